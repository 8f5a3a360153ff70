"""Pretraining: loss falls, evaluation repeats, each setting does what it says."""

import functools
import json
import logging
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import scenic
import scenic_pretrain
import synthetic
from PIL import Image

from av_mae import (
    ConfigError,
    autoencoder,
    checkpoints,
    inputs,
    loop,
    losses,
    optim,
    pretrain,
)
from av_mae import run as runs
from av_mae.importers import videomae

CONFIG = "digits/pretrain"
KINDS = ("loss", "fraction")
VIDEOMAE = scenic.SHARED / "fixtures" / "videomae" / "hf_videomae_pretrain_tiny"


@pytest.fixture(autouse=True, scope="module")
def quick():
    with synthetic.quick():
        yield


def datasets(config, **options):
    train = synthetic.Dataset(config, **options)
    held_out = synthetic.Dataset(config, num_clips=6, first=100, **options)
    return {"train": train, "eval": held_out}


@pytest.fixture(autouse=True, scope="module")
def without_tensorboard():
    """Importing TensorFlow takes seconds; test_loop tests its files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_tensorboard", lambda workdir: None)
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(config, workdir, results) of a run of 8 steps, evaluated every 4."""
    config, workdir = synthetic.tiny(CONFIG), tmp_path_factory.mktemp("pretrained")
    return config, workdir, pretrain.train(config, datasets(config), workdir)


# A whole run.


def test_loss_falls(trained):
    config, workdir, results = trained
    rows = [row for row in synthetic.lines(workdir) if "loss" in row]
    for name in ("loss", "loss_rgb"):
        assert rows[-1][name] < 0.95 * rows[0][name], (name, rows)
    assert results["eval/fraction_rgb"] < 0.95
    assert results["eval/fraction_spectrogram"] < 0.95


def test_a_line_for_each_log_step_and_evaluation(trained):
    _, workdir, results = trained
    numbers = {"gradient_norm", "learning_rate", "loss", "parameter_norm"}
    numbers |= {"loss_rgb", "loss_spectrogram"}
    names = ("loss_rgb", "fraction_rgb", "loss_spectrogram", "fraction_spectrogram")
    evaluation = {f"eval/{name}" for name in names}
    rows = synthetic.lines(workdir)
    expected = [(2, numbers), (4, numbers), (4, evaluation)]
    expected += [(6, numbers), (8, numbers), (8, evaluation)]
    assert [(row["step"], row.keys() - {"step"}) for row in rows] == expected
    assert results == {name: rows[-1][name] for name in evaluation}
    for row in rows[:2]:
        weighted = 0.5 * row["loss_rgb"] + 0.5 * row["loss_spectrogram"]
        assert row["loss"] == pytest.approx(weighted, rel=1e-6)


def test_evaluation_alone_repeats_that_of_the_training(trained):
    config, workdir, results = trained
    for _ in range(2):
        data = {"eval": datasets(config)["eval"]}
        assert pretrain.evaluate(config, data, workdir) == results


def test_each_modality_is_measured_with_the_other_hidden(trained):
    """As of clips that lack it; of what is then hidden there is no number."""
    config, workdir, _ = trained
    config = config.copy_and_resolve_references()
    config.eval.modalities = ("rgb", "spectrogram", "rgb+spectrogram")
    found = pretrain.evaluate(config, datasets(config), workdir)
    config.eval.modalities = ()
    for m, lacking in (("rgb", "has_audio"), ("spectrogram", "has_rgb")):
        data = datasets(config)["eval"]
        data.without[lacking], data.missing = set(range(6)), True
        alone = pretrain.evaluate(config, {"eval": data}, workdir)
        for name in (f"loss_{m}", f"fraction_{m}"):
            assert found[f"eval/{m}/{name}"] == pytest.approx(alone[f"eval/{name}"])
            assert found[f"eval/{m}/{name}"] != found[f"eval/{name}"]
    numbers = {f"eval/{m}/{kind}_{m}" for m in ("rgb", "spectrogram") for kind in KINDS}
    both = {f"eval/rgb+spectrogram/{k}_{m}" for m in config.modalities for k in KINDS}
    assert {name for name in found if name.count("/") == 2} == numbers | both
    assert found["eval/rgb+spectrogram/loss_rgb"] == found["eval/loss_rgb"]


def test_a_finished_run_is_evaluated_again(trained):
    config, workdir, results = trained
    before = synthetic.lines(workdir)
    assert pretrain.train(config, datasets(config), workdir) == results
    assert synthetic.lines(workdir) == before


