"""From a scene to pixels: 64x64 RGB in [-1, 1], anti-aliased.

render(sample_scene(seed=3)).shape == (3, 64, 64)
"""

from functools import cache

import numpy as np
from torch import Tensor

from .canvas import MARGIN, SIZE, Pen, to_tensor
from .graphs import draw_arrangement
from .laws import LAWS
from .scenes import Object, Scene


def canvas(law: str, objects: tuple[Object, ...], outcome: str) -> np.ndarray:
    """The scene with a margin around it, of which a camera position is a crop.  -> (80 80 3) uint8, read-only"""
    if law != "arrangement":
        return _law_canvas(law, objects, outcome)
    pen = Pen()
    draw_arrangement(pen, objects)
    return pen.canvas()


@cache  # there are 488 of them, 19 kB each
def _law_canvas(law: str, objects: tuple[Object, ...], outcome: str) -> np.ndarray:
    pen = Pen()
    LAWS[law].draw(pen, objects, outcome)
    drawn = pen.canvas()
    drawn.setflags(write=False)
    return drawn


def render_pixels(scene: Scene) -> np.ndarray:
    """Draw a scene.  -> (64 64 3) uint8, a read-only view."""
    x, y = MARGIN - scene.shift[0], MARGIN - scene.shift[1]
    return canvas(*scene.facts)[y : y + SIZE, x : x + SIZE]


def render(scene: Scene) -> Tensor:
    """Draw a scene.  -> (3 64 64) float32 in [-1, 1]"""
    return to_tensor(render_pixels(scene)[None])[0]
