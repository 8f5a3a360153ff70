"""Picture geometry on the host: resize by the short side, then crop.

Frames are uint8 [t h w c]. Nothing here distorts: both sides are scaled alike (the
long side rounded down to whole pixels), and all frames of a window share one crop.
"""

import numpy as np
from PIL import Image


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
    shape = resized_shape(*frames.shape[1:3], short_side)
    if shape == frames.shape[1:3]:
        return frames
    scale = RESIZES[method](frames.shape[1:3], shape)
    return np.stack([scale(frame) for frame in frames])


def _antialias(old: tuple[int, int], new: tuple[int, int]):
    """Pillow's bilinear: the triangle filter widens with the reduction."""
    del old
    size, filter = new[::-1], Image.Resampling.BILINEAR
    return lambda frame: np.asarray(Image.fromarray(frame).resize(size, filter))


def _bilinear(old: tuple[int, int], new: tuple[int, int]):
    """Four neighbours about each half-pixel centre, in float32 as TF computes it."""
    top, bottom, down = _neighbours(old[0], new[0])
    left, right, across = _neighbours(old[1], new[1])
    across, down = across[:, None], down[:, None, None]

    def scale(frame):
        near = frame[:, left].astype(np.float32)
        lines = near + (frame[:, right] - near) * across  # [h_old w c]
        near = lines[top]
        return (near + (lines[bottom] - near) * down).astype(np.uint8)

    return scale


def _neighbours(old: int, new: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lower and upper source index and the weight of the upper, each [new]."""
    half = np.float32(0.5)
    centre = (np.arange(new, dtype=np.float32) + half) * np.float32(old / new) - half
    floor = np.floor(centre)
    lower = np.maximum(floor, 0).astype(int)
    upper = np.minimum(np.ceil(centre), old - 1).astype(int)
    return lower, upper, centre - floor


RESIZES = {"antialias": _antialias, "bilinear": _bilinear}


def random_corner(
    rng: np.random.Generator, height: int, width: int, size: int
) -> tuple[int, int]:
    """(top, left) of a random square crop that lies inside the picture."""
    return (
        int(rng.integers(height - size + 1)),
        int(rng.integers(width - size + 1)),
    )


def center_corner(height: int, width: int, size: int) -> tuple[int, int]:
    """(top, left) of the central square; an odd rest leaves less at the top left."""
    return (height - size) // 2, (width - size) // 2


def three_corners(height: int, width: int, size: int) -> list[tuple[int, int]]:
    """Corners of three squares along the longer side, as Scenic and SlowFast test.

    The middle one rounds up where `center_corner` rounds down, as theirs do.
    """
    top, left = -((size - height) // 2), -((size - width) // 2)
    if height > width:
        return [(0, left), (top, left), (height - size, left)]
    return [(top, 0), (top, left), (top, width - size)]


def crop(frames: np.ndarray, corner: tuple[int, int], size: int) -> np.ndarray:
    """The square of side `size` at `corner` (top, left), a view of frames [t h w c]."""
    top, left = corner
    return frames[:, top : top + size, left : left + size]
