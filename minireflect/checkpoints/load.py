"""Published checkpoints in our networks: Stable Diffusion 1.x, 2.x and SDXL, and CLIP, from a folder or a
file.

    pipe = load_checkpoint("stable-diffusion-v1-5")         # a LatentDiffusion, as from `load_pipeline`
    clip, tokenizer = load_clip("CLIP-ViT-H-14")            # a reward for real pictures: rl/rewards.py

    minireflect inspect PATH                                # what is in it, which family, what does not match

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
from ..models.tokenizer import BytePairs, NoVocabulary, PromptError, TwoBytePairs
from ..models.unet import UNet
from ..pipeline import LatentDiffusion
from . import names
from .files import WeightsError, load_into, read_weights, tensor_shapes
from .lora import read_lora
from .parts import (
    PROJECTION,
    SD1,
    SD2,
    SDXL,
    UNET_PREFIX,
    Family,
    Part,
    Published,
    autoencoder_sizes,
    read_json,
    read_published,
    renamed,
    text_sizes,
    unet_sizes,
    vision_sizes,
    weights_file,
)


# --- Stable Diffusion ---------------------------------------------------------------------------------------
def load_checkpoint(
    path: str | Path,
    dtype: torch.dtype | None = None,
    tokenizer: str | Path | None = None,
    prediction: Prediction | None = None,
    image_size: int | None = None,
) -> LatentDiffusion:
    """A diffusers folder, or an original single file (.safetensors, .ckpt), of SD 1.x, SD 2.x or SDXL.

    `dtype` of UNet and text encoder is the file's when not given; the autoencoder is always float32, as
    SDXL's overflows in half precision.  `tokenizer` is a folder with CLIP's vocabulary, needed for single
    files that do not lie beside one.  `prediction` ("epsilon", "v") and `image_size` (pixels) overrule what
    the checkpoint says.
    Raises WeightsError that names every tensor that is missing, left over or of another shape.
    """
    published = read_published(Path(path))
    family, parts = family_of(published), published.parts
    unet = _filled(UNet, unet_sizes(parts["unet"], family), parts["unet"], dtype)
    autoencoder = _filled(Autoencoder, autoencoder_sizes(parts["vae"], family), parts["vae"], torch.float32)
    text, width, length = _text_encoder(published, family, dtype)
    if width != unet.config.context_width:
        reads = f"the UNet reads prompts of width {unet.config.context_width}"
        raise WeightsError(f"{path}: {reads}, the text encoder writes {width}")
    schedule = _schedule(published, prediction, family)
    factor = autoencoder.config.factor
    side, size = parts["unet"].config.get("sample_size"), family.image_size
    if isinstance(side, int):
        size = side * factor
    elif family is SD2 and schedule.prediction == "epsilon":
        size = 512  # the base model of SD 2.x, as it was published
    size = image_size or size
    multiple = factor * 2 ** (len(unet.config.channels) - 1)
    if size % multiple:
        raise WeightsError(f"image_size {size} is not a multiple of {multiple} pixels, as this UNet needs")
    words = _tokenizer(published.path, family, length, tokenizer)
    zero_null = family is SDXL and bool(published.index.get("force_zeros_for_empty_prompt", True))
    return LatentDiffusion(words, text, unet, autoencoder, Schedule(schedule), size, zero_null)


def family_of(published: Published) -> Family:
    """Told by what is there: a second text encoder, or how the UNet's attention is projected."""
    path, parts = published.path, published.parts
    tensors = parts["unet"].tensors
    if "text_encoder_2" in parts:
        if "text_encoder" not in parts:
            raise WeightsError(f"{path} is SDXL's refiner, which only finishes the pictures of another model")
        return SDXL
    projection = [t for name, t in tensors.items() if name.endswith(PROJECTION)]
    if not projection:
        raise WeightsError(f"{path} has no UNet with attention: not a checkpoint of Stable Diffusion")
    if "added.fc1.weight" in tensors:
        raise WeightsError(f"{path} has SDXL's UNet, but not its two text encoders")
    is_sd2 = projection[0].ndim == 2 or parts["text_encoder"].need("token.weight").shape[1] == 1024
    return SD2 if is_sd2 else SD1


