"""Reconstruction pictures: original | masked | reconstruction, for eyes.

`reconstruction` turns a batch, its masks and the model's predictions into uint8
pictures, which a TensorBoard writer takes as they are; `write` puts them into files.
Visible patches are shown as they are, predictions only where a patch was masked.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image, ImageDraw, ImageFont

from av_mae.tokens import grid_of, patchify, unpatchify

GREY = 128  # a masked place
PAPER, INK = (255, 255, 255), (40, 40, 40)
SMALLEST = 128  # pixels: pictures with a shorter side are enlarged to at least this
COLUMNS = 8  # frames in a row of the still picture
ROWS_A_SECOND = 100  # of every spectrogram preset

# Nine colours of matplotlib's magma (CC0): their lightness rises evenly.
COLOURS = np.array(
    [
        [0, 0, 4],
        [28, 16, 68],
        [79, 18, 123],
        [129, 37, 129],
        [181, 54, 122],
        [229, 89, 100],
        [251, 135, 97],
        [254, 194, 135],
        [252, 253, 191],
    ],
    dtype=np.float32,
)


class Panels(NamedTuple):
    """Three versions of one modality, uint8 [b t h w 3] (frames) or [b h w 3]."""

    original: np.ndarray
    masked: np.ndarray
    reconstruction: np.ndarray


class Pictures(NamedTuple):
    """Uint8 pictures of several clips by name: stills [h w 3] and films [t h w 3]."""

    stills: dict[str, np.ndarray]
    films: dict[str, np.ndarray]
    fps: float


def colours(values: Float[np.ndarray, "*shape"]) -> UInt8[np.ndarray, "*shape 3"]:
    """Values in [0, 1] (others are clipped) as colours from black to light yellow."""
    place = np.clip(np.nan_to_num(values), 0, 1) * (len(COLOURS) - 1)
    low = np.minimum(place.astype(int), len(COLOURS) - 2)
    part = (place - low)[..., None]
    return np.round(COLOURS[low] * (1 - part) + COLOURS[low + 1] * part).astype(
        np.uint8
    )


def _panels(
    x: Float[np.ndarray, "b ..."],
    predictions: Float[np.ndarray, "b m f"],
    masked: Int[np.ndarray, "b m"],
    patch: tuple[int, ...],
    paint: Callable[[np.ndarray], np.ndarray],
) -> Panels:
    """The three versions of `x`, cut to whole patches and painted as uint8."""
    grid = grid_of(x.shape[1:-1], patch)
    patches = np.array(patchify(jnp.asarray(x), patch))
    whole = lambda p: np.asarray(unpatchify(jnp.asarray(p), grid, patch))
    filled, hidden = patches.copy(), np.zeros_like(patches)
    np.put_along_axis(filled, masked[..., None], predictions, axis=1)
    np.put_along_axis(hidden, masked[..., None], 1.0, axis=1)
    original = paint(whole(patches))
    grey = np.where(whole(hidden)[..., :1] > 0, np.uint8(GREY), original)
    return Panels(original, grey, paint(whole(filled)))


def frame_panels(
    frames: Float[np.ndarray, "b t h w c"],
    predictions: Float[np.ndarray, "b m f"],
    masked: Int[np.ndarray, "b m"],
    patch: tuple[int, int, int],
    mean: Sequence[float],
    std: Sequence[float],
) -> Panels:
    """Frames and predicted tubes, both (picture - mean) / std, as uint8 [b t h w 3]."""

    def paint(x: np.ndarray) -> np.ndarray:
        picture = np.nan_to_num(x * np.float32(std) + np.float32(mean))
        return np.round(np.clip(picture, 0, 1) * 255).astype(np.uint8)

    return _panels(frames, predictions, masked, patch, paint)


def spectrogram_panels(
    spectrogram: Float[np.ndarray, "b t f 1"],
    predictions: Float[np.ndarray, "b m f2"],
    masked: Int[np.ndarray, "b m"],
    patch: tuple[int, int],
) -> Panels:
    """Spectrogram and predicted patches in the same units, as uint8 [b f t 3].

    Time runs to the right and frequency upwards. Each clip's colours span the 1st to
    the 99th percentile of its original, so that the three versions compare.
    """
    axes = (1, 2, 3)
    low = np.percentile(spectrogram, 1, axis=axes, keepdims=True)
    high = np.percentile(spectrogram, 99, axis=axes, keepdims=True)

    def paint(x: np.ndarray) -> np.ndarray:
        return colours(((x - low) / np.maximum(high - low, 1e-6))[..., 0])

    panels = _panels(spectrogram, predictions, masked, patch, paint)
    return Panels(*(np.flip(p.swapaxes(1, 2), axis=1) for p in panels))


def reconstruction(
    inputs: Mapping[str, Any],
    predictions: Mapping[str, Any],
    masked: Mapping[str, Any],
    patches: Mapping[str, tuple[int, ...]],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    present: Mapping[str, Any] | None = None,
    fps: float = 6.25,
) -> Pictures:
    """Pictures of the clips of a batch, as far as they have each modality.

    `inputs[m]`, `predictions[m]` and `masked[m]` are arrays of one modality: what the
    model saw (rgb [b t h w c], spectrogram [b t f 1], normalised), flat patches
    [b m f] in the same units (a standardised target must be undone before) and indices
    of the masked tokens [b m]; `patches[m]` is the patch size. `present[m]` [b] tells
    which clips have the modality; the others are left out of its picture. `fps` is the
    rate of the frames (25 fps at stride 4: 6.25).
    """
    stills, films = {}, {}
    for m, x in inputs.items():
        has = np.ones(len(x), bool) if present is None else np.asarray(present[m])
        clips = np.flatnonzero(has).tolist()
        if not clips:
            continue
        values = np.asarray(x, np.float32)[clips]
        predicted = np.asarray(predictions[m], np.float32)[clips]
        places = np.asarray(masked[m])[clips]
        share = places.shape[1] / math.prod(grid_of(values.shape[1:-1], patches[m]))
        if m == "rgb":
            panels = frame_panels(values, predicted, places, patches[m], mean, std)
            stills[m] = frames_still(panels, clips, share, fps)
            films[m] = frames_film(panels, clips, share)
        else:
            panels = spectrogram_panels(values, predicted, places, patches[m])
            stills[m] = spectrogram_still(panels, clips, share)
    return Pictures(stills, films, fps)


def frames_still(
    panels: Panels, clips: Sequence[int], share: float, fps: float
) -> UInt8[np.ndarray, "h w 3"]:
    """Three rows a clip, up to `COLUMNS` frames spread evenly over its time."""
    t = panels.original.shape[1]
    chosen = np.unique(np.linspace(0, t - 1, min(t, COLUMNS)).round().astype(int))
    rows = [
        [panel[i, j] for j in chosen] for i in range(len(clips)) for panel in panels
    ]
    return sheet(rows, _names(clips, share), [f"{j / fps:.2f} s" for j in chosen])


def spectrogram_still(
    panels: Panels, clips: Sequence[int], share: float
) -> UInt8[np.ndarray, "h w 3"]:
    """Three rows a clip, each the whole spectrogram."""
    rows = [[panel[i]] for i in range(len(clips)) for panel in panels]
    seconds = panels.original.shape[2] / ROWS_A_SECOND
    title = f"{seconds:.2f} s of sound, low frequencies at the bottom"
    return sheet(rows, _names(clips, share), [title])


def frames_film(
    panels: Panels, clips: Sequence[int], share: float
) -> UInt8[np.ndarray, "t h w 3"]:
    """One row a clip, the three versions side by side, one sheet a frame."""
    titles = ["original", f"masked {share:.0%}", "reconstruction"]
    names = [f"clip {i}" for i in clips]
    return np.stack(
        [
            sheet([[p[i, j] for p in panels] for i in range(len(clips))], names, titles)
            for j in range(panels.original.shape[1])
        ]
    )


def _names(clips: Sequence[int], share: float) -> list[str]:
    """The row labels of a still picture."""
    three = ("clip {}\noriginal", f"masked {share:.0%}", "reconstruction")
    return [name.format(i) for i in clips for name in three]


def _enlarge(image: np.ndarray) -> np.ndarray:
    """Repeat pixels until the short side is at least `SMALLEST`; never shrink."""
    times = max(1, math.ceil(SMALLEST / min(image.shape[:2])))
    return image.repeat(times, axis=0).repeat(times, axis=1)


def sheet(
    rows: Sequence[Sequence[np.ndarray]],
    names: Sequence[str],
    titles: Sequence[str],
) -> UInt8[np.ndarray, "h w 3"]:
    """Equally large uint8 pictures in rows, a name left of each row, titles above."""
    rows = [[_enlarge(image) for image in row] for row in rows]
    height, width = rows[0][0].shape[:2]
    size = max(14, height // 10)
    font = ImageFont.load_default(size=size)
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    gap = size // 2
    left = gap + max(
        math.ceil(measure.multiline_textbbox((0, 0), name, font)[2]) for name in names
    )
    top = 2 * size
    # A wider gap above each row whose name has two lines: there a clip begins.
    tops, y = [], top
    for i, name in enumerate(names):
        y += 2 * gap if i and "\n" in name else 0
        tops.append(y)
        y += height + gap // 2
    across = [
        max(width, math.ceil(font.getlength(title))) + gap // 2 for title in titles
    ]
    lefts = [left + gap + sum(across[:j]) for j in range(len(titles))]
    right = left + gap + sum(across)
    canvas = Image.new("RGB", (right + gap // 2, y + gap // 2), PAPER)
    draw = ImageDraw.Draw(canvas)
    for x, title in zip(lefts, titles, strict=True):
        draw.text((x, top - gap), title, INK, font, anchor="ls")
    for row, name, y in zip(rows, names, tops, strict=True):
        place = (left, y + height // 2)
        draw.multiline_text(place, name, INK, font, anchor="rm", align="right")
        for x, image in zip(lefts, row, strict=True):
            canvas.paste(Image.fromarray(image), (x, y))
    return np.asarray(canvas)


def _one_palette(film: UInt8[np.ndarray, "t h w 3"]) -> list[Image.Image]:
    """The frames in 256 colours chosen from all of them, so that nothing flickers."""
    t, h, w, _ = film.shape
    palette = Image.fromarray(film.reshape(t * h, w, 3)).quantize(256)
    return [Image.fromarray(frame).quantize(palette=palette) for frame in film]


def write(pictures: Pictures, directory: Path | str, step: int) -> list[Path]:
    """Write stills as PNG and films as GIF into `directory`; return their paths."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, image in pictures.stills.items():
        paths.append(directory / f"{step:07d}-{name}.png")
        Image.fromarray(image).save(paths[-1])
    for name, film in pictures.films.items():
        paths.append(
            write_gif(film, directory / f"{step:07d}-{name}.gif", pictures.fps)
        )
    return paths


