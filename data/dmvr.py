"""DMVR/MediaSequence TFRecords, on which Scenic trains, as a source of clips.

Each record is one clip, a `tf.train.SequenceExample`; TensorFlow is not needed:

| feature                      | kind          | meaning                              |
|------------------------------|---------------|--------------------------------------|
| clip/label/index, …/text     | int64s, bytes | classes of the clip, and their names |
| clip/data_path, …            | bytes         | the clip's name: see `NAMES`         |
| image/frame_rate             | float         | frames a second (Scenic has none)    |
| WAVEFORM/feature/sample_rate | float         | hertz (Scenic has none)              |
| image/encoded                | list of bytes | a JPEG or PNG a frame                |
| WAVEFORM/feature/floats      | list of float | mono sound, full scale 1             |
| melspec/feature/floats       | list of float | log-mel rows; Scenic: an entry is a  |
|                              |               | second, 100 rows of 128              |

The last three are feature lists, the others are the context; all may be missing.

`data.dir` is a folder, whose shards begin with the split's name (`train…`) or lie in a
folder of that name; or a pattern in which `{split}` stands for it, `*` and `?` for
anything, and a last `@16` for shards 00000-of-00016 to 00015-of-00016. A pattern
without `{split}` is the same clips for every split. The classes are those that the
records of all splits name, or the lines of `labels.txt` beside the shards.
`python -m data.prepare --format dmvr` writes such shards (in `DIR/NAME/1.0.0`) beside
the dataset.json of a prepared data set, whose classes and statistics then count.

A TFRecord file can be read from anywhere only with a list of where its records begin.
That list is made once, by reading everything (checksums too, about 100 MB a second),
and kept in the user's cache (`$XDG_CACHE_HOME/av_mae/dmvr`, else under `~/.cache`), not
beside the shards: those are often read-only or shared, and match patterns. It holds for
a file of this path, size and time; hosts that share a cache share it.
"""

import contextlib
import glob
import hashlib
import io
import json
import logging
import os
import re
import struct
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from google.protobuf import message
from PIL import Image

from data import Clip, RecordError, storage
from data.records import SequenceExample, encode_jpeg, read_info
from data.transforms import cut_out

FORMAT = 2  # of the kept lists
LABELS, TEXTS = "clip/label/index", "clip/label/text"
NAMES = ("clip/data_path", "video/filename", "clip/media_id", "example/video_id")
FACTS = "clip/facts"  # JSON, ours
TIMES = ("clip/start/timestamp", "clip/end/timestamp")  # int64, microseconds
FRAME_RATE, SAMPLE_RATE = "image/frame_rate", "WAVEFORM/feature/sample_rate"
PICTURE, SOUND, LOG_MEL = (
    "image/encoded",
    "WAVEFORM/feature/floats",
    "melspec/feature/floats",
)
SHARD = re.compile(r"\.tfrecords?\b|-\d{5}-of-\d{5}$")
HEADER, FOOTER = 12, 4  # bytes about a record: length and its checksum; checksum
LOUD = 1e4  # no sound of full scale 1 gets there
CLASSES = 1 << 20  # more than any data set has
FORMATS = ("JPEG", "PNG")  # of stored pictures
BAD_PICTURE = (OSError, SyntaxError, struct.error, Image.DecompressionBombError)
LANE = 256  # values of 8 bytes that the checksum takes one after the other

log = logging.getLogger(__name__)


# --------------------------------------------------------------------- TFRecord framing


def _crc_tables() -> tuple[list[np.ndarray], list[list[int]]]:
    """Castagnoli's CRC (RFC 3720) as tables over 16 bits; it is linear.

    The first four give what the two bytes at place 0, 2, 4, 6 of eight leave behind;
    the last two what the low and high half of a state become over one lane of zeros.
    """
    byte = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        byte = np.where(byte & 1, (byte >> 1) ^ np.uint32(0x82F63B78), byte >> 1)
    step = lambda x: byte[x & 255] ^ (x >> 8)
    words = [step(step(np.arange(1 << 16, dtype=np.uint32)))]
    for _ in range(3):
        words.append(step(step(words[-1])))
    bits = np.uint32(1) << np.arange(32, dtype=np.uint32)
    for _ in range(8 * LANE):
        bits = step(bits)
    halves = []
    for half in (bits[:16], bits[16:]):
        table = np.zeros(1, np.uint32)
        for bit in half:
            table = np.concatenate([table, table ^ bit])
        halves.append(table.tolist())
    return words[::-1], halves


