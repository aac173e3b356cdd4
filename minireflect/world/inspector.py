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

from .arrangement import SHAPES, draw_arrangement
from .laws import LAWS
from .pen import MARGIN, PALETTE, SIZE, Pen
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


@lru_cache(maxsize=1)
def _stamps() -> np.ndarray:
    """How much of each pixel a shape covers, about its centre.  Shape (shapes 20 20), in [0, 1]"""
    stamps = []
    for name in SHAPES:
        pen = Pen()
        draw_arrangement(pen, (Object(name, "ink", xy=(32, 32)),))
        window = slice(MARGIN + 22, MARGIN + 42)
        shade = pen.canvas()[window, window].astype(np.float32).mean(axis=2)
        stamps.append((shade.max() - shade) / (shade.max() - shade.min()))
    return np.stack(stamps)


def _arrangement(pixels: np.ndarray) -> Scene | None:
    """Coloured shapes on paper, found one by one; None when something is neither paper nor a shape."""
    coverage = np.abs(pixels - PAPER).max(axis=2)  # (64 64)
    spots, _ = ndimage.label(coverage > 0.35)
    boxes = ndimage.find_objects(spots)
    things = []
    for i, (rows, columns) in enumerate(boxes, start=1):
        inside = spots[rows, columns] == i
        if inside.sum() < 40:  # the smallest shape, a cone, covers 98 pixels
            continue
        color = np.median(pixels[rows, columns][inside], axis=0) * 255
        name = min(COLORS, key=lambda c: float(((color - PALETTE[c]) ** 2).sum()))
        full = np.abs(np.array(PALETTE[name], np.float32) / 255 - PAPER).max()
        y, x = round((rows.start + rows.stop) / 2), round((columns.start + columns.stop) / 2)
        padded = np.pad(coverage / full, 12)
        _, shape, x, y = min(
            (float(((padded[v + 2 : v + 22, u + 2 : u + 22] - stamp) ** 2).sum()), k, u, v)
            for k, stamp in enumerate(_stamps())
            for u in (x - 1, x, x + 1)
            for v in (y - 1, y, y + 1)
        )
        things.append(Object(SHAPES[shape], name, xy=(x, y)))
    if not 1 <= len(things) <= 4:
        return None
    return Scene("arrangement", tuple(sorted(things, key=lambda o: o.xy)), "")


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
