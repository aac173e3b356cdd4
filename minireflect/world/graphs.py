"""Arrangements: one to four coloured shapes on paper, described in GenEval's six kinds of task.

The rules are GenEval's (Ghosh et al. 2023): a picture is right when every clause of the prompt holds and no
object is too many; "left of" and its kin compare centres, and an offset along the other axis may not dominate.
Ours is stricter in one point: objects that the prompt does not name are too many as well.
"""

import json
import math
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from .canvas import Pen
from .scenes import COLORS, Object, Scene

# Scene graphs: what stands where, as data; read from triples, JSON or a sentence.
#
#     red ball on blue box; green cube left of yellow cylinder          LAION-SG's triples (Li et al. 2024, arXiv 2412.08580)
#     a red ball on a blue box and a green block left of a yellow cylinder
#
# A graph is a list of requirements that a picture meets or not: every entity is there in its number, every relation holds, and
# nothing else is there.  RL-RIG (arXiv 2602.19974) checks, edits and is rewarded by these.

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


MAX_THINGS, MAX_RELATIONS = 4, 4


MAX_REQUIREMENTS = MAX_THINGS + MAX_RELATIONS + 1  # and that nothing else is there


TOUCHING = ("on", "inside", "in front of")


SYNONYMS = {"cube": "block", "sphere": "ball"}


SMALL = ("ball", "block", "cone", "cylinder")  # what can lie on, in or before something


class GraphError(ValueError):
    """A scene graph that cannot be drawn; the message is one sentence for the user."""


@dataclass(frozen=True)
class Entity:
    """`count` things alike.  The name "thing" is anything whatsoever."""

    name: str
    color: str = ""
    count: int = 1

    def matches(self, thing: Object) -> bool:
        return self.name in ("thing", thing.name) and self.color in ("", thing.color)

    @property
    def label(self) -> str:
        """As in a triple: "red ball", "two red balls"."""
        noun = f"{self.color} {self.name}".strip()
        return (
            noun
            if self.count == 1
            else f"{NUMBERS[self.count]} {noun}es"
            if noun.endswith("x")
            else f"{NUMBERS[self.count]} {noun}s"
        )

    @property
    def words(self) -> str:
        return f"a {self.label}" if self.count == 1 else self.label


@dataclass(frozen=True)
class Requirement:
    """One thing asked of a picture: `subject` is there in its number or, with a predicate, stands so to `object`."""

    subject: Entity
    predicate: str = ""
    object: Entity | None = None

    @property
    def words(self) -> str:
        if self.object is None:
            return self.subject.words
        return f"{self.subject.words} {self.predicate} {self.object.words}"

    def met_by(self, things: tuple[Object, ...]) -> bool:
        """Whether the things in a picture meet it; a relation holds for all that the two names match, and for one at least."""
        subjects = [t for t in things if self.subject.matches(t)]
        if self.object is None:
            return len(subjects) == self.subject.count
        objects = [t for t in things if self.object.matches(t)]
        return bool(subjects and objects) and all(
            stands(self.predicate, a, b) for a in subjects for b in objects
        )


@dataclass(frozen=True)
class SceneGraph:
    """Entities and (subject, predicate, object) relations between them, by index.  Raises GraphError if it cannot be."""

    entities: tuple[Entity, ...]
    relations: tuple[tuple[int, str, int], ...] = ()

    def __post_init__(self) -> None:
        if not self.entities:
            raise GraphError("the graph is empty; name one thing at least, such as: red ball on blue box")
        things = sum(e.count for e in self.entities)
        if things > MAX_THINGS:
            raise GraphError(f"the graph has {things} things, at most {MAX_THINGS} fit into a picture")
        if len(self.relations) > MAX_RELATIONS:
            raise GraphError(f"the graph has {len(self.relations)} relations, at most {MAX_RELATIONS}")
        for e in self.entities:
            _check_entity(e)
        kinds = [(e.name, e.color) for e in self.entities]
        for e in self.entities:
            if kinds.count((e.name, e.color)) > 1:
                raise GraphError(
                    f"{e.color} {e.name} stands twice in the graph; say how many there are: two {e.color} {e.name}s"
                )
        for relation in self.relations:
            self._check_relation(*relation)
        self._check_order("left of", lambda p: (p == "left of") - (p == "right of"))
        self._check_order("above", lambda p: (p in ("above", "on")) - (p in ("below", "in front of")))

    def _check_relation(self, s: int, predicate: str, o: int) -> None:
        a, b = self.entities[s], self.entities[o]
        said = f"{a.label} {predicate} {b.label}"
        if predicate not in PREDICATES:
            raise GraphError(f"no relation {predicate!r}; there are {', '.join(PREDICATES)}")
        if s == o:
            raise GraphError(f"{said}: nothing stands so to itself")
        if predicate not in TOUCHING:
            return
        if a.name not in SMALL:
            raise GraphError(f"{said}: a {a.name} is too big for that; {', '.join(SMALL)} are not")
        if predicate == "inside" and b.name != "box":
            raise GraphError(f"{said}: only a box has an inside")
        if predicate == "on" and b.name not in FLAT:
            raise GraphError(f"{said}: nothing rests on a {b.name}; {', '.join(FLAT)} are flat")
        if a.count > 1 or b.count > 1:
            raise GraphError(f"{said}: only a single thing can be {predicate} a single thing")
        if a.color == b.color:
            raise GraphError(
                f"{said}: things that touch must differ in colour, or nobody can tell them apart"
            )

    def _check_order(self, before: str, direction: Callable[[str], int]) -> None:
        """Nothing can come before itself: A left of B and B left of A contradict each other.

        `direction` of a predicate: +1 if its subject comes first, -1 if its object does, 0 if it says nothing of the order.
        """
        first: dict[int, set[int]] = {}  # what must come before each
        for s, predicate, o in self.relations:
            if (sign := direction(predicate)) != 0:
                a, b = (s, o) if sign > 0 else (o, s)
                first.setdefault(b, set()).add(a)
        try:
            TopologicalSorter(first).prepare()
        except CycleError as error:
            around = [self.entities[i].label for i in error.args[1]]
            raise GraphError(f"the graph contradicts itself: {f' {before} '.join(around)}") from None

    @cached_property
    def requirements(self) -> tuple[Requirement, ...]:
        """All that is asked: the entities, the relations, and that nothing else is there."""
        e = self.entities
        total = Entity("thing", "", sum(entity.count for entity in e))
        return (
            *(Requirement(entity) for entity in e),
            *(Requirement(e[s], p, e[o]) for s, p, o in self.relations),
            Requirement(total),
        )

    @property
    def triples(self) -> tuple[tuple[str, str, str], ...]:
        """(subject, predicate, object) as strings: "red ball", "on", "blue box"."""
        e = self.entities
        return tuple((e[s].label, p, e[o].label) for s, p, o in self.relations)

    @property
    def sentence(self) -> str:
        """The prompt: relations first, joined by "and"; what was named before is "the"."""
        named: set[int] = set()

        def name(i: int) -> str:
            entity, again = self.entities[i], i in named
            named.add(i)
            return f"the {entity.label}" if again else entity.words

        clauses = [f"{name(s)} {p} {name(o)}" for s, p, o in self.relations]
        clauses += [self.entities[i].words for i in range(len(self.entities)) if i not in named]
        return " and ".join(clauses)

    def fulfilled_by(self, things: tuple[Object, ...]) -> bool:
        """Whether a picture of these things meets every requirement."""
        return all(r.met_by(things) for r in self.requirements)


