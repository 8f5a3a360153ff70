"""Programs without this package: read again, they give the same numbers."""

import importlib.util
import json
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from synthetic import quick, tiny

from av_mae import (
    CheckpointError,
    api,
    checkpoints,
    export,
    finetune,
    portable,
    pretrain,
)
from av_mae import run as runs


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with quick():
        yield


def saved(tmp_path, trainer: str, **fields):
    """(workdir, api.Model) of first parameters of a tiny config."""
    config = tiny(f"digits/{trainer}", **fields)
    built = finetune.build(config, 3) if trainer == "finetune" else None
    first = finetune if trainer == "finetune" else pretrain
    params = first.init(config, built or pretrain.build(config), jax.random.key(0))
    rng = np.random.default_rng(0)
    draw = lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32)
    params = jax.tree.map(draw, params)
    settings = json.loads(runs.config_json(config))
    meta = {"labels": ["a", "b", "c"]}
    target = checkpoints.Checkpoints(tmp_path / "run", settings, meta, keep=1)
    target.save(3, {"params": params}, force=True)
    target.close()
    return tmp_path / "run", api.load(tmp_path / "run")


@pytest.mark.slow
def test_stablehlo_gives_the_models_logits(tmp_path):
    """Bytes in, logits out, by jax.export alone; of 5 clips and two views.

    The views are averaged as the config says.
    """
    fields = dict(data__views=2, eval__average="probabilities")
    workdir, model = saved(tmp_path, "finetune", **fields)
    out = tmp_path / "out"
    assert export.export(workdir, "stablehlo", out, licence="MIT") == []
    program = jax.export.deserialize(bytearray((out / "model.stablehlo").read_bytes()))
    rows = portable.noise(model.config, 5, seed=1)
    assert rows["rgb"].shape[:2] == (5, 2) and not rows["has_rgb"][2]
    found = program.call(load_file(out / "model.safetensors"), rows)["logits"]
    np.testing.assert_allclose(found, model.logits(rows), rtol=1e-4, atol=1e-5)
    assert set(program.platforms) == {"cpu", "cuda", "tpu"}
    assert (out / "labels.txt").read_text() == "a\nb\nc\n"
    assert "The weights are under MIT." in (out / "README.md").read_text()
    again = api.load(out)  # the folder is one of --to safetensors too
    np.testing.assert_array_equal(again.logits(rows), model.logits(rows))


@pytest.mark.slow
def test_an_autoencoders_program_gives_features(tmp_path):
    workdir, model = saved(tmp_path, "pretrain")
    export.export(workdir, "stablehlo", tmp_path / "out")
    file = tmp_path / "out" / "model.stablehlo"
    program = jax.export.deserialize(bytearray(file.read_bytes()))
    rows = portable.noise(model.config, 2)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    found = program.call(weights, rows)
    wanted = model._encode(model.config.model.depth - 1, "mean")(model.params, rows)
    for m, has in (("rgb", [0, 1]), ("spectrogram", [0])):  # clip 1 has no sound
        ours, theirs = np.asarray(wanted[m])[has], np.asarray(found[m])[has]
        np.testing.assert_allclose(theirs, ours, rtol=1e-4, atol=1e-5)
    assert not (tmp_path / "out" / "labels.txt").exists()


def test_a_program_that_differs_is_not_passed_off(tmp_path):
    _, model = saved(tmp_path, "finetune")
    apply = jax.jit(portable.function(model.config, model.params))
    weights = portable.optim.named(model.params)
    other = {name: x + 0.01 for name, x in weights.items()}
    check = lambda w: portable.compare(
        model.config, model.params, lambda rows: apply(w, rows), "x"
    )
    assert check(weights) <= 1e-6
    with pytest.raises(CheckpointError, match="x was written.*differs from the model"):
        check(other)


def test_names_of_heads():
    bias = lambda n: {"bias": np.zeros(n)}
    assert portable.classes({"head": bias(3), "head_norm": bias(9)}) == 3
    heads = {"head_verb": bias(2), "head_noun": bias(5), "head_norm": bias(9)}
    assert portable.classes(heads) == {"verb": 2, "noun": 5}


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("tensorflow") is None,
    reason="TensorFlow is not installed",
)
def test_a_saved_model_gives_the_models_logits(tmp_path):
    import tensorflow as tf

    workdir, model = saved(tmp_path, "finetune")
    export.export(workdir, "savedmodel", tmp_path / "out")
    again = tf.saved_model.load(str(tmp_path / "out" / "saved_model"))
    rows = portable.noise(model.config, 4, seed=1)
    found = again.serve(rows)["logits"].numpy()
    np.testing.assert_allclose(found, model.logits(rows), rtol=1e-4, atol=1e-5)


def test_a_saved_model_needs_tensorflow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(CheckpointError, match="pip install tensorflow-cpu"):
        portable.savedmodel(None, None, tmp_path)
