"""Wood floats on water, iron sinks; and plastic, which is in no prompt, floats."""

from ..pen import Pen
from ..scenes import Object
from .law import BIG, SMALL, Law


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
