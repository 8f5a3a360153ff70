"""Each strategy against the same stacks put together by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from scenic import quick

from av_mae import ConfigError, fusion
from av_mae.fusion import Fusion, mean_over_present
from av_mae.transformer import Block, BlockOptions, Size, Stack

BOTH = ("rgb", "spectrogram")
OPTIONS = BlockOptions(heads=2, mlp=16)
DEPTH = 3
SETTINGS = {
    "mid": {"fusion_layers": 1},
    "bottleneck": {"fusion_layer": 1, "bottlenecks": 2},
    "cross": {"fusion_layer": 1},
}
STACKS = {  # name: blocks
    "early": {"joint": 3},
    "shared": {"shared": 3},
    "separate": {"rgb": 3, "spectrogram": 3},
    "mid": {"rgb": 2, "spectrogram": 2, "joint": 1},
    "bottleneck": {"rgb": 3, "spectrogram": 3},
    "cross": {"rgb": 3, "spectrogram": 3},
}


def tokens():
    shapes = {"rgb": (3, 4, 8), "spectrogram": (3, 5, 8)}
    keys = jax.random.split(jax.random.key(1), 2)
    return {
        m: jax.random.normal(k, s)
        for (m, s), k in zip(shapes.items(), keys, strict=True)
    }


def coder(kind, settings=None, **options):
    settings = SETTINGS.get(kind, {}) | (settings or {})
    return Fusion(kind, DEPTH, OPTIONS, settings=settings, **options)


def some_params(module):
    """Parameters of noise, so that none is zero and no initial value is compiled."""
    rng = np.random.default_rng(0)

    def draw(path, x):
        middle = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(rng.normal(middle, 0.3, x.shape), x.dtype)

    init = lambda: module.init(jax.random.key(0), tokens())["params"]
    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(init))


def run(module, params, x, present=None, train=False):
    apply = lambda params, x, present: module.apply(
        {"params": params}, x, present, train, rngs={"drop_path": jax.random.key(0)}
    )
    return quick(apply)(params, x, present)


def stack(params, x, depth=DEPTH, exist=None):
    """A whole stack on a sequence."""
    module = Stack(OPTIONS, (0.0,) * depth)
    return quick(lambda p, x, e: module.apply({"params": p}, x, e))(params, x, exist)


def assert_close(found, wanted):
    assert list(found) == list(BOTH)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, found, wanted)


@pytest.mark.parametrize("kind", fusion.FUSIONS)
def test_stacks_and_their_depth(kind):
    params = some_params(coder(kind))
    blocks = {
        name: sum(part.startswith("block_") for part in stack)
        for name, stack in params.items()
        if name not in ("norm", "bottleneck")
    }
    assert blocks == STACKS[kind]
    norms = {name for name in blocks if "norm" in params[name]}
    assert norms == (set() if kind in ("bottleneck", "cross") else set(blocks))
    assert ("norm" in params) is (kind in ("bottleneck", "cross"))
    bare = some_params(coder(kind, norm=False))
    assert not {"norm"} & set(bare)
    assert all("norm" not in bare[name] for name in blocks)


def test_early_is_one_stack_over_all_tokens():
    params, x = some_params(coder("early")), tokens()
    joined = stack(params["joint"], jnp.concatenate([x["rgb"], x["spectrogram"]], 1))
    wanted = {"rgb": joined[:, :4], "spectrogram": joined[:, 4:]}
    assert_close(run(coder("early"), params, x), wanted)


@pytest.mark.parametrize("kind", ["shared", "separate"])
def test_shared_and_separate_never_meet(kind):
    params, x = some_params(coder(kind)), tokens()
    which = lambda m: params["shared" if kind == "shared" else m]
    wanted = {m: stack(which(m), x[m]) for m in BOTH}
    assert_close(run(coder(kind), params, x), wanted)


def test_mid_joins_in_its_last_layers():
    params, x = some_params(coder("mid")), tokens()
    first = [stack(params[m], x[m], depth=2) for m in BOTH]
    joined = stack(params["joint"], jnp.concatenate(first, 1), depth=1)
    wanted = {"rgb": joined[:, :4], "spectrogram": joined[:, 4:]}
    assert_close(run(coder("mid"), params, x), wanted)


def bottleneck_by_hand(params, x, has):
    """Clips that all have the modalities of `has`: the others do not exist."""
    block = quick(lambda p, x: Block(OPTIONS).apply({"params": p}, x))
    x = {m: block(params[m]["block_0"], x[m]) for m in has}
    shared = jnp.tile(params["bottleneck"], (len(next(iter(x.values()))), 1, 1))
    for i in (1, 2):
        joined = {m: jnp.concatenate([x[m], shared], axis=1) for m in has}
        joined = {m: block(params[m][f"block_{i}"], joined[m]) for m in has}
        x = {m: joined[m][:, :-2] for m in has}
        shared = sum(joined[m][:, -2:] for m in has) / len(has)
    return {m: normalised(y, params["norm"]) for m, y in x.items()}


def normalised(x, norm):
    """LayerNorm by hand."""
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    return x * norm["scale"] + norm["bias"]


def test_bottleneck_exchanges_tokens_of_those_who_are_present():
    module = coder("bottleneck")
    params, x = some_params(module), tokens()
    wanted = bottleneck_by_hand(params, x, BOTH)
    assert_close(run(module, params, x), wanted)
    present = {
        "rgb": jnp.array([True, False, True]),
        "spectrogram": jnp.array([True, True, False]),
    }
    found = run(module, params, x, present)
    for clip, has in enumerate([BOTH, BOTH[1:], BOTH[:1]]):
        alone = bottleneck_by_hand(params, x, has)
        for m in has:
            np.testing.assert_allclose(
                found[m][clip], alone[m][clip], rtol=1e-4, atol=1e-5
            )
    apart = bottleneck_by_hand(params, x, ("rgb",))["rgb"]
    assert np.abs(wanted["rgb"] - apart).max() > 0.01


def test_without_bottlenecks_at_test_nothing_meets_except_in_training():
    module = coder("bottleneck", {"bottlenecks_at_test": False})
    params, x = some_params(module), tokens()
    assert "bottleneck" in params
    alone = {m: bottleneck_by_hand(params, x, (m,))[m] for m in BOTH}
    found = run(module, params, x)
    for m in BOTH:  # a clip alone: its own copy of the bottleneck tokens is left out
        whole = stack_without_norm(params[m], x[m])
        wanted = normalised(whole, params["norm"])
        np.testing.assert_allclose(found[m], wanted, rtol=1e-4, atol=1e-5)
        assert np.abs(found[m] - alone[m]).max() > 0.01
    assert_close(
        run(module, params, x, train=True), bottleneck_by_hand(params, x, BOTH)
    )


def stack_without_norm(params, x, depth=DEPTH):
    module = Stack(OPTIONS, (0.0,) * depth, False)
    return quick(lambda p, x: module.apply({"params": p}, x))(params, x)


def test_one_encoder_for_all_modalities():
    """With bottlenecks: as two stacks with equal parameters."""
    module = coder("bottleneck", {"share_encoder": True})
    params, x = some_params(module), tokens()
    assert set(params) == {"shared", "bottleneck", "norm"}
    twice = {**params, "rgb": params["shared"], "spectrogram": params["shared"]}
    assert_close(run(module, params, x), bottleneck_by_hand(twice, x, BOTH))


def cross_by_hand(params, x):
    """Each modality's tokens through its own layers, together with the others'."""
    block = quick(lambda p, x: Block(OPTIONS).apply({"params": p}, x))
    x = {m: block(params[m]["block_0"], x[m]) for m in BOTH}
    for i in (1, 2):
        joined = jnp.concatenate([x["rgb"], x["spectrogram"]], axis=1)
        each = {m: block(params[m][f"block_{i}"], joined) for m in BOTH}
        x = {"rgb": each["rgb"][:, :4], "spectrogram": each["spectrogram"][:, 4:]}
    return {m: normalised(y, params["norm"]) for m, y in x.items()}


@pytest.mark.parametrize("share_encoder", [False, True])
def test_cross_attends_to_all_tokens_in_layers_of_its_own(share_encoder):
    module = coder("cross", {"share_encoder": share_encoder})
    params, x = some_params(module), tokens()
    stacks = {m: params["shared"] for m in BOTH} if share_encoder else params
    wanted = cross_by_hand({**stacks, "norm": params["norm"]}, x)
    assert_close(run(module, params, x), wanted)


def encoder_of(**changes):
    """The encoder of a config's `model` with three layers."""
    model = dict(drop_path=0.1, drop_path_rescale=True, norm=True)
    model |= dict(
        block=dict(
            gelu="tanh", eps=1e-6, key_bias=True, layer_scale=0.0, qkv_init="xavier"
        )
    )
    size = Size(8, 3, 2, 16, 8, 2)
    compute = dict(dtype="float32", attention="auto", scan=False, remat="none")
    model = ConfigDict(model | changes)
    return fusion.build_encoder(model, size, ConfigDict(compute))


