"""Data sets of TensorFlow Datasets that have a video, as a source of clips.

`config.data.dir` is `tfds:NAME` (`tfds:ucf101`, `tfds:ucf101/ucf101_1_256`), looked
for where TFDS keeps its data (`$TFDS_DATA_DIR`, else `~/tensorflow_datasets`), or the
folder of a builder, such as `~/tensorflow_datasets/ucf101/ucf101_1_256/2.0.0`. It must
be built as ArrayRecord, which alone can be read from anywhere:

    tfds build ucf101 --file_format=array_record

TFDS opens the data set and says what its features are; records are parsed here, so that
only the wanted frames are decoded. Used are, among the features on the top level:

| feature                      | as                                                    |
|------------------------------|-------------------------------------------------------|
| Video, or Sequence of Image  | the picture, `config.data.fps` frames a second (TFDS  |
|                              | does not say)                                         |
| Audio                        | the sound: integers of 16 bits, or floats of full     |
|                              | scale 1; channels are averaged; the rate is the       |
|                              | feature's, else that of the spectrogram's preset      |
| ClassLabel, or a Sequence    | the label, or labels                                  |
| Text called as in `NAMES`    | the clip's id; else SPLIT/number                      |

The list of what the records hold is made by reading all of them once; it is kept in the
user's cache (`$XDG_CACHE_HOME/av_mae/tfds`, else under `~/.cache`).

A data set may come from a stranger: features that are not TFDS's own, whose code TFDS
would import, are refused, and so are community data sets (`tfds:NAMESPACE:NAME`).
"""

import contextlib
import hashlib
import io
import json
import logging
import os
import re
import threading
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from google.protobuf import message
from PIL import Image

from data import RecordError, storage
from data.records import Example
from data.transforms import cut_out

FORMAT = 1  # of the kept lists
FORMATS = ("JPEG", "PNG")  # of stored pictures
NAMES = ("id", "video_id", "key", "filename", "file_name", "video_name")

log = logging.getLogger(__name__)


class Layout(NamedTuple):
    """Which features of a data set are what; '' where there is none."""

    picture: str = ""
    sound: str = ""
    channels: int = 1
    sample_rate: int = 0  # 0: not said
    label: str = ""
    names: tuple[str, ...] = ()
    id: str = ""


class Entry(NamedTuple):
    """What the list says of a record."""

    id: str
    labels: tuple[int, ...]
    num_frames: int
    num_samples: int


