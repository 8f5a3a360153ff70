"""Statistics against a plain float64 computation on the same sound and pictures."""

import logging
import re
from pathlib import Path

import numpy as np
import pytest
import toy
from ml_collections import ConfigDict
from test_spectrogram import reference

from av_mae import stats
from data import Clip, RecordError, prepare, records, storage


def write_set(folder: Path, waveforms: list, pictures: list | None = None) -> Path:
    """A prepared data set whose clips have this sound; None: picture alone."""
    folder.mkdir(parents=True)
    picture = np.zeros((2, 16, 16, 3), np.uint8)
    pictures = [picture] * len(waveforms) if pictures is None else pictures
    payloads = [
        records.encode(Clip(shown, 25.0, waveform), f"{i}.mp4", (), frames="jpeg")
        for i, (shown, waveform) in enumerate(zip(pictures, waveforms, strict=True))
    ]
    name = records.shard_name("set", "train", 0, 1)
    records.write_shard(folder / name, payloads)
    index = records.index_name("train")
    entries = [records.index_entry(records.Record(payload)) for payload in payloads]
    records.write_jsonl(folder / index, entries)
    sums = {file: storage.checksum(folder / file) for file in (name, index)}
    counts = dict(clips=len(payloads), shard_lengths=[len(payloads)])
    info = dict(format=records.FORMAT, name="set", labels=[], statistics={})
    info |= dict(settings=dict(fps=25.0, sample_rate=16000), checksums=sums)
    records.write_metadata(folder, info | dict(splits={"train": counts}))
    return folder


def sounds() -> list:
    """Clips of 1 s, 2.4 s and 12 s (ten of which count), and one without sound."""
    rng = np.random.default_rng(0)
    loud = [0.3, 0.02, 0.1]
    lengths = [16000, 38400, 192000]
    made = [
        np.int16(32767 * np.clip(a * rng.standard_normal(n), -1, 1))
        for a, n in zip(loud, lengths, strict=True)
    ]
    return [made[0], None, *made[1:]]


