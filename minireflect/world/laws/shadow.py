"""A shadow falls away from the light."""

from ..pen import Pen
from ..scenes import COLORS, Object
from .law import Law


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
