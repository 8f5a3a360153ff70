"""Models with random weights in a workdir, for the commands that use models."""

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


def write(workdir: Path, config, labels=LABELS, seed: int = 0):
    """Weights for `config` as a checkpoint of step 0; no bias or head is zero."""
    rng = jax.random.key(seed)
    if config.trainer == "pretrain":
        params = pretrain.init(config, pretrain.build(config), rng)
    else:
        classes = (
            {k: len(v) for k, v in labels.items()}
            if isinstance(labels, dict)
            else len(labels)
        )
        params = finetune.init(config, finetune.build(config, classes), rng)
    noise = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda x: np.asarray(x + noise.normal(0, 0.1, x.shape), np.float32), params
    )
    meta = {"labels": labels, "dataset_checksum": "", "provenance": {}}
    meta |= {"spectrogram": {}, "picture": {}}
    saved = json.loads(runs.config_json(config))
    target = checkpoints.Checkpoints(workdir, saved, meta, keep=1)
    try:
        target.save(0, {"params": params}, force=True)
    finally:
        target.close()
    return workdir