def test_pictures_are_written(trained):
    config, workdir, _ = trained
    names = {path.name for path in (workdir / "pictures").iterdir()}
    files = ("rgb.png", "rgb.gif", "spectrogram.png")
    assert names == {f"000000{step}-{file}" for step in (4, 8) for file in files}
    for name in names:
        with Image.open(workdir / "pictures" / name) as picture:
            assert min(picture.size) > 32
            frames = config.data.num_frames if name.endswith("gif") else 1
            assert getattr(picture, "n_frames", 1) <= frames
            picture.load()
            assert np.asarray(picture.convert("RGB")).std() > 10


def test_a_checkpoint_knows_its_labels_statistics_and_config(trained):
    config, workdir, _ = trained
    params, saved, meta = checkpoints.load(workdir)
    assert saved["model"]["width"] == 16
    assert meta["labels"] == ["class 0", "class 1", "class 2"]
    picture = {"normalise": "fixed", "mean": [0.5] * 3, "std": [0.5] * 3}
    assert meta["picture"] == picture
    assert meta["spectrogram"]["preset"] == "mbt"
    assert meta["dataset_checksum"] == "checksum"
    assert params["encoder"]["joint"]["block_0"]["attention"]["qkv"]["kernel"].ndim == 4


# Settings, on the loss of one batch.


class Zeros:
    """Stands for a model: predicts 0, so that the loss is the mean of target²."""

    def __init__(self, config):
        self.features = autoencoder.build(config).features

    def apply(self, variables, patches, masks, present, train, rngs, mutable):
        shape = lambda m: (*masks[m].masked.shape, self.features[m])
        return {m: jnp.zeros(shape(m)) for m in patches}, {}


def one_loss(config, dataset, batch_size=4, missing=False):
    """(loss, numbers, masks, patches) of the first batch."""
    reconstruct = pretrain.make_reconstruct(config, Zeros(config), missing)
    batch = jax.tree.map(jnp.asarray, next(dataset.train(batch_size)))
    rng = jax.random.key(3)
    total, numbers = pretrain.make_loss(config, reconstruct)({}, batch, rng)
    _, masks, patches, *_ = reconstruct({}, batch, rng, True)
    return float(total), numbers, masks, patches


def hidden_patches(masks, patches, m):
    """The masked patches, gathered by numpy, in float64."""
    patches = np.asarray(patches[m], np.float64)
    return np.take_along_axis(patches, np.asarray(masks[m].masked)[..., None], axis=1)


