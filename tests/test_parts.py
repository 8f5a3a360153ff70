"""Parts of a long work: made once, by one process or several."""

import json
import multiprocessing
import os
import sys
import time

import pytest

from av_mae import TrainingError, parts


def test_a_part_is_made_once_and_timed(tmp_path):
    work, made = parts.Parts(tmp_path / "results"), []
    make = lambda: made.append(1) or {"value": 0.1}
    assert work.found("x") is None
    first = work.make("x", make)
    assert first["value"] == 0.1 and first["seconds"] >= 0
    assert work.make("x", make) == first == work.found("x") and made == [1]
    assert work.seconds() == {"x": first["seconds"]}


def test_a_part_that_fails_is_made_again(tmp_path):
    work = parts.Parts(tmp_path)
    with pytest.raises(ZeroDivisionError):
        work.make("x", lambda: {"value": 1 / 0})
    assert work.found("x") is None
    assert work.make("x", lambda: {"value": 1})["value"] == 1


def test_a_part_within_itself_is_busy(tmp_path):
    work = parts.Parts(tmp_path)
    with pytest.raises(parts.Busy, match="x"):
        work.make("x", lambda: work.make("x", dict))


def test_what_is_busy_comes_later_and_the_order_is_kept():
    seen, tries = [], iter([True, True, False])

    def first():
        if next(tries):
            raise parts.Busy("first")
        seen.append("first")

    jobs = [first, lambda: seen.append("second"), lambda: seen.append("third")]
    parts.work_off(jobs, pause=0.0)
    assert seen == ["second", "third", "first"]


def test_nothing_begins_after_the_end():
    seen = []
    jobs = [lambda i=i: seen.append(i) for i in range(4)]
    parts.work_off(jobs, may_begin=lambda: len(seen) < 2)
    assert seen == [0, 1]


def share(folder):
    """Ten parts; each tells which process made it and when."""
    work = parts.Parts(folder)

    def make():
        begin = time.monotonic()
        (folder / f"{os.getpid()}.here").touch()
        while len(list(folder.glob("*.here"))) < 2:  # the slower one takes its time
            time.sleep(0.01)
        time.sleep(0.1)
        return {"who": os.getpid(), "begin": begin, "end": time.monotonic()}

    parts.work_off([lambda i=i: work.make(f"{i}", make) for i in range(10)], pause=0.01)


def test_two_processes_share_the_parts_and_none_idles(tmp_path):
    parts.together(2, share, tmp_path)
    found = [parts.Parts(tmp_path).found(f"{i}") for i in range(10)]
    by_process = {}
    for part in found:
        by_process.setdefault(part["who"], []).append((part["begin"], part["end"]))
    assert len(by_process) == 2
    for times in by_process.values():  # one part of a process after another
        times = sorted(times)
        assert all(a[1] <= b[0] for a, b in zip(times, times[1:], strict=False))


def tell(folder):
    """Leaves which processors and what of malloc this process was given."""
    allowed = sorted(os.sched_getaffinity(0))
    found = {"processors": allowed, "tunables": os.environ["GLIBC_TUNABLES"]}
    (folder / f"{os.getpid()}").write_text(json.dumps(found))


@pytest.mark.skipif(sys.platform != "linux", reason="processors are shared on Linux")
def test_processes_share_the_processors(tmp_path):
    before = os.environ.get("GLIBC_TUNABLES")
    mine = os.sched_getaffinity(0)
    parts.together(min(2, len(mine)), tell, tmp_path)
    found = [json.loads(path.read_text()) for path in tmp_path.iterdir()]
    given = [set(one["processors"]) for one in found]
    assert set.union(*given) == mine and sum(map(len, given)) == len(mine)
    assert all("glibc.malloc.hugetlb=1" in one["tunables"] for one in found)
    assert os.environ.get("GLIBC_TUNABLES") == before
    assert parts.processes(len(mine), most=len(mine)) == len(mine)
    assert parts.processes(9, most=2) == 2


def fail_first(folder):
    """The first process fails; the other would go on for ten minutes."""
    try:
        (folder / "first").touch(exist_ok=False)
    except FileExistsError:
        time.sleep(600)
    sys.exit(2)


def test_where_one_process_fails_the_others_end(tmp_path):
    start = time.monotonic()
    with pytest.raises(TrainingError, match="ended with code 2: mend what it says"):
        parts.together(2, fail_first, tmp_path)
    assert time.monotonic() - start < 300
    assert not multiprocessing.active_children()
