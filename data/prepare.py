"""A folder or CSV of video files → a prepared data set, in parallel, resumable.

    python -m data.prepare SOURCE --out DIR

Each clip is read, scaled and encoded frame by frame in a worker process; the results
are written in a fixed order, so that the files are the same for any number of jobs and
after any interruption. A clip's split is the first 8 bytes of BLAKE2b(id), as a number
in [0, 1), against the --split fractions (a split that the source names goes before);
the next 8 bytes are its place in the split. Shards are about CLIPS_PER_SHARD clips
each; a shard is written whole or not at all, and what is known of its clips is kept in
`progress/` until the end, so that a run that was stopped goes on with the next shard.

A clip that cannot be decoded, or whose worker dies or stalls, is told in the report and
left out of the records.
"""

import argparse
import collections
import contextlib
import fcntl
import functools
import hashlib
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import connection
from pathlib import Path
from typing import NamedTuple

import rich.console
import rich.progress
import rich.table

from data import DataError, ManifestError, RecordError, manifest, media, records

SETTINGS_VERSION = 1  # of what this file and media.py make of the same arguments
CLIPS_PER_SHARD = 256  # 10 s clips: about 150 MB
STALL = 600.0  # s without a new frame after which a worker is given up
BEAT = 1.0  # s between a worker's signs of life
AHEAD = 8  # clips a worker that may be done before the one that is next in order,
HELD_BYTES = 512 << 20  # unless they take more memory than this
LOCK_WAIT = 5.0  # s until a lock that stays taken is another run's
LOST_SHARE = 0.01  # of the clips without a modality, from which on a warning is due
SHOWN = 30  # failures and classes on screen; report.json has all


class Job(NamedTuple):
    """One clip for a worker."""

    row: manifest.Row
    labels: tuple[int, ...]
    settings: dict


class Outcome(NamedTuple):
    """What became of it: the record's bytes, or the reason why there is none."""

    payload: bytes | None
    reason: str = ""


class Shard(NamedTuple):
    """One shard to be: which file, and which clips in which order."""

    split: str
    number: int
    path: Path
    progress: Path
    rows: list[manifest.Row]


# ------------------------------------------------------------------- the whole of it


def prepare(
    source: str | os.PathLike,
    out: str | os.PathLike,
    name: str | None = None,
    split: dict[str, float] | None = None,
    short_side: int | str = 256,
    fps: float | str = 25.0,
    frames: str = "h264",
    sample_rate: int = 16000,
    jobs: int | None = None,
    console: rich.console.Console | None = None,
) -> dict:
    """Prepares a data set in `out`, or goes on with it; returns the report.

    Args:
        source: a folder or CSV (data/manifest.py).
        out: where `NAME/1.0.0/` and `report.json` go.
        name: of the data set; None: the name of the folder `out`.
        split: {split: fraction} for clips whose split the source does not name, the sum
            1; None: train .9, validation .1.
        short_side: pixels that the picture is shrunk to, or "source": as it is.
        fps: frames a second, or "source": as they are.
        frames: "h264" or "jpeg".
        sample_rate: of the sound, in Hz.
        jobs: worker processes; None: one a core. A script that calls this needs the
            usual `if __name__ == "__main__":`, since the workers import it.
        console: where progress and report are shown; None: nowhere.

    Raises:
        ManifestError: the source is no usable list of clips.
        RecordError: `out` holds something else, or no clip can be decoded.
    """
    out = Path(out)
    split = dict(split or {"train": 0.9, "validation": 0.1})
    settings = dict(fps=fps, short_side=short_side, frames=frames)
    settings |= dict(sample_rate=sample_rate, split=split, version=SETTINGS_VERSION)
    found = manifest.read(source)
    folder = out / _check_name(name, out) / records.VERSION
    plan = _plan(found.rows, settings, folder)
    with _only_run(out, folder, plan["settings"]):
        if (folder / "dataset.json").is_file():
            report = _read_report(out, folder)
            report["already_complete"] = True
        else:
            _write_shards(plan, jobs or len(os.sched_getaffinity(0)), console)
            report = _finish(plan, found.passed_over, out, folder)
    if console:
        show_report(report, console)
    if not report["clips"]:
        raise RecordError(
            f"{out}: none of the {len(found.rows)} clips of {source} can be used; "
            "report.json there says why."
        )
    return report


