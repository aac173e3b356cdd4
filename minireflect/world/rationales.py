"""Thinking in words before drawing: a plan of the picture, in several styles, and what such a plan says, read back.

    cause      a balance with a big red ball on the left pan and ... . the red ball is bigger and heavier, so the left pan goes down.
    outcome    a balance with ..., leaning to the left, as the red ball is bigger and heavier, so the left pan goes down.
    steps      first, the red ball is bigger and heavier, so the left pan goes down. then draw a balance with ..., leaning to the left.
               and against the law: "... by nature the red ball ... . instead, leaning to the right."

    arrangements: how many things there are, and where each is: "two things. a red ball at the top left. a blue block at the right."

These are the rationales of ReasonGen-R1 (arXiv 2505.24875), whose are dense captions written by a large model.  Ours say what the law makes
of the scene, so that they can be right or wrong: `read_rationale` is the parser that says what a plan promises, and a sentence outside of this grammar
promises nothing.
"""

import random
from functools import cache
from typing import NamedTuple

from .graphs import NUMBERS, SHAPES, Task
from .laws import LAWS
from .layout import COLUMNS, ROWS, place
from .prompts import Prompt, combinations, split
from .scenes import COLORS, Object, Reading, Scene

LAW_STYLES = ("cause", "outcome", "steps")


ARRANGEMENT_STYLES = ("rows", "columns", "any")  # the order in which the things are told


PLACES = tuple(f"{row} {column}".strip() or "middle" for row in ROWS for column in COLUMNS)


class Plan(NamedTuple):
    """What a rationale promises to draw."""

    law: str  # a key of LAWS, or "arrangement"
    objects: tuple[Object, ...]  # of a law
    outcome: str
    things: tuple[tuple[str, str, str], ...] = ()  # of an arrangement: sorted (name, colour, place)

    def shown_in(self, reading: Reading) -> bool:
        """Whether a picture keeps the promise."""
        return reading.scene is not None and plan_of(reading.scene) == self

    def fulfils(self, prompt: Prompt) -> bool:
        """Whether a picture that keeps the promise is what the prompt asks for, as far as places in ninths can tell."""
        if prompt.task is None:
            return (self.law, self.objects, self.outcome) == (prompt.law, prompt.objects, prompt.outcome)
        return self.law == "arrangement" and _could_fulfil(self.things, prompt.task)


def plan_of(scene: Scene) -> Plan:
    """What a rationale of this scene has to say."""
    if scene.law != "arrangement":
        return Plan(scene.law, scene.objects, scene.outcome)
    return Plan("arrangement", (), "", tuple(sorted((o.name, o.color, place(o.xy)) for o in scene.objects)))


def rationale(scene: Scene, style: str = "", draw: random.Random | None = None) -> str:
    """A plan of the picture: what is in it, where, and what the law makes of it (or that it is defied).

    `style` is one of LAW_STYLES or ARRANGEMENT_STYLES; without one the first, or with `draw` any.  Raises ValueError on another.
    """
    styles = ARRANGEMENT_STYLES if scene.law == "arrangement" else LAW_STYLES
    style = style or (draw.choice(styles) if draw else styles[0])
    if style not in styles:
        raise ValueError(f"no style {style!r} for {scene.law}; there are {', '.join(styles)}")
    if scene.law == "arrangement":
        return _told(scene, style, draw or random.Random(0))
    return _reasoned(scene.law, scene.objects, scene.outcome, style)


def vocabulary() -> list[str]:
    """Every rationale of the laws, and words enough for those of arrangements."""
    things = [f"a {c} {n} at the {where}" for n in SHAPES for c in COLORS for where in PLACES]
    return [*_law_rationales(), *(f"{n} thing things" for n in NUMBERS[1:]), *things]


def _told(scene: Scene, style: str, draw: random.Random) -> str:
    things = list(scene.objects)
    if style == "any":
        draw.shuffle(things)
    else:
        things.sort(key=lambda o: o.xy[::-1] if style == "rows" else o.xy)
    count = f"{NUMBERS[len(things)]} thing{'s' if len(things) > 1 else ''}"
    return " ".join([f"{count}.", *(f"a {t.words} at the {place(t.xy)}." for t in things)])


def _reasoned(name: str, objects: tuple[Object, ...], outcome: str, style: str) -> str:
    law = LAWS[name]
    setting, because, result = law.setting(objects), law.because(objects), law.result(objects, outcome)
    shown = f"{setting}, {result}"
    if outcome == law.lawful(objects):
        return {
            "cause": f"{setting}. {because}.",
            "outcome": f"{shown}, as {because}.",
            "steps": f"first, {because}. then draw {shown}.",
        }[style]
    return {
        "cause": f"{setting}. by nature {because}. instead, {result}.",
        "outcome": f"{shown}, although by nature {because}.",
        "steps": f"by nature, {because}. against it, draw {shown}.",
    }[style]


def read_rationale(text: str) -> Plan | None:
    """What a rationale promises; None when it is not one of ours, to the last word.  Case and punctuation play no part."""
    words = split(text)
    return _law_rationales().get(" ".join(words)) or _read_things(words)


@cache
def _law_rationales() -> dict[str, Plan]:
    """Every rationale of the laws there is, by its words."""
    return {
        " ".join(split(_reasoned(name, objects, outcome, style))): Plan(name, objects, outcome)
        for name, law in LAWS.items()
        for part in ("train", "held-out")
        for objects in combinations(name, part)
        for outcome in law.possible(objects)
        for style in LAW_STYLES
    }


def _read_things(words: list[str]) -> Plan | None:
    """number thing(s) (a colour shape at the place)+"""
    if len(words) < 2 or words[0] not in NUMBERS[1:] or words[1] not in ("thing", "things"):
        return None
    count, things = NUMBERS.index(words[0]), []
    if (words[1] == "thing") != (count == 1):
        return None
    for sentence in " ".join(words[2:]).split("a ")[1:] if words[2:3] == ["a"] else []:
        thing, _, where = sentence.strip().partition(" at the ")
        color, _, name = thing.partition(" ")
        if color not in COLORS or name not in SHAPES or where not in PLACES:
            return None
        things.append((name, color, where))
    return Plan("arrangement", (), "", tuple(sorted(things))) if len(things) == count else None


def _could_fulfil(things: tuple[tuple[str, str, str], ...], task: Task) -> bool:
    """Names, colours and numbers exactly; a relation, unless the places contradict it."""
    chosen = [[t for t in things if t[0] == c.name and c.color in ("", t[1])] for c in task.clauses]
    if any(len(found) != c.count for found, c in zip(chosen, task.clauses)):
        return False
    if len(things) != sum(c.count for c in task.clauses):
        return False
    return not task.relation or _compatible(task.relation, chosen[0][0][2], chosen[1][0][2])


def _compatible(relation: str, a: str, b: str) -> bool:
    """Whether things at these places may stand so: never farther the other way along the axis in question."""

    def cell(where: str) -> tuple[int, int]:
        i = PLACES.index(where)
        return i % 3, i // 3

    (ax, ay), (bx, by) = cell(a), cell(b)
    along = {"left of": bx - ax, "right of": ax - bx, "above": by - ay, "below": ay - by}[relation]
    return along >= 0
