"""The sweep over degraded input: levels, tables, pictures, and what is done already."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
import synthetic

from av_mae import ConfigError, corruption, finetune, robustness
from av_mae.robustness import Subject

BOTH = ("rgb", "spectrogram", "rgb+spectrogram")


def answer(kind_level: str) -> dict:
    """Scores that fall with the level, those of sound not at all."""
    level = float(kind_level.partition(":")[2] or 0)
    falling = {"top_1": 0.9 - level / 10, "loss": 1.0}
    return dict(zip(BOTH, (falling, {"top_1": 0.5, "loss": 2.0}, falling), strict=True))


@pytest.fixture
def asked(monkeypatch):
    """What was evaluated, without a model."""
    calls = []

    def evaluate(folder, corruptions, data):
        for text in corruptions:
            calls.append((folder.name, text))
            yield text, answer(text), ["7 of 8 clips"]

    monkeypatch.setattr(robustness, "evaluate", evaluate)
    return calls


def test_default_levels_are_ones_that_can_be():
    assert set(robustness.LEVELS) == set(corruption.KINDS)
    for kind, levels in robustness.LEVELS.items():
        for level in levels:
            corruption.parse("x", f"{kind}:{level:g}")


def test_levels_may_be_given_and_wrong_ones_are_told():
    found = robustness.levels_of(["blur", "mute"], ["blur=1,2.5"])
    assert found == {"blur": (1.0, 2.5), "mute": robustness.LEVELS["mute"]}
    with pytest.raises(ConfigError, match="--kinds is 'blurr': did you mean 'blur'"):
        robustness.levels_of(["blurr"], [])
    with pytest.raises(ConfigError, match="write KIND=A,B"):
        robustness.levels_of(["blur"], ["blur=much"])


def test_subsets_are_each_alone_and_all():
    config = synthetic.config("digits/finetune")
    assert robustness.subsets(config) == BOTH
    config.modalities = ("rgb",)
    assert robustness.subsets(config) == ("rgb",)
    config = synthetic.config("ucf101/avmaskenhancer_finetune")  # classifies pictures
    assert robustness.subsets(config) == ("rgb", "rgb+spectrogram")
    config.eval.modalities = robustness.subsets(config)
    finetune.check(config)
    found = {"eval/top_1": 0.5, "eval/rgb/top_1": 0.25, "eval/rgb/ema/top_1": 0.1}
    assert robustness._numbers(found, "rgb", 3) == {"top_1": 0.25}
    assert robustness._numbers(found, "rgb", 1) == {"top_1": 0.5}


def test_what_is_done_is_not_done_again(asked, tmp_path):
    subjects = [Subject("a", Path("/x/a"), 4), Subject("b", Path("/x/b"), 4)]
    levels = {"blur": (1.0, 2.0)}
    robustness.test(subjects, levels, tmp_path)
    assert asked == [(n, c) for n in "ab" for c in ("", "blur:1", "blur:2")]
    asked.clear()
    levels["blur"] = (1.0, 4.0)
    done = robustness.test(subjects[:1], levels, tmp_path)
    assert asked == [("a", "blur:4")]
    asked.clear()
    robustness.test([Subject("a", Path("/x/a"), 8)], levels, tmp_path)  # trained on
    others = {"seal": "another training's"}, {"data": "datasets/other"}
    for more in others:
        robustness.test([Subject("a", Path("/x/a"), 4, **more)], levels, tmp_path)
    assert len(asked) == 9
    assert len(json.loads((tmp_path / "robustness.json").read_text())) == 21
    assert len(done) == 9  # 7 evaluations and the notes of both


def test_table_and_pictures(asked, tmp_path):
    subjects = [Subject("a|b", Path("/x/a"), 4)]
    levels = {"blur": (1.0, 2.0), "audio_noise": (3.0,)}
    done = robustness.test(subjects, levels, tmp_path)
    assert robustness.markdown(subjects, done, levels).splitlines() == [
        "| blur | clean | 1 | 2 |",
        "|---|---|---|---|",
        "| a/b, rgb | 90.0 | 80.0 | 70.0 |",
        "| a/b, spectrogram | 50.0 | 50.0 | 50.0 |",
        "| a/b, rgb+spectrogram | 90.0 | 80.0 | 70.0 |",
        "",
        "| audio_noise | clean | 3 |",
        "|---|---|---|",
        "| a/b, rgb | 90.0 | 60.0 |",
        "| a/b, spectrogram | 50.0 | 50.0 |",
        "| a/b, rgb+spectrogram | 90.0 | 60.0 |",
        "",
        "- NOTE (a|b): 7 of 8 clips.",
    ]
    found = robustness.series(subjects, done, "blur", levels["blur"])
    assert found["a|b, rgb"] == [
        (x, pytest.approx(y)) for x, y in ((0.0, 0.9), (1.0, 0.8), (2.0, 0.7))
    ]
    # Without a level that harms nothing, the clean score has no place on the axis.
    found = robustness.series(subjects, done, "audio_noise", levels["audio_noise"])
    assert [x for x, _ in found["a|b, rgb"]] == [3.0]
    robustness.draw(subjects, done, levels, tmp_path)
    svg = ElementTree.fromstring((tmp_path / "blur.svg").read_text())
    assert "a|b, spectrogram ends at 0.5" in svg.get("aria-label")
    assert (tmp_path / "audio_noise.svg").exists()


@pytest.mark.slow
def test_the_command_on_runs(toy_run, tmp_path, capsys):
    words = ["--kinds", "mute", "--levels", "mute=1", "--out", str(tmp_path)]
    robustness.main([str(toy_run / "finetune"), *words])
    done = json.loads((tmp_path / "robustness.json").read_text())
    clean, _, mute = done.values()
    assert set(clean) == set(BOTH)
    assert mute["rgb"] == clean["rgb"] and mute["spectrogram"] != clean["spectrogram"]
    lines = (toy_run / "finetune" / "metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    whole = clean["rgb+spectrogram"]
    assert whole["loss"] == pytest.approx(last["eval/loss"], rel=1e-3)
    assert "| mute | clean | 1 |" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        robustness.main([str(toy_run / "pretrain"), *words])
    assert "only classifiers are tested" in capsys.readouterr().err
