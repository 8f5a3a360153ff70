"""What is in a data set: a summary, one clip in full, or a check of every record.

    python -m data.inspect DIR                    counts, hours, classes, rates, sizes
    python -m data.inspect DIR --clip ID          all that is known of one clip, its
                                                  contact sheet (PNG) and sound (WAV)
    python -m data.inspect DIR --verify           reads everything again: files against
                                                  their SHA-256, records against the
                                                  index, sound and first and last
                                                  picture of each can be decoded; exits
                                                  1 with a list where anything is wrong

DIR is what `config.data.dir` takes; --source as `config.data.source`.
"""

import argparse
import collections
import concurrent.futures
import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import rich.console
import rich.table
import soundfile
from PIL import Image, ImageDraw

from data import DataError, RecordError, manifest, records, storage
from data.sources import SOURCES, open_records

SAMPLE = 500  # records of a split that are read for rates and sizes
SHOWN = 20  # classes and values that are listed
FRAMES = 12  # of a contact sheet,
COLUMNS = 4  # in so many columns,
SIDE = 160  # pixels of the short side of each
BAR = 40  # characters of the longest bar


def splits_of(
    where: str, source: str = "records", split: str | None = None, skip: int = 0
) -> dict:
    """The records of each split by name; RecordError where none can be opened.

    skip: damaged records that opening may pass over.
    """
    info = {}
    if source == "records":
        try:
            info = records.read_info(records.find(where))["splits"]
        except RecordError:
            folder = storage.place(where)
            if not folder.exists() or any(folder.glob("*/*/settings.json")):
                raise
    names = [split] if split else list(info) or [*manifest.SPLITS, "all"]
    found, errors = {}, []
    for name in names:
        try:
            if name != "all" or not found:
                found[name] = open_records(where, name, source, skip_bad_records=skip)
        except RecordError as error:
            errors.append(error)
    if not found or (errors and (split or info)):
        raise errors[0]
    return found


# ----------------------------------------------------------------------------- summary


def summary(sets: dict, console: rich.console.Console) -> None:
    """Counts of each split, how clips are spread over classes, rates and sizes."""
    table = rich.table.Table()
    columns = ("clips", "hours", "with sound", "silent", "with picture", "classes")
    for column in ("split", *columns):
        table.add_column(column, justify="right")
    samples = {name: list(_sample(found)) for name, found in sets.items()}
    for name, found in sets.items():
        table.add_row(name, *_counts(name, found, samples[name]))
    console.print(table)
    say = lambda text: console.print(
        text, markup=False, highlight=False, soft_wrap=True
    )
    for name, found in sets.items():
        for line in _classes(found):
            say(f"{name}: {line}")
    for name, read in samples.items():
        say(f"{name}: of {len(read)} of {len(sets[name])} clips, read for this:")
        for title, values in _spreads(read).items():
            say(f"  {title:12} {_listed(collections.Counter(values))}")


def _sample(found) -> Iterator:
    places = np.linspace(0, len(found) - 1, min(SAMPLE, len(found)))
    for place in places.round().astype(int):
        yield found.record(int(place))


def _counts(name: str, found, sample: list) -> list[str]:
    """A row of the table; hours and silence are exact where prepare counted them."""
    index, known = found.index, found.info.get("splits", {}).get(name, {})
    share = lambda key: sum(bool(entry[key]) for entry in index) / len(index)
    seconds = np.mean([_seconds(record) for record in sample])
    estimate = f"≈ {seconds * len(index) / 3600:.3f}"
    used = {label for entry in index for label in entry["labels"]}
    return [
        str(len(index)),
        f"{known['hours']:.3f}" if "hours" in known else estimate,
        f"{share('has_audio'):.1%}",
        str(known["silent"]) if "silent" in known else "?",
        f"{share('has_rgb'):.1%}",
        str(len(used)),
    ]


def _seconds(record) -> float:
    picture = record.num_frames / record.fps if record.has_rgb else 0.0
    sound = record.num_samples / record.sample_rate if record.has_audio else 0.0
    return max(picture, sound)


