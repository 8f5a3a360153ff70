"""One training run around its step: where it starts, what it logs, when it saves.

Both trainers use it in the same way: `start` decides from what to begin, and the `Run`
writes numbers, pictures and checkpoints, and watches for bad numbers and pre-emption.
"""

import contextlib
import functools
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from av_mae import (
    BadNumberError,
    CheckpointError,
    TrainingError,
    caveats,
    checkpoints,
    checksums,
    flops,
    importers,
    loop,
    optim,
    parallel,
    update,
)
from av_mae.importers import imported

log = logging.getLogger(__name__)


# Fields that change what a model sees or computes in an evaluation; of the means and
# deviations, which may differ by rounding, `caveats.of_inputs` speaks.
SEEN = re.compile(
    r"model\.(?!variant|width|depth|mlp|classes|label_heads|drop_path"
    r"|head_init|head_dropout).*"
    r"|objective\.(kind|target\..*|unmasked|inpaint_layout)|mask\..*|modalities"
    r"|data\.(num_frames|stride|fps|size|short_side|resize|sampling|audio_\w+)"
)
# Every field that is fixed in a run, but for how a finished one may be evaluated.
ANY = re.compile(
    rf"(?!({checkpoints.FREE.pattern})$|(spectrogram|picture)\.(mean|std|normalise)$"
    r"|spectrogram\.preset$|data\.(views|crops)$).*"
)

# So many dropped updates one after another end a run that may skip some.
MAX_SKIPPED = 100


