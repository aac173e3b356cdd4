"""A pipeline of random weights, small enough to train in a second; what it draws is noise."""

import torch
from torch import Tensor

from minireflect.diffusion.schedule import Schedule, ScheduleConfig
from minireflect.models.autoencoder import Autoencoder, AutoencoderConfig
from minireflect.models.clip import TextConfig, TextEncoder
from minireflect.models.tokenizer import EOS, Tokenizer
from minireflect.models.unet import UNet, UNetConfig
from minireflect.pipeline import LatentDiffusion
from minireflect.world.prompts import all_texts

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


def brightness(images: Tensor, prompts: list[str]) -> Tensor:
    """A reward that needs no weights: the mean pixel.  Shapes: images (b 3 h w), b prompts -> (b)"""
    return images.mean(dim=(1, 2, 3))


def nothing(images: Tensor, prompts: list[str]) -> Tensor:
    return torch.zeros(len(images))


def four_texts(step: int) -> tuple[list[str], list[str]]:
    return TEXTS, TEXTS
