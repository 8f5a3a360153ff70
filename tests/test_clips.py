"""Clips as models see them: files, windows, and rows that equal the pipeline's."""

import dataclasses

import numpy as np
import pytest
import toy
import toy_models

import av_mae
from av_mae import ConfigError, clips
from data import ManifestError, MediaError, media, pipeline, prepare


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    toy.write_clip(folder / "tone.mp4", 1)
    toy.write_clip(folder / "silent.mp4", 0, sound=False)
    toy.write_clip(folder / "long.mp4", 2, seconds=4.0)
    (folder / "broken.mp4").write_text("no video at all")
    return folder


def test_a_file_has_frames_sound_and_times(folder):
    clip = av_mae.read_clip(folder / "tone.mp4")
    assert clip.frames.dtype == np.uint8 and clip.frames.shape[2:] == (64, 3)
    assert clip.has_rgb and clip.has_audio and clip.sound.dtype == np.int16
    assert clip.fps == 25.0 and abs(clip.seconds - 1.5) < 0.05
    np.testing.assert_allclose(clip.times, np.arange(len(clip.frames)) / 25)
    later = av_mae.read_clip(folder / "tone.mp4", 0.4, 1.0)
    np.testing.assert_array_equal(later.frames, clip.frames[10:25])
    np.testing.assert_allclose(later.times, 0.4 + np.arange(15) / 25)
    assert av_mae.read_clip(folder / "tone.mp4", fps=5.0).fps == 5.0
    silent = av_mae.read_clip(folder / "silent.mp4")
    assert silent.has_rgb and not silent.has_audio and silent.sound is None
    with pytest.raises(MediaError, match="broken"):
        av_mae.read_clip(folder / "broken.mp4")


def test_a_picture_that_fits_no_memory_is_refused(folder, monkeypatch):
    monkeypatch.setattr(clips, "MOST_BYTES", 100_000)
    with pytest.raises(MediaError, match="tone.mp4.* in windows"):
        av_mae.read_clip(folder / "tone.mp4")


@pytest.mark.parametrize("every", [0.5, 0.88, 3.0])
def test_windows_of_a_file_are_those_of_the_clip(folder, every):
    clip = av_mae.read_clip(folder / "long.mp4")
    streamed = list(clips.windows(folder / "long.mp4", 1.2, every))
    cut = list(clips.windows(clip, 1.2, every))
    assert len(streamed) == len(cut)
    for a, b in zip(streamed, cut, strict=True):
        assert a.start == b.start and len(a.frames) == 30
        np.testing.assert_array_equal(a.frames, b.frames)
        np.testing.assert_array_equal(a.sound, b.sound)
        first = round(a.start * 25)
        np.testing.assert_array_equal(a.frames, clip.frames[first : first + 30])
    starts = [window.start for window in cut]
    wanted = [i * every for i in range(10) if i * every + 1.2 <= clip.seconds]
    np.testing.assert_allclose(starts[: len(wanted)], wanted, atol=0.0201)
    # Nothing at the end is left out, and nothing comes twice.
    assert abs(starts[-1] + 1.2 - clip.seconds) < 1e-6
    assert len(set(starts)) == len(starts)


def test_windows_of_short_clips_and_of_sound_alone(folder):
    clip = av_mae.read_clip(folder / "tone.mp4")
    (whole,) = clips.windows(clip, 10.0, 1.0)
    np.testing.assert_array_equal(whole.frames, clip.frames)
    sound = dataclasses.replace(clip, frames=None)
    parts = list(clips.windows(sound, 0.5, 0.5))
    assert [part.start for part in parts[:2]] == [0.0, 0.5]
    assert all(len(part.sound) == 8000 and not part.has_rgb for part in parts)
    np.testing.assert_array_equal(parts[-1].sound, clip.sound[-8000:])
    with pytest.raises(ConfigError, match="every is 0.0"):
        list(clips.windows(clip, 1.0, 0.0))
    # A window has at least one frame; a part begins within the clip.
    assert [len(x.frames) for x in clips.windows(clip, 0.01, 0.7)] == [1, 1, 1, 1]
    for span in ((-1.0, 1.0), (1.0, 0.5)):
        with pytest.raises(ConfigError, match="give seconds with 0 <= start <= end"):
            clip.cut(*span)


