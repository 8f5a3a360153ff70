"""Layers in a loop, scanned or computed again: the same numbers from fewer lines."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scenic import quick
from test_flops import products

from av_mae import depth
from av_mae.fusion import Fusion
from av_mae.transformer import BlockOptions, Compute

OPTIONS = BlockOptions(heads=2, mlp=16, drop_path_rescale=True)
LAYERS = 3
KINDS = {
    "shared": {},
    "bottleneck": dict(fusion_layer=1, bottlenecks=2, share_encoder=False),
}


def coder(kind: str, layers: int = LAYERS, **compute) -> Fusion:
    options = dataclasses.replace(OPTIONS, compute=Compute(**compute))
    return Fusion(kind, layers, options, 0.3, KINDS[kind])


def tokens() -> dict:
    rng = np.random.default_rng(0)
    sizes = {"rgb": 5, "spectrogram": 3}
    make = lambda n: jnp.asarray(rng.normal(size=(3, n, 8)), jnp.float32)
    return {m: make(n) for m, n in sizes.items()}


def shapes(layers: int = LAYERS) -> dict:
    init = lambda kind: coder(kind, layers).init(jax.random.key(0), tokens())
    return {k: jax.eval_shape(functools.partial(init, k)) for k in KINDS}


def some_params() -> dict:
    rng = np.random.default_rng(1)
    draw = lambda x: jnp.asarray(rng.normal(0.3, 0.3, x.shape), x.dtype)
    return jax.tree.map(draw, shapes())


def loss_of(**compute):
    """Squares of what every strategy makes of the tokens, in training."""
    present = {"rgb": jnp.array([True, True, False]), "spectrogram": jnp.ones(3, bool)}
    rngs = {"drop_path": jax.random.key(3)}

    def loss(params, x):
        total = 0.0
        for kind in KINDS:
            layers = len(params["shared"]["params"]["shared"]) - 1
            module = coder(kind, layers, **compute)
            found = module.apply(params[kind], x, present, True, rngs=rngs)
            total += sum((y * jnp.cos(jnp.arange(8))).sum() for y in found.values())
        return total

    return loss


@functools.cache
def gradients(**compute):
    grad = jax.value_and_grad(loss_of(**compute), argnums=(0, 1))
    return quick(grad)(some_params(), tokens())


@pytest.mark.parametrize(
    "compute",
    [
        dict(scan=True, remat="dots"),
        pytest.param(dict(scan=True), marks=pytest.mark.slow),
        pytest.param(dict(remat="blocks"), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_same_loss_and_gradients(compute):
    """With drop path, whose draws are the same too."""
    wanted, found = gradients(), gradients(**compute)
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(b) + 1e-5


def lines(compute: dict, layers: int) -> int:
    params, x = shapes(layers), tokens()
    return str(jax.make_jaxpr(jax.grad(loss_of(**compute)))(params, x)).count("dot_gen")


@pytest.mark.slow
def test_a_scan_has_as_many_products_however_deep():
    assert lines(dict(scan=True), 3) == lines(dict(scan=True), 5)
    assert lines({}, 3) < lines({}, 5)


def test_what_is_computed_again():
    """Blocks: all products but the last layers' last; dots: attention's alone."""
    params, x = shapes(), tokens()
    count = lambda **compute: products(
        jax.make_jaxpr(jax.grad(loss_of(**compute)))(params, x).jaxpr
    )
    plain, blocks, dots = (count(remat=kind) for kind in depth.REMAT)
    assert plain < dots < blocks
    # The forward pass is a third of both passes, so nearly a third more.
    assert 1.2 < blocks / plain < 4 / 3
