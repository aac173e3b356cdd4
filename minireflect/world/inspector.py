"""The inspector reads objects and outcome from pixels alone.  Its reading counts as the truth.

The inspector has no parameters, and no network is trained on it.  It works by analysis by synthesis:

    1. Scale each channel so that the paper has its usual colour, because people ignore a slight tint.
    2. Find candidate scenes.  For laws, a matched filter compares the picture with every scene at every
       camera position.  For arrangements, the coloured shapes are fitted one by one.
    3. Render each candidate, and keep the one that differs least from the picture.
    4. Accept the candidate only if no 4x4 block of pixels differs by more than TOLERANCE, no band of 8 rows
       and 32 columns by more than BAND_TOLERANCE on average, and the whole picture by no more than
       MEAN_TOLERANCE on average, and if the picture does not lie halfway to another scene.  Otherwise the
       picture is unreadable, and the reading says why.

If the picture is unreadable and a flat strip, two pixels wide, crosses it, the inspector replaces the strip
with the mean of the lines beside it and reads again.

    inspect(render(scene)).scene.facts == scene.facts
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import product

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

from ..ranges import floats
from .canvas import MARGIN, PALETTE, SIZE
from .captions import caption
from .graphs import THINGS
from .laws import LAWS, canvas, render_pixels
from .scenes import ARRANGEMENT, COLORS, Object, Reading, Scene, arrangement, distance

TOLERANCE = 0.25  # in [0, 1]; a missing ball differs by 0.7, and a line that is moved by a pixel by 0.2
BAND_TOLERANCE = 0.085  # in [0, 1], of the signed mean; a missing floor differs by 0.1
MEAN_TOLERANCE = 0.035  # in [0, 1], of the mean over all blocks
HALFWAY = 0.47  # share of the way from the nearest scene to another; a picture beyond it is unreadable

FLAT = 0.08  # in [0, 1]: largest standard deviation of a channel along a flat strip

REACH = 4  # largest shift of the camera that is tried, in pixels; twice MAX_SHIFT
STRIDE = 2  # pixels (even) between the camera positions of the matched filter
DIMS = 64  # principal components that the matched filter keeps, of 768
NEAR = 48  # nearest points of the matched filter, from which the candidates are taken
CANDIDATES = 3  # scenes that are rendered, at most

PAPER = np.array(PALETTE["paper"], np.float32) / 255


def inspect(image: Tensor) -> Reading:
    """Read one picture.  Raises ValueError if it has another shape.  Shapes: image (3 64 64) in [-1, 1]"""
    if (shape := tuple(getattr(image, "shape", ()))) != (3, SIZE, SIZE):
        raise ValueError(f"the inspector reads pictures of shape (3, {SIZE}, {SIZE}), not {shape}")
    floats(image, f"3 {SIZE} {SIZE}", "a picture for the inspector, in [-1, 1],")
    pixels = (image.detach().float().cpu().permute(1, 2, 0).numpy() + 1) / 2  # (64 64 3) in [0, 1]
    if not np.isfinite(pixels).all():
        return Reading(None, 1.0, "the picture has pixels that are not finite numbers")
    reading = _read(pixels := _even_out(pixels))
    if reading.readable:
        return reading
    return min([reading, *map(_read, _behind_strips(pixels))], key=_badness)


def inspect_all(images: Tensor) -> list[Reading]:
    """Read pictures.  Shapes: images (b 3 64 64) in [-1, 1] -> b readings"""
    return [inspect(image) for image in images.detach()]


def _even_out(pixels: np.ndarray) -> np.ndarray:
    """Scale each channel by at most 15 %, so that its 80th percentile becomes the colour of the paper."""
    light = np.percentile(_blocks(pixels).reshape(-1, 3), 80, axis=0)
    gain = np.clip(PAPER / np.maximum(light, 1e-3), 1 / 1.15, 1.15)
    return np.clip(pixels * gain.astype(np.float32), 0, 1)


def _badness(reading: Reading) -> tuple[bool, float]:
    """Sort key: readable before unreadable, then by residual."""
    return not reading.readable, reading.residual


def _read(pixels: np.ndarray) -> Reading:
    """Read the picture as a law's scene or, if that fails, as shapes.  Shapes: pixels (64 64 3) in [0, 1]"""
    nearest, *others = _law_candidates(pixels)
    reading = _verify(pixels, nearest, others)
    if not reading.readable and (shapes := _find_shapes(pixels)) is not None:
        reading = min(reading, _verify(pixels, shapes, []), key=_badness)
    return reading


