"""Save and load the networks of minireflect: safetensors files with the configuration in their metadata.

    pipe = load_pipeline()                  the shipped weights, a run folder, or Stable Diffusion (load.py)
    save_pipeline(pipe, folder)             one file for each network
    reasongen = load_reasongen()            ReasonGen-R1: the transformer and its codec

    minireflect inspect PATH                describe a file, ours or published, and check that it fits

The file of the text encoder also has the vocabulary, and the file of the UNet the noise schedule.
"""

import json
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from ..diffusion.schedule import Schedule, ScheduleConfig
from ..disk import Place, parse_json
from ..models.autoencoder import Autoencoder, AutoencoderConfig, Codec, VQAutoencoder, VQConfig
from ..models.clip import Matcher, MatcherConfig, TextConfig, TextEncoder
from ..models.lora import lora_layers
from ..models.reasongen import ReasonGen, ReasonGenConfig
from ..models.tokenizer import NoVocabulary, Tokenizer
from ..models.transformer import Actor, ActorConfig
from ..models.unet import UNet, UNetConfig
from ..pipeline import LatentDiffusion, ReasonPipeline
from . import lora, parts
from .files import WeightsError, load_into, named_as, read_metadata, read_ours, read_weights, save_weights
from .load import Given, Words, family_of, filled, load_checkpoint, load_clip, vocabulary
from .stated import read_stated

SHIPPED = Path(__file__).parent.parent / "pretrained"
RIG = SHIPPED / "rlrig"  # shipped weights of RL-RIG
REASON = SHIPPED / "reasongen"  # shipped weights of ReasonGen-R1
Device = torch.device | str
PARTS = ("autoencoder", "text_encoder", "unet")

# The networks that are saved in files of minireflect, and the classes of their configurations.
CONFIGS: dict[type[nn.Module], type] = {
    Autoencoder: AutoencoderConfig, TextEncoder: TextConfig, UNet: UNetConfig, Matcher: MatcherConfig,
    Actor: ActorConfig, VQAutoencoder: VQConfig, ReasonGen: ReasonGenConfig,
}  # fmt: skip


# Networks of Stable Diffusion in files of their own: part -> text in tensor names, class, sizes.
LONE = {
    "unet": ("time_embed", UNet, parts.unet_sizes),
    "vae": ("decoder.conv_in", Autoencoder, parts.autoencoder_sizes),
    "text_encoder": ("token_embedding", TextEncoder, lambda part, family: parts.text_sizes(part)),
}  # fmt: skip


def save_module(path: Path, module: nn.Module, about: dict[str, str]) -> None:
    """Save a network in float32; the metadata are its configuration and the strings `about`."""
    tensors = {key: value.float() for key, value in module.state_dict().items()}
    save_weights(path, tensors, {"config": json.dumps(asdict(module.config)), **about})


def load_module(path: Path, network: type[nn.Module]) -> tuple[nn.Module, dict[str, str]]:
    """Load a network of CONFIGS, in evaluation mode and frozen.  -> the network, the metadata of its file

    Raises WeightsError when the file is missing, damaged, or of another network.
    """
    tensors, about = read_ours(path)
    config = stated(path, about, "config", CONFIGS[network])
    problem = f"{path} has sizes that do not fit each other"
    with named_as(problem, ValueError, RuntimeError), torch.device("meta"):
        sketch = network(config)
    load_into(sketch, tensors, source=str(path))  # checks the sizes before memory is allocated for them
    module = network(config)
    load_into(module, tensors, source=str(path))
    module.to(memory_format=torch.channels_last)  # makes convolutions a third faster on the CPU
    return module.eval().requires_grad_(False), about


def stated(path: Place, about: dict[str, str], key: str, kind: type) -> object:
    """A record of `kind` from the JSON text `about[key]`.

    Raises WeightsError when it is missing, of another kind, or has values out of range.
    """
    if key not in about:
        raise WeightsError(f"{path} was not saved by minireflect: it has no {kind.__name__}")
    with named_as(f"{path} does not hold a {kind.__name__}", ValueError, TypeError):
        return kind(**parse_json(about[key], dict, key))


def words_of(path: Place, about: dict[str, str], length: int, vocabulary: int) -> Tokenizer:
    """The tokenizer with the vocabulary in a file's metadata, for prompts of `length` tokens.

    Raises WeightsError when there are no words, or more than an encoder of `vocabulary` tokens has.
    """
    words = Tokenizer(about.get("words", "").split(), length)
    if not words.words or len(words) > vocabulary:
        raise WeightsError(f"{path} has {len(words.words)} words, but its network has {vocabulary} tokens")
    return words


