"""Features of all clips of a set: computed by a model, or read from files.

A modality's features are of it *alone*: the others are held back, or an encoder in
which they meet would carry one into the other's tokens, and a search for the sound that
belongs to a picture would find what it was told.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from av_mae import UserError, extract, inputs, representation

HAS = {"rgb": "has_rgb", "spectrogram": "has_audio"}
NAMES = {"rgb": "picture", "spectrogram": "sound"}


@dataclasses.dataclass(frozen=True)
class FeatureSet:
    """Features by name (`rgb`, `spectrogram`, `rgb+spectrogram`), labels and ids.

    features[name]: float32 [n d]; has[name]: bool [n], which clips have any of it;
    labels: int [n] numbers in `classes`, or None; ids: the clips' names.
    """

    features: dict[str, Float[np.ndarray, "n _d"]]
    has: dict[str, Bool[np.ndarray, " n"]]
    labels: Int[np.ndarray, " n"] | None
    classes: list[str]
    ids: list[str]


def subsets(modalities: Sequence[str]) -> list[tuple[str, ...]]:
    """Each modality alone, then all of them."""
    alone = [(m,) for m in modalities]
    return alone + [tuple(modalities)] if len(modalities) > 1 else alone


def compute(
    model, dataset, batch_size: int, layer: int = -1, pool: str = "mean"
) -> FeatureSet:
    """The features of a data set's clips, as `model.features` gives them of files.

    model: an `api.Model`; layer, pool: as of `Model.features`; of several views, the
    mean. Labels are there where the data set was opened with one label a clip. Of what
    AV-MaskEnhancer hears there are features of the last layer alone.
    """
    config = model.config
    number = representation.layer_number(config, layer)
    last = number == representation.layer_number(config, -1)
    modalities = tuple(config.modalities) if last else representation.known(config)
    encode = encoder(model.config, model.module, layer, pool)
    params = jax.device_put(model.params)
    rows: dict[str, list] = {}
    for batch in dataset.evaluate(batch_size):
        valid = batch["valid"]
        keep = lambda name, x, valid=valid: rows.setdefault(name, []).append(x[valid])
        arrays = {k: v for k, v in batch.items() if k not in ("label", "index")}
        for used in subsets(modalities):
            name = "+".join(used)
            keep(f"feature {name}", np.asarray(encode(params, arrays, used)))
            keep(f"has {name}", np.any([batch[HAS[m]] for m in used], axis=0))
        keep("index", batch["index"])
        if "label" in batch:
            keep("label", batch["label"])
    whole = {name: np.concatenate(parts) for name, parts in rows.items()}
    part = lambda kind: {
        name.removeprefix(kind): x for name, x in whole.items() if name.startswith(kind)
    }
    return FeatureSet(
        part("feature "),
        part("has "),
        whole.get("label"),
        list(dataset.label_names),
        [dataset.ids[i] for i in whole["index"]],
    )


def encoder(config, module, layer: int, pool: str):
    """The jitted (params, batch, used) → features [b d] of the modalities `used`."""
    prepare = inputs.make(config, missing=True)
    if pool == "none":
        raise UserError("--pool none gives tokens: choose mean or cls.")

    @functools.partial(jax.jit, static_argnums=2)
    def encode(params, batch, used):
        held = {HAS[m] for m in HAS} - {HAS[m] for m in used}
        batch = batch | {key: jnp.zeros_like(batch[key]) for key in held}
        patches, present = prepare(batch, jax.random.key(0), False)
        tokens = representation.tokens_of_layer(
            *(config, module, params, patches, present, layer)
        )
        pooled = representation.pool(config, tokens, pool)
        count = len(batch["valid"])
        found = [pooled[m].reshape(count, -1, pooled[m].shape[-1]) for m in used]
        found = [x.mean(axis=1) for x in found]
        if len({x.shape[-1] for x in found}) > 1:
            return jnp.concatenate(found, axis=-1)
        # Of a clip that lacks one, the mean over those that it has.
        there = jnp.stack([batch[HAS[m]] for m in used]).astype(jnp.float32)
        total = sum(x * has[:, None] for x, has in zip(found, there, strict=True))
        return total / jnp.maximum(there.sum(axis=0), 1.0)[:, None]

    return encode


def chunks(count: int, size: int = 1024) -> Iterator[slice]:
    """Slices of at most `size`, so that no n × n table lies in memory at once."""
    for start in itertools.takewhile(lambda x: x < count, itertools.count(0, size)):
        yield slice(start, start + size)


def unit(x: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    """Rows of length 1, so that a product of rows is their cosine; zeros stay."""
    x = x.astype(np.float32)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def read(*paths: Path | str) -> list[FeatureSet]:
    """Files of `python -m av_mae.extract --pool mean`; the same classes for all.

    `rgb+spectrogram` is their `joint`. Raises UserError for a file of tokens.
    """
    tables = [extract.read(path) for path in paths]
    classes = sorted({label for table in tables for label in table.labels})
    numbers = {label: i for i, label in enumerate(classes)}
    return [_of_table(p, t, numbers) for p, t in zip(paths, tables, strict=True)]


def _of_table(path, table: extract.Table, numbers: dict[str, int]) -> FeatureSet:
    names = {"joint": "rgb+spectrogram"}
    if any(x.ndim != 2 for x in table.arrays.values()):
        raise UserError(f"{path} holds tokens: extract with --pool mean or cls.")
    arrays = {names.get(name, name): x for name, x in table.arrays.items()}
    if len(arrays) == 2:  # of one modality, what is joint is that
        arrays.pop("rgb+spectrogram", None)
    known = bool(table.labels) and "" not in table.labels
    return FeatureSet(
        {name: np.nan_to_num(x) for name, x in arrays.items()},
        {name: ~np.isnan(x).any(axis=1) for name, x in arrays.items()},
        np.array([numbers[x] for x in table.labels], np.int64) if known else None,
        list(numbers),
        list(table.ids),
    )


def paired(video: FeatureSet, audio: FeatureSet) -> FeatureSet:
    """`rgb` of one set and `spectrogram` of another, of the clips that both have."""
    places = {name: i for i, name in enumerate(audio.ids)}
    rows = [i for i, name in enumerate(video.ids) if name in places]
    others = [places[video.ids[i]] for i in rows]
    parts = (("rgb", video, rows), ("spectrogram", audio, others))
    for m, clips, _ in parts:
        if m not in clips.features:
            raise UserError(f"there are no features of {m}: both are needed.")
    return FeatureSet(
        {m: clips.features[m][index] for m, clips, index in parts},
        {m: clips.has[m][index] for m, clips, index in parts},
        *(None, [], [video.ids[i] for i in rows]),
    )
