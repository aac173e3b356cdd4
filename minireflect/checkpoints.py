"""Published checkpoints in our networks: Stable Diffusion 1.x, 2.x and SDXL, and CLIP, from a folder or a single file.

    pipe = load_checkpoint("stable-diffusion-v1-5")                  # what `load_pipeline` calls for it: the same LatentDiffusion
    clip, tokenizer = load_clip("CLIP-ViT-H-14")                     # a reward for real pictures: rl/rewards.py

    python -m minireflect.checkpoints PATH                           what is in it, which family, what does not match

Sizes are read off the tensors.  What tensors cannot tell (heads, prediction, schedule) stands in the configuration files of a
folder; a single file has none, and the values are then those that its family was published with.  Nothing is downloaded.
"""

import argparse
import json
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .diffusion.schedule import Prediction, Schedule, ScheduleConfig
from .models import names
from .models.autoencoder import Autoencoder, AutoencoderConfig
from .models.clip import (
    CLIP,
    OPENAI_MEAN,
    OPENAI_STD,
    CLIPConfig,
    TextConfig,
    TextEncoder,
    TwoTextEncoders,
    VisionConfig,
)
from .models.lora import read_lora
from .models.tokenizer import BytePairs, NoVocabulary, PromptError, TwoBytePairs
from .models.unet import UNet, UNetConfig
from .models.weights import TORCH_FILES, WeightsError, load_into, new_names, read_weights, tensor_shapes
from .pipeline import LatentDiffusion, is_checkpoint

Shapes = dict[str, tuple[int, ...]]
Tensors = dict[str, Tensor]
EOS = 49_407  # CLIP's end of text, the last of its vocabulary


@dataclass(frozen=True)
class Family:
    """What the tensors of a family do not tell; configuration files, where there are any, know better."""

    name: str
    heads: int | None  # of the UNet's attention: a number for all levels ...
    head_width: int | None  # ... or channels for each
    scaling_factor: float  # of the latents: 1 / their standard deviation
    image_size: int  # pixels
    prediction: Prediction = "epsilon"


SD1 = Family("SD 1.x", heads=8, head_width=None, scaling_factor=0.18215, image_size=512)
SD2 = Family("SD 2.x", heads=None, head_width=64, scaling_factor=0.18215, image_size=768, prediction="v")
SDXL = Family("SDXL", heads=None, head_width=64, scaling_factor=0.13025, image_size=1024)


class Part(NamedTuple):
    """A network's tensors under our names, and where they came from."""

    tensors: Tensors
    config: dict  # the part's config.json, or what else is known
    source: str  # for error messages


# --- the whole pipeline -------------------------------------------------------------------------------------


def load_checkpoint(
    path: str | Path,
    dtype: torch.dtype | None = None,
    tokenizer: str | Path | None = None,
    prediction: Prediction | None = None,
    image_size: int | None = None,
) -> LatentDiffusion:
    """A diffusers folder, or an original single file (.safetensors, .ckpt), of SD 1.x, SD 2.x or SDXL.

    `dtype` of UNet and text encoder is the file's when not given; the autoencoder is always float32, as SDXL's overflows in
    half precision.  `tokenizer` is a folder with CLIP's vocabulary, needed for single files that do not lie beside one.
    `prediction` ("epsilon", "v") and `image_size` (pixels) overrule what the checkpoint says.
    Raises WeightsError that names every tensor that is missing, left over or of another shape.
    """
    path = Path(path)
    if path.is_dir():
        parts, read_tokenizer = _folder(path, tokenizer)
    elif path.is_file():
        parts, read_tokenizer = _single_file(path, tokenizer)
    else:
        raise WeightsError(f"there is no checkpoint {path}")
    family = _family(parts, path)
    unet_config = unet_sizes(parts["unet"], family)
    unet = _filled(UNet, unet_config, parts["unet"], dtype)
    autoencoder = _filled(Autoencoder, autoencoder_sizes(parts["vae"], family), parts["vae"], torch.float32)
    text = _filled_text(parts, family, dtype)
    if text_width(text) != unet_config.context_width:
        raise WeightsError(
            f"{path}: the UNet reads prompts of width {unet_config.context_width}, the text encoder writes {text_width(text)}"
        )
    known = parts["scheduler"].config if "scheduler" in parts else {}
    schedule = _schedule(known, prediction, family, path)
    size = image_size or _image_size(parts["unet"].config, autoencoder.config.factor, family, schedule)
    if size % (autoencoder.config.factor * 2 ** (len(unet_config.channels) - 1)):
        multiple = autoencoder.config.factor * 2 ** (len(unet_config.channels) - 1)
        raise WeightsError(f"image_size {size} is not a multiple of {multiple} pixels, as this UNet needs")
    index = parts["index"].config if "index" in parts else {}
    return LatentDiffusion(
        read_tokenizer(family, text_length(text)), text, unet, autoencoder, Schedule(schedule), size,
        zero_null=family is SDXL and bool(index.get("force_zeros_for_empty_prompt", True)),
    )  # fmt: skip


