"""Masked pretraining, read top to bottom: `train` runs it, `evaluate` measures it.

Both take the config, the data sets {"train": …, "eval": …} and a working directory. A
data set gives batches of numpy arrays by `train(batch_size, step)` and
`evaluate(batch_size)`, and says `num_clips`, `ids`, `missing`, `having`, `checksum`,
`label_names`, `info`, `notes` and `left_out`; no trainer knows video files.
"""

import contextlib
import functools
import itertools
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from av_mae import (
    STATISTICS,
    ConfigError,
    autoencoder,
    caveats,
    choose,
    classifier,
    evaluation,
    inputs,
    loop,
    losses,
    maskenhancer,
    masking,
    metrics,
    parallel,
    tokens,
    update,
    validate,
    visualise,
)
from av_mae import run as runs
from av_mae.transformer import size_of

log = logging.getLogger(__name__)


def train(config, data: dict, workdir: Path) -> dict[str, float]:
    """Runs (or goes on with) the pretraining; returns the last evaluation's numbers."""
    check(config)

    # Devices and steps.
    mesh = parallel.mesh(config.parallel.data, config.parallel.fsdp)
    clips = config.batch_size * config.compute.accumulate
    steps_per_epoch, total = loop.steps(config, data["train"].num_clips)
    eval_every = max(1, round(config.eval.every_epochs * steps_per_epoch))

    # Model and what is computed with it.
    model = build(config)
    init_params = functools.partial(init, config, model)
    missing = data["train"].missing or data["eval"].missing
    reconstruct = make_reconstruct(config, model, missing)
    loss, draw = make_loss(config, reconstruct), make_draw(config, reconstruct, mesh)
    measures = make_measures(config, model, missing, mesh)
    measure = functools.partial(_evaluate, config, measures)
    put = functools.partial(parallel.put_batch, mesh=mesh)

    # Optimiser, state, step.
    shapes = jax.eval_shape(init_params, jax.random.key(0))
    tx = runs.optimiser(config, steps_per_epoch, total, shapes)
    source, options = source_of(config), update.options_of(config)
    run = runs.start(config, data, workdir, init_params, tx, mesh, source, options)
    accumulate = config.compute.accumulate
    step = update.make(loss, tx, accumulate, run.abstract, mesh, options)

    # The loop.
    def assess(state, done):
        with run.kept(done, state):
            results = measure(runs.weights(state), data["eval"], put)
            run.report(done, results)
            draw(state["params"], data["eval"], put, run, done)
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
    """Masked-reconstruction loss of the newest checkpoint on `eval.split`."""
    check(config)
    mesh = parallel.mesh(config.parallel.data, config.parallel.fsdp)
    put = functools.partial(parallel.put_batch, mesh=mesh)
    split, dataset, model = config.eval.split, data["eval"], build(config)
    init_params = functools.partial(init, config, model)
    weights, said = runs.params_of(config, workdir, init_params, mesh)
    said += caveats.of_evaluation(config, dataset, said)
    runs.log_data(config, "eval", split, dataset)
    log.info("evaluating %s%s", workdir, caveats.text(said))
    measures = make_measures(config, model, dataset.missing, mesh)
    results = _evaluate(config, measures, weights, dataset, put)
    said += runs.left_out(config, dataset)
    log.info("evaluation on %s: %s%s", split, runs.text(results), caveats.text(said))
    return results


# Models that are not the plain autoencoder, by `model.fusion`.
MODELS = dict.fromkeys(maskenhancer.FUSIONS, maskenhancer.build)


def build(config):
    """The model that the config describes; ConfigError for a name of no table."""
    return MODELS.get(config.model.fusion, autoencoder.build)(config)


def masked(config) -> dict[str, inputs.Layout]:
    """Layouts of the modalities that are masked and predicted; others are only seen."""
    whole = maskenhancer.HEARD if config.model.fusion in maskenhancer.FUSIONS else ()
    layouts = inputs.layouts(config)
    return {m: layout for m, layout in layouts.items() if m not in whole}


def check(config):
    """Raises ConfigError for what can be seen to be wrong before anything is made."""
    validate.common(config)
    validate.pretraining(config)
    if evaluation.subsets(config) and config.objective.kind == "inpaint":
        raise ConfigError(
            "eval.modalities hides modalities, but objective.kind is 'inpaint', which "
            "predicts each from the other: set it to ()."
        )
    autoencoder.objective_of(config)
    for m in masked(config):
        kinds = losses.TARGETS if m == "rgb" else losses.SOUND_TARGETS
        goal = choose(f"objective.target.{m}", config.objective.target[m], kinds)
        if m == "rgb" and goal.pixels and config.picture.normalise != "fixed":
            raise ConfigError(
                f"objective.target.rgb is {config.objective.target.rgb!r}, which needs "
                'the picture as it was: set picture.normalise to "fixed".'
            )
    check_masks(config)
    build(config)


