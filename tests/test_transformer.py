"""Sizes, initial values, and a block against one written out in float64."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from scenic import quick

from av_mae import ConfigError, transformer
from av_mae.depth import Drop
from av_mae.transformer import BlockOptions, Compute, Stack


def sized(**fields):
    """The `config.model` of these sizes."""
    default = dict(variant="B/16x2", width=0, depth=0, heads=0, mlp=0)
    return ConfigDict({**default, **fields})


# Dosovitskiy et al. 2021, Table 1: layers, width, MLP, heads; Ti is DeiT's.
PUBLISHED = {
    "Ti": (12, 192, 768, 3),
    "S": (12, 384, 1536, 6),
    "B": (12, 768, 3072, 12),
    "L": (24, 1024, 4096, 16),
    "H": (32, 1280, 5120, 16),
}


def test_every_variant_has_the_published_size():
    assert set(PUBLISHED) == set(transformer.VARIANTS)
    for name, (depth, width, mlp, heads) in PUBLISHED.items():
        found = transformer.size_of(sized(variant=f"{name}/14x1"))
        assert found == transformer.Size(width, depth, heads, mlp, 14, 1)


def test_explicit_sizes_win_over_the_variant():
    found = transformer.size_of(sized(variant="L/8x4", width=96, depth=3, heads=4))
    assert found == transformer.Size(96, 3, 4, 384, 8, 4)
    assert transformer.size_of(sized(mlp=100)).mlp == 100


@pytest.mark.parametrize("variant", ["X/16x2", "L/16", "L16x2", "L/16x2 ", ""])
def test_an_unknown_variant_is_named(variant):
    with pytest.raises(ConfigError, match=f"model.variant is '{variant}': .*'L/16x2'"):
        transformer.size_of(sized(variant=variant))


def test_heads_that_do_not_divide_the_width_are_named():
    with pytest.raises(ConfigError, match="model.heads is 5, .* the width 768"):
        transformer.size_of(sized(heads=5))


# One program each: op by op, jax would compile every operation.
def init(module, x):
    """First parameters."""
    return quick(module.init)(jax.random.key(0), x)["params"]


def apply(module, params, x, present=None, train=False, seed=0, **options):
    """The module's output; `seed` draws what drop path drops."""

    def run(params, x, present):
        rngs = {"drop_path": jax.random.key(seed)}
        return module.apply({"params": params}, x, present, train, rngs=rngs, **options)

    return quick(run)(params, x, present)


def stack_of(depth=2, rate=0.0, **options):
    """(a stack of width 12 with 3 heads, its params with noise, tokens)."""
    options = BlockOptions(heads=3, mlp=20, **options)
    stack = Stack(options, transformer.drop_path_rates(rate, depth))
    x = jax.random.normal(jax.random.key(1), (4, 5, 12))
    params = init(stack, x)
    rng = np.random.default_rng(0)
    noise = lambda a: a + rng.normal(0, 0.1, a.shape).astype(np.float32)
    return stack, jax.tree.map(noise, params), x


def by_hand(params, x, eps=1e-6, last_eps=1e-6, gelu="tanh"):
    """The stack in numpy float64, head by head."""

    def norm(p, x, eps=eps):
        x = x - x.mean(axis=-1, keepdims=True)
        return (
            x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * p["scale"]
            + p["bias"]
        )

    def attention(p, x):
        out = np.zeros_like(x)
        biases = p["qkv"]["bias"]
        if len(biases) == 2:  # no bias of the keys
            biases = np.stack([biases[0], np.zeros_like(biases[0]), biases[1]])
        for head in range(3):
            kernel, bias = p["qkv"]["kernel"][:, :, head], biases[:, head]
            q, k, v = (x @ kernel[:, i] + bias[i] for i in range(3))
            weights = np.exp(q @ k.swapaxes(-1, -2) / np.sqrt(4))
            weights /= weights.sum(axis=-1, keepdims=True)
            out += weights @ v @ p["out"]["kernel"][head]
        return out + p["out"]["bias"]

    def mlp(p, x):
        h = x @ p["in"]["kernel"] + p["in"]["bias"]
        inner = np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3))
        if gelu == "erf":
            inner = np.vectorize(math.erf)(h / np.sqrt(2))
        return 0.5 * h * (1 + inner) @ p["out"]["kernel"] + p["out"]["bias"]

    for i in range(2):
        p = params[f"block_{i}"]
        x = x + attention(p["attention"], norm(p["norm_1"], x)) * p.get("scale_1", 1)
        x = x + mlp(p["mlp"], norm(p["norm_2"], x)) * p.get("scale_2", 1)
    return norm(params["norm"], x, last_eps)


