"""The commands as a user types them, from the root of the repository."""

import concurrent.futures
import importlib.util
import json
import math
import re
from pathlib import Path

import pytest
import toy

from av_mae import main

AUDIOSET = "--config=configs/audioset/pretrain.py"
MODULE = ("-m", "av_mae.main")
DEVICES = r"\d+ (CPU|GPU|TPU) devices? \(.+\), 1 process, jax \d+\.\d+"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """16 clips of two classes, two without sound, one broken file; prepared."""
    path = tmp_path_factory.mktemp("toy")
    toy.write_folder(path / "clips", 16, silent=(2, 5), broken=True)
    # Every config finds its splits in it.
    split = "--split=train=0.5,validation=0.25,test=0.25"
    text = toy.run("-m", "data.prepare", path / "clips", "--out", path / "set", split)
    assert "Failed: bell/broken.mp4: " in text
    return path / "set"


def smoke(name: str, data: Path, workdir: Path, *options) -> str:
    """A smoke run to its end; what it printed."""
    return toy.run(
        *("main.py", f"--config=configs/{name}.py:smoke", f"--workdir={workdir}"),
        *(f"--config.data.dir={data}", *options),
    )


def check_run(text: str, workdir: Path) -> list[dict]:
    """What every finished smoke run prints and leaves; the lines of its metrics."""
    lines = text.splitlines()
    assert re.match(DEVICES, lines[0])
    for noise in ("Traceback", "orbax.checkpoint", "oneDNN", "!!python"):
        assert noise not in text
    assert re.search(r"^total +[\d,]+$", text, re.M)
    assert re.search(
        r"^learning rate \S+ per 256 clips × 4 clips per update", text, re.M
    )
    assert re.search(r"^step 4/4  loss rgb \S+ spectrogram \S+  lr \S+  ", text, re.M)
    assert {p.name for p in (workdir / "checkpoints").glob("[0-9]*")} == {"2", "4"}
    assert list(workdir.glob("events.out.tfevents.*"))
    metrics = [json.loads(x) for x in (workdir / "metrics.jsonl").open()]
    steps = [row["step"] for row in metrics if "clips_per_second" in row]
    assert steps == [2, 4]
    return metrics


def test_the_literal_commands_where_the_data_are_not_there():
    if (toy.ROOT / "datasets" / "audioset").exists():
        pytest.skip("datasets/audioset is there")
    left = toy.ROOT / "runs" / "audioset_pretrain"
    before = left.exists()
    both = [toy.start(*MODULE, AUDIOSET), toy.start("main.py", AUDIOSET)]
    for text in [toy.finish(process, code=2) for process in both]:
        devices, *answer = text.splitlines()
        assert re.match(DEVICES, devices) and len(answer) == 1
        assert answer[0].startswith("error: datasets/audioset: ")
        assert "`python -m data.prepare SOURCE --out datasets/audioset`" in answer[0]
    assert left.exists() == before


@pytest.mark.parametrize(
    "file, workdir",
    [
        ("configs/audioset/pretrain.py", "runs/audioset_pretrain"),
        ("configs/digits/finetune.py", "runs/digits_finetune"),
        ("/far/away/mine.py", "runs/away_mine"),
    ],
)
def test_default_workdir(file, workdir):
    assert main.default_workdir(Path(file)) == workdir


# Found before anything else happens: the error is all that is printed.
WRONG_FLAGS = {
    f"{AUDIOSET} --config.data.sizes=3": r"no field 'sizes'.* Did you mean \"size\"",
    f"{AUDIOSET} --config.batch_size=many": r"--config\.batch_size=many: .*'many'",
    f"{AUDIOSET} --config.batch_size=2.5": r"--config\.batch_size=2\.5: .*'2\.5'",
    f"{AUDIOSET}:smok": r"no variant 'smok' of this config\. Did you mean \"smoke\"",
    f"{AUDIOSET} --workdri=x": r"'workdri'.* Did you mean: workdir",
    f"{AUDIOSET} extra": r"what is 'extra'",
    "--config=configs/nothing.py": r"No such file or directory: 'configs/nothing.py'",
    "": r"give a config, as in --config=configs/digits/pretrain\.py",
}
# Found when the config is used, before anything is compiled.
WRONG_NAMES = {
    "trainer=pretran": "trainer is 'pretran': did you mean 'pretrain'",
    "mode=evl": "mode is 'evl': did you mean 'eval'",
    "model.fusion=midd": "model.fusion is 'midd': did you mean 'mid'",
    "spectrogram.preset=mtb": "spectrogram.preset is 'mtb': did you mean 'mbt'",
    "data.resize=cubic --config.dry_run": "data.resize='cubic' is none of",
    "eval.split=tset": "has no split 'tset', only train, validation, test",
    "modalities=('rgb','sound')": "modalities=('rgb', 'sound') must be some of",
}


