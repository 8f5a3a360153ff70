"""Finetuning as a classifier, read top to bottom: `train` runs it, `evaluate` tests it.

Takes what `pretrain` takes. A clip's views are rows of one batch. With `config.probe`
the encoder stays as it is, and only what is behind it learns (av_mae/probe.py).
"""

import contextlib
import functools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from av_mae import (
    STATISTICS,
    ConfigError,
    caveats,
    choose,
    classifier,
    evaluation,
    inputs,
    loop,
    maskenhancer,
    mixing,
    optim,
    parallel,
    probe,
    update,
    validate,
)
from av_mae import run as runs

log = logging.getLogger(__name__)

LABELS = evaluation.LABELS
PREDICTIONS = "predictions.npz"
"""In the workdir: what the newest command that trained to the end predicted on its
`eval.split`; see `write_predictions`."""


def train(config, data: dict, workdir: Path) -> dict[str, float]:
    """Runs (or goes on with) the finetuning; returns the last evaluation's numbers."""
    check(config)

    # Devices and steps.
    mesh = parallel.mesh(config.parallel.data, config.parallel.fsdp)
    clips = config.batch_size * config.compute.accumulate
    steps_per_epoch, total = loop.steps(config, data["train"].num_clips)
    eval_every = max(1, round(config.eval.every_epochs * steps_per_epoch))

    # Model and what is computed with it.
    model = build(config, num_classes(config, data["train"]))
    init_params = functools.partial(init, config, model)
    missing = data["train"].missing or data["eval"].missing
    loss = make_loss(config, make_predict(config, model, missing))
    measures = make_measures(config, model, missing, mesh)
    put = functools.partial(parallel.put_batch, mesh=mesh)
    measure = functools.partial(evaluation.run, config, measures)

    # Optimiser, state, step.
    shapes = jax.eval_shape(init_params, jax.random.key(0))
    options = update.options_of(config, probe.TRAINED[config.probe])
    tx = runs.optimiser(
        *(config, steps_per_epoch, total, shapes, options.trained),
        **layers_of(model),
    )
    source = source_of(config)
    run = runs.start(config, data, workdir, init_params, tx, mesh, source, options)
    accumulate = config.compute.accumulate
    step = update.make(loss, tx, accumulate, run.abstract, mesh, options)

    # The loop.
    def assess(state, done):
        rows = [] if done >= total else None
        with run.kept(done, state):
            results = measure(runs.weights(state), data["eval"], put, rows)
            run.report(done, results)
            if rows:
                write_predictions(run.workdir, rows)
        return results

    state, results = run.state, {}
    clock = loop.Clock(clips, run.step, total)
    batches = loop.prefetch(data["train"].train(clips, run.step), put, clock=clock)
    with run, contextlib.closing(batches):
        if run.step >= total:
            log.info("step %d is done, of %d; evaluating", run.step, total)
        if run.step >= total or run.lacks_evaluation(eval_every):
            with clock.pause():
                results = assess(state, run.step)
        for done in range(run.step + 1, total + 1):
            batch = next(batches)
            state, numbers = step(state, batch)
            clock.ran(numbers)
            run.watch(done, numbers, batch["index"])
            last = done == total
            if done % config.log.every_steps == 0 or last:
                run.log(clock, total)
            if done % eval_every == 0 or last:
                with clock.pause():
                    results = assess(state, done)
            stop = run.preemption.reached(done)
            if stop or last or run.due(done):
                with clock.pause():
                    run.save(done, state)
            if stop:
                log.info("stopped by SIGTERM after step %d; run again to go on", done)
                break
        else:
            run.conclude(results, data["eval"])
    return results


def evaluate(config, data: dict, workdir: Path) -> dict[str, float]:
    """Loss and accuracy of the newest checkpoint on `eval.split`."""
    return measured(config, data, workdir)[0]


def measured(config, data: dict, workdir: Path) -> tuple[dict[str, float], list[str]]:
    """The same, and the sentences that belong beside it."""
    check(config)
    split, dataset = config.eval.split, data["eval"]
    weights, said, measures, put = _restored(config, dataset, workdir)
    said += caveats.of_evaluation(config, dataset, said)
    runs.log_data(config, "eval", split, dataset)
    log.info("evaluating %s%s", workdir, caveats.text(said))
    results = evaluation.run(config, measures, weights, dataset, put)
    said += runs.left_out(config, dataset)
    log.info("evaluation on %s: %s%s", split, runs.text(results), caveats.text(said))
    return results, said


