"""A folder or CSV of media files as a source of clips, without preparation.

For small sets, and for evaluation on new files: what a sample needs is decoded from the
file itself each time, which takes several times as long as from a prepared record. The
samples are the same: the same clips in the same order, the same frames (at
`config.data.fps` and the short side that `config.data.prepared` names, else that of
`python -m data.prepare`), the same sound.

Which clips there are, their labels and their splits is as in data/manifest.py; clips
whose split the source does not name are divided as `data.prepare` does by default. The
split `all` is every clip.

How many frames and how much sound a file really has is known only when it has been
decoded once. That list is made when the data set is first opened, and kept in the
user's cache (`$XDG_CACHE_HOME/av_mae/folder`, else under `~/.cache`) for files of the
same path, size and time. Files that cannot be decoded are told and left out.
"""

import concurrent.futures
import contextlib
import functools
import hashlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np

from data import Clip, MediaError, RecordError, manifest, media, prepare, storage
from data.transforms import cut_out

FORMAT = 3  # of the kept lists
SPLIT = {"train": 0.9, "validation": 0.1}  # as of data.prepare
SHORT_SIDE = 256  # pixels, likewise
ALL = "all"  # the split of every clip
FAILURES = (MediaError, av.FFmpegError, OSError, ValueError)  # of reading a file

log = logging.getLogger(__name__)


class Entry(NamedTuple):
    """What decoding a clip once has shown; `failed` is the reason where it cannot be.

    Rates, sizes and counts are of what the record gives, not of the file.
    """

    failed: str
    num_frames: int = 0
    fps: float = 0.0
    height: int = 0
    width: int = 0
    num_samples: int = 0
    problems: tuple[str, ...] = ()
    facts: dict = {}
    digest: str = ""  # of the file's beginning and end


class Rates(NamedTuple):
    """How files are read: frames a second and short side, None for the file's own."""

    fps: float | None
    sample_rate: int
    short_side: int | None


def _measure(row: manifest.Row, rates: Rates) -> Entry:
    try:
        clip = _read(row, rates)
        count, shape = 0, (0, 0)
        for frame in () if clip.frames is None else clip.frames:
            count, shape = count + 1, frame.shape[:2]
    except MediaError as error:
        return Entry(str(error))
    except FAILURES as error:
        return Entry(f"{row.path}: cannot be decoded ({error}); replace or remove it.")
    samples = 0 if clip.waveform is None else len(clip.waveform)
    problems = tuple(clip.problems)
    found = count, clip.fps, *shape, samples, problems, clip.source
    return Entry("", *found, storage.sketch(row.path))


def _read(row: manifest.Row, rates: Rates) -> Clip:
    wanted = dict(fps=rates.fps, short_side=rates.short_side)
    wanted |= dict(sample_rate=rates.sample_rate, start=row.start, end=row.end)
    return media.read(row.path, stream=True, **wanted)


