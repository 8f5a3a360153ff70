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

A cell is one run of `python -m av_mae.main` in a folder of its own; `--jobs 2` trains
two at a time, each on its share of the processors. What is finished is not done again:
give the command once more to go on. The table is in WORKDIR/table.md and table.json:
mean and 95 % interval over the seeds, and the differences, paired by seed, to the point
of all first values (av_mae/sweep_table.py). A cell that its config refuses, as a
combination may not exist, stands there as failed, and is tried again the next time.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from av_mae import TrainingError, UserError, commandline, loop, parts, sweep_table
from av_mae.sweep_table import Settings

ROOT = Path(__file__).resolve().parents[1]
BEFORE = "pretrain."  # before a field of the pretraining config


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


class Refused(UserError):
    """The sentence by which a training refused its config."""


class Trainings:
    """Runs, each in a process of its own, each made once."""

    def __init__(self, workdir: Path):
        self.workdir = workdir
        self._children: set[subprocess.Popen] = set()
        self._refused: dict[Run, str] = {}
        self.notes: dict[str, None] = {}  # what belongs beside the numbers, in order
        self._locks: dict[Run, threading.Lock] = {}
        self._stopped = False

    def result(self, cell: Cell) -> dict[str, float]:
        """The numbers of the cell's evaluation, or {"failed": sentence}.

        What is finished is only read. Raises TrainingError where a training ended
        without a sentence for the user, UserError for a folder of another sweep.
        """
        for run in cell.runs:
            result = self.finish(run)
            if "failed" in result:
                return result
        return result

    def finish(self, run: Run) -> dict:
        """What evaluation gave; waits where another thread makes the same run.

        A config that was refused is kept until the command ends, and tried again then.
        """
        make = lambda: {"command": run.command()} | self._train(run)
        with self._locks.setdefault(run, threading.Lock()):
            if run not in self._refused:
                try:
                    found = parts.Parts(run.folder).make("result", make)
                except Refused as error:
                    self._refused[run] = str(error)
        if run in self._refused:
            return {"failed": self._refused[run]}
        if found["command"] != run.command():
            raise UserError(
                f"{run.folder} holds a run of another command: give another "
                f"--workdir, or remove it. It was: {' '.join(found['command'])}"
            )
        self.notes |= dict.fromkeys(found.get("notes", ()))
        return found["result"]

    def _train(self, run: Run) -> dict:
        """Runs `python -m av_mae.main`, its words into the folder's log.txt.

        {"result": the numbers of its last evaluation, "notes": sentences of its log}.
        """
        if self._stopped:
            raise TrainingError("stopped: give the command again to go on.")
        path = run.folder / "log.txt"
        with open(path, "w", encoding="utf-8") as file:
            child = subprocess.Popen(
                [sys.executable, "-m", "av_mae.main", *run.command()],
                cwd=ROOT,
                env=_caching(self.workdir / "compiled"),
                stdout=file,
                stderr=subprocess.STDOUT,
            )
            self._children.add(child)
            if self._stopped:  # meanwhile
                child.terminate()
            try:
                code = child.wait()
            finally:
                self._children.discard(child)
        log = path.read_text(encoding="utf-8", errors="replace")
        if "stopped by SIGTERM after step" in log or code < 0:
            raise TrainingError(f"{run.folder} was stopped: give the command again.")
        if code == 2:  # a sentence for the user: the combination does not exist
            raise Refused(log.strip().splitlines()[-1].removeprefix("error: "))
        if code:
            raise TrainingError(f"the run failed: read {path}.")
        notes = re.findall(r"^  NOTE: (?:init_from\S*=.*?: )?(.*)$", log, re.M)
        found = evaluation(run.folder)
        return {"result": found, "notes": list(dict.fromkeys(notes))}

    @contextlib.contextmanager
    def ended_by_sigterm(self) -> Iterator[None]:
        """SIGTERM goes on to the trainings, which save and end, and none begins."""
        old = signal.signal(signal.SIGTERM, lambda number, frame: self.stop())
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, old)

    def stop(self) -> None:
        """Ends what runs; no other training begins."""
        self._stopped = True
        for child in list(self._children):
            child.terminate()