def test_where_modalities_meet_is_counted_from_either_end():
    meet = dict(fusion_layer=1, share_encoder=False)
    assert encoder_of(fusion="mid", **meet).settings == {"fusion_layers": 2}
    assert encoder_of(fusion="mid", fusion_layers=1).settings == {"fusion_layers": 1}
    assert encoder_of(fusion="cross", **meet).settings == meet
    own = dict(bottlenecks=2, bottlenecks_at_test=True)
    assert encoder_of(fusion="bottleneck", **meet, **own).settings == meet | own
    for kind in ("mid", "cross", "bottleneck"):
        with pytest.raises(ConfigError, match="fusion_layer is 4, .* has 3 layers"):
            encoder_of(fusion=kind, fusion_layer=4)


@pytest.mark.parametrize("kind", ["early", "mid", "cross"])
def test_tokens_of_a_missing_modality_are_never_attended_to(kind):
    module = coder(kind)
    params, x = some_params(module), tokens()
    present = {"rgb": jnp.array([True, False, True]), "spectrogram": jnp.ones(3, bool)}
    found = run(module, params, x, present)["spectrogram"]
    alone = run(module, params, {"spectrogram": x["spectrogram"]})["spectrogram"]
    np.testing.assert_allclose(found[1], alone[1], rtol=1e-4, atol=1e-5)
    assert np.abs(found[0] - alone[0]).max() > 0.01
    whole = run(module, params, x)["spectrogram"]
    np.testing.assert_allclose(found[0], whole[0], rtol=1e-4, atol=1e-5)


