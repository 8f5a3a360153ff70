"""The command: a published file becomes a workdir that trainers take."""

import os
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
import scenic
import synthetic
import test_import_scenic

from av_mae import CheckpointError, checkpoints, convert, finetune, optim
from av_mae import run as runs

LAYER = {"model.fusion_layer": 0}


@pytest.fixture(autouse=True, scope="module")
def quick():
    with synthetic.quick():
        yield


@pytest.fixture(scope="module")
def config():
    """A finetuning config small enough to run; the file's model is of its shape."""
    return synthetic.tiny("digits/finetune", model__drop_path=0.0)


def random(tree, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32)
    return jax.tree.map(draw, tree)


def as_kernels(found: dict, sides: dict) -> dict:
    """Flat patch embeddings as Scenic's convolutions."""
    shape = lambda name, x: (*sides[name], x.shape[-1])
    return found | {n: found[n].reshape(shape(n, found[n])) for n in sides}


@pytest.fixture(scope="module")
def published(config, tmp_path_factory):
    """(our params, the finetuning file that holds the same in Scenic's layout)."""
    classes = config.copy_and_resolve_references()
    classes.model.classes = 3
    params = random(convert.abstract(classes))
    found = scenic.write(params, scenic.classifier_places(config.modalities))
    sides = {
        "embedding/kernel": (2, 16, 16, 3),
        "embedding_spectrogram/kernel": (16, 16, 1),
    }
    path = tmp_path_factory.mktemp("published") / "checkpoint"
    return params, test_import_scenic.write(path, as_kernels(found, sides), "finetune")


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "av_mae.convert", *map(str, arguments)],
        cwd=synthetic.ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )


def assert_same(found, expected):
    found, expected = optim.named(found), optim.named(expected)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_a_finetuned_file_is_evaluated_and_gives_first_weights(
    published, config, tmp_path, caplog
):
    params, path = published
    out = tmp_path / "converted"
    run = command(path, "--out", out, "--config.model.fusion_layer=0")
    assert run.returncode == 0, run.stderr
    # The report: every parameter of the file, what was assumed, how many.
    told = dict(line.split()[:2] for line in run.stdout.splitlines() if "/" in line)
    assert told["embedding_spectrogram/kernel"] == "embed/spectrogram/kernel"
    assert told["bottleneck"] == "encoder/bottleneck"
    assert "Not in the file, taken from the publication: " in run.stdout
    assert "model.fusion_layer" not in run.stdout
    assert " 0 left out; " in run.stdout and "0 parameters are not in" in run.stdout
    assert f"written: {out}, step 0" in run.stdout
    # The workdir is a checkpoint like any other.
    values, saved, meta = checkpoints.load(out)
    assert_same(values, params)
    assert saved["model"]["classes"] == 3 and saved["trainer"] == "finetune"
    assert meta["source"] == str(path) and meta["spectrogram"]["preset"] == "mbt"
    # It is evaluated in its place, and as first weights; the file itself has to be
    # converted, as it does not tell the layer of fusion.
    data = synthetic.Dataset(config)
    logits, _ = finetune.predict_all(config, data, out)
    assert np.ptp(logits) > 0.1
    with caplog.at_level("INFO"):
        finetune.evaluate(config, {"eval": data}, out)
    # The file does not tell how it was trained, and so that is not compared.
    assert "evaluating the weights of" in caplog.text
    assert not re.search("(batch_size|optimizer|schedule)", caplog.text)
    assert "data.audio_seconds is 0.32, not 10.0, data.num_frames is 4" in caplog.text
    config = config.copy_and_resolve_references()
    config.init_from.checkpoint_path = str(out)
    fresh = jax.tree.map(np.zeros_like, params)
    assert_same(finetune.source_of(config)(fresh), params)
    config.init_from.checkpoint_path = str(path)
    with pytest.raises(CheckpointError, match="av_mae.convert. with --config.model.fu"):
        finetune.source_of(config)(fresh)


def test_a_file_is_evaluated_directly(config, published, tmp_path):
    """One modality alone: nothing is left to tell."""
    params, path = published
    config = config.copy_and_resolve_references()
    config.modalities, config.init_from.checkpoint_path = ("rgb",), str(path)
    params = {**params, "embed": {"rgb": params["embed"]["rgb"]}}
    rgb, norm = params["encoder"]["rgb"], params["encoder"]["norm"]
    params["encoder"] = {"rgb": rgb, "norm": norm}
    found = scenic.write(params, scenic.classifier_places(("rgb",)))
    found = as_kernels(found, {"embedding/kernel": (2, 16, 16, 3)})
    path = test_import_scenic.write(tmp_path / "checkpoint", found, "finetune")
    config.init_from.checkpoint_path = str(path)
    data = synthetic.Dataset(config)
    direct, _ = finetune.predict_all(config, data, tmp_path / "empty")
    convert.convert(path, tmp_path / "out")
    assert_same(checkpoints.load(tmp_path / "out")[0], params)
    assert np.ptp(direct) > 0.1