def _caching(folder: Path) -> dict[str, str]:
    """The environment of trainings, which share what XLA compiles; the user's first."""
    own = {
        "JAX_COMPILATION_CACHE_DIR": str(folder),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return own | os.environ


def evaluation(folder: Path) -> dict[str, float]:
    """The numbers of a run's last evaluation, without the `eval/` before them."""
    rows = loop.evaluations(folder)
    if not rows:
        raise TrainingError(f"{folder} holds no evaluation: see eval.every_epochs.")
    return {
        k.removeprefix("eval/"): v for k, v in rows[-1].items() if k.startswith("eval/")
    }


def sweep(todo: Sequence[Cell], workdir: Path, jobs: int = 1) -> dict:
    """Runs all cells, `jobs` at a time, and writes the table anew after each.

    It is that of `sweep_table.summary`.
    """
    trainings, results, table = Trainings(workdir), {}, {}
    shares = itertools.count()
    pool = concurrent.futures.ThreadPoolExecutor(
        jobs, initializer=lambda: parts.keep_to_share(next(shares), jobs)
    )
    with trainings.ended_by_sigterm(), parts.huge_pages(), pool:
        made = {pool.submit(_timed, trainings, x): x for x in _in_order(todo)}
        try:
            for future in concurrent.futures.as_completed(made):
                cell, (result, seconds) = made[future], future.result()
                if not isinstance(cell, Cell):
                    continue
                results[cell] = result
                shown = result.get("failed") or "  ".join(
                    f"{k} {v:.4g}" for k, v in result.items()
                )
                where = f"{name(cell.point)}, seed {cell.seed}"
                took = loop.duration(seconds)
                n = len(results)
                print(f"{n}/{len(todo)}  {where}: {shown}  ({took})", flush=True)
                done = {c: results[c] for c in todo if c in results}
                table = sweep_table.summary(
                    {(c.point, c.seed): result for c, result in done.items()},
                    list(trainings.notes),
                )
                (workdir / "table.json").write_text(json.dumps(table, indent=1) + "\n")
                (workdir / "table.md").write_text(sweep_table.markdown(table))
        except BaseException:
            trainings.stop()
            pool.shutdown(cancel_futures=True)
            raise
    return table


def _in_order(todo: Sequence[Cell]) -> Iterator[Run | Cell]:
    """Of each seed the pretrainings, each once, then the cells."""
    for _, cells in itertools.groupby(todo, lambda cell: cell.seed):
        cells = list(cells)
        yield from dict.fromkeys(run for cell in cells for run in cell.runs[:-1])
        yield from cells


def _timed(trainings: Trainings, work: Run | Cell) -> tuple[dict, float]:
    start = time.monotonic()
    make = trainings.result if isinstance(work, Cell) else trainings.finish
    return make(work), time.monotonic() - start


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
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time (CPU)")
    parser.add_argument("--workdir", type=Path, default=Path("runs/sweep"))
    given, rest = parser.parse_known_args(argv)
    commandline.quiet_libraries()
    try:
        axes = [commandline.axis("--grid", text) for text in given.grid]
        common = fields_of(rest)
        workdir = given.workdir.resolve()
        todo = cells(given.config, axes, given.seeds, workdir, common, given.pretrain)
        if not todo:
            raise UserError("--seeds must be 1 or more.")
        if given.jobs < 1:
            raise UserError("--jobs must be 1 or more.")
        workdir.mkdir(parents=True, exist_ok=True)
        table = sweep(todo, workdir, given.jobs)
    except UserError as error:
        commandline.stop(error)
    text = sweep_table.markdown(table)
    print(f"\n{text}\nwritten: {workdir / 'table.md'}, table.json")
    return 0 if any(row["seeds"] for row in table["rows"]) else 1


if __name__ == "__main__":
    sys.exit(main())
