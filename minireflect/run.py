"""The folder of a run: options, metrics, weights, figures, and the state from which the run is resumed.

    config.json                 all options of the run; --resume reads them
    metrics.jsonl               one line per step and stage
    weights/NAME.safetensors    trained networks
    state/STAGE.safetensors     networks, optimiser and step, replaced atomically after a step
    state/STAGE.done            marker of a finished stage
    figures/*.png

After Ctrl-C, `kill -TERM` or a hangup, the current step is finished and saved. `kill -9` loses the steps
since the last save. Every training loop iterates over `Run.steps`, which saves and restores the state.
"""

import errno
import io
import json
import math
import os
import shutil
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NamedTuple, TypedDict
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from tqdm import tqdm

from . import parallel
from .checkpoints.files import WeightsError, load_into, read_ours, save_weights
from .checkpoints.names import inside
from .disk import TEMPORARY, parse_json, read_bytes, read_json, read_text, stops, write_text
from .ranges import Refusal, expect, quote
from .tracking import PICTURES_EVERY, Tracking, numbers

with suppress(ImportError):  # Windows has no fcntl; there a run folder is not locked
    import fcntl

Networks = dict[str, nn.Module]
Flat = float | str | bool | list[float | None] | None
Value = Flat | dict  # in metrics.jsonl


class ByKind(TypedDict, total=False):
    """The scores of one kind of prompts in metrics.jsonl: the values that tables and reports read."""

    accuracy: float
    reward: float
    unreadable: float
    diversity: float
    interval: tuple[float, float]
    by_law: dict[str, float]
    intervals: dict[str, tuple[float, float]]


# Types in a line of the stage "evaluation"; it has either one score, or scores for each kind of prompts.
EVALUATION = {"model": str, "score": dict[str, ByKind | Flat] | None, "scores": dict[str, ByKind] | None}
# Types in a line of a training stage, of the values that figures, tables and reports read.
TRAINING = dict.fromkeys(("reward", "right"), float | None)
TRAINING |= dict.fromkeys(("reward_by_round", "right_by_round"), list[float] | None)

FOLDERS = ("weights", "state", "figures")
LOCK = ".lock"
ADAM = {"step", "exp_avg", "exp_avg_sq"}  # the state that AdamW keeps for a parameter
UNSIGNED = ADAM - {"exp_avg"}  # those that cannot be negative


class RunError(Refusal):
    """A run folder cannot be used as asked; the message is one sentence for the user."""


class Unfinished(RuntimeError):
    """A run failed after its start: disk full, out of memory, or a number that is not finite.

    The state saved before the failure is intact. The exit status is 1.
    """

    status = 1


class RewardFailed(Unfinished):
    """A reward function of the user raised an error. Prints the traceback within the user's code."""

    def __init__(self, name: str, error: BaseException) -> None:
        trace = error.__traceback__  # the first frame is not the user's
        traceback.print_exception(error.with_traceback(trace and trace.tb_next))
        super().__init__(f"--reward {name} raised {type(error).__name__}: {error}".removesuffix(": "))


class Interrupted(KeyboardInterrupt):
    """The user stopped the run; its state is saved, and the message says how to resume it."""


# lock files that this process holds, by device and inode
_LOCKS: WeakValueDictionary[tuple[int, int], io.FileIO] = WeakValueDictionary()


def locked(folder: Path) -> io.FileIO:
    """Lock a folder until the returned file is closed or the process ends.

    Raises RunError, which names the process that holds the lock, and OSError if the lock file is a link.
    """
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    file = io.FileIO(os.open(folder / LOCK, flags, 0o666), "r+")
    about = os.fstat(file.fileno())
    if ours := _LOCKS.get((about.st_dev, about.st_ino)):
        return ours
    try:
        if "fcntl" in globals():
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        who = quote(file.read(200).decode(errors="replace")).strip("'") or "another process"
        raise RunError(f"{folder} is in use by {who}; wait until it ends, or choose another --out") from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        said = f"cannot lock {folder}: its file system has no locks; do not start a second run in it"
        print(said, file=sys.stderr)
    if about.st_nlink > 1 or not os.path.samestat(os.stat(folder / LOCK), about):
        raise RunError(f"{folder / LOCK} is a link, or another process is removing it")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
    return _LOCKS.setdefault((about.st_dev, about.st_ino), file)


