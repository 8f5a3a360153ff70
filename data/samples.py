"""A record → a row of a batch: frames, crops, sound, label; in threads or processes.

`Reader` is what Grain calls: with a number (and random numbers, in training) it reads
one clip once and cuts all windows, crops and views of it. What it keeps in memory with
`data.cache` is here too.
"""

import threading
from typing import NamedTuple

import numpy as np

from data import RecordError, randaugment, sampling, transforms


class Sound(NamedTuple):
    """What a batch holds as sound: `waveform` or, with `mels`, `spectrogram`."""

    rate: int  # samples, or rows, a second
    mels: int = 0  # columns of a row

    @property
    def key(self):
        return "spectrogram" if self.mels else "waveform"

    def of(self, clip, start=0, stop=None):
        """A clip's sound from `start` to before `stop`, int16 [s] or float32 [t f]."""
        return clip.log_mel()[start:stop] if self.mels else clip.waveform(start, stop)

    def length(self, clip):
        """How many samples, or rows, a clip has."""
        return clip.num_values // self.mels if self.mels else clip.num_samples

    def bytes(self, record):
        return 4 * record.num_values if self.mels else 2 * record.num_samples

    def silence(self, views, length):
        """Zeros: int16 [v s] or float32 [v t f 1]."""
        if self.mels:
            return np.zeros((views, length, self.mels, 1), np.float32)
        return np.zeros((views, length), np.int16)


class Kept(NamedTuple):
    """A record that was decoded whole, pictures resized or not; used like `Record`."""

    labels: tuple[int, ...]
    has_rgb: bool
    has_audio: bool
    num_frames: int
    fps: float
    pictures: np.ndarray | None  # uint8 [t h w c]
    sound: np.ndarray | None  # int16 [s], or float32 [t f]

    @property
    def height(self):
        return self.pictures.shape[1]

    @property
    def width(self):
        return self.pictures.shape[2]

    @property
    def num_samples(self):
        return len(self.sound)

    @property
    def num_values(self):
        return self.sound.size

    def frames(self, indices, box=None):
        return transforms.cut_out(self.pictures, box)[indices]

    def waveform(self, start=0, stop=None):
        return self.sound[start:stop]

    def log_mel(self):
        return self.sound


