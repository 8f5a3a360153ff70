"""How fast clips come in, beside tf.data reading DMVR's records and files as they are.

`compare` takes some clips of a data set and measures, one after the other and each in a
process of its own, what it costs to make training batches of them

| name          | from                                                               |
|---------------|--------------------------------------------------------------------|
| records, h264 | prepared records, H.264 (data/records.py)                          |
| records, jpeg | prepared records of JPEGs                                          |
| tf.data, dmvr | the same JPEGs as DMVR's TFRecords, read as DMVR reads them:       |
|               | parsed, a window of frames decoded by tf.io.decode_jpeg, resized   |
|               | and cropped by tf.image; sound stays float32; AUTOTUNE everywhere  |
| files, PyAV   | the source files, decoded on the fly (data/folder_source.py)       |

with the same frames, sizes and seconds, as `config.data` says. Clips a second depend on
what else the machine does, and favour who has more threads; processor time a clip does
so much less, and is what an idle machine divides its cores by.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import rich.console
import rich.table

from data import Clip, RecordError, dmvr, records, storage
from data.sources import open_records

OURS = ("records, h264", "records, jpeg")
BASELINE, ON_THE_FLY = "tf.data, dmvr", "files, PyAV"
CLIPS = 128  # that are taken from the data set
SHUFFLE = 256  # DMVR's default buffer, in clips
STAGES = ("read", "decode", "resize", "collate")
TARGETS = (  # (what, a over b or its inverse, at least)
    ("records, jpeg", BASELINE, 1.3),
    ("records, h264", BASELINE, 0.9),
    ("records, h264", ON_THE_FLY, 4.0),
)


class Speed(NamedTuple):
    """What one way of reading costs.

    processor: milliseconds of processor time a clip, over all threads.
    stages: the same in one thread, by name in `STAGES`; {} where they cannot be told
        apart. first_batch: seconds from opening; imports: seconds before that.
    disk_bytes, host_bytes: of a clip, as stored and as handed to the device.
    memory: most resident megabytes of the process.
    """

    name: str
    clips_per_second: float
    processor: float
    first_batch: float
    imports: float
    stages: dict[str, float]
    disk_bytes: float
    host_bytes: float
    memory: float


def compare(
    config,
    *,
    split: str = "train",
    modalities: tuple[str, ...] = ("rgb", "spectrogram"),
    sample_rate: int = 16000,
    batch_size: int = 8,
    files: str = "",
    seconds: float = 10.0,
    clips: int = CLIPS,
) -> list[Speed]:
    """Measures all ways of reading clips of `config` (`config.data`).

    Args:
        files: a folder or CSV of source files; "": that way is left out.
        seconds: each way is measured for so long.
        clips: of the data set, so many are taken.

    Raises RecordError where a way fails.
    """
    fields = dict(vars(config) if isinstance(config, SimpleNamespace) else config)
    fields |= dict(cache=False, limit=0, missing_modalities=True, split="train")
    fields |= dict(skip_bad_records=0, prepared=dict(fps="", short_side=""))
    wish = dict(modalities=modalities, sample_rate=sample_rate)
    task = dict(wish, batch_size=batch_size, seconds=seconds)
    rates = dict(fps=config.fps, sample_rate=sample_rate)
    found = open_records(config.dir, split, config.source, **rates)
    with tempfile.TemporaryDirectory(prefix="input_speed_") as home:
        made = write_sets(found, Path(home), clips)
        count = min(clips, len(found))
        ways = [(name, dict(fields, dir=str(made[name])), count) for name in made]
        if files:  # opened here, so that the list of what they have is there
            count = len(open_records(files, "all", "folder", **rates))
            ways.append((ON_THE_FLY, dict(fields, dir=files, split="all"), count))
        return [
            _measure_apart(dict(task, name=name, data=own, count=count))
            for name, own, count in ways
        ]


def write_sets(found, home: Path, clips: int) -> dict[str, Path]:
    """The same clips in three forms, one shard each: {name of the way: folder}."""
    places = np.linspace(0, len(found) - 1, min(clips, len(found)))
    payloads = {name: [] for name in (*OURS, BASELINE)}
    for place in places.round().astype(int):
        record = found.record(int(place))
        for name, payload in zip(payloads, _forms(record), strict=True):
            payloads[name].append(payload)
    folders = {name: home / str(i) / "clips/1.0.0" for i, name in enumerate(payloads)}
    for name, folder in folders.items():
        folder.mkdir(parents=True)
        if name == BASELINE:
            dmvr.write_shard(folder / dmvr.shard_name("train", 0, 1), payloads[name])
        else:
            _write_set(folder, payloads[name])
    return folders


def _forms(record) -> Iterator[bytes]:
    """A record as H.264, as JPEGs and as DMVR's."""
    frames = record.frames(range(record.num_frames)) if record.has_rgb else None
    sound = record.waveform() if record.has_audio else None
    rate = round(record.sample_rate)
    clip = Clip(frames, record.fps, sound, rate, source=getattr(record, "facts", {}))
    yield records.encode(clip, record.id)
    jpeg = records.encode(clip, record.id, frames="jpeg")
    yield jpeg
    yield dmvr.from_record(records.Record(jpeg), ())


