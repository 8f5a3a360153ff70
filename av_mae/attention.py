"""Scaled dot-product attention: which implementation computes it.

`xla` is what XLA makes of the plain formula as `jax.nn.dot_product_attention` writes
it, `cudnn` the fused kernel of NVIDIA's cuDNN (no matrix of weights in memory), `dot`
the formula with the heads brought forward first. All take the softmax's statistics in
float32. `auto` takes cuDNN where it can run and the sequence is long enough.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from av_mae import ConfigError

KINDS = ("auto", "xla", "cudnn", "dot")

FUSED_FROM = 256
"""Keys from which `auto` takes cuDNN: below, the weights of a head fit into a GPU's
cache, and a fused kernel saves little. A guess: `python -m av_mae.benchmark step` with
`--config.compute.attention=xla` and `=cudnn` measures it on the device at hand."""


def attend(
    query: Float[Array, "b n h e"],
    key: Float[Array, "b k h e"],
    value: Float[Array, "b k h e"],
    present: Bool[Array, "b k"] | None,
    kind: str = "auto",
    dtype=jnp.float32,
) -> Float[Array, "b n h e"]:
    """softmax(query · keyᵀ / √e) · value, over the keys that are present.

    `cudnn` with keys that may be absent takes even numbers of queries and keys.
    """
    mask = None if present is None else present[:, None, None, :]  # b 1 1 k
    if kind == "auto":
        whole = mask is None
        kind = best(jax.default_backend(), dtype, key.shape[1], key.shape[-1], whole)
    if kind == "dot":
        return dot(query, key, value, mask)
    if kind == "cudnn" and mask is not None:  # it wants the mask of every query
        if query.shape[1] % 2 or key.shape[1] % 2:
            raise ConfigError(
                f"compute.attention is 'cudnn', which cannot leave out keys of "
                f"{key.shape[1]} for {query.shape[1]} queries, as one of the numbers "
                "is odd: set it to 'auto'."
            )
        mask = jnp.broadcast_to(mask, (len(mask), 1, query.shape[1], key.shape[1]))
    return jax.nn.dot_product_attention(
        query, key, value, mask=mask, implementation=kind
    )


def best(backend: str, dtype, keys: int, e: int, whole: bool = True) -> str:
    """The implementation for this backend, type, number of keys and width of a head.

    cuDNN takes 16-bit numbers and heads up to 128 wide by steps of 8 (jax checks the
    rest when it lowers). Where keys may be absent (not `whole`) it would need their
    mask for every query, and even lengths: XLA does that.
    """
    half = jnp.dtype(dtype).itemsize == 2
    fits = half and e % 8 == 0 and e <= 128
    if backend == "gpu" and fits and keys >= FUSED_FROM and whole:
        return "cudnn"
    return "xla"


def dot(query, key, value, mask=None) -> Float[Array, "b n h e"]:
    """The formula, heads first: two products over batch and head, softmax between."""
    query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))  # b h n e
    product = lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32)
    logits = product(query, key.swapaxes(2, 3)) / math.sqrt(query.shape[-1])
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min / 2)
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    return product(weights, value).astype(value.dtype).swapaxes(1, 2)
