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
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from zipfile import ZipFile, is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .names import Table, Tensors

Place = str | Path
Strings = dict[str, str]
SHOWN = 10  # names listed per kind of mismatch, before "and 123 more"
TORCH_FILES = (".ckpt", ".pt", ".pth", ".bin")
# What distributed training and torch.compile put before every name.
WRAPPERS = r"(module|_orig_mod|_fsdp_wrapped_module)\."
STAND_INS = {  # how a file begins that is none of weights
    b"version https://git-lfs": "is a pointer of git-lfs, not the file itself: run `git lfs pull` there",
    b"<": "is a web page, not a file of weights: download it again, logged in where that is needed",
    b"GGUF": "is quantised for llama.cpp (GGUF), which is not read: use its safetensors file",
}


class WeightsError(ValueError):
    """A file of weights that cannot be read, or does not fit the module."""


# --- files --------------------------------------------------------------------------------------------------
def save_weights(
    path: Place, tensors: Tensors, metadata: Strings | None = None, durable: bool = True
) -> None:
    """Write a safetensors file so that at any moment `path` holds the old file or the new one, never a part.

    `durable` waits for the disk, so that this holds through a power cut too, not only through a kill.
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


def read_weights(path: Place) -> Tensors:
    """The tensors of a file by their names, on the CPU, in the file's dtype.

    Takes safetensors, torch files (read with weights_only, so that nothing in them is executed), TorchScript
    archives, and the index of a file in several parts (.index.json); which it is, the first bytes tell.
    Raises WeightsError when the file is missing, truncated, or holds more than tensors.
    """
    path = existing(path)
    if path.suffix == ".json":
        found = _read_parts(path)
    elif is_torch(path):
        found = _read_torch(path)
    else:
        with _opened(path) as file:  # a tensor is a view of the mapped file: what is not used is not read
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
    while found and (wrapper := re.match(WRAPPERS, next(iter(found)))):
        if not all(name.startswith(wrapper[0]) for name in found):
            break
        found = {name.removeprefix(wrapper[0]): t for name, t in found.items()}
    return found


def read_metadata(path: Place) -> Strings:
    """The strings saved beside the tensors of a safetensors file; empty if there are none, and of others."""
    path = existing(path)
    if path.suffix == ".json" or is_torch(path):
        return {}
    with _opened(path) as file:
        return file.metadata() or {}


def existing(path: Place) -> Path:
    """The path of a file.  Raises WeightsError when it is not there, or only stands in for another."""
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path} is not there, or not a file")
    with open(path, "rb") as file:
        start = file.read(64)
    for magic, what in STAND_INS.items():
        if start.startswith(magic):
            raise WeightsError(f"{path} {what}")
    return path


def is_torch(path: Path) -> bool:
    """Whether a file is a zip or a pickle, whatever its name ends in; safetensors has a {, after a length."""
    with open(path, "rb") as file:
        start = file.read(9)
    return start[8:] != b"{" and (
        path.suffix in TORCH_FILES or (path.suffix == ".safetensors" and start.startswith((b"PK", b"\x80")))
    )


@contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    problem = f"{path} is truncated or not a safetensors file"
    with named_as(problem, SafetensorError, OSError), safe_open(path, "pt") as file:
        yield file


@contextmanager
def named_as(problem: str, *errors: type[Exception]) -> Iterator[None]:
    """Errors of a library as a WeightsError that states the problem in one sentence."""
    try:
        yield
    except errors as error:
        raise WeightsError(f"{problem}: {error}") from error


def read_json(path: Path) -> dict:
    """A configuration file; empty if there is none.  Raises WeightsError when it is not a JSON object."""
    if not path.is_file():
        return {}
    with named_as(f"{existing(path)} is not JSON in UTF-8", json.JSONDecodeError, UnicodeDecodeError):
        values = json.loads(path.read_text("utf-8-sig"))
    if not isinstance(values, dict):
        raise WeightsError(f"{path} holds a {type(values).__name__}, expected a configuration")
    return values


def _read_parts(index: Path) -> Tensors:
    """The tensors of all the files that an index names."""
    where = read_json(index).get("weight_map")  # tensor name -> file
    if not isinstance(where, dict):
        raise WeightsError(f"{index} is not the index of a file in several parts: it has no weight_map")
    found: Tensors = {}
    for part in sorted(set(where.values())):
        found |= read_weights(index.parent / part)
    if lost := sorted(where.keys() - found.keys()):
        raise WeightsError(f"{index} lists {len(lost)} tensors that its files do not have, {lost[0]} first")
    return found


def _read_torch(path: Path) -> Tensors:
    """A torch file, read with `weights_only`: tensors and containers alone, nothing in it is executed."""
    broken = (RuntimeError, EOFError, OSError, ValueError, KeyError)
    try:
        with named_as(f"{path} is truncated or not a torch file", *broken):
            if is_zipfile(path) and any(name.endswith("/constants.pkl") for name in ZipFile(path).namelist()):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # torch calls the format old
                    return dict(
                        torch.jit.load(str(path), "cpu").state_dict()
                    )  # OpenAI's CLIP; nothing is run
            # files from before torch 1.6, which are not zip files, cannot be mapped into memory
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    except pickle.UnpicklingError as error:
        named = re.search(r"(?:GLOBAL|global) (\S+)", str(error).replace("\n", " "))
        what = f"it asks for {named[1]}" if named else "it is not one of tensors alone"
        why = f"is a pickle that may run code when it is opened, and was not opened: {what}"
        raise WeightsError(f"{path} {why}; use the safetensors file of this checkpoint") from error
    for key in ("state_dict", "model_state_dict", "model", "module"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds a {type(content).__name__}, expected tensors by name")
    # a number is the alpha of a LoRA, or how far the training was
    numbers = {n: torch.tensor(v) for n, v in content.items() if str(n).endswith("alpha") and v is not None}
    return {n: t for n, t in (content | numbers).items() if isinstance(t, Tensor)}


# --- names and modules --------------------------------------------------------------------------------------
def new_names(names: Iterable[str], table: Table, source: Place = "the table") -> Strings:
    """Old name -> new name.

    Raises WeightsError, which begins with `source`, when two become one: one of the tensors would be lost.
    """
    before: Strings = {}  # new name -> old name
    for old in names:
        name = old
        for pattern, replacement in table:
            name = re.sub(pattern, replacement, name)
        if name in before:
            raise WeightsError(f"{source}: {before[name]} and {old} would both be renamed {name}")
        if name:
            before[name] = old
    return {old: name for name, old in before.items()}


def renamed(tensors: Tensors, table: Table, source: Place) -> Tensors:
    """The tensors under our names."""
    return {name: tensors[old] for old, name in new_names(tensors, table, source).items()}


def load_into(module: nn.Module, tensors: Tensors, rename: Table = (), source: Place = "the weights") -> None:
    """Fill the module, in its own precision, or raise a WeightsError and leave it as it was.

    A module on the meta device takes the tensors themselves: a real checkpoint is never in memory twice.
    """
    found = renamed(tensors, rename, source)
    expected, network = module.state_dict(), type(module).__name__
    if not found.keys() & expected.keys():
        fits = f"it has {first_names(found)}, expected {next(iter(expected))}"
        raise WeightsError(f"nothing in {source} matches {network}: {fits}")

    shapes, wanted = ({name: tuple(t.shape) for name, t in each.items()} for each in (found, expected))
    different = [name for name in wanted if name in found and shapes[name] != wanted[name]]
    numbers = [name for name in shapes if name in expected and not found[name].is_floating_point()]
    wrong = {
        "missing": [f"{name} {shape}" for name, shape in wanted.items() if name not in found],
        "extra": [f"{name} {shape}" for name, shape in shapes.items() if name not in expected],
        "misshapen": [f"{name}: expected {wanted[name]}, found {shapes[name]}" for name in different],
    }
    if numbers:
        wrong["quantised"] = [
            f"{name}: expected floating point, found {found[name].dtype}" for name in numbers
        ]
    refuse(f"{source} does not fit {network}", wrong)
    on_meta = any(t.is_meta for t in expected.values())
    module.load_state_dict({name: t.to(expected[name].dtype) for name, t in found.items()}, assign=on_meta)


def refuse(problem: str, wrong: dict[str, list[str]]) -> None:
    """Raise WeightsError with the problem and all that is wrong, by its kind; nothing when nothing is."""
    if not any(wrong.values()):
        return
    lines = [f"{problem} ({', '.join(f'{len(each)} {kind}' for kind, each in wrong.items())}):"]
    for kind, each in wrong.items():
        lines += [f"{kind} {line}" for line in each[:SHOWN]]
        if len(each) > SHOWN:
            lines.append(f"... and {len(each) - SHOWN} more {kind}")
    raise WeightsError("\n  ".join(lines))


def first_names(tensors: Iterable[str]) -> str:
    """The first three names, for error messages."""
    return ", ".join(list(tensors)[:3]) or "no tensors at all"
