"""A model as a program that runs where this package is not: StableHLO, SavedModel.

Both take what the data package gives of clips, any number of them (`b` is symbolic),
and do all that the model does with it: bytes to values, log-mels, logits.

    weights   {name: float32 array}, those of model.safetensors (StableHLO alone)
    inputs    rgb uint8 [b v t h w 3], has_rgb bool [b],
              waveform int16 [b v s], has_audio bool [b], as far as the model knows them

A classifier gives {"logits": [b classes]}, of several heads {head: …}; an autoencoder
{modality: features [b d]}, the mean of its encoded tokens over places and views. What
was written is read again and compared with the model before it counts as written.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from av_mae import (
    CheckpointError,
    classifier,
    evaluation,
    finetune,
    inputs,
    optim,
    pretrain,
    representation,
    spectrogram,
)

PLATFORMS = ("cpu", "cuda", "tpu")
STABLEHLO, SAVEDMODEL = "model.stablehlo", "saved_model"
TOLERANCE = 1e-4  # of outputs, relative to the largest

Arrays = Mapping[str, Any]


def shapes(config) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """{input: (shape of a clip, dtype)} of the program's inputs, in order."""
    data, found = config.data, {}
    views = data.views * data.crops if config.trainer == "finetune" else 1
    if "rgb" in config.modalities:
        picture = (data.num_frames, data.size, data.size, 3)
        found["rgb"] = ((views, *picture), np.dtype(np.uint8))
    if "spectrogram" in config.modalities:
        preset = spectrogram.preset_of(config.spectrogram)
        samples = round(data.audio_seconds * preset.sample_rate)
        if isinstance(preset, spectrogram.Precomputed):
            shape = (views, samples // preset.hop, preset.mels, 1)
            found["spectrogram"] = (shape, np.dtype(np.float32))
        else:
            found["waveform"] = ((views, samples), np.dtype(np.int16))
    boolean = np.dtype(bool)
    return found | {"has_rgb": ((), boolean), "has_audio": ((), boolean)}


def function(config, params) -> Callable[[Arrays, Arrays], dict]:
    """(weights by name, inputs of b clips) → outputs by name; see the module."""
    config = plain(config)
    if config.trainer == "pretrain":
        one = _features(config, pretrain.build(config))
    else:
        model = finetune.build(config, classes(params))
        one = _logits(config, model)

    def apply(weights: Arrays, batch: Arrays) -> dict:
        params = traverse_util.unflatten_dict(dict(weights), sep="/")

        def clip(row):
            found = one(params, jax.tree.map(lambda x: x[None], row))
            return jax.tree.map(lambda x: x[0], found)

        # Clip by clip, so that nothing within asks how many there are.
        return jax.vmap(clip)(dict(batch))

    return apply


def _logits(config, model):
    predict = finetune.make_predict(config, model, missing=True)
    average, kind = evaluation.AVERAGES[config.eval.average], config.objective.kind

    def one(params, batch):
        logits, present, *_ = predict(params, batch, jax.random.key(0), False)
        found = classifier.combine(logits, present)
        heads = found if isinstance(found, Mapping) else {"logits": found}
        return {head: average(x[None], kind) for head, x in heads.items()}

    return one


def _features(config, model):
    prepare = inputs.make(config, missing=True)

    def one(params, batch):
        patches, present = prepare(batch, jax.random.key(0), False)
        variables = {"params": params}
        tokens = model.apply(variables, patches, present, method=representation.encode)
        found = representation.pool(config, tokens, "mean")
        return {m: x.mean(axis=0)[None] for m, x in found.items()}

    return one


def plain(config):
    """The config with what runs on every kind of device."""
    config = config.copy_and_resolve_references()
    if "compute" in config:
        for field, value in (("scan", False), ("remat", "none"), ("attention", "xla")):
            if field in config.compute:
                config.compute[field] = value
    return config


def classes(params) -> int | dict[str, int]:
    """Number of classes of a classifier's parameters; {head: number} of several."""
    if "head" in params:
        return int(params["head"]["bias"].shape[0])
    heads = {k.removeprefix("head_"): v for k, v in params.items() if k[:5] == "head_"}
    return {k: int(v["bias"].shape[0]) for k, v in heads.items() if k != "norm"}


def stablehlo(config, params, out: Path) -> None:
    """Writes `model.stablehlo`, a serialised `jax.export.Exported`, and tries it."""
    from jax import export

    apply, weights = function(config, params), optim.named(params)
    (b,) = export.symbolic_shape("b")
    batch = {
        name: jax.ShapeDtypeStruct((b, *shape), dtype)
        for name, (shape, dtype) in shapes(config).items()
    }
    shape_of = lambda x: jax.ShapeDtypeStruct(np.shape(x), np.asarray(x).dtype)
    exported = export.export(jax.jit(apply), platforms=PLATFORMS)(
        {name: shape_of(x) for name, x in weights.items()}, batch
    )
    (out / STABLEHLO).write_bytes(exported.serialize())
    again = export.deserialize(bytearray((out / STABLEHLO).read_bytes()))
    compare(config, params, lambda rows: again.call(weights, rows), STABLEHLO)


def savedmodel(config, params, out: Path) -> None:
    """Writes the folder `saved_model`, weights within, and tries it.

    Raises CheckpointError where TensorFlow is not installed.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        import tensorflow as tf
        from jax.experimental import jax2tf
    except ImportError as error:
        raise CheckpointError(
            f"a SavedModel needs TensorFlow ({error}): pip install tensorflow-cpu, or "
            "export --to stablehlo."
        ) from error
    apply, weights = function(config, params), optim.named(params)
    converted = jax2tf.convert(
        apply,
        polymorphic_shapes=[None, "(b, ...)"],
        with_gradient=False,
        native_serialization_platforms=PLATFORMS,
    )
    converted = tf.autograph.experimental.do_not_convert(converted)
    module = tf.Module()
    module.weights = {
        name.replace("/", "."): tf.Variable(np.asarray(x), trainable=False)
        for name, x in weights.items()
    }
    variables = dict(zip(weights, module.weights.values(), strict=True))
    signature = {
        name: tf.TensorSpec((None, *shape), tf.as_dtype(dtype), name=name)
        for name, (shape, dtype) in shapes(config).items()
    }
    module.serve = tf.function(
        lambda rows: converted(variables, rows),
        input_signature=[signature],
        autograph=False,
    )
    tf.saved_model.save(module, str(out / SAVEDMODEL))
    again = tf.saved_model.load(str(out / SAVEDMODEL))
    call = lambda rows: {k: x.numpy() for k, x in again.serve(rows).items()}
    compare(config, params, call, SAVEDMODEL)


WRITERS = {"stablehlo": stablehlo, "savedmodel": savedmodel}


def noise(config, b: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Inputs of b clips; the first has all, the second no sound, the third no picture.

    (As far as the model knows both.)
    """
    rng, rows = np.random.default_rng(seed), {}
    for name, (shape, dtype) in shapes(config).items():
        if dtype == np.uint8:
            rows[name] = rng.integers(0, 256, (b, *shape)).astype(dtype)
        elif dtype.kind == "b":
            rows[name] = np.ones(b, bool)
        else:
            rows[name] = (1000 * rng.normal(0, 1, (b, *shape))).astype(dtype)
    if len(config.modalities) > 1:
        rows["has_audio"][1:2] = rows["has_rgb"][2:3] = False
    return rows


def compare(config, params, call: Callable[[Arrays], Arrays], what: str) -> float:
    """The largest difference of `call` from the model, over the largest output.

    On 1 and on 3 clips. Raises CheckpointError where it is more than TOLERANCE.
    """
    apply, weights = jax.jit(function(config, params)), optim.named(params)
    worst = 0.0
    for b in (1, 3):
        rows = noise(config, b)
        wanted, found = apply(weights, rows), call(rows)
        for name, x in wanted.items():
            x, y = np.asarray(x), np.asarray(found[name])
            worst = max(worst, np.abs(x - y).max() / max(np.abs(x).max(), 1e-6))
    if not worst <= TOLERANCE:
        raise CheckpointError(
            f"{what} was written, but read again it differs from the model by "
            f"{worst:.1e} of its largest output: report this with your versions."
        )
    return float(worst)
