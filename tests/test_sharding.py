"""Shards: whole or not there, and the same whoever makes them."""

import json
import sys
from pathlib import Path

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


def test_beam_is_asked_for_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(DataError, match="pip install apache-beam"):
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
