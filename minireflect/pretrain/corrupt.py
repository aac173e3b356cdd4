"""Corrupt clean renders for the training of reward and Checker, and label what the results still show.

The corruptions resemble the errors of a generator.  A reward that was trained on clean renders only is easily
fooled by RL.  A label compares the corrupted picture with its clean render and with a twin, which differs
from the clean render in one fact.  The inspector is not used.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from tqdm import tqdm

from ..diffusion.sample import denoise, last
from ..pipeline import LatentDiffusion
from ..world.laws import render
from ..world.scenes import MAX_SHIFT, Scene

Scenes = Sequence[Scene]
Stream = Callable[[int], Generator]

VISIBLE = 0.25  # largest error of a 4x4 block, in [0, 1], at which it still shows what was rendered
# A picture shows its scene only if its error is less than NEARER times its error against the twin; a blend of
# both thus shows neither.
NEARER = 0.9
REDRAW_STEPS = 8  # largest number of steps, of 20, by which a picture is renoised and denoised again


def block_error(images: Tensor, clean: Tensor) -> Tensor:
    """Error of the mean colour of each 4x4 block, in [0, 1].

    Shapes: images (b 3 h w), clean (b 3 h w) -> (b h/4 w/4)
    """
    return F.avg_pool2d((images - clean) / 2, 4).abs().amax(1)


def distance(images: Tensor, clean: Tensor) -> Tensor:
    """Largest error of a 4x4 block, in [0, 1], at the camera shift where this is smallest.

    Shapes: images (b 3 h w), clean (b 3 h w) -> (b)
    """
    h, w = images.shape[2:]
    wide = F.pad(clean, (MAX_SHIFT,) * 4, mode="replicate")
    shifts = range(2 * MAX_SHIFT + 1)
    errors = [block_error(images, wide[:, :, y : y + h, x : x + w]) for y in shifts for x in shifts]
    return torch.stack(errors).flatten(2).amax(2).amin(0)


def still_shows(images: Tensor, clean: Tensor, twins: Tensor) -> Tensor:
    """Whether each corrupted picture still shows the scene of its clean render, and not that of its twin.

    Shapes: images (b 3 h w), clean (b 3 h w), twins (b 3 h w) -> (b) bool
    """
    error = distance(images, clean)
    return (error < VISIBLE) & (error < NEARER * distance(images, twins))


class Chance(NamedTuple):
    """Draws random numbers for b pictures, on the CPU."""

    generator: Generator
    like: Tensor  # (b ...); gives the batch size, and the device and dtype of the numbers

    def uniform(self, low: float, high: float) -> Tensor:
        """One number for each picture.  -> (b 1 1 1)"""
        share = torch.rand(len(self.like), 1, 1, 1, generator=self.generator).to(self.like)
        return low + (high - low) * share

    def integers(self, n: int) -> Tensor:
        """One number from 0 to n - 1 for each picture.  -> (b 1 1 1)"""
        return torch.randint(n, (len(self.like), 1, 1, 1), generator=self.generator).to(self.like.device)

    def normal(self, shape: torch.Size) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.like)


@torch.no_grad()
def corrupt(
    pipe: LatentDiffusion, images: Tensor, twins: Tensor, prompts: list[str], generator: Generator
) -> Tensor:
    """Corrupt clean renders; `still_shows` tells which of them still show their scene.

    Of six pictures, on average, one stays clean; one gets noise on its latents; two are renoised and denoised
    by the base; one has blurred or dimmed pixels with noise; and one is a `guess` or a `mix`.
    Shapes: images, twins (b 3 64 64), b prompts -> (b 3 64 64)
    """
    chance = Chance(generator, images)
    # (b 1 1 1) kind: 0 clean, 1 noisy latents, 2 and 5 renoised, 3 dull, 4 guess or mix; way: a variant of it
    kind, way = chance.integers(6), chance.integers(3)
    z = pipe.autoencoder.encode(images)  # (b 4 8 8)
    noise = chance.normal(z.shape)
    latents = torch.where(kind == 1, z + chance.uniform(0, 0.3) * noise, z)
    rows = ((kind == 2) | (kind == 5)).flatten().nonzero().flatten()
    steps = int(torch.randint(1, REDRAW_STEPS + 1, (), generator=generator))
    if len(rows):
        eps, table = pipe.eps([prompts[i] for i in rows.tolist()])(1.0), pipe.table(20)[-steps:]
        x_t = pipe.schedule.add_noise(z[rows], table.t[:1].to(rows.device).expand(len(rows)), noise[rows])
        latents[rows] = last(denoise(eps, x_t, table, 1.0, generator))
    rows = ((kind == 4) & (way == 0)).flatten().nonzero().flatten()
    if len(rows):
        latents[rows] = guess(pipe, z[rows], noise[rows], chance.uniform(850, 990).long().flatten()[rows])
    mixed = (kind == 4) & (way > 0)
    latents = torch.where(mixed, mix(z, pipe.autoencoder.encode(twins), way == 1, chance), latents)
    pictures = torch.where(kind == 3, dull(images, way == 0, chance), pipe.decode(latents))
    return torch.where(kind == 0, images, pictures).clamp(-1, 1)


def guess(pipe: LatentDiffusion, z: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """The base's prediction of x_0 from a high noise level, without a prompt: a blurred mean of many scenes.

    At t = 850, x_t (256 numbers) contains 3 nats about x_0, too few to determine the outcome.
    Shapes: z, noise (m 4 8 8), t (m) -> (m 4 8 8)
    """
    abar = pipe.schedule.abar_at(t, z)
    x_t = pipe.schedule.add_noise(z, t, noise)
    eps = pipe.eps([""] * len(z))(1.0)
    return (x_t - (1 - abar).sqrt() * eps(x_t, t)) / abar.sqrt()  # DDIM (9)


def mix(z: Tensor, twins: Tensor, blended: Tensor, chance: Chance) -> Tensor:
    """Blend latents with those of the twin (2 of 3 pictures) or of another picture, or join two halves.

    Shapes: z, twins (b 4 8 8), blended (b 1 1 1) bool -> (b 4 8 8)
    """
    other = torch.where(chance.integers(3) > 0, twins, z.roll(1, 0))
    share = chance.uniform(0.3, 0.7)
    left = (torch.arange(z.shape[3], device=z.device) < z.shape[3] // 2).expand(z.shape[2:])  # (8 8)
    half = torch.where(chance.integers(2) > 0, left, left.T)  # (b 1 8 8) bool
    return torch.where(blended, share * z + (1 - share) * other, torch.where(half, z, other))


def dull(images: Tensor, blurred: Tensor, chance: Chance) -> Tensor:
    """Blur or dim the pixels, then add noise.

    Shapes: images (b 3 64 64), blurred (b 1 1 1) bool -> (b 3 64 64)
    """
    blur = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    dim = (images + 1) * chance.uniform(0.88, 1.0) - 1
    return torch.where(blurred, blur, dim) + chance.uniform(0, 0.15) * chance.normal(images.shape)


Label = Callable[[Tensor, Tensor, Tensor], Tensor]  # b corrupted pictures, clean renders, twins -> b labels


def corrupt_all(
    pipe: LatentDiffusion, scenes: Scenes, twins: Scenes, prompts: list[str], label: Label, stream: Stream
) -> tuple[Tensor, Tensor]:
    """Render n scenes and corrupt them in batches of 128; `stream(i)` is the generator for those from i on.

    -> (n 3 64 64) corrupted pictures, (n ...) their labels, both on the CPU
    """
    images, labels = [], []
    for i in tqdm(range(0, len(scenes), 128), "corrupting", leave=False):
        rows = slice(i, i + 128)
        clean, other = (torch.stack([*map(render, part[rows])]).to(pipe.device) for part in (scenes, twins))
        corrupted = corrupt(pipe, clean, other, prompts[rows], stream(i))
        images.append(corrupted.cpu())
        labels.append(label(corrupted, clean, other).cpu())
    return torch.cat(images), torch.cat(labels)