def predict_all(config, dataset, workdir: Path) -> tuple[Any, Any]:
    """(logits [clips classes], labels), in the data set's order, of the newest step.

    With several heads both are dicts by head.
    """
    weights, _, measures, put = _restored(config, dataset, workdir)
    measure = functools.partial(measures[""], weights[""])
    batches = dataset.evaluate(config.eval.batch_size)
    rows = [jax.device_get(measure(put(batch))[1]) for batch in batches]
    found = evaluation.in_order(rows)
    return found["logits"], found["label"]


def write_predictions(workdir: Path, rows: list[dict]):
    """PREDICTIONS: logits, label and record number of each clip, in their order.

    Those of several heads are called `logits/<head>` and `label/<head>`.
    """
    found, path = optim.named(evaluation.in_order(rows)), workdir / PREDICTIONS
    if jax.process_index() == 0:
        with loop.writing(path):
            np.savez(path, **found)


def _restored(config, dataset, workdir: Path):
    """(weights, caveats, measures, put) of the newest checkpoint of the workdir."""
    mesh = parallel.mesh(config.parallel.data, config.parallel.fsdp)
    model = build(config, num_classes(config, dataset))
    init_params = functools.partial(init, config, model)
    names = dataset.label_names
    weights, said = runs.params_of(config, workdir, init_params, mesh, names)
    measures = make_measures(config, model, dataset.missing, mesh)
    return weights, said, measures, functools.partial(parallel.put_batch, mesh=mesh)


def check(config):
    """Raises ConfigError for what can be seen to be wrong before anything is made."""
    validate.common(config)
    validate.finetuning(config)
    evaluation.subsets(config)
    choose("eval.average", config.eval.average, evaluation.AVERAGES)
    choose("objective.kind", config.objective.kind, evaluation.LOSSES)
    choose("probe", config.probe, probe.TRAINED)
    build(config, dict(config.model.label_heads) or config.model.classes)


# Models that are not the plain classifier, by `model.fusion`.
MODELS = {"concat": maskenhancer.build_classifier}


def build(config, classes: classifier.Classes):
    """The model that the config describes; ConfigError for a name of no table."""
    make = MODELS.get(config.model.fusion, classifier.build)
    return make(config, classes)


def num_classes(config, dataset) -> classifier.Classes:
    """The data set's number of classes, or {head: number} for labels of several kinds.

    Raises ConfigError where the config names another number, or there are no labels.
    """
    names = dataset.label_names
    if not names:
        raise ConfigError(
            f"data.dir {config.data.dir} has no labels: finetuning needs a data set "
            "prepared from one sub-folder for each class, or from a CSV with labels."
        )
    wanted, kinds = dict(config.model.label_heads), isinstance(names, Mapping)
    if set(wanted) != (set(names) if kinds else set()):
        found = ", ".join(names) if kinds else "one kind of label"
        raise ConfigError(
            f"model.label_heads names {', '.join(wanted) or 'no heads'}, but "
            f"{config.data.dir} has {found}: set it to pairs (kind of label, number of "
            "classes or 0), or to () for one kind."
        )
    if kinds:
        field = "model.label_heads.{}"
        return {
            head: _checked(config, field.format(head), wanted[head], len(names[head]))
            for head in wanted
        }
    return _checked(config, "model.classes", config.model.classes, len(names))


def _checked(config, field: str, wanted: int, found: int) -> int:
    if wanted not in (0, found):
        raise ConfigError(
            f"{field} is {wanted}, but {config.data.dir} has {found} classes: set it "
            f"to {found}, or to 0 to take the data set's."
        )
    return found


def init(config, model, rng: jax.Array) -> dict:
    """The first parameters; shapes come from the config alone."""
    patches = {
        m: jnp.zeros((1, layout.n, layout.f))
        for m, layout in inputs.layouts(config).items()
    }
    return model.init(rng, patches)["params"]


def layers_of(model) -> dict:
    """What the optimiser's layer decay asks: each parameter's layer, and how many."""
    encoder, before = model.encoder, 0
    if encoder.kind == "mid":  # whose joint blocks are counted from the first joint one
        before = encoder.depth - encoder.settings["fusion_layers"]
    of = functools.partial(layer_of, encoder.depth, before=before)
    return dict(layer_of=of, num_layers=encoder.depth)