def test_no_mask_exists_where_nothing_is_missing():
    """Without `present` the program has no select, the sign of a masked softmax."""
    module = coder("early")
    params, x = some_params(module), tokens()
    everybody = {m: jnp.ones(3, bool) for m in BOTH}
    text = lambda present: str(
        jax.make_jaxpr(lambda x: module.apply({"params": params}, x, present))(x)
    )
    assert "select_n" in text(everybody)
    assert "select_n" not in text(None)


def test_drop_path_rises_over_the_whole_depth():
    """With rate 1 the last of two layers is always dropped, the first never."""
    module = Fusion("mid", 2, OPTIONS, 1.0, {"fusion_layers": 1})
    params, x = some_params(module), tokens()
    found = run(module, params, x, train=True)
    # The joint layer is the last: what remains of it is its norm.
    wanted = {
        m: normalised(stack(params[m], x[m], depth=1), params["joint"]["norm"])
        for m in BOTH
    }
    assert_close(found, wanted)
    assert np.abs(run(module, params, x)["rgb"] - found["rgb"]).max() > 0.01


def test_mean_over_present():
    values = {
        "rgb": jnp.array([2.0, 4, 6]),
        "spectrogram": jnp.array([4.0, 8, jnp.nan]),
    }
    present = {
        "rgb": jnp.array([True, False, True]),
        "spectrogram": jnp.array([True, True, False]),
    }
    np.testing.assert_array_equal(mean_over_present(values, present), [3, 8, 6])
    grads = jax.grad(lambda x: mean_over_present(x, present)[:2].sum())(values)
    np.testing.assert_array_equal(grads["rgb"], [0.5, 0, 0])
    np.testing.assert_array_equal(grads["spectrogram"], [0.5, 1, 0])
    finite = values | {"spectrogram": jnp.array([4.0, 8, 2])}
    np.testing.assert_array_equal(mean_over_present(finite, None), [3, 6, 4])


def test_the_config_is_passed_on():
    found = encoder_of(fusion="separate", norm=False)
    assert (found.depth, found.drop_path, found.options.heads) == (3, 0.1, 2)
    assert found.options.drop_path_rescale and not found.norm
    assert found.settings == {}
    with pytest.raises(ConfigError, match="model.fusion is 'seperate': .*'separate'"):
        encoder_of(fusion="seperate")
