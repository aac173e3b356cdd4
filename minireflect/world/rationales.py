"""Rationales: a plan of the picture in words, written before it is drawn; and the parser that reads one back.

    cause      a balance with ... . the red ball is bigger and heavier, so the left pan goes down.
    outcome    a balance with ..., leaning to the left, as the red ball is bigger and heavier, so ... .
    steps      first, the red ball is bigger ..., so ... . then draw a balance with ..., leaning to the left.
               and against the law: "... by nature the red ball ... . instead, leaning to the right."

    arrangements: how many objects, and where each is: "two things. a red ball at the top left. a blue block
    at the right."

They take the place of the rationales of ReasonGen-R1 (arXiv 2505.24875), which are dense captions by a large
model.  Ours state what the law makes of the scene, so they can be right or wrong.  `read_rationale` gives the
plan that a text states, and None for a text outside this grammar.
"""

import random
import re
from collections.abc import Sized
from functools import cache
from typing import NamedTuple

from .captions import hint
from .graphs import NUMBERS, RELATIONS, SHAPES
from .laws import LAWS
from .layout import PLACES, place
from .prompts import SPLITS, Prompt, combinations, split
from .scenes import ARRANGEMENT, COLORS, Object, Objects, Reading, Scene

WORDINGS = {  # by style: of a lawful outcome, and of an unlawful one
    "cause": ("{setting}. {because}.", "{setting}. by nature {because}. instead, {result}."),
    "outcome": ("{shown}, as {because}.", "{shown}, although by nature {because}."),
    "steps": ("first, {because}. then draw {shown}.", "by nature, {because}. against it, draw {shown}."),
}
LAW_STYLES = tuple(WORDINGS)
ARRANGEMENT_STYLES = ("rows", "columns", "any")  # the order in which the objects are listed
_COLORS, _SHAPES, _PLACES = ("|".join(words) for words in (COLORS, SHAPES, PLACES))
THING = re.compile(rf"a ({_COLORS}) ({_SHAPES}) at the ({_PLACES})(?= a |$)")


class Plan(NamedTuple):
    """The facts that a rationale states: those of a scene, where shapes are at one of nine places."""

    law: str  # a key of LAWS, or ARRANGEMENT
    objects: Objects  # of an arrangement in a fixed order, with `place` and without `xy`
    outcome: str

    def shown_in(self, reading: Reading) -> bool:
        """Whether a picture shows what the rationale states."""
        return reading.scene is not None and plan_of(reading.scene) == self

    def fulfils(self, prompt: Prompt) -> bool:
        """Whether a picture of this plan is what the prompt asks for, as far as nine places can tell."""
        if prompt.graph is None:
            return self == (prompt.law, prompt.objects, prompt.outcome)
        graph = prompt.graph
        if self.law != ARRANGEMENT or not all(
            r.met_by(self.objects) for r in graph.requirements if not r.object
        ):
            return False
        at = [next(t.place for t in self.objects if e.matches(t)) for e in graph.entities]
        return all(_compatible(predicate, at[s], at[o]) for s, predicate, o in graph.relations)


def _compatible(relation: str, a: str, b: str) -> bool:
    """Whether objects at these places may be so related: not in the opposite direction."""
    (ay, ax), (by, bx) = (divmod(PLACES.index(where), 3) for where in (a, b))
    x, y = RELATIONS[relation]
    return x * (ax - bx) + y * (ay - by) >= 0


def plan_of(scene: Scene) -> Plan:
    """The facts that a rationale of this scene must state."""
    if scene.law != ARRANGEMENT:
        return Plan(*scene.facts)
    return _arrangement_plan([(o.name, o.color, place(o.xy)) for o in scene.objects])


def _arrangement_plan(things: list[tuple[str, str, str]]) -> Plan:
    """Of (name, colour, place) triples in any order."""
    objects = tuple(Object(name, color, place=where) for name, color, where in sorted(things))
    return Plan(ARRANGEMENT, objects, "")


def rationale(scene: Scene, style: str = "", rng: random.Random | None = None) -> str:
    """A plan of the picture: what is in it, where, and what the law makes of it (or that the law is defied).

    `style` is one of LAW_STYLES or ARRANGEMENT_STYLES; without one the first, or with `rng` a random one.
    Raises ValueError.
    """
    styles = ARRANGEMENT_STYLES if scene.law == ARRANGEMENT else LAW_STYLES
    style = style or (rng.choice(styles) if rng else styles[0])
    if style not in styles:
        raise ValueError(f"no style {style!r} for {scene.law}; there are {', '.join(styles)}")
    if scene.law != ARRANGEMENT:
        return _explain(scene.law, scene.objects, scene.outcome, style)
    things = list(scene.objects)
    if style == "any":
        (rng or random.Random(0)).shuffle(things)
    else:
        things.sort(key=lambda o: o.xy[::-1] if style == "rows" else o.xy)
    return " ".join(f"{sentence}." for sentence in (_how_many(things), *map(hint, things)))


def _explain(name: str, objects: Objects, outcome: str, style: str) -> str:
    """The rationale of a law's scene."""
    law = LAWS[name]
    setting, because, result = law.setting(objects), law.because(objects), law.outcomes[outcome]
    wording = WORDINGS[style][outcome != law.lawful(objects)]
    return wording.format(setting=setting, because=because, result=result, shown=f"{setting}, {result}")


def vocabulary() -> list[str]:
    """Every rationale of the laws, and texts with all words of those of arrangements."""
    things = [f"a {c} {n} at the {where}" for n in SHAPES for c in COLORS for where in PLACES]
    return [*_law_rationales(), *(f"{n} thing things" for n in NUMBERS[1:]), *things]


def read_rationale(text: str) -> Plan | None:
    """The plan that a rationale states; None unless every word fits.  Case and punctuation play no part."""
    words = " ".join(split(text))
    return _law_rationales().get(words) or _read_things(words)


@cache
def _law_rationales() -> dict[str, Plan]:
    """Every rationale of the laws, as words without punctuation, with its plan."""
    scenes = [
        (name, part, o) for name, law in LAWS.items() for part in SPLITS for o in combinations(name, part)
    ]
    plans = [Plan(law, objects, outcome) for law, _, objects in scenes for outcome in LAWS[law].outcomes]
    return {" ".join(split(_explain(*plan, style))): plan for plan in plans for style in LAW_STYLES}


def _read_things(text: str) -> Plan | None:
    """number thing(s) (a colour shape at the place)+"""
    things = [(name, color, where) for color, name, where in THING.findall(text)]
    sentences = [f"a {color} {name} at the {where}" for name, color, where in things]
    if len(things) >= len(NUMBERS) or text != " ".join([_how_many(things), *sentences]):
        return None
    return _arrangement_plan(things) if things else None


def _how_many(things: Sized) -> str:
    return f"{NUMBERS[len(things)]} thing{'s' if len(things) > 1 else ''}"
