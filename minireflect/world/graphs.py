"""Scene graphs: entities and relations of one to four shapes, parsed from triples or from a sentence.

    red ball on blue box; green cube left of yellow cylinder        triples, as in LAION-SG (arXiv 2412.08580)
    a red ball on a blue box and a green block left of a yellow cylinder

A graph makes requirements of a picture: each entity is present in its number, each relation holds, and there
are no other objects.  RL-RIG (arXiv 2602.19974) checks them, edits pictures to meet them, and takes the share
that is met as the reward.  GenEval's tasks (Ghosh et al. 2023, arXiv 2310.11513) are graphs too; their
entities may leave the colour open.
"""

import math
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from graphlib import CycleError, TopologicalSorter

from ..ranges import Refusal, quote
from .scenes import COLORS, RADIUS, Object, Objects

SHAPES = ("ball", "block", "cone")  # the shapes of GenEval's tasks
SMALL = (*SHAPES, "cylinder")  # shapes that can be on, inside or in front of another
THINGS = (*SMALL, "box")  # all shapes
FLAT = ("block", "cylinder", "box")  # shapes on which another can rest
SYNONYMS = {
    "cube": "block", "sphere": "ball", "on the left of": "left of", "on the right of": "right of",
    "on the bottom of": "below", "on top of": "on", "on the top of": "on",
}  # fmt: skip
NUMBERS = ("no", "one", "two", "three", "four")

RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}  # y points down
TOUCHING = ("on", "inside", "in front of")
PREDICATES = (*RELATIONS, *TOUCHING)
CONVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
DEAD_ZONE = 0.1  # GenEval's: share of the sum of both sizes that is subtracted from the offset

MAX_THINGS, MAX_RELATIONS = 4, 4


class GraphError(Refusal):
    """A scene graph that cannot be drawn; the message is one sentence for the user."""


def holds(predicate: str, a: Object, b: Object) -> bool:
    """Whether the relation "a PREDICATE b" holds.  Raises ValueError if there is no such predicate.

    left of, right of, above, below   the rule of GenEval's evaluate_images.py: the offset along the axis,
                                      minus DEAD_ZONE times the sum of both sizes, exceeds half the distance
                                      between the centres
    on                                the bottom of `a` is within 3 pixels of the top of `b`, and the centres
                                      are at most RADIUS apart horizontally
    inside                            `b` is a box, and the centre of `a` is within 4 pixels of its centre
    in front of                       `a` partly overlaps `b` and is lower: lower shapes are drawn later
    """
    dx, dy = a.xy[0] - b.xy[0], a.xy[1] - b.xy[1]
    reach = a.radius + b.radius  # half the sum of both sizes
    if predicate in RELATIONS:
        ux, uy = RELATIONS[predicate]
        return ux * dx + uy * dy - DEAD_ZONE * 2 * reach > 0.5 * math.hypot(dx, dy)
    dx = abs(dx)
    if predicate == "on":
        return abs(dy + reach) <= 3 and dx <= RADIUS
    if predicate == "inside":
        return b.name == "box" and a.name != "box" and max(dx, abs(dy)) <= 4
    if predicate == "in front of":
        return 2 <= dy < reach and RADIUS / 2 <= dx < reach
    raise ValueError(f"no relation {predicate!r}; there are {', '.join(PREDICATES)}")


def _require(kept: object, message: str) -> None:
    if not kept:
        raise GraphError(message)


@dataclass(frozen=True)
class Entity:
    """`count` objects of one name and colour.  "thing" matches every name, and "" matches every colour."""

    name: str
    color: str = ""
    count: int = 1

    def matches(self, thing: Object) -> bool:
        return self.name in ("thing", thing.name) and self.color in ("", thing.color)

    @property
    def label(self) -> str:
        """The entity as written in a triple: "red ball", "two red balls"."""
        noun = f"{self.color} {self.name}".strip()
        return noun if self.count == 1 else f"{NUMBERS[self.count]} {noun}{'es' if noun[-1] == 'x' else 's'}"

    @property
    def words(self) -> str:
        return f"a {self.label}" if self.count == 1 else self.label


