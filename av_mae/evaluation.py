"""How a classifier is measured: views averaged, subsets of the modalities, metrics.

A clip's logits are the mean over the modalities that it has; then its views (times in
the clip × crops) are averaged, as `eval.average` says. `eval.modalities` names subsets
('rgb', 'spectrogram', 'rgb+spectrogram') that are measured too, by hiding the others:
their numbers stand under `eval/<subset>/…`.
"""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from av_mae import ConfigError, choose, classifier, losses, metrics, parallel

# objective.kind: the loss, and how the data pipeline gives the labels.
LOSSES = {
    "softmax": losses.softmax_cross_entropy,
    "sigmoid": losses.sigmoid_cross_entropy,
}
LABELS = {"softmax": "class", "sigmoid": "multilabel"}
HAS = {"rgb": "has_rgb", "spectrogram": "has_audio"}

Views = Float[Array, "b v k"]
Clips = Float[Array, "b k"]


# eval.average: over the views of a clip.


def mean_logits(logits: Views, kind: str) -> Clips:
    """The mean of the logits (Scenic)."""
    return logits.mean(axis=1)


def mean_probabilities(logits: Views, kind: str) -> Clips:
    """Logits of the mean of the probabilities (VideoMAE, MCG-NJU's code).

    For `softmax` their logarithms; for `sigmoid` ln p − ln(1 − p).
    """
    mean = lambda logs: jax.nn.logsumexp(logs, axis=1) - np.log(logs.shape[1])
    logits = logits.astype(jnp.float32)
    if kind == "softmax":
        return mean(jax.nn.log_softmax(logits))
    return mean(jax.nn.log_sigmoid(logits)) - mean(jax.nn.log_sigmoid(-logits))


AVERAGES = {"logits": mean_logits, "probabilities": mean_probabilities}


def subsets(config) -> dict[str, tuple[str, ...]]:
    """{name: modalities} of `eval.modalities`; ConfigError for what is no subset."""
    found = {}
    for name in config.eval.modalities:
        parts = tuple(m for m in config.modalities if m in str(name).split("+"))
        if not parts or "+".join(parts) != name:
            raise ConfigError(
                f"eval.modalities has {name!r}, but modalities is "
                f"{tuple(config.modalities)}: name some of them, in this order, joined "
                "by '+'."
            )
        found[name] = parts
    return found


def only(batch: dict, modalities: tuple[str, ...]) -> dict:
    """The batch with all but these modalities hidden, on the device.

    Clips that have none of them do not count.
    """
    absent = {k: jnp.zeros_like(batch["valid"]) for k in HAS.values() if k in batch}
    shown = {HAS[m]: batch[HAS[m]] for m in modalities}
    some = functools.reduce(jnp.logical_or, shown.values())
    return batch | absent | shown | {"valid": batch["valid"] & some}


def by_head(values) -> dict:
    """{head: array}; the name of a head alone is ''."""
    return values if isinstance(values, Mapping) else {"": values}


def make_measure(config, predict, mesh, modalities: tuple[str, ...] = ()):
    """The jitted (params, batch) → sums of loss and accuracy over valid clips, rows.

    The numbers of several heads begin with the head's name; `action` is right where all
    heads are. modalities: the only ones that are seen (`predict` then has to know
    missing ones), () for all.
    """
    kind = config.objective.kind
    entropy = choose("objective.kind", kind, LOSSES)
    average = choose("eval.average", config.eval.average, AVERAGES)

    def measure(params, batch):
        batch = only(batch, modalities) if modalities else batch
        logits, present, _ = predict(params, batch, jax.random.key(0), False)
        labels, valid = by_head(batch["label"]), batch["valid"]
        count = valid.sum(dtype=jnp.float32)
        scores, values, sums = {}, [], {}
        for head, x in by_head(classifier.combine(logits, present)).items():
            x = average(x.reshape(len(valid), -1, x.shape[-1]), kind)  # b k, of (b v) k
            values.append(entropy(x, labels[head], 0.0, valid))
            scores[head] = x
            if kind == "softmax":
                found = metrics.classification(x, labels[head], valid)
                sums |= {f"{head}_{name}".lstrip("_"): n for name, n in found.items()}
        if len(scores) > 1:
            sums["action_top_1"] = metrics.all_right(scores, labels, valid)
        sums["loss"] = metrics.Mean(sum(values) / len(values) * count, count)
        keep = {name: batch[name] for name in ("label", "valid", "index")}
        return sums, {"logits": scores.get("", scores), **keep}

    return jax.jit(measure, out_shardings=parallel.replicated(mesh))


def make(config, make_predict: Callable, missing: bool, mesh) -> dict[str, Callable]:
    """{what its numbers begin with: measure}: of all modalities, and of each subset.

    make_predict(missing): the function that predicts. A subset that is all of the
    modalities has no measure of its own.
    """
    measures = {"": make_measure(config, make_predict(missing), mesh)}
    for name, modalities in subsets(config).items():
        if modalities != tuple(config.modalities):
            predict = make_predict(True)
            measures[f"{name}/"] = make_measure(config, predict, mesh, modalities)
    return measures


def run(
    config, measures: dict, weights: dict, dataset, put, keep: list | None = None
) -> dict[str, float]:
    """Mean loss and accuracy over the data set; mAP and its like of several labels.

    weights: {what its numbers begin with: params}. The data are read once. keep: gets
    what was predicted from all modalities, a dict for each batch, for `in_order`.
    """
    kind, pairs = config.objective.kind, [(m, w) for m in measures for w in weights]
    sums: dict = {pair: {} for pair in pairs}
    rows: dict = {pair: [] for pair in pairs}
    for batch in dataset.evaluate(config.eval.batch_size):
        batch = put(batch)
        for m, w in pairs:
            more, found = measures[m](weights[w], batch)
            sums[m, w] = metrics.add(sums[m, w], more)
            kept, ranked = keep is not None and not (m or w), kind == "sigmoid"
            if kept or ranked:
                found = jax.device_get(found)
            if kept:
                keep.append(found)
            if ranked:
                seen = [found[name][found["valid"]] for name in ("logits", "label")]
                rows[m, w].append(seen)
    results = {}
    for m, w in pairs:
        found = metrics.results(sums[m, w])
        if rows[m, w]:
            joined = map(np.concatenate, zip(*rows[m, w], strict=True))
            found |= metrics.ranking(*joined)
        results |= {f"eval/{m}{w}{name}": value for name, value in found.items()}
    return results | of_all(config, results)


def of_all(config, results: Mapping[str, float]) -> dict[str, float]:
    """The numbers of all modalities once more, under their subset's name if asked."""
    whole = {k: x for k, x in results.items() if k.count("/") == 1}
    return {
        k.replace("eval/", f"eval/{name}/"): x
        for name, modalities in subsets(config).items()
        if modalities == tuple(config.modalities)
        for k, x in whole.items()
    }


def in_order(rows: list[dict]) -> dict:
    """{logits, label, index} of all batches, each clip once, in the data set's order.

    Arrays whose first axis is clips; of several heads, logits and label are dicts.
    """
    found = jax.tree.map(lambda *parts: np.concatenate(parts), *rows)
    # Several processes put their clips behind one another; padding has index -1.
    order = np.argsort(found["index"])[np.sum(~found["valid"]) :]
    del found["valid"]
    return jax.tree.map(lambda x: x[order], found)
