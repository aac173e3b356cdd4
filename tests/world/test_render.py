"""Rendering: pictures are tensors in range, and pixels survive the way to a tensor and back."""

import numpy as np
import torch

from minireflect.world.canvas import to_pixels, to_tensor
from minireflect.world.laws import LAWS
from minireflect.world.render import render, render_pixels
from minireflect.world.scenes import Object, Scene, arrangement


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
