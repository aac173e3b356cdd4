"""One thread per worker and per process that a test starts: pytest-xdist already keeps every core busy.

Torch reads it when it is imported; the process that hands out the tests never imports it.
"""

import os
import socket

import pytest

os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection raises: a checkpoint is loaded from the disk alone."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
