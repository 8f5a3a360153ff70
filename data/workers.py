"""Jobs in worker processes, any of which may die, stall or fail without stopping a run.

C libraries that decode damaged files can crash or hang; so each job runs in a process
of its own kind, whose loss costs that job alone.
"""

import contextlib
import io
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing import connection
from typing import NamedTuple

from data import DataError

STALL = 600.0  # s without a new frame after which a worker is given up
BEAT = 1.0  # s between a worker's signs of life
AHEAD = 8  # jobs a worker that may be done before the one that is next in order,
HELD_BYTES = 512 << 20  # unless they take more memory than this


class Outcome(NamedTuple):
    """What became of a job: bytes, or the reason why there are none."""

    payload: bytes | None
    reason: str = ""


def processors() -> int:
    """How many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run(
    jobs: list, count: int, work: Callable, tell: Callable = lambda outcome: None
) -> Iterator[Outcome]:
    """The outcomes of all jobs in their order, from `count` worker processes.

    work: `work(job, beat)` gives bytes, in parts, and calls `beat` as a sign of life.
        Workers are spawned, so it is a function of a module.
    tell: is called with each outcome as soon as it is known.

    A worker that dies (a C library may do that) or stalls costs its clip, and is
    replaced. Jobs run at most a few clips ahead of the one that is next in order.
    """
    outcomes, started = {}, 0
    workers = [Worker(work) for _ in range(count)]
    try:
        for wanted in range(len(jobs)):
            while wanted not in outcomes:
                held = sum(len(done.payload or b"") for done in outcomes.values())
                limit = wanted + (AHEAD * count if held < HELD_BYTES else 1)
                for place, worker in enumerate(workers):
                    if worker.number is None and started < min(limit, len(jobs)):
                        job = started, jobs[started]
                        if not worker.start(*job):  # it died while it had none
                            worker.end()
                            workers[place] = Worker(work)
                            workers[place].start(*job)
                        started += 1
                for place, outcome in _wait(workers):
                    outcomes[workers[place].number] = outcome
                    tell(outcome)
                    workers[place].number = None
                    if not workers[place].process.is_alive():
                        workers[place] = Worker(work)
            yield outcomes.pop(wanted)
    finally:
        for worker in workers:
            worker.end()


def _wait(workers: list["Worker"]) -> list[tuple[int, Outcome]]:
    """(place of the worker, outcome) of the clips that are finished or lost."""
    busy = {
        worker.pipe: i for i, worker in enumerate(workers) if worker.number is not None
    }
    finished = []
    for pipe in connection.wait(busy, timeout=1.0):
        outcome = workers[busy[pipe]].receive()
        if outcome:
            finished.append((busy[pipe], outcome))
            busy[pipe] = None
    for place in [place for place in busy.values() if place is not None]:
        if time.monotonic() - workers[place].alive_at > STALL:
            workers[place].end()
            reason = f"gave no new frame for {STALL:.0f} s and was stopped"
            finished.append((place, Outcome(None, reason)))
    return finished


class Worker:
    """A process that makes records, one job after the other."""

    def __init__(self, work):
        context = multiprocessing.get_context("spawn")  # FFmpeg has threads: no fork
        self.pipe, theirs = context.Pipe()
        self.number, self.ready = None, False
        self.process = context.Process(target=_serve, args=(theirs, work), daemon=True)
        self.process.start()
        theirs.close()

    def start(self, number: int, job) -> bool:
        """Gives it a job; False where it is dead (receive() will tell how it died)."""
        self.number, self.alive_at = number, time.monotonic()
        if not self.process.is_alive():
            return False
        with contextlib.suppress(BrokenPipeError):
            self.pipe.send(job)
            return True
        return False

    def receive(self) -> Outcome | None:
        """An outcome; None for a sign of life."""
        self.alive_at = time.monotonic()
        try:
            reason = self.pipe.recv()
            payload = self._parts() if reason == "" else None
        except (EOFError, OSError):
            return self._post_mortem()
        self.ready = True
        return None if reason is None else Outcome(payload, reason)

    def _parts(self) -> bytes:
        """The bytes that come in parts, of which the last is empty."""
        whole = io.BytesIO()
        while part := self.pipe.recv_bytes():
            whole.write(part)
        return whole.getvalue()

    def _post_mortem(self) -> Outcome:
        self.process.join(10)
        code = self.process.exitcode
        cause = f"exit code {code}"
        if code is not None and code < 0:
            cause = signal.Signals(-code).name
        self.end()
        if not self.ready:
            raise DataError(
                f"Worker processes cannot be started ({cause}); the messages above say "
                "why."
            )
        return Outcome(None, f"its worker process died ({cause})")

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _serve(pipe, work) -> None:
    """The life of a worker: jobs in; out come None as a sign of life, the reason why
    there is no record, or "" and a record in parts, so that it is never here as a
    whole.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    beat = _Beat(pipe)
    beat.send()
    with contextlib.suppress(EOFError, OSError):  # the parent is gone
        while True:
            job = pipe.recv()
            try:
                parts = work(job, beat)
            except DataError as error:
                pipe.send(str(error) or "DataError")
            except Exception as error:  # a bad clip never stops the run
                pipe.send(f"{type(error).__name__}: {error}")
            else:
                pipe.send("")
                for part in filter(None, parts):  # an empty one is the end
                    pipe.send_bytes(part)
                pipe.send_bytes(b"")


class _Beat:
    """Sends a sign of life when called, but not more often than every BEAT seconds."""

    def __init__(self, pipe):
        self.pipe = pipe

    def send(self) -> None:
        self.pipe.send(None)
        self.at = time.monotonic()

    def __call__(self) -> None:
        if time.monotonic() - self.at > BEAT:
            self.send()
