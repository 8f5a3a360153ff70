"""Summary, one clip in full, and what --verify finds: in every kind of file."""

import json
import os
import shutil

import numpy as np
import pytest
import soundfile
import toy
from PIL import Image
from test_pipeline import prepared

from data import Clip, dmvr, inspect, prepare, records

__all__ = ["prepared"]  # a fixture: 6 clips of 40 frames, 32 x 48, 1.6 s, 2 shards


def run(capsys, *arguments, code=0):
    assert inspect.main([str(x) for x in arguments]) == code
    shown = capsys.readouterr()
    return shown.out + shown.err


@pytest.fixture(autouse=True)
def wide(monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_summary(prepared, capsys):
    text = run(capsys, prepared)
    row = next(line for line in text.splitlines() if "train │" in line)
    cells = [cell.strip() for cell in row.split("│")]
    assert "train" in cells and "6" in cells and cells.count("100.0%") == 2
    assert [line.split()[1:3] for line in text.splitlines() if "▇" in line] == [
        ["a", "2"],
        ["b", "2"],
        ["c", "2"],
    ]
    assert "frames/s     25 (6)" in text and "size         48x32 (6)" in text
    assert "seconds      2 (6)" in text and "sound in Hz  1600 (6)" in text


def test_one_clip_in_full(prepared, capsys, tmp_path):
    text = run(capsys, prepared, "--clip", "clip4", "--out", tmp_path / "out")
    assert "labels               b" in text and "num_frames           40" in text
    assert "rms_dbfs" in text
    sound, rate = soundfile.read(tmp_path / "out/clip4.wav", dtype="int16")
    assert rate == 1600
    np.testing.assert_array_equal(sound, np.arange(2560, dtype=np.int16) * 5)
    sheet = np.asarray(Image.open(tmp_path / "out/clip4.png"))
    assert sheet.shape == (3 * 32, 4 * 48, 3)  # 12 pictures
    found = records.Records(prepared, "train").record(4)
    last = found.frames([39])[0]
    np.testing.assert_array_equal(sheet[64 + 16 :, 144:], last[16:])  # below the time
    text = run(capsys, prepared, "--clip", "clip9", code=2)
    assert "has no clip 'clip9'; ids there are such as clip0, clip1" in text


def test_all_is_well(prepared, capsys):
    assert run(capsys, prepared, "--verify") == "6 records: all is well.\n"


@pytest.mark.parametrize("place", ["file", "record", "index", "missing"])
def test_any_damage_is_listed(prepared, tmp_path, capsys, place):
    folder = shutil.copytree(prepared, tmp_path / "copy")
    first, second = sorted(folder.glob("toys/1.0.0/*.array_record*"))
    words = []
    if place == "file":  # behind the records: nobody else would notice
        with second.open("ab") as file:
            file.write(b"x")
        words = ["00001-of-00002: has "]
    if place == "record":
        content = bytearray(first.read_bytes())
        content[content.rfind(b"fLaC") + 200] ^= 16
        first.write_bytes(content)
        words = [
            "00000-of-00002: its SHA-256 is not",
            "00000-of-00002: record 3 (clip3",
        ]
    if place == "index":
        index = folder / "toys/1.0.0" / records.index_name("train")
        index.write_text(index.read_text().replace('"clip2"', '"clip7"'))
        words = ["record 2 of train: its id is clip2, in the index clip7"]
    if place == "missing":
        second.unlink()
        words = ["00001-of-00002: is missing", "record 0 (clip4)", "record 1 (clip5)"]
    text = run(capsys, folder, "--verify", code=1)
    for word in words:
        assert word in text
    faults = text.splitlines()[-1]
    assert faults.endswith(" faults in 6 records.") and int(faults.split()[0]) >= 1
    assert place == "file" or int(faults.split()[0]) == len(words)


def test_other_sources_are_inspected_too(tmp_path, capsys):
    frames = np.zeros((5, 16, 24, 3), np.uint8)
    payloads = [
        dmvr.encode(Clip(frames, 12.5, np.ones(80, np.int16), 1600), f"{i}", (i,), "ab")
        for i in range(2)
    ]
    path = tmp_path / "train-00000-of-00001.tfrecord"
    dmvr.write_shard(path, payloads)
    text = run(capsys, tmp_path, "--source", "dmvr")
    assert "frames/s     12.5 (2)" in text and "≈ 0.000" in text
    assert run(capsys, tmp_path, "--verify") == "2 records: all is well.\n"
    os.truncate(path, path.stat().st_size - 10)
    text = run(capsys, tmp_path, "--verify", "--source", "dmvr", code=1)
    assert "the file ends in it" in text and "1 faults in 1 records" in text
    toy.write_folder(tmp_path / "clips", 2)
    text = run(capsys, tmp_path / "clips", "--source", "folder", "--split", "all")
    assert "source size  64x48 (1), 48x64 (1)" in text and "h264 + aac (2)" in text
    text = run(capsys, tmp_path / "nowhere", code=2)
    assert "python -m data.prepare" in text


@pytest.mark.slow
def test_the_command(tmp_path):
    """As a user types it, on a data set made by `data.prepare`."""
    toy.write_folder(tmp_path / "clips", 6, silent=(1,))
    split = {"train": 0.5, "test": 0.5}
    prepare.prepare(tmp_path / "clips", tmp_path / "set", split=split, jobs=1)
    text = toy.run("-m", "data.inspect", tmp_path / "set")
    assert "train: bell" in text and "test: of " in text and "h264 + aac" in text
    clip = ("--clip", "bell/00.mp4", "--out", tmp_path)
    text = toy.run("-m", "data.inspect", tmp_path / "set", *clip)
    facts = dict(line.split(maxsplit=1) for line in text.splitlines())
    assert len(facts["sha256"]) == 64 and facts["video_codec"] == "h264"
    assert {"bell_00.mp4.png", "bell_00.mp4.wav"} < set(os.listdir(tmp_path))
    info = json.loads(next(tmp_path.glob("set/*/*/dataset.json")).read_text())
    total = sum(counts["clips"] for counts in info["splits"].values())
    text = toy.run("-m", "data.inspect", tmp_path / "set", "--verify")
    assert text == f"{total} records: all is well.\n"
