"""What a law of this world is: a table of object combinations, the lawful outcome of each, the words, and a drawing."""

from abc import ABC, abstractmethod

from .canvas import Pen
from .scenes import COLORS, Object

# The bigger ball is heavier and pulls its pan down.
# Wood floats on water, iron sinks; and plastic, which is in no prompt, floats.
# A shadow falls away from the light.
# A mirror turns left and right around.
# A magnet lifts iron, and nothing made of plastic.
# Water in joined vessels stands level.
# Stones rest on the floor, helium balloons at the ceiling.
# A flame stands upright, and leans away from a fan.
# The laws of this small physical world, one file each.
#
# The prompt sets, the training pictures, the inspector and every plot read only the interface in `law.py`, so a ninth
# law is one class of about 40 lines, and its name below.  Coordinates are pixels of a 64x64 picture, y pointing down.

BIG, SMALL = 8.5, 5.5  # radius in pixels of big and small things


class Law(ABC):
    """The interface of a law.  `outcomes` are all that a picture can show, lawful or not."""

    name: str
    outcomes: tuple[str, ...]
    defied: str  # how an unlawful outcome is announced: "against gravity"

    @abstractmethod
    def combinations(self) -> list[tuple[Object, ...]]:
        """Every set of objects that this law can be shown with, in a fixed order."""

    @abstractmethod
    def lawful(self, objects: tuple[Object, ...]) -> str:
        """The one outcome that nature would give."""

    @abstractmethod
    def setting(self, objects: tuple[Object, ...]) -> str:
        """The scene in words, its outcome left open."""

    @abstractmethod
    def result(self, objects: tuple[Object, ...], outcome: str) -> str:
        """The outcome in words, after a comma."""

    @abstractmethod
    def because(self, objects: tuple[Object, ...]) -> str:
        """Why the lawful outcome is lawful, in one sentence without a full stop."""

    @abstractmethod
    def triples(self, objects: tuple[Object, ...], outcome: str) -> list[tuple[str, str, str]]:
        """(subject, relation, object) triples that hold in the picture."""

    @abstractmethod
    def draw(self, pen: Pen, objects: tuple[Object, ...], outcome: str) -> None: ...

    def possible(self, objects: tuple[Object, ...]) -> tuple[str, ...]:
        """The outcomes that a picture of these objects can show."""
        return self.outcomes

    def unlawful(self, objects: tuple[Object, ...]) -> list[str]:
        return [o for o in self.possible(objects) if o != self.lawful(objects)]


BIG_BALL, SMALL_BALL = 7, 4.5  # radius in pixels; a ball must fit between the strings of its pan


class Balance(Law):
    name, outcomes, defied = "balance", ("left", "right"), "against gravity"

    def combinations(self) -> list[tuple[Object, ...]]:
        return [
            (Object("ball", a, size, "left"), Object("ball", b, other, "right"))
            for a in COLORS
            for b in COLORS
            if a != b
            for size, other in (("big", "small"), ("small", "big"))
        ]

    def lawful(self, objects: tuple[Object, ...]) -> str:
        return "left" if objects[0].size == "big" else "right"

    def setting(self, objects: tuple[Object, ...]) -> str:
        left, right = objects
        return f"a balance with a {left.words} on the left pan and a {right.words} on the right pan"

    def result(self, objects: tuple[Object, ...], outcome: str) -> str:
        return f"leaning to the {outcome}"

    def because(self, objects: tuple[Object, ...]) -> str:
        heavy = objects[0] if objects[0].size == "big" else objects[1]
        return f"the {heavy.color} ball is bigger and heavier, so the {heavy.place} pan goes down"

    def triples(self, objects: tuple[Object, ...], outcome: str) -> list[tuple[str, str, str]]:
        other = "right" if outcome == "left" else "left"
        on = [(o.words, "on", f"{o.place} pan") for o in objects]
        return [*on, (f"{outcome} pan", "below", f"{other} pan")]

    def draw(self, pen: Pen, objects: tuple[Object, ...], outcome: str) -> None:
        tilt = 6 if outcome == "left" else -6
        pen.rect(31, 20, 33, 56, "ink"), pen.polygon([(22, 59), (42, 59), (32, 51)], "ink")
        pen.line([(13, 19 + tilt), (51, 19 - tilt)], 2.5, "ink"), pen.circle(32, 19, 3, "ink")
        for ball, x, y in ((objects[0], 13, 19 + tilt), (objects[1], 51, 19 - tilt)):
            r, pan = (BIG_BALL if ball.size == "big" else SMALL_BALL), y + 19
            pen.line([(x - 9, pan), (x, y), (x + 9, pan)], 1, "ink")
            pen.circle(x, pan - r, r, ball.color)
            pen.rect(x - 10, pan, x + 10, pan + 2.5, "ink")


