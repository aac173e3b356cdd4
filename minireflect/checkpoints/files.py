"""Read and write files of weights, and load them into modules.

    save_weights(path, unet.state_dict(), {"config": ...})
    load_into(unet, read_weights(path))                                      # a file of minireflect
    load_into(unet, read_weights(theirs), DIFFUSERS_UNET, source=theirs)     # a published file: names.py

Safetensors and torch files are read; no pickle code is executed.  Loading is strict: the file must have every
tensor of the module and no others, and all shapes must agree.  Otherwise nothing is loaded, and the error
names the tensors that are missing, extra or misshapen.
"""

import hashlib
import pickle
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from zipfile import is_zipfile

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..disk import Place, parse_json, read_text, replacing
from ..ranges import Finite, Refusal, all_finite, expect, finite, quote
from .names import Table, Tensors, inside

Strings = dict[str, str]
SHOWN = 10  # names listed per kind of mismatch, before "and 123 more"
CHECKSUM = "minireflect_checksum"  # metadata key of `checksum` in files of minireflect
# Prefixes that distributed training and torch.compile add to every name.
WRAPPERS = r"(module|_orig_mod|_fsdp_wrapped_module)\."
STAND_INS = {  # first bytes of files that hold no readable weights -> what such a file is
    b"version https://git-lfs": "is a pointer of git-lfs, not the file itself: run `git lfs pull` there",
    b"<": "is a web page, not a file of weights: download it again, and log in if the site needs it",
    b"GGUF": "is a quantised file for llama.cpp (GGUF), which is not supported: use a safetensors file",
}


class WeightsError(Refusal):
    """A file of weights cannot be read, or does not fit the module."""


# --- files --------------------------------------------------------------------------------------------------
def checksum(tensors: Tensors, metadata: Strings) -> str:
    """SHA-256 of the tensors (names, dtypes, shapes, bytes) and of the metadata except CHECKSUM."""
    found = hashlib.sha256(repr(sorted((k, v) for k, v in metadata.items() if k != CHECKSUM)).encode())
    for name, t in sorted(tensors.items()):
        found.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        found.update(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def save_weights(
    path: Place, tensors: Tensors, metadata: Strings, durable: bool = True, keep: Path | None = None
) -> None:
    """Write a safetensors file, with a checksum in its metadata; `durable` and `keep` as in `replacing`.

    Raises FloatingPointError when a number is not finite; then nothing is written.
    """
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    for name, t in tensors.items():
        finite(t, f"{name}, to be saved in {Path(path).name},")
    metadata = {**metadata, CHECKSUM: checksum(tensors, metadata)}
    with replacing(path, durable, keep) as written:
        written.write(safetensors.torch.save(tensors, metadata))


def read_weights(path: Place) -> Tensors:
    """The tensors of a file, by name, on the CPU, in the dtype of the file.

    The file may be a safetensors file, a torch file (read with weights_only, so that no code in it runs), a
    TorchScript archive, or the index of a file in several parts (.json).
    Raises WeightsError when the file is missing or truncated, or is a pickle of other objects.
    """
    path = existing(path)
    if path.suffix == ".json":
        found = _read_parts(path)
    elif is_torch(path):
        found = _read_torch(path)
    else:
        with _opened(path) as file:  # tensors are views of the mapped file: unused ones are not read
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
    found = _unwrapped(found)
    for dtype, name in {t.dtype: name for name, t in found.items() if t.is_floating_point()}.items():
        problem = f"{path} holds {quote(name)} in {dtype}, which cannot be converted; use another precision"
        with named_as(problem, RuntimeError):
            torch.zeros(8, dtype=torch.uint8).view(dtype).float()
    return found


def _unwrapped(found: dict) -> dict:
    """The values by their names without the WRAPPERS that all names have."""
    while (m := re.match(WRAPPERS, next(iter(found), ""))) and all(n.startswith(m[0]) for n in found):
        found = inside(found, m[0])
    return found


def read_metadata(path: Place) -> Strings:
    """The metadata of a safetensors file; empty for other kinds of file."""
    path = existing(path)
    if path.suffix == ".json" or is_torch(path):
        return {}
    with _opened(path) as file:
        return file.metadata() or {}


def read_ours(path: Place, checked: bool = False) -> tuple[Tensors, Strings]:
    """The tensors and the metadata of a file of minireflect.

    Raises WeightsError when the checksum is wrong; with `checked`, also when there is no checksum.
    """
    tensors, metadata = read_weights(path), read_metadata(path)
    if (checked or CHECKSUM in metadata) and metadata.get(CHECKSUM) != checksum(tensors, metadata):
        raise WeightsError(f"{path} is damaged: its tensors are not those that were saved (checksum)")
    return tensors, metadata


def existing(path: Place) -> Path:
    """The path of a file that exists.  Raises WeightsError otherwise, and for the files of STAND_INS."""
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path} does not exist, or is not a file")
    with open(path, "rb") as file:
        start = file.read(64)
    if what := next((what for magic, what in STAND_INS.items() if start.startswith(magic)), None):
        raise WeightsError(f"{path} {what}")
    return path


