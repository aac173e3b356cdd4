"""How well a loop shows scene graphs (RL-RIG): scene-graph IoU by the inspector, what learned models say of
it, what it costs.

    SG-IoU = |asked and seen| / |asked or seen|       of triples (subject, predicate, object)

LAION-SG, Li et al. 2024, arXiv 2412.08580.  The Checker is what the loop listens to; no loop sees the judge.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Generator, Tensor

from .evaluate import EvaluationConfig, fixed_batches
from .rl.checker import Answers, Checker
from .streams import choices
from .world.graphs import Requirement, SceneGraph, sample_graph
from .world.inspector import inspect_all
from .world.scenes import Object

Triple = tuple[str, str, str]


class Look(Protocol):
    """What a loop shows after each round, of b graphs."""

    images: Tensor  # (b 3 64 64) the best so far
    answers: Answers  # of the Checker about them
    evaluations: Tensor  # (b) of the UNet so far
    calls: Tensor  # (b) of the Checker so far


Loop = Callable[[list[SceneGraph], Generator], Iterable[Look]]


def iou(asked: set, seen: set) -> float:
    """|asked and seen| / |asked or seen|, and 0 if both are empty."""
    return len(asked & seen) / len(asked | seen) if asked | seen else 0.0


def seen_entities(things: tuple[Object, ...]) -> set[str]:
    """What is there, by colour and name; how many of a kind plays no part."""
    return {f"{t.color} {t.name}" for t in things}


def seen_triples(things: tuple[Object, ...], graph: SceneGraph) -> set[Triple]:
    """What holds between the pairs that the graph relates, in the graph's own predicates, as LAION-SG's
    reader answers.

    Of each pair one triple: the graph's, if it holds; else the first of the graph's predicates that does, if
    any.
    """
    predicates, seen = list(dict.fromkeys(p for _, p, _ in graph.relations)), set()
    for s, asked, o in graph.relations:
        a, b = graph.entities[s], graph.entities[o]
        true = [p for p in (asked, *predicates) if Requirement(a, p, b).met_by(things)]
        seen |= {(a.label, p, b.label) for p in true[:1]}
    return seen


@dataclass(frozen=True)
class GraphScore:
    """Means over the pictures, read by the inspector unless said otherwise."""

    pictures: int
    sg_iou: float  # of triples
    entity_iou: float  # of the things by colour and name
    relation_iou: float  # of the predicates
    met: float  # share of the requirements that are met
    right: float  # share of the pictures that meet all of theirs
    unreadable: float  # share of the pictures
    checker: float  # share of the requirements that the Checker calls met
    checker_right: float  # share of the pictures that the Checker accepts
    judge: float  # the same two by the judge
    judge_right: float
    fooled: float  # of the pictures that the Checker accepts, the share that is not right
    judge_fooled: float
    repaired: float  # of the pictures that are wrong in round 0, the share that is right at the end
    damaged: float  # of those that are right in round 0, the share that is wrong at the end
    evaluations: float  # of the UNet, per picture
    calls: float  # of the Checker, per picture


def evaluation_graphs(config: EvaluationConfig) -> list[SceneGraph]:
    """The graphs that every row of a table is measured on."""
    chance = choices(config.seed, "evaluate", "graphs")
    return [sample_graph(chance, config.split) for _ in range(config.pictures)]


def evaluate_loop(loop: Loop, judge: Checker, config: EvaluationConfig, name: str) -> GraphScore:
    """Run a loop on fixed graphs with fixed noise: loops with the same Diffuser share their round 0."""
    graphs, first, last, told = evaluation_graphs(config), [], [], []
    for part, noise in fixed_batches(graphs, config, "loop", label=name):
        looks = list(loop(part, noise()))
        end = looks[-1]
        first.append(looks[0].images.cpu())
        last.append(end.images.cpu())
        columns = end.answers.share, end.answers.met.all(1), end.evaluations, end.calls
        told.append(torch.stack([column.cpu().double() for column in columns], 1))  # (b 4)
    images = torch.cat(last)
    return graph_score(torch.cat(first), images, graphs, torch.cat(told), judge(images, graphs))


def graph_score(
    first: Tensor, images: Tensor, graphs: list[SceneGraph], told: Tensor, judged: Answers
) -> GraphScore:
    """From the pictures of round 0 and at the end, and what the loop and the judge say about the latter.

    Columns of `told`: share of requirements that the Checker calls met, acceptance, UNet evaluations, Checker
    calls.
    Shapes: first (n 3 64 64), images (n 3 64 64), n graphs, told (n 4)
    """
    before, things = ([r.scene.objects if r.scene else () for r in inspect_all(x)] for x in (first, images))
    was, right = (np.array([g.fulfilled_by(t) for g, t in zip(graphs, read)]) for read in (before, things))
    triples = [(set(g.triples), seen_triples(t, g)) for g, t in zip(graphs, things)]
    entities = [
        ({f"{e.color} {e.name}" for e in g.entities}, seen_entities(t)) for g, t in zip(graphs, things)
    ]
    predicates = [({p for _, p, _ in a}, {p for _, p, _ in b}) for a, b in triples]
    met = [np.mean([r.met_by(t) for r in g.requirements]) for g, t in zip(graphs, things)]
    accepted, liked = told[:, 1].bool().numpy(), judged.met.all(1).cpu().numpy()

    def share(of: np.ndarray, among: np.ndarray) -> float:
        return float(of[among].mean()) if among.any() else 0.0

    return GraphScore(
        len(graphs),
        *(float(np.mean([iou(a, b) for a, b in pairs])) for pairs in (triples, entities, predicates)),
        met=float(np.mean(met)),
        right=float(right.mean()),
        unreadable=sum(not t for t in things) / len(things),
        checker=told[:, 0].float().mean().item(),
        checker_right=float(accepted.mean()),
        judge=judged.share.mean().item(),
        judge_right=float(liked.mean()),
        fooled=share(~right, accepted),
        judge_fooled=share(~right, liked),
        repaired=share(right, ~was),
        damaged=share(~right, was),
        evaluations=told[:, 2].mean().item(),
        calls=told[:, 3].mean().item(),
    )
