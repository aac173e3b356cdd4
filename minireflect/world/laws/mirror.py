"""A mirror turns left and right around."""

from ..pen import Pen
from ..scenes import COLORS, Object
from .law import Law


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