def is_torch(path: Path) -> bool:
    """Whether a file is a torch file (a zip or a pickle), by its first bytes and its suffix.

    A safetensors file begins with 8 bytes of length and a brace, and may have the suffix of a torch file.
    """
    with open(path, "rb") as file:
        start, suffix = file.read(9), path.suffix.lower()
    mislabelled = suffix == ".safetensors" and start.startswith((b"PK", b"\x80"))
    return start[8:] != b"{" and (suffix in (".ckpt", ".pt", ".pth", ".bin") or mislabelled)


@contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    with named_as(f"{path} is truncated or not a safetensors file", Exception), safe_open(path, "pt") as file:
        yield file


@contextmanager
def named_as(problem: str, *errors: type[Exception]) -> Iterator[None]:
    """Turn these errors into a WeightsError, `problem: first line of the error`; "" adds no problem."""
    try:
        yield
    except errors as error:
        first = str(error).partition("\n")[0] or type(error).__name__
        raise WeightsError(f"{problem}: {first}" if problem else first) from error


def read_json(path: Path) -> dict:
    """The JSON object in a published configuration file; {} if there is no file.

    Raises WeightsError when the file is not a JSON object.
    """
    if not path.is_file():
        return {}
    with named_as("", Refusal):
        return parse_json(read_text(existing(path)), dict, path, float)  # diffusers writes Infinity


def _read_parts(index: Path) -> Tensors:
    """The tensors of all files that an index names; these must be in the folder of the index."""
    with named_as(f"{index} is not the index of a file in several parts", Refusal):
        # tensor -> file
        where = _unwrapped(expect(read_json(index).get("weight_map"), dict[str, str], "weight_map"))
    found: Tensors = {}
    for part in sorted(set(where.values())):
        if part != Path(part).name or part.endswith(".json") or len(part) > 200:
            raise WeightsError(f"{index} names {quote(part)}; the parts must be in the folder of the index")
        tensors, named = read_weights(index.parent / part), {n for n, file in where.items() if file == part}
        if lost := sorted(named - tensors.keys()):
            some = f"{len(lost)} tensors that its files do not have, such as {quote(lost[0])} in {part}"
            raise WeightsError(f"{index} lists {some}")
        if more := sorted(tensors.keys() - named):
            raise WeightsError(f"{part} has {quote(more[0])}, but {index} does not say so; get both again")
        found |= tensors
    return found


