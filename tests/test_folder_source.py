"""A folder without preparation against the same folder prepared, and against itself."""

import json
import logging
import os
import pickle
import shutil
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import toy
from ml_collections import ConfigDict
from test_pipeline import CONFIG, equal, take

from data import RecordError, folder_source, media, pipeline, prepare, sources
from data import records as prepared_records

CLIPS = Path(__file__).resolve().parents[2] / "shared" / "clips"
needed = pytest.mark.skipif(not CLIPS.is_dir(), reason=f"{CLIPS} is not there")
# As the commands that prepare use it; small, so that a test is quick.
SETTINGS = dict(fps=25.0, size=32, short_side=32, num_frames=4, audio_seconds=0.5)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Lists of files are kept in a folder of the tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(home))
        yield home / "av_mae" / "folder"


def load(where, split="train", **fields):
    config = CONFIG | SETTINGS | dict(dir=str(where)) | fields
    return pipeline.load(ConfigDict(config), split, label="class")


def psnr(a, b):
    error = np.square(a.astype(np.float64) - b).mean(axis=(1, 2, 3))
    return float(np.mean(10 * np.log10(255**2 / np.maximum(error, 1e-6))))


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """(folder of 8 clips, one silent and one broken; the same prepared)."""
    home = tmp_path_factory.mktemp("both")
    toy.write_folder(home / "clips", 8, silent=(3,), broken=True)
    prepare.prepare(home / "clips", home / "set", jobs=1)
    return home / "clips", home / "set"


def test_same_clips_in_the_same_order_with_the_same_sound(both):
    ours = folder_source.Records(both[0], "train")
    theirs = prepared_records.Records(both[1], "train")
    told = [{**entry, "labels": tuple(entry["labels"])} for entry in theirs.index]
    assert ours.index == told and ours.info["labels"] == theirs.info["labels"]
    for i in range(len(ours)):
        one, other = ours.record(i), theirs.record(i)
        assert (one.height, one.width) == (other.height, other.width)
        assert (one.fps, one.num_samples) == (other.fps, other.num_samples)
        np.testing.assert_array_equal(one.waveform(), other.waveform())
        wanted = [1, 5, 5, one.num_frames - 1]
        assert psnr(one.frames(wanted), other.frames(wanted)) > 35


def test_same_training_batches(both):
    clips, prepared = both
    batches = take(load(clips, source="folder").train(4), 3)
    others = take(load(prepared).train(4), 3)
    for batch, other in zip(batches, others, strict=True):
        rgb, theirs = batch.pop("rgb"), other.pop("rgb")
        assert psnr(rgb.reshape(-1, 32, 32, 3), theirs.reshape(-1, 32, 32, 3)) > 35
    equal(batches, others)  # clips, sound, labels, what is missing


