"""From a scene to pixels: 64x64 RGB in [-1, 1], anti-aliased.

render(sample_scene(seed=3)).shape == (3, 64, 64)
"""

from functools import lru_cache

import numpy as np
from torch import Tensor

from .canvas import MARGIN, SIZE, Pen, to_tensor
from .graphs import radius
from .laws import LAWS
from .scenes import ARRANGEMENT, Objects, Scene


@lru_cache(2048)  # all scenes of the laws are 488 canvases of 19 kB
def canvas(law: str, objects: Objects, outcome: str) -> np.ndarray:
    """The scene with its margin, of which a picture is a crop.  -> (80 80 3) uint8, read-only"""
    pen = Pen()
    if law == ARRANGEMENT:  # what is lower in the picture is nearer to the camera, and hides what is behind
        for o in sorted(objects, key=lambda o: o.xy[1]):
            pen.shape(o.name, *o.xy, radius(o.name), o.color)
    else:
        LAWS[law].draw(pen, outcome, *objects)
    pixels = pen.canvas()
    pixels.setflags(write=False)
    return pixels


def render_pixels(scene: Scene) -> np.ndarray:
    """-> (64 64 3) uint8, a view of the scene's canvas"""
    x, y = MARGIN - scene.shift[0], MARGIN - scene.shift[1]
    return canvas(*scene.facts)[y : y + SIZE, x : x + SIZE]


def render(scene: Scene) -> Tensor:
    """-> (3 64 64) float32 in [-1, 1]"""
    return to_tensor(render_pixels(scene)[None])[0]
