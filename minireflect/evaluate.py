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

from .methods.rlrig import Loop
from .pipeline import LatentDiffusion, SamplerConfig
from .rl.checker import Answers, Checker
from .rl.rewards import Reward
from .streams import choices, rng
from .world.graphs import MAX_REQUIREMENTS, Requirement, SceneGraph
from .world.inspector import inspect_all
from .world.laws import LAWS
from .world.layout import sample_graph
from .world.prompts import Prompt, draw_prompts
from .world.scenes import Object


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
    group = [p.group for p in prompts]
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


# --------------------------------------------------------------------------------------------------- scene graphs (RL-RIG)
Triple = tuple[str, str, str]


def iou(target: set, seen: set) -> float:
    """|target and seen| / |target or seen|, and 0 if both are empty (LAION-SG, Li et al. 2024, arXiv 2412.08580)."""
    return len(target & seen) / len(target | seen) if target | seen else 0.0


def seen_entities(things: tuple[Object, ...]) -> set[str]:
    """What is there, by colour and name; how many of a kind plays no part."""
    return {f"{t.color} {t.name}" for t in things}


def seen_triples(things: tuple[Object, ...], graph: SceneGraph) -> set[Triple]:
    """What is read about the pairs that the graph relates, in its own words: LAION-SG's reader answers from the graph's lists.

    Of each pair one triple: the graph's, if it holds; else the first of the graph's predicates that does, if any.
    """
    predicates = list(dict.fromkeys(p for _, p, _ in graph.relations))
    seen = set()
    for s, asked, o in graph.relations:
        a, b = graph.entities[s], graph.entities[o]
        for p in (asked, *predicates):
            if Requirement(a, p, b).met_by(things):
                seen.add((a.label, p, b.label))
                break
    return seen


@dataclass(frozen=True)
class GraphScore:
    """How well pictures show their graphs: means over the pictures, read by the inspector unless said otherwise."""

    pictures: int
    sg_iou: float  # of (subject, predicate, object) triples
    entity_iou: float  # of the things by colour and name
    relation_iou: float  # of the predicates
    met: float  # share of the requirements that are met
    right: float  # share of the pictures that meet all of theirs
    unreadable: float  # share of the pictures
    checker: float  # share of the requirements that the Checker calls met
    checker_right: float  # share of the pictures that the Checker accepts
    judge: float  # the same two by the held-out judge
    judge_right: float
    fooled: float  # of the pictures that the Checker accepts, the share that is not right
    judge_fooled: float
    repaired: float  # of the pictures that were wrong in round 0, the share that is right in the end
    damaged: float  # of those that were right, the share that is wrong in the end
    evaluations: float  # of the UNet, per picture
    calls: float  # of the Checker, per picture


def graph_score(
    first: Tensor,
    images: Tensor,
    graphs: list[SceneGraph],
    answers: Answers,
    judge: Checker,
    cost: tuple[float, float],
) -> GraphScore:
    """Shapes: first (n 3 64 64) of round 0, images (n 3 64 64) at the end; `answers` are the Checker's about the latter"""
    things, before = ([r.scene.objects if r.scene else () for r in inspect_all(x)] for x in (images, first))
    right, was = (np.array([g.fulfilled_by(t) for g, t in zip(graphs, read)]) for read in (things, before))
    triples = [(set(g.triples), seen_triples(t, g)) for g, t in zip(graphs, things)]
    names = [({f"{e.color} {e.name}" for e in g.entities}, seen_entities(t)) for g, t in zip(graphs, things)]
    judged = judge(images, graphs)
    accepted, liked = (a.met.all(1).cpu().numpy() for a in (answers, judged))

    def share(of: np.ndarray, among: np.ndarray) -> float:
        return float(of[among].mean()) if among.any() else 0.0

    return GraphScore(
        len(graphs),
        float(np.mean([iou(a, b) for a, b in triples])),
        float(np.mean([iou(a, b) for a, b in names])),
        float(np.mean([iou({p for _, p, _ in a}, {p for _, p, _ in b}) for a, b in triples])),
        float(np.mean([np.mean([r.met_by(t) for r in g.requirements]) for g, t in zip(graphs, things)])),
        float(right.mean()), sum(not t for t in things) / len(things),
        answers.share.mean().item(), float(accepted.mean()), judged.share.mean().item(), float(liked.mean()),
        share(~right, accepted), share(~right, liked), share(right, ~was), share(~right, was), *cost,
    )  # fmt: skip


def evaluation_graphs(config: EvaluationConfig) -> list[SceneGraph]:
    """The graphs that every row of a table is measured on."""
    chance = choices(config.seed, "evaluate", "graphs")
    return [sample_graph(chance, config.split) for _ in range(config.pictures)]


def evaluate_loop(loop: Loop, judge: Checker, config: EvaluationConfig, name: str) -> GraphScore:
    """Run a loop on fixed graphs with fixed noise; round 0 of every loop that starts with the same Diffuser is the same."""
    graphs, ends, starts, answers, cost = evaluation_graphs(config), [], [], [], []
    for i in tqdm(range(0, len(graphs), config.batch), f"measuring {name}", unit="batch", leave=False):
        looks = list(loop(graphs[i : i + config.batch], rng(config.seed, "evaluate", "loop", i)))
        starts.append(looks[0].images.cpu()), ends.append(looks[-1].images.cpu())
        said = looks[-1].answers
        answers.append(
            [
                F.pad(v.cpu(), (0, MAX_REQUIREMENTS - v.shape[1]), value=fill)
                for v, fill in zip(said, (1.0, False))
            ]
        )
        cost.append(torch.stack([looks[-1].evaluations, looks[-1].calls], 1).double())
    spent = torch.cat(cost).mean(0).tolist()
    said = Answers(*(torch.cat(parts) for parts in zip(*answers)))
    return graph_score(torch.cat(starts), torch.cat(ends), graphs, said, judge, tuple(spent))


GRAPH_ROWS = {  # field of GraphScore: its name in a table
    "sg_iou": "SG-IoU",
    "entity_iou": "Entity-IoU",
    "relation_iou": "Relation-IoU",
    "met": "requirements met",
    "right": "pictures fully right",
    "checker": "requirements met, says the Checker",
    "judge": "requirements met, says the held-out judge",
    "judge_right": "pictures right, says the judge",
    "fooled": "Checker fooled",
    "repaired": "repaired",
    "damaged": "damaged",
    "evaluations": "UNet evaluations",
    "calls": "Checker calls",
}


def graph_table(rows: dict[str, GraphScore]) -> str:
    """A Markdown table: a loop a row."""
    lines = [
        "| held-out graphs | " + " | ".join(GRAPH_ROWS.values()) + " |",
        "|---|" + "---|" * len(GRAPH_ROWS),
    ]
    for name, score in rows.items():
        values = [getattr(score, key) for key in GRAPH_ROWS]
        cells = [f"{v:.1f}" if v > 1 else f"{v:.3f}" for v in values]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
