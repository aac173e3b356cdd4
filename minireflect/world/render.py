"""From a scene to pixels: 64x64 RGB in [-1, 1], anti-aliased.

    render(sample_scene(seed=3)).shape == (3, 64, 64)
"""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from .arrangement import draw_arrangement
from .laws import LAWS
from .pen import MARGIN, SIZE, Pen
from .scenes import Object, Scene


@lru_cache(maxsize=1024)
def _canvas(law: str, objects: tuple[Object, ...], outcome: str) -> np.ndarray:
    pen = Pen()
    if law == "arrangement":
        draw_arrangement(pen, objects)
    else:
        LAWS[law].draw(pen, objects, outcome)
    canvas = pen.canvas()
    canvas.setflags(write=False)
    return canvas  # (80 80 3) uint8


def render_pixels(scene: Scene) -> np.ndarray:
    """Draw a scene.  -> (64 64 3) uint8, a read-only view."""
    x, y = MARGIN - scene.shift[0], MARGIN - scene.shift[1]
    return _canvas(*scene.facts)[y : y + SIZE, x : x + SIZE]


def render(scene: Scene) -> Tensor:
    """Draw a scene.  -> (3 64 64) float32 in [-1, 1]"""
    return to_tensor(render_pixels(scene)[None])[0]


def to_tensor(pixels: np.ndarray) -> Tensor:
    """Shapes: pixels (b h w 3) uint8 -> (b 3 h w) float32 in [-1, 1]"""
    return torch.from_numpy(pixels.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1.0)
