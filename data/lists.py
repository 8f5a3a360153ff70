"""The lists of public data sets, each in the format in which it is published.

Names of classes, in the published order, are in `data/labels/`, one a line; where they
come from is in data/README.md.
"""

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from data import ManifestError, manifest

LABELS = Path(__file__).parent / "labels"
HEADS = ("verb", "noun")  # of EPIC-KITCHENS
UCF_LINE = re.compile(r"(\S+?/)?(v_(\w+)_g\d+_c\d+)(?:\.avi)?(?:\s+\d+)?")


class Clip(NamedTuple):
    """A clip of a list: the file `name`, or its part from `start` to `end` seconds."""

    id: str
    split: str
    labels: tuple[str, ...]
    name: str
    start: float | None = None
    end: float | None = None


class Dataset(NamedTuple):
    """How to read a data set's lists, and the picture that is usual for it."""

    read: Callable  # (lists, number) → (clips, names of classes)
    preset: dict
    numbers: int = 1  # of published splits or folds
    any_case: bool = False  # names of files are compared without regard to case
    uncut: bool = False  # a file with a video's name is never a part of it


def class_names(dataset: str) -> list[str] | dict[str, list[str]]:
    """Names of the classes of a public data set in their published order.

    {head: names} for EPIC-KITCHENS-100. KeyError for an unknown data set.
    """
    name = {"audioset20k": "audioset", "audioset500k": "audioset"}.get(dataset, dataset)
    if dataset not in DATASETS:
        raise KeyError(dataset)
    if dataset == "epic-kitchens-100":
        return {head: _label_file(f"{name}_{head}") for head in HEADS}
    return _label_file(name)


def _label_file(name: str) -> list[str]:
    return (LABELS / f"{name}.txt").read_text(encoding="utf-8").splitlines()


# ----------------------------------------------------------------- any kind of list


def _pick(lists: Path, patterns: Iterable[str], needed: bool = True) -> Path | None:
    """The list with one of these names in a folder; a file given itself is it."""
    if lists.is_file():
        return lists
    for pattern in patterns:
        found = sorted(path for path in lists.rglob(pattern) if path.is_file())
        if found:
            return found[0]
    if needed:
        raise ManifestError(
            f"{lists}: holds no {' or '.join(patterns)}; give the folder of the lists "
            "under their published names."
        )
    return None


def _table(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, dict]]:
    """(line, fields) of a CSV; one without its header has `columns`.

    Lines that begin with # are comments; a space may come after a comma.
    """
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, skipinitialspace=True)
        header = None
        try:
            for values in reader:
                if not any(values) or values[0].startswith("#"):
                    continue
                values = [value.strip() for value in values]
                if header is None:
                    header = values if set(columns) & set(values) else list(columns)
                    if header is values:
                        continue
                if len(values) < len(header):
                    raise ManifestError(
                        f"{path}, line {reader.line_num}: has {len(values)} fields, "
                        f"not {len(header)} ({','.join(header)}); take the list as "
                        "it is published."
                    )
                yield reader.line_num, dict(zip(header, values, strict=False))
        except (csv.Error, UnicodeDecodeError) as error:
            raise ManifestError(
                f"{path}, after line {reader.line_num}: is not CSV ({error}); take the "
                "list as it is published."
            ) from None


def _field(fields: dict, path: Path, line: int, *names: str) -> str:
    for name in names:
        if name in fields:
            return fields[name]
    raise ManifestError(
        f"{path}, line {line}: has no {' or '.join(names)}; take the list as published."
    )


def _seconds(text: str, path: Path, line: int) -> float:
    """Seconds, also as hours:minutes:seconds."""
    try:
        value = 0.0
        for part in text.split(":"):
            value = 60 * value + float(part)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e6:
        raise ManifestError(f"{path}, line {line}: {text!r} is no time in seconds.")
    return value


def _known(label: str, names: Iterable[str], path: Path, line: int | str) -> str:
    if label not in names:
        raise ManifestError(
            f"{path}, line {line}: {label!r} is no class of the data set; take the "
            "list as it is published."
        )
    return label


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ManifestError(f"{path}: is no text in UTF-8 ({error}).") from None


# ---------------------------------------------------------------------------- AudioSet

