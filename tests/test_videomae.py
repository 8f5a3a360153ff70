"""VideoMAE: the stored outputs of its three editions, every layout of their files."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import parity
import pytest
import torch_files
import videomae_files as files
from synthetic import quick

from av_mae import (
    CheckpointError,
    ConfigError,
    augment,
    autoencoder,
    checkpoints,
    classifier,
    convert,
    finetune,
    importers,
    losses,
    masking,
    optim,
    pretrain,
    tokens,
)
from av_mae import run as runs
from av_mae.importers import configure, videomae
from data import transforms

SIZES = ("width", "depth", "heads", "mlp")
FIXTURES = Path(__file__).resolve().parents[2] / "shared" / "fixtures" / "videomae"


needed = pytest.mark.skipif(
    not FIXTURES.is_dir(), reason=f"the published numbers are not at {FIXTURES}"
)


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with quick():
        yield


# The stored cases. A family is one edition's models of one kind.

FAMILIES = {
    "hf_videomae_pretrain": 3,
    "hf_videomae_classification": 3,
    "mcg_videomae_pretrain": 1,
    "mcg_videomae_finetune": 3,
    "keras_videomae_pretrain": 1,
    "keras_videomae_finetune": 1,
}
# Beside the models: what a classifier begins with, and pictures as they are prepared.
TRANSFERS = sorted(FIXTURES.glob("mcg_videomae_transfer_tiny*"))
PROCESSOR = FIXTURES / "hf_videomae_processor" / "io.npz"


# The two targets, by the word in the names of what is stored.
TARGETS = {"true": "standardised_channels_unbiased", "false": "pixels"}


def cases() -> list[str]:
    return [
        path.name
        for family in FAMILIES
        for path in sorted(FIXTURES.glob(f"{family}_tiny*"))
    ]


@pytest.mark.parametrize("family, count", FAMILIES.items(), ids=FAMILIES)
@needed
def test_every_family_has_its_cases(family, count):
    assert sum(name.startswith(family) for name in cases()) >= count


@needed
def test_no_transfer_and_no_picture_is_missing():
    assert len(TRANSFERS) >= 1 and len(prepared()) >= 2


def prepared() -> list[str]:
    """Names of the pictures that the processor made, by the statistics it used."""
    names = np.load(PROCESSOR).files if PROCESSOR.is_file() else []
    return [name for name in names if name.startswith("pixel_values_")]


def untold_of(name: str) -> dict:
    """What the file of a case does not tell, in the constructor's words."""
    if name.startswith("hf"):
        return {}
    given = json.loads((FIXTURES / name / "config.json").read_text())
    prefix = "encoder_" if "pretrain" in name else ""
    untold = {
        "model.heads": given[f"{prefix}num_heads"],
        "data.size": given["img_size"],
        "data.num_frames": given.get("all_frames") or given["num_frames"],
    }
    if prefix:
        untold["model.decoder.heads"] = given["decoder_num_heads"]
    return untold


@functools.cache
def imported(name: str) -> importers.Imported:
    """The model of a case."""
    return importers.read(FIXTURES / name, **untold_of(name))


@functools.cache
def stored(name: str) -> dict[str, np.ndarray]:
    """Inputs and outputs; other spellings of the same weights have those of `_tiny`."""
    path = FIXTURES / name / "io.npz"
    if not path.is_file():
        path = FIXTURES / name.removesuffix("_newkeys") / "io.npz"
    return dict(np.load(path))


def patches_of(config, io: dict) -> dict[str, jax.Array]:
    """The video of a case as flat patches; each edition orders its axes in its way."""
    if "pixel_values" in io:
        video = io["pixel_values"].transpose(0, 1, 3, 4, 2)  # from b t c h w
    else:
        video = io["video"]
        video = video if video.shape[-1] == 3 else video.transpose(0, 2, 3, 4, 1)
    return {"rgb": tokens.patchify(jnp.asarray(video), (2, 16, 16))}


def mask_of(masked: np.ndarray) -> dict[str, masking.Mask]:
    """Of [b n] with True where a token is masked."""
    order = np.argsort(masked, axis=1, kind="stable").astype(np.int32)
    k = int((~masked[0]).sum())
    return {"rgb": masking.Mask(jnp.asarray(order[:, :k]), jnp.asarray(order[:, k:]))}


def worst(found, wanted) -> float:
    """The largest absolute difference, which has to be within 1e-5."""
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)
    return float(np.abs(found - wanted).max())


