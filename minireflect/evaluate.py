"""Evaluate a generator on fixed test prompts with fixed noise, by the inspector and by the learned reward.

This file has the parts that all evaluations share, and the evaluation of SRRL. evaluate_graphs.py evaluates
RL-RIG, evaluate_reason.py ReasonGen-R1. Tables show each law separately, because a mean can hide a law at
zero, and show the inspector's verdict beside the reward, because a learned reward can be fooled.
"""

from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import stdtrit
from torch import Tensor
from tqdm import tqdm
from tyro.conf import Suppress

from .pipeline import LatentDiffusion, SamplerConfig, scored
from .ranges import Checked, Count, Refusal, expect
from .rl.rewards import Reward
from .run import ByKind
from .streams import choices, rng
from .world.inspector import inspect_all
from .world.laws import LAWS
from .world.prompts import Prompt, draw_prompts

WIDTH = 110  # columns of a terminal
Z = 1.959964  # 95 % of a normal distribution lie within Z standard deviations
Score = dict[str, Any]  # results by name: numbers, or numbers by law; JSON values


@dataclass(frozen=True)
class EvaluationConfig(Checked):
    """The prompts and pictures of an evaluation."""

    # pictures per kind of prompt, in equal shares for all laws or tasks
    pictures: Count = 256
    # split of the combinations of objects: test for results, validation for choices, train for comparison
    split: Annotated[Literal["train", "validation", "test"], Suppress] = "test"
    # seed of prompts and noise, the same for all compared models
    seed: int = 1_000
    # pictures sampled at once; another batch size gives other noise
    batch: Annotated[Count, Suppress] = 64


def fixed_batches(items: Sequence, config: EvaluationConfig, label: str, *stream: str) -> Iterator[tuple]:
    """Yield batches of items, each with a function that returns the generator of the batch's noise.

    If a batch is sampled several times, the function takes the index of the sample: noise(k).
    """
    for i in tqdm(range(0, len(items), config.batch), f"measuring {label}", unit="batch", leave=False):
        yield items[i : i + config.batch], partial(rng, config.seed, "evaluate", *stream, i)


@dataclass(frozen=True)
class Table:
    """A table with named rows and columns: `print(table)` for a terminal, `table.markdown` for a page.

    Numbers below 10 are shown with three decimals, larger ones with one; text is shown unchanged.
    """

    title: str  # heading of the column of row names
    rows: Mapping[str, Mapping[str, str | float]]  # row -> column -> cell; the columns are those of the first

    @property
    def cells(self) -> list[list[str]]:
        """Header and rows as text."""
        head = list(next(iter(self.rows.values()), {}))
        text = [[_shown(row.get(c), f"{c} of {name}") for c in head] for name, row in self.rows.items()]
        return [[self.title, *head], *([name, *row] for name, row in zip(self.rows, text))]

    @property
    def markdown(self) -> str:
        """The table as Markdown."""
        head, *rows = ("| " + " | ".join(row) + " |" for row in self.cells)
        return "\n".join([head, "|---" * len(self.cells[0]) + "|", *rows])

    def __str__(self) -> str:
        """Aligned columns; columns that do not fit into WIDTH follow below, with the row names repeated."""
        names, *columns = zip(*self.cells)
        names = [name.ljust(max(map(len, names))) for name in names]
        blocks = [names]
        for column in columns:
            column = [cell.rjust(max(map(len, column))) for cell in column]
            if blocks[-1] is not names and len(blocks[-1][0]) + len(column[0]) + 2 > WIDTH:
                blocks.append(names)
            blocks[-1] = ["  ".join(pair) for pair in zip(blocks[-1], column)]
        return "\n\n".join("\n".join(block) for block in blocks)


def _shown(cell: object, where: str) -> str:
    cell = expect(cell, str | float, where)
    return cell if isinstance(cell, str) else f"{cell:.3f}" if abs(cell) < 10 else f"{cell:,.1f}"


def interval(right: Tensor, prompts: Sequence[Hashable]) -> tuple[float, float]:
    """The 95 % interval of the share of right pictures, if pictures of the same prompt are correlated.

    Wilson's interval with an effective number of pictures: the number of independent pictures whose share
    would have the variance that is estimated over prompts (Korn and Graubard 1998), corrected by Student's t
    for the number of prompts. If all pictures are right, or all wrong, each prompt counts as one picture.
    Shapes: right (n) of 0 and 1, n prompts -> both ends, in [0, 1]
    """
    share, n, sums = right.mean().item(), len(right), defaultdict(float)
    for ok, prompt in zip(right.tolist(), prompts):
        sums[prompt] += ok - share
    groups, spread = len(sums), sum(s**2 for s in sums.values())
    if groups == 1 or share in (0, 1):
        return wilson(share, groups)
    variance = max(spread * groups / (groups - 1) / n**2, share * (1 - share) / n)
    return wilson(share, share * (1 - share) / variance * (Z / stdtrit(groups - 1, 0.975)) ** 2)


def wilson(share: float, n: float) -> tuple[float, float]:
    """The 95 % interval of a share of n independent pictures (Wilson 1927), always within [0, 1]."""
    middle, half = share + Z**2 / (2 * n), Z * (share * (1 - share) / n + (Z / (2 * n)) ** 2) ** 0.5
    return (middle - half) / (1 + Z**2 / n), (middle + half) / (1 + Z**2 / n)


