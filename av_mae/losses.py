"""What training minimises: reconstruction of masked patches, and cross-entropies."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from jaxtyping import Array, Bool, Float, Float32, Int

from av_mae import choose

# Scenic's `jax.nn.standardize`: population variance, and this added to it.
STANDARDISE_EPSILON = 1e-6
# VideoMAE: unbiased variance, and this added to the deviation.
UNBIASED_EPSILON = 1e-6
# Of the luma of ITU-R BT.601, with as many digits as Scenic has.
GREY = (0.2989, 0.587, 0.114)

Values = Float32[Array, "b n g"]


# Which values of a patch [b n f] are to be predicted.


def whole(patches: Float32[Array, "b n f"], channels: int, frames: int) -> Values:
    """All of them."""
    return patches


def central_frame(
    patches: Float32[Array, "b n f"], channels: int, frames: int
) -> Values:
    """Frame number frames // 2 of a tube."""
    size = patches.shape[-1] // frames
    first = frames // 2 * size
    return patches[..., first : first + size]


def grey(patches: Float32[Array, "b n f"], channels: int, frames: int) -> Values:
    """The brightness of each pixel, in all three channels."""
    pixels = rearrange(patches, "b n (p c) -> b n p c", c=channels)
    weighted = (pixels * jnp.array(GREY)).sum(axis=-1)
    return repeat(weighted, "b n p -> b n (p c)", c=channels)


# The mean and the deviation that are taken away, [b n g] both.


def unchanged(values: Values, channels: int):
    """No statistics."""
    return jnp.zeros_like(values), jnp.ones_like(values)


def by_patch(values: Values, channels: int):
    """One mean and deviation per patch."""
    return by_channel(values, 1)


def by_channel(values: Values, channels: int):
    """One mean and deviation per patch and channel."""
    pixels = rearrange(values, "b n (p c) -> b n p c", c=channels)
    deviation = jnp.sqrt(jnp.var(pixels, axis=2) + STANDARDISE_EPSILON)
    return _fill(jnp.mean(pixels, axis=2), deviation, pixels.shape[2])


def by_channel_unbiased(values: Values, channels: int):
    """The same as VideoMAE has it."""
    pixels = rearrange(values, "b n (p c) -> b n p c", c=channels)
    deviation = jnp.std(pixels, axis=2, ddof=1) + UNBIASED_EPSILON
    return _fill(jnp.mean(pixels, axis=2), deviation, pixels.shape[2])


def _fill(mean: Array, deviation: Array, p: int) -> tuple[Array, Array]:
    fill = lambda x: repeat(x, "b n c -> b n (p c)", p=p)
    return fill(mean), fill(deviation)


class Target(NamedTuple):
    """What is predicted: some values of a patch, standardised in some way.

    pixels: they are taken from the picture before `picture.mean` and `picture.std`
    were applied to it (VideoMAE undoes its normalisation).
    """

    values: Callable
    statistics: Callable
    pixels: bool = False


TARGETS = {
    "raw": Target(whole, unchanged),
    "standardised": Target(whole, by_patch),
    "standardised_channels": Target(whole, by_channel),
    "standardised_channels_unbiased": Target(whole, by_channel_unbiased, pixels=True),
    "pixels": Target(whole, unchanged, pixels=True),
    "central_frame": Target(central_frame, unchanged),
    "standardised_central_frame": Target(central_frame, by_patch),
    "grey": Target(grey, unchanged),
}
# Of these a spectrogram has one channel, no frames, and no pixels.
SOUND_TARGETS = ("raw", "standardised", "standardised_channels")


def target_size(kind: str, f: int, frames: int = 1) -> int:
    """How many of the f values of a patch are predicted."""
    values = choose("objective.target", kind, TARGETS).values
    return f // frames if values is central_frame else f


def target_statistics(
    patches: Float[Array, "b n f"], kind: str, channels: int, frames: int = 1
) -> tuple[Values, Values]:
    """Mean and deviation of what is predicted of each patch.

    `channels` are fastest in f, `frames` (of a tube) slowest. A prediction p of a
    standardised target is drawn as p * deviation + mean, with the statistics of the
    true patch: the model is not asked for them.
    """
    chosen = choose("objective.target", kind, TARGETS)
    return chosen.statistics(_values(patches, kind, channels, frames), channels)


def target(
    patches: Float[Array, "b n f"], kind: str, channels: int, frames: int = 1
) -> Values:
    """What the decoder is to predict, from the true patches.

    For a target of `pixels` the patches are those of the picture in [0, 1]. Raises
    ConfigError for an unknown name.
    """
    mean, deviation = target_statistics(patches, kind, channels, frames)
    return (_values(patches, kind, channels, frames) - mean) / deviation


def _values(patches: Array, kind: str, channels: int, frames: int) -> Values:
    take = choose("objective.target", kind, TARGETS).values
    return take(patches.astype(jnp.float32), channels, frames)


def to_patches(values: Float[Array, "b n g"], f: int) -> Float[Array, "b n f"]:
    """Predicted values as whole patches: a single frame is repeated over the tube."""
    return jnp.tile(values, f // values.shape[-1])


def l2(params) -> Float32[Array, ""]:
    """Half the sum of the squares of all parameters but vectors (Scenic's l2 decay)."""
    leaves = [x for x in jax.tree.leaves(params) if x.ndim > 1]
    return 0.5 * sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in leaves)


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
