"""AV-MaskEnhancer: the sound encoder's statistics, how sound meets video, training."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import synthetic
import videomae_files
from scenic import quick

from av_mae import (
    STATISTICS,
    CheckpointError,
    ConfigError,
    checkpoints,
    finetune,
    inputs,
    maskenhancer,
    optim,
    pretrain,
)
from av_mae.masking import Mask

PRETRAIN, FINETUNE = "ucf101/avmaskenhancer_pretrain", "ucf101/avmaskenhancer_finetune"
KEY = jax.random.key(0)


def small(name=PRETRAIN, fusion=""):
    """Two layers; 4 frames of 32 pixels; 0.32 s of sound."""
    settings = synthetic.config(name, f"{fusion},smoke" if fusion else "smoke")
    settings.model.update(width=16, depth=2, mlp=32)
    settings.data.audio_seconds = 0.32
    settings.picture.mean = settings.picture.std = (0.5, 0.5, 0.5)
    return settings


# Batch statistics.


def normalised(x, present=None, train=True, **params):
    """(normalised, new statistics) of one BatchNorm."""
    norm, c = maskenhancer.BatchNorm(), x.shape[-1]
    ones, zeros = np.ones(c, np.float32), np.zeros(c, np.float32)
    first = {"scale": ones, "bias": zeros, "mean": zeros, "variance": ones}
    variables = {"params": {k: jnp.asarray(v) for k, v in (first | params).items()}}
    y, changed = norm.apply(
        variables, jnp.asarray(x), present, train, mutable=[STATISTICS]
    )
    return np.asarray(y), changed.get(STATISTICS)


def clips():
    x = np.random.default_rng(0).normal(3, 2, (4, 5, 3, 2))
    return x.astype(np.float32)


def test_training_normalises_by_the_batch_and_moves_the_statistics():
    """PyTorch's rule: a tenth of the new value, the variance unbiased."""
    x = clips()
    y, new = normalised(x)
    flat, wanted = y.reshape(-1, 2), x.reshape(-1, 2).astype(np.float64)
    np.testing.assert_allclose(flat.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(flat.var(0), 1, rtol=1e-4)
    np.testing.assert_allclose(new["mean"], 0.1 * wanted.mean(0), rtol=1e-5)
    unbiased = wanted.var(0, ddof=1)
    np.testing.assert_allclose(new["variance"], 0.9 + 0.1 * unbiased, rtol=1e-5)


def test_tests_normalise_by_the_statistics():
    x = clips()
    mean, variance = np.float32([1, 2]), np.float32([4, 9])
    y, new = normalised(x, train=False, mean=mean, variance=variance)
    np.testing.assert_allclose(y, (x - mean) / np.sqrt(variance + 1e-5), rtol=1e-5)
    assert new is None


def test_absent_clips_do_not_count():
    x, present = clips(), jnp.array([True, True, False, True])
    junk = x.copy()
    junk[2] = 1e4
    y, new = normalised(junk, present)
    there, alone = normalised(x[[0, 1, 3]])
    np.testing.assert_allclose(y[[0, 1, 3]], there, rtol=1e-4, atol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4), new, alone)
    _, none = normalised(junk, jnp.zeros(4, bool))
    assert none["mean"].tolist() == [0, 0] and none["variance"].tolist() == [1, 1]


# Sizes.

PUBLISHED = {  # the numbers of parameters in the project's logs
    (PRETRAIN, "attention"): 28_146_262,
    (PRETRAIN, "concat"): 25_482_070,
    (PRETRAIN, "video"): 24_029_376,
    (FINETUNE, "scratch"): 89_232_123,
    (FINETUNE, "k400"): 89_232_123,
    (FINETUNE, "pretrained"): 89_232_123,
}
SAME = ("k400", "pretrained")  # but for where they begin


def initial(settings):
    """(model, the function that makes its first params)."""
    if settings.trainer == "pretrain":
        model = pretrain.build(settings)
        return model, functools.partial(pretrain.init, settings, model)
    model = finetune.build(settings, settings.model.classes or 3)
    return model, functools.partial(finetune.init, settings, model)


@pytest.mark.parametrize(
    "name, variant",
    [
        pytest.param(*case, marks=[pytest.mark.slow] if case[1] in SAME else [])
        for case in PUBLISHED
    ],
)
def test_published_number_of_parameters(name, variant):
    settings = synthetic.config(name, variant)
    params = optim.named(jax.eval_shape(initial(settings)[1], KEY))
    weights = {k: x for k, x in params.items() if not k.endswith(("/mean", "variance"))}
    found = sum(math.prod(x.shape) for x in weights.values())
    assert found == PUBLISHED[name, variant]


def test_the_pretraining_has_the_published_settings():
    peaks = {}
    for variant in ("attention", "concat", "video"):
        settings = synthetic.config(PRETRAIN, variant)
        rate, clips = settings.schedule.learning_rate_per_256, settings.batch_size
        peaks[variant] = rate * clips / 256
        assert (settings.model.variant, settings.epochs) == ("S/16x2", 3200.0)
        assert settings.mask.rgb.to_dict() == dict(kind="tube", ratio=0.75)
    assert peaks == pytest.approx(
        dict(attention=2.34375e-5, concat=2.8125e-5, video=2.8125e-5)
    )
    assert synthetic.config(FINETUNE, "").model.variant == "B/16x2"


