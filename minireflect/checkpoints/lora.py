"""Read and write LoRA files of the UNet and the text encoders.

    save_lora("lora.safetensors", unet)         write the adapters of models/lora.py in diffusers' format
    load_lora(pipe, "lora.safetensors", 0.8)    add a file's adapters to a pipeline, or to a UNet alone

Files of minireflect, diffusers, peft, kohya and older tools can be read.  Loading is strict: every layer in
the file must fit.
"""

import json
import math
import re
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from ..disk import Place, parse_json
from ..models.clip import TwoTextEncoders
from ..models.lora import install, lora_layers, takes_lora
from ..pipeline import LatentDiffusion
from ..ranges import Finite, Positive, all_finite, expect, quote
from . import files, names
from .files import WeightsError, named_as, new_names
from .parts import warn_of_metadata, weights_file
from .stated import check, check_names

Target = LatentDiffusion | nn.Module
NETWORKS = ("unet", "text_encoder", "text_encoder_2")
PEFT = "adapter_model"  # name of a file of peft, which has adapter_config.json beside it
STEMS = PEFT, "pytorch_lora_weights"  # names of the file in a folder
OUR_ALPHAS = "minireflect_alphas"  # metadata key of our files: layer name -> alpha / r

# kohya writes _ for every dot in a layer's name.  WORDS are the parts of names that contain a _ themselves.
KOHYA = {"unet": "unet", "te": "text_encoder", "te1": "text_encoder", "te2": "text_encoder_2"}
WORDS = """(?x) (?:down|up|mid|transformer|input|middle|output)_blocks? | time_emb_proj | label_emb
    | (?:time|add)_embed(?:ding)? | (?:emb|in|out)_layers | linear_[12] | conv_(?:in|out|shortcut)
    | skip_connection | text_model | text_projection | self_attn | proj_(?:in|out) | (?:[qkv]|out)_proj
    | to_(?:[qkv]|out) | [a-z0-9]+"""

# A table from the tensor names of all tools to NETWORK.LAYER/A, NETWORK.LAYER/B or NETWORK.LAYER/alpha.
SPELLINGS = [
    (r"^((base_model\.)?model\.|diffusion_model\.)+", ""),
    (r"^text_encoders\.clip_[lh]\.transformer\.", "text_encoder."),  # ComfyUI's own, as clip_g
    (r"^text_encoders\.clip_g\.transformer\.", "text_encoder_2."),
    (r"^lora_(unet|te[12]?)_([^.]+)", lambda m: ".".join([KOHYA[m[1]], *re.findall(WORDS, m[2])])),
    (r"^(?=(text_model|encoder)\.)", "text_encoder."), (r"^(?!(unet|text_encoder(_2)?)\.)", "unet."),
    (r"\.processor\b", ""), (r"([._]lora(_linear_layer)?([._](A|B|down|up))?)?\.(lora_)?alpha$", "/alpha"),
    (r"[._]lora(_linear_layer)?[._](A|down)(\.[^.]+)?\.weight$", "/A"),
    (r"[._]lora(_linear_layer)?[._](B|up)(\.[^.]+)?\.weight$", "/B"),
]  # fmt: skip


class Adapter(NamedTuple):
    """The adapter of one layer:  y = W x + scale B A x."""

    A: Tensor  # (r in)
    B: Tensor  # (out r)
    scale: float  # alpha / r


def save_lora(path: Place, unet: nn.Module) -> None:
    """Write the adapters of a UNet as safetensors, in the layout that diffusers' `load_lora_weights` reads.

    Tools expect alpha in different places.  Hence B is saved multiplied by alpha / r, and no alpha is saved,
    which means a scale of 1.  `load_lora` finds the original scale in the metadata.
    Raises ValueError when the UNet has no adapters.
    """
    if not (layers := lora_layers(unet)):
        raise ValueError("there is no LoRA to save: call add_lora first")
    tensors = {}
    for name, theirs in new_names(layers, names.TO_DIFFUSERS).items():
        layer, kernel = layers[name], layers[name].weight.shape[2:]  # kernel is (1 1) for a convolution
        for side, matrix in {"A": layer.lora.A, "B": layer.scale * layer.lora.B}.items():
            tensors[f"unet.{theirs}.lora_{side}.weight"] = matrix.detach().view(*matrix.shape, *kernel)
    scales = {name: layer.scale for name, layer in layers.items()}
    files.save_weights(path, tensors, {"format": "pt", OUR_ALPHAS: json.dumps(scales)})


