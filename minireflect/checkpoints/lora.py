"""checkpoints.lora."""

import json
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from ..models.lora import install, lora_layers
from .files import WeightsError, new_names, read_metadata, read_weights, save_weights
from .names import DIFFUSERS_UNET

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

    Readers differ in how they learn of alpha, so it is multiplied into B, and alpha / rank is 1 for whoever
    reads the file; what it was is kept in the header for `load_lora`.
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
    """A, B and alpha / rank of every layer of a file, by our names.
    Raises WeightsError naming what is no adapter of a UNet.
    """
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
    """Put the adapters of a file on a UNet, and freeze all else.
    Raises WeightsError naming each layer that does not fit.
    """
    if lora_layers(module):
        raise ValueError("this network has LoRA already; merge_lora or remove_lora it first")
    layers = _checked(module, read_lora(path), path)
    install(module, {name: (len(A), scale) for name, (A, _, scale) in layers.items()})
    with torch.no_grad():
        for name, (A, B, _) in layers.items():
            lora = module.get_submodule(name).lora
            lora.A.copy_(A), lora.B.copy_(B)
    return module