class Run:
    """A run in `workdir`: its first state, checkpoints, writers, and signals.

    Attributes: `state` (give it up before the first step: it is donated), `abstract`
    (shapes and shardings), `step` (updates already done), `writer`, `preemption`,
    `caveats` (sentences that belong beside the run's numbers), `of_evaluations` (those
    that do not belong to its checkpoints too).
    """

    def __init__(
        self,
        config,
        meta: dict,
        workdir: Path,
        ids: Sequence[str] = (),
        devices: int = 1,
    ):
        self.config = config
        self._use = functools.partial(
            flops.utilisation, config, devices=devices, classes=_classes(meta)
        )
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
        self.caveats: list[str] = []
        self.of_evaluations: list[str] = []
        self._ids = ids
        self._watched: list[tuple[int, Mapping[str, Any], Any]] = []
        self._newest: tuple[int, Mapping[str, Any]] = (0, {})
        self._saved: int | None = None
        self._evaluated = 0  # the newest step whose evaluation is in METRICS
        self._spikes = loop.Spikes()
        self._spiked: list[int] = []  # steps since the start of this process
        self._skipped_in_a_row = 0
        self._skipped_before = 0  # by the runs that this one goes on from

    def __enter__(self):
        return self

    def __exit__(self, kind=None, *error):
        self.preemption.close()
        if self.writer:
            self.writer.close()
        # What ends a run matters more than that its last checkpoint failed too.
        with contextlib.suppress(*[CheckpointError] if kind else []):
            self.checkpoints.close()

    def begin(self, first: Callable[[], dict], abstract: dict, source: Callable):
        """Sets the state: 1. resume this run, 2. start from other weights, 3. anew.

        `source(params, caveats)` adds what the second has to say.
        """
        self.abstract = abstract
        latest = self.checkpoints.latest()
        if latest is not None:
            self.state = self.checkpoints.restore(latest, abstract)
            self.step, self._saved = latest, latest
            self._skipped_before = int(self.state["step"] - update.done(self.state))
            self.caveats += caveats.of_meta(self.checkpoints.meta(latest))
            self._tell_changes(latest)
            log.info("resuming %s at step %d", self.workdir, latest)
        else:
            self.state = first()
            if init_paths(self.config):
                params = source(self.state["params"], self.caveats)
                self.state |= {"params": params}
                if "ema" in self.state:
                    self.state["ema"] = update.copy(params)
        loop.cut_metrics(self.workdir, self.step)
        evaluated = [row["step"] for row in loop.evaluations(self.workdir)]
        # The others may read the file before process 0 has cut it.
        self._evaluated = checkpoints.from_first(max(evaluated, default=0))
        self.writer = loop.MetricWriter(self.workdir)

    def _tell_changes(self, step: int):
        """Notes what was set otherwise before `step`, of what may change meanwhile."""
        now = json.loads(config_json(self.config))
        found = checkpoints.changes(self.checkpoints.config(step), now)
        for told, where in (
            (checkpoints.TRAINED, self.caveats),
            (checkpoints.EVALUATED, self.of_evaluations),
        ):
            some = {k: x for k, x in found.items() if told.fullmatch(k)}
            where += caveats.of_changes(some, f"from step {step} on, other than before")

    def lacks_evaluation(self, every: int) -> bool:
        """Whether the evaluation of the step that it goes on from has failed."""
        return self._evaluated < self.step and self.step % every == 0

    @contextlib.contextmanager
    def kept(self, step: int, state: dict) -> Iterator[None]:
        """Inside, what fails (an evaluation, a picture) costs no step: they are saved.

        But not after a bad number, nor by one process of several, which cannot save
        alone.
        """
        try:
            yield
        except BadNumberError:
            raise
        except Exception:
            if jax.process_count() == 1:
                with contextlib.suppress(CheckpointError, TrainingError):
                    self.save(step, state)
            raise

    def watch(self, step: int, numbers: Mapping[str, Any], index: Any = None):
        """Keeps the numbers of a step, and its clips' [b], until they are looked at."""
        self._watched.append((step, numbers, index))

    def check(self):
        """Looks at the steps since the last look: bad numbers, spikes of the loss.

        Raises BadNumberError at the first step with a bad number. Where updates may be
        skipped, it names the clips of those that were, and ends a run only when that is
        all it does: after MAX_SKIPPED updates one after another.
        """
        watched, self._watched = self._watched, []
        spikes = []
        steps, numbers, indices = zip(*watched, strict=True) if watched else [()] * 3
        for step, values, index in zip(
            steps, jax.device_get(numbers), indices, strict=True
        ):
            self._newest = (step, values)
            bad = loop.not_finite(values)
            self._skipped_in_a_row = self._skipped_in_a_row + 1 if bad else 0
            if bad:
                try:
                    loop.note_clips(self.workdir, step, bad, self._names(index))
                finally:  # whether or not that could be written
                    self._stop_or_skip(step, values, bad)
            if text := self._spikes.see(float(values["loss"])):
                spikes.append((step, text))
                self._spiked.append(step)
        if spikes:
            more = f" (and {len(spikes) - 1} more)" if len(spikes) > 1 else ""
            log.warning("the loss has a spike at step %d: %s%s", *spikes[0], more)

    def _stop_or_skip(self, step: int, values: Mapping, bad: Mapping):
        if self.config.nonfinite != "skip":
            loop.check_finite(values, step, self._saved, self.workdir)
        log.warning(
            "the update of step %d is skipped: %s (its clips: %s)",
            *(step, ", ".join(f"{k} is {v}" for k, v in bad.items()), loop.NONFINITE),
        )
        if self._skipped_in_a_row >= MAX_SKIPPED:
            raise BadNumberError(
                f"{MAX_SKIPPED} updates one after another were not finite, up to step "
                f"{step}: try a lower schedule.learning_rate_per_256, or "
                f"compute.dtype=float32; {loop.NONFINITE} names the clips."
            )

    def _names(self, index: Any) -> list[str]:
        """The ids of the clips of a global batch."""
        if index is None:
            return []
        if jax.process_count() > 1:  # every process comes here, at the same step
            index = multihost_utils.process_allgather(index, tiled=True)
        return [self._ids[i] for i in jax.device_get(index) if 0 <= i < len(self._ids)]

    def log(self, clock: loop.Clock, total: int):
        """Writes the newest numbers and prints the line of a log step.

        What is not finite (the loss of a skipped update) is printed, not written.
        """
        self.check()
        step, numbers = self._newest
        timing, bad = clock.report(step), loop.not_finite(numbers)
        timing |= self._use(timing["clips_per_second"])
        written = {name: x for name, x in numbers.items() if name not in bad}
        self.writer.write(step, {**written, **timing})
        each = {
            name.removeprefix("loss_"): float(value)
            for name, value in numbers.items()
            if name.startswith("loss_")
        }
        shown = each or {"": float(numbers["loss"])}
        rate = float(numbers["learning_rate"])
        log.info("%s", loop.progress(step, total, shown, rate, timing))

    def report(self, step: int, results: Mapping[str, float]):
        """Writes and prints the numbers of an evaluation, if training went well.

        What is not finite is printed, and written as how many numbers that are
        (`loop.NOT_FINITE`). Nothing is written where the file has the step's evaluation
        already, as after a new start.
        """
        self.check()
        bad = loop.not_finite(results)
        if step > self._evaluated:
            written = {k: x for k, x in results.items() if k not in bad}
            count = {loop.NOT_FINITE: len(bad)} if bad else {}
            self.writer.write(step, written | count)
            self._evaluated = step
        log.info("step %d evaluation: %s", step, text(results))
        if bad:
            log.warning("not finite in this evaluation: %s", text(bad))

    def conclude(self, results: Mapping[str, float], dataset):
        """Prints the final numbers, with what has to be said beside them.

        dataset: that of the evaluation.
        """
        said = [*self.caveats, *left_out(self.config, dataset)]
        if skipped := int(self._newest[1].get("skipped", self._skipped_before)):
            said.append(f"{skipped} updates were skipped as not finite")
        if self._spiked:
            said.append(
                f"spikes of the loss since this process began: {len(self._spiked)}, "
                f"the last at step {self._spiked[-1]}"
            )
        log.info("result: %s%s", text(results), caveats.text(said))

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
    source: Callable[[Any, list[str]], Any],
    options: update.Options = update.Options(),  # noqa: B008 (it cannot change)
) -> Run:
    """A run that is ready to train; `source` maps first params to init_from's."""
    first, abstract = update.initial(init_params, tx, config.seed, mesh, options)
    train = data["train"]
    run = Run(config, meta_of(config, train), workdir, train.ids, mesh.size)
    try:
        run.begin(first, abstract, source)
    except BaseException:
        run.__exit__()  # lets go of the workdir
        raise
    if options.trained != ".*" and run.step == 0 and not init_paths(config):
        run.caveats.append(
            "the frozen parameters are random: init_from names no source"
        )
    for name, split in (("train", config.data.split), ("eval", config.eval.split)):
        dataset = data[name]
        log_data(config, name, split, dataset)
        found = caveats.of_data(config, dataset, split)
        run.caveats += [sentence for sentence in found if sentence not in run.caveats]
    run.checkpoints.describe(caveats=run.caveats)
    run.caveats += run.of_evaluations
    run.caveats += caveats.of_subsets(config, data["eval"])
    run.caveats += caveats.of_corruption(config)
    if run.caveats:
        log.warning("beside all numbers of this run:%s", caveats.text(run.caveats))
    return run


