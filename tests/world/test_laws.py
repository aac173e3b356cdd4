"""The laws: exactly one outcome is lawful, and it is the one that physics gives."""

import pytest

from minireflect.world.laws import LAWS
from minireflect.world.scenes import Object


@pytest.mark.parametrize("name", LAWS)
def test_every_law_can_be_broken_and_only_one_outcome_is_lawful(name: str) -> None:
    law = LAWS[name]
    for objects in law.combinations:
        assert law.lawful(objects) in law.outcomes
        assert law.unlawful(objects)


def test_the_laws_say_what_physics_says() -> None:
    """The verdicts written out by hand, one law at a time."""
    big, small = Object("ball", "red", "big", "left"), Object("ball", "blue", "small", "right")
    assert LAWS["balance"].lawful((big, small)) == "left"
    assert LAWS["buoyancy"].lawful((Object("ball", "wooden", "big", "left"),)) == "floats"
    assert LAWS["buoyancy"].lawful((Object("block", "iron", "small", "left"),)) == "sinks"
    assert LAWS["shadow"].lawful((Object("sun", place="left"), Object("cone", "red", "tall"))) == "right"
    assert LAWS["mirror"].lawful((Object("flag", "red", place="left"),)) == "flipped"
    assert LAWS["magnet"].lawful((Object("ball", "iron", "big", "left"),)) == "lifted"
    assert LAWS["magnet"].lawful((Object("ball", "red plastic", "", "left"),)) == "floor"
    assert LAWS["vessels"].lawful(LAWS["vessels"].combinations[0]) == "level"
    assert LAWS["gravity"].lawful((Object("stone", "grey", "big", "left"),)) == "floor"
    assert LAWS["gravity"].lawful((Object("balloon", "red", "", "left"),)) == "ceiling"
    assert LAWS["flame"].lawful((Object("candle", "red", "tall"), Object("fan", place=""))) == "upright"
    assert LAWS["flame"].lawful((Object("candle", "red", "tall"), Object("fan", place="left"))) == "right"