SEGMENTS = ("YTID", "start_seconds", "end_seconds", "positive_labels")


def _audioset(train: tuple[str, ...]):
    """A reader whose training clips are those of the lists `train`."""

    def read(lists: Path, _: int) -> tuple[Iterator[Clip], list[str]]:
        names, by_mid = _audioset_classes(lists)
        evaluation = _segments_list(lists, "eval", needed=False)
        paths = [(path, "train") for kind in train if (path := _training(lists, kind))]
        if evaluation and not lists.is_file():
            paths.append((evaluation, "test"))
        if lists.is_file():
            kind = "test" if "eval" in lists.name else "train"
            paths = [(lists, kind)]
        if not paths:
            files = ", ".join(f"{kind}_segments.csv" for kind in train)
            raise ManifestError(
                f"{lists}: holds none of {files}; give the folder of AudioSet's lists."
            )
        clips = (c for path, s in paths for c in _segments(path, s, by_mid, lists))
        return clips, names

    return read


def _training(lists: Path, kind: str) -> Path | None:
    return _segments_list(lists, kind, needed=False)


def _segments_list(lists: Path, kind: str, needed: bool) -> Path | None:
    patterns = {
        "eval": ["eval_segments*.csv", "*eval*.csv"],
        "balanced_train": ["balanced_train_segments*.csv", "balanced_train*.csv"],
        "unbalanced_train": ["unbalanced_train_segments*.csv", "unbalanced_train*.csv"],
        "balanced_500k": ["*500k*", "*500K*"],
    }
    return _pick(lists, patterns[kind], needed)


def _audioset_classes(lists: Path) -> tuple[list[str], dict[str, str]]:
    """The 527 names, and the name of each mid; of the list's folder if it is there."""
    folder = lists.parent if lists.is_file() else lists
    path = _pick(folder, ["class_labels_indices.csv"], needed=False)
    if path is None:
        names, mids = _label_file("audioset"), _label_file("audioset_mids")
        return names, dict(zip(mids, names, strict=True))
    rows = list(_table(path, ("index", "mid", "display_name")))
    order = sorted(int(_field(fields, path, i, "index")) for i, fields in rows)
    if order != list(range(len(rows))):
        raise ManifestError(f"{path}: its column index is not 0 to {len(rows) - 1}.")
    rows.sort(key=lambda row: int(row[1]["index"]))
    names = [_field(fields, path, i, "display_name") for i, fields in rows]
    mids = [_field(fields, path, i, "mid") for i, fields in rows]
    return names, dict(zip(mids, names, strict=True))


def _segments(path: Path, split: str, by_mid: dict, lists: Path) -> Iterator[Clip]:
    """Of `# comments` and `YTID, start, end, "mid,mid"`; of bare ids where a list has
    nothing else, whose times and labels the other lists of the folder know."""
    first = next((x for x in _lines(path) if x.strip() and not x.startswith("#")), "")
    if "," not in first:
        yield from _segments_of_ids(path, split, by_mid, lists)
        return
    for line, fields in _table(path, SEGMENTS):
        video = fields["YTID"]
        start = _seconds(fields["start_seconds"], path, line)
        end = _seconds(fields["end_seconds"], path, line)
        mids = [mid for mid in fields["positive_labels"].split(",") if mid]
        for mid in mids:
            _known(mid, by_mid, path, line)
        labels = tuple(dict.fromkeys(by_mid[mid] for mid in mids))
        yield Clip(_dated(video, start), split, labels, video, start, end)


def _segments_of_ids(path: Path, split, by_mid, lists: Path) -> Iterator[Clip]:
    wanted = {re.sub(r"\.\w+$", "", line.strip()) for line in _lines(path)} - {""}
    folder = lists.parent if lists.is_file() else lists
    for kind in ("balanced_train", "unbalanced_train"):
        other = _segments_list(folder, kind, needed=True)
        for clip in _segments(other, split, by_mid, folder):
            if clip.name in wanted:
                wanted.discard(clip.name)
                yield clip
    if wanted:
        raise ManifestError(
            f"{path}: {len(wanted)} ids, such as {min(wanted)}, are in neither list of "
            "training segments; take AudioSet's own."
        )


