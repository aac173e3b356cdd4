"""How good a generator is: fixed held-out prompts, fixed noise, the exact checker, and the learned reward beside it.

Every table prints both, law by law: a law at zero must not hide in an average, and a reward alone proves nothing.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import binomtest
from scipy.stats import t as student
from torch import Tensor
from tqdm import tqdm

from .pipeline import LatentDiffusion, SamplerConfig
from .rl.rewards import Reward
from .streams import choices, rng
from .world.inspector import inspect_all
from .world.laws import LAWS
from .world.prompts import Prompt, draw_prompts


@dataclass(frozen=True)
class EvaluationConfig:
    pictures: int = 256  # per kind of prompt, the laws in equal shares
    split: str = "held-out"  # "held-out" or "train" combinations of objects
    seed: int = 1_000  # of prompts and noise; the same for every model that is compared
    batch: int = 64  # pictures drawn at once

    def __post_init__(self) -> None:
        if self.pictures < 1 or self.batch < 1:
            raise ValueError(f"pictures and batch must be at least 1, got {self.pictures} and {self.batch}")


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
        """The 95 % interval of the accuracy (Wilson)."""
        found = binomtest(round(self.accuracy * self.pictures), self.pictures).proportion_ci(method="wilson")
        return found.low, found.high


@torch.no_grad()
def draw_all(
    pipe: LatentDiffusion, prompts: list[Prompt], sampler: SamplerConfig, config: EvaluationConfig, name: str
) -> Tensor:
    """A picture for each prompt, in fixed batches with fixed noise.  -> (n 3 h w) on the CPU"""
    images = []
    for i in tqdm(range(0, len(prompts), config.batch), f"drawing {name}", unit="batch", leave=False):
        texts = [p.text for p in prompts[i : i + config.batch]]
        noise = rng(config.seed, "evaluate", name, i)
        images.append(
            pipe.generate(texts, sampler.steps, sampler.guidance, sampler.eta, generator=noise).cpu()
        )
    return torch.cat(images)


def score(images: Tensor, prompts: list[Prompt], kind: str, rewards: Tensor) -> Score:
    """Shapes: images (n 3 64 64), n prompts, rewards (n)"""
    readings = inspect_all(images)
    right = torch.tensor([float(p.fulfilled_by(r)) for p, r in zip(prompts, readings)])
    group = [p.task.kind if p.task else p.law for p in prompts]
    names = [n for n in (*LAWS, *dict.fromkeys(group)) if n in group]
    rows = {n: torch.tensor([g == n for g in group]) for n in dict.fromkeys(names)}
    spread = [
        torch.pdist(images[r].flatten(1)).mean().item() / images[0].numel() ** 0.5
        for r in rows.values()
        if r.sum() > 1
    ]
    return Score(
        kind, len(prompts), right.mean().item(), rewards.mean().item(),
        sum(not r.readable for r in readings) / len(readings),
        {n: right[r].mean().item() for n, r in rows.items()},
        *off_reward(images), sum(spread) / max(1, len(spread)),
    )  # fmt: skip


def off_reward(images: Tensor) -> tuple[float, float]:
    """Mean pixel, in [-1, 1], and mean absolute difference of neighbouring pixels: what changes when a reward is fooled."""
    edges = F.l1_loss(images[..., 1:], images[..., :-1]) + F.l1_loss(images[..., 1:, :], images[..., :-1, :])
    return images.mean().item(), edges.item() / 2


def evaluate(
    pipe: LatentDiffusion,
    reward: Reward,
    sampler: SamplerConfig,
    config: EvaluationConfig,
    kinds: tuple[str, ...] = ("physical", "unconventional"),
) -> dict[str, Score]:
    """Draw and judge `config.pictures` pictures of each kind of prompt."""
    scores = {}
    for kind in kinds:
        prompts = draw_prompts(kind, config.split, config.pictures, choices(config.seed, "evaluate", kind))
        images = draw_all(pipe, prompts, sampler, config, kind)
        texts = [p.text for p in prompts]
        parts = [
            reward(x.to(pipe.device), texts[i * 64 : i * 64 + 64]).cpu()
            for i, x in enumerate(images.split(64))
        ]
        scores[kind] = score(images, prompts, kind, torch.cat(parts))
    return scores


def over_seeds(values: list[float]) -> str:
    """Mean and 95 % interval (Student's t) of what the seeds gave; one seed has no interval."""
    x = np.array(values)
    if len(x) < 2:
        return f"{x.mean():.3f}"
    half = student.ppf(0.975, len(x) - 1) * x.std(ddof=1) / len(x) ** 0.5
    return f"{x.mean():.3f} ± {half:.3f}"


def table(columns: dict[str, dict[str, Score]]) -> str:
    """A Markdown table: for each kind of prompt and each law, accuracy and reward of every model."""
    names = list(columns)
    lines = ["| held-out prompts | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]

    def row(label: str, cells: list[str]) -> None:
        lines.append(f"| {label} | " + " | ".join(cells) + " |")

    for kind in columns[names[0]]:
        scores = [columns[n][kind] for n in names]
        row(
            f"**{kind}**: accuracy by the inspector",
            ["**{:.3f}** [{:.2f}, {:.2f}]".format(s.accuracy, *s.interval) for s in scores],
        )
        for law in scores[0].by_law:
            row(f"{kind}, {law}", [f"{s.by_law[law]:.2f}" for s in scores])
        row(f"{kind}: learned reward", [f"{s.reward:.3f}" for s in scores])
        row(f"{kind}: unreadable", [f"{s.unreadable:.3f}" for s in scores])
        row(f"{kind}: diversity within a law", [f"{s.diversity:.3f}" for s in scores])
    return "\n".join(lines)