def _write_set(folder: Path, payloads: list[bytes]) -> None:
    name, index = (
        records.shard_name("clips", "train", 0, 1),
        records.index_name("train"),
    )
    records.write_shard(folder / name, payloads)
    read = [records.Record(payload) for payload in payloads]
    records.write_jsonl(folder / index, map(records.index_entry, read))
    sums = {name: storage.checksum(folder / name)}
    info = dict(format=records.FORMAT, name="clips", labels=[], statistics={})
    info |= dict(settings=dict(fps="source", sample_rate=read[0].sample_rate))
    counts = dict(clips=len(payloads), shard_lengths=[len(payloads)])
    info |= dict(checksums=sums, splits=dict(train=counts))
    records.write_metadata(folder, info)


# -------------------------------------------------------------- one way, in one process


def _measure_apart(task: dict) -> Speed:
    """Runs this file as a program that measures one way."""
    command = [sys.executable, "-m", "data.input_speed", json.dumps(task)]
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise RecordError(f"{task['name']}: could not be measured ({last}).")
    return Speed(**json.loads(done.stdout.splitlines()[-1]))


def measure(task: dict) -> Speed:
    """Measures the way `task["name"]` in this process.

    task: name, data (fields of `config.data`), count (of clips there), modalities,
        sample_rate, batch_size, seconds.
    """
    began = time.perf_counter()
    __import__("tensorflow" if task["name"] == BASELINE else "data.pipeline")
    imports = time.perf_counter() - began
    make = _tf_batches if task["name"] == BASELINE else _own_batches
    opened = time.perf_counter()
    batches, stages, disk = make(task)
    first = next(batches)
    first_batch = time.perf_counter() - opened
    for share in (0.25, 1.0):  # what is measured first is forgotten
        count, start, spent = 0, time.perf_counter(), time.process_time()
        while count < 2 or time.perf_counter() - start < share * task["seconds"]:
            next(batches)
            count += 1
    rate = count * task["batch_size"] / (time.perf_counter() - start)
    spent = 1000 * (time.process_time() - spent) / (count * task["batch_size"])
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    size = sum(value.nbytes for value in first.values()) / task["batch_size"]
    rates = rate, spent, first_batch, imports
    return Speed(task["name"], *rates, stages(), disk, size, memory)


def _own_batches(task: dict):
    """(batches, function that measures stages, bytes a clip on disk)."""
    import data.pipeline  # a second or so, which counts as imports

    def batches():
        yield from opened().train(task["batch_size"])

    def opened():
        wish = dict(modalities=tuple(task["modalities"]))
        wish |= dict(sample_rate=task["sample_rate"])
        source = "folder" if task["name"] == ON_THE_FLY else "records"
        config = SimpleNamespace(**dict(task["data"], source=source))
        return data.pipeline.load(config, config.split, **wish)

    def stages():
        return measure_stages(opened(), task["batch_size"])

    where = Path(task["data"]["dir"])
    disk = sum(path.stat().st_size for path in where.rglob("*") if path.is_file())
    return batches(), stages, disk / task["count"]


class _Timed:
    """A source, or a record, whose calls are timed."""

    def __init__(self, inner, times):
        self._inner, self._times = inner, times

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def _call(self, stage, function, *arguments):
        start = time.thread_time()
        result = function(*arguments)
        self._times[stage] += time.thread_time() - start
        return result

    def record(self, number):
        def read():
            record = self._inner.record(number)
            record.num_frames, record.labels  # noqa: B018  parses it
            return record

        return _Timed(self._call("read", read), self._times)

    def frames(self, *arguments):
        return self._call("decode", self._inner.frames, *arguments)

    def waveform(self, *arguments):
        return self._call("decode", self._inner.waveform, *arguments)


def measure_stages(dataset, batch_size: int, batches: int = 4) -> dict[str, float]:
    """Milliseconds of processor time a clip of each stage, by name in `STAGES`.

    dataset: of `data.pipeline.load`. "resize" is all that comes after decoding:
    windows, scaling, crops.
    """
    (reader, clips), times = dataset.rows(), dict.fromkeys(STAGES, 0.0)
    plain, reader.records = reader.records, _Timed(reader.records, times)
    rng, numbers = np.random.default_rng(0), np.arange(batches * batch_size)
    try:
        for start in range(0, len(numbers), batch_size):
            began, before = time.thread_time(), sum(times.values())
            rows = [
                reader.train(clips[number % len(clips)], rng)
                for number in numbers[start : start + batch_size]
            ]
            spent = time.thread_time() - began
            times["resize"] += spent - (sum(times.values()) - before)
            began = time.thread_time()
            for key in rows[0]:
                if not isinstance(rows[0][key], dict):
                    np.stack([row[key] for row in rows])
            times["collate"] += time.thread_time() - began
    finally:
        reader.records = plain
    return {name: 1000 * spent / len(numbers) for name, spent in times.items()}


