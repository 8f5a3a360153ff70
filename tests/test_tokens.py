"""Token order against loops, positions against the published table."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from scenic import SHARED

from av_mae import ConfigError, tokens

VIDEOMAE = SHARED / "fixtures" / "videomae" / "mcg_recipe"


def test_tubes_are_ordered_t_h_w_and_their_values_t_h_w_c():
    clip = np.random.default_rng(0).normal(size=(2, 4, 6, 9, 3))
    found = np.asarray(tokens.patchify(jnp.asarray(clip, jnp.float32), (2, 3, 3)))
    assert found.shape == (2, 2 * 2 * 3, 2 * 3 * 3 * 3)
    for t in range(2):
        for h in range(2):
            for w in range(3):
                wanted = []
                for dt in range(2):
                    for dh in range(3):
                        for dw in range(3):
                            for c in range(3):
                                place = (2 * t + dt, 3 * h + dh, 3 * w + dw, c)
                                wanted.append(clip[(1, *place)])
                token = (t * 2 + h) * 3 + w
                np.testing.assert_array_equal(found[1, token], np.float32(wanted))


def test_patches_of_sound_are_ordered_time_frequency():
    rows, bins = np.mgrid[0:6, 0:4]
    sound = jnp.asarray((10 * rows + bins)[None, :, :, None])
    found = tokens.patchify(sound, (3, 2))
    # token 0: rows 0 to 2 of bins 0, 1; token 1: the same rows, bins 2, 3.
    np.testing.assert_array_equal(found[0, 0], [0, 1, 10, 11, 20, 21])
    np.testing.assert_array_equal(found[0, 1], [2, 3, 12, 13, 22, 23])
    np.testing.assert_array_equal(found[0, 2], [30, 31, 40, 41, 50, 51])


@pytest.mark.parametrize(
    "shape, patch",
    [
        ((2, 4, 8, 12, 3), (2, 4, 4)),
        ((2, 12, 8, 1), (4, 2)),
        ((1, 3, 5, 7, 2), (1,) * 3),
    ],
)
def test_unpatchify_inverts_patchify(shape, patch):
    x = jax.random.normal(jax.random.key(0), shape)
    patches = tokens.patchify(x, patch)
    back = tokens.unpatchify(patches, tokens.grid_of(shape[1:-1], patch), patch)
    np.testing.assert_array_equal(back, x)


def test_what_fills_no_patch_is_dropped_at_the_end():
    # 10 s of sound: 1000 rows of 128 mels give 62 by 8 patches, from rows 0 to 991.
    assert tokens.grid_of((1000, 128), (16, 16)) == (62, 8)
    sound = jnp.arange(1000.0)[None, :, None, None] * jnp.ones((1, 1, 128, 1))
    patches = tokens.patchify(sound, (16, 16))
    assert patches.shape == (1, 496, 256)
    assert patches.max() == 991
    np.testing.assert_array_equal(patches, tokens.patchify(sound[:, :992], (16, 16)))
    whole = tokens.unpatchify(patches, (62, 8), (16, 16))
    np.testing.assert_array_equal(whole, sound[:, :992])


def test_patch_sides_of_the_modalities():
    assert tokens.patch_sides((16, 2), "rgb") == (2, 16, 16)
    assert tokens.patch_sides((16, 2), "spectrogram") == (16, 16)


@pytest.mark.skipif(
    not VIDEOMAE.is_dir(), reason=f"the published table is not at {VIDEOMAE}"
)
def test_sinusoid_is_the_published_table():
    stored = np.load(VIDEOMAE / "recipe.npz")
    rows = stored["sinusoid_1568x384_rows"]
    assert len(rows) == 17 and rows[-1] > 1500
    found = tokens.sinusoid(1568, 384)[rows]
    error = np.abs(found - stored["sinusoid_1568x384"]).max()
    parity.record("videomae recipe: positions", "1568 × 384", outputs=error)
    assert error <= 1e-7


def test_sinusoid_by_hand():
    found = tokens.sinusoid(5, 4)
    assert found.dtype == np.float32
    wanted = [np.sin(3), np.cos(3), np.sin(3 / 100), np.cos(3 / 100)]
    np.testing.assert_allclose(found[3], wanted, atol=1e-7)


@pytest.mark.parametrize("kind", tokens.POSITIONS)
def test_positions_are_looked_up_by_index(kind):
    module = tokens.Positions(kind, (2, 3, 2))
    x = jax.random.normal(jax.random.key(1), (2, 12, 12))
    params = module.init(jax.random.key(0), x)
    table = module.apply(params, jnp.zeros((1, 12, 12)))[0]  # n d
    assert np.ptp(table, axis=0).max() > 0
    np.testing.assert_allclose(module.apply(params, x), x + table, rtol=1e-6)
    index = jnp.array([[6, 0, 3], [1, 1, 11]])
    found = module.apply(params, x[:, :3], index)
    np.testing.assert_allclose(found, x[:, :3] + table[index], rtol=1e-6)


def test_positions_over_a_grid_by_hand():
    """Six features: sine and cosine of the time, the column, the row; rate 1."""
    found = tokens.sincos((4, 5, 6), 6).reshape(4, 5, 6, 6)
    wanted = [f(place) for place in (3, 5, 2) for f in (np.sin, np.cos)]
    np.testing.assert_allclose(found[3, 2, 5], wanted, atol=1e-6)
    # Eight features over (h, w): two rates, 1 and 1/100.
    found = tokens.sincos((5, 6), 8).reshape(5, 6, 8)
    wanted = [
        f(place / rate)
        for place in (4, 2)
        for f in (np.sin, np.cos)
        for rate in (1, 100)
    ]
    np.testing.assert_allclose(found[2, 4], wanted, atol=1e-6)


def table_of(kind, grid, d):
    n = int(np.prod(grid))
    module = tokens.Positions(kind, grid)
    params = module.init(jax.random.key(0), jnp.zeros((1, n, d)))
    found = module.apply(params, jnp.zeros((1, n, d)))[0]
    return params.get("params", {}), np.asarray(found).reshape(*grid, d)


def test_2d_positions_of_frames_are_those_of_a_picture_at_all_times():
    _, video = table_of("sinusoidal_2d", (3, 4, 5), 8)
    _, picture = table_of("sinusoidal_2d", (4, 5), 8)
    for time in video:
        np.testing.assert_array_equal(time, picture)


def test_learned_positions_are_parameters_and_fixed_ones_are_not():
    for kind in ("sinusoidal", "sinusoidal_cls", "sinusoidal_2d", "sinusoidal_3d"):
        assert not table_of(kind, (2, 3, 4), 12)[0]
    params, _ = table_of("learned", (8, 16, 32), 16)
    assert params["embedding"].shape == (4096, 16)
    assert float(params["embedding"].std()) == pytest.approx(0.02, rel=0.02)
    params, table = table_of("learned_space_time", (3, 4, 5), 6)
    assert {k: x.shape for k, x in params.items()} == {"time": (3, 6), "space": (20, 6)}
    space = np.asarray(params["space"]).reshape(4, 5, 6)
    wanted = np.asarray(params["time"])[2] + space[1, 3]
    np.testing.assert_allclose(table[2, 1, 3], wanted, rtol=1e-6)


@pytest.mark.parametrize(
    "kind, grid, d, message",
    [
        ("sinusoid", (3,), 4, "model.positions is 'sinus.*'sinusoidal'?"),
        ("sinusoidal_3d", (3, 4), 12, "needs frames, but there is sound"),
        ("sinusoidal_3d", (3, 4, 5), 8, "needs a width that 6 divides, but it is 8"),
        ("sinusoidal_2d", (3, 4, 5), 6, "needs a width that 4 divides, but it is 6"),
        ("learned_space_time", (3, 4), 12, "needs frames, but there is sound"),
    ],
)
def test_positions_that_cannot_be_are_refused_in_words(kind, grid, d, message):
    with pytest.raises(ConfigError, match=message):
        table_of(kind, grid, d)


@pytest.mark.parametrize("grid", [(4, 4, 4), (12, 8)])
def test_fourier_positions_tell_near_places_apart(grid):
    d = 48
    table = tokens.fourier(grid, d)
    assert table.shape == (math.prod(grid), d) and table.dtype == np.float32
    np.testing.assert_allclose(table.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(table.std(), 1, rtol=1e-5)

    def cosines(x):
        x = x / np.linalg.norm(x, axis=1, keepdims=True)
        return (x @ x.T) - 2 * np.eye(len(x))  # never its own nearest

    others = ~np.eye(len(table), dtype=bool)
    assert abs(cosines(table)[others].mean()) < 0.05
    assert cosines(tokens.sinusoid(len(table), d))[others].mean() > 0.5
    places = np.indices(grid).reshape(len(grid), -1).T
    nearest = places[cosines(table).argmax(1)]
    np.testing.assert_array_equal(np.abs(nearest - places).sum(1), 1)


def test_fourier_positions_fill_up_with_zeros():
    table = tokens.fourier((2, 2, 2), 16)
    np.testing.assert_array_equal(table[:, :12], tokens.fourier((2, 2, 2), 12))
    np.testing.assert_array_equal(table[:, 12:], 0)
    module = tokens.Positions("fourier", (2, 2, 2))
    with pytest.raises(ConfigError, match="a width of 6, but it is 4"):
        module.init(jax.random.key(0), jnp.zeros((1, 8, 4)))
