"""Gradients in parts, and the step of both trainers on a linear model."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct

from av_mae import STATISTICS, loop, optim, parallel, update

RNG = np.random.default_rng(0)
BATCH = {
    "x": jnp.asarray(RNG.normal(size=(8, 3)), jnp.float32),
    "y": jnp.asarray(RNG.normal(size=8), jnp.float32),
}


def linear(params, batch, rng):
    """Mean squared error; without randomness."""
    error = batch["x"] @ params["kernel"] + params["bias"] - batch["y"]
    return jnp.mean(error**2), {"largest": jnp.abs(error).mean()}


def noisy(params, batch, rng):
    """Adds noise to every clip."""
    noise = jax.random.normal(rng, batch["y"].shape)
    return linear(params, batch | {"y": batch["y"] + noise}, rng)


def init(rng):
    return {"kernel": jax.random.normal(rng, (3,)), "bias": jnp.ones(())}


@pytest.mark.parametrize("accumulate", [2, 4, 8])
def test_parts_give_the_gradient_of_the_whole_batch(accumulate):
    params = init(jax.random.key(0))
    key = jax.random.key(1)
    wanted = update.gradients(linear, params, BATCH, key, 1)
    found = jax.jit(update.gradients, static_argnums=(0, 4))(
        linear, params, BATCH, key, accumulate
    )
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, found, wanted)
    x, y = np.asarray(BATCH["x"]), np.asarray(BATCH["y"])
    error = x @ np.asarray(params["kernel"]) + 1 - y
    close(found[1]["kernel"], 2 * x.T @ error / 8)
    close(found[1]["bias"], 2 * error.mean())


def test_a_part_takes_every_other_row_and_its_own_randomness():
    seen = []

    def loss(params, batch, rng):
        seen.append((batch["y"], jax.random.key_data(rng)))
        return jnp.sum(params["bias"] * batch["y"]), {}

    with jax.disable_jit():
        update.gradients(loss, init(jax.random.key(0)), BATCH, jax.random.key(1), 2)
    values = [np.asarray(y) for y, _ in seen]
    np.testing.assert_array_equal(values[0], BATCH["y"][0::2])
    np.testing.assert_array_equal(values[1], BATCH["y"][1::2])
    assert (np.asarray(seen[0][1]) != np.asarray(seen[1][1])).any()


class Rising(struct.PyTreeNode):
    """A schedule: rate · (1 + slope · step)."""

    rate: float
    slope: float = 0.0

    def __call__(self, step):
        return self.rate * (1 + self.slope * step)


def optimiser(chain, rate=0.1, slope=0.0) -> optim.Optimiser:
    """`chain(schedule)`, an optax transformation, without layers."""
    return optim.Optimiser(Rising(rate, slope), (), lambda schedule, _: chain(schedule))


def momentum(schedule):
    return optax.sgd(schedule, momentum=0.9)


def started(loss, accumulate=1, rate=0.1):
    tx = optimiser(momentum, rate)
    mesh = parallel.mesh(1, 1)
    first, abstract = update.initial(init, tx, 7, mesh)
    step = update.make(loss, tx, accumulate, abstract, mesh)
    return first, abstract, step


def test_the_first_state():
    first, abstract, _ = started(linear)
    state = first()
    assert set(state) == {"step", "params", "opt_state", "rng"}
    shape = lambda x: (x.shape, x.dtype, x.sharding)
    assert jax.tree.map(shape, state) == jax.tree.map(shape, abstract)
    assert state["step"] == 0
    np.testing.assert_array_equal(state["rng"], jax.random.key_data(jax.random.key(7)))
    jax.tree.map(
        np.testing.assert_array_equal, state["params"], init(loop.key(7, 0, "init"))
    )
    jax.tree.map(np.testing.assert_array_equal, first(), state)


def test_a_step_is_the_optimiser_s():
    first, _, step = started(linear)
    tx = optax.sgd(0.1, momentum=0.9)
    params = first()["params"]
    memory, state = tx.init(params), first()
    for i in range(3):
        (loss, _), grads = jax.value_and_grad(linear, has_aux=True)(params, BATCH, None)
        updates, memory = tx.update(grads, memory, params)
        params = optax.apply_updates(params, updates)
        state, numbers = step(state, BATCH)
        assert state["step"] == i + 1
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5)
        close(numbers["loss"], loss)
        close(numbers["gradient_norm"], optax.tree.norm(grads))
        close(numbers["learning_rate"], 0.1)
        assert "largest" in numbers
    jax.tree.map(close, state["params"], params)


def test_randomness_is_of_seed_and_step_alone():
    """A state written down and read again goes on as if nothing had happened."""
    first, _, step = started(noisy)
    state, losses = first(), []
    for i in range(4):
        if i == 2:
            copy = jax.tree.map(np.array, state)
        state, numbers = step(state, BATCH)
        losses.append(float(numbers["loss"]))
    for i in (2, 3):
        copy, numbers = step(copy, BATCH)
        assert float(numbers["loss"]) == losses[i]
    jax.tree.map(np.testing.assert_array_equal, copy, state)
    # The same parameters at another step see other noise.
    again, _ = first(), None
    again["step"] = jnp.int32(1)
    assert float(step(again, BATCH)[1]["loss"]) != losses[0]


def test_the_state_is_donated():
    first, _, step = started(linear)
    state = first()
    step(state, BATCH)
    assert state["params"]["kernel"].is_deleted()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_running_statistics_are_replaced_not_learned(accumulate):
    """Half of the old value and half of the batch's mean; parts are averaged."""

    def loss(params, batch, rng):
        still = jax.lax.stop_gradient(params["norm"]["mean"])
        total, numbers = linear(params, batch, rng)
        new = {"norm": {"mean": 0.5 * still + 0.5 * batch["y"].mean()}}
        return total, numbers | {STATISTICS: new}

    def start(rng):
        return init(rng) | {"norm": {"mean": jnp.float32(2), "scale": jnp.float32(3)}}

    tx = optimiser(lambda rate: optax.adamw(rate, weight_decay=0.0))
    mesh = parallel.mesh(1, 1)
    first, abstract = update.initial(start, tx, 7, mesh)
    step = update.make(loss, tx, accumulate, abstract, mesh)
    state, numbers = step(first(), BATCH)
    assert STATISTICS not in numbers
    assert state["params"]["norm"]["scale"] == 3
    mean = np.asarray(BATCH["y"]).mean()
    assert state["params"]["norm"]["mean"] == pytest.approx(1 + 0.5 * mean, rel=1e-6)
    assert (state["params"]["kernel"] != first()["params"]["kernel"]).all()