_WORDS, (_LOW, _HIGH) = _crc_tables()


def crc32c(data: bytes) -> int:
    """The CRC-32C of some bytes (8 or more, as here everywhere).

    Many lanes side by side, in numpy: about 2 ms a megabyte.
    """
    padding = -len(data) % (8 * LANE)  # zeros before the data leave the state at 0
    padded = np.zeros(padding + len(data), np.uint8)
    padded[padding:] = np.frombuffer(data, np.uint8)
    padded[padding : padding + 4] ^= 255  # the same as a first state of ones
    lanes = np.ascontiguousarray(padded.view("<u8").reshape(-1, LANE).T)
    states = np.zeros(lanes.shape[1], np.uint32)
    for values in lanes:
        two = (values ^ states).view("<u2").reshape(-1, 4).T
        parts = [table[part] for table, part in zip(_WORDS, two, strict=True)]
        states = parts[0] ^ parts[1] ^ parts[2] ^ parts[3]
    crc = 0
    for state in states.tolist():
        crc = _LOW[crc & 0xFFFF] ^ _HIGH[crc >> 16] ^ state
    return crc ^ 0xFFFFFFFF


def masked_crc(data: bytes) -> int:
    """The checksum as TFRecord files have it: rotated by 15 bits, plus a constant."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _read(file, path: Path, offset: int) -> bytes:
    """The payload of the record at `offset`; RecordError where it is damaged."""
    file.seek(offset)
    header = file.read(HEADER)
    if len(header) < HEADER:
        raise _damaged(path, offset, "the file ends in it")
    length, checksum = struct.unpack("<QI", header)
    if masked_crc(header[:8]) != checksum:
        packed = "; it looks compressed, unpack it" if header[:2] == b"\x1f\x8b" else ""
        raise _damaged(path, offset, f"its length has a wrong checksum{packed}")
    if offset + HEADER + length + FOOTER > os.fstat(file.fileno()).st_size:
        raise _damaged(path, offset, "the file ends in it")
    payload, footer = file.read(length), file.read(FOOTER)
    if masked_crc(payload) != struct.unpack("<I", footer)[0]:
        raise _damaged(path, offset, "its data have a wrong checksum")
    return payload


def _damaged(path: Path, offset: int, why) -> RecordError:
    return RecordError(
        f"{path}: the record at byte {offset} cannot be used ({why}); copy or make the "
        "file again."
    )


def write_shard(path: Path, payloads: Iterable[bytes]) -> None:
    """Writes a whole TFRecord file, or nothing under this name."""
    with storage.writing(path) as temporary, temporary.open("wb") as file:
        for payload in payloads:
            length = struct.pack("<Q", len(payload))
            file.write(length + struct.pack("<I", masked_crc(length)))
            file.write(payload + struct.pack("<I", masked_crc(payload)))


# -------------------------------------------------------------------------- one record


def encode(
    clip: Clip,
    id: str,
    labels: Sequence[int] = (),
    label_names: Sequence[str] = (),
    log_mel: np.ndarray | None = None,
) -> bytes:
    """One clip as a serialized `tf.train.SequenceExample`.

    Args:
        clip: frames become JPEGs of quality 90; sound becomes floats, without loss.
        id: the clip's name.
        labels: class numbers, whose names are looked up in `label_names`.
        log_mel: rows of a log-mel spectrogram, float32 [t f], stored a row an entry.
    """
    frames = () if clip.frames is None else clip.frames
    jpegs = [encode_jpeg(frame) for frame in frames]
    sequence = _sequence(id, labels, label_names, jpegs, clip)
    rows = sequence.feature_lists.feature_list[LOG_MEL]
    for row in () if log_mel is None else log_mel:
        rows.feature.add().float_list.value.extend(row)
    return sequence.SerializeToString(deterministic=True)


def from_record(record, label_names: Sequence[str]) -> bytes:
    """A `data.records.Record` as a serialized `tf.train.SequenceExample`.

    JPEGs are passed on as they are, others made of its frames; sound stays the same to
    the bit; `facts` of the source go to the context as JSON.
    """
    jpegs = record.encoded_frames()
    clip = Clip(None, record.fps, None, record.sample_rate)
    clip.waveform = record.waveform() if record.has_audio else None
    if not jpegs and record.has_rgb:
        jpegs = [encode_jpeg(x) for x in record.frames(range(record.num_frames))]
    sequence = _sequence(record.id, record.labels, label_names, jpegs, clip)
    facts = json.dumps(record.facts, sort_keys=True).encode()
    sequence.context.feature[FACTS].bytes_list.value.append(facts)
    return sequence.SerializeToString(deterministic=True)


def _sequence(id, labels, label_names, jpegs, clip):
    sequence = SequenceExample()
    context, lists = sequence.context.feature, sequence.feature_lists.feature_list
    context[NAMES[0]].bytes_list.value.append(id.encode())
    context[LABELS].int64_list.value.extend(labels)
    texts = [label_names[label].encode() for label in labels]
    context[TEXTS].bytes_list.value.extend(texts)
    for jpeg in jpegs:
        lists[PICTURE].feature.add().bytes_list.value.append(jpeg)
    if jpegs:
        context[FRAME_RATE].float_list.value.append(clip.fps)
    if clip.waveform is not None:
        context[SAMPLE_RATE].float_list.value.append(clip.sample_rate)
        samples = clip.waveform.astype(np.float32) / 32768
        lists[SOUND].feature.add().float_list.value.extend(samples)
    return sequence


def shard_name(split: str, shard: int, shards: int) -> str:
    """The file name of shard `shard` of `shards`: `DIR/SPLIT.tfrecord@SHARDS`."""
    return f"{split}.tfrecord-{shard:05d}-of-{shards:05d}"


class Entry(NamedTuple):
    """What the list of a shard says of one record; rates are 0.0 where it does not."""

    id: str
    labels: tuple[int, ...]
    num_frames: int
    fps: float
    num_samples: int  # of sound
    sample_rate: float
    num_values: int  # of the log-mel
    offset: int  # byte of the file


class Record:
    """One record, parsed when it is first read; like `data.records.Record`.

    Args:
        payload: a serialized `tf.train.SequenceExample`.
        path: its file, for errors.
        entry: what is known of it.
        mels: columns of the log-mel that counts as the clip's sound; 0: its waveform.
        as_tensorflow: JPEGs are decoded to what TensorFlow makes of them.
    """

    def __init__(
        self,
        payload: bytes,
        path: Path,
        entry: Entry,
        mels: int = 0,
        as_tensorflow: bool = False,
    ):
        self._payload, self._path, self._entry = payload, path, entry
        self._mels, self._as_tensorflow = mels, as_tensorflow

    id = property(lambda self: self._entry.id)
    labels = property(lambda self: self._entry.labels)
    num_frames = property(lambda self: self._entry.num_frames)
    fps = property(lambda self: self._entry.fps)
    num_samples = property(lambda self: self._entry.num_samples)
    num_values = property(lambda self: self._entry.num_values)
    sample_rate = property(lambda self: self._entry.sample_rate)
    has_rgb = property(lambda self: self.num_frames > 0)
    has_audio = property(lambda self: _has_sound(self._entry, self._mels))
    height = property(lambda self: self._shape[0])
    width = property(lambda self: self._shape[1])

    @cached_property
    def _shape(self) -> tuple[int, int]:
        if not self.has_rgb:
            return 0, 0
        encoded = _bytes(self._lists[PICTURE].feature[0])
        try:
            with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
                return image.size[::-1]
        except (*BAD_PICTURE, ValueError) as error:
            raise self._broken("picture", error) from None

    @cached_property
    def _lists(self):
        return _parse(self._payload, self._path, self._entry.offset)[1]

    def frames(self, indices: Sequence[int], box=None) -> np.ndarray:
        """The wanted frames, uint8 [len(indices) h w 3]; RecordError if damaged.

        box: (top, left, height, width) that is cut out of each; None: all of it.
        """
        encoded = self._lists[PICTURE].feature
        try:
            exact, wanted = self._as_tensorflow, {int(i) for i in indices}
            decoded = {i: _decode(_bytes(encoded[i]), exact) for i in wanted}
            return np.stack([cut_out(decoded[int(i)], box) for i in indices])
        except (*BAD_PICTURE, ValueError) as error:
            raise self._broken("picture", error) from None

    def encoded_frames(self) -> list[bytes]:
        """The pictures as they are stored."""
        return [_bytes(feature) for feature in self._lists[PICTURE].feature]

    def waveform(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """The sound from sample `start` to before `stop` (its end), int16 [s].

        Empty without sound; RecordError if it is damaged.
        """
        return self._waveform()[start:stop]

    def _waveform(self) -> np.ndarray:
        sound = _floats(self._lists[SOUND])
        if (~(np.abs(sound) < LOUD)).sum() > sound.size / 100:  # NaN too
            # DMVR's own converter takes 32-bit integers' bits for floats'.
            return (sound.view(np.int32) >> 16).astype(np.int16)
        if not np.isfinite(sound).all():
            raise self._broken("sound", "a sample is no finite number")
        return np.clip(np.rint(sound * 32768), -32768, 32767).astype(np.int16)

    def log_mel(self) -> np.ndarray:
        """The precomputed log-mel, float32 [t f]; RecordError if it is damaged."""
        values = _floats(self._lists[LOG_MEL])
        if values.size % self._mels:
            why = f"{values.size} values do not make rows of {self._mels}"
            raise self._broken("log-mel", why)
        if not np.isfinite(values).all():
            raise self._broken("log-mel", "a value is no finite number")
        return values.reshape(-1, self._mels)

    def _broken(self, part: str, why) -> RecordError:
        why = f"its {part}: {' '.join(str(why).split()) or type(why).__name__}"
        return _damaged(self._path, self._entry.offset, why)


def _parse(payload: bytes, path: Path, offset: int):
    """(context, feature lists) as maps by name."""
    try:
        sequence = SequenceExample.FromString(payload)
    except message.DecodeError as error:
        raise _damaged(path, offset, f"no SequenceExample: {error}") from None
    return sequence.context.feature, sequence.feature_lists.feature_list


def _bytes(feature) -> bytes:
    return next(iter(feature.bytes_list.value), b"")


def _decode(encoded: bytes, as_tensorflow: bool) -> np.ndarray:
    """A stored picture, uint8 [h w 3]; one of `BAD_PICTURE` where it is damaged."""
    with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
        sides = [layer[1:3] for layer in getattr(image, "layer", ())]
        known = image.mode == "RGB" and sides[1:] == [(1, 1)] * 2
        if as_tensorflow and known and sides[0] in ((1, 1), (2, 1), (2, 2)):
            return _decode_fast(image, *sides[0])
        return np.asarray(image.convert("RGB"))


def _decode_fast(image: Image.Image, wide: int, high: int) -> np.ndarray:
    """A JPEG as TensorFlow decodes it by default, to the last bit.

    That is with libjpeg's fast integer transform, which Pillow has for drafts only, and
    there with every value of colour repeated; so repeats are dropped, and what libjpeg
    does next (its "fancy upsampling" and conversion, in whole numbers) is done here.

    wide, high: values of brightness for one of colour, 1 or 2.
    """
    image.draft("YCbCr", None)
    image.decoderconfig = (1, 1)  # whole size, draft
    y, *colours = np.moveaxis(np.asarray(image).astype(np.int32), 2, 0)
    b, r = (_upsample(c[::high, ::wide], wide, high) - 128 for c in colours)
    b, r = b[: len(y), : y.shape[1]], r[: len(y), : y.shape[1]]
    half = 1 << 15  # the factors are 1.402, 0.34414, 0.71414 and 1.772 of 65536
    red = y + ((91881 * r + half) >> 16)
    green = y + ((half - 22554 * b - 46802 * r) >> 16)
    blue = y + ((116130 * b + half) >> 16)
    return np.clip(np.stack([red, green, blue], -1), 0, 255).astype(np.uint8)


def _upsample(plane: np.ndarray, wide: int, high: int) -> np.ndarray:
    """Twice as many columns, or also rows: ¾ of the nearest value, ¼ of the next."""
    if high == 2:
        plane = _between(plane.T).T
    if wide == 1:
        return plane
    # Rounded once, down and up by turns.
    plane, shift = _between(plane), 2 * high
    plane[:, ::2] += 1 << (shift - 1) if high == 2 else 1
    plane[:, 1::2] += (1 << (shift - 1)) - 1 if high == 2 else 2
    return plane >> shift


def _between(plane: np.ndarray) -> np.ndarray:
    """Between neighbours of a row, three of the nearer and one of the other: [h 2w]."""
    edged = np.pad(plane, ((0, 0), (1, 1)), "edge")
    out = np.empty((len(plane), 2 * plane.shape[1]), np.int32)
    out[:, ::2] = 3 * plane + edged[:, :-2]
    out[:, 1::2] = 3 * plane + edged[:, 2:]
    return out


def _floats(listed) -> np.ndarray:
    """All numbers of a feature list, float32 [n], bit by bit as they are stored."""
    parts = [np.zeros(0, "<f4")]
    for feature in listed.feature:
        count = len(feature.float_list.value)
        packed = feature.float_list.SerializeToString()
        parts.append(np.frombuffer(packed, "<f4", count, len(packed) - 4 * count))
    return np.concatenate(parts)


def _has_sound(entry: Entry, mels: int) -> bool:
    return (entry.num_values if mels else entry.num_samples) > 0


# ---------------------------------------------------------------------- one file's list


class Listing(NamedTuple):
    """What is known of a shard: its records, names of classes, what is damaged."""

    entries: list[Entry]
    names: dict[int, str]
    damaged: list[str]  # messages


def _list(path: Path) -> Listing:
    """Reads a whole shard, as far as that goes: after a record whose data are damaged
    comes the next one; after one whose length is, nothing more can be found."""
    entries, names, damaged, offset, number = [], {}, [], 0, 0
    size = path.stat().st_size
    with path.open("rb") as file:
        while offset < size:
            try:
                payload = _read(file, path, offset)
                context, lists = _parse(payload, path, offset)
                entry = _entry(context, lists, f"{path.name}:{number}", offset)
                if wrong := [x for x in entry.labels if not 0 <= x < CLASSES]:
                    raise _damaged(path, offset, f"its class is {wrong[0]}")
                texts = map(_text, context[TEXTS].bytes_list.value)
                names |= dict(zip(entry.labels, texts, strict=False))
                entries.append(entry)
            except RecordError as error:
                damaged.append(str(error))
            after = _after(file, offset)
            if after is None:
                break
            offset, number = after, number + 1
    return Listing(entries, names, damaged)


def _after(file, offset: int) -> int | None:
    """Where the record after that at `offset` begins; None where nothing tells."""
    file.seek(offset)
    header = file.read(HEADER)
    if len(header) < HEADER:
        return None
    length, checksum = struct.unpack("<QI", header)
    if masked_crc(header[:8]) != checksum:
        return None
    after = offset + HEADER + length + FOOTER
    return after if after <= os.fstat(file.fileno()).st_size else None


def _entry(context, lists, place: str, offset: int) -> Entry:
    count = lambda name: sum(len(f.float_list.value) for f in lists[name].feature)
    return Entry(
        id=_id(context) or place,
        labels=tuple(context[LABELS].int64_list.value),
        num_frames=len(lists[PICTURE].feature),
        fps=_number(context[FRAME_RATE]),
        num_samples=count(SOUND),
        sample_rate=_number(context[SAMPLE_RATE]),
        num_values=count(LOG_MEL),
        offset=offset,
    )


def _id(context) -> str:
    """The clip's name, and which part of it where the record says so."""
    named = (context[name].bytes_list.value for name in NAMES)
    name = next((_text(value[0]) for value in named if value), "")
    times = [context[time].int64_list.value for time in TIMES]
    if name and all(times):
        name += "@" + "-".join(f"{time[0] / 1e6:g}" for time in times)
    return name