def left_out(config, dataset) -> list[str]:
    """What the evaluations met on their way; every process asks at the same place."""
    count = dataset.left_out
    if jax.process_count() > 1:
        count = int(multihost_utils.process_allgather(np.asarray(count)).sum())
    return caveats.of_left_out(count, config.eval.split)


def log_data(config, role: str, split: str, dataset):
    """Which data these are, for the log; role: what they are for."""
    log.info(
        "%s: %s of %s, %d clips, checksum %s",
        *(role, split, config.data.dir, dataset.num_clips, dataset.checksum),
    )


def optimiser(
    config, steps_per_epoch: int, total: int, abstract, trained: str = ".*", **layers
):
    """The optimiser; the log states the learning rate's rule and result.

    trained: regex of the parameters that learn, which it is for.
    """
    clips = config.batch_size * config.compute.accumulate
    schedule, rule = optim.learning_rate(config.schedule, clips, steps_per_epoch, total)
    log.info("%s\n%s", loop.parameter_table(abstract), rule)
    learns = update.part(abstract, trained)
    if learns != abstract:
        log.info("trained: %s; all others are frozen", ", ".join(optim.named(learns)))
    return optim.make(config.optimizer, schedule, learns, **layers)


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


def _classes(meta: Mapping[str, Any]):
    """The number of classes, {head: number}; None where the data set names none."""
    labels = meta["labels"]
    if isinstance(labels, Mapping):
        return {head: len(names) for head, names in labels.items()}
    return len(labels) or None


