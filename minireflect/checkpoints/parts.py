"""The parts of a published checkpoint: where each lies, its tensors under our names, its sizes read off them.

    a diffusers folder      model_index.json, and a folder for each part with config.json and its weights
    an original file        all parts in one, told apart by prefixes; no configuration, no vocabulary

A tensor's shape gives channels, depths and widths.  What it does not give, as the number of attention heads
or the scale of the latents, stands in a part's config.json, or is what the family was published with.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from torch import Tensor

from ..models.autoencoder import AutoencoderConfig
from ..models.clip import OPENAI_MEAN, OPENAI_STD, TextConfig, VisionConfig
from ..models.unet import UNetConfig
from . import names
from .files import WeightsError, first_names, read_json, read_weights, renamed
from .names import Tensors, count


@dataclass(frozen=True)
class Family:
    """What the tensors of a family do not tell; configuration files, where there are any, overrule it."""

    name: str
    heads: int | None  # of the UNet's attention: the same number on all levels ...
    head_width: int | None  # ... or the same channels for each
    scaling_factor: float  # of the latents: 1 / their standard deviation
    image_size: int  # pixels
    pads: tuple[str, ...]  # padding token of each text encoder, where the vocabulary does not tell
    prediction: Literal["epsilon", "v", "x0"] = "epsilon"


END, BANG = "<|endoftext|>", "!"  # OpenAI's encoders are padded with the end, OpenCLIP's with the token 0
SD1 = Family("SD 1.x", 8, None, scaling_factor=0.18215, image_size=512, pads=(END,))
SD2 = Family("SD 2.x", None, 64, scaling_factor=0.18215, image_size=768, pads=(BANG,), prediction="v")
SDXL = Family("SDXL", None, 64, scaling_factor=0.13025, image_size=1024, pads=(END, BANG))


class Part(NamedTuple):
    """A network's tensors under our names, and where they came from."""

    tensors: Tensors
    config: dict  # its configuration file, or what its layout tells
    source: str  # for error messages
    prefix: str = ""  # of the names below, for a network inside the part

    def need(self, name: str) -> Tensor:
        """The tensor of this name.  Raises WeightsError when it is missing, or has other axes."""
        name = self.prefix + name
        if name not in self.tensors:
            raise WeightsError(f"missing {name} in {self.source}, which has {first_names(self.tensors)}")
        axes, found = 4 if re.search(r"(conv\w*|patch)\.weight$", name) else 2, self.tensors[name]
        if found.ndim != axes or not found.numel():
            raise WeightsError(
                f"{name} in {self.source} has shape {tuple(found.shape)}, expected {axes} axes"
            )
        return found

    def ending(self, end: str) -> Tensor | None:
        """The first tensor whose name ends so.  Raises WeightsError when it is no matrix."""
        name = next((name for name in self.tensors if name.endswith(end)), None)
        if name is not None and self.tensors[name].ndim < 2:
            raise WeightsError(f"{name} in {self.source} has shape {tuple(self.tensors[name].shape)}")
        return self.tensors.get(name)

    def count(self, pattern: str) -> int:
        return count(self.tensors, re.escape(self.prefix) + pattern)

    def level_channels(self, path: str) -> tuple[int, ...]:
        """Channels of the levels whose names begin with `path`, finest first."""
        levels = range(self.count(rf"{re.escape(path)}\.(\d+)\."))
        return tuple(self.need(f"{path}.{i}.layers.0.res.conv1.weight").shape[0] for i in levels)


# --- where the parts lie ------------------------------------------------------------------------------------
FOLDERS = {  # names in the folder of each part
    "unet": names.DIFFUSERS_UNET, "vae": names.DIFFUSERS_AUTOENCODER,
    "text_encoder": names.TRANSFORMERS_CLIP_TEXT, "text_encoder_2": names.TRANSFORMERS_CLIP_TEXT,
}  # fmt: skip
ORIGINAL = {  # prefix of the names in an original file -> part, and how its tensors are read there
    "model.diffusion_model.": ("unet", names.original_unet),
    "first_stage_model.": ("vae", names.original_autoencoder),
    "cond_stage_model.transformer.": ("text_encoder", names.original_only_text),
    "cond_stage_model.model.": ("text_encoder", names.original_only_text),
    "conditioner.embedders.0.transformer.": ("text_encoder", names.original_only_text),
    "conditioner.embedders.1.model.": ("text_encoder_2", names.original_text),
}
UNET_PREFIX = next(iter(ORIGINAL))

# Beside the networks, original files hold the schedule's tables (computed here) and a running average of the
# UNet (which the weights of published files already are).
LEFT_OUT = (
    r"^(model_ema\.|denoiser\.|model\.diffusion_model$|(alphas|betas|sqrt|log_one_minus|posterior|lvlb)\w*$"
    r"|logvar$|scale_factor$|v_pred$|ztsnr$)"
)


