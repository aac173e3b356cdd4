"""Named streams of random numbers: every place that draws has its own, and none of them needs to be saved.

    rng(seed, "rollout", step)

A stream is named by a path, so no two places share one, and a resumed run draws what the unbroken one would
have.
"""

import hashlib
import random
from typing import Annotated

import torch
from torch import Generator, Tensor

from .ranges import Dense

Floats = Annotated[Tensor, Dense()]


def _number(seed: int, path: tuple[str | int, ...]) -> int:
    name = "/".join(map(str, (seed, *path)))
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1  # torch takes 63 bits


def rng(seed: int, *path: str | int) -> Generator:
    """A torch generator on the CPU, so that the noise is the same for every device."""
    return Generator().manual_seed(_number(seed, path))


def normal(shape: tuple[int, ...], generator: Generator, device: torch.device | str) -> Tensor:
    """N(0, I), drawn on the device of the generator, and copied to `device` without a wait."""
    return sent(torch.randn(shape, generator=generator, device=generator.device), device)


def sent(x: Tensor, device: torch.device | str) -> Tensor:
    """Copy `x` to the device; from the CPU without a wait for the copy."""
    return x.to(device, non_blocking=x.device.type == "cpu")


def choices(seed: int, *path: str | int) -> random.Random:
    """A generator of Python's random module, to draw from lists."""
    return random.Random(_number(seed, path))
