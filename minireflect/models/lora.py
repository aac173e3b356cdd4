"""Low-rank adapters: a large layer stays as it is, and learns a small difference.

    Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685, section 4.1

    y = W x + (alpha / r) B A x,     A (r in) random, B (out r) zero: at the start nothing changes

    add_lora(unet, LoRAConfig(rank=4))          q, k, v and out of every attention learn, all else is frozen
    save_lora("lora.safetensors", unet)         as diffusers' pipe.load_lora_weights reads it
    load_lora(unet, "lora.safetensors")         ours, diffusers', or peft's

Differs from peft: an adapter is no wrapper around a layer but a layer that knows it, so that the names of the weights below
stay what they were.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .names import DIFFUSERS_UNET
from .weights import WeightsError, new_names, read_metadata, read_weights, save_weights


@dataclass(frozen=True)
class LoRAConfig:
    rank: int = 4  # r
    alpha: float | None = None  # the difference is scaled by alpha / rank; None = rank, that is by 1
    targets: tuple[str, ...] = (
        "q",
        "k",
        "v",
        "out",
    )  # ends of the names of linear layers, such as "cross_attn.q" or "ff.up"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")
        if self.alpha is not None and self.alpha <= 0:
            raise ValueError(f"alpha must be positive, got {self.alpha}")
        if not self.targets:
            raise ValueError("targets is empty: name the layers that are to learn, such as q k v out")


class LoRA(nn.Module):
    """The two small matrices, in float32 whatever the layer's precision: small steps would vanish in half."""

    def __init__(self, width_in: int, width_out: int, rank: int, generator: torch.Generator | None) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(rank, width_in))
        self.B = nn.Parameter(torch.zeros(width_out, rank))
        nn.init.uniform_(
            self.A, -(width_in**-0.5), width_in**-0.5, generator
        )  # as peft, and as every nn.Linear


