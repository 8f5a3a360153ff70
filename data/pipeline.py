"""Prepared records → batches of numpy arrays, with Grain.

    source(numbers).shuffle().repeat().random_map(sample)[process::processes].batch()[step:]

Everything up to the batch is random access, so the position in the data is the step
alone: a run that starts at step k gets what an uninterrupted one gets from k on, with
any number of threads or worker processes. Each process takes its share *after* the
random numbers are bound to places in the global order; shares taken before would all
draw the same ones. Batches hold uint8 pictures and int16 sound: what can be computed
from those (floats, log-mels, flips) is left to the device.
"""

import copy
import hashlib
import logging
import multiprocessing
import os
import threading
from collections.abc import Iterator
from typing import NamedTuple

import grain
import numpy as np
from absl import flags

from data import ConfigError, dmvr, sampling, transforms
from data.records import Records

LABELS = ("none", "class", "multilabel")
CHOICES = {  # fields of config.data that take one of a few values
    "sampling": tuple(sampling.SAMPLINGS),
    "crop": tuple(transforms.CROPS),
    "resize": tuple(transforms.RESIZES),
    "audio_align": ("proportional", "window", "whole"),
    "crops": (1, 3),
}
HAS = {"rgb": "has_rgb", "spectrogram": "has_audio"}  # modality → key of the index
KIND = {"rgb": "picture", "spectrogram": "sound"}
CACHE_SHARE = 4  # data.cache fills at most this fraction (1/4) of the machine's memory

log = logging.getLogger(__name__)


def load(
    config,
    split: str,
    *,
    modalities: tuple[str, ...] = ("rgb", "spectrogram"),
    label: str = "none",
    sample_rate: int = 16000,
    log_mel: tuple[int, int] | None = None,
    seed: int = 0,
    process: tuple[int, int] = (0, 1),
) -> "Dataset":
    """Opens one split of a prepared data set, or of DMVR's TFRecords (data/dmvr.py).

    Args:
        config: `config.data`; its fields are in the design (config tree, `data`).
        split: 'train', 'validation', 'test' or another that was prepared.
        modalities: which of 'rgb' and 'spectrogram' a batch holds (a clip that has
            none of them is left out).
        label: 'none'; 'class': one per clip, int32; 'multilabel': float32 [classes].
        sample_rate: hertz of the sound that the spectrogram's preset wants.
        log_mel: (rows a second, columns) of the log-mel that the records hold: a batch
            has `spectrogram`, float32 [b v t f 1], instead of `waveform`.
        seed: of the order, of all random draws, and of the subset of `config.limit`.
        process: (index of this process, number of processes).

    Raises:
        RecordError: the data set is missing or damaged.
        ConfigError: the data set is not what the config wants.
    """
    log_mel = log_mel if "spectrogram" in modalities else None
    records = open_records(
        config.dir,
        split,
        fps=config.fps,
        sample_rate=sample_rate,
        mels=log_mel[1] if log_mel else 0,
        as_tensorflow=config.resize == "bilinear",
    )
    sound = _Sound(*log_mel) if log_mel else _Sound(sample_rate)
    return Dataset(records, config, split, modalities, label, sound, seed, process)


def open_records(where, split: str, mels: int = 0, **options):
    """The records of a split, whatever `where` (`data.dir`) means.

    mels and options: see `data.dmvr.Records`; a prepared data set says the rest itself.
    """
    if dmvr.matches(where):
        return dmvr.Records(where, split, mels=mels, **options)
    if mels:
        raise ConfigError(
            f"{where}: a prepared data set holds waveforms, no log-mels; choose a "
            "config.spectrogram.preset that computes them, not 'precomputed'."
        )
    return Records(where, split)


class _Sound(NamedTuple):
    """What a batch holds as sound: `waveform` or, with `mels`, `spectrogram`."""

    rate: int  # samples, or rows, a second
    mels: int = 0  # columns of a row

    @property
    def key(self):
        return "spectrogram" if self.mels else "waveform"

    def of(self, clip):
        """The sound of a clip, int16 [s] or float32 [t f]."""
        return clip.log_mel() if self.mels else clip.waveform()

    def bytes(self, record):
        return 4 * record.num_values if self.mels else 2 * record.num_samples

    def silence(self, views, length):
        """Zeros: int16 [v s] or float32 [v t f 1]."""
        if self.mels:
            return np.zeros((views, length, self.mels, 1), np.float32)
        return np.zeros((views, length), np.int16)