def config_json(config) -> str:
    """The config as JSON; tuples become lists."""
    return json.dumps(config.to_dict())


def config_of(saved: Mapping[str, Any]) -> ConfigDict:
    """The inverse of `config_json`, for `config.model` and its like.

    Fields that an older release did not have get the value at which they change
    nothing (`importers.imported.template`), but for those that an optimiser, another
    than the template's, never had.
    """
    config = ConfigDict(saved)
    if "trainer" in config:
        neutral = imported.template(config.trainer)
        if config.optimizer.name != neutral.optimizer.name:
            for name in ("b2", "eps"):
                del neutral.optimizer[name]
        _fill(config, neutral)
    return config


def _fill(config: ConfigDict, neutral: ConfigDict):
    for name, value in neutral.items():
        if name not in config:
            config[name] = value
        elif isinstance(value, ConfigDict):
            _fill(config[name], value)


def weights_of(
    path: Path | str, weights: str = "params"
) -> tuple[dict, ConfigDict, dict]:
    """(params, config, meta) of a checkpoint of ours, or a file that others published.

    weights: `params`, or `ema` for their moving average. Of a published file, the
    sentences on what it does not tell go into the log.
    """
    if importers.find(path):
        found = importers.read(path)
        log.info("%s", "\n".join(found.notes))
        return found.params, found.config, found.meta | {"labels": found.labels}
    values, saved, meta = checkpoints.load(path, weights)
    return values, config_of(saved), meta


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
    expected: Sequence[str] = (),
):
    """The function (first params, caveats) → params of `init_from`; prints the report.

    `renames(theirs)` and `gaps(theirs)`, of the source's config, give the pairs and the
    (fresh, unused) regexes that `checkpoints.init_from` takes, as it takes `adapt`.
    `init_from.rgb` and `init_from.spectrogram` fill what belongs to one modality alone.
    What is to be said of the source is added to `caveats`, a list; `expected` are
    regexes of parameters that need no word if they stay fresh.
    """

    def take(params, field: str, path: str, m: str):
        """(params, names of those from the source, sentences on the source)."""
        settings = config.init_from
        values, theirs, meta = weights_of(path, settings.weights)
        fresh, unused = gaps(theirs) if gaps else ((), ())
        targets = optim.named(params)
        if m:
            own, norm = branch(m), rf"encoder/{m}/norm/.*"
            unused = [*unused, rf"(?!(?:{own})$).*"]
            if config.model.fusion == "separate":  # a source need not have its norm
                own, fresh = f"{own}|{norm}", [*fresh, norm]
            targets = {k: x for k, x in targets.items() if re.fullmatch(own, k)}
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
        params = jax.tree.map(lambda k, x: found.get(k, x), optim.names(params), params)
        expected = lambda name: any(re.fullmatch(x, name) for x in unused)
        left = [name for name, _ in report.unused if not expected(name)]
        said = caveats.of_unused(left, len(optim.named(values)))
        said += differences(theirs, config) + caveats.of_meta(meta)
        return params, found.keys() - report.fresh, said

    def source(params, said: list[str] | None = None):
        names, filled, paths, found = list(optim.named(params)), set(), [], []
        for field, (path, m) in init_paths(config).items():
            params, taken, sentences = take(params, field, path, m)
            filled |= taken
            paths.append(f"{field}={path}")
            found += [f"{paths[-1]}: {sentence}" for sentence in sentences]
        fresh = [name for name in names if name not in filled]
        for sentence in caveats.of_fresh(fresh, len(names), expected):
            found.append(f"{' and '.join(paths)}: {sentence}")
        for sentence in found:
            log.warning("%s.", sentence)
        if said is not None:
            said += found
        return params

    return source