def _classes(found) -> Iterator[str]:
    """A line for each class with a bar, most frequent first; of each kind of labels."""
    names = found.info["labels"]
    heads = names if isinstance(names, dict) else {"": names}
    for place, (head, listed) in enumerate(heads.items()):
        labels = (entry["labels"] for entry in found.index)
        if head:
            labels = ((own[place],) for own in labels)
        counts = collections.Counter(label for own in labels for label in own)
        most = max(counts.values(), default=0)
        for label, count in counts.most_common(SHOWN):
            bar = "▇" * max(1, round(BAR * count / most))
            yield f"{head + ': ' if head else ''}{listed[label]:20} {count:7} {bar}"
        if len(counts) > SHOWN:
            least = min(counts.values())
            yield f"and {len(counts) - SHOWN} more classes, down to {least} clips"
        if missing := len(listed) - len(counts):
            yield f"{missing} of {len(listed)} classes have no clip here"
    if unlabelled := sum(not entry["labels"] for entry in found.index):
        yield f"{unlabelled} clips have no label"


def _spreads(read: list) -> dict[str, list]:
    facts = [getattr(record, "facts", {}) for record in read]
    seen = [record for record in read if record.has_rgb]
    return {
        "frames/s": [f"{record.fps:g}" for record in seen],
        "size": [f"{record.width}x{record.height}" for record in seen],
        "seconds": [f"{_seconds(record):.0f}" for record in read],
        "sound in Hz": [f"{r.sample_rate:g}" for r in read if r.has_audio],
        "source size": [f"{x['width']}x{x['height']}" for x in facts if x.get("width")],
        "source fps": [f"{x['fps']:.5g}" for x in facts if x.get("fps")],
        "codecs": [
            f"{x.get('video_codec')} + {x.get('audio_codec')}"
            for x in facts
            if "video_codec" in x
        ],
    }


def _listed(counts: collections.Counter) -> str:
    parts = [f"{value} ({count})" for value, count in counts.most_common(SHOWN)]
    more = [f"and {len(counts) - SHOWN} other"] if len(counts) > SHOWN else []
    return ", ".join(parts + more) or "none"


# ---------------------------------------------------------------------------- one clip


def clip(sets: dict, id: str, out: Path, console: rich.console.Console) -> list[Path]:
    """Tells all of one clip and writes its contact sheet and sound into `out`.

    Returns the files' paths. RecordError where there is no such clip.
    """
    for name, found in sets.items():
        for number, entry in enumerate(found.index):
            if entry["id"] == id:
                return _show(found.record(number), name, number, found, out, console)
    some = [entry["id"] for found in sets.values() for entry in found.index[:3]]
    raise RecordError(
        f"{next(iter(sets.values())).folder}: has no clip {id!r}; ids there are such "
        f"as {', '.join(some)}."
    )


def _show(record, split, number, found, out, console) -> list[Path]:
    names = found.info["labels"]
    lists = names.values() if isinstance(names, dict) else [names] * len(record.labels)
    labels = [x[y] for x, y in zip(lists, record.labels, strict=True)]
    lines = dict(id=record.id, split=split, number=number, labels=", ".join(labels))
    for name in ("num_frames", "fps", "height", "width", "num_samples", "sample_rate"):
        lines[name] = getattr(record, name)
    told = [f"{name:20} {value}" for name, value in lines.items()]
    facts = getattr(record, "facts", {})
    told += ["its source file:"] if facts else []
    told += [f"  {name:18} {value}" for name, value in facts.items()]
    for line in told:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    out.mkdir(parents=True, exist_ok=True)
    stem, written = re.sub(r"[^\w.@-]+", "_", record.id), []
    if record.has_rgb:
        written.append(out / f"{stem}.png")
        contact_sheet(record).save(written[-1])
    if record.has_audio:
        written.append(out / f"{stem}.wav")
        rate = round(record.sample_rate)
        soundfile.write(written[-1], record.waveform(), rate, "PCM_16")
    for path in written:
        console.print(f"wrote {path}", markup=False, highlight=False, soft_wrap=True)
    return written


