"""Where data sets lie: in a local folder, or in a bucket (gs://, s3://) by etils.epath.

A file is written under another name and gets its own when it is whole. Files of a
bucket are written here first, then copied. ArrayRecord opens local files alone, so a
shard that is read from a bucket is copied once into the cache of this machine
($XDG_CACHE_HOME/av_mae/shards, else ~/.cache/…), where its SHA-256 must be right.
"""

import contextlib
import hashlib
import logging
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from data import RecordError

PART = 1 << 20  # bytes read at once

log = logging.getLogger(__name__)


def place(where: str | os.PathLike) -> Path:
    """A local path, or etils's (used alike) where `where` names a bucket."""
    if not is_remote(where):
        return Path(where)
    from etils import epath

    return epath.Path(where)


def is_remote(where: str | os.PathLike) -> bool:
    return "://" in os.fspath(where)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A local file to write; it becomes `path` at the end, unless there is an error."""
    if not is_remote(path):
        temporary = _temporary_name(path)
        try:
            yield temporary
            _make_final(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        return
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / path.name
        yield local
        temporary = _temporary_name(path)
        with local.open("rb") as source, temporary.open("wb") as target:
            shutil.copyfileobj(source, target, PART)
        temporary.replace(path)


def _temporary_name(path: Path) -> Path:
    """A name that no other thread on any machine writes to at the same time."""
    who = f"{socket.gethostname()}-{os.getpid()}-{threading.get_ident()}"
    return path.with_name(f"{path.name}.{who}.tmp")


def _make_final(temporary: Path, path: Path) -> None:
    """Flushes a file to the disk, then gives it its name."""
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)  # the name too
    os.close(folder)


def size(path: Path) -> int:
    """Bytes of a file."""
    found = path.stat()
    return found.length if is_remote(path) else found.st_size


def sketch(path: Path) -> str:
    """SHA-256 of a file's size, beginning and end (64 KiB each), which is quick."""
    length, part = path.stat().st_size, 1 << 16
    digest = hashlib.sha256(str(length).encode())
    with open(path, "rb") as file:
        digest.update(file.read(part))
        file.seek(max(0, length - part))
        digest.update(file.read(part))
    return digest.hexdigest()


def checksum(path: Path) -> dict:
    """{"sha256": hex, "size": bytes} of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(PART):
            digest.update(part)
    return dict(sha256=digest.hexdigest(), size=size(path))


def local_copy(path: Path, expected: dict | None) -> Path:
    """`path` itself, or the file that was copied from a bucket, now or before.

    expected: its `checksum`. RecordError where that of the copy differs.
    """
    if not is_remote(path):
        return path
    if expected is None:
        raise RecordError(f"{path}: dataset.json beside it has no checksum of it.")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    kept = home / "av_mae" / "shards" / expected["sha256"]
    if kept.is_file() and size(kept) == expected["size"]:
        return kept
    kept.parent.mkdir(parents=True, exist_ok=True)
    log.info("copying %s (%.1f MB) to %s", path, expected["size"] / 1e6, kept)
    with writing(kept) as temporary:
        with path.open("rb") as source, temporary.open("wb") as target:
            shutil.copyfileobj(source, target, PART)
        if checksum(temporary) != expected:
            raise RecordError(
                f"{path}: its SHA-256 is not that of the finished data set; copy or "
                "prepare the data set again."
            )
    return kept
