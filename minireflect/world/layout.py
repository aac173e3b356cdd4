"""Scenes of scene graphs: layouts, and random graphs that have one.

    scene = lay_out(parse_graph("red ball on blue box"), random.Random(0))

A layout is found by trial and error: shapes are placed one by one where every relation holds.
"""

import math
import random
from collections.abc import Iterator
from contextlib import suppress

from .graphs import TOUCHING, Entity, GraphError, SceneGraph, holds, random_graph
from .scenes import COLORS, SPLITS, Object, Scene, arrangement, distance

GAP = 19  # least distance in pixels of two centres of GenEval's shapes, so that no two touch
AIR = 3  # pixels between two shapes of a graph that do not touch
LAYOUTS, SPOTS = 400, 40  # tries of a layout, and of a place for a shape
HELD_OUT = 0.2  # share of the pairs of entities that are never related in training
XY = tuple[int, int]
Keep = dict[int, XY]  # where to leave an entity, by its index
Placed = list[tuple[int, Object]]  # objects with the index of their entity


def arrange(graph: SceneGraph, rng: random.Random) -> Scene:
    """A scene of a GenEval task: shapes at random places, apart from each other; open colours at random."""
    things = [(e.name, e.color) for e in graph.entities for _ in range(e.count)]
    while True:
        spots: list[XY] = []
        for _ in range(100):
            spot = (rng.randint(10, 54), rng.randint(10, 54))
            if all(math.dist(spot, other) >= GAP for other in spots):
                spots.append(spot)
            if len(spots) == len(things):
                break
        objects = [Object(n, c or rng.choice(COLORS), xy=xy) for (n, c), xy in zip(things, spots)]
        if len(objects) == len(things) and graph.fulfilled_by(tuple(objects)):
            return arrangement(objects)


def lay_out(graph: SceneGraph, rng: random.Random, keep: Keep | None = None, layouts: int = LAYOUTS) -> Scene:
    """A scene of a graph with colours, whose shapes may touch.  Entities in `keep` (by index) stay there.

    Raises GraphError when no layout is found.
    """
    # an object that carries, contains or is behind another is placed before it
    order = graph.in_order((), TOUCHING, "the relations form a cycle of things that touch")
    for _ in range(layouts):
        placed: Placed = []
        for i in [j for j in order for _ in range(graph.entities[j].count)]:
            name, color = graph.entities[i].name, graph.entities[i].color
            spots = [keep[i]] if keep and i in keep else _spots(graph, i, placed, rng)
            things = (Object(name, color, xy=xy) for xy in spots)
            if (thing := next((t for t in things if _fits(graph, i, t, placed)), None)) is None:
                break
            placed.append((i, thing))
        else:
            return arrangement(thing for _, thing in placed)
    raise GraphError(f"no layout was found that shows all of this in one picture: {graph.sentence}")


def _spots(graph: SceneGraph, i: int, placed: Placed, rng: random.Random) -> Iterator[XY]:
    """Random places for an object of entity i, where it touches what it must."""
    bases = dict(placed)  # what is touched is a single thing, and placed before
    contacts = [(p, bases[o]) for s, p, o in graph.relations if s == i and p in TOUCHING]
    r = Object(graph.entities[i].name).radius
    edges = r + 3, 60 - r
    for _ in range(SPOTS):
        yield _touching(*contacts[0], r, rng) if contacts else (rng.randint(*edges), rng.randint(*edges))


def _touching(predicate: str, base: Object, r: int, rng: random.Random) -> XY:
    """A random place of a shape of radius `r` on, inside or in front of another."""
    x, y = base.xy
    if predicate == "on":
        return x + rng.randint(-3, 3), y - base.radius - r
    if predicate == "inside":
        return x + rng.randint(-1, 1), y + rng.randint(-1, 1)
    aside = base.radius + rng.randint(-1, 2)  # in front: lower, and half aside
    return x + rng.choice((-aside, aside)), y + rng.randint(3, 6)


def _fits(graph: SceneGraph, i: int, thing: Object, placed: Placed) -> bool:
    """Whether all relations to what is placed hold, and the thing touches only what a relation says."""
    r = thing.radius
    if not all(r + 2 <= v <= 61 - r for v in thing.xy):
        return False
    for j, other in placed:
        between = [(p, s) for s, p, o in graph.relations if {s, o} == {i, j}]
        if not all(holds(p, *((thing, other) if s == i else (other, thing))) for p, s in between):
            return False
        apart = distance(thing, other) >= r + other.radius + AIR
        if not (apart or any(p in TOUCHING for p, _ in between)):
            return False
    return True


def pair_split(a: Entity, b: Entity) -> str:
    """The only split in whose graphs these two are related, in any number; training pairs are in all."""
    names = sorted(f"{e.color} {e.name}" for e in (a, b))
    chance = random.Random(f"pair/{names}").random()
    return "train" if chance >= HELD_OUT else "validation" if chance < HELD_OUT / 2 else "test"


def sample_graph(rng: random.Random, split: str = "train") -> SceneGraph:
    """Two to four objects, one to four relations.  Graphs of a held-out split relate a pair of it, see
    `pair_split`, and no other graphs do.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is not one of {', '.join(map(repr, SPLITS))}")
    while True:
        with suppress(GraphError):
            graph = random_graph(rng)
            pairs = {pair_split(graph.entities[s], graph.entities[o]) for s, _, o in graph.relations}
            if pairs - {"train"} != {split} - {"train"}:
                continue
            for seed in range(3):  # keep graphs that are easy to lay out: training must not stop
                lay_out(graph, random.Random(seed), layouts=20)
            return graph


def sample_picture(rng: random.Random, split: str = "train") -> tuple[SceneGraph, Scene]:
    """A random graph and a scene of it."""
    while True:
        graph = sample_graph(rng, split)
        with suppress(GraphError):  # for one graph in ten thousand no layout is found
            return graph, lay_out(graph, rng)
