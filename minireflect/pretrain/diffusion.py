"""Train the base: text encoder and UNet together, on pictures and captions (`world/data.py`, `world/edits.py`).

    L = level_weight(t) |eps - eps_theta(x_t, t, c)|^2          Ho et al. 2020, equation 14; captions dropped for guidance

It reads plain captions first (`Captioned.plain`).

    python train.py diffusion
"""

import copy
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from ..diffusion.schedule import Schedule, ScheduleConfig, level_weight
from ..models.autoencoder import Autoencoder
from ..models.clip import TextConfig, TextEncoder
from ..models.matcher import CrossBlock
from ..models.tokenizer import EOS, Tokenizer
from ..models.unet import UNet, UNetConfig
from ..pipeline import LatentDiffusion
from ..run import Run
from ..streams import rng
from ..world.captions import PROMPT_LENGTH
from ..world.data import Captioned
from .optimise import encode_all, lr_factor, set_lr

READING_RATE = 2e-3  # of AdamW, peak


@dataclass(frozen=True)
class DiffusionTraining:
    pictures: int = 24_000  # drawn and encoded once
    steps: int = 5_000
    batch: int = 64
    lr: float = 1e-3  # peak; cosine to zero after a warm-up of 5 %
    late: float = 20.0  # largest weight of a late noise level, see `level_weight`
    # share of noise levels drawn by their weight, the rest evenly: the same loss with less variance
    levels: float = 0.0
    # share of the steps, the first, on captions that say what is to be seen: see `Captioned`
    words: float = 0.25
    reading: int = 0  # steps of learning to read before anything is drawn, see `learn_to_read`
    dropped: float = 0.1  # share of captions left empty, so that guidance has something to compare with
    ema: float = 0.995  # decay of the averaged weights, which are the ones kept
    continued: Literal["nothing", "unet", "everything"] = "nothing"  # what starts from the base in --weights


class Networks(NamedTuple):
    """The sizes of a base."""

    unet: UNetConfig
    text_width: int
    prompt_length: int  # tokens


LAW_NETWORKS = Networks(UNetConfig.toy(), 96, 32)


GRAPH_NETWORKS = Networks(UNetConfig.small(), 64, PROMPT_LENGTH)


def train_diffusion(
    config: DiffusionTraining,
    sizes: Networks,
    data: Captioned,
    seed: int,
    autoencoder: Autoencoder,
    run: Run,
    device: torch.device,
    start: LatentDiffusion | None = None,
) -> LatentDiffusion:
    """Learn to draw from captions: text encoder and UNet together.  -> the averaged weights.

    They begin at random, or where the base `start` left off: its UNet, or both, as `config.continued` says.
    """
    autoencoder = autoencoder.to(device).eval().requires_grad_(False)
    latents = encode_all(autoencoder.encode, data.pixels, device)  # (n 4 8 8)
    tokenizer = Tokenizer.of(data.vocabulary, sizes.prompt_length)
    ids = tokenizer(data.captions).to(device)  # (n t)
    torch.manual_seed(seed)
    schedule = Schedule(ScheduleConfig())
    raw = torch.nn.ModuleDict(
        {
            "text_encoder": TextEncoder(
                TextConfig.toy(len(tokenizer), EOS, tokenizer.length, sizes.text_width)
            ),
            "unet": UNet(sizes.unet),
        }
    ).to(device, memory_format=torch.channels_last)  # fmt: skip  (a third faster on the CPU)
    if start is not None:
        raw["unet"].load_state_dict(start.unet.state_dict())
        if config.continued == "everything":
            if start.tokenizer.words != tokenizer.words:
                raise ValueError("the base to continue from has another vocabulary than this world")
            raw["text_encoder"].load_state_dict(start.text_encoder.state_dict())
    plain = torch.tensor(data.plain)  # (m) rows
    learn_to_read(config, raw["text_encoder"], latents, ids, plain, seed, run)
    averaged = copy.deepcopy(raw).requires_grad_(False)
    optimizer = torch.optim.AdamW(raw.parameters(), lr=config.lr, weight_decay=1e-4)
    null = tokenizer([""]).to(device)
    chance, weights = level_chances(schedule, config.late, config.levels)  # (T), (T)
    for step in run.steps(
        "diffusion", config.steps, {"raw": raw, "averaged": averaged}, optimizer, save_every=50
    ):
        set_lr(optimizer, config.lr * lr_factor(step, config.steps))
        draw = rng(seed, "diffusion", "batch", step)
        pick = torch.randint(len(latents), (config.batch,), generator=draw)
        if step < config.words * config.steps:
            pick = plain[pick % len(plain)]
        t = torch.multinomial(chance, config.batch, replacement=True, generator=draw)  # (b)
        weight, t = weights[t].to(device).view(-1, 1, 1, 1), t.to(device)
        noise = torch.randn(config.batch, *latents.shape[1:], generator=draw).to(device)  # (b 4 8 8)
        empty = torch.rand(config.batch, 1, generator=draw) < config.dropped  # (b 1)
        x0, words = latents[pick], torch.where(empty.to(device), null, ids[pick])
        output = raw["unet"](schedule.add_noise(x0, t, noise), t, raw["text_encoder"](words))
        error = (output - schedule.target(x0, noise, t)) ** 2  # DDPM (14)
        loss = (weight * error).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(raw.parameters(), 1.0)
        optimizer.step()
        decay = min(
            config.ema, (1 + step) / (10 + step)
        )  # short memory at first, when the weights are still noise
        with torch.no_grad():
            torch._foreach_lerp_(list(averaged.parameters()), list(raw.parameters()), 1 - decay)
        run.log("diffusion", step, loss=loss.item())
        run.bar.set_postfix(loss=f"{loss.item():.4f}")
    return LatentDiffusion(
        tokenizer, averaged["text_encoder"], averaged["unet"], autoencoder, schedule
    ).eval()


