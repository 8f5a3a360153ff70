"""Writes features of clips into one file: batched, resumable, with the clips' ids.

    python -m av_mae.extract runs/pretrain CLIPS --out features.npz
    python -m av_mae.extract runs/finetune CLIPS --out features.parquet \\
        --layer 8 --every 2

CLIPS are media files, folders, or CSVs as data.prepare takes them. FILE.npz and
FILE.safetensors hold rows of `rgb`, `spectrogram` and `joint`, float32 [rows d] (with
--pool none `rgb` and `spectrogram` [rows n d]), NaN where a clip lacks the modality,
and `start`, `end` [rows] in seconds; `id` and `label` are arrays of strings in .npz, in
.safetensors JSON lists in the header's metadata, whose `settings` say how all was made.
FILE.parquet has the same as columns (needs pyarrow). `av_mae.extract.read` reads them.

With --every SECONDS a row is a window. A run that was stopped goes on where it was:
what is done lies in FILE.parts until the end. Clips that cannot be read are reported
and passed over; the exit status is then 1 (2 where nothing could be done).
"""

import argparse
import dataclasses
import functools
import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import rich.console
import rich.progress

from av_mae import MODALITIES, UserError, api, clips, commandline, representation
from av_mae.predict import modalities_of
from data import DataError

CLIPS_A_PART = 64  # clips after which what is done is kept
ARRAYS = (*MODALITIES, "joint")


class ExtractError(UserError):
    """Features cannot be written or read; the sentence names the file."""


@dataclasses.dataclass
class Table:
    """Features by row. settings: how they were made.

    ids, labels: of the clip of each row ("" without label; several are joined by |);
    start, end: float64 [rows], seconds; arrays: float32 by name of ARRAYS,
    [rows d] or [rows n d], NaN where the clip lacks the modality.
    """

    ids: list[str]
    labels: list[str]
    start: np.ndarray
    end: np.ndarray
    arrays: dict[str, np.ndarray]
    settings: dict = dataclasses.field(default_factory=dict)


# What is extracted.


def extract(
    model: api.Model,
    rows: list,
    out: Path,
    *,
    layer: int = -1,
    pool: str = "mean",
    every: float | None = None,
    modalities: tuple[str, ...] | None = None,
    tell: Callable[[str], None] = print,
) -> list[str]:
    """Writes the features of `rows` (clips.listed) into `out`; returns what failed.

    tell: is given a sentence for each clip that is passed over. Raises ExtractError
    where `out` is of another kind, or holds or was to hold something else.
    """
    writer = writer_of(out)
    settings = dict(model=_checksum(model), layer=layer, pool=pool, every=every)
    settings["modalities"] = list(modalities or model.modalities)
    settings["clips"] = _digest(repr([row.id for row in rows]).encode())
    if out.exists():
        table = read(out)
        _check_settings(out, table.settings, settings)
        written = set(table.ids)
        failed = [row.id for row in rows if row.id not in written]
        for name in failed:
            tell(f"passed over: {name}, as before; delete {out} to try it again.")
        return failed
    parts = Parts(out, settings)
    failed: list[str] = []
    todo = [row for row in rows if row.id not in parts.done]

    def passed_over(number: int, error: Exception):
        failed.append(todo[number].id)
        tell(f"passed over: {error}")

    how = dict(layer=layer, pool=pool, modalities=modalities, every=every)
    sources = (_source(model, row) for row in todo)
    found = model.stream_features(sources, failed=passed_over, **how)
    with _progress() as progress:
        bar = progress.add_task("clips", total=len(rows), completed=len(parts.done))
        for number, features in found:
            parts.add(todo[number], features if every is not None else [features])
            progress.update(bar, completed=len(parts.done) + len(failed))
    parts.keep()
    table = parts.table(rows)
    if table.ids:
        writer(out, table)
        shutil.rmtree(parts.folder)
    return failed


def _source(model: api.Model, row):
    """A path, or what has to be cut out of a file and is read when it is asked for."""
    if row.start is None and row.end is None:
        return row.path
    return functools.partial(model.read, row.path, row.start, row.end)


def _progress() -> rich.progress.Progress:
    columns = (
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TextColumn("clips"),
        rich.progress.TimeRemainingColumn(),
    )
    console = rich.console.Console(stderr=True)
    return rich.progress.Progress(*columns, console=console)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _checksum(model: api.Model) -> str:
    """Of all parameters."""
    sha = hashlib.sha256()
    for leaf in jax.tree.leaves(model.params):
        sha.update(np.ascontiguousarray(leaf).tobytes())
    return sha.hexdigest()[:16]


