"""Named streams of random numbers: each use has its own generator, seeded from the run's seed and a path.

    rng(seed, "rollout", step)

No two uses share a stream, and no generator state has to be saved: a resumed run draws the same numbers as
an uninterrupted one.
"""

import hashlib
import random

import torch
from torch import Generator, Tensor


def _number(seed: int, path: tuple[str | int, ...]) -> int:
    name = "/".join(map(str, (seed, *path)))
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1  # a seed of 63 bits


def rng(seed: int, *path: str | int) -> Generator:
    """A torch generator on the CPU, so that the noise is the same on every device."""
    return Generator().manual_seed(_number(seed, path))


def normal(shape: tuple[int, ...], generator: Generator, device: torch.device | str) -> Tensor:
    """Draw N(0, I) on the device of the generator and copy it to `device` with `sent`."""
    return sent(torch.randn(shape, generator=generator, device=generator.device), device)


def sent(x: Tensor, device: torch.device | str) -> Tensor:
    """Copy `x` to the device. A copy from the CPU is asynchronous: the host does not wait for it."""
    return x.to(device, non_blocking=x.device.type == "cpu")


def choices(seed: int, *path: str | int) -> random.Random:
    """A generator of Python's `random` module, for random choices from lists."""
    return random.Random(_number(seed, path))
