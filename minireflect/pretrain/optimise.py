"""What the pretraining loops share: an optimiser step, its learning rate, pictures that are encoded once."""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..world.canvas import to_tensor


def lr_factor(step: int, steps: int) -> float:
    """Linear warm-up over 5 % of the steps, then a cosine to zero (Loshchilov & Hutter 2017, equation 5)."""
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def take_step(optimizer: torch.optim.Optimizer, loss: Tensor, lr: float, max_norm: float = 1.0) -> float:
    """One optimiser step at the learning rate `lr`.  -> the gradient's norm before clipping to `max_norm`

    Raises FloatingPointError, and leaves the weights as they are, when the gradient is not finite.
    """
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm).item()
    if not math.isfinite(norm):
        raise FloatingPointError(f"the gradient is not finite; lower the learning rate, {lr:.2e} now")
    set_lr(optimizer, lr)
    optimizer.step()
    return norm


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


@torch.no_grad()
def encode_all(encode: Callable[[Tensor], Tensor], pixels: np.ndarray, device: torch.device) -> Tensor:
    """Encode all pictures, about 256 at a time.  Shapes: pixels (n 64 64 3) uint8 -> (n ...)"""
    parts = np.array_split(pixels, max(1, len(pixels) // 256))
    encoding = tqdm(parts, "encoding", unit="batch", leave=False)
    return torch.cat([encode(to_tensor(part).to(device)) for part in encoding])
