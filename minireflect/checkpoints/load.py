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
from ..models.autoencoder import Autoencoder
from ..models.clip import CLIP, CLIPConfig, TextEncoder, TwoTextEncoders
from ..models.tokenizer import BytePairs, NoVocabulary, TwoBytePairs
from ..models.unet import UNet
from ..pipeline import LatentDiffusion
from . import names, parts
from .files import Place, WeightsError, load_into, read_json, read_weights, renamed
from .parts import SD1, SD2, SDXL, Family, Part, Published, read_published, weights_file

Dtype, Folder = torch.dtype | None, Place | None
Words = BytePairs | TwoBytePairs | NoVocabulary


class Given(NamedTuple):
    """What overrules a checkpoint of Stable Diffusion; None leaves it as its files say."""

    # of UNet and text encoder; the autoencoder is always float32, as SDXL's overflows in half precision
    dtype: Dtype = None
    tokenizer: Folder = None  # with CLIP's vocabulary, for files that do not lie beside one
    prediction: Prediction | None = None  # "epsilon", "v"
    image_size: int | None = None  # pixels


# --- Stable Diffusion ---------------------------------------------------------------------------------------
def load_checkpoint(path: Place, given: Given = Given()) -> LatentDiffusion:
    """A diffusers folder, or an original single file (.safetensors, .ckpt), of SD 1.x, SD 2.x or SDXL.

    Raises WeightsError that names every tensor that is missing, left over or of another shape.
    """
    published = read_published(Path(path))
    family, found = family_of(published), published.parts
    unet = _filled(UNet, parts.unet_sizes(found["unet"], family), found["unet"], given.dtype)
    vae = found["vae"]
    autoencoder = _filled(Autoencoder, parts.autoencoder_sizes(vae, family), vae, torch.float32)
    text, width, length = _text_encoder(published, family, given.dtype)
    if width != (reads := unet.config.context_width):
        widths = f"the UNet reads prompts of width {reads}, the text encoder writes {width}"
        raise WeightsError(f"{path}: {widths}")
    schedule, factor = _schedule(published, given.prediction, family), autoencoder.config.factor
    side = found["unet"].config.get("sample_size")
    is_sd2_base = family is SD2 and schedule.prediction == "epsilon"  # published for 512 pixels
    known = side * factor if isinstance(side, int) else 512 if is_sd2_base else family.image_size
    size = given.image_size or known
    multiple = factor * 2 ** (len(unet.config.channels) - 1)
    if size % multiple:
        raise WeightsError(f"image_size {size} is not a multiple of {multiple} pixels, as this UNet needs")
    words = _tokenizer(published.path, family.pads, length, given.tokenizer)
    zero_null = family is SDXL and bool(published.index.get("force_zeros_for_empty_prompt", True))
    return LatentDiffusion(words, text, unet, autoencoder, Schedule(schedule), size, zero_null)


def family_of(published: Published) -> Family:
    """Told by what is there: a second text encoder, or how the UNet's attention is projected."""
    path, unet = published.path, published.parts["unet"]
    if "text_encoder_2" in published.parts:
        return SDXL
    projection = unet.ending(parts.PROJECTION)
    if "added.fc1.weight" in unet.tensors:
        raise WeightsError(f"{path} has SDXL's UNet, but not its two text encoders")
    text_width = published.parts["text_encoder"].need("token.weight").shape[1]
    return SD2 if (projection is not None and projection.ndim == 2) or text_width == 1024 else SD1


def _text_encoder(published: Published, family: Family, dtype: Dtype) -> tuple[nn.Module, int, int]:
    """The text encoder, or SDXL's two; the width of its states; the tokens of a prompt."""
    both = [published.parts[name] for name in ("text_encoder", "text_encoder_2")[: len(family.pads)]]
    configs = [parts.text_sizes(part, penultimate=family is SDXL) for part in both]
    if family is SDXL:
        both[1].need("text_projection.weight")
    each = [_filled(TextEncoder, config, part, dtype) for config, part in zip(configs, both)]
    width, length = sum(config.width for config in configs), configs[0].length
    return TwoTextEncoders(*each).eval() if family is SDXL else each[0], width, length


