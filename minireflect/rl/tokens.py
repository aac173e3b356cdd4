"""One step of GRPO on tokens, and an entropy term whose weight keeps the entropy at a target.

Papers: GRPO (Shao et al. 2024, arXiv 2402.03300), equations 3 and 4.  The adaptive entropy weight is from
ReasonGen-R1 (arXiv 2505.24875).  It is SAC's temperature (Haarnoja et al. 2018, arXiv 1812.05905, equation
18), but may be negative.

    rho   = pi(token) / pi_old(token)                           # exactly 1 before the first step
    L     = sum w max(-A rho, -A clip(rho, 1 - e, 1 + e))       # over the tokens that the policy chose
          + beta sum w (r - 1 - log r),   r = pi_ref / pi       # estimate of KL(pi || pi_ref)
          + alpha H,   alpha = sinh(psi)                        # alpha rises if the entropy H exceeds H*
    psi  <- Adam ascent on alpha (H - H*),   |alpha| <= bound

Differs from ReasonGen-R1's code:
- the bound is applied to psi after each step; a first version of their code clamps alpha inside the
  differentiated expression, so the gradient is 0 at the bound and alpha stays there
- psi takes one step per optimiser step; in their code, one for every two samples, on each device separately
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..parallel import MAX, sum_gradients, total
from ..ranges import Several, Weight
from ..training import check_gradient, take_step
from .collapse import StopRule
from .policy import MAX_LOG_RATIO, ppo_clip


@dataclass(frozen=True)
class TokenConfig(StopRule):
    # G, samples of each prompt, or edits of each picture
    group: Several = 8
    # e, clip of the ratio of a token's probabilities
    clip_range: Weight = 0.2
    # weight of the KL to the model before RL, in nats per token
    beta: Weight = 0.02
    # also measure the baselines that the trained model is compared with
    controls: bool = True


class TokenBatch(NamedTuple):
    """m sampled sequences of t tokens to learn from."""

    old: Tensor  # (m t) log-probabilities of the policy that sampled the tokens, in nats
    reference: Tensor  # (m t) log-probabilities of the policy before RL
    advantage: Tensor  # (m)
    # (m t) weight in the loss, with sum 1 over all processes; 0 for tokens that the policy did not choose
    weight: Tensor


class TokenStats(NamedTuple):
    """Statistics of one optimiser step."""

    loss: float  # the term of the clipped policy gradient
    total: float  # the sum of all terms
    clip_high: float  # share of tokens with A > 0 beyond the upper clip
    clip_low: float  # share of tokens with A < 0 beyond the lower clip
    ratio_error: float  # exp(largest |log rho|) - 1; must be 0 in the first step after sampling
    kl: float  # KL to the reference, in nats per token
    grad_norm: float  # before clipping


def token_step(
    now: Tensor, batch: TokenBatch, optimizer: Optimizer, clip: float, beta: float, *more: Tensor
) -> TokenStats:
    """One optimiser step of GRPO.  With several processes, each has a share of the sequences.

    now: log-probabilities of the sampled tokens, with their autograd graph.
    more: further terms of the loss.
    Raises FloatingPointError if the loss or its gradient is not finite.
    Shapes: now (m t), more ()
    """
    counted, weight = batch.weight > 0, batch.weight  # (m t)
    A = batch.advantage[:, None].expand_as(now)  # all tokens of a sequence have its advantage
    now, old, reference = (torch.where(counted, v, 0.0) for v in (now, batch.old, batch.reference))
    ppo = ppo_clip(now, old, A, clip, weight)
    kl = (weight * token_kl(now, reference)).sum()
    loss = sum(more, ppo.loss + beta * kl)  # GRPO (3), and the further terms
    optimizer.zero_grad(set_to_none=True)
    (loss * torch.where(loss.isfinite(), 1.0, torch.nan)).backward()  # NaN gradients for an infinite loss
    sum_gradients(p for group in optimizer.param_groups for p in group["params"])
    norm, error = take_step(optimizer), total(ppo.log_ratio_max.expm1(), MAX)
    shares = [share * counted.numel() for share in (ppo.clip_high, ppo.clip_low)]
    sums = total(torch.stack([ppo.loss, loss, *shares, kl, counted.sum()]).detach())
    loss, all_terms, high, low, kl, n, error, norm = [*sums.tolist(), error.item(), norm.item()]
    check_gradient(norm, optimizer)
    return TokenStats(loss, all_terms, high / n, low / n, error, kl, norm)


def token_weights(mask: Tensor) -> Tensor:
    """The weight 1 / (b |a_i|) for every token of sequence i, so that all sequences count equally.

    Shapes: mask (b t) bool -> (b t)
    """
    return mask / (mask.sum(1, keepdim=True).clamp(min=1) * len(mask))  # GRPO (3)


def token_kl(log_prob: Tensor, reference: Tensor) -> Tensor:
    """Schulman's k3 estimate of KL(pi || pi_ref) from sampled tokens, in nats; it is never negative.

    Shapes: log_prob (n), reference (n) -> (n)
    """
    log_r = (reference.detach() - log_prob).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return log_r.exp() - 1 - log_r  # GRPO (4)


def entropy_of(log_prob: Tensor) -> Tensor:
    """Entropy of each distribution in nats; tokens of probability 0 contribute 0.

    Shapes: log_prob (... v) -> (...)
    """
    p = log_prob.exp()  # not torch.special.entr(p), whose gradient is inf * 0 where p underflows
    return -(p * log_prob.masked_fill(p == 0, 0)).sum(-1)


class AdaptiveEntropy(nn.Module):
    """The weight alpha of an entropy term, on the CPU.

    It is a module, so that a run saves psi and the moments of its Adam optimiser.
    """

    def __init__(self, target: float, bound: float, lr: float) -> None:
        """`target` is H* in nats per token, `bound` the largest |alpha|, `lr` Adam's learning rate of psi."""
        super().__init__()
        self.target, self.bound, self.lr = target, bound, lr
        self.psi = nn.Parameter(torch.zeros(()))
        for name in ("mean", "square", "steps"):  # Adam's two moments and its step count
            self.register_buffer(name, torch.zeros(()))

    @property
    def alpha(self) -> float:
        return math.sinh(self.psi.item())

    @torch.no_grad()
    def step(self, entropy: float) -> float:
        """Update alpha, given the policy's entropy in nats per token.  -> the new alpha"""
        gradient = torch.cosh(self.psi) * (entropy - self.target)  # of alpha (H - H*) with respect to psi
        self.steps += 1
        self.mean.lerp_(gradient, 0.1)  # Adam (Kingma & Ba 2015, algorithm 1)
        self.square.lerp_(gradient**2, 0.001)
        mean, square = self.mean / (1 - 0.9**self.steps), self.square / (1 - 0.999**self.steps)
        moved = self.psi + self.lr * mean / (square.sqrt() + 1e-8)  # ascent
        limit = math.asinh(self.bound)
        self.psi.copy_(moved.clamp(-limit, limit))
        return self.alpha