def _check_settings(path: Path, found: dict, wanted: dict):
    differing = [name for name in wanted if found.get(name) != wanted[name]]
    if differing:
        raise ExtractError(
            f"{path} holds features made otherwise ({', '.join(differing)} differ): "
            "delete it, or give another --out."
        )


class Parts:
    """What is done already, in FILE.parts: a few clips a file, written whole."""

    def __init__(self, out: Path, settings: dict):
        self.folder, self.settings = out.with_name(out.name + ".parts"), settings
        self.folder.mkdir(parents=True, exist_ok=True)
        known = self.folder / "settings.json"
        if known.exists():
            stored = json.loads(known.read_text(encoding="utf-8"))
            _check_settings(self.folder, stored, settings)
        else:
            known.write_text(json.dumps(settings), encoding="utf-8")
        self.tables = [_read_npz(path) for path in sorted(self.folder.glob("*.npz"))]
        self.done = {name for table in self.tables for name in table.ids}
        self._held: list[tuple] = []

    def add(self, row, features: list[api.Features]):
        """Takes the features of a clip, one for each of its windows."""
        self._held.append((row, features))
        self.done.add(row.id)
        if len(self._held) >= CLIPS_A_PART:
            self.keep()

    def keep(self):
        """Writes what is held."""
        if not self._held:
            return
        pairs = [(row, one) for row, features in self._held for one in features]
        table = Table(
            ids=[row.id for row, _ in pairs],
            labels=["|".join(row.labels) for row, _ in pairs],
            start=np.array([one.start for _, one in pairs]),
            end=np.array([one.end for _, one in pairs]),
            arrays=_stacked([one for _, one in pairs], self.settings),
            settings=self.settings,
        )
        path = self.folder / f"{len(self.tables):06d}.npz"
        _write_npz(path.with_suffix(".new"), table)
        path.with_suffix(".new").rename(path)
        self.tables.append(table)
        self._held = []

    def table(self, rows: list) -> Table:
        """All of it, in the order of `rows`."""
        tables, place = self.tables, {row.id: i for i, row in enumerate(rows)}
        ids = [name for table in tables for name in table.ids]
        order = sorted(range(len(ids)), key=lambda i: place[ids[i]])
        labels = [name for table in tables for name in table.labels]
        join = lambda values: np.concatenate(values)[order] if ids else np.zeros(0)
        names = [m for m in ARRAYS if any(m in table.arrays for table in tables)]
        shapes = {
            m: next(t.arrays[m].shape[1:] for t in tables if m in t.arrays)
            for m in names
        }
        lacking = lambda t, m: np.full((len(t.ids), *shapes[m]), np.nan, np.float32)
        arrays = {
            m: join([t.arrays.get(m, lacking(t, m)) for t in tables]) for m in names
        }
        return Table(
            ids=[ids[i] for i in order],
            labels=[labels[i] for i in order],
            start=join([table.start for table in tables]),
            end=join([table.end for table in tables]),
            arrays=arrays,
            settings=self.settings,
        )


def _stacked(features: list[api.Features], settings: dict) -> dict[str, np.ndarray]:
    """{m: [rows …]}, NaN where a clip lacks m; no `joint` of tokens."""
    arrays = {}
    for m in ARRAYS:
        shape = next((one[m].shape for one in features if m in one), None)
        if shape is None or (m == "joint" and settings["pool"] == "none"):
            continue
        lacking = np.full(shape, np.nan, np.float32)
        arrays[m] = np.stack([one.get(m, lacking) for one in features]).astype("f4")
    return arrays


# Files.


def _write_npz(path: Path, table: Table):
    with path.open("wb") as file:
        np.savez(
            file,
            id=np.array(table.ids, dtype=str),
            label=np.array(table.labels, dtype=str),
            start=table.start,
            end=table.end,
            settings=np.array(json.dumps(table.settings)),
            **table.arrays,
        )


def _read_npz(path: Path) -> Table:
    with np.load(path) as found:
        arrays = {m: found[m] for m in ARRAYS if m in found}
        return Table(
            found["id"].tolist(),
            found["label"].tolist(),
            *(found["start"], found["end"], arrays),
            json.loads(str(found["settings"])),
        )


def _write_safetensors(path: Path, table: Table):
    from safetensors.numpy import save_file

    told = {"id": table.ids, "label": table.labels, "settings": table.settings}
    metadata = {name: json.dumps(value) for name, value in told.items()}
    arrays = dict(table.arrays, start=table.start, end=table.end)
    arrays = {name: np.ascontiguousarray(x) for name, x in arrays.items()}
    save_file(arrays, path, metadata=metadata)


