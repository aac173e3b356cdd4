"""Evaluate a loop of RL-RIG on scene graphs: scene-graph IoU by the inspector, the verdicts of the learned
models, and the cost.

    SG-IoU = |requested and shown| / |requested or shown|      of triples (subject, predicate, object)

SG-IoU is from LAION-SG (Li et al. 2024, arXiv 2412.08580). The loop uses the Checker, never the judge.
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

# A function of b graphs and a generator. After each round it yields the best `images` so far (b 3 64 64), the
# Checker's `answers` about them, and the numbers of UNet `evaluations` (b) and Checker `calls` (b) so far.
Loop = Callable[[list[SceneGraph], torch.Generator], Iterable[Any]]


def iou(pairs: Iterable[tuple[set, set]]) -> float:
    """The mean over pairs of sets of intersection over union, which is 0 if both sets are empty."""
    return float(np.mean([len(asked & seen) / max(1, len(asked | seen)) for asked, seen in pairs]))


def named(things: Iterable[Object | Entity]) -> set[str]:
    """Colour and name of each object or entity, such as "red ball"."""
    return {f"{t.color} {t.name}" for t in things}


def seen_triples(things: tuple[Object, ...], graph: SceneGraph) -> set[tuple[str, str, str]]:
    """The triples that `things` show for the related pairs of a graph: at most one per relation of the graph.

    The triple has the predicate of the graph if it holds; otherwise the first other predicate of the graph
    that holds. LAION-SG's reader answers in the same way.
    """
    predicates, seen = list(dict.fromkeys(p for _, p, _ in graph.relations)), set()
    for s, asked, o in graph.relations:
        a, b = graph.entities[s], graph.entities[o]
        true = [p for p in (asked, *predicates) if Requirement(a, p, b).met_by(things)]
        seen |= {(a.label, p, b.label) for p in true[:1]}
    return seen


def evaluation_graphs(config: EvaluationConfig) -> list[SceneGraph]:
    """The graphs of the evaluation, the same for all models."""
    chance = choices(config.seed, "evaluate", "graphs")
    return [sample_graph(chance, config.split) for _ in range(config.pictures)]


def evaluate_loop(loop: Loop, judge: Checker, config: EvaluationConfig, name: str) -> Score:
    """Run a loop on fixed graphs with fixed noise. Loops with the same Diffuser have the same round 0.

    -> means over the pictures, by the inspector unless stated otherwise
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
    accepted, liked = accepted.numpy(), judged.met.all(1).cpu().numpy()
    ends = list(zip(graphs, read[1]))  # each graph, and the objects of its last picture
    triples = [(set(g.triples), seen_triples(t, g)) for g, t in ends]
    return {
        "pictures": len(graphs),
        "sg_iou": iou(triples),
        "entity_iou": iou((named(g.entities), named(t)) for g, t in ends),  # of objects, by colour and name
        "relation_iou": iou(({p for _, p, _ in a}, {p for _, p, _ in b}) for a, b in triples),
        # share of the requirements that are met
        "met": float(np.mean([np.mean([r.met_by(t) for r in g.requirements]) for g, t in ends])),
        "right": float(right.mean()),  # share of the pictures that meet all requirements
        "unreadable": sum(not t for _, t in ends) / len(ends),  # share of the pictures
        "checker": checker.mean().item(),  # share of the requirements that the Checker calls met
        "checker_right": float(accepted.mean()),  # share of the pictures that the Checker accepts
        "judge": judged.share.mean().item(),  # as "checker", by the judge
        "judge_right": float(liked.mean()),  # as "checker_right", by the judge
        "fooled": share(~right, accepted),  # share of wrong pictures among those that the Checker accepts
        "judge_fooled": share(~right, liked),
        "repaired": share(right, ~was),  # share that is right at the end, of those wrong in round 0
        "damaged": share(~right, was),  # share that is wrong at the end, of those right in round 0
        "evaluations": evaluations.double().mean().item(),  # UNet evaluations per picture
        "calls": calls.double().mean().item(),  # Checker calls per picture
    }


def share(of: np.ndarray, among: np.ndarray) -> float:
    """The share of the pictures `among` for which `of` is true; 0 if `among` is empty.  Shapes: (n), (n)"""
    return float(of[among].mean()) if among.any() else 0.0


def loop_bars(loops: dict[str, Score]) -> dict[str, Score]:
    """Data for `figures.bars`: SG-IoU and share of right pictures of every loop, labelled with its cost."""
    groups: dict[str, Score] = {"SG-IoU": {}, "fully right": {}}
    for name, s in loops.items():
        for group, key in zip(groups.values(), ("sg_iou", "right")):
            value, cost = (expect(s.get(part), float, f"{part} of {name}") for part in (key, "evaluations"))
            group[f"{name}\n{cost:.0f} UNet evaluations"] = (value,) * 3  # without an interval
    return {"Test graphs, read by the inspector": groups}
