"""From a scene graph to a scene: shapes are placed one by one where every relation holds, by trial and error.

    scene = lay_out(parse_graph("red ball on blue box"), random.Random(0))

Also the random graphs for training and testing, which differ in the pairs of entities that they relate.
"""

import math
import random
from collections.abc import Iterator
from contextlib import suppress

from . import graphs
from .graphs import THINGS, TOUCHING, Entity, GraphError, SceneGraph, holds, radius
from .scenes import COLORS, Object, Scene, arrangement, distance

ROWS, COLUMNS = ("top", "", "bottom"), ("left", "", "right")
PLACES = tuple(f"{row} {column}".strip() or "middle" for row in ROWS for column in COLUMNS)
GAP = 19  # least distance in pixels of two centres of GenEval's shapes, so that no two touch
AIR = 3  # pixels between two shapes of a graph that do not touch
LAYOUTS, SPOTS = 400, 40  # how often a layout is begun, and how many spots are tried for a shape
HELD_OUT = 0.2  # share of the pairs of entities that are never related in training
XY = tuple[int, int]
Keep = dict[int, XY]  # where to leave an entity, by its index
Placed = list[tuple[int, Object]]  # objects with the index of their entity


def place(xy: XY) -> str:
    """One of nine places of a picture: "top left", "right", "middle"."""
    column, row = ((v >= 25) + (v >= 40) for v in xy)
    return PLACES[3 * row + column]


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
    # what carries, contains or is behind something comes before it
    relations = [(s, o) for s, p, o in graph.relations if p in TOUCHING]
    after = {i: {o for s, o in relations if s == i} for i in range(len(graph.entities))}
    order = graph.in_order(after, "the relations form a cycle of things that touch")
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
    name = graph.entities[i].name
    bases = dict(placed)  # what is touched is a single thing, and placed before
    contacts = [(p, bases[o]) for s, p, o in graph.relations if s == i and p in TOUCHING]
    edges = radius(name) + 3, 60 - radius(name)
    for _ in range(SPOTS):
        yield _touching(*contacts[0], name, rng) if contacts else (rng.randint(*edges), rng.randint(*edges))


def _touching(predicate: str, base: Object, name: str, rng: random.Random) -> XY:
    """A random place of a shape on, inside or in front of another."""
    x, y = base.xy
    if predicate == "on":
        return x + rng.randint(-3, 3), y - radius(base.name) - radius(name)
    if predicate == "inside":
        return x + rng.randint(-1, 1), y + rng.randint(-1, 1)
    aside = radius(base.name) + rng.randint(-1, 2)  # in front: lower, and half aside
    return x + rng.choice((-aside, aside)), y + rng.randint(3, 6)


def _fits(graph: SceneGraph, i: int, thing: Object, placed: Placed) -> bool:
    """Whether all relations to what is placed hold, and the thing touches only what a relation says."""
    r = radius(thing.name)
    if not all(r + 2 <= v <= 61 - r for v in thing.xy):
        return False
    for j, other in placed:
        between = [(p, s) for s, p, o in graph.relations if {s, o} == {i, j}]
        if not all(holds(p, *((thing, other) if s == i else (other, thing))) for p, s in between):
            return False
        apart = distance(thing, other) >= r + radius(other.name) + AIR
        if not (apart or any(p in TOUCHING for p, _ in between)):
            return False
    return True


def held_out(a: Entity, b: Entity) -> bool:
    """Whether these two are related in held-out graphs only, in any number."""
    names = sorted(f"{e.color} {e.name}" for e in (a, b))
    return random.Random(f"pair/{names}").random() < HELD_OUT


def sample_graph(rng: random.Random, split: str = "train") -> SceneGraph:
    """Two to four objects, one to four relations; held-out graphs relate a pair that training never does."""
    if split not in ("train", "held-out"):
        raise ValueError(f"split {split!r} is not one of 'train', 'held-out'")
    while True:
        with suppress(GraphError):
            graph = _random_graph(rng)
            new = any(held_out(graph.entities[s], graph.entities[o]) for s, _, o in graph.relations)
            if new != (split == "held-out"):
                continue
            for seed in range(3):  # easy to lay out, so that training does not stop at one that is not
                lay_out(graph, random.Random(seed), layouts=20)
            return graph


def _random_graph(rng: random.Random) -> SceneGraph:
    """Any entities and relations.  Raises GraphError if no picture can show them."""
    wanted = rng.randint(1, graphs.MAX_RELATIONS)
    while True:
        things = rng.randint(2, graphs.MAX_THINGS)
        counts = [2, *[1] * (things - 2)] if things > 2 and rng.random() < 0.25 else [1] * things
        pairs = [(i, j) for i in range(len(counts)) for j in range(i)]
        if wanted <= len(pairs):
            break
    kinds = rng.sample([(n, c) for n in THINGS for c in COLORS], len(counts))
    ordered = (
        rng.sample(pair, 2) for pair in rng.sample(pairs, wanted)
    )  # a generator: in turns with the predicates
    relations = [(s, rng.choice((*graphs.PREDICATES, *TOUCHING)), o) for s, o in ordered]
    return SceneGraph(tuple(Entity(n, c, k) for (n, c), k in zip(kinds, counts)), tuple(relations))


def sample_picture(rng: random.Random, split: str = "train") -> tuple[SceneGraph, Scene]:
    """A random graph and a scene of it."""
    while True:
        graph = sample_graph(rng, split)
        with suppress(GraphError):  # one in ten thousand is too crowded after all
            return graph, lay_out(graph, rng)
