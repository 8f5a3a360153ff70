"""Starts and loops, against the tables of the published samplers."""

from pathlib import Path

import numpy as np
import pytest

from data import sampling
from data.sampling import Length, Want

SHARED = Path(__file__).resolve().parents[2] / "shared"
TABLES = SHARED / "fixtures/scenic/data/pipeline.npz"
WANT = Want(16, 4, 160_000, 16_000, "proportional")


@pytest.fixture(scope="module")
def tables():
    if not TABLES.exists():
        pytest.skip(f"{TABLES} is not there (fixtures of the published system)")
    return np.load(TABLES)


@pytest.mark.parametrize("length", [9, 20, 30, 300])
@pytest.mark.parametrize(("steps", "stride"), [(4, 2), (16, 4), (32, 2)])
def test_published_tables(tables, length, steps, stride):
    tag = f"len{length}_steps{steps}_stride{stride}"
    (middle,) = sampling.even_starts(length, 1, steps, stride)
    views = sampling.even_starts(length, 4, steps, stride)
    shared = sampling.proportional_start(25, 100, length)
    for name, starts in [
        ("center", [middle]),
        ("linspace4", views),
        ("random_given_proportion0.25", [shared]),
    ]:
        ours = [sampling.looped(length, start, steps, stride) for start in starts]
        np.testing.assert_array_equal(
            np.concatenate(ours), tables[f"index/{name}/{tag}"]
        )


@pytest.mark.parametrize(
    ("tag", "views"), [("validation_center", 1), ("test_4clips", 4)]
)
def test_published_sound_views(tables, tag, views):
    """Thirty rows of sound, spread over its own length."""
    for example in range(3):
        rows = tables[f"raw/example{example}/melspec"].reshape(-1, 16)
        ours = [
            rows[sampling.looped(len(rows), start, 30)]
            for start in sampling.even_starts(len(rows), views, 30)
        ]
        theirs = tables[f"{tag}/example{example}/spectrogram"][..., 0]
        np.testing.assert_allclose(np.stack(ours), theirs * 2.762 + 1.102, atol=1e-5)


def test_random_start_covers_exactly_the_starts_that_fit():
    rng = np.random.default_rng(0)
    starts = {sampling.random_start(rng, 70, 16, 4) for _ in range(500)}
    assert starts == set(range(10))  # 9 + 15 · 4 = 69, the last frame
    assert {sampling.random_start(rng, 20, 16, 4) for _ in range(50)} == {0}


def test_ten_seconds_of_ten_are_a_rotation():
    clip, rng = Length(250, 25.0, 160_000), np.random.default_rng(1)
    waveform = np.arange(160_000)
    for _ in range(5):
        start, sound = sampling.train_starts(WANT, clip, rng)
        window = sampling.cut(waveform, sound, WANT.num_samples)
        assert window[0] == start * 640  # 16,000 / 25 samples a frame
        assert (np.diff(window) % 160_000 == 1).all()


@pytest.mark.parametrize("start", [-3, 0, 4, 11])
@pytest.mark.parametrize("length", [4, 7, 30])
def test_cut_is_cyclic(start, length):
    np.testing.assert_array_equal(
        sampling.cut(np.arange(7), start, length),
        [(start + i) % 7 for i in range(length)],
    )


def test_window_sound_is_centred_on_the_frames():
    want = Want(16, 4, 32_000, 16_000, "window")  # 2 s of sound, 61 frames = 2.44 s
    clip = Length(250, 25.0, 160_000)
    assert sampling.aligned_sound_start(100, clip, want) == round(16_000 * (4.22))
    frames, sounds = sampling.view_starts(want, clip, 3)
    assert frames == [0, 93, 186]
    assert sounds == [3_520, 63_040, 122_560]  # (start / 25 + 1.22 - 1) · 16,000


def test_proportional_views_are_spread_over_the_sound_itself():
    want = WANT._replace(num_samples=32_000)
    clip = Length(250, 25.0, 80_000)  # sound ends halfway
    assert sampling.view_starts(want, clip, 3) == ([0, 93, 186], [0, 24_000, 48_000])


@pytest.mark.parametrize("align", ["proportional", "window"])
def test_a_missing_modality_starts_at_zero(align):
    want, rng = WANT._replace(align=align, num_samples=100), np.random.default_rng(0)
    picture, sound = Length(250, 25.0, 0), Length(0, 25.0, 1_000)
    assert sampling.train_starts(want, picture, rng)[1] == 0
    assert sampling.train_starts(want, sound, rng)[0] == 0
    assert sampling.view_starts(want, picture, 2) == ([0, 186], [0, 0])
    assert sampling.view_starts(want, sound, 2) == ([0, 0], [0, 900])
