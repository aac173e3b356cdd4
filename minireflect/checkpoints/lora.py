"""LoRA files of UNet and text encoders: written as diffusers reads them; read as minireflect, diffusers,
peft, kohya or older tools write them.

save_lora("lora.safetensors", unet)         the adapters of models/lora.py
load_lora(pipe, "lora.safetensors", 0.8)    strict: every layer of the file has to fit; or of a UNet alone
"""

import json
import re
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..disk import parse_json
from ..models.clip import TwoTextEncoders
from ..models.lora import install, lora_layers, takes_lora
from ..pipeline import LatentDiffusion
from ..ranges import Finite, Positive, expect, quote
from .files import (
    SHOWN,
    Strings,
    WeightsError,
    first_names,
    named_as,
    new_names,
    read_json,
    read_metadata,
    read_weights,
    refuse,
    save_weights,
    typed,
)  # fmt: skip
from .names import DIFFUSERS_UNET, TRANSFORMERS_CLIP_TEXT, numbered
from .stated import check, check_names

Target = LatentDiffusion | nn.Module
PEFT_NAMES = ("adapter_model.safetensors", "adapter_model.bin")  # beside adapter_config.json

# Our names of a UNet's layers as diffusers has them: DIFFUSERS_UNET backwards, as far as linear layers go.
TO_DIFFUSERS = [
    (r"^(down|up)\.(\d+)\.layers\.(\d+)\.attn\.", r"\1_blocks.\2.attentions.\3."),
    (r"^mid\.layers\.0\.attn\.", "mid_block.attentions.0."),
    (r"^(down|up)\.(\d+)\.layers\.(\d+)\.res\.time$", r"\1_blocks.\2.resnets.\3.time_emb_proj"),
    (r"^mid\.layers\.(\d)\.res\.time$", r"mid_block.resnets.\1.time_emb_proj"),
    (r"^time\.fc", "time_embedding.linear_"), (r"^added\.fc", "add_embedding.linear_"),
    (r"\bblocks\.(\d+)\.self_attn\b", r"transformer_blocks.\1.attn1"),
    (r"\bblocks\.(\d+)\.cross_attn\b", r"transformer_blocks.\1.attn2"),
    (r"\bblocks\.(\d+)\.ff\.up$", r"transformer_blocks.\1.ff.net.0.proj"),
    (r"\bblocks\.(\d+)\.ff\.down$", r"transformer_blocks.\1.ff.net.2"),
    (r"\b(attn[12])\.(q|k|v)$", r"\1.to_\2"), (r"\b(attn[12])\.out$", r"\1.to_out.0"),
]  # fmt: skip

NETWORKS = {  # how the names of a network begin -> the network; diffusers', then kohya's
    "unet.": "unet", "text_encoder.": "text_encoder", "text_encoder_2.": "text_encoder_2",
    "lora_unet_": "unet", "lora_te_": "text_encoder", "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
}  # fmt: skip
# kohya writes a layer's name with _ for every dot; these words have a _ of their own.
WORDS = (
    "down_blocks|up_blocks|mid_block|transformer_blocks|time_emb_proj|time_embedding|add_embedding|proj_in"
    "|proj_out|to_out|to_[qkv]|input_blocks|middle_block|output_blocks|emb_layers|time_embed|label_emb"
    "|text_model|self_attn|[qkv]_proj|out_proj|linear_[12]|[a-z0-9]+"
)
# The oldest way to name a layer, and the ends that say which tensor it is.
PROCESSOR = (r"\.processor\.(to_\w+)_lora\.", r".\1.lora.")
ENDS = r"[._]lora(?:_linear_layer)?[._](A|B|down|up)(?:\.\w+)?\.weight$|\.(alpha)$"
KINDS = {"A": "A", "down": "A", "B": "B", "up": "B", "alpha": "alpha"}
OUR_ALPHAS = "minireflect_alphas"


class Adapter(NamedTuple):
    """What a file holds for one layer:  y = W x + scale B A x."""

    A: Tensor  # (r in)
    B: Tensor  # (out r)
    scale: float  # alpha / r


