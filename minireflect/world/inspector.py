"""The inspector reads objects, relations and outcome from pixels alone.  It is the truth of this project.

It does not see the scene and is never trained, nor trained on.  It renders instead (analysis by synthesis):
    1. scale each channel so that the paper has its colour: a person forgives a tint;
    2. find the scenes that could look like this: for laws a matched filter over every scene and every
       position of the camera, for arrangements the coloured shapes one by one;
    3. render each candidate, and keep the one that differs least;
    4. accept it only if it explains the whole picture: no 4x4 block of pixels may differ by more than
       TOLERANCE, no band of 8 rows and 32 columns by more than BAND_TOLERANCE, the mean over all blocks by
       no more than MEAN_TOLERANCE, and the picture may not lie halfway to another scene.  Otherwise the
       picture is unreadable, and the reading says why.
A flat strip two pixels wide over the picture is forgiven too: what it hides is read off the lines beside it.
So a picture with one fact wrong is read as another scene; one that no scene explains is never accepted.

    inspect(render(scene)).scene.facts == scene.facts
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import product

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

from ..ranges import checked
from ..streams import Floats
from .canvas import MARGIN, PALETTE, SIZE
from .captions import caption
from .graphs import THINGS
from .laws import LAWS, canvas, render_pixels
from .scenes import ARRANGEMENT, COLORS, Object, Reading, Scene, arrangement, distance

TOLERANCE = 0.25  # in [0, 1]: a ball that is missing makes 0.7, a line moved by a pixel 0.2
BAND_TOLERANCE = 0.085  # in [0, 1], signed: a missing floor makes 0.1, as it is 0.19 darker than paper
MEAN_TOLERANCE = 0.035  # in [0, 1], over all blocks
HALFWAY = 0.47  # share of the way to another scene from which on a picture is neither

FLAT = 0.08  # in [0, 1]: along a strip over the picture no channel has a standard deviation above this

REACH = 4  # pixels: camera positions looked at, twice what scenes are moved by
STRIDE = 2  # pixels (even) between camera positions of the matched filter; refined afterwards
DIMS = 64  # principal directions kept of the matched filter's 768
NEAR = 48  # nearest points of the filter among which candidates are found
CANDIDATES = 3  # scenes that are rendered

PAPER = np.array(PALETTE["paper"], np.float32) / 255


@checked
def inspect(image: Floats) -> Reading:
    """Shapes: image (3 64 64) in [-1, 1] -> Reading.  Raises ValueError on any other shape."""
    if (shape := tuple(image.shape)) != (3, SIZE, SIZE):
        raise ValueError(f"the inspector reads pictures of shape (3, {SIZE}, {SIZE}), not {shape}")
    pixels = (image.detach().float().cpu().permute(1, 2, 0).numpy() + 1) / 2  # (64 64 3) in [0, 1]
    if not np.isfinite(pixels).all():
        return Reading(None, 1.0, "the picture has pixels that are not finite numbers")
    reading = _read(pixels := _even_out(pixels))
    if reading.readable:
        return reading
    return min([reading, *map(_read, _behind_strips(pixels))], key=_worse)


def inspect_all(images: Tensor) -> list[Reading]:
    """Read pictures.  Shapes: images (b 3 64 64) in [-1, 1] -> b readings"""
    return [inspect(image) for image in images.detach()]


def _even_out(pixels: np.ndarray) -> np.ndarray:
    """Scale each channel so that the lightest common colour is the paper's, within 15 %."""
    light = np.percentile(_blocks(pixels).reshape(-1, 3), 80, axis=0)
    gain = np.clip(PAPER / np.maximum(light, 1e-3), 1 / 1.15, 1.15)
    return np.clip(pixels * gain.astype(np.float32), 0, 1)


def _worse(reading: Reading) -> tuple[bool, float]:
    return not reading.readable, reading.residual


def _read(pixels: np.ndarray) -> Reading:
    """The picture as a law, or else as shapes.  Shapes: pixels (64 64 3) in [0, 1]"""
    nearest, *others = _law_candidates(pixels)
    reading = _verify(pixels, nearest, others)
    if not reading.readable and (shapes := _find_shapes(pixels)) is not None:
        reading = min(reading, _verify(pixels, shapes, []), key=_worse)
    return reading


def _behind_strips(pixels: np.ndarray) -> Iterator[np.ndarray]:
    """If a flat strip, two pixels wide, covers the picture from edge to edge: the picture with the mean of
    the two lines beside the strip in its place.

    Shapes: pixels (64 64 3) in [0, 1] -> none to two of the same: of rows, of columns
    """
    for axis in (0, 1):
        lines = pixels.swapaxes(0, axis)
        flat = lines.std(axis=1).max(axis=1) <= FLAT  # (64)
        k = np.flatnonzero(flat[:-1] & flat[1:])  # the first lines of n strips
        before, after = lines[np.where(k > 0, k - 1, 2)], lines[np.where(k < SIZE - 2, k + 2, SIZE - 3)]
        off = np.minimum(np.abs(lines[k] - before), np.abs(lines[k + 1] - after)).mean(axis=(1, 2))
        if off.max(initial=0) > FLAT / 2:  # visible, and not an edge of the scene
            behind, n = pixels.copy(), off.argmax()
            behind.swapaxes(0, axis)[k[n] : k[n] + 2] = (before[n] + after[n]) / 2
            yield behind


