"""One thread per worker and per process that a test starts: pytest-xdist already keeps every core busy.

Torch reads it when it is imported; the process that hands out the tests never imports it.
"""

import gc
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
gc.disable()  # until all is imported


def pytest_collection_finish() -> None:
    """Half a million objects of modules and tests stay to the end: no collection looks at them again."""
    gc.freeze()
    gc.enable()


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection raises: a checkpoint is loaded from the disk alone."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)


@pytest.fixture
def terminal() -> Iterator[None]:
    """A hangup is not ignored, though pytest may have been started with `nohup`."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture
def short_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run shows one prompt in its album and strips, and a strip its first picture, where no test looks at
    them (tests/test_showcase.py does): to sample, read and lay out all takes longer than the training.
    """
    from minireflect import figures, showcase

    prompts, strip = showcase.fixed_prompts, figures.strip

    def first(rows: list, labels: list[str], heads: list[str], path: Path, abreast: int = 1) -> None:
        strip([rows[0][:1]], labels[:1], heads[:1], path)

    monkeypatch.setattr(figures, "strip", first)
    monkeypatch.setattr(showcase, "fixed_prompts", lambda *kinds: prompts(*kinds)[:1])