def read_lora(path: Place, res_blocks: int = 2) -> dict[str, Adapter]:
    """The adapters in a file, by network and our name of the layer, such as "unet.down.0...".

    `res_blocks` is the number of residual blocks per level of the UNet.  It is needed for files with the
    block numbers of the original code.
    Raises WeightsError when a tensor is not part of a LoRA, or is not supported; the error names it.
    """
    if all(any(Path(path).glob(f"{stem}.*")) for stem in STEMS):
        raise WeightsError(f"{path} has two LoRAs, {' and '.join(STEMS)}; give the path of one of the files")
    path = weights_file(Path(path), STEMS)
    tensors = files.read_weights(path)
    check_names("LoRA", tensors, path)
    warn_of_metadata(path)
    lost: list[str] = []
    layers: dict[str, dict[str, Tensor]] = {}  # NETWORK.LAYER in the names of the file -> A, B, alpha
    for name, spelled in new_names(tensors, SPELLINGS, path).items():
        layer, slash, kind = spelled.rpartition("/")
        if slash:
            layers.setdefault(layer, {})[kind] = tensors[name]
        else:
            lost.append(f"{name} {tuple(tensors[name].shape)}")
    for layer, found in layers.items():
        lost += [f"{layer}: missing lora_{side}.weight" for side in "AB" if side not in found]
    if lost or not layers:
        some = "; ".join(lost[: files.SHOWN]) or f"it has {files.first_names(tensors)}"
        raise WeightsError(f"{path} is not a complete LoRA of a UNet or text encoder: {some}")
    about, unet = files.read_metadata(path), [*names.DIFFUSERS_UNET, *names.numbered(res_blocks + 1)]
    adapters: dict[str, Adapter] = {}
    with named_as(str(path), ValueError):
        ours = parse_json(about.get(OUR_ALPHAS, "{}"), dict[str, Positive], OUR_ALPHAS)
        stated = _configuration(path, about, any(n.startswith("base_model.") for n in tensors))
    for network in NETWORKS:
        inside = names.inside(layers, f"{network}.")
        table = unet if network == "unet" else names.TRANSFORMERS_CLIP_TEXT
        for theirs, name in new_names(inside, [(r"$", ".lora"), *table, (r"\.lora$", "")], path).items():
            A, B, alpha = _numbers(f"{path} has {theirs}", inside[theirs])
            scale = _scale(path, stated[network], theirs, len(A), alpha)
            adapters[f"{network}.{name}"] = Adapter(A, B / ours.get(name, 1.0), ours.get(name, scale))
    return adapters


def _numbers(source: str, found: dict[str, Tensor]) -> tuple[Tensor, Tensor, float | None]:
    """A, B and alpha of a layer.  Raises WeightsError unless they are two matrices and a number."""
    A, B, alpha = (found.get(kind) for kind in ("A", "B", "alpha"))
    matrices = all(t.ndim > 1 and t.numel() and t.is_floating_point() and all_finite(t) for t in (A, B))
    if not matrices or (alpha is not None and (alpha.numel() != 1 or alpha.is_complex())):
        shapes = ", ".join(f"{kind} {tuple(t.shape)} {t.dtype}" for kind, t in found.items())
        raise WeightsError(f"{source} with {shapes}; expected matrices of finite numbers, and one alpha")
    if max(A.shape[2:] + B.shape[2:], default=1) > 1:
        raise WeightsError(f"{source}, a convolution LoRA of shape {tuple(A.shape)}; only 1x1 is supported")
    if len(A) != B.shape[1]:
        raise WeightsError(f"{source} with A of rank {len(A)}, but B of rank {B.shape[1]}")
    with named_as(source, ValueError):
        alpha = None if alpha is None else expect(float(alpha), Finite, "alpha")
    return A.flatten(1), B.flatten(1).float(), alpha


