"""One training run around its step: where it starts, what it logs, when it saves.

Both trainers use it in the same way: `start` decides from what to begin, and the `Run`
writes numbers, pictures and checkpoints, and watches for bad numbers and pre-emption.
"""

import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from av_mae import (
    CheckpointError,
    checkpoints,
    importers,
    loop,
    optim,
    parallel,
    update,
)

log = logging.getLogger(__name__)


class Run:
    """A run in `workdir`: its first state, checkpoints, writers, and signals.

    Attributes: `state` (give it up before the first step: it is donated), `abstract`
    (shapes and shardings), `step` (updates already done), `writer`, `preemption`.
    """

    def __init__(self, config, meta: dict, workdir: Path):
        self.config = config
        self.workdir = Path(workdir)
        self.checkpoints = checkpoints.Checkpoints(
            workdir,
            json.loads(config_json(config)),
            meta,
            keep=config.checkpoint.keep,
            every_steps=config.checkpoint.every_steps,
        )
        self.state: Any = None
        self.abstract: Any = None
        self.step = 0
        self.writer: loop.MetricWriter | None = None
        self.preemption = loop.Preemption()
        self._recent: list[tuple[int, Mapping[str, Any]]] = []
        self._saved: int | None = None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.preemption.close()
        if self.writer:
            self.writer.close()
        self.checkpoints.close()

    def begin(self, first: Callable[[], dict], abstract: dict, source: Callable):
        """Sets the state: 1. resume this run, 2. start from other weights, 3. anew."""
        self.abstract = abstract
        latest = self.checkpoints.latest()
        if latest is not None:
            self.state = self.checkpoints.restore(latest, abstract)
            self.step, self._saved = latest, latest
            log.info("resuming %s at step %d", self.workdir, latest)
        else:
            self.state = first()
            if init_paths(self.config):
                self.state = self.state | {"params": source(self.state["params"])}
        loop.cut_metrics(self.workdir, self.step)
        self.writer = loop.MetricWriter(self.workdir)

    def watch(self, step: int, numbers: Mapping[str, Any]):
        """Keeps the numbers of a step until they are looked at."""
        self._recent.append((step, numbers))

    def check(self):
        """TrainingError at the first step since the last check with a bad number."""
        self._recent = jax.device_get(self._recent)
        for step, numbers in self._recent:
            loop.check_finite(numbers, step, self._saved, self.workdir)
        self._recent = self._recent[-1:]

    def log(self, clock: loop.Clock, total: int):
        """Writes the newest numbers and prints the line of a log step."""
        self.check()
        step, numbers = self._recent[-1]
        timing = clock.report(step)
        self.writer.write(step, {**numbers, **timing})
        each = {
            name.removeprefix("loss_"): float(value)
            for name, value in numbers.items()
            if name.startswith("loss_")
        }
        shown = each or {"": float(numbers["loss"])}
        rate = float(numbers["learning_rate"])
        log.info("%s", loop.progress(step, total, shown, rate, timing))

    def report(self, step: int, results: Mapping[str, float]):
        """Writes and prints the numbers of an evaluation, if training went well."""
        self.check()
        self.writer.write(step, results)
        log.info("step %d evaluation: %s", step, text(results))

    def due(self, step: int) -> bool:
        """Whether the config wants a checkpoint of this step."""
        return self.checkpoints.due(step)

    def save(self, step: int, state: dict):
        """Saves the state, after a look at the numbers that led to it."""
        self.check()
        self.checkpoints.save(step, state, force=True)
        self._saved = step


def start(
    config,
    data: dict,
    workdir: Path,
    init_params: Callable[[jax.Array], Any],
    tx: Any,
    mesh: Mesh,
    source: Callable[[Any], Any],
) -> Run:
    """A run that is ready to train; `source` maps first params to init_from's."""
    first, abstract = update.initial(init_params, tx, config.seed, mesh)
    run = Run(config, meta_of(config, data["train"]), workdir)
    try:
        run.begin(first, abstract, source)
    except BaseException:
        run.__exit__()  # lets go of the workdir
        raise
    return run


def optimiser(config, steps_per_epoch: int, total: int, abstract, **layers):
    """(optax chain, schedule); the log states the learning rate's rule and result."""
    clips = config.batch_size * config.compute.accumulate
    schedule, rule = optim.learning_rate(config.schedule, clips, steps_per_epoch, total)
    log.info("%s\n%s", loop.parameter_table(abstract), rule)
    return optim.make(config.optimizer, schedule, abstract, **layers), schedule


