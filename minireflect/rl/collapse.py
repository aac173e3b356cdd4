"""Signs of a collapse: the pictures turn into grey or blue noise while the reward rises.

    statistic                                                 a sign of collapse, if
    size         mean |x_0| of the clean latents              it differs from the base's by a factor over 1.5
    constant     share of pictures with almost no contrast    it is over 0.5
    unreadable   share that the inspector cannot read         it exceeds the base's by 0.5, or rises to 1
    flat         share of groups with equal rewards           it is at least 0.95
    clip_high, clip_low   share stopped by one clip (PPO)     one of them is at least 0.95

The base is the model at iteration 0.  The signs of every iteration are in metrics.jsonl, and a warning is
printed when they first appear; `--stop-on-collapse` ends the run after PATIENCE iterations with signs.
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
CONTRAST = 0.05  # a picture is constant if no channel has this standard deviation, in [-1, 1]
READ = 16  # pictures that the inspector reads in each iteration
PATIENCE = 3  # iterations with signs until `--stop-on-collapse` ends the run


@dataclass(frozen=True)
class StopRule(Checked):
    # end the run if the pictures collapse into noise
    stop_on_collapse: bool = False


class Collapsed(Unfinished):
    """`--stop-on-collapse` has ended the run."""


def statistics(x_0: Tensor, images: Tensor, readable: bool = True) -> dict[str, float]:
    """The statistics `size`, `constant` and, if possible, `unreadable` of an iteration's pictures.

    readable: whether the pictures are of the synthetic world; the inspector reads those of 64x64 pixels.
    Shapes: x_0 (b c h w), images (b 3 h w) in [-1, 1]
    """
    contrast = images.float().flatten(2).std(2).amax(1)
    both = torch.stack([x_0.float().abs().mean(), (contrast < CONTRAST).float().mean()])
    found = dict(zip(("size", "constant"), both.tolist()))
    if readable and images.shape[1:] == (3, SIZE, SIZE):
        read = inspect_all(images[:READ].cpu())
        found["unreadable"] = sum(r.scene is None for r in read) / len(read)
    return found


def signs(now: dict[str, float | None], base: dict[str, float | None]) -> list[str]:
    """The signs of a collapse, as phrases.

    now, base: statistics of this iteration and of iteration 0; a value may be missing or None.
    """
    at = {"unreadable": 0.0, "flat": 0.0, "clip_high": 0.0, "clip_low": 0.0}
    at |= {name: value for name, value in now.items() if value is not None}
    size, size_0, clipped = at["size"], base["size"] or 1.0, max(at["clip_high"], at["clip_low"])
    unread, unread_0 = at["unreadable"], base.get("unreadable", 0.0)
    wrong = {
        f"mean |x_0| is {size:.2f}, the base's {size_0:.2f}": not 1 / FACTOR <= size / size_0 <= FACTOR,
        f"{at['constant']:.0%} of the pictures are nearly constant": at["constant"] > HALF,
        f"{unread:.0%} of the pictures are unreadable": unread >= min(1, unread_0 + HALF) > unread_0,
        "nearly all groups have equal rewards": at["flat"] >= ALL,
        "nearly all samples are stopped by one clip": clipped >= ALL,
    }
    return [said for said, holds in wrong.items() if holds]


def watch(rule: StopRule, run: Run, memory: dict, now: dict[str, float | None]) -> str | None:
    """Compare an iteration with iteration 0, and warn or end the run if there are signs of a collapse.

    memory: keeps the statistics of iteration 0 and the number of bad iterations in a row; a run saves it.
    -> the signs for the log, or None.  Raises Collapsed if `rule` ends the run.
    """
    found = "; ".join(signs(now, memory.setdefault("base", now)))
    memory["bad"] = memory.get("bad", 0) + 1 if found else 0
    if memory["bad"] == 1:
        print(f"\nwarning: the pictures may have collapsed in {run.at}: {found}", file=sys.stderr)
    if memory["bad"] >= PATIENCE and rule.stop_on_collapse:
        raise Collapsed(f"stopped by --stop-on-collapse in {run.at}: {found}; the last state is saved")
    return found or None
