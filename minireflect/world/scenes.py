"""What a picture shows, as data: a scene is a law, its objects and an outcome, made from a seed.

Everything else in the world reads this one record: `render` draws it, `caption` and `rationale` put it into
words, `graph` into triples, and `inspect` gives the same facts back from pixels alone.
"""

import random
from dataclasses import dataclass, replace

COLORS = ("red", "green", "blue", "yellow", "purple")


@dataclass(frozen=True)
class Object:
    """One thing in a scene.  An empty string means that the attribute plays no part in this law."""

    name: str  # "ball", "block", "candle", ...
    color: str = ""  # one of COLORS, or the colour of a material
    size: str = ""  # "big", "small", "tall", "wide", ...
    place: str = ""  # "left", "middle", "right", or the way it points
    xy: tuple[int, int] | None = None  # centre in pixels; arrangements only, the laws place their own

    @property
    def words(self) -> str:
        return " ".join(w for w in (self.size, self.color, self.name) if w)


@dataclass(frozen=True)
class Scene:
    """A picture in words: `outcome` is what the law made of the objects ("left" pan down, "floats", ...)."""

    law: str
    objects: tuple[Object, ...]
    outcome: str
    shift: tuple[int, int] = (0, 0)  # the whole picture moved by (x, y) pixels, in [-MAX_SHIFT, MAX_SHIFT]

    @property
    def facts(self) -> tuple[str, tuple[Object, ...], str]:
        """What must be right about a picture; where exactly the camera stood is not part of it."""
        return (self.law, self.objects, self.outcome)


@dataclass(frozen=True)
class Reading:
    """What the inspector saw.  `scene` is None when the picture is unreadable; `why` says what was wrong then."""

    scene: Scene | None
    residual: float  # largest difference of a 4x4 block of pixels from the scene drawn again, in [0, 1]
    why: str = ""

    @property
    def readable(self) -> bool:
        return self.scene is not None

    def agrees_with(self, drawn: Scene) -> bool:
        """Whether all facts of a scene were read; the shapes of an arrangement may lie two pixels off."""
        read = self.scene
        if read is None or read.law != drawn.law or len(read.objects) != len(drawn.objects):
            return False
        if drawn.law != "arrangement":
            return read.facts == drawn.facts
        left = list(read.objects)
        for thing in drawn.objects:
            near = [
                o
                for o in left
                if o.words == thing.words and max(abs(a - b) for a, b in zip(o.xy, thing.xy)) <= 2
            ]
            if not near:
                return False
            left.remove(near[0])
        return True


MAX_SHIFT = 2  # pixels by which a sampled scene may be moved


def jitter(scene: Scene, rng: random.Random) -> Scene:
    """The same scene seen by a camera that stands up to MAX_SHIFT pixels off."""
    return replace(scene, shift=(rng.randint(-MAX_SHIFT, MAX_SHIFT), rng.randint(-MAX_SHIFT, MAX_SHIFT)))
