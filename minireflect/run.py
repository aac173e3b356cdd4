"""A run folder: what was asked for, what was measured, the weights, and all that it takes to go on.

    config.json          the resolved configuration; --resume needs nothing else
    metrics.jsonl        one line a step and stage, as it happened
    weights/NAME.safetensors
    state/STAGE.safetensors   networks, optimiser, step: written after a step and in one piece
    figures/*.png

Ctrl-C and `kill -TERM` finish the step, save, and leave; `kill -9` loses what came after the last save.
"""

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .checkpoints.files import read_metadata, read_weights, save_weights


class RunError(ValueError):
    """Something about a run folder is not as it must be; the message is one sentence for the user."""


class Interrupted(Exception):
    """The user asked to stop; everything has been saved."""


class Run:
    """A run folder.  Raises RunError when it is not writable, holds another run, or --resume does not fit."""

    def __init__(self, folder: str | Path, config: dict, resume: bool = False) -> None:
        self.folder = Path(folder)
        self.stop_signal = 0
        written = self.folder / "config.json"
        if written.exists():
            if not resume:
                raise RunError(
                    f"{self.folder} already holds a run; choose another --out, or continue it with --resume"
                )
            self._check_same(json.loads(written.read_text()), config)
        elif resume:
            raise RunError(f"there is no run to resume in {self.folder}: config.json is missing")
        elif self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise RunError(
                f"{self.folder} is not an empty folder, and not a run of this program; choose another --out"
            )
        try:
            for name in ("weights", "state", "figures"):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
            if not written.exists():
                write_text(written, json.dumps(config, indent=2) + "\n")
        except OSError as error:
            raise RunError(f"cannot write to {self.folder}: {error.strerror}") from error

    def _check_same(self, old: dict, new: dict) -> None:
        old, new = flat(old), flat(new)
        changed = [
            f"{key} was {old.get(key)!r}, now {new.get(key)!r}"
            for key in sorted({*old, *new})
            if old.get(key) != new.get(key)
        ]
        if changed:
            raise RunError(
                f"the run in {self.folder} was started with another configuration: {'; '.join(changed)}"
            )

    def log(self, stage: str, step: int, **values: float | int | str | dict) -> None:
        """Append one line to metrics.jsonl."""
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"stage": stage, "step": step, **values}) + "\n")

    def metrics(self, stage: str) -> list[dict]:
        """The lines of one stage, in order."""
        return read_metrics(self.folder, stage)

    def is_done(self, stage: str) -> bool:
        """Whether a stage of this run has been finished before; its weights are there then."""
        return (self.folder / "state" / f"{stage}.done").exists()

    def finish(self, stage: str) -> None:
        write_text(self.folder / "state" / f"{stage}.done", "")

    def steps(
        self,
        stage: str,
        total: int,
        networks: dict[str, nn.Module],
        optimizer: torch.optim.Optimizer,
        save_every: int = 1,
        memory: dict | None = None,
    ) -> Iterator[int]:
        """Yield the steps still to do, and save the state behind the loop body's back.

        `memory` is JSON-able and changed in place by the loop; it comes back on resume.  Raises Interrupted
        after the step in which a signal came.
        """
        path = self.folder / "state" / f"{stage}.safetensors"
        start = restore(path, networks, optimizer, memory) if path.exists() else 0
        self._forget_after(stage, start)
        bar = tqdm(
            range(start, total), desc=stage, initial=start, total=total, unit="step", dynamic_ncols=True
        )
        self.bar = bar
        handlers = {s: signal.signal(s, self._remember) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            for step in bar:
                yield step
                if (step + 1) % save_every == 0 or step + 1 == total or self.stop_signal:
                    store(path, step + 1, networks, optimizer, memory)
                if self.stop_signal:
                    raise Interrupted(
                        f"stopped after step {step + 1} of {total} of {stage}, and saved; "
                        f"go on with: minireflect train --resume --out {self.folder}"
                    )
        finally:
            bar.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.stop_signal = number
        print("\nfinishing this step, then saving ...", file=sys.stderr)

    def _forget_after(self, stage: str, start: int) -> None:
        """Drop what was logged after the state was saved: those steps are about to be done again."""
        path = self.folder / "metrics.jsonl"
        if not path.exists():
            return
        rows = []
        for line in path.read_text().splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:  # the line that a kill cut short
                continue
            if row["stage"] != stage or row["step"] < start:
                rows.append(line)
        write_text(path, "".join(row + "\n" for row in rows))


class Job(NamedTuple):
    """What every training loop is given: its run folder, the seed of its random streams, the device."""

    run: Run
    seed: int = 0
    device: torch.device = torch.device("cpu")


def read_metrics(folder: Path, stage: str) -> list[dict]:
    """The lines that one stage of a run has logged, in order; none if there is no such run."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [row for line in lines if (row := json.loads(line))["stage"] == stage]


def store(
    path: Path,
    step: int,
    networks: dict[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    memory: dict | None,
) -> None:
    """Networks, optimiser and step in one file, written beside it and moved into place."""
    tensors = {f"{name}/{key}": t for name, net in networks.items() for key, t in net.state_dict().items()}
    for i, slots in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{i}/{key}": torch.as_tensor(value) for key, value in slots.items()}
    save_weights(path, tensors, {"step": str(step), "memory": json.dumps(memory)}, durable=False)


def restore(
    path: Path, networks: dict[str, nn.Module], optimizer: torch.optim.Optimizer, memory: dict | None
) -> int:
    """Undo `store`; -> the number of steps done."""
    tensors, metadata = read_weights(path), read_metadata(path)
    slots: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        head, rest = key.split("/", 1)
        if head == "optimizer":
            i, slot = rest.split("/")
            slots.setdefault(int(i), {})[slot] = tensor
    for name, net in networks.items():
        net.load_state_dict({k.split("/", 1)[1]: t for k, t in tensors.items() if k.startswith(f"{name}/")})
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
