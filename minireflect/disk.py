"""The one place where bytes are written, and where JSON is read.

with replacing(path) as file:           at any moment `path` holds the old file or the new one
values = read_json(path, dict[str, float])          a wrong type is named with its place in the file
"""

import errno
import io
import json
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from stat import S_ISREG
from typing import Any, BinaryIO

from .ranges import Refusal, expect, quote

Place = str | Path
LARGEST = 1 << 28  # bytes of a file that is read whole
DEEPEST = 50  # lists and objects within each other


@contextmanager
def replacing(path: Place, durable: bool = True, keep: Path | None = None) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` when it is written whole; nothing is left of a failure.

    It is collected in memory: libraries that write to a file themselves do not all notice a full disk.

    Its name is random and it is made anew, so no link is followed; a link at `path` is replaced, not its
    target.  `keep` is where the old file goes.  `durable` waits for the disk, so that all this holds through
    a power cut too, not only through a kill.  Raises OSError, also on a folder or a device at `path`.
    """
    path, whole = Path(path), io.BytesIO()
    check_place(path)
    yield whole
    # In the same folder, since a rename is atomic only within a disk.
    temporary = path.with_name(f".{path.name[:80]}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(whole.getbuffer())
            file.flush()
            if durable:
                os.fsync(file.fileno())  # contents before the name: a power cut must not swap the two
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def check_place(path: Path) -> None:
    """Raises OSError on a folder, pipe or device, and on a path that cannot be there."""
    with suppress(FileNotFoundError):
        if not S_ISREG(path.stat().st_mode):
            raise OSError(errno.EEXIST, "there is no regular file", str(path))


def remove_temporaries(folder: Path) -> None:
    """Remove what a process that died has left of `replacing`."""
    for left in folder.glob(".*.tmp"):
        left.unlink()


def write_text(path: Place, text: str) -> None:
    """Write a text file in one piece: a reader sees the old one or the new one."""
    with replacing(path) as file:
        file.write(text.encode())


def read_bytes(path: Place) -> bytes:
    """The contents of a regular file.  Raises Refusal when it is none, OSError when it cannot be read."""
    if not Path(path).is_file():  # a pipe would be waited for
        raise Refusal(f"{path} is not there, or not a file")
    if Path(path).stat().st_size > LARGEST:
        raise Refusal(f"{path} is too large: {LARGEST >> 20} MB are read of a file at most")
    return Path(path).read_bytes()


def read_text(path: Place) -> str:
    """The text of a regular file in UTF-8.  Raises Refusal and OSError as `read_bytes`."""
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Refusal(f"{path} is not a text file: {error.reason} at byte {error.start}") from None


def _refused(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    for name, value in pairs:
        if values[name] is not value:
            raise ValueError(f"{quote(name)} is there twice")
    return values


def _depth(value: object) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_depth, inner), default=0)


def parse_json(text: str | bytes, kind: Any, where: object, constant: Callable = _refused) -> Any:
    """The value of a JSON text, of the type that is expected.  Raises Refusal, which begins with `where`.

    `constant` makes a value of NaN, Infinity and -Infinity, which are no JSON, but Python writes them.
    """
    try:
        unique = _unique if constant is _refused else None  # published files are taken as they are
        value = json.loads(text, parse_constant=constant, object_pairs_hook=unique)
        if _depth(value) > DEEPEST:
            raise RecursionError
    except (ValueError, RecursionError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise Refusal(f"{where} is not JSON: {why}") from None
    return expect(value, kind, str(where))


def read_json(path: Place, kind: Any = dict) -> Any:
    """The value of a JSON file.  Raises Refusal as `read_text` and `parse_json`."""
    return parse_json(read_text(path), kind, path)