def direct(waveforms: list) -> tuple[float, float, float]:
    """(mean, deviation, standard error) of clips weighted alike, in float64.

    Whole seconds, the first ten; two rows at either end of a second see the padding and
    are left out.
    """
    means, squares = [], []
    for waveform in waveforms:
        seconds = min(len(waveform) // 16000, 10)
        rows = np.concatenate(
            [
                reference(waveform[16000 * i : 16000 * (i + 1)] / 32768)[2:-2]
                for i in range(seconds)
            ]
        )
        means.append(rows.mean())
        squares.append((rows**2).mean())
    mean = np.mean(means)
    spread = np.std(means) / np.sqrt(len(means))
    return mean, np.sqrt(np.mean(squares) - mean**2), spread


def test_equal_a_direct_computation_and_are_kept(tmp_path, capsys, monkeypatch):
    folder = write_set(tmp_path / "set", sounds())
    mean, std, spread = direct([x for x in sounds() if x is not None])
    *found, known = stats.sound(str(folder), keep=False)
    assert found == pytest.approx([mean, std], abs=5e-5) and not known
    assert not records.read_info(folder)["statistics"]
    stats.sound(str(folder))

    stored = records.read_info(folder)["statistics"]["log_mel/mbt"]
    assert (stored["mean"], stored["std"], True) == stats.sound(str(folder))
    assert stored["mean_standard_error"] == pytest.approx(spread, abs=5e-5)
    assert stored["clips"] == 3

    # The command measures anew, stores and prints.
    stats.main([str(folder)])
    text = capsys.readouterr().out
    assert re.search(r"mean (\S+) ", text)[1] == f"{stored['mean']:.4f}"
    assert "from 3 clips of " in text

    # What is stored is not measured again.
    monkeypatch.setattr(stats, "measure", lambda *_: pytest.fail("measured again"))
    info = records.read_info(folder)
    info["statistics"]["log_mel/mbt"] |= {"mean": -1.5, "std": 0.5}
    records.write_json(folder / "dataset.json", info)
    assert stats.sound(str(folder)) == (-1.5, 0.5, True)


def test_no_more_clips_than_wanted_spread_over_the_split(tmp_path, monkeypatch):
    waveforms = [np.full(16000, i, np.int16) for i in range(1, 8)]
    folder = write_set(tmp_path / "set", waveforms)
    seen = []
    take = records.Records.record
    monkeypatch.setattr(
        records.Records, "record", lambda self, i: seen.append(i) or take(self, i)
    )
    monkeypatch.setattr(stats, "CLIPS", 3)
    stats.sound(str(folder))
    assert seen == [0, 3, 6]


def test_a_folder_that_cannot_be_written_is_told(tmp_path, monkeypatch, caplog):
    folder = write_set(tmp_path / "set", sounds()[:1])

    def refuse(*_):
        raise PermissionError("read-only")

    monkeypatch.setattr(stats, "write_json", refuse)
    with caplog.at_level(logging.WARNING):
        _, std, known = stats.sound(str(folder))
    assert std > 0 and not known and "statistics are not stored" in caplog.text
    assert not records.read_info(folder)["statistics"]


def test_no_sound_at_all_is_an_error(tmp_path, capsys):
    toy.write_folder(tmp_path / "clips", 2, silent=(0, 1))
    prepare.prepare(tmp_path / "clips", tmp_path / "set", split={"train": 1.0}, jobs=1)
    with pytest.raises(RecordError, match="no clip of train has sound"):
        stats.sound(str(tmp_path / "set"))
    capsys.readouterr()  # what preparation showed
    stats.main([str(tmp_path / "set")])
    shown = capsys.readouterr().out
    assert shown.startswith("rgb: ") and "no clip of train has sound" in shown
    with pytest.raises(SystemExit, match="2"):
        stats.main([str(tmp_path / "nowhere")])
    assert "python -m data.prepare" in capsys.readouterr().err


def test_the_command(tmp_path):
    """As a user types it, on a data set made by `data.prepare`."""
    toy.write_folder(tmp_path / "clips", 2)
    toy.run(
        *("-m", "data.prepare", tmp_path / "clips", "--out", tmp_path / "set"),
        *("--split", "train=1", "--jobs", 1),
    )
    text = toy.run("-m", "av_mae.stats", tmp_path / "set")
    assert text.startswith("log-mel (mbt): mean ") and "from 2 clips of " in text
    (folder,) = (tmp_path / "set").glob("*/1.0.0")
    assert records.read_info(folder)["statistics"].keys() == {"log_mel/mbt", "rgb"}


def test_colours_equal_a_direct_computation(tmp_path, capsys):
    rng = np.random.default_rng(0)
    pictures = [  # flat in blocks of 8, which a JPEG keeps to a level or so
        np.repeat(np.repeat(rng.integers(0, 256, (7, 2, 3, 3), np.uint8), 16, 1), 16, 2)
        for _ in range(5)
    ]
    pictures.append(None)
    waveforms = [np.ones(1600, np.int16)] * 6
    folder = write_set(tmp_path / "set", waveforms, pictures)
    used = np.stack([x[[1, 3, 5]] for x in pictures[:5]]) / 255  # middles of thirds
    stats.main([str(folder), "--preset", "mbt", "kaldi"])
    stored = records.read_info(folder)["statistics"]
    assert stored.keys() == {"log_mel/mbt", "log_mel/kaldi", "rgb"}
    found = stored["rgb"]
    assert found["clips"] == 5
    np.testing.assert_allclose(found["mean"], used.mean((0, 1, 2, 3)), atol=0.01)
    np.testing.assert_allclose(found["std"], used.std((0, 1, 2, 3)), atol=0.01)
    shown = capsys.readouterr().out
    assert shown.count(" ± ") == 2 * 2 + 6


def test_standard_errors_are_those_of_repeated_samples():
    """Of mean and deviation: the spread over many samples of 60 clips."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(400):
        levels, widths = rng.normal(0, 2, 60), rng.uniform(0.5, 3, 60)
        squares = levels**2 + widths**2  # of a clip at this level, so wide
        found.append(stats._summary(list(levels), list(squares)))
    for key in ("mean", "std"):
        spread = np.std([x[key] for x in found])
        told = np.mean([x[f"{key}_standard_error"] for x in found])
        assert told == pytest.approx(spread, rel=0.12)


@pytest.mark.parametrize(
    ("mean", "std", "right"),
    [
        (1.0, 0.5, True),
        (1.04, 0.54, True),
        (1.06, 0.5, False),
        (1.0, 0.56, False),
        (1.0, 1.0, True),  # AudioMAE divides by twice the deviation
        (1.0, 1.15, False),
        (1.0, 0.25, False),
    ],
)
def test_fixed_numbers_that_are_not_those_of_the_data_are_told(
    tmp_path, caplog, mean, std, right
):
    folder = write_set(tmp_path / "set", [np.ones(1600, np.int16)])
    sound = dict(preset="mbt", normalise="fixed", mean=mean, std=std)
    data = dict(dir=str(folder), split="train", source="records", skip_bad_records=0)
    config = ConfigDict(dict(spectrogram=sound, data=data))
    with caplog.at_level(logging.INFO):
        assert stats.check_fixed(config) == ""
    assert "python -m av_mae.stats" in caplog.text  # nothing is stored yet
    opened = records.Records(folder, "train")
    stats.store(opened, {"log_mel/mbt": dict(mean=1.0, std=0.5)})
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        told = stats.check_fixed(config)
    assert bool(told) == bool(caplog.records) == (not right)
    assert right or f"spectrogram.mean={mean:g} and std={std:g} are not" in told