def _read_torch(path: Path) -> Tensors:
    """The tensors of a torch file, read with `weights_only`: no code in the file is executed."""
    try:
        if is_zipfile(path):  # opened as torch.jit.load does, so that both find the same records
            archive = torch._C.PyTorchFileReader(str(path))
            if archive.has_record("constants.pkl"):
                return _read_script(path, archive)
        # Only zip files can be mapped into memory, which those from before torch 1.6 are not.  A name that
        # ends in .safetensors makes recent torch read that format instead; an open file has no name.
        mapped = is_zipfile(path) and path.suffix != ".safetensors"
        with open(path, "rb") as file:
            content = torch.load(path if mapped else file, "cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        named = re.search(r"(?:GLOBAL|global) (\S+)", str(error).replace("\n", " "))
        what = f"it uses {named[1]}" if named else "it contains more than tensors"
        why = f"may run code when it is opened, so it was not opened: {what}"
        raise WeightsError(f"{path} {why}; use the safetensors file of this checkpoint") from error
    except Exception as error:  # torch raises many kinds of error on truncated files
        first = quote(str(error).partition("\n")[0])
        raise WeightsError(f"{path} is truncated or not a torch file: {first}") from error
    for key in ("state_dict", "model_state_dict", "model", "module"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            for name in filter(re.compile(r"(?i)(.*_)?ema(_.*)?").fullmatch, map(str, content)):
                warnings.warn(f"{path}: its averaged weights ({quote(name)}) are ignored", stacklevel=5)
            content = content[key]
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds a {type(content).__name__}, expected a dict of tensors by name")
    content = {str(name): value for name, value in content.items()}
    for name, value in content.items():  # the alpha of a LoRA may be a number; others are dropped
        if name.endswith("alpha") and isinstance(value, int | float | str):
            with named_as(str(path), Refusal):
                content[name] = torch.tensor(float(expect(value, Finite, name)))
    found = {name: t for name, t in content.items() if isinstance(t, Tensor)}
    if odd := [name for name, value in content.items() if isinstance(value, dict) and value]:
        raise WeightsError(f"{path} holds {quote(odd[0])}, which is no tensor; expected only tensors by name")
    if odd := [name for name, t in found.items() if t.layout != torch.strided or t.is_quantized or t.is_meta]:
        raise WeightsError(f"{path} holds {quote(odd[0])}, which is sparse, quantised or without data")
    return {name: t.detach() for name, t in found.items()}


def _read_script(path: Path, archive: torch._C.PyTorchFileReader) -> Tensors:
    """The tensors of a TorchScript archive, such as OpenAI's CLIP.

    Only the method `__setstate__` of the program in it would run.  Raises UnpicklingError if there is one.
    """
    programs = [archive.get_record(name) for name in archive.get_all_records() if name.endswith(".py")]
    with open(path, "rb") as file:  # a file with PTMF here is read in another format, not as an archive
        if file.read(8)[4:] == b"PTMF" or any(b"__setstate__" in program for program in programs):
            raise pickle.UnpicklingError("GLOBAL __setstate__")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that TorchScript is deprecated
        return dict(torch.jit.load(str(path), "cpu").state_dict())


# --- names and modules --------------------------------------------------------------------------------------
def new_names(names: Iterable[str], table: Table, source: Place = "the table") -> Strings:
    """Old name -> new name, by a table of names.py.  Names that become empty are left out.

    Raises WeightsError, which begins with `source`, when two names become equal: a tensor would be lost.
    """
    before: Strings = {}  # new name -> old name
    for old in names:
        name = reduce(lambda name, rule: re.sub(*rule, name), table, old)
        if name in before:
            raise WeightsError(f"{source}: {before[name]} and {old} would both be renamed {name}")
        if name:
            before[name] = old
    return {old: name for name, old in before.items()}


def renamed(tensors: Tensors, table: Table, source: Place) -> Tensors:
    """The tensors by their new names, as `new_names`."""
    return {name: tensors[old] for old, name in new_names(tensors, table, source).items()}


def load_into(module: nn.Module, tensors: Tensors, rename: Table = (), source: Place = "the weights") -> None:
    """Copy the tensors into the module, converted to its dtypes; `rename` is a table of names.py.

    A module on the meta device takes the tensors themselves, so that a checkpoint is in memory only once.
    Raises WeightsError when names, shapes or dtypes do not agree, or a number is not finite; the module is
    then unchanged.
    """
    found = renamed(tensors, rename, source)
    expected, network = module.state_dict(), type(module).__name__
    if expected and not found.keys() & expected.keys():
        fits = f"it has {first_names(found)}, expected {next(iter(expected))}"
        raise WeightsError(f"no tensor of {source} matches {network}: {fits}")

    both = [(name, t, found[name]) for name, t in expected.items() if name in found]
    other = [(name, tuple(a.shape), tuple(b.shape)) for name, a, b in both if a.shape != b.shape]
    kinds = [(n, a.dtype, b.dtype) for n, a, b in both if a.is_floating_point() != b.is_floating_point()]
    wrong = {
        "missing": [f"{name} {tuple(t.shape)}" for name, t in expected.items() if name not in found],
        "extra": [f"{name} {tuple(t.shape)}" for name, t in found.items() if name not in expected],
        "misshapen": [f"{name}: expected {a}, found {b}" for name, a, b in other],
        "quantised": [f"{name}: expected {a}, found {b}" for name, a, b in kinds],
        "not finite": [name for name, _, t in both if t.is_floating_point() and not all_finite(t)],
    }
    refuse(f"{source} does not fit {network}", wrong)
    on_meta = any(t.is_meta for t in expected.values())
    module.load_state_dict({name: t.to(expected[name].dtype) for name, t in found.items()}, assign=on_meta)


def refuse(problem: str, wrong: dict[str, list[str]]) -> None:
    """Raise WeightsError with the problem and all mismatches, by kind, unless all lists are empty."""
    if not (wrong := {kind: each for kind, each in wrong.items() if each}):
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
