"""The learning rate of the three pretraining loops: a warm-up, then a cosine (Loshchilov & Hutter 2017, equation 5)."""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..world.canvas import to_tensor


def lr_factor(step: int, steps: int) -> float:
    """Linear warm-up over the first 5 %, then a cosine to zero."""
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


@torch.no_grad()
def encode_all(encode: Callable[[Tensor], Tensor], pixels: np.ndarray, device: torch.device) -> Tensor:
    """What `encode` makes of each picture, some hundred at a time.  Shapes: pixels (n 64 64 3) uint8 -> (n ...)"""
    parts = np.array_split(pixels, max(1, len(pixels) // 256))
    encoding = tqdm(parts, "encoding", unit="batch", leave=False)
    return torch.cat([encode(to_tensor(part).to(device)) for part in encoding])