class Published(NamedTuple):
    """A checkpoint as it lies on the disk."""

    path: Path
    parts: dict[str, Part]  # by the names of FOLDERS
    scheduler: dict  # its configuration, or what else is known of it
    index: dict  # model_index.json, in a folder


def read_published(path: Path) -> Published:
    """A diffusers folder or an original file.  Raises WeightsError when it is neither, or lacks a part."""
    if not path.exists():
        raise WeightsError(f"there is no checkpoint {path}")
    published = _read_folder(path) if path.is_dir() else _read_file(path)
    if "text_encoder_2" in published.parts and "text_encoder" not in published.parts:
        raise WeightsError(f"{path} is SDXL's refiner, which only finishes the pictures of another model")
    if missing := {"unet", "vae", "text_encoder"} - published.parts.keys():
        lacks = " and no ".join(sorted(missing))
        has = f"it has {first_names(published.parts)}"
        raise WeightsError(f"{path} has no {lacks}, as Stable Diffusion has; {has}")
    return published


def _read_folder(path: Path) -> Published:
    index, parts = read_json(path / "model_index.json"), {}
    if not index:
        raise WeightsError(f"{path} is not a diffusers folder: model_index.json is missing")
    for part, table in FOLDERS.items():
        if (index.get(part) or [None])[0] is not None or (path / part).is_dir():
            file = weights_file(path / part)
            tensors = renamed(read_weights(file), table, file)
            parts[part] = Part(tensors, read_json(path / part / "config.json"), str(file))
    return Published(path, parts, read_json(path / "scheduler" / "scheduler_config.json"), index)


def _read_file(path: Path) -> Published:
    whole, parts = read_weights(path), {}
    if not any(name.startswith(UNET_PREFIX) for name in whole):
        expected = f"it has {first_names(whole)}, expected {UNET_PREFIX[:-1]}..."
        raise WeightsError(f"{path} is not an original file of Stable Diffusion: {expected}")
    if strange := [n for n in whole if not n.startswith(tuple(ORIGINAL)) and not re.match(LEFT_OUT, n)]:
        listed = ", ".join(strange[:10])
        raise WeightsError(f"{path} has {len(strange)} tensors that belong to no part: {listed}")
    for prefix, (part, read) in ORIGINAL.items():
        if inside := {n.removeprefix(prefix): t for n, t in whole.items() if n.startswith(prefix)}:
            source = f"{path} ({prefix}*)"
            tensors, table, known = read(inside)
            parts[part] = Part(renamed(tensors, table, source), known, source)
    about = path.with_suffix(".yaml")  # published beside some files
    stated = about.is_file() and re.search(r"parameterization:\s*[\"']?(eps|v)\b", about.read_text("utf-8"))
    known = stated[1] if stated else "v" if "v_pred" in whole else None
    predictions = {"v": "v_prediction", "eps": "epsilon"}
    return Published(path, parts, {"prediction_type": predictions[known]} if known else {}, {})


STEMS = ("diffusion_pytorch_model", "model", "pytorch_model", "open_clip_model", "open_clip_pytorch_model")
ENDINGS = (  # safetensors before torch files, full precision before half, several parts before one
    ".safetensors.index.json", ".safetensors", ".safetensors.index.fp16.json", ".fp16.safetensors",
    ".bin.index.json", ".bin", ".bin.index.fp16.json", ".fp16.bin",
)  # fmt: skip


def weights_file(path: Path) -> Path:
    """A file itself; of a folder the file with its tensors, or the index of several.

    Raises WeightsError when there is none.
    """
    if not path.is_dir():
        return path
    for name in (f"{stem}{ending}" for ending in ENDINGS for stem in STEMS):
        if (path / name).is_file():
            return path / name
    expected = f"{STEMS[0]}{ENDINGS[1]}, or another of its names and endings"
    raise WeightsError(f"there are no weights in {path}: expected {expected}")


# --- sizes --------------------------------------------------------------------------------------------------
PROJECTION = "attn.proj_in.weight"  # of the UNet's attention: linear (two axes) from SD 2 on
# Options of diffusers that our UNet does not have; all published SD 1.x, 2.x and SDXL have these values.
ASSUMED = {
    "act_fn": "silu", "flip_sin_to_cos": True, "freq_shift": 0, "center_input_sample": False,
    "norm_eps": 1e-5, "class_embed_type": None, "resnet_time_scale_shift": "default", "encoder_hid_dim": None,
    "mid_block_scale_factor": 1, "downsample_padding": 1, "dual_cross_attention": False,
    "only_cross_attention": False, "time_embedding_type": "positional", "timestep_post_act": None,
}  # fmt: skip


