"""Schedules, (regex, value) rules and layer decay → one optax chain.

    update = clip by global norm → the optimiser's direction → weight decay
             → × layer scale → × −learning rate

Everything is optax: the state is a pytree of arrays and the update runs under jit.
Schedule and layer scale are values that a compiled update is given, not constants in
it, so that runs which differ in them alone share one compiled step. Rules and layers
see a parameter by its name in the tree, joined by slashes
(`encoder/rgb/block_0/mlp/in/kernel`).
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jaxtyping import PyTree

from av_mae import ConfigError, choose

Schedule = Callable[[Any], Any]  # update number, from 0 → learning rate


class Optimiser(struct.PyTreeNode):
    """An optax transformation, and the numbers in it that are no part of a program.

    A pytree whose leaves are the schedule's numbers and the learning rate's multiple of
    each layer, float32 [layers]; `chain(schedule, multiples)` is the transformation.
    """

    schedule: Any  # a Schedule that is a pytree
    multiples: Any
    chain: Callable[..., optax.GradientTransformation] = struct.field(pytree_node=False)

    def init(self, params):
        """The first state of the optimiser."""
        return self.chain(self.schedule, self.multiples).init(params)

    def update(self, updates, state, params):
        """(what is added to params, the next state), from gradients."""
        return self.chain(self.schedule, self.multiples).update(updates, state, params)


def learning_rate(
    config, clips_per_update: int, steps_per_epoch: int, total_steps: int
) -> tuple[Schedule, str]:
    """The schedule that config.schedule asks for, and a text with rule and result.

    clips_per_update is global batch × accumulation; samples per clip do not count.
    """
    scale = clips_per_update / 256
    peak = config.learning_rate_per_256 * scale
    floor = config.floor_per_256 * scale
    warmup = config.warmup_epochs * steps_per_epoch
    text = (
        f"learning rate {config.learning_rate_per_256:g} per 256 clips × "
        f"{clips_per_update} clips per update / 256 = {peak:g}: "
        f"{warmup:g} steps of warm-up ({config.warmup_epochs:g} epochs of "
        f"{steps_per_epoch}), then cosine to {floor:g} at step {total_steps}"
    )
    if warmup >= total_steps:
        text += "; the warm-up is longer than the run, so the peak is never reached"
    before = choose("schedule.kind", config.kind, KINDS)
    return warmup_cosine(peak, floor, warmup, total_steps, before), text


# schedule.kind: how many steps before the end of the warm-up the peak is reached.
KINDS = {"scenic": 0, "videomae": 1}


class WarmupCosine(struct.PyTreeNode):
    """Linear from 0 over `rise` steps, cosine from peak at `warmup` to the floor.

    Its fields are numbers, in a compiled update float32 arrays [].
    """

    peak: Any
    floor: Any
    rise: Any
    warmup: Any
    remaining: Any

    def __call__(self, step):
        rising = jnp.where(self.rise > 0, step / jnp.maximum(self.rise, 1e-9), 1.0)
        progress = jnp.clip((step - self.warmup) / self.remaining, 0.0, 1.0)
        cosine = 0.5 * (1 + jnp.cos(jnp.pi * progress))
        height = self.floor + (self.peak - self.floor) * cosine
        return jnp.minimum(1.0, rising) * height


def warmup_cosine(
    peak: float, floor: float, warmup: float, total_steps: int, before: int = 0
) -> WarmupCosine:
    """Linear from 0 to peak, then cosine over the remaining steps, then the floor.

    The numbers of Scenic's compound schedule up to the last step. At total_steps, where
    the published code starts another cycle at the peak, this one stays at the floor.
    With `before` 1 those of VideoMAE's, whose last step of the warm-up has the peak
    already, and the first one of the cosine again.
    """
    remaining = float(max(total_steps - int(warmup), 1))
    return WarmupCosine(peak, floor, float(warmup - before), float(warmup), remaining)


def adamw(config, decay, scale, schedule) -> optax.GradientTransformation:
    """p ← p − lr (Adam's direction + decay · p), as `optax.adamw`."""
    return optax.chain(
        optax.scale_by_adam(config.b1, config.b2, config.eps),
        add_decay(decay),
        scale_by_tree(scale),
        optax.scale_by_learning_rate(schedule),
    )


def adam(config, decay, scale, schedule) -> optax.GradientTransformation:
    """p ← (1 − lr · decay) (p − lr · Adam's direction), as Scenic pretrains.

    The decay comes after the update and so shrinks the update too; the difference to
    `adamw` is lr² · decay · direction.
    """
    return optax.chain(
        optax.scale_by_adam(config.b1, config.b2, config.eps),
        scale_by_tree(scale),
        optax.scale_by_learning_rate(schedule),
        shrink(decay, scale, schedule),
    )


def sgd(config, decay, scale, schedule) -> optax.GradientTransformation:
    """Momentum b1; decay, where there is any, as in `adamw` and not in the momentum."""
    return optax.chain(
        optax.trace(config.b1),
        add_decay(decay),
        scale_by_tree(scale),
        optax.scale_by_learning_rate(schedule),
    )


OPTIMIZERS = {"adamw": adamw, "adam": adam, "sgd": sgd}


def make(
    config,
    schedule: Schedule,
    params: PyTree,
    layer_of: Callable[[str], int] | None = None,
    num_layers: int = 0,
) -> Optimiser:
    """The optimiser that config.optimizer asks for, for this tree of parameters.

    `params` may be abstract. `layer_of` gives a parameter's layer by its name: 0 for
    what comes before the first block, i + 1 for block i, num_layers + 1 for what comes
    after the last. Its learning rate is scaled by
    layer_decay ** (num_layers + 1 - layer).
    """
    decay = jax.tree.map(
        lambda multiple: multiple * config.weight_decay,
        by_rule(config.decay_rules, params, "optimizer.decay_rules"),
    )
    rule = choose("optimizer.name", config.name, OPTIMIZERS)
    layers, multiples = layers_of(config.layer_decay, params, layer_of, num_layers)

    def chain(schedule, multiples):
        scale = jax.tree.map(lambda layer: multiples[layer], layers)
        update = rule(config, decay, scale, schedule)
        if config.clip_norm:
            return optax.chain(optax.clip_by_global_norm(config.clip_norm), update)
        return update

    return Optimiser(schedule, multiples, chain)


def names(params: PyTree) -> PyTree:
    """The tree of the parameters' own names, joined by slashes."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: jax.tree_util.keystr(path, simple=True, separator="/"), params
    )


def named(params: PyTree) -> dict[str, Any]:
    """The parameters by their names, in the tree's order."""
    return dict(
        zip(jax.tree.leaves(names(params)), jax.tree.leaves(params), strict=True)
    )


def by_rule(rules, params: PyTree, field: str) -> PyTree:
    """A value for each parameter: of the first (regex, value) that its name matches.

    A rule has to match the whole name. A parameter that no rule covers is a
    ConfigError that names it and the `field` of the rules.
    """

    def value(name):
        for pattern, result in rules:
            if re.fullmatch(pattern, name):
                return result
        raise ConfigError(
            f"{field} covers no parameter named {name}: "
            'add a rule for it, or end the rules with (".*", value).'
        )

    return jax.tree.map(value, names(params))


def layers_of(
    layer_decay: float, params: PyTree, layer_of, num_layers
) -> tuple[PyTree, np.ndarray]:
    """(each parameter's layer, each layer's multiple of the learning rate, float32).

    Without `layer_of` there is one layer, of multiple 1, and no layer decay.
    """
    if layer_of is None:
        if layer_decay != 1.0:
            raise ConfigError(
                f"optimizer.layer_decay is {layer_decay}, but this trainer numbers no "
                "layers: set it to 1.0."
            )
        layer_of = lambda name: 0
        num_layers = -1
    above = np.arange(num_layers + 1, -1, -1)
    layers = jax.tree.map(layer_of, names(params))
    return layers, np.float32(layer_decay ** above.astype(np.float64))


def add_decay(decay: PyTree) -> optax.GradientTransformation:
    """updates + decay · params."""
    return optax.stateless(
        lambda updates, params: jax.tree.map(
            lambda u, p, d: u + d * p if d else u, updates, params, decay
        )
    )


def scale_by_tree(scale: PyTree) -> optax.GradientTransformation:
    """updates · scale, each parameter its own."""
    return optax.stateless(
        lambda updates, _: jax.tree.map(lambda u, s: u * s, updates, scale)
    )


def shrink(decay: PyTree, scale: PyTree, schedule) -> optax.GradientTransformation:
    """The whole step's result × (1 − lr · scale · decay), said as an update."""

    def update(updates, state, params):
        rate = schedule(state.count)
        shrunk = jax.tree.map(
            lambda u, p, d, s: u - rate * s * d * (p + u) if d else u,
            updates,
            params,
            decay,
            scale,
        )
        return shrunk, optax.ScaleByScheduleState(state.count + 1)

    init = lambda params: optax.ScaleByScheduleState(jnp.zeros([], jnp.int32))
    return optax.GradientTransformation(init, update)
