"""Prompts: what is asked of a picture, and which pictures fulfil it.

Two kinds after SRRL's prompt templates 4 and 5, and GenEval's tasks:
    physical        "a big wooden ball on the left of a water tank"                    the laws decide the outcome
    unconventional  "..., lying on the bottom against buoyancy"                        stated, and unlawful
    arrangement     "a red ball left of a blue block"
An outcome merely stated, lawful or not ("..., lying on the bottom"), occurs in training captions only.
Train and held-out prompts differ in their combinations of objects, not only in their seeds.
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache

from ..streams import choices
from .graphs import Task, arrange, fulfils, task_list
from .laws import LAWS
from .scenes import Object, Reading, Scene, jitter


@dataclass(frozen=True)
class PromptMix:
    """What RL asks for: shares of the kinds of prompts, training combinations only."""

    physical: float = 0.6  # share
    unconventional: float = 0.3  # share
    arrangement: float = 0.1  # share; keeps what is not reinforced from being forgotten

    def __post_init__(self) -> None:
        if min(self.physical, self.unconventional, self.arrangement) < 0 or self.total <= 0:
            raise ValueError("the shares of prompts must not be negative, and not all zero")

    @property
    def total(self) -> float:
        return self.physical + self.unconventional + self.arrangement

    def draw(self, seed: int, n: int) -> Callable[[int], tuple[list[str], list[str]]]:
        """A function from a step to `n` prompts, and for each the family of scenes whose rewards compare."""

        def texts(step: int) -> tuple[list[str], list[str]]:
            chance = choices(seed, "prompts", step)
            weights = [self.physical, self.unconventional, self.arrangement]
            kinds = chance.choices(KINDS, weights, k=n)
            prompts = [
                chance.choice(draw_prompts(kind, "train", 8, chance)) for kind in kinds
            ]  # 8: one of each law
            return [p.text for p in prompts], [f"{p.kind}/{p.law}" for p in prompts]

        return texts


def split(text: str) -> list[str]:
    """Lower-case words without punctuation."""
    return re.findall(r"[\w']+", text.lower())


KINDS = ("physical", "unconventional", "arrangement")


HELD_OUT_EVERY = 5  # one combination in five is never trained on


@dataclass(frozen=True)
class Prompt:
    """A sentence and what it asks for: objects with one outcome of a law, or a `task` for an arrangement."""

    text: str
    kind: str  # one of KINDS, or "stated" for an outcome in plain words
    law: str  # a key of LAWS, or "arrangement"
    objects: tuple[Object, ...] = ()
    outcome: str = ""
    task: Task | None = None

    def fulfilled_by(self, reading: Reading) -> bool:
        """Whether the picture that gave this reading is right: every fact, nothing missing, nothing too many."""
        scene = reading.scene
        if scene is None or scene.law != self.law:
            return False
        if self.task:
            return fulfils(scene.objects, self.task)
        return scene.objects == self.objects and scene.outcome == self.outcome

    def scene(self, rng: random.Random) -> Scene:
        """A picture that fulfils the prompt, what it leaves open drawn at random."""
        if self.task:
            return arrange(self.task, rng)
        return jitter(Scene(self.law, self.objects, self.outcome), rng)


def law_prompt(
    law: str, objects: tuple[Object, ...], outcome: str | None = None, defiant: bool = True
) -> Prompt:
    """The prompt for these objects; without an outcome, the lawful one is wanted and not named.

    An unlawful outcome is announced as one ("... against gravity"), or if not `defiant` merely stated.
    """
    rule = LAWS[law]
    text, lawful = rule.setting(objects), rule.lawful(objects)
    if outcome is None:
        return Prompt(text, "physical", law, objects, lawful)
    text = f"{text}, {rule.result(objects, outcome)}"
    if outcome == lawful or not defiant:
        return Prompt(text, "stated", law, objects, outcome)
    return Prompt(f"{text} {rule.defied}", "unconventional", law, objects, outcome)


def _split(items: list, name: str, split: str) -> list:
    """Every fifth of the shuffled items is held out; the shuffle depends on the name alone."""
    order = list(items)
    random.Random(f"split/{name}").shuffle(order)
    held_out = order[::HELD_OUT_EVERY]
    if split == "held-out":
        return held_out
    if split == "train":
        return [item for item in order if item not in held_out]
    raise ValueError(f"split {split!r} is not one of 'train', 'held-out'")


@cache
def combinations(law: str, split: str) -> tuple[tuple[Object, ...], ...]:
    """The sets of objects of one law in one split."""
    return tuple(_split(LAWS[law].combinations(), law, split))


@cache
def tasks(split: str) -> tuple[Task, ...]:
    """The arrangement tasks of one split, split kind by kind; the three single objects are in both."""
    everything = task_list()
    chosen = []
    for kind in dict.fromkeys(t.kind for t in everything):
        of_kind = [t for t in everything if t.kind == kind]
        chosen += of_kind if len(of_kind) <= HELD_OUT_EVERY else _split(of_kind, kind, split)
    return tuple(chosen)


@cache
def prompt_set(kind: str, split: str) -> tuple[Prompt, ...]:
    """Every prompt of one kind ("physical", "unconventional", "arrangement") and split ("train", "held-out")."""
    if kind == "arrangement":
        return tuple(Prompt(t.words, "arrangement", "arrangement", task=t) for t in tasks(split))
    pairs = [(law, objects) for law in LAWS for objects in combinations(law, split)]
    if kind == "physical":
        return tuple(law_prompt(law, objects) for law, objects in pairs)
    if kind == "unconventional":
        return tuple(
            law_prompt(law, objects, o) for law, objects in pairs for o in LAWS[law].unlawful(objects)
        )
    raise ValueError(f"prompt kind {kind!r} is not one of {', '.join(KINDS)}")


def draw_prompts(kind: str, split: str, n: int, rng: random.Random) -> list[Prompt]:
    """`n` prompts of one kind; the laws take turns, so that each has an equal share, the rest is chance."""
    pool = prompt_set(kind, split)
    groups = [[p for p in pool if (p.task.kind if p.task else p.law) == g] for g in _groups(kind)]
    return [rng.choice(groups[i % len(groups)]) for i in range(n)]


def _groups(kind: str) -> list[str]:
    return list(dict.fromkeys(p.task.kind if p.task else p.law for p in prompt_set(kind, "train")))


@lru_cache(maxsize=1)
def _by_text() -> dict[str, Prompt]:
    known = {}
    for split in ("train", "held-out"):
        for kind in KINDS:
            known.update({p.text.lower(): p for p in prompt_set(kind, split)})
        for law in LAWS:
            for objects in combinations(law, split):
                for outcome in LAWS[law].possible(objects):
                    stated = law_prompt(law, objects, outcome, defiant=False)
                    known[stated.text.lower()] = stated
    return known


def understand(text: str) -> Prompt | None:
    """The prompt behind a sentence of this world, or None when it asks for something the laws do not cover."""
    return _by_text().get(" ".join(text.lower().split()).rstrip("."))


def all_texts() -> list[str]:
    """Every sentence that the world can say; the vocabulary is read off them."""
    return list(_by_text())


def sample_scene(
    seed: int, law: str | None = None, split: str = "train", lawful: bool | None = None
) -> Scene:
    """A scene from a seed: any law or arrangement unless `law` is given; lawful or not at random unless given."""
    rng = random.Random(f"scene/{seed}")
    law = law or rng.choice([*LAWS, "arrangement"])
    if law == "arrangement":
        kinds = [t.kind for t in tasks(split)]
        kind = rng.choice(list(dict.fromkeys(kinds)))
        return arrange(rng.choice([t for t in tasks(split) if t.kind == kind]), rng)
    if law not in LAWS:
        raise ValueError(f"no law named {law!r}; there are {', '.join(LAWS)} and arrangement")
    objects = rng.choice(combinations(law, split))
    if lawful is None:
        lawful = rng.random() < 0.5
    outcome = LAWS[law].lawful(objects) if lawful else rng.choice(LAWS[law].unlawful(objects))
    return jitter(Scene(law, objects, outcome), rng)


def near_miss(prompt: Prompt, draw: random.Random, split: str = "train") -> Prompt:
    """The same prompt with one fact wrong: its pictures are the twins of this one's, its text is a false caption.

    Laws: the outcome is another one, or one object differs in as few attributes as the law allows (a balance has a
    big and a small ball, so there two change).  Arrangements: one clause or the relation of the task is another.
    """
    if prompt.task:
        others = [t for t in tasks(split) if t.kind == prompt.task.kind and t != prompt.task]
        nearest = min(_task_distance(prompt.task, t) for t in others)
        task = draw.choice([t for t in others if _task_distance(prompt.task, t) == nearest])
        return Prompt(task.words, "arrangement", "arrangement", task=task)
    law = LAWS[prompt.law]
    objects, outcome = prompt.objects, prompt.outcome
    if draw.random() < 0.5:
        outcome = draw.choice([o for o in law.possible(objects) if o != outcome])
    else:
        others = [o for o in combinations(prompt.law, split) if o != objects and outcome in law.possible(o)]
        nearest = min(_distance(objects, o) for o in others)
        objects = draw.choice([o for o in others if _distance(objects, o) <= max(nearest, 1)])
    silent = outcome == law.lawful(objects) and draw.random() < 0.5
    return law_prompt(prompt.law, objects, None if silent else outcome)


def _distance(a: tuple[Object, ...], b: tuple[Object, ...]) -> int:
    """How many attributes differ between two sets of objects of one law."""
    return sum(
        (x.name != y.name) + (x.color != y.color) + (x.size != y.size) + (x.place != y.place)
        for x, y in zip(a, b)
    )


def _task_distance(a: Task, b: Task) -> int:
    """How many facts differ between two tasks of one kind."""
    differ = int(a.relation != b.relation)
    for x, y in zip(a.clauses, b.clauses):
        differ += (x.name != y.name) + (x.color != y.color) + (x.count != y.count)
    return differ