def _text_encoder(
    published: Published, family: Family, dtype: torch.dtype | None
) -> tuple[TextEncoder | TwoTextEncoders, int, int]:
    """The text encoder, or SDXL's two; the width of its states; the tokens of a prompt."""
    parts = [published.parts[name] for name in ("text_encoder", "text_encoder_2")[: len(family.pads)]]
    configs = [text_sizes(part, penultimate=family is SDXL) for part in parts]
    if family is SDXL and configs[1].projection is None:
        raise WeightsError(f"missing text_projection.weight in {parts[1].source}")
    each = [_filled(TextEncoder, config, part, dtype) for config, part in zip(configs, parts)]
    width, length = sum(config.width for config in configs), configs[0].length
    if family is not SDXL:
        return each[0], width, length
    with torch.device("meta"):
        both = TwoTextEncoders(*configs)
    both.first, both.second = each
    return both.eval(), width, length


def _tokenizer(
    path: Path, family: Family, length: int, given: str | Path | None
) -> BytePairs | TwoBytePairs | NoVocabulary:
    """A vocabulary for each text encoder: the folder's, or the one that is given or lies beside the file."""
    n = len(family.pads)
    if given is None and (path / "tokenizer").is_dir():
        each = [BytePairs(path / name, length) for name in ("tokenizer", "tokenizer_2")[:n]]
    else:
        beside = [] if path.is_dir() else [path.parent / "tokenizer", path.parent]
        files = [f for f in beside if (f / "tokenizer.json").is_file() or (f / "vocab.json").is_file()]
        if given is None and not files:
            return NoVocabulary(path, n * length)
        each = [BytePairs(given or files[0], length, pad) for pad in family.pads]
    return each[0] if n == 1 else TwoBytePairs(*each)


def _schedule(published: Published, prediction: Prediction | None, family: Family) -> ScheduleConfig:
    """The scheduler's configuration where there is one.

    The sampler that it was written for does not matter: ours is DDIM, and its table of steps is Stable
    Diffusion's (leading, offset 1).
    """
    path, known = published.path, published.scheduler
    if known.get("rescale_betas_zero_snr") or known.get("trained_betas") is not None:
        own = "a schedule of its own (zero terminal SNR or listed betas)"
        raise WeightsError(f"{path} has {own}, which is not supported")
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


def _filled(network: type[nn.Module], config: object, part: Part, dtype: torch.dtype | None) -> nn.Module:
    """A network around the part's tensors, which are converted one by one: nothing is in memory twice."""
    stored = next(t.dtype for t in part.tensors.values() if t.is_floating_point())
    with torch.device("meta"):
        module = network(config).to(dtype or stored)
    load_into(module, part.tensors, source=part.source)
    part.tensors.clear()
    return module.eval().requires_grad_(False)


# --- CLIP ---------------------------------------------------------------------------------------------------
class LoadedCLIP(NamedTuple):
    clip: CLIP
    tokenizer: BytePairs | NoVocabulary


def load_clip(
    path: str | Path,
    dtype: torch.dtype | None = None,
    tokenizer: str | Path | None = None,
    quick_gelu: bool | None = None,
) -> LoadedCLIP:
    """A CLIP: a folder of transformers' CLIPModel, or OpenCLIP's state dict (a file, or a folder with it).

    `quick_gelu` overrules the activation; an OpenCLIP state dict does not tell it: OpenAI's own weights need
    True, all of LAION's False (the default without a configuration file).  `tokenizer` as in
    `load_checkpoint`.
    Raises WeightsError.
    """
    path = Path(path)
    if not path.exists():
        raise WeightsError(f"there is no CLIP {path}")
    folder, file = (path, weights_file(path)) if path.is_dir() else (path.parent, path)
    text, vision, pictures = _clip_parts(folder, file, quick_gelu)
    vision_config = vision_sizes(vision, pictures)
    text_config = text_sizes(text)
    whole = text._replace(prefix="")
    sizes = CLIPConfig(text_config, vision_config, whole.need("text_projection.weight").shape[0])
    clip = _filled(CLIP, sizes, whole, dtype)
    try:
        return LoadedCLIP(clip, BytePairs(tokenizer or folder, text_config.length))
    except PromptError:
        if tokenizer:
            raise
        return LoadedCLIP(clip, NoVocabulary(path, text_config.length))


