"""A folder, CSV or public data set of video files → a prepared data set, in parallel,
resumable.

    python -m data.prepare SOURCE --out DIR
    python -m data.prepare --dataset NAME --videos DIR --lists DIR --out DIR

Each clip is read, scaled and encoded frame by frame in a worker process; the results
are written in a fixed order, so that the files are the same for any number of jobs and
after any interruption. A clip's split is the first 8 bytes of BLAKE2b(id), as a number
in [0, 1), against the --split fractions (a split that the source names goes before);
the next 8 bytes are its place in the split. Shards are about CLIPS_PER_SHARD clips
each; a shard is written whole or not at all, and what is known of its clips is kept in
`progress/` until the end, so that a run that was stopped goes on with the next shard.
Several machines that see the same folders share the shards (--shards I/N); whoever
makes the last one, or --finish, writes index and metadata, which do not depend on that.

A clip that cannot be decoded, or whose worker dies or stalls, is told in the report and
left out of the records.
"""

import argparse
import collections
import contextlib
import fcntl
import hashlib
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import rich.console
import rich.progress

from data import (
    DataError,
    ManifestError,
    RecordError,
    dmvr,
    manifest,
    published,
    records,
    sharding,
    storage,
    tally,
    workers,
)

SETTINGS_VERSION = 3  # of what the same arguments make: media.py, records.py, here
CLIPS_PER_SHARD = 256  # 10 s clips: about 150 MB
LOCK_WAIT = 5.0  # s until a lock that stays taken is another run's
FINISH_WAIT = 600.0  # s that another run may take to write index and metadata


# ------------------------------------------------------------------- the whole of it


def prepare(
    source: str | os.PathLike | manifest.Manifest,
    out: str | os.PathLike,
    name: str | None = None,
    split: dict[str, float] | None = None,
    short_side: int | str = 256,
    fps: float | str = 25.0,
    frames: str = "h264",
    sample_rate: int = 16000,
    jobs: int | None = None,
    console: rich.console.Console | None = None,
    share: tuple[int, int] = (1, 1),
    finish: bool = False,
    runner: str = "processes",
    format: str = "records",
) -> dict:
    """Prepares a data set in `out`, or goes on with it; returns the report.

    Args:
        source: a folder or CSV (data/manifest.py), or what data/published.py read.
        out: where `NAME/1.0.0/` and `report.json` go: a local folder, or a bucket
            (gs://, s3://; data/storage.py).
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
        share: (i, n) makes the shards i, i + n, i + 2n, … (from 1) alone, while others
            make the others. The report is {"shards_left": number} until all are there.
        finish: makes no shard, but index and metadata from those that are there.
        runner: "processes" of this machine, or "beam": an Apache Beam pipeline.
        format: "records", or "dmvr": TFRecords as Scenic reads them (data/dmvr.py),
            whose pictures are JPEG.

    Raises:
        ManifestError: the source is no usable list of clips.
        RecordError: `out` holds something else, no clip can be decoded, or shards are
            missing where `finish` is asked for.
    """
    out = storage.place(out)
    split = dict(split or {"train": 0.9, "validation": 0.1})
    settings = dict(fps=fps, short_side=short_side, frames=frames)
    settings |= dict(sample_rate=sample_rate, split=split, version=SETTINGS_VERSION)
    if format == "dmvr":
        settings |= dict(frames="jpeg", format="dmvr")
    found = (
        manifest.read(source) if not isinstance(source, manifest.Manifest) else source
    )
    folder = out / _check_name(name, out) / records.VERSION
    plan = _plan(found, settings, folder)
    lock = "lock" if share == (1, 1) else "lock-{}-of-{}".format(*share)
    with _only_run(out, folder, plan["settings"], lock):
        whole = (folder / "dataset.json").is_file()
        if not whole and not finish:
            mine = plan["shards"][share[0] - 1 :: share[1]]
            _make_shards(mine, jobs or workers.processors(), runner, console)
        report = _finish(plan, found, out, folder)
    if whole:
        report["already_complete"] = True
    if finish and "shards_left" in report:
        raise RecordError(
            f"{out}: {report['shards_left']} of {len(plan['shards'])} shards are still "
            "to be made; run the command without --finish, or wait for those that "
            "make them."
        )
    if console:
        _show(report, console)
    if not report.get("clips", 1):
        raise RecordError(
            f"{out}: none of the {len(found.rows)} clips of the source can be used; "
            "report.json there says why."
        )
    return report


def _show(report: dict, console: rich.console.Console) -> None:
    if "shards_left" in report:
        console.print(
            f"This share is done; {report['shards_left']} shards are left to the "
            "others, of which the last writes the metadata."
        )
    else:
        tally.show(report, console)