class Buoyancy(Law):
    name, outcomes, defied = "buoyancy", ("floats", "sinks"), "against buoyancy"

    def combinations(self) -> list[tuple[Object, ...]]:
        return [
            (Object(shape, material, size, place),)
            for shape in ("ball", "block")
            for material in ("wooden", "iron")
            for size in ("big", "small")
            for place in ("left", "middle", "right")
        ]

    def lawful(self, objects: tuple[Object, ...]) -> str:
        return "sinks" if objects[0].color == "iron" else "floats"

    def setting(self, objects: tuple[Object, ...]) -> str:
        side = "in the middle" if objects[0].place == "middle" else f"on the {objects[0].place}"
        return f"a {objects[0].words} {side} of a water tank"

    def result(self, objects: tuple[Object, ...], outcome: str) -> str:
        return "floating on the water" if outcome == "floats" else "lying on the bottom"

    def because(self, objects: tuple[Object, ...]) -> str:
        if objects[0].color == "iron":
            return f"iron is heavier than water, so the {objects[0].name} sinks"
        material = "wood" if objects[0].color == "wooden" else "plastic"  # the second in no prompt
        return f"{material} is lighter than water, so the {objects[0].name} floats"

    def triples(self, objects: tuple[Object, ...], outcome: str) -> list[tuple[str, str, str]]:
        return [(objects[0].words, "on" if outcome == "floats" else "under", "water")]

    def draw(self, pen: Pen, objects: tuple[Object, ...], outcome: str) -> None:
        (thing,) = objects
        r = BIG if thing.size == "big" else SMALL
        x = {"left": 18, "middle": 32, "right": 46}[thing.place]
        pen.rect(6, 14, 58, 58, "ink"), pen.rect(8.5, 14, 55.5, 55.5, "paper")
        pen.rect(8.5, 27, 55.5, 55.5, "water")
        pen.shape(thing.name, x, 27 if outcome == "floats" else 55.5 - r, r, thing.color.split()[0])


class Shadow(Law):
    name, outcomes, defied = "shadow", ("left", "right"), "toward the light"

    def combinations(self) -> list[tuple[Object, ...]]:
        return [
            (Object("sun", place=side), Object(shape, color, size="tall"))
            for side in ("left", "right")
            for shape in ("tower", "cone", "tree")
            for color in COLORS
        ]

    def lawful(self, objects: tuple[Object, ...]) -> str:
        return "right" if objects[0].place == "left" else "left"

    def setting(self, objects: tuple[Object, ...]) -> str:
        return f"the sun on the {objects[0].place} of a {objects[1].words}"

    def result(self, objects: tuple[Object, ...], outcome: str) -> str:
        return f"its shadow on the {outcome}"

    def because(self, objects: tuple[Object, ...]) -> str:
        return f"light comes from the {objects[0].place}, so the shadow falls to the {self.lawful(objects)}"

    def triples(self, objects: tuple[Object, ...], outcome: str) -> list[tuple[str, str, str]]:
        thing = objects[1].words
        return [("sun", f"{objects[0].place} of", thing), ("shadow", f"{outcome} of", thing)]

    def draw(self, pen: Pen, objects: tuple[Object, ...], outcome: str) -> None:
        sun, thing = objects
        pen.rect(-8, 46, 72, 72, "ground")
        pen.circle(10 if sun.place == "left" else 54, 11, 6.5, "sun")
        sign = 1 if outcome == "right" else -1
        pen.polygon(
            [(32 - 6 * sign, 49), (32 + 24 * sign, 52), (32 + 24 * sign, 57), (32 - 3 * sign, 55)], "shade"
        )
        if thing.name == "tower":
            pen.rect(26, 22, 38, 53, thing.color)
        elif thing.name == "cone":
            pen.polygon([(32, 20), (42, 53), (22, 53)], thing.color)
        else:
            pen.rect(30, 36, 34, 53, "wooden"), pen.circle(32, 29, 10, thing.color)