def test_finetuning_begins_from_a_published_pretraining_file(config, tmp_path):
    pretrained = synthetic.tiny("digits/pretrain")
    params = random(convert.abstract(pretrained))
    places = scenic.places(
        "separate_encoders_and_concat", "same_decoder", config.modalities
    )
    sides = {
        "embedding_rgb/kernel": (2, 16, 16, 3),
        "embedding_spectrogram/kernel": (16, 16, 1),
    }
    stored = as_kernels(scenic.write(params, places), sides)
    path = test_import_scenic.write(tmp_path / "checkpoint", stored, "pretrain")
    config = config.copy_and_resolve_references()
    config.init_from.checkpoint_path, config.model.classes = str(path), 3
    fresh = random(convert.abstract(config), seed=1)
    found = optim.named(finetune.source_of(config)(fresh))
    np.testing.assert_array_equal(found["head/kernel"], fresh["head"]["kernel"])
    theirs = optim.named(params)
    name = "block_0/attention/qkv/kernel"
    for m in config.modalities:
        same = f"encoder/{m}/{name}"
        np.testing.assert_array_equal(found[same], theirs[same])
        ours = found[f"encoder/{m}/block_1/mlp/in/kernel"]
        joint = theirs["encoder/joint/block_0/mlp/in/kernel"]
        np.testing.assert_array_equal(ours, joint)
        embed = f"embed/{m}/kernel"
        np.testing.assert_array_equal(found[embed], theirs[embed])


def test_the_command_in_its_words(tmp_path, published):
    _, path = published
    for arguments, message in [
        ((), "give a published file and --out"),
        ((path,), "give a published file and --out"),
        ((tmp_path / "none", "--out", tmp_path / "a"), "none does not exist"),
        ((path, "--out", tmp_path / "a", "--fusion=mid"), "what is '--fusion=mid'?"),
    ]:
        with pytest.raises(SystemExit) as stop:
            convert.main([str(argument) for argument in arguments])
        assert stop.value.code == 2, message
    wrong = ("--config.model.fusion_layer=0", "--config.model.fuson=1")
    run = command(path, "--out", tmp_path / "a", *wrong)
    assert run.returncode == 2 and "Traceback" not in run.stderr
    assert run.stderr.strip().endswith("model.fuson is no field of a finetune config.")
    assert not (tmp_path / "a").exists()


def test_values_of_options():
    arguments = [
        "--config.model.fusion=mid",
        "--config.data.num_frames=8",
        "--config.data.audio_seconds=0.4",
        "--config.modalities=('rgb',)",
        "--config.data.dir=a=b",
    ]
    assert convert.options_of(arguments) == {
        "model.fusion": "mid",
        "data.num_frames": 8,
        "data.audio_seconds": 0.4,
        "modalities": ("rgb",),
        "data.dir": "a=b",
    }


def test_what_does_not_fit_is_refused(tmp_path):
    """Learned positions for another input than the config's."""
    stored = test_import_scenic.arrays_of(test_import_scenic.tiny_shapes())
    for m, n in (("rgb", 8), ("spectrogram", 80)):
        table = np.ones((1, n, 32), np.float32)
        stored[f"posembed_input_{m}/pos_embedding"] = table
    path = test_import_scenic.write(tmp_path / "file", stored, "pretrain")
    with pytest.raises(CheckpointError, match=r"positions_rgb/embedding \(8, 32\).*in"):
        convert.convert(path, tmp_path / "a")
    small = {"data.num_frames": 4, "data.size": 16, "data.audio_seconds": 0.4}
    found = convert.convert(path, tmp_path / "a", **small)
    assert found.config.model.positions == "learned"
    # The same again is written again; another experiment is not.
    convert.convert(path, tmp_path / "a", **small)
    other = {"model.decoder.kind": "joint"}
    with pytest.raises(CheckpointError, match="holds another experiment"):
        convert.convert(path, tmp_path / "a", **small | other)


def test_parameters_that_the_file_lacks_are_told(tmp_path):
    """A file of one more layer in the config than it has weights for."""
    stored = test_import_scenic.arrays_of(test_import_scenic.tiny_shapes())
    path = test_import_scenic.write(tmp_path / "file", stored, "pretrain")
    found = convert.importers.read(path)
    del found.params["predict"]
    found.rows[:] = [row for row in found.rows if "predict" not in row.target]
    rows = [row for row in convert.fitted(found, path).rows if not row.source]
    assert [row.target for row in rows] == [
        f"predict/{m}/{leaf}"
        for m in ("rgb", "spectrogram")
        for leaf in ("bias", "kernel")
    ]
    assert "4 parameters are not in the source" in convert.summary(found)
    assert runs.config_json(found.config)