def _verify(pixels: np.ndarray, scene: Scene, others: list[Scene]) -> Reading:
    """Render the scene and see whether it explains the picture, and better than any other scene does."""
    rendered = _float_pixels(scene)
    signed = _blocks(rendered - pixels)  # (16 16 3)
    off = np.abs(signed).max(axis=2)  # (16 16)
    band = np.abs(sliding_window_view(signed, (2, 8), axis=(0, 1)).mean(axis=(3, 4))).max()
    residual, mean = float(off.max()), off.mean()
    y, x = (4 * int(v) for v in np.unravel_index(off.argmax(), off.shape))
    for value, most, where in (
        (residual, TOLERANCE, f"the 4x4 pixels at x {x}, y {y} are {residual:.2f} off"),
        (band, BAND_TOLERANCE, f"8 rows of 32 pixels are {band:.3f} off on average"),
        (mean, MEAN_TOLERANCE, f"it is {mean:.3f} off on average"),
    ):
        if value > most:
            far = f"nearest is {caption(scene)!r}, but {where}, at most {most} is allowed"
            return Reading(None, residual, f"no scene explains the picture: {far}", (x, y))
    for other in others:
        way = (_float_pixels(other) - rendered).ravel()
        if (pixels - rendered).ravel() @ way > HALFWAY * (way @ way):
            both = f"{caption(scene)!r} and {caption(other)!r}"
            return Reading(None, residual, f"the picture lies halfway between two scenes: {both}")
    return Reading(scene, residual)


