"""The content of a picture as data: a scene is a law of physics, its objects and an outcome.

Everything else in the world uses this record: `render` turns it into pixels, `caption` and `rationale` into
words, and `inspect` recovers it from pixels alone.
"""

import random
from collections.abc import Iterable
from dataclasses import dataclass, replace

SPLITS = ("train", "validation", "test")  # of prompts and graphs; the last two are held out from training
COLORS = ("red", "green", "blue", "yellow", "purple")
ARRANGEMENT = "arrangement"  # in place of a law: one to four shapes on paper, see graphs.py
MAX_SHIFT = 2  # pixels by which a sampled scene may be moved
RADIUS, BOX = 7, 12  # pixels; half the height of a shape of an arrangement, and of a box, which holds one
SAME_PLACE = 2  # pixels by which a shape of an arrangement may be read off its place


@dataclass(frozen=True)
class Object:
    """One object of a scene.  An empty string means that the attribute plays no part in this law."""

    name: str  # "ball", "block", "candle", ...
    color: str = ""  # one of COLORS, or the colour of a material
    size: str = ""  # "big", "small", "tall", "wide", ...
    place: str = ""  # "left", "middle", "right", or the direction in which it points
    xy: tuple[int, int] | None = None  # centre in pixels; arrangements only, laws place their own

    @property
    def words(self) -> str:
        return " ".join(w for w in (self.size, self.color, self.name) if w)

    @property
    def where(self) -> str:
        """Its place in words: "in the middle", "on the left"."""
        return "in the middle" if self.place == "middle" else f"on the {self.place}"

    @property
    def radius(self) -> int:
        """Of an arrangement: half its height, in pixels."""
        return BOX if self.name == "box" else RADIUS

    @property
    def material(self) -> str:
        """As a noun: "wood", "iron", or "plastic" of any colour."""
        return {"wooden": "wood", "iron": "iron"}.get(self.color, "plastic")


Objects = tuple[Object, ...]


@dataclass(frozen=True)
class Scene:
    """The facts of a picture: `outcome` is what the law decides ("left" pan down, "floats", ...)."""

    law: str  # a key of LAWS, or ARRANGEMENT
    objects: Objects
    outcome: str
    shift: tuple[int, int] = (0, 0)  # the whole picture moved by (x, y) pixels, in [-MAX_SHIFT, MAX_SHIFT]

    def __post_init__(self) -> None:
        if self.law == ARRANGEMENT and any(o.xy is None for o in self.objects):
            raise ValueError(f"shapes of an arrangement need xy, their centre in pixels, got {self.objects}")

    @property
    def facts(self) -> tuple[str, Objects, str]:
        """The facts that a picture must show.  The camera position is not one of them."""
        return (self.law, self.objects, self.outcome)


@dataclass(frozen=True)
class Reading:
    """The inspector's result.  For an unreadable picture `scene` is None and `why` is a sentence; `block` is
    the (x, y) of the 4x4 pixels that differ most from the nearest scene, if there is such a scene.
    """

    scene: Scene | None
    residual: float  # largest difference of a 4x4 block of pixels from the rendered scene, in [0, 1]
    why: str = ""
    block: tuple[int, int] | None = None

    @property
    def readable(self) -> bool:
        return self.scene is not None

    def agrees_with(self, truth: Scene) -> bool:
        """Whether every fact of the scene was read; shapes of an arrangement may be SAME_PLACE pixels off."""
        read = self.scene
        if read is None or read.law != ARRANGEMENT or truth.law != ARRANGEMENT:
            return read is not None and read.facts == truth.facts
        unmatched = list(read.objects)
        for o in truth.objects:
            near = [p for p in unmatched if p.words == o.words and distance(p, o) <= SAME_PLACE]
            if not near:
                return False
            unmatched.remove(near[0])
        return not unmatched


def distance(a: Object, b: Object) -> int:
    """The larger of the horizontal and the vertical distance of two centres, in pixels."""
    return max(abs(u - v) for u, v in zip(a.xy, b.xy))


def arrangement(objects: Iterable[Object]) -> Scene:
    """Shapes on paper as a scene, in a fixed order: from left to right."""
    return Scene(ARRANGEMENT, tuple(sorted(objects, key=lambda o: o.xy)), "")


def jitter(scene: Scene, rng: random.Random) -> Scene:
    """The same scene with the camera moved by up to MAX_SHIFT pixels."""
    return replace(scene, shift=(rng.randint(-MAX_SHIFT, MAX_SHIFT), rng.randint(-MAX_SHIFT, MAX_SHIFT)))