def _dated(video: str, *times: float) -> str:
    """`ID_000030`; a time that is no whole second keeps its fraction."""
    parts = (f"{t:06.0f}" if t == int(t) else f"{t:g}" for t in times)
    return "_".join((video, *parts))


# --------------------------------------------------------------------------- the others


def _vggsound(lists: Path, _: int) -> tuple[Iterator[Clip], list[str]]:
    """Of `ID,start,"label, with commas",split`; a clip lasts 10 s."""
    path, names = _pick(lists, ["vggsound.csv", "*.csv"]), class_names("vggsound")
    known = set(names)

    def clips():
        for line, fields in _table(path, ("id", "start", "label", "split")):
            start = _seconds(fields["start"], path, line)
            split = _split(fields["split"], path, line)
            label, video = _known(fields["label"], known, path, line), fields["id"]
            times = (start, start + 10.0)
            yield Clip(_dated(video, start), split, (label,), video, *times)

    return clips(), names


def _split(text: str, path: Path, line: int) -> str:
    name = {"val": "validation", "validate": "validation"}.get(text, text)
    if name not in manifest.SPLITS:
        raise ManifestError(f"{path}, line {line}: {text!r} is no split.")
    return name


def _ucf101(lists: Path, number: int) -> tuple[Iterator[Clip], list[str]]:
    """Of `Class/v_Class_g01_c01.avi 1`, in the test lists without the number."""
    classes = _pick(lists, ["classInd.txt"], needed=False) if lists.is_dir() else None
    names = class_names("ucf101")
    if classes:
        pairs = [line.split() for line in _lines(classes) if line.strip()]
        names = [name for _, name in sorted(pairs, key=lambda pair: int(pair[0]))]
    by_lower = {name.lower(): name for name in names}
    folder = lists.parent if lists.is_file() else lists
    files = {
        split: _pick(folder, [f"{word}list{number:02d}.txt"])
        for split, word in (("train", "train"), ("test", "test"))
    }

    def clips():
        for split, path in files.items():
            for line, text in enumerate(_lines(path), 1):
                if not text.strip():
                    continue
                found = UCF_LINE.fullmatch(text.strip())
                if not found:
                    raise ManifestError(f"{path}, line {line}: {text!r} names no clip.")
                label = _known(found[3].lower(), by_lower, path, line)
                name = by_lower[label]
                yield Clip(f"{name}/{found[2]}", split, (name,), found[2])

    return clips(), names


KINETICS = {
    "train": ["train.csv", "kinetics*train.csv", "*train*.csv"],
    "validation": ["val*.csv", "kinetics*val*.csv", "*val*.csv"],
    "test": ["test.csv", "kinetics*test.csv", "*test*.csv"],
}


def _kinetics400(lists: Path, _: int) -> tuple[Iterator[Clip], list[str]]:
    """Of `label,youtube_id,time_start,time_end,split[,is_cc]`; a test list without its
    labels is passed over."""
    names = class_names("kinetics400")
    spelt = {_plain(name): name for name in names}
    found = {split: _pick(lists, x, needed=False) for split, x in KINETICS.items()}
    paths = dict.fromkeys(path for path in found.values() if path)
    if not paths:
        raise ManifestError(f"{lists}: holds no train.csv, val.csv or test.csv.")
    columns = ("label", "youtube_id", "time_start", "time_end", "split")

    def clips():
        for path in paths:
            for line, fields in _table(path, columns):
                if not fields.get("label"):
                    break
                video = _field(fields, path, line, "youtube_id")
                times = (fields.get("time_start", ""), fields.get("time_end", ""))
                start, end = (_seconds(time, path, line) for time in times)
                label = _known(_plain(fields["label"]), spelt, path, line)
                split = _split(_field(fields, path, line, "split"), path, line)
                id = _dated(video, start, end)
                yield Clip(id, split, (spelt[label],), video, start, end)

    return clips(), names


def _plain(label: str) -> str:
    """A Kinetics label without what copies of the lists differ in."""
    return label.strip().strip('"').replace("_", " ").lower()


SSV2 = {
    "train": ["something-something-v2-train.json", "train.json", "*train.json"],
    "validation": [
        "something-something-v2-validation.json",
        "validation.json",
        "*val*.json",
    ],
}


