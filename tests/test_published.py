"""Files are found under the names that people give them; what is missing is counted."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from data import ManifestError, prepare, published
from data.records import Record, Records
from tests import toy

ROOT = Path(__file__).resolve().parents[1]
ID = "--0PQM4-hqg"


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def vggsound(folder, *lines):
    folder.mkdir(exist_ok=True)
    (folder / "vggsound.csv").write_text("".join(f"{line}\n" for line in lines))
    return folder


@pytest.mark.parametrize(
    "name, cut",
    [
        (f"{ID}_000030.mp4", True),
        (f"{ID}_30.webm", True),
        (f"train/{ID}_000030_000040.mp4", True),
        (f"{ID}_30_40.mkv", True),
        (f"{ID}_30000_40000.mp4", True),
        (f"{ID}_30.000_40.000.wav", True),
        (f"hail/Y{ID}_30.0.mp4", True),
        (f"{ID}.mp4", False),
        (f"Y{ID}.flac", False),
        (f"A title [{ID}].webm", False),
    ],
)
def test_names_that_people_have(tmp_path, name, cut):
    lists = vggsound(tmp_path / "lists", f"{ID},30,hail,train")
    touch(tmp_path / "videos", name, f"{ID}_000031.mp4", "--0pqm4-hqg.mp4")
    (row,) = published.read("vggsound", tmp_path / "videos", lists).rows
    assert row.path == tmp_path / "videos" / name and row.id == f"{ID}_000030"
    assert row.perhaps_cut == (not cut)
    assert (row.start, row.end) == ((None, None) if cut else (30.0, 40.0))


def test_of_several_files_the_cut_one_with_a_picture_is_taken(tmp_path):
    lists = vggsound(tmp_path / "lists", f"{ID},30,hail,train")
    names = [f"{ID}.mp4", f"a/{ID}_30.wav", f"b/{ID}_30.mp4", f"c/{ID}_30.mp4"]
    touch(tmp_path / "videos", *names)
    (row,) = published.read("vggsound", tmp_path / "videos", lists).rows
    assert row.path == tmp_path / "videos" / names[2]


def test_what_is_listed_and_what_is_missing(tmp_path):
    lines = [f"{ID},{start},hail,train" for start in (1, 20, 30)]
    lists = vggsound(tmp_path / "lists", *lines, f"{ID},50,thunder,test")
    touch(tmp_path / "videos", f"{ID}_000001.mp4", f"{ID}_000050.mp4")
    found = published.read("vggsound", tmp_path / "videos", lists)
    assert found.listed == dict(train=3, test=1) and len(found.labels) == 309
    assert [clip.id for clip in found.missing] == [f"{ID}_000020", f"{ID}_000030"]
    assert {clip.split for clip in found.missing} == {"train"}


def test_the_case_of_ucf101(tmp_path):
    name = "HandstandPushups/v_HandStandPushups_g01_c01"
    (tmp_path / "trainlist01.txt").write_text(f"{name}.avi 37\n")
    (tmp_path / "testlist01.txt").write_text("")
    touch(tmp_path / "videos", f"{name.replace('Stand', 'stand')}.avi")
    (row,) = published.read("ucf101", tmp_path / "videos", tmp_path).rows
    assert row.id == name and row.labels == ("HandstandPushups",)


def test_nothing_there(tmp_path):
    lists = vggsound(tmp_path / "lists", f"{ID},30,hail,train")
    touch(tmp_path / "videos", "other.mp4")
    for videos, at, number, words in (
        (tmp_path / "videos", lists, 1, f"none of the 1 clips .* such as {ID}_000030"),
        (tmp_path / "nowhere", lists, 1, "nowhere is not there"),
        (tmp_path / "videos", tmp_path / "no", 1, "no is not there"),
        (tmp_path / "videos", lists, 2, "--split-number 2: vggsound has 1"),
    ):
        with pytest.raises(ManifestError, match=words):
            published.read("vggsound", videos, at, number)
    vggsound(lists, f"{ID},30,hail,train", f"{ID},30,hail,test")
    with pytest.raises(ManifestError, match="names the clip .* twice"):
        published.read("vggsound", tmp_path / "videos", lists)
    vggsound(lists)
    with pytest.raises(ManifestError, match="names no clip"):
        published.read("vggsound", tmp_path / "videos", lists)


# ------------------------------------------------------------------------- the command


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "data.prepare", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def test_from_lists_to_records(tmp_path):
    """A clip that was cut, a whole video, a broken and a missing file."""
    lines = ["a,30,hail,train", "b,1,thunder,test", "c,0,hail,train", "d,0,hail,train"]
    lists = vggsound(tmp_path / "lists", *lines)
    (tmp_path / "videos").mkdir()
    toy.write_clip(tmp_path / "videos" / "a.mp4", 0)  # 1.5 s: the clip itself
    toy.write_clip(tmp_path / "videos" / "b.mp4", 1, seconds=13)  # the whole video
    (tmp_path / "videos" / "c_000000.mp4").write_text("no video")
    public = (
        "--dataset",
        "vggsound",
        "--videos",
        tmp_path / "videos",
        "--lists",
        lists,
    )
    out = tmp_path / "out"
    done = run(*public, "--out", out, "--short-side", 48, "--jobs", 1)
    assert done.returncode == 0, done.stderr
    assert (
        "2 of 4 listed clips are present: train 1 of 3, test 1 of 1 (missing.csv names "
        "the others)." in done.stdout
    )
    info = Records(out, "train").info
    assert {s: c["listed"] for s, c in info["splits"].items()} == dict(train=3, test=1)
    assert info["settings"]["fps"] == 25.0 and len(info["labels"]) == 309
    a, b = (Record(Records(out, split)[0]) for split in ("train", "test"))
    assert (a.id, a.num_frames, a.facts["start"]) == ("a_000030", 38, None)
    assert (b.id, b.num_frames, b.facts["start"]) == ("b_000001", 250, 1.0)
    assert info["labels"][b.labels[0]] == "thunder"
    with (out / "missing.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["id"], row["split"]) for row in rows] == [
        ("c_000000", "train"),
        ("d_000000", "train"),
    ]
    assert rows[0]["reason"].startswith("cannot be opened as media")
    assert rows[1]["reason"] == "there is no such file"
    assert json.loads((out / "report.json").read_text())["listed"] == dict(
        train=3, test=1
    )


def test_two_heads(tmp_path):
    header = "narration_id,video_id,start_timestamp,stop_timestamp"
    header += ",verb_class,noun_class"
    for split, line in (("train", "P01_01_0"), ("validation", "P01_01_1")):
        text = f"{header}\n{line},P01_01,00:00:00.20,00:00:01.00,7,{len(split)}\n"
        (tmp_path / f"EPIC_100_{split}.csv").write_text(text)
    toy.write_clip(tmp_path / "P01_01.mp4", 0)
    found = published.read("epic-kitchens-100", tmp_path, tmp_path)
    report = prepare.prepare(found, tmp_path / "out", short_side=48, jobs=1)
    assert report["splits"]["train"]["per_class"]["verb: cut"] == 1
    data = Records(tmp_path / "out", "validation")
    assert {head: len(names) for head, names in data.info["labels"].items()} == dict(
        verb=97, noun=300
    )
    record = data.record(0)
    assert record.labels == (7, 10) and record.num_frames == 20


def test_options_of_a_public_data_set():
    public = "--dataset {} --videos v --lists l --out o"
    for dataset, fps, side in (
        ("audioset", 25.0, 256),
        ("kinetics400", "source", 320),
        ("ssv2", "source", "source"),
        ("ucf101", "source", "source"),
    ):
        options = prepare.parse(public.format(dataset).split())
        assert (options.fps, options.short_side) == (fps, side)
    options = prepare.parse((public + " --fps 10").format("ssv2").split())
    assert (options.fps, options.short_side) == (10.0, "source")


@pytest.mark.parametrize(
    "arguments", ["--out o", "in --dataset ssv2 --out o", "--dataset ssv2 --out o"]
)
def test_a_source_or_a_public_data_set(arguments, capsys):
    with pytest.raises(SystemExit):
        prepare.parse(arguments.split())
    assert "give either SOURCE or all of --dataset" in capsys.readouterr().err
