"""Masks: exact counts, partitions, and no place preferred."""

import jax
import jax.numpy as jnp
import numpy as np
import parity
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
            parity.record("videomae recipe: tube masks", name, outputs=0)
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


def running_cells(grid, shown: int) -> np.ndarray:
    """VideoMAE V2's decoder masks, one for each start: bool [4 n], True what is shown.

    A queue of 4 − shown ones and `shown` zeros goes round by one from time to time; a
    cell of 2×2 places reads it row by row, and what has a one is left out.
    """
    t, h, w = grid
    queue, found = np.array([True] * (4 - shown) + [False] * shown), []
    for start in range(4):
        times = [np.roll(queue, -start - i - 1).reshape(2, 2) for i in range(t)]
        cells = [np.tile(cell, (h // 2, w // 2)).reshape(-1) for cell in times]
        found.append(~np.concatenate(cells))
    return np.stack(found)


@pytest.mark.parametrize("shown", [1, 2, 3])
def test_running_cells_in_tubes_are_those_of_videomae_2(shown):
    mask = masking.tube(jax.random.key(0), 32, VIDEO, 0.75)
    share = shown / 4
    found = masking.part(jax.random.key(1), mask, VIDEO, "running_cell", share)
    np.testing.assert_array_equal(found.kept, mask.kept)
    count = int(share * mask.masked.shape[1])
    assert found.masked.shape == (32, count)
    starts, cells = set(), running_cells(VIDEO, shown)
    for wanted, row in zip(np.asarray(mask.masked), found.masked, strict=True):
        hidden, decoded = np.zeros((2, int(np.prod(VIDEO))), bool)
        hidden[wanted], decoded[np.asarray(row)] = True, True
        assert decoded.sum() == count  # none twice
        starts |= {
            i for i, cell in enumerate(cells) if (decoded == hidden & cell).all()
        }
    assert starts == {0, 1, 2, 3}


@pytest.mark.parametrize("kind", ["random", "running_cell"])
@pytest.mark.parametrize("grid", [VIDEO, SOUND], ids=["video", "sound"])
def test_a_part_is_exactly_so_many_of_the_masked(kind, grid):
    mask = masking.random(jax.random.key(0), 4, grid, 0.7)
    found = masking.part(jax.random.key(1), mask, grid, kind, 0.5)
    count = mask.masked.shape[1] // 2
    assert found.masked.shape == (4, count) and found.masked.dtype == jnp.int32
    for row, whole in zip(np.asarray(found.masked), mask.masked, strict=True):
        assert len(set(row)) == count and set(row) <= set(np.asarray(whole).tolist())
    other = masking.part(jax.random.key(2), mask, grid, kind, 0.5).masked
    assert (np.sort(other, axis=1) != np.sort(found.masked, axis=1)).any()


def test_running_cells_of_sound_show_half_of_every_cell():
    """Of a mask that hides all, and every place as often over four cells in time."""
    everything = jnp.arange(496, dtype=jnp.int32)[None]
    mask = masking.Mask(everything[:, :0], everything)
    found = masking.part(jax.random.key(0), mask, SOUND, "running_cell", 0.5)
    shown = np.zeros(496, bool)
    shown[np.asarray(found.masked[0])] = True
    cells = shown.reshape(31, 2, 4, 2)
    assert (cells.sum((1, 3)) == 2).all()
    assert (cells[:28].reshape(7, 4, 2, 4, 2).sum(1) == 2).all()


def test_all_is_all():
    mask = masking.random(jax.random.key(0), 2, SOUND, 0.5)
    assert masking.part(jax.random.key(1), mask, SOUND, "all", 0.5) is mask


def test_several_index_sets_of_one_example():
    x = jnp.arange(24).reshape(2, 6, 2)
    index = jnp.array([[0, 5], [1, 1], [2, 3], [4, 0]])
    wanted = masking.take(jnp.repeat(x, 2, axis=0), index)
    np.testing.assert_array_equal(masking.take(x, index), wanted)