def layer_of(depth: int, name: str, before: int = 0) -> int:
    """Layer of a parameter for layer decay: 0 embedding, i + 1 block i, else depth + 1.

    Scenic's and VideoMAE's rule: what comes after the blocks learns at the full rate.
    before: layers below the joint stack.
    """
    if name.startswith("embed/"):
        return 0
    parts = name.split("/")
    blocks = [part for part in parts if part.startswith("block_")]
    below = before if "joint" in parts else 0
    return below + int(blocks[0].removeprefix("block_")) + 1 if blocks else depth + 1


def source_of(config):
    """How `init_from` reads a pretraining (or finetuning) checkpoint."""
    return runs.source_of(
        config,
        renames=lambda theirs: classifier.sources(theirs, config),
        gaps=lambda theirs: gaps(theirs, config),
        adapt=classifier.ADAPT,
        # Nothing to wonder about: heads, and what every new finetuning begins with.
        expected=classifier.ALWAYS_FRESH
        if config.probe == "full"
        else (probe.TRAINED[config.probe],),
    )


def gaps(theirs, config) -> tuple[list[str], list[str]]:
    """Regexes of parameters that may stay fresh, of sources that may stay unused."""
    fresh, unused = classifier.expected_gaps(theirs, config)
    more_fresh, more_unused = maskenhancer.expected_gaps(theirs, config)
    return [*fresh, *more_fresh], [*unused, *more_unused]


class Prediction(NamedTuple):
    """What a model says of a batch.

    logits: {m: [(b v) k]}, with several heads {m: {head: …}}, m a modality or `joint`;
    present: {m: [(b v)]} or None; statistics: {STATISTICS: new values of params that
    are running statistics}, in training of a model that has some.
    """

    logits: dict[str, classifier.Logits]
    present: dict[str, jax.Array] | None
    statistics: Mapping[str, Any] = {}


def make_predict(config, model, missing: bool):
    """The function (params, batch, rng, train, mixes) → Prediction."""
    prepare = inputs.make(config, missing)

    def predict(params, batch, rng, train: bool, mixes=None):
        key = loop.key(rng, 0, "augment")
        patches, present = prepare(batch, key, train, mixes)
        names = ("drop_path", "dropout")
        logits, changed = model.apply(
            {"params": params},
            *(patches, present, train),
            rngs={name: loop.key(rng, 0, name) for name in names},
            mutable=[STATISTICS],
        )
        return Prediction(logits, present, changed)

    return predict


def make_loss(config, predict):
    """(params, batch, rng) → (mean of the modalities' losses, each of them).

    A modality's loss is the mean over the heads.
    """
    entropy = choose("objective.kind", config.objective.kind, evaluation.LOSSES)
    by_head = evaluation.by_head
    smoothing = config.objective.label_smoothing
    size = (config.data.size, config.data.size)

    def loss(params, batch, rng):
        mixes = None
        if mixing.is_wanted(config.augment):
            key = loop.key(rng, 0, "mix")
            mixes = mixing.draw(key, config.augment, size, config.modalities)
        logits, present, changed = Prediction(*predict(params, batch, rng, True, mixes))
        each = {}
        for m, heads in logits.items():
            valid = classifier.having(present, m)
            values = []
            for head, x in by_head(heads).items():
                wanted = inputs.rows(by_head(batch["label"])[head], len(x))
                if mixes:
                    wanted = mixed(mixes, m, wanted, present, x.shape[-1])
                values.append(entropy(x, wanted, smoothing, valid))
            each[m] = sum(values) / len(values)
        numbers = {f"loss_{m}": value for m, value in each.items()}
        return sum(each.values()) / len(each), numbers | changed

    return loss


def mixed(mixes, m: str, labels, present, classes: int) -> jax.Array:
    """The labels [b classes] that go with the mixed inputs of the logits `m`.

    Those of all modalities together are the mean over those that a clip has.
    """
    if m in mixes:
        mix = mixing.among(mixes[m], classifier.having(present, m))
        return mixing.labels(labels, mix, classes)
    each = {one: mixed(mixes, one, labels, present, classes) for one in mixes}
    return classifier.combine(each, present)


def make_measures(config, model, missing: bool, mesh) -> dict:
    """What `evaluation.run` measures with: all modalities, and subsets of them."""
    make = functools.partial(make_predict, config, model)
    return evaluation.make(config, make, missing, mesh)