def by_hand(kind, x, channels):
    """The target of patches [b m f], tubes of two frames, in float64."""
    if kind == "pixels":
        return x * 0.5 + 0.5
    if kind == "central_frame":
        return x[..., x.shape[-1] // 2 :]
    if kind == "standardised_channels_unbiased":
        x = (x * 0.5 + 0.5).reshape(*x.shape[:2], -1, channels)
        deviation = np.sqrt(x.var(2, keepdims=True, ddof=1)) + 1e-6
        return (x - x.mean(2, keepdims=True)) / deviation
    if kind == "raw":
        return x
    size = channels if kind == "standardised_channels" else 1
    x = x.reshape(*x.shape[:2], -1, size)
    return (x - x.mean(2, keepdims=True)) / np.sqrt(x.var(2, keepdims=True) + 1e-6)


@pytest.mark.parametrize(
    "rgb, spectrogram",
    [
        ("raw", "standardised"),
        ("standardised", "raw"),
        ("standardised_channels", "standardised_channels"),
        ("standardised_channels_unbiased", "raw"),
        ("pixels", "raw"),
        ("central_frame", "raw"),
    ],
)
def test_targets_of_each_modality(rgb, spectrogram):
    config = synthetic.tiny(CONFIG)
    config.objective.target.update(rgb=rgb, spectrogram=spectrogram)
    dataset = synthetic.Dataset(config)
    _, numbers, masks, patches = one_loss(config, dataset)
    for m, kind, channels in (("rgb", rgb, 3), ("spectrogram", spectrogram, 1)):
        x = by_hand(kind, hidden_patches(masks, patches, m), channels)
        assert numbers[f"loss_{m}"] == pytest.approx(np.mean(x**2), rel=1e-5)


@pytest.mark.parametrize(
    "kind", [k for k, t in losses.TARGETS.items() if t.values is losses.whole]
)
def test_what_is_drawn_is_the_prediction_with_the_target_undone(kind):
    """Where all patches are alike, the visible ones' statistics are the true ones."""
    config = synthetic.tiny(CONFIG)
    config.objective.target.rgb = kind
    one = jax.random.normal(jax.random.key(0), (1, 1, 2 * 16 * 16 * 3))
    patches = jnp.broadcast_to(one, (2, 4, one.shape[-1]))
    perfect = pretrain.target(config, "rgb", patches)
    drawn = pretrain.undo_target(config, "rgb", perfect[:, :3], patches[:, 3:])
    np.testing.assert_allclose(drawn, patches[:, :3], rtol=1e-4, atol=1e-4)


def test_a_predicted_frame_is_drawn_at_both_times_of_its_tube():
    config = synthetic.tiny(CONFIG)
    config.objective.target.rgb = "central_frame"
    frame = jax.random.normal(jax.random.key(0), (1, 2, 16 * 16 * 3))
    visible = jnp.zeros((1, 2, 2 * 16 * 16 * 3))
    drawn = pretrain.undo_target(config, "rgb", frame, visible)
    np.testing.assert_array_equal(drawn, jnp.concatenate([frame, frame], axis=-1))


def test_l2_adds_half_the_squares_of_all_but_vectors():
    config = synthetic.tiny(CONFIG, objective__l2=0.1)
    params = {"a": jnp.full((2, 3), 2.0), "b": jnp.full((5,), 7.0)}
    reconstruct = lambda *_: (
        ({"rgb": (jnp.ones((1, 2, 3)), jnp.zeros((1, 2, 3)))},) + ((None,) * 3)
    )
    total, numbers = pretrain.make_loss(config, reconstruct)(params, None, None)
    assert numbers["loss_rgb"] == pytest.approx(1.0)
    assert total == pytest.approx(0.5 + 0.1 * 0.5 * 6 * 4)


def test_weights_of_the_modalities():
    weights = {"objective__weights__rgb": 2.0, "objective__weights__spectrogram": 0.25}
    config = synthetic.tiny(CONFIG, **weights)
    total, numbers, *_ = one_loss(config, synthetic.Dataset(config))
    expected = 2.0 * numbers["loss_rgb"] + 0.25 * numbers["loss_spectrogram"]
    assert total == pytest.approx(float(expected), rel=1e-6)


def test_mask_kinds_and_ratios():
    config = synthetic.tiny(CONFIG, mask__rgb__kind="random", mask__rgb__ratio=0.5)
    grid = inputs.layouts(config)["rgb"].grid
    assert grid == (2, 2, 2)
    config.mask.spectrogram.ratio = 0.25
    masks = pretrain.draw_masks(config, jax.random.key(0), 64)
    assert masks["rgb"].masked.shape == (64, 4)
    assert masks["spectrogram"].masked.shape == (64, 4)  # of 2 × 8
    config.mask.rgb.kind = "tube"
    tubes = np.sort(pretrain.draw_masks(config, jax.random.key(0), 64)["rgb"].masked)
    np.testing.assert_array_equal(tubes[:, :2] + 4, tubes[:, 2:])
    # Rows have masks of their own, and so have modalities and keys.
    assert len(np.unique(tubes, axis=0)) == 6
    other = pretrain.draw_masks(config, jax.random.key(1), 64)["rgb"].masked
    assert not np.array_equal(np.sort(other), tubes)


def test_masks_follow_step_and_seed_alone():
    config = synthetic.tiny(CONFIG)
    draw = lambda seed, step: (
        pretrain.draw_masks(config, loop.key(seed, step, "mask"), 4)[
            "spectrogram"
        ].masked
    )
    np.testing.assert_array_equal(draw(0, 5), draw(0, 5))
    assert not np.array_equal(draw(0, 5), draw(0, 6))
    assert not np.array_equal(draw(0, 5), draw(1, 5))


def test_samples_of_a_clip_are_rows():
    """Two samples of a clip give what two clips give: the same masks, losses, rows."""
    config = synthetic.tiny(CONFIG)
    two = synthetic.Dataset(config, views=2)
    loss, _, masks, patches = one_loss(config, two, batch_size=2)
    assert patches["rgb"].shape[0] == masks["rgb"].masked.shape[0] == 4

    class Apart:
        def train(self, batch_size):
            batch = next(two.train(2))
            each = {
                k: batch[k].reshape(4, 1, *batch[k].shape[2:])
                for k in ("rgb", "waveform")
            }
            yield {k: np.repeat(x, 2, axis=0) for k, x in batch.items()} | each

    assert one_loss(config, Apart())[0] == loss


@pytest.mark.parametrize("one", ["rgb", "spectrogram"])
def test_one_modality_alone(one):
    other = {"rgb": "spectrogram", "spectrogram": "rgb"}[one]
    config = synthetic.tiny(CONFIG, modalities=(one,))
    total, numbers, _, patches = one_loss(config, synthetic.Dataset(config))
    assert numbers.keys() == {f"loss_{one}"} and patches.keys() == {one}
    assert total == pytest.approx(0.5 * float(numbers[f"loss_{one}"]), rel=1e-6)
    init = lambda: pretrain.init(config, autoencoder.build(config), jax.random.key(0))
    names = checkpoints._names(jax.eval_shape(init))
    assert any(one in name for name in names)
    assert not [name for name in names if other in name]


def test_clips_without_sound_are_out_of_the_loss():
    config = synthetic.tiny(CONFIG)
    dataset = synthetic.Dataset(config)
    batch = next(dataset.train(4))["index"]
    dataset.without["has_audio"] = {int(batch[1])}
    _, numbers, masks, patches = one_loss(config, dataset, missing=True)
    with_sound = batch != batch[1]
    assert 0 < with_sound.sum() < 4
    x = hidden_patches(masks, patches, "spectrogram")[with_sound]
    deviation = np.sqrt(x.var(2, keepdims=True) + 1e-6)
    expected = np.mean(((x - x.mean(2, keepdims=True)) / deviation) ** 2)
    assert numbers["loss_spectrogram"] == pytest.approx(expected, rel=1e-5)


class Asked(Exception):
    """Stands for the data set's answer."""


def test_an_update_takes_batch_times_accumulation(tmp_path, caplog):
    config = synthetic.tiny(CONFIG, compute__accumulate=2, data__samples_per_clip=3)
    data = datasets(config)

    def train(batch_size, step):
        raise Asked(batch_size, step)

    data["train"].train = train
    with caplog.at_level(logging.INFO), pytest.raises(Asked) as asked:
        pretrain.train(config, data, tmp_path)
    assert asked.value.args == (8, 0)
    assert "0.64 per 256 clips × 8 clips per update / 256 = 0.02" in caplog.text


def test_clipping_bounds_the_update():
    config = synthetic.tiny(CONFIG, optimizer__name="sgd", optimizer__clip_norm=0.5)
    config.optimizer.b1 = config.optimizer.weight_decay = 0.0
    gradients = {"a": np.float32([3.0]), "b": np.float32([4.0])}
    tx = runs.optimiser(config, 4, 8, gradients)
    updates, _ = tx.update(gradients, tx.init(gradients), gradients)
    rate = float(tx.schedule(0))
    assert rate == pytest.approx(0.01)
    np.testing.assert_allclose(updates["a"], -rate * 0.3, rtol=1e-6)
    np.testing.assert_allclose(updates["b"], -rate * 0.4, rtol=1e-6)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mask.rgb.kind", "checkers"),
        ("mask.spectrogram.kind", "tube"),
        ("mask.rgb.kind", "time"),
        ("objective.target.rgb", "hog"),
        ("objective.target.spectrogram", "grey"),
        ("model.decoder.kind", "tall"),
        ("model.fusion", "late"),
        ("optimizer.name", "lion"),
    ],
)
def test_unknown_names_are_refused_by_field(field, value, tmp_path):
    config = synthetic.tiny(CONFIG, **{field.replace(".", "__"): value})
    with pytest.raises(ConfigError, match=f"{field} is '{value}'"):
        pretrain.train(config, datasets(config), tmp_path)
    # Nothing holds on to the workdir.
    checkpoints.Checkpoints(tmp_path, {}, {}).close()


