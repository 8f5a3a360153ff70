"""A bucket for tests: its files lie in a folder here, and only epath reaches them."""

import os
from pathlib import Path

from etils.epath import backend, gpath


class Bucket:
    """epath's local backend, for files that only their gs:// names reach."""

    def __init__(self, folder: Path):
        self.folder, self.opened = folder, []

    def _here(self, path) -> str:
        path = os.fspath(path)
        assert path.startswith("gs://"), path
        return str(self.folder / path.removeprefix("gs://"))

    def __getattr__(self, name):
        method = getattr(backend.os_backend, name)
        return lambda path, *rest, **more: method(self._here(path), *rest, **more)

    def open(self, path, mode):
        self.opened.append((path, mode))
        return backend.os_backend.open(self._here(path), mode)

    def glob(self, path):
        found = backend.os_backend.glob(self._here(path))
        return [f"gs://{Path(one).relative_to(self.folder)}" for one in found]

    def replace(self, path, dst):
        backend.os_backend.replace(self._here(path), self._here(dst))


def make(tmp_path: Path, monkeypatch) -> Bucket:
    """`gs://` from now on, in tmp_path/buckets; its copies in tmp_path/cache."""
    made = Bucket(tmp_path / "buckets")
    monkeypatch.setitem(gpath._PREFIX_TO_BACKEND, "gs", made)
    monkeypatch.setattr(gpath, "_is_tf_installed", lambda: False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return made