class Record:
    """One record of a TFDS data set; like `data.records.Record`."""

    def __init__(self, payload, where, entry, layout, fps, sample_rate):
        self._payload, self._where = payload, where
        self._layout, self.sample_rate = layout, sample_rate
        self.id, self.labels, self.num_frames, self.num_samples = entry
        self.has_rgb, self.has_audio = self.num_frames > 0, self.num_samples > 0
        self.fps = fps if self.has_rgb else 0.0

    height = property(lambda self: self._shape[0])
    width = property(lambda self: self._shape[1])

    @cached_property
    def _shape(self) -> tuple[int, int]:
        if not self.has_rgb:
            return 0, 0
        encoded = self._features[self._layout.picture].bytes_list.value[0]
        try:
            with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
                return image.size[::-1]
        except (OSError, SyntaxError, ValueError) as error:
            raise _damaged(self._where, f"its picture: {error}") from None

    @cached_property
    def _features(self):
        return _parse(self._payload, self._where)

    def frames(self, indices: Sequence[int], box=None) -> np.ndarray:
        """The wanted frames, uint8 [len(indices) h w 3]; RecordError if damaged.

        box: (top, left, height, width) that is cut out of each; None: all of it.
        """
        encoded = self._features[self._layout.picture].bytes_list.value
        try:
            decoded = {i: _decode(encoded[i]) for i in {int(i) for i in indices}}
            return np.stack([cut_out(decoded[int(i)], box) for i in indices])
        except (OSError, SyntaxError, ValueError) as error:
            raise _damaged(self._where, f"its picture: {error}") from None

    def waveform(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """The sound from sample `start` to before `stop` (its end), int16 [s].

        Empty without sound; RecordError if it is damaged.
        """
        if not self.has_audio:
            return np.zeros(0, np.int16)
        feature = self._features[self._layout.sound]
        floats = feature.WhichOneof("kind") == "float_list"
        values = (feature.float_list if floats else feature.int64_list).value
        sound = np.asarray(values, np.float64).reshape(-1, self._layout.channels)
        sound = sound[start:stop].mean(axis=1) * (32768 if floats else 1)
        if not np.isfinite(sound).all():
            raise _damaged(self._where, "its sound: a sample is no finite number")
        return np.clip(np.rint(sound), -32768, 32767).astype(np.int16)


def _decode(encoded: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
        return np.asarray(image.convert("RGB"))


def _parse(payload: bytes, where: str):
    try:
        return Example.FromString(payload).features.feature
    except message.DecodeError as error:
        raise _damaged(where, f"no tf.train.Example: {error}") from None


def _damaged(where: str, why: str) -> RecordError:
    return RecordError(f"{where}: cannot be used ({why}); build the data set again.")


class Records:
    """The records of one split, by number; see data/sources.py.

    Args:
        where: `data.dir`: `tfds:NAME`, or the folder of a builder.
        split: such as "train".
        fps: frames a second.
        sample_rate: hertz of the sound, where the data set does not say.

    Raises:
        RecordError: there is no such data set or split, it is not ArrayRecord, it has
            neither picture nor sound, or a record is damaged.
    """

    damaged = ()

    def __init__(
        self,
        where: str | os.PathLike,
        split: str,
        fps: float = 25.0,
        sample_rate: int = 16000,
    ):
        self._where, self.split = str(where), split
        builder = _builder(self._where)
        if split not in builder.info.splits:
            raise RecordError(
                f"{where}: has no split {split!r}, only "
                f"{', '.join(builder.info.splits)}; correct the name of the split."
            )
        self.folder = Path(builder.data_dir)
        self._layout = _layout(builder.info.features, self._where)
        self._fps, self._rate = fps, self._layout.sample_rate or sample_rate
        self._open()
        self._source = _open(builder, split)
        files = [Path(x) for x in builder.info.splits[split].filepaths]
        self._entries = self._list(files)
        self.index = [self._describe(entry) for entry in self._entries]
        self.info = dict(
            name=builder.info.name,
            labels=list(self._layout.names),
            settings=dict(fps=fps, sample_rate=self._rate),
            statistics={},
            checksums={path.name: _digest(path) for path in files},
        )

    def _open(self) -> None:
        self._source, self._lock = None, threading.Lock()

    def __getstate__(self) -> dict:
        return {k: v for k, v in vars(self).items() if k not in ("_source", "_lock")}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._open()

    def __repr__(self) -> str:
        return f"Records({self._where!r}, {self.split!r})"

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, number: int) -> bytes:
        """The payload of record `number`; RecordError where it is damaged."""
        with self._lock:
            if self._source is None:
                self._source = _open(_builder(self._where), self.split)
        try:
            return self._source[number]
        except (RuntimeError, ValueError, IndexError) as error:
            why = " ".join(str(error).split())
            raise _damaged(
                f"{self.folder}: record {number} of {self.split}", why
            ) from None

    def record(self, number: int) -> Record:
        """Record `number`, whose errors name the data set, the split and the number."""
        where = f"{self.folder}: record {number} of {self.split}"
        facts = self._entries[number], self._layout, self._fps, self._rate
        return Record(self[number], where, *facts)

    def _describe(self, entry: Entry) -> dict:
        return dict(
            id=entry.id,
            labels=entry.labels,
            has_rgb=entry.num_frames > 0,
            has_audio=entry.num_samples > 0,
            num_frames=entry.num_frames,
        )

    def _list(self, files: list[Path]) -> list[Entry]:
        """What each record holds, from the cache or by reading all."""
        stats = [path.stat() for path in files]
        states = [f"{x.st_size} {x.st_mtime_ns}" for x in stats]
        key = json.dumps([FORMAT, *map(str, files), *states]).encode()
        kept = _cache() / f"{hashlib.sha256(key).hexdigest()[:32]}.json"
        try:
            values = json.loads(kept.read_text())
            return [Entry(x[0], tuple(x[1]), *x[2:]) for x in values]
        except (OSError, ValueError, TypeError):
            count = len(self._source)
        log.info("%s: %d records are read once to list them.", self._where, count)
        entries = [self._entry(number) for number in range(count)]
        temporary = kept.with_suffix(f".{os.getpid()}.tmp")
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(entries))
            temporary.replace(kept)
        except OSError as error:
            log.warning("The list of records is not kept: %s", error)
        return entries

    def _entry(self, number: int) -> Entry:
        where, layout = f"{self.folder}: record {number} of {self.split}", self._layout
        features = _parse(self[number], where)
        text = features[layout.id].bytes_list.value if layout.id else ()
        sound = features[layout.sound] if layout.sound else None
        samples = 0
        if sound is not None:
            values = len(sound.int64_list.value) + len(sound.float_list.value)
            samples = values // layout.channels
        labels = features[layout.label].int64_list.value if layout.label else ()
        return Entry(
            id=text[0].decode() if text else f"{self.split}/{number}",
            labels=tuple(int(x) for x in labels if x >= 0),  # −1: not known
            num_frames=len(features[layout.picture].bytes_list.value)
            if layout.picture
            else 0,
            num_samples=samples,
        )


