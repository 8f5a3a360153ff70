"""Folders and CSVs become rows; each mistake in a CSV is named by line and field."""

from pathlib import Path

import pytest

from data import ManifestError, manifest

CLIPS = Path(__file__).resolve().parents[2] / "shared" / "clips"


def touch(folder, *names) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def told(rows) -> list[tuple]:
    return [(row.id, row.labels, row.split) for row in rows]


def write_csv(folder, text) -> Path:
    (folder / "clips.csv").write_text(text, encoding="utf-8")
    return folder / "clips.csv"


def test_class_folders(tmp_path):
    touch(tmp_path, "dog/b.mp4", "dog/deep/a.MKV", "cat/c.wav", "cat/notes.txt")
    rows, passed_over, *_ = manifest.read(tmp_path)
    assert told(rows) == [
        ("cat/c.wav", ("cat",), None),
        ("dog/b.mp4", ("dog",), None),
        ("dog/deep/a.MKV", ("dog",), None),
    ]
    assert rows[1].path == tmp_path / "dog/b.mp4" and rows[1].start is None
    assert passed_over == ["cat/notes.txt"]


def test_flat_and_mixed_folder(tmp_path):
    touch(tmp_path, "-a.mp4", "README.md", "._b.mp4", ".cache/c.mp4", "mp4")
    assert told(manifest.rows(tmp_path)) == [("-a.mp4", (), None)]
    assert manifest.read(tmp_path).passed_over == ["._b.mp4", "README.md", "mp4"]
    touch(tmp_path, "dog/d.mp4")
    assert told(manifest.rows(tmp_path)) == [
        ("-a.mp4", (), None),
        ("dog/d.mp4", ("dog",), None),
    ]


def test_split_folders(tmp_path):
    touch(tmp_path, "train/dog/a.mp4", "val/cat/b.mp4", "val/c.mp4")
    assert told(manifest.rows(tmp_path)) == [
        ("train/dog/a.mp4", ("dog",), "train"),
        ("val/c.mp4", (), "validation"),
        ("val/cat/b.mp4", ("cat",), "validation"),
    ]
    touch(tmp_path, "car/d.mp4")  # now `train` is a vehicle
    assert told(manifest.rows(tmp_path))[1] == ("train/dog/a.mp4", ("train",), None)


def test_links(tmp_path):
    touch(tmp_path, "elsewhere/a.mp4", "clips/dog/b.mp4")
    (tmp_path / "clips/cat").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "clips/dog/loop").symlink_to(tmp_path / "clips")
    ids = [row.id for row in manifest.rows(tmp_path / "clips")]
    assert ids == ["cat/a.mp4", "dog/b.mp4"]


def test_bytes_in_a_name(tmp_path):
    (tmp_path / b"\xff.mp4".decode("utf-8", "surrogateescape")).touch()
    (row,) = manifest.rows(tmp_path)
    assert row.id == "\\xff.mp4" and row.path.is_file()


def test_csv(tmp_path):
    path = write_csv(
        tmp_path,
        "\ufeffpath,start,end,label,split\r\n"
        'a.mp4,1.50,3,dog|cat,train\r\n\r\n"b, c.mp4",,,,\r\n'
        f"sub/../a.mp4,4,,dog,test\r\n{tmp_path}/d.mp4,,2.25,,validation\r\n",
    )
    rows = manifest.rows(path)
    assert told(rows) == [
        ("a.mp4@1.5-3", ("dog", "cat"), "train"),
        ("b, c.mp4", (), None),
        ("a.mp4@4-", ("dog",), "test"),
        ("d.mp4@0-2.25", (), "validation"),
    ]
    assert (rows[0].start, rows[0].end, rows[2].end) == (1.5, 3.0, None)
    assert rows[0].path == tmp_path / "a.mp4"


def test_csv_with_paths_only(tmp_path):
    assert told(manifest.rows(write_csv(tmp_path, "path\na.mp4\n"))) == [
        ("a.mp4", (), None)
    ]