def worst_gradient(found: dict, wanted: dict) -> float:
    """The largest ‖g − g_ref‖ / max(‖g_ref‖, 1e-4 ‖all‖), which has to be ≤ 1e-4."""
    norm = lambda x: float(np.linalg.norm(np.ravel(x)))
    everything = norm([norm(g) for g in wanted.values()])
    assert found.keys() == wanted.keys() and everything > 0
    errors = {
        name: norm(found[name] - g) / max(norm(g), 1e-4 * everything)
        for name, g in wanted.items()
    }
    bad = max(errors, key=errors.get)
    assert errors[bad] <= 1e-4, (bad, errors[bad])
    return errors[bad]


def close(found, wanted):
    """Of values within the network, which are larger: 1e-5 of the largest one."""
    bound = 1e-5 * max(1.0, float(np.abs(wanted).max()))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=bound)


@functools.cache
def autoencoder_of(settings: str):
    """(params, patches, masks) → normalised loss, (losses, targets, encoded, …)."""
    config = runs.config_of(json.loads(settings))
    network = autoencoder.build(config)

    def run(self, patches, masks):
        return self.encoder(self.embed(patches, masks))["rgb"], self(patches, masks)

    def forward(params, patches, masks):
        encoded, found = network.apply({"params": params}, patches, masks, method=run)
        prediction, each = found["rgb"], []
        hidden = masking.take(patches["rgb"], masks["rgb"].masked)
        targets = {}
        for word, kind in TARGETS.items():
            config.objective.target.rgb = kind
            targets[word] = pretrain.target(config, "rgb", hidden)
            each.append(losses.masked_mse(prediction, targets[word]))
        return each[0], (each, targets, encoded, prediction)

    return forward


@functools.cache
def compiled(settings: str, gradients: bool):
    """The function of `autoencoder_of`, with the gradients of its loss if wanted."""
    forward = autoencoder_of(settings)
    if gradients:
        return jax.jit(jax.value_and_grad(forward, has_aux=True))
    return jax.jit(lambda *args: (forward(*args), None))


def compare(name: str, model: importers.Imported) -> dict[str, float]:
    """The worst errors of a case: {"outputs": …, "loss": …, "gradients": …}."""
    if model.config.trainer == "pretrain":
        return compare_pretraining(name, model)
    return compare_classification(name, model)


def compare_pretraining(name: str, model: importers.Imported):
    """Outputs and losses of every stored mask, and the gradients where they are."""
    io, errors = stored(name), {"outputs": [], "loss": []}
    patches, settings = patches_of(model.config, io), runs.config_json(model.config)
    for key in [k for k in io if k.startswith("bool_masked_pos")]:
        masks, which = mask_of(io[key]), key.removeprefix("bool_masked_pos")
        reference = gradients(name) if which != "_random" else {}
        forward = compiled(settings, bool(reference))
        (_, found), slopes = forward(model.params, patches, masks)
        each, targets, encoded, prediction = found
        wanted = io.get(f"logits{which}", io.get("output"))
        errors["outputs"].append(worst(prediction, wanted))
        if which != "_random":
            wanted = io.get(f"encoder_last_hidden_state{which}")
            close(encoded, io.get("encoder_output", wanted))
        for loss, word in zip(each, TARGETS, strict=True):
            wanted = io.get(f"loss{which}_norm_pix_{word}")
            wanted = io.get(f"loss_normlize_{word}", wanted)
            if wanted is not None:
                errors["loss"].append(worst(loss, wanted) / float(wanted))
            labels = io.get(f"labels_normlize_{word}", np.zeros(0))
            if labels.size:
                worst(targets[word], labels)
        if reference:
            slopes = optim.named(jax.device_get(slopes))
            errors["gradients"] = [worst_gradient(slopes, reference)]
    assert errors["outputs"], f"nothing of {name} was compared"
    return {key: max(values) for key, values in errors.items() if values}


def gradients(name: str) -> dict[str, np.ndarray]:
    """The stored gradients as our parameters are: reading a file is linear."""
    for path in (FIXTURES / name).glob("grads_*.npz"):
        arrays = {k.removeprefix("grad."): v for k, v in np.load(path).items()}
        heads = {"model.heads": 2, "model.decoder.heads": 2}
        source = videomae.original(arrays, {})
        return optim.named(videomae.imported(source, heads).params)
    return {}


