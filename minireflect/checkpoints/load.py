"""Published checkpoints in our networks: Stable Diffusion 1.x, 2.x and SDXL, and CLIP: a folder or a file.

    pipe = load_checkpoint("stable-diffusion-v1-5")         # a LatentDiffusion, as from `load_pipeline`
    clip, tokenizer = load_clip("CLIP-ViT-H-14")            # a reward for real pictures: rl/rewards.py

Sizes are read off the tensors.  What tensors cannot tell (heads, prediction, schedule) stands in the
configuration files of a folder; a single file has none, and gets the values that its family was published
with.  Nothing is downloaded.
"""

import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from ..diffusion.schedule import Prediction, Schedule, ScheduleConfig
from ..disk import Place
from ..models.autoencoder import Autoencoder
from ..models.clip import CLIP, CLIPConfig, TextEncoder, TwoTextEncoders
from ..models.tokenizer import BytePairs, NoVocabulary, TwoBytePairs
from ..models.unet import UNet
from ..pipeline import LatentDiffusion
from . import names, parts
from .files import WeightsError, existing, load_into, read_weights, renamed
from .parts import SD2, SDXL, Family, Part, Published, read_published, weights_file
from .stated import check, read_stated

Dtype, Folder = torch.dtype | None, Place | None
# Of all Stable Diffusion, where nothing else is stated.
SD_NOISE = {
    "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False,
}  # fmt: skip
# Samplers that without step noise are DDIM.
DDIM_LIKE = [f"{name}Scheduler" for name in ["DDIM", "DDPM", "EulerDiscrete", "EulerAncestralDiscrete"]]
Words = BytePairs | TwoBytePairs | NoVocabulary


class Given(NamedTuple):
    """What overrules a checkpoint of Stable Diffusion; None leaves it as its files say."""

    # of UNet and text encoder; the autoencoder is always float32, as SDXL's overflows in half precision
    dtype: Dtype = None
    tokenizer: Folder = None  # with CLIP's vocabulary, for files that do not lie beside one
    prediction: Prediction | None = None  # "epsilon", "v"
    image_size: int | tuple[int, int] | None = None  # pixels: of each side, or height and width
    vae: Folder = None  # another autoencoder: a folder, or a file in either layout


# --- Stable Diffusion ---------------------------------------------------------------------------------------
def load_checkpoint(path: Place, given: Given = Given()) -> LatentDiffusion:
    """A diffusers folder, or an original single file (.safetensors, .ckpt), of SD 1.x, SD 2.x or SDXL.

    Raises WeightsError that names every tensor that is missing, left over or of another shape.
    """
    published = read_published(Path(path), None if given.vae is None else Path(given.vae))
    family, found = family_of(published), published.parts
    if {given.dtype, stored := _stored(found["unet"])} == {torch.float16, torch.bfloat16}:
        said = f"there is {stored}, and {given.dtype} was asked for: its numbers are rounded twice"
        warnings.warn(f"{found['unet'].source}: {said}".replace("torch.", ""), stacklevel=3)
    unet = _filled(UNet, parts.unet_sizes(found["unet"], family), found["unet"], given.dtype)
    latents = parts.autoencoder_sizes(found["vae"], family)
    autoencoder = _filled(Autoencoder, latents, found["vae"], torch.float32)
    texts = [found[name] for name in ("text_encoder", "text_encoder_2")[: len(family.pads)]]
    configs = [parts.text_sizes(part, family is SDXL) for part in texts]
    if family is SDXL:
        texts[1].shape("text_projection.weight")
    encoders = [_filled(TextEncoder, config, part, given.dtype) for config, part in zip(configs, texts)]
    text = TwoTextEncoders(*encoders).eval() if family is SDXL else encoders[0]
    if (width := sum(config.width for config in configs)) != (reads := unet.config.context_width):
        raise WeightsError(f"{path}: its UNet reads prompts of width {reads}, its text is of width {width}")
    if (z := latents.latent_channels) != (reads := unet.config.in_channels):
        raise WeightsError(f"{found['vae'].source} has {z} latent channels, the UNet reads {reads}")
    schedule, factor = _schedule(published, given.prediction, family), latents.factor
    size, side = given.image_size, found["unet"].config.get("sample_size")  # in pixels, in latents
    if size is None and side:
        size = side * factor if isinstance(side, int) else tuple(n * factor for n in side)
    # SD 2's base, which predicts the noise, was published for 512 pixels
    size = size or (512 if family is SD2 and schedule.config.prediction == "epsilon" else family.image_size)
    multiple = factor * 2 ** (len(unet.config.channels) - 1)
    if any(n % multiple for n in ([size] if isinstance(size, int) else size)):
        raise WeightsError(f"image_size {size} is not a multiple of {multiple} pixels, as this UNet needs")
    words = _tokenizer(published.path, family.pads, text, configs[0].length, given.tokenizer)
    zero_null = family is SDXL and bool(published.index.get("force_zeros_for_empty_prompt", True))
    return LatentDiffusion(words, text, unet, autoencoder, schedule, size, zero_null)


