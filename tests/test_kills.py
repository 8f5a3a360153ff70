"""Training that is killed with SIGKILL, again and again, ends as if it had not been.

One long run on real records is killed at moments drawn by a seed, in every phase:
while it starts, steps, reads, saves and evaluates. Also a program, which the tests
start: it imports what a training needs, once, and forks for each run.

    python tests/test_kills.py       reads jobs from standard input, a line of JSON each
"""

import contextlib
import functools
import json
import mmap
import os
import random
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import reliability  # noqa: E402
import synthetic  # noqa: E402

PHASES = ("start", "step", "read", "save", "evaluate")
# Which of a phase's occurrences after a start may be the last one, and about how many
# seconds one takes: a kill falls up to so much later than the phase's beginning.
UP_TO = {"start": (1, 3.0), "step": (9, 0.05), "read": (9, 0.05)}
UP_TO |= {"save": (3, 0.3), "evaluate": (2, 0.3)}
ORDER = "order.jsonl"


# In the processes that train.


class Phases:
    """How often each phase has begun and ended, in a file that others can look at.

    The counts outlive the process: they are pages that it shares with the file.
    """

    SIZE = 16 * len(PHASES)

    def __init__(self, path: Path, new: bool = False):
        if new:
            path.write_bytes(bytes(self.SIZE))
        with open(path, "r+b") as file:
            self._map = mmap.mmap(file.fileno(), self.SIZE)

    def counts(self) -> dict[str, tuple[int, int]]:
        values = struct.unpack(f"{2 * len(PHASES)}Q", self._map[:])
        return dict(zip(PHASES, zip(values[::2], values[1::2], strict=True), strict=1))

    def _add(self, place: int):
        (value,) = struct.unpack_from("Q", self._map, 8 * place)
        struct.pack_into("Q", self._map, 8 * place, value + 1)

    def begin(self, phase: str):
        self._add(2 * PHASES.index(phase))

    def end(self, phase: str):
        self._add(2 * PHASES.index(phase) + 1)

    @contextlib.contextmanager
    def during(self, phase: str):
        self.begin(phase)
        try:
            yield
        finally:
            self.end(phase)

    def running(self) -> set[str]:
        return {name for name, (begun, ended) in self.counts().items() if begun > ended}


def train(job: dict):
    """One training of `job`, which tells in `phases` what it is doing."""
    from av_mae import checkpoints, datasets, evaluation, finetune, pretrain, update
    from av_mae import run as runs
    from data import pipeline

    workdir, phases = Path(job["workdir"]), Phases(Path(job["phases"]))
    phases.begin("start")
    around = lambda phase, function: functools.wraps(function)(
        lambda *args, **options: _within(phases, phase, function, args, options)
    )
    pretrain._evaluate = around("evaluate", pretrain._evaluate)
    evaluation.run = around("evaluate", evaluation.run)
    make, save, finish = (
        update.make,
        checkpoints.Checkpoints.save,
        checkpoints.Checkpoints._finish,
    )
    batches, watch = pipeline.Dataset.train, runs.Run.watch

    def make_step(*args):
        return around("step", make(*args))

    def saved(self, *args, **options):  # writing ends in another thread
        phases.begin("save")
        if not save(self, *args, **options):
            phases.end("save")

    def finished(self, step):
        finish(self, step)
        phases.end("save")

    def read(self, batch_size, step=0):
        iterator = batches(self, batch_size, step)
        while True:
            with phases.during("read"):
                batch = next(iterator)
            yield batch

    def watched(self, step, numbers, index=None):
        if "start" in phases.running():
            phases.end("start")
        numbers["loss"].block_until_ready()  # else all steps are sent off at once
        line = json.dumps([step, np.asarray(index).tolist()])
        with open(workdir / ORDER, "a") as file:
            file.write(line + "\n")
        watch(self, step, numbers, index)

    update.make = make_step
    checkpoints.Checkpoints.save = saved
    checkpoints.Checkpoints._finish = finished
    pipeline.Dataset.train = read
    runs.Run.watch = watched
    config = config_of(job)
    trainer = {"pretrain": pretrain, "finetune": finetune}[config.trainer]
    trainer.train(config, datasets.load(config), workdir)


