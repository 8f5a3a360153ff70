"""Clips for a model that is there: files read, long ones cut into windows.

    clip = av_mae.read_clip("concert.mp4")
    clip.frames, clip.sound, clip.times, clip.has_rgb, clip.has_audio

What is read here is what `python -m data.prepare` would put into a record, but for the
record's H.264; `Rows` makes of it what the data pipeline gives in evaluation, by the
pipeline's own code.
"""

import collections
import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int16, UInt8

from av_mae import MODALITIES, ConfigError, inputs
from data import ManifestError, MediaError, manifest, media, pipeline

MOST_BYTES = 4 << 30  # of pictures in memory at once; longer files want windows


@dataclasses.dataclass(frozen=True)
class Clip:
    """A clip in memory; time 0 is its first picture.

    frames: uint8 [t h w 3] at `fps` frames a second, or None; sound: int16 [s], mono at
    `sample_rate` Hz, or None; path: the file it is from, "" for arrays; start: where in
    the file it begins, in seconds; problems: what was lost in reading.
    """

    frames: UInt8[np.ndarray, "t h w 3"] | None
    fps: float
    sound: Int16[np.ndarray, " s"] | None
    sample_rate: int = 16000
    path: str = ""
    start: float = 0.0
    problems: tuple[str, ...] = ()

    @property
    def has_rgb(self) -> bool:
        """Whether there is a picture."""
        return self.frames is not None and len(self.frames) > 0

    @property
    def has_audio(self) -> bool:
        """Whether there is sound."""
        return self.sound is not None and len(self.sound) > 0

    @property
    def waveform(self) -> np.ndarray | None:
        """The sound, by the name that the data package has for it."""
        return self.sound

    @property
    def seconds(self) -> float:
        """Its length: that of the picture, or of the sound where there is none."""
        if self.has_rgb:
            return len(self.frames) / self.fps
        return len(self.sound) / self.sample_rate if self.has_audio else 0.0

    @property
    def times(self) -> Float[np.ndarray, " t"]:
        """When each frame is shown, in seconds of the file; empty without picture."""
        count = len(self.frames) if self.has_rgb else 0
        return self.start + np.arange(count) / (self.fps or 1.0)

    def at(self, fps: float) -> "Clip":
        """Its frames nearest in time at another rate, some twice or left out."""
        count = max(1, round(len(self.frames) * fps / self.fps))
        nearest = np.floor(np.arange(count) * (self.fps / fps) + 0.5).astype(int)
        frames = self.frames[np.minimum(nearest, len(self.frames) - 1)]
        return dataclasses.replace(self, frames=frames, fps=fps)

    def cut(self, start: float, end: float) -> "Clip":
        """The part from `start` to `end` seconds of this clip, on whole frames."""
        if not 0 <= start <= end:
            raise ConfigError(
                f"The part from {start} to {end} s is none of a clip: give seconds "
                "with 0 <= start <= end."
            )
        frames = sound = None
        if self.has_rgb:
            first, last = round(start * self.fps), round(end * self.fps)
            frames, start = self.frames[first:last], first / self.fps
            end = last / self.fps
        if self.has_audio:
            first, last = (round(x * self.sample_rate) for x in (start, end))
            sound = self.sound[first:last]
        begin = self.start + start
        return dataclasses.replace(self, frames=frames, sound=sound, start=begin)