def _check_name(name: str | None, out: Path) -> str:
    """A name that TFDS takes: letters, digits and _, a letter first."""
    pattern = r"[A-Za-z]\w*"
    if name is None:
        name = re.sub(r"\W", "_", out.resolve().name, flags=re.ASCII)
        name = name if re.fullmatch(pattern, name, re.ASCII) else f"set_{name}"
    if not re.fullmatch(pattern, name, re.ASCII):
        raise RecordError(
            f"--name: {name!r} cannot be a name; use letters, digits and _, a letter "
            "first."
        )
    return name


def _plan(rows: list[manifest.Row], settings: dict, folder: Path) -> dict:
    """Labels, shards and what is to be remembered of them, all fixed before work."""
    names = label_names(rows)
    splits = collections.defaultdict(list)
    for row in rows:
        splits[row.split or choose_split(row.id, settings["split"])].append(row)
    order = [s for s in manifest.SPLITS if s in splits]
    counts = {s: math.ceil(len(splits[s]) / CLIPS_PER_SHARD) for s in order}
    shards = [
        shard for s in order for shard in _shards(splits[s], s, counts[s], folder)
    ]
    facts = [(r.id, r.start, r.end, r.labels, r.split, *r.heads) for r in rows]
    digest = hashlib.sha256(json.dumps(sorted(facts, key=str)).encode()).hexdigest()
    remembered = dict(settings, clips=len(rows), manifest=digest, shards=counts)
    hashed = any(row.split is None for row in rows)
    empty = [s for s in settings["split"] if hashed and s not in splits]
    plan = dict(name=folder.parent.name, labels=names, shards=shards)
    return plan | dict(settings=remembered, empty_splits=empty)


def label_names(rows: list[manifest.Row]) -> list[str] | dict[str, list[str]]:
    """All class names, sorted; {head: names} for labels of several kinds."""
    heads = {row.heads for row in rows}
    if heads == {()}:
        return sorted({label for row in rows for label in row.labels})
    if len(heads) > 1:
        raise ManifestError(
            f"The clips have different kinds of labels ({sorted(heads)}); give each "
            "clip a label of every kind."
        )
    kinds = zip(*(row.labels for row in rows), strict=True)
    names = (sorted(set(labels)) for labels in kinds)
    return dict(zip(*heads, names, strict=True))


def label_places(names: list[str] | dict) -> Callable:
    """A function from a row to the places of its labels in `names` (`label_names`)."""
    lists = list(names.values()) if isinstance(names, dict) else [names]
    places = [{name: place for place, name in enumerate(listed)} for listed in lists]

    def numbers(row: manifest.Row) -> tuple[int, ...]:
        own = places if row.heads else places * len(row.labels)
        return tuple(x[y] for x, y in zip(own, row.labels, strict=True))

    return numbers


def _hashes(id: str) -> tuple[int, int]:
    """Two numbers in [0, 2^64) from a clip's id: for its split and for its place."""
    digest = hashlib.blake2b(id.encode()).digest()
    return int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:16], "big")


def choose_split(id: str, fractions: dict[str, float]) -> str:
    """The split of a clip, from its id alone."""
    value, edge = _hashes(id)[0] / 2**64, 0.0
    for split, fraction in fractions.items():
        edge += fraction
        if value < edge:
            return split
    return split  # the fractions sum to 1 but for rounding


def shuffled(rows: Iterable[manifest.Row]) -> list[manifest.Row]:
    """In the order that the records of a split have; it comes from the ids alone."""
    return sorted(rows, key=lambda row: (_hashes(row.id)[1], row.id))


