"""Preparation: small files made here → records, stopped in every way that can be."""

import hashlib
import json
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest

from data import ManifestError, RecordError, manifest, prepare
from data.records import Record, Records

CLIPS = Path(__file__).resolve().parents[2] / "shared" / "clips"
ROOT = Path(__file__).resolve().parents[1]
RATE = 16000


def make_file(path, frames=12, size=(48, 32), sound=None, fps=25):
    """A small H.264 + FLAC file; sound: int16 [s] at 16 kHz, or None."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=fps, options={"crf": "10"})
        video.width, video.height = size
        video.pix_fmt = "yuv420p"
        if sound is not None:
            audio = container.add_stream("flac", rate=RATE, layout="mono")
        for i in range(frames):
            pixels = np.full((size[1], size[0], 3), 40 + 10 * i % 200, np.uint8)
            pixels[:, : 2 + 2 * i % size[0]] = 200
            container.mux(video.encode(av.VideoFrame.from_ndarray(pixels)))
        container.mux(video.encode(None))
        if sound is not None:
            frame = av.AudioFrame.from_ndarray(sound[None], "s16", "mono")
            frame.rate, frame.pts = RATE, 0
            container.mux(audio.encode(frame))
            container.mux(audio.encode(None))


def noise(seed, samples=6400):
    return np.random.default_rng(seed).integers(-9000, 9000, samples, dtype=np.int16)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Two classes with four good clips each; one silent, one without sound, one bad."""
    folder = tmp_path_factory.mktemp("source")
    for i in range(4):
        make_file(folder / "cat" / f"{i}.mkv", sound=noise(i))
        make_file(folder / "dog" / f"{i}.mkv", sound=noise(10 + i), size=(64, 96))
    make_file(folder / "cat" / "silent.mkv", sound=np.zeros(6400, np.int16))
    make_file(folder / "dog" / "mute.mkv", size=(64, 96))
    (folder / "dog" / "broken.mp4").write_text("no video")
    (folder / "dog" / "notes.txt").write_text("no clip")
    return folder


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(prepare, "CLIPS_PER_SHARD", 3)


def contents(out):
    """{name: bytes} of all that a data set consists of."""
    return {
        path.relative_to(out): path.read_bytes() for path in out.rglob("*.*[!k]") if
        path.is_file() and path.name != "report.json"
    }  # fmt: skip


def test_from_a_folder_per_class_to_records(source, tmp_path, small_shards):
    out = tmp_path / "my-set"
    report = prepare.prepare(source, out, short_side=64, jobs=2)
    assert report == json.loads((out / "report.json").read_text())
    assert report["clips"] == 10 and report["name"] == "my_set"
    assert [(f["id"], "cannot be opened" in f["reason"]) for f in report["failed"]] == [
        ("dog/broken.mp4", True)
    ]
    assert report["silent"] == ["cat/silent.mkv"]
    assert report["without_audio"] == ["dog/mute.mkv"]
    assert report["passed_over"] == ["dog/notes.txt"]
    counts = report["splits"]
    assert sum(counts[s]["clips"] for s in counts) == 10
    per_class = Counter()
    for split in counts:
        per_class.update(counts[split]["per_class"])
    assert per_class == {"cat": 5, "dog": 5}
    # 12 frames at 25 a second; the sound takes 0.4 s of 0.48
    np.testing.assert_allclose(report["hours"], 10 * 0.48 / 3600)
    rows = {row.id: row for row in manifest.rows(source)}
    seen = []
    for split in counts:
        data = Records(out, split)
        assert data.info["labels"] == ["cat", "dog"] and data.info["format"] == 1
        for i, entry in enumerate(data.index):
            record = Record(data[i])
            seen.append(record.id)
            assert record.labels == (int(record.id.startswith("dog")),)
            assert entry["labels"] == list(record.labels)
            assert (
                prepare.choose_split(record.id, data.info["settings"]["split"]) == split
            )
            size = (64, 96) if record.id.startswith("dog") else (48, 32)  # not enlarged
            assert (record.width, record.height) == size
            assert (record.num_frames, record.fps) == (12, 25.0)
            if record.id[-5].isdigit():
                seed = int(record.id[-5]) + 10 * record.labels[0]
                np.testing.assert_array_equal(record.waveform(), noise(seed))
            digest = hashlib.sha256(rows[record.id].path.read_bytes()).hexdigest()
            assert record.facts["sha256"] == digest
    assert sorted(seen) == sorted(set(rows) - {"dog/broken.mp4"})


