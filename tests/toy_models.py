"""Models with random weights in a workdir, for the commands that use models."""

import functools
import json
from pathlib import Path

import jax
import numpy as np
import synthetic

from av_mae import checkpoints, finetune, pretrain
from av_mae import run as runs

LABELS = ["bell", "drum"]


def config(trainer: str, **changes):
    """A tiny config for clips of toy.py: 4 frames of 32 pixels, .32 s of sound."""
    return synthetic.tiny(f"digits/{trainer}", **changes)


def random_params(init, seed: int = 0) -> dict:
    """Random values in the shapes of `init(rng)`: quicker than initial ones."""
    shapes = jax.eval_shape(init, jax.random.key(0))
    rng = np.random.default_rng(seed)

    def values(path, x):
        scale = path[-1].key == "scale"
        return (scale + rng.normal(0, 0.2, x.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(values, shapes)


def write(workdir: Path, config, labels=LABELS, seed: int = 0) -> Path:
    """Random weights for `config` as a checkpoint of step 0."""
    if config.trainer == "pretrain":
        init = functools.partial(pretrain.init, config, pretrain.build(config))
    else:
        heads = isinstance(labels, dict)
        count = {k: len(v) for k, v in labels.items()} if heads else len(labels)
        init = functools.partial(finetune.init, config, finetune.build(config, count))
    meta = {"labels": labels, "dataset_checksum": "", "provenance": {}}
    meta |= {"spectrogram": {}, "picture": {}}
    saved = json.loads(runs.config_json(config))
    target = checkpoints.Checkpoints(workdir, saved, meta, keep=1)
    try:
        target.save(0, {"params": random_params(init, seed)}, force=True)
    finally:
        target.close()
    return workdir