def _within(phases, phase, function, args, options):
    with phases.during(phase):
        return function(*args, **options)


def config_of(job: dict):
    """A tiny audiovisual run: a line for every step, a checkpoint for every third."""
    config = synthetic.tiny(
        job["name"], data__dir=job["data"], steps=job["steps"], ema=0.9
    )
    config.data.num_frames = 2
    config.log.every_steps = 1
    if config.trainer == "pretrain":
        config.log.pictures = 0
    config.checkpoint.every_steps = 3
    config.eval.every_epochs = 2.5  # of two steps
    return config


def board(job: dict):
    """Writes the last value of every number and step in TensorBoard's files."""
    from tensorboard.backend.event_processing import event_file_loader
    from tensorboard.util import tensor_util

    found: dict = {}
    files = sorted(Path(job["workdir"]).glob("events.out.*"), key=os.path.getmtime)
    for path in files:
        for event in event_file_loader.EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                number = float(tensor_util.make_ndarray(value.tensor))
                found[f"{value.tag} {event.step}"] = number
    Path(job["out"]).write_text(json.dumps(found))


def serve():
    """Forks for every job; prints its process id, and its exit status when it ends.

    No device is touched before the fork, so that each run begins from the same.
    """
    import tensorflow  # noqa: F401 (TensorBoard's writer)
    from clu import metric_writers  # noqa: F401

    from av_mae import datasets, finetune, pretrain  # noqa: F401

    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(log, 1), os.dup2(log, 2)
            code = 1
            try:
                {"train": train, "board": board}[job["do"]](job)
                code = 0
            except BaseException:
                import traceback

                traceback.print_exc()
            os._exit(code)
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    serve()
    sys.exit()


# The tests.

import pytest  # noqa: E402
import toy  # noqa: E402

FULL = os.environ.get("AV_MAE_STRESS") == "full"
KILLS = 50 if FULL else 5


