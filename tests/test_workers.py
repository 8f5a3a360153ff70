"""Workers that die, stall or fail cost their own job and nothing else."""

import multiprocessing
import os
import signal
import time
from collections import Counter

import pytest

from data import workers


def odd_work(job, beat):
    """A worker's work: numbers in, bytes out, and some ways not to come to that."""
    if job == 3:
        os.kill(os.getpid(), signal.SIGSEGV)
    if job == 5:
        raise MemoryError("too much")
    if job == 7:
        time.sleep(60)
    return [b"%d" % job]


def test_dead_stalled_and_failing_workers_cost_their_clip_only(monkeypatch):
    monkeypatch.setattr(workers, "STALL", 6.0)
    told = []
    outcomes = list(workers.run(list(range(10)), 2, odd_work, told.append))
    assert [o.payload for i, o in enumerate(outcomes) if i not in (3, 5, 7)] == [
        b"%d" % i for i in range(10) if i not in (3, 5, 7)
    ]
    assert [outcomes[i].payload for i in (3, 5, 7)] == [None, None, None]
    assert outcomes[3].reason == "its worker process died (SIGSEGV)"
    assert outcomes[5].reason == "MemoryError: too much"
    assert outcomes[7].reason == "gave no new frame for 6 s and was stopped"
    assert Counter(told) == Counter(outcomes)


def test_a_worker_that_dies_without_a_job_costs_none(monkeypatch):
    found = workers.run(list(range(20, 40)), 1, odd_work)
    outcomes = [next(found)]
    time.sleep(0.5)  # it has done all that it may do ahead
    (process,) = multiprocessing.active_children()
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    outcomes += found
    assert [o.payload for o in outcomes] == [b"%d" % i for i in range(20, 40)]
    # The same where it dies between the look at it and the job.
    monkeypatch.setattr(multiprocessing.process.BaseProcess, "is_alive", lambda _: True)
    worker = workers.Worker(odd_work)
    worker.end()
    worker.pipe, theirs = multiprocessing.Pipe()
    theirs.close()
    assert not worker.start(0, 20)


def slow_work(job, beat):
    """Takes longer than STALL, but shows that it lives."""
    for _ in range(70):
        time.sleep(0.1)
        beat()
    return [b"", b"do", b"", b"ne", b""]


@pytest.mark.slow
def test_a_slow_worker_that_shows_signs_of_life_is_kept(monkeypatch):
    monkeypatch.setattr(workers, "STALL", 6.0)
    outcomes = workers.run([0], 1, slow_work)
    assert [outcome.payload for outcome in outcomes] == [b"done"]


def test_processors_are_those_that_this_process_may_use():
    """Its affinity where there is one, else those of the machine."""
    assert 1 <= workers.processors() <= os.cpu_count()
    if hasattr(os, "sched_getaffinity"):
        assert workers.processors() == len(os.sched_getaffinity(0))
