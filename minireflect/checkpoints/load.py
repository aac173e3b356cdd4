"""Load published checkpoints into our networks: Stable Diffusion 1.x, 2.x and SDXL, and CLIP.

    pipe = load_checkpoint("stable-diffusion-v1-5")         # a LatentDiffusion, as from `load_pipeline`
    clip, tokenizer = load_clip("CLIP-ViT-H-14")            # for a reward on real pictures: rl/rewards.py

A checkpoint is a folder or a single file.  Sizes are read off the tensors.  Other values (heads, prediction,
schedule) are read from the configuration files of a folder.  For a single file, which has none, they are the
published values of its family (SD 1.x, SD 2.x or SDXL).  Nothing is downloaded.
"""

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..diffusion.schedule import Prediction, Schedule, ScheduleConfig
from ..disk import Place
from ..models.autoencoder import Autoencoder
from ..models.clip import CLIP, CLIPConfig, TextEncoder, TwoTextEncoders
from ..models.tokenizer import BytePairs, NoVocabulary, TwoBytePairs
from ..models.unet import UNet
from ..pipeline import LatentDiffusion
from ..ranges import Checked, Size, expect
from . import names, parts
from .files import WeightsError, existing, load_into, read_json, read_weights, renamed
from .parts import SD2, SDXL, Family, Part, Published, autoencoder_sizes, read_published, weights_file
from .stated import check, read_stated

Dtype, Folder = torch.dtype | None, Place | None
# The schedule of all Stable Diffusion families, used where a checkpoint states nothing else.
SD_NOISE = {
    "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False,
}  # fmt: skip
# Schedulers whose sampler without step noise is DDIM.
DDIM_LIKE = [f"{name}Scheduler" for name in ["DDIM", "DDPM", "EulerDiscrete", "EulerAncestralDiscrete"]]
Words = BytePairs | TwoBytePairs | NoVocabulary


@dataclass(frozen=True)
class Given(Checked):
    """Values that override those of a Stable Diffusion checkpoint; None = the checkpoint's own."""

    # of UNet and text encoder; the autoencoder is always float32, as SDXL's overflows in half precision
    dtype: object = None  # a torch.dtype
    tokenizer: Folder = None  # folder of CLIP's vocabulary, for a single file without one beside it
    prediction: Prediction | None = None  # what the UNet predicts: "epsilon", "v" or "x0"
    image_size: Size | tuple[Size, Size] | None = None  # in pixels: one side of a square, or height and width
    vae: Folder = None  # another autoencoder: a folder, or a file in diffusers' or the original layout