def write_gif(film: UInt8[np.ndarray, "t h w 3"], path: Path, fps: float) -> Path:
    """Write a film that begins again at its end; return its path."""
    frames = _one_palette(film)
    options = dict(duration=round(1000 / fps), loop=0, save_all=True)
    frames[0].save(path, append_images=frames[1:], **options)
    return path


# Pieces of pictures.


def log_mel_picture(
    log_mel: Float[np.ndarray, "t f"], low: float, high: float
) -> UInt8[np.ndarray, "f t 3"]:
    """A log-mel from black (low) to light (high), NaN grey; low frequencies below."""
    picture = colours((log_mel - low) / max(high - low, 1e-6))
    picture[np.isnan(log_mel)] = GREY
    return np.flip(picture.swapaxes(0, 1), axis=0)


def to_size(image: UInt8[np.ndarray, "h w 3"], height: int, width: int) -> np.ndarray:
    """A picture scaled by repeating pixels, as patches are to be seen."""
    size = (width, height)
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.NEAREST))


def heat(
    image: UInt8[np.ndarray, "h w 3"],
    values: Float[np.ndarray, "i j"],
    low: float,
    high: float,
) -> UInt8[np.ndarray, "h w 3"]:
    """A grey picture under colours of `values` (low to high), scaled to its size."""
    size = image.shape[1::-1]
    scaled = Image.fromarray(np.float32((values - low) / max(high - low, 1e-12)))
    strength = np.asarray(scaled.resize(size, Image.Resampling.BILINEAR)).clip(0, 1)
    grey = image.mean(axis=-1, keepdims=True) * np.ones(3)
    share = 0.35 + 0.4 * strength[..., None]
    mixed = grey * (1 - share) + colours(strength).astype(np.float32) * share
    return np.round(mixed).astype(np.uint8)


