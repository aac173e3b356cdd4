"""From a scene graph to a picture of it: things are placed one by one where every relation holds, by trial and error.

    scene = lay_out(parse_graph("red ball on blue box"), random.Random(0))

And the graphs that are trained and tested on, which differ in the pairs of things that they relate.
"""

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
    radius,
    stands,
)
from .scenes import COLORS, Object, Scene

ROWS, COLUMNS = ("top", "", "bottom"), ("left", "", "right")


AIR = 3  # pixels between two things that do not touch


LAYOUTS, SPOTS = 400, 40  # how often a layout is begun, and how many spots are tried for a thing


def place(xy: tuple[int, int]) -> str:
    """One of nine places of a picture: "top left", "right", "middle"."""
    row, column = (ROWS[_third(xy[1])], COLUMNS[_third(xy[0])])
    return f"{row} {column}".strip() or "middle"


def _third(v: int) -> int:
    return (v >= 25) + (v >= 40)


def lay_out(
    graph: SceneGraph,
    rng: random.Random,
    keep: dict[int, tuple[int, int]] | None = None,
    layouts: int = LAYOUTS,
) -> Scene:
    """A picture of the graph, what it leaves open at random.  Entities in `keep` (by index) stay where they are said to be.

    Raises GraphError when no layout is found.
    """
    keep = keep or {}
    order = _contact_order(graph)
    for _ in range(layouts):
        placed: list[tuple[int, Object]] = []
        for i in order:
            entity = graph.entities[i]
            for _ in range(entity.count):
                thing = _find_spot(graph, i, placed, rng, keep.get(i))
                if thing is None:
                    break
                placed.append((i, thing))
            else:
                continue
            break
        else:
            return Scene("arrangement", tuple(sorted((t for _, t in placed), key=lambda o: o.xy)), "")
    raise GraphError(f"no way was found to place this in one picture: {graph.sentence}")


def _contact_order(graph: SceneGraph) -> list[int]:
    """What carries, contains or stands behind something comes before it; then as listed."""
    after = {
        i: {o for s, p, o in graph.relations if s == i and p in TOUCHING} for i in range(len(graph.entities))
    }
    try:
        return list(TopologicalSorter(after).static_order())
    except CycleError:
        raise GraphError(f"these lean on each other all around: {graph.sentence}") from None


def _find_spot(
    graph: SceneGraph,
    i: int,
    placed: list[tuple[int, Object]],
    rng: random.Random,
    fixed: tuple[int, int] | None,
) -> Object | None:
    """Somewhere for one thing of entity i where all its relations to what is placed hold, and nothing else touches it."""
    entity = graph.entities[i]
    r = radius(entity.name)
    links = [(s, p, o) for s, p, o in graph.relations if i in (s, o)]
    contact = next(
        ((p, thing) for s, p, o in links if s == i and p in TOUCHING for j, thing in placed if j == o), None
    )
    for _ in range(1 if fixed else SPOTS):
        if fixed:
            xy = fixed
        elif contact:
            xy = _touching(contact[0], entity.name, contact[1], rng)
        else:
            xy = (rng.randint(r + 3, 60 - r), rng.randint(r + 3, 60 - r))
        thing = Object(entity.name, entity.color, xy=xy)
        if not all(r + 2 <= v <= 61 - r for v in xy):
            continue
        if all(_fits(graph, i, thing, j, other) for j, other in placed):
            return thing
    return None


def _touching(predicate: str, name: str, base: Object, rng: random.Random) -> tuple[int, int]:
    x, y = base.xy
    if predicate == "on":
        return x + rng.randint(-3, 3), y - radius(base.name) - radius(name)
    if predicate == "inside":
        return x + rng.randint(-1, 1), y + rng.randint(-1, 1)
    aside = radius(base.name) + rng.randint(-1, 2)  # in front: lower, and half aside
    return x + rng.choice((-aside, aside)), y + rng.randint(3, 6)


def _fits(graph: SceneGraph, i: int, thing: Object, j: int, other: Object) -> bool:
    touch = False
    for s, p, o in graph.relations:
        if {s, o} == {i, j}:
            a, b = (thing, other) if s == i else (other, thing)
            if not stands(p, a, b):
                return False
            touch |= p in TOUCHING
    dx, dy = abs(thing.xy[0] - other.xy[0]), abs(thing.xy[1] - other.xy[1])
    return touch or max(dx, dy) >= radius(thing.name) + radius(other.name) + AIR


HELD_OUT = 0.2  # share of the pairs of entities that are never related in training


def held_out(a: Entity, b: Entity) -> bool:
    """Whether these two are related in held-out graphs only; in their numbers they may differ."""
    names = sorted(f"{e.color} {e.name}" for e in (a, b))
    return random.Random(f"pair/{names}").random() < HELD_OUT


def sample_graph(rng: random.Random, split: str = "train") -> SceneGraph:
    """Two to four things with one to four relations.  A held-out graph relates a pair that no training graph does."""
    if split not in ("train", "held-out"):
        raise ValueError(f"split {split!r} is not one of 'train', 'held-out'")
    while True:
        wanted = rng.randint(1, MAX_RELATIONS)
        while True:
            things = rng.randint(2, MAX_THINGS)
            counts = [2, *[1] * (things - 2)] if things > 2 and rng.random() < 0.25 else [1] * things
            if wanted <= len(counts) * (len(counts) - 1) // 2:
                break
        kinds = rng.sample([(n, c) for n in THINGS for c in COLORS], len(counts))
        entities = tuple(Entity(n, c, k) for (n, c), k in zip(kinds, counts))
        pairs = [(i, j) for i in range(len(entities)) for j in range(i)]
        relations = [
            (*rng.sample(pair, 2), rng.choice((*PREDICATES, *TOUCHING))) for pair in rng.sample(pairs, wanted)
        ]
        relations = [(s, p, o) for s, o, p in relations]
        new = any(held_out(entities[s], entities[o]) for s, _, o in relations)
        if new != (split == "held-out"):
            continue
        try:
            graph = SceneGraph(entities, tuple(relations))
            for seed in range(3):  # easily laid out, so that no training stops on one that is not
                lay_out(graph, random.Random(seed), layouts=20)
        except GraphError:
            continue
        return graph


def sample_picture(rng: random.Random, split: str = "train") -> tuple[SceneGraph, Scene]:
    """A graph and a picture of it."""
    while True:
        graph = sample_graph(rng, split)
        try:
            return graph, lay_out(graph, rng)
        except GraphError:  # one in ten thousand is too crowded after all
            continue