def _read_safetensors(path: Path) -> Table:
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        told = {name: json.loads(text) for name, text in file.metadata().items()}
        arrays = {name: file.get_tensor(name) for name in file.keys()}
    start, end = arrays.pop("start"), arrays.pop("end")
    arrays = {m: arrays[m] for m in ARRAYS if m in arrays}
    return Table(told["id"], told["label"], start, end, arrays, told["settings"])


def _parquet():
    """pyarrow, which comes with TensorFlow Datasets; ExtractError without it."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ExtractError(
            ".parquet needs pyarrow, which is not installed: `pip install pyarrow`, or "
            "write .npz or .safetensors."
        ) from error
    return pyarrow


def _write_parquet(path: Path, table: Table):
    pyarrow = _parquet()
    columns = {"id": pyarrow.array(table.ids), "label": pyarrow.array(table.labels)}
    columns |= {"start": pyarrow.array(table.start), "end": pyarrow.array(table.end)}
    shapes = {}
    for m, x in table.arrays.items():
        shapes[m] = x.shape[1:]
        size = int(np.prod(shapes[m]))
        flat = pyarrow.array(x.reshape(-1))
        columns[m] = pyarrow.FixedSizeListArray.from_arrays(flat, size)
    told = {"settings": json.dumps(table.settings), "shapes": json.dumps(shapes)}
    found = pyarrow.table(columns).replace_schema_metadata(told)
    pyarrow.parquet.write_table(found, path)


def _read_parquet(path: Path) -> Table:
    found = _parquet().parquet.read_table(path)
    told = {k.decode(): json.loads(v) for k, v in found.schema.metadata.items()}
    arrays = {}
    for m, shape in told["shapes"].items():
        flat = found[m].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        arrays[m] = flat.astype(np.float32).reshape(-1, *shape)
    return Table(
        found["id"].to_pylist(),
        found["label"].to_pylist(),
        *(found["start"].to_numpy(), found["end"].to_numpy(), arrays),
        told["settings"],
    )


FILES = {
    ".npz": (_write_npz, _read_npz),
    ".safetensors": (_write_safetensors, _read_safetensors),
    ".parquet": (_write_parquet, _read_parquet),
}


def writer_of(path: Path) -> Callable[[Path, Table], None]:
    """The function that writes such a file; ExtractError for a suffix of no kind."""
    if path.suffix not in FILES:
        raise ExtractError(
            f"--out {path} has none of the suffixes {', '.join(FILES)}: choose one."
        )
    if path.suffix == ".parquet":
        _parquet()
    return FILES[path.suffix][0]


def read(path: Path | str) -> Table:
    """The features in a file that this command wrote.

    Raises ExtractError where it is no such file.
    """
    path = Path(path)
    writer_of(path)
    try:
        return FILES[path.suffix][1](path)
    except ExtractError:
        raise
    except Exception as error:  # each of three libraries has its own
        raise ExtractError(
            f"{path} is no file of features that av_mae.extract wrote ({error!r}): "
            "extract them again."
        ) from error


# The command.


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m av_mae.extract",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument("clips", nargs="+", metavar="CLIPS")
    out = "FILE.npz, .safetensors or .parquet"
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help=out)
    layer = "from 0, or from -1 (the last, which is the default)"
    parser.add_argument("--layer", type=int, default=-1, help=layer)
    parser.add_argument("--pool", choices=representation.POOLS, default="mean")
    parser.add_argument(
        "--every", type=float, metavar="SECONDS", help="extract windows"
    )
    parser.add_argument("--modalities", type=modalities_of)
    parser.add_argument("--weights", default="params", choices=("params", "ema"))
    return parser.parse_args(argv)


def main(argv=None) -> int:
    given = parse(argv)
    commandline.quiet_libraries()
    names = ("layer", "pool", "every", "modalities")
    try:
        writer_of(given.out)
        rows = clips.listed(given.clips)
        model = api.load(given.checkpoint, given.weights)
        options = {name: getattr(given, name) for name in names}
        tell = lambda text: print(text, file=sys.stderr)
        failed = extract(model, rows, given.out, tell=tell, **options)
    except (UserError, DataError) as error:
        commandline.stop(error)
    if failed:
        print(f"{len(failed)} of {len(rows)} clips passed over", file=sys.stderr)
    if len(failed) == len(rows):
        return 2
    table = read(given.out)
    widths = ", ".join(f"{m} {x.shape[1:]}" for m, x in table.arrays.items())
    clips_done = len(set(table.ids))
    print(f"{given.out}: {len(table.ids)} rows of {clips_done} clips: {widths}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
