"""The whole path by the user's own commands: clips, records, weights, a classifier."""

import json
import re
import time
from pathlib import Path

import pytest
import toy

CLIPS = Path(__file__).resolve().parents[2] / "shared" / "clips"
FAILING = ["empty.mp4", "not_a_video.mp4", "truncated_no_index.mp4"]


def train(name: str, workdir: Path, data: Path, *options):
    """The command of one training or evaluation; see toy.run."""
    return (
        *("-m", "av_mae.main", f"--config=configs/folder/{name}.py:smoke"),
        *(f"--workdir={workdir}", f"--config.data.dir={data}", *options),
    )


def metrics(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").open()]


def steps(workdir: Path) -> list[int]:
    """The steps that have a checkpoint."""
    return sorted(int(p.name) for p in (workdir / "checkpoints").glob("[0-9]*"))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A folder with prepared clips (`set`) and a finished pretraining (`pretrain`)."""
    path = tmp_path_factory.mktemp("path")
    toy.write_folder(path / "clips", 16, silent=(2, 5), broken=True)
    prepared = ("--out", path / "set", "--split", "train=0.7,validation=0.3")
    toy.run("-m", "data.prepare", path / "clips", *prepared)
    (path / "log").write_text(
        toy.run(*train("pretrain", path / "pretrain", path / "set"))
    )
    return path


def test_pretrain_finetune_evaluate(path):
    data, pretrained, finetuned = (path / x for x in ("set", "pretrain", "finetune"))
    assert steps(pretrained) == [2, 4]
    assert list((pretrained / "pictures").glob("*.png"))

    init = f"--config.init_from.checkpoint_path={pretrained}"
    text = toy.run(*train("finetune", finetuned, data, init))
    # The report of every parameter: from where it comes, what is fresh or left out.
    assert re.search(r"^head/kernel .*fresh", text, re.M)
    for block, source in (("block_0", "rgb/block_0"), ("block_2", "joint/block_1")):
        name = "mlp/in/kernel"
        row = rf"^encoder/rgb/{block}/{name}\s.*encoder/{source}/{name}"
        assert re.search(row, text, re.M), row
    assert 0 <= metrics(finetuned)[-1]["eval/top_1"] <= 1

    # Evaluation alone gives the numbers that the training ended with.
    text = toy.run(*train("finetune", finetuned, data, "--config.mode=eval"))
    found = re.search(r"^evaluation on validation: (.*)$", text, re.M)[1].split()
    last = metrics(finetuned)[-1]
    for name, value in zip(found[::2], found[1::2], strict=True):
        assert float(value) == pytest.approx(last[f"eval/{name}"], rel=1e-3), name
    assert steps(finetuned) == [2, 4] and len(found) == 4  # loss and top_1


def test_the_log_tells_what_made_the_run(path):
    """Devices, versions, commit, the whole config with its seed, and both data sets."""
    text = (path / "log").read_text()
    for part in (
        r"^\d+ CPU devices? ",
        r"'python': '3\.",
        r"'jax': '\d",
        r"'git_commit': '",
        r"^seed: \d+$",
        r"^ +dir: \S+/set$",
        r"^train: train of \S+/set, \d+ clips, checksum \w{16}",
        r"^eval: validation of \S+/set, \d+ clips, checksum \w{16}",
    ):
        assert re.search(part, text, re.M), part


@pytest.mark.slow
def test_evaluating_a_pretraining_repeats_its_last_numbers(path):
    options = (path / "pretrain", path / "set", "--config.mode=eval")
    before = metrics(path / "pretrain")
    text = toy.run(*train("pretrain", *options))
    found = re.search(r"^evaluation on validation: (.*)$", text, re.M)[1].split()
    assert set(found[::2]) == {
        *("loss_rgb", "fraction_rgb", "loss_spectrogram", "fraction_spectrogram")
    }
    for name, value in zip(found[::2], found[1::2], strict=True):
        assert float(value) == pytest.approx(before[-1][f"eval/{name}"], rel=1e-3), name
    assert metrics(path / "pretrain") == before


@pytest.mark.slow
def test_the_same_command_again_goes_on(path):
    """A finished run is left as it is; with more steps it goes on from its end."""
    workdir, data = path / "again", path / "set"
    toy.run(*train("pretrain", workdir, data))
    before = metrics(workdir)
    text = toy.run(*train("pretrain", workdir, data))
    assert f"resuming {workdir} at step 4" in text
    assert metrics(workdir) == before and steps(workdir) == [2, 4]

    text = toy.run(*train("pretrain", workdir, data, "--config.steps=6"))
    assert f"resuming {workdir} at step 4" in text and "step 6/6" in text
    assert metrics(workdir)[: len(before)] == before
    assert steps(workdir) == [4, 6]  # checkpoint.keep is 2

    other = "--config.model.drop_path=0.5"
    text = toy.run(*train("pretrain", workdir, data, other), code=2)
    wrong = f"error: {workdir} holds another experiment: config.model.drop_path is 0.5"
    assert text.splitlines()[-1].startswith(wrong)
    assert steps(workdir) == [4, 6]


@pytest.mark.slow
def test_sigterm_saves_and_exits_cleanly(path):
    workdir, options = path / "stopped", ("--config.log.every_steps=1",)
    rare = "--config.checkpoint.every_steps=1000000"
    endless = ("--config.steps=1000000", "--config.eval.every_epochs=1000000.0", rare)
    process = toy.start(*train("pretrain", workdir, path / "set", *options, *endless))
    file = workdir / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (file.exists() and len(file.read_text().splitlines()) >= 3):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.terminate()
    text = toy.finish(process, code=0)
    done = int(re.search(r"stopped by SIGTERM after step (\d+); run again", text)[1])
    assert steps(workdir) == [done] and metrics(workdir)[-1]["step"] == done

    more = (f"--config.steps={done + 2}", *options, rare)
    text = toy.run(*train("pretrain", workdir, path / "set", *more))
    assert f"resuming {workdir} at step {done}" in text
    trained = [row["step"] for row in metrics(workdir) if "loss" in row]
    assert trained == list(range(1, done + 3))


@pytest.mark.slow
@pytest.mark.skipif(
    not CLIPS.is_dir(), reason=f"the development clips are not at {CLIPS}"
)
def test_real_clips(tmp_path):
    """Real files of many kinds, damaged ones too, to records and to a trained model."""
    data, workdir = tmp_path / "set", tmp_path / "run"
    text = toy.run("-m", "data.prepare", CLIPS, "--out", data)
    report = json.loads((data / "report.json").read_text())
    assert report["clips"] == 24
    assert [clip["id"] for clip in report["failed"]] == FAILING
    for clip in report["failed"]:
        assert clip["reason"]
        assert f"Failed: {clip['id']}: {clip['reason']}" in text
    assert report["without_audio"] == [
        *("bikes_silent.mp4", "corrupted_packets.mp4", "mmaction_demo_silent.mp4"),
        *("rot90_three_frames.mov", "tiny_66x50_60fps.mov"),
    ]
    assert report["without_rgb"] == []

    text = toy.run(*train("pretrain", workdir, data))
    assert "step 4/4 " in text and steps(workdir) == [2, 4]
    assert {f"eval/loss_{m}" for m in ("rgb", "spectrogram")} <= set(
        metrics(workdir)[-1]
    )
    assert len(list((workdir / "pictures").glob("0000004-*"))) == 3