# --- Stable Diffusion ---------------------------------------------------------------------------------------
def load_checkpoint(path: Place, given: Given = Given()) -> LatentDiffusion:
    """Load a diffusers folder, or an original single file (.safetensors, .ckpt), of SD 1.x, SD 2.x or SDXL.

    Raises WeightsError when a file is missing, when a key is not supported (stated.py), or when tensors do
    not fit; the error names them.
    """
    published = read_published(Path(path), None if given.vae is None else Path(given.vae))
    family, found = family_of(published), published.parts
    named = published.index.get("_class_name") or ""
    if named.startswith("StableDiffusion") and ("XL" in named) != (family is SDXL):
        raise WeightsError(f"{path}: model_index.json says {named}, but its networks are of {family.name}")
    if {given.dtype, stored := _stored(found["unet"])} == {torch.float16, torch.bfloat16}:
        said = f"it is stored in {stored}, and {given.dtype} is asked for: its numbers are rounded twice"
        warnings.warn(f"{found['unet'].source}: {said}".replace("torch.", ""), stacklevel=3)
    unet = filled(UNet, parts.unet_sizes(found["unet"], family), found["unet"], given.dtype)
    autoencoder = filled(Autoencoder, autoencoder_sizes(found["vae"], family), found["vae"], torch.float32)
    texts = [found[name] for name in ("text_encoder", "text_encoder_2")[: len(family.pads)]]
    configs = [parts.text_sizes(part, family is SDXL) for part in texts]
    if family is SDXL:
        texts[1].shape("text_projection.weight")
    encoders = [filled(TextEncoder, config, part, given.dtype) for config, part in zip(configs, texts)]
    text = TwoTextEncoders(*encoders).eval() if family is SDXL else encoders[0]
    if (width := sum(config.width for config in configs)) != (reads := unet.config.context_width):
        raise WeightsError(f"{path}: its UNet needs prompts of width {reads}, its text encoder gives {width}")
    if family is SDXL and (reads := unet.config.pooled_width) != (width := configs[1].projection):
        told = f"a pooled prompt of width {reads}, its second text encoder gives {width}"
        raise WeightsError(f"{path}: its UNet needs {told}; addition_time_embed_dim may be wrong")
    if (z := autoencoder.config.latent_channels) != (reads := unet.config.in_channels):
        raise WeightsError(f"{found['vae'].source} has {z} latent channels, but the UNet needs {reads}")
    schedule, factor = _schedule(published, given.prediction, family), autoencoder.config.factor
    size, side = given.image_size, found["unet"].config.get("sample_size")  # in pixels, in latents
    if size is None and side:
        size = side * factor if isinstance(side, int) else tuple(n * factor for n in side)
    # SD 2's base model, which predicts epsilon, was published for 512 pixels
    size = size or (512 if family is SD2 and schedule.config.prediction == "epsilon" else family.image_size)
    multiple = factor * 2 ** (len(unet.config.channels) - 1)
    if any(n % multiple for n in ([size] if isinstance(size, int) else size)):
        raise WeightsError(f"image_size {size} is not a multiple of {multiple} pixels, as this UNet needs")
    words = _tokenizer(published.path, family.pads, text, configs[0].length, given.tokenizer)
    zero_null = family is SDXL and bool(published.index.get("force_zeros_for_empty_prompt", True))
    return LatentDiffusion(words, text, unet, autoencoder, schedule, size, zero_null)


def family_of(published: Published) -> Family:
    """SDXL has two text encoders.  SD 2.x has linear projections in its UNet, or a text width of 1024.

    Raises WeightsError when SDXL's second text encoder is missing.
    """
    path, unet = published.path, published.parts["unet"]
    if "text_encoder_2" in published.parts:
        return SDXL
    if "added.fc1.weight" in unet.tensors:
        raise WeightsError(f"{path} has SDXL's UNet, but not both of its text encoders")
    text_width = published.parts["text_encoder"].shape("token.weight")[1]
    return SD2 if len(unet.ending(parts.PROJECTION)) == 2 or text_width == 1024 else parts.SD1


def _tokenizer(path: Path, pads: tuple, encoder: nn.Module, length: int, given: Folder) -> Words:
    """A vocabulary for each text encoder: the given one, that of the folder, or one beside the file."""
    n = len(pads)
    if given is None and (path / "tokenizer").is_dir():
        folders, pads = [path / "tokenizer", path / "tokenizer_2"][:n], (None,) * n
    else:
        beside = [path] if path.is_dir() else [path.parent / "tokenizer", path.parent]
        beside = [f for f in beside if (f / "tokenizer.json").is_file() or (f / "vocab.json").is_file()]
        if given is None and not beside:
            return NoVocabulary(path, n * length)
        folders = [Path(beside[0] if given is None else given)] * n
    each, tokens = [], [m.num_embeddings for name, m in encoder.named_modules() if name.endswith("token")]
    for folder, pad, known in zip(folders, pads, tokens):
        if len(words := vocabulary(folder, length, pad)) > known:
            has = f"the vocabulary in {folder} has {len(words):,} tokens, the text encoder {known:,}"
            raise WeightsError(f"{has}: the embeddings of added tokens are not in this checkpoint")
        each.append(words)
    return each[0] if n == 1 else TwoBytePairs(*each)