def compare_classification(name: str, model: importers.Imported):
    """Logits, the features before the head, the encoder's tokens and the loss."""
    io = stored(name)
    config, variables = model.config, {"params": model.params}
    network = classifier.build(config, config.model.classes)
    patches = patches_of(config, io)

    def run(self):
        encoded = self.encode(patches)
        features = self.features(encoded)
        return encoded["rgb"], features["rgb"], self.classify(features)["rgb"]

    encoded, features, logits = jax.jit(lambda v: network.apply(v, method=run))(
        variables
    )
    errors = {"outputs": worst(logits, io["logits"])}
    if "features" in io:
        close(features, io["features"])
    if "last_hidden_state" in io:
        close(encoded, io["last_hidden_state"])
    if "labels" in io:
        labels = jnp.asarray(io["labels"].astype(np.int32))
        loss = losses.softmax_cross_entropy(logits, labels)
        errors["loss"] = worst(loss, io["loss"]) / float(io["loss"])
    return errors


@pytest.mark.parametrize("name", cases())
def test_stored_outputs_are_met(name):
    errors = compare(name, imported(name))
    parity.record("_".join(name.split("_")[:3]), name, **errors)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in cases() if n.startswith("keras")])
def test_a_savedmodel_has_the_outputs_of_the_h5_file(tmp_path, name):
    pytest.importorskip("tensorflow")
    (path,) = (FIXTURES / name).glob("*.h5")
    folder = files.write_savedmodel(tmp_path / "model", files.read_h5(path))
    found = importers.read(folder, **untold_of(name))
    files.assert_same(found, imported(name))
    compare(name, found)


@pytest.mark.parametrize("name", cases())
def test_stored_files_fill_the_whole_model(name):
    model = imported(name)
    assert convert.shapes(model.params) == files.whole(runs.config_json(model.config))
    named = optim.named(model.params)
    assert {row.target for row in model.rows if row.target} == named.keys()
    assert all(x.dtype == np.float32 for x in named.values())


@needed
def test_positions_are_the_stored_ones():
    recipe = np.load(FIXTURES / "mcg_recipe" / "recipe.npz")
    key = next(k for k in recipe.files if k.startswith("sinusoid_1568x384"))
    np.testing.assert_allclose(
        tokens.sinusoid(1568, 384)[::97], recipe[key], rtol=0, atol=1e-6
    )
    io = stored("hf_videomae_pretrain_tiny")
    for which, d in (("encoder", 32), ("decoder", 16)):
        wanted = io[f"position_embeddings_{which}"][0]
        np.testing.assert_allclose(tokens.sinusoid(8, d), wanted, rtol=0, atol=1e-6)


@needed
def test_targets_are_the_stored_ones():
    io = stored("hf_videomae_pretrain_tiny")
    config = imported("hf_videomae_pretrain_tiny").config.copy_and_resolve_references()
    patches = patches_of(config, io)["rgb"]
    for kind, key in (("pixels", "raw"), ("standardised_channels_unbiased", "norm")):
        config.objective.target.rgb = kind
        found = pretrain.target(config, "rgb", patches)
        worst(found, io[f"target_patches_{key}"])


@needed
@pytest.mark.parametrize("folder", TRANSFERS, ids=lambda folder: folder.name)
def test_pretrained_weights_start_a_classifier(folder):
    io = np.load(folder / "io.npz")
    told = json.loads((folder / "transfer.json").read_text())
    source = imported("mcg_videomae_pretrain_tiny")
    given = told["finetune_config"]
    found = {
        "modalities": ("rgb",),
        "model.variant": "B/16x2",
        "model.width": given["embed_dim"],
        "model.depth": given["depth"],
        "model.heads": given["num_heads"],
        "model.mlp": given["embed_dim"] * given["mlp_ratio"],
        "model.classes": given["num_classes"],
        "model.norm": False,
        "model.head_norm": True,
        "data.num_frames": given["all_frames"],
        "data.size": given["img_size"],
    }
    block = {f"model.block.{k}": v for k, v in source.config.model.block.items()}
    config, _ = configure("finetune", found | block, {}, {})
    network = classifier.build(config, given["num_classes"])
    first = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), convert.abstract(config))
    fresh, unused = classifier.expected_gaps(source.config, config)
    params, report = checkpoints.init_from(
        first,
        source.params,
        renames=classifier.sources(source.config, config),
        adapt=classifier.ADAPT,
        allow_fresh=fresh,
        allow_unused=unused,
    )
    assert len(report.fresh) == len(told["missing_keys"])
    assert {name.split("/")[0] for name, _ in report.unused} == {
        *("decoder", "decoder_embed", "predict", "encoder")
    }
    params["head_norm"] = {
        "scale": io["init.fc_norm.weight"],
        "bias": io["init.fc_norm.bias"],
    }
    params["head"] = {"kernel": io["init.head.weight"].T, "bias": io["init.head.bias"]}
    patches = patches_of(config, io)

    def run(self):
        features = self.features(self.encode(patches))
        return features["rgb"], self.classify(features)["rgb"]

    forward = jax.jit(lambda p: network.apply({"params": p}, method=run))
    features, logits = forward(params)
    close(features, io["features"])
    error = worst(logits, io["logits"])
    parity.record("mcg_videomae_transfer", folder.name, outputs=error)


