"""From a scene to pixels: 64x64 RGB in [-1, 1], anti-aliased.

render(sample_scene(seed=3)).shape == (3, 64, 64)
"""

from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .arrangement import draw_arrangement
from .laws import LAWS
from .pen import MARGIN, SIZE, Pen
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


def to_tensor(pixels: np.ndarray) -> Tensor:
    """Shapes: pixels (b h w 3) uint8 -> (b 3 h w) float32 in [-1, 1]"""
    return torch.from_numpy(pixels.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1.0)


def write_picture(pixels: np.ndarray, path: Path) -> None:
    """Shapes: pixels (h w 3) uint8"""
    Image.fromarray(pixels).save(path)


def read_picture(path: Path) -> np.ndarray:
    """-> (h w 3) uint8"""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))