class Server:
    """The program above, with jobs for one run after another."""

    def __init__(self, folder: Path):
        settings = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        settings |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_PLATFORMS": "cpu"}
        self._folder, self._path = folder, folder / "phases"
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env=os.environ | settings,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        assert self._line() == "ready"

    def _line(self) -> str:
        line = self._process.stdout.readline().strip()
        assert line, "the server of runs has ended"
        return line

    def begin(self, **job) -> int:
        """Starts a job; the id of its process."""
        self.phases = Phases(self._path, new=True)
        job |= {"phases": str(self._path), "log": str(self._folder / "log")}
        self._process.stdin.write(json.dumps(job) + "\n")
        return int(self._line())

    def ended(self) -> int:
        """The exit status of the last job, negative for a signal."""
        return int(self._line())

    def run(self, **job):
        """A job from start to end."""
        self.begin(**job)
        assert self.ended() == 0, self.log()

    def log(self) -> str:
        """The end of what the jobs said."""
        return (self._folder / "log").read_text()[-3000:]

    def close(self):
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Eight clips, some without sound, as records."""
    path = tmp_path_factory.mktemp("kills")
    toy.write_folder(path / "clips", 12, silent=(3,))
    split = "--split=train=0.6,validation=0.4"
    toy.run("-m", "data.prepare", path / "clips", "--out", path / "set", split)
    return path / "set"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.close()


def kill(server, draw, phase: str, job: dict) -> set[str] | None:
    """Kills a new process at a moment of the phase; what it was doing.

    None where it had ended before.
    """
    most, seconds = UP_TO[phase]
    count, delay = draw.randint(1, most), draw.uniform(0.0, seconds)
    pid, until = server.begin(**job), time.monotonic() + 120
    alive = Path(f"/proc/{pid}").exists  # an ended process is waited for at once
    while server.phases.counts()[phase][0] < count and alive():
        assert time.monotonic() < until, f"no {phase}"
        time.sleep(0.001)
    time.sleep(delay)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    status = server.ended()
    assert status in (0, -signal.SIGKILL), (status, server.log())
    return server.phases.running() if status else None


def kill_and_compare(
    server, name: str, data, folder, kills: int, seed: int
) -> tuple[int, dict[str, int]]:
    """Kills one run so often, lets it end, and compares it with one that was not.

    Returns how many kills met it alive, and how many of them fell into each phase (into
    several at once, as the data are read and a checkpoint is written while the run goes
    on).
    """
    draw, steps = random.Random(seed), 8 * kills
    killed, whole = folder / "killed", folder / "whole"
    job = {"do": "train", "name": name, "data": str(data), "steps": steps}
    server.run(**job, workdir=str(whole))  # compiles what the others read from disk
    phases = [PHASES[i % len(PHASES)] for i in range(kills)]
    draw.shuffle(phases)
    fell, met = dict.fromkeys(PHASES, 0), 0
    for phase in phases:
        doing = kill(server, draw, phase, job | {"workdir": str(killed)})
        met += doing is not None
        for name in doing or ():
            fell[name] += 1
    server.run(**job, workdir=str(killed))
    compare(server, killed, whole, steps)
    # On a fast machine a run may end before, the shorter the sooner.
    assert met >= (0.8 if FULL else 0.5) * kills
    return met, fell


def compare(server, killed: Path, whole: Path, steps: int):
    """Arrays, numbers, order of the clips and TensorBoard: all as without a kill."""
    synthetic.assert_same_run(killed, whole)
    lines = synthetic.lines(whole)
    assert [x["step"] for x in lines if "loss" in x] == list(range(1, steps + 1))
    assert order(killed) == order(whole) and len(order(whole)) == steps
    kept = lambda run: sorted(p.name for p in (run / "checkpoints").iterdir())
    assert kept(killed) == kept(whole) and len(kept(whole)) == 3  # and the lock
    for run in (killed, whole):
        out = run.with_suffix(".json")
        server.run(do="board", workdir=str(run), out=str(out))
        assert_shown(json.loads(out.read_text()), run)


def assert_shown(shown: dict[str, float], workdir: Path):
    """TensorBoard shows what metrics.jsonl has: {"name step": value}, no more."""
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        step = row.pop("step")
        for name, value in row.items():
            assert shown.pop(f"{name} {step}") == np.float32(value), (name, step)
    assert shown == {}


def order(workdir: Path) -> dict[int, list[int]]:
    """{step: the records of its batch}, which every repetition of it had too."""
    found: dict[int, list[int]] = {}
    for line in (workdir / ORDER).read_text().splitlines():
        step, index = json.loads(line)
        assert found.setdefault(step, index) == index
    return found


FINETUNE = pytest.param("folder/finetune", marks=pytest.mark.slow)


@pytest.mark.stress
@pytest.mark.parametrize("name", ["folder/pretrain", FINETUNE])
def test_killed_at_any_moment_a_run_ends_as_without(name, server, data, tmp_path):
    # A sixth more, for those that come after the end of the run.
    most = KILLS + KILLS // 6
    met, fell = kill_and_compare(server, name, data, tmp_path, most, seed=0)
    assert all(fell.values()) or not FULL, fell
    where = ", ".join(f"{count} in {name}" for name, count in fell.items())
    outcome = "parameters, optimiser state, EMA, order of the data, metrics.jsonl and "
    outcome += f"TensorBoard as without a kill ({where}; some in two of them)"
    kind = name.split("/")[1]
    reliability.record(f"SIGKILL of a training: {kind}", met, outcome, seed=0)


@pytest.mark.slow
def test_killed_at_many_moments_it_ends_as_without(server, data, tmp_path):
    kill_and_compare(server, "folder/pretrain", data, tmp_path, 20, seed=1)
