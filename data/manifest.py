"""A folder or a CSV of clips → rows: which file, which part of it, labels, split.

Folder with one sub-folder per class: the label of a clip is the name of the top-level
sub-folder it lies in, at whatever depth. A flat folder has no labels. Where both occur,
files beside the class folders are clips without a label. Where there are two
sub-folders or more and each is called train, validation (val, valid) or test, they are
splits, and the classes are the folders inside. Files are known as media by their
suffix; others, and hidden ones, are passed over and listed in `Manifest.passed_over`.

CSV: a header `path,start,end,label,split` of which only `path` must be there. Paths are
relative to the CSV's folder and stay inside it; `start` and `end` are seconds; several
labels are separated by `|`; an empty field is as good as none. Instead of `label` there
may be columns `label_verb`, `label_noun`, … for labels of several kinds ("heads"), of
which each clip has one of each.

Whether a file can be decoded, or in a CSV is there at all, is found out by prepare.
"""

import csv
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from data import ManifestError

COLUMNS = ("path", "start", "end", "label", "split")
HEAD = "label_"  # and the name of a kind of labels: such a column
SPLITS = ("train", "validation", "test")
SPLIT_FOLDERS = {x: x for x in SPLITS} | {"val": "validation", "valid": "validation"}
PICTURE_SUFFIXES = """
    3g2 3gp asf avi divx dv f4v flv gif ivf m2ts m2v m4v mjpeg mjpg mkv mov mp4 mpe mpeg
    mpg mts mxf nut ogm ogv qt rm rmvb ts vob webm wmv y4m"""
SOUND_SUFFIXES = """
    aac ac3 aif aifc aiff amr au caf eac3 flac m4a m4b mka mp2 mp3 oga ogg opus spx tta
    wav wma wv"""
SUFFIXES = frozenset(f".{x}" for x in (PICTURE_SUFFIXES + SOUND_SUFFIXES).split())


class Row(NamedTuple):
    """One clip: a file or, with `start` or `end` (seconds), a part of one.

    `id` is the path relative to the source (POSIX), plus `@start-end` when cut.
    `split` is None where the source names none. With `heads`, `labels` has one of each
    of these kinds, in their order. `perhaps_cut`: the file may be that part already,
    which its length tells.
    """

    path: Path
    id: str
    start: float | None = None
    end: float | None = None
    labels: tuple[str, ...] = ()
    split: str | None = None
    heads: tuple[str, ...] = ()
    perhaps_cut: bool = False


class Missing(NamedTuple):
    """A clip that is listed, but whose file is not there."""

    id: str
    split: str


class Manifest(NamedTuple):
    """The clips of a source, and the files in it (relative paths) that are no media.

    Of a public data set (data/published.py) also `labels`, the names of its classes in
    their order or {head: names}, `missing`, what its lists name and the folder lacks,
    and `listed`, {split: number of clips that its lists name}.
    """

    rows: list[Row]
    passed_over: list[str]
    labels: list[str] | dict[str, list[str]] | None = None
    missing: tuple[Missing, ...] | list[Missing] = ()
    listed: dict[str, int] | None = None


def rows(source) -> list[Row]:
    """The clips of a folder (sorted by id) or a CSV (in its order); see `read`."""
    return read(source).rows


def read(source) -> Manifest:
    """Reads a folder or a CSV; ManifestError where it is no usable list of clips."""
    source = Path(source)
    if source.is_dir():
        return _read_folder(source)
    if source.is_file() and source.suffix.lower() == ".csv":
        return Manifest(_read_csv(source), [])
    what = "is neither a folder nor a .csv file" if source.exists() else "is not there"
    raise ManifestError(f"{source} {what}; give a folder of clips or a CSV of them.")


def make_id(relative: str, start: float | None, end: float | None) -> str:
    """The id of a clip: 'a/b.mp4', cut 'a/b.mp4@1.5-3', to the end 'a/b.mp4@1.5-'."""
    text = os.fsencode(relative).decode("utf-8", "backslashreplace")
    if start is None and end is None:
        return text
    until = "" if end is None else f"{end:.15g}"
    return f"{text}@{start or 0.0:.15g}-{until}"


# ------------------------------------------------------------------------------ folder


def _read_folder(folder: Path) -> Manifest:
    media, others = [], []
    for relative in _files(folder):
        (media if _is_media(relative) else others).append(relative)
    if not media:
        raise ManifestError(
            f"{folder} holds no media file ({len(others)} others were passed over); "
            "give the folder that holds the clips or their class folders."
        )
    tops = {parts[0] for x in media if len(parts := x.split("/")) > 1}
    as_splits = len(tops) > 1 and tops <= SPLIT_FOLDERS.keys()
    found = [_folder_row(folder, relative, as_splits) for relative in media]
    return Manifest(sorted(found, key=lambda row: row.id), sorted(others))


def _files(folder: Path) -> Iterator[str]:
    """POSIX paths below a folder. Links to folders are followed, each folder once."""
    seen = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(x for x in folders if not x.startswith("."))
        for name in files:
            yield Path(os.path.relpath(os.path.join(place, name), folder)).as_posix()


def media_files(folder: Path) -> list[str]:
    """POSIX paths of the media files below a folder, hidden ones passed over."""
    return [relative for relative in _files(folder) if _is_media(relative)]


