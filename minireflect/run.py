"""A run folder: what was asked for, what was measured, the weights, and all that it takes to go on.

    config.json          the resolved configuration; --resume needs nothing else
    metrics.jsonl        one line a step and stage, as it happened
    weights/NAME.safetensors
    state/STAGE.safetensors   networks, optimiser, step: written after a step and in one piece
    figures/*.png

Ctrl-C and `kill -TERM` finish the step, save, and leave; `kill -9` loses what came after the last save.
`Run.steps` are the steps of any loop; `optimise` adds AdamW, its schedule and the log for the plain ones.
"""

import json
import math
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.distributed import ReduceOp
from torch.optim import AdamW, Optimizer
from tqdm import tqdm

from . import parallel
from .checkpoints.files import read_metadata, read_weights, save_weights
from .parallel import rank
from .ranges import Checked, Count, Weight
from .streams import rng
from .tracking import PICTURES_EVERY, Tracking

Networks = dict[str, nn.Module]

SAVE_EVERY = 25  # steps of `optimise` between two saves of the state that --resume continues from
MAX_GRAD_NORM = 1.0  # the gradient of a step is scaled down to this norm, as in most recipes


class RunError(ValueError):
    """Something about a run folder is not as it must be; the message is one sentence for the user."""


class Interrupted(KeyboardInterrupt):
    """The user asked to stop; everything has been saved, and the message says how to go on."""


class Run:
    """A run folder.  Raises RunError when it is not writable, holds another run, or --resume does not fit."""

    def __init__(self, folder: str | Path, config: dict, resume: bool = False) -> None:
        self.folder, self.stop_signal, self.made = Path(folder), 0, None
        self.tracking: Tracking | None = None  # besides metrics.jsonl
        written = self.folder / "config.json"
        if resume and not written.exists():
            raise RunError(f"there is no run to resume in {folder}: config.json is missing")
        if resume:
            self._check_same(json.loads(written.read_text()), config)
            return
        if written.exists():
            raise RunError(f"{folder} already holds a run; choose another --out, or go on with --resume")
        missing = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        if not missing and (self.folder.is_file() or any(self.folder.iterdir())):
            raise RunError(f"{folder} is no empty folder, and no run of ours; choose another --out")
        self.made = missing[-1] if missing else self.folder
        try:
            for name in ("weights", "state", "figures"):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
            write_text(written, json.dumps(config, indent=2) + "\n")
        except OSError as error:
            raise RunError(f"cannot write to {folder}: {error.strerror}") from error

    def abandon(self) -> None:
        """Remove the folder again, if this process made it and no step of training has been done."""
        if self.made is not None and not any((self.folder / "state").iterdir()):
            shutil.rmtree(self.made)

    def _check_same(self, old: dict, new: dict) -> None:
        old, new = flat(old), flat(new)
        differ = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
        if differ:
            changes = "; ".join(f"{key} was {old.get(key)!r}, now {new.get(key)!r}" for key in differ)
            raise RunError(f"the run in {self.folder} was started with another configuration: {changes}")

    def log(self, stage: str, step: int, **values: float | int | str | dict) -> None:
        """Append one line to metrics.jsonl."""
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"stage": stage, "step": step, **values}) + "\n")
        if self.tracking:
            self.tracking.scalars(stage, step, values)

    def show(self, stage: str, step: int, images: Tensor) -> None:
        """Pictures of a step, for what tracks the run, now and then.  Shapes: images (b 3 h w)"""
        if self.tracking and step % PICTURES_EVERY == 0:
            self.tracking.pictures(stage, step, images)

    def metrics(self, stage: str) -> list[dict]:
        """The lines of one stage, in order."""
        return read_metrics(self.folder, stage)

    def steps(
        self, stage: str, total: int, networks: Networks, optimizer: Optimizer, save_every: int = 1,
        memory: dict | None = None,
    ) -> Iterator[int]:  # fmt: skip
        """Yield the steps still to do, and save the state after each iteration of the loop body.

        `memory` is JSON-able and changed in place by the loop; it comes back on resume.  Raises Interrupted
        after the step in which a signal came.
        """
        path = self.folder / "state" / f"{stage}.safetensors"
        start = restore(path, networks, optimizer, memory) if path.exists() else 0
        self._forget_after(stage, start)
        steps = range(start, total)
        quiet = {"dynamic_ncols": True, "disable": rank() > 0}
        self.bar = bar = tqdm(steps, stage, total, initial=start, unit="step", **quiet)
        handlers = {s: signal.signal(s, self._remember) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            for step in bar:
                yield step
                self.stop_signal = int(parallel.total(torch.tensor(self.stop_signal), ReduceOp.MAX))  # of any
                due = (step + 1) % save_every == 0 or step + 1 == total or self.stop_signal
                if due and not rank():
                    store(path, step + 1, networks, optimizer, memory)
                if self.stop_signal:
                    done = f"stopped after step {step + 1} of {total} of {stage}, and saved"
                    raise Interrupted(f"{done}; go on with: minireflect train --resume --out {self.folder}")
        finally:
            bar.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.stop_signal = number
        print("\nfinishing this step, then saving ...", file=sys.stderr)

    def _forget_after(self, stage: str, start: int) -> None:
        """Drop what was logged after the state was saved: those steps are about to be done again."""
        kept = [r for r in read_metrics(self.folder) if r["stage"] != stage or r["step"] < start]
        write_text(self.folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in kept))