def with_cursor(image: UInt8[np.ndarray, "h w 3"], place: float) -> np.ndarray:
    """The picture with a white line at a share (0 to 1) of its width."""
    width = image.shape[1]
    marked, thick = image.copy(), max(1, width // 160)
    left = min(int(place * width), width - thick)
    if 0 <= place <= 1:
        marked[:, left : left + thick] = 255
    return marked


def curve(
    values: Float[np.ndarray, " n"], height: int, width: int, highest: float
) -> UInt8[np.ndarray, "h w 3"]:
    """Values (0 to `highest`) as bars that fill the width, from left to right."""
    canvas = Image.new("RGB", (width, height), PAPER)
    draw, colour = ImageDraw.Draw(canvas), tuple(COLOURS[4].astype(int).tolist())
    for i, value in enumerate(values / max(highest, 1e-12)):
        left, right = i * width // len(values), (i + 1) * width // len(values) - 1
        top = height - 1 - round(min(float(value), 1) * (height - 2))
        draw.rectangle((left, top, max(left, right), height - 1), fill=colour)
    return np.asarray(canvas)


def below(
    images: Sequence[UInt8[np.ndarray, "_h _w 3"]], caption: str = ""
) -> UInt8[np.ndarray, "h w 3"]:
    """Pictures under one another, each at the left, and a line of text below them."""
    size = 16
    font = ImageFont.load_default(size=size)
    lines = caption.splitlines()
    wide = [math.ceil(font.getlength(line)) + size for line in lines]
    width = max([image.shape[1] for image in images] + wide)
    height = sum(image.shape[0] for image in images)
    text = (len(lines) * size * 5 // 4 + size) if lines else 0
    # Even sides: H.264 wants them.
    shape = (width + width % 2, height + text + (height + text) % 2)
    canvas, top = Image.new("RGB", shape, PAPER), 0
    for image in images:
        canvas.paste(Image.fromarray(image), (0, top))
        top += image.shape[0]
    draw = ImageDraw.Draw(canvas)
    draw.multiline_text((size // 2, top + size // 4), caption, INK, font)
    return np.asarray(canvas)