def _configuration(path: Path, about: dict[str, str], peft: bool) -> dict[str, dict]:
    """The LoRA configuration of each network: of diffusers in the metadata, of peft in a file beside it."""
    header = parse_json(about.get("lora_adapter_metadata", "{}"), dict, "lora_adapter_metadata")
    for_all = {key: value for key, value in header.items() if not key.startswith(NETWORKS)}
    if not header and (peft or path.stem == PEFT):
        for_all = files.read_json(path.parent / "adapter_config.json")
    found = {network: for_all | names.inside(header, f"{network}.") for network in NETWORKS}
    return {name: check("LoRA's configuration", c, "its configuration") for name, c in found.items()}


def _scale(path: Path, config: dict, layer: str, rank: int, alpha: float | None) -> float:
    """alpha / r, or alpha / sqrt(r) with `use_rslora` (arXiv 2312.03732).

    rank and alpha are those of the tensors.  Without a tensor alpha, `alpha_pattern` or `lora_alpha` in the
    configuration state it; otherwise it is r.  A pattern matches the end of a layer's name, as in peft.
    Raises WeightsError when the configuration states another r or alpha than the tensors.
    """
    stated_rank = _matched(config, "rank_pattern", layer, config.get("r"))
    stated_alpha = _matched(config, "alpha_pattern", layer, config.get("lora_alpha"))
    both = ("rank", "r", rank, stated_rank), ("alpha", "lora_alpha", alpha, stated_alpha)
    for what, key, has, said in both:
        if None not in (has, said) and not math.isclose(has, said, rel_tol=4e-3):  # alpha may be in bfloat16
            odd = f"{what} {has:g}, but its configuration says {said:g} ({what}_pattern or {key})"
            raise WeightsError(f"{path}: the tensors of {layer} have {odd}")
    alpha = next(value for value in (alpha, stated_alpha, rank) if value is not None)
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _matched(config: dict, key: str, layer: str, general: float | None) -> float | None:
    """The value of the first pattern that matches the end of a layer's name, as in peft; else `general`."""
    patterns = config.get(key) or {}
    with named_as(f"{key} {quote(list(patterns))}", re.error, OverflowError, RecursionError):
        if any(re.search(r"\)[*+?{]", p) or len(re.findall(r"[*+?({]", p)) > 4 for p in patterns):
            raise re.error("repeated groups, or more than four repetitions, may take too long")
        found = (value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", layer))
        return next(found, general)


def load_lora(target: Target, path: Place, strength: float = 1.0) -> Target:
    """Add the adapters of a file to a pipeline, or to a UNet alone, and freeze the networks they are in.

    `strength` multiplies the updates of all adapters.  Raises WeightsError, which names the layers that do
    not fit, and ValueError when a network already has adapters.
    """
    expect(strength, Finite, "strength")
    networks = networks_of(target) if isinstance(target, LatentDiffusion) else {"unet": target}
    adapters = read_lora(path, networks["unet"].config.res_blocks)
    whole = nn.ModuleDict({n: m for n, m in networks.items() if any(k.startswith(f"{n}.") for k in adapters)})
    known, wrong = dict(whole.named_modules()), {"extra": [], "misshapen": []}
    for name, (A, B, _) in adapters.items():
        layer = known.get(name)
        if not takes_lora(layer):
            wrong["extra"].append(name + ("" if layer is None else f", a {type(layer).__name__}"))
        elif (A.shape[1], B.shape[0]) != (layer.weight.shape[1], len(layer.weight)) or len(A) != B.shape[1]:
            fits = f"(r {layer.weight.shape[1]}) and ({len(layer.weight)} r)"
            wrong["misshapen"].append(f"{name}: expected {fits}, found {tuple(A.shape)} and {tuple(B.shape)}")
    files.refuse(f"{path} does not fit this network: of {len(adapters)} layers", wrong)
    install(whole, {name: (len(found.A), strength * found.scale) for name, found in adapters.items()}, None)
    for name, found in adapters.items():
        known[name].lora.load_state_dict({"A": found.A, "B": found.B})
    return target


def networks_of(pipe: LatentDiffusion) -> dict[str, nn.Module]:
    """The networks that a LoRA can adapt, by their names in NETWORKS: the UNet, one or two text encoders."""
    text = pipe.text_encoder
    texts = (text.first, text.second) if isinstance(text, TwoTextEncoders) else (text,)
    return dict(zip(NETWORKS, (pipe.unet, *texts)))
