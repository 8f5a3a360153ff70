"""Batches: shapes, order, processes, views, missing modalities, words of errors."""

import ast
import hashlib
import logging
import platform
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from ml_collections import ConfigDict

from data import (
    Clip,
    ConfigError,
    RecordError,
    pipeline,
    records,
    sampling,
    sources,
    storage,
    transforms,
)

ROOT = Path(__file__).resolve().parents[1]
RATE = 1600
CONFIG = dict(
    dir="toys",
    split="train",
    fps=25.0,
    num_frames=4,
    stride=2,
    sampling="dense",
    size=8,
    short_side=8,
    crop="random",
    audio_seconds=0.5,
    audio_align="proportional",
    samples_per_clip=1,
    views=1,
    crops=1,
    threads=2,
    workers=0,
    cache=False,
    resize="antialias",
    missing_modalities=True,
    limit=0,
    source="records",
    skip_bad_records=0,
    prepared=dict(fps="", short_side=""),
    randaugment="",
)


class FakeRecord:
    """50 frames of 8 × 12; each pixel says (record, frame, column); sound counts up."""

    def __init__(self, number, entry):
        self.number, self.labels = number, entry["labels"]
        self.has_rgb, self.has_audio = entry["has_rgb"], entry["has_audio"]
        self.num_frames, self.fps = entry["num_frames"], 25.0
        self.height, self.width, self.sample_rate = 8, 12, RATE
        self.num_samples = 3200 if self.has_audio else 0
        self.decoded, self.boxes, self.heard = [], [], []

    def frames(self, indices, box=None):
        self.decoded.append(list(indices))
        self.boxes.append(box)
        frames = np.empty((len(indices), 8, 12, 3), np.uint8)
        frames[..., 0] = self.number
        frames[..., 1] = np.asarray(indices)[:, None, None]
        frames[..., 2] = np.arange(12)
        return transforms.cut_out(frames, box)

    def waveform(self, start=0, stop=None):
        self.heard.append((start, stop))
        return np.arange(3200, dtype=np.int16)[start:stop]


class FakeRecords:
    """Record i belongs to class i % 3; those named lack their picture or sound."""

    def __init__(self, size=10, silent=(), blind=()):
        self.index = [
            dict(
                id=f"clip{i}",
                labels=(i % 3,),
                has_rgb=i not in blind,
                has_audio=i not in silent,
                num_frames=0 if i in blind else 50,
            )
            for i in range(size)
        ]
        self.info = dict(
            labels=["a", "b", "c"],
            settings=dict(fps=25, sample_rate=RATE),
            checksums={
                "x-train.array_record-00001-of-00002": dict(sha256="bb", size=1),
                "x-train.array_record-00000-of-00002": dict(sha256="aa", size=1),
                "features.json": dict(sha256="00", size=1),
            },
        )
        self.records, self.damaged = [FakeRecord(*p) for p in enumerate(self.index)], ()

    def __len__(self):
        return len(self.records)

    def record(self, number):
        return self.records[number]


