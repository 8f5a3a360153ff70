"""Checkpoints: saved while training goes on, verified before they are read.

A step is a folder `workdir/checkpoints/<step>` written by Orbax, with three items and
the checksums of all its files:

    state/     the arrays, as a plain nested dict; parts of the state that are no
               dicts (optax tuples) are stored by the names of their fields
    config/    the run's config (JSON)
    meta/      what else rebuilds the model: labels, statistics, versions (JSON), and
               `format`, the number of this layout
    checksums-<process>.json   SHA-256 and size of each file that a process wrote

Orbax renames a step into place when its arrays are on disk; the checksums follow, by
every process for its own files. A step that lacks some is unfinished (the run was
killed) and is passed over. Old steps go only when enough newer ones are complete, so
that a kill at any moment leaves a good step. Random keys are stored as their data.

Folders are POSIX paths that all processes share.
"""

import contextlib
import dataclasses
import errno
import fcntl
import json
import logging
import math
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from av_mae import CheckpointError, ConfigError, checksums, mirror

log = logging.getLogger(__name__)

FORMAT = 1

FREE = re.compile(
    r"(mode|steps|epochs|dry_run|workdir|nonfinite)"
    r"|(log|eval|checkpoint|parallel)\..*"
    r"|compute\.(?!accumulate$).*"
    r"|data\.(dir|threads|workers|cache|skip_bad_records)"
    r"|init_from\.(allow_fresh|allow_unused)"
)
"""Fields (dotted names) that may change when a run goes on: they alter neither the
state nor the order of the data. Any other difference is another experiment."""

TRAINED = re.compile(r"steps|epochs|nonfinite|compute\.dtype")
"""Those of `FREE` that change how the run is trained from then on."""

EVALUATED = re.compile(r"eval\.(split|average|corruption)")
"""Those of `FREE` that change what its evaluations are of."""

Adapt = Callable[[np.ndarray, tuple[int, ...]], np.ndarray]


