"""Export: what is written comes back, and Hugging Face's classes compute the same."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import videomae_files as files
from synthetic import quick

from av_mae import (
    CheckpointError,
    autoencoder,
    checkpoints,
    classifier,
    convert,
    export,
    importers,
    masking,
    optim,
    tokens,
)
from av_mae import run as runs
from av_mae.importers import configure

LABELS = ["archery", "bowling", "crawling baby"]


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with quick():
        yield


def settings(trainer: str, **more):
    """A config of VideoMAE's kind at a tiny size; more: fields with __ for dots."""
    found = {
        "modalities": ("rgb",),
        "data.num_frames": files.FRAMES,
        "data.size": files.SIZE,
        "model.variant": f"B/{files.SIDE}x2",
        "model.width": files.WIDTH,
        "model.depth": 2,
        "model.heads": files.HEADS,
        "model.mlp": files.MLP,
        "model.block.gelu": "erf",
        "model.block.key_bias": False,
    }
    if trainer == "finetune":
        found |= {"model.classes": 3, "model.norm": False, "model.head_norm": True}
        found["model.head_eps"] = 1e-5
    else:
        sizes = dict(width=4, depth=1, heads=2, mlp=12, bias=False, eps=1e-5)
        found |= {f"model.decoder.{k}": v for k, v in sizes.items()}
    found |= {k.replace("__", "."): v for k, v in more.items()}
    return configure(trainer, found, {}, {})[0]


def parameters(config, seed: int = 0):
    """Random values for all parameters of a config's model."""
    rng = np.random.default_rng(seed)
    draw = lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32)
    return jax.tree.map(draw, convert.abstract(config))


def write(workdir, config, params, **state):
    """A checkpoint of ours."""
    meta = {"labels": LABELS if config.trainer == "finetune" else []}
    saved = json.loads(runs.config_json(config))
    target = checkpoints.Checkpoints(workdir, saved, meta, keep=1)
    target.save(7, {"params": params, **state}, force=True)
    target.close()
    return workdir


def video() -> np.ndarray:
    """Two clips [b t h w c]."""
    shape = (2, files.FRAMES, files.SIZE, files.SIZE, 3)
    return np.random.default_rng(5).normal(0, 1, shape).astype(np.float32)


def mask() -> np.ndarray:
    """Which tokens of both clips are masked, [b n]."""
    rows = np.zeros((2, files.TOKENS), bool)
    rows[0, [1, 2, 5, 7, 0]] = rows[1, [0, 3, 4, 6, 1]] = True
    return rows


def outputs(config, params) -> np.ndarray:
    """Logits of the clips, or predictions of the masked tokens."""
    patch = (2, files.SIDE, files.SIDE)
    patches = {"rgb": tokens.patchify(jnp.asarray(video()), patch)}
    if config.trainer == "finetune":
        network = classifier.build(config, config.model.classes)
        apply = lambda p: network.apply({"params": p}, patches)["rgb"]
    else:
        network = autoencoder.build(config)
        order = np.argsort(mask(), axis=1, kind="stable").astype(np.int32)
        k = int((~mask()[0]).sum())
        order = jnp.asarray(order)
        masks = {"rgb": masking.Mask(order[:, :k], order[:, k:])}
        apply = lambda p: network.apply({"params": p}, patches, masks)["rgb"]
    return np.asarray(jax.jit(apply)(params))


# Our own layout.


def test_moving_averages_are_exported_where_asked_for(tmp_path):
    config = settings("finetune")
    params, ema = parameters(config), parameters(config, seed=1)
    workdir = write(tmp_path / "run", config, params, ema=ema)
    export.export(workdir, "safetensors", tmp_path / "out", weights="ema")
    found = importers.read(tmp_path / "out").params
    jax.tree.map(np.testing.assert_array_equal, found, ema)


def test_a_published_folder_is_exported_too(tmp_path):
    """As our own: what `safetensors` wrote, again, with the names of the classes."""
    config = settings("finetune")
    params = parameters(config)
    export.export(
        write(tmp_path / "run", config, params), "safetensors", tmp_path / "a"
    )
    export.export(tmp_path / "a", "safetensors", tmp_path / "b")
    one, other = importers.read(tmp_path / "a"), importers.read(tmp_path / "b")
    jax.tree.map(np.testing.assert_array_equal, one.params, other.params)
    assert one.config == other.config and one.labels == other.labels
    assert "left no evaluation" in (tmp_path / "b" / "README.md").read_text()
    assert one.meta == other.meta and one.meta["labels"] == one.labels
    with pytest.raises(CheckpointError, match="has no weights called ema"):
        export.export(tmp_path / "a", "safetensors", tmp_path / "b", weights="ema")


def test_the_command_tells_errors_in_a_sentence(tmp_path, capsys):
    arguments = [str(tmp_path / "none"), "--to", "safetensors", "--out", "x"]
    with pytest.raises(SystemExit) as stop:
        export.main(arguments)
    assert stop.value.code == 2
    assert "holds no checkpoint" in capsys.readouterr().err


# Hugging Face's.