def _text(value: bytes) -> str:
    return value.decode("utf-8", "backslashreplace")


def _number(feature) -> float:
    return float(next(iter([*feature.float_list.value, *feature.int64_list.value]), 0))


def _listing(path: Path) -> Listing:
    """The list of a shard, from the cache or made and kept there."""
    state = path.stat()
    key = f"{FORMAT} {path.resolve()} {state.st_size} {state.st_mtime_ns}"
    kept = _cache() / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
    with contextlib.suppress(OSError, ValueError, TypeError):
        entries, names, damaged = json.loads(kept.read_text())
        entries = [Entry(*entry)._replace(labels=tuple(entry[1])) for entry in entries]
        names = {int(label): name for label, name in names.items()}
        return Listing(entries, names, damaged)
    listing = _list(path)
    if listing.damaged:  # the file may be mended behind its time
        return listing
    temporary = kept.with_suffix(f".{os.getpid()}.tmp")
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(listing))
        temporary.replace(kept)
    except OSError as error:
        log.warning("The list of records of %s is not kept: %s", path, error)
    return listing


def _cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "av_mae" / "dmvr"


# ------------------------------------------------------------------------ many shards


def matches(where: str | os.PathLike) -> bool:
    """Whether `data.dir` means TFRecords: a folder that holds some, or a pattern."""
    if Path(where).is_dir():
        if prepared := _prepared(where):
            return any(_shards_in(prepared))
        return any(_shards_in(Path(where)))
    return bool(re.search(r"[*?\[]|\{split\}|@\d+$|\.tfrecord", str(where)))


