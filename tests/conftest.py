"""One thread per worker: pytest-xdist already keeps every core busy, and two that share cores slow each other
down.
"""

import socket

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection raises: a checkpoint is loaded from the disk alone."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