MODELS = {
    "pretraining": ("pretrain", dict(model__norm=False)),
    "with the final norm": ("pretrain", dict(model__block__eps=1e-12)),
    "one early stack": ("pretrain", dict(model__fusion="early")),
    "one shared stack": (
        "pretrain",
        dict(model__fusion="shared", model__decoder__kind="joint"),
    ),
    "raw pixels": ("pretrain", {"objective__target__rgb": "pixels"}),
    "classifier": ("finetune", {}),
    "first token": (
        "finetune",
        dict(model__norm=True, model__head_norm=False, model__pool="token"),
    ),
    "tanh": ("finetune", dict(model__block__gelu="tanh")),
    "keys with biases": ("finetune", dict(model__block__key_bias=True)),
    "layer scale": ("finetune", dict(model__block__layer_scale=0.1)),
    "bottleneck": (
        "finetune",
        dict(
            model__fusion="bottleneck",
            model__norm=True,
            model__head_norm=False,
            model__pool="token",
        ),
    ),
    "labels apart": ("finetune", dict(objective__kind="sigmoid")),
}


def exported(tmp_path, name: str):
    """(config, params, folder, notes) of a model in Hugging Face's layout."""
    trainer, fields = MODELS[name]
    config = settings(trainer, **fields)
    params = parameters(config)
    workdir, out = write(tmp_path / "run", config, params), tmp_path / "out"
    return config, params, out, export.export(workdir, "hf-videomae", out)


@pytest.mark.parametrize("name", MODELS)
def test_hugging_faces_layout_is_read_back(tmp_path, name):
    config, params, out, notes = exported(tmp_path, name)
    found = importers.read(out)
    assert bool(notes) == (name in ("keys with biases", "layer scale"))
    if notes:  # other parameters, of the same function
        ours, theirs = outputs(config, params), outputs(found.config, found.params)
        np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-5)
    else:
        place = lambda n: re.sub(r"^(\w+coder/)(\w+/)?(block|norm)", r"\1rgb/\3", n)
        ours = {place(n): x for n, x in optim.named(params).items()}
        jax.tree.map(np.testing.assert_array_equal, optim.named(found.params), ours)
    for field in ("norm", "head_norm", "pool", "head_eps", "block"):
        if field in config.model and not (notes and field == "block"):
            assert found.config.model[field] == config.model[field], field
    assert found.labels == (LABELS if config.trainer == "finetune" else [])
    for field in ("mean", "std"):
        assert list(found.config.picture[field]) == list(config.picture[field])
    if name in ("raw pixels", "labels apart"):
        objective = found.config.objective
        same = objective.kind, config.objective.kind
        assert same[0] == same[1]
        if "target" in objective:
            assert objective.target.rgb == config.objective.target.rgb


@pytest.mark.parametrize("name", MODELS)
def test_hugging_faces_classes_open_it(tmp_path, name):
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed"
    )
    import torch

    config, params, out, _ = exported(tmp_path, name)
    finetuned = config.trainer == "finetune"
    kind = "VideoMAEForVideoClassification" if finetuned else "VideoMAEForPreTraining"
    model, told = getattr(transformers, kind).from_pretrained(
        out, output_loading_info=True
    )
    assert not told["missing_keys"] and not told["unexpected_keys"], told
    given = torch.from_numpy(video().transpose(0, 1, 4, 2, 3).copy())
    more = {} if finetuned else {"bool_masked_pos": torch.from_numpy(mask())}
    with torch.no_grad():
        found = model.eval()(given, **more).logits.numpy()
    wanted = outputs(config, params)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)
    error = float(np.abs(found - wanted).max())
    parity.record("export to transformers", name, outputs=error)
    if finetuned:
        assert model.config.id2label == dict(enumerate(LABELS))


def test_another_epsilon_is_told(tmp_path):
    for trainer, field in (
        ("pretrain", "model__decoder__eps"),
        ("finetune", "model__head_eps"),
    ):
        config = settings(trainer, **{field: 1e-6})
        workdir = write(tmp_path / trainer, config, parameters(config))
        (note,) = export.export(workdir, "hf-videomae", tmp_path / f"{trainer} out")
        assert "epsilon 1e-05, ours 1e-06" in note


REFUSED = {
    "modalities": ("pretrain", dict(modalities=("rgb", "spectrogram"))),
    "sound": ("finetune", dict(modalities=("spectrogram",))),
    "positions": ("finetune", dict(model__positions="learned")),
    "CLS": ("finetune", dict(model__cls_token=True)),
    "modality embeddings": ("pretrain", dict(model__modality_embeddings=True)),
    "a bias": ("pretrain", dict(model__decoder__bias=True)),
    "decoder positions": ("pretrain", dict(model__decoder__positions="learned")),
    "pool": ("finetune", dict(model__pool="max")),
    "no norm": ("finetune", dict(model__head_norm=False)),
    "representation": ("finetune", dict(model__representation=5)),
    "two stacks": ("pretrain", dict(model__fusion="mid", model__fusion_layers=1)),
}


@pytest.mark.parametrize("trainer, fields", REFUSED.values(), ids=REFUSED)
def test_what_hugging_face_cannot_express_is_told(tmp_path, trainer, fields):
    config = settings(trainer, **fields)
    workdir = write(tmp_path / "run", config, parameters(config))
    with pytest.raises(CheckpointError, match="--to safetensors"):
        export.export(workdir, "hf-videomae", tmp_path / "out")
    assert not (tmp_path / "out").exists()