@contextlib.contextmanager
def _own_features():
    """Inside, TFDS builds features of its own alone.

    The features.json of a data set may name any class, and TFDS imports its module: a
    folder that somebody made could run what it likes.
    """
    from tensorflow_datasets.core.features.feature import FeatureConnector

    import_class = FeatureConnector.cls_from_name

    def own(name: str):
        if not name.startswith("tensorflow_datasets."):
            raise ValueError(f"its features.json names {name!r}, no feature of TFDS")
        return import_class(name)

    FeatureConnector.cls_from_name = staticmethod(own)
    try:
        yield
    finally:
        FeatureConnector.cls_from_name = import_class


def _builder(where: str):
    """TFDS's builder of a name or a folder; RecordError where there is none."""
    import tensorflow_datasets as tfds

    if re.match(r"tfds:[\w.-]+:[A-Za-z]", where):
        raise RecordError(
            f"{where} is a community data set, whose code TFDS would download and run: "
            "build it, and give its folder as data.dir."
        )
    try:
        with _own_features():
            if where.startswith("tfds:"):
                builder = tfds.builder(where.removeprefix("tfds:"))
            else:
                builder = tfds.builder_from_directory(where)
    except Exception as error:  # of many kinds: not found, metadata damaged, imports
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RecordError(
            f"{where}: TFDS cannot open it ({why}); correct data.dir, or build it with "
            "`tfds build NAME --file_format=array_record`."
        ) from None
    kind = builder.info.file_format
    if not builder.info.splits or kind is None or kind.value != "array_record":
        state = f"is built as {kind.value}" if builder.info.splits else "is not built"
        raise RecordError(
            f"{where}: {state} in {builder.data_dir}; build it with `tfds build "
            f"{builder.info.name} --file_format=array_record`."
        )
    return builder


def _open(builder, split: str):
    from tensorflow_datasets.core.decode import DeserializeMethod

    raw = DeserializeMethod.RAW_BYTES
    return builder.as_data_source(split, deserialize_method=raw)


def _layout(features, where: str) -> Layout:
    """Which of the features are picture, sound, label and id."""
    import tensorflow_datasets as tfds

    kinds, found = tfds.features, {}
    inner = lambda feature: getattr(feature, "feature", None)
    for name, feature in features.items():
        if isinstance(feature, kinds.Video) or isinstance(inner(feature), kinds.Image):
            found.setdefault("picture", name)
        elif isinstance(feature, kinds.Audio):
            found.setdefault("sound", name)
        elif isinstance(feature, kinds.ClassLabel):
            found.setdefault("label", name)
        elif isinstance(inner(feature), kinds.ClassLabel):
            found.setdefault("label", name)
        elif name in NAMES and feature.np_dtype == np.object_:
            found.setdefault("id", name)
    if not {"picture", "sound"} & found.keys():
        raise RecordError(
            f"{where}: has neither a Video nor an Audio among its features "
            f"({', '.join(features)}); choose a data set that has."
        )
    more = {}
    if "label" in found:
        feature = features[found["label"]]
        more["names"] = tuple((inner(feature) or feature).names)
    if "sound" in found:
        feature = features[found["sound"]]
        more["sample_rate"] = int(getattr(feature, "sample_rate", None) or 0)
        more["channels"] = feature.shape[1] if len(feature.shape) > 1 else 1
    return Layout(**found, **more)


def _digest(path: Path) -> dict:
    """Stands for a file's content: a hash of its name, its beginning and its end.

    Not of its time, so that a data set may be copied while a run goes on from it.
    """
    text = f"{path.name} {storage.sketch(path)}".encode()
    size = path.stat().st_size
    return dict(sha256=hashlib.sha256(text).hexdigest(), size=size)


def _cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "av_mae" / "tfds"