@pytest.mark.parametrize("fusion", ["bottleneck", "mid"])
@pytest.mark.parametrize("source", ["pretrain", "finetune"])
def test_the_picture_branch_of_an_audiovisual_model(tmp_path, source, fusion):
    finetuned = source == "finetune"
    arrays = files.huggingface(files.arrays(finetuned))
    settings = files.huggingface_config(finetuned, use_mean_pooling=finetuned)
    path = files.write_huggingface(tmp_path, arrays, settings)
    theirs = importers.read(path)
    found = {f"model.{k}": theirs.config.model[k] for k in ("variant", *SIZES)}
    found |= {f"model.block.{k}": v for k, v in theirs.config.model.block.items()}
    found |= {
        "model.fusion": fusion,
        "model.fusion_layer": 1,
        "model.classes": 5,
        "data.num_frames": files.FRAMES,
        "data.size": files.SIZE,
        "data.audio_seconds": 0.08,
        "init_from.rgb.checkpoint_path": str(path),
    }
    if fusion == "mid":  # the last layer is joint, and nobody's own
        found["init_from.allow_unused"] = ("encoder/rgb/block_1/.*",)
    config, _ = configure("finetune", found, {}, {})
    first = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), convert.abstract(config))
    params = optim.named(finetune.source_of(config)(first))
    given = optim.named(theirs.params)
    taken = {n for n, x in params.items() if (x != 1).any()}
    blocks = range(2 if fusion == "bottleneck" else 1)
    wanted = tuple(f"encoder/rgb/block_{i}/" for i in blocks)
    assert taken == {n for n in given if n.startswith(("embed/rgb/", *wanted))}
    for name in taken:
        np.testing.assert_array_equal(params[name], given[name])


@needed
@pytest.mark.parametrize("name", prepared())
def test_pictures_are_prepared_as_by_the_processor(name):
    io, key = np.load(PROCESSOR), name.removeprefix("pixel_values_")
    frames = transforms.resize(io["frames_uint8_thwc"], 32, "antialias")
    box = transforms.center_box(None, *frames.shape[1:3], 32)
    frames = transforms.crop(frames, box, 32, "antialias")
    mean, std = {
        "default_mean0.5": ((0.5,) * 3, (0.5,) * 3),
        "imagenet_mean": (videomae.IMAGENET_MEAN, videomae.IMAGENET_STD),
    }[key]
    found = augment.prepare_rgb(jnp.asarray(frames)[None], mean, std)
    wanted = io[name].transpose(0, 1, 3, 4, 2)
    parity.record("hf_videomae_processor", key, outputs=worst(found, wanted))


# Layouts, on files that are written here.


@pytest.mark.parametrize("biases", ["q_bias", "query", "all"])
@pytest.mark.parametrize("finetuned", [False, True])
def test_biases_of_every_spelling(tmp_path, finetuned, biases):
    key = "qkv_bias" if biases == "all" else "qv_bias"
    config = files.huggingface_config(finetuned, **{key: True})
    arrays = files.huggingface(files.arrays(finetuned), biases)
    if not finetuned:  # without the final norm, as with use_mean_pooling
        config["use_mean_pooling"] = False
    path = files.write_huggingface(tmp_path, arrays, config)
    found, wanted = importers.read(path), files.anchor(finetuned)
    model = found.config.model
    assert (model.get("head_eps"), model.get("decoder", {}).get("eps")) in (
        (1e-5, None),
        (None, 1e-5),
    )
    jax.tree.map(np.testing.assert_array_equal, found.params, wanted.params)
    left = [row for row in found.rows if not row.target]
    assert len(left) == (biases == "all") * (2 if finetuned else 3)


