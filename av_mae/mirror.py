"""Workdirs in a bucket (gs://, s3://, by etils.epath): a folder here, kept alike there.

A run works in a folder of this machine's cache. Every `SECONDS`, and when it ends, what
is new or has changed is copied to the bucket: a checkpoint step when it is complete,
its checksums last, so that a step in the bucket is whole or counts as unfinished. Steps
that are gone here go there. A run that is started again, on whatever machine, begins
with the newest complete step of the bucket, unless this machine has a newer one.

A bucket has no lock: take care that no two machines run in the same workdir.
"""

import contextlib
import errno
import logging
import os
import shutil
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import jax
from etils import epath

from av_mae import CheckpointError, ConfigError, checksums

SECONDS = 30.0
PART = 1 << 20  # bytes copied at once

log = logging.getLogger(__name__)


def is_remote(where: str | os.PathLike) -> bool:
    """Whether it names a bucket."""
    return "://" in os.fspath(where)


@contextlib.contextmanager
def kept(workdir: str | os.PathLike) -> Iterator[Path]:
    """The folder to work in: `workdir`, or what is kept like the bucket's folder.

    Raises ConfigError for a bucket and several processes, which need one folder that
    they share, and CheckpointError where it cannot be read, or where at the end not all
    could be copied.
    """
    if not is_remote(workdir):
        yield Path(workdir)
        return
    if jax.process_count() > 1:
        raise ConfigError(
            f"--workdir={workdir} is a bucket, but there are {jax.process_count()} "
            "processes, which have to share a folder: mount the bucket, or give a "
            "folder of a file system that all see."
        )
    try:
        mirror = Mirror(workdir)
        mirror.pull()
    except CheckpointError:
        raise
    except Exception as error:
        raise _unreachable(workdir, error) from error
    ended = threading.Event()
    thread = threading.Thread(target=mirror.keep, args=(ended,), daemon=True)
    thread.start()
    try:
        yield mirror.here
    except BaseException:
        _end(thread, ended)
        with contextlib.suppress(CheckpointError):  # what ended the run matters more
            mirror.push()
        raise
    _end(thread, ended)
    mirror.push()


def _unreachable(path, error: Exception) -> CheckpointError:
    """One sentence, for an error of any backend of epath, or of the cache's disk."""
    what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    todo = "correct the address, install its backend (pip install gcsfs s3fs), log in"
    if getattr(error, "errno", None) == errno.ENOSPC:
        todo = "free space for its copy, or set XDG_CACHE_HOME to a larger disk"
    return CheckpointError(f"{path} cannot be read or written ({what}): {todo}.")


def _end(thread: threading.Thread, ended: threading.Event):
    ended.set()
    thread.join()


class Mirror:
    """A workdir of a bucket (`there`) and its folder on this machine (`here`)."""

    def __init__(self, workdir: str | os.PathLike):
        self.there = epath.Path(workdir)
        self.here = _cache(self.there)
        self._sent: dict[str, tuple[int, int]] = {}  # size and time of what is there

    def pull(self):
        """Fills `here` from the bucket where that has the newer good step.

        Raises CheckpointError where all that either has is damaged: a run that began
        anew would replace it.
        """
        newest = self._newest_good()
        steps = _complete(self.there / checksums.FOLDER)
        if not steps:
            self._probe()
        if newest > max(steps, default=-1):
            log.warning(
                "This machine has step %d of %s, which the bucket lacks: the run goes "
                "on from it. Delete %s to begin with what the bucket holds.",
                *(newest, self.there, self.here),
            )
        problem = ""
        for step in reversed(steps):
            if step <= newest:
                break
            problem = self._take(step)
            if not problem:
                return
            log.warning("Step %d of %s is passed over: %s", step, self.there, problem)
        if problem and newest < 0:
            raise CheckpointError(
                f"{self.there} holds no good checkpoint, and nothing in it was "
                f"changed: in step {step}, {problem} Restore the files from a copy, or "
                "move this folder away to begin anew."
            )
        self._note_what_is_there()

    def _probe(self):
        """Writes and deletes a file: a bucket that cannot be reached looks empty."""
        marker = self.there / ".probe.lock"
        self.there.mkdir(parents=True, exist_ok=True)
        marker.write_bytes(b"")
        marker.unlink()

    def _newest_good(self) -> int:
        """The newest good step that is here; -1 for none."""
        folder = self.here / checksums.FOLDER
        steps = reversed(_complete(folder))
        return next((x for x in steps if not checksums.verify(folder / str(x))), -1)

    def _take(self, step: int) -> str:
        """Copies a step and the logs; why the step is not good, '' if it is.

        The checksums come last: a copy that a kill cuts short counts as unfinished.
        """
        log.info(
            "copying step %d and the logs of %s to %s", step, self.there, self.here
        )
        folder = self.here / checksums.FOLDER
        if (folder / str(step)).exists():  # a copy that was cut short
            checksums.delete(folder / str(step))
        for name in sorted(_files(self.there), key=_checksums_last):
            parts = name.split("/")
            if parts[0] == checksums.FOLDER and parts[1] != str(step):
                continue
            _copy(self.there / name, self.here / name)
            self._sent[name] = _state(self.here / name)
        problem = checksums.verify(folder / str(step))
        old = [step] if problem else [x for x in checksums.steps(folder) if x != step]
        for other in old:
            checksums.delete(folder / str(other))
        return problem

    def _note_what_is_there(self):
        """Steps that both have need not be copied again."""
        there, here = (x / checksums.FOLDER for x in (self.there, self.here))
        for step in {*_complete(there)} & {*_complete(here)}:
            if _seals(there / str(step)) == _seals(here / str(step)):
                for name in _files(here / str(step)):
                    name = f"{checksums.FOLDER}/{step}/{name}"
                    self._sent[name] = _state(self.here / name)

    def push(self):
        """Makes the bucket what the folder is. Raises CheckpointError if it cannot."""
        try:
            steps = set(_complete(self.here / checksums.FOLDER))
            for name in sorted(_files(self.here), key=_checksums_last):
                parts = name.split("/")
                if parts[0] == checksums.FOLDER and (
                    not parts[1].isdigit() or int(parts[1]) not in steps
                ):
                    continue
                state = _state(self.here / name)
                if self._sent.get(name) != state:
                    _copy(self.here / name, self.there / name)
                    self._sent[name] = state
            self._remove_old(steps)
        except Exception as error:  # each backend of epath has errors of its own
            raise CheckpointError(
                f"{self.there} cannot be written ({error}): the run is whole in "
                f"{self.here}; give the command again to copy it."
            ) from error

    def _remove_old(self, steps: set[int]):
        folder = self.there / checksums.FOLDER
        for step in checksums.steps(folder):
            if steps and step not in steps and step < max(steps):
                checksums.delete(folder / str(step))

    def keep(self, ended: threading.Event):
        """Pushes every `SECONDS` until the event; what fails is tried again."""
        while not ended.wait(SECONDS):
            try:
                self.push()
            except CheckpointError as error:
                # An old step that the run deletes meanwhile is no fault.
                if not isinstance(error.__cause__, FileNotFoundError):
                    log.warning("%s It is tried again.", error)


