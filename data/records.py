"""Clip ↔ record, and the folder of ArrayRecord shards that holds a prepared data set.

A record is one serialized `tf.train.Example`; TensorFlow is needed neither to write nor
to read it. A data set lies in `DIR/NAME/1.0.0/`:

    NAME-SPLIT.array_record-00000-of-0000n   one clip a record, `group_size:1`
    index-SPLIT.jsonl        a line a record, in record order: id, labels, has_rgb,
                             has_audio, num_frames; opening a split reads no record
    dataset.json             settings, counts, label names, checksums, statistics
    dataset_info.json, features.json         the same folder as TFDS wants it, for
                             `tfds.builder_from_directory(...).as_data_source()`

| feature                   | type        | meaning                                    |
|---------------------------|-------------|--------------------------------------------|
| id                        | bytes       | path in the source (+ `@start-end`), UTF-8 |
| labels                    | int64 list  | places in the label names of dataset.json; |
|                           |             | one a head where those are several lists   |
| has_rgb, has_audio        | int64       | 0 or 1                                     |
| num_frames, height, width | int64       | of the picture; 0 without                  |
| fps                       | float       | frames a second, constant; 0 without       |
| video                     | bytes       | the picture as H.264 in MP4, or empty      |
| jpeg                      | bytes list  | the picture as JPEG frames, or empty       |
| sample_rate, num_samples  | int64       | of the sound; num_samples is 0 without     |
| audio                     | bytes       | the sound as mono 16-bit FLAC (WAV beside  |
|                           |             | JPEGs: decoded in no time), or empty       |
| facts                     | bytes       | JSON: of the source file, and how it went  |

Picture. H.264 by libx264 at constant quality, a key frame every 16 frames, so that
decoding starts at most 15 frames early. Three of four frames in between are B frames
that no other frame refers to: those that are not wanted are not decoded. At stride 4
that leaves 28 of 67 frames and two thirds of the time that it takes without B frames,
in 4 % fewer bytes of the same PSNR (six of the development clips at short side 256:
mean 38.8 dB, lowest clip 34.6). `veryfast` with `tune=fastdecode` (no CABAC, no
deblocking, no weighted prediction) at crf 21, 8 bit 4:2:0, BT.601 in the limited range.
Adaptive quantisation, transforms of 8 x 8 and partitions are off: at the same PSNR that
takes 9 % fewer bytes, a quarter less time to decode and as much less to encode. Without
`fastdecode` the same PSNR takes 5 % fewer bytes and 1.6 times as long to decode. There
is no `mbtree`, since with it the same small frames gave other bytes in some runs (never
with x264's assembly code off); the same PSNR takes as many bytes without it. JPEG is at
quality 90, for those who have the disk.

Sound is aligned to picture time 0: sample i belongs to i / sample_rate seconds.
"""

import bisect
import io
import json
import math
import os
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from functools import cached_property
from pathlib import Path

import av
import numpy as np
import soundfile
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from av.video.frame import PictureType
from av.video.reformatter import VideoReformatter
from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory
from PIL import Image

from data import Clip, RecordError, storage

FORMAT = 1
VERSION = "1.0.0"
GOP = 16  # frames from one key frame to the next
X264 = {
    "preset": "veryfast",
    "tune": "fastdecode",
    "crf": "21",
    "x264-params": f"keyint={GOP}:scenecut=0:rc-lookahead=0:mbtree=0:bframes=3:"
    "b-adapt=0:b-pyramid=0:weightb=0:aq-mode=0:8x8dct=0:partitions=none",
}
COLOURS = {"colorspace": "ITU601", "color_range": "MPEG"}
JPEG_QUALITY = 90
SOUND_FORMATS = {"h264": "FLAC", "jpeg": "WAV"}  # by how the picture is stored
SPOOLED = 32 << 20  # bytes of an encoded picture that memory holds
OPEN_SHARDS = 256  # readers kept open; a process may have 1024 files open
SINGLE = ("id", "has_rgb", "has_audio", "num_frames", "height", "width", "fps", "video")
SINGLE += ("sample_rate", "num_samples", "audio", "facts")


# ------------------------------------------------------------------- the proto messages


