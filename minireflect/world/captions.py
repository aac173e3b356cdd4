"""Texts about a scene: captions, RL-RIG's edit prompts, and ReasonGen-R1's rationales.

An edit prompt (RL-RIG, arXiv 2602.19974) says where objects should be.  The generator of RL-RIG is trained on
three forms of captions:

    a red ball left of a blue box                                      the scene graph
    a red ball left of a blue box with a red ball at the top left      the scene graph and places of objects
    with a red ball at the top left                                    places of objects only

The generator follows a place more easily than a relation.  An Actor therefore looks at the picture and turns
relations into places.

A rationale describes the picture before it is generated.  Scenes of a law have three styles:

    cause      a balance with ... . the red ball is bigger and heavier, so the left pan goes down.
    outcome    a balance with ..., leaning to the left, as the red ball is bigger and heavier, so ... .
    steps      first, the red ball is bigger ..., so ... . then draw a balance with ..., leaning to the left.

If the outcome is unlawful, the style "cause" is "... by nature the red ball ... . instead, leaning to the
right."  The rationale of an arrangement counts the objects and gives the place of each: "two things. a red
ball at the top left. a blue block at the right."

In ReasonGen-R1 (arXiv 2505.24875) a large model writes the rationales, as dense captions.  The rationales
here come from the scene, so they are right or wrong; `read_rationale` parses them.
"""

import re
from collections.abc import Iterable, Sequence, Sized
from contextlib import suppress
from dataclasses import replace
from functools import cache
from random import Random
from typing import NamedTuple

from ..ranges import expect
from .graphs import NUMBERS, PREDICATES, RELATIONS, SHAPES, THINGS, Entity, GraphError, SceneGraph
from .laws import LAWS
from .layout import lay_out
from .prompts import Prompt, law_prompt, prompt_set, split
from .scenes import ARRANGEMENT, COLORS, SPLITS, Object, Objects, Reading, Scene

PLACES = ("top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom", "bottom right")
PROMPT_LENGTH = 64  # tokens: four relations of nine words, two places of eight, and the words that join them
MAX_HINTS = 2  # objects of which an edit prompt gives the place, at most
# Probability that a training caption of a graph keeps a relation; otherwise the relation is random.  Captions
# on the web also name objects reliably and relations badly.  The errors leave RL something to improve.
RELATION_ACCURACY = 0.5


def caption(scene: Scene) -> str:
    """One sentence: every fact of a law's scene, its outcome included; or the objects of an arrangement."""
    if expect(scene, Scene, "scene").law != ARRANGEMENT:
        return law_prompt(scene.law, scene.objects, scene.outcome).text
    return " and ".join(f"a {thing.words}" for thing in scene.objects)


def place(xy: tuple[int, int]) -> str:
    """The name of one of nine places of a picture, such as "top left".  `xy` is in pixels."""
    column, row = ((v >= 25) + (v >= 40) for v in xy)
    return PLACES[3 * row + column]


def hint(thing: Object) -> str:
    """An object and its place: "a red ball at the top left"."""
    return f"a {thing.words} at the {thing.place or place(thing.xy)}"


def hints(things: Iterable[Object]) -> str:
    return " and ".join(map(hint, things))


def edit_prompt(graph: SceneGraph, places: str = "") -> str:
    """The text that the editor reads: the graph's sentence, followed by the places of some objects."""
    return f"{graph.sentence} with {places}" if places else graph.sentence


def training_caption(graph: SceneGraph, scene: Scene, rng: Random, accuracy: float) -> str:
    """A random caption of the scene: the graph's sentence, places of objects, both, or some requirements.

    accuracy: probability that the caption keeps a relation, see `randomise_relations`.
    """
    graph = randomise_relations(graph, rng, accuracy)
    objects = scene.objects
    some = hints(rng.sample(objects, rng.randint(1, min(MAX_HINTS, len(objects)))))
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
    """Keep each relation with probability `accuracy`; otherwise replace it with another possible one."""
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
    """The edit prompt of a scripted Actor: lay out the graph and give the places of objects that are wrong.

    met: whether the picture meets each of the graph's requirements, in their order.
    seen: the scene in the picture.  The layout keeps the objects that are right where they are in it.
        Without `seen`, all objects get new places.
    Returns "" if every requirement is met, or if no layout is found.
    """
    if all(met):
        return ""
    n = len(graph.entities)
    unmet = [r for r, ok in zip(graph.relations, met[n:]) if not ok]
    # correct the entities in the wrong number, and one random entity of each unmet relation
    wrong = [i for i in range(n) if not met[i]]
    for s, _, o in unmet:
        if s not in wrong and o not in wrong:
            wrong.append(rng.choice((s, o)))
    wrong = wrong or [rng.randrange(n)]  # too many objects: choose any entity
    single = [(i, e) for i, e in enumerate(graph.entities) if seen and i not in wrong and e.count == 1]
    right = {i: thing.xy for i, e in single for thing in seen.objects if e.matches(thing)}
    layout = None
    for keep in (right, {}):
        with suppress(GraphError):
            layout = layout or lay_out(graph, rng, keep, tries=20)
    if layout is None:
        return ""
    related = [i for s, _, o in unmet if {s, o} & set(wrong) for i in (s, o)]  # in the order of the sentence
    entities = [graph.entities[i] for i in dict.fromkeys([i for i in wrong if i not in related] + related)]
    return hints([thing for e in entities for thing in layout.objects if e.matches(thing)][:MAX_HINTS])