class Reader(nn.Module):
    """From a caption to the mean of its pictures: every pixel of the latents asks the words what it is to show."""

    def __init__(self, channels: int, side: int, width: int) -> None:
        super().__init__()
        self.side = side
        self.asked = nn.Parameter(torch.randn(side**2, width))
        self.blocks = nn.ModuleList(CrossBlock(width, heads=4) for _ in range(2))
        self.out = nn.Linear(width, channels)

    def forward(self, words: Tensor) -> Tensor:
        """Shapes: words (b t d) -> (b c h w)"""
        x = self.asked.expand(len(words), -1, -1)  # (b h*w d)
        for block in self.blocks:
            x = block(x, words)
        return rearrange(self.out(x), "b (h w) c -> b c h w", h=self.side)


def learn_to_read(
    config: DiffusionTraining,
    encoder: TextEncoder,
    latents: Tensor,
    ids: Tensor,
    plain: Tensor,
    seed: int,
    run: Run,
) -> None:
    """Teach the text encoder what stands where, from words alone: L = |x_0 - Reader(words)|^2, plain captions in the first half.

    It is what a denoiser has to know at the last noise level, where the picture tells nothing; learnt through the UNet it
    took more than 5,000 steps to tell "at the top left" from any other place, by itself 500.
    Shapes: latents (n c h w), ids (n t), plain (m)
    """
    if not config.reading:
        return
    reader = Reader(latents.shape[1], latents.shape[2], encoder.config.width).to(latents.device)
    both = nn.ModuleDict({"text_encoder": encoder, "reader": reader})
    optimizer = torch.optim.AdamW(both.parameters(), lr=READING_RATE, weight_decay=1e-4)
    for step in run.steps("reading", config.reading, {"reading": both}, optimizer, save_every=50):
        set_lr(optimizer, READING_RATE * lr_factor(step, config.reading))
        draw = rng(seed, "reading", "batch", step)
        pick = torch.randint(len(latents), (config.batch,), generator=draw)
        if 2 * step < config.reading:
            pick = plain[pick % len(plain)]
        loss = ((reader(encoder(ids[pick])) - latents[pick]) ** 2).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        optimizer.step()
        run.log("reading", step, loss=loss.item())
        run.bar.set_postfix(loss=f"{loss.item():.4f}")


def level_chances(schedule: Schedule, cap: float, levels: float) -> tuple[Tensor, Tensor]:
    """How often each noise level is drawn, and what its error then counts, so that the loss is the one of `level_weight`.

    A share `levels` of the draws is proportional to that weight and the rest even: the same mean with less variance.
    -> (T) chances, (T) weights
    """
    share = (
        level_weight(schedule, torch.arange(schedule.config.train_steps), cap) / schedule.config.train_steps
    )
    chance = levels * share / share.sum() + (1 - levels) / len(share)
    return chance, share / chance