def _declare_messages():
    """Classes of tensorflow/core/example/*.proto by name, declared as they are there.

    In a pool of its own: TensorFlow, if it is there, declares the same names.
    """
    field = descriptor_pb2.FieldDescriptorProto
    proto = descriptor_pb2.FileDescriptorProto(
        name="av_mae/example.proto", package="tensorflow", syntax="proto3"
    )
    one, many = field.LABEL_OPTIONAL, field.LABEL_REPEATED

    def add(message, name, number, label, kind, **more):
        """A field whose kind is a type, or the name of another message."""
        if isinstance(kind, str):
            more |= dict(type_name=f".tensorflow.{kind}")
            kind = field.TYPE_MESSAGE
        message.field.add(name=name, number=number, label=label, type=kind, **more)

    def add_map(name, key, kind):
        """A message whose only field maps strings to messages."""
        holder, entry = proto.message_type.add(name=name), f"{kind}Entry"
        nested = holder.nested_type.add(name=entry)
        nested.options.map_entry = True
        add(nested, "key", 1, one, field.TYPE_STRING)
        add(nested, "value", 2, one, kind)
        add(holder, key, 1, many, f"{name}.{entry}")

    types = dict(Bytes=field.TYPE_BYTES, Float=field.TYPE_FLOAT, Int64=field.TYPE_INT64)
    feature = proto.message_type.add(name="Feature")
    feature.oneof_decl.add(name="kind")
    for number, (kind, type_) in enumerate(types.items(), start=1):
        add(proto.message_type.add(name=f"{kind}List"), "value", 1, many, type_)
        name = f"{kind.lower()}_list"
        add(feature, name, number, one, f"{kind}List", oneof_index=0)
    add_map("Features", "feature", "Feature")
    add(proto.message_type.add(name="FeatureList"), "feature", 1, many, "Feature")
    add_map("FeatureLists", "feature_list", "FeatureList")
    example = proto.message_type.add(name="Example")
    add(example, "features", 1, one, "Features")
    sequence = proto.message_type.add(name="SequenceExample")
    add(sequence, "context", 1, one, "Features")
    add(sequence, "feature_lists", 2, one, "FeatureLists")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(proto)
    find = lambda name: pool.FindMessageTypeByName(f"tensorflow.{name}")
    names = ("Example", "SequenceExample")
    return (message_factory.GetMessageClass(find(name)) for name in names)


Example, SequenceExample = _declare_messages()


# ------------------------------------------------------------------------ clip → record


def encode(
    clip: Clip,
    id: str,
    labels: Sequence[int] = (),
    facts: dict | None = None,
    frames: str = "h264",
) -> bytes:
    """One clip as a serialized `tf.train.Example`.

    Args:
        clip: its frames may be an iterator: each is encoded as it comes.
        id: the clip's name in the data set.
        labels: class numbers.
        facts: more about where the clip comes from; added are `clip.source`,
            `clip.problems`, the loudness `rms_dbfs` (None: no sound, or all zeros),
            `silent` (there is sound, all zeros) and `short_sound` (shorter than half
            the picture).
        frames: how the picture is stored, "h264" (even sizes) or "jpeg".
    """
    return b"".join(encode_parts(clip, id, labels, facts, frames))


def encode_parts(
    clip: Clip,
    id: str,
    labels: Sequence[int] = (),
    facts: dict | None = None,
    frames: str = "h264",
) -> Iterator[bytes]:
    """The bytes that `encode` gives, in parts of which memory never holds all.

    The whole clip is encoded when this returns; a long picture waits on the disk.
    """
    fields = dict(id=id.encode(), labels=[int(label) for label in labels])
    fields |= _picture(clip, frames) | _sound(clip, SOUND_FORMATS[frames])
    facts = dict(facts or {}, **clip.source)
    facts |= dict(problems=list(clip.problems), rms_dbfs=_loudness(clip.waveform))
    picture = fields["num_frames"] / fields["fps"] if fields["has_rgb"] else 0.0
    sound, has_sound = fields["num_samples"] / clip.sample_rate, fields["has_audio"]
    facts["silent"] = bool(has_sound and facts["rms_dbfs"] is None)
    facts["short_sound"] = bool(has_sound and sound < picture / 2)
    fields["facts"] = json.dumps(facts, sort_keys=True).encode()
    return _serialize(fields)