class Dataset:
    """One split of a prepared data set, as batches (keys and shapes: design, 3).

    Attributes:
        info: what `dataset.json` says.
        ids: id of every record; `ids[batch["index"]]` names a row.
        label_names: name of every class.
        num_clips: clips in an epoch (those with neither wanted modality are out).
        missing: whether some of these clips lack a wanted modality.
        checksum: SHA-256 that stands for the data set's content.
    """

    def __init__(self, records, config, split, modalities, label, sound, seed, process):
        self._where = f"{split} of {config.dir}"
        self._config, self._seed = config, seed
        self._process, self._num_processes = process
        _check_choices(config, modalities, label)
        self.info = records.info
        self.ids = [entry["id"] for entry in records.index]
        self.label_names = list(self.info["labels"])
        self.checksum = _checksum(self.info)
        self._clips = self._usable(records.index, modalities)
        if config.limit and split == config.split:
            self._clips = _balanced(records.index, self._clips, config.limit, seed)
        self.num_clips = len(self._clips)
        self.missing = self._check_missing(records.index, modalities)
        self._check_labels(records.index, label)
        self._check_rates(records, modalities, sound)
        self._reader = _Reader(
            records, config, modalities, label, len(self.label_names), sound
        )
        if config.cache:
            self._open_cache(records)

    def train(self, batch_size: int, step: int = 0) -> Iterator[dict]:
        """Endless shuffled batches of this process, from batch `step` on.

        `batch_size` counts clips over all processes.
        """
        dataset = (
            grain.MapDataset.source(self._clips)
            .seed(self._seed)
            .shuffle()
            .repeat()
            .random_map(self._reader.train)
        )
        return self._iterate(dataset, batch_size, step)

    def evaluate(self, batch_size: int) -> Iterator[dict]:
        """One pass in order; every process gets the same number of batches.

        The rows that fill the last batch have `valid` False and `index` −1.
        """
        padding = np.full(-self.num_clips % batch_size, -1)
        numbers = np.concatenate([self._clips, padding])
        dataset = grain.MapDataset.source(numbers).map(self._reader.evaluate)
        return self._iterate(dataset, batch_size, 0)

    def _iterate(self, dataset, batch_size, step):
        if batch_size % self._num_processes:
            raise ConfigError(
                f"batch_size={batch_size} does not divide among {self._num_processes} "
                "processes; make it a multiple of their number."
            )
        local = batch_size // self._num_processes
        threads, workers = self._config.threads, self._config.workers
        share = dataset[self._process :: self._num_processes]
        # No remainder is ever left; without the flag an endless length overflows.
        batches = share.batch(local, drop_remainder=True)[step:]
        # A thread makes a whole batch; two more may wait, so that memory stays small.
        buffer = threads + 2 if threads else 0
        batches = batches.to_iter_dataset(grain.ReadOptions(threads, buffer))
        if workers:
            if not flags.FLAGS.is_parsed():  # outside absl's app.run; Grain reads them
                flags.FLAGS.mark_as_parsed()
            options = grain.multiprocessing.MultiprocessingOptions(workers)
            batches = batches.mp_prefetch(options, _end_with_parent)
        return iter(batches)

    def _usable(self, index, modalities):
        """Numbers, int64 [clips], of the records with any of the modalities."""
        keys = [HAS[modality] for modality in modalities]
        usable = [any(entry[key] for key in keys) for entry in index]
        if not any(usable):
            raise ConfigError(
                f"No clip in {self._where} has {_either(modalities)}; choose other "
                "config.modalities or prepare the data set again."
            )
        if dropped := len(usable) - sum(usable):
            log.warning(
                "%d of %d clips in %s have no %s and are left out.",
                *(dropped, len(usable), self._where, _either(modalities)),
            )
        return np.flatnonzero(usable)

    def _check_missing(self, index, modalities):
        lacking = {
            KIND[modality]: sum(not index[i][HAS[modality]] for i in self._clips)
            for modality in modalities
        }
        if any(lacking.values()) and not self._config.missing_modalities:
            counts = " and ".join(f"{n} have no {kind}" for kind, n in lacking.items())
            raise ConfigError(
                f"Of {self.num_clips} clips in {self._where}, {counts}; set "
                "config.data.missing_modalities=True to train with what each has."
            )
        return any(lacking.values())

    def _check_labels(self, index, label):
        wrong = [i for i in self._clips if len(index[i]["labels"]) != 1]
        if label == "class" and wrong:
            raise ConfigError(
                f"{len(wrong)} of {self.num_clips} clips in {self._where} do not have "
                f"exactly one label (the first is {self.ids[wrong[0]]!r}); label them, "
                "or use config.objective.kind='sigmoid' where there are several."
            )
        if label == "multilabel" and not self.label_names:
            raise ConfigError(
                f"{self._where} has no labels; prepare it from a folder per class or "
                "a CSV with a column `label`."
            )

    def _check_rates(self, records, modalities, sound):
        settings = self.info["settings"]
        wanted = "spectrogram" in modalities and not sound.mels
        if wanted and settings["sample_rate"] != sound.rate:
            raise ConfigError(
                f"The sound in {self._where} has {settings['sample_rate']:g} Hz, but "
                f"the spectrogram preset wants {sound.rate}; prepare the data set "
                f"again with `python -m data.prepare … --sample-rate {sound.rate}`."
            )
        fps = settings["fps"]
        if not isinstance(fps, int | float):  # 'source': each record has its own
            fps = self._first_seen(records).fps
        if "rgb" in modalities and abs(fps - self._config.fps) > 0.01:
            log.warning(
                "The clips in %s have %g frames a second, but config.data.fps expects "
                "%g: a stride of %d frames lasts another time than it should.",
                *(self._where, fps, self._config.fps, self._config.stride),
            )

    def _first_seen(self, records):
        """The first record with picture (the first of all where there is none)."""
        first = max(self._clips, key=lambda i: records.index[i]["has_rgb"])
        return records.record(int(first))

    def _open_cache(self, records):
        if self._config.workers:
            raise ConfigError(
                "config.data.cache=True keeps clips in the memory of one process; set "
                "config.data.workers=0."
            )
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        self._reader.open_cache(memory // CACHE_SHARE)
        frames = sum(records.index[i]["num_frames"] for i in self._clips)
        size = self._reader.frame_bytes(self._first_seen(records))
        log.info(
            "data.cache: the pictures of %s take about %.1f GB of memory; up to %.1f "
            "GB are kept, the rest is decoded anew each time.",
            *(self._where, frames * size / 1e9, memory / CACHE_SHARE / 1e9),
        )


class _Kept(NamedTuple):
    """A record that was decoded whole, pictures resized or not; used like `Record`."""

    labels: tuple[int, ...]
    has_rgb: bool
    has_audio: bool
    num_frames: int
    fps: float
    pictures: np.ndarray | None  # uint8 [t h w c]
    sound: np.ndarray | None  # int16 [s], or float32 [t f]

    def frames(self, indices):
        return self.pictures[indices]

    def waveform(self):
        return self.sound

    def log_mel(self):
        return self.sound


class _Reader:
    """Makes rows of a batch from numbers of records, in threads or processes."""

    def __init__(self, records, config, modalities, label, num_classes, sound):
        self.records, self.config, self.sound = records, config, sound
        self.modalities, self.label = modalities, label
        self.num_classes = num_classes
        # A crop larger than the picture: the picture is enlarged to the crop.
        self.short_side = max(config.short_side, config.size)
        self.want = sampling.Want(
            num_frames=config.num_frames,
            stride=config.stride,
            num_samples=round(config.audio_seconds * sound.rate),
            sample_rate=sound.rate,
            align=config.audio_align,
            sampling=config.sampling,
        )
        self.kept = None

    def train(self, number, rng):
        """A row of random windows (`samples_per_clip` of them), each its own crop."""
        config = self.config

        def windows(clip):
            count = range(config.samples_per_clip)
            pairs = [sampling.train_window(self.want, clip, rng) for _ in count]
            return tuple(zip(*pairs, strict=True))

        def boxes(height, width):
            return [transforms.CROPS[config.crop](rng, height, width, config.size)]

        return self._row(int(number), windows, boxes, stored=self._from_stored)

    def evaluate(self, number):
        """A row of `views` × `crops`, crops fastest; nothing is random."""
        config = self.config
        if number < 0:
            return self._padding(config.views * config.crops)

        def windows(clip):
            return sampling.view_windows(self.want, clip, config.views)

        def boxes(height, width):
            if config.crops == 3:
                scenic = config.sampling == "dense"  # the other rules are VideoMAE's
                return transforms.three_boxes(height, width, config.size, up=scenic)
            return [transforms.center_box(None, height, width, config.size)]

        return self._row(int(number), windows, boxes, config.crops)

    def _row(self, number, windows, boxes, crops=1, stored=False):
        """A row of the batch: `windows` picks frames and sound, `boxes` their crops.

        stored: boxes are of the pictures as they are stored, not as resized.
        """
        clip = self._clip(number)
        rgb = "rgb" in self.modalities and clip.has_rgb
        audio = "spectrogram" in self.modalities and clip.has_audio
        sound = self.sound.of(clip) if audio else ()
        frames, sounds = windows(
            sampling.Length(
                num_frames=clip.num_frames if rgb else 0,
                fps=clip.fps,
                num_samples=len(sound),
            )
        )
        row = self._padding(len(frames) * crops)
        row |= {"index": np.int64(number), "valid": np.True_}
        if rgb:
            pictures, where = self._pictures(clip, frames, stored)
            row["rgb"] = self._crops(pictures, where, boxes)
            row["has_rgb"] = np.True_
        if audio:
            row[self.sound.key] = self._sounds(sound, sounds, crops)
            row["has_audio"] = np.True_
        if self.label != "none":
            row["label"] = self._label(clip.labels)
        return row

    def _padding(self, views):
        """A row of nothing: zeros that stand for no clip."""
        config, row = self.config, {"index": np.int64(-1), "valid": np.False_}
        if "rgb" in self.modalities:
            shape = (views, config.num_frames, config.size, config.size, 3)
            row |= {"rgb": np.zeros(shape, np.uint8), "has_rgb": np.False_}
        if "spectrogram" in self.modalities:
            silence = self.sound.silence(views, self.want.num_samples)
            row |= {self.sound.key: silence, "has_audio": np.False_}
        if self.label != "none":
            row["label"] = self._label(())
        return row

    def _pictures(self, clip, windows, stored):
        """Decoded frames and where in them each window's are, int [v t].

        A frame that several windows share is decoded once.
        """
        needed, where = np.unique(windows, return_inverse=True)
        pictures = clip.frames(needed)
        if not stored:
            pictures = self._resize(pictures)
        return pictures, where.reshape(len(windows), self.want.num_frames)

    def _crops(self, pictures, where, boxes):
        """uint8 [v t h w c], crops fastest; `boxes` is asked once per window."""
        size, method, crops = self.config.size, self.config.resize, []
        for window in where:
            first = window.min()
            frames = pictures[first : window.max() + 1]
            for box in boxes(*pictures.shape[1:3]):
                crops.append(transforms.crop(frames, box, size, method)[window - first])
        return np.stack(crops)

    def _sounds(self, sound, starts, crops):
        """[v s] or [v t f 1]; the crops of one view hear the same."""
        length, views = self.want.num_samples, len(starts) * crops
        if self.want.align == "whole":
            windows = [sampling.beginning(sound, length)] * len(starts)
        else:
            windows = [sampling.cut(sound, start, length) for start in starts]
        windows = np.repeat(np.stack(windows), crops, axis=0)
        return windows.reshape(self.sound.silence(views, length).shape)

    def _label(self, labels):
        if self.label == "class":
            return np.int32(labels[0] if labels else 0)
        hot = np.zeros(self.num_classes, np.float32)
        hot[list(labels)] = 1
        return hot

    def _resize(self, frames):
        return transforms.resize(frames, self.short_side, self.config.resize)

    @property
    def _from_stored(self):
        """Whether training crops pictures as they are stored, not as resized."""
        return self.config.crop in transforms.FROM_STORED

    def open_cache(self, num_bytes):
        self.kept, self.room, self.lock = {}, num_bytes, threading.Lock()

    def frame_bytes(self, record):
        """Bytes of one picture of the record as it is kept."""
        if not record.has_rgb:
            return 0
        shape = record.height, record.width
        if not self._from_stored:
            shape = transforms.resized_shape(*shape, self.short_side)
        return 3 * shape[0] * shape[1]

    def _clip(self, number):
        """The record, or its decoded self from memory."""
        if self.kept is None:
            return self.records.record(number)
        if (kept := self.kept.get(number)) is not None:
            return kept
        record = self.records.record(number)
        rgb = "rgb" in self.modalities and record.has_rgb
        audio = "spectrogram" in self.modalities and record.has_audio
        size = rgb * self.frame_bytes(record) * record.num_frames
        size += self.sound.bytes(record) if audio else 0
        with self.lock:  # two threads may decode the same clip: harmless, counted twice
            if size > self.room:
                return record
            self.room -= size
        pictures = record.frames(range(record.num_frames)) if rgb else None
        if rgb and not self._from_stored:
            pictures = self._resize(pictures)
        self.kept[number] = kept = _Kept(
            *(record.labels, record.has_rgb, record.has_audio),
            *(record.num_frames, record.fps, pictures),
            self.sound.of(record) if audio else None,
        )
        return kept


class Evaluation:
    """What `Dataset.evaluate` makes of a clip, for clips in memory.

    Args: as of `load`. A clip is a `data.Clip` whose frames are an array (or None).
    """

    def __init__(
        self, config, modalities=("rgb", "spectrogram"), sample_rate: int = 16000
    ):
        _check_choices(config, modalities, "none")
        sound = _Sound(sample_rate)
        self._reader = _Reader(None, config, modalities, "none", 0, sound)

    def row(self, clip) -> dict:
        """The clip as a row of a batch: keys and shapes as there, without b."""
        reader = copy.copy(self._reader)
        reader.kept = {0: _kept(clip)}
        return reader.evaluate(0)

    def windows(self, clip) -> tuple[np.ndarray, np.ndarray]:
        """Frames, int64 [v t], and first sample of the sound, int64 [v], of each view.

        The sound may begin before 0 or end after its end: it is looped. Crops are not
        counted among the views here.
        """
        kept, reader = _kept(clip), self._reader
        samples = len(kept.sound) if kept.has_audio else 0
        length = sampling.Length(kept.num_frames, kept.fps, samples)
        views = reader.config.views
        frames, sounds = sampling.view_windows(reader.want, length, views)
        return np.stack(frames), np.asarray(sounds, np.int64)


def _kept(clip) -> _Kept:
    """A `data.Clip` as the reader takes it."""
    rgb = clip.frames is not None and len(clip.frames) > 0
    audio = clip.waveform is not None and len(clip.waveform) > 0
    frames, sound = (clip.frames if rgb else None), (clip.waveform if audio else None)
    return _Kept((), rgb, audio, len(frames) if rgb else 0, clip.fps, frames, sound)


def _end_with_parent(worker_index, num_workers):
    """Ends a worker process when its parent is gone, even if that was killed."""
    del worker_index, num_workers
    parent = multiprocessing.parent_process()

    def wait():
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _either(modalities):
    return " or ".join(KIND[modality] for modality in modalities)


def _check_choices(config, modalities, label):
    for field, allowed in CHOICES.items():
        if getattr(config, field) not in allowed:
            raise ConfigError(
                f"config.data.{field}={getattr(config, field)!r} is none of {allowed}."
            )
    if not modalities or set(modalities) - set(HAS):
        raise ConfigError(f"modalities={modalities!r} must be some of {tuple(HAS)}.")
    if label not in LABELS:
        raise ConfigError(f"label={label!r} is none of {LABELS}.")


def _checksum(info):
    """SHA-256 over the sorted checksums of the shards."""
    files = info["checksums"].items()
    shards = sorted(entry["sha256"] for name, entry in files if ".json" not in name)
    return hashlib.sha256("".join(shards).encode()).hexdigest()


def _balanced(index, clips, limit, seed):
    """`limit` of the clips, equally many of each class as far as there are enough.

    Classes take turns, in an order drawn by the seed, so that a smaller limit gives a
    subset of a larger one. A clip counts for its first label; those without any are
    one class of their own.
    """
    if limit > len(clips):
        raise ConfigError(
            f"config.data.limit={limit} is more than the {len(clips)} clips there are; "
            "lower it, or set 0 to use all."
        )
    rng = np.random.default_rng(seed)
    turns, of_class = [], {}
    for clip in rng.permutation(clips):
        label = next(iter(index[clip]["labels"]), -1)
        of_class[label] = of_class.get(label, -1) + 1
        turns.append((of_class[label], label, clip))
    order = dict(zip(sorted(of_class), rng.permutation(len(of_class)), strict=True))
    turns.sort(key=lambda turn: (turn[0], order[turn[1]]))
    return np.sort([clip for _, _, clip in turns[:limit]])
