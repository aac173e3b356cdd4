"""Read the parts of a published checkpoint: find their files, rename their tensors, determine their sizes.

    a diffusers folder      model_index.json, and for each part a folder with config.json and its weights
    an original file        all parts in one file, with a prefix for each; no configuration, no vocabulary

Channels, depths and widths are read off the shapes of the tensors.  Other values, such as the number of
attention heads and the scale of the latents, are read from config.json, or are those of the family.
"""

import re
import warnings
from pathlib import Path
from typing import Literal, NamedTuple

from torch import Tensor

from ..disk import read_text
from ..models.autoencoder import AutoencoderConfig
from ..models.clip import OPENAI_MEAN, OPENAI_STD, TextConfig, VisionConfig
from ..models.unet import UNetConfig
from ..ranges import quote
from . import files, names
from .files import WeightsError, first_names, read_json, read_metadata, read_weights, renamed
from .names import ORIGINAL, UNET_PREFIX, Tensors, count, inside
from .stated import REFINER, check_names, read_stated


class Family(NamedTuple):
    """Published values that the tensors do not determine; configuration files override them."""

    name: str
    heads: int | None  # attention heads of the UNet, the same on all levels; or head_width
    head_width: int | None  # channels per attention head
    scaling_factor: float  # 1 / std of the latents
    image_size: int  # pixels
    pads: tuple[str, ...]  # padding token of each text encoder, if no tokenizer folder states it
    prediction: Literal["epsilon", "v", "x0"] = "epsilon"


END, BANG = "<|endoftext|>", "!"  # padding of OpenAI's text encoder, and of OpenCLIP's (token 0)
SD1 = Family("SD 1.x", 8, None, scaling_factor=0.18215, image_size=512, pads=(END,))
SD2 = Family("SD 2.x", None, 64, scaling_factor=0.18215, image_size=768, pads=(BANG,), prediction="v")
SDXL = Family("SDXL", None, 64, scaling_factor=0.13025, image_size=1024, pads=(END, BANG))


