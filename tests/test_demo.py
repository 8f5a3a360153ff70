"""The demo: its tables, and the whole of it at smoke size."""

import csv
import importlib.util
import json
import re

import jax
import numpy as np
import pytest
import synthetic
import toy

from av_mae import TrainingError, baselines, demo, inputs, loop, pretrain
from data import DataError

SETS = ("sound", "picture", "both")


def write_logits(folder, logits):
    folder.mkdir()
    np.savez(folder / "predictions.npz", logits=logits, label=[0, 1, 1, 0])
    return folder


def test_late_fusion_adds_logits(tmp_path):
    """Clip 0: both right; 1: one is right and surer; 2: one is wrong and surer."""
    sound = write_logits(tmp_path / "sound", [[2.0, 0], [3, 0], [4, 0], [0, 1]])
    picture = write_logits(tmp_path / "picture", [[1.0, 0], [0, 5], [0, 1], [0, 1]])
    assert demo.late_fusion(sound, picture) == 0.5
    assert demo.late_fusion(sound, sound) == 0.25
    assert demo.late_fusion(picture, picture) == 0.75


def test_text():
    table = {
        "linear": {"sound": 0.25, "picture": 0.1, "both": 0.333},
        "scratch": {"sound": 0.5, "picture": 0.625, "both": 1.0},
        "late fusion, scratch": {"both": 0.75},
    }
    ours = {"eval/loss_rgb": 0.125, "eval/loss_spectrogram": 0.25, "seconds": 3.0}
    trivial = {"mean of the visible": {"rgb": 1.0, "spectrogram": 0.98765}}
    lines = demo.text(table, ours | {"trivial": trivial}, 200, demo.Path("w"))
    assert lines.splitlines() == [
        "Top-1 on the test clips, 200 labels, one seed:",
        "",
        "| | sound | picture | both |",
        "|---|---|---|---|",
        "| linear | 25.0% | 10.0% | 33.3% |",
        "| scratch | 50.0% | 62.5% | 100.0% |",
        "| late fusion, scratch |  |  | 75.0% |",
        "",
        "Masked error on test clips (mean squared, normalised values):",
        "",
        "| | picture | sound |",
        "|---|---|---|",
        "| the autoencoder | 0.1250 | 0.2500 |",
        "| mean of the visible | 1.0000 | 0.9877 |",
        "",
        "Reconstructions: w/pretrain/pictures",
        "All on one page: w/report.html",
    ]


def test_errors_of_the_trivial_guesses(monkeypatch):
    """Of 5 clips, though batches of 4 are padded: as a loop over clips has them."""
    config = synthetic.tiny("digits/pretrain", eval__batch_size=4)
    data = {
        "train": synthetic.Dataset(config, num_clips=4),
        "eval": synthetic.Dataset(config, num_clips=5, first=50),
    }
    with synthetic.quick():
        found = demo.trivial_errors(config, data, clips=8)
        prepare = jax.jit(inputs.make(config, missing=False), static_argnums=2)
        known = {"rgb": [], "spectrogram": []}
        seen = lambda name: (
            prepare(x, jax.random.key(0), False)[0] for x in batches[name]
        )
        batches = {k: list(x.evaluate(4)) for k, x in data.items()}
        (patches,) = seen("train")
        mean = {m: np.asarray(x).mean(0) for m, x in patches.items()}
        for i, (batch, patches) in enumerate(
            zip(batches["eval"], seen("eval"), strict=True)
        ):
            rng = loop.key(loop.key(config.seed, i, "eval"), 0, "mask")
            masks = pretrain.draw_masks(config, rng, 4)
            for m, x in patches.items():
                for row in np.flatnonzero(batch["valid"]):
                    hidden = np.asarray(masks[m].masked)[row]
                    error = (np.asarray(x)[row] - mean[m])[hidden] ** 2
                    known[m].append(error.mean())
    assert list(found) == ["mean of training clips", *baselines.PREDICTORS]
    for m, errors in known.items():
        assert len(errors) == 5
        assert found["mean of training clips"][m] == pytest.approx(np.mean(errors))


