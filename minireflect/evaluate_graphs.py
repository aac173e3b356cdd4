"""Measure a loop of RL-RIG on scene graphs: scene-graph IoU by the inspector, the verdicts of the learned
models, and the cost.

    SG-IoU = |asked and seen| / |asked or seen|       of triples (subject, predicate, object)

LAION-SG, Li et al. 2024, arXiv 2412.08580.  The loop decides by the
Checker; it never uses the judge.
"""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

from .evaluate import EvaluationConfig, Score, fixed_batches
from .ranges import expect
from .rl.rewards import Checker
from .streams import choices
from .world.graphs import Entity, Requirement, SceneGraph
from .world.inspector import inspect_all
from .world.layout import sample_graph
from .world.scenes import Object

# A function of b graphs and noise.  After each round it yields the best `images` so far (b 3 64 64), the
# Checker's `answers` about them, and the UNet `evaluations` (b) and Checker `calls` (b) so far.
Loop = Callable[[list[SceneGraph], torch.Generator], Iterable[Any]]


def iou(asked: set, seen: set) -> float:
    """|asked and seen| / |asked or seen|, and 0 if both are empty."""
    return len(asked & seen) / len(asked | seen) if asked | seen else 0.0


def named(things: Iterable[Object | Entity]) -> set[str]:
    """The colours and names of objects or entities, without their numbers."""
    return {f"{t.color} {t.name}" for t in things}


def seen_triples(things: tuple[Object, ...], graph: SceneGraph) -> set[tuple[str, str, str]]:
    """The relations that hold between the related pairs of a graph, one triple for each pair at most.

    The triple has the predicate of the graph, if that holds; otherwise the first predicate used anywhere in
    the graph that holds.  So does LAION-SG's reader answer.
    """
    predicates, seen = list(dict.fromkeys(p for _, p, _ in graph.relations)), set()
    for s, asked, o in graph.relations:
        a, b = graph.entities[s], graph.entities[o]
        true = [p for p in (asked, *predicates) if Requirement(a, p, b).met_by(things)]
        seen |= {(a.label, p, b.label) for p in true[:1]}
    return seen


def evaluation_graphs(config: EvaluationConfig) -> list[SceneGraph]:
    """The graphs that every row of a table is measured on."""
    chance = choices(config.seed, "evaluate", "graphs")
    return [sample_graph(chance, config.split) for _ in range(config.pictures)]


def evaluate_loop(loop: Loop, judge: Checker, config: EvaluationConfig, name: str) -> Score:
    """Run a loop on fixed graphs with fixed noise: loops with the same Diffuser share their round 0.

    -> means over the pictures, read by the inspector unless said otherwise
    """
    graphs, found = evaluation_graphs(config), []
    for part, noise in fixed_batches(graphs, config, name, "loop"):
        looks = list(loop(part, noise()))
        end, answers = looks[-1], looks[-1].answers
        columns = answers.share, answers.met.all(1), end.evaluations, end.calls  # (b) each
        found.append([value.cpu() for value in (looks[0].images, end.images, *columns)])
    first, images, checker, accepted, evaluations, calls = map(torch.cat, zip(*found))
    judged = judge(images, graphs)
    read = [[r.scene.objects if r.scene else () for r in inspect_all(x)] for x in (first, images)]
    was, right = (np.array([g.fulfilled_by(t) for g, t in zip(graphs, of)]) for of in read)
    things = read[1]
    accepted, liked = accepted.numpy(), judged.met.all(1).cpu().numpy()
    triples = [(set(g.triples), seen_triples(t, g)) for g, t in zip(graphs, things)]
    kinds = [(named(g.entities), named(t)) for g, t in zip(graphs, things)]
    predicates = [({p for _, p, _ in a}, {p for _, p, _ in b}) for a, b in triples]
    met = [np.mean([r.met_by(t) for r in g.requirements]) for g, t in zip(graphs, things)]
    return {
        "pictures": len(graphs),
        "sg_iou": mean_iou(triples),
        "entity_iou": mean_iou(kinds),  # of the things by colour and name
        "relation_iou": mean_iou(predicates),
        "met": float(np.mean(met)),  # share of the requirements that are met
        "right": float(right.mean()),  # share of the pictures that meet all requirements
        "unreadable": sum(not t for t in things) / len(things),  # share of the pictures
        "checker": checker.mean().item(),  # share of the requirements that the Checker calls met
        "checker_right": float(accepted.mean()),  # share of the pictures that the Checker accepts
        "judge": judged.share.mean().item(),  # the same two by the judge
        "judge_right": float(liked.mean()),
        "fooled": share(~right, accepted),  # share of wrong ones among those that the Checker accepts
        "judge_fooled": share(~right, liked),
        "repaired": share(right, ~was),  # of those that are wrong in round 0, the share right at the end
        "damaged": share(~right, was),  # of those that are right in round 0, the share wrong at the end
        "evaluations": evaluations.double().mean().item(),  # of the UNet, per picture
        "calls": calls.double().mean().item(),  # of the Checker, per picture
    }


def mean_iou(pairs: Iterable[tuple[set, set]]) -> float:
    return float(np.mean([iou(asked, seen) for asked, seen in pairs]))


def share(of: np.ndarray, among: np.ndarray) -> float:
    """The share of the set `of` in the set `among` of pictures; 0 if `among` is empty."""
    return float(of[among].mean()) if among.any() else 0.0


def loop_bars(loops: dict[str, Score]) -> dict[str, Score]:
    """For `figures.bars`: SG-IoU and the share of pictures fully right of every loop, with its cost."""
    groups: dict[str, Score] = {"SG-IoU": {}, "fully right": {}}
    for name, s in loops.items():
        for group, key in zip(groups.values(), ("sg_iou", "right")):
            value, cost = (expect(s.get(part), float, f"{part} of {name}") for part in (key, "evaluations"))
            group[f"{name}\n{cost:.0f} UNet evaluations"] = (value,) * 3  # without an interval
    return {"Test graphs, read by the inspector": groups}
