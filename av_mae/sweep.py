"""Trains every combination of some fields of a config, and tabulates the results.

    python -m av_mae.sweep --config=configs/digits/finetune.py --workdir=runs/fusion \\
        --grid model.bottlenecks=1,4,16 --grid probe=full,linear --seeds 5 \\
        --config.init_from.checkpoint_path=runs/pretrain

    python -m av_mae.sweep --config=configs/digits/finetune.py --seeds 3 \\
        --pretrain=configs/digits/pretrain.py --workdir=runs/objective \\
        --grid pretrain.model.fusion=early,mid --grid pretrain.mask.rgb.ratio=.75,.9

`--grid FIELD=A,B,…` names a field of the config, or with `pretrain.` before it one of
the pretraining config: each of its settings is pretrained first, and the finetunings
start from it. Values are written as in `--config.FIELD=VALUE`; commas within brackets
belong to a value. `--config.x=…` and `--pretrain.x=…` change all cells.

A cell is one run of `python -m av_mae.main` in a folder of its own; cells follow one
another. What is finished is not done again: give the command once more to go on. The
table is in WORKDIR/table.md and table.json: mean and 95 % interval over the seeds. A
cell that its config refuses, as a combination may not exist, stands there as failed.
"""

import argparse
import dataclasses
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from av_mae import TrainingError, UserError, commandline, loop

ROOT = Path(__file__).resolve().parents[1]
BEFORE = "pretrain."  # before a field of the pretraining config
Settings = tuple[tuple[str, str], ...]  # (field, value as it is typed)


@dataclasses.dataclass(frozen=True)
class Run:
    """One training: its config file, what is set in it, and its folder."""

    config: str
    settings: Settings
    folder: Path

    def command(self) -> list[str]:
        """What is given to `python -m av_mae.main`."""
        fields = [f"--config.{field}={value}" for field, value in self.settings]
        return [f"--config={self.config}", f"--workdir={self.folder}", *fields]


@dataclasses.dataclass(frozen=True)
class Cell:
    """One point of the grid with one seed: the run, after the one it starts from."""

    point: Settings
    seed: int
    runs: tuple[Run, ...]


def axis(text: str) -> tuple[str, list[str]]:
    """(field, values) of `FIELD=A,B`; commas within brackets or quotes part nothing."""
    field, equals, values = text.partition("=")
    parts = re.findall(
        r"""(?:[^,(\["']|\([^)]*\)|\[[^\]]*\]|"[^"]*"|'[^']*')+""", values
    )
    if not (field and equals and parts):
        raise UserError(
            f"--grid {text!r}: write FIELD=A,B as in --grid probe=full,linear."
        )
    return field, parts


def cells(
    config: str,
    grid: Sequence[tuple[str, Sequence[str]]],
    seeds: int,
    workdir: Path,
    common: Settings = (),
    pretrain: str = "",
) -> list[Cell]:
    """The cells, all points with the first seed first.

    common: settings of all cells; with `pretrain.` before them, of the pretraining.
    """
    if not pretrain and any(f.startswith(BEFORE) for f, _ in [*grid, *common]):
        raise UserError("a field of pretrain. is set: give --pretrain=CONFIG too.")
    points = itertools.product(*([(f, v) for v in values] for f, values in grid))
    pairs = itertools.product(range(seeds), list(points))
    return [_cell(config, pretrain, p, seed, workdir, common) for seed, p in pairs]


def _cell(config, pretrain, point, seed, workdir, common) -> Cell:
    own, before = _parts(point)
    common, common_before = _parts(common)
    seeded = (("seed", str(seed)),)
    runs, start = (), ()
    if pretrain:
        folder = workdir / "pretrain" / name(before) / f"seed {seed}"
        runs = (Run(pretrain, common_before + before + seeded, folder),)
        start = (("init_from.checkpoint_path", str(folder)),)
    folder = workdir / "runs" / name(point) / f"seed {seed}"
    runs += (Run(config, common + own + start + seeded, folder),)
    return Cell(point, seed, runs)


