"""Degraded input: how well does a model see and hear when little is to be had?

`config.eval.corruption` degrades what is evaluated, `config.augment.corruption` what is
trained on (pretraining and finetuning), both written KIND:LEVEL:

| kind           | level                                             | nothing |
|----------------|---------------------------------------------------|---------|
| blur           | deviation of a Gaussian, pixels of the input      | 0       |
| low_resolution | factor by which each side is reduced, and         | 1       |
|                | enlarged again (bilinear, antialiased)            |         |
| noise          | deviation of Gaussian noise, grey levels of 255   | 0       |
| frame_drop     | share of the frames after the first that repeat   | 0       |
|                | the one before                                    |         |
| mute           | share of the sound that is silent, in one piece   | 0       |
| audio_noise    | ratio of the sound's power to that of white       | large   |
|                | noise, decibels                                   |         |

They act on bytes of frames and samples of sound as they are stored, before anything
else. A clip's random numbers come from its number in the data set alone, in evaluation,
so that neither batch size nor order changes a result; in training from the step. Clips
that are in no data set, as a user gives them to predict, are left as they are.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int16, PRNGKeyArray, Shaped, UInt8

from av_mae import ConfigError, choose

TRUNCATE = 4.0  # a Gaussian reaches this many deviations (as in SciPy)


class Kind(NamedTuple):
    """key: of the batch; levels: least and largest; level: its words; apply: to a clip.

    apply(values of one clip with its views, level, key) → the same, degraded.
    """

    key: str
    levels: tuple[float, float]
    level: str
    apply: Callable[..., Array]


class Corruption(NamedTuple):
    """What a config asks for."""

    kind: Kind
    level: float

    def __call__(
        self, batch: Mapping[str, Array], keys: Shaped[PRNGKeyArray, " b"]
    ) -> dict[str, Array]:
        """The batch with this modality of every clip degraded, if it is there."""
        key, _, _, apply = self.kind
        if key not in batch:
            return dict(batch)
        one = lambda values, rng: apply(values, self.level, rng)
        return {**batch, key: jax.vmap(one)(batch[key], keys)}


def parse(field: str, text: str) -> Corruption | None:
    """The corruption that a field of the config names; None where it is ''.

    Raises ConfigError for an unknown kind or a level that it cannot have.
    """
    if not text:
        return None
    name, _, number = text.partition(":")
    kind = choose(field, name, KINDS)
    low, high = kind.levels
    try:
        level = float(number)
    except ValueError:
        level = math.nan
    if not low <= level <= high or math.isinf(level):
        bounds = f"{low:g} to {high:g}" if high < math.inf else f"{low:g} or more"
        bounds = bounds if low > -math.inf else "any number"
        raise ConfigError(
            f"{field} is {text!r}: write {name}:LEVEL, where LEVEL is {kind.level} "
            f"({bounds})."
        )
    return Corruption(kind, level)


# -------------------------------------------------------------------------- of pictures


def _bytes(x: Array) -> UInt8[Array, "..."]:
    return jnp.clip(jnp.round(x), 0, 255).astype(jnp.uint8)


def blur(
    frames: UInt8[Array, "v t h w c"], sigma: float, rng: PRNGKeyArray
) -> UInt8[Array, "v t h w c"]:
    """A Gaussian over height and width; the border is repeated outside."""
    del rng
    down, across = (_gaussian(side, sigma) for side in frames.shape[2:4])
    x = frames.astype(jnp.float32)
    exact = dict(precision=jax.lax.Precision.HIGHEST)
    x = jnp.einsum("ih,vthwc->vtiwc", down, x, **exact)
    return _bytes(jnp.einsum("jw,vthwc->vthjc", across, x, **exact))


def _gaussian(side: int, sigma: float) -> np.ndarray:
    """Weights float32 [new old] of a blur along one side."""
    radius = int(TRUNCATE * sigma + 0.5)
    steps = np.arange(-radius, radius + 1)
    weights = np.exp(-0.5 * (steps / max(sigma, 1e-9)) ** 2)
    matrix = np.zeros((side, side))
    for step, weight in zip(steps, weights / weights.sum(), strict=True):
        places = np.clip(np.arange(side) + step, 0, side - 1)
        matrix[np.arange(side), places] += weight
    return matrix.astype(np.float32)


def low_resolution(
    frames: UInt8[Array, "v t h w c"], factor: float, rng: PRNGKeyArray
) -> UInt8[Array, "v t h w c"]:
    """Reduced by the factor (to a pixel at least) and enlarged to what it was."""
    del rng
    v, t, h, w, c = frames.shape
    small = (v, t, max(1, round(h / factor)), max(1, round(w / factor)), c)
    x = jax.image.resize(frames.astype(jnp.float32), small, "linear")
    return _bytes(jax.image.resize(_bytes(x).astype(x.dtype), frames.shape, "linear"))


def noise(
    frames: UInt8[Array, "v t h w c"], deviation: float, rng: PRNGKeyArray
) -> UInt8[Array, "v t h w c"]:
    """Gaussian noise of its own on every value."""
    return _bytes(frames + deviation * jax.random.normal(rng, frames.shape))


def frame_drop(
    frames: UInt8[Array, "v t h w c"], share: float, rng: PRNGKeyArray
) -> UInt8[Array, "v t h w c"]:
    """The same number of frames in each view, at random places, never the first."""
    views, count = frames.shape[:2]
    order = jax.random.uniform(rng, (views, count - 1)).argsort(axis=1).argsort(axis=1)
    dropped = order < round(share * (count - 1))
    last = jnp.where(dropped, 0, jnp.arange(1, count))
    last = jax.lax.cummax(jnp.pad(last, ((0, 0), (1, 0))), axis=1)  # v t
    return jnp.take_along_axis(frames, last[:, :, None, None, None], axis=1)


# ----------------------------------------------------------------------------- of sound


def mute(
    sound: Int16[Array, "v s"], share: float, rng: PRNGKeyArray
) -> Int16[Array, "v s"]:
    """Zeros in one piece of each view, anywhere."""
    views, count = sound.shape
    length = round(share * count)
    start = jax.random.randint(rng, (views, 1), 0, count - length + 1)
    i = jnp.arange(count)
    return jnp.where((i >= start) & (i < start + length), 0, sound)


def audio_noise(
    sound: Int16[Array, "v s"], decibels: float, rng: PRNGKeyArray
) -> Int16[Array, "v s"]:
    """White noise as loud as each view's own sound asks for; silence stays silent."""
    x = sound.astype(jnp.float32)
    loudness = jnp.sqrt((x**2).mean(axis=1, keepdims=True))
    x += loudness * 10 ** (-decibels / 20) * jax.random.normal(rng, x.shape)
    return jnp.clip(jnp.round(x), -32768, 32767).astype(jnp.int16)


SHARE, POSITIVE = (0.0, 1.0), (0.0, math.inf)
REDUCTION, ANY = (1.0, math.inf), (-math.inf, math.inf)
KINDS = {
    "blur": Kind("rgb", POSITIVE, "the Gaussian's deviation in pixels", blur),
    "low_resolution": Kind(
        "rgb", REDUCTION, "the factor that each side is reduced by", low_resolution
    ),
    "noise": Kind("rgb", POSITIVE, "the noise's deviation in grey levels", noise),
    "frame_drop": Kind("rgb", SHARE, "the share of frames not seen", frame_drop),
    "mute": Kind("waveform", SHARE, "the share of the sound not heard", mute),
    "audio_noise": Kind(
        "waveform", ANY, "the signal-to-noise ratio in decibels", audio_noise
    ),
}