def family_of(published: Published) -> Family:
    """Told by what is there: a second text encoder, or how the UNet's attention is projected."""
    path, unet = published.path, published.parts["unet"]
    if "text_encoder_2" in published.parts:
        return SDXL
    if "added.fc1.weight" in unet.tensors:
        raise WeightsError(f"{path} has SDXL's UNet, but not its two text encoders")
    text_width = published.parts["text_encoder"].shape("token.weight")[1]
    return SD2 if len(unet.ending(parts.PROJECTION)) == 2 or text_width == 1024 else parts.SD1


def _tokenizer(path: Path, pads: tuple, encoder: nn.Module, length: int, given: Folder) -> Words:
    """A vocabulary for each text encoder: the folder's, or the one that is given or lies beside the file."""
    n = len(pads)
    if given is None and (path / "tokenizer").is_dir():
        folders, pads = [path / "tokenizer", path / "tokenizer_2"][:n], (None,) * n
    else:
        beside = [path] if path.is_dir() else [path.parent / "tokenizer", path.parent]
        beside = [f for f in beside if (f / "tokenizer.json").is_file() or (f / "vocab.json").is_file()]
        if given is None and not beside:
            return NoVocabulary(path, n * length)
        folders = [Path(given or beside[0])] * n
    each, tokens = [], [m.num_embeddings for name, m in encoder.named_modules() if name.endswith("token")]
    for folder, pad, known in zip(folders, pads, tokens):
        for file in folder.iterdir() if folder.is_dir() else ():
            existing(file) if file.is_file() else None  # raises on a pointer of git-lfs
        config = read_stated("tokenizer", folder / "tokenizer_config.json")
        if (longest := int(min(length, config.get("model_max_length") or length))) < 3:
            raise WeightsError(f"model_max_length in {folder} must be at least 3, got {longest}")
        words = BytePairs(folder, longest, pad)
        if len(words) > known:
            has = f"the vocabulary in {folder} has {len(words):,} tokens, the text encoder {known:,}"
            raise WeightsError(f"{has}: the words that were learnt are not in this checkpoint")
        each.append(words)
    return each[0] if n == 1 else TwoBytePairs(*each)


def _schedule(published: Published, prediction: Prediction | None, family: Family) -> Schedule:
    """The noise that the UNet was trained with, and the levels that its sampler visits.

    The sampler is DDIM whatever the configuration names; without step noise Euler's is the same.
    """
    path, kind, abar = published.path, published.scheduler.get("_class_name"), published.abar
    known = dict(published.scheduler) if kind else SD_NOISE | published.scheduler
    if family is not SDXL:  # diffusers' pipelines of SD 1.x and 2.x mend these two in older folders
        known |= {"steps_offset": 1, "clip_sample": False}
    if kind not in ("DDIMScheduler", "DDPMScheduler", "HeunDiscreteScheduler"):
        known.pop("clip_sample", None)  # not read by the other samplers
    known = check("scheduler", known, f"{path} (scheduler)")
    own = [key for key, value in known.items() if key.startswith("use_") and value]  # noise levels
    if kind and (own or kind not in DDIM_LIKE):
        asked = f"{kind} with {', '.join(own)}" if own else kind
        warnings.warn(f"{path} asks for {asked}; it is drawn with DDIM, which gives others", stacklevel=4)
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
        spacing=known["timestep_spacing"], offset=known["steps_offset"] or 0, euler=euler,
        set_alpha_to_one=bool(known["set_alpha_to_one"]),
    )  # fmt: skip
    if abar is not None and not (off := (Schedule(config).abar - abar).abs().max()) <= 5e-3:  # bfloat16's
        raise WeightsError(f"{path} was trained with other noise: its alphas_cumprod is off by {off:.3f}")
    if config.zero_snr and config.prediction == "epsilon" and config.spacing != "leading":
        raise WeightsError(f"{path} has zero terminal SNR: there noise does not tell the picture; it needs v")
    return Schedule(config)


