"""How modalities meet: one table of functions, each from tokens to encoded tokens.

Names are the paper's (Audiovisual MAE §3.2 and MBT): `early` joins from the first
layer, `shared` sends each modality through the same layers, `separate` never joins,
`mid` joins in the last `fusion_layers` layers, `bottleneck` lets the modalities meet
only in a few extra tokens (Nagrani et al. 2021). The same functions make encoders and
decoders, for pretraining and for finetuning.

`present[m]` [b] says which clips have modality m; None means that all do, and then no
mask exists in the program. Tokens of a missing modality are never attended to.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from av_mae import choose
from av_mae.transformer import (
    BlockOptions,
    Size,
    Stack,
    block_options,
    drop_path_rates,
)

Tokens = Mapping[str, Float[Array, "b _ d"]]
Present = Mapping[str, Bool[Array, " b"]] | None


def _join(tokens: Tokens, present: Present) -> tuple[Array, Array | None]:
    """All tokens in one sequence, and which of them exist [b n]."""
    x = jnp.concatenate(list(tokens.values()), axis=1)
    if present is None:
        return x, None
    exist = [
        jnp.broadcast_to(present[m][:, None], y.shape[:2]) for m, y in tokens.items()
    ]
    return x, jnp.concatenate(exist, axis=1)


def _part(x: Array, tokens: Tokens) -> dict[str, Array]:
    """The inverse of `_join` on the sequence."""
    parts, start = {}, 0
    for m, y in tokens.items():
        parts[m] = x[:, start : start + y.shape[1]]
        start += y.shape[1]
    return parts


def early(coder: "Fusion", tokens: Tokens, present: Present, train: bool):
    """One stack over the joint sequence."""
    x, exist = _join(tokens, present)
    return _part(coder.stack("joint")(x, exist, train), tokens)


def shared(coder: "Fusion", tokens: Tokens, present: Present, train: bool):
    """One stack, applied to each modality alone."""
    stack = coder.stack("shared")
    return {m: stack(x, None, train) for m, x in tokens.items()}


def separate(coder: "Fusion", tokens: Tokens, present: Present, train: bool):
    """A stack of its own for each modality."""
    return {m: coder.stack(m)(x, None, train) for m, x in tokens.items()}


def mid(
    coder: "Fusion",
    tokens: Tokens,
    present: Present,
    train: bool,
    *,
    fusion_layers: int,
):
    """Separate stacks, each with its norm, then `fusion_layers` joint layers."""
    first = coder.depth - fusion_layers
    tokens = {
        m: coder.stack(m, slice(0, first))(x, None, train) for m, x in tokens.items()
    }
    x, exist = _join(tokens, present)
    joint = coder.stack("joint", slice(first, coder.depth))
    return _part(joint(x, exist, train), tokens)


def bottleneck(
    coder: "Fusion",
    tokens: Tokens,
    present: Present,
    train: bool,
    *,
    fusion_layer: int,
    bottlenecks: int,
):
    """Separate stacks that, from `fusion_layer` on, exchange `bottlenecks` tokens.

    Each modality updates its own copy of the bottleneck tokens; after every layer the
    copies are averaged over the modalities that the clip has. One final norm serves all
    modalities (Scenic's MBT).
    """
    stacks = {m: coder.stack(m, norm=False) for m in tokens}
    b, _, d = next(iter(tokens.values())).shape
    init = nn.initializers.normal(0.02)
    meet = len(tokens) > 1
    if meet:
        start = coder.param("bottleneck", init, (1, bottlenecks, d), jnp.float32)
        shared_tokens = jnp.broadcast_to(start, (b, bottlenecks, d))
    for i in range(coder.depth):
        if not meet or i < fusion_layer:
            tokens = {m: stacks[m].layer(i, x, None, train) for m, x in tokens.items()}
            continue
        joined = {
            m: jnp.concatenate([x, shared_tokens.astype(x.dtype)], axis=1)
            for m, x in tokens.items()
        }
        joined = {m: stacks[m].layer(i, x, None, train) for m, x in joined.items()}
        tokens = {m: x[:, :-bottlenecks] for m, x in joined.items()}
        copies = {m: x[:, -bottlenecks:] for m, x in joined.items()}
        shared_tokens = mean_over_present(copies, present)
    norm = nn.LayerNorm(coder.options.eps, dtype=coder.options.dtype, name="norm")
    return {m: norm(x) for m, x in tokens.items()}


def mean_over_present(
    values: Mapping[str, Float[Array, "b ..."]], present: Present
) -> Float[Array, "b ..."]:
    """Mean over modalities, of those that each clip has."""
    if present is None:
        return sum(values.values()) / len(values)
    weights = {
        m: present[m].astype(x.dtype).reshape((-1,) + (1,) * (x.ndim - 1))
        for m, x in values.items()
    }
    total = sum(jnp.where(weights[m] > 0, x, 0) for m, x in values.items())
    return total / jnp.maximum(sum(weights.values()), 1)


FUSIONS = {
    "early": early,
    "shared": shared,
    "separate": separate,
    "mid": mid,
    "bottleneck": bottleneck,
}


class Fusion(nn.Module):
    """An encoder or decoder of several modalities by the strategy `kind`.

    `settings` are the options that this strategy alone has. Sub-modules are named after
    what passes through them: rgb, spectrogram, shared or joint.
    """

    kind: str
    depth: int
    options: BlockOptions
    drop_path: float = 0.0
    settings: Mapping[str, Any] | None = None

    def stack(self, name: str, layers: slice = slice(None), norm: bool = True) -> Stack:
        """The stack `name` for `layers` of the whole depth."""
        rates = drop_path_rates(self.drop_path, self.depth)[layers]
        return Stack(self.options, rates, norm, name=name)

    @nn.compact
    def __call__(self, tokens: Tokens, present: Present = None, train: bool = False):
        return FUSIONS[self.kind](self, tokens, present, train, **(self.settings or {}))


# The options of `config.model` that belong to one strategy alone.
SETTINGS = {"mid": ("fusion_layers",), "bottleneck": ("fusion_layer", "bottlenecks")}


def build_encoder(model, size: Size, dtype) -> Fusion:
    """The encoder that `config.model` describes; ConfigError for an unknown name."""
    choose("model.fusion", model.fusion, FUSIONS)
    return Fusion(
        kind=model.fusion,
        depth=size.depth,
        options=block_options(model, size.heads, size.mlp, dtype),
        drop_path=model.drop_path,
        settings={name: model[name] for name in SETTINGS.get(model.fusion, ())},
    )
