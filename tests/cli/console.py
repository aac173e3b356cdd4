"""The console command in this process, from a folder of its own: the import of torch is paid once."""

import io
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest

from minireflect.__main__ import main

ROOT = Path(__file__).parent.parent.parent


class Result(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def run(command: str, *words: str, cwd: Path) -> Result:
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(cwd)
        try:
            code = main([command, *words])
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
    return Result(code or 0, out.getvalue(), err.getvalue())


def refused(result: Result, *parts: str) -> None:
    """Exit status 2, no traceback, and a message that holds the parts."""
    assert result.returncode == 2, result.stderr[-2000:]
    assert "Traceback" not in result.stderr
    said = " ".join(result.stderr.replace("│", " ").split())  # tyro frames and wraps its sentences
    for part in parts:
        assert part in said, result.stderr