@pytest.mark.parametrize(
    "text, message",
    [
        ("path,label\na.mp4\n", r"line 2: there are 1 fields where the header names 2"),
        ("file,label\na.mp4,x\n", r"line 1: the header is 'file,label'; it must name"),
        ("path,labels\na.mp4,x\n", r"line 1: the header is 'path,labels'"),
        ("path,path\na.mp4,x\n", r"line 1: .*each once"),
        ("", r"line 1: the header is ''"),
        ("path\n", r"lists no clip"),
        (
            "path\n../a.mp4\n",
            r"line 2, field path: '../a.mp4' does not lie in the fold",
        ),
        ("path\n/etc/a.mp4\n", r"line 2, field path: '/etc/a.mp4' does not lie in"),
        ("path\n.\n", r"line 2, field path: '.' does not lie in"),
        ("path,start\n,1\n", r"line 2, field path: '' is no path"),
        ("path,start\na.mp4,x\n", r"line 2, field start: 'x' is no time"),
        ("path,start\na.mp4,-1\n", r"line 2, field start: '-1' is no time"),
        ("path,end\na.mp4,inf\n", r"line 2, field end: 'inf' is no time"),
        (
            "path,start,end\na.mp4,3,2\n",
            r"line 2, field end: 2 is not after the start, 3",
        ),
        ("path,end\na.mp4,0\n", r"line 2, field end: 0 is not after the start, 0"),
        ("path,label\na.mp4,x||y\n", r"line 2, field label: 'x\|\|y' holds an empty"),
        ("path,label\na.mp4,x|x\n", r"line 2, field label: 'x\|x' holds an empty"),
        (
            "path,split\na.mp4,val\n",
            r"line 2, field split: 'val' is unknown; use one of",
        ),
        ("path\na.mp4\nb.mp4\nc/../a.mp4\n", r"line 4, field path: .*'a.mp4'.* line 2"),
        ("path,start\na.mp4,1\na.mp4,1.0\n", r"line 3, .*'a.mp4@1-' is on line 2"),
        ('path\n"a.mp4\n', r"after line 2: is not CSV in UTF-8"),
    ],
)
def test_mistakes_in_a_csv(tmp_path, text, message):
    with pytest.raises(ManifestError, match=message) as error:
        manifest.rows(write_csv(tmp_path, text))
    assert str(tmp_path / "clips.csv") in str(error.value)


def test_not_utf_8(tmp_path):
    (tmp_path / "clips.csv").write_bytes(b"path\n\xff.mp4\n")
    with pytest.raises(ManifestError, match="is not CSV in UTF-8"):
        manifest.rows(tmp_path / "clips.csv")


def test_no_source(tmp_path):
    touch(tmp_path, "notes.txt", "clip.mp4x")
    with pytest.raises(ManifestError, match=r"holds no media file \(2 others"):
        manifest.rows(tmp_path)
    with pytest.raises(ManifestError, match="absent is not there; give a folder"):
        manifest.rows(tmp_path / "absent")
    with pytest.raises(ManifestError, match="is neither a folder nor a .csv file"):
        manifest.rows(tmp_path / "notes.txt")


@pytest.mark.skipif(not CLIPS.is_dir(), reason=f"the clips are not at {CLIPS}")
def test_the_development_clips():
    """27 files, the four broken ones among them, without labels; README.md is none."""
    rows, passed_over, *_ = manifest.read(CLIPS)
    assert len(rows) == 27 and passed_over == ["README.md"]
    assert {"empty.mp4", "not_a_video.mp4"} <= {row.id for row in rows}
    assert {row.labels for row in rows} == {()}


def test_labels_of_several_kinds(tmp_path):
    csv = tmp_path / "clips.csv"
    csv.write_text("path,label_verb,label_noun\na.mp4,cut,bread\nb.mp4,wash,cup\n")
    rows = manifest.rows(csv)
    assert [row.heads for row in rows] == [("verb", "noun")] * 2
    assert [row.labels for row in rows] == [("cut", "bread"), ("wash", "cup")]
    csv.write_text("path,label_verb,label_noun\na.mp4,cut,\n")
    with pytest.raises(ManifestError, match="line 2, field label_noun: is empty"):
        manifest.rows(csv)
    csv.write_text("path,label,label_noun\na.mp4,cut,bread\n")
    with pytest.raises(ManifestError, match="instead of label"):
        manifest.rows(csv)
