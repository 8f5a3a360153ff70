"""The training state and the jitted update that both trainers share.

State is one pytree: step, params, opt_state, rng. The update is a closure over the loss
and the optimiser, with donated state; randomness is folded from the seed and the step,
so that a resumed run draws what an uninterrupted one would. Running statistics of
batches, where a model has some, are among the params: no gradient flows to them, and
the update replaces them by what the loss gives under STATISTICS.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from av_mae import STATISTICS, loop, parallel

Loss = Callable[[Any, Any, jax.Array], tuple[jax.Array, dict]]


def initial(
    init_params: Callable[[jax.Array], Any],
    tx: optax.GradientTransformation,
    seed: int,
    mesh: Mesh,
) -> tuple[Callable[[], dict], dict]:
    """(function that makes the first state on the mesh, its shapes and shardings)."""

    def make():
        params = init_params(loop.key(seed, 0, "init"))
        return {
            "step": jnp.zeros([], jnp.int32),
            "params": params,
            "opt_state": tx.init(params),
            "rng": jax.random.key_data(jax.random.key(seed)),
        }

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


def make(
    loss: Loss,
    tx: optax.GradientTransformation,
    schedule: Callable,
    accumulate: int,
    abstract: dict,
    mesh: Mesh,
) -> Callable[[dict, dict], tuple[dict, dict]]:
    """The jitted (state, batch) → (state, numbers); the state is donated."""

    def step(state, batch):
        rng = loop.key(jax.random.wrap_key_data(state["rng"]), state["step"], "step")
        (total, numbers), grads = gradients(
            loss, state["params"], batch, rng, accumulate
        )
        updates, opt_state = tx.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        params = replaced(params, numbers.pop(STATISTICS, {}))
        numbers = numbers | {
            "loss": total,
            "gradient_norm": optax.tree.norm(grads),
            # Not finite after a bad update, before any loss tells: no such checkpoint.
            "parameter_norm": optax.tree.norm(params),
            "learning_rate": jnp.asarray(schedule(state["step"]), jnp.float32),
        }
        new = {"step": state["step"] + 1, "params": params, "opt_state": opt_state}
        return state | new, numbers

    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    return jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(shardings, parallel.batch_sharding(mesh)),
        out_shardings=(shardings, parallel.replicated(mesh)),
    )