def _serialize(fields: dict) -> Iterator[bytes]:
    """A `tf.train.Example`, in parts; the large fields are put in by hand.

    Protobuf would hold an hour's picture four times at once.
    """
    example, pieces = Example(), []
    for name, value in fields.items():
        values = value if isinstance(value, list) else [value]
        if name in ("video", "jpeg", "audio"):  # the JPEGs are delimited already
            listed = [value] if name == "jpeg" else _delimited(1, value)
            feature = _delimited(2, *_delimited(1, *listed))
            pieces += _delimited(1, *_delimited(1, name.encode()), *feature)
            continue
        feature = example.features.feature[name]
        if name in ("id", "facts"):
            feature.bytes_list.value.extend(values)
        elif name == "fps":
            feature.float_list.value.extend(values)
        else:
            feature.int64_list.value.extend(values)
    small = example.features.SerializeToString(deterministic=True)
    parts = _delimited(1, small, *pieces)
    if sum(map(len, parts)) >= 2**31:
        raise ValueError("its record would be larger than 2 GB; cut the clip shorter")
    return (x for p in parts for x in (p.parts() if isinstance(p, _Spool) else (p,)))


class _Spool:
    """A file in memory, or on the disk when it grows: its length, and its parts."""

    def __init__(self):
        self.file = tempfile.SpooledTemporaryFile(SPOOLED)

    def __len__(self) -> int:
        return self.file.seek(0, os.SEEK_END)

    def parts(self) -> Iterator[bytes]:
        self.file.seek(0)
        while part := self.file.read(1 << 20):
            yield part


def _delimited(number: int, *pieces: "bytes | _Spool") -> list:
    """`pieces` together as field `number` (below 16) of a protobuf message."""
    size, prefix = sum(map(len, pieces)), bytearray([number << 3 | 2])
    while size > 127:
        prefix.append(size & 127 | 128)
        size >>= 7
    return [bytes(prefix + bytes([size])), *pieces]


def _picture(clip: Clip, kind: str) -> dict:
    """The features of the picture; encodes frame by frame."""
    shape, count = (0, 0), 0

    def counted():
        nonlocal shape, count
        for frame in () if clip.frames is None else clip.frames:
            if count and _shape(frame) != shape:
                raise ValueError(f"frame {count} is {_shape(frame)}, not {shape}")
            shape, count = _shape(frame), count + 1
            yield frame

    video, jpeg = _Spool(), _Spool()
    if kind == "h264":
        _encode_h264(counted(), clip.fps, video.file)
    elif kind == "jpeg":
        for frame in counted():
            jpeg.file.writelines(_delimited(1, encode_jpeg(frame)))
    else:
        raise ValueError(f"frames must be 'h264' or 'jpeg', not {kind!r}")
    size = dict(num_frames=count, height=shape[0], width=shape[1])
    fps = float(clip.fps) if count else 0.0
    return dict(has_rgb=int(count > 0), fps=fps, video=video, jpeg=jpeg, **size)


def _shape(frame: np.ndarray | av.VideoFrame) -> tuple[int, int]:
    """Height and width."""
    if isinstance(frame, av.VideoFrame):
        return frame.height, frame.width
    return frame.shape[:2]


def _encode_h264(frames: Iterable, fps: float, file) -> None:
    """Writes frames of even sides as MP4; nothing where there are none.

    frames: uint8 [h w 3], or yuv420p as `media.Scaler.coded` gives it. file: a binary
    file, open for writing and seeking.
    """
    container = None
    reformatter = VideoReformatter()
    for number, frame in enumerate(frames):
        if container is None:
            container = av.open(file, "w", format="mp4")
            stream = _h264_stream(container, _shape(frame), fps)
        if isinstance(frame, np.ndarray):
            frame = _coded(frame, reformatter)
        frame.pict_type = PictureType.NONE  # not that of the file it comes from
        frame.pts, frame.time_base = number, stream.codec_context.time_base
        container.mux(stream.encode(frame))
    if container is not None:
        container.mux(stream.encode(None))
        container.close()


def _coded(pixels: np.ndarray, reformatter: VideoReformatter) -> av.VideoFrame:
    """uint8 [h w 3] as yuv420p."""
    pixels = np.ascontiguousarray(pixels)  # not copied: from_ndarray would
    return reformatter.reformat(
        av.VideoFrame.from_numpy_buffer(pixels, format="rgb24"),
        format="yuv420p",
        interpolation="BICUBIC",
        dst_colorspace=COLOURS["colorspace"],
        dst_color_range=COLOURS["color_range"],
        threads=1,
    )


