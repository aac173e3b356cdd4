"""The eight laws of the synthetic world, one class each, and the rendering of scenes.

    balance    the pan with the bigger, heavier ball goes down
    buoyancy   wood floats on water, iron sinks; plastic floats too, but is in no prompt
    shadow     a shadow falls away from the light
    mirror     a mirror exchanges left and right
    magnet     a magnet lifts iron but not plastic
    vessels    water in joined vessels stands level
    gravity    stones rest on the floor, and helium balloons touch the ceiling
    flame      a flame is upright in still air, and leans away from a fan

A law decides the lawful outcome for its objects, describes it in words, and draws it.  `render` turns the
scene of a law or of an arrangement into pixels.  Other modules use only the interface `Law`; to add a law,
write one class of about 30 lines and add it to EVERY_LAW.  Coordinates are in pixels of a 64x64 picture; y
points down.

    render(sample_scene(seed=3)).shape == (3, 64, 64)
"""

from abc import ABC, abstractmethod
from functools import lru_cache
from itertools import permutations, product

import numpy as np
from torch import Tensor

from ..ranges import expect
from .canvas import MARGIN, SIZE, Pen, to_tensor
from .scenes import ARRANGEMENT, COLORS, Object, Objects, Scene

BIG, SMALL = 8.5, 5.5  # radius of big and small objects in pixels
BIG_BALL, SMALL_BALL = 7, 4.5  # radius of a balance's balls, which must fit between the strings of a pan
OPPOSITES = (("left", "right"), ("right", "left"))
SIDES, THIRDS = ("left", "right"), ("left", "middle", "right")


class Law(ABC):
    """The interface of a law: its objects, its outcomes, its words and its picture.

    `words`, `reasons` and the deciding fact in `nature` are format strings that are filled with the objects:
    "a {0.words} in a room".
    """

    name: str
    defied: str  # the words that announce an unlawful outcome: "against gravity"
    outcomes: dict[str, str]  # every outcome, lawful or not -> words that follow the setting
    words: str  # the setting, that is, the scene without its outcome
    nature: tuple[str, dict[str, str]]  # the deciding fact, and: value of the fact -> lawful outcome
    reasons: dict[str, str]  # lawful outcome -> the reason, a sentence without a full stop
    combinations: list[Objects]  # every set of objects of this law, in a fixed order

    @abstractmethod
    def draw(self, pen: Pen, outcome: str, *objects: Object) -> None:
        """Draw the objects with this outcome."""

    def lawful(self, objects: Objects) -> str:
        """The lawful outcome; each combination of objects has exactly one."""
        fact, outcomes = self.nature
        return outcomes[fact.format(*objects)]

    def unlawful(self, objects: Objects) -> list[str]:
        return [o for o in self.outcomes if o != self.lawful(objects)]

    def setting(self, objects: Objects) -> str:
        """The scene in words without its outcome: "a red flag pointing left in front of a mirror"."""
        return self.words.format(*objects)

    def because(self, objects: Objects) -> str:
        """The reason for the lawful outcome: "iron is heavier than water, so the ball sinks"."""
        return self.reasons[self.lawful(objects)].format(*objects)


def _alone(*attributes: tuple[str, ...]) -> list[Objects]:
    """All combinations of one object with one of these names, colours, sizes and places."""
    return [(Object(*values),) for values in product(*attributes)]


class Balance(Law):
    name, defied = "balance", "against gravity"
    outcomes = {side: f"leaning to the {side}" for side in SIDES}
    words = "a balance with a {0.words} on the left pan and a {1.words} on the right pan"
    nature = "{0.size}", {"big": "left", "small": "right"}
    reasons = {"left": "the {0.color} ball is bigger and heavier, so the left pan goes down",
               "right": "the {1.color} ball is bigger and heavier, so the right pan goes down"}  # fmt: skip
    kinds = product(permutations(COLORS, 2), permutations(("big", "small")))  # of the left and right ball
    combinations = [(Object("ball", a, s, "left"), Object("ball", b, t, "right")) for (a, b), (s, t) in kinds]

    def draw(self, pen: Pen, outcome: str, left: Object, right: Object) -> None:
        tilt = 6 if outcome == "left" else -6
        pen.rect(31, 20, 33, 56, "ink")
        pen.polygon([(22, 59), (42, 59), (32, 51)], "ink")
        pen.line([(13, 19 + tilt), (51, 19 - tilt)], 2.5, "ink")
        pen.circle(32, 19, 3, "ink")
        for ball, x, y in ((left, 13, 19 + tilt), (right, 51, 19 - tilt)):
            r, pan = (BIG_BALL if ball.size == "big" else SMALL_BALL), y + 19
            pen.line([(x - 9, pan), (x, y), (x + 9, pan)], 1, "ink")
            pen.circle(x, pan - r, r, ball.color)
            pen.rect(x - 10, pan, x + 10, pan + 2.5, "ink")


