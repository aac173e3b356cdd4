"""Arrangements: one to four coloured shapes on paper, described in GenEval's six kinds of task.

The rules are GenEval's (Ghosh et al. 2023): a picture is right when every clause of the prompt holds and no
object is too many; "left of" and its kin compare centres, and an offset along the other axis may not dominate.
Ours is stricter in one point: objects that the prompt does not name are too many as well.
"""

import math
import random
from dataclasses import dataclass

from .pen import Pen
from .scenes import COLORS, Object, Scene

SHAPES = ("ball", "block", "cone")  # of GenEval's tasks
THINGS = (*SHAPES, "cylinder", "box")  # of scene graphs (graph.py)
FLAT = ("block", "cylinder", "box")  # something can rest on these
RADIUS = 7  # pixels
BOX = 12  # pixels, of a box: a frame with room for one thing
GAP = 19  # least distance of two centres in pixels, so that no two shapes touch
NUMBERS = ("no", "one", "two", "three", "four")
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}  # y points down
PREDICATES = (*RELATIONS, "on", "inside", "in front of")
TASKS = ("single object", "two objects", "counting", "colors", "position", "color attribution")


@dataclass(frozen=True)
class Clause:
    """`count` objects with these attributes; an empty colour is any colour."""

    name: str
    color: str = ""
    count: int = 1

    def matches(self, thing: Object) -> bool:
        return thing.name == self.name and self.color in ("", thing.color)

    @property
    def words(self) -> str:
        noun = f"{self.color} {self.name}".strip()
        return f"a {noun}" if self.count == 1 else f"{NUMBERS[self.count]} {noun}s"


@dataclass(frozen=True)
class Task:
    """What an arrangement prompt asks for.  `relation` is between the first clause and the second."""

    kind: str
    clauses: tuple[Clause, ...]
    relation: str = ""

    @property
    def words(self) -> str:
        return f" {self.relation or 'and'} ".join(clause.words for clause in self.clauses)


def holds(relation: str, a: tuple[int, int], b: tuple[int, int]) -> bool:
    """Whether the shape at `a` stands in `relation` to the shape at `b` (GenEval's position rule)."""
    dx, dy = a[0] - b[0], a[1] - b[1]
    dead = 0.1 * 4 * RADIUS  # GenEval: offsets below a tenth of both sizes count as none
    dx, dy = (0 if abs(dx) < dead else dx), (0 if abs(dy) < dead else dy)
    length = math.hypot(dx, dy)
    ux, uy = RELATIONS[relation]
    return length > 0 and (ux * dx + uy * dy) / length > 0.5


def radius(name: str) -> int:
    """Half the height of a thing, in pixels."""
    return BOX if name == "box" else RADIUS


def stands(predicate: str, a: Object, b: Object) -> bool:
    """Whether `a` stands in one of PREDICATES to `b`.

    left of, right of, above, below: GenEval's rule on the centres.  on: the foot of `a` is at the head of `b`, within 3 pixels,
    and its centre above `b`'s width.  inside: centre within 4 pixels of a box's.  in front of: they overlap, and `a` is lower, as
    things are drawn from the back, which is the top, to the front.
    """
    if predicate in RELATIONS:
        return holds(predicate, a.xy, b.xy)
    dx, dy = abs(a.xy[0] - b.xy[0]), a.xy[1] - b.xy[1]
    reach = radius(a.name) + radius(b.name)
    if predicate == "on":
        return abs(dy + reach) <= 3 and dx <= RADIUS
    if predicate == "inside":
        return b.name == "box" and a.name != "box" and max(dx, abs(dy)) <= 4
    if predicate == "in front of":
        return 2 <= dy < reach and RADIUS / 2 <= dx < reach
    raise ValueError(f"no relation {predicate!r}; there are {', '.join(PREDICATES)}")


def fulfils(objects: tuple[Object, ...], task: Task) -> bool:
    """Whether a set of objects is what the task asks for, nothing missing and nothing too many."""
    chosen = [[o for o in objects if clause.matches(o)] for clause in task.clauses]
    if any(len(found) != clause.count for found, clause in zip(chosen, task.clauses)):
        return False
    if len(objects) != sum(clause.count for clause in task.clauses):
        return False
    if not task.relation:
        return True
    (a,), (b,) = chosen
    return holds(task.relation, a.xy, b.xy)


def task_list() -> list[Task]:
    """Every arrangement prompt there is, in a fixed order."""
    pairs = [(a, b) for a in SHAPES for b in SHAPES if a != b]
    tasks = [Task("single object", (Clause(s),)) for s in SHAPES]
    tasks += [Task("two objects", (Clause(a), Clause(b))) for a, b in pairs]
    tasks += [Task("counting", (Clause(s, c, n),)) for s in SHAPES for c in ("", *COLORS) for n in (2, 3, 4)]
    tasks += [Task("colors", (Clause(s, c),)) for s in SHAPES for c in COLORS]
    tasks += [Task("position", (Clause(a), Clause(b)), r) for a, b in pairs for r in RELATIONS]
    tasks += [
        Task("color attribution", (Clause(a, c), Clause(b, d)))
        for a, b in pairs for c in COLORS for d in COLORS if c != d
    ]  # fmt: skip
    return tasks


def arrange(task: Task, rng: random.Random) -> Scene:
    """A scene that fulfils the task; what the task leaves open is drawn at random."""
    things = [(c.name, c.color) for c in task.clauses for _ in range(c.count)]
    while True:
        spots: list[tuple[int, int]] = []
        for _ in range(100):
            spot = (rng.randint(10, 54), rng.randint(10, 54))
            if all(math.dist(spot, other) >= GAP for other in spots):
                spots.append(spot)
            if len(spots) == len(things):
                break
        objects = tuple(Object(n, c or rng.choice(COLORS), xy=xy) for (n, c), xy in zip(things, spots))
        if len(objects) == len(things) and fulfils(objects, task):
            return Scene("arrangement", tuple(sorted(objects, key=lambda o: o.xy)), "")


def draw_arrangement(pen: Pen, objects: tuple[Object, ...]) -> None:
    """What is lower in the picture is nearer, and hides what is behind it."""
    for thing in sorted(objects, key=lambda o: o.xy[1]):
        pen.shape(thing.name, *thing.xy, radius(thing.name), thing.color)
