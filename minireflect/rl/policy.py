"""PPO's clipped policy gradient, and the KL divergence between two Gaussians.

Papers: PPO (Schulman et al. 2017, arXiv 1707.06347), equation 7.  DDPO (arXiv 2305.13301) and SRRL (arXiv
2505.22407), E8, apply it to denoising steps.

    rho  = exp(log_prob - old_log_prob)                        # 1 in the first update; its gradient is not 0
    loss = mean max(-A rho, -A clip(rho, 1 - clip, 1 + clip))

The meaning of `clip` depends on how a log-probability is reduced.  If it is the mean over d dimensions, a
clip of e allows the log-density to change by about e d nats.  With d = 16,384, DDPO's e = 1e-4 allows 1.6
nats; the released SRRL's e = 0.1 allows 1,638 nats, so it never clips.  Here, `learn.mean_of` takes the mean.
"""

from typing import NamedTuple

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0  # nats; exp(20) = 5e8.  An overflow of exp would give NaN gradients, from 0 * inf


class PPOStats(NamedTuple):
    """The loss, and detached statistics of the clip.  A sample beyond the clip has no gradient."""

    loss: Tensor  # ()
    clip_high: Tensor  # () share of samples with A > 0 whose ratio is above 1 + clip
    clip_low: Tensor  # () share of samples with A < 0 whose ratio is below 1 - clip
    log_ratio_max: Tensor  # () largest |log_prob - old_log_prob|


def ppo_clip(
    log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, clip: float, weight: Tensor | None = None
) -> PPOStats:
    """PPO's clipped loss.  Denoising steps without a density (sigma 0) must not be passed.

    weight: if given, the loss is the weighted sum instead of the mean; `tokens.token_weights` has an example.
    Raises ValueError if the shapes of the first three arguments differ.
    Shapes: log_prob (n), old_log_prob (n), advantage (n), weight (n) -> loss ()
    """
    if not log_prob.shape == old_log_prob.shape == advantage.shape:
        shapes = [tuple(v.shape) for v in (log_prob, old_log_prob, advantage)]
        raise ValueError(f"log_prob, old_log_prob and advantage differ in shape: {shapes}")
    advantage = advantage.detach().float()
    log_ratio = log_prob.float() - old_log_prob.detach().float()
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    each = torch.maximum(-advantage * ratio, -advantage * clipped)  # PPO (7), SRRL (E8)
    loss = each.mean() if weight is None else (weight * each).sum()
    with torch.no_grad():
        high = ((ratio > 1 + clip) & (advantage > 0)).float().mean()
        low = ((ratio < 1 - clip) & (advantage < 0)).float().mean()
        return PPOStats(loss, high, low, log_ratio.abs().max())


def gaussian_kl(mean: Tensor, mean_ref: Tensor, sigma: Tensor) -> Tensor:
    """KL between N(mean, sigma^2 I) and N(mean_ref, sigma^2 I), in nats; 0 where sigma is 0.

    Shapes: mean (b c h w), mean_ref (b c h w), sigma () or (b) -> (b)
    """
    squared = ((mean.float() - mean_ref.float()) ** 2).flatten(1).sum(1)
    sigma = sigma.to(squared)
    safe = torch.where(sigma > 0, sigma, 1.0)
    return torch.where(sigma > 0, squared / (2 * safe**2), 0.0)