def _parts(settings: Settings) -> tuple[Settings, Settings]:
    """(of the config, of the pretraining config without its prefix)."""
    own = tuple(pair for pair in settings if not pair[0].startswith(BEFORE))
    before = ((f.removeprefix(BEFORE), v) for f, v in settings if f.startswith(BEFORE))
    return own, tuple(before)


def name(point: Settings) -> str:
    """A folder's name: `probe=full,model.pool=mean`; `all` where no field is set."""
    text = ",".join(f"{field}={value}" for field, value in point)
    return re.sub(r"[^\w.=,+-]", "_", text) or "all"


def run(cell: Cell) -> dict[str, float]:
    """Trains the cell; the numbers of its evaluation, or {"failed": sentence}.

    What is finished is only read. Raises TrainingError where SIGTERM ended a training,
    UserError for a folder of another sweep.
    """
    for training in cell.runs:
        result = finish(training)
        if "failed" in result:
            return result
    return result


def finish(training: Run) -> dict:
    """What evaluation gave; read from the folder's result.json once it is there."""
    command, file = training.command(), training.folder / "result.json"
    if file.exists():
        found = json.loads(file.read_text(encoding="utf-8"))
        if found["command"] != command:
            raise UserError(
                f"{training.folder} holds a run of another command: give another "
                f"--workdir, or remove it. It was: {' '.join(found['command'])}"
            )
        return found["result"]
    start = time.monotonic()
    training.folder.mkdir(parents=True, exist_ok=True)
    code = _train(command, training.folder / "log.txt")
    log = (training.folder / "log.txt").read_text(encoding="utf-8", errors="replace")
    if "stopped by SIGTERM after step" in log or code < 0:
        raise TrainingError(f"{training.folder} was stopped: give the command again.")
    if code == 2:  # a sentence for the user: the combination does not exist
        result = {"failed": log.strip().splitlines()[-1].removeprefix("error: ")}
    elif code:
        raise TrainingError(f"the run failed: read {training.folder / 'log.txt'}.")
    else:
        result = evaluation(training.folder)
    seconds = time.monotonic() - start
    text = json.dumps({"command": command, "seconds": seconds, "result": result})
    temporary = file.with_suffix(".tmp")
    temporary.write_text(text + "\n", encoding="utf-8")
    os.replace(temporary, file)  # whole or not at all
    return result


def _train(command: list[str], log: Path) -> int:
    """Runs `python -m av_mae.main`, its words into `log`; SIGTERM goes on to it."""
    with open(log, "w", encoding="utf-8") as file:
        child = subprocess.Popen(
            [sys.executable, "-m", "av_mae.main", *command],
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
        old = signal.signal(signal.SIGTERM, lambda number, frame: child.terminate())
        try:
            return child.wait()
        finally:
            signal.signal(signal.SIGTERM, old)


def evaluation(folder: Path) -> dict[str, float]:
    """The numbers of a run's last evaluation, without the `eval/` before them."""
    lines = (folder / loop.METRICS).read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if any("eval/" in k for k in row)]
    if not rows:
        raise TrainingError(f"{folder} holds no evaluation: see eval.every_epochs.")
    return {
        k.removeprefix("eval/"): v for k, v in rows[-1].items() if k.startswith("eval/")
    }


def interval(values: Sequence[float]) -> tuple[float, float]:
    """(mean, half the width of its 95 % interval by Student's t), NaN for one value."""
    from scipy.stats import t

    n = len(values)
    if n < 2:
        return float(np.mean(values)), math.nan
    half = t.ppf(0.975, n - 1) * np.std(values, ddof=1) / math.sqrt(n)
    return float(np.mean(values)), float(half)


