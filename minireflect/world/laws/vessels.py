"""Water in joined vessels stands level."""

from ..pen import Pen
from ..scenes import COLORS, Object
from .law import Law


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