def differences(theirs, config) -> list[str]:
    """Sentences on choices that have no parameters, but in which two models differ."""
    block = [
        f"model.block.{name} is {config.model.block[name]!r}, but the source was "
        f"trained with {theirs.model.block[name]!r}"
        for name in ("gelu", "eps")
        if config.model.block[name] != theirs.model.block[name]
    ]
    names = ["positions", "pool"]
    if config.model.fusion == theirs.model.fusion and len(config.modalities) > 1:
        names += ["fusion_layer", "bottlenecks_at_test"]
    model = [
        f"model.{name} is {config.model[name]!r}, but the source was trained with "
        f"{theirs.model[name]!r}"
        for name in names
        if name in config.model
        and name in theirs.model
        and config.model[name] != theirs.model[name]
    ]
    return [*block, *model, *caveats.of_inputs(theirs, config)]


def params_of(config, workdir: Path, init_params: Callable, mesh: Mesh, labels=None):
    """({"": params, "ema_": their moving average}, caveats) for an evaluation.

    Of the newest checkpoint of workdir, else of init_from. The average is there where
    `config.ema` is. labels: the names of the data set's classes.
    """
    path, weights = workdir, {"": "params"} | ({"ema_": "ema"} if config.ema else {})
    own = any((Path(workdir) / checksums.FOLDER).glob("[0-9]*"))
    if config.init_from.checkpoint_path and not own:
        path, weights = config.init_from.checkpoint_path, {"": config.init_from.weights}
    if not importers.find(path):  # once: a running training may save another meanwhile
        folder, step = checkpoints.find(path)
        path = folder / str(step)
    shape = jax.eval_shape(init_params, jax.random.key(0))
    shardings = parallel.state_shardings(shape, mesh)
    first = jax.jit(init_params, out_shardings=shardings)(jax.random.key(0))
    params, meta = {}, {}
    for prefix, name in weights.items():
        values, theirs, meta = weights_of(path, name)
        params[prefix], _ = checkpoints.init_from(first, values)
    log.info("evaluating the weights of %s", path)
    ours, trained = (json.loads(config_json(x)) for x in (config, theirs))
    found = checkpoints.changes(trained, ours)
    # Weights that `convert` took over do not tell how they were trained.
    seen = ANY if own and "source" not in meta else SEEN
    told = {k: x for k, x in found.items() if seen.fullmatch(k)}
    said = caveats.of_changes(told, "the config is not that of the training")
    said += [*caveats.of_inputs(theirs, config), *caveats.of_meta(meta)]
    return params, [*said, *caveats.of_labels(meta, labels)]


def weights(state: Mapping[str, Any]) -> dict[str, Any]:
    """What of a state is evaluated, by what the names of its numbers begin with."""
    found = {"": state["params"]}
    return found | ({"ema_": state["ema"]} if "ema" in state else {})


def text(numbers: Mapping[str, float]) -> str:
    """Numbers by name in one line."""
    return "  ".join(f"{k.removeprefix('eval/')} {v:.4g}" for k, v in numbers.items())