def _check_entity(entity: Entity) -> None:
    if entity.name not in THINGS:
        raise GraphError(f"no thing named {entity.name!r}; there are {', '.join(THINGS)}")
    if entity.color not in COLORS:
        raise GraphError(f"{entity.label}: say its colour, one of {', '.join(COLORS)}")


def parse_graph(text: str) -> SceneGraph:
    """A graph from triples joined by ";", or from a sentence whose clauses are joined by "and" or ",".

    Raises GraphError, naming what is unknown, contradictory or too much.
    """
    entities: dict[tuple[str, str], Entity] = {}

    def index(words: str) -> int:
        entity = _parse_entity(words)
        key = (entity.name, entity.color)
        if entity.count > 1 or key not in entities:
            entities[key] = entity
        return list(entities).index(key)

    relations = []
    for clause in re.split(r"\s*;\s*|\s*,\s*|\s+and\s+", " ".join(text.lower().split()).rstrip(".;")):
        found = re.fullmatch(rf"(.+?) ({'|'.join(PREDICATES)}) (.+)", clause)
        if found:
            s, o = index(found[1]), index(found[3])
            relations.append((s, found[2], o))
        elif clause:
            index(clause)
    return SceneGraph(tuple(entities.values()), tuple(dict.fromkeys(relations)))


def _parse_entity(words: str) -> Entity:
    """ "a red ball", "the red ball", "two red balls", "red cube"."""
    parts = words.split()
    if parts and parts[0] in ("a", "an", "the", "one"):
        parts = parts[1:]
    count = 1
    if parts and parts[0] in NUMBERS[2:]:
        count, parts = NUMBERS.index(parts[0]), parts[1:]
    color = parts.pop(0) if parts and parts[0] in COLORS else ""
    name = " ".join(parts)
    if count > 1:
        name = name.removesuffix("es") if name.endswith("xes") else name.removesuffix("s")
    if len(parts) > 1:
        raise GraphError(
            f"cannot read {words!r}: a thing is a colour and a name, and relations are {', '.join(PREDICATES)}"
        )
    entity = Entity(SYNONYMS.get(name, name), color, count)
    _check_entity(entity)
    return entity


def read_graph(text: str) -> SceneGraph:
    """A graph from triples, from a sentence, or from a .json file in LAION-SG's format."""
    if not text.lower().endswith(".json"):
        return parse_graph(text)
    try:
        return from_laion_sg(Path(text).read_text())
    except OSError as error:
        raise GraphError(f"cannot read {text}: {error.strerror}") from None


def from_laion_sg(text: str) -> SceneGraph:
    """A graph from an annotation in LAION-SG's JSON: `items` with a label and attributes, `relations` between their ids.

    Items that are alike are one entity, counted.  Raises GraphError.
    """
    try:
        data = json.loads(text)
        items = {
            item["item_id"]: " ".join([*map(str, item.get("attributes", [])), item["label"]]).lower()
            for item in data["items"]
        }
        links = [(r["item1"], str(r["relation"]).lower(), r["item2"]) for r in data.get("relations", [])]
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise GraphError(f"not an annotation of LAION-SG, which has items and relations: {error!r}") from None
    kinds = {i: _parse_entity(words) for i, words in items.items()}
    alike = list(dict.fromkeys(kinds.values()))
    entities = tuple(Entity(e.name, e.color, list(kinds.values()).count(e)) for e in alike)
    if stray := [i for s, _, o in links for i in (s, o) if i not in kinds]:
        raise GraphError(f"a relation names item {stray[0]!r}, which is not among the items")
    relations = dict.fromkeys((alike.index(kinds[s]), p, alike.index(kinds[o])) for s, p, o in links)
    return SceneGraph(entities, tuple(relations))