def save_lora(path: str | Path, unet: nn.Module) -> None:
    """The adapters of a UNet as safetensors, in the layout that diffusers' `load_lora_weights` reads.

    Readers differ in where they look for alpha, so B is multiplied by alpha / r, which is then 1 for all of
    them; `load_lora` finds the original value in the header.
    """
    layers = lora_layers(unet)
    if not layers:
        raise ValueError("there is no LoRA to save: call add_lora first")
    tensors = {}
    for name, theirs in new_names(layers, TO_DIFFUSERS).items():
        A, B, scale = layers[name].lora.A.detach(), layers[name].lora.B.detach(), layers[name].scale
        tensors[f"unet.{theirs}.lora_A.weight"] = A.float().cpu()
        tensors[f"unet.{theirs}.lora_B.weight"] = (scale * B.float()).cpu()
    scales = {name: layer.scale for name, layer in layers.items()}
    save_weights(path, tensors, {"format": "pt", OUR_ALPHAS: json.dumps(scales)})


def read_lora(path: str | Path, res_blocks: int = 2) -> dict[str, Adapter]:
    """The adapter of every layer, by our names, with "text_encoder." before those of a text encoder.

    `res_blocks` are those of the UNet's levels, for files that number its blocks as the original code does.
    Raises WeightsError at a tensor that is not of a LoRA, and says what it is.
    """
    path = next((p for name in PEFT_NAMES if (p := Path(path) / name).is_file()), Path(path))  # of a folder
    tensors = read_weights(path)
    check_names("LoRA", tensors, path)
    lost: list[str] = []
    layers: dict[tuple[str, str], dict[str, Tensor]] = {}  # network, layer by its dotted name
    for name, tensor in tensors.items():
        network, bare = _whose(re.sub(*PROCESSOR, name))
        if match := re.search(ENDS, bare):
            layers.setdefault((network, bare[: match.start()]), {})[KINDS[match[1] or match[2]]] = tensor
        else:
            lost.append(f"{name} {tuple(tensor.shape)}")
    layers = {name: found for name, found in layers.items() if found.keys() != {"alpha"}}
    for (network, name), found in layers.items():
        lost += [f"{network}.{name}: missing lora_{side}.weight" for side in "AB" if side not in found]
    if lost or not layers:
        some = "; ".join(lost[:SHOWN]) or f"it has {first_names(tensors)}"
        raise WeightsError(f"{path} is not a LoRA of a UNet or text encoder that can be read whole: {some}")
    about, adapters = read_metadata(path), {}
    with named_as(str(path), ValueError):
        ours = parse_json(about.get(OUR_ALPHAS, "{}"), dict[str, Positive], OUR_ALPHAS)
        stated = _configuration(path, about)
    for (network, theirs), found in layers.items():
        table = DIFFUSERS_UNET if network == "unet" else TRANSFORMERS_CLIP_TEXT
        original = re.match(r"(in|out)put_blocks\.|middle_block\.|time_embed\.|label_emb\.", theirs)
        table = numbered(res_blocks + 1) if original else table
        (name,) = new_names([theirs], [(r"$", ".weight"), *table, (r"\.weight$", "")]).values()
        name = name if network == "unet" else f"{network}.{name}"
        numbers = [t for kind, t in found.items() if kind == "alpha" and t.numel() == 1]
        matrices = [t for t in found.values() if t.ndim > 1 and t.numel() and t.is_floating_point()]
        if len(numbers) + len(matrices) < len(found) or len(matrices) < 2:
            shapes = ", ".join(f"{kind} {tuple(t.shape)} {t.dtype}" for kind, t in found.items())
            expected = "expected matrices of floats, and a number as alpha"
            raise WeightsError(f"{path} has {theirs} with {shapes}; {expected}")
        A, B = found["A"].flatten(1), found["B"].flatten(1).float()
        if found["A"].ndim == 4 and found["A"].shape[2:] != (1, 1):
            raise WeightsError(f"{path} has {theirs}, a convolution LoRA of {tuple(found['A'].shape)}")
        with named_as(str(path), ValueError, TypeError):
            alpha = expect(float(found["alpha"]), Finite, f"{theirs}.alpha") if "alpha" in found else None
        scale = ours.get(name) or _scale(stated.get(network, {}), theirs, len(A), alpha)
        adapters[name] = Adapter(A, B / ours.get(name, 1.0), scale)
    return adapters


