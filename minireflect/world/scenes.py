"""The content of a picture as data: a scene has a law of physics, its objects and an outcome.

All other files of the world use these records: `render` turns a scene into pixels, `caption` and `rationale`
turn it into words, and `inspect` recovers it from pixels alone.
"""

import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import permutations

SPLITS = ("train", "validation", "test")  # of prompts and graphs; the last two are held out from training
COLORS = ("red", "green", "blue", "yellow", "purple")
ARRANGEMENT = "arrangement"  # the `law` of a scene without a law: one to four shapes on paper, see graphs.py
MAX_SHIFT = 2  # largest shift of a sampled scene along each axis, in pixels
RADIUS, BOX = 7, 12  # half the height of a shape, and of a box, in an arrangement, in pixels
SAME_PLACE = 2  # largest error of the place of a shape that the inspector reads, in pixels


@dataclass(frozen=True)
class Object:
    """One object of a scene.  An empty string means that the law does not use this attribute."""

    name: str  # "ball", "block", "candle", ...
    color: str = ""  # one of COLORS, or the colour of a material
    size: str = ""  # "big", "small", "tall", "wide", ...
    place: str = ""  # "left", "middle" or "right"; of an arrow or a flag, the direction in which it points
    xy: tuple[int, int] | None = None  # centre in pixels, for arrangements only; laws choose the position

    @property
    def words(self) -> str:
        return " ".join(w for w in (self.size, self.color, self.name) if w)

    @property
    def where(self) -> str:
        """The place in words: "in the middle", "on the left"."""
        return "in the middle" if self.place == "middle" else f"on the {self.place}"

    @property
    def radius(self) -> int:
        """Half of the height in an arrangement, in pixels."""
        return BOX if self.name == "box" else RADIUS

    @property
    def material(self) -> str:
        """The material as a noun: "wood", "iron", or "plastic" for any other colour."""
        return {"wooden": "wood", "iron": "iron"}.get(self.color, "plastic")


Objects = tuple[Object, ...]


@dataclass(frozen=True)
class Scene:
    """The content of a picture."""

    law: str  # a key of LAWS, or ARRANGEMENT
    objects: Objects
    outcome: str  # a key of the law's `outcomes`, such as "floats"; "" for an arrangement
    shift: tuple[int, int] = (0, 0)  # (x, y) by which the whole picture is moved, in pixels

    @property
    def facts(self) -> tuple[str, Objects, str]:
        """All fields but the camera's `shift`."""
        return (self.law, self.objects, self.outcome)


@dataclass(frozen=True)
class Reading:
    """The inspector's result."""

    scene: Scene | None  # None if the picture is unreadable
    residual: float  # largest difference of a 4x4 block of pixels from the rendered scene, in [0, 1]
    why: str = ""  # the reason why a picture is unreadable
    block: tuple[int, int] | None = None  # (x, y) of the block that differs most, if no scene explains it

    @property
    def readable(self) -> bool:
        return self.scene is not None

    def agrees_with(self, truth: Scene) -> bool:
        """Whether the reading has the facts of `truth`.  Shapes may be off by up to SAME_PLACE pixels."""
        read = self.scene
        if read is None or read.law != ARRANGEMENT or truth.law != ARRANGEMENT:
            return read is not None and read.facts == truth.facts

        def alike(a: Object, b: Object) -> bool:
            return a.words == b.words and distance(a, b) <= SAME_PLACE

        orders = permutations(read.objects) if len(read.objects) == len(truth.objects) else ()
        return any(all(map(alike, order, truth.objects)) for order in orders)


def distance(a: Object, b: Object) -> int:
    """The larger of the horizontal and the vertical distance between two centres, in pixels."""
    return max(abs(u - v) for u, v in zip(a.xy, b.xy))


def arrangement(objects: Iterable[Object]) -> Scene:
    """Shapes on paper as a scene, sorted from left to right."""
    return Scene(ARRANGEMENT, tuple(sorted(objects, key=lambda o: o.xy)), "")


def jitter(scene: Scene, rng: random.Random) -> Scene:
    """The scene with a random shift of up to MAX_SHIFT pixels along each axis."""
    return replace(scene, shift=(rng.randint(-MAX_SHIFT, MAX_SHIFT), rng.randint(-MAX_SHIFT, MAX_SHIFT)))
