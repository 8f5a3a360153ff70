"""Probes: the pool by attention as published, and encoders that stay as they are."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import synthetic

from av_mae import checkpoints, finetune, mixing, probe, update
from av_mae.transformer import BlockOptions

CONFIG = "digits/finetune"


@pytest.fixture(autouse=True, scope="module")
def quick():
    with synthetic.quick():
        yield


# The pool.


def filled(module, *inputs):
    """Random parameters of a module."""
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs))["params"]
    draw = np.random.default_rng(1)
    fill = lambda x: jnp.asarray(draw.normal(0, 0.3, x.shape), x.dtype)
    return jax.tree.map(fill, shapes)


def by_hand(p, x):
    """V-JEPA's cross-attention block on one clip's tokens [n d], in float64."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), p)

    def norm(name, x):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
        return x * p[name]["scale"] + p[name]["bias"]

    def dense(layer, x):
        return np.tensordot(x, layer["kernel"], 1) + layer["bias"]

    query = p["query"][0, 0]
    q = dense(p["to_query"], query)  # heads e
    k, v = np.moveaxis(dense(p["key_value"], norm("norm_1", x)), 1, 0)  # n heads e
    scores = np.einsum("he,nhe->hn", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(1, keepdims=True))
    weights /= weights.sum(1, keepdims=True)
    y = np.einsum("hn,nhe->he", weights, v)
    y = query + np.einsum("he,hed->d", y, p["out"]["kernel"]) + p["out"]["bias"]
    hidden = dense(p["mlp"]["in"], norm("norm_2", y))
    cubic = np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)
    return y + dense(p["mlp"]["out"], 0.5 * hidden * (1 + np.tanh(cubic)))


def test_one_query_attends_to_all_tokens_that_are_there():
    pool = probe.AttentivePool(BlockOptions(heads=2, mlp=12))
    draw = np.random.default_rng(0)
    tokens = {m: draw.normal(size=(3, n, 8)) for m, n in (("rgb", 5), ("sound", 3))}
    tokens = {m: jnp.asarray(x, jnp.float32) for m, x in tokens.items()}
    params = filled(pool, tokens)
    apply = jax.jit(functools.partial(pool.apply, {"params": params}))
    both = np.concatenate(list(tokens.values()), axis=1)
    found = apply(tokens)
    assert found.shape == (3, 8)
    for row, x in zip(found, both, strict=True):
        np.testing.assert_allclose(row, by_hand(params, x), rtol=1e-4, atol=1e-5)
    present = {"rgb": jnp.array([1, 1, 0], bool), "sound": jnp.array([1, 0, 1], bool)}
    found = apply(tokens, present)
    for row, x in zip(found, (both[0], both[1, :5], both[2, 5:]), strict=True):
        np.testing.assert_allclose(row, by_hand(params, x), rtol=1e-4, atol=1e-5)


def test_the_first_query_is_small_and_other_layers_are_not_zero():
    pool = probe.AttentivePool(BlockOptions(heads=2, mlp=12))
    first = jax.jit(pool.init)(jax.random.key(0), {"rgb": jnp.zeros((1, 4, 64))})
    params = first["params"]
    assert 0.01 < np.std(params["query"]) < 0.03
    assert np.all(np.std(params["key_value"]["kernel"], axis=0) > 0)


# What learns.


def shapes_of(**changes):
    config = synthetic.tiny(CONFIG, **changes)
    model = finetune.build(config, 3)
    init = functools.partial(finetune.init, config, model)
    return config, model, jax.eval_shape(init, jax.random.key(0))


@pytest.mark.parametrize(
    ("kind", "changes", "learns"),
    [
        ("linear", {}, {"head"}),
        ("linear", {"model__head_norm": True}, {"head", "head_norm"}),
        ("attentive", {}, {"head", "attentive"}),
        ("full", {}, {"head", "embed", "encoder"}),
    ],
)
def test_what_learns(kind, changes, learns):
    _, _, shapes = shapes_of(probe=kind, **changes)
    assert set(update.part(shapes, probe.TRAINED[kind])) == learns
    assert set(shapes) == learns | {"embed", "encoder"}