def _whose(name: str) -> tuple[str, str]:
    """The network of a tensor, and its name inside: kohya's with the dots in their places."""
    name = re.sub(r"^(base_model\.model\.)+", "", name)
    for prefix, network in NETWORKS.items():
        if name.startswith(prefix):
            bare = name.removeprefix(prefix)
            if prefix.startswith("lora_"):
                layer, dot, end = bare.partition(".")
                bare = ".".join(re.findall(WORDS, layer)) + dot + end
            return network, bare
    return ("text_encoder" if name.startswith("text_model.") else "unet"), name


def _configuration(path: Path, about: Strings) -> dict[str, dict]:
    """What is stated of each network's alpha: by diffusers in the header, by peft in a file beside it."""
    header = parse_json(about.get("lora_adapter_metadata", "{}"), dict, "lora_adapter_metadata")
    found: dict[str, dict] = {}
    for key, value in header.items():
        network, _, key = key.partition(".")
        found.setdefault(network, {})[key] = value
    if not header and path.name in PEFT_NAMES:
        found = dict.fromkeys(NETWORKS.values(), read_json(path.parent / "adapter_config.json"))
    for config in found.values():
        typed(json.dumps(config), "its configuration")
    return {network: check("LoRA's configuration", config, path) for network, config in found.items()}


def _scale(config: dict, layer: str, rank: int, alpha: float | None) -> float:
    """alpha / r, or alpha / sqrt(r) with `use_rslora` (arXiv 2312.03732); alpha is r where nothing is said.

    A pattern of `alpha_pattern` names layers by the end of their names, as in peft.
    """
    if alpha is None:
        alpha = config.get("lora_alpha", rank)
        alpha = rank if alpha is None else alpha
        for pattern, value in (config.get("alpha_pattern") or {}).items():
            with named_as(f"alpha_pattern {quote(pattern)}", re.error):
                found = re.match(rf"(.*\.)?({pattern})$", layer)
            if found:
                alpha = value
                break
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def load_lora(target: Target, path: str | Path, strength: float = 1.0) -> Target:
    """Add the adapters of a file to a pipeline, or to a UNet alone, and freeze all else.

    `strength` multiplies what they change.  Raises WeightsError naming each layer that does not fit.
    """
    networks = networks_of(target) if isinstance(target, LatentDiffusion) else {"unet": target}
    known = {}
    for n, network in networks.items():
        known |= {("" if n == "unet" else f"{n}.") + name: m for name, m in network.named_modules()}
    adapters = read_lora(path, networks["unet"].config.res_blocks)
    wrong: dict[str, list[str]] = {"extra": [], "misshapen": []}
    for name, (A, B, _) in adapters.items():
        layer = known.get(name)
        if not takes_lora(layer):
            wrong["extra"].append(name + ("" if layer is None else f", a {type(layer).__name__}"))
        elif (A.shape[1], B.shape[0]) != (layer.weight.shape[1], len(layer.weight)) or len(A) != B.shape[1]:
            expected = f"(r {layer.weight.shape[1]}) and ({len(layer.weight)} r)"
            found = f"{tuple(A.shape)} and {tuple(B.shape)}"
            wrong["misshapen"].append(f"{name}: expected {expected}, found {found}")
    refuse(f"{path} does not fit this network: of {len(adapters)} layers", wrong)
    for network, module in networks.items():
        inside = {_inside(name, network): found for name, found in adapters.items() if _inside(name, network)}
        if inside:
            install(module, {name: (len(f.A), strength * f.scale) for name, f in inside.items()}, None)
        with torch.no_grad():
            for name, found in inside.items():
                lora = module.get_submodule(name).lora
                lora.A.copy_(found.A), lora.B.copy_(found.B)
    return target


def _inside(name: str, network: str) -> str:
    """The layer's name inside this network; empty when it is another's."""
    of, _, rest = name.partition(".")
    if of not in NETWORKS.values():
        return name if network == "unet" else ""
    return rest if of == network else ""


def networks_of(pipe: LatentDiffusion) -> dict[str, nn.Module]:
    """What a LoRA file can change: the UNet, and one text encoder or two."""
    text = pipe.text_encoder
    two = isinstance(text, TwoTextEncoders)
    texts = {"text_encoder": text.first, "text_encoder_2": text.second} if two else {"text_encoder": text}
    return {"unet": pipe.unet, **texts}
