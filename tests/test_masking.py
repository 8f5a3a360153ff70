"""Masks: exact counts, partitions, and no place preferred."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from av_mae import masking

VIDEO = (8, 14, 14)  # 16 frames of 224 by 224 in tubes of 2 by 16 by 16


@pytest.mark.parametrize(
    "kind, grid, ratio, masked",
    [
        ("random", VIDEO, 0.9, 1411),  # of 1568
        ("random", (62, 8), 0.7, 347),  # of 496
        ("random", (2, 2, 2), 0.75, 6),
        ("tube", VIDEO, 0.75, 8 * 147),
        ("tube", VIDEO, 0.9, 8 * 176),
        ("tube", VIDEO, 0.95, 8 * 186),
        ("tube", VIDEO, 0.8, 8 * 156),  # of 156.8: rounded down
    ],
)
def test_counts_and_partition(kind, grid, ratio, masked):
    mask = masking.MASKS[kind](jax.random.key(0), 3, grid, ratio)
    n = int(np.prod(grid))
    assert mask.masked.shape == (3, masked) and mask.kept.shape == (3, n - masked)
    assert mask.kept.dtype == mask.masked.dtype == jnp.int32
    both = np.sort(np.concatenate([mask.kept, mask.masked], axis=1), axis=1)
    np.testing.assert_array_equal(both, np.broadcast_to(np.arange(n), (3, n)))


@pytest.mark.parametrize("kind", masking.MASKS)
def test_examples_and_keys_draw_differently_and_a_key_alike(kind):
    draw = lambda seed: masking.MASKS[kind](jax.random.key(seed), 2, VIDEO, 0.5).kept
    first = np.sort(draw(0), axis=1)
    assert (first[0] != first[1]).any()
    assert (first != np.sort(draw(1), axis=1)).any()
    np.testing.assert_array_equal(draw(0), draw(0))


def test_tubes_hide_the_same_places_at_all_times():
    mask = masking.tube(jax.random.key(0), 4, (5, 3, 4), 0.5)
    hidden = np.zeros((4, 60), bool)
    np.put_along_axis(hidden, np.asarray(mask.masked), True, axis=1)
    hidden = hidden.reshape(4, 5, 12)
    assert (hidden == hidden[:, :1]).all()
    assert (hidden[:, 0].sum(axis=1) == 6).all()
    assert (hidden[0, 0] != hidden[1, 0]).any()


def test_random_masks_differ_between_times():
    mask = masking.random(jax.random.key(0), 1, VIDEO, 0.5)
    hidden = np.zeros(1568, bool)
    hidden[np.asarray(mask.masked)[0]] = True
    hidden = hidden.reshape(8, 196)
    # Two times agree at half of the places by chance: .5 ± .036.
    assert abs((hidden[0] == hidden[1]).mean() - 0.5) < 0.15


@pytest.mark.parametrize("kind", masking.MASKS)
def test_every_token_is_masked_equally_often(kind):
    grid, ratio, draws = (2, 3, 4), 0.75, 4000
    mask = masking.MASKS[kind](jax.random.key(0), draws, grid, ratio)
    rates = np.bincount(np.ravel(mask.masked), minlength=24) / draws
    # Five standard deviations of a binomial.
    assert np.abs(rates - ratio).max() < 5 * np.sqrt(ratio * (1 - ratio) / draws)
    # Nor does a token prefer a place among the masked ones.
    rates = np.bincount(np.asarray(mask.masked)[:, 0], minlength=24) / draws
    chance = 1 / 24 if kind == "random" else 1 / 12  # a tube begins at time 0
    wanted = np.where(np.arange(24) < (24 if kind == "random" else 12), chance, 0)
    assert np.abs(rates - wanted).max() < 5 * np.sqrt(chance / draws)


def test_take_is_a_loop_over_rows():
    x = np.random.default_rng(0).normal(size=(2, 5, 3)).astype(np.float32)
    index = np.array([[4, 0], [2, 2]])
    found = masking.take(jnp.asarray(x), jnp.asarray(index))
    for b in range(2):
        for k in range(2):
            np.testing.assert_array_equal(found[b, k], x[b, index[b, k]])


@pytest.mark.parametrize("kind", masking.MASKS)
def test_restore_inverts_take(kind):
    x = jax.random.normal(jax.random.key(1), (3, 24, 5))
    mask = masking.MASKS[kind](jax.random.key(0), 3, (2, 3, 4), 0.75)
    kept, masked = masking.take(x, mask.kept), masking.take(x, mask.masked)
    np.testing.assert_array_equal(masking.restore(kept, masked, mask), x)
