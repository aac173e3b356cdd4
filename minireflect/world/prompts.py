"""Prompts, their splits, and whether a picture fulfils a prompt.

There are three kinds of prompts: two that follow SRRL's prompt templates 4 and 5, and GenEval's six tasks
(arXiv 2310.11513).

    physical        "a big wooden ball on the left of a water tank"         the law decides the outcome
    unconventional  "..., lying on the bottom against buoyancy"             states an unlawful outcome
    arrangement     "a red ball left of a blue block"                       a scene graph

A fourth kind, "stated", states a lawful or unlawful outcome without "against ..." ("..., lying on the
bottom").  It occurs in training captions only.

Splits differ in their combinations of objects.  One combination in five is held out from all training.  Half
of these are for validation, on which choices are made; the other half are for test, which is only reported.
Arrangements with the same content are in one split: "a ball left of a cone" and "a cone right of a ball".
Tasks with at most five contents (single object, two objects) are in training only; an evaluation of all tasks
takes the training prompts of these.  Only what the prompt states is held out; a colour that it leaves open
may be the same in all splits.

A picture fulfils a prompt if the inspector reads every fact of the prompt in it, and nothing else.  The
milder rules of GenEval's tables are in published.py.
"""

import random
import re
from dataclasses import dataclass
from functools import cache
from itertools import permutations, product
from typing import Literal

from ..ranges import Checked, Weight, expect
from ..streams import choices
from .graphs import RELATIONS, SHAPES, Entity, SceneGraph
from .laws import LAWS
from .layout import arrange
from .scenes import ARRANGEMENT, COLORS, SPLITS, Objects, Reading, Scene, jitter

KINDS = ("physical", "unconventional", ARRANGEMENT)
TASKS = ("single object", "two objects", "counting", "colors", "position", "color attribution")  # GenEval's
HELD_OUT_EVERY = 5  # one combination in five is held out from training


def split(text: str) -> list[str]:
    """Split a text into lower-case words, without punctuation and TeX commands such as \\frac."""
    return re.findall(r"(?<![\\\w])[\w']+", text.lower())


@dataclass(frozen=True)
class Prompt:
    """A sentence and what it asks for: objects and outcome of a law, or the scene graph of an arrangement."""

    text: str
    kind: str  # one of KINDS, or "stated"
    law: str  # a key of LAWS, or ARRANGEMENT
    objects: Objects = ()
    outcome: str = ""
    graph: SceneGraph | None = None  # arrangements only
    task: str = ""  # one of TASKS, arrangements only

    @property
    def content(self) -> tuple:
        """The facts that the prompt asks for, independent of their order in the sentence."""
        return self.graph.content if self.graph else (self.law, self.objects, self.outcome)

    @property
    def group(self) -> str:
        """The group over which tables average: the law, or GenEval's task."""
        return self.task or self.law

    def fulfilled_by(self, reading: Reading) -> bool:
        """Whether a picture with this reading shows every fact of the prompt, and nothing else."""
        scene = reading.scene
        if self.graph and scene and scene.law == ARRANGEMENT:
            return self.graph.fulfilled_by(scene.objects)
        return scene is not None and scene.facts == self.content

    def scene(self, rng: random.Random) -> Scene:
        """A random scene that fulfils the prompt."""
        if self.graph:
            return arrange(self.graph, rng)
        return jitter(Scene(self.law, self.objects, self.outcome), rng)


def law_prompt(law: str, objects: Objects, outcome: str | None = None, defiant: bool = True) -> Prompt:
    """The prompt for these objects and this outcome.

    outcome: None makes a prompt of kind "physical", which asks for the lawful outcome without naming it.
    defiant: whether "against ..." follows an unlawful outcome, as in kind "unconventional".
    """
    rule = LAWS[law]
    text, lawful = rule.setting(objects), rule.lawful(objects)
    if outcome is None:
        return Prompt(text, "physical", law, objects, lawful)
    text = f"{text}, {rule.outcomes[outcome]}"
    if outcome == lawful or not defiant:
        return Prompt(text, "stated", law, objects, outcome)
    return Prompt(f"{text} {rule.defied}", "unconventional", law, objects, outcome)


