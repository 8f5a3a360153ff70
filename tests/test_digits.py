"""The demo data set: what its files hold, what decides them, what the splits share."""

import csv
import importlib.util
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from data import DataError, digits

needs_espeak = pytest.mark.skipif(
    importlib.util.find_spec("espeakng_loader") is None,
    reason='espeak-ng is not installed: pip install -e ".[demo]"',
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A small set made by two processes at a time, in chunks of 4 clips."""
    folder = tmp_path_factory.mktemp("digits")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "_CHUNK", 4)
        manifest = digits.make(folder, train=10, test=6, seed=3, jobs=2)
    return manifest


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.mp4")}


@needs_espeak
def test_manifest_names_every_file_with_its_label(made):
    rows = list(csv.DictReader(open(made)))
    assert [row["label"] for row in rows] == digits.WORDS + digits.WORDS[:6]
    assert [row["split"] for row in rows] == ["train"] * 10 + ["test"] * 6
    assert {row["path"] for row in rows} == set(contents(made.parent))
    assert list(rows[0]) == ["path", "start", "end", "label", "split"]


@needs_espeak
def test_files_are_h264_and_aac_of_two_seconds(made):
    with av.open(str(made.parent / "test" / "00005.mp4")) as file:
        video, audio = file.streams.video[0], file.streams.audio[0]
        assert (video.codec_context.name, audio.codec_context.name) == ("h264", "aac")
        assert (video.width, video.height) == (64, 64)
        assert video.average_rate == Fraction(25)
        assert (audio.rate, audio.layout.name) == (22050, "mono")
        frames = [frame.pts * frame.time_base for frame in file.decode(video)]
        assert frames == [Fraction(i, 25) for i in range(50)]
    with av.open(str(made.parent / "test" / "00005.mp4")) as file:
        sound = np.concatenate([f.to_ndarray()[0] for f in file.decode(audio=0)])
        assert 44100 <= len(sound) < 44100 + 2048
        level = 20 * np.log10(np.sqrt(np.mean(sound[:44100] ** 2)))
        assert digits.LOUDNESS[0] - 1 < level < digits.LOUDNESS[1] + 1


@needs_espeak
def test_one_job_or_two_a_longer_set_or_a_shorter_one(made, tmp_path, monkeypatch):
    monkeypatch.setattr(digits, "_CHUNK", 4)
    digits.make(tmp_path, train=5, test=0, seed=3, jobs=1)
    first, again = contents(made.parent), contents(tmp_path)
    assert len(again) == 5
    assert again == {name: first[name] for name in again}


@needs_espeak
def test_another_seed_makes_other_clips(made, tmp_path):
    digits.make(tmp_path, train=1, test=1, seed=4, jobs=1)
    first, other = contents(made.parent), contents(tmp_path)
    assert all(first[name] != other[name] for name in other)
    assert other["train/00000.mp4"] != other["test/00000.mp4"]


@needs_espeak
def test_splits_share_no_voice():
    train, test = digits.voices("train"), digits.voices("test")
    assert len(train) + len(test) > 95 and abs(len(train) - len(test)) < 10
    families = [
        {name.rstrip("0123456789").lower() for name in v} for v in (train, test)
    ]
    assert not families[0] & families[1]


def test_splits_share_no_scan():
    from sklearn.datasets import load_digits

    (train, _), (test, labels) = digits.scans("train"), digits.scans("test")
    assert len(train) + len(test) == len(load_digits().images) == 1797
    assert not {s.tobytes() for s in train} & {s.tobytes() for s in test}
    assert np.bincount(labels).min() > 80


def test_a_frame_shows_only_part_and_all_frames_together_the_digit(monkeypatch):
    """Against the same clip without bars: what the brightest of frames can show."""
    monkeypatch.setattr(digits, "SWING", (0.0, 0.0))
    monkeypatch.setattr(digits, "NOISE", (0.0, 0.0))
    scan = digits.scans("train")[0][0]
    clip = digits.picture(scan, np.random.default_rng(0)).astype(float)
    monkeypatch.setattr(digits, "BAR_SHARE", (-1.0, -1.0))
    whole = digits.picture(scan, np.random.default_rng(0)).astype(float)[0]
    ink = whole > whole.min() + 50
    shown = lambda frames: np.mean(np.abs(frames - whole)[ink] < 10)
    assert max(shown(frame) for frame in clip) < 0.7
    assert shown(clip.max(0)) > 0.97


def test_the_word_is_as_loud_over_the_noise_as_drawn(monkeypatch):
    monkeypatch.setattr(digits, "SNR", (60.0, 60.0))
    monkeypatch.setattr(digits, "LOUDNESS", (-20.0, -20.0))
    word = (10000 * np.sin(np.arange(11025) / 5)).astype(np.int16)
    sound = digits.sound(word, np.random.default_rng(0)).astype(float)
    assert 20 * np.log10(sound.std() / 32768) == pytest.approx(-20, abs=0.1)
    loud = np.flatnonzero(np.abs(sound) > 0.1 * sound.max())
    assert loud[-1] - loud[0] == pytest.approx(11025, abs=10)
    found = sound[loud[0] : loud[0] + 11000]
    quiet = np.delete(sound, np.s_[loud[0] - 10 : loud[-1] + 10])
    assert 20 * np.log10(found.std() / quiet.std()) == pytest.approx(60, abs=2)


def test_pink_noise_loses_three_decibels_an_octave():
    rng = np.random.default_rng(0)
    power = np.abs(np.fft.rfft(digits._pink_noise(rng))) ** 2
    octave = lambda hertz: power[2 * hertz : 4 * hertz].mean()  # bins of half a hertz
    fall = 10 * np.log10(octave(200) / octave(3200)) / 4
    assert fall == pytest.approx(3.01, abs=0.2)


@needs_espeak
def test_espeak_starts_from_a_very_long_path(tmp_path, monkeypatch):
    """espeak-ng itself cannot: its buffer for the path has about 160 characters."""
    library, data = digits._load_espeak()
    link = tmp_path / ("x" * 120) / ("y" * 120)
    link.parent.mkdir()
    link.symlink_to(data)
    monkeypatch.setattr(digits, "_load_espeak", lambda: (library, str(link)))
    word = digits.Speaker(0).say("seven", "en-us", "f3", 50, 175)
    assert word.dtype == np.int16 and 0.2 < len(word) / digits.RATE < 0.8


def test_without_espeak_the_command_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    assert digits.main(["--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert 'pip install -e ".[demo]"' in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@needs_espeak
def test_a_process_that_fails_is_reported_with_its_clips(tmp_path, monkeypatch):
    (tmp_path / "train" / "00001.mp4").mkdir(parents=True)  # cannot be written
    with pytest.raises(DataError, match="train clips 0 to 2 failed"):
        digits.make(tmp_path, train=3, test=0, jobs=1)


@needs_espeak
def test_negative_counts_are_refused(tmp_path):
    with pytest.raises(DataError, match="negative"):
        digits.make(tmp_path, train=-1)
