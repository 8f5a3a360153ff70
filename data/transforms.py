"""Picture geometry on the host: resize by the short side, crop, scale the crop.

Frames are uint8 [t h w c], and all frames of a window share one draw. A crop is a box
(top, left, height, width) of the picture that becomes a square of side `size`; whole
numbers cut the picture first and scale what is left, others scale as if the whole
picture were scaled and then cut. `CROPS` has the ways of drawing a box:

| name       | box                                                       | source      |
|------------|-----------------------------------------------------------|-------------|
| random     | a square of side `size` anywhere                          | Scenic      |
| center     | that in the middle                                        |             |
| jitter     | the same of a picture whose height and width are scaled   | Scenic's    |
|            | by factors of .9 to 1.33 each                             | finetuning  |
| multiscale | sides 1, .875, .75 or .66 of the short side, at one of 13 | VideoMAE's  |
|            | places                                                    | pretraining |
| resized    | .08 to 1 of the area at a width of .75 to 1.33 heights    | VideoMAE's  |
|            |                                                           | finetuning  |

The last two find their own scale: the picture is not resized before (`FROM_STORED`).
"""

import math

import numpy as np
from PIL import Image

JITTER = (0.9, 1.33)  # factors of height and of width
SCALES = (1.0, 0.875, 0.75, 0.66)  # of the short side; neighbours in this list mix
# Places of a box in quarters of the room that it leaves: (right, down).
QUARTERS = ((0, 0), (4, 0), (0, 4), (4, 4), (2, 2), (0, 2), (4, 2), (2, 4), (2, 0))
QUARTERS += ((1, 1), (3, 1), (1, 3), (3, 3))
AREA = (0.08, 1.0)  # of the picture
ASPECT = (0.75, 1.3333)  # width / height
TRIES = 10  # draws of a box until one lies inside the picture

Box = tuple[float, float, float, float]  # top, left, height, width