# ------------------------------------------------------------------------------------------------ all prompts
@cache
def combinations(law: str, split: str) -> tuple[Objects, ...]:
    """The combinations of objects of a law that belong to one of SPLITS.  Raises ValueError."""
    return _part(LAWS[law].combinations, law, split)


@cache
def prompt_set(kind: str, split: str) -> tuple[Prompt, ...]:
    """Every prompt of one of KINDS, or "stated", in one of SPLITS, in a fixed order.  Raises ValueError."""
    expect(kind, Literal[(*KINDS, "stated")], "prompt kind")
    if kind == ARRANGEMENT:
        return tuple(prompt for task in TASKS for prompt in _arrangements(task, split))
    prompts: list[Prompt] = []  # some of other kinds: the outcome decides the kind
    for law, rule in LAWS.items():
        for objects in combinations(law, split):
            prompts += [law_prompt(law, objects, o, kind != "stated") for o in (None, *rule.outcomes)]
    return tuple(prompt for prompt in prompts if prompt.kind == kind)


def _arrangements(task: str, split: str) -> list[Prompt]:
    """Every prompt of one of GenEval's tasks in one split."""
    prompts = [Prompt(g.sentence, ARRANGEMENT, ARRANGEMENT, graph=g, task=task) for g in _graphs(task)]
    contents = _part(list(dict.fromkeys(p.content for p in prompts)), task, split)
    return [p for content in contents for p in prompts if p.content == content]


def _graphs(task: str) -> list[SceneGraph]:
    """Every scene graph of one of GenEval's tasks."""
    if task in ("two objects", "position", "color attribution"):
        colors = list(permutations(COLORS, 2)) if task == "color attribution" else [("", "")]
        relations = [((0, r, 1),) for r in RELATIONS] if task == "position" else [()]
        every = product(permutations(SHAPES, 2), colors, relations)
        return [SceneGraph((Entity(a, c), Entity(b, d)), r) for (a, b), (c, d), r in every]
    colors = {"single object": ("",), "counting": ("", *COLORS), "colors": COLORS}[task]
    counts = (2, 3, 4) if task == "counting" else (1,)
    return [SceneGraph((Entity(s, c, n),)) for s in SHAPES for c in colors for n in counts]


def _part(items: list, name: str, split: str) -> tuple:
    """The items that belong to a split.  Five items or fewer are all in training.

    The order is shuffled with a seed made of `name`.  Then every fifth item is held out; held-out items go
    to validation and test in turns.
    """
    expect(split, Literal[SPLITS], "split")
    if len(items) <= HELD_OUT_EVERY:
        return tuple(items) if split == "train" else ()
    order = list(items)
    random.Random(f"split/{name}").shuffle(order)
    parts = {"validation": order[:: 2 * HELD_OUT_EVERY], "test": order[HELD_OUT_EVERY :: 2 * HELD_OUT_EVERY]}
    parts["train"] = [item for i, item in enumerate(order) if i % HELD_OUT_EVERY]
    return tuple(parts[split])


@cache
def _by_text() -> dict[str, Prompt]:
    kinds = [(kind, split) for split in SPLITS for kind in (*KINDS, "stated")]
    return {p.text.lower(): p for of_kind in kinds for p in prompt_set(*of_kind)}


def understand(text: str) -> Prompt | None:
    """The prompt with this text, or None.  Case, repeated spaces and a final full stop are ignored."""
    return _by_text().get(" ".join(text.lower().split()).rstrip("."))


def all_texts() -> list[str]:
    """The texts of all prompts and captions of all splits, for the vocabulary."""
    return list(_by_text())


# --------------------------------------------------------------------------------- random prompts and scenes
@cache
def _by_group(kind: str, split: str) -> dict[str, list[Prompt]]:
    """The prompts of each law or task in a split; those of training for a task that has none in the split."""
    names = TASKS if kind == ARRANGEMENT else LAWS
    groups = {name: [p for p in prompt_set(kind, split) if p.group == name] for name in names}
    return {name: prompts or _by_group(kind, "train")[name] for name, prompts in groups.items()}


def draw_prompts(kind: str, split: str, n: int, rng: random.Random) -> list[Prompt]:
    """`n` random prompts of one kind.  Laws or tasks take turns, so that each has an equal share.

    Prompts of the tasks single object and two objects are from training in every split.
    """
    groups = list(_by_group(kind, split).values())
    return [rng.choice(groups[i % len(groups)]) for i in range(n)]


