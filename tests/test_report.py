"""The report: what runs left behind, laid over one another; and the command."""

import json
from pathlib import Path

import chromium
import numpy as np
import pytest

from av_mae import UserError, mistakes, report


def run(name: str, trainer: str = "finetune", rate: float = 0.1, rows=()) -> report.Run:
    config = {"trainer": trainer, "schedule": {"rate": rate}, "data": {"dir": "d"}}
    return report.Run(name, Path(name), config, {"labels": []}, list(rows))


def test_runs_share_their_charts_but_trainers_not_their_losses():
    rows = [{"step": 1, "loss": 1.0, "loss_rgb": 1.0, "learning_rate": 0.1}]
    rows.append({"step": 2, "eval/top_1": 0.5, "wait_share": 0.25})
    runs = [run("a", rows=rows), run("b", rows=rows)]
    text = report.curves(runs)
    assert text.count("<svg") == 5  # loss, of rgb, top_1, learning rate, waiting
    assert text.count('data-run="a"') == text.count('data-run="b"') == 5
    runs.append(run("c", "pretrain", rows=rows[:1]))
    text = report.curves(runs)
    assert text.count("<svg") == 7
    assert "Loss, rgb (pretrain)" in text and "Loss, rgb (finetune)" in text
    assert "no numbers" in report.curves([run("a")])


def test_what_differs_is_told():
    text = report.configs([run("a", rate=0.1), run("b", rate=0.2)])
    assert "<td>schedule.rate</td><td>0.1</td><td>0.2</td>" in text
    assert "<td>trainer</td>" not in text
    assert "the configs are the same" in report.configs([run("a"), run("b")])
    assert report.flat({"a": {"b": 1}, "c": [2]}) == {"a.b": 1, "c": [2]}


def test_names_tell_runs_apart():
    paths = [Path("/x/one/seed"), Path("/x/two/seed")]
    assert report.names_of(paths) == ["one/seed", "two/seed"]
    assert report.names_of([Path("/x/a"), Path("/y/b")]) == ["a", "b"]
    with pytest.raises(UserError, match="given twice"):
        report.names_of([Path("/x/a"), Path("/x/a")])


def test_how_many_clips_are_present():
    train = {"clips": 8, "hours": 0.5, "failed": 1}
    info = {
        "splits": {"train": train},
        "settings": {"clips": 9},
        "labels": ["a", "b"],
    }
    assert "sets/x: 8 of 9 clips present, 2 classes." in report.data_of("sets/x", info)
    test = {"clips": 5, "hours": 0.5, "failed": 0, "listed": 5}
    splits = {"train": train | {"listed": 10}, "test": test}
    text = report.data_of("x", info | {"splits": splits})
    assert "13 of 15 clips present" in text and "<td>8 of 10</td>" in text


def test_mistakes_name_classes_and_clips_as_text():
    evil = "<b>bold</b>"
    labels = np.array([0, 1, 1])
    logits = np.eye(3, dtype=np.float32)[[0, 1, 0]]
    found = mistakes.Answers(logits, labels, ["x", "y", evil], [evil, "dog", "cow"])
    text = report.mistakes_of("run", "test", found)
    assert "<b>" not in text and "top-1 66.7%" in text
    hardest = text[text.index("Hardest clips") :]
    assert hardest.index("&lt;b&gt;") < hardest.index("<td>x</td>")
    many = mistakes.Answers(
        np.eye(40, dtype=np.float32),
        np.roll(np.arange(40), 1),
        list(map(str, range(40))),
        [f"class {i}" for i in range(40)],
    )
    assert "The 30 classes most often confused" in report.mistakes_of("r", "t", many)


def test_what_is_no_run_is_told_in_a_sentence(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        report.main([str(tmp_path), "--out", str(tmp_path / "r.html")])
    assert "holds no checkpoint" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_on_runs(toy_run, tmp_path, capsys):
    """Two runs with their data: every section; without the data, a sentence instead."""
    folders = [str(toy_run / name) for name in ("pretrain", "finetune")]
    report.main([*folders, "--out", str(tmp_path / "r.html"), "--title", "A <title>"])
    assert "written:" in capsys.readouterr().out
    text = (tmp_path / "r.html").read_text()
    for words in (
        "Curves",
        "Reconstructions",
        "Answers and mistakes",
        "16 of 16 clips",
    ):
        assert words in text, words
    assert "A &lt;title&gt;" in text and text.count('class="example"') == 3
    assert text.count("data:audio/wav") >= 6 and "Hardest clips" in text
    last = json.loads((toy_run / "finetune/metrics.jsonl").open().readlines()[-1])
    assert f"top-1 {last['eval/top_1']:.1%}" in text

    if chromium.PROGRAM:
        program = """
          const all = x => [...document.querySelectorAll(x)];
          const reachable = x => {x.focus(); return document.activeElement === x};
          return {heads: all('h2').map(x => x.textContent),
                  examples: all('.example').length, sounds: all('audio').length,
                  loaded: all('img').every(x => x.naturalWidth > 0),
                  lines: new Set(all('[data-run]').map(x => x.dataset.run)).size,
                  keys: all('input, summary, .wide, audio').every(reachable),
                  wide: document.documentElement.scrollWidth <= innerWidth};
        """
        found = chromium.after(text, program, tmp_path, "--window-size=390,800")
        heads = ["Curves", "Reconstructions", "Answers and mistakes", "Data", "Config"]
        assert found["heads"] == heads and found["examples"] == 3
        assert found["sounds"] >= 6 and found["lines"] == 2
        assert found["loaded"] and found["keys"] and found["wide"]

    (toy_run / "set").rename(toy_run / "away")
    try:
        text = report.make([toy_run / "finetune"])
    finally:
        (toy_run / "away").rename(toy_run / "set")
    assert "Hardest clips" not in text and "finetune: " in text and "Curves" in text