def text_width(encoder: TextEncoder | TwoTextEncoders) -> int:
    """Width of the hidden states that an encoder writes."""
    if isinstance(encoder, TwoTextEncoders):
        return encoder.first.config.width + encoder.second.config.width
    return encoder.config.width


def text_length(encoder: TextEncoder | TwoTextEncoders) -> int:
    """Tokens of a prompt, for each encoder."""
    return (encoder.first if isinstance(encoder, TwoTextEncoders) else encoder).config.length


def _family(parts: dict[str, Part], path: Path) -> Family:
    """Told by what is there: a second text encoder, or how the attention is projected."""
    shapes = parts["unet"].tensors
    if "text_encoder_2" in parts:
        if "text_encoder" not in parts:
            raise WeightsError(f"{path} is SDXL's refiner, which only finishes the pictures of another model")
        return SDXL
    projection = [t for name, t in shapes.items() if name.endswith("attn.proj_in.weight")]
    if not projection:
        raise WeightsError(
            f"nothing in {path} is a UNet with attention: not a checkpoint of Stable Diffusion"
        )
    if "added.fc1.weight" in shapes:
        raise WeightsError(f"{path} has SDXL's UNet, but not its two text encoders")
    return (
        SD2
        if projection[0].ndim == 2 or parts["text_encoder"].tensors["token.weight"].shape[1] == 1024
        else SD1
    )


# --- where the parts lie ------------------------------------------------------------------------------------


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


def _json(path: Path) -> dict:
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


def _folder(path: Path, tokenizer: str | Path | None) -> tuple[dict[str, Part], ReadTokenizer]:
    """A folder as diffusers writes it."""
    index = _json(path / "model_index.json")
    if not index:
        raise WeightsError(f"{path} is not a diffusers folder: model_index.json is missing")
    parts = {"index": Part({}, index, "model_index.json")}
    for part, table in DIFFUSERS_TABLES.items():
        if index.get(part, [None])[0] is None and not (path / part).is_dir():
            continue
        file = weights_file(path / part)
        tensors = names_as_ours(read_weights(file), table, file)
        parts[part] = Part(tensors, _json(path / part / "config.json"), str(file))
    for part in ("unet", "vae"):
        if part not in parts:
            raise WeightsError(f"{path} has no folder {part}: not a checkpoint of Stable Diffusion")
    if "text_encoder" not in parts and "text_encoder_2" not in parts:
        raise WeightsError(f"{path} has no folder text_encoder: not a checkpoint of Stable Diffusion")
    parts["scheduler"] = Part({}, _json(path / "scheduler" / "scheduler_config.json"), "scheduler")

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


