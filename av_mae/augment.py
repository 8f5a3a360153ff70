"""On the device, inside the step: bytes to normalised values, and augmentation.

Views are flattened into the batch before. Every random choice is made once per row, the
same for all its frames, from the key that the caller gives.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, PRNGKeyArray, UInt8

from av_mae import ConfigError

PICTURE_NORMALISATIONS = ("fixed", "clip")
NORMALISATIONS = ("none", "fixed", "dataset", "clip")

# Ranges of DMVR's color_default_augm.
BRIGHTNESS = 32 / 255  # added, either way
SATURATION = CONTRAST = (0.6, 1.4)  # factors
HUE = 0.2  # of a turn, either way
GREY = (0.2989, 0.5870, 0.1140)  # TensorFlow's rgb_to_grayscale

# Of random erasing, as timm, SlowFast and VideoMAE have them.
ERASED_AREA = (0.02, 1 / 3)  # of the picture
ERASED_ASPECT = (0.3, 1 / 0.3)  # height / width
ERASING_TRIES = 10  # all fail once in about 1e30; VideoMAE tries 100 times


def prepare_rgb(
    frames: UInt8[Array, "b t h w c"],
    mean: Sequence[float],
    std: Sequence[float],
    *,
    normalise: str = "fixed",
    colour: float = 0.0,
    grey: float = 0.0,
    flip: float = 0.0,
    erase: float = 0.0,
    rng: PRNGKeyArray | None = None,
    train: bool = False,
) -> Float32[Array, "b t h w c"]:
    """Frames on [0, 1], less the mean, by the deviation.

    mean and std have a number for each channel. mean .5, std .5 give [−1, 1]. With
    normalise="clip" they are not used: each clip loses its own mean colour, and is
    divided by its own deviation.

    In training each clip, by these chances, gets other colours (`jitter`), loses them,
    is mirrored, and has a box erased: colours before the values are normalised, the
    box after (Scenic's and VideoMAE's order).
    """
    x = frames.astype(jnp.float32) / 255
    key = lambda i: jax.random.fold_in(rng, i)
    if train and colour:
        x = jitter(x, key(1), colour)
    if train and grey:
        x = _some(key(2), grey, _grey(x), x)
    if normalise == "clip":
        x = _by_clip(x, (1, 2, 3))
    else:
        x = (x - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)
    if train and flip:
        x = mirror(x, jax.random.bernoulli(rng, flip, x.shape[:1]))
    return erased(x, key(3), erase) if train and erase else x


def _by_clip(x: Float[Array, "b ..."], axes: tuple[int, ...]) -> Float[Array, "b ..."]:
    """Less the mean over these axes, by the deviation of all that is left of a clip."""
    x = x - x.mean(axes, keepdims=True)
    return x / (x.std(tuple(range(1, x.ndim)), keepdims=True) + 1e-6)


def mirror(
    frames: Float[Array, "b t h w c"], chosen: Bool[Array, " b"]
) -> Float[Array, "b t h w c"]:
    """The chosen clips with left and right exchanged, in all their frames."""
    return jnp.where(chosen[:, None, None, None, None], frames[:, :, :, ::-1], frames)


# ------------------------------------------------------------------------------- colour


def jitter(
    frames: Float[Array, "b t h w 3"], rng: PRNGKeyArray, probability: float
) -> Float[Array, "b t h w 3"]:
    """Brightness, saturation, contrast and hue of some clips on [0, 1], in this order.

    DMVR's color_default_augm, which Scenic finetunes AV-MAE with: uniform draws from
    `BRIGHTNESS`, `SATURATION`, `CONTRAST` and `HUE`; clipped to [0, 1] at the end only.
    """
    keys = jax.random.split(rng, 5)
    draw = lambda key, low, high: jax.random.uniform(
        key, (len(frames), 1, 1, 1), minval=low, maxval=high
    )
    x = frames + draw(keys[0], -BRIGHTNESS, BRIGHTNESS)[..., None]
    x = adjust_saturation(x, draw(keys[1], *SATURATION))
    x = adjust_contrast(x, draw(keys[2], *CONTRAST))
    x = adjust_hue(x, draw(keys[3], -HUE, HUE))
    return _some(keys[4], probability, jnp.clip(x, 0, 1), frames)


def _some(rng, probability, changed, x):
    """The changed values of some rows, drawn by this probability, and x of others."""
    chosen = jax.random.bernoulli(rng, probability, x.shape[:1])
    return jnp.where(chosen.reshape((-1,) + (1,) * (x.ndim - 1)), changed, x)


def adjust_saturation(
    x: Float[Array, "*pixels 3"], factor: Float[Array, "*#pixels"]
) -> Float[Array, "*pixels 3"]:
    """The saturation of HSV times a factor, at most 1 (tf.image.adjust_saturation)."""
    value = x.max(-1)
    chroma = value - x.min(-1)
    wanted = jnp.clip(chroma * factor, 0, jnp.maximum(value, 0))
    ratio = jnp.where(chroma > 0, wanted / jnp.where(chroma > 0, chroma, 1), 1)
    return value[..., None] - (value[..., None] - x) * ratio[..., None]


def adjust_contrast(
    x: Float[Array, "*n h w 3"], factor: Float[Array, "*#n 1 1"]
) -> Float[Array, "*n h w 3"]:
    """Away from the mean of each frame and channel (tf.image.adjust_contrast)."""
    mean = x.mean((-3, -2), keepdims=True)
    return (x - mean) * factor[..., None] + mean


def adjust_hue(
    x: Float[Array, "*pixels 3"], turn: Float[Array, "*#pixels"]
) -> Float[Array, "*pixels 3"]:
    """Hue turned by a share of the circle (tf.image.adjust_hue).

    The largest and the smallest value of a pixel stay; hue h in [0, 6) gives channel i
    value − chroma · clip(min(k, 4 − k), 0, 1) with k = (i + h) mod 6, i = 5, 3, 1.
    """
    r, g, b = jnp.moveaxis(x, -1, 0)
    value = x.max(-1)
    chroma = value - x.min(-1)
    of = lambda difference: difference / jnp.where(chroma > 0, chroma, 1)
    of_green = jnp.where(value == g, 2 + of(b - r), 4 + of(r - g))
    hue = jnp.where(value == r, of(g - b), of_green) + 6 * turn
    k = (jnp.array([5.0, 3.0, 1.0]) + hue[..., None]) % 6
    return value[..., None] - chroma[..., None] * jnp.clip(jnp.minimum(k, 4 - k), 0, 1)


def _grey(x: Float[Array, "*pixels 3"]) -> Float[Array, "*pixels 3"]:
    """The luma of each pixel in all its channels."""
    r, g, b = jnp.moveaxis(x, -1, 0)
    luma = GREY[0] * r + GREY[1] * g + GREY[2] * b
    return jnp.broadcast_to(luma[..., None], x.shape)


# ------------------------------------------------------------------------------ erasing


def erased(
    frames: Float[Array, "b t h w c"], rng: PRNGKeyArray, probability: float
) -> Float[Array, "b t h w c"]:
    """Some clips with a box of noise from N(0, 1), the same box in all their frames.

    timm's RandomErasing, mode "pixel", count 1, with SlowFast's `cube`, as VideoMAE
    finetunes: each frame has noise of its own. Frames are normalised already.
    """
    chosen, places, noise = jax.random.split(rng, 3)
    b, _, h, w, _ = frames.shape
    uniform = jax.random.uniform(places, (4, b, ERASING_TRIES))
    top, left, high, wide = erased_boxes(uniform, (h, w))
    rows, columns = jnp.arange(h), jnp.arange(w)
    rows = (rows >= top[:, None]) & (rows < (top + high)[:, None])  # b h
    columns = (columns >= left[:, None]) & (columns < (left + wide)[:, None])  # b w
    box = rows[:, None, :, None, None] & columns[:, None, None, :, None]
    noisy = jnp.where(box, jax.random.normal(noise, frames.shape), frames)
    return _some(chosen, probability, noisy, frames)


def erased_boxes(
    uniform: Float[Array, "4 b tries"], size: tuple[int, int]
) -> Int[Array, "4 b"]:
    """(top, left, height, width) of boxes smaller than a picture of this size.

    uniform: numbers in [0, 1) for area, shape, row and column. The area is uniform in
    `ERASED_AREA`, the logarithm of the shape in `ERASED_ASPECT`; of several tries the
    first counts that fits.
    """
    area, aspect, row, column = uniform
    low, high = ERASED_AREA
    area = size[0] * size[1] * (low + area * (high - low))
    low, high = map(math.log, ERASED_ASPECT)
    aspect = jnp.exp(low + aspect * (high - low))
    tall, wide = jnp.round(jnp.sqrt(area * aspect)), jnp.round(jnp.sqrt(area / aspect))
    first = jnp.argmax((tall < size[0]) & (wide < size[1]), axis=1)
    top = jnp.floor(row * (size[0] - tall + 1))
    left = jnp.floor(column * (size[1] - wide + 1))
    boxes = jnp.stack([top, left, tall, wide])  # 4 b tries
    return boxes[:, jnp.arange(len(first)), first].astype(jnp.int32)


# -------------------------------------------------------------------------------- sound


def prepare_spectrogram(
    log_mel: Float32[Array, "b t f 1"],
    normalise: str,
    mean: float | Float[Array, ""] = 0.0,
    std: float | Float[Array, ""] = 1.0,
) -> Float32[Array, "b t f 1"]:
    """The log-mel as it is ("none"), or less mean and by std ("fixed", "dataset").

    For "dataset" the caller has looked mean and std up in the prepared data set. With
    "clip" each clip loses the mean of each mel bin (the colour of its noise, its
    level), and is divided by its own deviation.
    """
    if normalise not in NORMALISATIONS:
        raise ConfigError(
            f"spectrogram.normalise is {normalise!r}: "
            f"choose one of {', '.join(NORMALISATIONS)}."
        )
    if normalise == "clip":
        return _by_clip(log_mel, (1,))
    return log_mel if normalise == "none" else (log_mel - mean) / std


def time_shift(
    log_mel: Float[Array, "b t f 1"], rng: PRNGKeyArray
) -> Float[Array, "b t f 1"]:
    """Each row turned by its own random number of rows; what leaves comes in again."""
    b, t = log_mel.shape[:2]
    shift = jax.random.randint(rng, (b, 1), 0, t)
    index = (jnp.arange(t)[None] - shift) % t  # b t
    return jnp.take_along_axis(log_mel, index[:, :, None, None], axis=1)


def spec_augment(
    log_mel: Float[Array, "b t f 1"],
    rng: PRNGKeyArray,
    frequency: tuple[int, int] = (0, 0),
    time: tuple[int, int] = (0, 0),
) -> Float[Array, "b t f 1"]:
    """Bands of frequency and of time are zero: SpecAugment without the warp of time.

    frequency, time: (how many bands, bound of their widths), as in Lingvo's
    SpectrumAugmenter, which Scenic uses: each width is uniform in 0 … bound − 1, each
    place uniform where the band fits; bands may overlap. Zero is the mean of log-mels
    that are standardised. (Park et al., 2019, arXiv:1904.08779.)

    Scenic's published AV-MAE configs also set `time_mask_max_ratio` to 0, with which
    Lingvo leaves out the bands of time that they ask for.
    """
    b, t, f, _ = log_mel.shape
    rows, bins = jax.random.split(rng)
    masked = _bands(rows, b, t, *time)[:, :, None, None]
    masked |= _bands(bins, b, f, *frequency)[:, None, :, None]
    return jnp.where(masked, 0, log_mel)


def _bands(rng, count, length, bands, bound) -> Bool[Array, "b length"]:
    """Where any of the bands [b bands] lies."""
    width, place = jax.random.uniform(rng, (2, count, bands, 1))
    width = jnp.minimum(jnp.floor(width * bound), length)
    start = jnp.floor(place * (length - width + 1))
    i = jnp.arange(length)
    return ((i >= start) & (i < start + width)).any(axis=1)
