"""What evaluation reports: sums over padded batches, divided at the end.

A step returns a dict of `Mean`s, each a total and a count; `add` collects them over the
batches in float64 on the host, and `results` divides. Rows that pad the last batch and
clips that lack the modality have weight 0 in both. Totals of a sharded batch are
global under jit, so that devices and hosts need nothing more.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int


class Mean(NamedTuple):
    """A mean that is still two sums."""

    total: Float32[Array, ""]
    count: Float32[Array, ""]


def mean(values: Float[Array, "b ..."], valid: Bool[Array, " b"] | None) -> Mean:
    """The mean over all values of the valid rows (None: all rows)."""
    values = values.astype(jnp.float32)
    if valid is None:
        return Mean(values.sum(), jnp.float32(values.size))
    rows = valid.reshape(-1, *[1] * (values.ndim - 1))
    per_row = values.size // values.shape[0]
    total = jnp.where(rows, values, 0.0).sum()
    return Mean(total, valid.sum(dtype=jnp.float32) * per_row)


def top_k(
    logits: Float[Array, "b k"],
    labels: Int[Array, " b"],
    best: int,
    valid: Bool[Array, " b"] | None = None,
) -> Mean:
    """How often the label is among the `best` highest logits.

    Of equal logits the lower class number comes first, so that a model that says
    nothing is not credited with everything.
    """
    _, classes = jax.lax.top_k(logits, best)  # b best
    found = (classes == labels[:, None]).any(axis=1)
    return mean(found.astype(jnp.float32), valid)


def classification(
    logits: Float[Array, "b k"],
    labels: Int[Array, " b"],
    valid: Bool[Array, " b"] | None = None,
) -> dict[str, Mean]:
    """Top-1, and top-5 where there are more than five classes."""
    wanted = {"top_1": 1, "top_5": 5}
    return {
        name: top_k(logits, labels, best, valid)
        for name, best in wanted.items()
        if best == 1 or logits.shape[1] > best
    }


def reconstruction(
    prediction: Float[Array, "b m f"],
    target: Float[Array, "b m f"],
    present: Bool[Array, " b"] | None = None,
) -> dict[str, Mean]:
    """Squared error, and what the variance of the target is made of.

    Give `results` of the sums to `fraction_of_variance`. A target that is far from 0
    beside its deviation would lose digits in float32; log-mels and pixels are not.
    """
    target = target.astype(jnp.float32)
    return {
        "error": mean((prediction.astype(jnp.float32) - target) ** 2, present),
        "target": mean(target, present),
        "target_squared": mean(target**2, present),
    }


def fraction_of_variance(means: dict[str, float]) -> float:
    """Error / variance of the target over all of the set: 1 is its constant mean."""
    variance = means["target_squared"] - means["target"] ** 2
    return means["error"] / variance if variance > 0 else float("nan")


def add(sums: dict, batch: dict) -> dict:
    """One batch more, in float64 on the host; start with an empty dict."""
    batch = jax.tree.map(lambda x: np.asarray(x, np.float64), batch)
    return jax.tree.map(np.add, sums, batch) if sums else batch


def results(sums: dict) -> dict:
    """The means as Python floats, NaN where nothing was counted."""
    divide = lambda m: float(m.total / m.count) if m.count else float("nan")
    return jax.tree.map(divide, sums, is_leaf=lambda x: isinstance(x, Mean))