class Mirror(Law):
    name, outcomes, defied = "mirror", ("flipped", "same"), "against optics"

    def combinations(self) -> list[tuple[Object, ...]]:
        return [
            (Object(shape, color, place=way),)
            for shape in ("arrow", "flag")
            for color in COLORS
            for way in ("left", "right")
        ]

    def lawful(self, objects: tuple[Object, ...]) -> str:
        return "flipped"

    def setting(self, objects: tuple[Object, ...]) -> str:
        return f"a {objects[0].words} pointing {objects[0].place} in front of a mirror"

    def result(self, objects: tuple[Object, ...], outcome: str) -> str:
        return (
            "its image pointing the other way" if outcome == "flipped" else "its image pointing the same way"
        )

    def because(self, objects: tuple[Object, ...]) -> str:
        return f"a mirror turns left and right around, so the image of the {objects[0].name} is flipped"

    def triples(self, objects: tuple[Object, ...], outcome: str) -> list[tuple[str, str, str]]:
        thing = objects[0]
        image = thing.place if outcome == "same" else {"left": "right", "right": "left"}[thing.place]
        return [
            (thing.words, "left of", "mirror"),
            (thing.words, "points", thing.place),
            ("image", "points", image),
        ]

    def draw(self, pen: Pen, objects: tuple[Object, ...], outcome: str) -> None:
        (thing,) = objects
        sign = 1 if thing.place == "right" else -1
        pen.rect(29.5, 6, 34.5, 58, "ink"), pen.rect(31, 8, 33, 56, "water")
        for x, s in ((15, sign), (49, -sign if outcome == "flipped" else sign)):
            if thing.name == "arrow":
                pen.rect(min(x - 11 * s, x), 29, max(x - 11 * s, x), 35, thing.color)
                pen.polygon([(x, 22), (x, 42), (x + 11 * s, 32)], thing.color)
            else:
                pen.rect(min(x - 9 * s, x - 6 * s), 14, max(x - 9 * s, x - 6 * s), 54, "ink")
                pen.polygon([(x - 6 * s, 15), (x - 6 * s, 35), (x + 10 * s, 25)], thing.color)


class Magnet(Law):
    name, outcomes, defied = "magnet", ("lifted", "floor"), "against magnetism"

    def combinations(self) -> list[tuple[Object, ...]]:
        return [
            (Object(shape, material, size, place),)
            for shape in ("ball", "block")
            for material in ("iron", *(f"{c} plastic" for c in COLORS))
            for size in (("big", "small") if material == "iron" else ("",))
            for place in ("left", "right")
        ]

    def lawful(self, objects: tuple[Object, ...]) -> str:
        return "lifted" if objects[0].color == "iron" else "floor"

    def setting(self, objects: tuple[Object, ...]) -> str:
        return f"a magnet on the {objects[0].place} above a {objects[0].words}"

    def result(self, objects: tuple[Object, ...], outcome: str) -> str:
        return "lifted by the magnet" if outcome == "lifted" else "staying on the floor"

    def because(self, objects: tuple[Object, ...]) -> str:
        if objects[0].color == "iron":
            return f"a magnet pulls iron, so the {objects[0].name} is lifted"
        return f"a magnet does not pull plastic, so the {objects[0].name} stays on the floor"

    def triples(self, objects: tuple[Object, ...], outcome: str) -> list[tuple[str, str, str]]:
        thing = objects[0].words
        return [("magnet", "above", thing), (thing, "on", "magnet" if outcome == "lifted" else "floor")]

    def draw(self, pen: Pen, objects: tuple[Object, ...], outcome: str) -> None:
        (thing,) = objects
        x = 20 if thing.place == "left" else 44
        r = SMALL if thing.size == "small" else BIG
        pen.rect(-8, 57, 72, 72, "ground")
        pen.circle(x, 14, 11, "magnet"), pen.rect(x - 11, 14, x + 11, 24, "magnet")
        pen.circle(x, 14, 5, "paper"), pen.rect(x - 5, 14, x + 5, 24, "paper")
        pen.rect(x - 11, 19, x - 5, 24, "ink"), pen.rect(x + 5, 19, x + 11, 24, "ink")
        y = 24 + r if outcome == "lifted" else 57 - r
        pen.shape(thing.name, x, y, r, thing.color.split()[0])


