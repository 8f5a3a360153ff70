"""A data set made of arrays, and the smoke configs that fit it, for the trainers' tests.

Trainers see a data set only through these attributes and the two iterators.
"""

import importlib.util
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]


def config(name: str, arg: str = "smoke"):
    """The config of configs/<name>.py for this argument."""
    path = ROOT / "configs" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name.replace("/", "_"), path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(arg)


class Dataset:
    """Clips whose class is written into picture and sound; endless, by step alone."""

    def __init__(self, config, num_clips=16, classes=3, views=1, multilabel=False):
        self.num_clips, self.classes = num_clips, classes
        self.label_names = [f"class {i}" for i in range(classes)]
        self.ids = [f"clip {i}" for i in range(num_clips)]
        self.info, self.checksum, self.missing = {}, "checksum", False
        self._views, self._multilabel = views, multilabel
        self._frames = (config.data.num_frames, config.data.size, config.data.size, 3)
        self._samples = round(config.data.audio_seconds * 16000)
        self.without: dict[str, set[int]] = {"has_rgb": set(), "has_audio": set()}
        self.junk = 0  # what stands where a clip has no picture or sound

    def clip(self, i: int) -> dict:
        rng = np.random.default_rng(i)
        label = i % self.classes
        shape = (self._views, *self._frames)
        rgb = rng.integers(0, 64, shape) + 190 * label // self.classes
        t = np.arange(self._samples)
        sound = 8000 * np.sin(t * (0.05 + 0.4 * label)) + rng.normal(0, 100, t.shape)
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
            row["rgb"] = np.full_like(row["rgb"], self.junk)
        if not row["has_audio"]:
            row["waveform"] = np.full_like(row["waveform"], self.junk)
        return row

    def _batch(self, numbers) -> dict:
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
            batch["valid"] = numbers < self.num_clips
            batch["index"] = np.where(batch["valid"], numbers, -1)
            yield batch