def has_picture(name: str) -> bool:
    """Whether the suffix of a media file is one of pictures, not of sound alone."""
    return os.path.splitext(name)[1].lower()[1:] in PICTURE_SUFFIXES.split()


def _is_media(relative: str) -> bool:
    name = relative.rsplit("/", 1)[-1]
    return os.path.splitext(name)[1].lower() in SUFFIXES and not name.startswith(".")


def _folder_row(folder: Path, relative: str, as_splits: bool) -> Row:
    *folders, _ = relative.split("/")
    split = SPLIT_FOLDERS[folders.pop(0)] if as_splits and folders else None
    labels = tuple(make_id(name, None, None) for name in folders[:1])
    return Row(
        folder / relative, make_id(relative, None, None), labels=labels, split=split
    )


# --------------------------------------------------------------------------------- CSV


def _read_csv(path: Path) -> list[Row]:
    found, lines = [], {}
    for line, fields in _csv_lines(path):
        row = _csv_row(path, line, fields)
        if row.id in lines:
            raise ManifestError(
                f"{path}, line {line}, field path: the clip {row.id!r} is on line "
                f"{lines[row.id]} already; list each clip once."
            )
        lines[row.id] = line
        found.append(row)
    if not found:
        raise ManifestError(f"{path} lists no clip; give one a line below the header.")
    return found


def _csv_lines(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """(line number, {column: stripped text}) of each line below the header."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = _check_header(path, next(reader, []))
            for values in reader:
                if not any(value.strip() for value in values):
                    continue
                if len(values) != len(header):
                    raise ManifestError(
                        f"{path}, line {reader.line_num}: there are {len(values)} "
                        f"fields where the header names {len(header)} "
                        f"({','.join(header)}); "
                        "put quotes around a field that holds a comma."
                    )
                fields = (value.strip() for value in values)
                yield reader.line_num, dict(zip(header, fields, strict=True))
        except (csv.Error, UnicodeDecodeError) as error:
            raise ManifestError(
                f"{path}, after line {reader.line_num}: is not CSV in UTF-8 ({error}); "
                "save it as such."
            ) from None


def _check_header(path: Path, header: list[str]) -> list[str]:
    header = [name.strip() for name in header]
    heads = [name for name in header if name.startswith(HEAD) and name != HEAD]
    unknown = [name for name in header if name not in (*COLUMNS, *heads)]
    mixed = heads and "label" in header
    if "path" not in header or unknown or mixed or len(set(header)) < len(header):
        raise ManifestError(
            f"{path}, line 1: the header is {','.join(header)!r}; it must name path "
            f"and may name the others of {','.join(COLUMNS)} (or, instead of label, "
            "label_verb, label_noun, …), each once."
        )
    return header


def _csv_row(path: Path, line: int, fields: dict[str, str]) -> Row:
    where = f"{path}, line {line}, field"
    relative = _inside(path.parent, fields["path"], f"{where} path")
    start = _seconds(fields.get("start", ""), f"{where} start")
    end = _seconds(fields.get("end", ""), f"{where} end")
    if end is not None and end <= (start or 0.0):
        raise ManifestError(
            f"{where} end: {end:g} is not after the start, {start or 0.0:g}; "
            "give seconds with start < end."
        )
    labels = _labels(fields.get("label", ""), f"{where} label")
    heads = tuple(name.removeprefix(HEAD) for name in fields if name.startswith(HEAD))
    for head in heads:
        if not fields[HEAD + head]:
            raise ManifestError(
                f"{where} {HEAD}{head}: is empty; each clip has a label of each kind."
            )
        labels += (fields[HEAD + head],)
    split = fields.get("split") or None
    if split is not None and split not in SPLITS:
        raise ManifestError(
            f"{where} split: {split!r} is unknown; use one of {', '.join(SPLITS)}."
        )
    clip_id = make_id(relative, start, end)
    return Row(path.parent / relative, clip_id, start, end, labels, split, heads)


def _inside(folder: Path, text: str, where: str) -> str:
    """The POSIX path relative to `folder`, which it may not leave (by `..` or by root).

    Links are not looked through: a link in the folder may lead to clips elsewhere.
    """
    if not text or "\0" in text:
        raise ManifestError(f"{where}: {text!r} is no path; name a file.")
    root = os.path.abspath(folder)
    full = os.path.normpath(os.path.join(root, text))
    if os.path.commonpath([root, full]) != root or full == root:
        raise ManifestError(
            f"{where}: {text!r} does not lie in the folder of the CSV ({root}); move "
            "the CSV above its clips, or link them into its folder."
        )
    return Path(os.path.relpath(full, root)).as_posix()


def _seconds(text: str, where: str) -> float | None:
    if not text:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0.0 <= seconds < math.inf:
        raise ManifestError(f"{where}: {text!r} is no time; give seconds from 0 on.")
    return seconds


def _labels(text: str, where: str) -> tuple[str, ...]:
    if not text:
        return ()
    labels = tuple(label.strip() for label in text.split("|"))
    if "" in labels or len(set(labels)) < len(labels):
        raise ManifestError(
            f"{where}: {text!r} holds an empty label or one twice; give each once, "
            "separated by |."
        )
    return labels
