"""All that is said of a scene: captions, RL-RIG's edit prompts, and ReasonGen-R1's rationales.

A caption states every fact.  An edit prompt (RL-RIG, arXiv 2602.19974) says what to change; the generator is
trained on all three forms, so that they can steer its inversion:

    a red ball left of a blue box                                      all that the picture must show
    a red ball left of a blue box with a red ball at the top left      ... and where to put the ball
    with a red ball at the top left                                    that, and anything else

A relation is hard to draw and a place is easy; so an Actor that looks at the picture and turns one into the
other has something to reason about.  A rationale is a plan of the picture, written before it is drawn:

    cause      a balance with ... . the red ball is bigger and heavier, so the left pan goes down.
    outcome    a balance with ..., leaning to the left, as the red ball is bigger and heavier, so ... .
    steps      first, the red ball is bigger ..., so ... . then draw a balance with ..., leaning to the left.
               and against the law: "... by nature the red ball ... . instead, leaning to the right."
    arrangements: how many objects, and where each is: "two things. a red ball at the top left. a blue block
    at the right."

Rationales take the place of those of ReasonGen-R1 (arXiv 2505.24875), dense captions by a large model.  Ours
state what the law makes of the scene, so they can be right or wrong: `read_rationale` reads them back.
"""

import re
from collections.abc import Iterable, Sequence, Sized
from contextlib import suppress
from dataclasses import replace
from functools import cache
from random import Random
from typing import NamedTuple

from ..ranges import checked
from .graphs import NUMBERS, PREDICATES, RELATIONS, SHAPES, THINGS, Entity, GraphError, SceneGraph
from .laws import law_of
from .layout import lay_out
from .prompts import Prompt, law_prompt, prompt_set, split
from .scenes import ARRANGEMENT, COLORS, SPLITS, Object, Objects, Reading, Scene

PLACES = ("top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom", "bottom right")
PROMPT_LENGTH = 64  # tokens: four relations of nine words, two places of eight, and the words that join them
HINTS = 2  # places that an edit prompt names, at most
# Share of the relations that a training caption of a graph gives correctly; the others are random.  Captions
# on the web also name objects reliably and relations badly, and RL needs something to improve.
RELATION_ACCURACY = 0.5


@checked
def caption(scene: Scene) -> str:
    """One sentence that states every fact of the scene, the outcome included."""
    if scene.law != ARRANGEMENT:
        return law_prompt(scene.law, scene.objects, scene.outcome).text
    return " and ".join(f"a {thing.words}" for thing in scene.objects)


def place(xy: tuple[int, int]) -> str:
    """One of nine places of a picture: "top left", "right", "middle"."""
    column, row = ((v >= 25) + (v >= 40) for v in xy)
    return PLACES[3 * row + column]


def hint(thing: Object) -> str:
    """An object with its place, or with the place where it should be: "a red ball at the top left"."""
    return f"a {thing.words} at the {place(thing.xy)}"


def hints(things: Iterable[Object]) -> str:
    return " and ".join(map(hint, things))


def edit_prompt(graph: SceneGraph, places: str = "") -> str:
    """The graph's sentence, with the places of some objects."""
    return f"{graph.sentence} with {places}" if places else graph.sentence


def training_caption(graph: SceneGraph, scene: Scene, rng: Random, accuracy: float) -> str:
    """A random caption for the generator: the graph's sentence, places of objects, both, or some facts."""
    graph = randomise_relations(graph, rng, accuracy)
    objects = scene.objects
    some = hints(rng.sample(objects, rng.randint(1, min(HINTS, len(objects)))))
    form = rng.random()
    if form < 0.6:
        return edit_prompt(graph, some if form >= 0.35 else "")
    if form < 0.7:
        return f"with {some}"
    if form < 0.9:
        return f"with {hints(rng.sample(objects, len(objects)))}"
    facts = rng.sample(graph.requirements[:-1], min(2, len(graph.requirements) - 1))
    return f"with {' and '.join(r.words for r in facts)}"


def randomise_relations(graph: SceneGraph, rng: Random, accuracy: float) -> SceneGraph:
    """Keep each relation with probability `accuracy`, otherwise replace it by another possible one."""
    for i, (s, predicate, o) in enumerate(graph.relations):
        if rng.random() < accuracy:
            continue
        for other in rng.sample([p for p in PREDICATES if p != predicate], len(PREDICATES) - 1):
            changed = (*graph.relations[:i], (s, other, o), *graph.relations[i + 1 :])
            with suppress(GraphError):
                graph = replace(graph, relations=changed)
                break
    return graph