def test_a_frozen_encoder_drops_no_path():
    """In training its features are those of the test, whatever model.drop_path is."""
    for kind, same in (("linear", True), ("full", False)):
        config, model, _ = shapes_of(
            probe=kind, model__drop_path=0.9, modalities=("rgb",)
        )
        patches = finetune.inputs.layouts(config)
        draw = np.random.default_rng(0)
        patches = {
            m: jnp.asarray(draw.normal(size=(4, cut.n, cut.f)), jnp.float32)
            for m, cut in patches.items()
        }
        params = filled(model, patches)

        def run(train, model=model, params=params, patches=patches):
            rngs = {"drop_path": jax.random.key(0)}
            apply = lambda p: model.apply(
                {"params": p}, patches, None, train, rngs=rngs
            )
            return jax.jit(apply)(params)["rgb"]

        assert np.array_equal(run(True), run(False)) == same


def test_labels_of_all_modalities_together_are_mixed_as_these_are():
    none = (jnp.array(False), jnp.zeros(4, int))
    mixes = {
        m: mixing.Mix(jnp.float32(share), *none)
        for m, share in (("rgb", 0.75), ("spectrogram", 0.25))
    }
    labels = jnp.array([0, 1])
    found = finetune.mixed(mixes, "joint", labels, None, 2)
    np.testing.assert_allclose(found, [[0.5, 0.5], [0.5, 0.5]])
    # Clip 0 has no sound: its label is that of its picture, and nothing is mixed
    # into the sound of clip 1.
    present = {"rgb": jnp.array([1, 1], bool), "spectrogram": jnp.array([0, 1], bool)}
    found = finetune.mixed(mixes, "joint", labels, present, 2)
    np.testing.assert_allclose(found, [[0.75, 0.25], [0.125, 0.875]])


# Whole runs.


def run_of(workdir, **changes):
    steps = {"steps": 4, "log__every_steps": 2}
    config = synthetic.tiny(CONFIG, **steps | changes)
    config.checkpoint.every_steps = 100
    data = {
        "train": synthetic.Dataset(config),
        "eval": synthetic.Dataset(config, num_clips=6, first=100),
    }
    results = finetune.train(config, data, workdir)
    assert finetune.evaluate(config, data, workdir) == results
    return config, results, checkpoints._names(checkpoints.load(workdir)[0])


def test_a_linear_probe_trains_its_head_alone(tmp_path, caplog):
    """With the average of the head, views' probabilities, and each modality alone."""
    with caplog.at_level("INFO"):
        config, results, params = run_of(
            tmp_path,
            probe="linear",
            ema=0.5,
            eval__average="probabilities",
            eval__modalities=("rgb",),
        )
    names = ("loss", "top_1", "ema_loss", "ema_top_1")
    assert set(results) == {f"eval/{s}{n}" for s in ("", "rgb/") for n in names}
    assert results["eval/ema_loss"] != results["eval/loss"]
    _, model, _ = shapes_of(probe="linear")
    init = functools.partial(finetune.init, config, model)
    key = finetune.loop.key(config.seed, 0, "init")
    first = checkpoints._names(jax.jit(init)(key))
    ema = checkpoints._names(checkpoints.load(tmp_path, "ema")[0])
    for name, value in params.items():
        still = np.array_equal(value, first[name])
        assert still == (not name.startswith("head/")), name
        assert np.array_equal(ema[name], value) == still, name
    memory = checkpoints._names(checkpoints.load(tmp_path, "opt_state")[0])
    learnt = [name for name in memory if "kernel" in name]
    assert learnt and all("/head/" in name for name in learnt)
    random = "NOTE: the frozen parameters are random: init_from names no source."
    assert caplog.text.count(random) == 4  # top and end, of training and evaluation
    assert "trained: head/bias, head/kernel; all others are frozen" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("modalities", [("rgb", "spectrogram"), ("spectrogram",)])
def test_an_attentive_probe_learns(tmp_path, modalities):
    config, results, params = run_of(
        *(tmp_path,),
        probe="attentive",
        modalities=modalities,
        model__fusion="mid",
        model__fusion_layer=1,
        steps=24,
        schedule__learning_rate_per_256=0.32,
    )
    assert any(name.startswith("attentive/") for name in params)
    rows = [row for row in synthetic.lines(tmp_path) if "loss" in row]
    assert all(row["loss_joint"] == row["loss"] for row in rows)
    assert rows[-1]["loss"] < 0.9 * rows[0]["loss"], rows