@pytest.mark.parametrize(
    "options",
    [
        {},
        # Those of VideoMAE, with an epsilon that shows.
        dict(gelu="erf", key_bias=False, layer_scale=0.1, eps=1e-2, last_eps=1e-1),
    ],
)
def test_a_stack_is_the_equations(options):
    stack, params, x = stack_of(**options)
    double = lambda a: np.asarray(a, np.float64)
    keys = ("eps", "last_eps", "gelu")
    chosen = {k: v for k, v in options.items() if k in keys}
    wanted = by_hand(jax.tree.map(double, params), double(x), **chosen)
    found = apply(stack, params, x)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    plain = by_hand(jax.tree.map(double, params), double(x))
    assert (np.abs(plain - wanted).max() > 1e-3) == bool(options)


def test_layer_scale_and_the_key_bias_that_is_not_there():
    options = BlockOptions(heads=3, mlp=20, key_bias=False, layer_scale=0.1)
    params = jax.device_get(init(Stack(options, (0.0,)), jnp.zeros((1, 2, 12))))
    block = params["block_0"]
    assert block["attention"]["qkv"]["bias"].shape == (2, 3, 4)
    assert block["attention"]["qkv"]["kernel"].shape == (12, 3, 3, 4)
    for name in ("scale_1", "scale_2"):
        np.testing.assert_array_equal(block[name], np.full(12, 0.1, np.float32))


def test_a_linear_layer_without_bias():
    x = jax.random.normal(jax.random.key(1), (2, 5))
    layer = transformer.Linear((3,), biased=())
    params = init(layer, x)
    assert set(params) == {"kernel"}
    found = layer.apply({"params": params}, x)
    np.testing.assert_allclose(found, x @ params["kernel"], rtol=1e-5)


def test_the_config_gives_every_option_of_a_block():
    model = ConfigDict(
        dict(
            drop_path_rescale=True,
            block=dict(
                gelu="erf",
                eps=1e-5,
                key_bias=False,
                layer_scale=0.2,
                qkv_init="aligned",
            ),
        )
    )
    compute = dict(dtype="bfloat16", attention="dot", scan=True, remat="dots")
    found = transformer.block_options(model, 4, 8, ConfigDict(compute), last_eps=1e-4)
    assert found == BlockOptions(
        *(4, 8, True, 1e-5, "erf", False, 0.2, "aligned", 1e-4),
        Compute(**compute | {"dtype": jnp.dtype("bfloat16")}),
    )
    with pytest.raises(ConfigError, match="compute.remat"):
        wrong = ConfigDict(compute | {"remat": "all"})
        transformer.block_options(model, 4, 8, wrong)


def test_tokens_that_are_not_present_are_never_attended_to():
    stack, params, x = stack_of()
    present = jnp.array([[True] * 5, [True, True, True, False, False]] * 2)
    found = apply(stack, params, x, present)
    changed = jnp.where(present[:, :, None], x, 1e3)
    other = apply(stack, params, changed, present)
    np.testing.assert_array_equal(found[present], other[present])
    alone = apply(stack, params, x[1:2, :3])
    np.testing.assert_allclose(found[1:2, :3], alone, rtol=1e-5, atol=1e-5)
    whole = apply(stack, params, x)
    assert np.abs(whole[1, :3] - found[1, :3]).max() > 0.01


def test_a_stack_without_its_last_norm():
    stack, params, x = stack_of()
    bare = Stack(stack.options, stack.rates, final_norm=False)
    del params["norm"]
    y = apply(bare, params, x)
    assert jax.tree.structure(init(bare, x)) == jax.tree.structure(params)
    layers = x
    for i in range(2):
        method = lambda m, x, p, t, i=i: m.layer(i, x, p)
        layers = apply(bare, params, layers, method=method)
    np.testing.assert_allclose(y, layers, rtol=1e-5, atol=1e-6)


