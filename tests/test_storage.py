"""Buckets: the files of gs:// lie in a folder here, and are reached by epath alone."""

import logging
from pathlib import Path

import numpy as np
import pytest
import toy

from data import RecordError, inspect, prepare, records, storage


def files_of(folder: Path) -> dict:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "lock" not in path.name and path.name != "report.json"
    }


def test_a_local_place_is_a_path(tmp_path):
    assert storage.place(str(tmp_path)) == tmp_path
    assert storage.local_copy(tmp_path / "x", None) == tmp_path / "x"


@pytest.mark.parametrize("format", ["records", "dmvr"])
def test_a_bucket_gets_what_a_folder_gets(tmp_path, bucket, monkeypatch, format):
    monkeypatch.setattr(prepare, "CLIPS_PER_SHARD", 3)
    toy.write_folder(tmp_path / "clips", 6)
    common = dict(name="set", jobs=1, format=format)
    prepare.prepare(tmp_path / "clips", tmp_path / "local", **common)
    shares = [
        prepare.prepare(tmp_path / "clips", "gs://mine/local", share=(i, 2), **common)
        for i in (2, 1)
    ]
    assert shares[0]["shards_left"] and shares[1]["clips"] == 6
    assert files_of(bucket.folder / "mine/local") == files_of(tmp_path / "local")
    again = prepare.prepare(tmp_path / "clips", "gs://mine/local", **common)
    assert again["already_complete"]
    assert not list(tmp_path.glob("gs:*"))  # as a path without its backend would make


def test_shards_are_copied_once_and_checked(tmp_path, bucket, caplog, capsys):
    toy.write_folder(tmp_path / "clips", 4)
    report = prepare.prepare(
        tmp_path / "clips", "gs://mine/set", split={"train": 1.0}, jobs=1
    )
    assert report["folder"] == "gs://mine/set/set/1.0.0"
    caplog.set_level(logging.INFO, "data.storage")
    found = records.Records("gs://mine/set", "train")
    whole = [found.record(i).frames([0, 5]) for i in range(4)]
    assert caplog.text.count("copying gs://mine/set/set/1.0.0/set-train") == 1
    bucket.opened.clear()
    again = records.Records("gs://mine/set", "train")
    np.testing.assert_array_equal(again.record(3).frames([0, 5]), whole[3])
    assert not [path for path, _ in bucket.opened if "array_record" in path]
    assert inspect.main(["gs://mine/set", "--verify"]) == 0

    (shard,) = bucket.folder.glob("mine/set/set/1.0.0/*array_record*")
    damaged = bytearray(shard.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    shard.write_bytes(damaged)
    assert inspect.main(["gs://mine/set", "--verify"]) == 1
    assert "its SHA-256 is not that" in capsys.readouterr().out
    for kept in (tmp_path / "cache/av_mae/shards").iterdir():
        kept.unlink()
    with pytest.raises(RecordError, match="^gs://mine/set/.*array_record.*SHA-256"):
        records.Records("gs://mine/set", "train").record(0)
    assert not list((tmp_path / "cache/av_mae/shards").iterdir())


def test_nothing_half_written_gets_a_name(bucket):
    path = storage.place("gs://mine/file")
    path.parent.mkdir(parents=True)
    with pytest.raises(ZeroDivisionError):
        with storage.writing(path) as temporary:
            temporary.write_text("half")
            raise ZeroDivisionError
    assert not path.exists()
    with storage.writing(path) as temporary:
        temporary.write_bytes(b"whole")
    assert storage.size(path) == 5 and path.read_text() == "whole"
    assert [x.name for x in (bucket.folder / "mine").iterdir()] == ["file"]
