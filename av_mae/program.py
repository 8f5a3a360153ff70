"""The jitted programs of a config and synthetic batches for them, without any data.

What `pretrain.train` and `finetune.train` run, put together from the same functions:
the benchmark times it, a dry run only compiles it. Shapes come from the config alone.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from av_mae import (
    choose,
    finetune,
    loop,
    parallel,
    pretrain,
    probe,
    spectrogram,
    update,
)
from av_mae import evaluation as measuring
from av_mae import run as runs

CLASSES = 400
"""Of a config that takes its number of classes from the data set."""


class Program(NamedTuple):
    """A jitted function and what it is called with.

    run: the step (state, batch, *rest) → (state, numbers), the state donated, or a
    measure (params, batch) → numbers; first: makes the state or params; abstract: their
    shapes and shardings; batch: {name: ShapeDtypeStruct} of a global batch; clips: in a
    call; rest: what else the step is given each time.
    """

    run: Callable
    first: Callable[[], Any]
    abstract: Any
    batch: dict[str, jax.ShapeDtypeStruct]
    clips: int
    mesh: Mesh
    rest: tuple = ()

    def arguments(self) -> tuple:
        """Abstract arguments, for `run.lower`."""
        sharding = parallel.batch_sharding(self.mesh)
        batch = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            self.batch,
        )
        return self.abstract, batch, *self.rest


def classes_of(config):
    """The number of classes, or {head: number}; CLASSES where the config has none."""
    heads = dict(config.model.label_heads)
    if heads:
        return {head: number or CLASSES for head, number in heads.items()}
    return config.model.classes or CLASSES


def batch_of(config, clips: int, views: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and types of the batch that `data` would give for `clips` clips."""
    data, shape = config.data, jax.ShapeDtypeStruct
    batch = {name: shape((clips,), bool) for name in ("has_rgb", "has_audio", "valid")}
    batch["index"] = shape((clips,), np.int64)
    if "rgb" in config.modalities:
        picture = (data.num_frames, data.size, data.size, 3)
        batch["rgb"] = shape((clips, views, *picture), np.uint8)
    if "spectrogram" in config.modalities:
        preset = spectrogram.preset_of(config.spectrogram)
        samples = round(data.audio_seconds * preset.sample_rate)
        batch["waveform"] = shape((clips, views, samples), np.int16)
        if isinstance(preset, spectrogram.Precomputed):
            del batch["waveform"]
            rows = (samples // preset.hop, preset.mels, 1)
            batch["spectrogram"] = shape((clips, views, *rows), np.float32)
    if config.trainer == "finetune":
        batch["label"] = _labels(config, clips)
    return batch


def _labels(config, clips: int):
    """Of one kind, or {head: …}; several at a time are float32 [clips classes]."""
    many = config.objective.kind == "sigmoid"
    one = lambda n: jax.ShapeDtypeStruct(
        (clips, n) if many else (clips,), np.float32 if many else np.int32
    )
    classes = classes_of(config)
    if isinstance(classes, dict):
        return {head: one(n) for head, n in classes.items()}
    return one(classes)


def synthetic(batch: dict[str, jax.ShapeDtypeStruct], seed: int = 0) -> dict:
    """Noise of these shapes, as numpy arrays; every clip is whole and valid."""
    rng = np.random.default_rng(seed)

    def one(x):
        if x.dtype == np.bool_:
            return np.ones(x.shape, bool)
        if x.dtype == np.uint8:
            return rng.integers(0, 256, x.shape, np.uint8)
        if x.dtype == np.int16:
            return rng.integers(-8000, 8000, x.shape, np.int16)
        if x.dtype == np.float32:
            return rng.random(x.shape, np.float32)
        return np.zeros(x.shape, x.dtype)  # labels and indices

    return jax.tree.map(one, batch)


def bytes_of(batch: dict) -> int:
    """Bytes of a batch over the wire."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(batch))


def _settled(config):
    """A copy of the config that asks no data set for its statistics."""
    config = type(config)(config.to_dict())
    if config.spectrogram.normalise == "dataset":
        config.spectrogram.mean, config.spectrogram.std = 0.0, 1.0
    return config


def _parts(config):
    """(trainer, model, function that makes params, whether clips lack modalities)."""
    trainer = choose("trainer", config.trainer, TRAINERS)
    trainer.check(config)
    if config.trainer == "pretrain":
        model = pretrain.build(config)
    else:
        model = finetune.build(config, classes_of(config))
    first = functools.partial(trainer.init, config, model)
    missing = config.data.missing_modalities and len(config.modalities) > 1
    return trainer, model, first, missing


TRAINERS = {"pretrain": pretrain, "finetune": finetune}


def mesh_of(config) -> Mesh:
    """The config's mesh."""
    return parallel.mesh(config.parallel.data, config.parallel.fsdp)


def step(config, mesh: Mesh | None = None, num_clips: int = 0) -> Program:
    """The training step of the config, on its mesh (or another).

    num_clips: of the training split; it decides over the schedule alone. Raises
    ConfigError for what `train` would refuse.
    """
    config, mesh = _settled(config), mesh or mesh_of(config)
    clips = config.batch_size * config.compute.accumulate
    per_epoch, total = loop.steps(config, num_clips or 1000 * clips)
    trainer, model, first, missing = _parts(config)
    shapes = jax.eval_shape(first, jax.random.key(0))
    if config.trainer == "pretrain":
        layers = {}
        call = pretrain.make_reconstruct(config, model, missing)
        options = update.options_of(config)
    else:
        layers = finetune.layers_of(model)
        call = finetune.make_predict(config, model, missing)
        options = update.options_of(config, probe.TRAINED[config.probe])
    tx = runs.optimiser(config, per_epoch, total, shapes, options.trained, **layers)
    make, abstract = update.initial(first, tx, config.seed, mesh, options)
    loss = trainer.make_loss(config, call)
    accumulate = config.compute.accumulate
    run, tx = update.make(loss, tx, accumulate, abstract, mesh, options)
    batch = batch_of(config, clips, config.data.samples_per_clip)
    return Program(run, make, abstract, batch, clips, mesh, (tx,))


def evaluation(config, mesh: Mesh | None = None) -> Program:
    """The jitted measure of one evaluation batch, with all test views."""
    config, mesh = _settled(config), mesh or mesh_of(config)
    trainer, model, first, missing = _parts(config)
    shapes = jax.eval_shape(first, jax.random.key(0))
    shardings = parallel.state_shardings(shapes, mesh)
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        *(shapes, shardings),
    )
    init = jax.jit(first, out_shardings=shardings)
    if config.trainer == "pretrain":
        views = config.data.samples_per_clip
        call = pretrain.make_reconstruct(config, model, missing)
        measure = pretrain.make_measure(call, mesh)
        key = jax.random.key(0)
        run = jax.jit(lambda params, batch: measure(params, batch, key))
    else:
        views = config.data.views * config.data.crops
        call = finetune.make_predict(config, model, missing)
        run = measuring.make_measure(config, call, mesh)
    clips = config.eval.batch_size
    batch = batch_of(config, clips, views)
    return Program(run, lambda: init(jax.random.key(0)), abstract, batch, clips, mesh)