class Checkpoints:
    """The checkpoints of one run in `workdir`, which it locks against a second run.

    config, meta: JSON-able dicts, stored with each step; meta may hold the key
    `dataset_checksum`. Raises CheckpointError if the workdir cannot be written, is in
    use, or holds another experiment (the sentence names the first field that differs).
    """

    def __init__(
        self,
        workdir: Path | str,
        config: Mapping[str, Any],
        meta: Mapping[str, Any],
        keep: int = 2,
        every_steps: int = 1000,
    ):
        if keep < 1 or every_steps < 1:
            raise ConfigError(
                f"checkpoint.keep={keep} and checkpoint.every_steps={every_steps} must "
                "be at least 1."
            )
        self.workdir = Path(workdir).absolute()
        self.folder = self.workdir / checksums.FOLDER
        self._keep, self._every = keep, every_steps
        self._config = json.loads(json.dumps(config))
        self._meta = json.loads(json.dumps({**meta, "format": FORMAT}))
        self._good: set[int] = set()
        self._bad: set[int] = set()
        self._error: Exception | None = None
        self._sealer: threading.Thread | None = None
        self._lock = _lock(self.folder)
        try:
            self._refuse_other_experiment()
        except BaseException:
            self._unlock()
            raise
        # Old steps are deleted here, not by Orbax, which does not know which are good.
        options = ocp.CheckpointManagerOptions(cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def _refuse_other_experiment(self):
        for step in reversed(checksums.steps(self.folder)):
            folder = self.folder / str(step)
            if checksums.verify(folder, parts=("config", "meta")):
                continue  # a damaged or unfinished step: an older one will tell
            config, meta = _read_json(folder, "config"), _meta(folder)
            for name, (old, new) in changes(config, self._config).items():
                if not FREE.fullmatch(name):
                    raise CheckpointError(
                        f"{self.workdir} holds another experiment: config.{name} is "
                        f"{new!r}, there it is {old!r}; choose another --workdir, or "
                        "set the field back."
                    )
            ours, theirs = (m.get("dataset_checksum") for m in (self._meta, meta))
            if ours and theirs and ours != theirs:
                raise CheckpointError(
                    f"{self.workdir} was trained on other records than those in "
                    "data.dir (their checksums differ): choose another --workdir."
                )
            return

    def describe(self, **meta: Any):
        """Adds to what is stored beside the steps that are saved from now on."""
        self._meta |= json.loads(json.dumps(meta))

    def meta(self, step: int) -> dict[str, Any]:
        """What is stored beside a step that `latest` found good."""
        return _meta(self.folder / str(step))

    def config(self, step: int) -> dict[str, Any]:
        """The config that is stored beside it."""
        return _read_json(self.folder / str(step), "config")

    def due(self, step: int) -> bool:
        """Whether `save` would save at this step without force."""
        return step % self._every == 0

    def latest(self) -> int | None:
        """The newest complete and undamaged step; what is passed over is logged.

        None where there is none, or one alone that a kill left unfinished. Raises
        CheckpointError where what is there is damaged: to begin anew would replace it.
        """
        damaged = ""
        while True:
            # Process 0 decides: the others might list the folder at another moment.
            left = [s for s in checksums.steps(self.folder) if s not in self._bad]
            step = from_first(max(left, default=-1))
            if step < 0 and damaged:
                raise CheckpointError(
                    f"{self.folder} holds no good checkpoint, and nothing in it was "
                    f"changed: {damaged} Restore the files from a copy, or move this "
                    "folder away to begin anew."
                )
            if step < 0:
                return None
            folder = self.folder / str(step)
            problem = self._problem(step)
            if not problem:
                return step
            if from_first(not checksums.missing(folder)):
                damaged = f"in step {step}, {problem}"
            self._bad.add(step)
            log.warning("Step %d of %s is passed over: %s", step, self.folder, problem)

    def _problem(self, step: int) -> str:
        """Why a step is not good, '' if it is; every process checks its share."""
        share = (jax.process_index(), jax.process_count())
        problem = checksums.verify(self.folder / str(step), share)
        if any(_from_all(bool(problem))):
            return problem or "another process found a damaged file in it (its log)."
        self._good.add(step)
        return ""

    def restore(self, step: int, abstract_state: Any) -> Any:
        """The state of a step, with the shapes, types and shardings asked for.

        abstract_state: the state's tree with ShapeDtypeStructs (or arrays) as leaves;
        their shardings may be those of any mesh. Raises CheckpointError naming the
        damaged file, or the first array that does not fit.
        """
        folder = self.folder / str(step)
        problem = self._problem(step)
        if problem:
            raise CheckpointError(f"{folder} cannot be restored: {problem}")
        leaves, tree = jax.tree.flatten(abstract_state)
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        arrays = jax.tree.unflatten(tree, [_abstract(leaf, here) for leaf in leaves])
        wanted = _nested(arrays)
        _check_shapes(folder, wanted)
        restore_args = ocp.checkpoint_utils.construct_restore_args(wanted)
        with _reader() as reader:
            restored = reader.restore(
                epath.Path(folder / "state"),
                args=ocp.args.PyTreeRestore(item=wanted, restore_args=restore_args),
            )
        found = _names(restored)
        values = [
            jax.random.wrap_key_data(found[name], impl=_impl(leaf))
            if _is_key(leaf)
            else found[name]
            for name, leaf in zip(_names(arrays), leaves, strict=True)
        ]
        return jax.tree.unflatten(tree, values)

    def save(self, step: int, state: Any, force: bool = False) -> bool:
        """Starts saving the state if the step is due or forced; says whether it did.

        Returns as soon as the arrays are copied from the devices: the state may be
        donated at once. Raises CheckpointError if the save before this one failed.
        """
        if not (force or self.due(step)):
            return False
        self.wait()
        if step in self._good:
            return False
        folder = self.folder / str(step)
        arrays = _nested(
            jax.tree.map(lambda x: jax.random.key_data(x) if _is_key(x) else x, state)
        )
        try:
            if jax.process_index() == 0 and folder.exists():
                checksums.delete(folder)  # unfinished or damaged, of an earlier run
            _barrier(f"save {step}")
            self._manager.reload()
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(arrays),
                    config=ocp.args.JsonSave(self._config),
                    meta=ocp.args.JsonSave(self._meta),
                ),
                force=True,
            )
        except Exception as error:
            raise _save_error(folder, error) from error
        self._bad.discard(step)
        self._sealer = threading.Thread(
            target=self._finish, args=(step,), name="checksums"
        )
        self._sealer.start()
        return True

    def _finish(self, step: int):
        """Waits for Orbax, writes this process's checksums, deletes old steps."""
        folder = self.folder / str(step)
        try:
            self._manager.wait_until_finished()
            checksums.seal(folder, jax.process_index(), jax.process_count())
            if jax.process_index() == 0 and _all_sealed(folder):
                self._delete_old()
            self._good.add(step)
        except Exception as error:
            self._error = _save_error(folder, error)

    def _delete_old(self):
        left = [s for s in checksums.steps(self.folder) if s not in self._bad]
        complete = [s for s in left if not checksums.missing(self.folder / str(s))]
        if len(complete) < self._keep:
            return
        for step in checksums.steps(self.folder):
            if step < complete[-self._keep]:
                checksums.delete(self.folder / str(step))

    def wait(self):
        """Waits for the last save to be complete; CheckpointError if it failed."""
        if self._sealer:
            self._sealer.join()
            self._sealer = None
        if self._error:
            error, self._error = self._error, None
            raise error

    def close(self):
        """Waits for the last save and lets go of the workdir."""
        try:
            self.wait()
        finally:
            with contextlib.suppress(Exception):  # what failed has been raised above
                self._manager.close()
            self._unlock()

    def _unlock(self):
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def find(path: Path | str) -> tuple[Path, int]:
    """The checkpoints folder and the newest good step in it.

    path: a workdir, its `checkpoints` folder, or one step in it (then that step); one
    in a bucket is copied here first. Raises CheckpointError, in one sentence, if there
    is none.
    """
    if mirror.is_remote(path):
        path = mirror.fetched(path)
    path = Path(path).absolute()
    if path.name.isdigit() and (path / "state").is_dir():
        problem = checksums.verify(path)
        if problem:
            raise CheckpointError(f"{path} cannot be read: {problem}")
        return path.parent, int(path.name)
    folder = path / checksums.FOLDER if (path / checksums.FOLDER).is_dir() else path
    found = checksums.steps(folder)
    if not found:
        raise CheckpointError(
            f"{path} holds no checkpoint: give a workdir, its checkpoints folder or a "
            "step in it; `python -m av_mae.convert` makes one of published weights."
        )
    for step in reversed(found):
        problem = checksums.verify(folder / str(step))
        if not problem:
            return folder, step
        log.warning("Step %d of %s is passed over: %s", step, folder, problem)
    raise CheckpointError(
        f"{folder} holds no good checkpoint; its oldest step {step} is unusable: "
        f"{problem}"
    )


