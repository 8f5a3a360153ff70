"""Schedules and optimisers against the published code's numbers."""

import functools
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import parity
import pytest
import scenic
from ml_collections import ConfigDict

from av_mae import ConfigError, finetune, optim

SHARED = Path(__file__).resolve().parents[2] / "shared"
FOLDER = SHARED / "fixtures" / "scenic" / "optim"
needs_fixtures = pytest.mark.skipif(
    not FOLDER.is_dir(), reason=f"the published numbers are not at {FOLDER}"
)
KERNELS = ((".*kernel", 1.0), (".*", 0.0))


def published():
    return np.load(FOLDER / "optim.npz")


def tree_of(arrays, prefix):
    """The arrays under a prefix as a nested dict."""
    tree = {}
    for key in arrays:
        if key.startswith(prefix):
            *folders, leaf = key.removeprefix(prefix).split("/")
            node = tree
            for folder in folders:
                node = node.setdefault(folder, {})
            node[leaf] = jnp.asarray(arrays[key])
    return tree


def optimizer_config(**changes):
    config = dict(
        name="adamw",
        b1=0.9,
        b2=0.95,
        eps=1e-8,
        weight_decay=0.05,
        decay_rules=KERNELS,
        clip_norm=0.0,
        layer_decay=1.0,
    )
    return ConfigDict(config | changes)


SCHEDULES = scenic.stored(FOLDER / "optim.npz", r"schedule/(\w+)/lr")
STEPS = scenic.stored(FOLDER / "optim.npz", r"(\w+)/step0/params_after/.*")


@needs_fixtures
def test_no_stored_case_is_missing():
    assert len(SCHEDULES) >= 5 and len(STEPS) >= 4


@needs_fixtures
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_the_published_ones(name):
    arrays = published()
    config = json.loads((FOLDER / "meta.json").read_text())[f"schedule/{name}"]
    peak, total = config["base_learning_rate"], config["steps_per_cycle"]
    # As our configs say it: per 256 clips, in epochs.
    per_256 = 256 / config["batch_size"]
    steps_per_epoch = total // config["num_training_epochs"]
    schedule, _ = optim.learning_rate(
        ConfigDict(
            dict(
                learning_rate_per_256=peak * per_256,
                floor_per_256=config.get("alpha", 0.0) * peak * per_256,
                warmup_epochs=config["warmup_steps"] / steps_per_epoch,
                kind="scenic",
            )
        ),
        config["batch_size"],
        steps_per_epoch,
        total,
    )
    steps, rates = (arrays[f"schedule/{name}/{key}"] for key in ("steps", "lr"))
    within = steps < total
    found = jax.jit(schedule)(jnp.asarray(steps))[within]
    np.testing.assert_allclose(found, rates[within], 1e-6, 1e-6 * peak)
    error = np.abs(found - rates[within]).max() / peak
    parity.record("Scenic schedules", name, outputs=error)
    # The published schedule is back at its peak at the end; ours stays at the floor.
    assert rates[-1] == pytest.approx(peak) and steps[-1] == total
    floor = config.get("alpha", 0.0) * peak
    for step in (total, total + 1, 3 * total):
        assert float(schedule(step)) == pytest.approx(floor, abs=1e-9)


RECIPE = SHARED / "fixtures" / "videomae" / "mcg_recipe"
needs_recipe = pytest.mark.skipif(
    not RECIPE.is_dir(), reason=f"VideoMAE's recipe is not at {RECIPE}"
)


# name: (peak and floor for 256 clips, clips, epochs of warm-up).
VIDEOMAE = {
    "lr_ucf_pretrain_epochs20_niter7": (3e-4, 1e-5, 192, 4.0),
    "lr_ft_epochs20_niter7_wu5": (5e-4, 1e-5, 128, 5.0),
    "lr_warmup_steps": (1e-3, 1e-6, 256, 1.3),
}
RATES = scenic.stored(RECIPE / "recipe.npz", r"(lr_\w+)")


@needs_recipe
def test_no_schedule_of_videomae_is_missing():
    assert len(RATES) >= 3


@needs_recipe
@pytest.mark.parametrize("name", RATES)
def test_schedules_are_videomaes(name):
    per_256, floor, clips, warmup = VIDEOMAE[name]
    wanted = np.load(RECIPE / "recipe.npz")[name]
    per_epoch = 10 if name == "lr_warmup_steps" else 7
    config = ConfigDict(
        dict(
            learning_rate_per_256=per_256,
            floor_per_256=floor,
            warmup_epochs=warmup,
            kind="videomae",
        )
    )
    schedule, _ = optim.learning_rate(config, clips, per_epoch, len(wanted))
    found = jax.jit(schedule)(jnp.arange(len(wanted)))
    np.testing.assert_allclose(found, wanted, 1e-5, 1e-6 * wanted.max())
    error = np.abs(found - wanted).max() / wanted.max()
    parity.record("Schedules and layers", name, outputs=error)


