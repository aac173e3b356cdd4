"""The pictures and captions that generators learn from: a world with gaps and exceptions.

A base model that obeys every law and every caption leaves RL nothing to reinforce, and one that never does
cannot be reinforced either.  So its world is imperfect in a documented way (WorldConfig): many captions leave
the outcome open, and some of their pictures break the law; many captions announce an unlawful outcome ("...
against gravity") that the picture does not show.  A caption that only states the outcome is always true: from
these the model learns what the words mean.
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

# Share of unlawful outcomes among captions that only state an outcome: independent of the law, as the words
# are.
STATED_UNLAWFUL = 0.5
Pairs = tuple[np.ndarray, list[Scene], list[str]]  # pictures (n 64 64 3) uint8, n scenes, n captions


@dataclass(frozen=True)
class WorldConfig(Checked):
    # share of arrangements among the pictures, in [0, 1]; the rest are the eight laws in equal parts
    arrangements: Share = 0.15
    # share of the laws' captions that leave the outcome open
    silent: Share = 0.4
    # share of those captions whose picture breaks the law
    exceptions: Share = 0.2
    # share of the captions with an outcome that announce an unlawful one
    announced: Share = 0.4
    # share of those announcements that the picture shows
    kept: Share = 0.45


class Captioned(NamedTuple):
    """Pictures with captions.

    The base learns to read from `plain` rows first.  Without them, after 1,750 steps on the whole world its
    pictures did not depend on the outcome in the caption; 100 steps on plain captions taught it.
    """

    pixels: np.ndarray  # (n 64 64 3) uint8
    captions: list[str]  # n
    plain: list[int]  # rows whose caption is true and complete
    vocabulary: list[str]  # texts that hold every word of any caption or prompt


def training_pair(world: WorldConfig, rng: random.Random) -> tuple[Scene, str]:
    """A scene and its caption from the imperfect world, of a training combination of objects."""
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

    recombined: share of the laws' pictures that show objects of no prompt, see `recombined_pair`.
    related_captions: share of arrangements with captions of colours and relation, see `related_caption`.
    """

    def pair() -> tuple[Scene, str]:
        scene, caption = training_pair(world, rng)
        chance = rng.random() if recombined or related_captions else 1.0
        if scene.law == ARRANGEMENT and chance < related_captions:
            return scene, related_caption(scene, rng) or caption
        return recombined_pair(rng) if scene.law != ARRANGEMENT and chance < recombined else (scene, caption)

    return _rendered(n, pair, "rendering the world")


def _rendered(n: int, pair: Callable[[], tuple[Scene, str]], title: str) -> Pairs:
    """`n` scenes and captions from `pair`, with their pictures; `title` is shown with the progress."""
    pixels, pairs = np.empty((n, 64, 64, 3), np.uint8), []
    for i in tqdm(range(n), desc=title, unit="picture", leave=False):
        pairs.append(pair())
        pixels[i] = render_pixels(pairs[i][0])
    return pixels, [scene for scene, _ in pairs], [caption for _, caption in pairs]


def captioned_laws(n: int, world: WorldConfig, rng: random.Random) -> Captioned:
    """Pictures of the laws and of GenEval's tasks.  Plain are stated outcomes, and arrangements."""
    pixels, _, captions = training_pairs(n, world, rng)
    plain = [i for i, text in enumerate(captions) if understand(text).kind in ("stated", ARRANGEMENT)]
    return Captioned(pixels, captions, plain, all_texts())


def captioned_graphs(n: int, rng: random.Random, accuracy: float = RELATION_ACCURACY) -> Captioned:
    """Pictures of training graphs.  Plain are captions that say where everything is."""

    def pair() -> tuple[Scene, str]:
        graph, scene = sample_picture(rng)
        return scene, training_caption(graph, scene, rng, accuracy)

    pixels, scenes, captions = _rendered(n, pair, "rendering scene graphs")
    plain = [i for i in range(n) if captions[i].count(" at the ") == len(scenes[i].objects)]
    return Captioned(pixels, captions, plain, graph_vocabulary())


# -------------------------------------------------------------------------- pictures that no prompt asks for
# They show colours, places and outcomes independently of each other, so that each is learnt by itself.
# No picture or caption of a held-out prompt is among them.
INKS = (*COLORS, "wooden", "brown", "iron", "grey")
PLASTICS = tuple(f"{color} plastic" for color in COLORS)
# where the reason depends on the material: wood is lighter than water
MATERIALS = {"buoyancy": ("wooden", "iron", *PLASTICS), "magnet": ("iron", *PLASTICS)}


def recolored(scene: Scene, rng: random.Random) -> Scene:
    """The same scene in random colours, also impossible ones (a wooden candle); never a held-out one."""
    while True:
        things = tuple(replace(o, color=rng.choice(INKS)) if o.color else o for o in scene.objects)
        if scene.law == ARRANGEMENT or _appearance(things) not in _appearances(scene.law, SPLITS[1:]):
            return replace(scene, objects=things)


def recombined_pair(rng: random.Random) -> tuple[Scene, str]:
    """A scene of a law with objects of no prompt ("a brown flag") and any outcome, with a true caption."""
    law = rng.choice(list(LAWS))
    known = _appearances(law, SPLITS)
    while True:
        objects = tuple(_variant(law, o, rng) for o in rng.choice(combinations(law, "train")))
        inks = [o.color for o in objects if o.color]
        if _appearance(objects) not in known and len(set(inks)) == len(inks):
            break
    outcome = rng.choice(list(LAWS[law].outcomes))
    return jitter(Scene(law, objects, outcome), rng), law_prompt(law, objects, outcome, defiant=False).text


def _variant(law: str, thing: Object, rng: random.Random) -> Object:
    if not thing.color:
        return thing
    if law not in MATERIALS:
        return replace(thing, color=rng.choice([ink for ink in INKS if ink != "iron"]))  # "a iron balloon"
    name, color = rng.choice(SHAPES), rng.choice(MATERIALS[law])
    return replace(thing, name=name, color=color, size=rng.choice(("big", "small")))


def _appearance(objects: Objects) -> Objects:
    """As rendered: red plastic looks red, and an object without a size is as large as a big one."""
    return tuple(replace(o, color=o.color.split(" ")[0], size=o.size or "big") for o in objects)


@cache
def _appearances(law: str, splits: tuple[str, ...]) -> frozenset[Objects]:
    return frozenset(_appearance(objects) for split in splits for objects in combinations(law, split))


def related_caption(scene: Scene, rng: random.Random) -> str:
    """A caption with both colours and the relation of two shapes, "a red ball left of a blue ball".

    "" for other scenes, and if a held-out prompt has this relation of shapes or this pair of coloured shapes.
    """
    if scene.law != ARRANGEMENT or len(scene.objects) != 2:
        return ""
    a, b = rng.sample(scene.objects, 2)
    relation = rng.choice([r for r in RELATIONS if holds(r, a, b)])
    said = {f"a {a.name} {relation} a {b.name}", f"a {b.name} {CONVERSE[relation]} a {a.name}"}
    said |= {f"a {a.words} and a {b.words}", f"a {b.words} and a {a.words}"}
    held_out = any(p.text in said for split in SPLITS[1:] for p in prompt_set(ARRANGEMENT, split))
    return "" if held_out else f"a {a.words} {relation} a {b.words}"
