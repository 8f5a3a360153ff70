"""How modalities meet: one table of functions, each from tokens to encoded tokens.

Names are the paper's (Audiovisual MAE §3.2 and MBT): `early` joins from the first
layer, `shared` sends each modality through the same layers, `separate` never joins,
`mid` joins in the last `fusion_layers` layers, `bottleneck` lets the modalities meet
only in a few extra tokens, `cross` lets each attend to the other in layers of its own
(Nagrani et al. 2021, §3.2). The same functions make encoders and decoders, for
pretraining and for finetuning.

`present[m]` [b] says which clips have modality m; None means that all do, and then no
mask exists in the program. Tokens of a missing modality are never attended to.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from av_mae import ConfigError, choose, depth
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


def _own_stacks(coder: "Fusion", tokens: Tokens, share_encoder: bool):
    """({modality: its stack's name}, {name: stack}), without final norms."""
    names = {m: "shared" if share_encoder else m for m in tokens}
    return names, {
        name: coder.stack(name, norm=False) for name in dict.fromkeys(names.values())
    }


def _one_norm(coder: "Fusion", tokens: Tokens) -> dict[str, Array]:
    """One final norm that serves all modalities (Scenic's MBT)."""
    norm = coder.final_norm("norm")
    return {m: norm(x) for m, x in tokens.items()}


def bottleneck(
    coder: "Fusion",
    tokens: Tokens,
    present: Present,
    train: bool,
    *,
    fusion_layer: int,
    bottlenecks: int,
    bottlenecks_at_test: bool = True,
    share_encoder: bool = False,
):
    """Separate stacks that, from `fusion_layer` on, exchange `bottlenecks` tokens.

    Each modality updates its own copy of the bottleneck tokens; after every layer the
    copies are averaged over the modalities that the clip has. Without
    `bottlenecks_at_test` nothing is exchanged except in training. `share_encoder` sends
    all modalities through the same layers. One final norm serves all modalities.
    """
    names, stacks = _own_stacks(coder, tokens, share_encoder)
    b, _, d = next(iter(tokens.values())).shape
    init = nn.initializers.normal(0.02)
    meet = len(tokens) > 1
    if meet:
        start = coder.param("bottleneck", init, (1, bottlenecks, d), jnp.float32)
        shared_tokens = jnp.broadcast_to(start, (b, bottlenecks, d))
        meet = train or bottlenecks_at_test
    fusion_layer = fusion_layer if meet else coder.depth
    tokens = _alone(stacks, names, range(fusion_layer), tokens, train)
    if not meet:
        return _one_norm(coder, tokens)

    def exchange(calls, carry):
        tokens, shared_tokens = carry
        joined = {
            m: calls[names[m]](jnp.concatenate([x, shared_tokens], axis=1))
            for m, x in tokens.items()
        }
        tokens = {m: x[:, :-bottlenecks] for m, x in joined.items()}
        copies = {m: x[:, -bottlenecks:] for m, x in joined.items()}
        return tokens, mean_over_present(copies, present).astype(shared_tokens.dtype)

    dtype = next(iter(tokens.values())).dtype
    carry = (tokens, shared_tokens.astype(dtype))
    late = range(fusion_layer, coder.depth)
    tokens, _ = depth.through(stacks, late, exchange, carry, train)
    return _one_norm(coder, tokens)


def _alone(stacks, names, layers: range, tokens: Tokens, train: bool):
    """Each modality through some layers of its own stack."""
    layer = lambda calls, tokens: {m: calls[names[m]](x) for m, x in tokens.items()}
    return depth.through(stacks, layers, layer, dict(tokens), train)


def cross(
    coder: "Fusion",
    tokens: Tokens,
    present: Present,
    train: bool,
    *,
    fusion_layer: int,
    share_encoder: bool = False,
):
    """MBT without bottlenecks: from `fusion_layer` on, attention sees all modalities.

    Each modality's tokens are updated by its own layers, whose keys and values are the
    tokens of all; with `share_encoder` the layers are the same, so that this is one
    stack over the joint sequence. One final norm serves all modalities.
    """
    names, stacks = _own_stacks(coder, tokens, share_encoder)
    tokens = _alone(stacks, names, range(fusion_layer), tokens, train)

    def layer(calls, tokens):
        x, exist = _join(tokens, present)
        joint = {name: call(x, exist) for name, call in calls.items()}
        return {m: _part(joint[names[m]], tokens)[m] for m in tokens}

    late = range(fusion_layer, coder.depth)
    tokens = depth.through(stacks, late, layer, dict(tokens), train)
    return _one_norm(coder, tokens)


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
    "cross": cross,
}


class Fusion(nn.Module):
    """An encoder or decoder of several modalities by the strategy `kind`.

    `settings` are the options that this strategy alone has; `norm` says whether there
    are LayerNorms after the last blocks. Sub-modules are named after what passes
    through them: rgb, spectrogram, shared or joint.
    """

    kind: str
    depth: int
    options: BlockOptions
    drop_path: float = 0.0
    settings: Mapping[str, Any] | None = None
    norm: bool = True

    def stack(self, name: str, layers: slice = slice(None), norm: bool = True) -> Stack:
        """The stack `name` for `layers` of the whole depth."""
        rates = drop_path_rates(self.drop_path, self.depth)[layers]
        return Stack(self.options, rates, norm and self.norm, name=name)

    def final_norm(self, name: str) -> Callable[[Array], Array]:
        """A LayerNorm outside of the stacks; nothing for an encoder without norms."""
        if not self.norm:
            return lambda x: x
        return nn.LayerNorm(self.options.eps, dtype=self.options.dtype, name=name)

    @nn.compact
    def __call__(self, tokens: Tokens, present: Present = None, train: bool = False):
        return FUSIONS[self.kind](self, tokens, present, train, **(self.settings or {}))


# The options of `config.model` that belong to one strategy alone.
SETTINGS = {
    "mid": ("fusion_layers",),
    "bottleneck": (
        *("fusion_layer", "bottlenecks", "bottlenecks_at_test"),
        "share_encoder",
    ),
    "cross": ("fusion_layer", "share_encoder"),
}


def settings_of(model, depth: int) -> dict[str, Any]:
    """The options of `config.model` for its strategy.

    A finetuning config counts where the modalities meet from the first layer
    (`fusion_layer`), a pretraining config from the last (`fusion_layers`). Raises
    ConfigError where they would meet outside of the encoder.
    """
    if model.fusion == "mid" and "fusion_layers" not in model:
        return {"fusion_layers": depth - _checked(model.fusion_layer, depth)}
    names = SETTINGS.get(model.fusion, ())
    if "fusion_layer" in names:
        _checked(model.fusion_layer, depth)
    return {name: model[name] for name in names}


def _checked(fusion_layer: int, depth: int) -> int:
    if not 0 <= fusion_layer <= depth:
        raise ConfigError(
            f"model.fusion_layer is {fusion_layer}, but the encoder has {depth} "
            f"layers: set it from 0 (all joint) to {depth} (never joint)."
        )
    return fusion_layer


def build_encoder(model, size: Size, compute) -> Fusion:
    """The encoder that `config.model` describes; ConfigError for an unknown name.

    compute is `config.compute`.
    """
    choose("model.fusion", model.fusion, FUSIONS)
    return Fusion(
        kind=model.fusion,
        depth=size.depth,
        options=block_options(model, size.heads, size.mlp, compute),
        drop_path=model.drop_path,
        settings=settings_of(model, size.depth),
        norm=model.norm,
    )
