"""Sizes read off the tensors of a checkpoint, under our names: what a configuration file must tell is only what no shape can.

A tensor's shape gives channels, depths and widths.  The number of attention heads, of groups in a norm, or the scale of the latents
it does not give: those stand in a part's config.json, or are what the family was published with.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from torch import Tensor

from ..models.autoencoder import AutoencoderConfig
from ..models.clip import TextConfig
from ..models.tokenizer import BytePairs, NoVocabulary, TwoBytePairs
from ..models.unet import UNetConfig
from . import names
from .files import WeightsError, new_names, read_weights, tensor_shapes

# Where the parts of a published checkpoint lie, and their tensors under our names.
#
#     a diffusers folder      model_index.json, and a folder for each part with config.json and its weights
#     an original file        all parts in one, told apart by prefixes; no configuration, no vocabulary
#
# What becomes of them is the business of checkpoints.py.

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Family:
    """What the tensors of a family do not tell; configuration files, where there are any, know better."""

    name: str
    heads: int | None  # of the UNet's attention: a number for all levels ...
    head_width: int | None  # ... or channels for each
    scaling_factor: float  # of the latents: 1 / their standard deviation
    image_size: int  # pixels
    prediction: Literal["epsilon", "v", "x0"] = "epsilon"


SD1 = Family("SD 1.x", heads=8, head_width=None, scaling_factor=0.18215, image_size=512)


SD2 = Family("SD 2.x", heads=None, head_width=64, scaling_factor=0.18215, image_size=768, prediction="v")


SDXL = Family("SDXL", heads=None, head_width=64, scaling_factor=0.13025, image_size=1024)


class Part(NamedTuple):
    """A network's tensors under our names, and where they came from."""

    tensors: Tensors
    config: dict  # the part's config.json, or what else is known
    source: str  # for error messages


def count(tensors: Tensors, pattern: str) -> int:
    """How many numbers a place in the names counts up to."""
    return 1 + max((int(m[1]) for name in tensors if (m := re.match(pattern, name))), default=-1)


def need(tensors: Tensors, name: str, source: str) -> Tensor:
    if name not in tensors:
        raise WeightsError(
            f"missing {name} in {source}, which has {', '.join(list(tensors)[:3]) or 'no tensors'}"
        )
    return tensors[name]


# What a configuration may ask for that our UNet does not do; all published SD 1.x, 2.x and SDXL agree on these.
ASSUMED = {
    "act_fn": "silu", "flip_sin_to_cos": True, "freq_shift": 0, "center_input_sample": False, "norm_eps": 1e-5,
    "class_embed_type": None, "resnet_time_scale_shift": "default", "mid_block_scale_factor": 1, "downsample_padding": 1,
    "dual_cross_attention": False, "only_cross_attention": False, "time_embedding_type": "positional",
    "encoder_hid_dim": None, "timestep_post_act": None,
}  # fmt: skip