def write_click_and_flash(path, at=0.8, rate=44100):
    """White at one frame, and a click of 1 ms at its beginning; else dark and still."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=25, options={"crf": "10"})
        video.width, video.height, video.pix_fmt = 64, 64, "yuv420p"
        audio = container.add_stream("pcm_s16le", rate=rate, layout="mono")
        for i in range(40):
            value = 255 if i == round(at * 25) else 20
            frame = np.full((64, 64, 3), value, np.uint8)
            frame = av.VideoFrame.from_ndarray(frame, format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, 25)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        sound = np.zeros((1, round(1.6 * rate)), np.int16)
        sound[0, round(at * rate) :][: rate // 1000] = 20000
        frame = av.AudioFrame.from_ndarray(sound, format="s16", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
        container.mux([*audio.encode(frame), *audio.encode(None)])


def test_click_and_flash_stay_together(tmp_path):
    """In a file of their own, and in part of it: ours, and against the prepared."""
    write_click_and_flash(tmp_path / "a.mkv")
    (tmp_path / "clips.csv").write_text(
        "path,start,end,split\na.mkv,,,train\na.mkv,0.5,1.5,train\n"
    )
    ours = folder_source.Records(tmp_path / "clips.csv", "train")
    prepare.prepare(tmp_path / "clips.csv", tmp_path / "set", jobs=1)
    theirs = prepared_records.Records(tmp_path / "set", "train")
    for i, start in enumerate([0.0, 0.5] if "@" in ours.index[1]["id"] else [0.5, 0.0]):
        for record in (ours.record(i), theirs.record(i)):
            frames = record.frames(range(record.num_frames))
            flash = int(frames.mean(axis=(1, 2, 3)).argmax())
            loud = np.flatnonzero(np.abs(record.waveform()) > 8000)
            assert abs(flash / 25 - (0.8 - start)) < 0.04  # a cut begins between frames
            assert abs(loud[0] / 16000 - (0.8 - start)) <= 1e-3
        sounds = ours.record(i).waveform(), theirs.record(i).waveform()
        assert np.abs(sounds[0].astype(int) - sounds[1]).max() <= 1


def test_own_size_and_rate_where_the_config_was_prepared_so(tmp_path):
    """As `data.prepare --fps source --short-side 40`."""
    (tmp_path / "clips").mkdir()
    for i in range(2):
        toy.write_clip(tmp_path / f"clips/{i}.mp4", i, seconds=0.8)
    options = dict(split={"train": 1.0}, fps="source", short_side=40, jobs=1)
    prepare.prepare(tmp_path / "clips", tmp_path / "set", **options)
    wish = dict(fps=12.5, prepared=dict(fps="source", short_side="40"))
    ours = sources.open_records(tmp_path / "clips", "all", "folder", **wish)
    theirs = sources.open_records(tmp_path / "set", "train")
    for i in range(2):
        one, other = ours.record(i), theirs.record(i)
        assert (one.id, one.num_frames) == (other.id, other.num_frames)
        assert one.fps == pytest.approx(25.0) == other.fps
        assert {one.height, one.width} == {40, 54} or one.height == one.width
        assert (one.height, one.width) == (other.height, other.width)
        wanted = [0, 7, one.num_frames - 1]
        assert psnr(one.frames(wanted), other.frames(wanted)) > 35
    wish["prepared"] = dict(fps="", short_side="source")
    own = sources.open_records(tmp_path / "clips", "all", "folder", **wish)
    assert own.record(0).fps == 12.5 and min(own.record(0)._entry[3:5]) == 48


def test_random_frames_are_those_of_reading_through(both):
    records = folder_source.Records(both[0], "all")
    assert len(records) == 8
    for i in range(3):
        record = records.record(i)
        row = record._row
        whole = np.stack(list(media.read_frames(row.path, 25.0, 256)))
        wanted = np.random.default_rng(i).integers(0, len(whole), 5)
        np.testing.assert_array_equal(record.frames(wanted), whole[wanted])
    assert record.frames([]).shape == (0, record.height, record.width, 3)
    with pytest.raises(IndexError):
        record.frames([record.num_frames])


def test_lists_are_kept_and_hold_for_the_same_files(both, tmp_path, cache, caplog):
    clips = shutil.copytree(both[0], tmp_path / "clips")
    with caplog.at_level(logging.INFO):
        first = folder_source.Records(clips, "all")
    assert "left out" in caplog.text and "broken.mp4: cannot be opened" in caplog.text
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folder_source, "_measure", None)
        again = folder_source.Records(clips, "all")
    assert again.index == first.index and again.info == first.info
    other = pickle.loads(pickle.dumps(first))
    np.testing.assert_array_equal(
        other.record(1).waveform(), first.record(1).waveform()
    )
    toy.write_clip(clips / "bell/00.mp4", 0, seconds=0.8)
    changed = folder_source.Records(clips, "all")
    counts = {e["id"]: e["num_frames"] for e in changed.index}
    assert counts["bell/00.mp4"] == 20 and counts["bell/02.mp4"] == 38
    assert changed.info["checksums"] != first.info["checksums"]
    for path in cache.iterdir():
        path.write_text("damaged")
    assert folder_source.Records(clips, "all").index == changed.index


@pytest.mark.parametrize("error", [av.FFmpegError(1, "odd"), OSError("odd")])
def test_whatever_fails_leaves_the_clip_out(both, tmp_path, caplog, error):
    clips = shutil.copytree(both[0], tmp_path / "clips")
    read = media.read

    def failing(path, **how):
        if path.name == "00.mp4":
            raise error
        return read(path, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(media, "read", failing)
        records = folder_source.Records(clips, "all")
    ids = {entry["id"] for entry in records.index}
    assert records.info["splits"] == {"all": {"listed": 9, "clips": 7}}
    assert len(ids) == 7 and "bell/00.mp4" not in ids
    assert "bell/00.mp4: cannot be decoded" in caplog.text


def test_what_was_measured_is_kept_when_it_stops(tmp_path, monkeypatch, cache):
    rows = [SimpleNamespace(id=i, path=tmp_path / i) for i in "abc"]

    def stopping(row, rates):
        if row.id == "c":
            raise KeyboardInterrupt
        return folder_source.Entry("", 1)

    monkeypatch.setattr(folder_source, "_measure", stopping)
    with pytest.raises(KeyboardInterrupt):
        folder_source._entries(tmp_path, rows, "rates")
    monkeypatch.setattr(folder_source, "_measure", None)
    assert len(folder_source._entries(tmp_path, rows[:2], "rates")) == 2


def test_a_folder_that_is_copied_is_the_same_data(both, tmp_path):
    sums_of = lambda x: folder_source.Records(x, "all").info["checksums"]
    clips = shutil.copytree(both[0], tmp_path / "clips")
    sums = sums_of(clips)
    os.utime(clips / "bell/00.mp4", (1, 1))
    assert sums_of(clips) == sums == sums_of(both[0])
    data = bytearray((clips / "bell/00.mp4").read_bytes())
    data[-9] ^= 1  # as long, and as many frames
    (clips / "bell/00.mp4").write_bytes(data)
    differ = [x for x, digest in sums_of(clips).items() if digest != sums[x]]
    assert differ == ["bell/00.mp4"]


def test_a_file_that_goes_away_is_named(both, tmp_path):
    clips = shutil.copytree(both[0], tmp_path / "clips")
    records = folder_source.Records(clips, "all")
    places = {entry["id"]: i for i, entry in enumerate(records.index)}
    (clips / "bell/02.mp4").unlink()
    record = records.record(places["bell/02.mp4"])
    for read in (record.waveform, lambda: record.frames([3])):
        with pytest.raises(RecordError, match="bell/02.mp4: cannot be read as it was"):
            read()
    os.truncate(clips / "drum/01.mp4", 300)
    with pytest.raises(RecordError, match="drum/01.mp4"):
        records.record(places["drum/01.mp4"]).frames([20])


def test_splits_that_are_not_there_are_told(both, tmp_path):
    with pytest.raises(RecordError, match="no clip of the split 'test'.*\"all\""):
        folder_source.Records(both[0], "test")
    (tmp_path / "bad.mp4").write_text("nothing")
    with pytest.raises(RecordError, match="no clip of all can be decoded; .*bad.mp4"):
        folder_source.Records(tmp_path, "all")


@needed
@pytest.mark.slow
def test_the_development_clips(tmp_path):
    """Mean PSNR of the good clips, exact sound, the same clips in the same order."""
    report = prepare.prepare(CLIPS, tmp_path / "set", split={"train": 1.0}, jobs=2)
    theirs = prepared_records.Records(tmp_path / "set", "train")
    ours = folder_source.Records(CLIPS, "all")
    told = [{**entry, "labels": tuple(entry["labels"])} for entry in theirs.index]
    assert ours.index == told and len(ours) == report["clips"] == 24
    values = []
    for i in range(len(ours)):
        one, other = ours.record(i), theirs.record(i)
        np.testing.assert_array_equal(one.waveform(), other.waveform())
        if one.facts and not one._entry.problems:
            wanted = np.linspace(0, one.num_frames - 1, 16).astype(int)
            values.append(psnr(one.frames(wanted), other.frames(wanted)))
    print(json.dumps(dict(clips=len(values), mean=np.mean(values), least=min(values))))
    assert np.mean(values) >= 35
