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

from .arrangement import arrange
from .laws import LAWS
from .prompts import all_texts, combinations, law_prompt, tasks, understand
from .render import render_pixels
from .scenes import COLORS, Object, Scene, jitter


@dataclass(frozen=True)
class WorldConfig:
    arrangements: float = (
        0.15  # share of arrangements among the pictures, the rest is the eight laws in equal parts
    )
    silent: float = 0.4  # share of captions that leave the outcome out
    exceptions: float = 0.2  # share of silent pictures that break the law
    announced: float = 0.4  # share of speaking captions that announce an unlawful outcome
    kept: float = 0.45  # share of those announcements that the picture keeps
    stated: float = 0.5  # share of unlawful outcomes in the other speaking captions, which are all true
    told: float = (
        0.5  # of scene graphs: share of a caption's relations that are told as they are, see edits.py
    )

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
    n: int, world: WorldConfig, draw: random.Random
) -> tuple[np.ndarray, list[Scene], list[str]]:
    """`n` pictures with their scenes and captions.  -> (n 64 64 3) uint8, n scenes, n captions"""
    pixels, scenes, captions = np.empty((n, 64, 64, 3), np.uint8), [], []
    for i in tqdm(range(n), desc="drawing the world", unit="picture", leave=False):
        scene, caption = training_pair(world, draw)
        pixels[i] = render_pixels(scene)
        scenes.append(scene), captions.append(caption)
    return pixels, scenes, captions


def captioned_laws(n: int, world: WorldConfig, draw: random.Random) -> Captioned:
    """Pictures of the eight laws and of simple arrangements.  Plain are arrangements, and laws with the outcome merely stated."""
    pixels, _, captions = training_pairs(n, world, draw)
    plain = [i for i, text in enumerate(captions) if understand(text).kind in ("stated", "arrangement")]
    return Captioned(pixels, captions, plain, all_texts())


INKS = (*COLORS, "wooden", "brown", "iron", "grey")  # what things are painted with


def twin(scene: Scene, draw: random.Random) -> Scene:
    """The same scene in other colours, each thing's drawn by itself; never one that is held out.  Its picture may break the world's rules: a wooden candle."""
    while True:
        things = tuple(replace(o, color=draw.choice(INKS)) if o.color else o for o in scene.objects)
        if scene.law == "arrangement" or things not in _held_out_as_painted(scene.law):
            return replace(scene, objects=things)


@cache
def _held_out_as_painted(law: str) -> frozenset[tuple[Object, ...]]:
    """Held-out combinations with colours as they are seen: red plastic is red."""
    return frozenset(
        tuple(replace(o, color=o.color.split(" ")[0]) for o in objects)
        for objects in combinations(law, "held-out")
    )