def outputs(commands, code: int) -> list[str]:
    """What each command printed; two at a time."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda c: toy.run(*MODULE, *c, code=code), commands))


def test_what_is_wrong_with_the_flags_is_one_line():
    texts = outputs([flags.split() for flags in WRONG_FLAGS], code=2)
    for (flags, expected), text in zip(WRONG_FLAGS.items(), texts, strict=True):
        assert re.fullmatch(r"error: [^\n]*\n", text), (flags, text)
        assert re.search(expected, text), (flags, text)


def test_a_wrong_name_in_the_config_names_the_field(folder, tmp_path):
    common = (f"{AUDIOSET}:smoke", f"--config.data.dir={folder}")
    common += (f"--workdir={tmp_path / 'run'}",)
    wrong = [f"--config.{name}".split() for name in WRONG_NAMES]
    texts = outputs([(*common, *flags) for flags in wrong], code=2)
    for (name, expected), text in zip(WRONG_NAMES.items(), texts, strict=True):
        assert "Traceback" not in text and text.count("error: ") == 1, (name, text)
        assert text.splitlines()[-1].startswith("error: "), (name, text)
        assert expected in text.splitlines()[-1], (name, text)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_audioset_pretrain_smoke(folder, tmp_path):
    """Every kind of file that a pretraining leaves, and what it says."""
    text = smoke("audioset/pretrain", folder, tmp_path)
    metrics = check_run(text, tmp_path)
    evaluations = [row for row in metrics if "eval/loss_rgb" in row]
    assert [row["step"] for row in evaluations][-1] == 4
    for m in ("rgb", "spectrogram"):
        # At the beginning the model predicts zeros: worse than the mean of the target.
        assert evaluations[-1][f"eval/fraction_{m}"] > 0.9
    names = {path.name for path in (tmp_path / "pictures").iterdir()}
    assert {"0000004-rgb.gif", "0000004-rgb.png", "0000004-spectrogram.png"} <= names
    assert re.search(r"^step 4 evaluation: loss_rgb ", text, re.M)


@pytest.mark.slow
def test_folder_pretrain_smoke(folder, tmp_path):
    text = smoke("folder/pretrain", folder, tmp_path)
    check_run(text, tmp_path)
    assert re.search(
        r"^log-mel mean -?\d+\.\d+, deviation \d+\.\d+ \(data set\)", text, re.M
    )


@pytest.mark.slow
def test_folder_finetune_smoke(folder, tmp_path):
    text = smoke("folder/finetune", folder, tmp_path)
    last = check_run(text, tmp_path)[-1]
    assert last["step"] == 4 and 0 <= last["eval/top_1"] <= 1
    assert "eval/top_5" not in last  # of two classes


@pytest.mark.slow
def test_audioset_finetune_smoke(tmp_path):
    """Several labels a clip, from a CSV that names the splits."""
    clips = tmp_path / "clips"
    toy.write_folder(clips, 10, silent=(3,))
    rows = ["path,label,split"]
    for number, path in enumerate(sorted(clips.glob("*/*.mp4"))):
        label = path.parent.name + ("|loud" if number % 3 == 0 else "")
        split = "test" if number % 2 else "train"
        rows.append(f"{path.relative_to(clips)},{label},{split}")
    (clips / "clips.csv").write_text("\n".join(rows) + "\n")
    toy.run("-m", "data.prepare", clips / "clips.csv", "--out", tmp_path / "set")
    text = smoke("audioset/finetune", tmp_path / "set", tmp_path / "run")
    rows = check_run(text, tmp_path / "run")
    first, last = next(row for row in rows if "loss_rgb" in row), rows[-1]
    # The first update has the rate 0 and the head is zero at first, so that the second
    # step sees ln 2 for each of three classes, whatever the labels.
    assert first["step"] == 2
    for m in ("rgb", "spectrogram"):
        assert first[f"loss_{m}"] == pytest.approx(3 * math.log(2), rel=1e-5)
    assert last["step"] == 4 and math.isfinite(last["eval/loss"])
    wrong = ("--config.model.classes=527", f"--workdir={tmp_path / 'other'}")
    text = toy.run(
        *("main.py", "--config=configs/audioset/finetune.py:smoke", *wrong),
        *(f"--config.data.dir={tmp_path / 'set'}",),
        code=2,
    )
    assert text.splitlines()[-1].startswith("error: model.classes is 527, but ")
    assert "has 3 classes" in text.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("espeakng_loader") is None,
    reason="espeakng_loader (the extra `demo`) is not installed",
)
def test_digits_smoke(tmp_path):
    """The commands of the configs' docstrings, on few clips."""
    clips, data = tmp_path / "digits_clips", tmp_path / "digits"
    counts = ("--train", 40, "--test", 20, "--jobs", 2)
    toy.run("-m", "data.digits", "--out", clips, *counts)
    side = "--short-side=source"
    toy.run("-m", "data.prepare", clips / "clips.csv", "--out", data, side)
    pretrained, finetuned = tmp_path / "pretrain", tmp_path / "finetune"
    text = smoke("digits/pretrain", data, pretrained)
    check_run(text, pretrained)
    assert "was prepared with" not in text  # what the config wants
    options = (f"--config.init_from.checkpoint_path={pretrained}",)
    text = smoke("digits/finetune", data, finetuned, *options, "--config.data.limit=20")
    last = check_run(text, finetuned)[-1]
    assert {"eval/top_1", "eval/top_5"} <= set(last)
    assert f"init_from {pretrained}" in text
