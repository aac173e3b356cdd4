"""How good a generator is: fixed held-out prompts, fixed noise, the inspector's verdict, and the learned
reward beside it.

What all measurements share, and that of the laws; evaluate_graphs.py measures loops, evaluate_reason.py
rationales. Tables show truth and reward law by law: an average can hide a law at zero, and a learned reward
can be fooled.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from tqdm import tqdm
from tyro.conf import Suppress

from .pipeline import LatentDiffusion, SamplerConfig
from .rl.rewards import Reward
from .streams import choices, rng
from .world.inspector import inspect_all
from .world.laws import LAWS
from .world.prompts import Prompt, draw_prompts

WIDTH = 110  # columns of a terminal
Z = 1.959964  # standard deviations of a normal distribution to either side that hold 95 % of it


@dataclass(frozen=True)
class EvaluationConfig:
    # pictures of each kind of prompt, the laws or tasks in equal shares
    pictures: int = 256
    # combinations of objects: held-out ones, which no training sees, or train
    split: Annotated[str, Suppress] = "held-out"
    # of prompts and noise, the same for every model that is compared
    seed: int = 1_000
    # pictures sampled at once; another number gives other noise
    batch: Annotated[int, Suppress] = 64

    def __post_init__(self) -> None:
        if self.pictures < 1 or self.batch < 1:
            raise ValueError(f"pictures and batch must be at least 1, got {self.pictures} and {self.batch}")


def fixed_batches(
    items: Sequence, config: EvaluationConfig, *stream: str, label: str = ""
) -> Iterator[tuple[Sequence, Callable[..., Generator]]]:
    """`config.batch` items at a time, each time with a function that makes the noise of this batch.

    Where a batch is sampled several times, the function takes the number of the sample: noise(k).
    """
    for i in tqdm(range(0, len(items), config.batch), f"measuring {label}", unit="batch", leave=False):
        yield items[i : i + config.batch], partial(rng, config.seed, "evaluate", *stream, i)


@dataclass(frozen=True)
class Table:
    """Named rows of named numbers: `print(table)` for a terminal, `table.markdown` for a page.

    Numbers are shown with three decimals, from 10 on with one; text is shown as it is.
    """

    title: str  # what the rows are
    rows: Mapping[
        str, Mapping[str, str | float]
    ]  # row -> column -> cell; all rows have the columns of the first

    @property
    def cells(self) -> list[list[str]]:
        """Head and rows as text."""
        head = list(next(iter(self.rows.values()), {}))
        text = [[_shown(row[column]) for column in head] for row in self.rows.values()]
        return [[self.title, *head], *([name, *row] for name, row in zip(self.rows, text))]

    @property
    def markdown(self) -> str:
        head, *rows = ("| " + " | ".join(row) + " |" for row in self.cells)
        return "\n".join([head, "|---" * len(self.cells[0]) + "|", *rows])

    def __str__(self) -> str:
        """Aligned columns; those that do not fit into WIDTH follow below, with the names again."""
        names, *columns = zip(*self.cells)
        names = [name.ljust(max(map(len, names))) for name in names]
        blocks = [names]
        for column in columns:
            column = [cell.rjust(max(map(len, column))) for cell in column]
            if blocks[-1] is not names and len(blocks[-1][0]) + len(column[0]) + 2 > WIDTH:
                blocks.append(names)
            blocks[-1] = ["  ".join(pair) for pair in zip(blocks[-1], column)]
        return "\n\n".join("\n".join(block) for block in blocks)


def _shown(cell: str | float) -> str:
    return cell if isinstance(cell, str) else f"{cell:.3f}" if abs(cell) < 10 else f"{cell:,.1f}"


def over_seeds(values: Sequence[float]) -> str:
    """Mean ± half of the 95 % interval (Student's t) of what several seeds gave; one seed has no interval."""
    from scipy.special import stdtrit

    x = np.asarray(values, float)
    if len(x) < 2:
        return f"{x.mean():.3f}"
    return f"{x.mean():.3f} ± {stdtrit(len(x) - 1, 0.975) * x.std(ddof=1) / len(x) ** 0.5:.3f}"


def wilson(share: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a share of n pictures (Wilson 1927); unlike share ± Z std it stays in [0, 1]."""
    middle, half = share + Z**2 / (2 * n), Z * (share * (1 - share) / n + (Z / (2 * n)) ** 2) ** 0.5
    return (middle - half) / (1 + Z**2 / n), (middle + half) / (1 + Z**2 / n)


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


@torch.no_grad()
def sample_and_score(
    pipe: LatentDiffusion, reward: Reward, texts: list[str], sampler: SamplerConfig, config: EvaluationConfig,
    *stream: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
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
    group = [p.group for p in prompts]
    rows = {n: torch.tensor([g == n for g in group]) for n in dict.fromkeys([*LAWS, *group]) if n in group}
    apart = [torch.pdist(images[r].flatten(1)).mean().item() for r in rows.values() if r.sum() > 1]
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
        diversity=sum(d / images[0].numel() ** 0.5 for d in apart) / max(1, len(apart)),
    )


def off_reward(images: Tensor) -> tuple[float, float]:
    """Brightness and edges, as in `Score`: no reward asks for them, and they change when one is fooled."""
    edges = F.l1_loss(images[..., 1:], images[..., :-1]) + F.l1_loss(images[..., 1:, :], images[..., :-1, :])
    return images.mean().item(), edges.item() / 2


@dataclass(frozen=True)
class RewardScore:
    """Pictures of a published checkpoint, which no inspector can read."""

    reward: float  # mean
    reward_se: float  # its standard error
    brightness: float
    edges: float


def reward_score(images: Tensor, rewards: Tensor) -> RewardScore:
    """Shapes: images (n 3 h w), rewards (n)"""
    error = (rewards.std() / len(rewards) ** 0.5).item() if len(rewards) > 1 else 0.0
    return RewardScore(rewards.mean().item(), error, *off_reward(images))


def evaluate(
    pipe: LatentDiffusion, reward: Reward, sampler: SamplerConfig, config: EvaluationConfig,
    kinds: tuple[str, ...] = ("physical", "unconventional"),
) -> dict[str, Score]:  # fmt: skip
    """Sample and score `config.pictures` pictures of each kind of prompt."""
    scores = {}
    for kind in kinds:
        prompts = draw_prompts(kind, config.split, config.pictures, choices(config.seed, "evaluate", kind))
        images, rewards = sample_and_score(pipe, reward, [p.text for p in prompts], sampler, config, kind)
        scores[kind] = score(images, prompts, kind, rewards)
    return scores


def law_table(models: dict[str, dict[str, Score]]) -> Table:
    """A column for each model; for each kind of prompt the accuracy with its interval, law by law, and the
    reward.
    """
    rows: dict[str, dict[str, str | float]] = {}
    for kind, first in next(iter(models.values())).items():
        scores = {name: model[kind] for name, model in models.items()}
        rows[f"{kind}: right by the inspector"] = {
            n: "{:.3f} [{:.2f}, {:.2f}]".format(s.accuracy, *wilson(s.accuracy, s.pictures))
            for n, s in scores.items()
        }
        for law in first.by_law:
            rows[f"{kind}, {law}"] = {n: f"{s.by_law[law]:.2f}" for n, s in scores.items()}
        for name, key in (
            ("learned reward", "reward"),
            ("unreadable", "unreadable"),
            ("diversity within a law", "diversity"),
        ):
            rows[f"{kind}: {name}"] = {n: getattr(s, key) for n, s in scores.items()}
    return Table("held-out prompts", rows)
