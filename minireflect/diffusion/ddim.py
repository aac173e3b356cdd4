"""One DDIM step with its log-probability, and the inverse of a step without noise.

Papers: DDIM (Song et al. 2020, arXiv 2010.02502), equations 9, 12 and 16.  DDPO (Black et al. 2023, arXiv
2305.13301) uses a step with noise as the action of a policy.

    x0     = (x - sqrt(1 - abar) eps) / sqrt(abar)                    # predicted clean latent
    mean   = sqrt(abar_prev) x0 + sqrt(1 - abar_prev - sigma^2) eps
    x_prev ~ N(mean, sigma^2)                                         # latent at the next, cleaner level
    x      = sqrt(abar) x0(x_prev, abar_prev) + sqrt(1 - abar) eps    # inverse for sigma = 0: re-noising

The same function samples x_prev and computes the log-probability of a given x_prev, in float32, so the first
PPO ratio is exactly 1.

Differs from the released code of SRRL and DDPO: a log-probability is the sum over all dimensions of the
latent, that is, the log-density in nats, and not the mean (`learn.mean_of` takes the mean where a loss needs
it); x_0 is never clipped.
"""

import math
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from ..streams import normal, sent


class DDIMStep(NamedTuple):
    """One step from level t to t_prev, where x_prev is drawn from N(mean, sigma^2)."""

    x_prev: Tensor  # (b c h w) the next latent, drawn or given
    mean: Tensor  # (b c h w)
    sigma: Tensor  # (b)
    x0: Tensor  # (b c h w) predicted clean latent
    log_prob: Tensor  # (b) log-density of x_prev in nats, summed over c h w; a meaningless 0 where sigma is 0


def per_sample(value: Tensor, x: Tensor) -> Tensor:
    """One float32 number per sample, shaped to multiply x.  Shapes: value () or (b), x (b c h w) -> (b 1 1 1)

    A 0-d value is expanded, so that a step of a rollout and a batch of mixed steps in an update run the same
    kernels and round alike.  Raises ValueError on other shapes of `value`.
    """
    if value.ndim > 1 or (value.ndim == 1 and len(value) != len(x)):
        raise ValueError(f"expected one number or one per sample ({len(x)}), got shape {tuple(value.shape)}")
    value = sent(value.float(), x.device).expand(len(x)).contiguous()
    return value.view(-1, *[1] * (x.ndim - 1))


def ddim_step(
    x: Tensor, eps: Tensor, abar: Tensor, abar_prev: Tensor, sigma: Tensor, x_prev: Tensor | None = None,
    generator: Generator | None = None,
) -> DDIMStep:  # fmt: skip
    """Take one step or, if `x_prev` is given, compute the log-probability of that step.

    Noise is drawn if `x_prev` is not given and some sigma is positive.  It is drawn on the generator's
    device, so a CPU generator gives the same noise on every accelerator.  The log-probability treats x_prev
    as a constant (score-function gradient).  Raises ValueError if noise is needed without a generator.
    Shapes: x (b c h w), eps (b c h w), abar () or (b), abar_prev () or (b), sigma () or (b)
    -> x_prev (b c h w), log_prob (b)
    """
    draw = x_prev is None and bool((sigma > 0).any())  # while sigma is on the CPU: does not wait for the GPU
    x, eps = x.float(), eps if eps.dtype == torch.float64 else eps.float()
    abar, abar_prev, sigma = (per_sample(v, x) for v in (abar, abar_prev, sigma))

    abar = abar.to(eps.dtype)  # float64 if `Schedule.to_eps` returns float64, for levels with little signal
    x0 = ((x - (1 - abar).sqrt() * eps) / abar.sqrt()).float()  # DDIM (9)
    eps = eps.float()
    left = (1 - abar_prev - sigma**2).clamp(min=0)  # rounding may make it -1e-8
    mean = abar_prev.sqrt() * x0 + left.sqrt() * eps  # DDIM (12), without the noise

    if draw and generator is None:
        raise ValueError("a step with sigma > 0 draws noise; pass a generator")
    if x_prev is None:
        x_prev = mean + sigma * normal(x.shape, generator, x.device) if draw else mean
    log_prob = gaussian_log_prob(x_prev.detach(), mean, sigma.flatten())
    return DDIMStep(x_prev.float(), mean, sigma.flatten(), x0, log_prob)


def gaussian_log_prob(x: Tensor, mean: Tensor, sigma: Tensor) -> Tensor:
    """Log-density of N(mean, sigma^2 I) at x in nats, summed over all dimensions; 0 where sigma is 0.

    Shapes: x (b c h w), mean (b c h w), sigma () or (b) -> (b)
    """
    x, mean = x.float(), mean.float()
    sigma = per_sample(sigma, x)
    safe = torch.where(sigma > 0, sigma, 1.0)  # a division by 0 gives NaN gradients, even if not selected
    log_density = -((x - mean) ** 2) / (2 * safe**2) - safe.log() - 0.5 * math.log(2 * math.pi)
    return torch.where(sigma > 0, log_density, 0.0).flatten(1).sum(1)


def renoise_step(x_prev: Tensor, eps: Tensor, abar: Tensor, abar_prev: Tensor) -> Tensor:
    """The inverse of a step with sigma 0.  It is exact if the step used the same eps.

    Shapes: x_prev (b c h w), eps (b c h w), abar () or (b), abar_prev () or (b) -> (b c h w)
    """
    x_prev, eps = x_prev.float(), eps.float()
    abar, abar_prev = per_sample(abar, x_prev), per_sample(abar_prev, x_prev)
    x0 = (x_prev - (1 - abar_prev).sqrt() * eps) / abar_prev.sqrt()  # DDIM (9) at the cleaner level
    return abar.sqrt() * x0 + (1 - abar).sqrt() * eps  # SRRL (E4)