def load(
    path: Path | str, weights: str = "params"
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """(params, config, meta) of a checkpoint; params is a nested dict of numpy arrays.

    path: as for `find`; weights: the part of the state to read, `params` or `ema`.
    """
    folder, step = find(path)
    folder = folder / str(step)
    log.info("reading the %s of %s", weights, folder)
    config, meta = _read_json(folder, "config"), _meta(folder)
    with _reader() as reader:
        saved = reader.metadata(epath.Path(folder / "state")).tree
        if weights not in saved:
            raise CheckpointError(
                f"{folder} holds no {weights!r}; it holds {', '.join(sorted(saved))}."
            )
        wanted = {weights: saved[weights]}
        restored = reader.restore(
            epath.Path(folder / "state"),
            args=ocp.args.PyTreeRestore(
                item=jax.tree.map(lambda _: 0, wanted),
                restore_args=jax.tree.map(
                    lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted
                ),
                partial_restore=True,
            ),
        )
    return restored[weights], config, meta


def _all_sealed(folder: Path, seconds: float = 600.0) -> bool:
    """Waits until every process has written its checksums; False if some do not."""
    until = time.monotonic() + seconds
    while checksums.missing(folder):
        if time.monotonic() > until:
            log.warning("%s has no %s.", folder, checksums.missing(folder))
            return False
        time.sleep(0.05)
    return True


# Folders.


def _lock(folder: Path) -> int | None:
    """Makes the folder and takes its lock, which the system frees when a process ends.

    None where locking is not ours to do (other processes) or not supported.
    """
    if jax.process_index() != 0:
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise CheckpointError(
            f"{folder} cannot be written ({error.strerror}): choose another --workdir."
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            log.warning(
                "%s has no locks (%s): take care that no second run works there.",
                *(folder.parent, error.strerror),
            )
            return None
        raise CheckpointError(
            f"{folder.parent} is in use by another run: choose another --workdir, or "
            "stop that run."
        ) from error
    return lock


def _save_error(folder: Path, error: Exception) -> CheckpointError:
    """One sentence about a failed save, with the free space, the usual reason."""
    space = ""
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(folder.parent).free
        space = f" ({free / 2**20:.0f} MiB are free there)"
    reason = " ".join(str(error).split())[:300]
    return CheckpointError(
        f"{folder} could not be saved{space}: {reason or type(error).__name__}"
    )


def _read_json(folder: Path, item: str) -> dict[str, Any]:
    path = folder / item / "metadata"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _meta(folder: Path) -> dict[str, Any]:
    """What is stored beside a step; CheckpointError for one of a later release."""
    meta = _read_json(folder, "meta")
    if meta["format"] > FORMAT:
        raise CheckpointError(
            f"{folder} has format {meta['format']}, this release reads up to {FORMAT}: "
            "update av_mae."
        )
    return meta


def changes(
    saved: Mapping[str, Any], current: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """{dotted field: (value in saved, in current)} where two JSON configs differ.

    A field that only one of them has is not compared: releases add fields. Numbers may
    differ by rounding: mean and deviation of the data, measured on other devices.
    """
    old, new = _dotted(saved), _dotted(current)
    return {
        name: (value, new[name])
        for name, value in old.items()
        if name in new and not _alike(new[name], value)
    }


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-5)
    return one == other


def _dotted(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A flat dict with dotted names, from any nesting of JSON objects."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat |= _dotted(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


# Trees.


def _reader() -> contextlib.AbstractContextManager[ocp.PyTreeCheckpointHandler]:
    return contextlib.closing(ocp.PyTreeCheckpointHandler())


def _impl(leaf: Any) -> Any:
    """The algorithm of an abstract random key, which jax tells only of traced ones."""
    found = []
    jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), leaf)
    return found[0]


def _is_key(leaf: Any) -> bool:
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)


