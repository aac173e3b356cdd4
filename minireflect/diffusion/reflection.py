"""Reflection: turn a picture back into noise, and sample again from that noise.

Papers: SRRL (Pan et al. 2025, arXiv 2505.22407), E4 and E5.  Re-noising only a part of the steps, with new
noise, is SDEdit (Meng et al. 2021, arXiv 2108.01073).  There are two modes:

    blind, as in SRRL's released code: K rounds that do not look at the picture
        x_0^k     = last(denoise(eps_w_denoise, x_T^k, table))    # w = 3.0, eta 0
        x_T^{k+1} = last(renoise(eps_w_renoise, x_0^k, table))    # w = 0.1; the last picture comes from x_T^K
        x_T^{k+1} - x_T^k  ~  -(w_denoise - w_renoise) (eps_c - eps_u), summed over the steps         (E5)
    with a reward, as in SRRL's figure: the caller samples and scores pictures; refused pictures are sampled
        again from the noise of the picture, from the negative of that noise, or from new noise

-(eps_c - eps_u) is proportional to the gradient of log p(prompt | x).  The difference between the two
guidances therefore moves the noise to where the prompt is likely.

Differs from the released code: no autograd graph is kept.  Blind reflection leaves the prior N(0, I): for the
Gaussian mixtures of exact.py, the mean along the guided axis grows with every round and the spread collapses
(tests/diffusion/test_reflection.py).  Therefore the noise is brought back to mean 0 and std 1 (`renormalise`)
and may be mixed with new noise (`fresh_noise`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

from ..ranges import Checked, Count, Natural, Share, Weight
from ..streams import normal, sent
from .sample import EpsFn, denoise, evaluations, last, renoise
from .schedule import StepTable

Wrong = Literal["opposite", "fresh", "repeat"]


@dataclass(frozen=True)
class ReflectionConfig(Checked):
    """The number of reflections, and how a picture is turned back into noise.

    The defaults are those of SRRL, except `renormalise`.
    """

    # K, number of reflections; gives K + 1 pictures
    rounds: Natural = 1
    # blind: guidance of sampling the pictures before the last
    w_denoise: Weight = 3.0
    # guidance of re-noising
    w_renoise: Weight = 0.1
    # steps of re-noising up to x_T
    steps: Count = 20
    # SDEdit's t*, share of the steps that are re-noised; 1 re-noises to x_T, 0 keeps the picture
    strength: Share = 1.0
    # bring the noise of each sample back to mean 0 and std 1; the released code does not
    renormalise: bool = True
    # amplitude l of new noise: sqrt(1 - l^2) old + l new; 1 replaces all of the noise
    fresh_noise: Share = 0.0
    # with a reward: noise for a refused picture, the negative of its own, new noise, or its own
    wrong: Wrong = "repeat"
    # with a reward: which pictures are sampled again
    redraw: Literal["refused", "all"] = "refused"

    def tail(self, table: StepTable) -> StepTable:
        """The last steps of the table, a share of `strength`: they are re-noised, then denoised again."""
        return table[len(table) - round(self.strength * len(table)) :]

    @property
    def renoise_cost(self) -> int:
        """UNet evaluations to turn one picture into noise; 0 if all of the noise is new."""
        return 0 if self.fresh_noise == 1 else round(self.strength * self.steps) * evaluations(self.w_renoise)

    def blind_cost(self, steps: int) -> int:
        """UNet evaluations of all blind rounds with `steps` denoising steps, without the last picture."""
        return self.rounds * (steps * evaluations(self.w_denoise) + self.renoise_cost)

    @property
    def reflect_cost(self) -> int:
        """UNet evaluations to turn one picture that `reflect` selects into noise."""
        return 0 if self.wrong == "fresh" and self.redraw == "refused" else self.renoise_cost


@torch.no_grad()
def renoise_to(
    eps: EpsFn, x0: Tensor, table: StepTable, config: ReflectionConfig, generator: Generator | None = None,
    sign: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Turn pictures back into noise.  The steps `config.tail(table)` lead from the result to new pictures.

    The options change the noise in x_t = sqrt(abar) x0 + sqrt(1 - abar) noise; at strength 1, the noise is
    x_T itself.
    sign: for each picture, +1 keeps its noise, and sampling repeats the picture, right or wrong; -1 takes
        the negative noise, which is as likely under N(0, I), and sampling avoids the picture; 0 takes new
        noise.  None is +1 for all.
    Raises ValueError if new noise is needed and there is no generator.
    Shapes: x0 (b c h w), sign (b) -> (b c h w)
    """
    tail, share, each = config.tail(table), config.fresh_noise, (-1, *[1] * (x0.ndim - 1))
    if not len(tail):
        return x0
    sign = (torch.ones(len(x0)) if sign is None else sign.cpu()).view(each)
    abar = tail.abar[0] if config.strength < 1 else torch.tensor(0.0)
    new = x0.new_zeros(())
    if share > 0 or (sign == 0).any():
        if generator is None:
            raise ValueError(f"fresh_noise {share}, wrong {config.wrong!r} needs new noise; pass a generator")
        new = normal(x0.shape, generator, x0.device)
    if share == 1 or (sign == 0).all():  # SDEdit; at strength 1, a picture from new noise, as in best-of-N
        return abar.sqrt() * x0 + (1 - abar).sqrt() * new  # DDPM (4)
    x = last(renoise(eps, x0, tail))
    if not config.renormalise and share == 0 and (sign == 1).all():
        return x  # as in the released code
    noise = (x - abar.sqrt() * x0) / (1 - abar).sqrt()
    if config.renormalise:
        mean, std = moments(noise)
        noise = (noise - mean.view(each)) / std.view(each).clamp(min=1e-6)  # a constant latent has std 0
    sign = sent(sign, x0.device)
    noise = torch.where(sign == 0, new, (1 - share**2) ** 0.5 * (sign * noise) + share * new)
    return abar.sqrt() * x0 + (1 - abar).sqrt() * noise  # DDPM (4)