def vocabulary(folder: Path, length: int = 77, pad: str | None = None) -> BytePairs:
    """CLIP's vocabulary in a folder, for prompts of at most `length` tokens.

    Raises WeightsError when its configuration is not supported.
    """
    for file in filter(Path.is_file, folder.glob("*")):
        existing(file)  # raises on a pointer of git-lfs
    read_stated("tokenizer", folder / "special_tokens_map.json")
    config = read_stated("tokenizer", folder / "tokenizer_config.json")
    if (longest := int(min(length, config.get("model_max_length") or length))) < 3:
        raise WeightsError(f"model_max_length in {folder} must be at least 3, got {longest}")
    return BytePairs(folder, longest, pad)


def _schedule(published: Published, prediction: Prediction | None, family: Family) -> Schedule:
    """The noise schedule that the UNet was trained with, and the spacing of the sampler's steps.

    The sampler is always DDIM, whatever scheduler is configured; without step noise, Euler's method is equal
    to DDIM.
    """
    path, kind, abar = published.path, published.scheduler.get("_class_name"), published.abar
    known = dict(published.scheduler) if kind else SD_NOISE | published.scheduler
    # diffusers' pipelines of SD 1.x and 2.x correct clip_sample and steps_offset in older folders
    known |= {"clip_sample": False} if family is not SDXL and known.get("clip_sample", True) is True else {}
    if kind not in ("DDIMScheduler", "DDPMScheduler", "HeunDiscreteScheduler"):
        known.pop("clip_sample", None)  # the other schedulers ignore it
    known = check("scheduler", known, f"{path} (scheduler)")
    if kind not in (None, "DDIMScheduler", "PNDMScheduler"):
        known["set_alpha_to_one"] = True  # the others ignore this key, which SDXL's folder has beside Euler's
    own = [key for key, value in known.items() if key.startswith("use_") and value]  # other noise levels
    if kind and (own or kind not in DDIM_LIKE):
        asked = f"{kind} with {', '.join(own)}" if own else kind
        warnings.warn(f"{path} asks for {asked}; DDIM is used, so its pictures differ", stacklevel=4)
    stated = (known if kind else published.scheduler).get("prediction_type")
    if prediction is None and stated is None and family.prediction != "epsilon":
        assumed = f"{family.prediction!r}, as {family.name} at {family.image_size} pixels does"
        hint = "For the 512-pixel base model give prediction='epsilon' (--prediction epsilon)"
        warnings.warn(f"{path} does not say what its UNet predicts; assuming {assumed}. {hint}", stacklevel=3)
    ours = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x0", None: family.prediction}
    zero = bool(known.get("rescale_betas_zero_snr") or (abar is not None and abar[-1] < 1e-6))
    euler = kind not in (None, "DDIMScheduler", "DDPMScheduler", "PNDMScheduler")
    config = ScheduleConfig(
        *(known[key] for key in list(SD_NOISE)[:4]), prediction=prediction or ours[stated], zero_snr=zero,
        spacing=known["timestep_spacing"], offset=(known["steps_offset"] or 0) if family is SDXL else 1,
        euler=euler, set_alpha_to_one=bool(known["set_alpha_to_one"]),
    )  # fmt: skip
    if abar is not None and not (off := (Schedule(config).abar - abar).abs().max()) <= 5e-3:  # bfloat16's
        raise WeightsError(f"{path} has another noise schedule: its alphas_cumprod is off by {off:.3f}")
    if config.zero_snr and config.prediction == "epsilon" and config.spacing != "leading":
        raise WeightsError(f"{path} has zero terminal SNR, where epsilon does not determine x_0; it needs v")
    return Schedule(config)


def _stored(part: Part) -> torch.dtype:
    """The dtype to compute in: float16 or bfloat16 if all tensors have it, else float32.

    float8 counts as float16.
    """
    dtypes = {t.dtype for t in part.tensors.values() if t.is_floating_point()}
    halves = {torch.float16 if dtype.itemsize == 1 else dtype for dtype in dtypes}
    return halves.pop() if halves in ({torch.float16}, {torch.bfloat16}) else torch.float32