def scripted_edit(graph: SceneGraph, met: Sequence[bool], rng: Random, seen: Scene | None = None) -> str:
    """The places of an edit prompt, by script: lay out the graph and name objects that are not right yet.

    `met` are the answers to the graph's requirements.  With the scene that is `seen` in the picture, what is
    right stays where it is and the layout is found around it; without one, the layout is new.  "" if all are
    met or there is no layout.
    """
    if not (wrong := unmet_entities(graph, met, rng)):
        return ""
    single = [(i, e) for i, e in enumerate(graph.entities) if seen and i not in wrong and e.count == 1]
    right = {i: thing.xy for i, e in single for thing in seen.objects if e.matches(thing)}
    layout = None
    for keep in (right, {}):
        with suppress(GraphError):
            layout = layout or lay_out(graph, rng, keep, layouts=20)
    if layout is None:
        return ""
    unmet = [r for r, ok in zip(graph.relations, met[len(graph.entities) :]) if not ok]
    related = [i for s, _, o in unmet if {s, o} & set(wrong) for i in (s, o)]  # in the order of the sentence
    entities = [graph.entities[i] for i in dict.fromkeys([i for i in wrong if i not in related] + related)]
    return hints([thing for e in entities for thing in layout.objects if e.matches(thing)][:HINTS])


def unmet_entities(graph: SceneGraph, met: Sequence[bool], rng: Random) -> list[int]:
    """The entities to correct: those that are missing, and one of each relation that does not hold."""
    n = len(graph.entities)
    wrong = [i for i in range(n) if not met[i]]
    for (s, _, o), ok in zip(graph.relations, met[n:]):
        if not ok and s not in wrong and o not in wrong:
            wrong.append(rng.choice((s, o)))
    if not wrong and not all(met):  # too many objects: give the place of one
        wrong = [rng.randrange(n)]
    return wrong


# ------------------------------------------------------------------------------------------------- rationales
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
        graph = prompt.graph
        if graph is None:
            return self == (prompt.law, prompt.objects, prompt.outcome)
        numbers = [r for r in graph.requirements if not r.object]
        if self.law != ARRANGEMENT or not all(r.met_by(self.objects) for r in numbers):
            return False
        at = [next(t.place for t in self.objects if e.matches(t)) for e in graph.entities]
        return all(_compatible(predicate, at[s], at[o]) for s, predicate, o in graph.relations)


def _compatible(relation: str, a: str, b: str) -> bool:
    """Whether objects at these places may have this relation: their places do not contradict it."""
    (ay, ax), (by, bx) = (divmod(PLACES.index(where), 3) for where in (a, b))
    x, y = RELATIONS[relation]
    return x * (ax - bx) + y * (ay - by) >= 0


def plan_of(scene: Scene) -> Plan:
    """The facts that a rationale of this scene must state."""
    if scene.law != ARRANGEMENT:
        return Plan(*scene.facts)
    return _arrangement_plan([(o.name, o.color, place(o.xy)) for o in scene.objects])


def _arrangement_plan(things: list[tuple[str, str, str]]) -> Plan:
    """The plan of (name, colour, place) triples in any order."""
    objects = tuple(Object(name, color, place=where) for name, color, where in sorted(things))
    return Plan(ARRANGEMENT, objects, "")


@checked
def rationale(scene: Scene, style: str = "", rng: Random | None = None) -> str:
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
        (rng or Random(0)).shuffle(things)
    else:
        things.sort(key=lambda o: o.xy[::-1] if style == "rows" else o.xy)
    return " ".join(f"{sentence}." for sentence in (_how_many(things), *map(hint, things)))


def _explain(name: str, objects: Objects, outcome: str, style: str) -> str:
    """The rationale of a law's scene."""
    law = law_of(name, objects, outcome)
    setting, because, result = law.setting(objects), law.because(objects), law.outcomes[outcome]
    wording = WORDINGS[style][outcome != law.lawful(objects)]
    return wording.format(setting=setting, because=because, result=result, shown=f"{setting}, {result}")


def rationale_vocabulary() -> list[str]:
    """Every rationale of the laws, and texts with all words of the arrangements' rationales."""
    things = [f"a {c} {n} at the {where}" for n in SHAPES for c in COLORS for where in PLACES]
    return [*_law_rationales(), *(f"{n} thing things" for n in NUMBERS[1:]), *things]


def graph_vocabulary() -> list[str]:
    """Every word of graphs, their prompts and their requirements, in a fixed order."""
    counted = [Entity(name, "", count).label for name in (*THINGS, "thing") for count in (1, 2)]
    texts = (*counted, *COLORS, *NUMBERS, *PREDICATES, *PLACES, "a the and with at yes")
    return sorted(set(" ".join(texts).split()))


def read_rationale(text: str) -> Plan | None:
    """The plan that a rationale states; None unless every word fits.  Case and punctuation play no part."""
    words = " ".join(split(text))
    return _law_rationales().get(words) or _read_things(words)


@cache
def _law_rationales() -> dict[str, Plan]:
    """Every rationale of the laws, as words without punctuation, with its plan."""
    plans = [Plan(p.law, p.objects, p.outcome) for part in SPLITS for p in prompt_set("stated", part)]
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