def condition_guided_forward(
    make_eps: Callable[[float], EpsFn], x_T: Tensor, table: StepTable, back: StepTable,
    config: ReflectionConfig, generator: Generator | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One blind round: sample at guidance w_denoise without step noise, and re-noise at w_renoise.

    make_eps: guidance w -> the network at that guidance.
    table, back: the steps of sampling and of re-noising.
    Shapes: x_T (b c h w) -> x_0 (b c h w), next x_T (b c h w)
    """
    x_0 = last(denoise(make_eps(config.w_denoise), x_T.detach(), table))
    return x_0, renoise_to(make_eps(config.w_renoise), x_0, back, config, generator)


def reflect(
    eps_of: Callable[[Tensor], EpsFn], x0: Tensor, accepted: Tensor, back: StepTable,
    config: ReflectionConfig, generator: Generator | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A round with a reward: select the pictures to sample again, and compute their start noise.

    If `redraw` is "all", accepted pictures keep their noise.
    eps_of: rows (m) -> the network at guidance w_renoise for the prompts of these rows.
    back: the steps of re-noising.
    Shapes: x0 (n c h w), accepted (n) bool -> rows (m) long, on the CPU, x_T (m c h w)
    """
    accepted = accepted.cpu()
    rows = (~accepted | (config.redraw == "all")).nonzero().flatten()  # (m)
    if not len(rows):
        return rows, x0[:0]
    value = {"opposite": -1.0, "fresh": 0.0, "repeat": 1.0}[config.wrong]
    sign = torch.where(accepted[rows], 1.0, value)  # (m)
    return rows, renoise_to(eps_of(rows), x0[sent(rows, x0.device)], back, config, generator, sign)


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and std of each sample over all dimensions.  Shapes: x (b c h w) -> mean (b), std (b)"""
    flat = x.flatten(1).float()
    return flat.mean(1), flat.std(1, correction=0)
