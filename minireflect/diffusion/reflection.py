"""The condition-guided forward process: re-noise a picture with less guidance than it was drawn with, and its prompt stays in the noise.

Paper: SRRL (Pan et al. 2025, arXiv 2505.22407), E4 and E5; step by step: Z-Sampling (Bai et al. 2024, arXiv 2412.10891).

    x_0^k     = last(denoise(eps_w_denoise, x_T^k, table))       # w = 3.0, eta 0
    x_T^{k+1} = last(renoise(eps_w_renoise, x_0^k, table))       # w = 0.1
    x_T^{k+1} - x_T^k  ~  -(w_denoise - w_renoise) (eps_c - eps_u), summed over the steps         (E5)

-(eps_c - eps_u) is proportional to the gradient of log p(prompt | x): the guidance gap pushes the noise to where the prompt is likely.

Differs from the released code: no graph is kept; the noise is brought back to mean 0 and std 1 (`renormalise`), may be re-noised only in part
(`level`), or mixed with new noise (`fresh_noise`), because blind reflection drifts off the prior: in the exact world the mean along
the guided axis grows round by round and its spread collapses (tests/test_reflection.py). Reading the reward between the
rounds is the business of methods/srrl.py.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from .sample import EpsFn, Step, denoise, last, renoise
from .schedule import StepTable


@dataclass(frozen=True)
class ReflectionConfig:
    """How often to reflect and how the picture is turned back into noise. The defaults are SRRL's, but for `renormalise`."""

    rounds: int = 1  # K, number of re-noisings; K + 1 pictures
    w_denoise: float = 3.0  # guidance, noise to image
    w_renoise: float = 0.1  # guidance, image to noise
    steps: int = 20  # rows of the table
    level: float = 1.0  # share of the table that is re-noised; 1 is all the way to x_T
    renormalise: bool = True  # bring the noise of each sample back to mean 0, std 1; False as published
    fresh_noise: float = 0.0  # l in sqrt(1 - l^2) old + l new

    def __post_init__(self) -> None:
        if self.rounds < 0:
            raise ValueError(f"rounds {self.rounds} must not be negative")
        if self.steps < 1:
            raise ValueError(f"steps {self.steps} must be at least 1")
        if not 0 < self.level <= 1:
            raise ValueError(f"level {self.level} is outside (0, 1]")
        if round(self.level * self.steps) < 1:
            raise ValueError(f"level {self.level} of {self.steps} steps re-noises nothing")
        if not 0 <= self.fresh_noise <= 1:
            raise ValueError(f"fresh_noise {self.fresh_noise} is outside [0, 1]")

    def tail(self, table: StepTable) -> StepTable:
        """The steps that are re-noised, and then denoised again."""
        return table[len(table) - round(self.level * len(table)) :]


ACCEPT = 0.5  # reward from which a picture counts as right: the judge is as sure as not


# how a refused picture becomes noise before it is turned over: coarsely, without guidance, half of it new
OPPOSITE = ReflectionConfig(w_renoise=0.0, steps=5, fresh_noise=0.5)


class Round(NamedTuple):
    """One picture of a reflection."""

    k: int  # 0 is the picture before any reflection
    x_T: (
        Tensor  # (b c h w) the latent the round started from; at level < 1 only partly noise, from round 1 on
    )
    x0: Tensor  # (b c h w) the clean latent it ended with
    mean: Tensor  # (b) of x_T over its dimensions; 0 on the prior
    std: Tensor  # (b) of x_T over its dimensions; 1 on the prior


def condition_guided_forward(
    denoise_eps: EpsFn, renoise_eps: EpsFn, x_T: Tensor, table: StepTable
) -> tuple[Tensor, Tensor]:
    """One reflection as SRRL publishes it; the samplers keep no graph.  Shapes: x_T (b c h w) -> x0 (b c h w), next x_T (b c h w)"""
    x0 = last(denoise(denoise_eps, x_T.detach(), table, eta=0.0))
    return x0, last(renoise(renoise_eps, x0, table))