def test_no_biases_are_zeros(tmp_path):
    arrays = files.huggingface(files.arrays(True), "none")
    path = files.write_huggingface(tmp_path, arrays, files.huggingface_config(True))
    found = importers.read(path)
    assert not found.params["encoder"]["rgb"]["block_0"]["attention"]["qkv"][
        "bias"
    ].any()
    assert any(not row.source and "zeros" in row.note for row in found.rows)


def test_one_bias_of_all_three(tmp_path):
    arrays = files.arrays(True)
    for i in range(2):
        q, v = (arrays.pop(f"blocks.{i}.attn.{x}_bias") for x in "qv")
        arrays[f"blocks.{i}.attn.qkv.bias"] = np.concatenate([q, 0 * q + 9, v])
    path = files.write_mcg(tmp_path / "a.pth", arrays)
    files.assert_same(importers.read(path, **files.UNTOLD), files.anchor(True))


@pytest.mark.parametrize(
    "layout", ["safetensors", "safetensors shards", "bin", "bin shards"]
)
def test_files_of_hugging_face(tmp_path, layout):
    arrays = files.huggingface(files.arrays(True))
    config = files.huggingface_config(True)
    path = files.write_huggingface(tmp_path, arrays, config, layout)
    (path / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]})
    )
    found = importers.read(path)
    jax.tree.map(np.testing.assert_array_equal, found.params, files.anchor(True).params)
    assert found.labels == ["archery", "bowling", "crawling baby"]
    assert tuple(found.config.picture.mean) == (0.1, 0.2, 0.3)
    files_there = [p for p in path.iterdir() if "config" not in p.name]
    files.assert_same(importers.read(files_there[0]), found)


def test_what_hugging_face_says_of_the_model(tmp_path):
    arrays = files.huggingface(files.arrays(True))
    config = files.huggingface_config(
        True,
        hidden_act="gelu_new",
        layer_norm_eps=1e-12,
        problem_type="multi_label_classification",
    )
    found = importers.read(files.write_huggingface(tmp_path / "a", arrays, config))
    assert found.config.model.block.gelu == "tanh"
    assert found.config.model.block.eps == 1e-12
    assert found.config.objective.kind == "sigmoid"
    assert found.config.data.resize == "antialias"
    arrays = files.huggingface(files.arrays(False))
    config = files.huggingface_config(False, norm_pix_loss=False, use_mean_pooling=True)
    found = importers.read(files.write_huggingface(tmp_path / "b", arrays, config))
    assert found.config.objective.target.rgb == "pixels"
    assert not found.config.model.norm
    assert any("not used" in row.note for row in found.rows)


@pytest.mark.parametrize("key", ["model", "module"])
@pytest.mark.parametrize("prefix", ["", "module.", "backbone."])
def test_prefixes_of_the_original(tmp_path, key, prefix):
    arrays = {f"{prefix}{k}": v for k, v in files.arrays(True).items()}
    path = files.write_mcg(tmp_path / "checkpoint-best.pth", arrays, key)
    files.assert_same(importers.read(tmp_path, **files.UNTOLD), files.anchor(True))
    files.assert_same(importers.read(path, **files.UNTOLD), files.anchor(True))


@pytest.mark.parametrize("finetuned", [False, True])
def test_layer_scale(tmp_path, finetuned):
    arrays = files.arrays(finetuned, scaled=True)
    path = files.write_mcg(tmp_path / "a.pth", arrays)
    found = importers.read(path, **files.untold(finetuned))
    block = found.params["encoder"]["rgb"]["block_1"]
    root = "" if finetuned else "encoder."
    for i in (1, 2):
        wanted = arrays[f"{root}blocks.1.gamma_{i}"]
        np.testing.assert_array_equal(block[f"scale_{i}"], wanted)
    assert found.config.model.block.layer_scale > 0
    files.assert_same(found, files.anchor(finetuned, scaled=True))


def test_the_final_norm_and_the_first_token(tmp_path):
    path = files.write_mcg(tmp_path / "a.pth", files.arrays(True, pooled=False))
    model = importers.read(path, **files.UNTOLD).config.model
    assert (model.norm, model.head_norm, model.pool) == (True, False, "token")
    model = files.anchor(True).config.model
    assert (model.norm, model.head_norm, model.pool) == (False, True, "mean")