@dataclass(frozen=True)
class Requirement:
    """One requirement: the number of `subject` or, if there is an `object`, the relation between the two."""

    subject: Entity
    predicate: str = ""
    object: Entity | None = None

    @property
    def words(self) -> str:
        return self.subject.words + (f" {self.predicate} {self.object.words}" if self.object else "")

    def met_by(self, things: Objects) -> bool:
        """Whether these objects meet the requirement.

        A relation must hold between every object that matches `subject` and every one that matches `object`,
        and there must be at least one of each.
        """
        subjects = [t for t in things if self.subject.matches(t)]
        if self.object is None:
            return len(subjects) == self.subject.count
        pairs = [(a, b) for a in subjects for b in things if self.object.matches(b)]
        return bool(pairs) and all(holds(self.predicate, a, b) for a, b in pairs)


@dataclass(frozen=True)
class SceneGraph:
    """Entities and relations.  Raises GraphError if one is invalid, or if relations contradict each other."""

    entities: tuple[Entity, ...]
    relations: tuple[tuple[int, str, int], ...] = ()  # index of the subject, predicate, index of the object

    def __post_init__(self) -> None:
        things, relations, singular = sum(e.count for e in self.entities), len(self.relations), set()
        _require(things > 0, "the graph is empty; name at least one thing, such as: red ball on blue box")
        _require(things <= MAX_THINGS, f"the graph has {things} things; at most {MAX_THINGS} fit a picture")
        _require(relations <= MAX_RELATIONS, f"the graph has {relations} relations; only {MAX_RELATIONS} fit")
        for e in self.entities:
            _require_known(e, colors=("", *COLORS))
            one, two = (Entity(e.name, e.color, count).label for count in (1, 2))
            _require(one not in singular, f"{one} is listed twice; use a number instead: {two}")
            singular.add(one)
        for s, predicate, o in self.relations:
            a, b = self.entities[s], self.entities[o]
            said = f"{a.label} {predicate} {b.label}"
            _require(predicate in PREDICATES, f"no relation {predicate!r}; there are {', '.join(PREDICATES)}")
            _require(s != o, f"{said}: an object cannot be related to itself")
            if predicate in TOUCHING:
                base = THINGS if predicate == "in front of" else FLAT
                _require(a.name in SMALL, f"{said}: a {a.name} is too big; {', '.join(SMALL)} are not")
                _require(predicate != "inside" or b.name == "box", f"{said}: only a box has an inside")
                _require(b.name in base, f"{said}: a {b.name} is not flat; {', '.join(FLAT)} are")
                single = a.count == b.count == 1
                _require(single, f"{said}: only a single thing can be {predicate} a single thing")
                colors = a.color != b.color
                _require(colors, f"{said}: things that touch must differ in colour, or they look like one")
        # such as: A is left of B, and B is left of A
        self.in_order(("left of",), ("right of",), "the relations contradict each other")
        self.in_order(("above", "on"), ("below", "in front of"), "the relations contradict each other")

    def in_order(self, forward: tuple[str, ...], backward: tuple[str, ...], why: str) -> list[int]:
        """Sort the indices of the entities.

        The subject of a `forward` relation comes before its object; the subject of a `backward` relation
        comes after its object.
        Raises GraphError if these relations form a cycle.  The message is `why`, followed by the labels in
        the cycle, joined by the first `forward` relation, or by commas if there is none.
        """
        first = {i: set() for i in range(len(self.entities))}  # index -> indices that must come before it
        for s, predicate, o in self.relations:
            if predicate in forward + backward:
                before, after = (s, o) if predicate in forward else (o, s)
                first[after].add(before)
        try:
            return list(TopologicalSorter(first).static_order())
        except CycleError as error:
            joint = f" {forward[0]} " if forward else ", "
            raise GraphError(f"{why}: {joint.join(self.entities[i].label for i in error.args[1])}") from None

    @cached_property
    def requirements(self) -> tuple[Requirement, ...]:
        """The requirements of the entities and the relations, and the total number of objects."""
        e = self.entities
        relations = (Requirement(e[s], p, e[o]) for s, p, o in self.relations)
        return (*map(Requirement, e), *relations, Requirement(Entity("thing", "", sum(x.count for x in e))))

    @property
    def triples(self) -> tuple[tuple[str, str, str], ...]:
        """The relations as strings: ("red ball", "on", "blue box")."""
        return tuple((self.entities[s].label, p, self.entities[o].label) for s, p, o in self.relations)

    @property
    def sentence(self) -> str:
        """The prompt.  Relations come first, then the other entities, joined by "and".

        An entity that was named before has the article "the".
        """
        unnamed, clauses = {i: e.words for i, e in enumerate(self.entities)}, []
        for s, predicate, o in self.relations:
            subject, object_ = (unnamed.pop(i, f"the {self.entities[i].label}") for i in (s, o))
            clauses.append(f"{subject} {predicate} {object_}")
        return " and ".join([*clauses, *unnamed.values()])

    @property
    def content(self) -> tuple[frozenset, frozenset]:
        """The entities and relations as sets; "a left of b" and "b right of a" have the same content."""
        e, turned = self.entities, [(o, CONVERSE[p], s) for s, p, o in self.relations if p in CONVERSE]
        return frozenset(e), frozenset((e[s], p, e[o]) for s, p, o in (*self.relations, *turned))

    def fulfilled_by(self, things: Objects) -> bool:
        """Whether a picture of these objects meets every requirement."""
        return all(r.met_by(things) for r in self.requirements)