def test_empty_batches_are_refused(tmp_path):
    config = synthetic.tiny(CONFIG, eval__batch_size=0)
    with pytest.raises(ConfigError, match="eval.batch_size is 0"):
        pretrain.train(config, datasets(config), tmp_path)


# Clips that lack a modality, through whole updates.


def test_what_stands_in_for_missing_sound_or_picture_changes_nothing(tmp_path):
    workdirs = [tmp_path / "quiet", tmp_path / "loud"]
    for workdir, junk in zip(workdirs, (0, 200), strict=True):
        config = synthetic.tiny(CONFIG, steps=3, log__every_steps=1, log__pictures=0)
        data = datasets(config)
        for dataset in data.values():
            dataset.missing, dataset.junk = True, junk
            dataset.without = {"has_audio": {0, 3, 5, 9}, "has_rgb": {1, 4, 12}}
        pretrain.train(config, data, workdir)
    quiet, loud = (synthetic.lines(workdir) for workdir in workdirs)
    assert quiet == loud and len(quiet) == 4
    quiet, loud = (checkpoints.load(workdir)[0] for workdir in workdirs)
    jax.tree.map(np.testing.assert_array_equal, quiet, loud)


# The published trainer, step by step.


@scenic.needed
def test_three_updates_are_the_published_ones():
    scenic_pretrain.compare_steps()


