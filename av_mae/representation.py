"""What the layers of an encoder hold: tokens of any layer, pooled; queries and keys.

Nothing of this is in the models: flax hands the outputs of blocks out when it is asked
to (`capture_intermediates`), and the normal path does not know of it. Where the tokens
of a modality are found depends on how the modalities meet; `place` says it.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from av_mae import ConfigError, choose, fusion, maskenhancer
from av_mae.transformer import Block, size_of

Tokens = Mapping[str, Float[Array, "b _n _d"]]


def encode(model: nn.Module, patches: Mapping[str, Array], present=None) -> Tokens:
    """Encoded tokens {m: [b n d]} of patches {m: [b n f]}, nothing masked.

    For `model.apply(…, method=encode)`, with a model of either trainer. What
    AV-MaskEnhancer hears are a few vectors of its convolutions.
    """
    if hasattr(model, "encode"):
        return model.encode(patches, present)
    if not isinstance(model, maskenhancer.Pretraining):
        return model.encoder(model.embed(patches), present)
    encoded = model.encoder(model.embed({"rgb": patches["rgb"]}), None)
    heard = maskenhancer.heard(present)
    return encoded | {"spectrogram": model.sound(patches["spectrogram"], heard)}


class Place(NamedTuple):
    """Where a layer's tokens of a modality are.

    stack, block: the block that they go through; call: its how manieth call that is;
    joint: whether it holds the tokens of all modalities side by side; bottlenecks: how
    many tokens that belong to no modality follow.
    """

    stack: str
    block: int
    call: int = 0
    joint: bool = False
    bottlenecks: int = 0


def known(config) -> tuple[str, ...]:
    """The modalities whose tokens go through the encoder's blocks."""
    if config.model.fusion in maskenhancer.FUSIONS:
        return ("rgb",)
    return tuple(config.modalities)


def place(config, m: str, i: int) -> Place:
    """Where the tokens of modality m are in layer i."""
    model, order = config.model, known(config).index(m)
    if model.fusion in maskenhancer.FUSIONS:
        return Place(m, i)
    depth = size_of(model).depth
    settings = fusion.settings_of(model, depth)
    if model.fusion == "mid":
        joint = i - (depth - settings["fusion_layers"])
        return Place(m, i) if joint < 0 else Place("joint", joint, joint=True)
    if model.fusion in ("early", "shared", "separate"):
        places = {
            "early": Place("joint", i, joint=True),
            "shared": Place("shared", i, order),
            "separate": Place(m, i),
        }
        return places[model.fusion]
    own = Place("shared", i, order) if settings["share_encoder"] else Place(m, i)
    if i < settings["fusion_layer"] or len(known(config)) == 1:
        if model.fusion == "cross" and i >= settings["fusion_layer"]:
            return own._replace(joint=True)
        return own
    if model.fusion == "cross":
        return own._replace(call=0, joint=True)
    meet = settings["bottlenecks_at_test"]
    return own._replace(bottlenecks=settings["bottlenecks"] if meet else 0)


def layer_number(config, layer: int) -> int:
    """A layer counted from the first (0) or the last (-1), as from the first."""
    depth = size_of(config.model).depth
    if not -depth <= layer < depth:
        raise ConfigError(
            f"layer is {layer}, but the encoder has {depth} layers: choose from 0 to "
            f"{depth - 1}, or from -1 (the last) to {-depth}."
        )
    return layer % depth


def tokens_of_layer(
    config, model: nn.Module, params, patches, present, layer: int
) -> Tokens:
    """Tokens {m: [b n d]} after block `layer`; after the last one, and its norm: -1."""
    number = layer_number(config, layer)
    last = number == size_of(config.model).depth - 1
    is_block = lambda module, method: isinstance(module, Block) and method == "__call__"
    encoded, captured = _captured(model, params, patches, present, is_block)
    if last:
        return encoded
    counts = {m: encoded[m].shape[1] for m in known(config)}
    result = {}
    for m in counts:
        where = place(config, m, number)
        calls = captured["encoder"][where.stack][f"block_{where.block}"]["__call__"]
        x, start = calls[where.call], 0
        if where.joint:
            start = sum(counts[other] for other in _before(counts, m))
        result[m] = x[:, start : start + counts[m]]
    return result


def queries_and_keys(config, model: nn.Module, params, patches, present):
    """(encoded {m: [b n d]}, {"stack/block": calls}) with calls [b n 3 heads e].

    What every attention of the encoder made of its input: queries, keys, values.
    """
    is_qkv = lambda module, method: module.name == "qkv" and method == "__call__"
    encoded, captured = _captured(model, params, patches, present, is_qkv)
    found = {
        f"{stack}/{block.removeprefix('block_')}": inside["attention"]["qkv"][
            "__call__"
        ]
        for stack, blocks in captured["encoder"].items()
        for block, inside in blocks.items()
    }
    return encoded, found


def _captured(model, params, patches, present, wanted: Callable) -> tuple[Tokens, Any]:
    encoded, found = model.apply(
        {"params": params},
        patches,
        present,
        method=encode,
        capture_intermediates=wanted,
        mutable=["intermediates"],
    )
    return encoded, found.get("intermediates", {})


def _before(counts: Mapping[str, int], m: str) -> list[str]:
    names = list(counts)
    return names[: names.index(m)]


# Pooling.

POOLS = ("none", "mean", "cls")


def pool(config, tokens: Tokens, kind: str) -> dict[str, Array]:
    """Tokens {m: [b n d]} as features, float32: a name of POOLS.

    mean: over all patches [b d] (a CLS token is left out); cls: the CLS token [b d];
    none: the patches' tokens [b n d]. Raises ConfigError where there is no CLS token.
    """
    choose("pool", kind, POOLS)
    has_cls = bool(config.model.cls_token)
    if kind == "cls" and not has_cls:
        raise ConfigError(
            "pool is 'cls', but the model has no CLS token (model.cls_token is False): "
            "choose 'mean'."
        )
    features = {}
    for m, x in tokens.items():
        x = x.astype(jnp.float32)
        if kind == "cls" and m in known(config):
            features[m] = x[:, 0]
            continue
        x = x[:, 1:] if has_cls and m in known(config) else x
        features[m] = x if kind == "none" else x.mean(axis=1)
    return features
