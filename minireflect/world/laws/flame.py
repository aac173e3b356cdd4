"""A flame stands upright, and leans away from a fan."""

from ..pen import Pen
from ..scenes import COLORS, Object
from .law import Law


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
