"""What training minimises: reconstruction of masked patches, and cross-entropies."""

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from jaxtyping import Array, Bool, Float, Float32, Int

from av_mae import ConfigError

# Scenic's `jax.nn.standardize`: population variance, and this added to it.
STANDARDISE_EPSILON = 1e-6


def raw(patches: Float32[Array, "b n f"], channels: int):
    """No statistics: the target is the patch itself."""
    return jnp.zeros_like(patches), jnp.ones_like(patches)


def standardised(patches: Float32[Array, "b n f"], channels: int):
    """One mean and deviation per patch."""
    return standardised_channels(patches, 1)


def standardised_channels(patches: Float32[Array, "b n f"], channels: int):
    """One mean and deviation per patch and channel."""
    pixels = rearrange(patches, "b n (p c) -> b n p c", c=channels)
    mean = jnp.mean(pixels, axis=2)
    deviation = jnp.sqrt(jnp.var(pixels, axis=2) + STANDARDISE_EPSILON)
    fill = lambda x: repeat(x, "b n c -> b n (p c)", p=pixels.shape[2])
    return fill(mean), fill(deviation)


# Each gives the mean and the deviation that its target takes away, [b n f] both.
TARGETS = {
    "raw": raw,
    "standardised": standardised,
    "standardised_channels": standardised_channels,
}


def target_statistics(
    patches: Float[Array, "b n f"], kind: str, channels: int
) -> tuple[Float32[Array, "b n f"], Float32[Array, "b n f"]]:
    """Mean and deviation of each patch; `channels` is fastest in f.

    A prediction p of a standardised target is drawn as p * deviation + mean, with the
    statistics of the true patch: the model is not asked for them.
    """
    if kind not in TARGETS:
        raise ConfigError(
            f"objective.target is {kind!r}: choose one of {', '.join(TARGETS)}."
        )
    return TARGETS[kind](patches.astype(jnp.float32), channels)


def target(
    patches: Float[Array, "b n f"], kind: str, channels: int
) -> Float32[Array, "b n f"]:
    """What the decoder is to predict, from the true patches."""
    mean, deviation = target_statistics(patches, kind, channels)
    return (patches.astype(jnp.float32) - mean) / deviation


def masked_mse(
    prediction: Float[Array, "b m f"],
    target: Float[Array, "b m f"],
    present: Bool[Array, " b"] | None = None,
) -> Float32[Array, ""]:
    """Mean squared error of the tokens in the loss, as Scenic divides it.

    The sum over f, divided by the number of tokens plus 1e-8, divided by f. Clips that
    are not `present` are out of both sums; when none is present the loss is 0.
    """
    batch, tokens, features = prediction.shape
    error = prediction.astype(jnp.float32) - target.astype(jnp.float32)
    count = batch * tokens
    if present is not None:
        # Before squaring: what an absent clip holds must not reach the gradient.
        error = jnp.where(present[:, None, None], error, 0.0)
        count = tokens * present.sum()
    return jnp.sum(error**2) / (count + 1e-8) / features


def softmax_cross_entropy(
    logits: Float[Array, "b k"],
    labels: Int[Array, " b"] | Float[Array, "b k"],
    smoothing: float = 0.0,
    valid: Bool[Array, " b"] | None = None,
) -> Float32[Array, ""]:
    """Mean over valid clips. Labels are class numbers, or probabilities of classes."""
    if labels.ndim == 1:
        labels = jax.nn.one_hot(labels, logits.shape[1])
    wanted = smooth(labels, smoothing)
    losses = -jnp.sum(wanted * jax.nn.log_softmax(logits.astype(jnp.float32)), axis=1)
    return mean(losses, valid)


def sigmoid_cross_entropy(
    logits: Float[Array, "b k"],
    labels: Float[Array, "b k"],
    smoothing: float = 0.0,
    valid: Bool[Array, " b"] | None = None,
) -> Float32[Array, ""]:
    """Sum over the classes, mean over valid clips. Labels are 0 or 1, or between."""
    wanted = smooth(labels, smoothing)
    logits = logits.astype(jnp.float32)
    yes, no = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
    return mean(-jnp.sum(wanted * yes + (1 - wanted) * no, axis=1), valid)


def smooth(labels: Float[Array, "b k"], smoothing: float) -> Float[Array, "b k"]:
    """Scenic's label smoothing, the same for both cross-entropies."""
    return labels * (1 - smoothing) + smoothing / labels.shape[1]


def mean(
    losses: Float32[Array, " b"], valid: Bool[Array, " b"] | None
) -> Float32[Array, ""]:
    """Mean over the valid rows, 0 when there is none."""
    if valid is None:
        return jnp.mean(losses)
    return jnp.sum(jnp.where(valid, losses, 0.0)) / jnp.maximum(valid.sum(), 1)
