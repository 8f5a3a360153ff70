"""On the device, inside the step: bytes to normalised values, and augmentation.

Views are flattened into the batch before. Every random choice is made once per row, the
same for all its frames, from the key that the caller gives.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, PRNGKeyArray, UInt8

from av_mae import ConfigError

PICTURE_NORMALISATIONS = ("fixed", "clip")
NORMALISATIONS = ("none", "fixed", "dataset", "clip")


def prepare_rgb(
    frames: UInt8[Array, "b t h w c"],
    mean: Sequence[float],
    std: Sequence[float],
    *,
    normalise: str = "fixed",
    flip: float = 0.0,
    rng: PRNGKeyArray | None = None,
    train: bool = False,
) -> Float32[Array, "b t h w c"]:
    """Frames on [0, 1], less the mean, by the deviation; in training perhaps flipped.

    mean and std have a number for each channel. mean .5, std .5 give [−1, 1]. With
    normalise="clip" they are not used: each clip loses its own mean colour, and is
    divided by its own deviation.
    """
    x = frames.astype(jnp.float32) / 255
    if normalise == "clip":
        x = _by_clip(x, (1, 2, 3))
    else:
        x = (x - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)
    if train and flip:
        return mirror(x, jax.random.bernoulli(rng, flip, x.shape[:1]))
    return x


def _by_clip(x: Float[Array, "b ..."], axes: tuple[int, ...]) -> Float[Array, "b ..."]:
    """Less the mean over these axes, by the deviation of all that is left of a clip."""
    x = x - x.mean(axes, keepdims=True)
    return x / (x.std(tuple(range(1, x.ndim)), keepdims=True) + 1e-6)


def mirror(
    frames: Float[Array, "b t h w c"], chosen: Bool[Array, " b"]
) -> Float[Array, "b t h w c"]:
    """The chosen clips with left and right exchanged, in all their frames."""
    return jnp.where(chosen[:, None, None, None, None], frames[:, :, :, ::-1], frames)


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