def read_clip(
    path: Path | str,
    start: float | None = None,
    end: float | None = None,
    *,
    fps: float = 25.0,
    short_side: int = 256,
    sample_rate: int = 16000,
) -> Clip:
    """A media file, or the part of it from `start` to `end` seconds, as a Clip.

    fps, short_side (pixels; never enlarged) and sample_rate (Hz) are what
    `data.prepare` takes by default; `Model.read` takes what the model wants. Of a clip
    at another rate a model sees the frames nearest in time. Raises
    MediaError where nothing can be decoded, or where the picture does not fit into
    memory: then give `start` and `end`, or let the model read the path in windows.
    """
    wanted = dict(fps=fps, short_side=short_side, sample_rate=sample_rate)
    found = media.read(path, start=start, end=end, stream=True, **wanted)
    frames, size = [], 0
    for frame in () if found.frames is None else found.frames:
        size += frame.nbytes
        if size > MOST_BYTES:
            raise MediaError(
                f"{path}: its picture takes over {MOST_BYTES >> 30} GiB of memory; "
                "give start and end, or read it in windows (every=SECONDS)."
            )
        frames.append(frame)
    return Clip(
        frames=np.stack(frames) if frames else None,
        fps=found.fps or fps,
        sound=found.waveform,
        sample_rate=sample_rate,
        path=str(path),
        start=start or 0.0,
        problems=tuple(found.problems),
    )


def listed(sources: Iterable[Path | str]) -> list[manifest.Row]:
    """The clips of files, folders and CSVs, with their ids and labels.

    A folder is walked as `data.prepare` does; the id of a file is the path as given.
    Raises ManifestError where a folder or CSV is no usable list of clips, or where two
    clips have one id.
    """
    rows = []
    for source in map(Path, sources):
        if source.is_dir() or source.suffix.lower() == ".csv":
            rows += manifest.read(source).rows
        else:
            rows.append(manifest.Row(source, source.as_posix()))
    count = collections.Counter(row.id for row in rows)
    twice = [name for name, times in count.items() if times > 1]
    if twice:
        raise ManifestError(
            f"{twice[0]} comes twice: give folders whose clips have different names."
        )
    return rows


# Windows.


def windows(
    source: Clip | Path | str, seconds: float, every: float, **reading
) -> Iterator[Clip]:
    """Parts of `seconds`, one each `every` seconds, the last one at the end.

    All of a clip that is shorter. A path is decoded as it goes, and no more of its
    picture is in memory than one window; `reading` as of `read_clip`. The picture says
    where the end is: sound that goes on beyond it is in no window.
    """
    if every <= 0:
        raise ConfigError(f"every is {every}: give the seconds between two windows.")
    if not isinstance(source, Clip):
        found = media.read(source, stream=True, **reading)
        rate = reading.get("sample_rate", 16000)
        frames = found.frames
        source = Clip(None, found.fps, found.waveform, rate, str(source))
    else:
        frames = iter(source.frames) if source.has_rgb else None
    if frames is None:
        yield from _of_sound(source, seconds, every)
    else:
        yield from _of_frames(source, frames, seconds, every)


def _of_sound(clip: Clip, seconds: float, every: float) -> Iterator[Clip]:
    last = max(0.0, clip.seconds - seconds)
    starts = [i * every for i in range(math.ceil(last / every))]
    for start in [*starts, last]:
        yield clip.cut(start, start + seconds)


def _of_frames(clip: Clip, frames: Iterable, seconds, every) -> Iterator[Clip]:
    """Frames pass by; `held` are those from number `first` on."""
    length = max(1, round(seconds * clip.fps))
    held, first, number, done = [], 0, 0, -1
    begin = lambda i: round(i * every * clip.fps)
    for frame in frames:
        held.append(frame)
        if len(held) > length:
            held.pop(0)
            first += 1
        while begin(number) < first:
            number += 1
        if len(held) == length and begin(number) == first:
            yield _window(clip, held, first, seconds)
            done = first
    if held and first != done:
        yield _window(clip, held, first, seconds)


def _window(clip: Clip, held: Sequence[np.ndarray], first: int, seconds) -> Clip:
    start, sound = first / clip.fps, None
    if clip.has_audio:
        at = round(start * clip.sample_rate)
        length = min(seconds, len(held) / clip.fps)
        sound = clip.sound[at : at + round(length * clip.sample_rate)]
    begin = clip.start + start
    return dataclasses.replace(clip, frames=np.stack(held), sound=sound, start=begin)


# What a model sees of a clip.


