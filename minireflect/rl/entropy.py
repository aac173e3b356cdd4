"""Adaptive entropy: a signed weight that holds a policy's entropy at a target, from above and from below (ReasonGen-R1, arXiv 2505.24875).

    L     = L_PG + alpha H,   alpha = sinh(psi)                 H too high: alpha > 0, entropy is penalised; too low: alpha < 0, it is rewarded
    psi  <- Adam ascent on alpha (H - H*)                       |alpha| at most `bound`

SAC's temperature (Haarnoja et al. 2018, arXiv 1812.05905, equation 18) with a sign.  After each step psi is set to the value that the bounded alpha has:
a first version of theirs clamped alpha inside what was differentiated, so that its gradient vanished at the bound and alpha stayed there.
One step an update, whatever the micro-batches (theirs steps every two samples, on each device by itself).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class EntropyConfig:
    target: float  # H*, nats a token
    bound: float = 5e-3  # largest |alpha|, theirs
    lr: float = 5e-4  # of Adam on psi

    def __post_init__(self) -> None:
        if self.target < 0 or self.bound <= 0 or self.lr <= 0:
            raise ValueError(
                f"target {self.target} must be 0 or more, bound {self.bound} and lr {self.lr} positive"
            )


class AdaptiveEntropy(nn.Module):
    """The weight of one modality's entropy.  A module, so that a run saves psi and the moments of its Adam."""

    def __init__(self, config: EntropyConfig) -> None:
        super().__init__()
        self.config = config
        self.psi = nn.Parameter(torch.zeros(()))
        self.register_buffer("mean", torch.zeros(())), self.register_buffer("square", torch.zeros(()))
        self.register_buffer("steps", torch.zeros(()))

    @property
    def alpha(self) -> float:
        return math.sinh(self.psi.item())

    @torch.no_grad()
    def step(self, entropy: float) -> float:
        """Move alpha after an update whose policy had this entropy, in nats a token.  -> the new alpha"""
        gradient = torch.cosh(self.psi) * (entropy - self.config.target)  # of alpha (H - H*) by psi
        self.steps += 1
        self.mean.lerp_(gradient, 0.1)  # Adam (Kingma & Ba 2015, algorithm 1)
        self.square.lerp_(gradient**2, 0.001)
        unbiased = self.mean / (1 - 0.9**self.steps), self.square / (1 - 0.999**self.steps)
        moved = self.psi + self.config.lr * unbiased[0] / (unbiased[1].sqrt() + 1e-8)  # ascent
        most = math.asinh(self.config.bound)
        self.psi.copy_(moved.clamp(-most, most))
        return self.alpha


def entropy_of(log_prob: Tensor) -> Tensor:
    """Of each distribution, in nats; tokens that cannot be drawn (-inf) count nothing.  Shapes: log_prob (... v) -> (...)"""
    p = log_prob.exp()  # not torch.special.entr(p): where p underflows its gradient is inf * 0
    return -(p * log_prob.masked_fill(p == 0, 0)).sum(-1)
