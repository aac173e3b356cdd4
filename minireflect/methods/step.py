"""One optimiser step, in as many parts as memory wants, in the precision that the network computes in."""

import torch
from torch import Tensor, nn

from ..pipeline import LatentDiffusion
from .rollout import SRRLConfig

# In float16 a gradient below 6e-8 is 0, and those of a log-probability averaged over 16,384 dimensions are.
HALF_SCALE = 2.0**16


def parts(n: int, pipe: LatentDiffusion) -> list[slice]:
    """`n` pictures in parts of `pipe.micro_batch`, the very parts that `pipe.eps` drew them in."""
    m = pipe.micro_batch or n
    return [slice(i, min(i + m, n)) for i in range(0, n, m)]


def backward(loss: Tensor, network: nn.Module) -> None:
    """Add a part's gradient, scaled up where the network computes in float16."""
    (loss * _scale(network)).backward()


def take_step(optimizer: torch.optim.Optimizer, network: nn.Module, config: SRRLConfig, number: int) -> float:
    """Clip the gradient's norm and step.  -> the norm before.  Raises FloatingPointError if it is not finite."""
    trained = [p for p in network.parameters() if p.grad is not None]
    if (scale := _scale(network)) != 1:
        for p in trained:
            p.grad /= scale
    norm = torch.nn.utils.clip_grad_norm_(trained, config.grad_norm)
    if not torch.isfinite(norm):
        raise FloatingPointError(
            f"the gradient of update {number} is not finite; lower --srrl.lr {config.lr}"
            + (", or use --precision bf16" if scale != 1 else "")
        )
    optimizer.step()
    return norm.item()


def _scale(network: nn.Module) -> float:
    return HALF_SCALE if next(network.parameters()).dtype == torch.float16 else 1.0
