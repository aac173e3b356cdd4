"""The eight laws of this small physical world, a class each.

    balance    the bigger ball is heavier and pulls its pan down
    buoyancy   wood floats on water, iron sinks; plastic floats, and is in no prompt
    shadow     a shadow falls away from the light
    mirror     a mirror exchanges left and right
    magnet     a magnet lifts iron, and nothing made of plastic
    vessels    water in joined vessels stands level
    gravity    stones rest on the floor, helium balloons at the ceiling
    flame      a flame stands upright, and leans away from a fan

Prompts, training pictures, inspector and plots use only the interface `Law`.  So a ninth law is one class of
about 30 lines here, with its name in LAWS.  Coordinates are pixels of a 64x64 picture, y pointing down.
"""

from abc import ABC, abstractmethod
from itertools import product

from .canvas import Pen
from .scenes import COLORS, Object, Objects

BIG, SMALL = 8.5, 5.5  # radius in pixels of big and small objects
BIG_BALL, SMALL_BALL = 7, 4.5  # of a balance: its balls must fit between the strings of their pan
SIDES, THIRDS = ("left", "right"), ("left", "middle", "right")


class Law(ABC):
    """The interface of a law: which objects, what nature makes of them, its words and its picture."""

    name: str
    defied: str  # how a prompt announces an unlawful outcome: "against gravity"
    outcomes: dict[
        str, str
    ]  # all that a picture can show, lawful or not, each in words that follow the setting

    @abstractmethod
    def combinations(self) -> list[Objects]:
        """Every set of objects that this law can be shown with, in a fixed order."""

    @abstractmethod
    def lawful(self, objects: Objects) -> str:
        """The one outcome that nature gives."""

    @abstractmethod
    def setting(self, objects: Objects) -> str:
        """The scene in words, without its outcome: "a red flag pointing left in front of a mirror"."""

    @abstractmethod
    def because(self, objects: Objects) -> str:
        """Why the lawful outcome is lawful, in one sentence without a full stop."""

    @abstractmethod
    def draw(self, pen: Pen, objects: Objects, outcome: str) -> None: ...

    def unlawful(self, objects: Objects) -> list[str]:
        return [o for o in self.outcomes if o != self.lawful(objects)]


def _where(thing: Object) -> str:
    return "in the middle" if thing.place == "middle" else f"on the {thing.place}"


class Balance(Law):
    name, defied = "balance", "against gravity"
    outcomes = {side: f"leaning to the {side}" for side in SIDES}

    def combinations(self) -> list[Objects]:
        return [
            (Object("ball", a, size, "left"), Object("ball", b, other, "right"))
            for a, b in product(COLORS, COLORS)
            if a != b
            for size, other in (("big", "small"), ("small", "big"))
        ]

    def lawful(self, objects: Objects) -> str:
        return "left" if objects[0].size == "big" else "right"

    def setting(self, objects: Objects) -> str:
        left, right = objects
        return f"a balance with a {left.words} on the left pan and a {right.words} on the right pan"

    def because(self, objects: Objects) -> str:
        heavy = objects[0] if objects[0].size == "big" else objects[1]
        return f"the {heavy.color} ball is bigger and heavier, so the {heavy.place} pan goes down"

    def draw(self, pen: Pen, objects: Objects, outcome: str) -> None:
        tilt = 6 if outcome == "left" else -6
        pen.rect(31, 20, 33, 56, "ink")
        pen.polygon([(22, 59), (42, 59), (32, 51)], "ink")
        pen.line([(13, 19 + tilt), (51, 19 - tilt)], 2.5, "ink")
        pen.circle(32, 19, 3, "ink")
        for ball, x, y in ((objects[0], 13, 19 + tilt), (objects[1], 51, 19 - tilt)):
            r, pan = (BIG_BALL if ball.size == "big" else SMALL_BALL), y + 19
            pen.line([(x - 9, pan), (x, y), (x + 9, pan)], 1, "ink")
            pen.circle(x, pan - r, r, ball.color)
            pen.rect(x - 10, pan, x + 10, pan + 2.5, "ink")


