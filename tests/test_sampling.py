"""Frames, starts and loops, against the tables of the published samplers."""

import re
from pathlib import Path

import numpy as np
import parity
import pytest

from data import sampling
from data.sampling import Length, Want

SHARED = Path(__file__).resolve().parents[2] / "shared"
SCENIC = SHARED / "fixtures/scenic/data/pipeline.npz"
VIDEOMAE = SHARED / "fixtures/videomae/mcg_recipe/recipe.npz"
WANT = Want(16, 4, 160_000, 16_000, "proportional")


def tables(path):
    if not path.exists():
        pytest.skip(f"{path} is not there (fixtures of the published system)")
    return np.load(path)


def numbers(name):
    """{'rate': 4, 'len': 300 …} of a table's name."""
    return {key: int(value) for key, value in re.findall(r"([a-z]+)(\d+)", name)}


class Legacy:
    """numpy's old generator, with which the published tables were drawn."""

    def __init__(self, seed):
        self.state = np.random.RandomState(seed)

    def integers(self, high, size=None):
        return self.state.randint(high, size=size)


def index_table(rule, length, num_frames, stride):
    """Ours of a table of DMVR's samplers, views one after the other."""
    if rule == "center":
        return sampling.dense_views(length, 1, num_frames, stride)
    if rule == "linspace4":
        return sampling.dense_views(length, 4, num_frames, stride)
    if rule == "random_given_proportion0.25":
        start = sampling.proportional_start(25, 100, length)
        return [sampling.looped(length, start, num_frames, stride)]
    if rule == "uniform_eval":
        return sampling.segments_views(length, 1, num_frames, stride)
    assert rule == "two_uniform"
    return sampling.segments_views(length, 2, num_frames, stride)[::-1]


def test_published_tables_of_scenic():
    stored = tables(SCENIC)
    names = [name for name in stored if name.startswith("index/")]
    assert len(names) >= 60
    for name in names:
        _, rule, tag = name.split("/")
        at = numbers(tag)
        ours = index_table(rule, at["len"], at["steps"], at.get("stride", 1))
        ours = np.concatenate(ours) % at["len"]
        np.testing.assert_array_equal(ours, stored[name], err_msg=name)
        error = np.abs(ours - stored[name]).max()
        parity.record("scenic data: frame tables", f"{rule}/{tag}", outputs=error)


