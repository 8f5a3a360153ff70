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
    return mean(_ranked(logits, labels, best).astype(jnp.float32), valid)


def _ranked(
    logits: Float[Array, "b k"], labels: Int[Array, " b"], best: int
) -> Bool[Array, " b"]:
    """Whether the label is among the `best` highest logits, for each row."""
    _, classes = jax.lax.top_k(logits, best)  # b best
    return (classes == labels[:, None]).any(axis=1)


def all_right(
    logits: dict[str, Float[Array, "b _k"]],
    labels: dict[str, Int[Array, " b"]],
    valid: Bool[Array, " b"] | None = None,
) -> Mean:
    """How often every head's highest logit is its label: an action's verb and noun."""
    right = [_ranked(logits[name], labels[name], 1) for name in logits]
    return mean(jnp.all(jnp.stack(right), axis=0).astype(jnp.float32), valid)


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


def ranking(
    scores: Float[np.ndarray, "n k"], labels: Float[np.ndarray, "n k"]
) -> dict[str, float]:
    """mAP, AUC and d′ of a whole set whose clips may have several labels (0 or 1).

    mAP is the mean over the classes of average precision, AUC that of the area under
    the ROC curve; d′ is √2 times the normal quantile of that mean (Scenic's
    evaluation, after Hershey et al. 2017). Classes without a positive clip have
    neither, classes without a negative one no AUC; they are left out of the means.
    NaN where no class is left.
    """
    from scipy.special import ndtri
    from sklearn.metrics import average_precision_score, roc_auc_score

    labels = labels > 0.5
    some, all_ = labels.any(axis=0), labels.all(axis=0)
    score = lambda rule, classes: np.mean(
        [rule(labels[:, k], scores[:, k]) for k in np.flatnonzero(classes)] or [np.nan]
    )
    auc = score(roc_auc_score, some & ~all_)
    return {
        "mAP": float(score(average_precision_score, some)),
        "AUC": float(auc),
        "d_prime": float(np.sqrt(2.0) * ndtri(auc)),
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