@torch.no_grad()
def sample_and_score(
    pipe: LatentDiffusion, reward: Reward, texts: list[str], sampler: SamplerConfig, config: EvaluationConfig,
    *stream: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Sample a picture for each prompt with fixed noise, and score it.  -> (n 3 h w) and (n), on the CPU"""
    images, rewards = [], []
    for part, noise in fixed_batches(texts, config, " ".join(stream), *stream):
        x = pipe.generate(part, sampler.steps, sampler.guidance, sampler.eta, generator=noise())
        images.append(x.cpu())
        rewards.append(scored(reward, x, part))
    return torch.cat(images), torch.cat(rewards)


def score(images: Tensor, prompts: list[Prompt], rewards: Tensor) -> Score:
    """The scores of pictures of one kind of prompts.  Shapes: images (n 3 64 64), n prompts, rewards (n)"""
    readings = inspect_all(images)
    right = torch.tensor([float(p.fulfilled_by(r)) for p, r in zip(prompts, readings)])
    group, texts = [p.group for p in prompts], np.array([p.text for p in prompts])
    rows = {n: torch.tensor([g == n for g in group]) for n in dict.fromkeys([*LAWS, *group]) if n in group}
    apart = [torch.pdist(images[r].flatten(1)).mean().item() for r in rows.values() if r.sum() > 1]
    return {
        "kind": prompts[0].kind,
        "pictures": len(prompts),
        "accuracy": right.mean().item(),  # share of pictures that show what the prompt asks for
        "interval": interval(right, texts.tolist()),  # 95 % interval of the accuracy
        "reward": rewards.mean().item(),  # learned, in [0, 1]
        "unreadable": sum(not r.readable for r in readings) / len(readings),  # share of the pictures
        "by_law": {name: right[r].mean().item() for name, r in rows.items()},  # accuracy by law, or by task
        "intervals": {name: interval(right[r], texts[r.numpy()].tolist()) for name, r in rows.items()},
        # mean distance between two pictures of the same law, root mean square over pixels
        "diversity": sum(d / images[0].numel() ** 0.5 for d in apart) / max(1, len(apart)),
        **off_reward(images),
    }


def off_reward(images: Tensor) -> Score:
    """Mean pixel value in [-1, 1], and mean absolute difference of neighbouring pixels.

    No reward measures these statistics. They change when a reward is exploited.  Shapes: images (n 3 h w)
    """
    edges = F.l1_loss(images[..., 1:], images[..., :-1]) + F.l1_loss(images[..., 1:, :], images[..., :-1, :])
    return {"brightness": images.mean().item(), "edges": edges.item() / 2}


def evaluate_rewards(
    pipe: LatentDiffusion, reward: Reward, texts: list[str], sampler: SamplerConfig, config: EvaluationConfig
) -> tuple[Tensor, Score]:
    """Evaluate a published checkpoint, whose pictures the inspector cannot read.

    -> pictures (n 3 h w), and the scores: mean reward, its standard error, and `off_reward`
    """
    images, rewards = sample_and_score(pipe, reward, texts, sampler, config)
    error = (rewards.std() / len(rewards) ** 0.5).item() if len(rewards) > 1 else 0.0
    return images, {"reward": rewards.mean().item(), "reward_se": error, **off_reward(images)}


def evaluate(
    pipe: LatentDiffusion, reward: Reward, sampler: SamplerConfig, config: EvaluationConfig,
    kinds: tuple[str, ...] = ("physical", "unconventional"),
) -> dict[str, Score]:  # fmt: skip
    """Sample and score `config.pictures` pictures of each kind of prompts.  -> scores by kind"""
    scores = {}
    for kind in kinds:
        prompts = draw_prompts(kind, config.split, config.pictures, choices(config.seed, "evaluate", kind))
        images, rewards = sample_and_score(pipe, reward, [p.text for p in prompts], sampler, config, kind)
        scores[kind] = score(images, prompts, rewards)
    return scores


def law_table(models: dict[str, dict[str, Score]]) -> Table:
    """A table with a column per model. Rows for each kind of prompts: accuracy with its interval, accuracy
    of each law, learned reward, share of unreadable pictures, diversity.
    """
    rows: dict[str, dict[str, str | float]] = {}
    for name, scores in models.items():
        for kind, s in scores.items():
            if missing := sorted(ByKind.__annotations__.keys() - s.keys()):
                raise Refusal(f"the score of {name}, {kind}, has no {', '.join(missing)}")
            right = "{:.3f} [{:.2f}, {:.2f}]".format(s["accuracy"], *s["interval"])
            cells = {f"{kind}: right by the inspector": right}
            cells |= {f"{kind}, {law}": f"{share:.2f}" for law, share in s["by_law"].items()}
            cells |= {f"{kind}: learned reward": s["reward"], f"{kind}: unreadable": s["unreadable"]}
            cells |= {f"{kind}: diversity within a law": s["diversity"]}
            for row, cell in cells.items():
                rows.setdefault(row, {})[name] = cell
    return Table("test prompts", rows)


def law_bars(models: dict[str, Score]) -> dict[str, Score]:
    """Data for `figures.bars`: accuracy and interval of each law; one plot per kind, one group per model.

    Scores of other evaluations, which are not by law, are left out.
    """
    plots: dict[str, Score] = {}
    for name, scores in models.items():
        for kind, s in scores.items():
            if isinstance(s, dict) and {"accuracy", "by_law"} <= s.keys():
                ends = s.get("intervals", {})
                shares = {law: (share, *ends.get(law, (share, share))) for law, share in s["by_law"].items()}
                plots.setdefault(f"{kind}, test prompts", {})[f"{name}: {s['accuracy']:.2f}"] = shares
    return plots
