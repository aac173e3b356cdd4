"""LoRA files of a UNet: written as diffusers reads them; read as minireflect, diffusers, peft or older tools
write them.

save_lora("lora.safetensors", unet)         the adapters of models/lora.py
load_lora(unet, "lora.safetensors")         strict: every layer of the file has to fit
"""

import json
import re
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..models.lora import install, lora_layers
from .files import SHOWN, WeightsError, new_names, read_metadata, read_weights, refuse, save_weights
from .names import DIFFUSERS_UNET

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

# Prefixes of a layer's name, the oldest way to name a layer, and the ends that say which tensor it is.
PREFIX = r"^(?:base_model\.model\.|unet\.)+"
PROCESSOR = (r"\.processor\.(to_\w+)_lora\.", r".\1.lora.")
ENDS = r"\.(?:lora_(A|B)(?:\.default)?\.weight|lora[._](down|up)\.weight|(alpha))$"
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


def read_lora(path: str | Path) -> dict[str, Adapter]:
    """The adapter of every layer, by our names.
    Raises WeightsError naming each tensor that is not of a UNet's adapter.
    """
    layers: dict[str, dict[str, Tensor]] = {}
    strange = []
    for name, tensor in read_weights(path).items():
        bare = re.sub(*PROCESSOR, re.sub(PREFIX, "", name))
        match = re.search(ENDS, bare)
        if match is None or name.startswith("text_encoder"):
            strange.append(f"{name} {tuple(tensor.shape)}")
        else:
            kind = KINDS[match[1] or match[2] or match[3]]
            layers.setdefault(bare[: match.start()], {})[kind] = tensor
    layers = {name: found for name, found in layers.items() if found.keys() != {"alpha"}}
    for name, found in layers.items():
        strange += [f"{name}: missing lora_{side}.weight" for side in "AB" if side not in found]
    if strange or not layers:
        some = "; ".join(strange[:SHOWN]) or "it is empty"
        raise WeightsError(f"{path} is not a LoRA of a UNet that can be read whole: {some}")
    metadata = read_metadata(path)
    stated = json.loads(metadata.get("lora_adapter_metadata", "{}"))  # of recent versions of diffusers
    r, alpha = stated.get("unet.r"), stated.get("unet.lora_alpha")
    ours = json.loads(metadata.get(OUR_ALPHAS, "{}"))
    table = [(r"$", ".weight"), *DIFFUSERS_UNET, (r"\.weight$", "")]
    adapters = {}
    for theirs, name in new_names(layers, table).items():
        found = layers[theirs]
        A, B = found["A"].flatten(1), found["B"].flatten(1)  # 1x1 convolutions, in some files
        scale = float(found["alpha"]) / len(A) if "alpha" in found else alpha / r if r and alpha else 1.0
        adapters[name] = Adapter(A, B / ours[name], ours[name]) if name in ours else Adapter(A, B, scale)
    return adapters


def load_lora(module: nn.Module, path: str | Path) -> nn.Module:
    """Add the adapters of a file to a UNet, and freeze all else.
    Raises WeightsError naming each layer that does not fit.
    """
    adapters, known = read_lora(path), dict(module.named_modules())
    wrong: dict[str, list[str]] = {"extra": [], "misshapen": []}
    for name, (A, B, _) in adapters.items():
        layer = known.get(name)
        if not isinstance(layer, nn.Linear):
            wrong["extra"].append(name + ("" if layer is None else f", a {type(layer).__name__}"))
        elif (A.shape[1], B.shape[0]) != (layer.in_features, layer.out_features) or A.shape[0] != B.shape[1]:
            expected = f"(r {layer.in_features}) and ({layer.out_features} r)"
            found = f"{tuple(A.shape)} and {tuple(B.shape)}"
            wrong["misshapen"].append(f"{name}: expected {expected}, found {found}")
    refuse(f"{path} does not fit this network: of {len(adapters)} layers", wrong)
    install(module, {name: (len(found.A), found.scale) for name, found in adapters.items()}, None)
    with torch.no_grad():
        for name, found in adapters.items():
            lora = module.get_submodule(name).lora
            lora.A.copy_(found.A), lora.B.copy_(found.B)
    return module
