"""Training pictures and captions for generators.

RL needs a base model that is right on some of its pictures but not on all.  The training data is therefore
imperfect in ways that WorldConfig sets.  The caption of a law's picture is of one of three kinds:

    silent      does not name the outcome; a share `exceptions` of these pictures breaks the law
    announced   announces an unlawful outcome ("... against gravity"); a share `kept` of the pictures shows it
    stated      states the outcome without "against ..."; always true, so that the model learns the words
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from ..ranges import Checked, Share
from .captions import RELATION_ACCURACY, graph_vocabulary, training_caption
from .graphs import CONVERSE, RELATIONS, SHAPES, holds
from .laws import LAWS, render_pixels
from .layout import sample_picture
from .prompts import all_texts, combinations, law_prompt, prompt_set, sample_arrangement, understand
from .scenes import ARRANGEMENT, COLORS, SPLITS, Object, Objects, Scene, jitter

STATED_UNLAWFUL = 0.5  # share of unlawful outcomes among the captions that state one
Pairs = tuple[np.ndarray, list[Scene], list[str]]  # pictures (n 64 64 3) uint8, n scenes, n captions


@dataclass(frozen=True)
class WorldConfig(Checked):
    # share of arrangements among the pictures, in [0, 1]; the rest are the eight laws in equal parts
    arrangements: Share = 0.15
    # share of the laws' captions that do not name the outcome
    silent: Share = 0.4
    # share of pictures that break the law, among those with a silent caption
    exceptions: Share = 0.2
    # share of captions that announce an unlawful outcome, among those that name one
    announced: Share = 0.4
    # share of pictures that show the announced outcome
    kept: Share = 0.45


class Captioned(NamedTuple):
    """Pictures with captions.

    The base trains on the `plain` rows first.  Without this phase, its pictures did not depend on the outcome
    in the caption after 1,750 steps on all rows; with it, they did after 100 steps.
    """

    pixels: np.ndarray  # (n 64 64 3) uint8
    captions: list[str]  # n
    plain: list[int]  # rows whose caption is true and complete
    vocabulary: list[str]  # texts that contain every word of any caption or prompt


def training_pair(world: WorldConfig, rng: random.Random) -> tuple[Scene, str]:
    """A random scene and its caption, with a training combination of objects."""
    if rng.random() < world.arrangements:
        prompt = sample_arrangement("train", rng)
        return prompt.scene(rng), prompt.text
    name = rng.choice(list(LAWS))
    law, objects = LAWS[name], rng.choice(combinations(name, "train"))
    lawful, unlawful = law.lawful(objects), rng.choice(law.unlawful(objects))
    if rng.random() < world.silent:
        share, prompt = world.exceptions, law_prompt(name, objects)
    elif rng.random() < world.announced:
        share, prompt = world.kept, law_prompt(name, objects, unlawful)
    else:
        share, prompt = STATED_UNLAWFUL, None
    shown = unlawful if rng.random() < share else lawful
    prompt = prompt or law_prompt(name, objects, shown, defiant=False)
    return jitter(Scene(name, objects, shown), rng), prompt.text


def training_pairs(
    n: int, world: WorldConfig, rng: random.Random, recombined: float = 0.0, related_captions: float = 0.0
) -> Pairs:
    """`n` pictures with their scenes and captions.  -> (n 64 64 3) uint8, n scenes, n captions

    recombined: share of the laws' pictures that come from `recombined_pair`.
    related_captions: share of the arrangements that `related_caption` describes, where it can.
    """

    def pair() -> tuple[Scene, str]:
        scene, caption = training_pair(world, rng)
        chance = rng.random() if recombined or related_captions else 1.0
        if scene.law == ARRANGEMENT and chance < related_captions:
            return scene, related_caption(scene, rng) or caption
        return recombined_pair(rng) if scene.law != ARRANGEMENT and chance < recombined else (scene, caption)

    return _rendered(n, pair, "rendering the world")


def _rendered(n: int, pair: Callable[[], tuple[Scene, str]], title: str) -> Pairs:
    """Call `pair` `n` times and render the scenes.  `title` is the label of the progress bar."""
    pixels, pairs = np.empty((n, 64, 64, 3), np.uint8), []
    for i in tqdm(range(n), desc=title, unit="picture", leave=False):
        pairs.append(pair())
        pixels[i] = render_pixels(pairs[i][0])
    return pixels, [scene for scene, _ in pairs], [caption for _, caption in pairs]


def captioned_laws(n: int, world: WorldConfig, rng: random.Random) -> Captioned:
    """Pictures of the laws and of GenEval's tasks.

    A caption is plain if it states the outcome without "against ...", or describes an arrangement.
    """
    pixels, _, captions = training_pairs(n, world, rng)
    plain = [i for i, text in enumerate(captions) if understand(text).kind in ("stated", ARRANGEMENT)]
    return Captioned(pixels, captions, plain, all_texts())


def captioned_graphs(n: int, rng: random.Random, accuracy: float = RELATION_ACCURACY) -> Captioned:
    """Pictures of training graphs.  A caption is plain if it gives the place of every object."""

    def pair() -> tuple[Scene, str]:
        graph, scene = sample_picture(rng)
        return scene, training_caption(graph, scene, rng, accuracy)

    pixels, scenes, captions = _rendered(n, pair, "rendering scene graphs")
    plain = [i for i in range(n) if captions[i].count(" at the ") == len(scenes[i].objects)]
    return Captioned(pixels, captions, plain, graph_vocabulary())


# -------------------------------------------------------------------------- pictures that no prompt asks for
# Their colours, places and outcomes are independent of each other, so that a model learns each by itself.
# No law's picture shows a held-out combination of objects, and no caption is a held-out prompt.
INKS = (*COLORS, "wooden", "brown", "iron", "grey")
PLASTICS = tuple(f"{color} plastic" for color in COLORS)
# materials of the laws whose outcome depends on the material
MATERIALS = {"buoyancy": ("wooden", "iron", *PLASTICS), "magnet": ("iron", *PLASTICS)}


def recolored(scene: Scene, rng: random.Random) -> Scene:
    """The scene with random colours, possible or not ("a wooden candle"), but never a held-out scene."""
    while True:
        things = tuple(replace(o, color=rng.choice(INKS)) if o.color else o for o in scene.objects)
        if scene.law == ARRANGEMENT or _appearance(things) not in _appearances(scene.law, SPLITS[1:]):
            return replace(scene, objects=things)


def recombined_pair(rng: random.Random) -> tuple[Scene, str]:
    """A scene of a law with objects that no prompt has ("a brown flag"), any outcome, and a true caption."""
    law = rng.choice(list(LAWS))
    while True:
        objects = tuple(_variant(law, o, rng) for o in rng.choice(combinations(law, "train")))
        inks = [o.color for o in objects if o.color]
        if _appearance(objects) not in _appearances(law, SPLITS) and len(set(inks)) == len(inks):
            break
    outcome = rng.choice(list(LAWS[law].outcomes))
    return jitter(Scene(law, objects, outcome), rng), law_prompt(law, objects, outcome, defiant=False).text


def _variant(law: str, thing: Object, rng: random.Random) -> Object:
    """The object in a random colour; if its material matters, also with a random shape and size."""
    if not thing.color:
        return thing
    if law not in MATERIALS:  # without iron, as the article would be wrong: "a iron balloon"
        return replace(thing, color=rng.choice([ink for ink in INKS if ink != "iron"]))
    name, color = rng.choice(SHAPES), rng.choice(MATERIALS[law])
    return replace(thing, name=name, color=color, size=rng.choice(("big", "small")))


def _appearance(objects: Objects) -> Objects:
    """The objects as rendered: red plastic looks red, and an object without a size looks big."""
    return tuple(replace(o, color=o.color.split(" ")[0], size=o.size or "big") for o in objects)


@cache
def _appearances(law: str, splits: tuple[str, ...]) -> frozenset[Objects]:
    """The appearance of every combination of objects in these splits."""
    return frozenset(_appearance(objects) for split in splits for objects in combinations(law, split))


def related_caption(scene: Scene, rng: random.Random) -> str:
    """A caption with the colours and the relation of two shapes: "a red ball left of a blue ball".

    Returns "" if the scene does not have two shapes, or if a held-out prompt asks for this relation of the
    two shapes or for these two coloured shapes.
    """
    if scene.law != ARRANGEMENT or len(scene.objects) != 2:
        return ""
    a, b = rng.sample(scene.objects, 2)
    relation = rng.choice([r for r in RELATIONS if holds(r, a, b)])
    said = {f"a {a.name} {relation} a {b.name}", f"a {b.name} {CONVERSE[relation]} a {a.name}"}
    said |= {f"a {a.words} and a {b.words}", f"a {b.words} and a {a.words}"}
    held_out = any(p.text in said for split in SPLITS[1:] for p in prompt_set(ARRANGEMENT, split))
    return "" if held_out else f"a {a.words} {relation} a {b.words}"
