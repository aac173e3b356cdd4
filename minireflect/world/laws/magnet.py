"""A magnet lifts iron, and nothing made of plastic."""

from ..pen import Pen
from ..scenes import COLORS, Object
from .law import BIG, SMALL, Law


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
