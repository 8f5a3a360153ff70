"""Records: round trips, random access, quality, damage, the folder as TFDS sees it."""

import concurrent.futures
import io
import itertools
import os
import pickle
from pathlib import Path

import av
import numpy as np
import pytest

from data import Clip, RecordError, records, storage
from data.records import Record, Records, encode

CLIPS = Path(__file__).resolve().parents[2] / "shared" / "clips"


def moving_picture(frames=70, height=48, width=64, seed=0):
    """uint8 [t h w 3]: two tinted waves that move apart, with a little noise."""
    rng = np.random.default_rng(seed)
    t, y, x = np.ogrid[:frames, :height, :width]
    light = np.sin((x + t) / 9) * np.cos((y - t) / 7)
    tint = np.sin((x - t) / 15) * np.cos((y + t) / 13)
    colours = 80 * light[..., None] + 25 * tint[..., None] * np.array([1, 0.2, -1])
    pixels = 128 + colours + rng.normal(0, 2, (frames, height, width, 3))
    return pixels.clip(0, 255).astype(np.uint8)


def noise(samples=20000, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(-32768, 32768, samples, dtype=np.int16)


def psnr(a, b):
    """Mean over frames of the PSNR in dB."""
    error = np.square(a.astype(np.float64) - b).mean(axis=(1, 2, 3))
    return np.mean(10 * np.log10(255**2 / error))


@pytest.fixture(scope="module")
def payload():
    return encode(Clip(iter(moving_picture()), 25.0, noise()), "a/clip.mp4", (2, 0))


def test_round_trip(payload):
    record = Record(payload)
    assert (record.id, record.labels) == ("a/clip.mp4", (2, 0))
    assert (record.num_frames, record.height, record.width) == (70, 48, 64)
    assert (record.fps, record.has_rgb, record.has_audio) == (25.0, True, True)
    assert (record.sample_rate, record.num_samples) == (16000, 20000)
    np.testing.assert_array_equal(record.waveform(), noise())
    assert abs(record.facts["rms_dbfs"] - 20 * np.log10(1 / np.sqrt(3))) < 0.1


@pytest.mark.parametrize("kind", ["h264", "jpeg"])
@pytest.mark.parametrize("fps", [25.0, 30000 / 1001, 14.985, 0.5])
def test_random_access_is_exact_and_faithful(kind, fps):
    source = moving_picture()
    record = Record(encode(Clip(source, fps, None), "clip", frames=kind))
    everything = record.frames(range(70))
    assert psnr(source, everything) >= 35
    rng = np.random.default_rng(1)
    for wanted in (
        [],
        [69],
        [15, 16],
        [0, 69],
        [5, 5, 60, 3],
        range(2, 63, 4),
        rng.permutation(70),
    ):
        np.testing.assert_array_equal(record.frames(wanted), everything[list(wanted)])
        part = record.frames(wanted, (3, 20, 31, 15))
        np.testing.assert_array_equal(part, everything[list(wanted), 3:34, 20:35])
    for wanted in ([70], [-1]):
        with pytest.raises(IndexError):
            record.frames(wanted)


@pytest.mark.parametrize("kind", ["h264", "jpeg"])
def test_a_part_of_the_sound_is_what_it_is_in_the_whole(kind):
    record = Record(encode(Clip(moving_picture(1), 25.0, noise()), "x", frames=kind))
    for start, stop in ((0, 20000), (0, 1), (4099, 9000), (19999, None), (500, 500)):
        part = record.waveform(start, stop)
        np.testing.assert_array_equal(part, noise()[start:stop])
        assert part.dtype == np.int16
    magic = {"h264": b"fLaC", "jpeg": b"RIFF"}[kind]
    assert record._fields["audio"].startswith(magic)


def test_no_more_is_decoded_than_the_wanted_frames_need(payload, monkeypatch):
    """Groups of 16: others refer to frames 4, 8, 12 and 15 alone."""
    decoded = []
    whole = Record._frames_of

    def counting(self, *arguments):
        for index, frame in whole(self, *arguments):
            decoded.append(index)
            yield index, frame

    monkeypatch.setattr(Record, "_frames_of", counting)
    Record(payload).frames([20, 66])
    assert decoded == [16, 20, 64, 66]
    decoded.clear()
    Record(payload).frames([31, 49])
    assert decoded == [16, 20, 24, 28, 31, 48, 49]


def test_frames_as_they_were_coded_are_encoded_like_pictures():
    """In the types that the encoder chooses, whichever those of their file were."""
    first = Record(encode(Clip(moving_picture(), 25.0, None), "clip"))
    with av.open(io.BytesIO(first._fields["video"])) as container:
        frames = list(container.decode(video=0))
    again = Record(encode(Clip(iter(frames[5:]), 25.0, None), "clip"))
    assert (again.num_frames, again.height, again.width) == (65, 48, 64)
    assert psnr(first.frames(range(5, 70)), again.frames(range(65))) > 36
    with av.open(io.BytesIO(again._fields["video"])) as container:
        keys = [x.pts * x.time_base for x in container.decode(video=0) if x.key_frame]
    assert [round(25 * at) for at in keys] == [0, 16, 32, 48, 64]


def test_threads_read_the_same_record_alike(payload):
    record = Record(payload)
    everything = record.frames(range(70))
    wanted = [np.random.default_rng(i).integers(0, 70, 8) for i in range(24)]
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        for indices, frames in zip(
            wanted, threads.map(record.frames, wanted), strict=True
        ):
            np.testing.assert_array_equal(frames, everything[indices])


def test_encoding_is_deterministic_and_streams():
    clip = lambda frames: encode(Clip(frames, 25.0, noise()), "clip")
    assert clip(moving_picture()) == clip(iter(moving_picture()))
    # x264's mbtree failed here, at this size, in one run of ten.
    small = moving_picture(12, height=96, width=64)
    assert len({clip(small) for _ in range(40)}) == 1


@pytest.mark.parametrize("waveform", [None, np.zeros(0, np.int16)])
def test_picture_without_sound(waveform):
    record = Record(encode(Clip(moving_picture(3), 25.0, waveform), "clip"))
    assert (record.has_rgb, record.has_audio, record.num_samples) == (True, False, 0)
    assert record.waveform().shape == (0,) and record.facts["rms_dbfs"] is None


@pytest.mark.parametrize("frames", [None, iter(())])
def test_sound_without_picture(frames):
    record = Record(encode(Clip(frames, 0.0, noise()), "clip"))
    assert (record.has_rgb, record.has_audio) == (False, True)
    assert (record.num_frames, record.height, record.fps) == (0, 0, 0.0)
    np.testing.assert_array_equal(record.waveform(), noise())
    with pytest.raises(IndexError):
        record.frames([0])


def test_silence_is_sound_without_loudness():
    record = Record(encode(Clip(None, 0.0, np.zeros(100, np.int16)), "clip"))
    assert record.has_audio and record.facts["rms_dbfs"] is None


def test_a_clip_of_no_known_kind_is_refused():
    with pytest.raises(ValueError, match="png"):
        encode(Clip(moving_picture(1), 25.0, None), "clip", frames="png")


@pytest.mark.parametrize("part", ["video", "audio", "jpeg"])
def test_damage_inside_a_record_is_named(payload, part):
    if part == "jpeg":
        clip = Clip(moving_picture(1), 25.0, noise())
        payload = encode(clip, "a/clip.mp4", frames="jpeg")
    example = records.Example.FromString(payload)
    values = example.features.feature[part].bytes_list
    values.value[0] = values.value[0][: len(values.value[0]) // 2]
    record = Record(example.SerializeToString(), "set: record 7 of train")
    read = dict(video=lambda: record.frames([69]), jpeg=lambda: record.frames([0]))
    read = dict(read, audio=record.waveform)[part]
    with pytest.raises(
        RecordError, match="record 7 of train .a/clip.mp4.: its .*damaged"
    ):
        read()


def test_flipped_bits_in_the_picture_never_pass_as_another_number_of_frames(payload):
    rng = np.random.default_rng(0)
    video = records.Example.FromString(payload).features.feature["video"]
    for _ in range(20):
        example = records.Example.FromString(payload)
        data = bytearray(video.bytes_list.value[0])
        data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        example.features.feature["video"].bytes_list.value[0] = bytes(data)
        try:
            frames = Record(example.SerializeToString()).frames(range(70))
            assert frames.shape == (70, 48, 64, 3)
        except RecordError:
            pass


@pytest.mark.parametrize("junk", [b"\xff\xff\xff", b"", b"text"])
def test_a_payload_that_is_no_clip_is_named(junk):
    with pytest.raises(RecordError, match="set: record 3"):
        Record(junk, "set: record 3").num_frames  # noqa: B018


# ------------------------------------------------------------------ a folder of shards


def write_folder(directory, lengths=(3, 0, 2), kind="h264"):
    """A data set `set` with one split; clip i has i frames (the first no picture)."""
    folder = directory / "set" / records.VERSION
    folder.mkdir(parents=True)
    numbers, index, checksums = itertools.count(), [], {}
    for shard, length in enumerate(lengths):
        payloads = []
        for number in itertools.islice(numbers, length):
            clip = Clip(
                moving_picture(number), 25.0 if number else 0.0, noise(100, number)
            )
            payloads.append(encode(clip, f"{number}.mp4", (number % 2,), frames=kind))
            index.append(records.index_entry(Record(payloads[-1])))
        name = records.shard_name("set", "train", shard, len(lengths))
        records.write_shard(folder / name, payloads)
        checksums[name] = storage.checksum(folder / name)
    records.write_jsonl(folder / records.index_name("train"), index)
    info = dict(
        format=records.FORMAT, name="set", labels=["a", "b"], checksums=checksums
    )
    info["splits"] = dict(train=dict(clips=sum(lengths), shard_lengths=list(lengths)))
    records.write_metadata(folder, info)
    return folder


def test_records_of_a_folder(tmp_path):
    folder = write_folder(tmp_path)
    assert sorted(path.name for path in folder.glob("set-*")) == [
        f"set-train.array_record-0000{i}-of-00003" for i in range(3)
    ]
    data = Records(tmp_path, "train")
    assert data.folder == Records(folder, "train").folder == folder
    assert len(data) == len(data.index) == 5 and data.info["labels"] == ["a", "b"]
    for i, entry in enumerate(data.index):
        record = Record(data[i])
        assert entry["id"] == record.id == f"{i}.mp4"
        assert entry["num_frames"] == record.num_frames == i
        assert entry["labels"] == list(record.labels) == [i % 2]
        assert (entry["has_rgb"], entry["has_audio"]) == (i > 0, True)
    copy = pickle.loads(pickle.dumps(data))
    assert [copy[i] for i in range(5)] == [data[i] for i in range(5)]
    for outside in (5, -1):
        with pytest.raises(IndexError):
            data[outside]


def test_few_readers_stay_open(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "OPEN_SHARDS", 2)
    write_folder(tmp_path, (1, 1, 1, 1))
    data = Records(tmp_path, "train")
    assert [Record(data[i]).id[0] for i in (0, 1, 2, 3, 0)] == list("01230")
    assert len(data._readers) == 2


def test_what_is_not_there_is_told_with_the_command(tmp_path):
    command = f"python -m data.prepare SOURCE --out {tmp_path}"
    with pytest.raises(RecordError, match="is not there") as error:
        Records(tmp_path, "train")
    assert f"`{command}`" in str(error.value)
    folder = write_folder(tmp_path)
    with pytest.raises(RecordError, match="no split 'test', only train"):
        Records(tmp_path, "test")
    (folder / "settings.json").touch()
    (folder / "dataset.json").unlink()
    with pytest.raises(RecordError, match=f"is not finished; go on with `{command}"):
        Records(tmp_path, "train")


def test_several_data_sets_in_a_folder_are_ambiguous(tmp_path):
    folder = write_folder(tmp_path)
    folder.parent.with_name("other").mkdir()
    (folder.parent.with_name("other") / records.VERSION).symlink_to(folder)
    with pytest.raises(RecordError, match="several data sets"):
        Records(tmp_path, "train")


def test_damaged_files_are_named_with_the_place(tmp_path):
    folder = write_folder(tmp_path)
    data = Records(tmp_path, "train")
    path = folder / "set-train.array_record-00000-of-00003"
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[whole.index(data[1]) + len(data[1]) // 2] ^= 1
    path.write_bytes(flipped)
    damaged = Records(tmp_path, "train")
    assert [damaged[i] for i in (0, 2)] == [data[i] for i in (0, 2)]
    with pytest.raises(RecordError, match=r"00000-of-00003: record 1 \(1.mp4\)"):
        damaged[1]
    for size in (0, len(whole) // 4):
        path.write_bytes(whole[:size])
        with pytest.raises(RecordError, match=r"00000-of-00003: record 2 \(2.mp4\)"):
            Records(tmp_path, "train")[2]
    path.unlink()
    with pytest.raises(RecordError, match=r"00000-of-00003: record 2 \(2.mp4\)"):
        Records(tmp_path, "train")[2]


def test_a_damaged_index_or_info_is_named(tmp_path):
    folder = write_folder(tmp_path)
    index = folder / records.index_name("train")
    lines = index.read_text().splitlines(keepends=True)
    index.write_text("".join(lines[:-1]))
    with pytest.raises(RecordError, match="lists 4 of 5 records"):
        Records(tmp_path, "train")
    index.write_text("".join(lines)[:-5])
    with pytest.raises(RecordError, match="index-train.jsonl: cannot be read"):
        Records(tmp_path, "train")
    (folder / "dataset.json").write_text('{"format": 2}')
    with pytest.raises(RecordError, match="its format is 2, not 1"):
        Records(tmp_path, "train")


def test_a_shard_is_whole_or_not_there(tmp_path):
    def payloads():
        yield b"first"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        records.write_shard(tmp_path / "shard", payloads())
    assert not (tmp_path / "shard").exists()


def test_writing_is_deterministic(tmp_path):
    first = write_folder(tmp_path / "1")
    second = write_folder(tmp_path / "2")
    names = sorted(os.listdir(first))
    assert names == sorted(os.listdir(second)) and len(names) == 7
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["h264", "jpeg"])
def test_tfds_opens_the_folder(tmp_path, kind):
    import tensorflow_datasets as tfds

    folder = write_folder(tmp_path, kind=kind)
    source = tfds.builder_from_directory(folder).as_data_source("train")
    data = Records(tmp_path, "train")
    assert len(source) == len(data) == 5
    for i in range(5):
        record, example = Record(data[i]), source[i]
        assert example["id"].decode() == record.id
        assert list(example["labels"]) == list(record.labels)
        assert example["num_frames"] == record.num_frames == i
        assert bool(example["has_rgb"]) == record.has_rgb
        assert example["fps"] == record.fps
        assert example["video"] == record._fields["video"]
        assert list(example["jpeg"]) == list(record._fields["jpeg"])
        assert example["audio"] == record._fields["audio"]


@pytest.mark.parametrize("kind", ["h264", "jpeg"])
def test_the_bytes_are_those_of_protobuf(kind):
    for frames in (2, 40):
        payload = encode(Clip(moving_picture(frames), 25.0, noise()), "x", frames=kind)
        example = records.Example.FromString(payload)
        assert len(example.features.feature) == 14
        assert sorted(example.SerializeToString()) == sorted(payload)


@pytest.mark.slow
def test_tensorflow_parses_the_example(payload):
    import tensorflow as tf

    features = tf.train.Example.FromString(payload).features.feature
    assert features["id"].bytes_list.value[0] == b"a/clip.mp4"
    assert list(features["labels"].int64_list.value) == [2, 0]
    assert features["fps"].float_list.value[0] == 25.0
    assert features["video"].bytes_list.value[0] == Record(payload)._fields["video"]
    wanted = dict(audio=tf.io.FixedLenFeature([], tf.string))
    parsed = tf.io.parse_single_example(payload, wanted)
    assert parsed["audio"].numpy() == Record(payload)._fields["audio"]


# ------------------------------------------------------------------------- real clips


@pytest.mark.skipif(not CLIPS.is_dir(), reason="the development clips are not here")
def test_real_clips_keep_35_db_on_average():
    names = ("bigbuckbunny_5.1.mp4", "mmaction_test.avi", "rabbit320.webm")
    values = [real_psnr(CLIPS / name) for name in names]
    assert min(values) >= 33.5 and np.mean(values) >= 35


def real_psnr(path):
    """PSNR of the first 64 frames, scaled alike, after a round trip."""
    with av.open(str(path)) as container:
        source = []
        for frame in itertools.islice(container.decode(video=0), 64):
            scale = min(1, 256 / min(frame.height, frame.width))
            size = [round(side * scale / 2) * 2 for side in (frame.width, frame.height)]
            source.append(frame.reformat(*size, "rgb24", interpolation="BICUBIC"))
    source = np.stack([frame.to_ndarray() for frame in source])
    record = Record(encode(Clip(source, 25.0, None), path.name))
    return psnr(source, record.frames(range(64)))