# ------------------------------------------------------------------------------------------------- rationales
WORDINGS = {  # style -> templates for a lawful and for an unlawful outcome
    "cause": ("{setting}. {because}.", "{setting}. by nature {because}. instead, {result}."),
    "outcome": ("{shown}, as {because}.", "{shown}, although by nature {because}."),
    "steps": ("first, {because}. then draw {shown}.", "by nature, {because}. against it, draw {shown}."),
}
LAW_STYLES = tuple(WORDINGS)
ARRANGEMENT_STYLES = ("rows", "columns", "any")  # order of the objects
_COLORS, _SHAPES, _PLACES = ("|".join(words) for words in (COLORS, SHAPES, PLACES))
THING = re.compile(rf"a ({_COLORS}) ({_SHAPES}) at the ({_PLACES})(?= a |$)")


class Plan(NamedTuple):
    """The facts that a rationale states.  They are those of a scene, but shapes have one of nine places."""

    law: str  # a key of LAWS, or ARRANGEMENT
    objects: Objects  # those of an arrangement are sorted, and have a `place` but no `xy`
    outcome: str

    def shown_in(self, reading: Reading) -> bool:
        """Whether the picture that was read shows what the rationale states."""
        return reading.scene is not None and plan_of(reading.scene) == self

    def fulfils(self, prompt: Prompt) -> bool:
        """Whether a picture of this plan fulfils the prompt.  Relations are judged by the nine places."""
        graph = prompt.graph
        if graph is None:
            return self == prompt.content
        numbers = [r for r in graph.requirements if not r.object]
        if self.law != ARRANGEMENT or not all(r.met_by(self.objects) for r in numbers):
            return False
        at = [next(t.place for t in self.objects if e.matches(t)) for e in graph.entities]
        return all(_compatible(predicate, at[s], at[o]) for s, predicate, o in graph.relations)


def _compatible(relation: str, a: str, b: str) -> bool:
    """Whether an object at place `a` can have this relation to one at `b`: the places do not exclude it."""
    (ay, ax), (by, bx) = (divmod(PLACES.index(where), 3) for where in (a, b))
    x, y = RELATIONS[relation]
    return x * (ax - bx) + y * (ay - by) >= 0


def plan_of(scene: Scene) -> Plan:
    """The plan of a scene: the facts that its rationale must state."""
    if scene.law != ARRANGEMENT:
        return Plan(*scene.facts)
    return _arrangement_plan([replace(o, place=place(o.xy), xy=None) for o in scene.objects])


def _arrangement_plan(things: list[Object]) -> Plan:
    """The plan of objects that have a `place`, in any order."""
    return Plan(ARRANGEMENT, tuple(sorted(things, key=lambda o: (o.name, o.color, o.place))), "")


def rationale(scene: Scene, style: str = "", rng: Random | None = None) -> str:
    """Describe a scene in one of the forms at the top of this file.

    style: one of LAW_STYLES or, for an arrangement, of ARRANGEMENT_STYLES.  The default is a random style if
        `rng` is given, else the first.
    Raises ValueError if the scene has no such style.
    """
    styles = ARRANGEMENT_STYLES if expect(scene, Scene, "scene").law == ARRANGEMENT else LAW_STYLES
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
    """The rationale of a scene of the law with this name."""
    law = LAWS[name]
    setting, because, result = law.setting(objects), law.because(objects), law.outcomes[outcome]
    wording = WORDINGS[style][outcome != law.lawful(objects)]
    return wording.format(setting=setting, because=because, result=result, shown=f"{setting}, {result}")


def rationale_vocabulary() -> list[str]:
    """Texts that contain every word of a rationale."""
    return [*_law_rationales(), *NUMBERS[1:], "thing things a at the", *COLORS, *SHAPES, *PLACES]


def graph_vocabulary() -> list[str]:
    """Every word of scene graphs, their prompts and their requirements, sorted."""
    counted = [Entity(name, "", count).label for name in (*THINGS, "thing") for count in (1, 2)]
    texts = (*counted, *COLORS, *NUMBERS, *PREDICATES, *PLACES, "a the and with at yes")
    return sorted(set(" ".join(texts).split()))


def read_rationale(text: str) -> Plan | None:
    """Parse a rationale.  Returns None unless every word fits.  Case and punctuation are ignored."""
    words = " ".join(split(text))
    return _law_rationales().get(words) or _read_things(words)


@cache
def _law_rationales() -> dict[str, Plan]:
    """Every rationale of a law's scene, without punctuation, and its plan."""
    plans = [Plan(p.law, p.objects, p.outcome) for part in SPLITS for p in prompt_set("stated", part)]
    return {" ".join(split(_explain(*plan, style))): plan for plan in plans for style in LAW_STYLES}


def _read_things(text: str) -> Plan | None:
    """Parse "NUMBER thing(s)" and then "a COLOUR SHAPE at the PLACE" for each object; else None."""
    things = [Object(name, color, place=where) for color, name, where in THING.findall(text)]
    if len(things) >= len(NUMBERS) or text != " ".join([_how_many(things), *map(hint, things)]):
        return None
    return _arrangement_plan(things) if things else None


def _how_many(things: Sized) -> str:
    return f"{NUMBERS[len(things)]} thing{'s' if len(things) > 1 else ''}"