@pytest.mark.parametrize("name", [PRETRAIN, FINETUNE])
def test_an_unknown_variant_is_named(name):
    with pytest.raises(ValueError, match="no variant 'audio' of this config"):
        synthetic.config(name, "smoke,audio")


# Where sound and video meet.


def examples(settings, b=3):
    rng = np.random.default_rng(1)
    normal = lambda layout: rng.normal(size=(b, layout.n, layout.f))
    layouts = inputs.layouts(settings)
    return {m: jnp.asarray(normal(x), jnp.float32) for m, x in layouts.items()}


def drawn(init):
    """Params of any values, without running what makes them."""
    rng = np.random.default_rng(5)

    def draw(path, x):
        if path[-1].key in ("scale", "variance"):
            return jnp.asarray(0.5 + rng.random(x.shape), jnp.float32)
        return jnp.asarray(rng.normal(0, 0.2, x.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(init, KEY))


@pytest.fixture(scope="module", params=["attention", "concat"])
def pair(request):
    """(settings, params, predictions of (patches, masks, present, train))."""
    settings = small(fusion=request.param)
    model, init = initial(settings)
    params = drawn(init)

    @functools.partial(quick, static_argnums=3)
    def predict(x, masks, present=None, train=False):
        rngs = {"drop_path": KEY}
        return model.apply({"params": params}, x, masks, present, train, rngs=rngs)

    return settings, params, predict


def test_the_drawn_order_does_not_matter(pair):
    """The sound is dealt out by rising index, as the published boolean masks do."""
    settings, _, predict = pair
    x, masks = examples(settings), pretrain.draw_masks(settings, KEY, 3)
    assert set(masks) == {"rgb"}
    order = jnp.argsort(masks["rgb"].masked, axis=1)
    rising = Mask(
        jnp.sort(masks["rgb"].kept, axis=1), jnp.sort(masks["rgb"].masked, axis=1)
    )
    found = predict(x, masks)["rgb"]
    wanted = predict(x, {"rgb": rising})["rgb"]
    found = jnp.take_along_axis(found, order[..., None], axis=1)
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert np.abs(np.diff(wanted, axis=1)).max() > 0.1


def test_predictions_hear_the_sound_of_their_own_clip(pair):
    settings, _, predict = pair
    x, masks = examples(settings), pretrain.draw_masks(settings, KEY, 3)
    changed = x["spectrogram"].at[1].add(3.0)
    moved = np.abs(
        predict(x | {"spectrogram": changed}, masks)["rgb"] - predict(x, masks)["rgb"]
    ).max((1, 2))
    assert moved[1] > 0.01 and moved[0] == moved[2] == 0


def test_dropout_is_of_training_alone():
    meet = maskenhancer.Meeting(jnp.dtype("float32"))
    x, y = jnp.ones((2, 4, 16)), jnp.linspace(0, 1, 128).reshape(2, 4, 16)
    variables = {"params": drawn(lambda key: meet.init(key, x, y, False)["params"])}
    run = lambda train, seed: meet.apply(
        variables, x + y, y, train, rngs={"drop_path": jax.random.key(seed)}
    )
    assert (run(False, 0) == run(False, 1)).all()
    assert (run(True, 0) != run(True, 1)).any()


@pytest.mark.parametrize("name", [PRETRAIN, FINETUNE])
def test_a_clip_without_sound_does_not_see_its_junk(name):
    settings = small(name)
    model, init = initial(settings)
    params, x = drawn(init), examples(settings)
    masks = (
        (pretrain.draw_masks(settings, KEY, 3),)
        if settings.trainer == "pretrain"
        else ()
    )
    present = {
        "rgb": jnp.ones(3, bool),
        "spectrogram": jnp.array([True, False, True]),
    }

    @quick
    def run(x):
        def loss(params):
            out, changed = model.apply(
                {"params": params},
                *(x, *masks, present, True),
                rngs={"drop_path": KEY, "dropout": KEY},
                mutable=[STATISTICS],
            )
            return jnp.sum(out["rgb"] ** 2), (out, changed)

        return jax.value_and_grad(loss, has_aux=True)(params)

    junk = x | {"spectrogram": x["spectrogram"].at[1].set(1e5)}
    jax.tree.map(np.testing.assert_array_equal, run(junk), run(x))
    (_, (_, changed)), grads = run(x)
    names = optim.named(changed[STATISTICS])
    still = {k: g for k, g in optim.named(grads).items() if k in names}
    assert len(still) == len(names) > 10
    assert not any(np.any(g) for g in still.values())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"modalities": ("rgb",)}, "modalities is .'rgb',., but model.fusion 'concat'"),
        ({"spectrogram.preset": "mbt"}, "spectrogram.preset is 'mbt', but .* 'mfcc'"),
    ],
)
@pytest.mark.parametrize("name", [PRETRAIN, FINETUNE])
def test_other_inputs_are_refused(name, change, message):
    settings = small(name, fusion="concat" if name == PRETRAIN else "")
    settings.update_from_flattened_dict(change)
    with pytest.raises(ConfigError, match=message):
        initial(settings)