def test_learned_positions_tell_the_frames(tmp_path):
    arrays = files.arrays(True, learned=True)
    path = files.write_mcg(tmp_path / "a.pth", arrays)
    options = {k: v for k, v in files.UNTOLD.items() if k != "data.num_frames"}
    found = importers.read(path, **options)
    assert found.config.model.positions == "learned"
    assert found.config.data.num_frames == files.FRAMES
    table = found.params["embed"]["positions_rgb"]["embedding"]
    np.testing.assert_array_equal(table, arrays["pos_embed"][0])
    with pytest.raises(CheckpointError, match="positions.*data.size"):
        importers.read(path, **(options | {"data.size": 12}))
    with pytest.raises(CheckpointError, match="data.num_frames is 8, but the file"):
        importers.read(path, **(options | {"data.num_frames": 8}))


@pytest.mark.parametrize(
    "name", ["pos_embed", "videomae.embeddings.position_embeddings"]
)
def test_a_stored_sinusoid_is_left_out(tmp_path, name):
    table = tokens.sinusoid(files.TOKENS, files.WIDTH)[None]
    path = files.write_mcg(tmp_path / "a.pth", files.arrays(True) | {name: table})
    found = importers.read(path, **files.UNTOLD)
    files.assert_same(found, files.anchor(True))
    assert any("sinusoid" in note for note in found.notes)


def test_what_a_run_of_the_original_remembers(tmp_path):
    more = dict(num_frames=files.FRAMES, input_size=files.SIZE, sampling_rate=2)
    args = torch_files.namespace(model="x", mask_ratio=0.75, **more)
    path = files.write_mcg(tmp_path / "a.pth", files.arrays(False), args=args)
    found = importers.read(path, **{"model.heads": 2, "model.decoder.heads": 2})
    files.assert_same(found, files.anchor(False))
    assert (found.config.data.stride, found.config.mask.rgb.ratio) == (2, 0.75)
    path = files.write_mcg(tmp_path / "b.pth", files.arrays(True), args=args)
    assert importers.read(path, **{"model.heads": 2}).config.data.stride == 2


def test_heads_are_asked_for_or_the_published_ones(tmp_path):
    path = files.write_mcg(tmp_path / "a.pth", files.arrays(True))
    with pytest.raises(CheckpointError, match="a.pth.*number of heads.*model.heads"):
        importers.read(path)
    with pytest.raises(ConfigError, match="model.heads is 3, which does not divide"):
        importers.read(path, **(files.UNTOLD | {"model.heads": 3}))


@pytest.mark.parametrize("pieces", ["no decoder", "a part of it"])
def test_a_file_without_a_decoder_says_so(tmp_path, pieces):
    arrays = files.arrays(False, decoder=False)
    if pieces == "a part of it":
        whole = files.arrays(False)
        arrays |= {k: whole[k] for k in ("mask_token", "encoder_to_decoder.weight")}
    path = files.write_mcg(tmp_path / "a.pth", arrays)
    found = importers.read(path, **files.UNTOLD)
    assert found.params.keys() == {"embed", "encoder"}
    assert any(note.startswith("Only the encoder was loaded") for note in found.notes)
    fitted = convert.fitted(found, path)
    assert any(row.target.startswith("decoder/") for row in fitted.rows)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("edition", ["mcg", "hf"])
def test_half_precision_becomes_float32(tmp_path, dtype, edition):
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    arrays = {k: v.astype(kind) for k, v in files.arrays(True).items()}
    if edition == "mcg":
        found = importers.read(
            files.write_mcg(tmp_path / "a.pth", arrays), **files.UNTOLD
        )
    else:
        config = files.huggingface_config(True)
        path = files.write_huggingface(tmp_path, files.huggingface(arrays), config)
        found = importers.read(path)
    kernel = found.params["head"]["kernel"]
    assert kernel.dtype == np.float32
    np.testing.assert_array_equal(kernel, arrays["head.weight"].T.astype(np.float32))
    assert any(f"{dtype} to float32" in row.note for row in found.rows)


# What is refused.