class Part(NamedTuple):
    """The tensors of a network, with our names, and their source."""

    tensors: Tensors
    config: dict  # its configuration file, and what its layout implies
    source: str  # for error messages
    prefix: str = ""  # prepended to all names in the methods, for one of two networks in the part

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor.  Raises WeightsError when it is missing or has another number of axes."""
        name = self.prefix + name
        if name not in self.tensors:
            raise WeightsError(f"missing {name} in {self.source}, which has {first_names(self.tensors)}")
        axes = (4,) if re.search(r"(conv\w*|patch)\.weight$", name) else (2,)
        axes = (2, 4) if name.endswith(PROJECTION) else axes
        found = tuple(self.tensors[name].shape)
        if len(found) not in axes or not all(found):
            expected = " or ".join(map(str, axes))
            raise WeightsError(f"{name} in {self.source} has shape {found}, expected {expected} axes")
        return found

    def ending(self, end: str) -> tuple[int, ...]:
        """The shape of the first tensor whose name ends with `end`, else ().  Raises as `shape`."""
        name = next((name for name in self.tensors if name.endswith(end)), None)
        return self.shape(name) if name else ()

    def count(self, pattern: str) -> int:
        """1 + the largest number in names that match the pattern, as in names.py."""
        return count(self.tensors, re.escape(self.prefix) + pattern)

    def level_channels(self, path: str) -> tuple[int, ...]:
        """Output channels of the levels whose names begin with `path`, finest first."""
        levels = range(self.count(rf"{re.escape(path)}\.(\d+)\."))
        return tuple(self.shape(f"{path}.{i}.layers.0.res.conv1.weight")[0] for i in levels)

    def agrees(self, has: dict) -> None:
        """Raises WeightsError when the configuration states another value of a key than the tensors have."""
        for key, value in has.items():
            said = self.config.get(key, value)
            each = said if isinstance(said, list) else [said]  # a number may be stated once for each level
            if said != value and any(number != value for number in each):
                odd = f"states {key} = {said!r}, but its tensors are of {value!r}"
                raise WeightsError(f"config.json beside {self.source} {odd}")

    def shortened(self) -> "Part":
        """Keep the first `num_hidden_layers` blocks of the configuration; fewer than stored is a "clip skip".

        Raises WeightsError when there are fewer blocks than configured.
        """
        block, has = rf"{re.escape(self.prefix)}blocks\.(\d+)\.", self.count(r"blocks\.(\d+)\.")
        if (uses := self.config.get("num_hidden_layers", has)) > has:
            raise WeightsError(f"{self.source} has {has} blocks, but num_hidden_layers is {uses}")
        left_out = {name for name in self.tensors if (m := re.match(block, name)) and int(m[1]) >= uses}
        return self._replace(tensors={n: t for n, t in self.tensors.items() if n not in left_out})


# --- files --------------------------------------------------------------------------------------------------
PARTS = {  # part, by the name of its folder -> its kind in stated.py, and its function in names.py
    "unet": ("UNet", names.unet), "vae": ("VAE", names.autoencoder),
    "text_encoder": ("text encoder", names.first_text), "text_encoder_2": ("text encoder", names.text),
}  # fmt: skip


class Published(NamedTuple):
    """The contents of a published checkpoint."""

    path: Path
    parts: dict[str, Part]  # by the names of PARTS
    scheduler: dict  # configuration of the noise schedule; {} if nothing is stated
    index: dict  # model_index.json of a folder; {} for a file
    abar: Tensor | None = None  # (T) alpha-bar of the schedule, stored in some single files


def read_published(path: Path, vae: Path | None = None) -> Published:
    """Read a diffusers folder or an original file; `vae` is the path of an autoencoder to use instead.

    Raises WeightsError when the path is neither of these, or a part is missing.
    """
    if not path.exists():
        raise WeightsError(f"there is no checkpoint at {path}")
    found = _read_folder(path) if path.is_dir() else _read_file(path)
    if vae is not None:
        found.parts["vae"] = read_part(vae / "vae" if (vae / "vae").is_dir() else vae, "vae")
    if "text_encoder_2" in found.parts and "text_encoder" not in found.parts:
        raise WeightsError(f"{path} is {REFINER}")
    if missing := {"unet", "vae", "text_encoder"} - found.parts.keys():
        lacks, has = " and no ".join(sorted(missing)), first_names(found.parts)
        raise WeightsError(f"{path} has no {lacks}, which Stable Diffusion needs; it has {has}")
    return found


def _read_folder(path: Path) -> Published:
    index = read_stated("model_index.json", path / "model_index.json", needed=True)
    parts = {p: read_part(path / p, p) for p in PARTS if (index.get(p) or [None])[0] or (path / p).is_dir()}
    scheduler = read_json(file := path / "scheduler" / "scheduler_config.json")
    if (named := (index.get("scheduler") or [None])[-1]) and not scheduler:
        raise WeightsError(f"{file} is missing or empty, but model_index.json names a scheduler")
    if named and (used := scheduler.setdefault("_class_name", named)) != named:
        warnings.warn(f"{file} is of {used} and is used; model_index.json names {named}", stacklevel=5)
    return Published(path, parts, scheduler, index)


def read_part(path: Path, part: str) -> Part:
    """Read the folder of a network, or its file, and check the configuration in the folder."""
    folder = path if path.is_dir() else path.parent
    config = read_stated(PARTS[part][0], folder / "config.json", needed=path.is_dir())
    return part_of(read_weights(file := weights_file(path)), part, config, str(file))


def part_of(tensors: Tensors, part: str, config: dict, source: str) -> Part:
    """A part of PARTS, with our names, from the tensors of a published layout."""
    tensors, table, known = PARTS[part][1](tensors)
    return Part(renamed(tensors, table, source), known | config, source).shortened()


def _read_file(path: Path) -> Published:
    whole, parts = read_weights(path), {}
    odd, averaged = check_names("single file", whole, path), inside(whole, "model_ema.")
    if not inside(whole, UNET_PREFIX):
        has = "averaged weights (model_ema) and no others" if averaged else first_names(whole)
        expected = f"it has {has}, expected {UNET_PREFIX[:-1]}..."
        raise WeightsError(f"{path} is not an original file of Stable Diffusion: {expected}")
    if odd:
        raise WeightsError(f"{path} has {len(odd)} tensors of no known part: {first_names(odd)}")
    known = _known_of(path, whole)
    warn_of_metadata(path, "1" if inside(whole, "cond_stage_model.transformer.") else "2")
    latents = {"scaling_factor": known.pop("scaling_factor", None)}
    for prefix, part in ORIGINAL.items():
        if not (tensors := inside(whole, prefix)):
            continue
        if part in parts:
            raise WeightsError(f"{path} has a second {part} ({prefix}*); only one can be used")
        parts[part] = part_of(tensors, part, latents, f"{path} ({prefix}*)")
        if n := parts[part].config.get("num_hidden_layers"):
            warnings.warn(f"{path}: using {n} of {n + 1} blocks of its text encoder, as SD 2.x", stacklevel=4)
    if averaged:
        warnings.warn(f"{path}: its averaged weights (model_ema) are ignored", stacklevel=4)
    abar = whole["alphas_cumprod"].flatten().float() if "alphas_cumprod" in whole else ()
    if "denoiser.sigmas" in whole:  # in SDXL's files: std of the noise divided by that of the signal
        abar = 1 / (1 + whole["denoiser.sigmas"].flatten().float().sort().values ** 2)
    if not len(abar) or abar[0] < 0.5:  # some files store zeros
        return Published(path, parts, known, {})
    return Published(path, parts, known | {"num_train_timesteps": len(abar)}, {}, abar)


# Keys in the .yaml file of the original program -> keys of diffusers' configurations.
YAML = {
    "parameterization": "prediction_type", "beta_schedule": "beta_schedule", "linear_start": "beta_start",
    "linear_end": "beta_end", "timesteps": "num_train_timesteps", "scale_factor": "scaling_factor",
    "denoiser_scaling": "prediction_type",  # module of a class such as VScaling
    "rescale_betas_zero_snr": "rescale_betas_zero_snr", "zero_snr": "rescale_betas_zero_snr",
}  # fmt: skip
# Values in that file -> values of diffusers' configurations.
THEIRS = {"v": "v_prediction", "eps": "epsilon", "x0": "sample",
          "linear": "scaled_linear", "sqrt_linear": "linear", "true": True, "false": False}  # fmt: skip
# Beginning of the names of a text encoder -> the layers that its family uses, in that file.
LAYERS = {"cond_stage_model.transformer.": ["last"], "cond_stage_model.model.": ["penultimate"],
          "conditioner.": ["hidden", "11", "penultimate"]}  # fmt: skip


def _known_of(path: Path, whole: Tensors) -> dict:
    """What a single file, its metadata, and a .yaml file beside it state, with the keys of diffusers."""
    text = read_text(about) if (about := path.with_suffix(".yaml")).is_file() else ""
    text = re.sub(r"(?m)(^|\s)#.*", "", text)  # comments
    said = re.findall(rf"\b({'|'.join(YAML)})(?:[\"']? *: *[\"']?|\.)([-+.\w]+)", text)
    known: dict = {}
    with files.named_as(f"{path}, or {about.name} beside it", ValueError, RuntimeError):
        for key, value in reversed(said):  # the first of several values remains
            kind = str if value.isidentifier() else int if value.isdigit() else float
            known[YAML[key]] = kind(value.removesuffix("Scaling").lower())
        if "scale_factor" in whole:
            known["scaling_factor"] = float(whole["scale_factor"])
    usual = next((layers for prefix, layers in LAYERS.items() if inside(whole, prefix)), [])
    layers = re.findall(r"\blayer(?:_idx)?[\"']? *: *[\"']?([-\w]+)", text)
    if odd := [layer for layer in layers if layer not in (*usual, "null")]:
        only = f"only {' '.join(usual)} is supported; remove it, and give --clip-skip if it is needed"
        raise WeightsError(f"{about} asks for layer {odd[0]} of the text encoder, but {only}")
    marked = "v" if "v_pred" in whole else None
    types = [read_metadata(path).get("modelspec.prediction_type"), known.get("prediction_type"), marked]
    if len({THEIRS.get(each, each) for each in types if each}) > 1:
        which = "its metadata, the .yaml file beside it and its tensors disagree about what its UNet predicts"
        warnings.warn(f"{path}: {which}; the last of {types} is used, or give --prediction", stacklevel=5)
    default = "eps" if "beta_start" in known else None  # of the original program, if there is a .yaml file
    known |= {"prediction_type": next(filter(None, reversed(types)), default)}
    known = {key: THEIRS.get(value, value) for key, value in known.items() if value not in (None, "")}
    return known | ({"rescale_betas_zero_snr": True} if "ztsnr" in whole else {})


def warn_of_metadata(path: Path, layer: str = "1") -> None:
    """Warn if the metadata of a file ask for a setting that is not applied.

    `layer` is the usual layer of the family's text encoder, counted from the end.
    """
    usual = {"modelspec.encoder_layer": layer, "ss_clip_skip": layer, "ss_zero_terminal_snr": "False",
             "modelspec.timestep_range": "0,1000"}  # fmt: skip
    for key, value in read_metadata(path).items():
        if key in usual and value not in (usual[key], "None", ""):
            skip = "" if re.search("snr|range", key) else "; give --clip-skip, this number minus 1"
            warnings.warn(f"{path} asks for {key} {quote(value)}, which is not applied{skip}", stacklevel=5)


STEMS = ("diffusion_pytorch_model", "model", "pytorch_model", "open_clip_model", "open_clip_pytorch_model")
# [.VARIANT].safetensors or .bin; with .index[.VARIANT].json for the index of a file in several parts
ENDINGS = r"(?:\.(\w+))?\.(safetensors|bin)(\.index(?:\.(\w+))?\.json)?"


def weights_file(path: Path, stems: tuple[str, ...] = STEMS) -> Path:
    """The path itself if it is a file; in a folder, the file of weights (or its index) with one of the stems.

    Prefers safetensors to torch files, and full precision to half.  Raises WeightsError if there is none, or
    if there are several other variants.
    """
    if not path.is_dir():
        return files.existing(path)

    def order(match: re.Match) -> tuple:
        return match[2] == "bin", [None, "fp16", variant(match)].index(variant(match)), not match[3]

    def variant(match: re.Match) -> str | None:
        return match[1] or match[4]

    here = sorted(file.name for file in path.iterdir() if file.is_file())
    if not (found := [m for name in here if (m := re.fullmatch(rf"(?:{'|'.join(stems)}){ENDINGS}", name))]):
        has = ", ".join(sorted(file.name for file in path.iterdir())[:3]) or "no files"
        raise WeightsError(f"{path} has no {stems[0]}.safetensors or other file of weights; it has {has}")
    best = min(found, key=order)
    same = [m for m in found if order(m)[:2] == order(best)[:2]]
    if other := [m[0] for m in same if variant(m) != variant(best)]:
        raise WeightsError(f"{path} has {best[0]} and {other[0]}, and nothing says which; keep one of them")
    return path / best[0]


# --- sizes --------------------------------------------------------------------------------------------------
PROJECTION = "attn.proj_in.weight"  # in the UNet's attention: a linear layer (2 axes) from SD 2 on


def unet_sizes(part: Part, family: Family) -> UNetConfig:
    """The configuration of a UNet: sizes from tensors, heads and groups from config.json or the family."""
    config, source = part.config, part.source
    read, written = part.shape("conv_in.weight")[1], part.shape("conv_out.weight")[0]
    if (read, written) != (4, 4):  # inpainting has 9 input channels, learnt variances 8 output channels
        raise WeightsError(f"{source} has {read} input and {written} output channels; only 4 are supported")
    channels = part.level_channels("down")
    # diffusers stores the number of heads in attention_head_dim, despite its name
    stated = config.get("num_attention_heads") or config.get("attention_head_dim")
    heads, head_width = (stated, None) if stated else (family.heads, family.head_width)
    if isinstance(heads, list) and len(heads) != len(channels):
        raise WeightsError(f"{source} states heads {heads}, but its UNet has {len(channels)} levels")
    down, up = _depths(part, "down"), _depths(part, "up")[::-1]
    keys, added = part.ending("cross_attn.k.weight"), part.ending("added.fc1.weight")
    size_width = config.get("addition_time_embed_dim") or 256
    attends = "CrossAttn" if "mid.layers.0.attn.norm.weight" in part.tensors else ""
    res_blocks, linear = part.count(r"down\.0\.layers\.(\d+)\."), len(part.ending(PROJECTION)) == 2
    has = {"mid_block_type": f"UNetMidBlock2D{attends}" if part.count(r"mid\.layers\.(\d+)\.") else None,
           "addition_embed_type": "text_time" if added else None, "in_channels": 4, "out_channels": 4,
           "block_out_channels": list(channels), "layers_per_block": res_blocks}  # fmt: skip
    has |= {"cross_attention_dim": keys[1], "use_linear_projection": linear} if keys else {}
    depths, key = [max(level, default=0) for level in down], "transformer_layers_per_block"
    each = config[key] if isinstance(config.get(key), list) else [config.get(key)] * len(depths)
    if any(n and isinstance(k, int) and n != k for n, k in zip(depths, each)):
        # a level without attention states a number that is not used; lists of lists are not compared
        has[key] = depths
    part.agrees(has)
    return UNetConfig(
        channels, tuple(depths[0] for depths in down), part.count(r"mid\.layers\.0\.attn\.blocks\.(\d+)\."),
        context_width=keys[1] if keys else 0, res_blocks=res_blocks,
        heads=heads, head_width=head_width, groups=config.get("norm_num_groups") or 32,
        pooled_width=added[1] - 6 * size_width if added else None, size_width=size_width,
        use_linear_projection=linear,
        mid_blocks=part.count(r"mid\.layers\.(\d+)\."), down=down, up=up,
    )  # fmt: skip


def _depths(part: Part, way: str) -> tuple[tuple[int, ...], ...]:
    """Transformer blocks behind each residual block, per level, in the order of computation."""
    layers = [part.count(rf"{way}\.{i}\.layers\.(\d+)\.") for i in range(part.count(rf"{way}\.(\d+)\."))]
    blocks = r"\.attn\.blocks\.(\d+)\."
    levels = ([rf"{way}\.{i}\.layers\.{j}{blocks}" for j in range(n)] for i, n in enumerate(layers))
    return tuple(tuple(map(part.count, level)) for level in levels)


def autoencoder_sizes(part: Part, family: Family) -> AutoencoderConfig:
    """The configuration of an autoencoder: sizes from tensors, the rest from config.json or the family."""
    config, z = part.config, part.shape("post_quant_conv.weight")[0]
    shift, scale = config.get("shift_factor") or 0.0, config.get("scaling_factor")
    mean = tuple(m + shift for m in config.get("latents_mean") or (z * [0.0] if shift else ()))
    sizes = AutoencoderConfig(
        part.level_channels("encoder.down"), res_blocks=part.count(r"encoder\.down\.0\.layers\.(\d+)\."),
        groups=config.get("norm_num_groups") or 32, latent_channels=z,
        in_channels=part.shape("encoder.conv_in.weight")[1],
        scaling_factor=family.scaling_factor if scale is None else scale,
        mid_attention="encoder.mid.layers.0.attn.norm.weight" in part.tensors,
        mean=mean, std=config.get("latents_std") or (),
    )  # fmt: skip
    part.agrees({"mid_block_add_attention": sizes.mid_attention, "layers_per_block": sizes.res_blocks,
                 "block_out_channels": list(sizes.channels), "latent_channels": z})  # fmt: skip
    if bool(config.get("latents_mean")) != bool(config.get("latents_std")):
        raise WeightsError(f"{part.source} states only one of latents_mean and latents_std; give both")
    return sizes


def _transformer_sizes(part: Part, width: int, heads: int, **sizes: int) -> dict:
    """Fields that TextConfig and VisionConfig share; `heads` is used if the configuration states none.

    Raises WeightsError when the configuration states another width or other `sizes` than the tensors.
    """
    hidden = part.shape("blocks.0.fc1.weight")[0]
    part.agrees({"hidden_size": width, "intermediate_size": hidden, **sizes})
    return dict(
        width=width, layers=part.count(r"blocks\.(\d+)\."), hidden=hidden,
        heads=part.config.get("num_attention_heads") or heads,
        quick_gelu={"quick_gelu": True, "gelu": False}[part.config["hidden_act"]],
    )  # fmt: skip


def text_sizes(part: Part, penultimate: bool = False) -> TextConfig:
    """The configuration of a text encoder; `penultimate` as SDXL needs it, which no checkpoint states."""
    vocabulary, width = part.shape("token.weight")
    eos = part.config.get("eos_token_id", 2)
    eos = min(vocabulary - 1, 49_407) if eos == 2 else eos  # 2 is an error in older files; CLIP's is 49,407
    projection = None if part.prefix else part.tensors.get("text_projection.weight")
    length, heads = part.shape("position.weight")[0], max(1, width // 64)  # published: 64 channels a head
    return TextConfig(
        vocabulary, eos, length, penultimate=penultimate,
        projection=None if projection is None else len(projection),
        **_transformer_sizes(part, width, heads, vocab_size=vocabulary, max_position_embeddings=length),
    )  # fmt: skip


# Width -> heads, of ViT-H, g and bigG; all other vision encoders have 64 channels a head.
VISION_HEADS = {1280: 16, 1408: 16, 1664: 16}


def vision_sizes(part: Part, pictures: dict) -> VisionConfig:
    """The configuration of a vision encoder.

    `pictures` may state image_mean and image_std, for pictures in [0, 1]; the defaults are OpenAI's.
    """
    mean, std = pictures.get("image_mean"), pictures.get("image_std")
    width, _, patch, _ = part.shape("patch.weight")  # (d 3 p p)
    size = patch * round((part.shape("position.weight")[0] - 1) ** 0.5)  # positions without the class token
    whole = {"image_size": [size, size], "size": {"shortest_edge": size},
             "crop_size": {"height": size, "width": size}}  # fmt: skip
    if odd := [key for key in whole if pictures.get(key) not in (None, size, whole[key])]:
        asked = f"{odd[0]} = {quote(pictures[odd[0]])}, which is refused: its pictures have sides of {size}"
        raise WeightsError(f"the configuration of pictures beside {part.source} asks for {asked}")
    heads = VISION_HEADS.get(width, max(1, width // 64))
    return VisionConfig(
        size, patch, mean=tuple(2 * m - 1 for m in mean) if mean else OPENAI_MEAN,
        std=tuple(2 * s for s in std) if std else OPENAI_STD,
        **_transformer_sizes(part, width, heads, image_size=size, patch_size=patch),
    )  # fmt: skip
