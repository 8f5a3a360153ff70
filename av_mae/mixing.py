"""Mixup, cutmix and mixing each modality by its own share, inside the jitted step.

A row is mixed with the row as far from the end as it is from the beginning (the batch
reversed), as Scenic and VideoMAE (timm) do. `draw` decides what is mixed, one choice
for the batch, and `apply` and `labels` do it, to inputs and to labels.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Shaped


class Mix(NamedTuple):
    """How one modality is mixed: for the whole batch, or for each row of it.

    share: what a row keeps of its own label, and of its own values where they are
    blended; box: (top, bottom, left, right) that comes from the other row where they
    are cut instead.
    """

    share: Float[Array, "*b"]
    cut: Bool[Array, "*b"]
    box: Int[Array, "*b 4"]


def is_wanted(augment) -> bool:
    """Whether `config.augment` mixes anything."""
    return augment.mix_probability > 0 and (augment.mixup > 0 or augment.cutmix > 0)


def draw(
    rng: PRNGKeyArray, augment, size: tuple[int, int], modalities: Sequence[str]
) -> dict[str, Mix]:
    """{modality: Mix} for a batch whose pictures have this (height, width).

    `augment` has mixup and cutmix, the α of Beta(α, α) that the share is drawn from
    (0: never); mix_probability of mixing at all; mix_switch, the probability of cutmix
    where both may be; mix_per_modality, whether each modality draws its own. Pictures
    alone are cut; sound is blended by the share of the area (timm's Mixup in mode
    "batch"; Scenic's mixup_modalities).
    """
    count = len(modalities) if augment.mix_per_modality else 1
    mixed, switch, share_key, box_key = jax.random.split(rng, 4)
    both = augment.mixup > 0 and augment.cutmix > 0
    switch_at = augment.mix_switch if both else float(augment.cutmix > 0)
    cut = jax.random.bernoulli(switch, switch_at, (count,))
    alpha = jnp.where(cut, augment.cutmix, augment.mixup)
    share = jax.random.beta(share_key, alpha, alpha)
    is_mixed = jax.random.bernoulli(mixed, augment.mix_probability, (count,))
    share = jnp.where(is_mixed, share, 1.0)
    found = {}
    for i, m in enumerate(modalities):
        i = i % count
        box = draw_box(jax.random.fold_in(box_key, i), share[i], size)
        top, bottom, left, right = box
        area = (bottom - top) * (right - left) / (size[0] * size[1])
        own = jnp.where(cut[i], 1.0 - area, share[i])
        found[m] = Mix(own, cut[i] & (m == "rgb"), box)
    return found


def draw_box(
    rng: PRNGKeyArray, share: Float[Array, ""], size: tuple[int, int]
) -> Int[Array, "4"]:
    """(top, bottom, left, right) of an area 1 − share, centred anywhere in the picture.

    What sticks out is cut off, so that the area may be smaller.
    """
    edges = []
    for key, side in zip(jax.random.split(rng), size, strict=True):
        half = (side * jnp.sqrt(1.0 - share)).astype(jnp.int32) // 2
        centre = jax.random.randint(key, (), 0, side)
        edges += [jnp.clip(centre - half, 0, side), jnp.clip(centre + half, 0, side)]
    return jnp.stack(edges)


def among(mix: Mix, present: Bool[Array, " b"] | None) -> Mix:
    """The same, except that a row keeps all of its own where the other has nothing."""
    if present is None:
        return mix
    other = present[::-1]
    return mix._replace(
        share=jnp.where(other, mix.share, 1.0), cut=jnp.logical_and(other, mix.cut)
    )


def apply(x: Float[Array, "b ..."], mix: Mix) -> Float[Array, "b ..."]:
    """The mixed inputs: [b t h w c] pictures, or anything that is never cut."""
    align = lambda values: values.reshape(values.shape + (1,) * (x.ndim - values.ndim))
    wide = lambda values: align(jnp.broadcast_to(values, x.shape[:1]))
    other, share = x[::-1], wide(mix.share)
    blended = share * x + (1 - share) * other
    if x.ndim != 5:
        return blended
    box = jnp.broadcast_to(mix.box, (len(x), 4))
    rows, columns = jnp.arange(x.shape[2]), jnp.arange(x.shape[3])
    inside = lambda i, low, high: (i >= low[:, None]) & (i < high[:, None])
    box_rows = inside(rows, box[:, 0], box[:, 1])[:, None, :, None, None]
    box_columns = inside(columns, box[:, 2], box[:, 3])[:, None, None, :, None]
    pasted = jnp.where(box_rows & box_columns, other, x)
    return jnp.where(wide(mix.cut), pasted, blended)


def labels(values: Shaped[Array, "b ..."], mix: Mix, classes: int):
    """The mixed labels [b classes], of class numbers [b] or probabilities [b k]."""
    if values.ndim == 1:
        values = jax.nn.one_hot(values, classes)
    share = jnp.broadcast_to(mix.share, values.shape[:1])[:, None]
    return share * values + (1 - share) * values[::-1]