def _single_file(path: Path, tokenizer: str | Path | None) -> tuple[dict[str, Part], ReadTokenizer]:
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
    everything = read_weights(path) if path.suffix in TORCH_FILES else None  # a torch file is unpickled once
    parts: dict[str, Part] = {}
    for part, several in PREFIXES.items():
        for prefix in several:
            if not any(name.startswith(prefix) for name in shapes):
                continue
            if everything is None:
                tensors = read_weights(path, prefix)
            else:
                tensors = {n.removeprefix(prefix): t for n, t in everything.items() if n.startswith(prefix)}
            source = f"{path} ({prefix}*)"
            ours, config = _original(part, tensors, source)
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
        blocks = _count(tensors, r"input_blocks\.(\d+)\.")
        return names_as_ours(tensors, names.original_unet(levels, blocks // levels - 1), source), {}
    if part == "vae":
        levels = _count(tensors, r"encoder\.down\.(\d+)\.")
        tensors, table = names.original_autoencoder(tensors, levels)
        return names_as_ours(tensors, table, source), {}
    if any(name.startswith("text_model.") for name in tensors):  # OpenAI's CLIP-L, in transformers' names
        return names_as_ours(tensors, names.TRANSFORMERS_CLIP_TEXT, source), {"hidden_act": "quick_gelu"}
    ours = names_as_ours(names.open_clip(tensors), names.OPEN_CLIP_TEXT, source)
    if (
        part == "text_encoder"
    ):  # SD 2.x reads what the last block but one writes, normalised, and never the last
        last = f"blocks.{_count(ours, r'blocks.([0-9]+)[.]') - 1}."
        ours = {n: t for n, t in ours.items() if not n.startswith(last) and n != "text_projection.weight"}
    return ours, {"hidden_act": "gelu"}


def names_as_ours(tensors: Tensors, table: names.Table, source: str | Path) -> Tensors:
    """Renamed; a clash of two names is told with the file."""
    try:
        return {name: tensors[old] for old, name in new_names(tensors, table).items()}
    except WeightsError as error:
        raise WeightsError(f"{source}: {error}") from error


# --- sizes off the tensors ----------------------------------------------------------------------------------


def _count(tensors: Tensors, pattern: str) -> int:
    """How many numbers a place in the names counts up to."""
    return 1 + max((int(m[1]) for name in tensors if (m := re.match(pattern, name))), default=-1)


def _need(tensors: Tensors, name: str, source: str) -> Tensor:
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
    conv_in = _need(tensors, "conv_in.weight", source)
    if conv_in.shape[1] != 4:
        raise WeightsError(
            f"{source} reads {conv_in.shape[1]} channels, as for inpainting; only text to image (4) is supported"
        )
    levels = _count(tensors, r"down\.(\d+)\.")
    channels = tuple(
        _need(tensors, f"down.{i}.layers.0.res.conv1.weight", source).shape[0] for i in range(levels)
    )
    depths = tuple(_count(tensors, rf"down\.{i}\.layers\.0\.attn\.blocks\.(\d+)\.") for i in range(levels))
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
        channels, depths, _count(tensors, r"mid\.layers\.0\.attn\.blocks\.(\d+)\."), context,
        _count(tensors, r"down\.0\.layers\.(\d+)\."), heads, head_width, linear, conv_in.shape[1],
        _need(tensors, "conv_out.weight", source).shape[0], config.get("norm_num_groups") or 32, pooled, 6, size_width,
    )  # fmt: skip


def autoencoder_sizes(part: Part, family: Family) -> AutoencoderConfig:
    tensors, config, source = part
    levels = _count(tensors, r"encoder\.down\.(\d+)\.")
    return AutoencoderConfig(
        tuple(_need(tensors, f"encoder.down.{i}.layers.0.res.conv1.weight", source).shape[0] for i in range(levels)),
        _count(tensors, r"encoder\.down\.0\.layers\.(\d+)\."),
        config.get("norm_num_groups") or 32,
        _need(tensors, "encoder.conv_in.weight", source).shape[1],
        _need(tensors, "post_quant_conv.weight", source).shape[0],
        config.get("scaling_factor") or family.scaling_factor,
        "encoder.mid.layers.0.attn.norm.weight" in tensors,
    )  # fmt: skip


def text_sizes(
    tensors: Tensors, config: dict, source: str, penultimate: bool, prefix: str = ""
) -> TextConfig:
    """`penultimate` is SDXL's habit, and is not written down anywhere in a checkpoint."""
    vocabulary, width = _need(tensors, f"{prefix}token.weight", source).shape
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
        len(_need(tensors, f"{prefix}position.weight", source)),
        width,
        _count(tensors, re.escape(prefix) + r"blocks\.(\d+)\."),
        config.get("num_attention_heads") or width // 64,  # 64 channels a head in all published text towers
        activation == "quick_gelu",
        penultimate,
        None if projection is None else projection.shape[0],
    )


def _schedule(known: dict, prediction: Prediction | None, family: Family, path: Path) -> ScheduleConfig:
    """The scheduler's configuration where there is one; which sampler it was written for does not matter."""
    if known.get("rescale_betas_zero_snr") or known.get("trained_betas") is not None:
        raise WeightsError(
            f"{path} has a schedule of its own (zero terminal SNR or listed betas), which is not supported"
        )
    stated = known.get("prediction_type", "epsilon" if "beta_start" in known else None)
    if prediction is None and stated is None and family.prediction != "epsilon":
        warnings.warn(
            f"{path} does not say what its UNet predicts; assuming {family.prediction!r}, as {family.name} at {family.image_size} "
            f"pixels does. For the 512-pixel base model give prediction='epsilon' (--prediction epsilon)", stacklevel=3,
        )  # fmt: skip
    ours = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x0", None: family.prediction}
    if stated not in ours:
        raise WeightsError(f"{path} predicts {stated!r}; expected epsilon, v_prediction or sample")
    return ScheduleConfig(
        known.get("num_train_timesteps", 1000),
        known.get("beta_start", 0.00085),
        known.get("beta_end", 0.012),
        known.get("beta_schedule", "scaled_linear"),
        prediction or ours[stated],
    )