def _tf_batches(task: dict):
    """What DMVR does: see the table at the top."""
    import tensorflow as tf

    config, auto = SimpleNamespace(**task["data"]), tf.data.AUTOTUNE
    want_rgb = "rgb" in task["modalities"]
    want_sound = "spectrogram" in task["modalities"]
    span = (config.num_frames - 1) * config.stride
    samples = round(config.audio_seconds * task["sample_rate"])
    strings = tf.io.FixedLenSequenceFeature([], tf.string)
    floats = tf.io.VarLenFeature(tf.float32)

    def parse(serialized):
        features = {dmvr.PICTURE: strings} if want_rgb else {}
        features |= {dmvr.SOUND: floats} if want_sound else {}
        return tf.io.parse_single_sequence_example(
            serialized, sequence_features=features
        )[1]

    def window(length, wanted):
        room = tf.maximum(1, length - wanted)
        return tf.random.uniform([], 0, room, tf.int32)

    def picture(encoded):
        count = tf.shape(encoded)[0]
        places = window(count, span) + config.stride * tf.range(config.num_frames)
        frames = tf.map_fn(
            lambda one: tf.io.decode_jpeg(one, channels=3),
            tf.gather(encoded, places % count),
            fn_output_signature=tf.uint8,
        )
        shape = tf.shape(frames)
        height, width = shape[1], shape[2]
        short = max(config.short_side, config.size)
        new = [
            tf.maximum(short, height * short // width),
            tf.maximum(short, width * short // height),
        ]
        if_small = lambda: tf.cast(tf.image.resize(frames, new), tf.uint8)
        same = tf.equal(tf.minimum(height, width), short)
        frames = tf.cond(same, lambda: frames, if_small)
        size = [config.num_frames, config.size, config.size, 3]
        return tf.image.random_crop(frames, size)

    def sound(sparse):
        values = tf.reshape(tf.sparse.to_dense(sparse), [-1])
        start = window(tf.shape(values)[0], samples)
        values = tf.pad(values[start : start + samples], [[0, samples]])[:samples]
        return tf.ensure_shape(values, [samples])

    def example(features):
        made = {}
        if want_rgb:
            made["rgb"] = picture(features[dmvr.PICTURE])
        if want_sound:
            made["waveform"] = sound(features[dmvr.SOUND])
        return made

    (path,) = Path(config.dir).glob("*.tfrecord-*")
    clips = tf.data.TFRecordDataset(str(path)).shuffle(SHUFFLE).repeat()
    clips = clips.map(parse, auto).map(example, auto)
    batches = clips.batch(task["batch_size"], drop_remainder=True).prefetch(auto)
    return batches.as_numpy_iterator(), dict, path.stat().st_size / task["count"]


# --------------------------------------------------------------------------- to be seen


def show(speeds: list[Speed], console: rich.console.Console) -> None:
    """A table of all ways, and the ratios that matter."""
    table = rich.table.Table()
    columns = ("clips/s", "CPU ms", "first batch s", "(imports s)")
    columns += tuple(f"{stage} ms" for stage in STAGES)
    columns += ("kB on disk", "kB to device", "memory MB")
    for column in ("", *columns):
        table.add_column(column, justify="right" if column else "left")
    for speed in speeds:
        stages = [
            f"{speed.stages[name]:.1f}" if name in speed.stages else ""
            for name in STAGES
        ]
        table.add_row(
            speed.name,
            f"{speed.clips_per_second:.1f}",
            f"{speed.processor:.1f}",
            f"{speed.first_batch:.2f}",
            f"{speed.imports:.1f}",
            *stages,
            f"{speed.disk_bytes / 1000:.0f}",
            f"{speed.host_bytes / 1000:.0f}",
            f"{speed.memory:.0f}",
        )
    console.print(table)
    for line in ratios(speeds):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def ratios(speeds: list[Speed]) -> Iterator[str]:
    """The speeds of one way over those of another, beside what they should be."""
    by_name = {speed.name: speed for speed in speeds}
    for one, other, target in TARGETS:
        if one in by_name and other in by_name:
            own, theirs = by_name[one], by_name[other]
            ratio = own.clips_per_second / theirs.clips_per_second
            cheap = theirs.processor / own.processor
            yield (
                f"{one} / {other}: {ratio:.2f} x its clips a second, {cheap:.2f} x its "
                f"clips by processor time (aim: {target:g})"
            )
    if BASELINE in by_name:
        for one in OURS:
            own, theirs = by_name[one], by_name[BASELINE]
            yield (
                f"{one} / {BASELINE}: 1/{theirs.disk_bytes / own.disk_bytes:.1f} of "
                f"its bytes, 1/{theirs.memory / own.memory:.1f} of its memory, first "
                f"batch in 1/{theirs.first_batch / own.first_batch:.1f} of its time"
            )


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))._asdict()))