@torch.no_grad()
def renoise_to(
    renoise_eps: EpsFn,
    x0: Tensor,
    table: StepTable,
    config: ReflectionConfig,
    generator: Generator | None = None,
    sign: Tensor | None = None,
) -> Tensor:
    """Turn pictures back into noise as the config says; the result starts `config.tail(table)`.

    The options act on the noise in x_t = sqrt(abar) x0 + sqrt(1 - abar) noise. All the way up (level 1) x_T itself is that noise.
    `sign` -1 gives the opposite of a picture's noise, which is as likely as the noise itself: drawn again, the noise of a
    picture repeats it, right or wrong, and its opposite avoids it.
    Shapes: x0 (b c h w), sign (b) of +1 and -1 -> (b c h w)
    """
    tail = config.tail(table)
    abar = tail.abar[0] if config.level < 1 else torch.tensor(0.0)
    if config.fresh_noise > 0:
        if generator is None:
            raise ValueError(f"fresh_noise {config.fresh_noise} draws noise: pass a generator")
        new = torch.randn(x0.shape, generator=generator, device=generator.device).to(x0.device)
        if (
            config.fresh_noise == 1
        ):  # nothing of the picture's noise is left (SDEdit; at level 1 best-of-N): no need to find it
            return (x0 * abar.sqrt() + (1 - abar).sqrt() * new) if config.level < 1 else new
    x = last(renoise(renoise_eps, x0, tail))
    if not config.renormalise and config.fresh_noise == 0 and sign is None:
        return x
    noise = (x - abar.sqrt() * x0) / (1 - abar).sqrt()
    if config.renormalise:
        mean, std = moments(noise)
        shape = (-1, *[1] * (x.ndim - 1))
        noise = (noise - mean.view(shape)) / std.view(shape).clamp(min=1e-6)  # a constant latent has no noise
    if sign is not None:
        noise = sign.view(-1, *[1] * (x.ndim - 1)) * noise
    if config.fresh_noise > 0:
        noise = (1 - config.fresh_noise**2) ** 0.5 * noise + config.fresh_noise * new
    return abar.sqrt() * x0 + (1 - abar).sqrt() * noise  # DDPM (4)


def reflect(
    make_eps: Callable[[float], EpsFn],
    x_T: Tensor,
    table: StepTable,
    config: ReflectionConfig,
    generator: Generator | None = None,
) -> Iterator[Round]:
    """Blind reflection, as in SRRL's code: K + 1 rounds with no look at any picture. `make_eps(w)` gives the network at guidance w.

    Stop early with `break`: nothing is computed for a round that is not asked for.
    Shapes: x_T (b c h w); yields rounds of x_T (b c h w), x0 (b c h w)
    """
    if len(table) != config.steps:
        raise ValueError(f"the table has {len(table)} steps, the config says {config.steps}")
    x = x_T.detach()
    for k in range(config.rounds + 1):
        x0 = last(denoise(make_eps(config.w_denoise), x, table if k == 0 else config.tail(table)))
        mean, std = moments(x)
        yield Round(k, x, x0, mean, std)
        if k < config.rounds:
            x = renoise_to(make_eps(config.w_renoise), x0, table, config, generator)


def zigzag(
    make_eps: Callable[[float], EpsFn], x_T: Tensor, table: StepTable, w_high: float, w_low: float
) -> Iterator[Step]:
    """Reflection inside every step (Z-Sampling): denoise at w_high, re-noise at w_low, denoise again; the last step goes straight.

    Yields every move, 3 S - 2 in all.
    """
    x = x_T.detach()
    down, up = partial(denoise, make_eps(w_high)), partial(renoise, make_eps(w_low))
    for i, rung in enumerate(table):
        for move in [down, up, down] if i + 1 < len(table) else [down]:
            for step in move(x, rung):
                x = step.x
                yield step._replace(index=i)


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and std of each sample over its dimensions.  Shapes: x (b c h w) -> mean (b), std (b)"""
    flat = x.flatten(1).float()
    return flat.mean(1), flat.std(1, correction=0)