def summary(results: Sequence[tuple[Cell, Mapping]]) -> list[dict]:
    """A row for each point: its fields, its number of seeds, metrics and failures."""
    points: dict[Settings, list[Mapping]] = {}
    for cell, result in results:
        points.setdefault(cell.point, []).append(result)
    rows = []
    for point, found in points.items():
        failed = [result["failed"] for result in found if "failed" in result]
        good = [result for result in found if "failed" not in result]
        numbers = {}
        for metric in good[0] if good else ():
            values = [result[metric] for result in good]
            mean, half = interval(values)
            numbers[metric] = {
                "mean": mean,
                "half_width": None if math.isnan(half) else half,
                "values": values,
            }
        row = {"point": dict(point), "seeds": len(good), "metrics": numbers}
        rows.append(row | ({"failed": failed[0]} if failed else {}))
    return rows


def markdown(rows: Sequence[Mapping]) -> str:
    """The table of `summary`: a line for each point, mean ± half of the interval."""
    fields = list(rows[0]["point"])
    metrics = list(dict.fromkeys(m for row in rows for m in row["metrics"]))
    lines = [
        f"| {' | '.join([*fields, 'seeds', *metrics])} |",
        "|---" * (len(fields) + 1 + len(metrics)) + "|",
    ]
    for row in rows:
        values = [str(row["point"][field]) for field in fields]
        found = [_cell_text(row, metric) for metric in metrics]
        if "failed" in row and not row["seeds"]:
            found = [f"failed: {row['failed']}".replace("|", "\\|")] + found[1:]
        lines.append(f"| {' | '.join([*values, str(row['seeds']), *found])} |")
    return "\n".join(lines) + "\n"


def _cell_text(row: Mapping, metric: str) -> str:
    numbers = row["metrics"].get(metric)
    if numbers is None:
        return ""
    if numbers["half_width"] is None:
        return f"{numbers['mean']:.4g}"
    return f"{numbers['mean']:.4g} ± {numbers['half_width']:.2g}"


def sweep(todo: Sequence[Cell], workdir: Path) -> list[dict]:
    """Runs all cells, and writes the tables anew after each."""
    results, rows = [], []
    for number, cell in enumerate(todo, 1):
        start = time.monotonic()
        result = run(cell)
        took = loop.duration(time.monotonic() - start)
        shown = result.get("failed") or "  ".join(
            f"{k} {v:.4g}" for k, v in result.items()
        )
        where = f"{name(cell.point)}, seed {cell.seed}"
        print(f"{number}/{len(todo)}  {where}: {shown}  ({took})", flush=True)
        results.append((cell, result))
        rows = summary(results)
        (workdir / "table.json").write_text(json.dumps(rows, indent=1) + "\n")
        (workdir / "table.md").write_text(markdown(rows))
    return rows


def fields_of(words: Sequence[str]) -> Settings:
    """(field, value) of --config.FIELD=VALUE and --pretrain.FIELD=VALUE."""
    found = []
    for word in words:
        match = re.fullmatch(r"--(config|pretrain)\.([\w.]+)=(.*)", word, re.S)
        if not match:
            raise UserError(f"what is {word!r}? Fields are given as --config.seed=1.")
        kind, field, value = match.groups()
        found.append((BEFORE * (kind == "pretrain") + field, value))
    return tuple(found)


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m av_mae.sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, help="the config file")
    parser.add_argument("--pretrain", default="", help="a config to pretrain by first")
    parser.add_argument("--grid", action="append", default=[], metavar="FIELD=A,B")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each point")
    parser.add_argument("--workdir", type=Path, required=True)
    given, rest = parser.parse_known_args(argv)
    commandline.quiet_libraries()
    try:
        axes, common = [axis(text) for text in given.grid], fields_of(rest)
        workdir = given.workdir.resolve()
        todo = cells(given.config, axes, given.seeds, workdir, common, given.pretrain)
        if not todo:
            raise UserError("--seeds must be 1 or more.")
        workdir.mkdir(parents=True, exist_ok=True)
        rows = sweep(todo, workdir)
    except UserError as error:
        commandline.stop(error)
    print(f"\n{markdown(rows)}\nwritten: {workdir / 'table.md'}, table.json")


if __name__ == "__main__":
    sys.exit(main())
