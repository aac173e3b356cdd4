"""Named streams of random numbers: every place that draws has its own, and none of them needs to be saved.

    rng(seed, "rollout", step)

A stream is named by a path, so no two places share one, and a resumed run draws what the unbroken one would
have.
"""

import hashlib
import random

import torch


def _number(seed: int, path: tuple[str | int, ...]) -> int:
    name = "/".join(map(str, (seed, *path)))
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1  # torch takes 63 bits


def rng(seed: int, *path: str | int) -> torch.Generator:
    """A torch generator on the CPU: the same noise whatever the device that it is moved to."""
    return torch.Generator().manual_seed(_number(seed, path))


def choices(seed: int, *path: str | int) -> random.Random:
    """The same for drawing from lists."""
    return random.Random(_number(seed, path))