def test_files_that_are_no_videomae_are_told(tmp_path):
    arrays = files.arrays(True)
    more = arrays | {"blocks.0.attn.relative_position": arrays["head.bias"]}
    path = files.write_mcg(tmp_path / "more.pth", more)
    with pytest.raises(CheckpointError, match="more.pth.*relative_position"):
        importers.read(path, **files.UNTOLD)
    for name in ("blocks.1.norm2.weight", "blocks.0.attn.qkv.weight", "head.bias"):
        less = {k: v for k, v in arrays.items() if k != name}
        path = files.write_mcg(tmp_path / "less.pth", less)
        with pytest.raises(CheckpointError, match="less.pth.*missing"):
            convert.fitted(importers.read(path, **files.UNTOLD), path)
    grey = {k: v[:, :1] if v.ndim == 5 else v for k, v in arrays.items()}
    path = files.write_mcg(tmp_path / "grey.pth", grey)
    with pytest.raises(CheckpointError, match="1 channels, not 3"):
        importers.read(path, **files.UNTOLD)
    skipped = {k.replace("blocks.1", "blocks.5"): v for k, v in arrays.items()}
    path = files.write_mcg(tmp_path / "skipped.pth", skipped)
    with pytest.raises(CheckpointError, match="some are missing"):
        importers.read(path, **files.UNTOLD)
    other = torch_files.write(tmp_path / "other.pth", {"model": {"x": np.ones(2)}})
    assert not videomae.matches(other)
    with pytest.raises(CheckpointError, match="is no file that this release reads"):
        importers.read(other)


def test_a_file_that_wants_to_run_code_is_refused_by_every_way_in(tmp_path):
    marker = tmp_path / "was-run"
    call = torch_files.Call(torch_files.Global("posix", "system"), (f"touch {marker}",))
    path = files.write_mcg(tmp_path / "bad.pth", files.arrays(True), args=call)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(files.huggingface_config(True)))
    (folder / "pytorch_model.bin").write_bytes(path.read_bytes())
    for source in (path, folder):
        with pytest.raises(CheckpointError, match="posix.system"):
            importers.read(source)
    assert not marker.exists()


def test_damaged_folders_of_hugging_face_are_told(tmp_path):
    arrays, config = (
        files.huggingface(files.arrays(True)),
        files.huggingface_config(True),
    )
    folder = files.write_huggingface(tmp_path / "a", arrays, config, "bin shards")
    index = folder / "pytorch_model.bin.index.json"
    good = index.read_text()
    first = "pytorch_model-00001-of"
    for text, match in (
        ("{}", "cannot be read"),
        (good.replace(first, f"../a/{first}"), "names the shard ../a/"),
        (good.replace("classifier.bias", "another.bias"), "no shard holds"),
    ):
        index.write_text(text)
        with pytest.raises(CheckpointError, match=match):
            importers.read(folder)
    folder = files.write_huggingface(tmp_path / "b", arrays, config)
    (folder / "model.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(CheckpointError, match="damaged"):
        importers.read(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="neither model.safetensors"):
        importers.read(folder)
    config["hidden_act"] = "relu"
    folder = files.write_huggingface(tmp_path / "c", arrays, config)
    with pytest.raises(CheckpointError, match="hidden_act 'relu'"):
        importers.read(folder)


def test_options_that_contradict_or_do_not_exist_are_told(tmp_path):
    folder = files.write_huggingface(
        tmp_path, files.huggingface(files.arrays(True)), files.huggingface_config(True)
    )
    with pytest.raises(CheckpointError, match="model.heads is 4, but the file says 2"):
        importers.read(folder, **{"model.heads": 4})
    with pytest.raises(ConfigError, match="model.colour is no field"):
        importers.read(folder, **{"model.colour": 4})
    found = importers.read(folder, **{"data.views": 2, "data.crops": 1})
    assert (found.config.data.views, found.config.data.crops) == (2, 1)


# The published sizes.

PUBLISHED = {
    "S": (24_029_376, 22_033_936),
    "B": (94_210_944, 86_534_800),
    "L": (342_996_992, 304_270_736),
    "H": (692_487_296, 632_119_440),
}


@pytest.mark.parametrize(
    "variant", ["S", "B", *(pytest.param(x, marks=pytest.mark.slow) for x in "LH")]
)
@pytest.mark.parametrize("trainer", ["pretrain", "finetune"])
def test_published_numbers_of_parameters(variant, trainer):
    config = videomae.published(trainer, variant, classes=400)
    shapes = jax.tree.leaves(convert.abstract(config))
    count = sum(x.size for x in shapes)
    assert count == PUBLISHED[variant][trainer == "finetune"]