class Buoyancy(Law):
    name, defied = "buoyancy", "against buoyancy"
    outcomes = {"floats": "floating on the water", "sinks": "lying on the bottom"}
    words = "a {0.words} {0.where} of a water tank"
    nature = "{0.material}", {"wood": "floats", "plastic": "floats", "iron": "sinks"}
    reasons = {"floats": "{0.material} is lighter than water, so the {0.name} floats",
               "sinks": "{0.material} is heavier than water, so the {0.name} sinks"}  # fmt: skip
    combinations = _alone(("ball", "block"), ("wooden", "iron"), ("big", "small"), THIRDS)

    def draw(self, pen: Pen, outcome: str, thing: Object) -> None:
        r = BIG if thing.size == "big" else SMALL
        x = {"left": 18, "middle": 32, "right": 46}[thing.place]
        pen.rect(6, 14, 58, 58, "ink")
        pen.rect(8.5, 14, 55.5, 55.5, "paper")
        pen.rect(8.5, 27, 55.5, 55.5, "water")
        pen.shape(thing.name, x, 27 if outcome == "floats" else 55.5 - r, r, thing.color.split()[0])


class Shadow(Law):
    name, defied = "shadow", "toward the light"
    outcomes = {side: f"its shadow on the {side}" for side in SIDES}
    words = "the sun {0.where} of a {1.words}"
    nature = "{0.place}", dict(OPPOSITES)
    reasons = {a: f"light comes from the {b}, so the shadow falls to the {a}" for a, b in OPPOSITES}
    kinds = product(SIDES, ("tower", "cone", "tree"), COLORS)
    combinations = [(Object("sun", place=side), Object(shape, color, "tall")) for side, shape, color in kinds]

    def draw(self, pen: Pen, outcome: str, sun: Object, thing: Object) -> None:
        pen.rect(-8, 46, 72, 72, "ground")
        pen.circle(10 if sun.place == "left" else 54, 11, 6.5, "sun")
        s = 1 if outcome == "right" else -1
        pen.polygon([(32 - 6 * s, 49), (32 + 24 * s, 52), (32 + 24 * s, 57), (32 - 3 * s, 55)], "shade")
        if thing.name == "tower":
            pen.rect(26, 22, 38, 53, thing.color)
        elif thing.name == "cone":
            pen.polygon([(32, 20), (42, 53), (22, 53)], thing.color)
        else:
            pen.rect(30, 36, 34, 53, "wooden")
            pen.circle(32, 29, 10, thing.color)


class Mirror(Law):
    name, defied = "mirror", "against optics"
    outcomes = {"flipped": "its image pointing the other way", "same": "its image pointing the same way"}
    words = "a {0.words} pointing {0.place} in front of a mirror"
    nature = "", {"": "flipped"}
    reasons = {"flipped": "a mirror turns left and right around, so the image of the {0.name} is flipped"}
    combinations = _alone(("arrow", "flag"), COLORS, ("",), SIDES)

    def draw(self, pen: Pen, outcome: str, thing: Object) -> None:
        sign = 1 if thing.place == "right" else -1
        pen.rect(29.5, 6, 34.5, 58, "ink")
        pen.rect(31, 8, 33, 56, "water")
        for x, s in ((15, sign), (49, -sign if outcome == "flipped" else sign)):
            if thing.name == "arrow":
                pen.rect(min(x - 11 * s, x), 29, max(x - 11 * s, x), 35, thing.color)
                pen.polygon([(x, 22), (x, 42), (x + 11 * s, 32)], thing.color)
            else:
                pen.rect(min(x - 9 * s, x - 6 * s), 14, max(x - 9 * s, x - 6 * s), 54, "ink")
                pen.polygon([(x - 6 * s, 15), (x - 6 * s, 35), (x + 10 * s, 25)], thing.color)


