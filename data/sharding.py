"""One shard of a data set to be: which clips it holds, how each becomes a record, and
what is written down of it in `progress/` until the whole data set is finished.

A shard is written whole or not at all, by whichever process or machine comes to it; its
bytes are the same every time.
"""

import contextlib
import functools
import json
import os
import shlex
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from data import DataError, dmvr, manifest, media, records, storage, workers

CUT_SLACK = 1.0  # s by which a file that was cut already may be longer than its part


class Job(NamedTuple):
    """One clip for a worker."""

    row: manifest.Row
    labels: tuple[int, ...]
    settings: dict


class Shard(NamedTuple):
    """One shard to be: which file, and which clips in which order."""

    split: str
    number: int
    path: Path
    progress: Path
    jobs: list[Job]


def known(shard: Shard) -> dict | None:
    """What an earlier run wrote down of a shard; None where it is to be made."""
    if shard.progress.is_file() and shard.path.is_file():
        facts = json.loads(shard.progress.read_text())
        if storage.size(shard.path) == facts["checksum"]["size"]:
            return facts
    return None


def make(shard: Shard) -> None:
    """Makes a shard that is not there yet, with one worker process of its own."""
    if known(shard) is None:
        with contextlib.closing(workers.run(shard.jobs, 1, make_record)) as outcomes:
            write(shard, outcomes)


def write(shard: Shard, outcomes: Iterator[workers.Outcome]) -> None:
    """Writes a shard from the next outcomes, and then what is to be known of it."""
    clips, failed = [], []

    def payloads():
        for job, outcome in zip(shard.jobs, outcomes, strict=False):
            row = job.row
            if outcome.payload is None:
                reason = outcome.reason.removeprefix(f"{row.path}: ")
                failed.append(dict(id=row.id, path=str(row.path), reason=reason))
            else:
                record = records.Record(outcome.payload)
                clips.append(_describe(record))
                yield as_dmvr(job, record) if in_dmvr else outcome.payload

    in_dmvr = dmvr.is_shard(shard.path)
    (dmvr if in_dmvr else records).write_shard(shard.path, payloads())
    sums = storage.checksum(shard.path)
    records.write_json(shard.progress, dict(clips=clips, failed=failed, checksum=sums))


def as_dmvr(job: Job, record: records.Record) -> bytes:
    """The record as DMVR has it, with the names of its labels."""
    names = dict(zip(job.labels, job.row.labels, strict=True))
    return dmvr.from_record(record, names)


def _describe(record: records.Record) -> dict:
    """What report and index say of a clip."""
    picture = record.num_frames / record.fps if record.has_rgb else 0.0
    sound = record.num_samples / record.sample_rate
    return dict(
        index=records.index_entry(record),
        seconds=max(picture, sound),
        silent=record.facts["silent"],
        short_sound=record.facts["short_sound"],
        problems=record.facts["problems"],
    )


def make_record(job: Job, beat: Callable = lambda: None) -> Iterator[bytes]:
    """Reads a clip and encodes it: the record's bytes in parts.

    `beat` is called at every frame.
    """
    row, settings = job.row, job.settings
    start, end = _cut(row)
    clip = media.read(
        row.path,
        fps=_number(settings["fps"]),
        short_side=_number(settings["short_side"]),
        sample_rate=settings["sample_rate"],
        start=start,
        end=end,
        stream=True,
        coded=settings["frames"] == "h264",
    )
    if clip.frames is not None:
        clip.frames = _beating(clip.frames, beat)
    facts = dict(file=row.path.name, start=start, end=end)
    stat = row.path.stat()
    facts["sha256"] = _sha256(row.path, stat.st_size, stat.st_mtime_ns)
    facts["settings_version"] = settings["version"]
    return records.encode_parts(clip, row.id, job.labels, facts, settings["frames"])


def _cut(row: manifest.Row) -> tuple[float | None, float | None]:
    """Start and end in the file: none of them where the file is that part already."""
    if row.perhaps_cut and row.end is not None:
        wanted = row.end - (row.start or 0.0)
        if media.length(row.path) <= wanted + CUT_SLACK:
            return None, None
    return row.start, row.end


def _number(setting) -> float | int | None:
    """What media.py wants: None for "source"."""
    return None if setting == "source" else setting


def _beating(frames: Iterable, beat: Callable) -> Iterator:
    for frame in frames:
        beat()
        yield frame


@functools.lru_cache(maxsize=16)  # many clips may be cut from one file
def _sha256(path: Path, size: int, time_ns: int) -> str:
    return storage.checksum(path)["sha256"]


def make_with_beam(shards: list[Shard]) -> None:
    """Makes shards by an Apache Beam pipeline; BEAM_OPTIONS has the pipeline's options.

    DataError where Beam is not installed. All machines must see the files.
    """
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError:
        raise DataError(
            "--runner beam needs Apache Beam, which is not installed; give "
            "`pip install -e '.[beam]'`."
        ) from None
    options = PipelineOptions(shlex.split(os.environ.get("BEAM_OPTIONS", "")))
    with beam.Pipeline(options=options) as pipeline:
        listed = pipeline | beam.Create(shards) | beam.Reshuffle()
        listed | beam.Map(make)