def _h264_stream(container, shape, fps):
    rate = Fraction(fps).limit_denominator(1001)
    stream = container.add_stream("libx264", rate=rate, options=X264)
    stream.height, stream.width = shape
    stream.pix_fmt = "yuv420p"
    context = stream.codec_context
    context.time_base = 1 / rate
    context.thread_count = 1  # the same bytes on every machine; clips run side by side
    context.colorspace, context.color_range = 5, 1  # BT.470BG (= BT.601), limited
    return stream


def encode_jpeg(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=JPEG_QUALITY)
    return file.getvalue()


def _sound(clip: Clip, format: str) -> dict:
    """The features of the sound."""
    samples = np.zeros(0, np.int16) if clip.waveform is None else clip.waveform
    if samples.dtype != np.int16 or samples.ndim != 1:
        raise ValueError(
            f"sound must be int16 [s], not {samples.dtype} {samples.shape}"
        )
    file = io.BytesIO()
    if samples.size:
        soundfile.write(file, samples, clip.sample_rate, "PCM_16", format=format)
    size = dict(sample_rate=clip.sample_rate, num_samples=samples.size)
    return dict(has_audio=int(samples.size > 0), audio=file.getvalue(), **size)


def _loudness(waveform: np.ndarray | None) -> float | None:
    """Root mean square in dB of full scale; None without sound or where all is zero."""
    if waveform is None or not waveform.any():
        return None
    power = 0.0
    for start in range(0, waveform.size, 1 << 20):  # in pieces: float64 takes 4 x int16
        piece = waveform[start : start + (1 << 20)]
        power += float(np.square(piece, dtype=np.float64).sum())
    return round(10 * math.log10(power / waveform.size / 32768**2), 2)


# ------------------------------------------------------------------------ record → clip