class LoRALinear(nn.Linear):
    """A linear layer with an adapter.  `scale` 0 turns the adapter off."""

    def __init__(
        self, layer: nn.Linear, rank: int, scale: float, generator: torch.Generator | None = None
    ) -> None:
        nn.Module.__init__(self)  # takes over the layer's own tensors, makes none
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        self.scale = scale
        self.lora = LoRA(self.in_features, self.out_features, rank, generator).to(layer.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: x (b t d) -> (b t e)"""
        y = F.linear(x, self.weight, self.bias)  # (b t e)
        if self.scale == 0:
            return y
        return y + self.scale * F.linear(F.linear(x, self.lora.A.to(x.dtype)), self.lora.B.to(x.dtype))


def lora_layers(module: nn.Module) -> dict[str, LoRALinear]:
    """The layers with an adapter, by name."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, LoRALinear)}


def add_lora(module: nn.Module, config: LoRAConfig, generator: torch.Generator | None = None) -> nn.Module:
    """Give every linear layer whose name ends as a target an adapter, and freeze all else.  Raises ValueError when there is none.

    `generator`, on the CPU, draws A; without it the global one does.
    """
    if lora_layers(module):
        raise ValueError("this network has LoRA already; merge_lora or remove_lora it first")
    ends = tuple(f".{t}" for t in config.targets)
    chosen = {n: m for n, m in module.named_modules() if f".{n}".endswith(ends)}
    for target, end in zip(config.targets, ends):
        if not any(f".{n}".endswith(end) for n in chosen):
            raise ValueError(f"no layer's name ends in {target!r}; try q, k, v, out, ff.up or ff.down")
    scale = (config.alpha or config.rank) / config.rank
    _install(module, {name: (config.rank, scale) for name in chosen}, generator)
    return module


def _install(
    module: nn.Module, layers: dict[str, tuple[int, float]], generator: torch.Generator | None = None
) -> None:
    module.requires_grad_(False)
    for name, (rank, scale) in layers.items():
        layer = module.get_submodule(name)
        if not isinstance(layer, nn.Linear):
            raise ValueError(f"{name} is a {type(layer).__name__}; LoRA goes on linear layers")
        parent, _, last = name.rpartition(".")
        setattr(module.get_submodule(parent), last, LoRALinear(layer, rank, scale, generator))


def adapters(module: nn.Module) -> nn.ModuleDict:
    """All that is trained, as a module of its own to save, to resume and to optimise; empty without LoRA."""
    return nn.ModuleDict({name.replace(".", "/"): layer.lora for name, layer in lora_layers(module).items()})


@torch.no_grad()
def merge_lora(module: nn.Module) -> nn.Module:
    """Add every difference to its layer, which becomes an ordinary one: as fast as before, W + (alpha / r) B A."""
    for layer in lora_layers(module).values():
        delta = layer.scale * layer.lora.B.double() @ layer.lora.A.double()
        layer.weight = nn.Parameter(
            (layer.weight.double() + delta).to(layer.weight.dtype), requires_grad=False
        )
    return remove_lora(module)


@torch.no_grad()
def unmerge_lora(module: nn.Module, path: str | Path) -> nn.Module:
    """Subtract the differences of a file that were merged, to within rounding."""
    for name, (A, B, scale) in _checked(module, read_lora(path), path).items():
        weight = module.get_submodule(name).weight
        weight.copy_((weight.double() - scale * B.double() @ A.double()).to(weight.dtype))
    return module


def remove_lora(module: nn.Module) -> nn.Module:
    """The network as it was before `add_lora`: the same layers, without their adapters."""
    for name, layer in lora_layers(module).items():
        plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        plain.weight, plain.bias = layer.weight, layer.bias
        parent, _, last = name.rpartition(".")
        setattr(module.get_submodule(parent), last, plain)
    return module


# --- files --------------------------------------------------------------------------------------------------

# Our names of a UNet's layers as diffusers has them: DIFFUSERS_UNET backwards, as far as linear layers go.
TO_DIFFUSERS = [
    (r"^(down|up)\.(\d+)\.layers\.(\d+)\.attn\.", r"\1_blocks.\2.attentions.\3."),
    (r"^mid\.layers\.0\.attn\.", "mid_block.attentions.0."),
    (r"^(down|up)\.(\d+)\.layers\.(\d+)\.res\.time$", r"\1_blocks.\2.resnets.\3.time_emb_proj"),
    (r"^mid\.layers\.(\d)\.res\.time$", r"mid_block.resnets.\1.time_emb_proj"),
    (r"^time\.fc", "time_embedding.linear_"),
    (r"^added\.fc", "add_embedding.linear_"),
    (r"\bblocks\.(\d+)\.self_attn\b", r"transformer_blocks.\1.attn1"),
    (r"\bblocks\.(\d+)\.cross_attn\b", r"transformer_blocks.\1.attn2"),
    (r"\bblocks\.(\d+)\.ff\.up$", r"transformer_blocks.\1.ff.net.0.proj"),
    (r"\bblocks\.(\d+)\.ff\.down$", r"transformer_blocks.\1.ff.net.2"),
    (r"\b(attn[12])\.(q|k|v)$", r"\1.to_\2"),
    (r"\b(attn[12])\.out$", r"\1.to_out.0"),
]

# Where a file ends a layer's name and says which matrix it is: A (or "down"), B (or "up").
ENDS = r"\.(?:lora_(A|B)(?:\.default)?|lora\.(down|up)|lora_(down|up))\.weight$"
PREFIX = r"^(?:base_model\.model\.|unet\.)+"
OUR_ALPHAS = "minireflect_alphas"


def save_lora(path: str | Path, unet: nn.Module) -> None:
    """The adapters of a UNet as safetensors, in the layout that diffusers' `load_lora_weights` reads.

    Readers differ in how they learn of alpha, so it is multiplied into B, and alpha / rank is 1 for whoever reads the file;
    what it was is kept in the header for `load_lora`.
    """
    layers = lora_layers(unet)
    if not layers:
        raise ValueError("there is no LoRA to save: call add_lora first")
    tensors, scales = {}, {}
    for name, layer in layers.items():
        theirs = f"unet.{next(iter(_renamed([name]).values()))}"
        tensors[f"{theirs}.lora_A.weight"] = layer.lora.A.detach().float().cpu()
        tensors[f"{theirs}.lora_B.weight"] = (layer.scale * layer.lora.B.detach().float()).cpu()
        scales[name] = layer.scale
    save_weights(path, tensors, {"format": "pt", OUR_ALPHAS: json.dumps(scales)})


def _renamed(layers: list[str]) -> dict[str, str]:
    return new_names(layers, TO_DIFFUSERS)


def read_lora(path: str | Path) -> dict[str, tuple[Tensor, Tensor, float]]:
    """A, B and alpha / rank of every layer of a file, by our names.  Raises WeightsError naming what is no adapter of a UNet."""
    tensors = read_weights(path)
    metadata = read_metadata(path) if Path(path).suffix == ".safetensors" else {}
    pairs: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, float] = {}
    strange = []
    for name, tensor in tensors.items():
        bare = re.sub(
            r"\.processor\.(to_\w+)_lora\.", r".\1.lora.", re.sub(PREFIX, "", name)
        )  # the oldest files
        if bare.endswith(".alpha"):
            alphas[bare.removesuffix(".alpha")] = float(tensor)
            continue
        match = re.search(ENDS, bare)
        if match is None or name.startswith("text_encoder"):
            strange.append(f"{name} {tuple(tensor.shape)}")
            continue
        side = "A" if (match[1] or match[2] or match[3]) in ("A", "down") else "B"
        pairs.setdefault(bare[: match.start()], {})[side] = tensor
    halves = [f"{n}: missing lora_{'B' if 'A' in p else 'A'}.weight" for n, p in pairs.items() if len(p) < 2]
    if strange or halves or not pairs:
        some = "; ".join((strange + halves)[:10]) or "it is empty"
        raise WeightsError(f"{path} is not a LoRA of a UNet that can be read whole: {some}")
    stated = json.loads(
        metadata.get("lora_adapter_metadata", "{}")
    )  # as recent versions of diffusers write it
    r, alpha = stated.get("unet.r"), stated.get("unet.lora_alpha")
    ours = json.loads(metadata.get(OUR_ALPHAS, "{}"))
    found = {}
    table = [(r"$", ".weight"), *DIFFUSERS_UNET, (r"\.weight$", "")]
    for theirs, name in new_names(pairs, table).items():
        A, B = pairs[theirs]["A"].flatten(1), pairs[theirs]["B"].flatten(1)  # 1x1 convolutions, in some files
        scale = alphas[theirs] / len(A) if theirs in alphas else alpha / r if r and alpha else 1.0
        if name in ours:
            scale, B = ours[name], B / ours[name]
        found[name] = (A, B, scale)
    return found