@scenic.needed
@pytest.mark.slow
def test_the_loss_of_200_updates_is_the_published_one():
    scenic_pretrain.compare_curve()


# Each second value through whole runs.

VARIANTS = [
    dict(objective__target__rgb="standardised_central_frame"),
    dict(objective__unmasked=True),
    dict(objective__kind="inpaint", objective__inpaint_layout="scenic"),
    dict(mask__spectrogram__kind="time"),
    dict(model__block__gelu="erf", model__block__key_bias=False),
    dict(model__block__layer_scale=0.1, model__norm=False),
    dict(model__cls_token=True, model__modality_embeddings=True),
    dict(compute__accumulate=2),
    dict(data__samples_per_clip=2),
    dict(modalities=("spectrogram",)),
    dict(model__fusion="separate", model__decoder__kind="separate"),
    dict(model__fusion="early", model__decoder__kind="joint"),
    dict(augment__flip=0.5, model__drop_path=0.2),
]
MORE = [  # in `make stress`: held to the published numbers, or by tests of their own
    dict(objective__target__rgb="raw", objective__target__spectrogram="raw"),
    dict(objective__target__rgb="standardised_channels"),
    dict(objective__target__rgb="standardised_channels_unbiased"),
    dict(objective__target__rgb="grey"),
    dict(objective__kind="inpaint"),
    dict(mask__spectrogram__kind="frequency"),
    dict(mask__rgb__kind="random"),
    dict(modalities=("rgb",)),
    dict(optimizer__clip_norm=1.0),
    dict(model__fusion="shared"),
    dict(optimizer__name="adam"),
]
FULL = os.environ.get("AV_MAE_STRESS") == "full"


@pytest.mark.slow
@pytest.mark.stress
@pytest.mark.parametrize(
    "changes", VARIANTS + MORE * FULL, ids=lambda c: "-".join(map(str, c.values()))
)
def test_every_setting_trains(changes, tmp_path):
    config = synthetic.tiny(CONFIG, **changes)
    data = datasets(config, views=config.data.samples_per_clip)
    results = pretrain.train(config, data, tmp_path)
    rows = [row for row in synthetic.lines(tmp_path) if "loss" in row]
    assert rows[-1]["loss"] < 0.97 * rows[0]["loss"], rows
    assert {name.split("_", 1)[1] for name in results} == set(config.modalities)
    assert pretrain.evaluate(config, {"eval": data["eval"]}, tmp_path) == results


RECIPE = scenic.SHARED / "fixtures" / "videomae" / "mcg_recipe" / "recipe.json"


@pytest.mark.skipif(not RECIPE.is_file(), reason=f"there are no numbers at {RECIPE}")
@pytest.mark.parametrize("name", ["kinetics400", "ssv2", "ucf101"])
def test_what_does_not_decay_is_videomaes(name):
    config = synthetic.config(f"{name}/pretrain", "smoke")
    config.model.depth = config.model.decoder.depth = 1
    init = functools.partial(pretrain.init, config, pretrain.build(config))
    params = jax.eval_shape(init, jax.random.key(0))
    decay = optim.named(optim.by_rule(config.optimizer.decay_rules, params, ""))
    theirs = json.loads(RECIPE.read_text())["pretrain_no_decay"]
    still = {re.sub("/(q|v)/bias", "/qkv/bias", videomae._ours(x)) for x in theirs}
    assert {name for name, factor in decay.items() if not factor} == still
    parity.record("Schedules and layers", f"{name}: no decay", outputs=0)


@pytest.mark.skipif(not VIDEOMAE.is_dir(), reason=f"no {VIDEOMAE}")
@pytest.mark.parametrize("fusion", ["mid", "separate"])
def test_a_published_videomae_begins_the_video_branch(fusion):
    """All of its blocks that are not joint here, and its embedding; nothing else."""
    config = synthetic.tiny("digits/pretrain", model__variant="Ti/16x2")
    config.model.update(width=32, mlp=64, depth=3, heads=2, fusion=fusion)
    config.init_from.rgb.checkpoint_path = str(VIDEOMAE)
    init = functools.partial(pretrain.init, config, pretrain.build(config))
    shapes = jax.eval_shape(init, jax.random.key(0))
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    found = optim.named(pretrain.source_of(config)(zeros))
    filled = {name for name, value in found.items() if np.any(value)}
    branch = {x for x in found if x.startswith(("embed/rgb/", "encoder/rgb/block"))}
    assert filled == branch
    blocks = {name.split("/")[2] for name in branch if "block" in name}
    assert len(blocks) == (2 if fusion == "mid" else 3)
