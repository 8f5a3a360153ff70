"""Python first: one call opens a workdir, a step, or an exported folder."""

import subprocess
import sys

import jax
import numpy as np
import pytest
import synthetic
from ml_collections import ConfigDict

import av_mae
from av_mae import CheckpointError, ConfigError, api, export, finetune, pretrain


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with synthetic.quick():
        yield


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory):
    """(workdir of a finetuning run of 2 steps, its config, its data)."""
    workdir = tmp_path_factory.mktemp("finetune")
    config = synthetic.tiny("digits/finetune", steps=2)
    data = {
        name: synthetic.Dataset(config, first=first)
        for name, first in (("train", 0), ("eval", 1000))
    }
    finetune.train(config, data, workdir)
    return workdir, config, data


def test_a_workdir_gives_the_logits_of_the_evaluation(finetuned):
    workdir, config, data = finetuned
    model = av_mae.load(workdir)
    assert model.labels == list(data["eval"].label_names)
    assert model.classes == len(model.labels)
    wanted, _ = finetune.predict_all(config, data["eval"], workdir)
    found = []
    for batch in data["eval"].evaluate(config.eval.batch_size):
        found.append(model.logits(batch)[batch["valid"]])
    np.testing.assert_allclose(np.concatenate(found), wanted, rtol=1e-5, atol=1e-5)
    step = av_mae.load(workdir / "checkpoints" / "2")
    jax.tree.map(np.testing.assert_array_equal, step.params, model.params)


def test_what_was_exported_is_opened_too(finetuned, tmp_path):
    workdir, config, data = finetuned
    export.export(workdir, "safetensors", tmp_path / "out")
    model, original = av_mae.load(tmp_path / "out"), av_mae.load(workdir)
    jax.tree.map(np.testing.assert_array_equal, model.params, original.params)
    assert model.labels == original.labels
    batch = next(data["eval"].evaluate(config.eval.batch_size))
    np.testing.assert_array_equal(model.logits(batch), original.logits(batch))


def test_an_autoencoder_has_no_logits(tmp_path):
    config = synthetic.tiny("digits/pretrain", steps=1)
    data = {"train": synthetic.Dataset(config), "eval": synthetic.Dataset(config)}
    pretrain.train(config, data, tmp_path)
    model = av_mae.load(tmp_path)
    assert type(model.module).__name__ == "Autoencoder"
    with pytest.raises(ConfigError, match="an autoencoder .* has no classes"):
        model.logits({})


def test_several_heads_are_counted():
    heads = {"head_verb": 3, "head_noun": 5, "head_norm": 16}
    params = {name: {"bias": np.zeros(n)} for name, n in heads.items()}
    assert api.Model(ConfigDict(), params, []).classes == {"verb": 3, "noun": 5}


def test_nothing_there_is_an_error_that_names_the_path(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere"):
        av_mae.load(tmp_path / "nowhere")


def test_importing_the_package_imports_no_jax():
    code = "import sys, av_mae; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        getattr(av_mae, "lode")  # noqa: B009
