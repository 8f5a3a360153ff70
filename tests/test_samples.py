"""Damaged records in training: passed over, counted, the same with any threads."""

import logging
import os
import shutil

import numpy as np
import pytest
from ml_collections import ConfigDict
from test_pipeline import CONFIG, FakeRecords, equal, load, prepared, take

from data import Clip, RecordError, dmvr, pipeline

__all__ = ["load", "prepared"]  # fixtures
NUM = 10


class Damaged(FakeRecords):
    """Records of which some cannot be read."""

    def __init__(self, bad, **kwargs):
        super().__init__(NUM, **kwargs)
        for number in bad:
            self.records[number].frames = self._refuse(number)

    def _refuse(self, number):
        def frames(indices, box=None):
            raise RecordError(f"shard: record {number} is damaged")

        return frames


def test_a_damaged_record_gives_way_to_the_next(load, caplog):
    with caplog.at_level(logging.WARNING):
        dataset = load(Damaged({3, 4}), config=dict(skip_bad_records=2))
        batches = take(dataset.train(5), 4)
    whole = take(load().train(5), 4)
    met = 0
    for batch, other in zip(batches, whole, strict=True):
        assert batch.keys() == other.keys()
        replaced = np.isin(other["index"], (3, 4))
        met += replaced.sum()
        assert (batch["index"][replaced] == 5).all()
        for key in batch:  # nothing else changes
            np.testing.assert_array_equal(batch[key][~replaced], other[key][~replaced])
    assert met == 4  # two in each of two epochs
    lines = [r.getMessage() for r in caplog.records if "passed over" in r.getMessage()]
    assert sorted(x[:28] for x in lines) == [
        "passed over (1 of at most 2)",
        "passed over (2 of at most 2)",
    ]
    assert any("record 3 is damaged" in x for x in lines)


@pytest.mark.parametrize("known", [True, False])  # False: a worker process met it
def test_damage_that_some_windows_show_counts_as_well(load, caplog, known):
    records = Damaged(())
    for number in (1, 3, 6):
        whole, refuse = records.records[number].frames, records._refuse(number)
        calls = iter([refuse])
        frames = lambda i, box, calls=calls, whole=whole: next(calls, whole)(i, box)
        records.records[number].frames = frames
    dataset = load(records, config=dict(skip_bad_records=2, threads=0))
    if not known:
        dataset._reader.failures = type("", (dict,), {"__setitem__": lambda *_: None})()
    one_more = "one more than config.data.skip_bad_records=2"
    with pytest.raises(RecordError, match=f"clip[136]: .* is damaged.* {one_more}"):
        take(dataset.train(5), 2)
    assert caplog.text.count("of at most 2): clip") == 2
    assert ("shard: record" in caplog.text) == known


def test_the_last_record_is_followed_by_the_first(load):
    dataset = load(Damaged({9}), config=dict(skip_bad_records=1, limit=0))
    index = np.concatenate([b["index"] for b in take(dataset.train(5), 2)])
    assert sorted(index) == [0, 0, *range(1, 9)]


def test_replacements_have_the_random_numbers_of_the_place(load):
    """What stands in depends on the place in the order, and on nothing else."""
    config = dict(skip_bad_records=3, samples_per_clip=2)
    reference = take(load(Damaged({2, 3, 7}), config=config).train(4), 6)
    threads = load(Damaged({2, 3, 7}), config=config | dict(threads=0))
    equal(take(threads.train(4), 6), reference)
    equal(take(threads.train(4, step=4), 2), reference[4:])
    halves = [
        take(load(Damaged({2, 3, 7}), config=config, process=(p, 2)).train(4), 6)
        for p in range(2)
    ]
    for k in range(2):
        equal([{key: b[key][k::2] for key in b} for b in reference], halves[k])


def test_one_too_many_is_an_error_at_the_same_batch(load):
    seen = {0: [], 3: []}
    for threads, batches in seen.items():
        config = dict(skip_bad_records=1, threads=threads)
        iterator = load(Damaged({1, 6}), config=config).train(1)
        with pytest.raises(RecordError, match="record . is damaged"):
            while True:
                batches.append(int(next(iterator)["index"][0]))
    assert seen[0] == seen[3] and len(seen[0]) < NUM
    with pytest.raises(RecordError, match="record . is damaged"):
        take(load(Damaged({1, 2, 3}), config=dict(skip_bad_records=2)).train(5), 2)


def test_without_it_nothing_is_passed_over(load):
    dataset = load(Damaged({3}))
    for batches in (dataset.train(5), dataset.evaluate(5)):
        with pytest.raises(RecordError, match="record 3 is damaged"):
            take(batches, 2)


def test_each_process_leaves_out_its_own(load):
    config = dict(skip_bad_records=2)
    both = [load(Damaged({3, 5, 8}), config=config, process=(p, 2)) for p in range(2)]
    rows = [np.concatenate([b["index"] for b in x.evaluate(4)]) for x in both]
    assert [x.left_out for x in both] == [1, 2]
    assert sorted(i for i in np.concatenate(rows) if i >= 0) == [0, 1, 2, 4, 6, 7, 9]