def resized_shape(height: int, width: int, short_side: int) -> tuple[int, int]:
    """(height, width) with the short side as asked; the long one rounds down."""
    return (
        max(short_side, height * short_side // width),
        max(short_side, width * short_side // height),
    )


def resize(frames: np.ndarray, short_side: int, method: str) -> np.ndarray:
    """Scale frames [t h w c] to a short side; untouched where it is right already.

    Args:
        method: a name in `RESIZES`: 'antialias' is Pillow's bilinear, 'bilinear' the
            rule of TF and DMVR (half-pixel centres, no antialias, truncated to uint8).
    """
    height, width = frames.shape[1:3]
    shape = resized_shape(height, width, short_side)
    return _scaled(frames, (0, 0, height, width), shape, method)


def cut_out(frames: np.ndarray, box: tuple[int, int, int, int] | None) -> np.ndarray:
    """The box of frames [… h w c], a view; all of them where it is None."""
    if box is None:
        return frames
    top, left, height, width = box
    return frames[..., top : top + height, left : left + width, :]


def crop(frames: np.ndarray, box: Box, size: int, method: str) -> np.ndarray:
    """The box of frames [t h w c] as squares of side `size`; a view where it fits."""
    if all(isinstance(side, int) for side in box):
        frames, box = cut_out(frames, box), (0, 0, *box[2:])
    return _scaled(frames, box, (size, size), method)


def _scaled(frames, box, shape, method):
    """A box of the frames at another (height, width)."""
    if shape == frames.shape[1:3] and box == (0, 0, *shape):
        return frames
    scale = RESIZES[method](frames.shape[1:3], box, shape)
    return np.stack([scale(frame) for frame in frames])


def _antialias(old: tuple[int, int], box: Box, new: tuple[int, int]):
    """Pillow's bilinear: the triangle filter widens with the reduction."""
    top, left, height, width = box
    # Rounding must not lead out of the picture.
    box = (left, top, min(left + width, old[1]), min(top + height, old[0]))
    options = dict(size=new[::-1], resample=Image.Resampling.BILINEAR, box=box)
    return lambda frame: np.asarray(Image.fromarray(frame).resize(**options))


def _bilinear(old: tuple[int, int], box: Box, new: tuple[int, int]):
    """Four neighbours about each half-pixel centre, in float32 as TF computes it."""
    top, bottom, down = _neighbours(old[0], new[0], box[0], box[2])
    left, right, across = _neighbours(old[1], new[1], box[1], box[3])
    across, down = across[:, None], down[:, None, None]

    def scale(frame):
        near = frame[:, left].astype(np.float32)
        lines = near + (frame[:, right] - near) * across  # [h_old w c]
        near = lines[top]
        return (near + (lines[bottom] - near) * down).astype(np.uint8)

    return scale


def _neighbours(old: int, new: int, start: float, extent: float):
    """Lower and upper source index and the weight of the upper, each [new]."""
    half = np.float32(0.5)
    centre = (np.arange(new, dtype=np.float32) + half) * np.float32(extent / new) - half
    centre += np.float32(start)
    floor = np.floor(centre)
    lower = np.clip(floor, 0, old - 1).astype(int)
    upper = np.clip(np.ceil(centre), 0, old - 1).astype(int)
    return lower, upper, centre - floor


RESIZES = {"antialias": _antialias, "bilinear": _bilinear}


# ----------------------------------------------------------------------- boxes of crops


def enclosing(boxes: list[Box]) -> tuple[int, int, int, int] | None:
    """The smallest box that holds all of whole numbers.

    None where a box is of fractions: scaling it looks beyond its edges.
    """
    if not all(isinstance(side, int) for box in boxes for side in box):
        return None
    top, left = min(box[0] for box in boxes), min(box[1] for box in boxes)
    bottom = max(box[0] + box[2] for box in boxes)
    right = max(box[1] + box[3] for box in boxes)
    return top, left, bottom - top, right - left


def random_box(rng: np.random.Generator, height: int, width: int, size: int) -> Box:
    """A random square that lies inside the picture."""
    top, left = (
        int(rng.integers(height - size + 1)),
        int(rng.integers(width - size + 1)),
    )
    return top, left, size, size


def center_box(rng, height: int, width: int, size: int) -> Box:
    """The central square; an odd rest leaves less at the top left."""
    del rng
    return (height - size) // 2, (width - size) // 2, size, size


def jitter_box(rng: np.random.Generator, height: int, width: int, size: int) -> Box:
    """A random square of the picture after its height and width are scaled.

    The scaled picture has whole pixels and holds the square, as a factor below 1 of a
    picture no larger than the square would not.
    """
    tall = max(size, int(height * rng.uniform(*JITTER)))
    wide = max(size, int(width * rng.uniform(*JITTER)))
    top, left, _, _ = random_box(rng, tall, wide, size)
    down, across = height / tall, width / wide
    return top * down, left * across, size * down, size * across


def multiscale_box(rng: np.random.Generator, height: int, width: int, size: int) -> Box:
    """A box of two of `SCALES`, which are neighbours, at one of `QUARTERS`.

    A side within 3 pixels of `size` is `size`, so that nothing is scaled for so little;
    unless the picture is smaller.
    """
    short = min(height, width)
    sides = [int(short * scale) for scale in SCALES]
    sides = [min(size, short) if abs(side - size) < 3 else side for side in sides]
    pairs = [
        (high, wide)
        for i, high in enumerate(sides)
        for j, wide in enumerate(sides)
        if abs(i - j) <= 1
    ]
    high, wide = pairs[int(rng.integers(len(pairs)))]
    right, down = QUARTERS[int(rng.integers(len(QUARTERS)))]
    return (height - high) // 4 * down, (width - wide) // 4 * right, high, wide


def resized_box(rng: np.random.Generator, height: int, width: int, size: int) -> Box:
    """A box whose area is uniform in `AREA`, the logarithm of its shape in `ASPECT`.

    Where no draw lies inside the picture: the largest central one of such a shape.
    """
    del size
    for _ in range(TRIES):
        area = height * width * rng.uniform(*AREA)
        aspect = math.exp(rng.uniform(*map(math.log, ASPECT)))
        wide, high = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < wide <= width and 0 < high <= height:
            top = int(rng.integers(height - high + 1))
            return top, int(rng.integers(width - wide + 1)), high, wide
    high = min(height, round(width / ASPECT[0]))
    wide = min(width, round(height * ASPECT[1]))
    return (height - high) // 2, (width - wide) // 2, high, wide


CROPS = {
    "random": random_box,
    "center": center_box,
    "jitter": jitter_box,
    "multiscale": multiscale_box,
    "resized": resized_box,
}
FROM_STORED = ("multiscale", "resized")


def three_boxes(height: int, width: int, size: int, up: bool = True) -> list[Box]:
    """Three squares along the longer side, for tests.

    up: an odd rest puts the middle one further (Scenic, SlowFast) or less far
    (VideoMAE) from the beginning. Across, `center_box` in both, also rounded so.
    """
    rests = (height - size, width - size)
    top, left = (((rest + 1) // 2 if up else rest // 2) for rest in rests)
    if height > width:
        corners = [(0, left), (top, left), (height - size, left)]
    else:
        corners = [(top, 0), (top, left), (top, width - size)]
    return [(*corner, size, size) for corner in corners]
