"""Our own weights: safetensors files that carry the configuration of their network, and what else it needs.

    pipe = load_pipeline()                  the shipped weights, a run folder, or Stable Diffusion (load.py)
    save_pipeline(pipe, folder)             one file for each network
    reasongen = load_reasongen()            ReasonGen-R1: the transformer and its codec

The vocabulary is saved with the text encoder, the schedule with the UNet.
"""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from ..diffusion.schedule import Prediction, Schedule, ScheduleConfig
from ..models.autoencoder import Autoencoder, AutoencoderConfig
from ..models.clip import TextConfig, TextEncoder
from ..models.reasongen import ReasonGen, ReasonGenConfig
from ..models.tokenizer import Tokenizer
from ..models.unet import UNet, UNetConfig
from ..models.vq import Codec, VQAutoencoder, VQConfig
from ..pipeline import LatentDiffusion, ReasonPipeline
from .files import WeightsError, load_into, read_metadata, read_weights, save_weights
from .load import load_checkpoint

SHIPPED = Path(__file__).parent.parent / "pretrained"
RIG = SHIPPED / "rlrig"  # of RL-RIG
REASON = SHIPPED / "reasongen"  # of ReasonGen-R1
PARTS = ("autoencoder", "text_encoder", "unet")


def save_module(
    path: Path, module: nn.Module, about: dict[str, str], dtype: torch.dtype = torch.float32
) -> None:
    """Save a network with the configuration that rebuilds it, and with the strings `about`."""
    tensors = {key: value.to(dtype) for key, value in module.state_dict().items()}
    save_weights(path, tensors, {"config": json.dumps(asdict(module.config)), **about})


def load_module(path: Path, network: type, config: type) -> tuple[nn.Module, dict[str, str]]:
    """A network from its file, in evaluation mode, with the strings that were saved beside it.

    Raises WeightsError when the file is missing, truncated, or holds another network.
    """
    about = read_metadata(path)
    if "config" not in about:
        why = f"it carries no configuration of a {config.__name__}"
        raise WeightsError(f"{path} was not saved by minireflect: {why}")
    values = json.loads(about["config"])
    if unknown := sorted(set(values) - set(config.__dataclass_fields__)):
        raise WeightsError(f"{path} is not a {config.__name__}: it has {', '.join(unknown)}")
    module = network(config(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}))
    load_into(module, read_weights(path), source=str(path))
    module.to(memory_format=torch.channels_last)  # convolutions are a third faster on the CPU that way
    return module.eval().requires_grad_(False), about


def load_pipeline(
    path: str | Path | None = None,
    unet: str = "unet",
    dtype: torch.dtype | None = None,
    tokenizer: str | Path | None = None,
    prediction: Prediction | None = None,
    image_size: int | None = None,
) -> LatentDiffusion:
    """The pipeline of a training run, or of Stable Diffusion (SD 1.x, 2.x, SDXL); by default the shipped one.

    `path` is a run folder, or a folder with our weight files; `unet` names the UNet's, of which a run of SRRL
    has two: "unet" and the "base_unet" that it started from.  Or it is a diffusers folder, or an original
    .safetensors or .ckpt file; the other arguments are for those, see `load_checkpoint`.
    Raises WeightsError when a file is missing, truncated or foreign.
    """
    if path is not None and is_checkpoint(path):
        return load_checkpoint(path, dtype, tokenizer, prediction, image_size)
    folder = weights_folder(path)
    autoencoder, _ = load_module(folder / "autoencoder.safetensors", Autoencoder, AutoencoderConfig)
    text_encoder, about = load_module(folder / "text_encoder.safetensors", TextEncoder, TextConfig)
    network, about_unet = load_module(folder / f"{unet}.safetensors", UNet, UNetConfig)
    words = Tokenizer(about["words"].split(), text_encoder.config.length)
    schedule = Schedule(ScheduleConfig(**json.loads(about_unet["schedule"])))
    return LatentDiffusion(words, text_encoder, network, autoencoder, schedule)


def is_checkpoint(path: str | Path) -> bool:
    """Whether a path is a published checkpoint and not a run of ours."""
    path = Path(path)
    return path.is_file() or (path / "model_index.json").is_file()


def weights_folder(path: str | Path | None) -> Path:
    """Where the weights of a run lie; the shipped ones for None."""
    folder = SHIPPED if path is None else Path(path)
    if not folder.is_dir():
        expected = "--weights takes the run folder of a training command"
        raise WeightsError(f"there is no folder {folder}; {expected}")
    return folder / "weights" if (folder / "weights").is_dir() else folder


def load_reasongen(
    folder: str | Path = REASON, name: str = "reasongen", device: torch.device | str = "cpu"
) -> ReasonPipeline:
    """ReasonGen-R1 from a folder with its weights: "reasongen", or "base_reasongen", its weights before GRPO.

    Raises WeightsError when a file is missing, truncated or foreign.
    """
    model, about = load_module(Path(folder) / f"{name}.safetensors", ReasonGen, ReasonGenConfig)
    tokenizer = Tokenizer(about["words"].split(), model.config.prompt)
    codec = load_codec(folder).to(device)
    return ReasonPipeline(model.to(device), tokenizer, codec, writes_rationale=about.get("thinks") != "no")


def save_reasongen(folder: Path, name: str, pipe: ReasonPipeline) -> None:
    """The transformer as `name`, and the codec beside it."""
    about = {"words": " ".join(pipe.tokenizer.words), "thinks": "yes" if pipe.writes_rationale else "no"}
    save_module(folder / f"{name}.safetensors", pipe.model, about)
    save_codec(folder, pipe.codec)


def load_codec(folder: str | Path) -> Codec:
    vq, _ = load_module(Path(folder) / "vq.safetensors", VQAutoencoder, VQConfig)
    return Codec(load_autoencoder(folder), vq)


def save_codec(folder: Path, codec: Codec) -> None:
    save_module(folder / "autoencoder.safetensors", codec.autoencoder, {})
    save_module(folder / "vq.safetensors", codec.vq, {})


def load_autoencoder(folder: str | Path) -> Autoencoder:
    """The folder's, else the shipped one."""
    file = or_shipped(folder, "autoencoder") / "autoencoder.safetensors"
    return load_module(file, Autoencoder, AutoencoderConfig)[0]


def or_shipped(folder: str | Path, name: str) -> Path:
    return Path(folder) if (Path(folder) / f"{name}.safetensors").exists() else SHIPPED


def save_pipeline(
    pipe: LatentDiffusion, folder: Path, parts: tuple[str, ...] = PARTS, dtype: torch.dtype = torch.float32
) -> None:
    """Write the parts as safetensors, each with its configuration."""
    about = {
        "text_encoder": {"words": " ".join(getattr(pipe.tokenizer, "words", ()))},
        "unet": {"schedule": json.dumps(asdict(pipe.schedule.config))},
    }
    for name in parts:
        save_module(folder / f"{name}.safetensors", getattr(pipe, name), about.get(name, {}), dtype)
