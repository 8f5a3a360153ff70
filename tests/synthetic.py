"""A data set made of arrays, and smoke configs that fit it, for the trainers' tests.

Trainers see a data set only through these attributes and the two iterators.
"""

import contextlib
import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from av_mae import checkpoints, loop

ROOT = Path(__file__).resolve().parents[1]


def config(name: str, arg: str = "smoke"):
    """The config of configs/<name>.py for this argument."""
    path = ROOT / "configs" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name.replace("/", "_"), path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(arg)


TIMING = ("clips_per_second", "wait_share", "seconds_per_step", "seconds_left")


def tiny(name: str, **changes):
    """The smoke config made smaller still: two layers, 8 steps, half the sound.

    changes: fields by dotted name with `__` for dots, `data__size=16`.
    """
    result = config(name)
    result.steps, result.data.audio_seconds = 8, 0.32
    # What the shipped config is tuned to does not matter here.
    result.spectrogram.normalise, result.picture.normalise = "none", "fixed"
    result.model.positions, result.model.block.qkv_init = "sinusoidal", "xavier"
    result.augment.time_shift, result.model.norm = False, True
    result.optimizer.layer_decay = 1.0
    result.model.width, result.model.depth, result.model.mlp = 16, 2, 32
    result.schedule.learning_rate_per_256, result.schedule.warmup_epochs = 0.64, 0.0
    result.eval.every_epochs = 1.0
    result.picture.mean = result.picture.std = (0.5, 0.5, 0.5)
    result.model.drop_path, result.augment.flip = 0.1, 0.0
    result.optimizer.name, result.optimizer.b2 = "adamw", 0.95
    if result.trainer == "pretrain":
        result.model.fusion, result.model.fusion_layers = "mid", 1
        result.model.decoder.width, result.model.decoder.mlp = 16, 32
        result.model.decoder.positions = "sinusoidal"
        result.mask.rgb.kind, result.mask.rgb.ratio = "tube", 0.75
        result.objective.target.update(rgb="standardised", spectrogram="standardised")
    else:
        result.model.fusion, result.model.fusion_layer = "bottleneck", 0
        result.augment.mixup = 0.0
    result.update_from_flattened_dict(
        {key.replace("__", "."): value for key, value in changes.items()}
    )
    return result


@contextlib.contextmanager
def quick():
    """Less work for XLA's compiler, and no TensorFlow (test_loop tests its files)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_tensorboard", lambda workdir: None)
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", False)


def lines(workdir) -> list[dict]:
    """The lines of metrics.jsonl without the fields that tell times."""
    text = (Path(workdir) / "metrics.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMING} for row in rows]


def assert_same_run(workdir, whole):
    """Two runs' newest checkpoints to the last bit, and the lines of their numbers."""
    for part in ("params", "opt_state", "ema"):
        found, wanted = (
            checkpoints._names(checkpoints.load(path, part)[0])
            for path in (workdir, whole)
        )
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            np.testing.assert_array_equal(found[name], value, err_msg=name)
    assert lines(workdir) == lines(whole)


class Dataset:
    """Clips whose class is written into picture and sound; endless, by step alone.

    first: the seed of the first clip's noise; process: (index, number): each gets its
    own part of every global batch, in order, so that several see what one does.
    """

    def __init__(
        self,
        config,
        num_clips=16,
        classes=3,
        views=1,
        multilabel=False,
        process=(0, 1),
        first=0,
    ):
        self.num_clips, self.classes = num_clips, classes
        self.label_names = [f"class {i}" for i in range(classes)]
        self.ids = [f"clip {i}" for i in range(num_clips)]
        self.info, self.checksum, self.missing = {}, "checksum", False
        self.notes: list[str] = []
        self.left_out = 0
        self._views, self._multilabel = views, multilabel
        self._process, self._first = process, first
        self._frames = (config.data.num_frames, config.data.size, config.data.size, 3)
        self._samples = round(config.data.audio_seconds * 16000)
        self.without: dict[str, set[int]] = {"has_rgb": set(), "has_audio": set()}
        self.junk = 0  # how loud the noise is where a clip has no picture or sound

    @property
    def having(self) -> dict[str, int]:
        keys = {"rgb": "has_rgb", "spectrogram": "has_audio"}
        return {m: self.num_clips - len(self.without[k]) for m, k in keys.items()}

    def clip(self, i: int) -> dict:
        rng = np.random.default_rng(self._first + i)
        label = i % self.classes
        shape = (self._views, *self._frames)
        across = np.arange(shape[3])[:, None]  # waves, shorter for each class
        wave = np.sin(2 * np.pi * (label + 1) * across / 16)
        rgb = 100 + 80 * wave + rng.integers(0, 40, shape)
        t = np.arange(self._samples)
        # A tone in noise; the noise is the same in all clips but louder in each class.
        noise = np.random.default_rng(5).normal(0, 100 * 3**label, t.shape)
        sound = 8000 * np.sin(t * (0.05 + 0.4 * label)) + noise
        sound += rng.normal(0, 20, t.shape)
        row = {
            "rgb": rgb.astype(np.uint8),
            "waveform": np.repeat(sound[None], self._views, 0).astype(np.int16),
            "has_rgb": i not in self.without["has_rgb"],
            "has_audio": i not in self.without["has_audio"],
            "label": np.int32(label),
            "index": np.int64(i),
            "valid": True,
        }
        if self._multilabel:
            row["label"] = np.eye(self.classes, dtype=np.float32)[label]
        if not row["has_rgb"]:
            row["rgb"] = rng.integers(0, 1 + self.junk, shape).astype(np.uint8)
        if not row["has_audio"]:
            noise = rng.integers(0, 1 + self.junk, row["waveform"].shape)
            row["waveform"] = (100 * noise).astype(np.int16)
        return row

    def _batch(self, numbers) -> dict:
        index, count = self._process
        local = len(numbers) // count
        numbers = numbers[index * local : (index + 1) * local]
        rows = [self.clip(int(i)) for i in numbers]
        return {key: np.stack([row[key] for row in rows]) for key in rows[0]}

    def train(self, batch_size: int, step: int = 0):
        while True:
            rng = np.random.default_rng([7, step])
            yield self._batch(rng.integers(0, self.num_clips, batch_size))
            step += 1

    def evaluate(self, batch_size: int):
        for start in range(0, self.num_clips, batch_size):
            numbers = np.arange(start, start + batch_size)
            batch = self._batch(np.minimum(numbers, self.num_clips - 1))
            index, count = self._process
            local = batch_size // count
            numbers = numbers[index * local : (index + 1) * local]
            batch["valid"] = numbers < self.num_clips
            batch["index"] = np.where(batch["valid"], numbers, -1)
            yield batch