def test_initial_values():
    stack = Stack(BlockOptions(heads=4, mlp=256), (0.0, 0.0))
    x = jnp.zeros((1, 2, 64))
    params = jax.device_get(init(stack, x))
    block, other = params["block_0"], params["block_1"]
    # Xavier-uniform: ±sqrt(6 / (inputs + outputs)), for query, key and value apart.
    for i in range(3):
        kernel = block["attention"]["qkv"]["kernel"][:, i]
        limit = np.sqrt(6 / (64 + 64))
        assert 0.99 * limit < np.abs(kernel).max() <= limit
        assert float(kernel.std()) == pytest.approx(limit / np.sqrt(3), rel=0.05)
    assert np.abs(block["attention"]["out"]["kernel"]).max() <= np.sqrt(6 / 128)
    assert np.abs(block["mlp"]["in"]["kernel"]).max() > 0.98 * np.sqrt(6 / (64 + 256))
    assert (block["attention"]["qkv"]["bias"] == 0).all()
    assert 0 < np.abs(block["mlp"]["in"]["bias"]).max() < 1e-5
    assert (block["norm_1"]["scale"] == 1).all()
    # No two blocks, nor two kernels of a block, begin alike.
    for name in ("attention", "mlp"):
        a, b = block[name]["out"]["kernel"], other[name]["out"]["kernel"]
        assert np.abs(a - b).min() < np.abs(a - b).mean() > 0.01
    q, k, _ = np.moveaxis(block["attention"]["qkv"]["kernel"], 1, 0)
    assert np.abs(q - k).mean() > 0.01


def test_drop_path_rates_rise_linearly():
    np.testing.assert_allclose(transformer.drop_path_rates(0.3, 4), (0, 0.1, 0.2, 0.3))
    assert transformer.drop_path_rates(0.3, 1) == (0.0,)
    assert transformer.drop_path_rates(0.0, 3) == (0.0,) * 3


@pytest.mark.parametrize("rescale, mean", [(True, 1.0), (False, 0.75)])
def test_drop_path_drops_whole_examples(rescale, mean):
    x = jnp.ones((8000, 2, 3))
    drop = Drop(jnp.float32(0.75), jax.random.key(0))
    found = transformer.drop_path(x, drop, rescale)
    kept = 4 / 3 if rescale else 1.0
    assert (found == found[:, :1, :1]).all()
    np.testing.assert_allclose(np.unique(found), [0, kept], rtol=1e-6)
    # Five standard deviations.
    assert abs(float(found.mean()) - mean) < 5 * kept * np.sqrt(0.25 * 0.75 / 8000)
    np.testing.assert_array_equal(transformer.drop_path(x, None, rescale), x)


def test_drop_path_draws_in_training_alone():
    """In training drop path draws; a block with both branches dropped is nothing."""
    stack, params, x = stack_of(rate=0.5)
    still = Stack(stack.options, (0.0, 0.0))
    wanted = apply(still, params, x, train=True)
    np.testing.assert_array_equal(apply(stack, params, x), wanted)
    first = apply(stack, params, x, train=True)
    assert (first != apply(stack, params, x, train=True, seed=1)).any()
    drop = Drop(jnp.float32(0.0), jax.random.key(0))
    block = transformer.Block(stack.options)
    found = block.apply({"params": params["block_1"]}, x, drop=drop)
    np.testing.assert_array_equal(found, x)


def test_bfloat16_keeps_float32_parameters_and_the_result_near():
    stack, params, x = stack_of()
    half = Stack(
        dataclasses.replace(stack.options, compute=Compute(jnp.dtype("bfloat16"))),
        stack.rates,
    )
    fresh = init(half, x.astype(jnp.bfloat16))
    assert {leaf.dtype for leaf in jax.tree.leaves(fresh)} == {jnp.dtype("float32")}
    found = apply(half, params, x.astype(jnp.bfloat16))
    assert found.dtype == jnp.bfloat16
    wanted = apply(stack, params, x)
    error = np.abs(found.astype(jnp.float32) - wanted)
    # bfloat16 has 8 bits; two blocks of rounding stay near that.
    assert 0 < error.mean() < 0.02 and error.max() < 0.1


def test_aligned_queries_equal_keys_so_that_like_attends_to_like():
    options = transformer.BlockOptions(heads=2, mlp=64, qkv_init="aligned")
    x = jax.random.normal(jax.random.key(1), (1, 6, 32))
    params = transformer.Attention(options).init(jax.random.key(0), x)["params"]
    kernel = params["qkv"]["kernel"]  # d 3 h e
    np.testing.assert_array_equal(kernel[:, 0], kernel[:, 1])
    for head in range(2):
        product = kernel[:, 0, head].T @ kernel[:, 0, head]
        np.testing.assert_allclose(product, np.eye(16), atol=1e-5)
    logits = jnp.einsum("dhe,ne,md->hnm", kernel[:, 0], x[0] @ kernel[:, 1, 0], x[0])
    assert np.array_equal(logits[0].argmax(1), np.arange(6))  # each token: itself
    plain = transformer.BlockOptions(heads=2, mlp=64)
    params = transformer.Attention(plain).init(jax.random.key(0), x)["params"]
    assert not np.array_equal(params["qkv"]["kernel"][:, 0], kernel[:, 0])