class Record:
    """One record, parsed when a field is first read; safe to use from several threads.

    Args:
        payload: a serialized `tf.train.Example`.
        where: what errors call the record before its id, such as the file and place.
    """

    def __init__(self, payload: bytes, where: str = ""):
        self._payload, self._where = payload, where

    @cached_property
    def _fields(self) -> dict:
        try:
            features = Example.FromString(self._payload).features.feature
            fields = {name: _values(feature) for name, feature in features.items()}
            return fields | {name: fields[name][0] for name in SINGLE}
        except (message.DecodeError, KeyError, IndexError) as error:
            where = self._where or "a record"
            raise RecordError(
                f"{where}: is not a clip of this format ({type(error).__name__}: "
                f"{error}); prepare the data set again."
            ) from None

    @cached_property
    def id(self) -> str:
        return self._fields["id"].decode()

    @cached_property
    def labels(self) -> tuple[int, ...]:
        return tuple(self._fields["labels"])

    @cached_property
    def facts(self) -> dict:
        """What is known of the source file; see `encode`."""
        return json.loads(self._fields["facts"])

    num_frames = property(lambda self: self._fields["num_frames"])
    fps = property(lambda self: self._fields["fps"])
    height = property(lambda self: self._fields["height"])
    width = property(lambda self: self._fields["width"])
    has_rgb = property(lambda self: bool(self._fields["has_rgb"]))
    has_audio = property(lambda self: bool(self._fields["has_audio"]))
    sample_rate = property(lambda self: self._fields["sample_rate"])
    num_samples = property(lambda self: self._fields["num_samples"])

    def frames(
        self, indices: Sequence[int], box: tuple[int, int, int, int] | None = None
    ) -> np.ndarray:
        """The wanted frames, uint8 [len(indices) h w 3]; any order, repeats allowed.

        Decodes from the nearest key frame at or before each wanted run on.

        Args:
            box: (top, left, height, width) that is cut out of each; None: all of it.

        Raises:
            IndexError: an index is not in [0, num_frames).
            RecordError: the picture is damaged.
        """
        indices = [int(i) for i in indices]
        if indices and not 0 <= min(indices) <= max(indices) < self.num_frames:
            raise IndexError(
                f"frames {min(indices)} to {max(indices)} of {self._name()}, which has "
                f"{self.num_frames}"
            )
        places = {}
        for place, index in enumerate(indices):
            places.setdefault(index, []).append(place)
        top, left, height, width = box or (0, 0, self.height, self.width)
        out = np.empty((len(indices), height, width, 3), np.uint8)
        decode = self._decode_h264 if self._fields["video"] else self._decode_jpeg
        try:
            for index, pixels in decode(sorted(places)):
                if pixels.shape != (self.height, self.width, 3):
                    raise ValueError(f"frame {index} has the shape {pixels.shape}")
                pixels = pixels[top : top + height, left : left + width]
                for place in places.pop(index):
                    out[place] = pixels
        except (av.FFmpegError, ValueError) as error:
            raise self._damaged("picture", error) from None
        if places:
            raise self._damaged("picture", f"frame {min(places)} is missing")
        return out

    def encoded_frames(self) -> list[bytes]:
        """The JPEGs of a picture that is stored so; else nothing."""
        return list(self._fields["jpeg"])

    def _decode_h264(self, wanted: list[int]):
        """(index, uint8 [h w 3]) of each wanted frame; `wanted` is sorted."""
        if not wanted:
            return
        reformatter = VideoReformatter()  # one a call: setting one up costs 0.3 ms
        with av.open(io.BytesIO(self._fields["video"]), format="mp4") as container:
            stream = container.streams.video[0]
            stream.thread_count = 1  # clips are decoded side by side
            stream.codec_context.options = {"err_detect": "explode"}
            for run in _runs(wanted):
                for index, frame in self._frames_of(container, stream, run):
                    if index == run[0]:
                        yield index, _rgb(frame, reformatter)
                        run.pop(0)
                    if not run:
                        break

    def _frames_of(self, container, stream, wanted: list[int]):
        """(index, decoded frame) from the key frame at or before the first wanted on.

        Frames that are not wanted may be left out if no other refers to them.
        """
        start, wanted = wanted[0] // GOP * GOP, frozenset(wanted)
        frames_a_tick = float(stream.time_base) * self.fps
        index = lambda x: round(x.pts * frames_a_tick)
        if start:
            seconds = (start + 0.5) / self.fps
            container.seek(int(seconds / stream.time_base), stream=stream)
        for packet in container.demux(stream):
            if packet.pts is not None:  # the one that ends the stream has none
                needed = index(packet) in wanted
                stream.codec_context.skip_frame = "DEFAULT" if needed else "NONREF"
            for frame in packet.decode():
                if frame.is_corrupt:
                    raise ValueError("a frame is damaged")
                yield index(frame), frame

    def _decode_jpeg(self, wanted: list[int]):
        """As `_decode_h264`; FFmpeg takes 2/3 of libjpeg's time, for 1 dB of colour."""
        decoder = av.CodecContext.create("mjpeg", "r")
        decoder.thread_count = 1
        decoder.options = {"err_detect": "explode"}
        reformatter = VideoReformatter()
        for index in wanted:
            for frame in decoder.decode(av.Packet(self._fields["jpeg"][index])):
                yield index, _rgb(frame, reformatter, "JPEG")

    def waveform(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """The sound from sample `start` to before `stop` (its end), int16 [s].

        Empty without sound; RecordError if it is damaged.
        """
        if not self.has_audio:
            return np.zeros(0, np.int16)
        wanted = len(range(*slice(start, stop).indices(self.num_samples)))
        try:
            with soundfile.SoundFile(io.BytesIO(self._fields["audio"])) as file:
                whole, _ = len(file), file.seek(start)
                samples = file.read(wanted, dtype="int16")
        except (soundfile.SoundFileError, ValueError) as error:
            raise self._damaged("sound", error) from None
        if whole != self.num_samples or samples.shape != (wanted,):
            raise self._damaged(
                "sound", f"{samples.size} of {wanted} samples can be decoded"
            )
        return samples

    def _name(self) -> str:
        return f"{self._where} ({self.id})" if self._where else self.id

    def _damaged(self, part: str, why) -> RecordError:
        why = str(why) or type(why).__name__
        return RecordError(
            f"{self._name()}: its {part} is damaged ({why}); "
            "prepare the data set again."
        )


def _values(feature):
    kind = feature.WhichOneof("kind")
    return getattr(feature, kind).value if kind else []


def _runs(wanted: list[int]) -> list[list[int]]:
    """Splits sorted indices where a whole group of pictures lies between two."""
    runs = [[wanted[0]]]
    for before, index in zip(wanted, wanted[1:], strict=False):
        if index // GOP > before // GOP + 1:
            runs.append([])
        runs[-1].append(index)
    return runs


def _rgb(frame, reformatter, color_range: str = COLOURS["color_range"]) -> np.ndarray:
    return reformatter.reformat(
        frame,
        format="rgb24",
        src_colorspace=COLOURS["colorspace"],
        src_color_range=color_range,
        threads=1,
    ).to_ndarray()


# ------------------------------------------------------------------- a folder of shards


class Records:
    """The records of one split, by number: a source for Grain.

    Args:
        directory: what `data.prepare --out` was given, or the `DIR/NAME/1.0.0` in it;
            local or, by data/storage.py, in a bucket.
        split: such as "train".

    Attributes:
        folder: the Path of `DIR/NAME/1.0.0`.
        info: what dataset.json says.
        index: per record, a dict of id, labels, has_rgb, has_audio, num_frames.
        damaged: nothing; records are read when they are wanted.

    Raises:
        RecordError: there is no such data set or split, or its index is damaged.
    """

    damaged = ()

    def __init__(self, directory: str | os.PathLike, split: str):
        self.folder = find(directory)
        self.info = read_info(self.folder)
        self.split = split
        if split not in self.info["splits"]:
            raise RecordError(
                f"{self.folder}: has no split {split!r}, only "
                f"{', '.join(self.info['splits'])}; correct the name of the split "
                "(config.data.split, config.eval.split), or prepare with another "
                "--split or a CSV that has a column `split`."
            )
        self.index = _read_index(self.folder / index_name(split))
        lengths = self.info["splits"][split]["shard_lengths"]
        self._ends = np.cumsum(lengths).tolist()
        if len(self.index) != sum(lengths):
            raise RecordError(
                f"{self.folder / index_name(split)}: lists {len(self.index)} of "
                f"{sum(lengths)} records; copy or prepare the data set again."
            )
        self._open_readers()

    def _open_readers(self) -> None:
        self._readers, self._lock = OrderedDict(), threading.Lock()

    def __getstate__(self) -> dict:
        return {k: v for k, v in vars(self).items() if k not in ("_readers", "_lock")}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._open_readers()

    def __repr__(self) -> str:
        return f"Records({str(self.folder)!r}, {self.split!r})"

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, number: int) -> bytes:
        """The payload of record `number`; RecordError where it is damaged."""
        path, place = self._place(number.__index__())
        why = "nothing is there"
        try:
            if payload := self._reader(path).read([place])[0]:
                return payload
        except (RuntimeError, IndexError) as error:
            why = " ".join(str(error).split())
        raise RecordError(
            f"{path}: record {place} ({self.index[number]['id']}) cannot be read "
            f"({why}); copy or prepare the data set again."
        )

    def _place(self, number: int) -> tuple[Path, int]:
        """The shard of record `number`, and its place there."""
        if not 0 <= number < len(self):
            raise IndexError(f"record {number} of {len(self)}")
        shard = bisect.bisect_right(self._ends, number)
        return self.shard_path(shard), number - (self._ends[shard - 1] if shard else 0)

    def record(self, number: int) -> Record:
        """Record `number`, whose errors name its file and its place there."""
        payload, (path, place) = self[number], self._place(number)
        return Record(payload, f"{path}: record {place}")

    def shard_path(self, shard: int) -> Path:
        return self.folder / shard_name(
            self.info["name"], self.split, shard, len(self._ends)
        )

    def _reader(self, path: Path) -> ArrayRecordReader:
        """The open reader of a shard; the least used one is closed where many are."""
        with self._lock:
            if path not in self._readers:
                # These options are for random access; the others read far ahead.
                options = "readahead_buffer_size:0,max_parallelism:0"
                checksum = self.info["checksums"].get(path.name)
                local = storage.local_copy(path, checksum)
                self._readers[path] = ArrayRecordReader(str(local), options)
            self._readers.move_to_end(path)
            if len(self._readers) > OPEN_SHARDS:
                self._readers.popitem(last=False)
            return self._readers[path]