class Run:
    """A run folder, used by one process at a time.

    Raises RunError if the folder is not writable, in use, or holds another run, and if a resumed run has
    other options than `config`.
    """

    def __init__(self, folder: str | Path, config: dict, resume: bool = False) -> None:
        self.folder, self.stop_signal, self.made, self.at = Path(folder), 0, [], "the start"
        self.tracking: Tracking | None = None  # set by `train --log`
        text = json.dumps(config, indent=2, allow_nan=False) + "\n"
        written = self.folder / "config.json"
        try:
            if resume and not written.is_file():
                raise RunError(f"there is no run to resume in {folder}: config.json is missing")
            if not resume:
                self._check_free()
                # folders that this process creates, the deepest first
                self.made = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
                self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = locked(self.folder)
            if resume:
                self._check_same(read_json(written), config)
            else:
                self._check_free()  # again: another process may have started a run before the lock
                self.made = self.made or [self.folder]
            self._recover()
            if not resume:
                write_text(written, text)
        except OSError as error:
            self.abandon()
            raise RunError(f"cannot write to {folder}: {error.strerror}") from error

    def _check_free(self) -> None:
        """Raises RunError unless the folder is absent, empty, or of a run that was killed at its start."""
        if (self.folder / "config.json").exists():
            raise RunError(f"{self.folder} already holds a run; choose another --out, or add --resume")
        inside = [path for name in ("", *FOLDERS) for path in (self.folder / name).glob("*")]
        if foreign := [p for p in inside if p.name not in (LOCK, *FOLDERS) and not p.match(TEMPORARY)]:
            what = f"neither empty nor a run folder: it contains {quote(foreign[0].name)}"
            raise RunError(f"{self.folder} is {what}; choose another --out")

    def _recover(self) -> None:
        """Create the subfolders, remove temporary files of a killed process, drop an incomplete last line of
        metrics.jsonl, and mark all stages as unfinished if weights of a finished stage are lost.

        Raises RunError if a subfolder is a link, so that nothing is written outside the run folder.
        """
        for name in (*FOLDERS, "album", "tensorboard", "wandb", "metrics.jsonl"):
            if (self.folder / name).is_symlink():
                raise RunError(f"{name} in {self.folder} is a link; a run writes nothing outside its folder")
        for name in FOLDERS:
            (self.folder / name).mkdir(exist_ok=True)
        for name in ("", "album", *FOLDERS):
            for left in (self.folder / name).glob(TEMPORARY):
                left.unlink()
        if (self.folder / "metrics.jsonl").exists():
            self._write_metrics(read_metrics(self.folder))
        markers = [path for path in (self.folder / "state").glob("*") if path.suffix in (".done", ".begun")]
        listed = {Path(name).name for path in markers for name in read_text(path).split()}
        if lost := [name for name in sorted(listed) if not _whole(self.folder / "weights" / name)]:
            said = f"{quote(', '.join(lost))} is missing or damaged in {self.folder / 'weights'}"
            print(f"{said}: all stages run again, from the saved states", file=sys.stderr)
            for path in (*markers, *(self.folder / "weights" / name for name in lost)):
                path.unlink(missing_ok=True)

    def abandon(self) -> bool:
        """Remove the folder if this process started the run and no training step has been saved.

        Parents that it created are removed if they are empty.

        -> whether the folder was removed
        """
        kept = {path.suffix for path in (self.folder / "state").glob("*")} & {".safetensors", ".done"}
        if not self.made or kept:
            return False
        shutil.rmtree(self.folder, ignore_errors=True)
        for parent in self.made[1:]:
            with suppress(OSError):  # it contains something else
                parent.rmdir()
        return True

    def _check_same(self, old: dict, new: dict) -> None:
        old, new = flat(old), flat(new)
        both = {key: (old.get(key), new.get(key)) for key in sorted({*old, *new})}
        if changes := [f"{k} was {quote(a)}, now {quote(b)}" for k, (a, b) in both.items() if a != b]:
            raise RunError(f"the run in {self.folder} was started with other options: {'; '.join(changes)}")

    def log(self, stage: str, step: int, **values: float | int | str | dict | list | None) -> None:
        """Append a line to metrics.jsonl.  Raises FloatingPointError if a number is not finite."""
        self.at = f"step {step} of {stage}"
        for name, number in numbers(values, stage):
            if not math.isfinite(number):
                raise FloatingPointError(f"{name} is not a finite number")
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"stage": stage, "step": step, **values}) + "\n")
        if self.tracking:
            self.tracking.scalars(stage, step, values)

    def show(self, stage: str, step: int, images: Tensor) -> None:
        """Log pictures to the tracker, every PICTURES_EVERY steps.  Shapes: images (b 3 h w)"""
        if self.tracking and step % PICTURES_EVERY == 0:
            self.tracking.pictures(stage, step, images)

    def metrics(self, stage: str) -> list[dict]:
        """The lines of one stage, in order."""
        return read_metrics(self.folder, stage)

    def _write_metrics(self, rows: list[dict]) -> None:
        write_text(self.folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    def once(self, name: str, work: Callable[[], None], ending: str = "done") -> None:
        """Call `work` unless the marker state/NAME.ENDING exists, then write the marker.

        The marker lists the weight files that exist at that time; `_recover` checks them.
        """
        marker = self.folder / "state" / f"{name}.{ending}"
        if not marker.exists():
            work()
            there = (path.name for path in (self.folder / "weights").glob("*.safetensors"))
            write_text(marker, "\n".join(sorted(there)))

    def steps(
        self, stage: str, total: int, networks: Networks, optimizer: Optimizer, save_every: int = 1,
        memory: dict | None = None,
    ) -> Iterator[int]:  # fmt: skip
        """Yield the remaining steps, and save the state after every `save_every` iterations of the loop body.

        `memory` is a dictionary of JSON values that the loop changes in place; it is saved with the state and
        restored on resume. The last two states are kept. Raises Interrupted after the step in which a signal
        to stop arrived, and RunError if the saved state is damaged.
        """
        memory = {} if memory is None else memory
        path = self.folder / "state" / f"{stage}.safetensors"
        before = path.with_suffix(".before.safetensors")
        latest = path if path.exists() else before
        try:
            start = restore(latest, total, networks, optimizer, memory) if latest.exists() else 0
        except ValueError as error:
            other = latest == path and before.exists()
            offered = f"; delete it to continue from the previous state, {before.name}" if other else ""
            raise RunError(f"{error}{offered}") from error
        # drop the lines of steps after the saved state: these steps are repeated
        rows = read_metrics(self.folder)
        self._write_metrics([row for row in rows if row["stage"] != stage or row["step"] < start])
        how = {"initial": start, "unit": "step", "dynamic_ncols": True, "disable": parallel.rank() > 0}
        self.bar = bar = tqdm(range(start, total), stage, total, **how)
        handlers = {s: signal.signal(s, self._remember) for s in stops()}
        try:
            for step in bar:
                self.at = f"step {step} of {stage}"
                yield step
                # a signal to any process stops all of them
                self.stop_signal = int(parallel.total(torch.tensor(self.stop_signal), parallel.MAX))
                due = (step + 1) % save_every == 0 or step + 1 == total or self.stop_signal
                if due and not parallel.rank():
                    store(path, step + 1, networks, optimizer, memory)
                if self.stop_signal:
                    done = f"stopped after step {step + 1} of {total} of {stage}, and saved"
                    raise Interrupted(f"{done}; resume with: minireflect train --resume --out {self.folder}")
        finally:
            bar.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.stop_signal == number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C stops at once
        self.stop_signal = number
        with suppress(OSError, AttributeError):  # it may be closed; `print` must not interrupt another print
            os.write(sys.stderr.fileno(), b"\nfinishing this step, then saving ...\n")


@contextmanager
def keeping(save: Callable[[], None]) -> Iterator[None]:
    """Call `save` when the block ends, also when it is stopped or fails, so that trained weights are kept.

    After a Refusal, for example of a damaged state, nothing is saved: untrained weights would replace
    trained ones.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Refusal):
            with suppress(FloatingPointError):  # raise the first error, not that such weights cannot be saved
                save()
        raise
    save()


class Job(NamedTuple):
    """The arguments common to all training loops: run folder, seed of the random streams, device."""

    run: Run
    seed: int = 0
    device: torch.device = torch.device("cpu")
    watch: Callable[[int], None] = lambda step: None  # SRRL calls it before each iteration and after the last


def read_metrics(folder: Path, stage: str | None = None) -> list[dict]:
    """The lines of metrics.jsonl in order, of one stage if given; an empty list if there is no such file.

    Empty lines and an incomplete last line are left out. Raises Refusal on any other invalid line.
    """
    path = folder / "metrics.jsonl"
    *lines, last = (read_bytes(path) if path.exists() else b"").split(b"\n")
    rows = [_row(line, f"line {number} of {path}") for number, line in enumerate(lines, 1) if line.strip()]
    with suppress(Refusal):
        rows.append(_row(last, "the last line"))
    return [row for row in rows if stage in (None, row["stage"])]


def _row(line: bytes, where: str) -> dict:
    row = parse_json(line, dict[str, Value], where)
    measured = expect(row.get("stage"), str, f"stage in {where}") == "evaluation"
    for key, kind in ({"step": int} | (EVALUATION if measured else TRAINING)).items():
        expect(row.get(key), kind, f"{key} in {where}")
    if measured:
        expect(row.get("scores") or row.get("score"), dict, f"score in {where}")
    return row


def _whole(path: Path) -> bool:
    with suppress(WeightsError):
        return bool(read_ours(path))
    return False


def store(path: Path, step: int, networks: Networks, optimizer: Optimizer, memory: dict) -> None:
    """Save networks, optimiser, step and memory atomically in one file; the previous file is kept as
    NAME.before.safetensors.
    """
    tensors = {f"{name}/{key}": t for name, net in networks.items() for key, t in net.state_dict().items()}
    for i, slots in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{i}/{key}": torch.as_tensor(value) for key, value in slots.items()}
    about = {"step": str(step), "memory": json.dumps(memory)}
    save_weights(path, tensors, about, durable=False, keep=path.with_suffix(".before.safetensors"))


def restore(path: Path, total: int, networks: Networks, optimizer: Optimizer, memory: dict) -> int:
    """Load what `store` saved.  -> the number of finished steps, at most `total`

    Raises WeightsError if the file is incomplete, damaged, or of another training. Optimiser and memory are
    then unchanged.
    """
    tensors, about = read_ours(path, checked=True)
    parts = {name: inside(tensors, f"{name}/") for name in (*networks, "optimizer")}
    if other := [key for key in tensors if key.partition("/")[0] not in parts]:
        raise WeightsError(f"{path} is the state of another training: it contains {quote(other[0])}")
    step = parse_json(about.get("step", "null"), int, f"step in {path}")
    if not 0 <= step <= total:
        raise WeightsError(f"{path} states {step} finished steps, but the training has {total}")
    found = parse_json(about.get("memory", "null"), dict, f"memory in {path}")
    kinds, theirs = ({key: type(value) for key, value in of.items()} for of in (memory, found))
    if kinds != theirs:
        raise WeightsError(f"{path} has another memory: expected {', '.join(kinds) or 'none'}")
    slots = _slots(path, parts["optimizer"], optimizer)
    for name, network in networks.items():
        load_into(network, parts[name], source=f"{path}, {name}")
    optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})
    memory.update(found)
    return step


def _slots(path: Path, tensors: dict[str, Tensor], optimizer: Optimizer) -> dict[int, dict[str, Tensor]]:
    """The optimiser state of each parameter, by its index.  Raises WeightsError if it does not fit."""
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    shapes, slots = {str(i): p.shape for i, p in enumerate(trained)}, {}
    for name, tensor in tensors.items():
        i, _, slot = name.partition("/")
        fits = i in shapes and tensor.shape == (() if slot == "step" else shapes[i])
        if not fits or not tensor.is_floating_point() or (slot in UNSIGNED and (tensor < 0).any()):
            raise WeightsError(f"{path} does not fit the optimiser: optimizer/{quote(name)}")
        slots.setdefault(int(i), {})[slot] = tensor
    if isinstance(optimizer, AdamW) and any(found.keys() != ADAM for found in slots.values()):
        raise WeightsError(f"{path} does not fit the optimiser: AdamW keeps {', '.join(sorted(ADAM))}")
    return slots


def flat(config: dict, prefix: str = "") -> dict[str, object]:
    """A nested dictionary as a flat one: {"a": {"b": 1}} becomes {"a.b": 1}."""
    rows: dict[str, object] = {}
    for key, value in config.items():
        rows |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return rows
