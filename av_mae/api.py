"""Python first: `av_mae.load` opens a model, wherever its weights come from.

model = av_mae.load("runs/finetune")     # a workdir, a step, or a published file
model.config, model.params, model.labels
model.logits(batch)                      # of a host batch, as the data package gives
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from av_mae import (
    ConfigError,
    checkpoints,
    classifier,
    finetune,
    importers,
    pretrain,
)
from av_mae import run as runs


@dataclasses.dataclass(frozen=True)
class Model:
    """A model with its weights.

    config: the whole config tree that it was trained by, or that its file implies;
    params: nested dict of numpy arrays; labels: the names of its classes, where known
    ({head: names} with several heads).
    """

    config: ConfigDict
    params: dict[str, Any]
    labels: list[str] | dict[str, list[str]]

    @functools.cached_property
    def module(self):
        """The flax module: an Autoencoder (pretrain) or a Classifier (finetune)."""
        if self.config.trainer == "pretrain":
            return pretrain.build(self.config)
        return finetune.build(self.config, self.classes)

    @property
    def classes(self) -> int | dict[str, int]:
        """Number of classes; {head: number} with several heads."""
        heads = {
            k: v["bias"].shape[0] for k, v in self.params.items() if k[:4] == "head"
        }
        heads.pop("head_norm", None)
        if list(heads) == ["head"]:
            return heads["head"]
        return {name.removeprefix("head_"): count for name, count in heads.items()}

    def logits(self, batch: dict[str, np.ndarray]):
        """Logits [b classes] of a host batch, the mean over views and modalities.

        {head: logits} with several heads. Compiles once for a shape. Raises ConfigError
        for an autoencoder, which has none.
        """
        if self.config.trainer == "pretrain":
            raise ConfigError(
                "this model is an autoencoder (trainer is 'pretrain') and has no "
                "classes: finetune it, or load a finetuned one."
            )
        inputs = {k: batch[k] for k in batch if k not in ("label", "index", "valid")}
        found = self._predict(self.params, inputs, jax.random.key(0))
        return jax.tree.map(np.asarray, found)

    @functools.cached_property
    def _predict(self):
        predict = finetune.make_predict(self.config, self.module, missing=True)

        def by_clip(params, batch, rng):
            logits, present, _ = predict(params, batch, rng, False)
            clips = len(next(iter(batch.values())))
            mean = lambda x: x.reshape(clips, -1, x.shape[-1]).mean(axis=1)
            return jax.tree.map(mean, classifier.combine(logits, present))

        return jax.jit(by_clip)


def load(path: Path | str, weights: str = "params") -> Model:
    """The model at `path`: a workdir, a checkpoint step, or a published file or folder.

    weights: `params`, or `ema` for their moving average, where a run keeps one. Raises
    CheckpointError for what is none of these, or is damaged.
    """
    if importers.find(path):
        found = importers.read(path)
        return Model(found.config, found.params, found.labels)
    params, config, meta = checkpoints.load(path, weights)
    return Model(runs.config_of(config), params, meta["labels"])
