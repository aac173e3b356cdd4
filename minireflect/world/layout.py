"""From a scene graph to a scene: shapes are placed one by one where every relation holds, by trial and error.

    scene = lay_out(parse_graph("red ball on blue box"), random.Random(0))

Also the random graphs for training and testing, which differ in the pairs of entities that they relate.
"""

import math
import random
from graphlib import CycleError, TopologicalSorter

from .graphs import (
    MAX_RELATIONS,
    MAX_THINGS,
    PREDICATES,
    THINGS,
    TOUCHING,
    Entity,
    GraphError,
    SceneGraph,
    holds,
    radius,
)
from .scenes import COLORS, Object, Scene, arrangement

ROWS, COLUMNS = ("top", "", "bottom"), ("left", "", "right")
PLACES = tuple(f"{row} {column}".strip() or "middle" for row in ROWS for column in COLUMNS)
GAP = 19  # least distance in pixels of two centres of GenEval's shapes, so that no two touch
AIR = 3  # pixels between two shapes of a graph that do not touch
LAYOUTS, SPOTS = 400, 40  # how often a layout is begun, and how many spots are tried for a shape
HELD_OUT = 0.2  # share of the pairs of entities that are never related in training
XY = tuple[int, int]


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


def lay_out(
    graph: SceneGraph, rng: random.Random, keep: dict[int, XY] | None = None, layouts: int = LAYOUTS
) -> Scene:
    """A scene of a graph with colours, whose shapes may touch.  Entities in `keep` (by index) stay there.

    Raises GraphError when no layout is found.
    """
    order = _contact_order(graph)
    for _ in range(layouts):
        placed: list[tuple[int, Object]] = []
        for i in [j for j in order for _ in range(graph.entities[j].count)]:
            thing = _find_spot(graph, i, placed, rng, (keep or {}).get(i))
            if thing is None:
                break
            placed.append((i, thing))
        else:
            return arrangement(thing for _, thing in placed)
    raise GraphError(f"no layout was found that shows all of this in one picture: {graph.sentence}")


def _contact_order(graph: SceneGraph) -> list[int]:
    """Entities by index: what carries, contains or is behind something comes before it."""
    after = {
        i: {o for s, p, o in graph.relations if s == i and p in TOUCHING} for i in range(len(graph.entities))
    }
    try:
        return list(TopologicalSorter(after).static_order())
    except CycleError as error:
        cycle = ", ".join(graph.entities[i].label for i in error.args[1])
        raise GraphError(f"the relations form a cycle of things that touch: {cycle}") from None


def _find_spot(
    graph: SceneGraph, i: int, placed: list[tuple[int, Object]], rng: random.Random, fixed: XY | None
) -> Object | None:
    """One object of entity i where its relations hold and it touches no other; None if there is no room."""
    entity = graph.entities[i]
    r = radius(entity.name)
    contacts = [
        (p, base)
        for s, p, o in graph.relations if s == i and p in TOUCHING
        for j, base in placed if j == o
    ]  # fmt: skip
    for _ in range(1 if fixed else SPOTS):
        if fixed:
            xy = fixed
        elif contacts:
            xy = _touching(*contacts[0], entity.name, rng)
        else:
            xy = (rng.randint(r + 3, 60 - r), rng.randint(r + 3, 60 - r))
        thing = Object(entity.name, entity.color, xy=xy)
        inside = all(r + 2 <= v <= 61 - r for v in xy)
        if inside and all(_fits(graph, i, thing, j, other) for j, other in placed):
            return thing
    return None


def _touching(predicate: str, base: Object, name: str, rng: random.Random) -> XY:
    """A random place of a shape on, inside or in front of another."""
    x, y = base.xy
    if predicate == "on":
        return x + rng.randint(-3, 3), y - radius(base.name) - radius(name)
    if predicate == "inside":
        return x + rng.randint(-1, 1), y + rng.randint(-1, 1)
    aside = radius(base.name) + rng.randint(-1, 2)  # in front: lower, and half aside
    return x + rng.choice((-aside, aside)), y + rng.randint(3, 6)


def _fits(graph: SceneGraph, i: int, thing: Object, j: int, other: Object) -> bool:
    """Whether all relations of two objects hold, and they touch only if a relation says so."""
    touch = False
    for s, predicate, o in graph.relations:
        if {s, o} == {i, j}:
            a, b = (thing, other) if s == i else (other, thing)
            if not holds(predicate, a, b):
                return False
            touch |= predicate in TOUCHING
    apart = max(abs(u - v) for u, v in zip(thing.xy, other.xy))
    return touch or apart >= radius(thing.name) + radius(other.name) + AIR


def held_out(a: Entity, b: Entity) -> bool:
    """Whether these two are related in held-out graphs only, in any number."""
    names = sorted(f"{e.color} {e.name}" for e in (a, b))
    return random.Random(f"pair/{names}").random() < HELD_OUT


def sample_graph(rng: random.Random, split: str = "train") -> SceneGraph:
    """Two to four objects, one to four relations; held-out graphs relate a pair that training never does."""
    if split not in ("train", "held-out"):
        raise ValueError(f"split {split!r} is not one of 'train', 'held-out'")
    while True:
        try:
            graph = _random_graph(rng)
            new = any(held_out(graph.entities[s], graph.entities[o]) for s, _, o in graph.relations)
            if new != (split == "held-out"):
                continue
            for seed in range(3):  # easy to lay out, so that training does not stop at one that is not
                lay_out(graph, random.Random(seed), layouts=20)
            return graph
        except GraphError:
            continue


def _random_graph(rng: random.Random) -> SceneGraph:
    """Any entities and relations.  Raises GraphError if no picture can show them."""
    wanted = rng.randint(1, MAX_RELATIONS)
    while True:
        things = rng.randint(2, MAX_THINGS)
        counts = [2, *[1] * (things - 2)] if things > 2 and rng.random() < 0.25 else [1] * things
        pairs = [(i, j) for i in range(len(counts)) for j in range(i)]
        if wanted <= len(pairs):
            break
    kinds = rng.sample([(n, c) for n in THINGS for c in COLORS], len(counts))
    relations = []
    for pair in rng.sample(pairs, wanted):
        s, o = rng.sample(pair, 2)
        relations.append((s, rng.choice((*PREDICATES, *TOUCHING)), o))
    return SceneGraph(tuple(Entity(n, c, k) for (n, c), k in zip(kinds, counts)), tuple(relations))


def sample_picture(rng: random.Random, split: str = "train") -> tuple[SceneGraph, Scene]:
    """A random graph and a scene of it."""
    while True:
        graph = sample_graph(rng, split)
        try:
            return graph, lay_out(graph, rng)
        except GraphError:  # one in ten thousand is too crowded after all
            continue