def _image_size(config: dict, factor: int, family: Family, schedule: ScheduleConfig) -> int:
    side = config.get("sample_size")
    if isinstance(side, int):
        return side * factor
    return 512 if family is SD2 and schedule.prediction == "epsilon" else family.image_size


# --- modules ------------------------------------------------------------------------------------------------


def _filled(network: type[nn.Module], config: object, part: Part, dtype: torch.dtype | None) -> nn.Module:
    """A network that takes the tensors themselves; each is converted by itself, so nothing is in memory twice."""
    stored = next(t.dtype for t in part.tensors.values() if t.is_floating_point())
    with torch.device("meta"):
        module = network(config).to(dtype or stored)
    load_into(module, part.tensors, source=part.source)
    part.tensors.clear()
    return module.eval().requires_grad_(False)


def _filled_text(
    parts: dict[str, Part], family: Family, dtype: torch.dtype | None
) -> TextEncoder | TwoTextEncoders:
    encoders, configs = ["text_encoder"] + ["text_encoder_2"] * (family is SDXL), []
    for name in encoders:
        part = parts[name]
        config = text_sizes(part.tensors, part.config, part.source, penultimate=family is SDXL)
        configs.append(config)
    if family is not SDXL:
        return _filled(TextEncoder, configs[0], parts["text_encoder"], dtype)
    if configs[1].projection is None:
        raise WeightsError(f"missing text_projection.weight in {parts['text_encoder_2'].source}")
    with torch.device("meta"):
        both = TwoTextEncoders(*configs)
    both.first = _filled(TextEncoder, configs[0], parts["text_encoder"], dtype)
    both.second = _filled(TextEncoder, configs[1], parts["text_encoder_2"], dtype)
    return both.eval()


# --- CLIP ---------------------------------------------------------------------------------------------------

VISION_HEADS = {1280: 16, 1664: 16}  # by width: ViT-H and bigG; all others have 64 channels a head


class LoadedCLIP(NamedTuple):
    clip: CLIP
    tokenizer: BytePairs | NoVocabulary