class Vessels(Law):
    name, outcomes, defied = "vessels", ("level", "left", "right"), "against gravity"

    def combinations(self) -> list[tuple[Object, ...]]:
        return [
            (
                Object("vessel", size=a, place="left"),
                Object("vessel", size=b, place="right"),
                Object("water", color),
            )
            for color in COLORS
            for a in ("wide", "narrow")
            for b in ("wide", "narrow")
        ]

    def lawful(self, objects: tuple[Object, ...]) -> str:
        return "level"

    def setting(self, objects: tuple[Object, ...]) -> str:
        return (
            f"a {objects[0].size} vessel joined to a {objects[1].size} vessel with {objects[2].color} water"
        )

    def result(self, objects: tuple[Object, ...], outcome: str) -> str:
        return (
            "the water standing level"
            if outcome == "level"
            else f"the water standing higher on the {outcome}"
        )

    def because(self, objects: tuple[Object, ...]) -> str:
        return "joined water presses equally on both sides, so it stands level"

    def triples(self, objects: tuple[Object, ...], outcome: str) -> list[tuple[str, str, str]]:
        if outcome == "level":
            return [("left water", "level with", "right water")]
        other = "right" if outcome == "left" else "left"
        return [(f"{outcome} water", "above", f"{other} water")]

    def draw(self, pen: Pen, objects: tuple[Object, ...], outcome: str) -> None:
        top = {"level": (30, 30), "left": (19, 41), "right": (41, 19)}[outcome]
        color = objects[2].color
        pen.rect(16, 47, 48, 57, "ink")
        for vessel, x, y in zip(objects[:2], (17, 47), top):
            half = 10 if vessel.size == "wide" else 5
            pen.rect(x - half - 2, 8, x + half + 2, 57, "ink"), pen.rect(x - half, 7, x + half, 55, "paper")
            pen.rect(x - half, y, x + half, 55, color)
        pen.rect(17, 49, 47, 55, color)


