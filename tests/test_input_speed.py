"""The benchmark of input: all ways give batches of the same clips; its numbers."""

from types import SimpleNamespace

import numpy as np
import pytest
import rich.console
import toy
from test_pipeline import CONFIG, prepared

from data import RecordError, dmvr, input_speed, pipeline, records

__all__ = ["prepared"]  # a fixture: 6 clips of 40 frames, 32 x 48, 1.6 s of sound
FIELDS = dict(size=24, short_side=32, audio_seconds=0.5, threads=1)


def fields(where, **more):
    return CONFIG | FIELDS | dict(dir=str(where), **more)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_the_three_forms_hold_the_same_clips(prepared, tmp_path):
    found = records.Records(prepared, "train")
    folders = input_speed.write_sets(found, tmp_path, 4)
    assert list(folders) == [*input_speed.OURS, input_speed.BASELINE]
    h264, jpeg = (records.Records(folders[name], "train") for name in input_speed.OURS)
    other = dmvr.Records(folders[input_speed.BASELINE], "train")
    for one in (h264, jpeg, other):
        assert [entry["id"] for entry in one.index] == [
            "clip0",
            "clip2",
            "clip3",
            "clip5",
        ]
        for i, place in enumerate((0, 2, 3, 5)):
            sound = found.record(place).waveform()
            np.testing.assert_array_equal(one.record(i).waveform(), sound)
            assert one.record(i).num_frames == 40
    assert jpeg.record(1).encoded_frames() == other.record(1).encoded_frames()


def test_stages_are_all_of_a_row(prepared):
    config = SimpleNamespace(**fields(prepared))
    dataset = pipeline.load(config, "train", sample_rate=1600)
    stages = input_speed.measure_stages(dataset, 3, batches=2)
    assert list(stages) == list(input_speed.STAGES)
    assert all(value > 0 for value in stages.values())
    next(dataset.train(2))  # it reads as before


def test_our_own_way(prepared):
    task = dict(name="records, h264", data=fields(prepared), count=6, seconds=0.1)
    task |= dict(batch_size=2, sample_rate=1600, modalities=["rgb", "spectrogram"])
    speed = input_speed.measure(task)
    assert speed.clips_per_second > 0 and speed.first_batch > 0
    assert speed.host_bytes == 4 * 24 * 24 * 3 + 800 * 2 + 8 + 3  # uint8, int16, flags
    size = sum(x.stat().st_size for x in prepared.rglob("*") if x.is_file())
    assert speed.disk_bytes == size / 6 and speed.memory > 50
    assert speed.stages["decode"] > 0 and speed.processor > 0


def test_the_table_and_its_ratios():
    names = (*input_speed.OURS, input_speed.BASELINE, input_speed.ON_THE_FLY)
    numbers = dict(zip(names, (90.0, 130.0, 100.0, 20.0), strict=True))
    speeds = [
        input_speed.Speed(
            name, rate, 1000 / rate, 0.5, 1.0, {}, 100.0 * i + 100, 9.0, 300.0
        )
        for i, (name, rate) in enumerate(numbers.items())
    ]
    lines = list(input_speed.ratios(speeds))
    assert lines[0].startswith("records, jpeg / tf.data, dmvr: 1.30 x its clips a sec")
    assert "0.90 x its clips by processor time (aim: 0.9)" in lines[1]
    assert "records, h264 / files, PyAV: 4.50 x" in lines[2]
    assert "records, h264 / tf.data, dmvr: 1/3.0 of its bytes" in lines[3]
    console = rich.console.Console(width=200, record=True, quiet=True)
    input_speed.show(speeds, console)
    assert len(list(input_speed.ratios(speeds[:1]))) == 0


def test_a_way_that_fails_is_named(prepared):
    task = dict(name="records, jpeg", data=fields("nowhere"), count=1, seconds=0.1)
    task |= dict(batch_size=2, sample_rate=1600, modalities=["rgb"])
    with pytest.raises(
        RecordError, match="records, jpeg: could not be measured .*is not"
    ):
        input_speed._measure_apart(task)


@pytest.mark.slow
def test_all_ways_side_by_side(tmp_path):
    toy.write_folder(tmp_path / "clips", 4)
    toy.run(
        *("-m", "data.prepare", tmp_path / "clips", "--out", tmp_path / "set"),
        *("--jobs", 1, "--split", "train=1"),
    )
    config = SimpleNamespace(**fields(tmp_path / "set"))
    speeds = input_speed.compare(
        config, batch_size=2, files=str(tmp_path / "clips"), seconds=0.5
    )
    names = (*input_speed.OURS, input_speed.BASELINE, input_speed.ON_THE_FLY)
    assert tuple(speed.name for speed in speeds) == names
    assert all(speed.clips_per_second > 0 for speed in speeds)
    ours, theirs = speeds[1], speeds[2]
    # Theirs ships float sound, and has none of our flags.
    frames, sound = 4 * 24 * 24 * 3, 8000
    assert theirs.host_bytes == frames + 4 * sound
    assert ours.host_bytes == frames + 2 * sound + 8 + 3
