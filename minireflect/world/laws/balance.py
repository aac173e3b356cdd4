"""The bigger ball is heavier and pulls its pan down."""

from ..pen import Pen
from ..scenes import COLORS, Object
from .law import Law

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
