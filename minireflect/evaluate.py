"""How good a generator is: fixed held-out prompts, fixed noise, the inspector's verdict, and the learned reward beside it.

What all measurements share, and the one of the laws; scene graphs are in evaluate_graphs.py, rationales in evaluate_reason.py.
Every table shows truth and reward law by law, as an average can hide a law at zero, and a learned reward can be fooled.
"""

import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from tqdm import tqdm

from .pipeline import LatentDiffusion, SamplerConfig
from .rl.rewards import Reward
from .streams import choices, rng
from .world.inspector import inspect_all
from .world.laws import LAWS
from .world.prompts import Prompt, draw_prompts

Z = 1.959964  # standard deviations of a normal distribution that hold 95 % of it
WIDTH = 110  # columns of a terminal


@dataclass(frozen=True)
class EvaluationConfig:
    # pictures of each kind of prompt, the laws in equal shares
    pictures: int = 256
    # combinations of objects: held-out ones, which no training sees, or train
    split: str = "held-out"
    # of prompts and noise, the same for every model that is compared
    seed: int = 1_000
    # pictures sampled at once; another number gives other noise
    batch: int = 64

    def __post_init__(self) -> None:
        if self.pictures < 1 or self.batch < 1:
            raise ValueError(f"pictures and batch must be at least 1, got {self.pictures} and {self.batch}")


def fixed_batches(
    items: Sequence, config: EvaluationConfig, *stream: str, label: str = ""
) -> Iterator[tuple[Sequence, Callable[..., Generator]]]:
    """`config.batch` items at a time, each time with a function that makes the noise of this batch.

    The function takes further numbers, where a batch is sampled more than once: noise(k).
    """
    for i in tqdm(range(0, len(items), config.batch), f"measuring {label}", unit="batch", leave=False):
        yield items[i : i + config.batch], partial(rng, config.seed, "evaluate", *stream, i)


# ------------------------------------------------------------------------------------------------ numbers and tables
def over_seeds(values: Sequence[float]) -> str:
    """Mean ± half of the 95 % interval (Student's t) of what several seeds gave; one seed has no interval."""
    from scipy.special import stdtrit

    x = np.asarray(values, float)
    if len(x) < 2:
        return f"{x.mean():.3f}"
    half = stdtrit(len(x) - 1, 0.975) * x.std(ddof=1) / len(x) ** 0.5
    return f"{x.mean():.3f} ± {half:.3f}"