def check_masks(config):
    """Raises ConfigError for masks that are of no kind, or hide all or nothing."""
    for m, layout in masked(config).items():
        kind, ratio = config.mask[m].kind, config.mask[m].ratio
        choose(f"mask.{m}.kind", kind, masking.KINDS[m])
        hidden = masking.count(kind, layout.grid, ratio) if 0 < ratio < 1 else 0
        if not 0 < hidden < layout.n:
            raise ConfigError(
                f"mask.{m}.ratio is {ratio}: choose a share between 0 and 1 that masks "
                f"some and keeps some of the {layout.n} tokens."
            )


def init(config, model, rng: jax.Array) -> dict:
    """The first parameters; shapes come from the config alone."""
    patches = {
        m: jnp.zeros((1, layout.n, layout.f))
        for m, layout in inputs.layouts(config).items()
    }
    return model.init(rng, patches, draw_masks(config, rng, 1))["params"]


def source_of(config):
    """How `init_from` reads another autoencoder, ours or published."""
    unused = lambda theirs: ((), later_blocks(theirs, config))
    return runs.source_of(config, gaps=unused, adapt=classifier.ADAPT)


def later_blocks(theirs, config) -> list[str]:
    """Regexes of a source's blocks of one modality, where ours has joint layers.

    VideoMAE's encoder in the video branch of `mid`, whose last layers are joint.
    """
    if config.model.fusion != "mid" or theirs.model.fusion == "mid":
        return []
    first = size_of(config.model).depth - config.model.fusion_layers
    late = range(first, size_of(theirs.model).depth)
    return [rf"encoder/\w+/block_({'|'.join(map(str, late))})/.*"]


def draw_masks(
    config, rng: jax.Array, b: int, train: bool = False
) -> dict[str, masking.Mask]:
    """A mask for each modality that is masked, for b rows.

    In training `masked` are those tokens alone that `objective.decode` wants.
    """
    masks, decode = {}, config.objective.decode
    for i, (m, layout) in enumerate(masked(config).items()):
        kind, ratio = config.mask[m].kind, config.mask[m].ratio
        draw = choose(f"mask.{m}.kind", kind, masking.MASKS)
        key = jax.random.fold_in(rng, i)
        masks[m] = draw(key, b, layout.grid, ratio)
        if train and decode.share < 1:
            key = loop.key(key, 0, "decode")
            masks[m] = masking.part(
                key, masks[m], layout.grid, decode.kind, decode.share
            )
    return masks


class Reconstruction(NamedTuple):
    """What a model makes of a batch.

    pairs: {m: (prediction, target)}, both [b p g], of the p tokens in the loss;
    present: {m: [b]} or None, which clips have what the prediction of m needs;
    statistics: {STATISTICS: new values of params that are running statistics}, in
    training of a model that has some.
    """

    pairs: dict[str, tuple[jax.Array, jax.Array]]
    masks: dict[str, masking.Mask]
    patches: dict[str, jax.Array]
    present: dict[str, jax.Array] | None
    statistics: Mapping[str, Any] = {}


def make_reconstruct(config, model, missing: bool):
    """The function (params, batch, rng, train) → Reconstruction."""
    prepare, objective = inputs.make(config, missing), autoencoder.objective_of(config)

    def reconstruct(params, batch, rng, train: bool):
        patches, present = prepare(batch, loop.key(rng, 0, "augment"), train)
        # Several masks of a clip follow each other; its patches are there once.
        again = config.objective.masks_per_clip if train else 1
        b = again * len(next(iter(patches.values())))
        masks = draw_masks(config, loop.key(rng, 0, "mask"), b, train)
        if present is not None:
            present = {m: inputs.rows(x, b) for m, x in present.items()}
        drop_path = loop.key(rng, 0, "drop_path")
        predictions, changed = model.apply(
            {"params": params},
            patches,
            masks,
            present,
            train,
            rngs={"drop_path": drop_path},
            mutable=[STATISTICS],
        )
        index = objective.predicted(masks)
        pairs = {
            m: (x, target(config, m, masking.take(patches[m], index[m])))
            for m, x in predictions.items()
        }
        present = objective.present(masks, present)
        return Reconstruction(pairs, masks, patches, present, changed)

    return reconstruct


def target(config, m: str, patches: jax.Array) -> jax.Array:
    """What is to be predicted of patches [b n f] of modality m, float32 [b n g]."""
    cut, kind = inputs.layouts(config)[m], config.objective.target[m]
    if losses.TARGETS[kind].pixels:
        patches = inputs.pixels(config, patches)
    return losses.target(patches, kind, cut.channels, cut.frames)


def make_loss(config, reconstruct):
    """(params, batch, rng) → (weighted sum of the modalities' losses, each of them).

    `objective.l2` adds its multiple of half the squares of the parameters, as Scenic's
    l2_decay_factor does.
    """

    def loss(params, batch, rng):
        found = Reconstruction(*reconstruct(params, batch, rng, True))
        present = found.present
        each = {
            m: losses.masked_mse(p, t, None if present is None else present[m])
            for m, (p, t) in found.pairs.items()
        }
        total = sum(config.objective.weights[m] * value for m, value in each.items())
        if config.objective.l2:
            total += config.objective.l2 * losses.l2(params)
        numbers = {f"loss_{m}": value for m, value in each.items()}
        return total, numbers | found.statistics

    return loss


