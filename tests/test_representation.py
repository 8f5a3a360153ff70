"""Tokens of inner layers are those that a shorter model would give."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import synthetic
import toy_models

from av_mae import (
    ConfigError,
    classifier,
    finetune,
    inputs,
    pretrain,
    representation,
)

FUSIONS = {
    "early": {},
    "shared": {},
    "separate": {},
    "mid": {"model__fusion_layer": 1},
    "bottleneck": {"model__fusion_layer": 1},
    "bottleneck, shared": {"model__fusion_layer": 1, "model__share_encoder": True},
    "cross": {"model__fusion_layer": 1},
    "cross, shared": {"model__fusion_layer": 1, "model__share_encoder": True},
}


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with synthetic.quick():
        yield


def config_of(fusion: str, **changes):
    config = toy_models.config("finetune", model__depth=3, **FUSIONS[fusion])
    config.model.fusion = fusion.split(",")[0]
    config.update_from_flattened_dict(
        {key.replace("__", "."): value for key, value in changes.items()}
    )
    return config


def model_of(config, seed: int = 0):
    """(model, its random parameters, patches of two clips)."""
    if config.trainer == "pretrain":
        model, init = pretrain.build(config), pretrain.init
    else:
        model, init = classifier.build(config, 3), finetune.init
    init = functools.partial(init, config, model)
    params = toy_models.random_params(init, seed)
    rng, size = np.random.default_rng(seed), {}
    for m, cut in inputs.layouts(config).items():
        size[m] = jnp.array(rng.normal(size=(2, cut.n, cut.f)), jnp.float32)
    return model, params, size


def normed(config, params, m: str, x) -> np.ndarray:
    """x after the final norm that tokens of m go through."""
    place = {"early": "joint", "mid": "joint", "shared": "shared", "separate": m}
    inside = params["encoder"]
    name = place.get(config.model.fusion)
    norm = inside[name]["norm"] if name else inside["norm"]
    x = np.asarray(x)
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return x * norm["scale"] + norm["bias"]


QUICK = ("early", "bottleneck")


@pytest.mark.parametrize(
    "fusion",
    [pytest.param(x, marks=[] if x in QUICK else [pytest.mark.slow]) for x in FUSIONS],
)
def test_inner_layers_are_the_output_of_a_shorter_model(fusion):
    config, present = config_of(fusion), None
    if fusion in ("early", "bottleneck", "cross"):
        present = {"rgb": [True, True], "spectrogram": [True, False]}
        present = {m: jnp.array(x) for m, x in present.items()}
    model, params, patches = model_of(config)

    @jax.jit
    def look(params, patches):
        tokens = functools.partial(representation.tokens_of_layer, config, model)
        inner, last = (tokens(params, patches, present, i) for i in (1, -1))
        wanted = model.apply({"params": params}, patches, present, method="encode")
        shorter = classifier.build(config_of(fusion, model__depth=2), 3)
        both = {"params": params}
        return (
            inner,
            shorter.apply(both, patches, present, method="encode"),
            last,
            wanted,
        )

    inner, shorter, last, wanted = look(params, patches)
    assert set(inner) == {"rgb", "spectrogram"}
    has = {m: np.array([True, True]) if present is None else present[m] for m in inner}
    for m in inner:
        found = normed(config, params, m, inner[m])
        np.testing.assert_allclose(
            found[has[m]], shorter[m][has[m]], rtol=1e-4, atol=1e-4
        )
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    jax.tree.map(close, last, wanted)


@pytest.mark.parametrize(
    "trainer", ["pretrain", pytest.param("finetune", marks=pytest.mark.slow)]
)
def test_queries_and_keys_give_the_attention_that_the_model_has(trainer):
    config = toy_models.config(trainer, model__depth=3)
    config.model.fusion = "mid"
    config.model["fusion_layers" if trainer == "pretrain" else "fusion_layer"] = 1
    model, params, patches = model_of(config)
    look = functools.partial(representation.queries_and_keys, config, model)
    encoded, calls = jax.jit(lambda params: look(params, patches, None))(params)
    encode = functools.partial(model.apply, method=representation.encode)
    wanted = jax.jit(encode)({"params": params}, patches)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    jax.tree.map(close, encoded, wanted)
    for i in range(3):
        for m in representation.known(config):
            where = representation.place(config, m, i)
            (qkv,) = calls[f"{where.stack}/{where.block}"]
            n = sum(x.shape[1] for x in encoded.values()) if where.joint else None
            assert qkv.shape[1] == (n or encoded[m].shape[1])
    # The first block of a stack again, from its own captured queries, keys, values.
    inside = params["encoder"]["rgb"]["block_0"]["attention"]
    embed = functools.partial(model.apply, method=lambda model, p: model.embed(p))
    x = jax.jit(embed)({"params": params}, patches)["rgb"]
    norm = params["encoder"]["rgb"]["block_0"]["norm_1"]
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    x = x * norm["scale"] + norm["bias"]
    product = np.einsum("bnd,dkhe->bnkhe", x, inside["qkv"]["kernel"])
    product = product + inside["qkv"]["bias"]
    close(calls["rgb/0"][0], product)


def test_layers_are_counted_from_either_end():
    config = config_of("early")
    numbers = [representation.layer_number(config, i) for i in (0, 2, -1, -3)]
    assert numbers == [0, 2, 2, 0]
    for layer in (3, -4):
        with pytest.raises(ConfigError, match="the encoder has 3 layers"):
            representation.layer_number(config, layer)


def test_pools():
    config = config_of("separate", model__cls_token=True)
    x = {"rgb": jnp.arange(12.0).reshape(1, 4, 3)}  # a CLS token and three patches
    pool = lambda kind: np.asarray(representation.pool(config, x, kind)["rgb"])
    np.testing.assert_array_equal(pool("cls"), [[0, 1, 2]])
    np.testing.assert_array_equal(pool("mean"), [[6, 7, 8]])
    np.testing.assert_array_equal(pool("none"), x["rgb"][:, 1:])
    config.model.cls_token = False
    np.testing.assert_array_equal(pool("mean"), [[4.5, 5.5, 6.5]])
    with pytest.raises(ConfigError, match="the model has no CLS token"):
        pool("cls")
    with pytest.raises(ConfigError, match="pool is 'meen': did you mean 'mean'"):
        pool("meen")
