"""Questions about a scene graph's picture, with true answers: what RL-RIG's Checker learns from."""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from torch import Tensor

from ..world.graphs import PREDICATES, THINGS, Entity, Requirement, SceneGraph, radius
from ..world.scenes import COLORS, Scene
from .corrupt import VISIBLE

T = TypeVar("T")


def changed(scene: Scene, draw: random.Random) -> Scene:
    """The same scene with one object of another colour or name: the twin that ghosts are mixed with."""
    things, i = list(scene.objects), draw.randrange(len(scene.objects))
    field, values = ("color", COLORS) if draw.random() < 0.5 else ("name", THINGS)
    things[i] = varied(things[i], field, values, draw)
    return replace(scene, objects=tuple(things))


def visible(error: Tensor, scene: Scene) -> list[bool]:
    """For each object whether it is still visible, and at the end whether the whole picture is.

    Shapes: error (16 16) of each block, in [0, 1]
    """
    seen = []
    for thing in scene.objects:
        r, (x, y) = radius(thing.name), thing.xy
        window = error[max(0, (y - r) // 4) : (y + r) // 4 + 1, max(0, (x - r) // 4) : (x + r) // 4 + 1]
        seen.append(bool(window.max() < VISIBLE))
    return [*seen, bool(error.max() < VISIBLE)]


def question(
    graph: SceneGraph, scene: Scene, shown: list[bool], draw: random.Random, relations: float = 0.5
) -> tuple[Requirement, bool]:
    """A requirement and whether the picture meets it; the share `relations` is about relations.

    It is one of the graph's own or, if the whole picture is visible, often one with a fact changed.
    """
    related = draw.random() < relations
    own = draw.choice([r for r in graph.requirements if bool(r.predicate) == related])
    if not shown[-1] or draw.random() < 0.4:
        return own, answer(own, scene, shown)
    asked = changed_requirement(own, graph, draw)
    return asked, answer(asked, scene, shown)


def answer(asked: Requirement, scene: Scene, shown: list[bool]) -> bool:
    """The true answer: objects that are not visible do not count; a corrupted picture has no total number."""
    if asked.subject.name == "thing" and not shown[-1]:
        return False
    return asked.met_by(tuple(t for t, seen in zip(scene.objects, shown) if seen))


def changed_requirement(asked: Requirement, graph: SceneGraph, draw: random.Random) -> Requirement:
    """The requirement with one fact changed; it may still be met by chance."""
    e = asked.subject
    if e.name == "thing":
        return Requirement(varied(e, "count", (1, 2, 3, 4), draw))
    if asked.object is None:
        return Requirement(changed_entity(e, graph, draw))
    way = draw.randrange(4)
    if way == 0:
        return varied(asked, "predicate", PREDICATES, draw)
    if way == 1:  # two entities of the graph in any relation
        a, b = draw.sample(graph.entities, 2)
        return Requirement(a, draw.choice(PREDICATES), b)
    if way == 2:
        return replace(asked, subject=changed_entity(e, graph, draw))
    return replace(asked, object=changed_entity(asked.object, graph, draw))


def changed_entity(e: Entity, graph: SceneGraph, draw: random.Random) -> Entity:
    """Another number, colour or name, or another entity of the graph."""
    way = draw.randrange(4)
    if way == 3:
        return draw.choice(graph.entities)
    field, values = (("count", (1, 2, 3)), ("color", COLORS), ("name", THINGS))[way]
    return varied(e, field, values, draw)


def varied(record: T, field: str, values: Sequence[str | int], draw: random.Random) -> T:
    """The record with another of the values in a field."""
    return replace(record, **{field: draw.choice([v for v in values if v != getattr(record, field)])})