@pytest.fixture
def load(monkeypatch):
    """`pipeline.load` on fake records; `config` fields by keyword."""

    def load(records=None, split="train", config=(), **kwargs):
        records = records or FakeRecords()
        monkeypatch.setattr(sources, "Records", lambda *where: records)
        config = SimpleNamespace(**(CONFIG | dict(config)))
        return pipeline.load(config, split, sample_rate=RATE, **kwargs)

    return load


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A real data set: 6 clips of 40 frames, 32 × 48, and 1.6 s of sound, 2 shards."""
    folder = tmp_path_factory.mktemp("prepared") / "toys/1.0.0"
    folder.mkdir(parents=True)
    payloads, names = [], [records.shard_name("toys", "train", i, 2) for i in range(2)]
    for i in range(6):
        frames = np.random.default_rng(i).integers(0, 256, (40, 4, 6, 3), np.uint8)
        frames = frames.repeat(8, axis=1).repeat(8, axis=2)
        clip = Clip(frames, 25.0, np.arange(2560, dtype=np.int16) * (i + 1), RATE)
        payloads.append(records.encode(clip, f"clip{i}", (i % 3,)))
    for name, share in zip(names, (payloads[:4], payloads[4:]), strict=True):
        records.write_shard(folder / name, share)
    index = [records.index_entry(records.Record(payload)) for payload in payloads]
    records.write_jsonl(folder / records.index_name("train"), index)
    info = FakeRecords().info | dict(format=1, name="toys")
    info["splits"] = dict(train=dict(shard_lengths=[4, 2]))
    info["checksums"] = {name: storage.checksum(folder / name) for name in names}
    records.write_metadata(folder, info)
    return folder.parents[1]


def load_prepared(folder, **fields):
    config = CONFIG | dict(dir=str(folder), size=24, short_side=32) | fields
    return pipeline.load(ConfigDict(config), "train", sample_rate=RATE)


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def equal(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for key in batch:
            np.testing.assert_array_equal(batch[key], other[key])


def test_training_batch_is_the_table_of_the_design(load):
    dataset = load(label="class", config=dict(samples_per_clip=3))
    (batch,) = take(dataset.train(5), 1)
    assert {key: (value.shape, str(value.dtype)) for key, value in batch.items()} == {
        "rgb": ((5, 3, 4, 8, 8, 3), "uint8"),
        "waveform": ((5, 3, 800), "int16"),
        "has_rgb": ((5,), "bool"),
        "has_audio": ((5,), "bool"),
        "label": ((5,), "int32"),
        "index": ((5,), "int64"),
        "valid": ((5,), "bool"),
    }
    assert batch["valid"].all() and batch["has_rgb"].all() and batch["has_audio"].all()
    np.testing.assert_array_equal(batch["label"], batch["index"] % 3)
    np.testing.assert_array_equal(
        batch["rgb"][..., 0] - batch["index"][:, None, None, None, None], 0
    )


def test_a_window_is_one_crop_and_its_sound_the_same_share_of_the_clip(load):
    (batch,) = take(load(config=dict(samples_per_clip=2)).train(10), 1)
    frames, columns = batch["rgb"][..., 0, 0, 1], batch["rgb"][..., 0, :, 2]
    starts = frames[..., 0].astype(int)
    np.testing.assert_array_equal(np.diff(frames.astype(int)), 2)
    np.testing.assert_array_equal(batch["waveform"][..., 0], starts * 64)  # 3200 / 50
    np.testing.assert_array_equal(np.diff(batch["waveform"].astype(int)) % 3200, 1)
    assert (columns == columns[:, :, :1]).all()  # all frames of a window alike
    assert len(set(columns[..., 0, 0].ravel())) > 1  # windows differ
    assert (starts[:, 0] != starts[:, 1]).any()


@pytest.mark.parametrize("crop", ["random", "jitter", "multiscale", "resized"])
@pytest.mark.parametrize("method", ["antialias", "bilinear"])
def test_every_crop_is_one_draw_for_all_frames(load, crop, method):
    config = dict(crop=crop, resize=method, samples_per_clip=2, size=6, threads=0)
    (batch,) = take(load(config=config).train(10), 1)
    assert batch["rgb"].shape == (10, 2, 4, 6, 6, 3)
    columns = batch["rgb"][..., 2]
    assert (columns == columns[:, :, :1]).all()
    assert (columns[:, 0, 0] != columns[:, 1, 0]).any()  # windows differ
    assert (np.diff(columns.astype(int)) >= 0).all() and columns.max() <= 11
    numbers = batch["index"][:, None, None, None, None]  # flat, so scaling keeps them
    assert np.abs(batch["rgb"][..., 0] - numbers.astype(int)).max() <= 1
    starts = batch["rgb"][..., 0, 0, 1].astype(int)
    assert np.abs(np.diff(starts) - 2).max() <= 1  # still frames at the stride


def test_randaugment_sees_whole_frames_once_for_a_window(load, monkeypatch):
    """In training alone; what moves in is grey, so that crops show what was outside."""
    config = dict(samples_per_clip=2, threads=0, randaugment="rand-m9-n3-inc1")
    augmented, plain = (load(config=c) for c in (config, config | dict(randaugment="")))
    (real,), (again,) = (take(augmented.train(10), 1) for _ in range(2))
    equal([real], [again])
    equal(list(augmented.evaluate(4)), list(plain.evaluate(4)))
    (usual,) = take(plain.train(10), 1)
    assert (real["rgb"] != usual["rgb"]).any((2, 3, 4, 5)).mean() > 0.5
    drawn = []
    moved = [("Invert", None), ("TranslateX", 0.5)]  # by 6 of 12
    draw = lambda policy, rng: drawn.append(policy) or moved
    monkeypatch.setattr("data.randaugment.draw", draw)
    (batch,) = take(augmented.train(10), 1)
    assert drawn == [(9.0, 3, 0.0, True)] * 20
    np.testing.assert_array_equal(batch["waveform"], usual["waveform"])
    inside = usual["rgb"][..., 2] < 6  # the column in the record
    wanted = np.where(inside[..., None], 255 - usual["rgb"] - [0, 0, 6], 128)
    np.testing.assert_array_equal(batch["rgb"], wanted)


@pytest.mark.parametrize("crop", ["multiscale", "resized"])
def test_scaling_crops_see_the_stored_pictures(load, crop):
    """Not those resized to the short side, in memory either; evaluation does."""
    config = dict(crop=crop, short_side=16, size=16, threads=0)
    plain, cached = (load(config=config | dict(cache=c)) for c in (False, True))
    equal(take(plain.train(4), 5), take(cached.train(4), 5))
    sizes = {kept.pictures.shape for kept in cached._reader.kept.values()}
    assert sizes == {(50, 8, 12, 3)}
    equal(list(plain.evaluate(4)), list(cached.evaluate(4)))
    assert next(plain.evaluate(4))["rgb"].shape == (4, 1, 4, 16, 16, 3)


@pytest.mark.parametrize("sampled", sampling.SAMPLINGS)
def test_rules_for_frames_reach_the_batch(load, sampled):
    dataset = load(config=dict(sampling=sampled, stride=20, views=2))
    rule = sampling.SAMPLINGS[sampled]
    (batch,) = take(dataset.train(10), 1)
    frames = batch["rgb"][:, 0, :, 0, 0, 1].astype(int)
    if sampled == "segments":  # 4 parts of 12 frames, the last 2 unused
        assert (frames // 12 == np.arange(4)).all()
    if sampled == "held":
        assert (frames == [0, 20, 40, 40]).all()
    if sampled == "stretched":
        assert (frames == [0, 49, 49, 49]).all()
    if sampled == "dense":
        assert (frames == [0, 20, 40, 10]).all()
    batch = next(dataset.evaluate(1))
    expected = np.stack(rule.views(50, 2, 4, 20)) % 50
    np.testing.assert_array_equal(batch["rgb"][0, :, :, 0, 0, 1], expected)


@pytest.mark.parametrize("sampled", sampling.SAMPLINGS)
def test_samples_by_videomaes_rules_are_crops_of_one_window(load, sampled):
    config = dict(sampling=sampled, stride=9, samples_per_clip=2, size=6, threads=0)
    (batch,) = take(load(config=config).train(10), 1)
    times, columns = batch["rgb"][:, :, :, 0, 0, 1], batch["rgb"][:, :, 0, 0, 0, 2]
    same = (times[:, 0] == times[:, 1]).all()
    assert same == (sampled in ("stretched", "segments"))
    assert same == (batch["waveform"][:, 0] == batch["waveform"][:, 1]).all()
    assert (columns[:, 0] != columns[:, 1]).any()


def test_the_middle_of_three_crops_rounds_as_its_system_does(load):
    for sampled, left in (("dense", 2), ("held", 1), ("segments", 1)):
        dataset = load(config=dict(sampling=sampled, crops=3, size=7, short_side=7))
        batch = next(dataset.evaluate(1))  # 7 × 10 from 8 × 12
        columns = batch["rgb"][0, :, 0, 0, :, 2].astype(int)
        whole = transforms.resize(FakeRecords().records[0].frames([0]), 7, "antialias")
        np.testing.assert_array_equal(columns[1], whole[0, 0, left : left + 7, 2])


def test_samples_of_a_clip_come_from_one_decode(load):
    records = FakeRecords(1)
    take(load(records, config=dict(samples_per_clip=3, threads=0)).train(1), 1)
    ((indices,),) = [record.decoded for record in records.records]
    assert indices == sorted(set(indices)) and len(indices) > 4


def test_no_more_is_decoded_than_the_windows_need(load):
    records = FakeRecords(1)
    config = dict(samples_per_clip=2, threads=0, size=6, audio_align="window")
    dataset = load(records, config=config)
    batches, (record,) = take(dataset.train(1), 12), records.records
    for batch, box, heard in zip(batches, record.boxes, record.heard, strict=True):
        columns = batch["rgb"][..., 2]
        assert box[1] == columns.min() and box[1] + box[3] == columns.max() + 1
        sound, (start, stop) = batch["waveform"], heard
        if stop is not None:
            assert (start, stop) == (sound.min(), sound.max() + 1)
    looped = [stop is None for _, stop in record.heard]
    assert 0 < sum(looped) < len(looped)
    for other in (dict(randaugment="rand-m9-n3-inc1"), dict(crop="jitter")):
        take(load(records, config=config | other).train(1), 1)
        assert record.boxes.pop() is None
    larger = dict(size=16, threads=0)  # scaled up as a whole
    take(load(records, config=larger).train(1), 1)
    assert record.boxes[12:] == [None]


def test_the_memory_of_a_batch_is_kept():
    code = (
        "import resource\n"
        "from data import pipeline\n"
        "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "def use():\n"
        "    before = faults()\n"
        "    for _ in range(8):\n"
        "        blocks = [bytearray(b'x') * (20 << 20) for _ in range(2)]\n"
        "    return faults() - before\n"
        "usual = use()\n"
        "pipeline._keep_memory()\n"
        "use()\n"
        "print(usual, use())\n"
    )
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True
    )
    usual, kept = map(int, done.stdout.split())
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("only glibc is asked to")
    assert kept < usual / 10, done.stderr


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_start_at_a_step_is_what_an_uninterrupted_run_gets(load, threads):
    whole = take(load().train(4), 9)
    later = load(config=dict(threads=threads)).train(4, step=5)
    equal(take(later, 4), whole[5:])


def test_epochs_hold_every_clip_once_in_another_order(load):
    batches = take(load().train(5), 4)
    epochs = np.concatenate([batch["index"] for batch in batches]).reshape(2, 10)
    np.testing.assert_array_equal(np.sort(epochs), [np.arange(10)] * 2)
    assert (epochs[0] != epochs[1]).any()
    other = take(load(seed=1).train(5), 2)
    assert (np.concatenate([batch["index"] for batch in other]) != epochs[0]).any()


def test_processes_share_the_global_batch(load):
    """Together they are the batches of one process: clips and random numbers."""
    whole = take(load().train(4), 5)
    halves = [take(load(process=(p, 2)).train(4), 5) for p in range(2)]
    for k in range(2):
        equal([{key: b[key][k::2] for key in b} for b in whole], halves[k])
    clips = [np.concatenate([batch["index"] for batch in half]) for half in halves]
    assert sorted(np.concatenate(clips)[:]) == sorted(list(range(10)) * 2)
    windows = [np.stack([b["waveform"][:, 0, 0] for b in half]) for half in halves]
    assert (windows[0] != windows[1]).any()


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_evaluation_is_each_clip_once_in_order(load, processes):
    config = dict(views=2, crops=3)
    parts = [
        list(load(config=config, process=(p, processes)).evaluate(8))
        for p in range(processes)
    ]
    assert [len(part) for part in parts] == [2] * processes
    index = [np.concatenate([b["index"] for b in part]) for part in parts]
    valid = [np.concatenate([b["valid"] for b in part]) for part in parts]
    assert np.stack(index, 1).ravel().tolist() == [*range(10)] + [-1] * 6
    assert np.stack(valid, 1).ravel().tolist() == [True] * 10 + [False] * 6
    last = parts[-1][-1]
    assert last["rgb"].shape == (8 // processes, 6, 4, 8, 8, 3)
    assert not last["rgb"][~last["valid"]].any()
    assert not last["has_audio"][~last["valid"]].any()


def test_views_are_spread_and_crops_are_fastest(load):
    dataset = load(config=dict(views=3, crops=3))
    batch = next(dataset.evaluate(2))
    starts, left = batch["rgb"][1, :, 0, 0, 0, 1], batch["rgb"][1, :, 0, 0, 0, 2]
    assert starts.tolist() == [0] * 3 + [21] * 3 + [42] * 3
    assert left.tolist() == [0, 2, 4] * 3
    assert batch["waveform"][1, :, 0].tolist() == [0] * 3 + [1200] * 3 + [2400] * 3


def test_window_alignment_reaches_the_batch(load):
    (batch,) = take(load(config=dict(audio_align="window")).train(4), 1)
    starts = batch["rgb"][:, 0, 0, 0, 0, 1].astype(int)
    expected = np.round((starts + 3.5) * 64 - 400) % 3200
    np.testing.assert_array_equal(batch["waveform"][:, 0, 0], expected)


def test_the_whole_sound_is_the_same_for_all_views_and_padded(load):
    settings = dict(audio_align="whole", audio_seconds=4.0, views=2)
    waveform = next(load(config=settings).evaluate(2))["waveform"]
    assert waveform.shape[:2] == (2, 2)
    np.testing.assert_array_equal(waveform[:, 0], waveform[:, 1])
    assert waveform[1, 0, 3199] == 3199 and not waveform[:, :, 3200:].any()


def test_center_crop_and_enlargement_to_the_crop(load):
    (batch,) = take(load(config=dict(crop="center")).train(10), 1)
    assert (batch["rgb"][..., 0, :, 2] == np.arange(2, 10)).all()
    (batch,) = take(load(config=dict(size=16)).train(2), 1)
    assert batch["rgb"].shape == (2, 1, 4, 16, 16, 3)
    np.testing.assert_array_equal(batch["rgb"][:, 0, 0, 0, 0, 0], batch["index"])


def test_missing_modalities_are_zeros_and_marked(load, caplog):
    records = FakeRecords(silent=(1, 2), blind=(2, 3))
    with caplog.at_level(logging.WARNING):
        dataset = load(records)
    assert "1 of 10 clips in train of toys have no picture or sound" in caplog.text
    assert dataset.num_clips == 9 and dataset.missing
    batch = next(dataset.evaluate(9))
    assert batch["index"].tolist() == [0, 1, 3, 4, 5, 6, 7, 8, 9]
    assert batch["has_audio"].tolist() == [i != 1 for i in batch["index"]]
    assert batch["has_rgb"].tolist() == [i != 3 for i in batch["index"]]
    assert not batch["waveform"][1].any() and not batch["rgb"][2].any()
    assert batch["waveform"][2].any() and batch["rgb"][1].any()
    assert dataset.ids[batch["index"][2]] == "clip3"


def test_one_modality_has_only_its_keys_and_its_clips(load):
    records = FakeRecords(silent=(1, 2), blind=(2, 3))
    sound = load(records, modalities=("spectrogram",))
    picture = load(records, modalities=("rgb",), config=dict(missing_modalities=False))
    assert (sound.num_clips, picture.num_clips) == (8, 8)
    assert not sound.missing and not picture.missing
    assert next(sound.train(2)).keys() == {"waveform", "has_audio", "index", "valid"}
    assert next(picture.train(2)).keys() == {"rgb", "has_rgb", "index", "valid"}


def test_missing_modalities_must_be_allowed(load):
    with pytest.raises(ConfigError, match="2 have no sound.*missing_modalities=True"):
        load(FakeRecords(silent=(1, 2)), config=dict(missing_modalities=False))
    with pytest.raises(ConfigError, match="No clip .* has sound"):
        load(FakeRecords(2, silent=(0, 1)), modalities=("spectrogram",))


def test_limit_draws_a_balanced_subset_of_the_training_split(load):
    small, large = (load(FakeRecords(30), config=dict(limit=n)) for n in (6, 12))
    clips = [
        {*np.concatenate([b["index"] for b in take(d.train(1), d.num_clips)])}
        for d in (small, large)
    ]
    assert [len(subset) for subset in clips] == [6, 12] and clips[0] < clips[1]
    assert Counter(i % 3 for i in clips[1]) == {0: 4, 1: 4, 2: 4}
    assert load(FakeRecords(30), "test", dict(limit=6)).num_clips == 30
    other = load(FakeRecords(30), config=dict(limit=6), seed=5)
    assert {*next(other.train(6))["index"]} != clips[0]
    with pytest.raises(ConfigError, match="limit=31 is more than the 30"):
        load(FakeRecords(30), config=dict(limit=31))


def test_limit_fills_up_where_a_class_is_short():
    index = [dict(labels=(int(i < 2),)) for i in range(12)]
    clips = pipeline._balanced(index, np.arange(12), 8, seed=0)
    assert {0, 1} < set(clips.tolist()) and len(set(clips.tolist())) == 8


def test_labels(load):
    records = FakeRecords()
    records.records[4].labels = records.index[4]["labels"] = (0, 2)
    batch = next(load(records, label="multilabel").evaluate(16))
    assert batch["label"].dtype == np.float32
    assert batch["label"][3:6].tolist() == [[1, 0, 0], [1, 0, 1], [0, 0, 1]]
    assert not batch["label"][10:].any()
    with pytest.raises(ConfigError, match="1 of 10 clips .* 'clip4'"):
        load(records, label="class")
    assert "label" not in next(load(records).train(2))


def test_cache_decodes_each_clip_once_and_changes_nothing(load):
    records, config = FakeRecords(), dict(cache=True, threads=0, short_side=16, size=16)
    cached = take(load(records, config=config).train(4), 6)
    assert [len(record.decoded) for record in records.records] == [1] * 10
    equal(cached, take(load(config=config | dict(cache=False)).train(4), 6))


def test_cache_is_bounded(load, monkeypatch, caplog):
    records, config = FakeRecords(), dict(cache=True, threads=0)
    clip = 50 * 8 * 12 * 3 + 2 * 3200
    memory = {"SC_PHYS_PAGES": 4 * (3 * clip + 1), "SC_PAGE_SIZE": 1}
    monkeypatch.setattr(pipeline.os, "sysconf", memory.get)
    with caplog.at_level(logging.INFO):
        dataset = load(records, config=config)
    take(dataset.train(10), 4)
    counts = Counter(len(record.decoded) for record in records.records)
    assert counts == {1: 3, 4: 7}
    assert "data.cache: the pictures of train of toys take about" in caplog.text


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (dict(crop="middle"), "crop='middle' is none of"),
        (dict(randaugment="rand-m20"), "randaugment='rand-m20': m goes to 10"),
        (dict(sampling="sparse"), "sampling='sparse' is none of"),
        (dict(resize="cubic"), "resize='cubic' is none of"),
        (dict(audio_align="left"), "audio_align='left' is none of"),
        (dict(crops=2), "crops=2 is none of"),
        (dict(prepared=dict(fps="", short_side="x")), "short_side='x' is no number"),
        (dict(cache=True, workers=1), "workers=0"),
    ],
)
def test_wrong_fields_are_named(load, config, words):
    with pytest.raises(ConfigError, match=words):
        load(config=config)


def test_wrong_arguments_are_named(load):
    with pytest.raises(ConfigError, match="batch_size=5 .* 2 processes"):
        load(process=(0, 2)).train(5)
    with pytest.raises(ConfigError, match="modalities=.'audio',. must be"):
        load(modalities=("audio",))
    with pytest.raises(ConfigError, match="label='verb' is none of"):
        load(label="verb")


def test_rates_of_the_records(load, caplog):
    records = FakeRecords()
    records.info["settings"]["sample_rate"] = 44_100
    with pytest.raises(ConfigError, match="44100 Hz.*1600;.*--sample-rate 1600"):
        load(records)
    load(records, modalities=("rgb",))
    for fps in (25, "source"):
        records.info["settings"] = dict(fps=fps, sample_rate=RATE)
        caplog.clear()
        load(records)
        assert not caplog.records
        load(records, config=dict(fps=12.5))
        assert "25 frames a second, but config.data.fps expects 12.5" in caplog.text


@pytest.mark.parametrize(
    ("found", "wanted", "told"),
    [
        (dict(fps=25.0, short_side=256), dict(fps="25", short_side="256"), []),
        (dict(fps="source", short_side=320), dict(fps="source", short_side="320"), []),
        (dict(fps=25.0), dict(fps="25", short_side="256"), []),
        (
            dict(fps=25.0, short_side=256),
            dict(fps="source", short_side="320"),
            ["--fps 25, but .*prepared.fps is source", "--short-side 256, .* is 320"],
        ),
    ],
)
def test_how_the_records_were_prepared(load, caplog, found, wanted, told):
    records = FakeRecords()
    records.info["settings"] = dict(sample_rate=RATE) | found
    load(records, config=dict(prepared=wanted))
    assert len(caplog.records) == len(told)
    for record, text in zip(caplog.records, told, strict=True):
        assert re.search(text, record.getMessage())


def test_prepared_clips_come_out_as_they_went_in(prepared):
    batch = next(load_prepared(prepared, crop="center").evaluate(8))
    assert batch["index"].tolist() == [0, 1, 2, 3, 4, 5, -1, -1]
    sound = np.arange(2560, dtype=np.int16)[880:1680]  # the middle 800
    for i in range(6):
        frames = np.random.default_rng(i).integers(0, 256, (40, 4, 6, 3), np.uint8)
        frames = frames.repeat(8, axis=1).repeat(8, axis=2)[16:24:2, 4:28, 12:36]
        # Chroma is stored at half the resolution: brightness is what comes back.
        error = batch["rgb"][i, 0].mean(-1) - frames.mean(-1)
        assert np.abs(error).mean() < 12
        np.testing.assert_array_equal(batch["waveform"][i, 0], sound * np.int16(i + 1))


def test_cache_holds_what_prepared_clips_decode_to(prepared):
    equal(
        take(load_prepared(prepared, cache=True).train(4), 4),
        take(load_prepared(prepared).train(4), 4),
    )


@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_change_nothing(prepared, workers):
    plain, config = load_prepared(prepared), dict(workers=workers, threads=1)
    batches = load_prepared(prepared, **config).train(2, step=3)
    equal(take(batches, 3), take(plain.train(2), 6)[3:])
    batches.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_record_is_named(prepared, tmp_path, workers):
    folder = shutil.copytree(prepared, tmp_path / "copy")
    (shard,) = folder.glob("toys/1.0.0/*-00000-of-00002")
    content = bytearray(shard.read_bytes())
    found = content.rfind(b"fLaC")  # the sound of clip3
    content[found : found + 4] = b"nope"
    shard.write_bytes(content)
    batches = load_prepared(folder, workers=workers).evaluate(2)
    assert next(batches)["index"].tolist() == [0, 1]
    with pytest.raises(RecordError, match="clip3"):
        next(batches)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="reads Linux's /proc")
def test_worker_processes_end_with_a_killed_parent(prepared):
    code = (
        "import multiprocessing, sys\nfrom tests.test_pipeline import *\n"
        "if __name__ == '__main__':\n"
        "    batches = load_prepared(sys.argv[1], workers=1).train(2)\n"
        "    next(batches)\n"
        "    print(multiprocessing.active_children()[0].pid, flush=True)\n"
        "    next(sys.stdin)\n"
    )
    command = [sys.executable, "-c", code, str(prepared)]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with subprocess.Popen(command, cwd=ROOT, **pipes) as parent:
        worker = Path("/proc") / parent.stdout.readline().strip()
        assert "spawn" in (worker / "cmdline").read_text()
        parent.kill()
    for _ in range(100):
        if not worker.exists() or "zombie" in (worker / "status").read_text():
            return
        time.sleep(0.1)
    raise AssertionError(f"{worker} lives on")


def test_what_is_known_about_the_data_set(load):
    dataset = load()
    assert dataset.ids == [f"clip{i}" for i in range(10)]
    assert dataset.label_names == ["a", "b", "c"]
    assert dataset.checksum == hashlib.sha256(b"aabb").hexdigest()
    assert not dataset.missing and dataset.num_clips == 10


def test_waveform_length_is_rounded(load):
    batch = next(load(config=dict(audio_seconds=0.3331)).train(1))
    assert batch["waveform"].shape == (1, 1, 533)  # 532.96


def test_data_imports_neither_jax_nor_tensorflow():
    """Grain imports jax for itself where it is installed; ours must not need it."""
    for module in (pipeline, sampling, pipeline.transforms):
        for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
            names = [alias.name for alias in getattr(node, "names", [])]
            names.append(getattr(node, "module", None) or "")
            assert not {"jax", "av_mae", "tensorflow"} & {
                n.split(".")[0] for n in names
            }
    code = "import sys, data.pipeline; print('tensorflow' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert result.stdout.strip() == "False", result.stderr