def _behind_strips(pixels: np.ndarray) -> Iterator[np.ndarray]:
    """The picture without a flat strip, two pixels wide, that crosses it from edge to edge.

    The mean of the two lines beside the strip takes its place.  Yields at most two pictures: one without a
    horizontal strip, one without a vertical strip.
    Shapes: pixels (64 64 3) in [0, 1]
    """
    for axis in (0, 1):
        lines = pixels.swapaxes(0, axis)
        flat = lines.std(axis=1).max(axis=1) <= FLAT  # (64)
        k = np.flatnonzero(flat[:-1] & flat[1:])  # (n) the first lines of strips
        before, after = lines[np.where(k > 0, k - 1, 2)], lines[np.where(k < SIZE - 2, k + 2, SIZE - 3)]
        off = np.minimum(np.abs(lines[k] - before), np.abs(lines[k + 1] - after)).mean(axis=(1, 2))
        if off.max(initial=0) > FLAT / 2:  # the strip differs from both neighbours, so it is no edge
            behind, n = pixels.copy(), off.argmax()
            behind.swapaxes(0, axis)[k[n] : k[n] + 2] = (before[n] + after[n]) / 2
            yield behind


def _verify(pixels: np.ndarray, scene: Scene, others: list[Scene]) -> Reading:
    """Render the scene and compare it with the picture; see step 4 at the top of this file.

    others: further candidates, which the picture must not lie halfway to.
    """
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
    """The scenes of all laws at all coarse camera positions, and their means of 4x4 blocks, reduced by PCA.

    -> n scenes, mean (768), basis (768 d), points (n d), squared lengths of the points (n)
    """
    pairs = [(name, objects) for name, law in LAWS.items() for objects in law.combinations]
    every = [Scene(name, objects, outcome) for name, objects in pairs for outcome in LAWS[name].outcomes]
    canvases = np.stack([canvas(*scene.facts) for scene in every]).astype(np.float32) / 255  # (n 80 80 3)
    halves = _halved(canvases)  # (n 40 40 3), cropped below at half resolution, as camera positions are even
    scenes, points = [], []
    for x, y in product(range(-REACH, REACH + 1, STRIDE), repeat=2):
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
    """The scenes of laws that look most like the picture, by squared error, with refined camera positions."""
    scenes, mean, basis, points, square = _filter()
    far = square - 2 * (points @ ((_blocks(pixels).ravel() - mean) @ basis))  # (n) distance^2 - const
    near = np.argpartition(far, NEAR)[:NEAR]
    best: dict[tuple, Scene] = {}
    for i in near[np.argsort(far[near])]:  # nearest first; keeps one camera position of each scene
        best.setdefault(scenes[i].facts, scenes[i])
    found = []
    for scene in list(best.values())[:CANDIDATES]:
        x, y = scene.shift
        for dx, dy in ((1, 0), (0, 1)):  # refine x, then y: the error is smooth in the position
            views = [replace(scene, shift=(x + d * dx, y + d * dy)) for d in (-1, 0, 1)]
            error, (x, y) = min((np.square(_float_pixels(v) - pixels).sum(), v.shift) for v in views)
        found.append((error, replace(scene, shift=(x, y))))
    return [scene for _, scene in sorted(found, key=lambda pair: pair[0])]


def _float_pixels(scene: Scene) -> np.ndarray:
    """The scene as (64 64 3) float32 in [0, 1]."""
    return render_pixels(scene).astype(np.float32) / 255