@pytest.mark.parametrize("threads", [0, 3])
def test_an_evaluation_leaves_damaged_records_out_and_says_so(load, threads, caplog):
    config = dict(skip_bad_records=2, threads=threads)
    dataset, whole = load(Damaged({3, 8}), config=config), load().evaluate(4)
    for _ in range(2):  # told once, however often it is evaluated
        for batch, other in zip(dataset.evaluate(4), list(whole), strict=True):
            assert batch.keys() == other.keys()
            left = np.isin(other["index"], (3, 8))
            assert (batch["index"][left] == -1).all() and not batch["valid"][left].any()
            for key in batch:
                np.testing.assert_array_equal(batch[key][~left], other[key][~left])
        assert dataset.left_out == 2
        whole = load().evaluate(4)
    assert caplog.text.count("of at most 2): clip") == 2
    dataset = load(Damaged({3, 4, 8}), config=config)
    with pytest.raises(RecordError, match="one more than config.data.skip_bad_records"):
        list(dataset.evaluate(4))


# ------------------------------------------------------------------------- real files


def open_files(folder, **fields):
    config = CONFIG | dict(dir=str(folder), size=24, short_side=32, threads=1) | fields
    return pipeline.load(ConfigDict(config), "train", sample_rate=1600)


def indices(dataset, batches=6):
    """Who is in the first batches of 2."""
    iterator = dataset.train(2)
    found = [batch["index"].tolist() for batch in take(iterator, batches)]
    iterator.close()
    return found


def test_flipped_and_cut_array_records(prepared, tmp_path, caplog):
    """6 clips in shards of 4 and 2: a flipped byte costs a clip, a cut its shard."""
    folder = shutil.copytree(prepared, tmp_path / "copy")
    first, second = sorted(folder.glob("toys/1.0.0/*.array_record*"))
    content = bytearray(first.read_bytes())
    content[content.rfind(b"fLaC") + 200] ^= 16  # the sound of clip 3
    first.write_bytes(content)
    whole = indices(open_files(prepared))
    with pytest.raises(RecordError, match=r"00000-of-00002: record 3 \(clip3\)"):
        indices(open_files(folder))
    with caplog.at_level(logging.WARNING):
        found = indices(open_files(folder, skip_bad_records=1, workers=1))
    assert found == [[4 if x == 3 else x for x in batch] for batch in whole]
    assert "passed over (1 of at most 1): " in caplog.text
    dataset = open_files(folder, skip_bad_records=1, workers=1)  # and in evaluation
    rows = np.concatenate([batch["index"] for batch in dataset.evaluate(2)])
    assert rows.tolist() == [0, 1, 2, -1, 4, 5] and dataset.left_out == 1
    os.truncate(second, second.stat().st_size // 2)
    with pytest.raises(RecordError, match="00001-of-00002: record . .clip"):
        indices(open_files(folder, skip_bad_records=2))
    found = indices(open_files(folder, skip_bad_records=3))
    assert found == [[0 if x > 2 else x for x in batch] for batch in whole]


def test_flipped_and_cut_tfrecords(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    payloads = []
    for i in range(6):
        frames = rng.integers(0, 256, (20, 32, 32, 3), np.uint8)
        sound = np.full(1600, i, np.int16)
        payloads.append(dmvr.encode(Clip(frames, 25.0, sound, 1600), f"clip{i}"))
    path = tmp_path / "train-00000-of-00001.tfrecord"
    dmvr.write_shard(path, payloads)
    where = [entry.offset for entry in dmvr._list(path).entries]
    content = bytearray(path.read_bytes())
    content[where[2] + 500] ^= 1
    content = content[: where[5] + 100]
    path.write_bytes(content)
    options = dict(source="dmvr")
    with pytest.raises(
        RecordError, match=f"{path.name}: the record at byte {where[2]}"
    ):
        open_files(tmp_path, **options)
    with pytest.raises(
        RecordError, match=f"{path.name}: the record at byte {where[2]}"
    ):
        open_files(tmp_path, skip_bad_records=1, **options)
    with caplog.at_level(logging.WARNING):
        dataset = open_files(tmp_path, skip_bad_records=2, **options)
    assert f"the record at byte {where[5]}" in caplog.text
    assert dataset.ids == ["clip0", "clip1", "clip3", "clip4"]
    assert {x for pair in indices(dataset, 2) for x in pair} == {0, 1, 2, 3}
    # Damage that comes after the data set was opened counts on.
    dataset = open_files(tmp_path, skip_bad_records=3, **options)
    content[where[1] + 500] ^= 1
    path.write_bytes(content)
    assert {x for pair in indices(dataset, 2) for x in pair} == {0, 2, 3}
    assert "passed over (3 of at most 3)" in caplog.text
