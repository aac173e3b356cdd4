"""The learning rate of the three pretraining loops: a warm-up, then a cosine (Loshchilov & Hutter 2017, equation 5)."""

import math

import torch


def lr_factor(step: int, steps: int) -> float:
    """Linear warm-up over the first 5 %, then a cosine to zero."""
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