def _abstract(leaf: Any, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    """Shape, type and sharding (or the one given) of the array stored for a leaf."""
    sharding = getattr(leaf, "sharding", None) or sharding
    stored = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
    return jax.ShapeDtypeStruct(np.shape(stored), stored.dtype, sharding=sharding)


def _names(tree: Any) -> dict[str, Any]:
    """Leaves by '/'-joined name, in the tree's order."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in leaves
    }


def _nested(tree: Any) -> dict[str, Any]:
    """The same leaves in plain nested dicts; tuples and classes by field names."""
    nested: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        *parents, last = (jax.tree_util.keystr((k,), simple=True) for k in path)
        place = nested
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = leaf
    return nested


def _check_shapes(folder: Path, wanted: dict[str, Any]):
    with _reader() as reader:
        saved = _names(reader.metadata(epath.Path(folder / "state")).tree)
    arrays = _names(wanted)
    for name in sorted(saved.keys() ^ arrays.keys()):
        where = "only in the checkpoint" if name in saved else "not in the checkpoint"
        raise CheckpointError(
            f"{folder} is of another model or optimiser: {name} is {where}."
        )
    for name, array in arrays.items():
        if tuple(saved[name].shape) != tuple(np.shape(array)):
            raise CheckpointError(
                f"{folder} is of another model: {name} is {tuple(saved[name].shape)} "
                f"there, {tuple(np.shape(array))} here."
            )


# Several processes.


def from_first(value: int) -> int:
    """Process 0's value, in every process."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.asarray(value, np.int32)))


def _from_all(value: bool) -> list[bool]:
    """Every process's value, in every process."""
    if jax.process_count() == 1:
        return [value]
    flags = multihost_utils.process_allgather(np.asarray(value))
    return [bool(flag) for flag in np.ravel(flags)]


def _barrier(name: str):
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


# Starting from other weights.


class Row(NamedTuple):
    """Where a parameter of the model came from."""

    target: str
    source: str  # 'fresh' if it keeps its initial value
    shape: tuple[int, ...]
    change: str  # '' if the array was taken as it is


@dataclasses.dataclass(frozen=True)
class Report:
    """What `init_from` did: every target parameter once, and the sources not used."""

    rows: list[Row]
    unused: list[tuple[str, tuple[int, ...]]]

    @property
    def fresh(self) -> list[str]:
        return [row.target for row in self.rows if row.source == "fresh"]

    def table(self) -> str:
        """The report as text, one line per parameter, with a summary."""
        lines = [("parameter", "from", "shape", "change")]
        lines += [(r.target, r.source, str(r.shape), r.change) for r in self.rows]
        lines += [("(unused)", name, str(shape), "") for name, shape in self.unused]
        widths = [max(len(line[i]) for line in lines) for i in range(3)]
        text = [
            "  ".join(
                [*(c.ljust(w) for c, w in zip(line, widths, strict=False)), line[3]]
            ).rstrip()
            for line in lines
        ]
        return "\n".join([*text, self.summary()])

    def summary(self) -> str:
        taken = len(self.rows) - len(self.fresh)
        changed = sum(bool(r.change) for r in self.rows if r.source != "fresh")
        return (
            f"{taken} of {len(self.rows)} parameters from the source ({changed} "
            f"changed), {len(self.fresh)} fresh; {len(self.unused)} of the source "
            "unused."
        )


def init_from(
    params: Any,
    source_params: Any,
    *,
    renames: Iterable[tuple[str, str]] = (),
    adapt: Iterable[tuple[str, Adapt]] = (),
    allow_fresh: str | Sequence[str] = (),
    allow_unused: str | Sequence[str] = (),
) -> tuple[Any, Report]:
    """(params with the values of source_params, report of every parameter).

    Parameters meet by '/'-joined name. renames: (regex, replacement) pairs that turn
    a target's name into its source's, where these differ; the first regex that
    matches the whole name counts, and several targets may share a source. adapt:
    (regex on the target's name, function(array, shape) -> array of that shape) for
    arrays whose shape differs. Types, shardings and the tree are the target's.

    Raises CheckpointError listing every target without source or with another shape,
    unless a regex in allow_fresh matches its whole name (it stays as it is), and every
    source left over, unless one in allow_unused does.
    """
    renames, adapt = list(renames), list(adapt)
    source, targets = _names(source_params), _names(params)
    values, rows, used = [], [], set()
    missing, unfit = [], []
    for name, target in targets.items():
        shape = tuple(np.shape(target))
        origin = _renamed(name, renames)
        value, change = target, ""
        if origin in source:
            used.add(origin)
            value, change = _adapted(name, np.asarray(source[origin]), target, adapt)
        if origin in source and value is not None:
            rows.append(Row(name, origin, shape, change))
            values.append(_place(value, target))
            continue
        if not _covered(name, allow_fresh):
            (unfit if change else missing).append(f"{name} {change}".strip())
        rows.append(Row(name, "fresh", shape, change))
        values.append(target)
    unused = [(name, np.shape(x)) for name, x in source.items() if name not in used]
    extra = [name for name, _ in unused if not _covered(name, allow_unused)]
    problems = [
        f"{text}: {', '.join(names)}"
        for text, names in (
            ("not in the source (init_from.allow_fresh)", missing),
            ("of another shape (init_from.allow_fresh)", unfit),
            ("of the source not used (init_from.allow_unused)", extra),
        )
        if names
    ]
    if problems:
        raise CheckpointError(
            "The source does not fit the model, and the regexes named do not cover "
            f"these parameters: {'; '.join(problems)}."
        )
    tree = jax.tree.structure(params)
    return jax.tree.unflatten(tree, values), Report(rows, unused)


def _renamed(name: str, renames: list[tuple[str, str]]) -> str:
    for pattern, replacement in renames:
        match = re.fullmatch(pattern, name)
        if match:
            return match.expand(replacement)
    return name


def _adapted(
    name: str, value: np.ndarray, target: Any, adapt: list[tuple[str, Adapt]]
) -> tuple[np.ndarray | None, str]:
    """(array of the target's shape and type, what was changed); None if impossible."""
    shape, changes = tuple(np.shape(target)), []
    if value.shape != shape:
        for pattern, function in adapt:
            if re.fullmatch(pattern, name):
                changes.append(f"{value.shape} by {function.__name__}")
                value = np.asarray(function(value, shape))
                break
    if value.shape != shape:
        return None, f"is {shape}, in the source {value.shape}"
    if value.dtype != target.dtype:
        changes.append(f"{value.dtype} to {target.dtype}")
    return value.astype(target.dtype), ", ".join(changes)


def _place(value: np.ndarray, target: Any) -> Any:
    """The value where the target lies."""
    if not isinstance(target, jax.Array):
        return value
    return jax.make_array_from_callback(
        value.shape, target.sharding, lambda index: value[index]
    )


def _covered(name: str, patterns: str | Sequence[str]) -> bool:
    patterns = [patterns] if isinstance(patterns, str) else patterns
    return any(re.fullmatch(pattern, name) for pattern in patterns if pattern)
