"""What both trainers share around their step: timing, logs, pre-emption, randomness."""

import contextlib
import json
import logging
import math
import os
import platform
import queue
import re
import shutil
import signal
import subprocess
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from av_mae import BadNumberError, TrainingError

log = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
BEFORE = "metrics-before.jsonl"
NOT_FINITE = "not_finite_in_evaluation"  # how many numbers, in a row that lacks some
NONFINITE = "nonfinite.jsonl"
EVENTS = "events.out.tfevents"  # and time, host and process: TensorBoard's files


# How long, and with which randomness.


def steps(config: Any, num_clips: int) -> tuple[int, int]:
    """Updates per epoch and in total, from the data set's own number of clips.

    An update takes `batch_size * compute.accumulate` clips; what does not fill one
    is left out of the epoch. `config.steps`, if not 0, wins over `config.epochs`.
    """
    clips = config.batch_size * config.compute.accumulate
    per_epoch = max(1, num_clips // clips)
    return per_epoch, config.steps or max(1, round(config.epochs * per_epoch))


def key(rng: Any, step: Any, purpose: str) -> jax.Array:
    """The random key of one purpose at one step: what a resumed run draws again.

    rng: a seed (int) or a key; step: int or traced int32 scalar; purpose: any name,
    a different one for each use.
    """
    if isinstance(rng, int):
        rng = jax.random.key(rng)
    # crc32 and not hash(): the same in every process and every run.
    return jax.random.fold_in(
        jax.random.fold_in(rng, step), zlib.crc32(purpose.encode())
    )


# Batches on the device before they are needed, and the clock.


class Clock:
    """Measures clips/s, the share of time spent waiting for data, and the time left.

    Evaluation, checkpoints and pictures happen inside `with clock.pause():` and do
    not count. `report()` covers the time since the last report.
    """

    def __init__(
        self,
        clips_per_step: int,
        step: int,
        total_steps: int,
        now: Callable[[], float] = time.perf_counter,
    ):
        self.clips_per_step, self.total_steps = clips_per_step, total_steps
        self._now = now
        self._running: Any = ()
        self._first: tuple[int, float] | None = None  # step and time of a report
        self._restart(step)

    def _restart(self, step: int):
        self._step, self._start = step, self._now()
        self._paused = self._waited = 0.0

    def ran(self, outputs: Any):
        """Remembers what the device is computing now (the outputs of the last step)."""
        self._running = outputs

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Time inside does not count. What runs before it is finished first."""
        jax.block_until_ready(self._running)
        start = self._now()
        try:
            yield
        finally:
            self._paused += self._now() - start

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Time inside is time in which the device had nothing to do."""
        # While the device still works nothing is lost: waiting starts when it is idle.
        jax.block_until_ready(self._running)
        start = self._now()
        try:
            yield
        finally:
            self._waited += self._now() - start

    def report(self, step: int) -> dict[str, float]:
        """clips_per_second, wait_share (0 to 1), seconds_per_step, seconds_left.

        What is left counts pauses too, as they were since the first report.
        """
        jax.block_until_ready(self._running)
        seconds = max(self._now() - self._start - self._paused, 1e-9)
        done = step - self._step
        per_step = whole = seconds / max(done, 1)
        if self._first and step > self._first[0]:
            whole = (self._now() - self._first[1]) / (step - self._first[0])
        self._first = self._first or (step, self._now())
        numbers = {
            "clips_per_second": done * self.clips_per_step / seconds,
            "wait_share": min(self._waited / seconds, 1.0),
            "seconds_per_step": per_step,
            "seconds_left": whole * max(self.total_steps - step, 0),
        }
        self._restart(step)
        return numbers


def prefetch(
    batches: Iterable[Any],
    put: Callable[[Any], Any],
    depth: int = 2,
    clock: Clock | None = None,
) -> Iterator[Any]:
    """Yields put(batch) for each batch, in order, prepared while the step runs.

    A thread reads and transfers up to `depth` batches ahead. Time in which the device
    has nothing to do because no batch is ready goes to `clock`. An error in reading is
    raised here, after the batches before it. `close()` stops the thread.
    """
    ready: queue.Queue = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def offer(item: tuple[str, Any]) -> bool:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(item, timeout=0.1)
                return True
        return False

    def read():
        try:
            for batch in batches:
                if not offer(("batch", put(batch))):
                    return
            offer(("end", None))
        except BaseException as error:  # raised again where the batch is wanted
            offer(("error", error))

    def take() -> tuple[str, Any]:
        with contextlib.suppress(queue.Empty):
            return ready.get_nowait()
        with clock.waiting() if clock else contextlib.nullcontext():
            return ready.get()

    thread = threading.Thread(target=read, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = take()
            if kind == "error":
                raise value
            if kind == "end":
                return
            yield value
    finally:
        stopped.set()
        thread.join(timeout=5.0)


# Logs.


@contextlib.contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """Turns what keeps a file from being written into a TrainingError that names it.

    A full disk, a folder that is read-only or belongs to others; TensorFlow, which
    writes TensorBoard's files, has errors of its own for that.
    """
    try:
        yield
    except Exception as error:
        ours = isinstance(error, OSError)
        if not ours and not type(error).__module__.startswith("tensorflow."):
            raise
        reason = (error.strerror if ours else None) or str(error)
        reason = re.sub(r"\{\{.*?\}\} *", "", reason)  # a place in TensorFlow's graph
        raise TrainingError(
            f"{path} could not be written: {reason.splitlines()[0][:300]}"
            f"{free_space(path)}; make room, or choose another --workdir, and run "
            "again to go on from the last checkpoint."
        ) from error


def free_space(path: Path | str) -> str:
    """How much room there is beside a file that could not be written, in brackets."""
    with contextlib.suppress(OSError):
        return f" ({shutil.disk_usage(Path(path).parent).free / 2**20:.1f} MiB free)"
    return ""


class MetricWriter:
    """Writes numbers to `metrics.jsonl` and TensorBoard, pictures to TensorBoard.

    Only process 0 writes. A line is `{"step": 100, "loss": 0.5, …}`, flushed at once;
    write a step's numbers before its checkpoint is saved, so that a resumed run, which
    cuts the file to the restored step, neither loses nor repeats a line. TensorBoard
    goes through clu; where clu or TensorFlow is not installed, the log says so once.
    """

    def __init__(self, workdir: Path | str):
        self._file = self._board = None
        self._path = Path(workdir) / METRICS
        if jax.process_index() != 0:
            return
        with writing(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._path, "a", encoding="utf-8")
            self._board = _tensorboard(self._path.parent)

    def write(self, step: int, numbers: Mapping[str, Any]):
        """Numbers by name (anything that float() takes) of one step."""
        if self._file is None:
            return
        line = {name: float(value) for name, value in numbers.items()}
        with writing(self._path):
            self._file.write(json.dumps({"step": int(step)} | line) + "\n")
            self._file.flush()
        if self._board:
            with writing(self._path.with_name(EVENTS)):
                self._board.write_scalars(int(step), line)
                self._board.flush()

    def images(self, step: int, pictures: Mapping[str, Any]):
        """Pictures by name: uint8 [n h w 3] or [h w 3], or float in [0, 1]."""
        if not self._board:
            return
        stacks = {
            name: picture[None] if np.ndim(picture) == 3 else picture
            for name, picture in pictures.items()
        }
        with writing(self._path.with_name(EVENTS)):
            self._board.write_images(int(step), stacks)
            self._board.flush()

    def close(self):
        """Lets go of the files; what could not be written has been said before."""
        for part in (self._file, self._board):
            with contextlib.suppress(TrainingError), writing(self._path):
                if part:
                    part.close()
        self._file = self._board = None


def _tensorboard(workdir: Path) -> Any:
    """clu's TensorBoard writer, or None where it is not installed."""
    try:
        import tensorflow as tf
        from clu import metric_writers
    except ImportError as error:
        log.warning(
            "No TensorBoard files, only %s: %s (pip install clu tensorflow-cpu).",
            METRICS,
            error,
        )
        return None
    # TensorFlow only writes files here; without this it would take a GPU's memory.
    with contextlib.suppress(RuntimeError):
        tf.config.set_visible_devices([], "GPU")
    return metric_writers.SummaryWriter(str(workdir))


def read_metrics(workdir: Path | str) -> list[dict[str, Any]]:
    """The rows of `metrics.jsonl`, without one that a kill left half written."""
    path, rows = Path(workdir) / METRICS, []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and "step" in row]


def evaluations(workdir: Path | str) -> list[dict[str, Any]]:
    """The rows of evaluations: `step`, and numbers whose names begin with `eval/`.

    What was not finite is missing, perhaps all.
    """
    found = []
    for row in read_metrics(workdir):
        numbers = {k: x for k, x in row.items() if k.startswith("eval/")}
        if numbers or NOT_FINITE in row:
            found.append({"step": row["step"]} | numbers)
    return found


def cut_metrics(workdir: Path | str, step: int):
    """Cuts `metrics.jsonl` to the lines at or before `step`; -1 empties it.

    A line that was only half written when the run was killed goes too. The new file
    replaces the old at once, so that a kill leaves one or the other. Lines of which a
    run that begins anew would empty it are appended to `BEFORE`.
    """
    path = Path(workdir) / METRICS
    if jax.process_index() != 0 or not path.exists():
        return
    kept, before = [], path.with_name(BEFORE)
    with writing(path):
        if step <= 0 and path.stat().st_size:
            log.info("%s of an earlier start is kept in %s", METRICS, before)
            with open(path, "rb") as old, open(before, "ab") as file:
                shutil.copyfileobj(old, file)
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
        temporary = path.with_name(METRICS + ".tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        os.replace(temporary, path)


def parameter_table(params: Any) -> str:
    """Name, shape and number of elements of each parameter, and the total, as text."""
    rows = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        shape = np.shape(leaf)
        rows.append((name, str(tuple(shape)), math.prod(shape)))
    total = sum(row[2] for row in rows)
    texts = [(name, shape, f"{count:,}") for name, shape, count in rows]
    texts = [("parameter", "shape", "elements"), *texts, ("total", "", f"{total:,}")]
    names, shapes, counts = (max(len(row[i]) for row in texts) for i in range(3))
    return "\n".join(f"{a:<{names}}  {b:<{shapes}}  {c:>{counts}}" for a, b, c in texts)


def progress(
    step: int,
    total_steps: int,
    losses: Mapping[str, Any],
    learning_rate: Any,
    timing: Mapping[str, Any],
) -> str:
    """The line of one log step; losses by modality, timing from `Clock.report`.

    `step 1200/48000  loss rgb 0.41 spectrogram 0.73  lr 3.0e-04  812 clips/s  wait 2%
    left 3 h 12 m` (in one line).
    """
    loss = " ".join(f"{name} {float(value):.4g}" for name, value in losses.items())
    return "  ".join(
        (
            f"step {step}/{total_steps}",
            f"loss {loss}",
            f"lr {float(learning_rate):.1e}",
            f"{timing['clips_per_second']:.3g} clips/s"
            if timing["clips_per_second"] < 100
            else f"{timing['clips_per_second']:.0f} clips/s",
            *([f"MFU {timing['mfu']:.0%}"] if "mfu" in timing else []),
            f"wait {timing['wait_share']:.0%}",
            f"left {duration(timing['seconds_left'])}",
        )
    )


def duration(seconds: float | int) -> str:
    """45 s, 12 m 5 s, 3 h 12 m or 2 d 4 h."""
    whole = round(seconds)
    for big, small, size in (("d", "h", 86400), ("h", "m", 3600), ("m", "s", 60)):
        if whole >= size:
            rest = {"d": 3600, "h": 60, "m": 1}[big]
            return f"{whole // size} {big} {whole % size // rest} {small}"
    return f"{whole} s"


def provenance() -> dict[str, str]:
    """What made this run: versions, and the git commit ('' outside of a clone).

    Versions of what computes, and of what reads the data where that is installed.
    """
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    versions = {name: metadata.version(name) for name in names}
    for name in ("av", "grain", "array_record", "pillow"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
        ).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        commit = ""
    return {"python": platform.python_version(), **versions, "git_commit": commit}


# Stopping.


class Preemption:
    """Turns SIGTERM into a question that every process answers alike.

    `reached(step)` is asked once a step, by all processes. One process answers at
    once; several agree every `every` steps, so that all save at the same step.
    """

    def __init__(self, every: int = 10):
        self._every, self._signalled = every, False
        self._old = signal.signal(signal.SIGTERM, self._note)

    def _note(self, number: int, frame: Any):
        self._signalled = True

    def reached(self, step: int) -> bool:
        """Whether to save and stop at this step."""
        if jax.process_count() == 1:
            return self._signalled
        if step % self._every:
            return False
        flags = multihost_utils.process_allgather(np.asarray(self._signalled))
        return bool(np.any(flags))

    def close(self):
        """Gives SIGTERM back to whoever had it."""
        signal.signal(signal.SIGTERM, self._old or signal.SIG_DFL)


def not_finite(numbers: Mapping[str, Any]) -> dict[str, float]:
    """Those of the numbers that are infinite or not a number."""
    values = {name: float(value) for name, value in numbers.items()}
    return {name: x for name, x in values.items() if not math.isfinite(x)}


def check_finite(
    metrics: Mapping[str, Any],
    step: int,
    last_checkpoint: int | None,
    workdir: Any = "",
):
    """Raises BadNumberError if a number is infinite or not a number.

    The sentence says at which step, what the last checkpoint is and what to try.
    """
    bad = not_finite(metrics)
    if not bad:
        return
    kept = (
        "there is no checkpoint yet"
        if last_checkpoint is None
        else f"the last good checkpoint is step {last_checkpoint}"
        + (f" in {workdir}" if workdir else "")
    )
    name, value = next(iter(bad.items()))
    raise BadNumberError(
        f"{name} is {value} at step {step}; {kept}: go on with compute.dtype=float32 "
        "or nonfinite=skip, which leaves such updates out, or begin anew in another "
        "--workdir with a lower schedule.learning_rate_per_256 or "
        f"optimizer.clip_norm=1.0; the clips of the batch are named in {NONFINITE}."
    )


def note_clips(
    workdir: Path | str, step: int, bad: Mapping[str, float], clips: Iterable[str]
):
    """A line {"step", "numbers", "clips"} in nonfinite.jsonl: the clips of a bad batch.

    A line that is there already (the run went on from before that step) is not written
    twice.
    """
    path = Path(workdir) / NONFINITE
    numbers = {name: str(value) for name, value in bad.items()}
    line = json.dumps({"step": step, "numbers": numbers, "clips": list(clips)}) + "\n"
    if jax.process_index() != 0:
        return
    if path.exists() and line in path.read_text(encoding="utf-8"):
        return
    with writing(path), open(path, "a", encoding="utf-8") as file:
        file.write(line)


class Spikes:
    """Tells losses that are far above what they were, from three numbers.

    A spike is a loss that is more than `DEVIATIONS` deviations, and more than `SHARE`
    of the mean, above the running mean. Mean and variance are exponential averages over
    about `STEPS` steps (a spike enters them as the limit that it broke, so that a new
    level is a spike for a while only); the first `STEPS` steps fill them and are never
    told. The rule is ours.
    """

    STEPS, DEVIATIONS, SHARE = 100, 6.0, 0.1

    def __init__(self):
        self._count, self._mean, self._square = 0, 0.0, 0.0

    def see(self, loss: float) -> str:
        """'' or what the loss is a spike above, as text."""
        if not math.isfinite(loss):
            return ""
        deviation = math.sqrt(max(self._square - self._mean**2, 0.0))
        room = max(self.DEVIATIONS * deviation, self.SHARE * abs(self._mean))
        spike = self._count >= self.STEPS and loss > self._mean + room
        self._count += 1
        share = 1 / min(self._count, self.STEPS)
        value = self._mean + room if spike else loss
        text = f"{loss:.4g} over a running mean of {self._mean:.4g} ± {deviation:.2g}"
        self._mean += share * (value - self._mean)
        self._square += share * (value**2 - self._square)
        return text if spike else ""