# ------------------------------------------------------------------------------------ laws: a matched filter
@cache
def _filter() -> tuple[list[Scene], np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Every scene of every law at every coarse camera position, on its principal directions.

    Shapes: n scenes -> mean (768), basis (768 d), points (n d), their squared lengths (n)
    """
    steps = range(-REACH, REACH + 1, STRIDE)
    pairs = [(name, objects) for name, law in LAWS.items() for objects in law.combinations]
    every = [Scene(name, objects, outcome) for name, objects in pairs for outcome in LAWS[name].outcomes]
    canvases = np.stack([canvas(*scene.facts) for scene in every]).astype(np.float32) / 255  # (n 80 80 3)
    halves = _halved(canvases)  # (n 40 40 3), because all camera positions are even
    scenes, points = [], []
    for x, y in product(steps, steps):
        top, left = (MARGIN - y) // 2, (MARGIN - x) // 2
        view = halves[:, top : top + SIZE // 2, left : left + SIZE // 2]  # (n 32 32 3)
        points.append(_halved(view).reshape(len(every), -1))  # means of 4x4 blocks
        scenes += [replace(scene, shift=(x, y)) for scene in every]
    points = np.concatenate(points)  # (n 768)
    mean = points.mean(axis=0)
    _, vectors = np.linalg.eigh((points - mean).T @ (points - mean))
    basis = np.ascontiguousarray(vectors[:, -DIMS:], np.float32)
    points = (points - mean) @ basis
    return scenes, mean, basis, points, (points**2).sum(axis=1)


def _law_candidates(pixels: np.ndarray) -> list[Scene]:
    """The law scenes that look most like the picture, camera refined; least squared error first."""
    scenes, mean, basis, points, square = _filter()
    far = square - 2 * (points @ ((_blocks(pixels).ravel() - mean) @ basis))  # (n), less a constant
    near = np.argpartition(far, NEAR)[:NEAR]
    best: dict[tuple, Scene] = {}
    for i in near[np.argsort(far[near])]:  # nearest first: one camera position for each scene
        best.setdefault(scenes[i].facts, scenes[i])
    found = []
    for scene in list(best.values())[:CANDIDATES]:
        x, y = scene.shift
        for dx, dy in ((1, 0), (0, 1)):  # the error is smooth in the camera's position: refine x, then y
            shifts = [(x + d * dx, y + d * dy) for d in (-1, 0, 1)]
            error, (x, y) = min((_square_error(replace(scene, shift=s), pixels), s) for s in shifts)
        found.append((error, replace(scene, shift=(x, y))))
    return [scene for _, scene in sorted(found, key=lambda pair: pair[0])]


def _square_error(scene: Scene, pixels: np.ndarray) -> float:
    difference = (_float_pixels(scene) - pixels).ravel()
    return float(difference @ difference)


def _float_pixels(scene: Scene) -> np.ndarray:
    """The scene as (64 64 3) float32 in [0, 1]."""
    return render_pixels(scene).astype(np.float32) / 255


def _halved(pixels: np.ndarray) -> np.ndarray:
    """Means of 2x2 blocks; adding strided views is ten times faster than NumPy's mean over two axes.

    Shapes: pixels (... h w c) -> (... h/2 w/2 c)
    """
    rows = pixels[..., ::2, :, :] + pixels[..., 1::2, :, :]  # (... h/2 w c)
    return (rows[..., ::2, :] + rows[..., 1::2, :]) / 4


def _blocks(pixels: np.ndarray) -> np.ndarray:
    """Means of 4x4 blocks.  Shapes: pixels (... h w c) -> (... h/4 w/4 c)"""
    return _halved(_halved(pixels))


# ------------------------------------------------------------------------- arrangements: shapes one by one
STAMP = 32  # pixels, side of a stamp; the largest shape is 24 wide
MIN_PIXELS = 25  # visible pixels of a shape; a cylinder has 98, and half of it can be hidden
# read in a picture; a graph has four, and a picture with more of them is wrong, but readable
MAX_SHAPES = 6


@cache
def _stamps() -> np.ndarray:
    """The share of each pixel that a shape covers, about its centre.  Shape (things 32 32), in [0, 1]"""
    window = slice(MARGIN + 32 - STAMP // 2, MARGIN + 32 + STAMP // 2)
    drawn = [canvas(ARRANGEMENT, (Object(name, "ink", xy=(32, 32)),), "") for name in THINGS]
    shades = [pixels[window, window].astype(np.float32).mean(axis=2) for pixels in drawn]
    return np.stack([(shade.max() - shade) / (shade.max() - shade.min()) for shade in shades])


def _inks(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The colour that explains each pixel best, and how much of it: pixel = paper + share (colour - paper).

    Shapes: pixels (64 64 3) -> index into COLORS (64 64), share (64 64) in [0, 1.2]
    """
    way = np.array([PALETTE[c] for c in COLORS], np.float32) / 255 - PAPER  # (5 3)
    off = pixels - PAPER
    share = np.clip(off @ way.T / (way**2).sum(1), 0, 1.2)  # (64 64 5)
    error = ((off[..., None, :] - share[..., None] * way) ** 2).sum(3)
    ink = error.argmin(2)
    return ink, np.take_along_axis(share, ink[..., None], 2)[..., 0]


def _find_shapes(pixels: np.ndarray) -> Scene | None:
    """Coloured shapes on paper, also behind each other; None when there are none or too many."""
    from scipy import ndimage  # a third of a second to import, and not needed for pictures of laws

    ink, share = _inks(pixels)
    spots = []
    for c in range(len(COLORS)):
        labels, _ = ndimage.label((ink == c) & (share > 0.5))
        for i, box in enumerate(ndimage.find_objects(labels), 1):
            if (labels[box] == i).sum() >= MIN_PIXELS:
                spots.append((c, labels == i, box))
    if not 1 <= len(spots) <= MAX_SHAPES:
        return None
    shapes: list[Object] = []
    for c, mask, box in spots:
        others = np.logical_or.reduce([other for _, other, _ in spots]) & ~mask
        hidden = ndimage.binary_dilation(others) & ~mask  # what is behind another shape cannot be seen
        shape = _fit(np.where(ink == c, share, 0.0), hidden, box, COLORS[c])
        # a shape in front of a frame may cut it in two spots
        if not any(s.words == shape.words and distance(s, shape) <= 3 for s in shapes):
            shapes.append(shape)
    return arrangement(shapes)


def _fit(share: np.ndarray, hidden: np.ndarray, box: tuple[slice, slice], color: str) -> Object:
    """The shape whose stamp agrees best with the visible pixels of a spot.

    Shapes: share (64 64), hidden (64 64) bool
    """
    pad = 16  # pixels by which a shape's centre may lie outside of the picture
    target = np.pad(share, pad + STAMP // 2)
    visible = np.pad(~hidden, pad + STAMP // 2, constant_values=True).astype(np.float32)
    rows, columns = box
    middle = ((columns.start + columns.stop) // 2, (rows.start + rows.stop) // 2)
    errors: dict[Object, float] = {}
    for name, stamp in zip(THINGS, _stamps()):
        # the spot must lie within the shape
        r = Object(name).radius
        for y, x in product(*(range(side.stop - r - 1, side.start + r + 2) for side in box)):
            window = np.s_[y + pad : y + pad + STAMP, x + pad : x + pad + STAMP]
            error = ((target[window] - stamp) ** 2 * visible[window]).sum()
            errors[Object(name, color, xy=(x, y))] = float(error)
    return min(errors, key=errors.get, default=Object("ball", color, xy=middle))