def load_pipeline(path: Place | None = None, unet: str = "unet", **given: object) -> LatentDiffusion:
    """Load a pipeline: the shipped one by default, that of a training run, or Stable Diffusion.

    `path` is one of
        a run folder, or another folder with files of minireflect.  `unet` names the file of the UNet: a run
            of SRRL has "unet", and "base_unet", from which the training started;
        a diffusers folder, or an original .safetensors or .ckpt file, of SD 1.x, SD 2.x or SDXL.  Only then
            `given` may have dtype, tokenizer, prediction, image_size and vae (`Given` in load.py).
    Raises WeightsError when a file is missing, damaged, or does not fit; TypeError on an unknown `given`.
    """
    overrides = Given(**given)  # raises TypeError for every kind of `path`
    if path is not None and (Path(path).is_file() or (Path(path) / "model_index.json").is_file()):
        return load_checkpoint(path, overrides)
    folder = weights_folder(path)
    if given:
        raise WeightsError(f"{', '.join(given)} apply to published checkpoints only, not to {folder}")
    autoencoder, _ = load_module(folder / "autoencoder.safetensors", Autoencoder)
    text_encoder, about = load_module(folder / "text_encoder.safetensors", TextEncoder)
    network, about_unet = load_module(folder / f"{unet}.safetensors", UNet)
    text = text_encoder.config
    words = words_of(folder / "text_encoder.safetensors", about, text.length, text.vocabulary)
    schedule = Schedule(stated(folder / f"{unet}.safetensors", about_unet, "schedule", ScheduleConfig))
    widths = (text.width, autoencoder.config.latent_channels)
    if widths != (network.config.context_width, network.config.in_channels):
        raise WeightsError(f"{folder}: {unet} does not fit the text encoder and autoencoder beside it")
    return LatentDiffusion(words, text_encoder, network, autoencoder, schedule)


def save_pipeline(pipe: LatentDiffusion, folder: Path, parts: tuple[str, ...] = PARTS) -> None:
    """Write each of `parts` as FOLDER/PART.safetensors.  Raises WeightsError for a published checkpoint."""
    if lora_layers(pipe.unet):
        raise WeightsError("its UNet has a LoRA: call merge_lora first, or save it with save_lora")
    if not isinstance(pipe.tokenizer, Tokenizer):
        raise WeightsError("a published checkpoint is not saved in our files; save its LoRA with save_lora")
    words, schedule = " ".join(pipe.tokenizer.words), json.dumps(asdict(pipe.schedule.config))
    about = {"text_encoder": {"words": words}, "unet": {"schedule": schedule}}
    for name in parts:
        save_module(folder / f"{name}.safetensors", getattr(pipe, name), about.get(name, {}))


def weights_folder(path: Place | None) -> Path:
    """The folder of a run's weights; None = the shipped weights.  Raises WeightsError if it is missing."""
    folder = SHIPPED if path is None else Path(path)
    if not folder.is_dir():
        raise WeightsError(f"there is no folder {folder}; --weights takes the run folder of a training")
    return folder / "weights" if (folder / "weights").is_dir() else folder


def or_shipped(folder: Place, name: str) -> Path:
    """The folder if it has NAME.safetensors, else that of the shipped weights."""
    return Path(folder) if (Path(folder) / f"{name}.safetensors").exists() else SHIPPED


def load_reasongen(folder: Place = REASON, name: str = "reasongen", device: Device = "cpu") -> ReasonPipeline:
    """Load ReasonGen-R1 from a folder.  `name`: "reasongen", or "base_reasongen" for the weights before GRPO.

    Raises WeightsError when a file is missing, damaged, or does not fit.
    """
    path = Path(folder) / f"{name}.safetensors"
    model, about = load_module(path, ReasonGen)
    words = words_of(path, about, model.config.prompt, model.config.vocabulary)
    return ReasonPipeline(model.to(device), words, load_codec(folder).to(device), about.get("thinks") != "no")


def save_reasongen(folder: Path, name: str, pipe: ReasonPipeline) -> None:
    """Write the transformer as FOLDER/NAME.safetensors, and the codec beside it."""
    about = {"words": " ".join(pipe.tokenizer.words), "thinks": "yes" if pipe.writes_rationale else "no"}
    save_codec(folder, pipe.codec)
    save_module(folder / f"{name}.safetensors", pipe.model, about)


def load_codec(folder: Place) -> Codec:
    return Codec(load_autoencoder(folder), load_module(Path(folder) / "vq.safetensors", VQAutoencoder)[0])


