"""The checksums of a checkpoint step, and which of its folders are whole.

`workdir/checkpoints/<step>/checksums-<process>.json` holds SHA-256 and size of each
file that a process wrote; it is written when they are on disk. A step that lacks some
is unfinished: the run was killed.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from etils import epath

FOLDER = "checkpoints"


def steps(folder: Path | epath.Path) -> list[int]:
    """The steps in a checkpoints folder, whatever their condition, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())


def delete(folder: Path | epath.Path):
    """Deletes a step, its checksums first: a kill in between leaves it unfinished."""
    for path in folder.glob("checksums-*.json"):
        path.unlink(missing_ok=True)
    epath.Path(folder).rmtree()


def seal(folder: Path, process: int, processes: int):
    """Writes checksums-<process>.json: the files of a finished step it wrote."""
    files = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() or path.name.startswith((".", "checksums-")):
            continue
        if _writer(name) == process:
            files[name] = {"sha256": _sha256(path), "size": path.stat().st_size}
    body = {
        "step": int(folder.name),
        "process": process,
        "processes": processes,
        "files": files,
    }
    temporary = folder / f".checksums-{process}.json"
    temporary.write_text(_sealed(body), encoding="utf-8")
    os.replace(temporary, folder / f"checksums-{process}.json")


def _writer(name: str) -> int:
    """The process that wrote a file: Orbax keeps each process's arrays in a folder of
    its own; everything else comes from process 0."""
    match = re.search(r"(?:^|/|\.)process_(\d+)(?:/|$)", name)
    return int(match[1]) if match else 0


def _sealed(body: Mapping[str, Any]) -> str:
    """The text of a checksums file, which holds its own SHA-256 too."""
    text = json.dumps(body, indent=1, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return json.dumps({**body, "seal": digest}, indent=1, sort_keys=True)


def _read_seal(path: Path | epath.Path) -> dict[str, Any] | None:
    """The contents of a checksums file, None if any bit of it is not as written."""
    try:
        text = path.read_text(encoding="utf-8")
        body = json.loads(text)
        del body["seal"]
        return body if _sealed(body) == text else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def missing(folder: Path | epath.Path) -> str:
    """The first checksums file that a step lacks; '' when the step is complete."""
    first = folder / "checksums-0.json"
    if not first.exists():
        return first.name
    body = _read_seal(first) or {"processes": 1}
    for process in range(body["processes"]):
        if not (folder / f"checksums-{process}.json").exists():
            return f"checksums-{process}.json"
    return ""


def verify(
    folder: Path, share: tuple[int, int] = (0, 1), parts: tuple[str, ...] = ()
) -> str:
    """Why a step cannot be used, naming the file; '' if it is complete and undamaged.

    share: (i, n) reads only every n-th file, from the i-th; parts: only what lies in
    these folders of the step, () for all.
    """
    if name := missing(folder):
        return f"it is unfinished (the run ended before {name} was written)."
    body = _read_seal(folder / "checksums-0.json")
    checksums: dict[str, dict[str, Any]] = {}
    for process in range(body["processes"] if body else 1):
        name = f"checksums-{process}.json"
        body = _read_seal(folder / name)
        if body is None or body["step"] != int(folder.name):
            return f"{name} is damaged."
        checksums.update(body["files"])
    for name in sorted(checksums)[share[0] :: share[1]]:
        if parts and name.split("/")[0] not in parts:
            continue
        if problem := _problem(folder / name, checksums[name]):
            return f"{name} {problem}"
    return ""


def _problem(path: Path, wanted: Mapping[str, Any]) -> str:
    """What is wrong with a file of a step, '' if nothing is."""
    if not path.is_file():
        return "is missing."
    try:
        size = path.stat().st_size
        if size != wanted["size"]:
            return f"is damaged ({size} bytes instead of {wanted['size']})."
        if _sha256(path) != wanted["sha256"]:
            return "is damaged (its SHA-256 is not what was written)."
    except OSError as error:
        return f"cannot be read ({error.strerror})."
    return ""


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