def unet_sizes(part: Part, family: Family) -> UNetConfig:
    """Sizes from the tensors of a UNet, heads and groups from config.json or the family."""
    config, source = part.config, part.source
    for key, value in ASSUMED.items():
        if config.get(key, value) != value:
            raise WeightsError(f"{source} asks for {key} = {config[key]!r}; this UNet does {value!r} only")
    if (read := part.need("conv_in.weight").shape[1]) != 4:
        raise WeightsError(f"{source} reads {read} channels, as for inpainting; only 4 are supported")
    channels = part.level_channels("down")
    heads, head_width = family.heads, family.head_width
    stated = config.get("num_attention_heads") or config.get("attention_head_dim")  # heads, despite its name
    if isinstance(stated, int):
        heads, head_width = stated, None
    elif stated:
        heads, (head_width, *others) = None, {c // h for c, h in zip(channels, stated)}
        if others:
            raise WeightsError(f"{source}: heads {stated} at channels {channels} are of several widths")
    depths = tuple(part.count(rf"down\.{i}\.layers\.0\.attn\.blocks\.(\d+)\.") for i in range(len(channels)))
    mid_depth = part.count(r"mid\.layers\.0\.attn\.blocks\.(\d+)\.")
    keys, projection, added = map(part.ending, ("cross_attn.k.weight", PROJECTION, "added.fc1.weight"))
    size_width = config.get("addition_time_embed_dim") or 256
    return UNetConfig(
        channels, depths, mid_depth, context_width=0 if keys is None else keys.shape[1],
        res_blocks=part.count(r"down\.0\.layers\.(\d+)\."), heads=heads, head_width=head_width,
        use_linear_projection=projection is not None and projection.ndim == 2,
        out_channels=part.need("conv_out.weight").shape[0], groups=config.get("norm_num_groups") or 32,
        pooled_width=None if added is None else added.shape[1] - 6 * size_width, size_width=size_width,
    )  # fmt: skip


def autoencoder_sizes(part: Part, family: Family) -> AutoencoderConfig:
    return AutoencoderConfig(
        part.level_channels("encoder.down"), res_blocks=part.count(r"encoder\.down\.0\.layers\.(\d+)\."),
        groups=part.config.get("norm_num_groups") or 32,
        in_channels=part.need("encoder.conv_in.weight").shape[1],
        latent_channels=part.need("post_quant_conv.weight").shape[0],
        scaling_factor=part.config.get("scaling_factor") or family.scaling_factor,
        mid_attention="encoder.mid.layers.0.attn.norm.weight" in part.tensors,
    )  # fmt: skip


def text_sizes(part: Part, penultimate: bool = False) -> TextConfig:
    """`penultimate`: read the states before the last block, as SDXL does; no checkpoint tells."""
    vocabulary, width = part.need("token.weight").shape
    eos = part.config.get("eos_token_id", 2)
    eos = vocabulary - 1 if eos == 2 else eos  # 2 is a mistake of older files, which the libraries know
    activation = part.config.get("hidden_act", "quick_gelu")  # transformers' own default
    if activation not in ("quick_gelu", "gelu"):
        raise WeightsError(f"{part.source} asks for hidden_act = {activation!r}; expected quick_gelu or gelu")
    projection = None if part.prefix else part.tensors.get("text_projection.weight")
    return TextConfig(
        vocabulary, eos, len(part.need("position.weight")), width, layers=part.count(r"blocks\.(\d+)\."),
        heads=part.config.get("num_attention_heads") or width // 64,  # 64 channels each where it is published
        quick_gelu=activation == "quick_gelu", penultimate=penultimate,
        projection=None if projection is None else projection.shape[0],
    )  # fmt: skip


VISION_HEADS = {1280: 16, 1664: 16}  # by width: ViT-H and bigG; all others have 64 channels a head


def vision_sizes(part: Part, pictures: dict) -> VisionConfig:
    """`pictures` may have image_mean and image_std, of pictures in [0, 1]; without them they are OpenAI's."""
    mean, std = pictures.get("image_mean"), pictures.get("image_std")
    width, _, patch, _ = part.need("patch.weight").shape  # (d 3 p p)
    side = round((len(part.need("position.weight")) - 1) ** 0.5)  # patches to a side, beside the class token
    return VisionConfig(
        side * patch, patch, width, layers=part.count(r"blocks\.(\d+)\."),
        heads=part.config.get("num_attention_heads") or VISION_HEADS.get(width, width // 64),
        quick_gelu=part.config.get("hidden_act") == "quick_gelu",
        mean=tuple(2 * m - 1 for m in mean) if mean else OPENAI_MEAN,
        std=tuple(2 * s for s in std) if std else OPENAI_STD,
    )  # fmt: skip
