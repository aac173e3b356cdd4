"""Published checkpoints in our networks: Stable Diffusion 1.x, 2.x and SDXL, and CLIP, from a folder or a single file.

    pipe = load_checkpoint("stable-diffusion-v1-5")                  # what `load_pipeline` calls for it: the same LatentDiffusion
    clip, tokenizer = load_clip("CLIP-ViT-H-14")                     # a reward for real pictures: rl/rewards.py

    python -m minireflect.checkpoints PATH                           what is in it, which family, what does not match

Sizes are read off the tensors.  What tensors cannot tell (heads, prediction, schedule) stands in the configuration files of a
folder; a single file has none, and the values are then those that its family was published with.  Nothing is downloaded.
"""

import argparse
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from ..diffusion.schedule import Prediction, Schedule, ScheduleConfig
from ..models.autoencoder import Autoencoder
from ..models.clip import (
    CLIP,
    OPENAI_MEAN,
    OPENAI_STD,
    CLIPConfig,
    TextEncoder,
    TwoTextEncoders,
    VisionConfig,
)
from ..models.tokenizer import BytePairs, NoVocabulary, PromptError
from ..models.unet import UNet
from ..pipeline import LatentDiffusion
from . import names
from .files import WeightsError, load_into, read_weights, tensor_shapes
from .lora import read_lora
from .ours import is_checkpoint
from .parts import (
    PREFIXES,
    SD1,
    SD2,
    SDXL,
    Family,
    Part,
    autoencoder_sizes,
    count,
    names_as_ours,
    need,
    parts_of_file,
    parts_of_folder,
    read_json,
    text_sizes,
    unet_sizes,
    weights_file,
)


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
        parts, read_tokenizer = parts_of_folder(path, tokenizer)
    elif path.is_file():
        parts, read_tokenizer = parts_of_file(path, tokenizer)
    else:
        raise WeightsError(f"there is no checkpoint {path}")
    family = family_of(parts, path)
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


def family_of(parts: dict[str, Part], path: Path) -> Family:
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
    is_sd2 = projection[0].ndim == 2 or parts["text_encoder"].tensors["token.weight"].shape[1] == 1024
    return SD2 if is_sd2 else SD1


def _schedule(known: dict, prediction: Prediction | None, family: Family, path: Path) -> ScheduleConfig:
    """The scheduler's configuration where there is one.  Which sampler it was written for does not matter: ours is DDIM, and
    its table of steps is Stable Diffusion's (leading, offset 1)."""
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
    """SDXL has two encoders, the others one."""
    configs = [
        text_sizes(parts[name].tensors, parts[name].config, parts[name].source, penultimate=family is SDXL)
        for name in (("text_encoder", "text_encoder_2") if family is SDXL else ("text_encoder",))
    ]
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
        config = read_json(folder / "config.json")
        text, vision = config.get("text_config") or {}, config.get("vision_config") or {}
        about = read_json(folder / "preprocessor_config.json")
        default = "quick_gelu"  # transformers' own
        ours = names_as_ours(tensors, names.TRANSFORMERS_CLIP, file)
    else:
        config = read_json(folder / "open_clip_config.json")
        model = config.get("model_cfg") or {}
        about = {f"image_{k}": v for k, v in (config.get("preprocess_cfg") or {}).items()}
        text, vision = model.get("text_cfg") or {}, model.get("vision_cfg") or {}
        if "heads" in text:
            text = {"num_attention_heads": text["heads"]}
        if "head_width" in vision:
            vision = {"num_attention_heads": vision["width"] // vision["head_width"]}
        default = "quick_gelu" if model.get("quick_gelu") else "gelu"
        ours = names_as_ours(names.open_clip(tensors), names.OPEN_CLIP, file)
    if quick_gelu is not None:
        default, text, vision = (
            ("quick_gelu" if quick_gelu else "gelu"),
            {**text, "hidden_act": None},
            {**vision, "hidden_act": None},
        )
    source = str(file)
    patch = need(ours, "vision.patch.weight", source)  # (d 3 p p)
    position = need(ours, "vision.position.weight", source)  # (1+n d)
    width = patch.shape[0]
    vision_config = VisionConfig(
        round((len(position) - 1) ** 0.5) * patch.shape[2], patch.shape[2], width,
        count(ours, r"vision\.blocks\.(\d+)\."),
        vision.get("num_attention_heads") or VISION_HEADS.get(width, width // 64),
        (vision.get("hidden_act") or default) == "quick_gelu",
        mean=tuple(2 * m - 1 for m in about["image_mean"]) if about.get("image_mean") else OPENAI_MEAN,
        std=tuple(2 * s for s in about["image_std"]) if about.get("image_std") else OPENAI_STD,
    )  # fmt: skip
    text_config = text_sizes(
        ours, {**text, "hidden_act": text.get("hidden_act") or default}, source, False, "text."
    )
    joint = need(ours, "text_projection.weight", source).shape[0]
    clip = _filled(CLIP, CLIPConfig(text_config, vision_config, joint), Part(ours, {}, source), dtype)
    where = Path(tokenizer) if tokenizer else folder
    try:
        return LoadedCLIP(clip, BytePairs(where, text_config.length))
    except PromptError:
        if tokenizer:
            raise
        return LoadedCLIP(clip, NoVocabulary(path, text_config.length))


# --- what is in it -------------------------------------------------------------------------------------------
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