def test_checksums_are_those_of_the_files(source, tmp_path, small_shards):
    prepare.prepare(source, tmp_path, "set", jobs=2)
    folder = tmp_path / "set" / "1.0.0"
    info = json.loads((folder / "dataset.json").read_text())
    names = {path.name for path in folder.glob("set-*")}
    assert len(names) == sum(info["shards"].values()) >= 4
    assert set(info["checksums"]) == names | {
        f"index-{s}.jsonl" for s in info["splits"]
    }
    digests = {}
    for name, known in info["checksums"].items():
        digests[name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        assert known == dict(sha256=digests[name], size=(folder / name).stat().st_size)
    joined = "".join(sorted(digests[name] for name in names))
    assert info["checksum"] == hashlib.sha256(joined.encode()).hexdigest()


def test_any_number_of_jobs_gives_the_same_bytes(source, tmp_path, small_shards):
    prepare.prepare(source, tmp_path / "1" / "set", jobs=1)
    prepare.prepare(source, tmp_path / "3" / "set", jobs=3)
    assert len(contents(tmp_path / "1")) >= 8
    assert contents(tmp_path / "1") == contents(tmp_path / "3")


def test_killed_and_run_again_equals_an_uninterrupted_run(
    source, tmp_path, monkeypatch
):
    monkeypatch.setattr(prepare, "CLIPS_PER_SHARD", 1)
    out = tmp_path / "killed" / "set"
    code = (
        "import sys; from data import prepare; prepare.CLIPS_PER_SHARD = 1; "
        "prepare.main(sys.argv[1:])"
    )
    arguments = [str(source), "--out", str(out), "--jobs", "1"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL
    )
    progress = out / "set" / "1.0.0" / "progress"
    while process.poll() is None and len(list(progress.glob("*.json"))) < 2:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    kept = {path: path.stat().st_mtime_ns for path in progress.glob("*.json")}
    shards = {
        path: path.stat().st_mtime_ns for path in progress.parent.glob("set-*[!p]")
    }
    assert 2 <= len(kept) < 10
    with pytest.raises(RecordError, match="is not finished; go on with"):
        Records(out, "train")
    prepare.prepare(source, out, jobs=2)
    unchanged = [path for path in shards if path.stat().st_mtime_ns == shards[path]]
    assert len(unchanged) >= len(kept)
    prepare.prepare(source, tmp_path / "whole" / "set", jobs=2)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_shares_in_any_order_give_the_same_files(source, tmp_path, small_shards):
    """Three machines, one of which is killed and comes again; the last one finishes."""
    options = dict(split=dict(train=1.0), jobs=1)
    prepare.prepare(source, tmp_path / "whole" / "set", **options)
    out = tmp_path / "shared" / "set"
    first = prepare.prepare(source, out, share=(2, 3), **options)
    assert first == dict(shards_left=3)
    with pytest.raises(RecordError, match="3 of 4 shards are still to be made"):
        prepare.prepare(source, out, finish=True, **options)
    (out / "set" / "1.0.0" / "x.killed-1.tmp").touch()
    assert prepare.prepare(source, out, share=(1, 3), **options)["shards_left"] == 1
    report = prepare.prepare(source, out, share=(3, 3), **options)
    assert report["clips"] == 10
    assert contents(tmp_path / "shared") == contents(tmp_path / "whole")
    again = prepare.prepare(source, out, finish=True, **options)
    assert again["already_complete"] and again["clips"] == 10


@pytest.mark.slow
def test_finish_alone_writes_the_metadata(source, tmp_path, monkeypatch):
    options = dict(split=dict(train=1.0), jobs=1)
    prepare.prepare(source / "cat", tmp_path / "whole" / "set", **options)
    whole = prepare._finish
    monkeypatch.setattr(prepare, "_finish", lambda *_: dict(shards_left=0))
    prepare.prepare(source / "cat", tmp_path / "made" / "set", **options)
    monkeypatch.setattr(prepare, "_finish", whole)
    prepare.prepare(source / "cat", tmp_path / "made" / "set", finish=True, **options)
    assert contents(tmp_path / "made") == contents(tmp_path / "whole")


def test_a_complete_set_is_left_alone_and_other_settings_are_refused(source, tmp_path):
    first = prepare.prepare(source, tmp_path / "set", jobs=2)
    before = contents(tmp_path)
    again = prepare.prepare(source, tmp_path / "set", jobs=1)
    assert again == first | {"already_complete": True}
    for change, words in (
        (dict(fps="source"), "started with fps 25.0, not source"),
        (dict(short_side=128), "started with short-side 256, not 128"),
        (dict(frames="jpeg"), "started with frames h264, not jpeg"),
        (dict(sample_rate=8000), "started with sample-rate 16000, not 8000"),
        (dict(split=dict(train=1.0)), "not train=1"),
        (dict(name="other"), "holds the data set 'set', not 'other'"),
    ):
        with pytest.raises(RecordError, match=words):
            prepare.prepare(source, tmp_path / "set", **change)
    with pytest.raises(RecordError, match=r"another list of clips \(11, now 5"):
        prepare.prepare(source / "cat", tmp_path / "set")
    assert contents(tmp_path) == before


def test_other_settings_are_used(source, tmp_path):
    prepare.prepare(
        source / "dog",
        tmp_path,
        name="set",
        split=dict(test=1.0),
        short_side=32,
        fps=10.0,
        frames="jpeg",
        sample_rate=8000,
        jobs=1,
    )
    data = Records(tmp_path, "test")
    assert len(data) == 5 and data.info["labels"] == []
    record = Record(data[0])
    assert (record.width, record.height, record.fps) == (32, 48, 10.0)
    assert record._fields["video"] == b"" and len(record._fields["jpeg"]) == 5
    assert {Record(data[i]).sample_rate for i in range(5)} == {8000}


def test_a_csv_with_splits_labels_and_cuts(tmp_path):
    make_file(tmp_path / "in" / "a.mkv", frames=50, sound=noise(1, 32000))
    lines = ["path,start,end,label,split", "a.mkv,0.4,1.2,y|x,test", "a.mkv,,,x,train"]
    (tmp_path / "in" / "clips.csv").write_text("\n".join(lines))
    report = prepare.prepare(tmp_path / "in" / "clips.csv", tmp_path / "out", jobs=2)
    assert {s: c["clips"] for s, c in report["splits"].items()} == dict(train=1, test=1)
    assert report["empty_splits"] == []  # nothing was left to the fractions
    record = Record(Records(tmp_path / "out", "test")[0])
    assert record.id == "a.mkv@0.4-1.2" and record.labels == (1, 0)
    assert (record.num_frames, record.num_samples) == (20, 12800)
    np.testing.assert_array_equal(record.waveform(), noise(1, 32000)[6400:19200])
    assert (record.facts["start"], record.facts["end"]) == (0.4, 1.2)


def test_source_size_and_rate_are_kept(tmp_path):
    make_file(tmp_path / "in" / "a.mkv", size=(322, 260), fps=10)
    report = prepare.prepare(
        tmp_path / "in", tmp_path / "out", short_side="source", fps="source", jobs=1
    )
    (split,) = report["splits"]
    assert report["empty_splits"] == list({"train", "validation"} - {split})
    record = Record(Records(tmp_path / "out", split)[0])
    assert (record.width, record.height) == (322, 260)
    assert (record.fps, record.num_frames) == (10.0, 12)


def test_splits_are_made_by_the_hash_of_the_id():
    fractions = dict(train=0.7, validation=0.2, test=0.1)
    ids = [f"clip {i}.mp4" for i in range(4000)]
    splits = [prepare.choose_split(id, fractions) for id in ids]
    for split, fraction in fractions.items():
        assert abs(splits.count(split) / 4000 - fraction) < 0.03
    for id, split in zip(ids[:100], splits, strict=False):
        value = int(hashlib.blake2b(id.encode()).hexdigest()[:16], 16) / 2**64
        wanted = "train" if value < 0.7 else "validation" if value < 0.9 else "test"
        assert split == wanted


def test_the_order_of_records_does_not_depend_on_the_shards(tmp_path, monkeypatch):
    rows = [manifest.Row(Path(f"{i}"), f"{i}") for i in range(500)]
    orders = []
    for size in (1, 7, 1000):
        monkeypatch.setattr(prepare, "CLIPS_PER_SHARD", size)
        settings = dict(split=dict(train=1.0))
        found = manifest.Manifest(rows, [])
        shards = prepare._plan(found, settings, tmp_path / "set" / "1.0.0")["shards"]
        assert len(shards) == -(-500 // size)
        orders.append([job.row.id for shard in shards for job in shard.jobs])
    assert orders[0] == orders[1] == orders[2] != sorted(orders[0])


# ------------------------------------------------------------------- the command


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "data.prepare", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def test_the_command_shows_its_report(source, tmp_path):
    done = run(source, "--out", tmp_path, "--name", "set", "--jobs", 2)
    assert done.returncode == 0 and done.stderr == ""
    assert "11/11 clips, 1 failed" in done.stdout
    assert "2 classes: cat 5, dog 5" in done.stdout
    assert "Failed: dog/broken.mp4: cannot be opened as media" in done.stdout
    assert "WARNING: 1 of 10 clips have no sound." in done.stdout


@pytest.mark.parametrize(
    "options, words",
    [
        (["--split", "train=0.5"], "sum to 1"),
        (["--split", "train=0.5,dev=0.5"], "train, validation, test"),
        (["--split", "train"], "--split"),
        (["--short-side", "0"], "--short-side"),
        (["--fps", "nan"], "--fps"),
        (["--sample-rate", "-1"], "--sample-rate"),
        (["--jobs", "0"], "--jobs"),
        (["--frames", "png"], "--frames"),
        (["--shards", "3/2"], "--shards"),
        (["--shards", "0/2"], "--shards"),
        (["--shards", "half"], "--shards"),
        (["--runner", "spark"], "--runner"),
    ],
)
def test_wrong_options_are_named(options, words, capsys):
    with pytest.raises(SystemExit) as stop:
        prepare.parse(["source", "--out", "out", *options])
    assert stop.value.code == 2 and words in capsys.readouterr().err


def test_options_are_understood():
    options = prepare.parse(
        "in --out o --split test=1 --short-side source --fps source".split()
    )
    assert options.split == dict(test=1.0)
    assert options.short_side == options.fps == "source"
    assert options.share == (1, 1) and not options.finish
    options = prepare.parse("in --out o --fps 29.97 --shards 2/8 --finish".split())
    assert options.share == (2, 8) and options.finish
    assert options.split == dict(train=0.9, validation=0.1)
    assert (options.fps, options.short_side) == (29.97, 256)


def test_help_shows_an_example(capsys):
    with pytest.raises(SystemExit) as stop:
        prepare.parse(["--help"])
    words = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    assert "examples: python -m data.prepare ~/clips --out datasets/clips" in words


def test_errors_are_one_sentence_and_exit_2(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "broken.mp4").write_text("no video")
    for source, words in (
        (tmp_path / "nowhere", "nowhere"),
        (tmp_path / "in", "none of the 1 clips"),
    ):
        assert prepare.main([str(source), "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert "cannot be opened" in report["failed"][0]["reason"]


def test_an_unusable_source_or_name_leaves_nothing_behind(tmp_path):
    with pytest.raises(ManifestError):
        prepare.prepare(tmp_path / "nowhere", tmp_path / "out")
    make_file(tmp_path / "in" / "a.mkv")
    with pytest.raises(RecordError, match="--name: 'my set' cannot be a name"):
        prepare.prepare(tmp_path / "in", tmp_path / "out", name="my set")
    assert not (tmp_path / "out").exists()


def test_two_runs_at_once_are_kept_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "LOCK_WAIT", 0.3)
    folder = tmp_path / "set" / "1.0.0"
    with prepare._only_run(tmp_path, folder, {}):
        with pytest.raises(RecordError, match="being prepared by another process"):
            with prepare._only_run(tmp_path, folder, {}):
                pass


def test_a_lock_that_is_freed_soon_is_waited_for(tmp_path):
    """As that of a killed run, which its workers hold until they are gone too."""
    folder = tmp_path / "set" / "1.0.0"
    folder.mkdir(parents=True)
    code = "import fcntl, sys, time; fcntl.flock(f := open(sys.argv[1], 'w'), 2)"
    code += "; print(flush=True); time.sleep(1)"
    command = [sys.executable, "-c", code, str(folder / "lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        with prepare._only_run(tmp_path, folder, {}):
            assert holder.wait() == 0


# --------------------------------------------------------------------- real clips


@pytest.mark.slow
@pytest.mark.skipif(not CLIPS.is_dir(), reason="the development clips are not here")
def test_the_development_clips(tmp_path):
    report = prepare.prepare(CLIPS, tmp_path / "clips")
    assert report["clips"] == 24
    assert [clip["id"] for clip in report["failed"]] == [
        "empty.mp4",
        "not_a_video.mp4",
        "truncated_no_index.mp4",
    ]
    assert [clip["id"] for clip in report["problems"]] == [
        "corrupted_packets.mp4",
        "truncated_half.mkv",
    ]
    assert report["without_audio"] == [
        "bikes_silent.mp4",
        "corrupted_packets.mp4",
        "mmaction_demo_silent.mp4",
        "rot90_three_frames.mov",
        "tiny_66x50_60fps.mov",
    ]
    records = [Records(tmp_path / "clips", split) for split in report["splits"]]
    for data in records:
        for i, entry in enumerate(data.index):
            record = data.record(i)
            frames = record.frames(range(entry["num_frames"]))
            assert frames.shape[0] == record.num_frames > 0 and record.fps == 25.0
            assert min(frames.shape[1:3]) <= 256
            assert record.waveform().size == record.num_samples
