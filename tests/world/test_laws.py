"""The laws: one outcome is lawful, the one that physics gives.  Pictures: in range, and moved as a whole."""

import numpy as np
import pytest
import torch

from minireflect.world import laws
from minireflect.world.canvas import PALETTE, to_pixels, to_tensor
from minireflect.world.laws import LAWS, render, render_pixels
from minireflect.world.scenes import Object, Scene, arrangement


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


def test_pictures_are_tensors_in_range() -> None:
    image = render(Scene("balance", LAWS["balance"].combinations[0], "left"))
    assert image.shape == (3, 64, 64) and image.min() >= -1 and image.max() <= 1


def test_pixels_survive_the_way_to_a_tensor_and_back() -> None:
    pixels = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3) * 2
    assert np.array_equal(to_pixels(to_tensor(pixels)), pixels)
    assert to_pixels(torch.full((1, 3, 2, 2), 1.7)).max() == 255  # out of range is clamped


def test_a_shift_moves_the_whole_picture() -> None:
    objects = LAWS["gravity"].combinations[0]
    still, moved = (render_pixels(Scene("gravity", objects, "floor", shift)) for shift in ((0, 0), (2, -1)))
    assert np.array_equal(moved[:-1, 2:], still[1:, :-2])


def test_the_lower_shape_hides_the_upper_one() -> None:
    red, blue = Object("ball", "red", xy=(32, 30)), Object("ball", "blue", xy=(32, 34))
    assert tuple(render_pixels(arrangement([red, blue]))[32, 32]) == (40, 90, 220)  # blue


def test_canvases_are_kept_of_the_laws_alone() -> None:
    """Arrangements are without end: a run that reads many of them must not grow."""
    every = [(name, o, out) for name, law in LAWS.items() for o in law.combinations for out in law.outcomes]
    for facts in every:
        laws.canvas(*facts)
    kept = laws._of_law.cache_info()
    assert len(every) <= kept.maxsize  # all fit, so none is drawn twice
    for x in range(100):
        render(arrangement((Object("ball", "red", xy=(20, x)),)))
    assert laws._of_law.cache_info().currsize == kept.currsize


def places_of(law: str, objects: tuple[Object, ...], outcome: str, color: str) -> np.ndarray:
    """Rows and columns, from the middle, of the pixels that have this colour.  -> (2 n)"""
    off = render_pixels(Scene(law, objects, outcome)).astype(int) - PALETTE[color]
    return np.stack((np.abs(off).max(2) <= 8).nonzero()) - 31.5


def test_the_pictures_show_what_the_names_of_the_outcomes_say() -> None:
    """What floats is above where it sinks; shadow, flame and higher water are on the side of their name."""
    for law, up, down in (
        ("buoyancy", "floats", "sinks"),
        ("magnet", "lifted", "floor"),
        ("gravity", "ceiling", "floor"),
    ):
        for objects in LAWS[law].combinations:
            color = objects[0].color.split()[0]
            high, low = (places_of(law, objects, outcome, color)[0].mean() for outcome in (up, down))
            assert high < low - 5, objects
    for law, color in (("shadow", "shade"), ("flame", "flame")):
        for objects in LAWS[law].combinations[:4]:
            left, right = (places_of(law, objects, side, color)[1].mean() for side in ("left", "right"))
            assert left < -0.5 and right > 0.5, objects
    objects = LAWS["vessels"].combinations[0]
    for outcome, sign in (("left", -1), ("right", 1), ("level", 0)):
        y, x = places_of("vessels", objects, outcome, objects[-1].color)
        assert np.sign(y[x < 0].min() - y[x > 0].min()) == sign, outcome
    for objects in LAWS["mirror"].combinations[:4]:
        for outcome in ("flipped", "same"):
            pixels = render_pixels(Scene("mirror", objects, outcome)).astype(int)
            assert (np.abs(pixels - pixels[:, ::-1]).max() < 60) == (outcome == "flipped")