def _tokenizer(path: Path, pads: tuple[str | None, ...], length: int, given: Folder) -> Words:
    """A vocabulary for each text encoder: the folder's, or the one that is given or lies beside the file."""
    n = len(pads)
    if given is None and (path / "tokenizer").is_dir():
        each = [BytePairs(path / name, length) for name in ("tokenizer", "tokenizer_2")[:n]]
    else:
        beside = [path] if path.is_dir() else [path.parent / "tokenizer", path.parent]
        files = [f for f in beside if (f / "tokenizer.json").is_file() or (f / "vocab.json").is_file()]
        if given is None and not files:
            return NoVocabulary(path, n * length)
        each = [BytePairs(given or files[0], length, pad) for pad in pads]
    return each[0] if n == 1 else TwoBytePairs(*each)


def _schedule(published: Published, prediction: Prediction | None, family: Family) -> ScheduleConfig:
    """The scheduler's configuration where there is one.

    The sampler that it was written for does not matter: ours is DDIM, and its table of steps is Stable
    Diffusion's (leading, offset 1).
    """
    path, known = published.path, published.scheduler
    if known.get("rescale_betas_zero_snr") or known.get("trained_betas") is not None:
        raise WeightsError(f"{path} has zero terminal SNR or listed betas, which are not supported")
    stated = known.get("prediction_type", "epsilon" if "beta_start" in known else None)
    if prediction is None and stated is None and family.prediction != "epsilon":
        assumed = f"{family.prediction!r}, as {family.name} at {family.image_size} pixels does"
        hint = "For the 512-pixel base model give prediction='epsilon' (--prediction epsilon)"
        warnings.warn(f"{path} does not say what its UNet predicts; assuming {assumed}. {hint}", stacklevel=3)
    ours = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x0", None: family.prediction}
    if stated not in ours:
        raise WeightsError(f"{path} predicts {stated!r}; expected epsilon, v_prediction or sample")
    steps, shape = known.get("num_train_timesteps", 1000), known.get("beta_schedule", "scaled_linear")
    betas = known.get("beta_start", 0.00085), known.get("beta_end", 0.012)
    return ScheduleConfig(steps, *betas, shape, prediction or ours[stated])


def _filled(network: type[nn.Module], config: object, part: Part, dtype: Dtype) -> nn.Module:
    """A network around the part's tensors, which are converted one by one: nothing is in memory twice."""
    stored = next((t.dtype for t in part.tensors.values() if t.is_floating_point()), torch.float32)
    with torch.device("meta"):
        module = network(config).to(dtype or stored)
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
    vision_config, text_config = parts.vision_sizes(vision, pictures), parts.text_sizes(text)
    whole = text._replace(prefix="")
    sizes = CLIPConfig(text_config, vision_config, whole.need("text_projection.weight").shape[0])
    return _filled(CLIP, sizes, whole, None), _tokenizer(path, (None,), text_config.length, tokenizer)


def _clip_parts(folder: Path, file: Path, quick_gelu: bool | None) -> tuple[Part, Part, dict]:
    """Text and image encoder, with configurations in transformers' words, and that of the pictures."""
    tensors = read_weights(file)
    if any(name.startswith("text_model.") for name in tensors):
        config, pictures = read_json(folder / "config.json"), read_json(folder / "preprocessor_config.json")
        text, vision = config.get("text_config") or {}, config.get("vision_config") or {}
        default, table = "quick_gelu", names.TRANSFORMERS_CLIP  # transformers' own default
    else:
        config = read_json(folder / "open_clip_config.json")
        model = config.get("model_cfg") or {}
        pictures = {f"image_{key}": value for key, value in (config.get("preprocess_cfg") or {}).items()}
        text, vision = model.get("text_cfg") or {}, model.get("vision_cfg") or {}
        if "heads" in text:
            text = {"num_attention_heads": text["heads"]}
        if "head_width" in vision:
            vision = {"num_attention_heads": vision["width"] // vision["head_width"]}
        default, table = "quick_gelu" if model.get("quick_gelu") else "gelu", names.OPEN_CLIP
        tensors = names.open_clip(tensors)
    asked = {True: "quick_gelu", False: "gelu", None: None}[quick_gelu]
    text, vision = (c | {"hidden_act": asked or c.get("hidden_act") or default} for c in (text, vision))
    ours, source = renamed(tensors, table, file), str(file)
    return Part(ours, text, source, "text."), Part(ours, vision, source, "vision."), pictures