def _require_known(entity: Entity, colors: tuple[str, ...] = COLORS) -> None:
    _require(entity.name in THINGS, f"no thing named {quote(entity.name)}; there are {', '.join(THINGS)}")
    _require(entity.color in colors, f"{entity.label}: say its colour, one of {', '.join(COLORS)}")


_NUMBERS, _COLORS = "|".join(NUMBERS[2:]), "|".join(COLORS)
ENTITY = re.compile(rf"(?:(?:a|an|the|one) )?(?:({_NUMBERS}) )?(?:({_COLORS}) )?(\S*)")
CLAUSE = re.compile(rf"(.+?) ({'|'.join(PREDICATES)}) (.+)")


def parse_graph(text: str) -> SceneGraph:
    """Parse triples joined by ";", or a sentence whose clauses are joined by "and" or ",".

    Every entity must have a colour.  Raises GraphError.
    """
    clauses = re.split(r"\s*;\s*|\s*,\s*|\s+and\s+", " ".join(text.lower().split()).rstrip(".;"))
    return graph_of(found.groups() if (found := CLAUSE.fullmatch(c)) else (c,) for c in clauses if c)


def graph_of(clauses: Iterable[tuple[str, ...]]) -> SceneGraph:
    """The graph of triples and single entities in words.  Raises GraphError."""
    entities: dict[str, Entity] = {}  # label in the singular -> entity

    def index_of(words: str) -> int:
        entity = parse_entity(words)
        key = f"{entity.color} {entity.name}"
        known = entities.get(key, entity)
        # "a red ball" may be one of the "two red balls"
        _require(len({1, known.count, entity.count}) < 3, f"{known.label} or {entity.label}? give one number")
        entities[key] = max(known, entity, key=lambda e: e.count)
        return list(entities).index(key)

    relations = []
    for words, *rest in clauses:
        i = index_of(words)
        if rest:
            relations.append((i, rest[0], index_of(rest[1])))
    return SceneGraph(tuple(entities.values()), tuple(dict.fromkeys(relations)))


def parse_entity(words: str) -> Entity:
    """Parse "a red ball", "the red ball", "two red balls" or "red cube".  Raises GraphError."""
    found, known = ENTITY.fullmatch(" ".join(words.split())), ", ".join(PREDICATES)
    _require(found, f"cannot read {quote(words)}: a thing is a colour and a name, and relations are {known}")
    number, color, name = found.groups()
    if number:
        name = name.removesuffix("es" if name.endswith("xes") else "s")
    entity = Entity(SYNONYMS.get(name, name), color or "", NUMBERS.index(number) if number else 1)
    _require_known(entity)
    return entity


def random_graph(rng: random.Random) -> SceneGraph:
    """A graph of random entities and relations.  Raises GraphError if they are not allowed together."""
    wanted, pairs = rng.randint(1, MAX_RELATIONS), []  # number of relations, and pairs that can be related
    while len(pairs) < wanted:
        things = rng.randint(2, MAX_THINGS)
        counts = [2, *[1] * (things - 2)] if things > 2 and rng.random() < 0.25 else [1] * things
        pairs = [(i, j) for i in range(len(counts)) for j in range(i)]
    kinds = rng.sample([(n, c) for n in THINGS for c in COLORS], len(counts))
    # a generator expression, so that the draws alternate with those of the predicates
    ordered = (rng.sample(pair, 2) for pair in rng.sample(pairs, wanted))
    relations = [(s, rng.choice((*PREDICATES, *TOUCHING)), o) for s, o in ordered]
    return SceneGraph(tuple(Entity(n, c, k) for (n, c), k in zip(kinds, counts)), tuple(relations))