def load_clip(
    path: str | Path,
    dtype: torch.dtype | None = None,
    tokenizer: str | Path | None = None,
    quick_gelu: bool | None = None,
) -> LoadedCLIP:
    """Both towers of a CLIP: a folder of transformers' CLIPModel, or an OpenCLIP state dict (file, or folder with one).

    `quick_gelu` overrules the activation; an OpenCLIP state dict does not tell it, and OpenAI's own weights need True, all of
    LAION's False (the default without a configuration file).  `tokenizer` as in `load_checkpoint`.  Raises WeightsError.
    """
    path = Path(path)
    if not path.exists():
        raise WeightsError(f"there is no CLIP {path}")
    folder = path if path.is_dir() else path.parent
    file = weights_file(path) if path.is_dir() else path
    tensors = read_weights(file)
    if any(name.startswith("text_model.") for name in tensors):
        config = _json(folder / "config.json")
        text, vision = config.get("text_config") or {}, config.get("vision_config") or {}
        about = _json(folder / "preprocessor_config.json")
        default = "quick_gelu"  # transformers' own
        ours = names_as_ours(tensors, names.TRANSFORMERS_CLIP, file)
    else:
        config = _json(folder / "open_clip_config.json")
        model = config.get("model_cfg") or {}
        about = {f"image_{k}": v for k, v in (config.get("preprocess_cfg") or {}).items()}
        text, vision = ({} if not model.get(k, {}).get("heads") else {"num_attention_heads": model[k]["heads"]} for k in ("text_cfg", "vision_cfg"))  # fmt: skip
        if head_width := model.get("vision_cfg", {}).get("head_width"):
            vision["num_attention_heads"] = model["vision_cfg"]["width"] // head_width
        default = "quick_gelu" if model.get("quick_gelu") else "gelu"
        ours = names_as_ours(names.open_clip(tensors), names.OPEN_CLIP, file)
    if quick_gelu is not None:
        default, text, vision = (
            ("quick_gelu" if quick_gelu else "gelu"),
            {**text, "hidden_act": None},
            {**vision, "hidden_act": None},
        )
    source = str(file)
    patch = _need(ours, "vision.patch.weight", source)  # (d 3 p p)
    position = _need(ours, "vision.position.weight", source)  # (1+n d)
    width = patch.shape[0]
    vision_config = VisionConfig(
        round((len(position) - 1) ** 0.5) * patch.shape[2], patch.shape[2], width,
        _count(ours, r"vision\.blocks\.(\d+)\."),
        vision.get("num_attention_heads") or VISION_HEADS.get(width, width // 64),
        (vision.get("hidden_act") or default) == "quick_gelu",
        mean=tuple(2 * m - 1 for m in about["image_mean"]) if about.get("image_mean") else OPENAI_MEAN,
        std=tuple(2 * s for s in about["image_std"]) if about.get("image_std") else OPENAI_STD,
    )  # fmt: skip
    text_config = text_sizes(
        ours, {**text, "hidden_act": text.get("hidden_act") or default}, source, False, "text."
    )
    joint = _need(ours, "text_projection.weight", source).shape[0]
    clip = _filled(CLIP, CLIPConfig(text_config, vision_config, joint), Part(ours, {}, source), dtype)
    where = Path(tokenizer) if tokenizer else folder
    try:
        return LoadedCLIP(clip, BytePairs(where, text_config.length))
    except PromptError:
        if tokenizer:
            raise
        return LoadedCLIP(clip, NoVocabulary(path, text_config.length))


# --- what is in it ------------------------------------------------------------------------------------------


def describe(path: str | Path) -> str:
    """A checkpoint, a CLIP, a LoRA or a file of ours in a few lines; loads it, so that whatever does not fit is named."""
    path = Path(path)
    if is_checkpoint(path) and (
        path.is_dir() or any(n.startswith(PREFIXES["unet"]) for n in tensor_shapes(path))
    ):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            pipe = load_checkpoint(path)
        lines = [f"{path}: {_name_of(pipe)}, pictures of {pipe.image_size} x {pipe.image_size}"]
        for name in ("text_encoder", "unet", "autoencoder"):
            lines.append(f"  {name:13} {_counted(getattr(pipe, name))}: all matched")
        c = pipe.schedule.config
        lines.append(
            f"  predicts {c.prediction}, {c.train_steps} levels, beta {c.beta_start} to {c.beta_end} {c.beta_schedule}"
        )
        words = pipe.tokenizer
        lines.append(
            "  no vocabulary: give --tokenizer FOLDER"
            if isinstance(words, NoVocabulary)
            else f"  prompts of {words.length} tokens"
        )
        return "\n".join(lines + [f"  note: {w.message}" for w in said])
    shapes = tensor_shapes(weights_file(path) if path.is_dir() else path)
    if any("lora" in name for name in shapes):
        layers = read_lora(path)
        ranks = sorted({a.shape[0] for a, _, _ in layers.values()})
        return f"{path}: a LoRA of {len(layers)} layers, rank {', '.join(map(str, ranks))}, first {next(iter(layers))}"
    if any(n.startswith(("vision_model.", "visual.")) for n in shapes):
        clip, words = load_clip(path)
        about = (
            "no vocabulary: give --tokenizer FOLDER"
            if isinstance(words, NoVocabulary)
            else f"{words.length} tokens"
        )
        return f"{path}: CLIP, {_counted(clip)}: all matched; pictures of {clip.config.vision.size} pixels, {about}"
    some = ", ".join(f"{n} {s}" for n, s in list(shapes.items())[:5])
    return f"{path}: {len(shapes)} tensors, of no family known here: {some}"


def _name_of(pipe: LatentDiffusion) -> str:
    if isinstance(pipe.text_encoder, TwoTextEncoders):
        return SDXL.name
    return (
        SD2.name
        if pipe.text_encoder.config.width == 1024 or pipe.unet.config.use_linear_projection
        else SD1.name
    )


def _counted(module: nn.Module) -> str:
    dtype = str(next(module.parameters()).dtype).removeprefix("torch.")
    return f"{len(module.state_dict()):,} tensors, {sum(p.numel() for p in module.parameters()):,} parameters, {dtype}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m minireflect.checkpoints", description=describe.__doc__)
    parser.add_argument(
        "paths", nargs="+", type=Path, metavar="PATH", help="diffusers folder, original file, CLIP or LoRA"
    )
    for path in parser.parse_args().paths:
        try:
            print(describe(path))
        except (ValueError, OSError, ImportError) as error:
            print(f"{path}: {error}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
