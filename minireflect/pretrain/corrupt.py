"""Clean renders made to look like what a generator draws, and whether they still show their scene: the reward's pictures.

The label is measured against the clean render that is known here; the inspector has no part in it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..diffusion.sample import denoise, last
from ..pipeline import LatentDiffusion
from ..world.scenes import MAX_SHIFT

# what still shows its scene has no 4x4 block farther off from the clean render than FAITHFUL, in [0, 1], and is nearer to
# it than NEARER times the distance to its twin: a ghost between the two shows neither
FAITHFUL, NEARER = 0.25, 0.9


REDRAWN = 8  # denoising steps, of twenty, that a picture at most goes back and forth


def distance(images: Tensor, clean: Tensor) -> Tensor:
    """How far the worst 4x4 block is off, in [0, 1], between pictures in [-1, 1] of two cameras that may have moved.

    Shapes: images (b 3 h w), clean (b 3 h w) -> (b)
    """
    h, w = images.shape[2:]
    wide = F.pad(clean, (MAX_SHIFT,) * 4, mode="replicate")
    off = [
        F.avg_pool2d((images - wide[:, :, y : y + h, x : x + w]) / 2, 4).abs().flatten(1).amax(1)  # (b)
        for y in range(2 * MAX_SHIFT + 1)
        for x in range(2 * MAX_SHIFT + 1)
    ]
    return torch.stack(off).amin(0)


def faithful(images: Tensor, clean: Tensor, twins: Tensor) -> Tensor:
    """Whether spoilt pictures still show what their clean renders show, and not just as well what their twins show.

    Shapes: images (b 3 h w), clean (b 3 h w), twins (b 3 h w) -> (b) bool
    """
    off = distance(images, clean)
    return (off < FAITHFUL) & (off < NEARER * distance(images, twins))


@torch.no_grad()
def spoil(
    pipe: LatentDiffusion, images: Tensor, twins: Tensor, prompts: list[str], generator: torch.Generator
) -> Tensor:
    """Make clean renders look like what a generator draws; some so much that they show nothing any more, see `faithful`.

    In equal shares, the second of them twice: clean; drawn again by the base from up to 8 of 20 steps back; through the
    autoencoder with noise on the latents; blurred, dimmed and noisy; and half-denoised from a late level, or mixed in latent space, all over or in
    one half, with its twin (one fact wrong) or another picture.
    Shapes: images, twins (b 3 64 64), b prompts -> (b 3 64 64)
    """
    b = len(images)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(b, 1, 1, 1, generator=generator).to(images)

    def chance(n: int) -> Tensor:
        return torch.randint(n, (b,), generator=generator).to(images.device)

    kind, way = chance(6), chance(3)
    z = pipe.autoencoder.encode(images)  # (b 4 8 8)
    noise = torch.randn(z.shape, generator=generator).to(z)
    shaken = z + uniform(0, 0.3) * noise
    latents = torch.where((kind == 1).view(-1, 1, 1, 1), shaken, z)
    rows = ((kind == 2) | (kind == 5)).nonzero().flatten()
    steps = int(torch.randint(1, REDRAWN + 1, (), generator=generator))
    table = pipe.table(20)[-steps:]
    if len(rows):
        eps = pipe.eps([prompts[i] for i in rows.tolist()])(1.0)
        x_t = pipe.schedule.add_noise(z[rows], table.t[:1].to(z.device).expand(len(rows)), noise[rows])
        latents[rows] = last(denoise(eps, x_t, table, 1.0, generator))
    rows = ((kind == 4) & (way == 0)).nonzero().flatten()
    if len(rows):  # by t = 850 the latent holds 3 nats about its 256 numbers: too few to tell the outcome
        eps = pipe.eps([""] * len(rows))(1.0)
        t = uniform(850, 990).long().flatten()[rows]
        abar = pipe.schedule.abar_at(t, z)
        x_t = pipe.schedule.add_noise(z[rows], t, noise[rows])
        latents[rows] = (x_t - (1 - abar).sqrt() * eps(x_t, t)) / abar.sqrt()  # DDIM (9)
    other = torch.where((chance(3) > 0).view(-1, 1, 1, 1), pipe.autoencoder.encode(twins), z.roll(1, 0))
    share = uniform(0.3, 0.7)
    columns = torch.arange(8, device=z.device) < 4
    half = torch.where(
        (chance(2) > 0).view(-1, 1, 1, 1), columns.expand(8, 8), columns[:, None].expand(8, 8)
    )  # (b 1 8 8) bool
    mixed = torch.where(
        (way == 1).view(-1, 1, 1, 1), share * z + (1 - share) * other, torch.where(half, z, other)
    )
    latents = torch.where(((kind == 4) & (way > 0)).view(-1, 1, 1, 1), mixed, latents)
    decoded = pipe.decode(latents)
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    dim = (images + 1) * uniform(0.88, 1.0) - 1
    pixel_noise = uniform(0, 0.15) * torch.randn(images.shape, generator=generator).to(images)
    dull = torch.where((way == 0).view(-1, 1, 1, 1), blurred, dim) + pixel_noise
    spoilt = torch.where((kind == 3).view(-1, 1, 1, 1), dull, decoded)
    return torch.where((kind == 0).view(-1, 1, 1, 1), images, spoilt).clamp(-1, 1)
