"""The command, as a user types it, on a machine that has nothing but the models."""

import json

import pytest
import synthetic
import toy

from av_mae import benchmark, flops, plan

# The command in an interpreter that can import nothing that reads data.
BLOCKED = """
import runpy, sys

class Blocked:
    names = "tensorflow tensorflow_datasets clu grain av array_record data".split()

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names:
            raise ImportError(f"{name} is not there")

sys.meta_path.insert(0, Blocked())
sys.argv[0] = "benchmark"
runpy.run_module("av_mae.benchmark", run_name="__main__", alter_sys=True)
"""
SMOKE = "--config=configs/digits/pretrain.py:smoke"
TINY = [f"--config.model.{name}" for name in ("width=16", "mlp=32", "depth=2")]
TINY += ["--config.model.fusion_layers=1", "--config.data.audio_seconds=0.32"]


def test_a_step_is_timed_without_data_and_compared(tmp_path):
    first = tmp_path / "first.json"
    timed = ("-c", BLOCKED, "step", SMOKE, *TINY, "--steps=2")
    text = toy.run(*timed, f"--json={first}")
    numbers = json.loads(first.read_text())["numbers"]
    config = synthetic.config("digits/pretrain")
    config.model.update(width=16, mlp=32, depth=2, fusion_layers=1)
    config.data.audio_seconds = 0.32
    # XLA counts what it computes: the useful FLOPs are below that, and not nothing.
    assert numbers["flops_per_clip"] == flops.per_clip(config)
    rate = numbers["clips"] / numbers["step_seconds"]
    assert numbers["clips_per_second"] == pytest.approx(rate)
    assert numbers["mfu"] == pytest.approx(
        rate * numbers["flops_per_clip"] / numbers["peak_flops_per_second"]
    )
    assert numbers["memory_total"] > numbers["memory_temporary"] > 0
    pixels = 4 * 32 * 32 * 3 + 2 * 5120 + 3 + 8  # a clip's bytes, sound and flags
    assert numbers["host_to_device_bytes"] == 4 * pixels
    assert "clips_per_second" in text and "the whole run" in text
    again = benchmark.table(numbers, {"clips_per_second": 2 * rate})
    assert f"× {0.5:.3f}" in again


def test_the_cost_is_shown_as_a_field_grows():
    config = synthetic.tiny("digits/pretrain", batch_size=2)
    with synthetic.quick():
        found = benchmark.vary(config, "step", 1, ["data.num_frames=2,8"])
    assert list(found) == ["as it is", "data.num_frames=2", "data.num_frames=8"]
    counts = []
    for frames in (config.data.num_frames, 2, 8):
        config.data.num_frames = frames
        counts.append(flops.per_clip(config))
    assert [x["flops_per_clip"] for x in found.values()] == counts
    row = benchmark.growth(found).splitlines()[-1].split("|")
    assert row[3].strip() == f"{counts[2] / counts[0]:.2f}"
    seconds = [1 / x["clips_per_second"] for x in found.values()]
    assert row[5].strip() == f"{seconds[2] / seconds[0]:.2f}"


@pytest.mark.parametrize(
    "axis", ["data.num_frame=2", "data.num_frames=two", "data.num_frames"]
)
def test_a_field_that_cannot_vary_is_named(axis, monkeypatch):
    monkeypatch.setattr(benchmark, "measure", lambda *_: {})
    config = synthetic.config("digits/pretrain")
    lists = """modalities=("rgb",),("rgb","spectrogram")"""
    assert len(benchmark.vary(config, "step", 1, [lists])) == 3
    with pytest.raises(benchmark.UserError, match=f"--vary.*{axis}.*: .*write .*=A,B"):
        benchmark.vary(config, "step", 1, [axis])


def test_a_wrong_word_is_one_sentence(tmp_path):
    text = toy.run("-m", "av_mae.benchmark", "stop", code=2)
    assert text.startswith("error: benchmark has no sub-command 'stop'")
    assert "Traceback" not in text
    with pytest.raises(benchmark.UserError, match="--compare"):
        benchmark._read(str(tmp_path / "none.json"))


@pytest.mark.parametrize("words", [["--help"], ["prepare", "--help"]])
def test_help_has_examples(words, capsys):
    benchmark.main(["benchmark", *words])
    assert "python -m av_mae.benchmark step --config=" in capsys.readouterr().out


@pytest.mark.slow
def test_an_evaluation_is_timed():
    config = synthetic.tiny("digits/finetune", batch_size=2, eval__batch_size=2)
    with synthetic.quick():
        numbers = benchmark.measure(config, "eval", repeats=1, warm_up=1)
    classes = benchmark.program.CLASSES
    assert numbers["clips"] == 2
    assert numbers["flops_per_clip"] == flops.per_clip(config, False, classes)


def test_main_finds_the_dry_run():
    assert benchmark.dry_run is plan.dry_run
