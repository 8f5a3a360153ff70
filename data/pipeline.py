"""Prepared records → batches of numpy arrays, with Grain.

    source(numbers).shuffle().repeat().random_map(sample)[process::processes].batch()[step:]

Everything up to the batch is random access, so the position in the data is the step
alone: a run that starts at step k gets what an uninterrupted one gets from k on, with
any number of threads or worker processes. Each process takes its share *after* the
random numbers are bound to places in the global order; shares taken before would all
draw the same ones. Batches hold uint8 pictures and int16 sound: what can be computed
from those (floats, log-mels, flips) is left to the device.
"""

import contextlib
import copy
import ctypes
import functools
import hashlib
import logging
import multiprocessing
import os
import re
import threading
from collections.abc import Iterator

import grain
import numpy as np
from absl import flags

from data import (
    ConfigError,
    RecordError,
    randaugment,
    samples,
    sampling,
    transforms,
)
from data.sources import SOURCES, open_records

LABELS = ("none", "class", "multilabel", "heads")
CHOICES = {  # fields of config.data that take one of a few values
    "source": tuple(SOURCES),
    "sampling": tuple(sampling.SAMPLINGS),
    "crop": tuple(transforms.CROPS),
    "resize": tuple(transforms.RESIZES),
    "audio_align": ("proportional", "window", "whole"),
    "crops": (1, 3),
}
HAS = {"rgb": "has_rgb", "spectrogram": "has_audio"}  # modality → key of the index
KIND = {"rgb": "picture", "spectrogram": "sound"}
# glibc's malloc.h: M_MMAP_THRESHOLD, at its most, and M_TRIM_THRESHOLD
MALLOPT = {-3: 32 << 20, -1: 256 << 20}
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
    """Opens one split of a data set of any kind (`config.source`, data/sources.py).

    Args:
        config: `config.data`; its fields are in the design (config tree, `data`).
        split: 'train', 'validation', 'test' or another that was prepared.
        modalities: which of 'rgb' and 'spectrogram' a batch holds (a clip that has
            none of them is left out).
        label: 'none'; 'class': one per clip, int32; 'multilabel': float32 [classes];
            'heads': dict of int32 by head (such as verb and noun).
        sample_rate: hertz of the sound that the spectrogram's preset wants.
        log_mel: (rows a second, columns) of the log-mel that the records hold: a batch
            has `spectrogram`, float32 [b v t f 1], instead of `waveform`.
        seed: of the order, of all random draws, and of the subset of `config.limit`.
        process: (index of this process, number of processes).

    Raises:
        RecordError: the data set is missing or damaged.
        ConfigError: the data set is not what the config wants.
    """
    check(config)
    log_mel = log_mel if "spectrogram" in modalities else None
    records = open_records(
        config.dir,
        split,
        config.source,
        fps=config.fps,
        sample_rate=sample_rate,
        mels=log_mel[1] if log_mel else 0,
        as_tensorflow=config.resize == "bilinear",
        skip_bad_records=config.skip_bad_records,
        prepared=config.prepared,
    )
    sound = samples.Sound(*log_mel) if log_mel else samples.Sound(sample_rate)
    return Dataset(records, config, split, modalities, label, sound, seed, process)


def check(config):
    """Raises ConfigError for what is wrong with `config.data` whatever the data are."""
    for field, allowed in CHOICES.items():
        if getattr(config, field) not in allowed:
            raise ConfigError(
                f"config.data.{field}={getattr(config, field)!r} is none of {allowed}."
            )
    randaugment.parse(config.randaugment)
    for name, text in config.prepared.items():
        if text not in ("", "source") and not re.fullmatch(r"\d+(\.\d+)?", text):
            raise ConfigError(
                f"config.data.prepared.{name}={text!r} is no number, 'source' or ''."
            )