# Moving averages, skipped updates, params that do not learn.


def made(loss, options, tx=None, rate=0.1, start=init):
    tx = tx or optimiser(momentum, rate, slope=1.0)
    mesh = parallel.mesh(1, 1)
    first, abstract = update.initial(start, tx, 7, mesh, options)
    step = update.make(loss, tx, 1, abstract, mesh, options)
    return first, step


def test_the_average_follows_the_params():
    first, step = made(linear, update.Options(ema=0.75))
    state, expected = first(), first()["params"]
    same = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, state["ema"], expected)
    for _ in range(3):
        state, _ = step(state, BATCH)
        mean = lambda old, x: 0.75 * old + 0.25 * np.asarray(x)
        expected = jax.tree.map(mean, expected, state["params"])
        jax.tree.map(same, state["ema"], expected)
    assert (state["ema"]["kernel"] != state["params"]["kernel"]).all()


def test_running_statistics_are_copied_to_the_average():
    def loss(params, batch, rng):
        total, numbers = linear(params, batch, rng)
        return total, numbers | {STATISTICS: {"norm": {"mean": jnp.float32(5)}}}

    start = lambda rng: init(rng) | {"norm": {"mean": jnp.float32(2)}}
    first, step = made(loss, update.Options(ema=0.9), start=start)
    state, _ = step(first(), BATCH)
    assert state["ema"]["norm"]["mean"] == state["params"]["norm"]["mean"] == 5


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_update_that_is_not_finite_is_as_if_it_had_not_been(bad):
    """A bad batch between two good ones leaves what the good ones alone give."""
    options = update.Options(ema=0.5, skip=True)
    first, step = made(linear, options, optimiser(optax.adam, slope=1.0))
    broken = BATCH | {"y": BATCH["y"].at[3].set(bad)}
    state, _ = step(first(), BATCH)
    before = jax.tree.map(np.array, state)
    state, numbers = step(state, broken)
    assert not np.isfinite(numbers["loss"])
    assert numbers["skipped"] == 1 and state["step"] == 2
    for part in ("params", "ema", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, state[part], before[part])
    state, numbers = step(state, BATCH)
    assert numbers["skipped"] == 1
    # The schedule stands where it stood; the step, and with it randomness, goes on.
    assert numbers["learning_rate"] == pytest.approx(0.2)
    whole = first()
    for _ in range(2):
        whole, _ = step(whole, BATCH)
    for part in ("params", "ema", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, state[part], whole[part])
    assert (state["step"], whole["step"]) == (3, 2)


def test_an_update_to_infinite_params_is_dropped_too():
    first, step = made(linear, update.Options(skip=True), rate=3e38)
    state = first()
    before = jax.tree.map(np.array, state["params"])
    state, numbers = step(state, BATCH)
    assert np.isfinite(numbers["loss"]) and np.isfinite(numbers["gradient_norm"])
    assert np.isinf(numbers["parameter_norm"]) and numbers["skipped"] == 1
    jax.tree.map(np.testing.assert_array_equal, state["params"], before)


def test_without_skip_a_bad_update_is_made():
    first, step = made(linear, update.Options())
    state, numbers = step(first(), BATCH | {"y": BATCH["y"] * np.nan})
    assert np.isnan(state["params"]["kernel"]).all() and "skipped" not in numbers


def test_frozen_params_stay_bit_equal_without_optimiser_state():
    options = update.Options(ema=0.9, trained="bias")
    chain = lambda rate: optax.chain(optax.add_decayed_weights(0.1), optax.adam(rate))
    first, step = made(linear, options, optimiser(chain, slope=1.0))
    state = first()
    names = jax.tree_util.tree_flatten_with_path(state["opt_state"])[0]
    assert not [path for path, _ in names if "kernel" in jax.tree_util.keystr(path)]
    before = jax.tree.map(np.array, state["params"])
    for _ in range(2):
        state, numbers = step(state, BATCH)
    for name in ("params", "ema"):
        np.testing.assert_array_equal(state[name]["kernel"], before["kernel"])
        assert state[name]["bias"] != before["bias"]
    params = before | {"bias": np.array(state["params"]["bias"])}
    state, numbers = step(state, BATCH)
    _, grads = jax.value_and_grad(linear, has_aux=True)(params, BATCH, None)
    assert numbers["gradient_norm"] == pytest.approx(
        abs(float(grads["bias"])), rel=1e-5
    )


def test_a_part_of_the_params_by_whole_names():
    params = {"head": {"kernel": 1, "bias": 2}, "header": {"kernel": 3}, "a": {"b": 4}}
    assert update.part(params, "head/.*") == {"head": {"kernel": 1, "bias": 2}}
    assert update.part(params, ".*/kernel|a/b") == {
        "head": {"kernel": 1},
        "header": {"kernel": 3},
        "a": {"b": 4},
    }
    assert update.part(params, ".*") == params
