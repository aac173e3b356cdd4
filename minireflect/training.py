"""A step of AdamW, and the loop that every plain training shares: its budget, its schedule, what it logs.

    for step, generator, minimise in optimise("actor", config, {"actor": actor}, job, decay=1e-2):
        loss = ...
        minimise(loss, accuracy=...)

SRRL, RL-RIG and ReasonGen-R1 have loops of their own, and take the same step.
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

SAVE_EVERY = 25  # steps of `optimise` between two saves of the state that --resume continues from
MAX_GRAD_NORM = 1.0  # the gradient of a step is scaled down to this norm, as in most recipes


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


Loss = tuple[Tensor, dict[str, float]]  # (), and values for the log
Minimise = Callable[..., None]  # of the loss (), and of values for the log by name
Step = tuple[int, Generator, Minimise]  # the random stream is for the choice of a batch


def optimise(
    name: str, config: Training, networks: Networks, job: Job, decay: float, beta2: float = 0.999
) -> Iterator[Step]:
    """The steps of a training loop, each with a random stream and what minimises and logs its loss.

    AdamW, with weight decay `decay`, trains all parameters of `networks` that require gradients.  The run
    saves the networks and the optimiser, and continues from what it saved.
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
    """AdamW, on a GPU in one kernel."""
    trained = list(parameters)
    return AdamW(trained, fused=trained[0].device.type == "cuda" or None, **how)


def take_step(optimizer: Optimizer, scaled: bool = False) -> Tensor:
    """One step with the gradients that there are, `scaled` if float16 made that necessary.  -> their norm
    before clipping ()

    A gradient that is not finite leaves the weights as they are.  It raises FloatingPointError, but for a
    fused optimiser: that one goes on without a wait for the GPU, and its caller asks `check_gradient`.
    """
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
    if optimizer.defaults.get("fused"):
        optimizer.found_inf = (~norm.isfinite()).float()  # as torch.amp.GradScaler tells it
    else:
        check_gradient(norm.item(), optimizer, scaled)
    optimizer.step()
    return norm


def check_gradient(norm: float, optimizer: Optimizer, scaled: bool = False) -> None:
    """Raises FloatingPointError when the norm of a gradient is not finite."""
    if not math.isfinite(norm):
        lr = optimizer.param_groups[0]["lr"]
        half = ", or use --precision bf16 in place of fp16" if scaled else ""
        raise FloatingPointError(f"a gradient is not finite; lower the learning rate, {lr:.2e} now{half}")


def set_lr(optimizer: Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