def _prepared(where: str | os.PathLike) -> Path | None:
    """The folder of dataset.json, if `data.prepare` made this."""
    names = ("dataset.json", "*/*/dataset.json")
    found = [path.parent for name in names for path in Path(where).glob(name)]
    return found[0] if found else None


def is_shard(path: Path) -> bool:
    """Whether a file is a shard of TFRecords by its name."""
    return bool(SHARD.search(path.name)) and ".array_record" not in path.name


def _shards_in(folder: Path) -> Iterator[Path]:
    """TFRecord files of a folder and of the folders in it."""
    for path in sorted([*folder.glob("*"), *folder.glob("*/*")]):
        if is_shard(path):
            yield path


def find(where: str | os.PathLike, split: str | None) -> list[Path]:
    """The shards of a split, or of all (None); RecordError where there are none."""
    where, parts = str(where), None
    if Path(where).is_dir():
        found = list(_shards_in(Path(where)))
        names = [path.relative_to(where).as_posix() for path in found]
        wanted = [name.startswith(split or "") for name in names]
        found = [path for path, right in zip(found, wanted, strict=True) if right]
        hint = f"; the shards there are {', '.join(names[:3])}, …"
    else:
        stem, _, parts = where.partition("@")
        suffix = "-?????-of-?????" if parts else ""
        pattern = stem.replace("{split}", split or "*") + suffix
        found, hint = [Path(path) for path in sorted(glob.glob(pattern))], ""
    if not found:
        raise RecordError(
            f"{where}: there are no TFRecords of the split {split!r}{hint}; correct "
            "data.dir, in which {split} stands for the name of a split, or the split."
        )
    if parts and split and len(found) != int(parts):
        raise RecordError(
            f"{where}: {len(found)} of {parts} shards of {split!r} are there; copy the "
            "others or correct data.dir."
        )
    return found


