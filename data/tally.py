"""What is known of all shards → index, metadata and report of a data set, and the
report as a person wants to see it.

The same clips give the same files, whoever made the shards and in whatever order.
"""

import collections
import csv
import hashlib
import io
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import rich.console
import rich.panel
import rich.progress
import rich.table
import rich.text

from data import manifest, records, storage, workers

LOST_SHARE = 0.01  # of the clips without a modality, from which on a warning is due
SHOWN = 30  # failures and classes on screen; report.json has all
SOUND_LOST = {  # key of the report: what is wrong with these clips
    "without_audio": "have no sound",
    "silent": "have sound that is all zeros",
    "short_sound": "have sound that ends before half of their picture",
}


def finish(plan: dict, found: manifest.Manifest, out: Path, folder: Path) -> dict:
    """Writes index, metadata and report from what is known of every shard.

    plan: as `data.prepare` makes it. found: the clips, and those that are missing.
    Returns the report. dataset.json comes last: a folder that has it is complete.
    """
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
        sums[index.name] = storage.checksum(index)
        lengths = [len(part["clips"]) for part in parts]
        failed = sum(len(part["failed"]) for part in parts)
        splits[split] = _count(clips, plan["labels"])
        splits[split] |= dict(failed=failed, shard_lengths=lengths)
        if found.listed is not None:
            splits[split]["listed"] = found.listed[split]
    info = dict(format=records.FORMAT, name=plan["name"], settings=plan["settings"])
    info |= dict(splits=splits, labels=plan["labels"], statistics={})
    info |= dict(
        shards={s: len(c["shard_lengths"]) for s, c in splits.items()},
        checksums=sums,
        checksum=hashlib.sha256("".join(digests).encode()).hexdigest(),
    )
    report = _report(plan, done, splits, found, folder)
    if found.listed is not None:
        _write_missing(out / "missing.csv", found, plan["shards"], report["failed"])
    records.write_json(out / "report.json", report)
    records.write_metadata(folder, info)
    for done_with in (folder / "progress").glob("*"):
        done_with.unlink(missing_ok=True)
    if not storage.is_remote(folder):  # a bucket has no folders
        shutil.rmtree(folder / "progress", ignore_errors=True)
    for leftover in folder.glob("*.tmp"):  # of writers that were killed
        leftover.unlink(missing_ok=True)
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


def _report(plan, done, splits, found, folder) -> dict:
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
        listed=found.listed,
        failed=sorted(failed, key=lambda clip: clip["id"]),
        without_audio=ids(lambda clip: not clip["index"]["has_audio"]),
        without_rgb=ids(lambda clip: not clip["index"]["has_rgb"]),
        silent=ids(lambda clip: clip["silent"]),
        short_sound=ids(lambda clip: clip["short_sound"]),
        problems=sorted(troubled, key=lambda clip: clip["id"]),
        passed_over=found.passed_over,
    )


def _write_missing(path: Path, found, shards, failed: list[dict]) -> None:
    """The listed clips that are no records: id, split and reason."""
    splits = {job.row.id: shard.split for shard in shards for job in shard.jobs}
    rows = [(clip.id, clip.split, "there is no such file") for clip in found.missing]
    rows += [(clip["id"], splits[clip["id"]], clip["reason"]) for clip in failed]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([("id", "split", "reason"), *sorted(rows)])
    records.write_text(path, text.getvalue())


def read_report(out: Path, folder: Path) -> dict:
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

    def count(self, outcome: workers.Outcome) -> None:
        self.done += 1
        self.failed += outcome.payload is None
        speed = self.done / (time.monotonic() - self.began)
        self.bar.update(self.task, advance=1, failed=self.failed, speed=speed)


def show(report: dict, console: rich.console.Console) -> None:
    """The report as a person wants to see it, warnings last and in a frame."""
    table = rich.table.Table()
    columns = ("clips", "failed", "hours", "without_audio", "without_rgb", "silent")
    for column in ("split", *columns, "short_sound"):
        heading = column.replace("_", " ").replace("audio", "sound")
        table.add_column(heading.replace("rgb", "picture"), justify="right")
    for split, counts in report["splits"].items():
        values = [counts[column] for column in (*columns, "short_sound")]
        table.add_row(
            split, *(f"{x:.3f}" if isinstance(x, float) else str(x) for x in values)
        )
    console.print(table)
    for line in _lines(report):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if warnings := list(_warnings(report)):
        text = "\n".join(f"WARNING: {warning}" for warning in warnings)
        frame = rich.panel.Panel.fit(rich.text.Text(text), style="bold red")
        console.print(frame, highlight=False)


def _lines(report: dict) -> Iterator[str]:
    if report.get("listed"):
        yield _presence(report)
    classes = collections.Counter()
    for counts in report["splits"].values():
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
    if report.get("already_complete"):
        yield "It was complete already; nothing was done."
    yield f"The data set is {report['folder']}."


def _presence(report: dict) -> str:
    """How many of the clips that the lists name are records now, per split."""
    present = {split: counts["clips"] for split, counts in report["splits"].items()}
    listed = report["listed"]
    parts = [f"{split} {present.get(split, 0)} of {n}" for split, n in listed.items()]
    total = sum(present.values())
    missing = " (missing.csv names the others)" if total < sum(listed.values()) else ""
    return (
        f"{total} of {sum(listed.values())} listed clips are present: "
        f"{', '.join(parts)}{missing}."
    )


def _warnings(report: dict) -> Iterator[str]:
    splits, clips = report["splits"].values(), report["clips"]
    count = lambda key: sum(counts[key] for counts in splits)
    if sum(map(count, SOUND_LOST)) > LOST_SHARE * clips:
        for key, what in SOUND_LOST.items():
            if count(key):
                yield f"{count(key)} of {clips} clips {what}."
    if count("without_rgb") > LOST_SHARE * clips:
        yield f"{count('without_rgb')} of {clips} clips have no picture."
    for split in report.get("empty_splits", []):
        yield (
            f"no clip fell into the split {split}; there is none: set the split of the "
            "config to another, or prepare a CSV that has a column `split`."
        )
