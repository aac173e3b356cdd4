"""What the pretraining loops share: their budget, the optimiser step, pictures that are encoded once."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..ranges import Checked, Count, Weight
from ..run import Job
from ..world.canvas import to_tensor

SAVE_EVERY = 25  # steps between two saves of the state that --resume continues from


@dataclass(frozen=True)
class Training(Checked):
    """The budget of a training loop."""

    # pictures, rendered once
    pictures: Count = 16_000
    # optimiser steps
    steps: Count = 5_000
    # pictures a step
    batch: Count = 64
    # peak learning rate of AdamW; cosine to zero after a warm-up of 5 %
    lr: Weight = 1e-3


def lr_factor(step: int, steps: int) -> float:
    """Linear warm-up over 5 % of the steps, then a cosine to zero (Loshchilov & Hutter 2017, equation 5)."""
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


Networks = dict[str, nn.Module]
Loss = tuple[Tensor, dict[str, float]]  # (), and values for the log
Minimise = Callable[..., None]  # of the loss (), and of values for the log by name


def optimise(
    name: str, config: Training, networks: Networks, job: Job, decay: float, beta2: float = 0.999
) -> Iterator[tuple[int, Minimise]]:
    """The steps of a training loop, each with the function that minimises and logs its loss:

        for step, minimise in optimise("actor", config, {"actor": actor}, job, decay=1e-2):
            loss = ...
            minimise(loss, accuracy=...)

    AdamW, with weight decay `decay`, trains all parameters of `networks` that require gradients.  The run
    saves the networks and the optimiser, and continues from what it saved.
    """
    trained = [p for network in networks.values() for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, config.lr, (0.9, beta2), weight_decay=decay)

    def minimise(step: int, loss: Tensor, /, **values: float) -> None:
        take_step(optimizer, loss, config.lr * lr_factor(step, config.steps))
        values = {"loss": loss.item()} | values
        job.run.log(name, step, **values)
        job.run.bar.set_postfix({key: f"{value:.4f}" for key, value in values.items()})

    for step in job.run.steps(name, config.steps, networks, optimizer, SAVE_EVERY):
        yield step, partial(minimise, step)


def take_step(optimizer: torch.optim.Optimizer, loss: Tensor, lr: float, max_norm: float = 1.0) -> float:
    """One optimiser step at the learning rate `lr`.  -> the gradient's norm before clipping to `max_norm`

    Raises FloatingPointError, and leaves the weights as they are, when the gradient is not finite.
    """
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, max_norm).item()
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
    parts = tqdm(np.array_split(pixels, max(1, len(pixels) // 256)), "encoding", unit="batch", leave=False)
    return torch.cat([encode(to_tensor(part).to(device)) for part in parts])
