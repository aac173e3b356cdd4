"""Signs that reinforcement has ruined the pictures: grey or blue noise under a rising reward.

    size         mean |x_0| of the clean latents            the base's, within a factor of 1.5
    constant     share of pictures with hardly any contrast   at most half
    unreadable   share that the inspector cannot read         the base's, plus half
    flat         share of groups with equal rewards           not all: nothing is learnt from them
    clip_high, clip_low   share stopped by one clip (PPO)     not nearly all of one side

The base is what iteration 0 samples.  The limits are wide on purpose: a sign is said once when it appears and
stands in metrics.jsonl; `--stop-on-collapse` ends the run after PATIENCE iterations with one.
"""

import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ranges import Checked
from ..run import Run, Unfinished
from ..world.canvas import SIZE
from ..world.inspector import inspect_all

FACTOR, HALF, ALL = 1.5, 0.5, 0.95
CONTRAST = 0.05  # standard deviation of the pixels, of [-1, 1]
READ = 16  # pictures that the inspector reads in an iteration
PATIENCE = 3


@dataclass(frozen=True)
class StopRule(Checked):
    # end when the pictures leave the base's range
    stop_on_collapse: bool = False


class Collapsed(Unfinished):
    """The run was ended by `--stop-on-collapse`."""


def statistics(x_0: Tensor, images: Tensor, readable: bool = True) -> dict[str, float]:
    """Statistics of an iteration's pictures. `readable`: they are of the synthetic world; the inspector reads
    those of 64 x 64 pixels.

    Shapes: x_0 (b c h w), images (b 3 h w) in [-1, 1]
    """
    contrast = images.float().flatten(1).std(1)
    both = torch.stack([x_0.float().abs().mean(), (contrast < CONTRAST).float().mean()])
    found = dict(zip(("size", "constant"), both.tolist()))
    if readable and images.shape[1:] == (3, SIZE, SIZE):
        read = inspect_all(images[:READ].cpu())
        found["unreadable"] = sum(r.scene is None for r in read) / len(read)
    return found


def signs(now: dict[str, float | None], base: dict[str, float | None]) -> list[str]:
    """The signs of a collapse in an iteration, compared with iteration 0."""
    at = {"unreadable": 0.0, "flat": 0.0, "clip_high": 0.0, "clip_low": 0.0}
    at |= {name: value for name, value in now.items() if value is not None}
    size, other, clipped = at["size"], base["size"] or 1.0, max(at["clip_high"], at["clip_low"])
    unread, was = at["unreadable"], base.get("unreadable", 0.0)
    wrong = {
        f"mean |x_0| is {size:.2f}, the base's {other:.2f}": not other / FACTOR <= size <= other * FACTOR,
        f"{at['constant']:.0%} of the pictures are nearly constant": at["constant"] > HALF,
        f"{unread:.0%} of the pictures are unreadable": unread > was and unread >= min(1, was + HALF),
        "all groups have equal rewards": at["flat"] >= ALL,
        "nearly all samples are stopped by one clip": clipped >= ALL,
    }
    return [said for said, holds in wrong.items() if holds]


def watch(rule: StopRule, run: Run, memory: dict, now: dict[str, float | None]) -> str | None:
    """Compare an iteration with the first one, which `memory` keeps, and count bad iterations in a row.

    -> the signs, for the log.  Raises Collapsed.
    """
    found = "; ".join(signs(now, memory.setdefault("base", now)))
    memory["bad"] = memory.get("bad", 0) + 1 if found else 0
    if memory["bad"] == 1:
        print(f"\nwarning: {found}, in {run.at}: the pictures may have collapsed", file=sys.stderr)
    if memory["bad"] >= PATIENCE and rule.stop_on_collapse:
        raise Collapsed(f"stopped by --stop-on-collapse in {run.at}: {found}; its last state is kept")
    return found or None
