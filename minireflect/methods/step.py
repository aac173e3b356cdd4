"""How a UNet is updated from what was drawn: the options of both objectives, and one optimiser step.

A step comes in as many parts as memory wants, in the precision that the network computes in.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..pipeline import LatentDiffusion
from ..rl.policy import clip_in_nats

# In float16 a gradient below 6e-8 is 0, and those of a log-probability averaged over 16,384 dimensions are.
HALF_SCALE = 2.0**16


@dataclass(frozen=True)
class UpdateConfig:
    """How SRRL, and RL-RIG's editor, learn from the pictures of an iteration."""

    objective: Literal["regress", "ppo"] = (
        "regress"  # on the pictures, noised anew; or on the sampler's steps
    )
    replay: int = 8  # regress: iterations whose pictures are learnt from
    batch: int = 64  # regress: pictures of an optimiser step
    floor: float = (
        0.5  # regress: added to the sum of a prompt's rewards, so that one that always fails counts little
    )
    anchored: int = 150  # regress: noise levels t below it, which draw the details, go on imitating the base
    late: float = 20.0  # regress: largest weight of a late noise level, see `level_weight`
    std_floor: float = (
        0.1  # ppo: added to a group's std of rewards, so that jitter in a solved group teaches nothing
    )
    lr: float = 2e-4  # of AdamW; 3e-5 for ppo
    warmup: int = 5  # iterations of linear warm-up; without it the first steps destroy the model
    cooldown: float = 0.3  # share of the iterations, the last, over which the rate falls to 0
    updates: int = 8  # optimiser steps per iteration; with ppo, each on its share of the denoising steps
    trained: float = (
        0.5  # ppo: share of the denoising steps that an iteration trains on, drawn anew each time
    )
    min_sigma: float = 0.1  # ppo: steps with less noise are not trained, their KL explodes: see `jobs`
    reduction: Literal["mean", "sum"] = "mean"  # ppo: of the log-probability over the latent's dimensions
    clip: float = 1e-2  # ppo: e, on the ratio of reduced log-probabilities; at 256 dimensions 2.6 nats
    kl: float = 0.0  # ppo: weight of the KL to the base, in reduced nats per step
    grad_norm: float = 1.0  # largest norm of an update's gradient

    def __post_init__(self) -> None:
        if self.updates < 1:
            raise ValueError(f"updates must be at least 1, got {self.updates}")
        if not 0 <= self.anchored < 1000:
            raise ValueError(f"anchored is a noise level in [0, 1000), got {self.anchored}")
        if not 0 <= self.cooldown <= 1:
            raise ValueError(f"cooldown is a share in [0, 1], got {self.cooldown}")
        if min(self.replay, self.batch) < 1 or self.floor <= 0:
            raise ValueError("replay and batch must be at least 1, and floor positive")
        if self.objective == "regress" and self.kl > 0:
            raise ValueError("kl belongs to the objective ppo; the regression has no such term")
        if not 0 < self.trained <= 1:
            raise ValueError(f"trained is a share in (0, 1], got {self.trained}")
        if self.min_sigma < 0:
            raise ValueError(f"min_sigma is a standard deviation, 0 or more, got {self.min_sigma}")
        clip_in_nats(self.clip, 1)  # raises on a clip that is not positive

    def lr_factor(self, step: int, iterations: int) -> float:
        """Linear warm-up, 1, and a linear fall to 0 at the end."""
        left = (iterations - step) / (self.cooldown * iterations) if self.cooldown else 1.0
        return min(1.0, (step + 1) / max(1, self.warmup), left)


def parts(n: int, pipe: LatentDiffusion) -> list[slice]:
    """`n` pictures in parts of `pipe.micro_batch`, the very parts that `pipe.eps` drew them in."""
    m = pipe.micro_batch or n
    return [slice(i, min(i + m, n)) for i in range(0, n, m)]


def backward(loss: Tensor, network: nn.Module) -> None:
    """Add a part's gradient, scaled up where the network computes in float16."""
    (loss * _scale(network)).backward()


def take_step(
    optimizer: torch.optim.Optimizer, network: nn.Module, config: UpdateConfig, number: int
) -> float:
    """Clip the gradient's norm and step.  -> the norm before.  Raises FloatingPointError if it is not finite."""
    trained = [p for p in network.parameters() if p.grad is not None]
    if (scale := _scale(network)) != 1:
        for p in trained:
            p.grad /= scale
    norm = torch.nn.utils.clip_grad_norm_(trained, config.grad_norm)
    if not torch.isfinite(norm):
        raise FloatingPointError(
            f"the gradient of update {number} is not finite; lower lr, {config.lr} now (--srrl.lr, --rlrig.editor.lr)"
            + (", or use --precision bf16" if scale != 1 else "")
        )
    optimizer.step()
    return norm.item()


def _scale(network: nn.Module) -> float:
    return HALF_SCALE if next(network.parameters()).dtype == torch.float16 else 1.0
