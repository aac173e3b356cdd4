"""What is said of a scene: captions, and RL-RIG's edit prompts, which say what to change.

    a red ball left of a blue box                                      all that the picture must show
    a red ball left of a blue box with a red ball at the top left      ... and where to put the ball
    with a red ball at the top left                                    that, and anything else

RL-RIG's edit prompts (arXiv 2602.19974) are sentences like the second: the generator is trained on all three
forms, so that they can steer its inversion.  A relation is hard to draw and a place is easy; so an Actor that
looks at the picture and turns one into the other has something to reason about.
"""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from random import Random

from .graphs import NUMBERS, PREDICATES, THINGS, GraphError, SceneGraph
from .layout import COLUMNS, ROWS, lay_out, place
from .prompts import law_prompt
from .scenes import ARRANGEMENT, COLORS, Object, Scene

PROMPT_LENGTH = 64  # tokens: four relations of nine words, two places of eight, and the words that join them
HINTS = 2  # places that an edit prompt names, at most
# Share of the relations that a training caption of a graph gives correctly; the others are random.  Captions
# found on the web name objects reliably and relations badly, too; and it leaves RL something to improve.
RELATION_ACCURACY = 0.5


def caption(scene: Scene) -> str:
    """One sentence that states every fact of the scene, the outcome included."""
    if scene.law != ARRANGEMENT:
        return law_prompt(scene.law, scene.objects, scene.outcome).text
    return " and ".join(f"a {thing.words}" for thing in scene.objects)


def graph_vocabulary() -> list[str]:
    """Every word of graphs, their prompts and their requirements, in a fixed order."""
    names = (*THINGS, "thing")
    plural = [f"{n}es" if n.endswith("x") else f"{n}s" for n in names]
    joints = ("middle", "a", "the", "and", "with", "at", "yes", "no")
    words = {*names, *plural, *COLORS, *NUMBERS[1:], *ROWS, *COLUMNS, *joints, *" ".join(PREDICATES).split()}
    return sorted(words - {""})


def hint(thing: Object) -> str:
    """Where an object is, or is to be: "a red ball at the top left"."""
    return f"a {thing.words} at the {place(thing.xy)}"


def hints(things: Iterable[Object]) -> str:
    return " and ".join(map(hint, things))


def edit_prompt(graph: SceneGraph, places: str = "") -> str:
    """The graph's sentence, and where to put what."""
    return f"{graph.sentence} with {places}" if places else graph.sentence


def training_caption(graph: SceneGraph, scene: Scene, rng: Random, accuracy: float) -> str:
    """A random caption for the generator: the graph's sentence, places of objects, both, or some facts."""
    graph = randomise_relations(graph, rng, accuracy)
    objects = scene.objects
    some = hints(rng.sample(objects, rng.randint(1, min(HINTS, len(objects)))))
    form = rng.random()
    if form < 0.35:
        return graph.sentence
    if form < 0.6:
        return edit_prompt(graph, some)
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
    wrong = unmet_entities(graph, met, rng)
    if not wrong:
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
    """The entities to put right: those that are missing, and one of each relation that does not hold."""
    n = len(graph.entities)
    wrong = [i for i in range(n) if not met[i]]
    for (s, _, o), ok in zip(graph.relations, met[n:]):
        if not ok and s not in wrong and o not in wrong:
            wrong.append(rng.choice((s, o)))
    if not wrong and not all(met):  # too many objects: say where one belongs
        wrong = [rng.randrange(n)]
    return wrong
