"""A scene in words: its caption and its graph of triples; the reasons for it are in rationales.py."""

import random
from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from .data import Captioned
from .graphs import NUMBERS, PREDICATES, RELATIONS, THINGS, GraphError, SceneGraph, holds
from .laws import LAWS
from .layout import COLUMNS, ROWS, lay_out, place, sample_picture
from .prompts import law_prompt
from .render import render_pixels
from .scenes import COLORS, Object, Scene

# What is said of a scene graph's picture: prompts that say everything, and edit prompts that say what to change.
#
#     a red ball left of a blue box                                                        everything that is to be seen
#     a red ball left of a blue box with a red ball at the top left                        ... and where to put the ball
#     with a red ball at the top left                                                      that, and whatever else is there
#
# RL-RIG's edit prompts (arXiv 2602.19974) are sentences of this kind: the Diffuser learns to draw from all of them, so that its
# inversion can be steered by them.  A relation is hard to draw and a place is easy; an Actor that turns the one into the
# other, looking at what is there already, has something to reason about.


def caption(scene: Scene) -> str:
    """One sentence that says everything a checker would look for, the outcome included."""
    if scene.law != "arrangement":
        return law_prompt(scene.law, scene.objects, scene.outcome).text
    return " and ".join(f"a {thing.words}" for thing in scene.objects)


def graph(scene: Scene) -> list[tuple[str, str, str]]:
    """(subject, relation, object) triples that hold in the scene; arrangements list every relation of every pair."""
    if scene.law != "arrangement":
        return LAWS[scene.law].triples(scene.objects, scene.outcome)
    return [
        (a.words, relation, b.words)
        for a in scene.objects
        for b in scene.objects
        if a is not b
        for relation in RELATIONS
        if holds(relation, a.xy, b.xy)
    ]


PROMPT_LENGTH = 64  # tokens: four relations of nine words, two places of eight, and what joins them


HINTS = 2  # places that an edit prompt names, at most


def graph_vocabulary() -> list[str]:
    """Every word of graphs, their prompts and their requirements, in a fixed order."""
    plural = [f"{n}es" if n.endswith("x") else f"{n}s" for n in (*THINGS, "thing")]
    words = {
        *THINGS,
        "thing",
        *plural,
        *COLORS,
        *NUMBERS[1:],
        *ROWS,
        *COLUMNS,
        "middle",
        "a",
        "the",
        "and",
        "with",
        "at",
        "yes",
        "no",
    }
    words |= {word for p in PREDICATES for word in p.split()}
    return sorted(words - {""})


def hint(thing: Object) -> str:
    """Where a thing is, or is to be."""
    return f"a {thing.color} {thing.name} at the {place(thing.xy)}"


def edit_prompt(graph: SceneGraph, hints: Sequence[str] = ()) -> str:
    """The graph's sentence, and where to put what."""
    return " with ".join([graph.sentence, " and ".join(hints)]) if hints else graph.sentence


def hearsay(graph: SceneGraph, draw: random.Random, told: float) -> SceneGraph:
    """The graph as somebody describes it who is sure of the things, but of the relations only in the share `told`.

    Of the others each is replaced by another relation that could be, as far as there is one.
    """
    for i, (s, predicate, o) in enumerate(graph.relations):
        if draw.random() < told:
            continue
        for other in draw.sample([p for p in PREDICATES if p != predicate], len(PREDICATES) - 1):
            relations = [*graph.relations[:i], (s, other, o), *graph.relations[i + 1 :]]
            try:
                graph = SceneGraph(graph.entities, tuple(relations))
                break
            except GraphError:
                continue
    return graph


def training_caption(graph: SceneGraph, scene: Scene, draw: random.Random, told: float) -> str:
    """What the Diffuser reads beside a picture: mostly the sentence, often with places; else the places of some or all things, or facts."""
    graph = hearsay(graph, draw, told)
    some = [hint(t) for t in draw.sample(scene.objects, draw.randint(1, min(HINTS, len(scene.objects))))]
    way = draw.random()
    if way < 0.35:
        return graph.sentence
    if way < 0.6:
        return edit_prompt(graph, some)
    if way < 0.7:
        return f"with {' and '.join(some)}"
    if way < 0.9:
        return every_place(scene, draw)
    facts = draw.sample(graph.requirements[:-1], min(2, len(graph.requirements) - 1))
    return f"with {' and '.join(r.words for r in facts)}"


def every_place(scene: Scene, draw: random.Random) -> str:
    """Where everything is, in any order."""
    return f"with {' and '.join(hint(t) for t in draw.sample(scene.objects, len(scene.objects)))}"


def captioned_graphs(n: int, draw: random.Random, told: float) -> Captioned:
    """Pictures of training graphs with their captions.  Plain are those that say where everything is: words are learnt from these."""
    pixels, captions, plain = np.empty((n, 64, 64, 3), np.uint8), [], []
    for i in tqdm(range(n), desc="drawing scene graphs", unit="picture", leave=False):
        graph, scene = sample_picture(draw)
        pixels[i] = render_pixels(scene)
        captions.append(training_caption(graph, scene, draw, told))
        if captions[-1].count(" at the ") == len(scene.objects):
            plain.append(i)
    return Captioned(pixels, captions, plain, graph_vocabulary())


# ------------------------------------------------------------------------------------------------ what a planner would say
def plan(graph: SceneGraph, met: Sequence[bool], draw: random.Random, there: Scene | None = None) -> str:
    """Scripted edit prompt: a layout of the graph is thought up, and the places of what is not right yet are named, and of what it relates to.

    With the scene that is `there`, what is right stays where it is and the layout is found around it; without, the script
    plans blindly.  `met` are the answers to the graph's requirements.  Nothing is said when all are met, or no layout is found: "".
    """
    wrong = unmet_entities(graph, met, draw)
    if not wrong:
        return ""
    right = {
        i: thing.xy
        for i, e in enumerate(graph.entities)
        for thing in (there.objects if there else ())
        if i not in wrong and e.count == 1 and e.matches(thing)
    }
    for keep in (right, {}):
        try:
            layout = lay_out(graph, draw, keep, layouts=20)
            break
        except GraphError:
            continue
    else:
        return ""
    unmet = [r for r, ok in zip(graph.relations, met[len(graph.entities) :]) if not ok]
    related = [
        i for s, _, o in unmet if {s, o} & set(wrong) for i in (s, o)
    ]  # in the order in which they are told
    alone = [i for i in wrong if i not in related]
    named = [
        t for i in dict.fromkeys(alone + related) for t in layout.objects if graph.entities[i].matches(t)
    ]
    return " and ".join(hint(t) for t in named[:HINTS])


def unmet_entities(graph: SceneGraph, met: Sequence[bool], draw: random.Random) -> list[int]:
    """The entities to put right: those that are missing, and one of each relation that does not hold."""
    n = len(graph.entities)
    wrong = [i for i in range(n) if not met[i]]
    for (s, _, o), ok in zip(graph.relations, met[n:]):
        if not ok and s not in wrong and o not in wrong:
            wrong.append(draw.choice((s, o)))
    if not wrong and not all(met):  # too many things: say where one belongs
        wrong = [draw.randrange(n)]
    return wrong