# Rows: the pipeline's own evaluation.


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """(folder of files, folder of records made of them)."""
    folder = tmp_path_factory.mktemp("prepared")
    toy.write_folder(folder / "clips", 3, silent=[1])
    prepare.prepare(folder / "clips", folder / "out", split={"test": 1.0}, jobs=1)
    return folder / "clips", folder / "out"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"data__views": 3, "data__crops": 3},
        {"data__sampling": "segments", "data__audio_align": "proportional"},
        {"data__audio_align": "whole", "data__audio_seconds": 3.2},
    ],
    ids=["one", "views", "segments", "whole"],
)
def test_rows_are_those_of_the_evaluation(prepared, changes):
    files, records = prepared
    config = toy_models.config("finetune", **changes)
    config.data.dir, config.data.limit = str(records), 0
    config.data.missing_modalities = True
    dataset = pipeline.load(config.data, "test")
    batch = next(dataset.evaluate(3))
    rows = clips.Rows(config, 16000)
    opened = pipeline.open_records(str(records), "test")
    for i, number in enumerate(batch["index"]):
        record = opened.record(int(number))
        frames = record.frames(range(record.num_frames))
        sound = record.waveform() if record.has_audio else None
        row = rows.of(clips.Clip(frames, record.fps, sound))
        assert set(row) == set(batch) - {"index", "valid"}
        for key in row:  # the records' own pictures: no difference at all
            np.testing.assert_array_equal(row[key], batch[key][i])
        row = rows.of(clips.read_clip(files / dataset.ids[number]))
        np.testing.assert_array_equal(row["has_audio"], batch["has_audio"][i])
        np.testing.assert_array_equal(row["waveform"], batch["waveform"][i])
        off = row["rgb"].astype(float) - batch["rgb"][i]
        assert np.sqrt(np.mean(off**2)) < 8  # of 255: H.264 in between


def test_views_lie_where_their_frames_are(folder):
    config = toy_models.config("finetune", data__views=2)
    clip = clips.read_clip(folder / "long.mp4")
    rows = clips.Rows(config, 16000)
    views, row = rows.views(clip), rows.of(clip)
    frames = {view.frames[0]: x for view, x in zip(views, row["rgb"], strict=True)}
    assert len(frames) == 2
    data = config.data
    np.testing.assert_allclose(np.diff(views[0].frames), data.stride / data.fps)
    for view, wave in zip(views, row["waveform"], strict=True):
        first = round(view.sound * 16000)
        if first >= 0:
            np.testing.assert_array_equal(wave, clip.sound[first : first + len(wave)])
        middle = (view.frames[0] + view.frames[-1] + 1 / data.fps) / 2
        assert abs(view.sound + data.audio_seconds / 2 - middle) < 1e-3  # align: window


def test_only_what_is_wanted_known_and_there_is_used(folder):
    config = toy_models.config("finetune")
    rows = clips.Rows(config, 16000)
    tone = clips.read_clip(folder / "tone.mp4")
    silent = clips.read_clip(folder / "silent.mp4")
    assert rows.used(tone) == ("rgb", "spectrogram")
    assert rows.used(silent) == ("rgb",)
    row = rows.of(tone, ("spectrogram",))
    assert not row["has_rgb"] and row["has_audio"]
    with pytest.raises(ConfigError, match="silent.mp4 has no sound"):
        rows.of(silent, ("spectrogram",))
    config.modalities = ("rgb",)
    with pytest.raises(ConfigError, match="has spectrogram, but the model knows rgb"):
        clips.Rows(config, 16000).of(tone, ("rgb", "spectrogram"))
    with pytest.raises(ConfigError, match="44100 Hz, the model hears 16000"):
        rows.of(dataclasses.replace(tone, sample_rate=44100))


def test_a_clip_at_another_rate_is_seen_at_the_models(folder):
    """By the frames nearest in time; data at any rate are taken as they are."""
    config = toy_models.config("finetune")
    clip = clips.read_clip(folder / "long.mp4")
    rows, twice = clips.Rows(config, 16000), np.repeat(clip.frames, 2, axis=0)
    double = dataclasses.replace(clip, frames=twice, fps=50.0)
    for key, value in rows.of(clip).items():
        np.testing.assert_array_equal(rows.of(double)[key], value)
    for ours, theirs in zip(rows.views(double), rows.views(clip), strict=True):
        np.testing.assert_allclose(ours.frames, theirs.frames)
    numbers = np.arange(6, dtype=np.uint8)[:, None, None, None] * np.ones(3, np.uint8)
    six = clips.Clip(numbers, 6.0, None)
    assert six.at(4.0).frames[:, 0, 0, 0].tolist() == [0, 2, 3, 5]
    doubled = [0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 5]
    assert six.at(12.0).frames[:, 0, 0, 0].tolist() == doubled
    config.data.prepared.fps = "source"
    assert (clips.Rows(config, 16000).of(double)["rgb"] != rows.of(clip)["rgb"]).any()


def test_files_and_folders_are_listed_with_ids_and_labels(tmp_path):
    toy.write_folder(tmp_path / "set", 2)
    single = tmp_path / "set" / "bell" / "00.mp4"
    rows = clips.listed([tmp_path / "set", single])
    ids = ["bell/00.mp4", "drum/01.mp4", single.as_posix()]
    assert [row.id for row in rows] == ids
    assert [row.labels for row in rows] == [("bell",), ("drum",), ()]
    with pytest.raises(ManifestError, match="bell/00.mp4 comes twice"):
        clips.listed([tmp_path / "set", tmp_path / "set"])
    assert clips.listed([tmp_path / "not there.mp4"])[0].path.name == "not there.mp4"
    with pytest.raises(MediaError):
        media.read(tmp_path / "not there.mp4")
