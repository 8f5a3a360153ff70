"""TFDS data sets as a source: some that TFDS itself builds here."""

import json
import pickle
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from test_pipeline import CONFIG

from data import RecordError, pipeline, tfds_source

CLASSES = ("bell", "drum", "owl")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def clip(number):
    """(frames, sound): 12 to 15 frames in one colour each; sound but for clip 1."""
    rng = np.random.default_rng(number)
    frames = np.zeros((12 + number % 4, 16, 24, 3), np.uint8)
    frames[:] = rng.integers(0, 256, (len(frames), 1, 1, 3))
    sound = rng.integers(-32768, 32768, 0 if number == 1 else 800)
    return frames, sound.astype(np.int64)


def build(folder, name="toys", file_format="array_record", features=None):
    """A data set of 6 training and 2 test clips, as TFDS writes it."""
    import importlib.resources.abc

    import tensorflow_datasets as tfds

    # TFDS 4.9.10 imports this without asking for it; it is the standard library's.
    sys.modules.setdefault("importlib_resources", importlib.resources)
    features = features or {
        "video": tfds.features.Video(shape=(None, 16, 24, 3)),
        "audio": tfds.features.Audio(sample_rate=1600),
        "label": tfds.features.ClassLabel(names=CLASSES),
        "video_id": tfds.features.Text(),
    }

    def generate(numbers):
        for i in numbers:
            frames, sound = clip(i)
            made = dict(video=frames, audio=sound, video_id=f"clip{i}", label=i % 3)
            made["audio2"] = np.stack([sound / 32768, sound / 65536], 1)
            made["labels"] = [i % 3, (i + 1) % 3] if i else []
            yield i, {key: made[key] for key in features}

    builder = tfds.dataset_builders.store_as_tfds_dataset(
        name=name,
        version="1.0.0",
        features=tfds.features.FeaturesDict(features),
        split_datasets={"train": generate(range(6)), "test": generate(range(6, 8))},
        data_dir=folder,
        file_format=file_format,
    )
    return builder.data_dir


def load(where, split="train", source="tfds", **options):
    config = SimpleNamespace(**CONFIG | dict(dir=str(where), source=source, size=8))
    return pipeline.load(config, split, sample_rate=1600, **options)


@pytest.mark.slow
def test_pictures_sound_labels_and_names_come_through(tmp_path, monkeypatch):
    folder = build(tmp_path)
    records = tfds_source.Records(folder, "train", 12.5, 16000)
    assert len(records) == 6 and records.info["labels"] == list(CLASSES)
    assert sorted(entry["id"] for entry in records.index) == [
        f"clip{i}" for i in range(6)
    ]
    for number, entry in enumerate(records.index):
        i = int(entry["id"].removeprefix("clip"))
        record, (frames, sound) = records.record(number), clip(i)
        assert (record.labels, record.fps) == ((i % 3,), 12.5)
        assert (record.height, record.width) == (16, 24)
        assert record.num_frames == entry["num_frames"] == len(frames)
        wanted = [3, 0, 3, len(frames) - 1]
        np.testing.assert_array_equal(record.frames(wanted), frames[wanted])
        np.testing.assert_array_equal(record.waveform(), sound)
        assert entry["has_audio"] == (i != 1)
    other = pickle.loads(pickle.dumps(records))
    assert other[2] == records[2] and other.index == records.index
    # The list is made once.
    monkeypatch.setattr(tfds_source.Records, "_entry", None)
    assert tfds_source.Records(folder, "train").index == records.index
    batch = next(load(folder, label="class").evaluate(6))
    assert batch["rgb"].shape == (6, 1, 4, 8, 8, 3)
    assert batch["has_audio"].sum() == 5 and not (batch["label"] - batch["index"]).all()
    # By name, from where TFDS keeps its data.
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(tfds_source.Records, "_entry", None)
    with pytest.raises(
        RecordError, match="has no split 'validation', only train, test"
    ):
        tfds_source.Records(folder, "validation")
    with pytest.raises(RecordError, match="tfds:no_such_set: TFDS cannot open it"):
        load("tfds:no_such_set", source="records")


@pytest.mark.slow
def test_several_labels_floats_and_no_picture(tmp_path):
    import tensorflow_datasets as tfds

    folder = build(
        tmp_path,
        features={
            "audio2": tfds.features.Audio(shape=(None, 2), dtype=np.float32),
            "labels": tfds.features.Sequence(tfds.features.ClassLabel(names=CLASSES)),
        },
    )
    records = tfds_source.Records(folder, "test", 25.0, 8000)
    assert [entry["id"] for entry in records.index] == ["test/0", "test/1"]
    record = records.record(0)
    assert (record.has_rgb, record.sample_rate, len(record.labels)) == (False, 8000, 2)
    expected = [np.rint(clip(i)[1] * 0.75) for i in (6, 7)]
    found = record.waveform()
    assert any(np.abs(found - sound).max() <= 1 for sound in expected)


@pytest.mark.slow
def test_what_cannot_be_read_is_told(tmp_path):
    import tensorflow_datasets as tfds

    folder = build(tmp_path, file_format="tfrecord")
    with pytest.raises(RecordError, match="is built as tfrecord.*file_format=array_re"):
        tfds_source.Records(folder, "train")
    text = {"video_id": tfds.features.Text()}
    with pytest.raises(RecordError, match="neither a Video nor an Audio .*video_id"):
        tfds_source.Records(build(tmp_path, "texts", features=text), "train")
    with pytest.raises(RecordError, match="TFDS cannot open it"):
        tfds_source.Records(tmp_path / "nowhere", "train")


def test_a_data_set_runs_nothing_of_its_own(tmp_path, monkeypatch):
    (tmp_path / "payload.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    info = {"name": "toys", "version": "1.0.0", "fileFormat": "array_record"}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    evil = {"pythonClassName": "payload.X", "jsonFeature": {"json": "{}"}}
    inner = {"features": {"a": evil}}
    own = "tensorflow_datasets.core.features.features_dict.FeaturesDict"
    for features in (
        evil,
        {"type": "payload.X", "content": "{}"},
        {"pythonClassName": own, "featuresDict": inner},
    ):
        (tmp_path / "features.json").write_text(json.dumps(features))
        with pytest.raises(RecordError, match="names 'payload.X', no feature of TFDS"):
            tfds_source.Records(tmp_path, "train")
    assert not (tmp_path / "ran").exists()
    with pytest.raises(RecordError, match="community data set, whose code"):
        tfds_source.Records("tfds:somebody:toys", "train")


def test_a_record_that_is_damaged_is_named():
    layout = tfds_source.Layout(picture="video", sound="audio")
    entry = tfds_source.Entry("clip", (), 1, 1)
    record = tfds_source.Record(b"\xff\xff", "set: record 3", entry, layout, 25.0, 1600)
    with pytest.raises(RecordError, match="set: record 3: cannot be used .no tf.train"):
        record.waveform()
    example = tfds_source.Example()
    example.features.feature["video"].bytes_list.value.append(b"no picture")
    example.features.feature["audio"].float_list.value.append(np.nan)
    payload = example.SerializeToString()
    record = tfds_source.Record(payload, "set: record 3", entry, layout, 25.0, 1600)
    with pytest.raises(RecordError, match="set: record 3: .*its picture"):
        record.frames([0])
    with pytest.raises(RecordError, match="set: record 3: .*no finite number"):
        record.waveform()