class Magnet(Law):
    name, defied = "magnet", "against magnetism"
    outcomes = {"lifted": "lifted by the magnet", "floor": "staying on the floor"}
    words = "a magnet {0.where} above a {0.words}"
    nature = "{0.material}", {"iron": "lifted", "plastic": "floor"}
    reasons = {"lifted": "a magnet pulls iron, so the {0.name} is lifted",
               "floor": "a magnet does not pull plastic, so the {0.name} stays on the floor"}  # fmt: skip
    materials = [("iron", "big"), ("iron", "small"), *((f"{c} plastic", "") for c in COLORS)]
    kinds = product(("ball", "block"), materials, SIDES)
    combinations = [(Object(shape, color, size, place),) for shape, (color, size), place in kinds]

    def draw(self, pen: Pen, outcome: str, thing: Object) -> None:
        x = 20 if thing.place == "left" else 44
        r = SMALL if thing.size == "small" else BIG
        pen.rect(-8, 57, 72, 72, "ground")
        for half, color in ((11, "magnet"), (5, "paper")):  # the horseshoe and its opening
            pen.circle(x, 14, half, color)
            pen.rect(x - half, 14, x + half, 24, color)
        for pole in (x - 8, x + 8):
            pen.rect(pole - 3, 19, pole + 3, 24, "ink")
        pen.shape(thing.name, x, 24 + r if outcome == "lifted" else 57 - r, r, thing.color.split()[0])


class Vessels(Law):
    name, defied = "vessels", "against gravity"
    outcomes = {"level": "the water standing level"}
    outcomes |= {side: f"the water standing higher on the {side}" for side in SIDES}
    words = "a {0.size} vessel joined to a {1.size} vessel with {2.color} water"
    nature = "", {"": "level"}
    reasons = {"level": "joined water presses equally on both sides, so it stands level"}
    combinations = [
        (Object("vessel", "", a, "left"), Object("vessel", "", b, "right"), Object("water", color))
        for color, a, b in product(COLORS, ("wide", "narrow"), ("wide", "narrow"))
    ]

    def draw(self, pen: Pen, outcome: str, left: Object, right: Object, water: Object) -> None:
        top = {"level": (30, 30), "left": (19, 41), "right": (41, 19)}[outcome]
        pen.rect(16, 47, 48, 57, "ink")
        for vessel, x, y in zip((left, right), (17, 47), top):
            half = 10 if vessel.size == "wide" else 5
            pen.rect(x - half - 2, 8, x + half + 2, 57, "ink")
            pen.rect(x - half, 7, x + half, 55, "paper")
            pen.rect(x - half, y, x + half, 55, water.color)
        pen.rect(17, 49, 47, 55, water.color)


class Gravity(Law):
    name, defied = "gravity", "against gravity"
    outcomes = {"floor": "resting on the floor", "ceiling": "touching the ceiling"}
    words = "a {0.words} {0.where} of a room"
    nature = "{0.name}", {"stone": "floor", "balloon": "ceiling"}
    reasons = {"floor": "a stone is heavier than air, so it rests on the floor",
               "ceiling": "helium is lighter than air, so the balloon rises to the ceiling"}  # fmt: skip
    combinations = _alone(("stone",), ("grey", "brown"), ("big", "small"), THIRDS)
    combinations += _alone(("balloon",), COLORS, ("",), THIRDS)

    def draw(self, pen: Pen, outcome: str, thing: Object) -> None:
        x = {"left": 15, "middle": 32, "right": 49}[thing.place]
        pen.rect(-8, -8, 72, 6, "ground")
        pen.rect(-8, 58, 72, 72, "ground")
        if thing.name == "stone":
            r = 8.5 if thing.size == "big" else 5
            y, flip = (58 - 0.75 * r, 1) if outcome == "floor" else (6 + 0.75 * r, -1)
            outline = ((-1, 0.75), (-1, -0.1), (-0.45, -0.75), (0.5, -0.75), (1, 0), (0.9, 0.75))
            pen.polygon([(x + u * r, y + flip * v * r) for u, v in outline], thing.color)
        else:
            y, end = (48, 33) if outcome == "floor" else (16, 38)
            pen.line([(x, y), (x, end)], 1.5, "ink")
            pen.ellipse(x, y, 8, 10, thing.color)


