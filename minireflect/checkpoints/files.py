"""Weights on disk and into modules: safetensors and torch files, no pickle executed, a loader strict both
ways.

    save_weights(path, unet.state_dict(), {"config": ...})
    load_into(unet, read_weights(path))                                      # ours
    load_into(unet, read_weights(theirs), DIFFUSERS_UNET, source=theirs)     # a published one: names.py

Strict means: every tensor of the module is filled, every tensor of the file is used, every shape agrees.
Otherwise nothing is loaded, and the error names each tensor that is missing, extra or misshapen.
"""

import json
import os
import pickle
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .names import Table, Tensors

SHOWN = 10  # names listed per kind of mismatch, before "and 123 more"
TORCH_FILES = (".ckpt", ".pt", ".pth", ".bin")


class WeightsError(ValueError):
    """A file of weights that cannot be read, or does not fit the module."""


# --- files --------------------------------------------------------------------------------------------------
def save_weights(
    path: str | Path, tensors: Tensors, metadata: dict[str, str] | None = None, durable: bool = True
) -> None:
    """Write a safetensors file so that at any moment `path` holds the old file or the new one, never a part.

    `durable` waits for the disk, so that this also holds through a power cut.
    """
    path = Path(path)
    # In the same folder, since a rename is atomic only within a disk.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file({name: t.detach().contiguous() for name, t in tensors.items()}, temporary, metadata)
        temporary.chmod(mode)  # safetensors ignores the umask and makes the file private
        if durable:
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())  # contents before the name: a power cut must not swap the two
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_weights(path: str | Path, prefix: str = "") -> Tensors:
    """The tensors of a file whose names begin with `prefix`, named without it; on the CPU, in the file's
    dtype.

    Takes safetensors, torch files (.ckpt, .pt, .bin, .pth: read with weights_only, so that nothing in them is
    executed), and the index of a file in several parts (.index.json).  Tensors without the prefix are not
    read.
    Raises WeightsError when the file is missing, truncated, or holds more than tensors.
    """
    path = existing(path)
    if path.suffix == ".json":
        return _read_parts(path, prefix)
    if path.suffix in TORCH_FILES:
        tensors = _read_torch(path)
        return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    with _opened(path) as file:
        names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118  not a dict
        return {name.removeprefix(prefix): file.get_tensor(name) for name in names}


def tensor_shapes(path: str | Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that `read_weights` would give.  Raises WeightsError as it does."""
    path = existing(path)
    if path.suffix == ".json" or path.suffix in TORCH_FILES:
        return {name: tuple(t.shape) for name, t in read_weights(path).items()}
    with _opened(path) as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def read_metadata(path: str | Path) -> dict[str, str]:
    """The strings saved beside the tensors; empty if there are none."""
    with _opened(existing(path)) as file:
        return file.metadata() or {}


def existing(path: str | Path) -> Path:
    if not Path(path).is_file():
        raise WeightsError(f"{path} is not there, or not a file")
    return Path(path)


@contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} is truncated or not a safetensors file: {error}") from error


def _read_parts(index: Path, prefix: str) -> Tensors:
    """The tensors of all the files that an index names."""
    try:
        where = json.loads(index.read_text())["weight_map"]  # tensor name -> file
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise WeightsError(f"{index} is not the index of a file in several parts: {error!r}") from error
    found: Tensors = {}
    for part in sorted(set(where.values())):
        found |= read_weights(index.parent / part, prefix)
    listed = {name.removeprefix(prefix) for name in where if name.startswith(prefix)}
    if lost := sorted(listed - found.keys()):
        raise WeightsError(f"{index} lists {len(lost)} tensors that its files do not have, {lost[0]} first")
    return found


def _read_torch(path: Path) -> Tensors:
    """A torch file, read with `weights_only`: tensors and containers alone, nothing in it is executed."""
    try:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # files from before torch 1.6 cannot be mapped into memory
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"(?:GLOBAL|global) (\S+)", str(error).replace("\n", " "))
        what = f"it asks for {named[1]}" if named else "it is not one of tensors alone"
        raise WeightsError(
            f"{path} is a pickle that may run code when it is opened, and was not opened: {what}; "
            "use the safetensors file of this checkpoint"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise WeightsError(f"{path} is truncated or not a torch file: {error}") from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds a {type(content).__name__}, expected tensors by name")
    return {name: t for name, t in content.items() if isinstance(t, Tensor)}


# --- names and modules --------------------------------------------------------------------------------------
def new_names(names: Iterable[str], table: Table) -> dict[str, str]:
    """Old name -> new name.  Raises WeightsError when two become one, as one of the tensors would be lost."""
    new: dict[str, str] = {}
    taken: dict[str, str] = {}
    for old in names:
        name = old
        for pattern, replacement in table:
            name = re.sub(pattern, replacement, name)
        if not name:
            continue
        if name in taken:
            raise WeightsError(f"{taken[name]} and {old} would both be renamed {name}")
        new[old], taken[name] = name, old
    return new


def load_into(
    module: nn.Module, tensors: Tensors, rename: Table | None = None, source: str | Path = "the weights"
) -> None:
    """Fill the module, in its own precision, or raise a WeightsError and leave it as it was.

    A module on the meta device takes the tensors themselves: a real checkpoint is never in memory twice.
    """
    original = {name: old for old, name in new_names(tensors, rename or []).items()}
    found = {name: tensors[old] for name, old in original.items()}
    expected = module.state_dict()
    if not found.keys() & expected.keys():
        some = ", ".join(list(found)[:3]) or "no tensors at all"
        fits = f"it has {some}, expected {next(iter(expected))}"
        raise WeightsError(f"nothing in {source} matches {type(module).__name__}: {fits}")

    shapes = {name: tuple(t.shape) for name, t in found.items()}
    missing, extra, misshapen = [], [], []
    for name, t in expected.items():
        if name not in found:
            missing.append(f"missing {name} {tuple(t.shape)}")
        elif shapes[name] != tuple(t.shape):
            misshapen.append(f"misshapen {name}: expected {tuple(t.shape)}, found {shapes[name]}")
    for name, old in original.items():
        if name not in expected:
            extra.append(f"extra {old} {shapes[name]}" + (f" (renamed {name})" if old != name else ""))
    if missing or extra or misshapen:
        counts = f"{len(missing)} missing, {len(extra)} extra, {len(misshapen)} misshapen"
        lines = [line for kind in (missing, extra, misshapen) for line in _shortened(kind)]
        raise WeightsError(
            "\n  ".join([f"{source} does not fit {type(module).__name__} ({counts}):", *lines])
        )
    on_meta = any(t.is_meta for t in expected.values())
    module.load_state_dict({name: t.to(expected[name].dtype) for name, t in found.items()}, assign=on_meta)


def _shortened(lines: list[str]) -> list[str]:
    rest = len(lines) - SHOWN
    return lines if rest <= 0 else [*lines[:SHOWN], f"... and {rest} more {lines[0].split()[0]}"]
