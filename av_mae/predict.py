"""Says what clips show and sound like, by a finetuned model.

    python -m av_mae.predict runs/finetune concert.mp4
    python -m av_mae.predict runs/finetune concert.mp4 folder --top 3 --json
    python -m av_mae.predict runs/finetune long.mp4 --windows 2 --modalities spectrogram

CHECKPOINT is a workdir, a step, or a published file; CLIP a media file, a folder of
them or a CSV as data.prepare takes it. Without --windows a clip is seen as the
evaluation of training saw it; with it in windows, one each SECONDS, each told by
itself. Clips that cannot be read are reported on standard error and passed over; the
exit status is then 1 (2 where nothing could be done).
"""

import argparse
import csv
import json
import sys
from collections.abc import Iterator
from typing import NamedTuple

import rich.box
import rich.console
import rich.table

from av_mae import MODALITIES, UserError, api, clips, commandline
from data import DataError

FORMATS = ("table", "json", "csv")
TOP = 5


class Answer(NamedTuple):
    """What is said of a clip or window; heads has one entry, '', for a head alone."""

    clip: str
    start: float
    end: float
    used: tuple[str, ...]
    heads: dict[str, list[tuple[str, float]]]


def answers(model: api.Model, row, given: argparse.Namespace) -> list[Answer]:
    """What the model says of one clip, or of each window of it."""
    options = dict(top=given.top or None, modalities=given.modalities)
    source = row.path
    if given.windows is None or row.start is not None or row.end is not None:
        source = model.read(row.path, row.start, row.end)
    if given.windows is None:
        found = [model.predict(source, **options)]
    else:
        found = model.predict(source, every=given.windows, average=False, **options)
    return [_answer(row.id, one) for one in found]


def _answer(name: str, found) -> Answer:
    heads = found if isinstance(found, dict) else {"": found}
    first = next(iter(heads.values()))
    pairs = {head: list(one) for head, one in heads.items()}
    return Answer(name, first.start, first.end, first.used, pairs)


def each(model, rows, given, failed: list[str]) -> Iterator[Answer]:
    """Answers of all clips; what cannot be read is told at once and kept."""
    for row in rows:
        try:
            yield from answers(model, row, given)
        except (UserError, DataError) as error:
            print(f"passed over: {error}", file=sys.stderr)
            failed.append(str(error))


# Ways to show them.


def show_table(found: Iterator[Answer]):
    """A table for people."""
    table = rich.table.Table(box=rich.box.SIMPLE)
    for title in ("clip", "seconds", "from", "shows"):
        table.add_column(title, overflow="fold")
    for answer in found:
        shows = "\n".join(
            f"{probability:6.1%}  {f'{head}: ' if head else ''}{label}"
            for head, pairs in answer.heads.items()
            for label, probability in pairs
        )
        span = f"{answer.start:.2f}-{answer.end:.2f}"
        table.add_row(answer.clip, span, " + ".join(answer.used), shows)
    if table.row_count:
        rich.console.Console().print(table)


def show_json(found: Iterator[Answer]):
    """A JSON list, one object for each clip or window."""
    objects = []
    for answer in found:
        named = {
            head: [{"label": label, "probability": p} for label, p in pairs]
            for head, pairs in answer.heads.items()
        }
        record = answer._asdict() | {"predictions": named.get("", named)}
        del record["heads"]
        objects.append(record)
    print(json.dumps(objects, indent=2))


def show_csv(found: Iterator[Answer]):
    """CSV, one line for each class of each clip or window."""
    writer = csv.writer(sys.stdout, lineterminator="\n")
    names = ("clip", "start", "end", "used", "head", "rank", "label", "probability")
    writer.writerow(names)
    for answer in found:
        for head, pairs in answer.heads.items():
            for rank, (label, probability) in enumerate(pairs, start=1):
                used = "+".join(answer.used)
                span = (f"{answer.start:.3f}", f"{answer.end:.3f}")
                line = (answer.clip, *span, used, head, rank, label)
                writer.writerow([*line, f"{probability:.6f}"])


SHOW = {"table": show_table, "json": show_json, "csv": show_csv}


# The command.


def modalities_of(text: str) -> tuple[str, ...]:
    """'rgb,spectrogram' as a tuple; for argparse."""
    names = tuple(text.replace("+", ",").split(","))
    if unknown := set(names) - set(MODALITIES):
        raise argparse.ArgumentTypeError(
            f"{', '.join(sorted(unknown))} is none of {', '.join(MODALITIES)}"
        )
    return names


def seconds_of(text: str) -> float:
    """The number of `--windows SECONDS`; for argparse."""
    try:
        return float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no number of seconds: give the clips before --windows"
        ) from error


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m av_mae.predict",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument("clips", nargs="+", metavar="CLIP")
    top = f"classes to show, 0 for all (default: {TOP})"
    parser.add_argument("--top", type=int, default=TOP, help=top)
    modalities = "use these alone, as in rgb,spectrogram"
    parser.add_argument("--modalities", type=modalities_of, help=modalities)
    windows = "tell windows, one each SECONDS (default: as long as a window)"
    optional = dict(nargs="?", type=seconds_of, const=0.0, metavar="SECONDS")
    parser.add_argument("--windows", help=windows, **optional)
    ways = parser.add_mutually_exclusive_group()
    for name in FORMATS[1:]:
        ways.add_argument(f"--{name}", dest="show", action="store_const", const=name)
    parser.add_argument("--weights", default="params", choices=("params", "ema"))
    parser.set_defaults(show="table")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    given, failed = parse(argv), []
    commandline.quiet_libraries()
    try:
        rows, model = (
            clips.listed(given.clips),
            api.load(given.checkpoint, given.weights),
        )
        if given.windows == 0.0:
            given.windows = model.window_seconds
        model.check_classifier()
        found = each(model, rows, given, failed)
        SHOW[given.show](found)
    except (UserError, DataError) as error:
        commandline.stop(error)
    if failed:
        print(f"{len(failed)} of {len(rows)} clips passed over", file=sys.stderr)
    return 2 if len(failed) == len(rows) else int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
