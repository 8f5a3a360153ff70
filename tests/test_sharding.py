"""Shards: whole or not there, and the same whoever makes them."""

import json
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from data import DataError, manifest, sharding
from data.records import Record, Records
from tests import toy

SETTINGS = dict(fps=10.0, short_side=32, sample_rate=8000, frames="h264", version=1)


def job(path, **facts):
    row = manifest.Row(path, path.name, **facts)
    return sharding.Job(row, (1,), SETTINGS)


def shard(folder, *jobs):
    folder.mkdir(exist_ok=True)
    return sharding.Shard("train", 0, folder / "shard", folder / "known.json", jobs)


def made(job):
    return Record(b"".join(sharding.make_record(job)))


def test_a_shard_is_made_once(tmp_path):
    toy.write_clip(tmp_path / "a.mp4", 0)
    (tmp_path / "b.mp4").write_text("no video")
    whole = shard(tmp_path / "x", job(tmp_path / "a.mp4"), job(tmp_path / "b.mp4"))
    assert sharding.known(whole) is None
    sharding.make(whole)
    facts = sharding.known(whole)
    assert [clip["index"]["id"] for clip in facts["clips"]] == ["a.mp4"]
    assert [clip["id"] for clip in facts["failed"]] == ["b.mp4"]
    assert facts["failed"][0]["reason"].startswith("cannot be opened as media")
    before = whole.path.stat().st_mtime_ns
    sharding.make(whole)
    assert whole.path.stat().st_mtime_ns == before
    assert [path.name for path in sorted(whole.path.parent.iterdir())] == [
        "known.json",
        "shard",
    ]
    whole.path.write_bytes(whole.path.read_bytes()[:-1])  # as a full disk leaves it
    assert sharding.known(whole) is None


def test_a_record_knows_where_it_comes_from(tmp_path):
    path = tmp_path / "a.mp4"
    toy.write_clip(path, 0)
    facts = made(job(path, start=0.2, end=1.0)).facts
    wanted = dict(file="a.mp4", start=0.2, end=1.0, bytes=path.stat().st_size)
    wanted |= dict(width=48, height=64, fps=25.0, video_codec="h264")
    wanted |= dict(audio_codec="aac", sample_rate=44100, channels=1)
    wanted |= dict(silent=False, short_sound=False, problems=[], settings_version=1)
    assert {key: facts[key] for key in wanted} == wanted
    assert len(facts["sha256"]) == 64 and -20 < facts["rms_dbfs"] < -10


@pytest.mark.parametrize(
    "seconds, start, end, cut",
    [(1.5, 30.0, 31.0, False), (3.0, 0.5, 1.0, True), (1.5, 0.5, None, True)],
)
def test_a_file_that_may_have_been_cut_already(tmp_path, seconds, start, end, cut):
    path = tmp_path / "a.mp4"
    toy.write_clip(path, 0, seconds=seconds)
    record = made(job(path, start=start, end=end, perhaps_cut=True))
    assert record.facts["start"] == (start if cut else None)
    length = (end or seconds) - start if cut else seconds
    assert abs(record.num_frames / record.fps - length) <= 0.11


# ----------------------------------------------------------------- long and large files

PEAK = r"""
import re, sys, time
from pathlib import Path
from data import manifest, sharding
path, start, end, fps = Path(sys.argv[1]), *map(eval, sys.argv[2:])
settings = dict(fps=fps, short_side=256, sample_rate=16000, frames="h264", version=1)
row = manifest.Row(path, path.name, start, end)
began = time.process_time()
size = sum(map(len, sharding.make_record(sharding.Job(row, (), settings))))
seconds = time.process_time() - began
peak = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
print(size, int(peak[1]) // 1024, seconds)
"""


def measured(path, start=None, end=None, fps=25.0) -> tuple[float, float, float]:
    """Bytes of the record, MiB at the peak and seconds of a worker's processor."""
    line = [sys.executable, "-c", PEAK, *map(str, (path, start, end, fps))]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    return tuple(map(float, done.stdout.split()))


def write_noise(path, seconds, fps, size, sound=True):
    """Noise in picture and sound: nothing takes more bytes."""
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (5, *size[::-1], 3), np.uint8)
    options = {"preset": "ultrafast", "crf": "28", "threads": "1"}
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=fps, options=options)
        video.width, video.height, video.pix_fmt = *size, "yuv420p"
        audio = container.add_stream("pcm_s16le", rate=16000, layout="mono")
        for i in range(seconds * fps):
            frame = av.VideoFrame.from_ndarray(pictures[i % 5], format="rgb24")
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        for second in range(seconds if sound else 0):
            samples = rng.integers(-9000, 9000, (1, 16000), np.int16)
            frame = av.AudioFrame.from_ndarray(samples, "s16", "mono")
            frame.sample_rate, frame.pts = 16000, second * 16000
            frame.time_base = Fraction(1, 16000)
            container.mux(audio.encode(frame))
        container.mux(audio.encode(None))


linux = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="Linux tells peaks of memory"
)


@linux
@pytest.mark.slow
def test_an_hour_takes_little_memory_and_its_end_is_sought(tmp_path):
    write_noise(tmp_path / "hour.mkv", 3600, 1, (160, 128))
    size, peak, _ = measured(tmp_path / "hour.mkv", fps=1.0)
    # The limit is 600; in memory the picture alone would take more than is left here.
    assert size > 60e6 and peak <= 420
    *_, first = measured(tmp_path / "hour.mkv", 10, 20, 1.0)
    *_, last = measured(tmp_path / "hour.mkv", 3580, 3590, 1.0)
    print(f"hour: {size / 1e6:.0f} MB, {peak:.0f} MiB; cut {first:.2f} s, {last:.2f} s")
    assert last < 2 * first + 1


@linux
@pytest.mark.slow
def test_4k_takes_little_memory(tmp_path):
    write_noise(tmp_path / "4k.mkv", 1, 10, (3840, 2160))
    size, peak, seconds = measured(tmp_path / "4k.mkv", fps=10.0)
    print(f"4K: {peak:.0f} MiB, {seconds:.1f} s")
    assert size > 1e5 and peak <= 600


# --------------------------------------------------------------------------------- Beam


def test_beam_is_asked_for_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(DataError, match="pip install -e"):
        sharding.make_with_beam([])


def test_beam_makes_the_same_files(tmp_path):
    pytest.importorskip("apache_beam", reason="Apache Beam (extra `beam`) is not there")
    from data import prepare

    for number in range(3):
        toy.write_clip(tmp_path / f"{number}.mp4", number)
    options = dict(name="set", split=dict(train=1.0), short_side=32, jobs=1)
    for runner in ("beam", "processes"):
        prepare.prepare(tmp_path, tmp_path / runner, runner=runner, **options)
    one, other = (
        tmp_path / runner / "set" / "1.0.0" for runner in ("beam", "processes")
    )
    names = {path.name for path in one.iterdir() if path.is_file()}
    assert names == {path.name for path in other.iterdir() if path.is_file()}
    for name in names:
        assert Path(one / name).read_bytes() == Path(other / name).read_bytes()
    assert json.loads((one / "dataset.json").read_text())["settings"]["clips"] == 3
    assert len(Records(tmp_path / "beam", "train")) == 3
