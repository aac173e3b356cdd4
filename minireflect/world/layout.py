"""Layouts of scene graphs, and random scene graphs that have a layout.

    scene = lay_out(parse_graph("red ball on blue box"), Random(0))

A layout is found by trial and error: shapes are placed one after the other, at random places where every
relation holds.
"""

import math
from collections.abc import Iterator
from contextlib import suppress
from random import Random

from .graphs import TOUCHING, Entity, GraphError, SceneGraph, holds, random_graph
from .scenes import COLORS, SPLITS, Object, Scene, arrangement, distance

MIN_DISTANCE = 19  # between the centres of two shapes of a GenEval task in pixels, so that they do not touch
GAP = 3  # smallest gap between two shapes of a graph that do not touch, in pixels
LAYOUTS, SPOTS = 400, 40  # attempts to lay out a graph, and to place one shape
HELD_OUT = 0.2  # share of the pairs of entities that no training graph relates
XY = tuple[int, int]
Placed = list[tuple[int, Object]]  # objects with the index of their entity


def arrange(graph: SceneGraph, rng: Random) -> Scene:
    """A random scene of a GenEval task.  Its shapes do not touch; colours that the graph leaves open vary."""
    things = [(e.name, e.color) for e in graph.entities for _ in range(e.count)]
    while True:
        spots: list[XY] = []
        for _ in range(100):
            spot = (rng.randint(10, 54), rng.randint(10, 54))
            if all(math.dist(spot, other) >= MIN_DISTANCE for other in spots):
                spots.append(spot)
            if len(spots) == len(things):
                break
        objects = [Object(n, c or rng.choice(COLORS), xy=xy) for (n, c), xy in zip(things, spots)]
        if graph.fulfilled_by(tuple(objects)):
            return arrangement(objects)


def lay_out(graph: SceneGraph, rng: Random, keep: dict[int, XY] | None = None, tries: int = LAYOUTS) -> Scene:
    """A random scene of a graph whose entities all have a colour.

    keep: fixed places, by the index of the entity.
    tries: number of attempts.
    Raises GraphError if no layout is found.
    """
    # the object of a touching relation is placed before its subject
    order = graph.in_order((), TOUCHING, "the relations form a cycle of things that touch")
    for _ in range(tries):
        placed: Placed = []
        with suppress(StopIteration):  # no spot fits an object
            for i in [j for j in order for _ in range(graph.entities[j].count)]:
                name, color = graph.entities[i].name, graph.entities[i].color
                spots = [keep[i]] if keep and i in keep else _spots(graph, i, placed, rng)
                things = (Object(name, color, xy=xy) for xy in spots)
                placed.append((i, next(t for t in things if _fits(graph, i, t, placed))))
            return arrangement(thing for _, thing in placed)
    raise GraphError(f"no layout was found that shows all of this in one picture: {graph.sentence}")


def _spots(graph: SceneGraph, i: int, placed: Placed, rng: Random) -> Iterator[XY]:
    """Random places for an object of entity i.  If it must touch a placed object, they are next to that."""
    # an entity that is touched is a single object, and is placed already
    contacts = [(p, dict(placed)[o]) for s, p, o in graph.relations if s == i and p in TOUCHING]
    r = Object(graph.entities[i].name).radius
    edges = r + 3, 60 - r
    for _ in range(SPOTS):
        yield _touching(*contacts[0], r, rng) if contacts else (rng.randint(*edges), rng.randint(*edges))


def _touching(predicate: str, base: Object, r: int, rng: Random) -> XY:
    """A random place for a shape of radius `r` that is on, inside or in front of `base`."""
    x, y = base.xy
    if predicate == "on":
        return x + rng.randint(-3, 3), y - base.radius - r
    if predicate == "inside":
        return x + rng.randint(-1, 1), y + rng.randint(-1, 1)
    aside = base.radius + rng.randint(-1, 2)  # in front of: lower, and shifted to one side
    return x + rng.choice((-aside, aside)), y + rng.randint(3, 6)


def _fits(graph: SceneGraph, i: int, thing: Object, placed: Placed) -> bool:
    """Whether all relations to placed objects hold, and the thing touches only objects that it should."""
    r = thing.radius
    if not all(r + 2 <= v <= 61 - r for v in thing.xy):
        return False
    for j, other in placed:
        between = [(p, s) for s, p, o in graph.relations if {s, o} == {i, j}]
        if not all(holds(p, *((thing, other) if s == i else (other, thing))) for p, s in between):
            return False
        if distance(thing, other) < r + other.radius + GAP and not any(p in TOUCHING for p, _ in between):
            return False
    return True


def pair_split(a: Entity, b: Entity) -> str:
    """The split to which the pair belongs, whatever the counts.

    Graphs of every split relate pairs of "train"; only graphs of a held-out split relate pairs of that split.
    """
    names = sorted(f"{e.color} {e.name}" for e in (a, b))
    chance = Random(f"pair/{names}").random()
    return "train" if chance >= HELD_OUT else "validation" if chance < HELD_OUT / 2 else "test"


def sample_graph(rng: Random, split: str = "train") -> SceneGraph:
    """A random graph of two to four objects and one to four relations.

    A graph of a held-out split has at least one relation between a pair of that split, see `pair_split`.
    Raises ValueError if there is no such split.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is not one of {', '.join(map(repr, SPLITS))}")
    while True:
        with suppress(GraphError):
            graph = random_graph(rng)
            pairs = {pair_split(graph.entities[s], graph.entities[o]) for s, _, o in graph.relations}
            if pairs - {"train"} != {split} - {"train"}:
                continue
            for seed in range(3):  # keep only graphs that are easy to lay out
                lay_out(graph, Random(seed), tries=20)
            return graph


def sample_picture(rng: Random, split: str = "train") -> tuple[SceneGraph, Scene]:
    """A random graph, and a scene of it."""
    while True:
        graph = sample_graph(rng, split)
        with suppress(GraphError):  # about one graph in 10,000 has no layout
            return graph, lay_out(graph, rng)
