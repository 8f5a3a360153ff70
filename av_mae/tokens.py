"""Patches, tubes and their positions: arrays to tokens and back.

A video [b t h w c] is cut into tubes and a spectrogram [b t f c] into patches by the
same code. Tokens are ordered (t, h, w), w fastest ((t, f), f fastest, for sound); the
vector inside one is ordered (t, h, w, c), c fastest. Rows and columns that do not fill
a patch are dropped at the end (1000 mel rows become 992).
"""

import math

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int, Shaped

from av_mae import ConfigError, choose


def grid_of(shape: tuple[int, ...], patch: tuple[int, ...]) -> tuple[int, ...]:
    """Number of whole patches along each axis; `shape` is without batch, channels."""
    return tuple(size // side for size, side in zip(shape, patch, strict=True))


def _axes(patch: tuple[int, ...]) -> tuple[str, str, dict[str, int]]:
    """Einops patterns of picture and flat patches, and the patch's sides.

    For two axes: "b (g0 p0) (g1 p1) c", "b (g0 g1) (p0 p1 c)", {"p0": …, "p1": …}.
    """
    axes = range(len(patch))
    pairs = " ".join(f"(g{i} p{i})" for i in axes)
    grid, inner = (" ".join(f"{x}{i}" for i in axes) for x in "gp")
    sides = {f"p{i}": side for i, side in enumerate(patch)}
    return f"b {pairs} c", f"b ({grid}) ({inner} c)", sides


def patchify(
    x: Shaped[Array, "b ..."], patch: tuple[int, ...]
) -> Shaped[Array, "b n f"]:
    """Cut [b, *sizes, c] into flat patches [b, n, f], f = prod(patch)·c."""
    grid = grid_of(x.shape[1:-1], patch)
    whole = tuple(slice(g * p) for g, p in zip(grid, patch, strict=True))
    x = x[(slice(None), *whole)]
    image, flat, sides = _axes(patch)
    return rearrange(x, f"{image} -> {flat}", **sides)


def unpatchify(
    patches: Shaped[Array, "b n f"], grid: tuple[int, ...], patch: tuple[int, ...]
) -> Shaped[Array, "b ..."]:
    """Put flat patches [b, n, f] back to [b, *sizes, c]; the inverse of `patchify`."""
    image, flat, sides = _axes(patch)
    sides |= {f"g{i}": size for i, size in enumerate(grid)}
    return rearrange(patches, f"{flat} -> {image}", **sides)


def sinusoid(n: int, d: int) -> Float[np.ndarray, "n d"]:
    """Fixed positions over the flattened token index, sine and cosine interleaved.

    Angle i/10000^(2j/d) at features 2j (sine) and 2j+1 (cosine), as Scenic's
    `sinusoidal_1d` and VideoMAE's `get_sinusoid_encoding_table` have it; computed in
    float64, returned as float32. `d` must be even.
    """
    rates = np.exp(-math.log(10_000.0) * np.arange(d // 2) / (d // 2))
    angles = np.arange(n)[:, None] * rates  # n d/2
    table = np.stack([np.sin(angles), np.cos(angles)], axis=-1)  # n d/2 2
    return table.reshape(n, d).astype(np.float32)


def sincos(grid: tuple[int, ...], d: int) -> Float[np.ndarray, "n d"]:
    """Fixed positions over a grid of two or three axes (MoCo v3; in 3-D, Scenic).

    For each axis in the order (t,) w, h the sines and then the cosines of
    place/10000^(j/r), for j below r = d / (2 · axes), which must be whole.
    """
    r = d // (2 * len(grid))
    rates = 10_000.0 ** (-np.arange(r) / r)
    *times, h, w = np.indices(grid).reshape(len(grid), -1, 1)  # n 1 each
    parts = [f(axis * rates) for axis in (*times, w, h) for f in (np.sin, np.cos)]
    return np.concatenate(parts, axis=1).astype(np.float32)


def fourier(grid: tuple[int, ...], d: int) -> Float[np.ndarray, "n d"]:
    """Fixed positions over a grid, far apart for near places however small it is.

    For each axis of length L sines and cosines at d // (2 · axes) wavelengths from 4 to
    4·L tokens, evenly on a logarithmic scale; then the mean over the grid is taken away
    and the deviation made 1; features left over are 0. A sinusoid with base 10000
    (`sinusoidal`) has wavelengths up to 60,000 tokens: on 4×4×4 tokens most of its
    features hardly change, and the vectors of two places have a cosine of .6 on
    average. Random Fourier features (Tancik et al. 2020) answer the same fault.
    """
    r = d // (2 * len(grid))
    parts = []
    for length, places in zip(
        grid, np.indices(grid).reshape(len(grid), -1), strict=True
    ):
        rates = math.pi / 2 / np.geomspace(1, max(length, 2), r)
        angles = places[:, None] * rates  # n r
        parts += [np.sin(angles), np.cos(angles)]
    table = np.concatenate(parts, axis=1)
    table = table - table.mean(axis=0)
    table = np.pad(table / table.std(), ((0, 0), (0, d - table.shape[1])))
    return table.astype(np.float32)


Grid = tuple[int, ...]


def _sinusoidal(module: nn.Module, grid: Grid, d: int) -> Array:
    return jnp.asarray(sinusoid(math.prod(grid), d))


def _sinusoidal_cls(module: nn.Module, grid: Grid, d: int) -> Array:
    """Place 0 is that of the CLS token, and the patches follow."""
    return jnp.asarray(sinusoid(math.prod(grid) + 1, d)[1:])


def _learned(module: nn.Module, grid: Grid, d: int) -> Array:
    """A parameter, from normal(0.02) as Scenic's `learned_1d`."""
    shape = (math.prod(grid), d)
    return module.param("embedding", nn.initializers.normal(0.02), shape, jnp.float32)


def _sinusoidal_2d(module: nn.Module, grid: Grid, d: int) -> Array:
    """Over (h, w), alike at all times; over (t, f) for sound."""
    _check(module.kind, d % 4 == 0, f"a width that 4 divides, but it is {d}")
    return jnp.tile(sincos(grid[-2:], d), (math.prod(grid[:-2]), 1))


def _sinusoidal_3d(module: nn.Module, grid: Grid, d: int) -> Array:
    _check(module.kind, len(grid) == 3, "frames, but there is sound")
    _check(module.kind, d % 6 == 0, f"a width that 6 divides, but it is {d}")
    return jnp.asarray(sincos(grid, d))


def _fourier(module: nn.Module, grid: Grid, d: int) -> Array:
    _check(
        module.kind, d >= 2 * len(grid), f"a width of {2 * len(grid)}, but it is {d}"
    )
    return jnp.asarray(fourier(grid, d))


def _learned_space_time(module: nn.Module, grid: Grid, d: int) -> Array:
    """A parameter for each time plus one for each place (h, w)."""
    _check(module.kind, len(grid) == 3, "frames, but there is sound")
    t, *space = grid
    init = nn.initializers.normal(0.02)
    time = module.param("time", init, (t, d), jnp.float32)
    space = module.param("space", init, (math.prod(space), d), jnp.float32)
    return (time[:, None] + space[None]).reshape(-1, d)


def _check(kind: str, good: bool, needs: str):
    if not good:
        raise ConfigError(
            f"model.positions (or that of the decoder) is {kind!r}, which needs "
            f"{needs}: choose 'sinusoidal' or 'learned', or change that."
        )


# Scenic's models of one modality have `sinusoidal_2d`, `sinusoidal_3d` and
# `learned_space_time`, its MBT with CLS tokens `sinusoidal_cls`; `fourier` is for small
# grids; the others serve every model.
POSITIONS = {
    "sinusoidal": _sinusoidal,
    "sinusoidal_cls": _sinusoidal_cls,
    "learned": _learned,
    "sinusoidal_2d": _sinusoidal_2d,
    "sinusoidal_3d": _sinusoidal_3d,
    "fourier": _fourier,
    "learned_space_time": _learned_space_time,
}


class Positions(nn.Module):
    """Adds to each token its position's vector, looked up by token index.

    `kind` is a name of POSITIONS; `grid` is that of all tokens, (n,) where nobody asks
    for its axes.
    """

    kind: str
    grid: Grid

    @nn.compact
    def __call__(
        self, x: Float[Array, "b k d"], index: Int[Array, "b k"] | None = None
    ) -> Float[Array, "b k d"]:
        make = choose("model.positions", self.kind, POSITIONS)
        table = make(self, tuple(self.grid), x.shape[-1])
        table = table.astype(x.dtype)
        if index is None:
            return x + table[None]
        return x + jnp.take(table, index, axis=0)


def patch_sides(tube: tuple[int, int], modality: str) -> tuple[int, ...]:
    """Patch sides of a modality, from a variant's (side, tubelet)."""
    side, tubelet = tube
    return (tubelet, side, side) if modality == "rgb" else (side, side)