class Gravity(Law):
    name, outcomes, defied = "gravity", ("floor", "ceiling"), "against gravity"

    def combinations(self) -> list[tuple[Object, ...]]:
        places = ("left", "middle", "right")
        stones = [
            (Object("stone", color, size, place),)
            for color in ("grey", "brown")
            for size in ("big", "small")
            for place in places
        ]
        return stones + [(Object("balloon", color, "", place),) for color in COLORS for place in places]

    def lawful(self, objects: tuple[Object, ...]) -> str:
        return "floor" if objects[0].name == "stone" else "ceiling"

    def setting(self, objects: tuple[Object, ...]) -> str:
        thing = objects[0]
        side = "in the middle" if thing.place == "middle" else f"on the {thing.place}"
        return f"a {thing.words} {side} of a room"

    def result(self, objects: tuple[Object, ...], outcome: str) -> str:
        return "resting on the floor" if outcome == "floor" else "touching the ceiling"

    def because(self, objects: tuple[Object, ...]) -> str:
        if objects[0].name == "stone":
            return "a stone is heavier than air, so it rests on the floor"
        return "helium is lighter than air, so the balloon rises to the ceiling"

    def triples(self, objects: tuple[Object, ...], outcome: str) -> list[tuple[str, str, str]]:
        return [(objects[0].words, "on" if outcome == "floor" else "under", outcome)]

    def draw(self, pen: Pen, objects: tuple[Object, ...], outcome: str) -> None:
        (thing,) = objects
        x = {"left": 15, "middle": 32, "right": 49}[thing.place]
        pen.rect(-8, -8, 72, 6, "ground"), pen.rect(-8, 58, 72, 72, "ground")
        if thing.name == "stone":
            r = 8.5 if thing.size == "big" else 5
            y = 58 - 0.75 * r if outcome == "floor" else 6 + 0.75 * r
            outline = ((-1, 0.75), (-1, -0.1), (-0.45, -0.75), (0.5, -0.75), (1, 0), (0.9, 0.75))
            flip = 1 if outcome == "floor" else -1
            pen.polygon([(x + u * r, y + flip * v * r) for u, v in outline], thing.color)
        else:
            y, end = (48, 33) if outcome == "floor" else (16, 38)
            pen.line([(x, y), (x, end)], 1.5, "ink")
            pen.ellipse(x, y, 8, 10, thing.color)


class Flame(Law):
    name, outcomes, defied = "flame", ("upright", "left", "right"), "against the air"

    def combinations(self) -> list[tuple[Object, ...]]:
        return [
            (Object("candle", color, size), Object("fan", place=wind))
            for color in COLORS
            for size in ("tall", "short")
            for wind in ("", "left", "right")
        ]

    def lawful(self, objects: tuple[Object, ...]) -> str:
        return {"": "upright", "left": "right", "right": "left"}[objects[1].place]

    def setting(self, objects: tuple[Object, ...]) -> str:
        candle, fan = objects
        return f"a {candle.words} " + (f"with a fan on the {fan.place}" if fan.place else "in still air")

    def result(self, objects: tuple[Object, ...], outcome: str) -> str:
        return "the flame upright" if outcome == "upright" else f"the flame leaning to the {outcome}"

    def because(self, objects: tuple[Object, ...]) -> str:
        if not objects[1].place:
            return "hot air rises straight up, so the flame is upright"
        return f"the fan blows from the {objects[1].place}, so the flame leans to the {self.lawful(objects)}"

    def triples(self, objects: tuple[Object, ...], outcome: str) -> list[tuple[str, str, str]]:
        candle, fan = objects
        wind = [("fan", f"{fan.place} of", candle.words)] if fan.place else []
        return [*wind, ("flame", "on", candle.words), ("flame", "leans", outcome)]

    def draw(self, pen: Pen, objects: tuple[Object, ...], outcome: str) -> None:
        candle, fan = objects
        top = 33 if candle.size == "tall" else 43
        lean = {"upright": 0, "left": -10, "right": 10}[outcome]
        pen.rect(-8, 58, 72, 72, "ground")
        pen.rect(27, top, 37, 58, candle.color), pen.rect(31.3, top - 3, 32.7, top, "ink")
        rise = 17 if outcome == "upright" else 13
        pen.polygon([(27.5, top - 6), (36.5, top - 6), (32 + lean, top - 4 - rise)], "flame")
        pen.circle(32, top - 6, 4.5, "flame")
        if fan.place:
            x = 12 if fan.place == "left" else 52
            (
                pen.rect(x - 1, 24, x + 1, 58, "ink"),
                pen.circle(x, 24, 7.5, "ink"),
                pen.circle(x, 24, 5.5, "water"),
            )
            pen.line([(x - 5, 24), (x + 5, 24)], 2, "ink"), pen.line([(x, 19), (x, 29)], 2, "ink")


LAWS: dict[str, Law] = {
    law.name: law
    for law in (Balance(), Buoyancy(), Shadow(), Mirror(), Magnet(), Vessels(), Gravity(), Flame())
}
