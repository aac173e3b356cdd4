"""The loop of supervised training: budget, learning-rate schedule, AdamW step, logging and saving.

    for step, generator, minimise in optimise("actor", config, {"actor": actor}, job, decay=1e-2):
        loss = ...
        minimise(loss, accuracy=...)

SRRL, RL-RIG and ReasonGen-R1 have their own loops and use `adamw` and `take_step` from here.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

from torch import Generator, Tensor, nn
from torch.optim import AdamW, Optimizer

from .ranges import Checked, Count, Weight, finite
from .run import Job, Networks
from .streams import rng

SAVE_EVERY = 25  # steps between two saves of the state that --resume continues from
MAX_GRAD_NORM = 1.0  # gradients are clipped to this norm, the usual choice


@dataclass(frozen=True)
class Training(Checked):
    """The budget of a training loop."""

    # training pictures, rendered once at the start
    pictures: Count = 16_000
    # optimiser steps
    steps: Count = 5_000
    # pictures per step
    batch: Count = 64
    # peak learning rate of AdamW: linear warm-up over 5 % of the steps, then cosine decay to zero
    lr: Weight = 1e-3


def lr_factor(step: int, steps: int) -> float:
    """Factor of the peak learning rate, in [0, 1]: linear warm-up over 5 % of the steps, then cosine decay to
    zero (Loshchilov & Hutter 2017, equation 5).
    """
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


Loss = tuple[Tensor, dict[str, float]]  # a scalar loss (), and named values to log
# step, generator for choosing the batch, and minimise(loss, **values to log): one optimiser step
Step = tuple[int, Generator, Callable[..., None]]


def optimise(
    name: str, config: Training, networks: Networks, job: Job, decay: float, beta2: float = 0.999
) -> Iterator[Step]:
    """Yield the steps of a training loop, each with a generator and the function that minimises the loss.

    AdamW with weight decay `decay` trains all parameters of `networks` that require gradients. The run saves
    networks and optimiser every SAVE_EVERY steps, and a resumed run continues from there.
    """
    trained = [p for network in networks.values() for p in network.parameters() if p.requires_grad]
    optimizer = adamw(trained, lr=config.lr, betas=(0.9, beta2), weight_decay=decay)

    def minimise(step: int, loss: Tensor, /, **values: float) -> None:
        optimizer.zero_grad(set_to_none=True)
        finite(loss, "the loss").backward()
        set_lr(optimizer, config.lr * lr_factor(step, config.steps))
        check_gradient(take_step(optimizer).item(), optimizer)
        values = {name: float(value) for name, value in {"loss": loss.detach(), **values}.items()}
        job.run.log(name, step, **values)
        job.run.bar.set_postfix({key: f"{value:.4f}" for key, value in values.items()})

    for step in job.run.steps(name, config.steps, networks, optimizer, SAVE_EVERY):
        yield step, rng(job.seed, name, "batch", step), partial(minimise, step)


def adamw(parameters: Iterable[Tensor], **how: float | tuple[float, float]) -> AdamW:
    """AdamW; on a GPU the fused version, one kernel for all parameters."""
    trained = list(parameters)
    return AdamW(trained, fused=trained[0].device.type == "cuda" or None, **how)


def take_step(optimizer: Optimizer, scaled: bool = False) -> Tensor:
    """Clip the gradients and take one optimiser step.  -> the norm of the gradients before clipping ()

    `scaled` says that a float16 loss was scaled; it only adds a hint to the error message. If a gradient is
    not finite, the weights stay unchanged and FloatingPointError is raised. A fused optimiser also skips the
    step but does not raise, to avoid a wait for the GPU: its caller calls `check_gradient` later.
    """
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
    if optimizer.defaults.get("fused"):
        optimizer.found_inf = (~norm.isfinite()).float()  # torch.amp.GradScaler sets it to skip a step
    else:
        check_gradient(norm.item(), optimizer, scaled)
    optimizer.step()
    return norm


def check_gradient(norm: float, optimizer: Optimizer, scaled: bool = False) -> None:
    """Raises FloatingPointError if the norm of the gradients is not finite."""
    if not math.isfinite(norm):
        lr = optimizer.param_groups[0]["lr"]
        half = ", or use --precision bf16 instead of fp16" if scaled else ""
        raise FloatingPointError(f"a gradient is not finite; lower the learning rate, {lr:.2e} now{half}")


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Set the learning rate of all parameters."""
    for group in optimizer.param_groups:
        group["lr"] = lr
