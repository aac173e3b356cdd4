"""A pipeline and a painter of random weights, small enough to train in a second; what they draw is noise."""

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from minireflect.checkpoints.ours import save_module
from minireflect.diffusion.schedule import Schedule, ScheduleConfig
from minireflect.models.autoencoder import Autoencoder, AutoencoderConfig, Codec, VQAutoencoder, VQConfig
from minireflect.models.clip import TextConfig, TextEncoder
from minireflect.models.reasongen import ReasonGen, ReasonGenConfig
from minireflect.models.tokenizer import EOS, Tokenizer
from minireflect.models.unet import UNet, UNetConfig
from minireflect.pipeline import LatentDiffusion, ReasonPipeline
from minireflect.pretrain.sft import reason_tokenizer
from minireflect.streams import choices
from minireflect.world.prompts import all_texts, draw_prompts

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import shipped

REASON_WORDS = reason_tokenizer(ReasonGenConfig.prompt)
TEXTS = ["a red ball", "a tall red candle in still air", "a blue block", "a green cone"]


def small_pipeline(seed: int = 0) -> LatentDiffusion:
    torch.manual_seed(seed)
    tokenizer = Tokenizer.of(all_texts(), 32)
    text = TextEncoder(TextConfig(len(tokenizer), EOS, 32, width=16, layers=1, heads=2))
    unet = UNet(UNetConfig((16, 16), (1, 0), 0, 16, res_blocks=1, heads=2, groups=4))
    for p in unet.parameters():  # the output layer starts at zero; a policy must depend on its input
        if not p.any():
            torch.nn.init.normal_(p, std=0.05)
    autoencoder = Autoencoder(AutoencoderConfig((8, 8, 8, 8), res_blocks=1, groups=4))
    autoencoder.to(memory_format=torch.channels_last)
    return LatentDiffusion(
        tokenizer, text, unet, autoencoder, Schedule(ScheduleConfig()), image_size=32
    ).eval()


def small_reasongen(seed: int = 0, rationale: int = 6) -> ReasonPipeline:
    torch.manual_seed(seed)
    sizes = ReasonGenConfig(
        len(REASON_WORDS), 16, 4, rationale=rationale, width=32, layers=1, heads=2, hidden=32
    )
    vq = VQAutoencoder(VQConfig(width=8, groups=4, forms=16, colors=4, dimensions=4))
    autoencoder = Autoencoder(AutoencoderConfig((8, 8, 8, 8), res_blocks=1, groups=4))
    return ReasonPipeline(ReasonGen(sizes).eval(), REASON_WORDS, Codec(autoencoder.eval(), vq.eval()))


def begin_with(
    monkeypatch: pytest.MonkeyPatch, module: ModuleType, folder: Path, **networks: nn.Module
) -> None:
    """The training loops of a module begin with these networks, as scripts/shipped.py lets them; their files
    are written into the folder.
    """
    for name, network in networks.items():
        save_module(folder / f"{name}.safetensors", network, {})
    monkeypatch.setattr(module, "optimise", shipped.begin_with(folder, {*networks}, module.optimise))


def law_texts(n: int, step: int = 0, number: int = 0) -> list[str]:
    return [p.text for p in draw_prompts("physical", "train", n, choices(0, "texts", step, number))]


def brightness(images: Tensor, prompts: list[str]) -> Tensor:
    """A reward that needs no weights: the mean pixel.  Shapes: images (b 3 h w), b prompts -> (b)"""
    return images.mean(dim=(1, 2, 3))


def nothing(images: Tensor, prompts: list[str]) -> Tensor:
    return torch.zeros(len(images))


def four_texts(step: int) -> tuple[list[str], list[str]]:
    return TEXTS, TEXTS


def shaken(module: nn.Module, std: float = 0.05) -> nn.Module:
    """Noise on every parameter, so that no norm is the identity and no branch gives zero."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(std * torch.randn_like(parameter))
    return module.eval()


class Stopped(Exception):
    """Raised by `stop`: a test has seen what it wanted, and spares itself the rest of a training."""


def stop() -> None:
    raise Stopped