def _ssv2(lists: Path, _: int) -> tuple[Iterator[Clip], list[str]]:
    """Of [{"id", "label", "template"}, …]: the class is the template without brackets.

    The test list has no labels and is left out.
    """
    names = class_names("ssv2")
    own = ["something-something-v2-labels.json", "labels.json"]
    classes = _pick(lists, own, needed=False) if lists.is_dir() else None
    if classes:
        places = _json(classes)
        names = sorted(places, key=lambda name: int(places[name]))
    known = set(names)
    paths = {split: _pick(lists, x) for split, x in SSV2.items()}
    if lists.is_file():
        paths = {"validation" if "val" in lists.name else "train": lists}

    def clips():
        for split, path in paths.items():
            for place, entry in enumerate(_json(path), 1):
                if not {"id", "template"} <= set(entry):
                    raise ManifestError(
                        f"{path}, entry {place}: has no id or no template; take the "
                        "list as it is published."
                    )
                label = entry["template"].replace("[", "").replace("]", "")
                label = _known(label, known, path, f"entry {place}")
                yield Clip(str(entry["id"]), split, (label,), str(entry["id"]))

    return clips(), names


def _json(path: Path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ManifestError(f"{path}: is not JSON ({error}).") from None


EPIC = {"train": "EPIC_100_train.csv", "validation": "EPIC_100_validation.csv"}


def _epic_kitchens_100(lists: Path, _: int) -> tuple[Iterator[Clip], dict]:
    """Of narrations in whole videos, with a verb and a noun each."""
    names = class_names("epic-kitchens-100")
    paths = {s: _pick(lists, [x], needed=False) for s, x in EPIC.items()}
    if lists.is_file():
        paths = {"validation" if "val" in lists.name else "train": lists}
    if not any(paths.values()):
        raise ManifestError(f"{lists}: holds neither {' nor '.join(EPIC.values())}.")

    def clips():
        for split, path in paths.items():
            for line, fields in _table(path, ("narration_id",)) if path else ():
                get = lambda *x, path=path, i=line, all=fields: _field(all, path, i, *x)
                labels = tuple(
                    _place(get(f"{head}_class"), names[head], path, line)
                    for head in HEADS
                )
                start = _seconds(get("start_timestamp"), path, line)
                end = _seconds(get("stop_timestamp"), path, line)
                id, video = get("narration_id"), get("video_id")
                yield Clip(id, split, labels, video, start, end)

    return clips(), names


def _place(text: str, names: list[str], path: Path, line: int) -> str:
    if not text.isdigit() or int(text) >= len(names):
        raise ManifestError(
            f"{path}, line {line}: there is no class {text!r}, only 0 to "
            f"{len(names) - 1}."
        )
    return names[int(text)]


def _esc50(lists: Path, fold: int) -> tuple[Iterator[Clip], list[str]]:
    """Of `filename,fold,target,category,…`: one fold is the test, the others train."""
    path, names = _pick(lists, ["esc50.csv"]), class_names("esc50")

    def clips():
        for line, fields in _table(path, ("filename",)):
            get = lambda *x, i=line, all=fields: _field(all, path, i, *x)
            category = fields.get("category_name") or get("category")
            label = _known(category, names, path, line)
            stem = Path(get("filename")).stem
            split = "test" if get("fold") == str(fold) else "train"
            yield Clip(stem, split, (label,), stem)

    return clips(), names


AS_USUAL = dict(fps=25.0, short_side=256)
AS_IT_IS = dict(fps="source", short_side="source")
DATASETS = {
    "audioset": Dataset(_audioset(("unbalanced_train", "balanced_train")), AS_USUAL),
    "audioset20k": Dataset(_audioset(("balanced_train",)), AS_USUAL),
    "audioset500k": Dataset(_audioset(("balanced_500k",)), AS_USUAL),
    "vggsound": Dataset(_vggsound, AS_USUAL),
    "ucf101": Dataset(_ucf101, AS_IT_IS, numbers=3, any_case=True),
    "kinetics400": Dataset(_kinetics400, dict(fps="source", short_side=320)),
    "ssv2": Dataset(_ssv2, AS_IT_IS),
    "epic-kitchens-100": Dataset(_epic_kitchens_100, AS_USUAL, uncut=True),
    "esc50": Dataset(_esc50, AS_USUAL, numbers=5),
}
