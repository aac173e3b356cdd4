"""The inspector reads a picture: objects, relations and outcome, from pixels alone.  It is the truth of this project.

It has no access to the scene and is never trained, nor trained on.  It draws instead (analysis by synthesis):
    1. even out the brightness by the paper;
    2. find the scenes that could look like this: for the laws a matched filter over every scene there is and every
       position of the camera, for arrangements the coloured shapes found one by one;
    3. draw each candidate again, and keep the one that differs least;
    4. believe it only if it explains the whole picture: no 4x4 block of pixels may be off by more than TOLERANCE,
       nor the picture on the whole by more than MEAN_TOLERANCE, and nothing may lie halfway to another scene.
       Otherwise the picture is unreadable.
So a picture with a fact wrong is read as another scene, and a picture that no scene explains is never accepted.

    inspect(render(scene)).scene.facts == scene.facts
"""

from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from .canvas import MARGIN, PALETTE, SIZE, Pen
from .graphs import THINGS, draw_arrangement, radius
from .laws import LAWS
from .render import canvas
from .scenes import COLORS, Object, Reading, Scene

TOLERANCE = 0.25  # in [0, 1]: a ball that is missing makes 0.7, a line moved by a pixel 0.2


MEAN_TOLERANCE = 0.035  # in [0, 1], over all blocks


REACH = 4  # pixels: camera positions looked at, twice what scenes are moved by


STRIDE = 2  # pixels, even, between the camera positions of the matched filter; the rest is refined


DIMS = 64  # principal directions kept of the matched filter's 768


CANDIDATES = 3  # scenes that are drawn again


NEAR = 48  # points looked at to find them


HALFWAY = 0.47  # share of the way to another scene from which on a picture is neither


PAPER = np.array(PALETTE["paper"], np.float32) / 255


class _Filter(NamedTuple):
    """Every scene of every law at every coarse camera position, on its principal directions."""

    scenes: list[Scene]  # n scenes, camera position included
    mean: np.ndarray  # (768)
    basis: np.ndarray  # (768 d)
    points: np.ndarray  # (n d)
    square: np.ndarray  # (n), the points' squared lengths


def _halved(pixels: np.ndarray) -> np.ndarray:
    """Means of 2x2 blocks; adding strided views is ten times faster than NumPy's mean over two axes.

    Shapes: pixels (... h w c) -> (... h/2 w/2 c)
    """
    rows = pixels[..., ::2, :, :] + pixels[..., 1::2, :, :]  # (... h/2 w c)
    return (rows[..., ::2, :] + rows[..., 1::2, :]) / 4


def _blocks(pixels: np.ndarray) -> np.ndarray:
    """Means of 4x4 blocks.  Shapes: pixels (... h w c) -> (... h/4 w/4 c)"""
    return _halved(_halved(pixels))


def _drawn(scene: Scene) -> np.ndarray:
    """The scene as (64 64 3) float32 in [0, 1]."""
    x, y = MARGIN - scene.shift[0], MARGIN - scene.shift[1]
    return canvas(*scene.facts)[y : y + SIZE, x : x + SIZE].astype(np.float32) / 255


