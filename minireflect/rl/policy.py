"""The policy gradient, ignorant of images: clipped ratios, and the KL between two Gaussians, in nats.

PPO (Schulman et al. 2017, arXiv 1707.06347), equation 7; on denoising steps: DDPO (arXiv 2305.13301), SRRL
(arXiv 2505.22407), E8.

    rho  = exp(log_prob - old_log_prob)                        # 1 at first; its gradient is not 0
    loss = mean max(-A rho, -A clip(rho, 1 - clip, 1 + clip))  # the pessimistic of the two

A clip means nothing without the reduction: the released SRRL clips at 0.1 the mean over 16,384 dimensions,
which lets the true log-ratio move by 1,638 nats (no clipping at all), where DDPO's 1e-4 allows 1.6: a clip
of a mean, times the dimensions, is the clip in nats.  `learn.mean_of` says in one place how sums are reduced.
"""

from typing import NamedTuple

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0  # nats; exp(20) = 5e8.  Beyond it exp overflows, and 0 * inf puts NaN in the gradient


class PPOStats(NamedTuple):
    """The loss, and detached statistics of the clip."""

    loss: Tensor  # ()
    clip_high: Tensor  # () share of samples with A > 0 whose ratio rose beyond the clip: no gradient left
    clip_low: Tensor  # () share of samples with A < 0 whose ratio fell beyond the clip: no gradient left
    log_ratio_max: Tensor  # () largest |log-ratio|, in the reduced unit


def ppo_clip(
    log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, clip: float, weight: Tensor | None = None
) -> PPOStats:
    """PPO's clipped surrogate, to be minimised.  The caller leaves out steps without a density (sigma 0).

    `weight` makes the loss a weighted sum in place of the mean: GRPO gives a token 1 / (G |a_i|), see
    `tokens.token_weights`.
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
