"""A pen that draws flat, anti-aliased shapes, and conversions between pictures, tensors and files.

For anti-aliasing, Pillow draws at SUPERSAMPLE times the size and the canvas is averaged down.  The canvas has
a margin of MARGIN pixels on every side, so a picture that is shifted by a few pixels is still a full crop.
"""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from ..disk import read_bytes, replacing
from ..ranges import Refusal

SIZE, MARGIN, SUPERSAMPLE = 64, 8, 4
FORMATS = "PNG", "JPEG", "WEBP", "BMP", "GIF"  # that are read; for others Pillow may start a program
WALL = 3  # thickness of a box's walls, in pixels

# fmt: off
PALETTE: dict[str, tuple[int, int, int]] = {  # 8-bit RGB; two of COLORS are at least 114 apart
    "paper": (250, 248, 242), "ink": (40, 46, 60), "ground": (214, 200, 176), "shade": (120, 108, 92),
    "water": (150, 208, 238), "sun": (252, 170, 20), "flame": (250, 130, 20), "magnet": (160, 24, 60),
    "wooden": (168, 112, 60), "brown": (124, 76, 40), "iron": (112, 120, 132), "grey": (146, 150, 156),
    "red": (222, 44, 44), "green": (40, 160, 70), "blue": (40, 90, 220), "yellow": (246, 212, 40),
    "purple": (146, 60, 190),
}
# fmt: on


class Pen:
    """Draws on one canvas.  Coordinates and lengths are in pixels of the 64x64 picture; y points down."""

    def __init__(self) -> None:
        side = (SIZE + 2 * MARGIN) * SUPERSAMPLE
        self.image = Image.new("RGB", (side, side), PALETTE["paper"])
        self.ink = ImageDraw.Draw(self.image)

    def _at(self, *points: tuple[float, float]) -> list[tuple[float, float]]:
        return [((x + MARGIN) * SUPERSAMPLE, (y + MARGIN) * SUPERSAMPLE) for x, y in points]

    def rect(self, x0: float, y0: float, x1: float, y1: float, color: str) -> None:
        (a, b), (c, d) = self._at((x0, y0), (x1, y1))
        self.ink.rectangle((a, b, c - 1, d - 1), fill=PALETTE[color])  # Pillow includes the far edge

    def ellipse(self, x: float, y: float, rx: float, ry: float, color: str) -> None:
        (a, b), (c, d) = self._at((x - rx, y - ry), (x + rx, y + ry))
        self.ink.ellipse((a, b, c - 1, d - 1), fill=PALETTE[color])

    def circle(self, x: float, y: float, r: float, color: str) -> None:
        self.ellipse(x, y, r, r, color)

    def polygon(self, points: list[tuple[float, float]], color: str) -> None:
        self.ink.polygon(self._at(*points), fill=PALETTE[color])

    def line(self, points: list[tuple[float, float]], width: float, color: str) -> None:
        self.ink.line(self._at(*points), PALETTE[color], round(width * SUPERSAMPLE), joint="curve")

    def shape(self, name: str, x: float, y: float, r: float, color: str) -> None:
        """A ball, block, cone, cylinder or hollow box, centred at (x, y), of half height `r`."""
        if name == "ball":
            self.circle(x, y, r, color)
        elif name == "block":
            self.rect(x - r, y - r, x + r, y + r, color)
        elif name == "cone":
            self.polygon([(x, y - r), (x + r, y + r), (x - r, y + r)], color)
        elif name == "cylinder":
            w, h = 0.58 * r, 0.25 * r  # half of the width, and half of the height of the elliptic ends
            self.rect(x - w, y - r + h, x + w, y + r - h, color)
            self.ellipse(x, y - r + h, w, h, color)
            self.ellipse(x, y + r - h, w, h, color)
        else:
            for near, far in ((-r, WALL - r), (r - WALL, r)):
                self.rect(x - r, y + near, x + r, y + far, color)
                self.rect(x + near, y - r, x + far, y + r, color)

    def canvas(self) -> np.ndarray:
        """The finished canvas, margin included.  Shape (80 80 3), uint8, read-only as Pillow's arrays are."""
        return np.asarray(self.image.reduce(SUPERSAMPLE))


def to_tensor(pixels: np.ndarray) -> Tensor:
    """Convert pixels to images.  Shapes: pixels (b h w 3) uint8 -> (b 3 h w) float32 in [-1, 1]"""
    return torch.from_numpy(pixels.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1.0)


def to_pixels(images: Tensor) -> np.ndarray:
    """The inverse of `to_tensor`, clamped and rounded.  Shapes: images (b 3 h w) -> (b h w 3) uint8"""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def write_picture(pixels: np.ndarray, path: Path) -> None:
    """Save a picture; the suffix of `path` chooses the format.  Shapes: pixels (h w 3) uint8"""
    with replacing(path) as file:
        Image.fromarray(pixels).save(file, Image.registered_extensions()[Path(path).suffix.lower()])


def read_picture(path: Path) -> np.ndarray:
    """Read a picture file of one of FORMATS as RGB, upright.  -> (h w 3) uint8

    Raises Refusal if the file is no picture or has several, and OSError if it cannot be opened.
    """
    whole = read_bytes(path)
    try:
        with Image.open(io.BytesIO(whole), formats=FORMATS) as image:
            if (n := getattr(image, "n_frames", 1)) > 1:
                raise ValueError(f"it has {n} frames; save one of them as a file")
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except (SyntaxError, ValueError, OSError, RuntimeError, Image.DecompressionBombError) as error:
        # the part of the error before the address of the buffer
        said = f"{str(error).partition(' <')[0]}; formats are {', '.join(FORMATS)}"
        raise Refusal(f"{path} is not a picture that can be read: {said}") from error