def find(directory: str | os.PathLike) -> Path:
    """The `DIR/NAME/1.0.0` of a prepared data set, given that or DIR.

    RecordError, with the command that makes one, where there is none; also where there
    are several.
    """
    directory = storage.place(directory)
    if (directory / "dataset.json").is_file():
        return directory
    found = sorted(directory.glob(f"*/{VERSION}/dataset.json"))
    if len(found) > 1:
        names = ", ".join(str(path.parent) for path in found)
        raise RecordError(f"{directory}: holds several data sets; give one of {names}.")
    if not found:
        started = any(directory.glob(f"*/{VERSION}/settings.json"))
        state = "is not finished; go on" if started else "is not there; make it"
        raise RecordError(
            f"{directory}: the prepared data set {state} with `python -m data.prepare "
            f"SOURCE --out {directory}`, where SOURCE is your folder or CSV of clips."
        )
    return found[0].parent


def read_info(folder: Path) -> dict:
    """What dataset.json says; RecordError where it is damaged or of another format."""
    path = storage.place(folder) / "dataset.json"
    try:
        info = json.loads(path.read_text())
        if info["format"] == FORMAT:
            return info
        why = f"its format is {info['format']}, not {FORMAT}"
    except (ValueError, KeyError, TypeError) as error:
        why = f"{type(error).__name__}: {error}"
    raise RecordError(f"{path}: cannot be used ({why}); prepare the data set again.")