def wilson(share: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a share of n pictures (Wilson 1927): never outside [0, 1], unlike share ± Z * std."""
    middle, half = share + Z**2 / (2 * n), Z * (share * (1 - share) / n + (Z / (2 * n)) ** 2) ** 0.5
    return (middle - half) / (1 + Z**2 / n), (middle + half) / (1 + Z**2 / n)


@dataclass(frozen=True)
class Table:
    """Named rows of numbers: `print(table)` for a terminal, `table.markdown` for a page."""

    head: Sequence[str]  # the first entry says what the rows are
    rows: Sequence[Sequence[str | float]]  # the first entry of each is its name; numbers get three decimals

    @property
    def cells(self) -> list[list[str]]:
        """Head and rows as text."""
        return [[c if isinstance(c, str) else f"{c:.3f}" for c in row] for row in (self.head, *self.rows)]

    @property
    def markdown(self) -> str:
        head, *rows = ("| " + " | ".join(row) + " |" for row in self.cells)
        return "\n".join([head, "|---" * len(self.head) + "|", *rows])

    def __str__(self) -> str:
        """Aligned columns.  Those that do not fit into WIDTH follow below, beside the names of the rows again."""
        columns = [(head, body) for head, *body in zip(*self.cells)]
        blocks, used = [], WIDTH
        for head, body in columns[1:]:
            column = _aligned(head, body, str.rjust)
            if used + 2 + len(column[-1]) > WIDTH:
                blocks.append([_aligned(*columns[0], str.ljust)])
                used = len(blocks[-1][0][-1])
            blocks[-1].append(column)
            used += 2 + len(column[-1])
        return "\n\n".join(_side_by_side(block) for block in blocks)


def _aligned(head: str, body: Sequence[str], justify: Callable[[str, int], str]) -> list[str]:
    """The lines of a column, all of one width; its head is wrapped to the width of its longest cell or word."""
    width = max(map(len, [*head.split(), *body]))
    return [justify(line, width) for line in [*textwrap.wrap(head, width), *body]]


def _side_by_side(block: list[list[str]]) -> str:
    """Columns of lines to text; heads of fewer lines end where the others end."""
    tall = max(map(len, block))
    full = [[" " * len(column[0])] * (tall - len(column)) + column for column in block]
    return "\n".join("  ".join(line).rstrip() for line in zip(*full))


# -------------------------------------------------------------------------------------------------------- the laws
@dataclass(frozen=True)
class Score:
    """The result for one kind of prompt."""

    kind: str
    pictures: int
    accuracy: float  # share that the inspector reads as the prompt asks, in [0, 1]
    reward: float  # mean learned reward, in [0, 1]
    unreadable: float  # share that the inspector cannot read, in [0, 1]
    by_law: dict[str, float]  # accuracy per law, or per task of an arrangement
    brightness: float  # mean pixel, in [-1, 1]
    edges: float  # mean absolute difference of neighbouring pixels
    diversity: float  # mean distance of two pictures of one law, root mean square over pixels

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the accuracy."""
        return wilson(self.accuracy, self.pictures)


@torch.no_grad()
def sample_and_score(
    pipe: LatentDiffusion,
    reward: Reward,
    texts: list[str],
    sampler: SamplerConfig,
    config: EvaluationConfig,
    *stream: str,
) -> tuple[Tensor, Tensor]:
    """A picture for each prompt and its reward, with fixed noise.  -> (n 3 h w) and (n), on the CPU"""
    images, rewards = [], []
    for part, noise in fixed_batches(texts, config, *stream, label=" ".join(stream)):
        x = pipe.generate(part, sampler.steps, sampler.guidance, sampler.eta, generator=noise())
        images.append(x.cpu())
        rewards.append(reward(x, part).cpu())
    return torch.cat(images), torch.cat(rewards)


def score(images: Tensor, prompts: list[Prompt], kind: str, rewards: Tensor) -> Score:
    """Shapes: images (n 3 64 64), n prompts, rewards (n)"""
    readings = inspect_all(images)
    right = torch.tensor([float(p.fulfilled_by(r)) for p, r in zip(prompts, readings)])
    group = [p.task.kind if p.task else p.law for p in prompts]
    rows = {n: torch.tensor([g == n for g in group]) for n in dict.fromkeys([*LAWS, *group]) if n in group}
    distances = [torch.pdist(images[r].flatten(1)).mean().item() for r in rows.values() if r.sum() > 1]
    brightness, edges = off_reward(images)
    return Score(
        kind=kind,
        pictures=len(prompts),
        accuracy=right.mean().item(),
        reward=rewards.mean().item(),
        unreadable=sum(not r.readable for r in readings) / len(readings),
        by_law={name: right[r].mean().item() for name, r in rows.items()},
        brightness=brightness,
        edges=edges,
        diversity=sum(d / images[0].numel() ** 0.5 for d in distances) / max(1, len(distances)),
    )


def off_reward(images: Tensor) -> tuple[float, float]:
    """What no reward asks for, and what changes when one is fooled: brightness and edges, as in `Score`."""
    edges = F.l1_loss(images[..., 1:], images[..., :-1]) + F.l1_loss(images[..., 1:, :], images[..., :-1, :])
    return images.mean().item(), edges.item() / 2


def evaluate(
    pipe: LatentDiffusion,
    reward: Reward,
    sampler: SamplerConfig,
    config: EvaluationConfig,
    kinds: tuple[str, ...] = ("physical", "unconventional"),
) -> dict[str, Score]:
    """Sample and score `config.pictures` pictures of each kind of prompt."""
    scores = {}
    for kind in kinds:
        prompts = draw_prompts(kind, config.split, config.pictures, choices(config.seed, "evaluate", kind))
        images, rewards = sample_and_score(pipe, reward, [p.text for p in prompts], sampler, config, kind)
        scores[kind] = score(images, prompts, kind, rewards)
    return scores


def law_table(models: dict[str, dict[str, Score]]) -> Table:
    """A column for each model; for each kind of prompt accuracy with its interval, law by law, and the reward."""
    rows: list[list[str | float]] = []
    for kind in next(iter(models.values())):
        scores = [model[kind] for model in models.values()]
        shares = ["{:.3f} [{:.2f}, {:.2f}]".format(s.accuracy, *s.interval) for s in scores]
        rows.append([f"{kind}: right by the inspector", *shares])
        rows += [[f"{kind}, {law}", *(f"{s.by_law[law]:.2f}" for s in scores)] for law in scores[0].by_law]
        rows.append([f"{kind}: learned reward", *(s.reward for s in scores)])
        rows.append([f"{kind}: unreadable", *(s.unreadable for s in scores)])
        rows.append([f"{kind}: diversity within a law", *(s.diversity for s in scores)])
    return Table(["held-out prompts", *models], rows)