def _shards(rows, split: str, count: int, folder: Path) -> Iterator[Shard]:
    """The shards of a split; the order of its clips does not depend on their count."""
    members = [[] for _ in range(count)]
    for row in shuffled(rows):
        members[_hashes(row.id)[1] * count >> 64].append(row)
    for number, rows_ in enumerate(members):
        path = folder / records.shard_name(folder.parent.name, split, number, count)
        progress = folder / "progress" / f"{split}-{number:05d}.json"
        yield Shard(split, number, path, progress, rows_)


# ----------------------------------------------------------- one run, the same settings


@contextlib.contextmanager
def _only_run(out: Path, folder: Path, settings: dict):
    """Stores the settings, or compares them with those stored; keeps other runs out."""
    for other in out.glob(f"*/{records.VERSION}/settings.json"):
        if other.parent != folder:
            raise RecordError(
                f"{out}: holds the data set {other.parent.parent.name!r}, not "
                f"{folder.parent.name!r}; give that --name or another --out."
            )
    (folder / "progress").mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        if not _locked(lock):
            raise RecordError(
                f"{out}: is being prepared by another process; wait for it to end."
            )
        path = folder / "settings.json"
        if path.is_file():
            _check_settings(out, json.loads(path.read_text()), settings)
        else:
            records.write_json(path, settings)
        yield


def _locked(lock) -> bool:
    """Takes the lock; False where somebody keeps it for longer than LOCK_WAIT.

    The workers of a run that was killed inherited its lock, and outlive it by a moment.
    """
    deadline = time.monotonic() + LOCK_WAIT
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError:
            if time.monotonic() > deadline:
                return False
        time.sleep(0.1)


def _check_settings(out: Path, stored: dict, wanted: dict) -> None:
    for key in ("fps", "short_side", "frames", "sample_rate", "split", "version"):
        if stored.get(key) != wanted[key]:
            option = key.replace("_", "-")
            raise RecordError(
                f"{out}: was started with {option} {_words(stored.get(key))}, not "
                f"{_words(wanted[key])}; give the same settings or another --out."
            )
    if stored != wanted:
        raise RecordError(
            f"{out}: was started from another list of clips ({stored['clips']}, now "
            f"{wanted['clips']}; files, labels or splits differ); restore the source "
            "or give another --out."
        )


def _words(value) -> str:
    if isinstance(value, dict):
        return ",".join(f"{name}={share:g}" for name, share in value.items())
    return f"{value}"


# ---------------------------------------------------------------------------- the work


def _write_shards(plan: dict, jobs: int, console) -> None:
    """Writes every shard that is not there yet."""
    known = [(shard, _known(shard)) for shard in plan["shards"]]
    left = [shard for shard, facts in known if facts is None]
    failed = sum(len(facts["failed"]) for _, facts in known if facts)
    numbers = label_places(plan["labels"])
    tasks = [
        Job(row, numbers(row), plan["settings"]) for shard in left for row in shard.rows
    ]
    total = sum(len(shard.rows) for shard in plan["shards"])
    with Meter(total, total - len(tasks), failed, console) as meter:
        outcomes = run_jobs(tasks, min(jobs, len(tasks)), meter)
        with contextlib.closing(outcomes):
            for shard in left:
                _write_shard(shard, outcomes)


def _known(shard: Shard) -> dict | None:
    """What an earlier run wrote down of a shard; None where it is to be made."""
    if shard.progress.is_file() and shard.path.is_file():
        facts = json.loads(shard.progress.read_text())
        if shard.path.stat().st_size == facts["checksum"]["size"]:
            return facts
    return None


def _write_shard(shard: Shard, outcomes: Iterator[Outcome]) -> None:
    clips, failed = [], []

    def payloads():
        for row, outcome in zip(shard.rows, outcomes, strict=False):
            if outcome.payload is None:
                reason = outcome.reason.removeprefix(f"{row.path}: ")
                failed.append(dict(id=row.id, path=str(row.path), reason=reason))
            else:
                clips.append(_describe(records.Record(outcome.payload)))
                yield outcome.payload

    records.write_shard(shard.path, payloads())
    sums = records.checksum(shard.path)
    records.write_json(shard.progress, dict(clips=clips, failed=failed, checksum=sums))


