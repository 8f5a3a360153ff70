"""Ranks by hand and by sorting, and the command on a run."""

import json

import numpy as np
import pytest

from av_mae import UserError, retrieve
from av_mae.featureset import FeatureSet


def clips(video, audio, has_video=None, has_audio=None) -> FeatureSet:
    n = len(video)
    all_ = np.ones(n, bool)
    has = {
        "rgb": all_ if has_video is None else has_video,
        "spectrogram": all_ if has_audio is None else has_audio,
    }
    features = {"rgb": video, "spectrogram": audio}
    return FeatureSet(features, has, None, [], list(map(str, range(n))))


def test_ranks_are_places_in_the_sorted_list():
    rng = np.random.default_rng(0)
    x, y = rng.normal(0, 1, (2, 1200, 6)).astype(np.float32)  # more than one chunk
    y += 0.5 * x
    cosine = retrieve.unit(x) @ retrieve.unit(y).T
    order = np.argsort(-cosine, axis=1)
    expected = (order == np.arange(1200)[:, None]).argmax(axis=1) + 1
    np.testing.assert_array_equal(retrieve.ranks(x, y), expected)


def test_features_that_say_nothing_find_nothing():
    """All alike: the clip's own stands behind all others."""
    same = np.ones((4, 3), np.float32)
    np.testing.assert_array_equal(retrieve.ranks(same, same), 4)


def test_both_directions_and_chance():
    video = np.eye(4, dtype=np.float32)
    audio = video[[0, 1, 3, 2]] + 0.1
    results = retrieve.evaluate(clips(video, audio))
    for direction in (retrieve.AUDIO_TO_VIDEO, retrieve.VIDEO_TO_AUDIO):
        assert results[direction]["R@1"] == 0.5
        assert results[direction]["R@5"] == 1.0
        assert results[direction]["clips"] == 4
    assert results["chance"]["R@1"] == 0.25 and results["chance"]["R@5"] == 1
    assert results["chance"]["median_rank"] == 2.5
    text = retrieve.table(results).splitlines()
    assert text[2].startswith("| audio → video | 50.0% | 100.0% | 100.0% | ")


def test_directions_differ_where_one_sound_is_near_all():
    video = np.array([[1, 0], [0, 1]], np.float32)
    audio = np.array([[1, 1], [0.1, 1]], np.float32)
    assert retrieve.ranks(audio, video).tolist() == [2, 1]
    assert retrieve.ranks(video, audio).tolist() == [1, 1]


def test_centring_takes_the_gap_between_modalities_away():
    rng = np.random.default_rng(1)
    shared = rng.normal(0, 1, (30, 8)).astype(np.float32)
    gap = 50 * rng.normal(0, 1, (2, 1, 8)).astype(np.float32)
    found = clips(shared + gap[0], shared + gap[1])
    assert retrieve.evaluate(found)["audio → video"]["R@1"] < 0.5
    assert retrieve.evaluate(found, centre=True)["audio → video"]["R@1"] == 1.0


def test_clips_with_one_modality_are_left_out():
    rng = np.random.default_rng(2)
    video, audio = rng.normal(0, 1, (2, 6, 3)).astype(np.float32)
    has = np.arange(6) > 1
    found = retrieve.evaluate(clips(video, audio, has, np.arange(6) < 5))
    part = retrieve.evaluate(clips(video[2:5], audio[2:5]))
    assert found == part
    with pytest.raises(UserError, match="no clip has both"):
        retrieve.evaluate(clips(video, audio, has, ~has))
    with pytest.raises(UserError, match="3 values, those of spectrogram 2"):
        retrieve.evaluate(clips(video, audio[:, :2]))
    alone = FeatureSet({"rgb": video}, {"rgb": has}, None, [], [])
    with pytest.raises(UserError, match="no features of spectrogram"):
        retrieve.evaluate(alone)


@pytest.mark.slow
def test_the_command_on_a_run(toy_run, capsys):
    words = ["--test", "validation", "--json", "--layer", "0"]
    retrieve.main([str(toy_run / "pretrain"), *words])
    results = json.loads(capsys.readouterr().out)
    assert list(results) == ["audio → video", "video → audio", "chance"]
    n = results["chance"]["clips"]
    assert 1 <= results["audio → video"]["median_rank"] <= n