class Record:
    """One clip of a file; like `data.records.Record`."""

    def __init__(
        self,
        row: manifest.Row,
        labels: tuple[int, ...],
        entry: Entry,
        rates: Rates,
    ):
        self.id, self.labels, self.sample_rate = row.id, labels, rates.sample_rate
        self.num_frames, self.fps, self.height, self.width = entry[1:5]
        self.num_samples, self.facts = entry.num_samples, entry.facts
        self.has_rgb, self.has_audio = entry.num_frames > 0, entry.num_samples > 0
        self._row, self._entry, self._rates = row, entry, rates

    @property
    def _info(self) -> media.MediaInfo:
        fields = media.MediaInfo.__dataclass_fields__
        facts = {k: v for k, v in self._entry.facts.items() if k in fields}
        return media.MediaInfo(**facts)

    def frames(self, indices: Sequence[int], box=None) -> np.ndarray:
        """The wanted frames, uint8 [len(indices) h w 3]; any order, repeats allowed.

        box: (top, left, height, width) that is cut out of each; None: all of it.
        IndexError outside of the clip, RecordError where the file cannot be read.
        """
        indices = np.asarray(indices, np.int64).reshape(-1)
        if indices.size and not 0 <= indices.min() <= indices.max() < self.num_frames:
            raise IndexError(f"frames of {self.id}, which has {self.num_frames}")
        height, width = box[2:] if box else (self.height, self.width)
        out = np.empty((len(indices), height, width, 3), np.uint8)
        missing = set(indices.tolist())
        with self._reading():
            for number, pixels in media.frames_at(
                self._row.path,
                self._info,
                sorted(missing),
                self.fps,
                self._rates.short_side,
                self._row.start,
                sought=not self._entry.problems,  # else timestamps may not be true
                own_rate=self._rates.fps is None,
            ):
                out[indices == number] = cut_out(pixels, box)
                missing.remove(number)
        if missing:
            raise self._changed(f"frame {min(missing)} is missing")
        return out

    def waveform(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """The sound from sample `start` to before `stop` (its end), int16 [s].

        Empty without sound. All of it is decoded.
        """
        if not self.has_audio:
            return np.zeros(0, np.int16)
        cut = self._row.start, self._row.end
        with self._reading():
            sound = media.read_audio(
                self._row.path, self.sample_rate, *cut, info=self._info
            )
        if sound is None or len(sound) != self.num_samples:
            raise self._changed("its sound has another length")
        return sound[start:stop]

    @contextlib.contextmanager
    def _reading(self):
        try:
            yield
        except FAILURES as error:
            raise self._changed(error) from None

    def _changed(self, why) -> RecordError:
        return RecordError(
            f"{self._row.path}: cannot be read as it was before ({why}); restore the "
            "file, or start again."
        )


class Records:
    """The clips of one split of a folder or CSV, by number; see data/sources.py.

    Args:
        where: the folder or CSV.
        split: such as "train"; "all" for every clip.
        fps: frames a second; None: each file's own mean rate.
        sample_rate: hertz of the sound.
        short_side: pixels that pictures are shrunk to; None: they stay as they are.

    Raises:
        ManifestError: `where` is no usable list of clips.
        RecordError: no clip is in this split, or none can be decoded.
    """

    damaged = ()

    def __init__(
        self,
        where: str | os.PathLike,
        split: str,
        fps: float | None = 25.0,
        sample_rate: int = 16000,
        short_side: int | None = SHORT_SIDE,
    ):
        self.folder, self.split = Path(where), split
        self._rates = Rates(fps, sample_rate, short_side)
        rows = manifest.rows(where)
        names = prepare.label_names(rows)
        numbers = prepare.label_places(names)
        wanted = prepare.shuffled(
            row
            for row in rows
            if split in (ALL, row.split or prepare.choose_split(row.id, SPLIT))
        )
        if not wanted:
            raise RecordError(
                f"{where}: has no clip of the split {split!r}; name splits in a CSV or "
                'by folders called train and test, or set the split to "all".'
            )
        entries = _entries(self.folder, wanted, self._rates)
        self._clips = [
            (row, numbers(row), entry)
            for row, entry in zip(wanted, entries, strict=True)
            if not entry.failed
        ]
        self._tell_failed([entry.failed for entry in entries if entry.failed])
        self.index = [self._describe(*clip) for clip in self._clips]
        self.info = dict(
            name=self.folder.stem,
            labels=names,
            settings=dict(
                fps=fps or "source",
                short_side=short_side or "source",
                sample_rate=sample_rate,
            ),
            splits={split: dict(listed=len(wanted), clips=len(self._clips))},
            statistics={},
            checksums={row.id: _digest(row, entry) for row, _, entry in self._clips},
        )

    def _tell_failed(self, reasons):
        if reasons and not self._clips:
            raise RecordError(
                f"{self.folder}: no clip of {self.split} can be decoded; {reasons[0]}"
            )
        for reason in reasons:
            log.warning("left out: %s", reason)

    def _describe(self, row, labels, entry) -> dict:
        return dict(
            id=row.id,
            labels=labels,
            has_rgb=entry.num_frames > 0,
            has_audio=entry.num_samples > 0,
            num_frames=entry.num_frames,
        )

    def __repr__(self) -> str:
        return f"Records({str(self.folder)!r}, {self.split!r})"

    def __len__(self) -> int:
        return len(self._clips)

    def record(self, number: int) -> Record:
        return Record(*self._clips[number], self._rates)


# --------------------------------------------------------------- what files have, kept


def _entries(folder: Path, rows, rates: Rates) -> list[Entry]:
    """What each clip has, from the cache or by decoding it; in the rows' order."""
    key = f"{FORMAT} {folder.resolve()} {rates}"
    path = _cache() / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
    try:
        kept = json.loads(path.read_text())
    except (OSError, ValueError):
        kept = {}
    keys = [_state(row) for row in rows]
    new = [(k, row) for k, row in zip(keys, rows, strict=True) if k not in kept]
    if new:
        log.info(
            "%s: %d files are decoded once to see what they have.", folder, len(new)
        )
        measure = functools.partial(_measure, rates=rates)
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
            found = threads.map(measure, (row for _, row in new))
            try:
                for (k, _), entry in zip(new, found, strict=True):
                    kept[k] = entry
            finally:
                _keep(path, kept)
    return [_entry(kept[k]) for k in keys]


def _entry(values) -> Entry:
    entry = Entry(*values)
    return entry._replace(problems=tuple(entry.problems))


def _state(row: manifest.Row) -> str:
    """The clip and the state of its file, as text."""
    with contextlib.suppress(OSError):
        state = row.path.stat()
        return f"{row.id} {state.st_size} {state.st_mtime_ns}"
    return f"{row.id} is not there"


def _keep(path: Path, entries: dict) -> None:
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(entries))
        temporary.replace(path)
    except OSError as error:
        log.warning("What the files have is not kept: %s", error)


def _cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "av_mae" / "folder"


def _digest(row: manifest.Row, entry: Entry) -> dict:
    """Stands for a clip's content: a hash of what it has and its file's `sketch`.

    Not of its time, so that a folder may be copied while a run goes on from it.
    """
    text = f"{row.id} {entry.digest} {entry[1:6]}".encode()
    return dict(sha256=hashlib.sha256(text).hexdigest(), size=len(text))
