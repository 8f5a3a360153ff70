"""DMVR TFRecords: framing, pictures, sound, lists, and every way to be damaged."""

import io
import json
import logging
import os
import pickle
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import parity
import pytest
import toy
from PIL import Image

from data import (
    Clip,
    ConfigError,
    ManifestError,
    RecordError,
    dmvr,
    inspect,
    pipeline,
    prepare,
    records,
)

SHARED = Path(__file__).resolve().parents[2] / "shared"
FIXTURES = SHARED / "fixtures/scenic/data"
needed = pytest.mark.skipif(
    not FIXTURES.is_dir(), reason=f"{FIXTURES} is not there (fixtures of Scenic)"
)
RATE = 1600
NAMES = ("dog", "cat", "owl")
CONFIG = dict(
    split="train",
    fps=25.0,
    num_frames=4,
    stride=2,
    sampling="dense",
    size=24,
    short_side=32,
    crop="center",
    audio_seconds=3.0,
    audio_align="proportional",
    samples_per_clip=1,
    views=1,
    crops=1,
    threads=0,
    workers=0,
    cache=False,
    resize="bilinear",
    missing_modalities=True,
    limit=0,
    source="dmvr",
    skip_bad_records=0,
    prepared=dict(fps="", short_side=""),
    randaugment="",
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Lists of records are kept in the test's own folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "av_mae" / "dmvr"


def make_clip(number, frames=5, sound=True):
    """16 × 24 pictures in flat colours, and noise for sound."""
    rng = np.random.default_rng(number)
    pictures = np.zeros((frames, 16, 24, 3), np.uint8)
    pictures[:] = rng.integers(0, 256, (frames, 1, 1, 3))
    waveform = rng.integers(-32768, 32768, 800).astype(np.int16) if sound else None
    return Clip(pictures if frames else None, 12.5, waveform, RATE)


def write(path, numbers=range(4), **clip):
    """A shard of made clips, of class i % 3 each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    payloads = [
        dmvr.encode(
            make_clip(i, **clip),
            f"clip{i}",
            (i % 3,),
            NAMES,
            rng.normal(size=(20, 8)).astype(np.float32),
        )
        for i in numbers
    ]
    dmvr.write_shard(path, payloads)
    return path


def load(where, split="train", config=(), **options):
    config = SimpleNamespace(**(CONFIG | dict(dir=str(where)) | dict(config)))
    return pipeline.load(config, split, **options)


# ----------------------------------------------------------------------- published data


def tags():
    """{tag: settings} of those that the published pipeline could produce here."""
    meta = json.loads((FIXTURES / "meta.json").read_text()) if FIXTURES.is_dir() else {}
    stored = np.load(FIXTURES / "pipeline.npz") if meta else ()
    present = {name.split("/")[0] for name in stored}
    return {tag: settings for tag, settings in meta.items() if tag in present}


def test_published_tags_are_all_there():
    assert not FIXTURES.is_dir() or len(tags()) >= 6


@needed
@pytest.mark.parametrize("tag", tags())
def test_published_batches(tag):
    """Through the whole pipeline: pictures, log-mels, order of views, labels."""
    settings, stored = tags()[tag], np.load(FIXTURES / "pipeline.npz")
    several = "multilabel" in tag
    crops = 3 if settings.get("do_three_spatial_crops") else 1
    dataset = load(
        FIXTURES / ("toy_multilabel.tfrecord" if several else "toy.tfrecord"),
        config=dict(
            num_frames=settings["num_frames"],
            stride=settings["stride"],
            short_side=settings["min_resize"],
            size=settings["crop_size"],
            views=settings["num_test_clips"],
            crops=crops,
        ),
        label="multilabel",
        log_mel=tuple(settings["spec_shape"]),
    )
    batch = next(dataset.evaluate(dataset.num_clips))
    mean, std = settings["normalization_mean_spec"], settings["normalization_std_spec"]
    for i in range(dataset.num_clips):
        theirs = {k: stored[f"{tag}/example{i}/{k}"] for k in ("image", "spectrogram")}
        pictures = theirs["image"]  # in [−1, 1], or [0, 1]
        pictures = (pictures + 1) / 2 if settings["zero_centering"] else pictures
        pictures = np.round(pictures * 255).astype(int)
        # Theirs has views fastest, ours crops.
        views = (crops, settings["num_test_clips"])
        pictures = pictures.reshape(*views, *pictures.shape[1:]).swapaxes(0, 1)
        ours = batch["rgb"][i].reshape(pictures.shape).astype(int)
        off = np.abs(ours - pictures).max()
        assert off <= 1
        rows = (batch["spectrogram"][i, ::crops] - mean) / std
        assert rows.dtype == np.float32
        # Theirs puts it on the scale of the pictures.
        rows = rows if settings["zero_centering"] else (rows + 1) / 2
        np.testing.assert_allclose(
            rows.repeat(theirs["spectrogram"].shape[-1], -1),  # inflated to 3 channels
            theirs["spectrogram"],
            atol=1e-5,
        )
        label = stored[f"{tag}/example{i}/label"][0]
        wide = np.zeros(len(label))  # of classes that no record has
        wide[: batch["label"].shape[1]] = batch["label"][i]
        np.testing.assert_array_equal(wide, label)
        parity.record("scenic data: batches", f"{tag}/{i}", outputs=off / 127.5)


@needed
def test_published_frames_are_decoded_to_the_bit():
    stored = np.load(FIXTURES / "pipeline.npz")
    where = FIXTURES / "toy.tfrecord"
    exact = dmvr.Records(where, "train", mels=16, as_tensorflow=True)
    plain = dmvr.Records(where, "train", mels=16)
    assert plain.info["labels"] == ["class 0", "label1", "class 2", "label3", "label4"]
    for i in range(len(exact)):
        frames = stored[f"raw/example{i}/frames"]
        ours = exact.record(i).frames(range(len(frames)))
        np.testing.assert_array_equal(ours, frames)
        near = plain.record(i).frames(range(len(frames))).astype(int)
        assert 0 < np.abs(near - frames).mean() < 3
        rows = exact.record(i).log_mel()
        np.testing.assert_array_equal(
            rows, stored[f"raw/example{i}/melspec"].reshape(rows.shape)
        )


# -------------------------------------------------------------------------- the framing


@pytest.mark.parametrize(
    ("data", "crc"),  # RFC 3720, B.4
    [
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
        (b"123456789", 0xE3069283),
    ],
)
def test_checksum(data, crc):
    assert dmvr.crc32c(data) == crc


@pytest.mark.parametrize("size", [8, 2047, 2048, 2049, 10_000])
def test_checksum_of_any_length_is_the_definition(size):
    data, crc = np.random.default_rng(size).bytes(size), 0xFFFFFFFF
    for value in data:
        crc ^= value
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    assert dmvr.crc32c(data) == crc ^ 0xFFFFFFFF


@pytest.mark.slow
def test_tensorflow_reads_what_is_written_and_the_other_way_round(tmp_path):
    tf = pytest.importorskip("tensorflow")
    path = write(tmp_path / "a.tfrecord")
    payloads = [x.numpy() for x in tf.data.TFRecordDataset(str(path))]
    records = dmvr.Records(path, "train")
    assert payloads == [records[i] for i in range(4)]
    sequence = tf.train.SequenceExample.FromString(payloads[2])
    assert sequence.context.feature[dmvr.TEXTS].bytes_list.value == [b"owl"]
    with tf.io.TFRecordWriter(str(tmp_path / "b.tfrecord")) as writer:
        for payload in payloads:
            writer.write(sequence.FromString(payload).SerializeToString())
    assert dmvr.Records(tmp_path / "b.tfrecord", "train").index == records.index


@pytest.mark.slow
@pytest.mark.parametrize("sides", [(16, 16), (17, 33), (40, 55), (9, 8)])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("quality", [60, 95])
def test_pictures_are_decoded_as_tensorflow_does(tmp_path, sides, subsampling, quality):
    tf = pytest.importorskip("tensorflow")
    pixels = np.random.default_rng(0).integers(0, 256, (*sides, 3), dtype=np.uint8)
    path = tmp_path / "a.jpg"
    Image.fromarray(pixels).save(path, quality=quality, subsampling=subsampling)
    theirs = tf.io.decode_jpeg(path.read_bytes()).numpy()
    np.testing.assert_array_equal(dmvr._decode(path.read_bytes(), True), theirs)


# ------------------------------------------------------------------------- round trips


def test_what_is_written_is_read_back(tmp_path):
    records = dmvr.Records(write(tmp_path / "a.tfrecord"), "train", mels=8)
    assert len(records) == 4 and "Records" in repr(records)
    for i in range(4):
        record, clip = records.record(i), make_clip(i)
        assert (record.id, record.labels) == (f"clip{i}", (i % 3,))
        assert (record.num_frames, record.fps) == (5, 12.5)
        assert (record.height, record.width) == (16, 24)
        assert (record.num_samples, record.sample_rate) == (800, RATE)
        np.testing.assert_array_equal(record.waveform(), clip.waveform)
        frames = record.frames([3, 0, 3])
        assert np.abs(frames.astype(int) - clip.frames[[3, 0, 3]]).max() < 8
        assert record.log_mel().shape == (20, 8)
        assert record.log_mel().dtype == np.float32
    assert records.info["labels"] == list(NAMES)
    assert records.index[3] == dict(
        id="clip3", labels=(0,), has_rgb=True, has_audio=True, num_frames=5
    )


def test_training_batches_of_both_kinds_of_sound(tmp_path):
    write(tmp_path / "train-00000-of-00001.tfrecord")
    options = dict(label="class", sample_rate=RATE)
    dataset = load(tmp_path, config=dict(audio_seconds=0.25), **options)
    batch = next(dataset.train(3))
    assert batch["waveform"].shape == (3, 1, 400)
    assert batch["rgb"].shape == (3, 1, 4, 24, 24, 3)
    np.testing.assert_array_equal(batch["label"], batch["index"] % 3)
    dataset = load(tmp_path, log_mel=(10, 8), **options)
    batch = next(dataset.train(3))
    assert batch["spectrogram"].shape == (3, 1, 30, 8, 1)
    assert batch["spectrogram"].dtype == np.float32 and "waveform" not in batch
    cached = load(tmp_path, config=dict(cache=True), log_mel=(10, 8), **options)
    again = next(cached.train(3))
    for key in batch:
        np.testing.assert_array_equal(batch[key], again[key])
    padded = list(load(tmp_path, log_mel=(10, 8), **options).evaluate(3))[-1]
    assert padded["valid"].tolist() == [True, False, False]
    assert not padded["spectrogram"][1:].any() and padded["spectrogram"][0].any()


def test_records_travel_to_worker_processes(tmp_path):
    records = dmvr.Records(write(tmp_path / "a.tfrecord"), "train", mels=8)
    other = pickle.loads(pickle.dumps(records))
    assert other.index == records.index and other[3] == records[3]
    rows = other.record(2).log_mel()
    np.testing.assert_array_equal(rows, records.record(2).log_mel())


def test_clips_without_picture_or_sound(tmp_path):
    write(tmp_path / "a.tfrecord", frames=0)
    write(tmp_path / "b.tfrecord", sound=False)
    records = dmvr.Records(tmp_path / "*.tfrecord", "train")
    assert [entry["has_rgb"] for entry in records.index] == [False] * 4 + [True] * 4
    assert [entry["has_audio"] for entry in records.index] == [True] * 4 + [False] * 4
    assert records.record(0).height == 0 and not records.record(5).waveform().size


def test_integers_that_were_taken_for_floats_are_sound_again(tmp_path):
    """As the converter that DMVR came with writes it."""
    sound = make_clip(0).waveform
    integers = sound.astype(np.int32) << 16
    clip = Clip(None, 0.0, None)
    payload = dmvr.encode(clip, "a")
    sequence = dmvr.SequenceExample.FromString(payload)
    feature = sequence.feature_lists.feature_list[dmvr.SOUND].feature.add()
    packed = b"\x0a" + bytes([800 * 4 & 127 | 128, 800 * 4 >> 7]) + integers.tobytes()
    feature.float_list.MergeFromString(packed)
    dmvr.write_shard(tmp_path / "a.tfrecord", [sequence.SerializeToString()])
    record = dmvr.Records(tmp_path / "a.tfrecord", "train").record(0)
    np.testing.assert_array_equal(record.waveform(), sound)


def test_loud_floats_are_clipped_and_rates_filled_in(tmp_path):
    sequence = dmvr.SequenceExample()
    lists = sequence.feature_lists.feature_list
    lists[dmvr.SOUND].feature.add().float_list.value.extend([-2, -1, 0, 0.5, 1, 3])
    sequence.context.feature["video/filename"].bytes_list.value.append(b"dir/a.mp4")
    sequence.context.feature["clip/start/timestamp"].int64_list.value.append(1_500_000)
    sequence.context.feature["clip/end/timestamp"].int64_list.value.append(4_000_000)
    dmvr.write_shard(tmp_path / "a.tfrecord", [sequence.SerializeToString()] * 2)
    where = tmp_path / "a.tfrecord"
    records = dmvr.Records(where, "train", fps=10.0, sample_rate=48_000)
    record = records.record(1)
    assert record.waveform().tolist() == [-32768, -32768, 0, 16384, 32767, 32767]
    assert record.id == "dir/a.mp4@1.5-4"
    assert (record.fps, record.sample_rate) == (10.0, 48_000)
    assert records.info["settings"]["sample_rate"] == 48_000


# --------------------------------------------------------------------- shards and lists


def test_shards_of_a_split(tmp_path):
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test.tfrecord"):
        write(tmp_path / "flat" / name, [0])
    write(tmp_path / "nested/train/x.tfrecord", [1])
    (tmp_path / "flat/README.md").write_text("no shard")
    for where, split, count in [
        ("flat", "train", 2),
        ("flat", "test", 1),
        ("flat", None, 3),
        ("nested", "train", 1),
        ("flat/{split}@2", "train", 2),
        ("flat/{split}*", "test", 1),
        ("*/*.tfrecord", "test", 1),
    ]:
        assert dmvr.matches(tmp_path / where)
        assert len(dmvr.find(tmp_path / where, split)) == count, (where, split)
    (tmp_path / "empty").mkdir()
    assert not dmvr.matches(tmp_path / "empty") and not dmvr.matches("datasets/mine")
    with pytest.raises(
        RecordError, match="no TFRecords of the split 'validation'; the"
    ):
        dmvr.find(tmp_path / "flat", "validation")
    with pytest.raises(RecordError, match="2 of 3 shards of 'train' are there"):
        (tmp_path / "flat/train-00002-of-00003").write_bytes(b"")
        (tmp_path / "flat/train-00000-of-00003").write_bytes(b"")
        (tmp_path / "flat/train-00000-of-00002").unlink()
        (tmp_path / "flat/train-00001-of-00002").unlink()
        dmvr.find(tmp_path / "flat/{split}@3", "train")


def test_a_prepared_data_set_is_not_taken_for_tfrecords(tmp_path):
    write(tmp_path / "x.tfrecord")
    assert dmvr.matches(tmp_path)
    (tmp_path / "name/1.0.0").mkdir(parents=True)
    (tmp_path / "name/1.0.0/dataset.json").write_text("{}")
    assert not dmvr.matches(tmp_path)
    with pytest.raises(ConfigError, match="holds waveforms, no log-mels"):
        load(tmp_path, log_mel=(100, 128), config=dict(source="records"))


def test_classes_are_the_same_in_every_split(tmp_path):
    write(tmp_path / "train.tfrecord", [0, 1])
    write(tmp_path / "test.tfrecord", [2])
    for split in ("train", "test"):
        assert dmvr.Records(tmp_path, split).info["labels"] == list(NAMES)
    (tmp_path / "labels.txt").write_text("a\nb\nc\nd\n")
    assert dmvr.Records(tmp_path, "test").info["labels"] == ["a", "b", "c", "d"]
    (tmp_path / "labels.txt").write_text("a\nb\n")
    with pytest.raises(
        RecordError, match="has 2 names, but there is a clip of class 2"
    ):
        dmvr.Records(tmp_path, "train")


def test_a_pattern_for_every_split_is_told(tmp_path, caplog):
    write(tmp_path / "a.tfrecord")
    with caplog.at_level(logging.WARNING):
        dmvr.Records(tmp_path / "*.tfrecord", "test")
    assert "the same clips for every split" in caplog.text


def test_lists_are_made_once_and_again_when_the_file_changes(
    tmp_path, cache, monkeypatch
):
    path = write(tmp_path / "a.tfrecord")
    first = dmvr.Records(path, "train")
    assert len(list(cache.iterdir())) == 1
    with monkeypatch.context() as patch:
        patch.setattr(dmvr, "_list", None)  # would be called
        again = dmvr.Records(path, "train")
    assert again.index == first.index and again.info == first.info
    write(path, range(6))
    longer = dmvr.Records(path, "train")
    assert len(longer) == 6 and longer.info["checksums"] != first.info["checksums"]
    for kept in cache.iterdir():
        kept.write_text("damaged")
    assert dmvr.Records(path, "train").index == longer.index


def test_lists_that_cannot_be_kept_are_made_each_time(tmp_path, cache, caplog):
    cache.parent.mkdir(parents=True)
    cache.write_text("a file where the folder would be")
    path = write(tmp_path / "a.tfrecord")
    with caplog.at_level(logging.WARNING):
        assert len(dmvr.Records(path, "train")) == 4
    assert "is not kept" in caplog.text


def test_two_rates_of_sound_are_refused(tmp_path):
    write(tmp_path / "a.tfrecord", [0])
    clip = make_clip(1)
    clip.sample_rate = 8000
    dmvr.write_shard(tmp_path / "b.tfrecord", [dmvr.encode(clip, "b")])
    with pytest.raises(RecordError, match="has 1600 and 8000 Hz"):
        dmvr.Records(tmp_path / "*.tfrecord", "train")
    with pytest.raises(ConfigError, match="has 1600 Hz, but .* wants 16000"):
        load(tmp_path / "a.tfrecord")


# ------------------------------------------------------------------------------- damage


def offsets(path):
    return [entry.offset for entry in dmvr._list(path).entries]


@pytest.mark.parametrize(
    ("place", "why"),
    [
        (0, "its length has a wrong checksum"),
        (9, "its length has a wrong checksum"),
        (300, "its data have a wrong checksum"),
        (-1, "its data have a wrong checksum"),
    ],
)
def test_flipped_bytes_are_found_and_named(tmp_path, place, why):
    path = write(tmp_path / "a.tfrecord")
    records = dmvr.Records(path, "train")
    where = offsets(path)
    content = bytearray(path.read_bytes())
    content[where[2] + place if place >= 0 else where[3] - 1] ^= 4
    path.write_bytes(content)
    words = f"{path.name}: the record at byte {where[2]} cannot be used .{why}"
    with pytest.raises(RecordError, match=words):
        records.record(2)
    assert records.record(1).frames([0]).any()
    with pytest.raises(RecordError, match=words):
        dmvr.Records(path, "train")  # its time changed: it is listed anew


@pytest.mark.parametrize("kept", [4, 13, 500])
def test_a_cut_file_is_named(tmp_path, kept):
    path = write(tmp_path / "a.tfrecord")
    where = offsets(path)
    os.truncate(path, where[2] + kept)
    with pytest.raises(RecordError, match=f"at byte {where[2]} .*the file ends in it"):
        dmvr.Records(path, "train")


def test_a_compressed_or_foreign_file_is_named(tmp_path):
    path = tmp_path / "a.tfrecord"
    path.write_bytes(b"\x1f\x8b" + bytes(40))
    with pytest.raises(RecordError, match="it looks compressed, unpack it"):
        dmvr.Records(path, "train")
    dmvr.write_shard(path, [b"\xff" * 20])
    with pytest.raises(RecordError, match="at byte 0 .*no SequenceExample"):
        dmvr.Records(path, "train")


@pytest.mark.parametrize("label", [-1, 1 << 40])
def test_a_class_out_of_proportion_is_damage(tmp_path, label):
    payload = dmvr.encode(Clip(None, 0.0, None), "a")
    sequence = dmvr.SequenceExample.FromString(payload)
    sequence.context.feature[dmvr.LABELS].int64_list.value.append(label)
    dmvr.write_shard(tmp_path / "a.tfrecord", [sequence.SerializeToString()])
    with pytest.raises(RecordError, match=f"at byte 0 .*its class is {label}"):
        dmvr.Records(tmp_path / "a.tfrecord", "train")


def test_pictures_that_are_none_are_damage(tmp_path):
    """Other formats, nothing at all, and a size that nobody would have memory for."""
    small = Image.new("RGB", (8, 8))
    kinds = {kind: io.BytesIO() for kind in ("PNG", "GIF")}
    for kind, file in kinds.items():
        small.save(file, kind)
    bomb = bytearray(kinds["PNG"].getvalue())
    bomb[16:24] = struct.pack(">II", 60_000, 60_000)
    bomb[29:33] = struct.pack(">I", zlib.crc32(bomb[12:29]))
    pictures = [kinds["PNG"].getvalue(), kinds["GIF"].getvalue(), b"", bytes(bomb)]
    sequence = dmvr.SequenceExample()
    for picture in pictures:
        feature = sequence.feature_lists.feature_list[dmvr.PICTURE].feature.add()
        feature.bytes_list.value.extend([picture] if picture else [])
    dmvr.write_shard(tmp_path / "a.tfrecord", [sequence.SerializeToString()])
    record = dmvr.Records(tmp_path / "a.tfrecord", "train").record(0)
    assert record.frames([0]).shape == (1, 8, 8, 3)
    for i in (1, 2, 3):
        with pytest.raises(RecordError, match="at byte 0 cannot be used .its picture"):
            record.frames([i])


def test_what_is_inside_may_be_damaged_too(tmp_path):
    sequence = dmvr.SequenceExample()
    lists = sequence.feature_lists.feature_list
    lists[dmvr.PICTURE].feature.add().bytes_list.value.append(b"no picture")
    lists[dmvr.SOUND].feature.add().float_list.value.extend([0.5] * 500 + [np.inf])
    lists[dmvr.LOG_MEL].feature.add().float_list.value.extend([1.0] * 9)
    dmvr.write_shard(tmp_path / "a.tfrecord", [sequence.SerializeToString()])
    record = dmvr.Records(tmp_path / "a.tfrecord", "train", mels=8).record(0)
    for read, why in [
        (lambda: record.frames([0]), "its picture: cannot identify"),
        (record.waveform, "its sound: a sample is no finite number"),
        (record.log_mel, "its log-mel: 9 values do not make rows of 8"),
    ]:
        with pytest.raises(RecordError, match=f"at byte 0 cannot be used .{why}"):
            read()


def test_a_length_out_of_proportion_takes_no_memory(tmp_path):
    length = struct.pack("<Q", 1 << 50)
    header = length + struct.pack("<I", dmvr.masked_crc(length))
    (tmp_path / "a.tfrecord").write_bytes(header + bytes(100))
    with pytest.raises(RecordError, match="the file ends in it"):
        dmvr.Records(tmp_path / "a.tfrecord", "train")


def test_a_shard_is_written_whole_or_not_at_all(tmp_path):
    def payloads():
        yield b"x" * 20
        raise ValueError("stopped")

    with pytest.raises(ValueError, match="stopped"):
        dmvr.write_shard(tmp_path / "a.tfrecord", payloads())
    assert not (tmp_path / "a.tfrecord").exists()


def test_no_tensorflow_is_needed(tmp_path):
    path = write(tmp_path / "a.tfrecord")
    code = (
        "import sys; sys.modules['tensorflow'] = None\n"
        f"from data import dmvr; records = dmvr.Records({str(path)!r}, 'train')\n"
        "print(records.record(1).frames([4]).shape, len(records.record(3).waveform()))"
    )
    root = Path(__file__).resolve().parents[1]
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True
    )
    assert run.stdout.strip() == "(1, 16, 24, 3) 800", run.stderr


def test_a_prepared_record_becomes_one_of_dmvr_without_loss(tmp_path):
    pictures = np.random.default_rng(0).integers(0, 256, (5, 16, 24, 3), np.uint8)
    clip = Clip(pictures, 12.5, make_clip(0).waveform, RATE)
    payload = records.encode(clip, "a.mp4", (2,), dict(file="a.mp4"), "jpeg")
    jpeg = records.Record(payload)
    h264 = records.Record(records.encode(clip, "b.mp4", ()))
    mute = records.Record(records.encode(Clip(pictures, 12.5, None), "c.mp4", (0,)))
    made = [dmvr.from_record(record, NAMES) for record in (jpeg, h264, mute)]
    path = tmp_path / dmvr.shard_name("train", 0, 1)
    dmvr.write_shard(path, made)
    again = dmvr.Records(f"{tmp_path}/{{split}}.tfrecord@1", "train")
    assert [entry["has_audio"] for entry in again.index] == [True, True, False]
    for i, record in enumerate((jpeg, h264, mute)):
        other = again.record(i)
        assert (other.id, other.labels, other.fps) == (record.id, record.labels, 12.5)
        assert other.num_frames == 5
        np.testing.assert_array_equal(other.waveform(), record.waveform())
    every = range(5)
    assert again.record(0).encoded_frames() == jpeg.encoded_frames()
    error = again.record(1).frames(every).astype(int) - h264.frames(every)
    assert np.abs(error).mean() < 12  # noise of single pixels is the worst for a JPEG
    context = dmvr.SequenceExample.FromString(made[0]).context.feature
    facts = json.loads(context[dmvr.FACTS].bytes_list.value[0])
    assert facts == jpeg.facts and facts["file"] == "a.mp4"
    assert context[dmvr.TEXTS].bytes_list.value == [b"owl"]


def test_prepare_writes_what_is_read_back_equal(tmp_path):
    """The command with --format dmvr against the same clips as records of JPEGs."""
    toy.write_folder(tmp_path / "clips", 6, silent=(1,))
    common = ("-m", "data.prepare", tmp_path / "clips", "--jobs", 1)
    text = toy.run(*common, "--out", tmp_path / "dmvr", "--format", "dmvr")
    assert "2 classes: bell 3, drum 3" in text
    toy.run(*common, "--out", tmp_path / "jpeg", "--frames", "jpeg")
    fields = dict(audio_seconds=0.5, resize="antialias")
    ours, theirs = (
        load(tmp_path / kind, config=fields | dict(source=source), label="class")
        for kind, source in (("dmvr", "records"), ("jpeg", "records"))
    )
    assert ours.ids == theirs.ids and ours.label_names == theirs.label_names
    for batch, other in zip(ours.evaluate(4), theirs.evaluate(4), strict=True):
        assert batch.keys() == other.keys()
        for key in set(batch) - {"rgb"}:
            np.testing.assert_array_equal(batch[key], other[key])
        # The same JPEGs, here by libjpeg (as TensorFlow), there by FFmpeg.
        error = batch["rgb"].astype(int) - other["rgb"]
        assert np.abs(error).mean() < 3
    (folder,) = tmp_path.glob("dmvr/dmvr/1.0.0")
    assert (folder / "labels.txt").read_text() == "bell\ndrum\n"
    pattern = load(f"{folder}/{{split}}.tfrecord@1", config=fields)
    assert pattern.ids == ours.ids and pattern.label_names == ["bell", "drum"]
    text = toy.run(*common, "--out", tmp_path / "dmvr", code=2)
    assert "was started with frames jpeg, not h264" in text
    assert inspect.main([str(tmp_path / "dmvr"), "--verify"]) == 0


def test_labels_of_several_kinds_have_no_room_here(tmp_path):
    (tmp_path / "a.csv").write_text("path,label_verb,label_noun\na.mp4,cut,bread\n")
    with pytest.raises(ManifestError, match="verb, noun.*leave --format dmvr out"):
        prepare.prepare(tmp_path / "a.csv", tmp_path / "set", format="dmvr")