class Flame(Law):
    name, defied = "flame", "against the air"
    outcomes = {"upright": "the flame upright"} | {side: f"the flame leaning to the {side}" for side in SIDES}
    nature = "{1.place}", {"": "upright", **dict(OPPOSITES)}
    reasons = {a: f"the fan blows from the {b}, so the flame leans to the {a}" for a, b in OPPOSITES}
    reasons["upright"] = "hot air rises straight up, so the flame is upright"
    kinds = product(COLORS, ("tall", "short"), ("", *SIDES))  # side of the fan; "" means no fan
    combinations = [(Object("candle", color, size), Object("fan", place=wind)) for color, size, wind in kinds]

    def setting(self, objects: Objects) -> str:
        candle, fan = objects
        return f"a {candle.words} " + (f"with a fan {fan.where}" if fan.place else "in still air")

    def draw(self, pen: Pen, outcome: str, candle: Object, fan: Object) -> None:
        top = 33 if candle.size == "tall" else 43
        lean, rise = {"upright": (0, 17), "left": (-10, 13), "right": (10, 13)}[outcome]
        pen.rect(-8, 58, 72, 72, "ground")
        pen.rect(27, top, 37, 58, candle.color)
        pen.rect(31.3, top - 3, 32.7, top, "ink")
        pen.polygon([(27.5, top - 6), (36.5, top - 6), (32 + lean, top - 4 - rise)], "flame")
        pen.circle(32, top - 6, 4.5, "flame")
        if fan.place:
            x = 12 if fan.place == "left" else 52
            pen.rect(x - 1, 24, x + 1, 58, "ink")
            pen.circle(x, 24, 7.5, "ink")
            pen.circle(x, 24, 5.5, "water")
            pen.line([(x - 5, 24), (x + 5, 24)], 2, "ink")
            pen.line([(x, 19), (x, 29)], 2, "ink")


EVERY_LAW = (Balance, Buoyancy, Shadow, Mirror, Magnet, Vessels, Gravity, Flame)
LAWS: dict[str, Law] = {law.name: law() for law in EVERY_LAW}


# ------------------------------------------------------------------------------------- from a scene to pixels
def _draw(law: str, objects: Objects, outcome: str) -> np.ndarray:
    pen = Pen()
    if law == ARRANGEMENT:  # shapes that are lower in the picture are nearer to the camera: draw them last
        for o in sorted(objects, key=lambda o: o.xy[1]):
            pen.shape(o.name, *o.xy, o.radius, o.color)
    else:
        LAWS[law].draw(pen, outcome, *objects)
    return pen.canvas()


_of_law = lru_cache(512)(_draw)  # holds all 488 canvases of the laws, 19 kB each; arrangements are too many


def canvas(law: str, objects: Objects, outcome: str) -> np.ndarray:
    """The scene with a margin; a picture is a crop of it.  -> (80 80 3) uint8, read-only"""
    return (_draw if law == ARRANGEMENT else _of_law)(law, objects, outcome)


def render_pixels(scene: Scene) -> np.ndarray:
    """The scene as pixels, a view of its canvas.  -> (64 64 3) uint8, read-only"""
    x, y = MARGIN - scene.shift[0], MARGIN - scene.shift[1]
    return canvas(*scene.facts)[y : y + SIZE, x : x + SIZE]


def render(scene: Scene) -> Tensor:
    """The scene as a tensor.  -> (3 64 64) float32 in [-1, 1]"""
    return to_tensor(render_pixels(expect(scene, Scene, "scene"))[None])[0]