def _check_name(name: str | None, out: Path) -> str:
    """A name that TFDS takes: letters, digits and _, a letter first."""
    pattern = r"[A-Za-z]\w*"
    if name is None:
        own = out.name if storage.is_remote(out) else out.resolve().name
        name = re.sub(r"\W", "_", own, flags=re.ASCII)
        name = name if re.fullmatch(pattern, name, re.ASCII) else f"set_{name}"
    if not re.fullmatch(pattern, name, re.ASCII):
        raise RecordError(
            f"--name: {name!r} cannot be a name; use letters, digits and _, a letter "
            "first."
        )
    return name


def _plan(found: manifest.Manifest, settings: dict, folder: Path) -> dict:
    """Labels, shards and what is to be remembered of them, all fixed before work."""
    rows = found.rows
    names = label_names(rows) if found.labels is None else found.labels
    as_dmvr = settings.get("format") == "dmvr"
    if as_dmvr and isinstance(names, dict):
        raise ManifestError(
            f"The clips have labels of several kinds ({', '.join(names)}), for which "
            "DMVR has no room; leave --format dmvr out."
        )
    splits = collections.defaultdict(list)
    for row in rows:
        splits[row.split or choose_split(row.id, settings["split"])].append(row)
    order = [s for s in manifest.SPLITS if s in splits]
    counts = {s: math.ceil(len(splits[s]) / CLIPS_PER_SHARD) for s in order}
    facts = [(r.id, r.start, r.end, r.labels, r.split, *r.heads) for r in rows]
    digest = hashlib.sha256(json.dumps(sorted(facts, key=str)).encode()).hexdigest()
    remembered = dict(settings, clips=len(rows), manifest=digest, shards=counts)
    numbers = label_places(names)
    shards = [
        sharding.Shard(
            *shard, [sharding.Job(r, numbers(r), remembered) for r in members]
        )
        for s in order
        for *shard, members in _shards(splits[s], s, counts[s], folder, as_dmvr)
    ]
    hashed = any(row.split is None for row in rows)
    empty = [s for s in settings["split"] if hashed and s not in splits]
    empty += [s for s in found.listed or () if s not in splits]
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


def _shards(rows, split, count: int, folder: Path, as_dmvr=False) -> Iterator[tuple]:
    """(split, number, path, progress, rows) of the shards of a split.

    The order of its clips does not depend on the number of shards.
    """
    members = [[] for _ in range(count)]
    for row in shuffled(rows):
        members[_hashes(row.id)[1] * count >> 64].append(row)
    for number, rows_ in enumerate(members):
        file = records.shard_name(folder.parent.name, split, number, count)
        path = folder / (dmvr.shard_name(split, number, count) if as_dmvr else file)
        progress = folder / "progress" / f"{split}-{number:05d}.json"
        yield split, number, path, progress, rows_


# ----------------------------------------------------------- one run, the same settings


@contextlib.contextmanager
def _only_run(out: Path, folder: Path, settings: dict, lock: str = "lock"):
    """Stores the settings, or compares them with those stored; keeps other runs out."""
    for other in out.glob(f"*/{records.VERSION}/settings.json"):
        if other.parent != folder:
            raise RecordError(
                f"{out}: holds the data set {other.parent.parent.name!r}, not "
                f"{folder.parent.name!r}; give that --name or another --out."
            )
    (folder / "progress").mkdir(parents=True, exist_ok=True)
    with _locked(folder / lock, LOCK_WAIT) as taken:
        if not taken:
            raise RecordError(
                f"{out}: is being prepared by another process; wait for it to end."
            )
        path = folder / "settings.json"
        if not path.is_file():
            records.write_json(path, settings)  # of several machines one is the last
        _check_settings(out, json.loads(path.read_text()), settings)
        yield


@contextlib.contextmanager
def _locked(path: Path, wait: float) -> Iterator[bool]:
    """Holds a lock; False where somebody keeps it for longer than `wait` seconds.

    The workers of a run that was killed inherited its lock, and outlive it by a moment.
    A bucket has no locks: who works there twice writes the same bytes twice.
    """
    if storage.is_remote(path):
        yield True
        return
    with path.open("w") as lock:
        yield _lock(lock, wait)


def _lock(lock, wait: float) -> bool:
    deadline = time.monotonic() + wait
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError:
            if time.monotonic() > deadline:
                return False
        time.sleep(0.1)