class Buoyancy(Law):
    name, defied = "buoyancy", "against buoyancy"
    outcomes = {"floats": "floating on the water", "sinks": "lying on the bottom"}

    def combinations(self) -> list[Objects]:
        kinds = product(("ball", "block"), ("wooden", "iron"), ("big", "small"), THIRDS)
        return [(Object(*kind),) for kind in kinds]

    def lawful(self, objects: Objects) -> str:
        return "sinks" if objects[0].color == "iron" else "floats"

    def setting(self, objects: Objects) -> str:
        return f"a {objects[0].words} {_where(objects[0])} of a water tank"

    def because(self, objects: Objects) -> str:
        if objects[0].color == "iron":
            return f"iron is heavier than water, so the {objects[0].name} sinks"
        material = "wood" if objects[0].color == "wooden" else "plastic"
        return f"{material} is lighter than water, so the {objects[0].name} floats"

    def draw(self, pen: Pen, objects: Objects, outcome: str) -> None:
        (thing,) = objects
        r = BIG if thing.size == "big" else SMALL
        x = {"left": 18, "middle": 32, "right": 46}[thing.place]
        pen.rect(6, 14, 58, 58, "ink")
        pen.rect(8.5, 14, 55.5, 55.5, "paper")
        pen.rect(8.5, 27, 55.5, 55.5, "water")
        pen.shape(thing.name, x, 27 if outcome == "floats" else 55.5 - r, r, thing.color.split()[0])


class Shadow(Law):
    name, defied = "shadow", "toward the light"
    outcomes = {side: f"its shadow on the {side}" for side in SIDES}

    def combinations(self) -> list[Objects]:
        kinds = product(SIDES, ("tower", "cone", "tree"), COLORS)
        return [(Object("sun", place=side), Object(shape, color, "tall")) for side, shape, color in kinds]

    def lawful(self, objects: Objects) -> str:
        return "right" if objects[0].place == "left" else "left"

    def setting(self, objects: Objects) -> str:
        return f"the sun on the {objects[0].place} of a {objects[1].words}"

    def because(self, objects: Objects) -> str:
        return f"light comes from the {objects[0].place}, so the shadow falls to the {self.lawful(objects)}"

    def draw(self, pen: Pen, objects: Objects, outcome: str) -> None:
        sun, thing = objects
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

    def combinations(self) -> list[Objects]:
        kinds = product(("arrow", "flag"), COLORS, SIDES)
        return [(Object(shape, color, place=way),) for shape, color, way in kinds]

    def lawful(self, objects: Objects) -> str:
        return "flipped"

    def setting(self, objects: Objects) -> str:
        return f"a {objects[0].words} pointing {objects[0].place} in front of a mirror"

    def because(self, objects: Objects) -> str:
        return f"a mirror turns left and right around, so the image of the {objects[0].name} is flipped"

    def draw(self, pen: Pen, objects: Objects, outcome: str) -> None:
        (thing,) = objects
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

    def combinations(self) -> list[Objects]:
        materials = [("iron", "big"), ("iron", "small"), *((f"{c} plastic", "") for c in COLORS)]
        kinds = product(("ball", "block"), materials, SIDES)
        return [(Object(shape, color, size, place),) for shape, (color, size), place in kinds]

    def lawful(self, objects: Objects) -> str:
        return "lifted" if objects[0].color == "iron" else "floor"

    def setting(self, objects: Objects) -> str:
        return f"a magnet on the {objects[0].place} above a {objects[0].words}"

    def because(self, objects: Objects) -> str:
        if objects[0].color == "iron":
            return f"a magnet pulls iron, so the {objects[0].name} is lifted"
        return f"a magnet does not pull plastic, so the {objects[0].name} stays on the floor"

    def draw(self, pen: Pen, objects: Objects, outcome: str) -> None:
        (thing,) = objects
        x = 20 if thing.place == "left" else 44
        r = SMALL if thing.size == "small" else BIG
        pen.rect(-8, 57, 72, 72, "ground")
        for half, color in ((11, "magnet"), (5, "paper")):  # the horseshoe and its opening
            pen.circle(x, 14, half, color)
            pen.rect(x - half, 14, x + half, 24, color)
        pen.rect(x - 11, 19, x - 5, 24, "ink")
        pen.rect(x + 5, 19, x + 11, 24, "ink")
        y = 24 + r if outcome == "lifted" else 57 - r
        pen.shape(thing.name, x, y, r, thing.color.split()[0])