@dataclass(frozen=True)
class PromptMix(Checked):
    """The kinds of prompts that reinforcement learning draws from the training split, by relative weight."""

    # weight of prompts whose outcome the law decides
    physical: Weight = 0.45
    # weight of prompts that state an unlawful outcome
    unconventional: Weight = 0.45
    # weight of GenEval's tasks, which the model would forget without them
    arrangement: Weight = 0.1

    def require(self) -> None:
        if not any(vars(self).values()):
            raise ValueError("the weights physical, unconventional and arrangement must not all be zero")

    def draw(self, seed: int, n: int, step: int) -> tuple[list[str], list[str]]:
        """Draw the prompts of a training step.  -> `n` texts, and the family (kind and law) of each"""
        rng = choices(seed, "prompts", step)
        kinds = rng.choices(KINDS, [self.physical, self.unconventional, self.arrangement], k=n)
        # eight prompts have one of each law; choosing one of them gives all laws the same chance
        prompts = [rng.choice(draw_prompts(kind, "train", 8, rng)) for kind in kinds]
        return [p.text for p in prompts], [f"{p.kind}/{p.law}" for p in prompts]


def sample_scene(seed: int, law: str = "", split: str = "train", lawful: bool | None = None) -> Scene:
    """A random scene from a seed.

    law: a key of LAWS, or ARRANGEMENT; "" for a random one.
    lawful: whether the outcome is lawful; None for a random choice.
    Raises ValueError if there is no such law or split.
    """
    rng = random.Random(f"scene/{seed}")
    law = expect(law or rng.choice([*LAWS, ARRANGEMENT]), Literal[(*LAWS, ARRANGEMENT)], "law")
    if law == ARRANGEMENT:
        return sample_arrangement(split, rng).scene(rng)
    objects = rng.choice(combinations(law, split))
    lawful = rng.random() < 0.5 if lawful is None else lawful
    outcome = LAWS[law].lawful(objects) if lawful else rng.choice(LAWS[law].unlawful(objects))
    return jitter(Scene(law, objects, outcome), rng)


def sample_arrangement(split: str, rng: random.Random) -> Prompt:
    """A random prompt of a random task of GenEval, as in `draw_prompts`."""
    return rng.choice(_by_group(ARRANGEMENT, split)[rng.choice(TASKS)])


# ------------------------------------------------------------------------------------------------ near misses
def near_miss(prompt: Prompt, rng: random.Random, split: str = "train") -> Prompt:
    """A random prompt with the fewest differences: a false caption of pictures of the given prompt.

    For a law, the outcome changes, or as few attributes of the objects as the law allows.  For example, the
    sizes of both balls of a balance change together.  For an arrangement, the graph changes within its task.
    """
    if prompt.graph:
        others = [p for p in _by_group(ARRANGEMENT, split)[prompt.task] if p != prompt]
        if not others:
            raise ValueError(f"no near miss: {prompt.task!r} has no other prompt in {split!r}; use 'train'")
        return rng.choice(_nearest(others, [_graph_distance(prompt.graph, p.graph) for p in others]))
    law, objects, outcome = LAWS[prompt.law], prompt.objects, prompt.outcome
    if rng.random() < 0.5:
        outcome = rng.choice([o for o in law.outcomes if o != outcome])
    else:
        others = [o for o in combinations(prompt.law, split) if o != prompt.objects]
        objects = rng.choice(_nearest(others, [_differences(prompt.objects, other) for other in others]))
    silent = outcome == law.lawful(objects) and rng.random() < 0.5
    return law_prompt(prompt.law, objects, None if silent else outcome)


def _nearest(others: list, distances: list[int]) -> list:
    """All elements with the smallest distance."""
    least = min(distances)
    return [other for other, distance in zip(others, distances) if distance == least]


def _graph_distance(a: SceneGraph, b: SceneGraph) -> int:
    """The number of differences between two graphs of one task, which have at most one relation each."""
    return _differences(a.entities, b.entities) + (a.relations != b.relations)


def _differences(a: tuple, b: tuple) -> int:
    """The number of attributes that differ between two tuples of objects or of entities."""
    return sum(u != v for x, y in zip(a, b) for u, v in zip(vars(x).values(), vars(y).values()))