def filled(network: type[nn.Module], config: object, part: Part, dtype: Dtype) -> nn.Module:
    """A frozen network with the part's tensors, which are then removed from the part to save memory."""
    with torch.device("meta"):
        module = network(config).to(dtype or _stored(part))
    load_into(module, part.tensors, source=part.source)
    part.tensors.clear()
    return module.eval().requires_grad_(False)


# --- CLIP ---------------------------------------------------------------------------------------------------
def load_clip(path: Place, tokenizer: Folder = None, activation: str | None = None) -> tuple[CLIP, Words]:
    """Load CLIP from a folder of transformers' CLIPModel, or from OpenCLIP's state dict (a file or a folder).

    `activation` overrides that of the configuration file, which a state dict alone does not have.  OpenAI's
    weights need "quick_gelu", and LAION's "gelu", the default for OpenCLIP.  `tokenizer` is that of `Given`.
    Raises WeightsError when a file is missing, not supported, or does not fit.
    """
    path = Path(path)
    text, vision, pictures = _clip_parts(weights_file(path), activation)
    whole, seen = text._replace(prefix=""), parts.vision_sizes(vision, pictures)
    config = CLIPConfig(parts.text_sizes(text), seen, whole.shape("text_projection.weight")[0])
    clip = filled(CLIP, config, whole, None)
    return clip, _tokenizer(path, (None,), clip.text, config.text.length, tokenizer)


def _clip_parts(file: Path, activation: str | None) -> tuple[Part, Part, dict]:
    """Text encoder, image encoder, and the configuration of the pictures, with the keys of transformers."""
    tensors = read_weights(file)
    if any(name.startswith("text_model.") for name in tensors):
        config = read_stated("CLIP", file.parent / "config.json")
        processor = read_json(file.parent / "processor_config.json")  # transformers 5 writes only this file
        pictures = expect(processor.get("image_processor") or {}, dict, "image_processor")
        pictures = check("preprocessor", pictures, "processor_config.json")
        pictures = pictures or read_stated("preprocessor", file.parent / "preprocessor_config.json")
        # transformers prefers KEY_dict, which older files have, to KEY
        stated = {key.removesuffix("_dict"): c for key, c in sorted(config.items()) if c is not None}
        text, vision = (stated.get(key) or {} for key in ("text_config", "vision_config"))
        default, table, said = "quick_gelu", names.TRANSFORMERS_CLIP, text and vision  # transformers' default
    else:
        config = read_stated("open_clip", file.parent / "open_clip_config.json")
        model, seen = (config.get(key) or {} for key in ("model_cfg", "preprocess_cfg"))
        text, vision = (model.get(key) or {} for key in ("text_cfg", "vision_cfg"))
        pictures = {f"image_{key}": value for key, value in seen.items()}
        text = {"num_attention_heads": text["heads"]} if text else {}
        vision = {"num_attention_heads": vision["width"] // vision["head_width"]} if vision else {}
        openai = "input_resolution" in tensors  # written by OpenAI's own program
        default, table = "quick_gelu" if model.get("quick_gelu", openai) else "gelu", names.OPEN_CLIP
        tensors, said = names.open_clip(tensors), openai or "quick_gelu" in model
    if activation is None and not said:
        hint = "LAION's need gelu; OpenAI's, and those trained from them, quick_gelu (--clip-activation)"
        warnings.warn(f"{file} does not state its activation: assuming {default}; {hint}", stacklevel=4)
    text, vision = (c | {"hidden_act": activation or c.get("hidden_act") or default} for c in (text, vision))
    ours = Part(renamed(tensors, table, file), text, str(file), "text.").shortened()
    seen = ours._replace(config=vision, prefix="vision.").shortened()
    return ours._replace(tensors=seen.tensors), seen, pictures
