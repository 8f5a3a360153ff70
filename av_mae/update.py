"""The training state and the jitted update that both trainers share.

State is one pytree: step, params, opt_state, rng, and perhaps ema, the moving average
of the params. The update is a closure over the loss and the optimiser, with donated
state; randomness is folded from the seed and the step, so that a resumed run draws what
an uninterrupted one would. Running statistics of batches, where a model has some, are
among the params: no gradient flows to them, and the update replaces them by what the
loss gives under STATISTICS.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from av_mae import STATISTICS, choose, loop, parallel
from av_mae.optim import Optimiser

Loss = Callable[[Any, Any, jax.Array], tuple[jax.Array, dict]]


class Options(NamedTuple):
    """What an update does besides, or leaves undone.

    ema: decay of the moving average of the params, 0.0 for none: after each update
    ema ← decay · ema + (1 − decay) · params; it begins as the first params. Running
    statistics, averages already, are copied to it.
    skip: an update whose loss, gradient or result is not finite is dropped, inside of
    the step: params, optimiser (its count and with it the schedule too) and ema stay as
    they were, and the next batch is as if there had been none.
    trained: regex of the names of the params that learn. The others are given to the
    loss as they are, have no gradients and no optimiser state, and stay bit-equal.
    """

    ema: float = 0.0
    skip: bool = False
    trained: str = ".*"


def options_of(config, trained: str = ".*") -> Options:
    """The options of `config.ema` and `config.nonfinite`."""
    choose("nonfinite", config.nonfinite, ("stop", "skip"))
    return Options(config.ema, config.nonfinite == "skip", trained)


def initial(
    init_params: Callable[[jax.Array], Any],
    tx: Optimiser | optax.GradientTransformation,
    seed: int,
    mesh: Mesh,
    options: Options = Options(),  # noqa: B008 (it cannot change)
) -> tuple[Callable[[], dict], dict]:
    """(function that makes the first state on the mesh, its shapes and shardings)."""

    def make():
        params = init_params(loop.key(seed, 0, "init"))
        state = {
            "step": jnp.zeros([], jnp.int32),
            "params": params,
            "opt_state": tx.init(part(params, options.trained)),
            "rng": jax.random.key_data(jax.random.key(seed)),
        }
        return state | ({"ema": copy(params)} if options.ema else {})

    shape = jax.eval_shape(make)
    shardings = parallel.state_shardings(shape, mesh)
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shape,
        shardings,
    )
    return jax.jit(make, out_shardings=shardings), abstract


def gradients(loss: Loss, params, batch, rng, accumulate: int):
    """((loss, numbers), gradients) of a batch, in `accumulate` parts one after another.

    A part takes every accumulate-th row, so that each device keeps its own rows.
    """
    grad = jax.value_and_grad(loss, has_aux=True)
    if accumulate == 1:
        return grad(params, batch, rng)

    def split(x):
        return x.reshape((-1, accumulate) + x.shape[1:]).swapaxes(0, 1)

    parts = (jax.tree.map(split, batch), jax.random.split(rng, accumulate))
    at = lambda i: jax.tree.map(lambda x: x[i], parts)

    def add(i, total):
        return jax.tree.map(jnp.add, total, grad(params, *at(i)))

    total = jax.lax.fori_loop(1, accumulate, add, grad(params, *at(0)))
    return jax.tree.map(lambda x: x / accumulate, total)


def replaced(params: Any, values: Any) -> Any:
    """The params, nested dicts, with some leaves taken from `values`, nested alike."""
    if not isinstance(values, Mapping):
        return values
    return params | {k: replaced(params[k], value) for k, value in values.items()}


def part(params: Any, pattern: str, prefix: str = "") -> dict:
    """The params, nested dicts, whose whole name the regex matches, nested alike."""
    found = {}
    for name, value in params.items():
        if isinstance(value, Mapping):
            if below := part(value, pattern, f"{prefix}{name}/"):
                found[name] = below
        elif re.fullmatch(pattern, prefix + name):
            found[name] = value
    return found


def copy(params: Any) -> Any:
    """The same values in other buffers, so that both can be donated."""
    return jax.tree.map(jnp.copy, params)


def done(state: dict) -> jax.Array:
    """Updates that were made: the optimiser's own count, or the step without one."""
    leaves = jax.tree_util.tree_flatten_with_path(state["opt_state"])[0]
    counts = [x for path, x in leaves if getattr(path[-1], "name", "") == "count"]
    return counts[0] if counts else state["step"]


class Step(NamedTuple):
    """A jitted update and the numbers of its optimiser, which it is given each time."""

    jitted: Callable
    tx: Optimiser

    def __call__(self, state, batch):
        return self.jitted(state, batch, self.tx)


def make(
    loss: Loss,
    tx: Optimiser,
    accumulate: int,
    abstract: dict,
    mesh: Mesh,
    options: Options = Options(),  # noqa: B008 (it cannot change)
) -> Step:
    """The jitted (state, batch) → (state, numbers); the state is donated.

    Numbers are those of the loss, the loss itself, gradient_norm, parameter_norm,
    learning_rate and, where updates may be skipped, how many were (`skipped`). Those of
    a skipped one are what made it one.
    """

    def step(state, batch, tx):
        rng = loop.key(jax.random.wrap_key_data(state["rng"]), state["step"], "step")
        params, learns = state["params"], part(state["params"], options.trained)
        (total, numbers), grads = gradients(
            lambda some, *rest: loss(replaced(params, some), *rest),
            *(learns, batch, rng, accumulate),
        )
        updates, opt_state = tx.update(grads, state["opt_state"], learns)
        learns = optax.apply_updates(learns, updates)
        statistics = numbers.pop(STATISTICS, {})
        params = replaced(replaced(params, learns), statistics)
        new = {"params": params, "opt_state": opt_state}
        if options.ema:
            mean = lambda old, x: options.ema * old + (1 - options.ema) * x
            averages = part(state["ema"], options.trained)
            averages = jax.tree.map(mean, averages, learns)
            new["ema"] = replaced(replaced(state["ema"], averages), statistics)
        norms = {
            "loss": total,
            "gradient_norm": optax.tree.norm(grads),
            # Not finite after a bad update, before any loss tells: no such checkpoint.
            "parameter_norm": optax.tree.norm(params),
        }
        if options.skip:
            good = jnp.isfinite(jnp.stack(list(norms.values()))).all()
            keep = lambda new, old: jnp.where(good, new, old)
            new = jax.tree.map(keep, new, {name: state[name] for name in new})
        rate = jnp.asarray(tx.schedule(done(state)), jnp.float32)
        numbers = numbers | norms | {"learning_rate": rate}
        state = state | new | {"step": state["step"] + 1}
        if options.skip:
            numbers["skipped"] = state["step"] - done(state)
        return state, numbers

    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    everywhere = parallel.replicated(mesh)
    jitted = jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(shardings, parallel.batch_sharding(mesh), everywhere),
        out_shardings=(shardings, everywhere),
    )
    # On the devices once, not in each step.
    return Step(jitted, jax.jit(lambda x: x, out_shardings=everywhere)(tx))