# Training.


def data(settings, missing=False):
    made = {
        "train": synthetic.Dataset(settings, views=settings.data.samples_per_clip),
        "eval": synthetic.Dataset(settings, 6),
    }
    if missing:
        for dataset in made.values():
            dataset.missing, dataset.without["has_audio"] = True, {1, 4}
    return made


def test_the_loss_gives_the_new_statistics():
    """Under the names of the params that they replace."""
    settings = small()
    model, init = initial(settings)
    dataset = synthetic.Dataset(settings)
    batch = jax.tree.map(jnp.asarray, next(dataset.train(4)))
    reconstruct = pretrain.make_reconstruct(settings, model, False)
    loss = pretrain.make_loss(settings, reconstruct)
    params = drawn(init)
    total, numbers = quick(loss)(params, batch, KEY)
    assert set(numbers) == {"loss_rgb", STATISTICS} and np.isfinite(total)
    new, old = optim.named(numbers[STATISTICS]), optim.named(params)
    statistics = [k for k in old if k.endswith(("/mean", "/variance"))]
    assert sorted(new) == sorted(statistics) and len(new) == 2 * 11
    assert all((new[k] != old[k]).any() for k in new)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Workdirs of pretraining by each fusion, and of a finetuning from `attention`."""
    folder = tmp_path_factory.mktemp("maskenhancer")
    with synthetic.quick():
        for fusion in ("attention", "concat", "video"):
            settings, some = small(fusion=fusion), fusion == "attention"
            settings.steps, settings.log.pictures = 2, 0
            pretrain.train(settings, data(settings, some), folder / fusion)
        settings = small(FINETUNE)
        settings.steps, settings.data.views, settings.data.crops = 2, 1, 1
        settings.init_from.checkpoint_path = str(folder / "attention")
        finetune.train(settings, data(settings), folder / "finetune")
    return folder


@pytest.mark.slow
def test_statistics_move_and_are_kept(runs):
    """They are in the checkpoint beside the weights, and no optimiser moves them."""
    for name in ("attention", "concat", "finetune"):
        params = optim.named(checkpoints.load(runs / name)[0])
        variances = [x for k, x in params.items() if k.endswith("/variance")]
        assert len(variances) == 11
        assert all(np.all(x > 0) and np.any(x != 1) for x in variances)
    numbers = synthetic.lines(runs / "attention")
    assert not any(STATISTICS in line for line in numbers)
    assert math.isfinite(numbers[-1]["eval/loss_rgb"])
    assert "eval/loss_spectrogram" not in numbers[-1]


@pytest.mark.slow
def test_finetuning_takes_video_and_sound_from_pretraining(runs):
    """Two steps later they are near where they began; the join is fresh."""
    first = optim.named(checkpoints.load(runs / "attention")[0])
    found = optim.named(checkpoints.load(runs / "finetune")[0])
    taken = "encoder/rgb/block_1/mlp/in/kernel", "sound/stage_3_unit_0/conv_1/kernel"
    for name in taken:
        np.testing.assert_allclose(found[name], first[name], atol=0.01)
    assert found["meet/embed/kernel"].shape != first["meet/embed/kernel"].shape


def test_k400_takes_the_video_half_from_a_published_file(tmp_path, monkeypatch):
    sizes = dict(WIDTH=64, MLP=128, SIDE=16)
    for name, value in sizes.items():
        monkeypatch.setattr(videomae_files, name, value)
    arrays = videomae_files.arrays(finetuned=False)
    path = videomae_files.write_mcg(tmp_path / "checkpoint.pth", arrays)
    settings = small(FINETUNE, "k400")
    settings.model.update(width=64, heads=1, mlp=128)
    settings.init_from.checkpoint_path = str(path)
    shapes = jax.eval_shape(initial(settings)[1], KEY)
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    found = optim.named(finetune.source_of(settings)(zeros))
    filled = {name for name, value in found.items() if np.any(value)}
    assert filled == {x for x in found if x.startswith(("embed/rgb/", "encoder/rgb/"))}
    kernel = arrays["encoder.blocks.1.mlp.fc1.weight"].T
    np.testing.assert_array_equal(found["encoder/rgb/block_1/mlp/in/kernel"], kernel)


@pytest.mark.slow
def test_finetuning_from_video_alone_has_a_fresh_sound(runs, tmp_path):
    settings = small(FINETUNE)
    settings.init_from.checkpoint_path = str(runs / "video")
    _, init = initial(settings)
    first = init(KEY)
    named = optim.named(finetune.source_of(settings)(first))
    source = optim.named(checkpoints.load(runs / "video")[0])
    for name, value in named.items():
        wanted = source if name.startswith(("embed", "encoder")) else optim.named(first)
        np.testing.assert_array_equal(value, wanted[name])
    settings.model.width = 32
    with pytest.raises(CheckpointError, match="of another shape"):
        finetune.source_of(settings)(initial(settings)[1](KEY))