class Reader:
    """Makes rows of a batch from numbers of records, in threads or processes.

    Args:
        records: a source (data/sources.py).
        config: `config.data`.
        modalities, label: as of `pipeline.load`.
        names: of the classes; of the heads with label 'heads'.
        sound: what a row holds as sound.
    """

    def __init__(self, records, config, modalities, label, names, sound):
        self.records, self.config, self.sound = records, config, sound
        self.modalities, self.label = modalities, label
        self.names = names
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
        self.policy = randaugment.parse(config.randaugment)
        self.kept = None
        self.failures = {}

    def train_or_next(self, number, rng, clips, limit):
        """As `train`; a damaged record gives way to the next of `clips`, int64 [n].

        The row tells in `skipped`, int64 [limit], whom it stands for (−1: nobody). It
        is what the next record gives with the same random numbers, so that it does not
        depend on what other threads have met. RecordError after `limit` in a row.
        `failures` keeps what was wrong, by number, of the records met in this process.
        """
        state, skipped = rng.bit_generator.state, np.full(limit, -1)
        place = np.searchsorted(clips, number)
        for tried in range(limit + 1):
            candidate = clips[(place + tried) % len(clips)]
            rng.bit_generator.state = state
            try:
                return self.train(candidate, rng) | {"skipped": skipped}
            except RecordError as error:
                self.failures[int(candidate)] = str(error)
                if tried == limit:
                    raise
                skipped[tried] = candidate

    def train(self, number, rng):
        """A row of random windows (`samples_per_clip` of them), each its own crop.

        By VideoMAE's rules for finetuning it is one window with several crops.
        """
        config, samples = self.config, self.config.samples_per_clip
        windows_drawn = 1 if config.sampling in sampling.ONE_WINDOW else samples

        def windows(clip):
            count = range(windows_drawn)
            pairs = [sampling.train_window(self.want, clip, rng) for _ in count]
            return tuple(zip(*pairs * (samples // windows_drawn), strict=True))

        def boxes(height, width):
            return [transforms.CROPS[config.crop](rng, height, width, config.size)]

        def draw():
            return randaugment.draw(self.policy, rng)

        draw = draw if self.policy else None
        stored = self._from_stored
        return self._row(int(number), windows, boxes, stored=stored, draw=draw)

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

    def evaluate_or_nothing(self, number):
        """As `evaluate`; a damaged record is a row of padding.

        The row tells in `skipped`, int64 [1], which (−1: none); see `failures`.
        """
        try:
            return self.evaluate(number) | {"skipped": np.full(1, -1)}
        except RecordError as error:
            self.failures[int(number)] = str(error)
            return self.evaluate(-1) | {"skipped": np.full(1, number)}

    def _row(self, number, windows, boxes, crops=1, stored=False, draw=None):
        """A row of the batch: `windows` picks frames and sound, `boxes` their crops.

        stored: boxes are of the pictures as they are stored, not as resized. draw: of
        RandAugment's changes of whole pictures, if any; asked, as `boxes` is, once for
        each window.
        """
        clip = self._clip(number)
        rgb = "rgb" in self.modalities and clip.has_rgb
        audio = "spectrogram" in self.modalities and clip.has_audio
        frames, sounds = windows(
            sampling.Length(
                num_frames=clip.num_frames if rgb else 0,
                fps=clip.fps,
                num_samples=self.sound.length(clip) if audio else 0,
            )
        )
        row = self._padding(len(frames) * crops)
        row |= {"index": np.int64(number), "valid": np.True_}
        if rgb:
            row["rgb"] = self._pictures(clip, frames, boxes, stored, draw)
            row["has_rgb"] = np.True_
        if audio:
            row[self.sound.key] = self._sounds(clip, sounds, crops)
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

    def _pictures(self, clip, windows, boxes, stored, draw):
        """uint8 [v t h w c] of windows of frames [v t], crops fastest.

        A frame that several windows share is decoded once, and no more of it is kept
        than the boxes need.
        """
        shape, method = (clip.height, clip.width), self.config.resize
        resized = shape
        if not stored:
            resized = transforms.resized_shape(*shape, self.short_side)
        drawn = [(draw() if draw else None, boxes(*resized)) for _ in windows]
        part = None
        if shape == resized and not draw:
            part = transforms.enclosing([box for _, listed in drawn for box in listed])
        needed, where = np.unique(windows, return_inverse=True)
        pictures = clip.frames(needed, part)
        if shape != resized:
            pictures = self._resize(pictures)
        crops = []
        for (change, listed), window in zip(
            drawn, where.reshape(len(windows), -1), strict=True
        ):
            own, order = np.unique(window, return_inverse=True)
            frames = pictures if len(own) == len(pictures) else pictures[own]
            in_order = np.array_equal(order, np.arange(len(order)))
            frames = randaugment.apply(frames, change) if draw else frames
            for box in listed:
                if part:
                    box = (box[0] - part[0], box[1] - part[1], *box[2:])
                found = transforms.crop(frames, box, self.config.size, method)
                crops.append(found if in_order else found[order])
        return crops[0][None] if len(crops) == 1 else np.stack(crops)

    def _sounds(self, clip, starts, crops):
        """[v s] or [v t f 1]; the crops of one view hear the same."""
        length, views = self.want.num_samples, len(starts) * crops
        if self.want.align == "whole":
            sound = self.sound.of(clip, 0, length)
            windows = [sampling.beginning(sound, length)] * len(starts)
        else:
            first, last = min(starts), max(starts) + length
            if first < 0 or last > self.sound.length(clip):  # it is looped
                first, last = 0, None
            sound = self.sound.of(clip, first, last)
            windows = [sampling.cut(sound, start - first, length) for start in starts]
        windows = np.repeat(np.stack(windows), crops, axis=0)
        return windows.reshape(self.sound.silence(views, length).shape)

    def _label(self, labels):
        if self.label == "class":
            return np.int32(labels[0] if labels else 0)
        if self.label == "heads":
            labels = labels or (0,) * len(self.names)
            return {h: np.int32(x) for h, x in zip(self.names, labels, strict=True)}
        hot = np.zeros(len(self.names), np.float32)
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
        self.kept[number] = kept = Kept(
            *(record.labels, record.has_rgb, record.has_audio),
            *(record.num_frames, record.fps, pictures),
            self.sound.of(record) if audio else None,
        )
        return kept


def kept(clip) -> Kept:
    """A `data.Clip` as the reader takes it."""
    rgb = clip.frames is not None and len(clip.frames) > 0
    audio = clip.waveform is not None and len(clip.waveform) > 0
    frames, sound = (clip.frames if rgb else None), (clip.waveform if audio else None)
    return Kept((), rgb, audio, len(frames) if rgb else 0, clip.fps, frames, sound)