class Dataset:
    """One split of a prepared data set, as batches (keys and shapes: design, 3).

    Attributes:
        info: what `dataset.json` says.
        ids: id of every record; `ids[batch["index"]]` names a row.
        label_names: name of every class; a dict of such lists by head, where clips have
            labels of several kinds.
        num_clips: clips in an epoch (those with neither wanted modality are out).
        missing: whether some of these clips lack a wanted modality.
        having: how many of them have each wanted modality.
        checksum: SHA-256 that stands for the data set's content.
        notes: sentences, without a full stop, on what belongs beside numbers of it.
        left_out: how many damaged records evaluations have left out so far, of those
            of this process.
    """

    def __init__(self, records, config, split, modalities, label, sound, seed, process):
        self._where = f"{split} of {config.dir}"
        self._config, self._seed = config, seed
        self._may_skip = config.skip_bad_records - len(records.damaged)
        self._skipped = set()
        self._process, self._num_processes = process
        _check_choices(modalities, label)
        self.info = records.info
        self.ids = [entry["id"] for entry in records.index]
        self.label_names = self.info["labels"]
        self.checksum = _checksum(self.info)
        self.notes = _notes(records, split)
        self._clips = self._usable(records.index, modalities)
        if config.limit and split == config.split:
            self._clips = _balanced(records.index, self._clips, config.limit, seed)
        self.num_clips = len(self._clips)
        self.having = {
            modality: sum(bool(records.index[i][HAS[modality]]) for i in self._clips)
            for modality in modalities
        }
        self.missing = self._check_missing()
        self._check_labels(records.index, label)
        self._check_rates(records, modalities, sound)
        self._reader = samples.Reader(
            records, config, modalities, label, tuple(self.label_names), sound
        )
        if config.cache:
            self._open_cache(records)

    def train(self, batch_size: int, step: int = 0) -> Iterator[dict]:
        """Endless shuffled batches of this process, from batch `step` on.

        `batch_size` counts clips over all processes. With `config.skip_bad_records`,
        up to so many damaged records give way to the ones after them (counted over
        the life of this object, in each process); one more is a RecordError.
        """
        sample = self._reader.train
        if self._may_skip:
            options = dict(clips=self._clips, limit=self._may_skip)
            sample = functools.partial(self._reader.train_or_next, **options)
        dataset = (
            grain.MapDataset.source(self._clips)
            .seed(self._seed)
            .shuffle()
            .repeat()
            .random_map(sample)
        )
        batches = self._iterate(dataset, batch_size, step)
        return self._counting_skipped(batches) if self._may_skip else batches

    def _counting_skipped(self, batches):
        """The batches without `skipped`, whose records are told and counted."""
        with contextlib.closing(batches):
            for batch in batches:
                for number in np.unique(batch.pop("skipped")):
                    if number >= 0 and number not in self._skipped:
                        self._skip(number)
                yield batch

    def _skip(self, number):
        """Tells of a damaged record; RecordError where it is one too many."""
        self._skipped.add(number)
        error = f"{self.ids[number]}: {self._why(number)}"
        allowed = self._config.skip_bad_records
        if len(self._skipped) > self._may_skip:
            raise RecordError(
                f"{error} It is one more than config.data.skip_bad_records={allowed}."
            )
        count = allowed - self._may_skip + len(self._skipped)
        log.warning("passed over (%d of at most %d): %s", count, allowed, error)

    def _why(self, number):
        """What was wrong with a record; a worker's is known by reading it again."""
        if number in self._reader.failures:
            return self._reader.failures[number]
        try:
            self._reader.train(number, np.random.default_rng(0))
        except RecordError as error:
            return str(error)
        return "it is damaged in places; copy or prepare the data set again."

    def evaluate(self, batch_size: int) -> Iterator[dict]:
        """One pass in order; every process gets the same number of batches.

        The rows that fill the last batch have `valid` False and `index` −1. So have, up
        to `config.skip_bad_records`, those of damaged records; see `left_out`.
        """
        padding = np.full(-self.num_clips % batch_size, -1)
        numbers = np.concatenate([self._clips, padding])
        dataset, reader = grain.MapDataset.source(numbers), self._reader
        if not self._may_skip:
            return self._iterate(dataset.map(reader.evaluate), batch_size, 0)
        batches = self._iterate(dataset.map(reader.evaluate_or_nothing), batch_size, 0)
        return self._counting_skipped(batches)

    @property
    def left_out(self):
        return len(self._skipped)

    def rows(self) -> tuple[samples.Reader, np.ndarray]:
        """What makes a row from a number, and the numbers, for measurements."""
        return self._reader, self._clips

    def _iterate(self, dataset, batch_size, step):
        if batch_size % self._num_processes:
            raise ConfigError(
                f"batch_size={batch_size} does not divide among {self._num_processes} "
                "processes; make it a multiple of their number."
            )
        _keep_memory()
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

    def _note(self, sentence):
        self.notes.append(sentence)
        log.warning("%s.", sentence)

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
            self._note(
                f"{dropped} of {len(usable)} clips in {self._where} have no "
                f"{_either(modalities)} and are left out"
            )
        return np.flatnonzero(usable)

    def _check_missing(self):
        lacking = {KIND[m]: self.num_clips - count for m, count in self.having.items()}
        if any(lacking.values()) and not self._config.missing_modalities:
            counts = " and ".join(f"{n} have no {kind}" for kind, n in lacking.items())
            raise ConfigError(
                f"Of {self.num_clips} clips in {self._where}, {counts}; set "
                "config.data.missing_modalities=True to train with what each has."
            )
        return any(lacking.values())

    def _check_labels(self, index, label):
        wrong = [i for i in self._clips if len(index[i]["labels"]) != 1]
        heads = isinstance(self.label_names, dict)
        used = {label for i in self._clips for label in index[i]["labels"]}
        if label in ("class", "multilabel") and len(used) < len(self.label_names):
            lacking = len(self.label_names) - len(used)
            self.notes.append(
                f"{lacking} of {len(self.label_names)} classes have no clip in "
                f"{self._where}"
            )
        if heads != (label == "heads") and label != "none":
            kinds = ", ".join(self.label_names) if heads else "one kind of label"
            raise ConfigError(
                f"{self._where} has {kinds}; set config.model.label_heads to "
                + ("pairs (kind of label, 0)." if heads else "().")
            )
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
        self._check_preparation(settings)
        fps = settings["fps"]
        if not isinstance(fps, int | float):  # 'source': each record has its own
            if self._config.prepared["fps"] == "source":
                return
            fps = self._first_seen(records).fps
        if "rgb" in modalities and abs(fps - self._config.fps) > 0.01:
            self._note(
                f"the clips in {self._where} have {fps:g} frames a second, but "
                f"config.data.fps expects {self._config.fps:g}: a stride of "
                f"{self._config.stride} frames lasts another time than it should"
            )

    def _check_preparation(self, settings):
        """Notes where the data set was prepared otherwise than the config says."""
        for option in ("fps", "short_side"):
            wanted, found = self._config.prepared[option], settings.get(option, "")
            found = f"{found:g}" if isinstance(found, int | float) else found
            if wanted and found and wanted != found:
                flag = option.replace("_", "-")
                self._note(
                    f"{self._where} was prepared with --{flag} {found}, but "
                    f"config.data.prepared.{option} is {wanted}: prepare it again, or "
                    "set the field to '' to train with it as it is"
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


class Evaluation:
    """What `Dataset.evaluate` makes of a clip, for clips in memory.

    Args: as of `load`. A clip is a `data.Clip` whose frames are an array (or None).
    """

    def __init__(
        self, config, modalities=("rgb", "spectrogram"), sample_rate: int = 16000
    ):
        check(config)
        _check_choices(modalities, "none")
        sound = samples.Sound(sample_rate)
        self._reader = samples.Reader(None, config, modalities, "none", (), sound)

    def row(self, clip) -> dict:
        """The clip as a row of a batch: keys and shapes as there, without b."""
        reader = copy.copy(self._reader)
        reader.kept = {0: samples.kept(clip)}
        return reader.evaluate(0)

    def windows(self, clip) -> tuple[np.ndarray, np.ndarray]:
        """Frames, int64 [v t], and first sample of the sound, int64 [v], of each view.

        The sound may begin before 0 or end after its end: it is looped. Crops are not
        counted among the views here.
        """
        kept, reader = samples.kept(clip), self._reader
        heard = len(kept.sound) if kept.has_audio else 0
        length = sampling.Length(kept.num_frames, kept.fps, heard)
        views = reader.config.views
        frames, sounds = sampling.view_windows(reader.want, length, views)
        return np.stack(frames), np.asarray(sounds, np.int64)


def _keep_memory():
    """Has glibc keep the memory of a batch for the next one.

    By itself it gives large blocks back to the system and takes them anew, page by
    page: of a record of 5.8 MB that is most of the time of reading it. Other C
    libraries are left alone.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "gnu_get_libc_version"):
        for option, value in MALLOPT.items():
            library.mallopt(option, value)


def _end_with_parent(worker_index, num_workers):
    """Ends a worker process when its parent is gone, even if that was killed."""
    del worker_index, num_workers
    _keep_memory()
    parent = multiprocessing.parent_process()

    def wait():
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _notes(records, split):
    """What is not in a split that belongs there."""
    notes, counts = [], records.info.get("splits", {}).get(split, {})
    if failed := counts.get("failed"):
        notes.append(
            f"{failed} files of {split} could not be prepared (report.json names them)"
        )
    if records.damaged:
        notes.append(f"{len(records.damaged)} damaged records of {split} are left out")
    return notes


def _either(modalities):
    return " or ".join(KIND[modality] for modality in modalities)


def _check_choices(modalities, label):
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