def _describe(record: records.Record) -> dict:
    """What report and index say of a clip."""
    picture = record.num_frames / record.fps if record.has_rgb else 0.0
    sound = record.num_samples / record.sample_rate
    return dict(
        index=records.index_entry(record),
        seconds=max(picture, sound),
        silent=record.has_audio and record.facts["rms_dbfs"] is None,
        short_sound=record.has_audio and sound < picture / 2,
        problems=record.facts["problems"],
    )


def make_record(job: Job, beat=lambda: None) -> bytes:
    """Reads a clip and encodes it; `beat` is called at every frame."""
    row, settings = job.row, job.settings
    clip = media.read(
        row.path,
        fps=_number(settings["fps"]),
        short_side=_number(settings["short_side"]),
        sample_rate=settings["sample_rate"],
        start=row.start,
        end=row.end,
        stream=True,
    )
    if clip.frames is not None:
        clip.frames = _beating(clip.frames, beat)
    facts = dict(file=row.path.name, start=row.start, end=row.end)
    stat = row.path.stat()
    facts["sha256"] = _sha256(row.path, stat.st_size, stat.st_mtime_ns)
    facts["settings_version"] = settings["version"]
    return records.encode(clip, row.id, job.labels, facts, settings["frames"])


def _number(setting) -> float | int | None:
    """What media.py wants: None for "source"."""
    return None if setting == "source" else setting


def _beating(frames: Iterable, beat) -> Iterator:
    for frame in frames:
        beat()
        yield frame


@functools.lru_cache(maxsize=16)  # many clips may be cut from one file
def _sha256(path: Path, size: int, time_ns: int) -> str:
    return records.checksum(path)["sha256"]


# ------------------------------------------------------------------- worker processes


def run_jobs(jobs: list[Job], count: int, meter, work=make_record) -> Iterator[Outcome]:
    """The outcomes of all jobs in their order, from `count` worker processes.

    A worker that dies (a C library may do that) or stalls costs its clip, and is
    replaced. Jobs run at most a few clips ahead of the one that is next in order.
    """
    outcomes, started = {}, 0
    workers = [Worker(work) for _ in range(count)]
    try:
        for wanted in range(len(jobs)):
            while wanted not in outcomes:
                held = sum(len(done.payload or b"") for done in outcomes.values())
                limit = wanted + (AHEAD * count if held < HELD_BYTES else 1)
                for worker in workers:
                    if worker.number is None and started < min(limit, len(jobs)):
                        worker.start(started, jobs[started])
                        started += 1
                for place, outcome in _wait(workers):
                    outcomes[workers[place].number] = outcome
                    meter.count(outcome)
                    workers[place].number = None
                    if not workers[place].process.is_alive():
                        workers[place] = Worker(work)
            yield outcomes.pop(wanted)
    finally:
        for worker in workers:
            worker.end()


def _wait(workers: list["Worker"]) -> list[tuple[int, Outcome]]:
    """(place of the worker, outcome) of the clips that are finished or lost."""
    busy = {
        worker.pipe: i for i, worker in enumerate(workers) if worker.number is not None
    }
    finished = []
    for pipe in connection.wait(busy, timeout=1.0):
        outcome = workers[busy[pipe]].receive()
        if outcome:
            finished.append((busy[pipe], outcome))
            busy[pipe] = None
    for place in [place for place in busy.values() if place is not None]:
        if time.monotonic() - workers[place].alive_at > STALL:
            workers[place].end()
            reason = f"gave no new frame for {STALL:.0f} s and was stopped"
            finished.append((place, Outcome(None, reason)))
    return finished


