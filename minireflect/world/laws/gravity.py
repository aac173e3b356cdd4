"""Stones rest on the floor, helium balloons at the ceiling."""

from ..pen import Pen
from ..scenes import COLORS, Object
from .law import Law


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
