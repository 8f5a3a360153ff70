"""Which tokens the encoder sees: a mask is a value, drawn from noise.

Counts are static, so that every batch compiles to one program: `random` masks
int(ratio·n) tokens, `tube` masks int(ratio·h·w) places in all time steps alike
(VideoMAE §3.2). Sound may lose int(ratio·t) whole times or int(ratio·f) whole
frequencies (AudioMAE, Huang et al. 2022, §3.2). A decoder may be asked for a part of
the masked tokens alone: `DECODE`.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, Shaped, UInt32

Rng = Key[Array, ""] | UInt32[Array, "2"]


class Mask(NamedTuple):
    """Token indices in drawn order: `kept` are encoded, `masked` are predicted."""

    kept: Int[Array, "b k"]
    masked: Int[Array, "b m"]


def _split(rng, b: int, n: int, num_masked: int) -> tuple[Array, Array]:
    """Two disjoint random index sets [b, n - num_masked] and [b, num_masked]."""
    order = jnp.argsort(jax.random.uniform(rng, (b, n)), axis=1).astype(jnp.int32)
    return order[:, num_masked:], order[:, :num_masked]


def random(rng: Rng, b: int, grid: tuple[int, ...], ratio: float) -> Mask:
    """Every token alike (MAE, AV-MAE): int(ratio·n) of n masked."""
    n = math.prod(grid)
    kept, masked = _split(rng, b, n, int(ratio * n))
    return Mask(kept, masked)


def tube(rng: Rng, b: int, grid: tuple[int, ...], ratio: float) -> Mask:
    """The same places in all time steps (VideoMAE): t·int(ratio·h·w) tokens masked."""
    t, *space = grid
    places = math.prod(space)
    over_time = jnp.arange(t, dtype=jnp.int32)[None, :, None] * places  # 1 t 1
    parts = _split(rng, b, places, int(ratio * places))
    kept, masked = ((over_time + part[:, None, :]).reshape(b, -1) for part in parts)
    return Mask(kept, masked)


def time(rng: Rng, b: int, grid: tuple[int, ...], ratio: float) -> Mask:
    """Whole times of sound: int(ratio·t)·f tokens masked."""
    t, f = grid
    over_frequency = jnp.arange(f, dtype=jnp.int32)  # f
    parts = _split(rng, b, t, int(ratio * t))
    kept, masked = (
        (part[:, :, None] * f + over_frequency).reshape(b, -1) for part in parts
    )
    return Mask(kept, masked)


def frequency(rng: Rng, b: int, grid: tuple[int, ...], ratio: float) -> Mask:
    """The same frequencies at all times: t·int(ratio·f) tokens masked."""
    return tube(rng, b, grid, ratio)


MASKS = {"random": random, "tube": tube, "time": time, "frequency": frequency}
# Those that make sense for each modality.
KINDS = {"rgb": ("random", "tube"), "spectrogram": ("random", "time", "frequency")}


def count(kind: str, grid: tuple[int, ...], ratio: float) -> int:
    """How many tokens of a clip a mask hides."""
    draw = lambda rng: MASKS[kind](rng, 1, grid, ratio)
    return jax.eval_shape(draw, jax.random.key(0)).masked.shape[1]


# Which of the masked tokens are decoded, in training.


def running_cell(
    rng: Rng, masked: Int[Array, "b m"], grid: tuple[int, ...], share: float
) -> Float[Array, "b m"]:
    """1 for tokens that a running cell leaves out, 0 for those that it shows.

    In cells of 2×2 places 4·share of them are shown, and from one time to the next they
    go round (MAR, Qing et al. 2022; as the decoder's mask, VideoMAE V2, Wang et al.
    2023, §3.2); where they begin is drawn for each clip. Cells of sound are 2×2 in time
    and frequency, and go round from one to the next in time (our choice).
    """
    *time, y, x = np.indices(grid).reshape(len(grid), -1)
    step = time[0] if time else y // 2
    start = jax.random.randint(rng, (len(masked), 1), 0, 4)
    place = jnp.asarray(2 * (y % 2) + x % 2 + step)[masked]
    return ((place + start) % 4 >= round(4 * share)).astype(jnp.float32)


def anywhere(rng: Rng, masked: Int[Array, "b m"], grid, share) -> Float[Array, "b m"]:
    """All masked tokens alike."""
    return jnp.zeros(masked.shape, jnp.float32)


# objective.decode.kind; `all` decodes every masked token.
DECODE = {"all": None, "random": anywhere, "running_cell": running_cell}


def part(rng: Rng, mask: Mask, grid: tuple[int, ...], kind: str, share: float) -> Mask:
    """The mask with int(share·m) of its masked tokens, by a kind of DECODE.

    The counts being static, tokens that a running cell leaves out fill up what it shows
    too few of, and some that it shows are left out where there are too many, by chance.
    With tubes over a multiple of 4 times there is neither.
    """
    if DECODE[kind] is None:
        return mask
    first, second = jax.random.split(rng)
    late = DECODE[kind](first, mask.masked, grid, share)
    order = jnp.argsort(late + jax.random.uniform(second, late.shape), axis=1)
    count = max(1, int(share * late.shape[1]))
    masked = jnp.take_along_axis(mask.masked, order[:, :count], axis=1)
    return Mask(mask.kept, masked)


def take(
    x: Shaped[Array, "b n d"], index: Int[Array, "b_r k"]
) -> Shaped[Array, "b_r k d"]:
    """Rows of each example by index; r index sets of one example follow each other."""
    b, k = len(x), index.shape[1]
    rows = jnp.take_along_axis(x, index.reshape(b, -1, 1), axis=1)
    return rows.reshape(len(index), k, x.shape[-1])


def restore(
    kept: Shaped[Array, "b k d"], masked: Shaped[Array, "b m d"], mask: Mask
) -> Shaped[Array, "b n d"]:
    """Kept and masked rows back in token order (pictures only; training needs none)."""
    rows = jnp.concatenate([kept, masked], axis=1)
    index = jnp.concatenate([mask.kept, mask.masked], axis=1)
    return take(rows, jnp.argsort(index, axis=1))