def unet_sizes(part: Part, family: Family) -> UNetConfig:
    """The configuration of a UNet from its tensors; heads and groups from config.json, or as the family has them."""
    tensors, config, source = part
    for key, value in ASSUMED.items():
        if config.get(key, value) != value:
            raise WeightsError(f"{source} asks for {key} = {config[key]!r}; this UNet does {value!r} only")
    conv_in = need(tensors, "conv_in.weight", source)
    if conv_in.shape[1] != 4:
        raise WeightsError(
            f"{source} reads {conv_in.shape[1]} channels, as for inpainting; only text to image (4) is supported"
        )
    levels = count(tensors, r"down\.(\d+)\.")
    channels = tuple(
        need(tensors, f"down.{i}.layers.0.res.conv1.weight", source).shape[0] for i in range(levels)
    )
    depths = tuple(count(tensors, rf"down\.{i}\.layers\.0\.attn\.blocks\.(\d+)\.") for i in range(levels))
    context = next((t.shape[1] for n, t in tensors.items() if n.endswith("cross_attn.k.weight")), 0)
    linear = next((t.ndim == 2 for n, t in tensors.items() if n.endswith("attn.proj_in.weight")), False)
    heads, head_width = family.heads, family.head_width
    stated = config.get("num_attention_heads") or config.get("attention_head_dim")  # heads, despite its name
    if isinstance(stated, int):
        heads, head_width = stated, None
    elif stated:
        widths = {c // h for c, h in zip(channels, stated)}
        if len(widths) > 1:
            raise WeightsError(f"{source}: heads {stated} at channels {channels} are of several widths")
        heads, head_width = None, widths.pop()
    pooled, size_width = None, config.get("addition_time_embed_dim") or 256
    if "added.fc1.weight" in tensors:
        pooled = tensors["added.fc1.weight"].shape[1] - 6 * size_width
    return UNetConfig(
        channels, depths, count(tensors, r"mid\.layers\.0\.attn\.blocks\.(\d+)\."), context,
        count(tensors, r"down\.0\.layers\.(\d+)\."), heads, head_width, linear, conv_in.shape[1],
        need(tensors, "conv_out.weight", source).shape[0], config.get("norm_num_groups") or 32, pooled, 6, size_width,
    )  # fmt: skip


def autoencoder_sizes(part: Part, family: Family) -> AutoencoderConfig:
    tensors, config, source = part
    levels = count(tensors, r"encoder\.down\.(\d+)\.")
    return AutoencoderConfig(
        tuple(need(tensors, f"encoder.down.{i}.layers.0.res.conv1.weight", source).shape[0] for i in range(levels)),
        count(tensors, r"encoder\.down\.0\.layers\.(\d+)\."),
        config.get("norm_num_groups") or 32,
        need(tensors, "encoder.conv_in.weight", source).shape[1],
        need(tensors, "post_quant_conv.weight", source).shape[0],
        config.get("scaling_factor") or family.scaling_factor,
        "encoder.mid.layers.0.attn.norm.weight" in tensors,
    )  # fmt: skip


def text_sizes(
    tensors: Tensors, config: dict, source: str, penultimate: bool, prefix: str = ""
) -> TextConfig:
    """`penultimate` is SDXL's habit, and is not written down anywhere in a checkpoint."""
    vocabulary, width = need(tensors, f"{prefix}token.weight", source).shape
    eos = config.get("eos_token_id", vocabulary - 1)
    projection = tensors.get("text_projection.weight") if not prefix else None
    activation = config.get("hidden_act", "quick_gelu")  # transformers' own default
    if activation not in ("quick_gelu", "gelu"):
        raise WeightsError(f"{source} asks for hidden_act = {activation!r}; expected quick_gelu or gelu")
    return TextConfig(
        vocabulary,
        vocabulary - 1
        if eos == 2
        else eos,  # 2: a mistake in the files of that time, which the libraries know as such
        len(need(tensors, f"{prefix}position.weight", source)),
        width,
        count(tensors, re.escape(prefix) + r"blocks\.(\d+)\."),
        config.get("num_attention_heads") or width // 64,  # 64 channels a head in all published text towers
        activation == "quick_gelu",
        penultimate,
        None if projection is None else projection.shape[0],
    )


STEMS = ("diffusion_pytorch_model", "model", "pytorch_model", "open_clip_model", "open_clip_pytorch_model")


ENDINGS = (  # safetensors before torch files, full precision before half, in several parts before one
    ".safetensors.index.json", ".safetensors", ".safetensors.index.fp16.json", ".fp16.safetensors",
    ".bin.index.json", ".bin", ".bin.index.fp16.json", ".fp16.bin",
)  # fmt: skip


def weights_file(folder: Path) -> Path:
    """The file with a part's tensors, or the index of several.  Raises WeightsError when there is none."""
    for ending in ENDINGS:
        for stem in STEMS:
            if (folder / f"{stem}{ending}").is_file():
                return folder / f"{stem}{ending}"
    raise WeightsError(
        f"there are no weights in {folder}: expected {STEMS[0]}{ENDINGS[1]}, or another of its names and endings"
    )


def read_json(path: Path) -> dict:
    """A configuration file; empty if there is none."""
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise WeightsError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise WeightsError(f"{path} holds a {type(values).__name__}, expected a configuration")
    return values


DIFFUSERS_TABLES = {
    "unet": names.DIFFUSERS_UNET,
    "vae": names.DIFFUSERS_AUTOENCODER,
    "text_encoder": names.TRANSFORMERS_CLIP_TEXT,
    "text_encoder_2": names.TRANSFORMERS_CLIP_TEXT,
}


AnyTokenizer = BytePairs | TwoBytePairs | NoVocabulary


ReadTokenizer = Callable[[Family, int], AnyTokenizer]  # of prompts of so many tokens


def parts_of_folder(path: Path, tokenizer: str | Path | None) -> tuple[dict[str, Part], ReadTokenizer]:
    """A folder as diffusers writes it."""
    index = read_json(path / "model_index.json")
    if not index:
        raise WeightsError(f"{path} is not a diffusers folder: model_index.json is missing")
    parts = {"index": Part({}, index, "model_index.json")}
    for part, table in DIFFUSERS_TABLES.items():
        if (index.get(part) or [None])[0] is None and not (path / part).is_dir():
            continue
        file = weights_file(path / part)
        tensors = names_as_ours(read_weights(file), table, file)
        parts[part] = Part(tensors, read_json(path / part / "config.json"), str(file))
    for part in ("unet", "vae"):
        if part not in parts:
            raise WeightsError(f"{path} has no folder {part}: not a checkpoint of Stable Diffusion")
    if "text_encoder" not in parts and "text_encoder_2" not in parts:
        raise WeightsError(f"{path} has no folder text_encoder: not a checkpoint of Stable Diffusion")
    parts["scheduler"] = Part({}, read_json(path / "scheduler" / "scheduler_config.json"), "scheduler")

    def read(family: Family, length: int) -> AnyTokenizer:
        if tokenizer is not None:
            return _tokenizer_for(family, Path(tokenizer), length)
        if not (path / "tokenizer").is_dir():
            return _no_vocabulary(path, family, length)
        first = BytePairs(path / "tokenizer", length)
        return first if family is not SDXL else TwoBytePairs(first, BytePairs(path / "tokenizer_2", length))

    return parts, read


def _no_vocabulary(path: Path, family: Family, length: int) -> NoVocabulary:
    return NoVocabulary(path, 2 * length if family is SDXL else length)


# Beside the networks, original files hold the schedule's tables (computed here) and a running average of the UNet
# (which the weights of published files already are).
LEFT_OUT = r"^(model_ema\.|denoiser\.|model\.diffusion_model$|(alphas|betas|sqrt|log_one_minus|posterior|lvlb)\w*$|logvar$|scale_factor$|v_pred$|ztsnr$)"


PREFIXES = {  # of the parts of an original file; the layout of a text encoder follows from its names
    "unet": ("model.diffusion_model.",),
    "vae": ("first_stage_model.",),
    "text_encoder": ("cond_stage_model.transformer.", "cond_stage_model.model.", "conditioner.embedders.0.transformer."),
    "text_encoder_2": ("conditioner.embedders.1.model.",),
}  # fmt: skip


def parts_of_file(path: Path, tokenizer: str | Path | None) -> tuple[dict[str, Part], ReadTokenizer]:
    """An original file: all parts in one, with prefixes."""
    shapes = tensor_shapes(path)
    prefixes = tuple(p for several in PREFIXES.values() for p in several)
    if not any(name.startswith(PREFIXES["unet"]) for name in shapes):
        some = ", ".join(list(shapes)[:3]) or "no tensors at all"
        raise WeightsError(
            f"{path} is not an original file of Stable Diffusion: it has {some}, expected model.diffusion_model..."
        )
    strange = [n for n in shapes if not n.startswith(prefixes) and not re.match(LEFT_OUT, n)]
    if strange:
        raise WeightsError(
            f"{path} has {len(strange)} tensors that belong to no part: {', '.join(strange[:10])}"
        )
    parts: dict[str, Part] = {}
    for part, several in PREFIXES.items():
        for prefix in several:
            if not any(name.startswith(prefix) for name in shapes):
                continue
            source = f"{path} ({prefix}*)"
            ours, config = _original(part, read_weights(path, prefix), source)
            parts[part] = Part(ours, config, source)
    for part in ("unet", "vae"):
        if part not in parts:
            raise WeightsError(f"{path} has no {part}: expected tensors {PREFIXES[part][0]}...")
    if "text_encoder" not in parts and "text_encoder_2" not in parts:
        raise WeightsError(f"{path} has no text encoder: expected tensors {PREFIXES['text_encoder'][0]}...")
    about = path.with_suffix(".yaml")  # published beside the file, where it is
    known = {"prediction_type": "v_prediction"} if "v_pred" in shapes else {}
    if about.is_file() and (
        stated := re.search(r"parameterization:\s*[\"']?(eps|v)\b", about.read_text("utf-8"))
    ):
        known = {"prediction_type": "v_prediction" if stated[1] == "v" else "epsilon"}
    parts["scheduler"] = Part({}, known, str(about))

    def read(family: Family, length: int) -> AnyTokenizer:
        for folder in [Path(tokenizer)] if tokenizer else [path.parent / "tokenizer", path.parent]:
            if tokenizer or any((folder / n).is_file() for n in ("tokenizer.json", "vocab.json")):
                return _tokenizer_for(family, folder, length)
        return _no_vocabulary(path, family, length)

    return parts, read


def _tokenizer_for(family: Family, folder: Path, length: int) -> BytePairs | TwoBytePairs:
    """OpenCLIP's encoders fill up with "!", the token 0, and OpenAI's with end-of-text."""
    if family is SD2:
        return BytePairs(folder, length, pad="!")
    end = BytePairs(folder, length, pad="<|endoftext|>")
    return end if family is SD1 else TwoBytePairs(end, BytePairs(folder, length, pad="!"))


def _original(part: str, tensors: Tensors, source: str) -> tuple[Tensors, dict]:
    """The tensors of a part of an original file under our names, and what its layout tells of its configuration."""
    if part == "unet":
        levels = 1 + sum(name.endswith(".0.op.weight") for name in tensors)
        blocks = count(tensors, r"input_blocks\.(\d+)\.")
        return names_as_ours(tensors, names.original_unet(levels, blocks // levels - 1), source), {}
    if part == "vae":
        levels = count(tensors, r"encoder\.down\.(\d+)\.")
        tensors, table = names.original_autoencoder(tensors, levels)
        return names_as_ours(tensors, table, source), {}
    if any(name.startswith("text_model.") for name in tensors):  # OpenAI's CLIP-L, in transformers' names
        return names_as_ours(tensors, names.TRANSFORMERS_CLIP_TEXT, source), {"hidden_act": "quick_gelu"}
    ours = names_as_ours(names.open_clip(tensors), names.OPEN_CLIP_TEXT, source)
    if part == "text_encoder":
        # SD 2.x reads what the last block but one writes, normalised, and never the last
        last = f"blocks.{count(ours, r'blocks.([0-9]+)[.]') - 1}."
        ours = {n: t for n, t in ours.items() if not n.startswith(last) and n != "text_projection.weight"}
    return ours, {"hidden_act": "gelu"}


def names_as_ours(tensors: Tensors, table: names.Table, source: str | Path) -> Tensors:
    """Renamed; a clash of two names is told with the file."""
    try:
        return {name: tensors[old] for old, name in new_names(tensors, table).items()}
    except WeightsError as error:
        raise WeightsError(f"{source}: {error}") from error