class Worker:
    """A process that makes records, one job after the other."""

    def __init__(self, work):
        context = multiprocessing.get_context("spawn")  # FFmpeg has threads: no fork
        self.pipe, theirs = context.Pipe()
        self.number, self.ready = None, False
        self.process = context.Process(target=_serve, args=(theirs, work), daemon=True)
        self.process.start()
        theirs.close()

    def start(self, number: int, job: Job) -> None:
        self.number, self.alive_at = number, time.monotonic()
        with contextlib.suppress(BrokenPipeError):  # it died: receive() will tell
            self.pipe.send(job)

    def receive(self) -> Outcome | None:
        """An outcome; None for a sign of life."""
        self.alive_at = time.monotonic()
        try:
            reason = self.pipe.recv()
            payload = self.pipe.recv_bytes() if reason == "" else None
        except (EOFError, OSError):
            return self._post_mortem()
        self.ready = True
        return None if reason is None else Outcome(payload, reason)

    def _post_mortem(self) -> Outcome:
        self.process.join(10)
        code = self.process.exitcode
        cause = f"exit code {code}"
        if code is not None and code < 0:
            cause = signal.Signals(-code).name
        self.end()
        if not self.ready:
            raise DataError(
                f"Worker processes cannot be started ({cause}); the messages above say "
                "why."
            )
        return Outcome(None, f"its worker process died ({cause})")

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _serve(pipe, work) -> None:
    """The life of a worker: jobs in; out come None as a sign of life, the reason why
    there is no record, or "" and a record (in bytes: pickled it would be there twice).
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    beat = _Beat(pipe)
    beat.send()
    with contextlib.suppress(EOFError, OSError):  # the parent is gone
        while True:
            job, payload = pipe.recv(), None
            try:
                payload = work(job, beat)
            except DataError as error:
                pipe.send(str(error) or "DataError")
            except Exception as error:  # a bad clip never stops the run
                pipe.send(f"{type(error).__name__}: {error}")
            else:
                pipe.send("")
                pipe.send_bytes(payload)


class _Beat:
    """Sends a sign of life when called, but not more often than every BEAT seconds."""

    def __init__(self, pipe):
        self.pipe = pipe

    def send(self) -> None:
        self.pipe.send(None)
        self.at = time.monotonic()

    def __call__(self) -> None:
        if time.monotonic() - self.at > BEAT:
            self.send()


# -------------------------------------------------------------------------- the report


def _finish(plan: dict, passed_over: list[str], out: Path, folder: Path) -> dict:
    """Index, metadata and report from what is known of every shard."""
    done = [json.loads(shard.progress.read_text()) for shard in plan["shards"]]
    sums = {}
    for shard, known in zip(plan["shards"], done, strict=True):
        sums[shard.path.name] = known["checksum"]
    digests = sorted(entry["sha256"] for entry in sums.values())
    splits = {}
    for split in plan["settings"]["shards"]:
        parts = [
            d for s, d in zip(plan["shards"], done, strict=True) if s.split == split
        ]
        clips = [clip for part in parts for clip in part["clips"]]
        index = folder / records.index_name(split)
        records.write_jsonl(index, (clip["index"] for clip in clips))
        sums[index.name] = records.checksum(index)
        lengths = [len(part["clips"]) for part in parts]
        failed = sum(len(part["failed"]) for part in parts)
        splits[split] = _count(clips, plan["labels"])
        splits[split] |= dict(failed=failed, shard_lengths=lengths)
    info = dict(format=records.FORMAT, name=plan["name"], settings=plan["settings"])
    info |= dict(splits=splits, labels=plan["labels"], statistics={})
    info |= dict(
        shards={s: len(c["shard_lengths"]) for s, c in splits.items()},
        checksums=sums,
        checksum=hashlib.sha256("".join(digests).encode()).hexdigest(),
    )
    report = _report(plan, done, splits, passed_over, folder)
    records.write_json(out / "report.json", report)
    records.write_metadata(folder, info)
    shutil.rmtree(folder / "progress")
    return report


def _count(clips: list[dict], labels: list[str] | dict) -> dict:
    heads = isinstance(labels, dict)
    lists = labels if heads else {"": labels}
    counts = {head: collections.Counter() for head in lists}
    for clip in clips:
        found = clip["index"]["labels"]
        pairs = zip(lists, found, strict=True) if heads else (("", x) for x in found)
        for head, label in pairs:
            counts[head][label] += 1
    per_class = {
        f"{head}: {name}" if heads else name: counts[head][i]
        for head, names in lists.items()
        for i, name in enumerate(names)
    }
    return dict(
        clips=len(clips),
        hours=sum(clip["seconds"] for clip in clips) / 3600,
        without_audio=sum(not clip["index"]["has_audio"] for clip in clips),
        without_rgb=sum(not clip["index"]["has_rgb"] for clip in clips),
        silent=sum(clip["silent"] for clip in clips),
        short_sound=sum(clip["short_sound"] for clip in clips),
        per_class=per_class,
    )


def _report(plan, done, splits, passed_over, folder) -> dict:
    clips = [clip for part in done for clip in part["clips"]]
    ids = lambda want: sorted(clip["index"]["id"] for clip in clips if want(clip))
    troubled = [
        dict(id=clip["index"]["id"], problems=clip["problems"])
        for clip in clips
        if clip["problems"]
    ]
    failed = [clip for part in done for clip in part["failed"]]
    return dict(
        name=plan["name"],
        folder=str(folder),
        settings=plan["settings"],
        clips=len(clips),
        hours=sum(clip["seconds"] for clip in clips) / 3600,
        splits=splits,
        empty_splits=plan["empty_splits"],
        failed=sorted(failed, key=lambda clip: clip["id"]),
        without_audio=ids(lambda clip: not clip["index"]["has_audio"]),
        without_rgb=ids(lambda clip: not clip["index"]["has_rgb"]),
        silent=ids(lambda clip: clip["silent"]),
        short_sound=ids(lambda clip: clip["short_sound"]),
        problems=sorted(troubled, key=lambda clip: clip["id"]),
        passed_over=passed_over,
    )


def _read_report(out: Path, folder: Path) -> dict:
    """The report of a finished data set; without its lists where the file is gone."""
    if (out / "report.json").is_file():
        return json.loads((out / "report.json").read_text())
    info = records.read_info(folder)
    total = lambda key: sum(counts[key] for counts in info["splits"].values())
    facts = dict(name=info["name"], folder=str(folder), settings=info["settings"])
    return facts | dict(
        clips=total("clips"), hours=total("hours"), splits=info["splits"]
    )


# ----------------------------------------------------------------------- on the screen


class Meter:
    """The progress bar: done, failed, clips a second, time left."""

    def __init__(self, total: int, done: int, failed: int, console):
        text = "{task.completed}/{task.total} clips, {task.fields[failed]} failed"
        columns = [rich.progress.BarColumn(), rich.progress.TextColumn(text)]
        columns += [rich.progress.TextColumn("{task.fields[speed]:.1f} clips/s")]
        columns += [rich.progress.TimeRemainingColumn()]
        self.bar = rich.progress.Progress(
            *columns, console=console, disable=console is None
        )
        self.task = self.bar.add_task(
            "", total=total, completed=done, failed=failed, speed=0.0
        )
        self.done, self.failed, self.began = 0, failed, time.monotonic()

    def __enter__(self) -> "Meter":
        self.bar.start()
        return self

    def __exit__(self, *_) -> None:
        self.bar.stop()

    def count(self, outcome: Outcome) -> None:
        self.done += 1
        self.failed += outcome.payload is None
        speed = self.done / (time.monotonic() - self.began)
        self.bar.update(self.task, advance=1, failed=self.failed, speed=speed)


def show_report(report: dict, console: rich.console.Console) -> None:
    """The report as a person wants to see it."""
    table = rich.table.Table()
    columns = ("clips", "failed", "hours", "without_audio", "without_rgb", "silent")
    for column in ("split", *columns):
        heading = column.replace("_", " ").replace("audio", "sound")
        table.add_column(heading.replace("rgb", "picture"), justify="right")
    for split, counts in report["splits"].items():
        values = (counts[column] for column in columns)
        table.add_row(
            split, *(f"{x:.3f}" if isinstance(x, float) else str(x) for x in values)
        )
    console.print(table)
    tell = functools.partial(
        console.print, markup=False, highlight=False, soft_wrap=True
    )
    for line in _lines(report):
        tell(line)
    if report.get("already_complete"):
        tell("It was complete already; nothing was done.")
    tell(f"The data set is {report['folder']}.")


def _lines(report: dict) -> Iterator[str]:
    splits = report["splits"].values()
    classes = collections.Counter()
    for counts in splits:
        classes.update(counts["per_class"])
    if classes:
        most = [f"{label} {n}" for label, n in classes.most_common(SHOWN)]
        more = [f"and {len(classes) - SHOWN} more"] if len(classes) > SHOWN else []
        yield f"{len(classes)} classes: {', '.join(most + more)}"
    for clip in report.get("problems", [])[:SHOWN]:
        yield f"Partly decoded: {clip['id']}: {'; '.join(clip['problems'])}"
    for clip in report.get("failed", [])[:SHOWN]:
        yield f"Failed: {clip['id']}: {clip['reason']}"
    if max(len(report.get(key, [])) for key in ("problems", "failed")) > SHOWN:
        yield f"report.json lists all {len(report['failed'])} failures and the rest."
    for key, what in (("without_audio", "sound"), ("without_rgb", "picture")):
        lost = sum(counts[key] for counts in splits)
        if lost > LOST_SHARE * report["clips"]:
            yield f"WARNING: {lost} of {report['clips']} clips have no {what}."
    for split in report.get("empty_splits", []):
        yield f"WARNING: no clip fell into the split {split}; there is none."


# ------------------------------------------------------------------------- the command


def _source_or(type_):
    """Parses a positive number, or "source"."""

    def parse(text: str):
        if text == "source":
            return text
        value = type_(text)
        if not 0 < value < math.inf:
            raise ValueError(text)
        return value

    parse.__name__ = f"'source' or positive {type_.__name__}"
    return parse


def _positive(text: str) -> int:
    if int(text) <= 0:
        raise ValueError(text)
    return int(text)


def _fractions(text: str) -> dict[str, float]:
    """'train=0.9,validation=0.1' as a dict; the names known, the sum 1."""
    parts = [part.split("=") for part in text.split(",")]
    fractions = {name: float(share) for name, share in parts}
    if (
        len(fractions) != len(parts)
        or not set(fractions) <= set(manifest.SPLITS)
        or min(fractions.values()) < 0
        or abs(sum(fractions.values()) - 1) > 1e-6
    ):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not fractions of {', '.join(manifest.SPLITS)} that sum to 1, "
            "such as train=0.9,validation=0.1"
        )
    return fractions


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m data.prepare",
        description="Turns a folder or CSV of video files into training records. "
        "Run it again after an interruption and it goes on where it stopped.",
        epilog="example: python -m data.prepare ~/clips --out datasets/clips --split "
        "train=0.8,validation=0.1,test=0.1 --jobs 8",
    )
    add = parser.add_argument
    add("source", help="a folder (one sub-folder per class, or flat), or a CSV with "
        "the columns path,start,end,label,split (all but path optional)")  # fmt: skip
    add("--out", required=True, help="where the data set and report.json go")
    add("--name", help="of the data set (default: the name of the folder --out)")
    add("--split", type=_fractions, default="train=0.9,validation=0.1",
        help="fractions, for clips whose split SOURCE does not name "
        "(default: %(default)s)")  # fmt: skip
    add("--short-side", type=_source_or(int), default=256,
        help="pixels, never enlarged, or 'source' (default: %(default)s)")  # fmt: skip
    add("--fps", type=_source_or(float), default=25.0,
        help="frames a second, or 'source' (default: %(default)s)")  # fmt: skip
    add("--frames", choices=("h264", "jpeg"), default="h264",
        help="how pictures are stored; jpeg decodes somewhat faster and takes ten "
        "times the space (default: %(default)s)")  # fmt: skip
    add("--sample-rate", type=_positive, default=16000,
        help="of the sound, in Hz (default: %(default)s)")  # fmt: skip
    add("--jobs", type=_positive, help="worker processes (default: one a core)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    options = vars(parse(arguments))
    try:
        prepare(**options, console=rich.console.Console())
    except (DataError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped; the same command goes on from here.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