class Job(NamedTuple):
    """What every training loop is given: its run folder, the seed of its random streams, the device."""

    run: Run
    seed: int = 0
    device: torch.device = torch.device("cpu")


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
    """The steps of a training loop, each with a random stream and what minimises and logs its loss:

        for step, generator, minimise in optimise("actor", config, {"actor": actor}, job, decay=1e-2):
            loss = ...
            minimise(loss, accuracy=...)

    AdamW, with weight decay `decay`, trains all parameters of `networks` that require gradients.  The run
    saves the networks and the optimiser, and continues from what it saved.
    """
    trained = [p for network in networks.values() for p in network.parameters() if p.requires_grad]
    optimizer = adamw(trained, lr=config.lr, betas=(0.9, beta2), weight_decay=decay)

    def minimise(step: int, loss: Tensor, /, **values: float) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        set_lr(optimizer, config.lr * lr_factor(step, config.steps))
        check_gradient(take_step(optimizer).item(), optimizer)
        values = {name: float(value) for name, value in {"loss": loss, **values}.items()}
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


def read_metrics(folder: Path, stage: str | None = None) -> list[dict]:
    """The lines that one stage of a run has logged, or all do, in order; none if there is no such run."""
    path, rows = folder / "metrics.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else []:
        with suppress(json.JSONDecodeError):  # of the line that a kill cut short
            rows.append(json.loads(line))
    return [row for row in rows if stage in (None, row["stage"])]


def store(path: Path, step: int, networks: Networks, optimizer: Optimizer, memory: dict | None) -> None:
    """Networks, optimiser and step in one file, written beside it and moved into place."""
    tensors = {f"{name}/{key}": t for name, net in networks.items() for key, t in net.state_dict().items()}
    for i, slots in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{i}/{key}": torch.as_tensor(value) for key, value in slots.items()}
    save_weights(path, tensors, {"step": str(step), "memory": json.dumps(memory)}, durable=False)


def restore(path: Path, networks: Networks, optimizer: Optimizer, memory: dict | None) -> int:
    """Undo `store`; -> the number of steps done.  Raises WeightsError on a file that is cut or another's."""
    metadata, parts = read_metadata(path), {}
    for key, tensor in read_weights(path).items():
        part, _, name = key.partition("/")
        parts.setdefault(part, {})[name] = tensor
    for name, network in networks.items():
        network.load_state_dict(parts[name])
    slots: dict[int, dict[str, Tensor]] = {}
    for name, tensor in parts.get("optimizer", {}).items():
        i, _, slot = name.partition("/")
        slots.setdefault(int(i), {})[slot] = tensor
    optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})
    if memory is not None:
        memory.clear()
        memory.update(json.loads(metadata["memory"]))
    return int(metadata["step"])


def flat(config: dict, prefix: str = "") -> dict[str, object]:
    """A nested configuration with dotted names."""
    rows: dict[str, object] = {}
    for key, value in config.items():
        rows |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return rows


def write_text(path: Path, text: str) -> None:
    """Write a text file in one piece: a reader sees the old one or the new one."""
    draft = path.with_name(path.name + ".tmp")
    draft.write_text(text)
    os.replace(draft, path)