def _read_index(path: Path) -> list[dict]:
    try:
        with path.open(encoding="utf-8") as lines:
            return [json.loads(line) for line in lines]
    except (OSError, ValueError) as error:
        raise RecordError(
            f"{path}: cannot be read ({error}); copy or prepare the data set again."
        ) from None


def index_entry(record: Record) -> dict:
    """What the index says of a record."""
    names = ("id", "labels", "has_rgb", "has_audio", "num_frames")
    return {name: getattr(record, name) for name in names}


# ----------------------------------------------------------------------------- writing


def shard_name(name: str, split: str, shard: int, shards: int) -> str:
    """The file name that TFDS gives to shard `shard` of `shards`."""
    return f"{name}-{split}.array_record-{shard:05d}-of-{shards:05d}"


def index_name(split: str) -> str:
    return f"index-{split}.jsonl"


def write_shard(path: Path, payloads: Iterable[bytes]) -> None:
    """Writes a whole shard, or nothing under this name."""
    with storage.writing(path) as temporary:
        # Pictures and sound are compressed already; Riegeli still adds its checksums.
        writer = ArrayRecordWriter(str(temporary), "group_size:1,uncompressed")
        for payload in payloads:
            writer.write(payload)
        writer.close()


def write_text(path: Path, text: str) -> None:
    """Writes a whole file, or nothing under this name."""
    with storage.writing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_jsonl(path: Path, values: Iterable) -> None:
    write_text(path, "".join(json.dumps(value) + "\n" for value in values))


def write_metadata(folder: Path, info: dict) -> None:
    """dataset.json and TFDS's two files; `info` as in `data.prepare`.

    dataset.json comes last: a folder that has it is complete.
    """
    if info.get("settings", {}).get("format") == "dmvr":  # not for TFDS
        text = "".join(f"{name}\n" for name in info["labels"])
        write_text(folder / "labels.txt", text)
        write_json(folder / "dataset.json", info)
        return
    splits = []
    for split, counts in info["splits"].items():
        shards = counts["shard_lengths"]
        names = [
            shard_name(info["name"], split, i, len(shards)) for i in range(len(shards))
        ]
        size = sum(info["checksums"][name]["size"] for name in names)
        splits.append(
            dict(
                name=split,
                numBytes=str(size),
                shardLengths=[str(length) for length in shards],
                filepathTemplate="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            )
        )
    tfds = dict(name=info["name"], version=VERSION, fileFormat="array_record")
    write_json(folder / "features.json", _tfds_features())
    write_json(folder / "dataset_info.json", dict(tfds, splits=splits))
    write_json(folder / "dataset.json", info)


def _tfds_features() -> dict:
    """features.json: the table at the top of this file in TFDS's words."""
    module = "tensorflow_datasets.core.features"
    text = dict(pythonClassName=f"{module}.text_feature.Text", text={})

    def tensor(dtype, name="tensor_feature.Tensor"):
        shape = dict(dtype=dtype, encoding="none", shape={})
        return dict(pythonClassName=f"{module}.{name}", tensor=shape)

    def sequence(feature):
        name = f"{module}.sequence_feature.Sequence"
        return dict(pythonClassName=name, sequence=dict(feature=feature, length="-1"))

    data = tensor("string", "scalar.Scalar")
    features = dict(id=text, facts=text, video=data, audio=data, jpeg=sequence(data))
    features |= dict(labels=sequence(tensor("int64")), fps=tensor("float32"))
    features |= dict(has_rgb=tensor("bool"), has_audio=tensor("bool"))
    for name in ("num_frames", "height", "width", "sample_rate", "num_samples"):
        features[name] = tensor("int64")
    return dict(
        pythonClassName=f"{module}.features_dict.FeaturesDict",
        featuresDict=dict(features=features),
    )