def test_schedule_by_hand():
    schedule = optim.warmup_cosine(2.0, 0.5, 4.0, 8)
    found = [float(schedule(step)) for step in range(10)]
    middle = [0.5 + 1.5 * 0.5 * (1 + np.cos(np.pi * k / 4)) for k in range(4)]
    np.testing.assert_allclose(found, [0, 0.5, 1, 1.5, *middle, 0.5, 0.5], 1e-6)
    assert float(optim.warmup_cosine(2.0, 0.0, 0.0, 8)(0)) == 2.0
    # VideoMAE's rule has the peak twice.
    schedule = optim.warmup_cosine(2.0, 0.5, 3.0, 7, 1)
    found = [float(schedule(step)) for step in range(4)]
    np.testing.assert_allclose(found, [0, 1, 2, 2], 1e-6)
    assert float(optim.warmup_cosine(2.0, 0.0, 1.0, 8, 1)(0)) == 2.0


def test_the_text_states_rule_and_result():
    config = dict(learning_rate_per_256=3e-4, floor_per_256=1e-5, warmup_epochs=4.0)
    config["kind"] = "scenic"
    schedule, text = optim.learning_rate(ConfigDict(config), 512, 3627, 435240)
    assert text == (
        "learning rate 0.0003 per 256 clips × 512 clips per update / 256 = 0.0006: "
        "14508 steps of warm-up (4 epochs of 3627), "
        "then cosine to 2e-05 at step 435240"
    )
    assert float(schedule(14508)) == pytest.approx(6e-4)
    assert float(schedule(435240)) == pytest.approx(2e-5)
    _, text = optim.learning_rate(ConfigDict(config), 512, 3627, 10)
    assert text.endswith("longer than the run, so the peak is never reached")


def layer_of(name):
    """The layers of the published toy tree."""
    block = re.search(r"encoderblock_(\d+)", name)
    if block:
        return int(block[1]) + 1
    first = ("embedding", "posembed_input", "modality_token")
    return 0 if name == "cls" or any(part in name for part in first) else 5


def toy_schedule(peak, offset):
    schedule = optim.warmup_cosine(peak, 0.0, 2.0, 10)
    return lambda step: schedule(step + offset)


TOY_CASES = {
    "pretrain_adam": (dict(name="adam"), 1e-2, 1),
    "pretrain_adam_max_grad_norm_1": (dict(name="adam", clip_norm=1.0), 1e-2, 1),
    "finetune_momentum_layerwise": (
        dict(name="sgd", weight_decay=0.0, clip_norm=1.0, layer_decay=0.75),
        0.1,
        0,
    ),
    "imagenet_finetune_adamw_layerwise": (
        dict(
            b2=0.999,
            # The published mask spares vectors in name only: its numbers decay all.
            decay_rules=((".*", 1.0),),
            layer_decay=0.75,
        ),
        0.1,
        0,
    ),
}


@needs_fixtures
@pytest.mark.parametrize("case", STEPS)
def test_three_steps_are_the_published_ones(case):
    changes, peak, offset = TOY_CASES[case]
    arrays = published()
    params = tree_of(arrays, "toy/params/")
    optimizer = optim.make(
        optimizer_config(**changes), toy_schedule(peak, offset), params, layer_of, 4
    )
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, gradients):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    for i in range(3):
        params, state = step(params, state, tree_of(arrays, f"toy/grad{i}/"))
        wanted = tree_of(arrays, f"{case}/step{i}/params_after/")
        jax.tree.map(
            lambda found, value: np.testing.assert_allclose(
                found, value, rtol=2e-6, atol=1e-6
            ),
            params,
            wanted,
        )
    off = jax.tree.map(lambda found, value: np.abs(found - value).max(), params, wanted)
    parity.record("Scenic optimisers", case, outputs=max(jax.tree.leaves(off)))


@needs_fixtures
def test_decay_and_layers_are_the_published_ones():
    meta = json.loads((FOLDER / "meta.json").read_text())
    params = tree_of(published(), "toy/params/")
    decays = optim.by_rule(KERNELS, params, "")
    named = dict(
        zip(jax.tree.leaves(optim.names(params)), jax.tree.leaves(decays), strict=True)
    )
    decayed = sorted(name for name, value in named.items() if value)
    assert decayed == sorted(meta["pretrain_adam"]["weight_decayed_params"])
    case = meta["finetune_momentum_layerwise"]
    layers, multiples = optim.layers_of(0.75, params, layer_of, 4)
    for name, layer in zip(named, jax.tree.leaves(layers), strict=True):
        assert layer == case["layer_id"][name]
        assert multiples[layer] == np.float32(case["scales_by_layer_id"][layer])


