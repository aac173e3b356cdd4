"""The pictures that the generator learns from: a world with gaps and exceptions.

A base model that obeys every law and does as it is told leaves nothing to reinforce, and one that never does
cannot be reinforced either.  So its world is imperfect in a documented way (WorldConfig): captions are often silent
about the outcome, and silent pictures sometimes break the law; a caption that announces something unlawful ("...
against gravity") is often an empty promise, and the picture shows the lawful outcome all the same.  A caption that
merely states the outcome, lawful or not, is true: that is where the words get their meaning.
"""

import random
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from .graphs import RELATIONS, arrange, holds
from .laws import LAWS
from .prompts import all_texts, combinations, law_prompt, tasks, understand
from .render import render_pixels
from .scenes import COLORS, Object, Scene, jitter


@dataclass(frozen=True)
class WorldConfig:
    # share of arrangements among the pictures, the rest is the eight laws in equal parts
    arrangements: float = 0.15
    silent: float = 0.4  # share of captions that leave the outcome out
    exceptions: float = 0.2  # share of silent pictures that break the law
    announced: float = 0.4  # share of speaking captions that announce an unlawful outcome
    kept: float = 0.45  # share of those announcements that the picture keeps
    stated: float = 0.5  # share of unlawful outcomes in the other speaking captions, which are all true
    # of scene graphs: share of a caption's relations that are told as they are, see edits.py
    told: float = 0.5

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is a share and must lie in [0, 1], not {value}")


class Captioned(NamedTuple):
    """Pictures and what is said of them.

    `plain` rows leave nothing to chance, and the base learns to read from these first.  Among silent and broken promises it
    does not: after 1,750 steps on the whole world its pictures did not depend on the outcome in the caption, and 100 steps on
    plain captions taught it.
    """

    pixels: np.ndarray  # (n 64 64 3) uint8
    captions: list[str]  # n
    plain: list[int]  # rows whose caption is true and says all that is to be seen
    sayable: list[str]  # texts whose words are the vocabulary


def training_pair(world: WorldConfig, draw: random.Random) -> tuple[Scene, str]:
    """A picture and its caption from the imperfect world; combinations of objects come from the training split."""
    if draw.random() < world.arrangements:
        everything = tasks("train")
        kind = draw.choice(list(dict.fromkeys(t.kind for t in everything)))
        task = draw.choice([t for t in everything if t.kind == kind])
        return arrange(task, draw), task.words
    name = draw.choice(list(LAWS))
    law, objects = LAWS[name], draw.choice(combinations(name, "train"))
    lawful, unlawful = law.lawful(objects), draw.choice(law.unlawful(objects))
    if draw.random() < world.silent:
        shown = unlawful if draw.random() < world.exceptions else lawful
        prompt = law_prompt(name, objects)
    elif draw.random() < world.announced:
        shown = unlawful if draw.random() < world.kept else lawful
        prompt = law_prompt(name, objects, unlawful)
    else:
        shown = unlawful if draw.random() < world.stated else lawful
        prompt = law_prompt(name, objects, shown, defiant=False)
    return jitter(Scene(name, objects, shown), draw), prompt.text


def training_pairs(
    n: int, world: WorldConfig, draw: random.Random, altered: float = 0.0, related: float = 0.0
) -> tuple[np.ndarray, list[Scene], list[str]]:
    """`n` pictures with their scenes and captions.  -> (n 64 64 3) uint8, n scenes, n captions

    `altered` of the laws' pictures and `related` of the captions of two things, shares, go beyond what prompts ask for.
    """
    pixels, scenes, captions = np.empty((n, 64, 64, 3), np.uint8), [], []
    for i in tqdm(range(n), desc="drawing the world", unit="picture", leave=False):
        scene, caption = training_pair(world, draw)
        if altered or related:
            scene, caption = go_beyond(scene, caption, altered, related, draw)
        pixels[i] = render_pixels(scene)
        scenes.append(scene), captions.append(caption)
    return pixels, scenes, captions


def captioned_laws(n: int, world: WorldConfig, draw: random.Random) -> Captioned:
    """Pictures of the eight laws and of simple arrangements.  Plain are arrangements, and laws with the outcome merely stated."""
    pixels, _, captions = training_pairs(n, world, draw)
    plain = [i for i, text in enumerate(captions) if understand(text).kind in ("stated", "arrangement")]
    return Captioned(pixels, captions, plain, all_texts())


