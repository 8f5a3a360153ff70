"""Through the layers of a transformer: one after another, or traced once and scanned.

Parameters are stored by layer (block_0 …) whichever way is taken: a scan stacks them
inside the program, so that checkpoints and numbers do not depend on it. A scan compiles
one layer, however many there are. Rematerialisation computes activations a second time
in the backward pass instead of keeping them: `blocks` keeps only what passes from layer
to layer, `dots` also the results of the products with weights (Chen et al. 2016,
"Training deep nets with sublinear memory cost").
"""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, UInt32

# compute.remat: what a layer keeps for the backward pass; None: its inputs alone.
REMAT = {
    "none": None,
    "blocks": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Drop(NamedTuple):
    """Stochastic depth of a layer: the probability of survival, and its randomness."""

    keep: Float[Array, ""]
    key: Key[Array, ""] | UInt32[Array, "2"]


def two(drop: Drop | None) -> tuple[Drop | None, Drop | None]:
    """The draws of a layer's two branches."""
    if drop is None:
        return None, None
    first, second = jax.random.split(drop.key)
    return drop._replace(key=first), drop._replace(key=second)


def through(
    stacks: Mapping[str, Any],
    layers: Sequence[int],
    body: Callable[[dict[str, Callable], Any], Any],
    carry: Any,
    train: bool,
) -> Any:
    """carry ← body(calls, carry) for each of `layers`, in order.

    `calls[name](x, present, context)` is this layer's block of the stack `name`. With
    `compute.scan` the carry keeps shapes and types. How is computed is told by the
    first stack's options.
    """
    if not len(layers):
        return carry
    first = next(iter(stacks.values()))
    compute = first.options.compute
    drops = [{name: s.drop(i, train) for name, s in stacks.items()} for i in layers]
    again = compute.remat != "none"
    if first.is_initializing() or not (compute.scan or again):
        for i, drop in zip(layers, drops, strict=True):
            bound = {n: functools.partial(s.layer, i) for n, s in stacks.items()}
            carry = body(_calls(bound, drop), carry)
        return carry

    def layer(carry, inputs):
        params, drop = inputs
        detached = {
            name: _detached(stack.detached(), params[name])
            for name, stack in stacks.items()
        }
        return body(_calls(detached, drop), carry), None

    if again:
        # Inside a scan XLA cannot merge the second computation with the first anyway.
        layer = jax.checkpoint(
            layer, policy=REMAT[compute.remat], prevent_cse=not compute.scan
        )
    params = [{name: s.parameters(i) for name, s in stacks.items()} for i in layers]
    inputs = list(zip(params, drops, strict=True))
    if compute.scan:
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *inputs)
        return jax.lax.scan(layer, carry, stacked)[0]
    for one in inputs:
        carry, _ = layer(carry, one)
    return carry


def _detached(block, params) -> Callable:
    return lambda *arguments: block.apply({"params": params}, *arguments)


def _calls(blocks: Mapping[str, Callable], drops: Mapping) -> dict[str, Callable]:
    """Each call of a block draws for itself, also of one that is called again."""

    def of(name):
        count, drop = itertools.count(), drops[name]

        def call(x, present=None, context=None):
            if drop is None:
                return blocks[name](x, present, context, None)
            own = drop._replace(key=jax.random.fold_in(drop.key, next(count)))
            return blocks[name](x, present, context, own)

        return call

    return {name: of(name) for name in blocks}