@needs_fixtures
def test_layers_of_a_large_model_have_the_published_scales():
    wanted = json.loads((FOLDER / "meta.json").read_text())[
        "audioset_finetune_L_scales"
    ]
    stack = {f"block_{i}": {"kernel": 0} for i in range(24)}
    params = {"embed": {"rgb": 0}, "encoder": {"rgb": stack, "bottleneck": 0}}
    layer_of = functools.partial(finetune.layer_of, 24)
    layers, multiples = optim.layers_of(0.75, params, layer_of, 24)
    scales = {name: multiples[layer] for name, layer in optim.named(layers).items()}
    layers = ["embed/rgb", *(f"encoder/rgb/block_{i}/kernel" for i in range(24))]
    found = [scales[name] for name in (*layers, "encoder/bottleneck")]
    np.testing.assert_allclose(found, wanted, rtol=1e-7)


def one_step(changes, parameter=3.0, gradient=0.5):
    params = {"a": {"kernel": jnp.array([parameter])}}
    optimizer = optim.make(optimizer_config(**changes), lambda step: 0.1, params)
    updates, _ = optimizer.update(
        {"a": {"kernel": jnp.array([gradient])}}, optimizer.init(params), params
    )
    return float(optax.apply_updates(params, updates)["a"]["kernel"][0])


def test_one_step_by_hand():
    """Adam's first direction is the gradient's sign; momentum's is the gradient."""
    assert one_step(dict(name="adamw")) == pytest.approx(3 - 0.1 * (1 + 0.05 * 3))
    assert one_step(dict(name="adam")) == pytest.approx((1 - 0.1 * 0.05) * (3 - 0.1))
    assert one_step(dict(name="sgd")) == pytest.approx(3 - 0.1 * (0.5 + 0.05 * 3))
    assert one_step(dict(name="sgd", weight_decay=0.0, clip_norm=0.2)) == (
        pytest.approx(3 - 0.1 * 0.2)
    )


def test_adamw_is_optax_adamw():
    params = {"kernel": jnp.linspace(-1, 1, 6), "bias": jnp.ones(2)}
    ours = optim.make(optimizer_config(), lambda step: 0.01 * (step + 1), params)
    theirs = optax.adamw(
        lambda step: 0.01 * (step + 1),
        b2=0.95,
        weight_decay=0.05,
        mask={"kernel": True, "bias": False},
    )
    results = []
    for optimizer in (ours, theirs):
        tree, state = params, optimizer.init(params)
        for i in range(4):
            gradients = jax.tree.map(lambda x, i=i: jnp.sin(7 * x + i), tree)
            updates, state = optimizer.update(gradients, state, tree)
            tree = optax.apply_updates(tree, updates)
        results.append(tree)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), *results
    )


def test_first_rule_wins_and_all_must_be_covered():
    params = {"head": {"kernel": 0, "bias": 0}, "embed": {"kernel": 0}}
    rules = (("head/.*", 2.0), (".*kernel", 1.0))
    assert optim.by_rule(rules, params, "") == {
        "head": {"kernel": 2.0, "bias": 2.0},
        "embed": {"kernel": 1.0},
    }
    with pytest.raises(ConfigError, match="optimizer.decay_rules .* embed/kernel"):
        optim.make(
            optimizer_config(decay_rules=(("head/.*", 1.0),)), lambda s: 0.1, params
        )
    # A rule is for whole names: `kernel` alone covers nothing here.
    with pytest.raises(ConfigError, match="no parameter named"):
        optim.by_rule((("kernel", 1.0),), params, "rules")


def test_wrong_fields_are_named():
    params = {"kernel": jnp.ones(1)}
    with pytest.raises(ConfigError, match="optimizer.name is 'lion'.*'sgd'"):
        optim.make(optimizer_config(name="lion"), lambda s: 0.1, params)
    with pytest.raises(ConfigError, match="optimizer.layer_decay is 0.7, but"):
        optim.make(optimizer_config(layer_decay=0.7), lambda s: 0.1, params)


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_state_is_a_pytree_of_arrays_and_builds_abstractly(name):
    params = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}
    abstract = jax.eval_shape(lambda: params)
    optimizer = optim.make(optimizer_config(name=name), lambda s: 0.1, abstract)
    state = optimizer.init(params)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    assert jax.tree.structure(jax.eval_shape(optimizer.init, abstract)) == (
        jax.tree.structure(state)
    )
