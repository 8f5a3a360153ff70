"""A checkpoint is gone on from, or read, in another shape than it was written in."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import reliability
import synthetic
import training_run
from test_run import child, finish

from av_mae import CheckpointError, checkpoints, checksums, pretrain

NAME, HALF, STEPS = "digits/pretrain", 3, 6
CHANGES = {
    "modalities": ["spectrogram"],
    "model__fusion": "separate",
    "batch_size": 8,
    "eval__batch_size": 8,
    "log__every_steps": 1,
    "log__pictures": 0,
    "checkpoint__every_steps": HALF,
    "eval__every_epochs": 100.0,
    "schedule__kind": "scenic",
    "optimizer__eps": 1e-6,
    "schedule__learning_rate_per_256": 0.032,
    "ema": 0.9,
    "steps": STEPS,
}
# What changes after step 3: (fields, devices, how close the losses have to stay).
OTHERS = {
    "scan": ({"compute__scan": True}, 1, 1e-5),
    "remat": ({"compute__remat": "blocks"}, 1, 1e-5),
    "bfloat16": ({"compute__dtype": "bfloat16"}, 1, 0.05),
    "8 devices": ({}, 8, 1e-5),
    "8 devices, fsdp=4": ({"parallel__fsdp": 4}, 8, 1e-5),
    "evaluation batch 3": ({"eval__batch_size": 3}, 1, 1e-5),
}


@pytest.fixture(autouse=True, scope="module")
def quick():
    with synthetic.quick():
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of six steps in one shape; its steps 3 and 6 are kept."""
    workdir = tmp_path_factory.mktemp("shapes") / "whole"
    training_run.run(NAME, workdir, CHANGES)
    return workdir


@pytest.fixture
def half(whole, tmp_path):
    """The same as it was after step 3."""
    workdir = Path(shutil.copytree(whole, tmp_path / "half"))
    checksums.delete(workdir / "checkpoints" / str(STEPS))
    return workdir


def losses(workdir) -> list[float]:
    return [row["loss"] for row in synthetic.lines(workdir) if "loss" in row]


@pytest.mark.stress
@pytest.mark.parametrize(
    "other",
    [
        pytest.param(
            x, marks=[] if x in ("scan", "8 devices, fsdp=4") else pytest.mark.slow
        )
        for x in OTHERS
    ],
)
def test_a_run_goes_on_in_another_shape(half, whole, other):
    changes, devices, close = OTHERS[other]
    options = dict(name=NAME, workdir=str(half), changes=CHANGES | changes)
    if devices > 1:
        finish(child([options | {"min_split": 64}], devices))
    else:
        training_run.run(**options)
    assert losses(half) == pytest.approx(losses(whole), rel=close)
    found, wanted = (checkpoints._names(checkpoints.load(x)[0]) for x in (half, whole))
    for name, value in wanted.items():
        assert found[name].shape == value.shape and found[name].dtype == value.dtype
        if close < 0.01 and not name.endswith("qkv/bias"):
            np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-5)
    reliability.record(f"gone on with: {other}", 1, "the losses stay as they were")


def test_another_batch_size_is_another_experiment_but_its_weights_are_read(half):
    """The order of the data would be another; evaluation and init_from ask no batch."""
    changes = CHANGES | {"batch_size": 4}
    with pytest.raises(CheckpointError, match="config.batch_size is 4, there it is 8"):
        training_run.run(NAME, half, changes)
    for size in (2, 8):
        config = synthetic.tiny(NAME, **CHANGES | {"eval__batch_size": size})
        data = synthetic.Dataset(config, num_clips=8, first=100)
        found = pretrain.evaluate(config, {"eval": data}, half)
        assert np.isfinite(list(found.values())).all()
    new = half.parent / "new"
    changes |= {"init_from__checkpoint_path": str(half), "steps": 2}
    training_run.run(NAME, new, changes)
    assert np.isfinite(losses(new)).all()