def fetched(path: str | os.PathLike) -> Path:
    """A copy on this machine of a checkpoint in a bucket, the folder of one step.

    Raises CheckpointError where there is none, or the bucket cannot be reached.
    """
    try:
        return _fetched(path)
    except CheckpointError:
        raise
    except Exception as error:
        raise _unreachable(path, error) from error


def _fetched(path: str | os.PathLike) -> Path:
    """The same, with the errors of epath's backends.

    path: as of `checkpoints.find`. An earlier copy serves where its checksums are the
    bucket's; copies of steps that the bucket has no more are deleted.
    """
    there = epath.Path(path)
    if there.name.isdigit() and (there / "state").is_dir():
        folder, whole = there.parent, not checksums.missing(there)
        steps = [int(there.name)] if whole else []
    else:
        inner = there / checksums.FOLDER
        folder = inner if inner.is_dir() else there
        steps = _complete(folder)
    if not steps:
        raise CheckpointError(
            f"{path} holds no complete checkpoint: give a workdir, its checkpoints "
            "folder or a step in it."
        )
    for old in {*checksums.steps(_cache(folder))} - {*checksums.steps(folder)}:
        checksums.delete(_cache(folder) / str(old))
    for step in map(str, reversed(steps)):
        here = _cache(folder) / step
        if _seals(here) != _seals(folder / step) or checksums.verify(here):
            shutil.rmtree(here, ignore_errors=True)
            log.info("copying %s to %s", folder / step, here)
            for name in sorted(_files(folder / step), key=_checksums_last):
                _copy(folder / step / name, here / name)
        problem = checksums.verify(here)
        if not problem:
            break
        log.warning("Step %s of %s is passed over: %s", step, folder, problem)
    return here  # where none is good, the oldest, whose reader says so


def _cache(there) -> Path:
    """Where a folder of a bucket has its copy."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "av_mae" / "runs" / urllib.parse.quote(os.fspath(there), safe="")


def _complete(folder) -> list[int]:
    """The steps with all their checksums."""
    return [
        step
        for step in checksums.steps(folder)
        if not checksums.missing(folder / str(step))
    ]


def _seals(step) -> dict[str, bytes]:
    """{name: contents} of a step's checksums files, by which two copies are one."""
    return {x.name: x.read_bytes() for x in step.glob("checksums-*.json")}


def _files(folder) -> Iterator[str]:
    """Names of the files below a folder, but for those that only a running run has."""
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        if path.name.startswith(".") and path.name.endswith(("lock", ".json")):
            continue
        if path.is_dir():
            yield from (f"{path.name}/{name}" for name in _files(path))
        else:
            yield path.name


def _checksums_last(name: str) -> tuple[bool, str]:
    return name.split("/")[-1].startswith("checksums-"), name


def _state(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _copy(source, target):
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as one, target.open("wb") as other:
        shutil.copyfileobj(one, other, PART)