class Records:
    """The records of one split, by number; like `data.records.Records`.

    Args:
        where: `data.dir`: a folder or a pattern (see above).
        split: such as "train".
        fps: frames a second of a record that does not say.
        sample_rate: hertz of the sound of a record that does not say.
        mels: columns of the log-mel that counts as the clip's sound; 0: its waveform.
        as_tensorflow: JPEGs are decoded to what TensorFlow makes of them by default, by
            a fast transform that is off by a few grey levels (and three times slower
            here than the accurate one).
        skip_bad_records: how many damaged records are left out, with a warning; of a
            file that ends early, or whose lengths are damaged, the rest counts as one.

    Attributes:
        folder: the Path of the first shard's folder.
        info: name, labels, settings, statistics (none) and checksums of the data set.
        index: per record, a dict of id, labels, has_rgb, has_audio, num_frames.
        damaged: messages of damaged records, of all splits, that are left out.

    Raises:
        RecordError: there are no such shards, or a record of theirs is damaged.
    """

    def __init__(
        self,
        where: str | os.PathLike,
        split: str,
        fps: float = 25.0,
        sample_rate: int = 16000,
        mels: int = 0,
        as_tensorflow: bool = False,
        skip_bad_records: int = 0,
    ):
        self.split, self._mels, self._as_tensorflow = split, mels, as_tensorflow
        prepared = _prepared(where) if Path(where).is_dir() else None
        where = prepared or where
        shards = find(where, split)
        self.folder = shards[0].parent
        every = sorted({*shards, *find(where, None)})
        log.info("%d TFRecord files; new ones are read to list records.", len(every))
        listings = {path: _listing(path) for path in every}
        self.damaged = [why for path in every for why in listings[path].damaged]
        if len(self.damaged) > skip_bad_records:
            raise RecordError(self.damaged[0])
        for why in self.damaged:
            log.warning("left out: %s", why)
        entries = [(path, entry) for path in shards for entry in listings[path].entries]
        self._places = [(path, _known(e, fps, sample_rate)) for path, e in entries]
        self.index = [self._describe(entry) for _, entry in self._places]
        self.info = (
            read_info(prepared)
            if prepared
            else dict(
                name=self.folder.name,
                labels=_label_names(self.folder, listings.values()),
                settings=dict(fps="source", sample_rate=self._sample_rate(sample_rate)),
                statistics={},
                checksums={path.name: _digest(listings[path]) for path in shards},
            )
        )
        if "{split}" not in str(where) and not Path(where).is_dir():
            log.warning("%s is the same clips for every split.", where)

    def _describe(self, entry: Entry) -> dict:
        return dict(
            id=entry.id,
            labels=entry.labels,
            has_rgb=entry.num_frames > 0,
            has_audio=_has_sound(entry, self._mels),
            num_frames=entry.num_frames,
        )

    def _sample_rate(self, default: int) -> float:
        """The rate of all sound; RecordError where there are several."""
        rates = {e.sample_rate for _, e in self._places if e.num_samples}
        if len(rates) > 1 and not self._mels:
            raise RecordError(
                f"{self.folder}: the sound of {self.split} has "
                f"{' and '.join(f'{rate:g}' for rate in sorted(rates))} Hz; make the "
                "files again with one rate."
            )
        return next(iter(rates), default)

    def __repr__(self) -> str:
        return f"Records({str(self.folder)!r}, {self.split!r})"

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, number: int) -> bytes:
        """The payload of record `number`; RecordError where it is damaged."""
        path, entry = self._places[number]
        with path.open("rb") as file:
            return _read(file, path, entry.offset)

    def record(self, number: int) -> Record:
        """Record `number`, whose errors name the file and the place in it."""
        payload, (path, entry) = self[number], self._places[number]
        return Record(payload, path, entry, self._mels, self._as_tensorflow)


def _known(entry: Entry, fps: float, sample_rate: float) -> Entry:
    """The entry with rates that the record does not say filled in."""
    return entry._replace(
        fps=entry.fps or fps, sample_rate=entry.sample_rate or sample_rate
    )


def _label_names(folder: Path, listings: Iterable[Listing]) -> list[str]:
    """Names of classes 0 to the highest: of labels.txt, or as far as records say."""
    listings, lines = list(listings), folder / "labels.txt"
    used = {x for listing in listings for e in listing.entries for x in e.labels}
    if lines.is_file():
        names = lines.read_text(encoding="utf-8").splitlines()
        if used and max(used) >= len(names):
            raise RecordError(
                f"{lines}: has {len(names)} names, but there is a clip of class "
                f"{max(used)} (from 0); complete it or remove it."
            )
        return names
    named = {k: name for listing in listings for k, name in listing.names.items()}
    return [named.get(i, f"class {i}") for i in range(max(used, default=-1) + 1)]


def _digest(listing: Listing) -> dict:
    """Stands for a shard's content: a hash of what its list says."""
    text = json.dumps(listing).encode()
    return dict(sha256=hashlib.sha256(text).hexdigest(), size=len(text))