@lru_cache(maxsize=1)
def _filter() -> _Filter:
    steps = range(-REACH, REACH + 1, STRIDE)
    every = [
        Scene(name, objects, outcome)
        for name, law in LAWS.items()
        for objects in law.combinations()
        for outcome in law.possible(objects)
    ]
    n = len(every)
    canvases = np.stack([canvas(*scene.facts) for scene in every]).astype(np.float32) / 255  # (n 80 80 3)
    halves = _halved(canvases)  # (n 40 40 3), because all camera positions are even
    scenes, points = [], []
    for x in steps:
        for y in steps:
            top, left = (MARGIN - y) // 2, (MARGIN - x) // 2
            view = halves[:, top : top + SIZE // 2, left : left + SIZE // 2]  # (n 32 32 3)
            points.append(_halved(view).reshape(n, -1))  # means of 4x4 blocks
            scenes += [replace(scene, shift=(x, y)) for scene in every]
    points = np.concatenate(points)  # (n 768)
    mean = points.mean(axis=0)
    _, vectors = np.linalg.eigh((points - mean).T @ (points - mean))
    basis = np.ascontiguousarray(vectors[:, -DIMS:], np.float32)
    points = (points - mean) @ basis
    return _Filter(scenes, mean, basis, points, (points**2).sum(axis=1))


def _law_candidates(pixels: np.ndarray) -> list[tuple[float, Scene]]:
    """The law scenes that look most like the picture, camera refined, with their squared errors, least first."""
    f = _filter()
    point = (_blocks(pixels).ravel() - f.mean) @ f.basis  # (d)
    distance = f.square - 2 * (f.points @ point)
    near = np.argpartition(distance, NEAR)[:NEAR]
    best: dict[tuple, Scene] = {}
    for i in near[np.argsort(distance[near])]:  # nearest first: one camera position for each scene
        best.setdefault(f.scenes[i].facts, f.scenes[i])
    found = []
    for scene in list(best.values())[:CANDIDATES]:
        drawn = canvas(*scene.facts).astype(np.float32) / 255
        x, y = scene.shift
        for axis in (0, 1):  # the error is smooth in the camera's position: refine x, then y
            tries = [(x + d, y) if axis == 0 else (x, y + d) for d in (-1, 0, 1)]
            error, (x, y) = min((_square_error(drawn, pixels, shift), shift) for shift in tries)
        found.append((error, replace(scene, shift=(x, y))))
    return sorted(found, key=lambda pair: pair[0])


def _square_error(drawn: np.ndarray, pixels: np.ndarray, shift: tuple[int, int]) -> float:
    x, y = MARGIN - shift[0], MARGIN - shift[1]
    difference = (drawn[y : y + SIZE, x : x + SIZE] - pixels).ravel()
    return float(difference @ difference)


STAMP = 32  # pixels, side of a stamp; the largest thing is 24 wide


FEWEST = 25  # visible pixels of a thing; a cylinder has 98, and half of it can be hidden


MOST = 6  # things found in a picture; a graph has four at most, and more than it asked for is wrong, not unreadable


@lru_cache(maxsize=1)
def _stamps() -> np.ndarray:
    """How much of each pixel a thing covers, about its centre.  Shape (things 32 32), in [0, 1]"""
    stamps = []
    for name in THINGS:
        pen = Pen()
        draw_arrangement(pen, (Object(name, "ink", xy=(32, 32)),))
        window = slice(MARGIN + 32 - STAMP // 2, MARGIN + 32 + STAMP // 2)
        shade = pen.canvas()[window, window].astype(np.float32).mean(axis=2)
        stamps.append((shade.max() - shade) / (shade.max() - shade.min()))
    return np.stack(stamps)


def _inks(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which colour on paper explains each pixel best, and how much of it: pixel = paper + share (colour - paper).

    Shapes: pixels (64 64 3) -> index into COLORS (64 64), share (64 64) in [0, 1.2]
    """
    way = np.array([PALETTE[c] for c in COLORS], np.float32) / 255 - PAPER  # (5 3)
    off = pixels - PAPER
    share = np.clip(off @ way.T / (way**2).sum(1), 0, 1.2)  # (64 64 5)
    error = ((off[..., None, :] - share[..., None] * way) ** 2).sum(3)
    ink = error.argmin(2)
    return ink, np.take_along_axis(share, ink[..., None], 2)[..., 0]


def _arrangement(pixels: np.ndarray) -> Scene | None:
    """Coloured things on paper, found one by one, behind each other too; None when there are none or too many."""
    ink, share = _inks(pixels)
    spots = []
    for c in range(len(COLORS)):
        labels, _ = ndimage.label((ink == c) & (share > 0.5))
        boxes = ndimage.find_objects(labels)
        spots += [
            (c, labels == i, box) for i, box in enumerate(boxes, 1) if (labels[box] == i).sum() >= FEWEST
        ]
    if not 1 <= len(spots) <= MOST:
        return None
    things = []
    for k, (c, mask, box) in enumerate(spots):
        others = np.zeros_like(mask)
        for j, (_, other, _) in enumerate(spots):
            others |= other & (j != k)
        hidden = ndimage.binary_dilation(others)  # what is behind another thing cannot be seen
        thing = _fit(np.where(ink == c, share, 0.0), hidden & ~mask, box, COLORS[c])
        if not any(t.words == thing.words and np.ptp([t.xy, thing.xy], 0).max() <= 3 for t in things):
            things.append(thing)  # what stands before a frame may cut it in two
    return Scene("arrangement", tuple(sorted(things, key=lambda o: o.xy)), "")


def _fit(share: np.ndarray, hidden: np.ndarray, box: tuple[slice, slice], color: str) -> Object:
    """The thing whose stamp agrees best with the visible pixels of a spot.  Shapes: share (64 64), hidden (64 64) bool"""
    rows, columns = box
    pad = STAMP // 2 + 16
    target = np.pad(share, pad)
    seen = np.pad(~hidden, pad, constant_values=True).astype(np.float32)
    best = (np.inf, None)
    for name, stamp in zip(THINGS, _stamps()):
        r = radius(name)
        for y in range(rows.stop - r - 1, rows.start + r + 2):  # the spot must lie within the thing
            for x in range(columns.stop - r - 1, columns.start + r + 2):
                v, u = y + pad - STAMP // 2, x + pad - STAMP // 2
                off = (target[v : v + STAMP, u : u + STAMP] - stamp) ** 2
                error = float((off * seen[v : v + STAMP, u : u + STAMP]).sum())
                if error < best[0]:
                    best = (error, Object(name, color, xy=(x, y)))
    return best[1] or Object(
        "ball", color, xy=((columns.start + columns.stop) // 2, (rows.start + rows.stop) // 2)
    )


def _even_out(pixels: np.ndarray) -> np.ndarray:
    """Scale the brightness so that the lightest common colour is the paper's, within 15 %."""
    light = np.percentile(_blocks(pixels).mean(axis=2), 90)
    gain = np.clip(PAPER.mean() / max(light, 1e-3), 1 / 1.15, 1.15)
    return np.clip(pixels * np.float32(gain), 0, 1)


def inspect(image: Tensor) -> Reading:
    """Read one picture.  Shapes: image (3 64 64) in [-1, 1] -> Reading.  Raises ValueError on any other shape."""
    if tuple(image.shape) != (3, SIZE, SIZE):
        raise ValueError(
            f"the inspector reads pictures of shape (3, {SIZE}, {SIZE}), not {tuple(image.shape)}"
        )
    pixels = (image.detach().float().cpu().permute(1, 2, 0).numpy() + 1) / 2  # (64 64 3) in [0, 1]
    if not np.isfinite(pixels).all():
        return Reading(None, 1.0, "not finite")
    pixels = _even_out(pixels)
    candidates = [scene for _, scene in _law_candidates(pixels)]
    reading = _believe(pixels, candidates[0], candidates[1:])
    if not reading.readable and (shapes := _arrangement(pixels)) is not None:
        reading = min(reading, _believe(pixels, shapes, []), key=lambda r: (not r.readable, r.residual))
    return reading


def _believe(pixels: np.ndarray, scene: Scene, others: list[Scene]) -> Reading:
    """Draw the scene again and see whether it explains the picture, and better than any other scene does."""
    drawn = _drawn(scene)
    off = np.abs(_blocks(drawn - pixels)).max(axis=2)  # (16 16)
    residual = float(off.max())
    if residual > TOLERANCE or off.mean() > MEAN_TOLERANCE:
        return Reading(None, residual, f"no scene explains it; nearest is {scene.law}")
    for other in others:
        way = (_drawn(other) - drawn).ravel()
        if (pixels - drawn).ravel() @ way > HALFWAY * (way @ way):
            return Reading(None, residual, f"between two scenes of {scene.law}")
    return Reading(scene, residual)


def inspect_all(images: Tensor) -> list[Reading]:
    """Read pictures.  Shapes: images (b 3 64 64) in [-1, 1] -> b readings"""
    with torch.no_grad():
        return [inspect(image) for image in images]