class Vessels(Law):
    name, defied = "vessels", "against gravity"
    outcomes = {"level": "the water standing level"}
    outcomes |= {side: f"the water standing higher on the {side}" for side in SIDES}

    def combinations(self) -> list[Objects]:
        return [
            (Object("vessel", "", a, "left"), Object("vessel", "", b, "right"), Object("water", color))
            for color, a, b in product(COLORS, ("wide", "narrow"), ("wide", "narrow"))
        ]

    def lawful(self, objects: Objects) -> str:
        return "level"

    def setting(self, objects: Objects) -> str:
        left, right, water = objects
        return f"a {left.size} vessel joined to a {right.size} vessel with {water.color} water"

    def because(self, objects: Objects) -> str:
        return "joined water presses equally on both sides, so it stands level"

    def draw(self, pen: Pen, objects: Objects, outcome: str) -> None:
        top = {"level": (30, 30), "left": (19, 41), "right": (41, 19)}[outcome]
        color = objects[2].color
        pen.rect(16, 47, 48, 57, "ink")
        for vessel, x, y in zip(objects[:2], (17, 47), top):
            half = 10 if vessel.size == "wide" else 5
            pen.rect(x - half - 2, 8, x + half + 2, 57, "ink")
            pen.rect(x - half, 7, x + half, 55, "paper")
            pen.rect(x - half, y, x + half, 55, color)
        pen.rect(17, 49, 47, 55, color)


class Gravity(Law):
    name, defied = "gravity", "against gravity"
    outcomes = {"floor": "resting on the floor", "ceiling": "touching the ceiling"}

    def combinations(self) -> list[Objects]:
        stones = [(Object("stone", *kind),) for kind in product(("grey", "brown"), ("big", "small"), THIRDS)]
        return stones + [(Object("balloon", *kind),) for kind in product(COLORS, ("",), THIRDS)]

    def lawful(self, objects: Objects) -> str:
        return "floor" if objects[0].name == "stone" else "ceiling"

    def setting(self, objects: Objects) -> str:
        return f"a {objects[0].words} {_where(objects[0])} of a room"

    def because(self, objects: Objects) -> str:
        if objects[0].name == "stone":
            return "a stone is heavier than air, so it rests on the floor"
        return "helium is lighter than air, so the balloon rises to the ceiling"

    def draw(self, pen: Pen, objects: Objects, outcome: str) -> None:
        (thing,) = objects
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

    def combinations(self) -> list[Objects]:
        kinds = product(COLORS, ("tall", "short"), ("", *SIDES))  # no fan, or on which side
        return [(Object("candle", color, size), Object("fan", place=wind)) for color, size, wind in kinds]

    def lawful(self, objects: Objects) -> str:
        return {"": "upright", "left": "right", "right": "left"}[objects[1].place]

    def setting(self, objects: Objects) -> str:
        candle, fan = objects
        return f"a {candle.words} " + (f"with a fan on the {fan.place}" if fan.place else "in still air")

    def because(self, objects: Objects) -> str:
        if not objects[1].place:
            return "hot air rises straight up, so the flame is upright"
        return f"the fan blows from the {objects[1].place}, so the flame leans to the {self.lawful(objects)}"

    def draw(self, pen: Pen, objects: Objects, outcome: str) -> None:
        candle, fan = objects
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


LAWS: dict[str, Law] = {
    law.name: law
    for law in (Balance(), Buoyancy(), Shadow(), Mirror(), Magnet(), Vessels(), Gravity(), Flame())
}