def _stored(part: Part) -> torch.dtype:
    """The precision to compute in: float32, unless all is stored in one half, or in float8 as in float16."""
    dtypes = {t.dtype for t in part.tensors.values() if t.is_floating_point()}
    halves = {torch.float16 if dtype.itemsize == 1 else dtype for dtype in dtypes}
    return halves.pop() if halves in ({torch.float16}, {torch.bfloat16}) else torch.float32


def _filled(network: type[nn.Module], config: object, part: Part, dtype: Dtype) -> nn.Module:
    """A network around the part's tensors, which are converted one by one: nothing is in memory twice."""
    with torch.device("meta"):
        module = network(config).to(dtype or _stored(part))
    load_into(module, part.tensors, source=part.source)
    part.tensors.clear()
    return module.eval().requires_grad_(False)


# --- CLIP ---------------------------------------------------------------------------------------------------
def load_clip(path: Place, tokenizer: Folder = None, quick_gelu: bool | None = None) -> tuple[CLIP, Words]:
    """A CLIP: a folder of transformers' CLIPModel, or OpenCLIP's state dict (a file, or a folder with it).

    `quick_gelu` overrules the activation; an OpenCLIP state dict does not tell it: OpenAI's own weights need
    True, all of LAION's False (the default without a configuration file).  `tokenizer` as in `Given`.
    Raises WeightsError.
    """
    path = Path(path)
    if not path.exists():
        raise WeightsError(f"there is no CLIP {path}")
    folder, file = path if path.is_dir() else path.parent, weights_file(path)
    text, vision, pictures = _clip_parts(folder, file, quick_gelu)
    whole, seen = text._replace(prefix=""), parts.vision_sizes(vision, pictures)
    config = CLIPConfig(parts.text_sizes(text), seen, whole.shape("text_projection.weight")[0])
    clip = _filled(CLIP, config, whole, None)
    return clip, _tokenizer(path, (None,), clip.text, config.text.length, tokenizer)


def _clip_parts(folder: Path, file: Path, quick_gelu: bool | None) -> tuple[Part, Part, dict]:
    """Text and image encoder, with configurations in transformers' words, and that of the pictures."""
    tensors = read_weights(file)
    if any(name.startswith("text_model.") for name in tensors):
        config = read_stated("CLIP", folder / "config.json")
        pictures = read_stated("preprocessor", folder / "preprocessor_config.json")
        text, vision = (config.get(key) or {} for key in ("text_config", "vision_config"))
        default, table, said = "quick_gelu", names.TRANSFORMERS_CLIP, config  # transformers' own default
    else:
        config = read_stated("open_clip", folder / "open_clip_config.json")
        model, seen = (config.get(key) or {} for key in ("model_cfg", "preprocess_cfg"))
        text, vision = (model.get(key) or {} for key in ("text_cfg", "vision_cfg"))
        pictures = {f"image_{key}": value for key, value in seen.items()}
        text = {"num_attention_heads": text["heads"]} if text else {}
        vision = {"num_attention_heads": vision["width"] // vision["head_width"]} if vision else {}
        openai = "input_resolution" in tensors  # OpenAI's own program
        default, table = "quick_gelu" if model.get("quick_gelu", openai) else "gelu", names.OPEN_CLIP
        tensors, said = names.open_clip(tensors), openai or "quick_gelu" in model
    if quick_gelu is None and not said:
        hint = "LAION's have gelu; OpenAI's, and what was trained from them, quick_gelu (--clip-activation)"
        warnings.warn(f"{file} does not say its activation: assuming {default}; {hint}", stacklevel=4)
    asked = {True: "quick_gelu", False: "gelu", None: None}[quick_gelu]
    text, vision = (c | {"hidden_act": asked or c.get("hidden_act") or default} for c in (text, vision))
    ours = Part(renamed(tensors, table, file), text, str(file), "text.").shortened()
    seen = ours._replace(config=vision, prefix="vision.").shortened()
    return ours._replace(tensors=seen.tensors), seen, pictures