def _checked(
    module: nn.Module, layers: dict[str, tuple[Tensor, Tensor, float]], path: str | Path
) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Every layer of a file must be one of the network's, and of its size."""
    wrong = []
    known = dict(module.named_modules())
    for name, (A, B, _) in layers.items():
        layer = known.get(name)
        if not isinstance(layer, nn.Linear):
            wrong.append(f"extra {name}" + ("" if layer is None else f", a {type(layer).__name__}"))
        elif (A.shape[1], B.shape[0]) != (layer.in_features, layer.out_features) or A.shape[0] != B.shape[1]:
            expected = f"(r {layer.in_features}) and ({layer.out_features} r)"
            wrong.append(
                f"misshapen {name}: expected {expected}, found {tuple(A.shape)} and {tuple(B.shape)}"
            )
    if wrong:
        raise WeightsError(
            f"{path} does not fit this network, {len(wrong)} of {len(layers)} layers:\n  "
            + "\n  ".join(wrong[:10])
        )
    return layers


def load_lora(module: nn.Module, path: str | Path) -> nn.Module:
    """Put the adapters of a file on a UNet, and freeze all else.  Raises WeightsError naming each layer that does not fit."""
    if lora_layers(module):
        raise ValueError("this network has LoRA already; merge_lora or remove_lora it first")
    layers = _checked(module, read_lora(path), path)
    _install(module, {name: (len(A), scale) for name, (A, _, scale) in layers.items()})
    with torch.no_grad():
        for name, (A, B, _) in layers.items():
            lora = module.get_submodule(name).lora
            lora.A.copy_(A), lora.B.copy_(B)
    return module