def meta_of(config, dataset) -> dict:
    """What a checkpoint keeps beside its config, to rebuild and explain the model."""
    names = dataset.label_names
    return {
        "labels": {head: list(names[head]) for head in names}
        if isinstance(names, Mapping)
        else list(names),
        "spectrogram": dict(config.spectrogram),
        "picture": config.picture.to_dict(),
        "dataset_checksum": dataset.checksum,
        "provenance": loop.provenance(),
    }


def config_json(config) -> str:
    """The config as JSON; tuples become lists."""
    return json.dumps(config.to_dict())


def config_of(saved: Mapping[str, Any]) -> ConfigDict:
    """The inverse of `config_json`, for `config.model` and its like."""
    return ConfigDict(saved)


def weights_of(path: Path | str, weights: str = "params") -> tuple[dict, ConfigDict]:
    """(params, config) of a checkpoint of ours, or of a file that others published.

    weights: `params`, or `ema` for their moving average. Of a published file, the
    sentences on what it does not tell go into the log.
    """
    if importers.find(path):
        found = importers.read(path)
        log.info("%s", "\n".join(found.notes))
        return found.params, found.config
    values, saved, _ = checkpoints.load(path, weights)
    return values, config_of(saved)


def init_paths(config) -> dict[str, tuple[str, str]]:
    """{field of init_from that is set: (path, the modality it is for, or '' for all)}.

    In the order in which they are read: the parts of one modality replace the whole's.
    """
    settings = config.init_from
    fields = {"checkpoint_path": (settings.checkpoint_path, "")}
    for m in config.modalities:
        fields[f"{m}.checkpoint_path"] = (settings[m].checkpoint_path, m)
    return {f"init_from.{k}": v for k, v in fields.items() if v[0]}


def branch(m: str) -> str:
    """Regex of the parameters that modality m has for itself before a joint layer."""
    return rf"embed/(\w+_)?{m}(/.*)?|encoder/{m}/block_.*"


def source_of(
    config,
    renames: Callable | None = None,
    gaps: Callable | None = None,
    adapt: Sequence = (),
):
    """The function first params → params of `init_from`; prints the whole report.

    `renames(theirs)` and `gaps(theirs)`, of the source's config, give the pairs and the
    (fresh, unused) regexes that `checkpoints.init_from` takes, as it takes `adapt`.
    `init_from.rgb` and `init_from.spectrogram` fill what belongs to one modality alone.
    """

    def take(params, field: str, path: str, m: str):
        settings = config.init_from
        values, theirs = weights_of(path, settings.weights)
        fresh, unused = gaps(theirs) if gaps else ((), ())
        targets = optim.named(params)
        if m:
            targets = {k: x for k, x in targets.items() if re.fullmatch(branch(m), k)}
            unused = [*unused, rf"(?!(?:{branch(m)})$).*"]
        try:
            found, report = checkpoints.init_from(
                targets,
                values,
                renames=renames(theirs) if renames else (),
                adapt=adapt,
                allow_fresh=[*fresh, *settings.allow_fresh],
                allow_unused=[*unused, *settings.allow_unused],
            )
        except CheckpointError as error:
            raise CheckpointError(f"{field}={path}: {error}") from error
        log.info(
            "%s %s\n%s", field.removesuffix(".checkpoint_path"), path, report.table()
        )
        for sentence in differences(theirs, config):
            log.warning("%s=%s: %s.", field, path, sentence)
        return jax.tree.map(lambda k, x: found.get(k, x), optim.names(params), params)

    def source(params):
        for field, (path, m) in init_paths(config).items():
            params = take(params, field, path, m)
        return params

    return source


def differences(theirs, config) -> list[str]:
    """Sentences on choices that have no parameters, but in which two models differ."""
    if "block" not in theirs.model:
        return []
    return [
        f"model.block.{name} is {config.model.block[name]!r}, but the source was "
        f"trained with {theirs.model.block[name]!r}"
        for name in ("gelu", "eps")
        if config.model.block[name] != theirs.model.block[name]
    ]


def params_of(config, workdir: Path, init_params: Callable, mesh: Mesh):
    """Params for evaluation: the newest checkpoint of workdir, else of init_from."""
    path = workdir
    if config.init_from.checkpoint_path and not any(
        (Path(workdir) / checkpoints.FOLDER).glob("[0-9]*")
    ):
        path = config.init_from.checkpoint_path
    values, _ = weights_of(path)
    shape = jax.eval_shape(init_params, jax.random.key(0))
    shardings = parallel.state_shardings(shape, mesh)
    first = jax.jit(init_params, out_shardings=shardings)(jax.random.key(0))
    params, _ = checkpoints.init_from(first, values)
    log.info("evaluating the weights of %s", path)
    return params


def text(numbers: Mapping[str, float]) -> str:
    """Numbers by name in one line."""
    return "  ".join(f"{k.removeprefix('eval/')} {v:.4g}" for k, v in numbers.items())