def _check_settings(out: Path, stored: dict, wanted: dict) -> None:
    keys = ("fps", "short_side", "frames", "sample_rate", "split", "version", "format")
    for key in keys:
        if stored.get(key) != wanted.get(key):
            option = key.replace("_", "-")
            raise RecordError(
                f"{out}: was started with {option} {_words(stored.get(key))}, not "
                f"{_words(wanted.get(key))}; give the same settings or another --out."
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


def _make_shards(shards: list[sharding.Shard], jobs: int, runner: str, console) -> None:
    """Writes those shards that are not there yet."""
    known = [(shard, sharding.known(shard)) for shard in shards]
    left = [shard for shard, facts in known if facts is None]
    if runner == "beam":
        sharding.make_with_beam(left)
        return
    failed = sum(len(facts["failed"]) for _, facts in known if facts)
    tasks = [job for shard in left for job in shard.jobs]
    total = sum(len(shard.jobs) for shard in shards)
    with tally.Meter(total, total - len(tasks), failed, console) as meter:
        outcomes = workers.run(
            tasks, min(jobs, len(tasks)), sharding.make_record, meter.count
        )
        with contextlib.closing(outcomes):
            for shard in left:
                sharding.write(shard, outcomes)


def _finish(plan: dict, found: manifest.Manifest, out: Path, folder: Path) -> dict:
    """Index, metadata and report, once; {"shards_left": n} where shards are missing."""
    with _locked(folder / "lock-finish", FINISH_WAIT):
        if (folder / "dataset.json").is_file():
            return tally.read_report(out, folder)
        left = sum(sharding.known(shard) is None for shard in plan["shards"])
        return (
            dict(shards_left=left) if left else tally.finish(plan, found, out, folder)
        )


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


def _share(text: str) -> tuple[int, int]:
    """'2/8' as (2, 8)."""
    number, count = map(int, text.split("/"))
    if not 1 <= number <= count:
        raise ValueError(text)
    return number, count


_share.__name__ = "share such as 2/8"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m data.prepare",
        description="Turns a folder or CSV of video files, or a public data set, into "
        "training records. Run it again after an interruption and it goes on where it "
        "stopped.",
        epilog="examples: python -m data.prepare ~/clips --out datasets/clips --split "
        "train=0.8,validation=0.1,test=0.1 --jobs 8; python -m data.prepare --dataset "
        "vggsound --videos ~/vggsound/videos --lists ~/vggsound --out "
        "datasets/vggsound. data/README.md has a section for each public data set.",
    )
    add = parser.add_argument
    add("source", nargs="?", help="a folder (one sub-folder per class, or flat), or a "
        "CSV with the columns path,start,end,label,split (all but path "
        "optional)")  # fmt: skip
    add("--dataset", choices=sorted(published.DATASETS), help="a public data set, "
        "instead of SOURCE; needs --videos and --lists")  # fmt: skip
    add("--videos", help="the folder that its files are in, at any depth")
    add("--lists", help="the folder of its lists as they are published, or one list")
    add("--split-number", type=_positive, default=1, help="which of the splits of "
        "ucf101 (1 to 3) or folds of esc50 (1 to 5; that fold is the test) "
        "(default: %(default)s)")  # fmt: skip
    add("--out", required=True, help="where the data set and report.json go")
    add("--name", help="of the data set (default: the name of the folder --out)")
    add("--split", type=_fractions, default="train=0.9,validation=0.1",
        help="fractions, for clips whose split SOURCE does not name "
        "(default: %(default)s)")  # fmt: skip
    add("--short-side", type=_source_or(int), help="pixels, never enlarged, or "
        "'source' (default: 256, or as is usual for the --dataset)")  # fmt: skip
    add("--fps", type=_source_or(float), help="frames a second, or 'source' "
        "(default: 25, or as is usual for the --dataset)")  # fmt: skip
    add("--frames", choices=("h264", "jpeg"), default="h264",
        help="how pictures are stored; jpeg decodes somewhat faster and takes ten "
        "times the space (default: %(default)s)")  # fmt: skip
    add("--format", choices=("records", "dmvr"), default="records",
        help="dmvr: TFRecords as Scenic reads them, with JPEG pictures "
        "(default: %(default)s)")  # fmt: skip
    add("--sample-rate", type=_positive, default=16000,
        help="of the sound, in Hz (default: %(default)s)")  # fmt: skip
    add("--jobs", type=_positive, help="worker processes (default: one a core)")
    add("--shards", type=_share, default=(1, 1), dest="share", metavar="I/N",
        help="make every Nth shard only, from the Ith on (1 to N), so that N machines "
        "or array jobs share the work; the last to end finishes")  # fmt: skip
    add("--finish", action="store_true", help="make no shard; write index and metadata "
        "if all shards are there")  # fmt: skip
    add("--runner", choices=("processes", "beam"), default="processes",
        help="beam: the same shards by an Apache Beam pipeline; its own options come "
        "from BEAM_OPTIONS (default: %(default)s)")  # fmt: skip
    options = parser.parse_args(arguments)
    public = (options.dataset, options.videos, options.lists)
    if (options.source is None) != all(public) or (options.source and any(public)):
        parser.error("give either SOURCE or all of --dataset, --videos and --lists")
    preset = published.DATASETS[options.dataset].preset if options.dataset else {}
    for key, value in (dict(fps=25.0, short_side=256) | preset).items():
        if getattr(options, key) is None:
            setattr(options, key, value)
    return options


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    options = vars(parse(arguments))
    public = [options.pop(key) for key in ("dataset", "videos", "lists")]
    number = options.pop("split_number")
    try:
        if public[0]:
            options["source"] = published.read(*public, number)
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