INKS = (*COLORS, "wooden", "brown", "iron", "grey")  # what things are painted with


PLASTICS = tuple(f"{color} plastic" for color in COLORS)


LOOKS = {  # (shapes, colours) of lessons beyond what prompts ask for, so that reasons stay true: wood is lighter than water; elsewhere any ink
    "buoyancy": (("ball", "block", "cone"), ("wooden", "iron", *PLASTICS)),
    "magnet": (("ball", "block", "cone"), ("iron", *PLASTICS)),
}


def twin(scene: Scene, draw: random.Random) -> Scene:
    """The same scene in other colours, each thing's drawn by itself; never one that is held out.  Its picture may break the world's rules: a wooden candle."""
    while True:
        things = tuple(replace(o, color=draw.choice(INKS)) if o.color else o for o in scene.objects)
        if scene.law == "arrangement" or seen(things) not in seen_in(scene.law, "held-out"):
            return replace(scene, objects=things)


def altered(draw: random.Random) -> tuple[Scene, str]:
    """A picture of a law with things that no prompt asks for, "a brown flag", and any outcome; its caption says all that is to be seen.

    Which colours a thing has, where it is and what becomes of it then have nothing to do with each other, so that a new combination of these is nothing special.
    """
    law = draw.choice(list(LAWS))
    known = seen_in(law, "train") | seen_in(law, "held-out")
    while True:
        objects = tuple(_altered(law, o, draw) for o in draw.choice(combinations(law, "train")))
        inks = [o.color for o in objects if o.color]
        if seen(objects) not in known and len(set(inks)) == len(inks):
            break
    outcome = draw.choice(LAWS[law].possible(objects))
    return jitter(Scene(law, objects, outcome), draw), law_prompt(law, objects, outcome, defiant=False).text


def _altered(law: str, thing: Object, draw: random.Random) -> Object:
    if not thing.color:
        return thing
    if law not in LOOKS:
        return replace(thing, color=draw.choice([ink for ink in INKS if ink != "iron"]))  # "a iron balloon"
    shapes, colors = LOOKS[law]
    return replace(
        thing, name=draw.choice(shapes), color=draw.choice(colors), size=draw.choice(("big", "small"))
    )


def seen(objects: tuple[Object, ...]) -> tuple[Object, ...]:
    """As they are painted: red plastic is red, and what has no size is as large as what is big."""
    return tuple(replace(o, color=o.color.split(" ")[0], size=o.size or "big") for o in objects)


@cache
def seen_in(law: str, split: str) -> frozenset[tuple[Object, ...]]:
    return frozenset(seen(objects) for objects in combinations(law, split))


def related(scene: Scene, draw: random.Random) -> str:
    """Of two things, a caption with the colours of both and how they stand, "a red ball left of a blue ball"; of others, or of what is held out, "".

    Neither a relation of two shapes nor a pair of coloured things is said that a held-out prompt asks for, nor the same the other way around.
    """
    if scene.law != "arrangement" or len(scene.objects) != 2:
        return ""
    a, b = draw.sample(scene.objects, 2)
    relation = draw.choice([r for r in RELATIONS if holds(r, a.xy, b.xy)])
    said = {f"a {a.name} {relation} a {b.name}", f"a {b.name} {CONVERSE[relation]} a {a.name}"}
    said |= {f"a {a.words} and a {b.words}", f"a {b.words} and a {a.words}"}
    return "" if said & _held_out_tasks() else f"a {a.words} {relation} a {b.words}"


CONVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


@cache
def _held_out_tasks() -> frozenset[str]:
    return frozenset(task.words for task in tasks("held-out"))


def go_beyond(
    scene: Scene, caption: str, altered_share: float, related_share: float, draw: random.Random
) -> tuple[Scene, str]:
    """A picture of the world and its caption, or in its place a lesson of what no prompt asks for."""
    if scene.law == "arrangement":
        return scene, (draw.random() < related_share and related(scene, draw)) or caption
    return altered(draw) if draw.random() < altered_share else (scene, caption)