def _halved(pixels: np.ndarray) -> np.ndarray:
    """Means of 2x2 blocks.  Adding strided views is ten times faster than NumPy's mean over two axes.

    Shapes: pixels (... h w c) -> (... h/2 w/2 c)
    """
    rows = pixels[..., ::2, :, :] + pixels[..., 1::2, :, :]  # (... h/2 w c)
    return (rows[..., ::2, :] + rows[..., 1::2, :]) / 4


def _blocks(pixels: np.ndarray) -> np.ndarray:
    """Means of 4x4 blocks.  Shapes: pixels (... h w c) -> (... h/4 w/4 c)"""
    return _halved(_halved(pixels))


# ------------------------------------------------------------------------- arrangements: shapes one by one
STAMP = 32  # side of a stamp in pixels; the largest shape is 24 pixels wide
MIN_PIXELS = 25  # smallest number of visible pixels of a shape; a whole cylinder has 98
MAX_SHAPES = 6  # a picture with more shapes is unreadable; a graph has at most four


@cache
def _stamps() -> np.ndarray:
    """For each of THINGS, the share of every pixel around its centre that it covers.

    -> (things 32 32) in [0, 1]
    """
    window = slice(MARGIN + 32 - STAMP // 2, MARGIN + 32 + STAMP // 2)
    drawn = [canvas(ARRANGEMENT, (Object(name, "ink", xy=(32, 32)),), "") for name in THINGS]
    shades = [pixels[window, window].astype(np.float32).mean(axis=2) for pixels in drawn]
    return np.stack([(shade.max() - shade) / (shade.max() - shade.min()) for shade in shades])


def _inks(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The best colour of each pixel, and its share: pixel = paper + share (colour - paper).

    Shapes: pixels (64 64 3) -> index into COLORS (64 64), share (64 64) in [0, 1.2]
    """
    way = np.array([PALETTE[c] for c in COLORS], np.float32) / 255 - PAPER  # (5 3)
    off = pixels - PAPER
    share = np.clip(off @ way.T / (way**2).sum(1), 0, 1.2)  # (64 64 5)
    ink = ((off[..., None, :] - share[..., None] * way) ** 2).sum(3).argmin(2)  # of the least squared error
    return ink, np.take_along_axis(share, ink[..., None], 2)[..., 0]


def _find_shapes(pixels: np.ndarray) -> Scene | None:
    """The coloured shapes in the picture as an arrangement; None if there are none or over MAX_SHAPES."""
    from scipy import ndimage  # imported here, because it takes 0.3 s and pictures of laws do not need it

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
        # what is behind another shape cannot be seen
        shape = _fit(np.where(ink == c, share, 0.0), ndimage.binary_dilation(others) & ~mask, box, COLORS[c])
        # a shape in front of a box can divide the box into two spots
        if not any(s.words == shape.words and distance(s, shape) <= 3 for s in shapes):
            shapes.append(shape)
    return arrangement(shapes)


def _fit(share: np.ndarray, hidden: np.ndarray, box: tuple[slice, slice], color: str) -> Object:
    """The shape and place whose stamp agrees best with the visible pixels of a spot.

    box: the rows and columns of the spot; the shape must cover it.
    Shapes: share (64 64), hidden (64 64) bool
    """
    pad = 16  # pixels by which the centre of a shape may lie outside the picture
    target = np.pad(share, pad + STAMP // 2)
    visible = np.pad(~hidden, pad + STAMP // 2, constant_values=True).astype(np.float32)
    errors: dict[Object, float] = {}
    for name, stamp in zip(THINGS, _stamps()):
        r = Object(name).radius
        for y, x in product(*(range(side.stop - r - 1, side.start + r + 2) for side in box)):
            window = np.s_[y + pad : y + pad + STAMP, x + pad : x + pad + STAMP]
            errors[Object(name, color, xy=(x, y))] = ((target[window] - stamp) ** 2 * visible[window]).sum()
    middle = tuple((side.start + side.stop) // 2 for side in reversed(box))
    return min(errors, key=errors.get, default=Object("ball", color, xy=middle))  # no shape is that large