def save_codec(folder: Path, codec: Codec) -> None:
    save_module(folder / "autoencoder.safetensors", codec.autoencoder, {})
    save_module(folder / "vq.safetensors", codec.vq, {})


def load_autoencoder(folder: Place) -> Autoencoder:
    """Load the folder's autoencoder, or the shipped one if the folder has none."""
    return load_module(or_shipped(folder, "autoencoder") / "autoencoder.safetensors", Autoencoder)[0]


# --- what is in a file --------------------------------------------------------------------------------------
def describe(path: Place) -> str:
    """A few lines about a Stable Diffusion checkpoint, a CLIP, a LoRA, or a file of minireflect.

    The file is loaded to check it.  Raises WeightsError, which names what does not fit.
    """
    path = Path(path)
    if (path / "model_index.json").is_file():
        return _describe_checkpoint(path)
    try:
        file = parts.weights_file(path, (*parts.STEMS, *lora.STEMS))
    except WeightsError:
        if not path.is_dir() or not (said := _describe_folder(path)):
            raise
        return said
    tensors = read_weights(file)
    if any(name.startswith(parts.UNET_PREFIX) for name in tensors):
        return _describe_checkpoint(path)
    if any("lora" in name for name in tensors):
        layers = lora.read_lora(path)
        ranks = ", ".join(map(str, sorted({len(layer.A) for layer in layers.values()})))
        return f"{path}: a LoRA of {len(layers)} layers, rank {ranks}, first {next(iter(layers))}"
    if any(name.startswith(("vision_model.", "visual.")) for name in tensors):
        clip, words = load_clip(path)
        size = clip.config.vision.size
        return f"{path}: CLIP, {_counted(clip)}; pictures of {size} pixels, {_limit(words)}"
    about = read_metadata(file)
    config = parse_json(about.get("config", "{}"), dict, f"the configuration in {path}")
    for kind, sizes in CONFIGS.items():
        if config and config.keys() <= sizes.__dataclass_fields__.keys():
            said = ", ".join(f"{key} {value}" for key, value in config.items())
            return f"{path}: {kind.__name__} of minireflect, {_counted(load_module(file, kind)[0])}\n  {said}"
    if {"step", "memory"} <= about.keys():
        return f"{path}: the state of a training after {about['step']} steps, {len(tensors)} tensors"
    for part, (mark, network, sizes) in LONE.items():
        if any(mark in name for name in tensors):
            found = parts.read_part(path, part)
            module = filled(network, sizes(found, parts.SD1), found, None)
            return f"{path}: the {part} of a Stable Diffusion checkpoint, {_counted(module)}"
    some = ", ".join(f"{name} {tuple(t.shape)}" for name, t in list(tensors.items())[:5])
    return f"{path}: {len(tensors)} tensors of an unknown kind of network: {some}"


def _describe_folder(path: Path) -> str:
    """Lines about a folder with a scheduler, a vocabulary, or files of minireflect; "" for other folders."""
    if values := read_stated("scheduler", path / "scheduler_config.json"):
        said = ", ".join(f"{key} {value}" for key, value in values.items() if not key.startswith("_"))
        return f"{path}: the scheduler of a Stable Diffusion checkpoint\n  {said}"
    if (path / "tokenizer.json").is_file() or (path / "vocab.json").is_file():
        return f"{path}: a vocabulary of {len(vocabulary(path)):,} tokens"
    return "\n".join(map(describe, sorted(weights_folder(path).glob("*.safetensors"))))


def _describe_checkpoint(path: Path) -> str:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pipe, family = load_checkpoint(path), family_of(parts.read_published(path)).name
    c = pipe.schedule.config
    said = f"{c.train_steps} levels, beta {c.beta_start} to {c.beta_end} {c.beta_schedule}"
    networks = [f"{part:13} {_counted(getattr(pipe, part))}" for part in PARTS]
    notes = dict.fromkeys(f"note: {each.message}" for each in caught)  # without repetitions
    title = f"{path}: {family}, pictures of {' x '.join(map(str, pipe.sides))}"
    return "\n  ".join([title, *networks, f"predicts {c.prediction}, {said}", _limit(pipe.tokenizer), *notes])


def _limit(tokenizer: Words) -> str:
    none = isinstance(tokenizer, NoVocabulary)
    return "no vocabulary: give --tokenizer FOLDER" if none else f"prompts of {tokenizer.length} tokens"


def _counted(module: nn.Module) -> str:
    dtype = str(next(module.parameters()).dtype).removeprefix("torch.")
    numbers = sum(p.numel() for p in module.parameters())
    return f"{len(module.state_dict()):,} tensors, {numbers:,} parameters, {dtype}: all matched"
