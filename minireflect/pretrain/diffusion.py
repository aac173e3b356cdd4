"""Train the base, a text encoder and a UNet together, on captioned pictures (world/data.py).

    L = w(t) |eps - eps_theta(x_t, t, c)|^2          Ho et al. 2020, equation 14, weighted by `level_weight`

A tenth of the captions is replaced by the empty prompt, for classifier-free guidance.  The first steps use
plain captions only (`Captioned.plain`).

    python train.py diffusion
"""

import copy
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from ..diffusion.schedule import Schedule, ScheduleConfig, level_weight
from ..models.autoencoder import Autoencoder
from ..models.clip import CrossBlock, TextConfig, TextEncoder
from ..models.tokenizer import EOS, Tokenizer
from ..models.unet import SMALL_UNET, TOY_UNET, UNet, UNetConfig
from ..pipeline import LatentDiffusion
from ..ranges import Count, Natural, Share
from ..run import Job
from ..training import Training, optimise
from ..world.captions import PROMPT_LENGTH
from ..world.data import Captioned
from .autoencoders import encode_all

READING_LR = 2e-3  # peak learning rate of `learn_to_read`
EMPTY = 0.1  # share of captions that are replaced by the empty prompt, as in Ho & Salimans 2022
MAX_WEIGHT = 20.0  # largest loss weight of a noise level: w(t) = min(1 / abar, MAX_WEIGHT)
EMA = 0.995  # decay of the averaged weights, which are the result of the training


@dataclass(frozen=True)
class DiffusionTraining(Training):
    # pictures, rendered and encoded once
    pictures: Count = 24_000
    # share of noise levels sampled in proportion to their weight; keeps the mean loss and lowers its variance
    importance: Share = 0.0
    # share of the steps, at the start, that use plain captions only
    plain: Share = 0.25
    # steps, before all others, that train the text encoder alone to predict latents from captions
    reading_steps: Natural = 0


class BaseSizes(NamedTuple):
    """Sizes of UNet and text encoder."""

    unet: UNetConfig
    text_width: int
    prompt_length: int  # tokens


LAW_BASE = BaseSizes(TOY_UNET, 96, 32)
GRAPH_BASE = BaseSizes(SMALL_UNET, 64, PROMPT_LENGTH)


def train_diffusion(
    config: DiffusionTraining, sizes: BaseSizes, data: Captioned, autoencoder: Autoencoder, job: Job
) -> LatentDiffusion:
    """Train text encoder and UNet to generate pictures from captions.  -> a pipeline with averaged weights"""
    latents = encode_all(autoencoder.to(job.device).encode, data.pixels, job.device)  # (n 4 8 8)
    tokenizer = Tokenizer.of(data.vocabulary, sizes.prompt_length)
    ids, null = tokenizer(data.captions).to(job.device), tokenizer([""]).to(job.device)  # (n t), (1 t)
    plain = torch.tensor(data.plain or range(len(latents)))  # (m) rows
    torch.manual_seed(job.seed)
    # with CLIP's init_std of 0.02 the text encoder hardly learns
    lengths = (len(tokenizer), EOS, tokenizer.length)
    text = TextConfig(*lengths, sizes.text_width, layers=3, heads=4, init_std=1.0)
    raw = nn.ModuleDict({"text_encoder": TextEncoder(text), "unet": UNet(sizes.unet)})
    raw = raw.to(job.device, memory_format=torch.channels_last)  # a third faster on the CPU
    if config.reading_steps:
        learn_to_read(config, raw["text_encoder"], latents, ids, plain, job)
    averaged = copy.deepcopy(raw).requires_grad_(False)
    schedule = Schedule(ScheduleConfig())
    chance, weights = level_chances(schedule, MAX_WEIGHT, config.importance)  # (T), (T)
    both = {"raw": raw, "averaged": averaged}
    for step, generator, minimise in optimise("diffusion", config, both, job, decay=1e-4):
        pick = torch.randint(len(latents), (config.batch,), generator=generator)
        if step < config.plain * config.steps:
            pick = plain[pick % len(plain)]
        t = torch.multinomial(chance, config.batch, replacement=True, generator=generator)  # (b)
        weight, t = weights[t].to(job.device).view(-1, 1, 1, 1), t.to(job.device)
        noise = torch.randn(config.batch, *latents.shape[1:], generator=generator).to(job.device)  # (b 4 8 8)
        empty = torch.rand(config.batch, 1, generator=generator) < EMPTY  # (b 1)
        x0, words = latents[pick], torch.where(empty.to(job.device), null, ids[pick])
        output = raw["unet"](schedule.add_noise(x0, t, noise), t, raw["text_encoder"](words))
        minimise((weight * (output - schedule.target(x0, noise, t)) ** 2).mean())  # DDPM (14)
        decay = min(EMA, (1 + step) / (10 + step))  # smaller at first, to forget the random weights
        with torch.no_grad():
            torch._foreach_lerp_(list(averaged.parameters()), list(raw.parameters()), 1 - decay)
    return LatentDiffusion(tokenizer, *averaged.values(), autoencoder, schedule).eval()


class Reader(nn.Module):
    """Predicts the mean latents of a caption's pictures: each latent pixel attends to the caption."""

    def __init__(self, channels: int, side: int, width: int) -> None:
        super().__init__()
        self.side = side
        self.pixels = nn.Parameter(torch.randn(side**2, width))
        self.blocks = nn.ModuleList(CrossBlock(width, heads=4) for _ in range(2))
        self.out = nn.Linear(width, channels)

    def forward(self, words: Tensor) -> Tensor:
        """Shapes: words (b t d) -> (b c h w)"""
        x = self.pixels.expand(len(words), -1, -1)  # (b h*w d)
        for block in self.blocks:
            x = block(x, words)
        return rearrange(self.out(x), "b (h w) c -> b c h w", h=self.side)


def learn_to_read(
    config: DiffusionTraining, encoder: TextEncoder, latents: Tensor, ids: Tensor, plain: Tensor, job: Job
) -> None:
    """Train the text encoder to predict latents from captions alone: L = |x_0 - Reader(caption)|^2.

    A denoiser must solve the same task at the highest noise level, where x_t contains no information.  When
    the text encoder was trained through the UNet only, it took more than 5,000 steps to distinguish "at the
    top left" from other places; here it takes 500.  The first half of the steps uses plain captions only.
    Shapes: latents (n c h w), ids (n t), plain (m) indices of plain captions
    """
    reader = Reader(latents.shape[1], latents.shape[2], encoder.config.width).to(job.device)
    both = nn.ModuleDict({"text_encoder": encoder, "reader": reader})
    config = replace(config, steps=config.reading_steps, lr=READING_LR)
    for step, generator, minimise in optimise("reading", config, {"reading": both}, job, decay=1e-4):
        pick = torch.randint(len(latents), (config.batch,), generator=generator)
        if 2 * step < config.steps:
            pick = plain[pick % len(plain)]
        minimise(((reader(encoder(ids[pick])) - latents[pick]) ** 2).mean())


def level_chances(schedule: Schedule, max_weight: float, importance: float) -> tuple[Tensor, Tensor]:
    """Importance sampling of noise levels: probabilities, and loss weights that keep the mean loss the same.

    The probability is a mixture: a share `importance` is proportional to `level_weight`, the rest is uniform.
    -> (T) probabilities, (T) loss weights
    """
    steps = schedule.config.train_steps
    weight = level_weight(schedule, torch.arange(steps), max_weight) / steps
    chance = importance * weight / weight.sum() + (1 - importance) / steps
    return chance, weight / chance