@dataclasses.dataclass(frozen=True)
class View:
    """Where one view of a clip lies, in seconds of the clip.

    frames: when each frame is shown [t] (empty without picture); sound: when the sound
    begins; it may be before 0, and sound is looped where there is none.
    """

    frames: Float[np.ndarray, " t"]
    sound: float


class Rows:
    """Clips as rows of a host batch, exactly as the data pipeline evaluates records.

    config: a model's; views: how many windows of a clip, None for `data.views`, with
    `data.crops` crops each; 1 for one window with one central crop. A clip at another
    rate than `data.fps` is seen at that rate, unless the model was trained on data at
    any rate (`data.prepared.fps` is "source").
    """

    def __init__(self, config, sample_rate: int, views: int | None = None):
        self.modalities = tuple(config.modalities)
        self.sample_rate = sample_rate
        at_source = config.data.prepared.fps == "source"
        self._fps = None if at_source else config.data.fps
        settings = config.data.copy_and_resolve_references()
        if views:
            settings.views, settings.crops = views, 1
        self._evaluation = pipeline.Evaluation(settings, self.modalities, sample_rate)

    def wanted(self, modalities: Sequence[str] | None = None) -> tuple[str, ...]:
        """Those that the user wants, None for all that the model knows.

        Raises ConfigError for a modality that the model does not know.
        """
        wanted = self.modalities if modalities is None else tuple(modalities)
        if unknown := set(wanted) - set(self.modalities):
            raise ConfigError(
                f"modalities has {', '.join(sorted(unknown))}, but the model knows "
                f"{', '.join(self.modalities)}: choose among those."
            )
        return wanted

    def used(self, clip: Clip, modalities: Sequence[str] | None = None):
        """Those modalities that the model knows, the clip has and the user wants.

        Raises ConfigError where none is left.
        """
        wanted = self.wanted(modalities)
        has = {"rgb": clip.has_rgb, "spectrogram": clip.has_audio}
        used = tuple(m for m in MODALITIES if m in wanted and has[m])
        if not used:
            kinds = {"rgb": "picture", "spectrogram": "sound"}
            what = " or ".join(kinds[m] for m in MODALITIES if m in wanted)
            raise ConfigError(
                f"{clip.path or 'the clip'} has no {what}, which is all the model may "
                "use of it: choose other modalities, or another clip."
            )
        return used

    def of(self, clip: Clip, modalities: Sequence[str] | None = None) -> dict:
        """The clip as a row: rgb uint8 [v t h w c], waveform int16 [v s], has_…"""
        used, clip = self.used(clip, modalities), self._as_seen(clip)
        row = self._evaluation.row(clip)
        drop = {"index", "valid"}
        row = {key: value for key, value in row.items() if key not in drop}
        for m, key in (("rgb", "has_rgb"), ("spectrogram", "has_audio")):
            if key in row:
                row[key] = np.bool_(m in used)
        return row

    def views(self, clip: Clip) -> list[View]:
        """Where its views lie."""
        clip = self._as_seen(clip)
        frames, sounds = self._evaluation.windows(clip)
        return [
            View(f / clip.fps if clip.has_rgb else f[:0] / 1.0, s / self.sample_rate)
            for f, s in zip(frames, sounds, strict=True)
        ]

    def _as_seen(self, clip: Clip) -> Clip:
        """At the model's frame rate; ConfigError for sound at another than its own."""
        if clip.has_audio and clip.sample_rate != self.sample_rate:
            raise ConfigError(
                f"{clip.path or 'the clip'} has sound of {clip.sample_rate} Hz, the "
                f"model hears {self.sample_rate}: read it by model.read."
            )
        if clip.has_rgb and self._fps and abs(clip.fps - self._fps) > 0.01:
            return clip.at(self._fps)
        return clip


def window_seconds(config) -> float:
    """How long a window has to be to hold all that a model sees at once."""
    data = config.data
    lengths = {
        "rgb": data.num_frames * data.stride / data.fps,
        "spectrogram": data.audio_seconds,
    }
    known = inputs.layouts(config)
    return max(lengths[m] for m in known)
