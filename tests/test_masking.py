"""Masks: exact counts, partitions, and no place preferred."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scenic import SHARED

from av_mae import masking

VIDEOMAE = SHARED / "fixtures" / "videomae" / "mcg_recipe"
needed = pytest.mark.skipif(
    not VIDEOMAE.is_dir(), reason=f"the published masks are not at {VIDEOMAE}"
)
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
        ("time", (62, 8), 0.7, 43 * 8),  # of 43.4
        ("frequency", (62, 8), 0.3, 62 * 2),  # of 2.4
    ],
)
def test_counts_and_partition(kind, grid, ratio, masked):
    assert masking.count(kind, grid, ratio) == masked
    mask = masking.MASKS[kind](jax.random.key(0), 3, grid, ratio)
    n = int(np.prod(grid))
    assert mask.masked.shape == (3, masked) and mask.kept.shape == (3, n - masked)
    assert mask.kept.dtype == mask.masked.dtype == jnp.int32
    both = np.sort(np.concatenate([mask.kept, mask.masked], axis=1), axis=1)
    np.testing.assert_array_equal(both, np.broadcast_to(np.arange(n), (3, n)))


SOUND = (62, 8)


@pytest.mark.parametrize("kind", masking.MASKS)
def test_examples_and_keys_draw_differently_and_a_key_alike(kind):
    grid = VIDEO if kind == "tube" else SOUND
    draw = lambda seed: masking.MASKS[kind](jax.random.key(seed), 2, grid, 0.5).kept
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


def test_each_modality_has_its_masks():
    assert set(masking.KINDS["rgb"]) == {"random", "tube"}
    assert set(masking.KINDS["spectrogram"]) == {"random", "time", "frequency"}
    assert {k for kinds in masking.KINDS.values() for k in kinds} == set(masking.MASKS)


@pytest.mark.parametrize("kind, axis", [("time", 2), ("frequency", 1)])
def test_whole_times_and_whole_frequencies_of_sound(kind, axis):
    mask = masking.MASKS[kind](jax.random.key(0), 4, (6, 5), 0.5)
    hidden = np.zeros((4, 30), bool)
    np.put_along_axis(hidden, np.asarray(mask.masked), True, axis=1)
    hidden = hidden.reshape(4, 6, 5)  # b t f
    line = np.take(hidden, 0, axis=axis)
    assert (hidden == np.expand_dims(line, axis)).all()
    assert (line.sum(axis=1) == {"time": 3, "frequency": 2}[kind]).all()
    assert (line[0] != line[1:]).any()


@needed
def test_tube_counts_are_those_of_videomae():
    """147, 176 and 186 of 196 places, as its own mask generator has them."""
    stored = np.load(VIDEOMAE / "recipe.npz")
    counts = set()
    for name in stored:
        if name.startswith("tube_mask_8x14x14_r"):
            ratio = float(name.split("_r")[1].split("_")[0])
            theirs = stored[name].reshape(8, 196)
            assert (theirs == theirs[:1]).all()
            mask = masking.tube(jax.random.key(0), 2, VIDEO, ratio)
            assert mask.masked.shape == (2, theirs.sum())
            counts.add(int(theirs[0].sum()))
    assert counts == {147, 176, 186}


@pytest.mark.parametrize("kind", masking.MASKS)
def test_every_token_is_masked_equally_often(kind):
    grid, ratio, draws = ((2, 3, 4) if kind == "tube" else (4, 8)), 0.75, 4000
    n = int(np.prod(grid))
    mask = masking.MASKS[kind](jax.random.key(0), draws, grid, ratio)
    rates = np.bincount(np.ravel(mask.masked), minlength=n) / draws
    # Five standard deviations of a binomial.
    assert np.abs(rates - ratio).max() < 5 * np.sqrt(ratio * (1 - ratio) / draws)
    # Nor does a token prefer a place among the masked ones: the first is any of them,
    # but whole lines begin at time or frequency 0.
    firsts = {
        "random": np.arange(n),
        "tube": np.arange(12),
        "time": np.arange(0, n, 8),
        "frequency": np.arange(8),
    }[kind]
    rates = np.bincount(np.asarray(mask.masked)[:, 0], minlength=n) / draws
    chance = 1 / len(firsts)
    wanted = np.where(np.isin(np.arange(n), firsts), chance, 0)
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
    x = jax.random.normal(jax.random.key(1), (3, 32, 5))
    grid = (2, 4, 4) if kind == "tube" else (4, 8)
    mask = masking.MASKS[kind](jax.random.key(0), 3, grid, 0.75)
    kept, masked = masking.take(x, mask.kept), masking.take(x, mask.masked)
    np.testing.assert_array_equal(masking.restore(kept, masked, mask), x)