def rows_of(text: str, title: str) -> dict[str, list[str]]:
    """{first cell: the others} of the table below a line that begins with `title`."""
    table = text[text.index(title) :].split("\n\n")[1].splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in table]
    return {name: rest for name, *rest in cells[2:]}


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("espeakng_loader") is None,
    reason="espeakng_loader (the extra `demo`) is not installed",
)
def test_the_whole_demo_at_smoke_size(tmp_path):
    command = ("-m", "av_mae.demo", "--smoke", "--workdir", tmp_path, "--jobs", 2)
    text = toy.run(*command, "--train", 200, "--test", 100)
    top_1 = rows_of(text, "Top-1 on the test clips")
    assert list(top_1) == [
        *("linear", "scratch", "late fusion, scratch"),
        *("pretrained", "late fusion, pretrained"),
    ]
    for name, cells in top_1.items():
        late = name.startswith("late")
        assert [cell == "" for cell in cells] == [late, late, False]
        assert all(re.fullmatch(r"\d+\.\d%", cell) for cell in cells if cell)
    errors = rows_of(text, "Masked error on test clips")
    assert len(errors) == 5 and "the autoencoder" in errors
    assert all(float(cell) > 0 for cells in errors.values() for cell in cells)
    pictures = tmp_path / "pretrain" / "pictures"
    assert f"Reconstructions: {pictures}" in text and list(pictures.glob("*.png"))
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert all(name in page for name in ("pretrain", "scratch_both", "pretrained_both"))

    linear = json.loads((tmp_path / "results" / "linear.json").read_text())
    assert top_1["linear"] == [f"{linear[name]:.1%}" for name in SETS]

    # Both starts, and the search of any rate, share a compiled step for each set.
    names = {p.name.rsplit("-", 2)[0] for p in (tmp_path / "compiled").iterdir()}
    steps = [p for p in (tmp_path / "compiled").glob("jit_step-*-cache")]
    assert len(steps) == 1 + len(SETS), names

    # Again: everything is there, nothing is made a second time.
    results = sorted((tmp_path / "results").glob("*.json"))
    times = [path.stat().st_mtime_ns for path in results if path.stem != "table"]
    again = toy.run(*command, "--train", 200, "--test", 100)
    assert "step 4/4" not in again
    assert times == [p.stat().st_mtime_ns for p in results if p.stem != "table"]
    assert again[again.index("Top-1") :] == text[text.index("Top-1") :]


def test_times():
    seconds = {"data": 61.0, "pretraining": 5.0, "pretrain": 4.0, "report": 2.0}
    assert demo.times(seconds) == "Time: data 1 m 1 s, pretraining 5 s, report 2 s"


def test_clips_held_out_of_training(tmp_path):
    rows = [f"{i}.mp4,,,zero,train" for i in range(4)] + ["t.mp4,,,one,test"]
    manifest = tmp_path / "clips.csv"
    for count, splits in {0: ["train"] * 4, 1: ["train"] * 3 + ["validation"]}.items():
        manifest.write_text("\n".join(["path,start,end,label,split", *rows]) + "\n")
        demo.hold_out(manifest, count)
        found = list(csv.DictReader(manifest.open()))
        assert [row["split"] for row in found] == [*splits, "test"]


def test_a_command_that_fails_is_named(tmp_path, capfd):
    with pytest.raises(DataError, match="python -m data.prepare failed .exit code 2."):
        demo.command("data.prepare", str(tmp_path / "none"), "--out", str(tmp_path))
    assert "none" in capfd.readouterr().err


def test_a_run_that_was_stopped_is_not_taken_for_done(tmp_path, monkeypatch):
    monkeypatch.setattr(demo.pretrain, "train", lambda *arguments: {})
    monkeypatch.setattr(demo, "load", lambda *arguments, **more: None)
    work = demo.Work(tmp_path, "smoke")
    with pytest.raises(TrainingError, match="stopped by SIGTERM: run it again"):
        demo.do_pretraining(work)
    assert work.done.found("pretrain") is None