def make_measures(config, model, missing: bool, mesh) -> dict[str, Callable]:
    """{what its numbers begin with: measure}: of all, and of `eval.modalities`."""
    measures = {"": make_measure(make_reconstruct(config, model, missing), mesh)}
    for name, modalities in evaluation.subsets(config).items():
        if modalities != tuple(config.modalities):
            reconstruct = make_reconstruct(config, model, True)
            measures[f"{name}/"] = make_measure(reconstruct, mesh, modalities)
    return measures


def make_measure(reconstruct, mesh, modalities: tuple[str, ...] = ()):
    """The jitted (params, batch, rng) → {m: sums of errors over the valid clips}.

    modalities: the only ones that are seen (`reconstruct` then has to know missing
    ones), () for all.
    """

    def measure(params, batch, rng):
        batch = evaluation.only(batch, modalities) if modalities else batch
        pairs, _, _, present, _ = reconstruct(params, batch, rng, False)
        sums = {}
        for m, (prediction, target) in pairs.items():
            valid = inputs.rows(batch["valid"], len(prediction))
            valid = valid if present is None else valid & present[m]
            sums[m] = metrics.reconstruction(prediction, target, valid)
        return sums

    return jax.jit(measure, out_shardings=parallel.replicated(mesh))


def _evaluate(config, measures: dict, weights: dict, dataset, put) -> dict[str, float]:
    """Loss of each modality, and as a fraction of its target's variance.

    weights: {what the names of its numbers begin with: params}. Where only some
    modalities are seen, of those that are predicted then.
    """
    pairs = list(itertools.product(measures, weights))
    sums: dict = {pair: {} for pair in pairs}
    for i, batch in enumerate(dataset.evaluate(config.eval.batch_size)):
        # The same masks at every evaluation, so that its numbers can be compared.
        rng, batch = loop.key(config.seed, i, "eval"), put(batch)
        for s, w in pairs:
            found = measures[s](weights[w], batch, rng)
            sums[s, w] = metrics.add(sums[s, w], found)
    results = {}
    for (s, w), found in sums.items():
        for m, means in metrics.results(found).items():
            if s and not found[m]["error"].count:
                continue
            fraction = metrics.fraction_of_variance(means)
            results[f"eval/{s}{w}loss_{m}"] = means["error"]
            results[f"eval/{s}{w}fraction_{m}"] = fraction
    return results | evaluation.of_all(config, results)


def make_draw(config, reconstruct, mesh):
    """The function that draws the first `log.pictures` clips of the evaluation.

    Standardised targets are undone with the mean statistics of the clip's *visible*
    patches: those of the masked ones the model does not know.
    """
    layouts, objective = inputs.layouts(config), autoencoder.objective_of(config)

    def look(params, batch, rng):
        pairs, masks, patches, present, _ = reconstruct(params, batch, rng, False)
        result = {}
        for m, sequence in objective.sequences(masks).items():
            visible = masking.take(patches[m], masks[m].kept)
            prediction = pairs[m][0][:, -sequence.masked.shape[1] :]
            values = undo_target(config, m, prediction, visible)
            result[m] = (patches[m], values, sequence.masked)
        return result, present

    look = jax.jit(look, out_shardings=parallel.replicated(mesh))

    def draw(params, dataset, put, run, done: int):
        count = config.log.pictures
        if not count:
            return
        with contextlib.closing(dataset.evaluate(config.eval.batch_size)) as batches:
            batch = next(batches)
        rng = loop.key(config.seed, 0, "eval")
        seen, present = jax.device_get(look(params, put(batch), rng))
        if jax.process_index() != 0:
            return
        originals = {
            m: np.asarray(tokens.unpatchify(jnp.asarray(x[:count]), *layouts[m][:2]))
            for m, (x, _, _) in seen.items()
        }
        pictures = visualise.reconstruction(
            originals,
            {m: values[:count] for m, (_, values, _) in seen.items()},
            {m: masked[:count] for m, (_, _, masked) in seen.items()},
            {m: layouts[m].patch for m in seen},
            mean=config.picture.mean,
            std=config.picture.std,
            present=None if present is None else {m: present[m][:count] for m in seen},
            fps=config.data.fps / config.data.stride,
        )
        folder = run.workdir / "pictures"
        with loop.writing(folder):
            visualise.write(pictures, folder, done)
        run.writer.images(done, pictures.stills)

    return draw


def undo_target(config, m: str, prediction: jax.Array, visible: jax.Array):
    """Predictions [b p g] as patches [b p f], by visible patches' mean statistics."""
    cut, kind = inputs.layouts(config)[m], config.objective.target[m]
    pixels = losses.TARGETS[kind].pixels
    if pixels:
        visible = inputs.pixels(config, visible)
    found = losses.target_statistics(visible, kind, cut.channels, cut.frames)
    mean, std = (x.mean(axis=1, keepdims=True) for x in found)
    values = losses.to_patches(prediction * std + mean, cut.f)
    return inputs.from_pixels(config, values) if pixels else values
