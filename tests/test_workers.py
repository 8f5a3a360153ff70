"""Workers that die, stall or fail cost their own job and nothing else."""

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