def _clip_parts(folder: Path, file: Path, quick_gelu: bool | None) -> tuple[Part, Part, dict]:
    """Text and image encoder, with configurations in transformers' words, and that of the pictures."""
    tensors = read_weights(file)
    if any(name.startswith("text_model.") for name in tensors):
        config, pictures = read_json(folder / "config.json"), read_json(folder / "preprocessor_config.json")
        text, vision = config.get("text_config") or {}, config.get("vision_config") or {}
        default, ours = (
            "quick_gelu",
            renamed(tensors, names.TRANSFORMERS_CLIP, file),
        )  # transformers' own default
    else:
        config = read_json(folder / "open_clip_config.json")
        model = config.get("model_cfg") or {}
        pictures = {f"image_{key}": value for key, value in (config.get("preprocess_cfg") or {}).items()}
        text, vision = model.get("text_cfg") or {}, model.get("vision_cfg") or {}
        if "heads" in text:
            text = {"num_attention_heads": text["heads"]}
        if "head_width" in vision:
            vision = {"num_attention_heads": vision["width"] // vision["head_width"]}
        default = "quick_gelu" if model.get("quick_gelu") else "gelu"
        ours = renamed(names.open_clip(tensors), names.OPEN_CLIP, file)
    if quick_gelu is not None:
        default = "quick_gelu" if quick_gelu else "gelu"
        text, vision = text | {"hidden_act": default}, vision | {"hidden_act": default}
    text, vision = ({**c, "hidden_act": c.get("hidden_act") or default} for c in (text, vision))
    source = str(file)
    return Part(ours, text, source, "text."), Part(ours, vision, source, "vision."), pictures


# --- what is in it
# -------------------------------------------------------------------------------------------
def describe(path: str | Path) -> str:
    """A checkpoint, CLIP, LoRA or file of ours in a few lines; it is loaded, so that what does not fit is
    named.
    """
    path = Path(path)
    if (path / "model_index.json").is_file():
        return _describe_checkpoint(path)
    shapes = tensor_shapes(weights_file(path) if path.is_dir() else path)
    if path.is_file() and any(name.startswith(UNET_PREFIX) for name in shapes):
        return _describe_checkpoint(path)
    if any("lora" in name for name in shapes):
        layers = read_lora(path)
        ranks = ", ".join(map(str, sorted({A.shape[0] for A, _, _ in layers.values()})))
        return f"{path}: a LoRA of {len(layers)} layers, rank {ranks}, first {next(iter(layers))}"
    if any(name.startswith(("vision_model.", "visual.")) for name in shapes):
        clip, words = load_clip(path)
        pictures = f"pictures of {clip.config.vision.size} pixels"
        return f"{path}: CLIP, {_counted(clip)}: all matched; {pictures}, {_vocabulary(words)}"
    some = ", ".join(f"{name} {shape}" for name, shape in list(shapes.items())[:5])
    return f"{path}: {len(shapes)} tensors, of no family known here: {some}"


def _describe_checkpoint(path: Path) -> str:
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        pipe = load_checkpoint(path)
    name = SDXL.name
    if isinstance(pipe.text_encoder, TextEncoder):
        is_sd2 = pipe.unet.config.use_linear_projection or pipe.text_encoder.config.width == 1024
        name = SD2.name if is_sd2 else SD1.name
    lines = [f"{path}: {name}, pictures of {pipe.image_size} x {pipe.image_size}"]
    for part in ("text_encoder", "unet", "autoencoder"):
        lines.append(f"  {part:13} {_counted(getattr(pipe, part))}: all matched")
    c = pipe.schedule.config
    betas = f"beta {c.beta_start} to {c.beta_end} {c.beta_schedule}"
    lines.append(f"  predicts {c.prediction}, {c.train_steps} levels, {betas}")
    lines.append(f"  {_vocabulary(pipe.tokenizer)}")
    return "\n".join(lines + [f"  note: {note.message}" for note in notes])


def _vocabulary(tokenizer: BytePairs | TwoBytePairs | NoVocabulary) -> str:
    if isinstance(tokenizer, NoVocabulary):
        return "no vocabulary: give --tokenizer FOLDER"
    return f"prompts of {tokenizer.length} tokens"


def _counted(module: nn.Module) -> str:
    dtype = str(next(module.parameters()).dtype).removeprefix("torch.")
    numbers = sum(p.numel() for p in module.parameters())
    return f"{len(module.state_dict()):,} tensors, {numbers:,} parameters, {dtype}"