def contact_sheet(record) -> Image.Image:
    """Pictures evenly over the clip, first and last among them, with their seconds."""
    count = min(FRAMES, record.num_frames)
    places = np.linspace(0, record.num_frames - 1, count).round().astype(int)
    scale = min(1.0, SIDE / min(record.height, record.width))
    size = (round(record.width * scale), round(record.height * scale))
    rows = -(-count // COLUMNS)
    sheet = Image.new("RGB", (size[0] * min(COLUMNS, count), size[1] * rows))
    for place, (frame, pixels) in enumerate(
        zip(places, record.frames(places), strict=True)
    ):
        picture = Image.fromarray(pixels).resize(size)
        draw = ImageDraw.Draw(picture)
        text = f"{frame / record.fps:.2f} s"
        draw.rectangle(draw.textbbox((3, 2), text), fill="black")
        draw.text((3, 2), text, fill="white")
        row, column = divmod(place, COLUMNS)
        sheet.paste(picture, (column * size[0], row * size[1]))
    return sheet


# ----------------------------------------------------------------------------- verify


def verify(sets: dict) -> list[str]:
    """What is wrong, a sentence each: files by their SHA-256, then every record."""
    wrong = list(_wrong_files(next(iter(sets.values()))))
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
        for found in sets.values():
            wrong += found.damaged
            numbers = range(len(found))
            told = threads.map(lambda number, own=found: _wrong(own, number), numbers)
            wrong += [why for why in told if why]
    return wrong


def _wrong_files(found) -> Iterator[str]:
    """Prepared data sets alone have the SHA-256 of their files."""
    if not (found.folder / "dataset.json").is_file():
        return
    for name, expected in sorted(found.info["checksums"].items()):
        path = found.folder / name
        if not path.is_file():
            yield f"{path}: is missing"
        elif (size := storage.size(path)) != expected["size"]:
            yield f"{path}: has {size} bytes, not {expected['size']}"
        elif storage.checksum(path) != expected:
            yield f"{path}: its SHA-256 is not that of the finished data set"


def _wrong(found, number: int) -> str | None:
    """What is wrong with one record, or None."""
    try:
        record, entry = found.record(number), found.index[number]
        for name, value in entry.items():
            own = getattr(record, name)
            if own != (tuple(value) if name == "labels" else value):
                return (
                    f"{found.folder}: record {number} of {found.split}: its {name} is "
                    f"{own}, in the index {value}"
                )
        if record.has_rgb:
            record.frames([0, record.num_frames - 1])
        if record.has_audio and record.num_samples:
            record.waveform()
        return None
    except (DataError, IndexError) as error:
        return str(error)


# ------------------------------------------------------------------------- the command


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m data.inspect",
        description=__doc__.split("\n\n")[0],
        epilog="example: python -m data.inspect datasets/mine --clip dog/a.mp4",
    )
    add = parser.add_argument
    add("directory", help="a data set: what config.data.dir takes")
    add("--source", choices=list(SOURCES), default="records",
        help="as config.data.source (default: %(default)s)")  # fmt: skip
    add("--split", help="only this one (default: all there are)")
    add("--clip", metavar="ID", help="tell all of this clip; write contact sheet, WAV")
    add("--out", default=".", type=Path, help="where these go (default: here)")
    add("--verify", action="store_true", help="read and check everything")
    return parser.parse_args(arguments)


def main(arguments: Iterable[str] | None = None) -> int:
    """The command; returns its exit status."""
    options = parse(arguments)
    console = rich.console.Console()
    try:
        skip = sys.maxsize if options.verify else 0
        sets = splits_of(options.directory, options.source, options.split, skip)
        if options.clip:
            clip(sets, options.clip, options.out, console)
        elif not options.verify:
            summary(sets, console)
        if not options.verify:
            return 0
        wrong = verify(sets)
    except (DataError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    for line in wrong:
        print(line)
    total = sum(map(len, sets.values()))
    print(
        f"{len(wrong)} faults in {total} records."
        if wrong
        else f"{total} records: all is well."
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
