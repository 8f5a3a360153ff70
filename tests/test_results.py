"""Results: parts, what they need of each other, and the whole at smoke size."""

import dataclasses
import importlib.util
import json
import re

import numpy as np
import pytest
import toy

from av_mae import parts, results, results_page

SCALE = results.Scale(100, 50, 20, 1.0, (20,), (1e-2,), (2, 4), arg="smoke")


def made(tmp_path, parts: dict) -> results.Work:
    """A workdir in which these parts are done."""
    folder = tmp_path / "results"
    folder.mkdir()
    for name, result in parts.items():
        (folder / f"{name}.json").write_text(json.dumps({"seconds": 30.0} | result))
    return results.Work(tmp_path, SCALE, 1)


def test_late_fusion_is_of_the_mean_logits(tmp_path):
    found = {}
    truth = np.array([0, 1, 0, 1])
    logits = {"sound": [[3, 0], [0, 1], [0, 2], [0, 1]]}
    logits["picture"] = [[0, 1], [0, 1], [0, 1], [2, 0]]
    for m, values in logits.items():
        folder = tmp_path / m
        folder.mkdir()
        logits = np.array(values, float)
        np.savez(folder / "predictions.npz", logits=logits, label=truth)
        found[f"scratch_{m}_20_0"] = {"eval/top_1": 0.5, "folder": str(folder)}
    work = made(tmp_path, found)
    assert results.late(work, 0, "scratch", "", 20)["top_1"] == 0.5
    text = results_page.table(work, 1)
    assert "| scratch: late fusion |  |  | 50.0 (1) |" in text
    with pytest.raises(parts.Busy):
        results.late(work, 1, "scratch", "", 20)


def test_numbers_of_another_workdir_are_taken_and_their_time_counted(tmp_path):
    """But for the parts whose files would be needed."""
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    other.mkdir()
    found = {"scratch_both_20_0": {"eval/top_1": 0.25, "folder": "/a/path"}}
    found |= {
        "pretrain_both_0": {"eval/loss_rgb": 0.5},
        "data": {"train": 9, "test": 9},
    }
    work = made(one, found)
    work.check()
    work.write_numbers(tmp_path / "page.json")
    assert "/a/path" not in (tmp_path / "page.json").read_text()
    taken = made(other, {})
    taken.take_numbers(tmp_path / "page.json")
    assert taken.found("scratch_both_20_0") == {"seconds": 30.0, "eval/top_1": 0.25}
    assert taken.found("pretrain_both_0") is taken.found("data") is None
    assert taken.minutes() == work.minutes() == 1.5
    work.take_numbers(tmp_path / "page.json")  # its own: nothing is counted twice
    assert work.minutes() == 1.5
    changed = results.Work(tmp_path / "third", dataclasses.replace(SCALE, clips=7), 1)
    changed.take_numbers(tmp_path / "page.json")
    assert changed.found("scratch_both_20_0") is None


def test_the_search_takes_the_best_on_held_out_clips(tmp_path):
    """Where all is tried, nothing is pretrained for it again."""
    found = {
        "search_pretrained_sound_0.01_2": {"eval/top_1": 0.3},
        "search_pretrained_sound_0.01_4": {"eval/top_1": 0.4},
    }
    work = made(tmp_path, found)
    assert results.search(work, "pretrained", "sound") == (1e-2, 4)
    text = results_page.table(work, 1)
    assert "| pretrained | sound | 0.01 | 4 | 40.0 (1) |" in text


def test_longer_is_tried_at_the_rate_that_did_best(tmp_path):
    found = {
        "search_scratch_sound_0.01_2": {"eval/top_1": 0.3},
        "search_scratch_sound_0.02_2": {"eval/top_1": 0.5},
        "search_scratch_sound_0.02_4": {"eval/top_1": 0.4},
    }
    work = made(tmp_path, found)
    work.scale = dataclasses.replace(SCALE, rates=(1e-2, 2e-2))
    tried = list(results.tries(work, "scratch", "sound"))
    assert tried == [(1e-2, 2), (2e-2, 2), (2e-2, 4)]
    assert results.search(work, "scratch", "sound") == (2e-2, 2)


def test_nothing_begins_after_the_last_minute(tmp_path):
    work = made(tmp_path, {"data": {"train": 100, "test": 50}})
    out = tmp_path / "page.md"
    results.run(work, seeds=2, minutes=0.5, out=out)
    assert "100 clips to pretrain on, for 1 epochs, and\n50 to test" in out.read_text()
    assert "python -m data.digits" not in out.read_text()
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "other.md").write_text("## Another command\n")
    results.write(work, 2, out)
    commands, other = out.read_text().split("python -m data.digits ")[1:], "## Another"
    assert len(commands) == 1 and other in commands[0]
    made_by_now = {p.stem for p in (tmp_path / "results").iterdir()}
    assert made_by_now == {"data", "setting"}


def test_tables_of_other_commands_stand_below(tmp_path):
    out = tmp_path / "digits.md"
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits" / "b.md").write_text("## Decoders\n")
    results.write(made(tmp_path, {}), 1, out)
    text = out.read_text()
    assert text.endswith("\n\n## Decoders\n") and text.startswith("# Does pretraining")


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("espeakng_loader") is None,
    reason="espeakng_loader (the extra `demo`) is not installed",
)
def test_the_whole_at_smoke_size(tmp_path):
    out = tmp_path / "digits.md"
    command = ("-m", "av_mae.results", "--smoke", "--seeds", 1, "--jobs", 2)
    command += ("--workdir", tmp_path / "work", "--out", out)
    toy.run(*command)
    text = out.read_text()
    for name in ("scratch", "pretrained on both", "each pretrained alone"):
        assert f"| {name} |" in text and f"| {name}: late fusion |  |  |" in text
    assert "made of the clip's own sound" in text
    for name in ("scratch, 8", "pretrained on both, 8"):
        cells = re.search(rf"^\| {name} \|(.*)\|$", text, re.M)[1].split("|")
        assert len(cells) == 3 and all(cell.strip() for cell in cells)
    assert "## All labels" in text and "| random | k-NN, all labels |" in text
    rows = [x.split("|")[2:-1] for x in text.splitlines() if x.startswith("| linear")]
    assert all(cell.strip() for cell in rows[0])
    # Again: nothing is made a second time.
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "work/results").iterdir()}
    toy.run(*command)
    assert times == {p: p.stat().st_mtime_ns for p in times} and out.read_text() == text
