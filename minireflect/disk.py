"""Atomic writing of files, and checked reading of JSON.

    with replacing(path) as file:                   # `path` always holds the complete old or new file
        file.write(data)
    values = read_json(path, dict[str, float])      # an error names the key that has the wrong type

All other modules use these functions.
"""

import errno
import io
import json
import math
import os
import secrets
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from stat import S_ISREG
from typing import Any, BinaryIO, TextIO

from .ranges import Refusal, expect, quote

Place = str | Path
LARGEST = 1 << 28  # bytes: larger files are not read
TEMPORARY = ".*.tmp"  # names of the temporary files that a killed process leaves
DEEPEST = 50  # levels of nested lists and objects in JSON


@contextmanager
def replacing(path: Place, durable: bool = True, keep: Path | None = None) -> Iterator[BinaryIO]:
    """A buffer whose contents replace the file at `path` when the block ends without an error.

    The contents are collected in memory, because some libraries do not report a full disk when they write to
    a file themselves. They are then written to a new temporary file with a random name, which is renamed to
    `path`. A link at `path` is replaced; its target is not changed. After an error `path` is unchanged and no
    temporary file is left.

    The old file is moved to `keep`, if given. With `durable` the function waits until the data are on the
    disk, so that a power cut cannot damage the file either. Raises OSError, also if `path` is a folder or a
    device.
    """
    path, whole = Path(path), io.BytesIO()
    check_place(path)
    yield whole
    # in the same folder, because a rename is atomic only within one file system
    temporary = path.with_name(f".{path.name[:80]}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(whole.getbuffer())
            file.flush()
            if durable:
                os.fsync(file.fileno())  # the contents must be on the disk before the rename is
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def stops() -> set[int]:
    """The signals that stop a command: Ctrl-C, kill, and a closed terminal unless `nohup` ignores it.

    Only the main thread gets signals: in another one there are none.
    """
    if threading.current_thread() is not threading.main_thread():
        return set()
    hangup = getattr(signal, "SIGHUP", signal.SIGTERM)  # Windows has no SIGHUP
    ignored = signal.getsignal(hangup) == signal.SIG_IGN
    return {signal.SIGINT, signal.SIGTERM, signal.SIGTERM if ignored else hangup}


def mute(*streams: TextIO) -> None:
    """Discard all further output: after an error, Python would flush the streams and fail again at exit."""
    for stream in streams:
        with suppress(OSError, AttributeError):  # the stream may have no file descriptor
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def check_place(path: Path) -> None:
    """Raises OSError if `path` is a folder, pipe or device, or if such a path cannot exist."""
    with suppress(FileNotFoundError):
        if not S_ISREG(path.stat().st_mode):
            raise OSError(errno.EEXIST, "it is not a regular file", str(path))


def write_text(path: Place, text: str) -> None:
    """Write a text file with `replacing`."""
    with replacing(path) as file:
        file.write(text.encode())


def read_bytes(path: Place) -> bytes:
    """The contents of a regular file.

    Raises Refusal if there is no such file or it is too large, OSError if it cannot be read.
    """
    if not Path(path).is_file():  # reading a pipe would block
        raise Refusal(f"{path} does not exist or is not a file")
    if Path(path).stat().st_size > LARGEST:
        raise Refusal(f"{path} is too large: the limit is {LARGEST >> 20} MB")
    return Path(path).read_bytes()


def read_text(path: Place) -> str:
    """The text of a UTF-8 file; its lines end in "\\n".

    Raises Refusal if it is not UTF-8, and the errors of `read_bytes`.
    """
    try:
        return read_bytes(path).decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise Refusal(f"{path} is not a text file in UTF-8: {error.reason} at byte {error.start}") from None


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):  # also of 1e999
        raise ValueError(f"{text} is not a finite number")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    for name, value in pairs:
        if values[name] is not value:
            raise ValueError(f"the key {quote(name)} appears twice")
    return values


def _depth(value: object) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_depth, inner), default=0)


def parse_json(text: str | bytes, kind: Any, where: object, number: Callable = _finite) -> Any:
    """The value of a JSON text, checked against the type `kind`.

    `number` reads numbers with a point or an exponent, and NaN, Infinity and -Infinity, which are not valid
    JSON, but Python writes them. By default it refuses what is not finite, as 1e999. Raises Refusal, whose
    message begins with `where`, on invalid JSON or another type.
    """
    try:
        value = json.loads(text, parse_constant=number, parse_float=number, object_pairs_hook=_unique)
        if _depth(value) > DEEPEST:
            raise RecursionError
    except (ValueError, RecursionError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise Refusal(f"{where} is not JSON: {why}") from None
    return expect(value, kind, str(where))


def read_json(path: Place, kind: Any = dict) -> Any:
    """The value of a JSON file.  Raises the errors of `read_text` and `parse_json`."""
    return parse_json(read_text(path), kind, path)
