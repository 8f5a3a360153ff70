"""Parts of a long work: each made once, by one process or by several together.

A part is a name and a function. What the function gives, a JSON object, is kept in
FOLDER/<name>.json with the seconds that it took, so that a work that was stopped goes
on where it stopped. Processes of one machine may share a folder: none makes a part that
another is making, and none waits for it as long as there is something else to do.
"""

import contextlib
import fcntl
import json
import multiprocessing
import multiprocessing.connection
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax

from av_mae import TrainingError, UserError


class Busy(UserError):
    """Another process is making a part that is needed."""


class Parts:
    """The parts of one folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def found(self, name: str) -> dict | None:
        """The part, or None before it is made."""
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
            return json.loads((self.folder / f"{name}.json").read_text("utf-8"))
        return None

    def of(self, setting: dict) -> None:
        """UserError where the folder holds the parts of another setting (JSON)."""
        setting = json.loads(json.dumps(setting))
        if (found := self.found("setting")) is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(self.folder / "setting.json", json.dumps(setting, indent=1))
        elif found != setting:
            names = [k for k in setting if found.get(k) != setting[k]]
            raise UserError(
                f"{self.folder} has results of other settings ({', '.join(names)} "
                "changed): remove that run's folder, or choose another --workdir."
            )

    def seconds(self) -> dict[str, float]:
        """What each part that is there took."""
        names = sorted(path.stem for path in self.folder.glob("*.json"))
        found = {name: self.found(name) for name in names}
        return {k: x["seconds"] for k, x in found.items() if "seconds" in x}

    def make(self, name: str, function: Callable[[], dict]) -> dict:
        """The part, made (and timed) if it is not there.

        Raises Busy while another process makes it.
        """
        if (found := self.found(name)) is not None:
            return found
        with self._alone(name):
            if (found := self.found(name)) is not None:
                return found
            start = time.monotonic()
            result = function() | {"seconds": time.monotonic() - start}
            self.put(name, result)
            return result

    def put(self, name: str, result: dict):
        """Keeps a part with its seconds, as one that was made."""
        write_text(self.folder / f"{name}.json", json.dumps(result, indent=1))

    @contextlib.contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / f"{name}.lock", "w") as lock:  # let go with the process
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Busy(
                    f"{self.folder}: another process is making {name!r}; wait until it "
                    "ends, or stop it."
                ) from None
            yield


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all, whoever else writes it."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def work_off(
    jobs: Sequence[Callable[[], object]],
    may_begin: Callable[[], bool] = lambda: True,
    pause: float = 0.2,
) -> None:
    """Calls the jobs in order, those that are Busy later, until all are done.

    Or until no further one may begin.
    """
    waiting = list(jobs)
    while waiting and may_begin():
        for job in waiting:
            with contextlib.suppress(Busy):
                job()
                waiting.remove(job)
                break
        else:
            time.sleep(pause)


def processes(wanted: int, most: int = 8) -> int:
    """How many processes to work with: `wanted`, but at most `most`.

    One alone where JAX has a GPU or TPU, which two cannot share.
    """
    return min(wanted, most) if jax.default_backend() == "cpu" else 1


def together(processes: int, function: Callable, *arguments) -> None:
    """`function(*arguments)` in so many fresh processes, which share the processors.

    Raises TrainingError when a process fails; its own message has been printed by then.
    """
    context = multiprocessing.get_context("spawn")
    with huge_pages():
        team = [
            context.Process(
                target=_member, args=(i, processes, function, *arguments), daemon=True
            )
            for i in range(processes)
        ]
        for process in team:
            process.start()
    try:
        while team:
            ready = multiprocessing.connection.wait([p.sentinel for p in team])
            for process in [p for p in team if p.sentinel in ready]:
                team.remove(process)
                process.join()
                if process.exitcode:
                    raise TrainingError(
                        f"a process of this work ended with code {process.exitcode}: "
                        "mend what it says above and run the command again."
                    )
    finally:
        for process in team:
            process.kill()  # what it has done is kept; on SIGTERM a run would save
            process.join()


def _member(i: int, processes: int, function: Callable, *arguments) -> None:
    """What a process of `together` does: its share of the processors, then the work."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    keep_to_share(i, processes)  # before JAX counts the processors
    function(*arguments)


def keep_to_share(i: int, n: int) -> None:
    """This thread, and the processes it starts, keep to share i of n of the processors.

    Nothing where the system has no such call (macOS).
    """
    if hasattr(os, "sched_setaffinity"):
        mine = sorted(os.sched_getaffinity(0))[i::n]
        os.sched_setaffinity(0, mine or os.sched_getaffinity(0))


def _end_with_parent() -> None:
    """Ends this process when its parent is gone, even if that was killed."""
    multiprocessing.parent_process().join()
    os._exit(1)


@contextlib.contextmanager
def huge_pages() -> Iterator[None]:
    """Processes started here ask for huge pages (Linux).

    XLA takes the buffers of a step anew from malloc each time: this saves a fifth of a
    small step's time.
    """
    name, before = "GLIBC_TUNABLES", os.environ.get("GLIBC_TUNABLES")
    os.environ[name] = ":".join(filter(None, (before, "glibc.malloc.hugetlb=1")))
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