def recipe_table(name):
    """Ours of a table of VideoMAE's data sets."""
    at = numbers(name)
    length, stride = at["len"], at.get("rate", 1)
    legacy = Legacy(at.get("seed", 0))
    if name.startswith("pretrain"):
        return sampling.held_train(legacy, length, 16, stride)
    if name.startswith("dense_train"):
        return sampling.stretched_train(legacy, length, 16, stride)
    if name.startswith("dense_testview"):
        return sampling.held_views(length, 5, 16, stride)[at["clip"]]
    if name.startswith("dense_test_"):  # all that the views are taken from
        frames = max(16, -(-length // stride))
        return sampling.held_views(length, 1, frames, stride)[0]
    if name.startswith("uniform_train"):
        return sampling.segments_train(legacy, length, 16, 1)
    views = sampling.segments_views(length, 2, 16, 1)
    if name.startswith("uniform_testview"):
        return views[at["clip"]]
    assert name.startswith("uniform_test_all")
    return np.sort(np.concatenate(views))


def test_published_tables_of_videomae():
    stored = tables(VIDEOMAE)
    names = [name for name in stored if re.match("(pretrain|dense|uniform)_", name)]
    assert len(names) >= 150
    for name in names:
        ours = recipe_table(name)
        np.testing.assert_array_equal(ours, stored[name], err_msg=name)
        error = np.abs(ours - stored[name]).max()
        parity.record("videomae recipe: frame tables", name, outputs=error)


@pytest.mark.parametrize(
    ("tag", "views"), [("validation_center", 1), ("test_4clips", 4)]
)
def test_published_sound_views(tag, views):
    """Thirty rows of sound, spread over its own length."""
    stored = tables(SCENIC)
    for example in range(3):
        rows = stored[f"raw/example{example}/melspec"].reshape(-1, 16)
        ours = [
            rows[sampling.looped(len(rows), start, 30)]
            for start in sampling.even_starts(len(rows), views, 30)
        ]
        theirs = stored[f"{tag}/example{example}/spectrogram"][..., 0]
        np.testing.assert_allclose(np.stack(ours), theirs * 2.762 + 1.102, atol=1e-5)


@pytest.mark.parametrize("sampled", sampling.SAMPLINGS)
@pytest.mark.parametrize("length", [1, 3, 15, 16, 17, 61, 64, 250])
def test_every_rule_stays_inside_every_clip(sampled, length):
    want, clip = WANT._replace(sampling=sampled), Length(length, 25.0, 160_000)
    rng = np.random.default_rng(0)
    windows = [sampling.train_window(want, clip, rng)[0] for _ in range(20)]
    for views in (1, 2, 3):
        windows += sampling.view_windows(want, clip, views)[0]
    for window in windows:
        assert window.shape == (16,) and window.dtype == np.int64
        assert 0 <= window.min() <= window.max() < length
        assert sampled == "dense" or (np.diff(window) >= 0).all()


def test_random_start_covers_exactly_the_starts_that_fit():
    rng = np.random.default_rng(0)
    starts = {sampling.random_start(rng, 70, 16, 4) for _ in range(500)}
    assert starts == set(range(10))  # 9 + 15 · 4 = 69, the last frame
    assert {sampling.random_start(rng, 20, 16, 4) for _ in range(50)} == {0}


@pytest.mark.parametrize(("sampled", "starts"), [("held", 7), ("stretched", 6)])
def test_windows_of_videomae_start_anywhere_alike(sampled, starts):
    """Of 70 frames, all 64 (held) or the 64 before another one."""
    rng, rule = np.random.default_rng(0), sampling.SAMPLINGS[sampled].train
    drawn = [rule(rng, 70, 16, 4)[0] for _ in range(700 * starts)]
    counts = np.bincount(drawn)
    assert len(counts) == starts and abs(counts - 700).max() < 150  # 5.7 deviations


def test_segments_draw_every_frame_of_each_part_alike():
    rng = np.random.default_rng(0)
    drawn = [sampling.segments_train(rng, 40, 8, 4) for _ in range(5000)]
    for part, places in enumerate(np.transpose(drawn)):
        counts = np.bincount(places - 5 * part)
        assert len(counts) == 5 and abs(counts - 1000).max() < 150
    assert abs(np.corrcoef(np.transpose(drawn))[0, 1]) < 0.1  # each by itself


def test_ten_seconds_of_ten_are_a_rotation():
    clip, rng = Length(250, 25.0, 160_000), np.random.default_rng(1)
    waveform = np.arange(160_000)
    for _ in range(5):
        frames, sound = sampling.train_window(WANT, clip, rng)
        window = sampling.cut(waveform, sound, WANT.num_samples)
        assert window[0] == frames[0] * 640  # 16,000 / 25 samples a frame
        assert (np.diff(window) % 160_000 == 1).all()


@pytest.mark.parametrize("start", [-3, 0, 4, 11])
@pytest.mark.parametrize("length", [4, 7, 30])
def test_cut_is_cyclic(start, length):
    expected = [(start + i) % 7 for i in range(length)]
    sound = np.arange(7)
    np.testing.assert_array_equal(sampling.cut(sound, start, length), expected)
    rows = sound[:, None] * [1, 10]  # a spectrogram
    cut = sampling.cut(rows, start, length)
    np.testing.assert_array_equal(cut, np.array(expected)[:, None] * [1, 10])


def test_window_sound_is_centred_on_the_frames():
    want = Want(16, 4, 32_000, 16_000, "window")  # 2 s of sound, 61 frames = 2.44 s
    clip = Length(250, 25.0, 160_000)
    frames = 100 + 4 * np.arange(16)
    assert sampling.aligned_sound_start(frames, clip, want) == round(16_000 * (4.22))
    frames, sounds = sampling.view_windows(want, clip, 3)
    assert [window[0] for window in frames] == [0, 93, 186]
    assert sounds == [3_520, 63_040, 122_560]  # (start / 25 + 1.22 - 1) · 16,000
    short = Length(30, 25.0, 19_200)  # looped frames: their sound does not jump
    frames, (sound,) = sampling.view_windows(want, short, 1)
    assert frames[0].max() < 30 and sound == 3_520


def test_segments_have_the_middle_of_the_sound():
    want = WANT._replace(align="window", sampling="segments", num_samples=32_000)
    clip = Length(160, 16.0, 160_000)
    frames, sounds = sampling.view_windows(want, clip, 2)
    assert frames[1].tolist() == [5 + 10 * i for i in range(16)]
    assert sounds == [59_500, 64_500]  # about (0 … 150), (5 … 155): 4.72 s, 5.03 s


def test_proportional_views_are_spread_over_the_sound_itself():
    want = WANT._replace(num_samples=32_000)
    clip = Length(250, 25.0, 80_000)  # sound ends halfway
    frames, sounds = sampling.view_windows(want, clip, 3)
    assert [window[0] for window in frames] == [0, 93, 186]
    assert sounds == [0, 24_000, 48_000]


def test_whole_sound_begins_with_the_clip_and_ends_in_zeros():
    want = WANT._replace(align="whole", num_samples=10)
    rng = np.random.default_rng(0)
    for clip in (Length(250, 25.0, 100), Length(250, 25.0, 5), Length(0, 25.0, 100)):
        assert sampling.train_window(want, clip, rng)[1] == 0
        assert sampling.view_windows(want, clip, 3)[1] == [0, 0, 0]
    sound = np.arange(1, 8, dtype=np.int16)
    assert sampling.beginning(sound, 4).tolist() == [1, 2, 3, 4]
    padded = sampling.beginning(sound, 9)
    assert padded.tolist() == [*range(1, 8), 0, 0] and padded.dtype == np.int16
    rows = sampling.beginning(sound[:, None] * [1, 10], 9)
    assert rows.shape == (9, 2) and not rows[7:].any()


@pytest.mark.parametrize("align", ["proportional", "window"])
@pytest.mark.parametrize("sampled", sampling.SAMPLINGS)
def test_a_missing_modality_starts_at_zero(align, sampled):
    want = WANT._replace(align=align, num_samples=100, sampling=sampled)
    rng = np.random.default_rng(0)
    picture, sound = Length(250, 25.0, 0), Length(0, 25.0, 1_000)
    assert sampling.train_window(want, picture, rng)[1] == 0
    assert not sampling.train_window(want, sound, rng)[0].any()
    assert sampling.view_windows(want, picture, 2)[1] == [0, 0]
    frames, sounds = sampling.view_windows(want, sound, 2)
    assert not np.any(frames) and sounds == [0, 900]
