"""How many multiply-adds a clip costs, counted from the config alone.

The useful work of the products of matrices: embedding, attention (with QKᵀ and the sum
over values), MLPs, decoder, predictions and heads. In pretraining the encoder sees the
kept tokens only. Not counted: norms, softmax, GELU, residual sums, biases, positions,
the log-mel front end, padding, and whatever is computed twice to save memory. A
multiply-add is two FLOPs.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from av_mae import choose, fusion, inputs, losses, maskenhancer, masking, peaks
from av_mae.autoencoder import DECODERS, objective_of
from av_mae.transformer import size_of

Counts = dict[str, int]
Tokens = Mapping[str, int]


def multiply_adds(config, classes=None, train: bool = False) -> Counts:
    """Multiply-adds of one forward pass of one clip's view, by part of the model.

    classes: as `classifier.build` takes them; None: `config.model.classes`. In training
    (`train`) a part of the masked tokens may be decoded alone, and a model may have its
    bottlenecks in training alone. Raises ConfigError where no model can be built from
    the config.
    """
    if config.trainer == "pretrain":
        return _pretraining(config, train)
    classes = config.model.classes if classes is None else classes
    return _finetuning(config, classes, train)


def training(config, classes=None) -> int:
    """FLOPs of one training step on one view: forward, and backward.

    Backward is two products for each of the forward pass, to the input and to the
    kernel, in the parts that learn; nobody asks for the gradient of what goes into the
    first of them.
    """
    counts = multiply_adds(config, classes, train=True)
    total = sum(counts.values())
    if config.trainer == "pretrain" or config.probe == "full":
        return 2 * (3 * total - counts["embed"])
    learns = sum(counts.get(part, 0) for part in ("meet", "attentive", "head"))
    first = counts["head"]  # a linear probe's only product
    if "meet" in counts or "attentive" in counts or config.model.head_norm:
        first = 0
    return 2 * (total + 2 * learns - first)


def passes(config, train: bool = True) -> int:
    """How often a clip goes through the model: views or samples, times masks."""
    data = config.data
    if config.trainer == "pretrain":
        again = config.objective.masks_per_clip if train else 1
        return data.samples_per_clip * again
    return data.samples_per_clip if train else data.views * data.crops


def per_clip(config, train: bool = True, classes=None) -> int:
    """FLOPs of a clip in one training step, or in the evaluation of it."""
    if train:
        return passes(config) * training(config, classes)
    return passes(config, False) * 2 * sum(multiply_adds(config, classes).values())


def utilisation(
    config, clips_per_second: float, devices: int, classes=None
) -> dict[str, float]:
    """{"mfu": share of the devices' peak that training uses}; {} on a device without.

    By the count and the peaks of `python -m av_mae.benchmark step`; devices: how many
    the run uses.
    """
    name = peaks.name_of(jax.devices()[0].device_kind)
    if not name:
        return {}
    peak = peaks.flops(peaks.named(name), config.compute.dtype) * devices
    return {"mfu": per_clip(config, classes=classes) * clips_per_second / peak}


# One layer, and stacks of them.


def layer(queries: int, keys: int, width: int, mlp: int) -> int:
    """A block in which `queries` tokens attend to `keys` tokens; equal in most."""
    projections = 2 * (queries + keys) * width**2  # query and out, key and value
    attention = 2 * queries * keys * width
    return projections + attention + 2 * queries * width * mlp


@dataclasses.dataclass(frozen=True)
class Stack:
    """Layers of one size: width d, depth and MLP width."""

    width: int
    depth: int
    mlp: int

    def alone(self, n: int, depth: int | None = None) -> int:
        """n tokens that attend to each other, in all layers or in `depth` of them."""
        one = layer(n, n, self.width, self.mlp)
        return (self.depth if depth is None else depth) * one


def _early(stack: Stack, tokens: Tokens, train: bool) -> int:
    return stack.alone(sum(tokens.values()))


def _separate(stack: Stack, tokens: Tokens, train: bool) -> int:
    return sum(stack.alone(n) for n in tokens.values())


def _mid(stack: Stack, tokens: Tokens, train: bool, *, fusion_layers: int) -> int:
    first = stack.depth - fusion_layers
    apart = sum(stack.alone(n, first) for n in tokens.values())
    return apart + stack.alone(sum(tokens.values()), fusion_layers)


def _bottleneck(
    stack: Stack,
    tokens: Tokens,
    train: bool,
    *,
    fusion_layer: int,
    bottlenecks: int,
    bottlenecks_at_test: bool,
    share_encoder: bool,
) -> int:
    meet = len(tokens) > 1 and (train or bottlenecks_at_test)
    first = fusion_layer if meet else stack.depth
    return sum(
        stack.alone(n, first) + stack.alone(n + bottlenecks, stack.depth - first)
        for n in tokens.values()
    )


def _cross(
    stack: Stack,
    tokens: Tokens,
    train: bool,
    *,
    fusion_layer: int,
    share_encoder: bool,
) -> int:
    """The keys and values of all tokens, in the layers of each modality."""
    apart = sum(stack.alone(n, fusion_layer) for n in tokens.values())
    n, late = sum(tokens.values()), stack.depth - fusion_layer
    if share_encoder:
        return apart + stack.alone(n, late)
    one = [layer(m, n, stack.width, stack.mlp) for m in tokens.values()]
    return apart + late * sum(one)


# The strategies of `fusion.FUSIONS`.
FUSIONS: dict[str, Callable[..., int]] = {
    "early": _early,
    "shared": _separate,
    "separate": _separate,
    "mid": _mid,
    "bottleneck": _bottleneck,
    "cross": _cross,
}


def _encoder(config, tokens: Tokens, train: bool) -> int:
    model, size = config.model, size_of(config.model)
    stack = Stack(size.width, size.depth, size.mlp)
    if model.fusion in maskenhancer.FUSIONS:  # its encoder is that of the video alone
        return _separate(stack, tokens, train)
    choose("model.fusion", model.fusion, FUSIONS)
    settings = fusion.settings_of(model, size.depth)
    return FUSIONS[model.fusion](stack, tokens, train, **settings)


# Models.


def _seen(config) -> dict[str, inputs.Layout]:
    """Layouts of the modalities whose patches become tokens of the encoder."""
    heard = maskenhancer.HEARD if config.model.fusion in maskenhancer.FUSIONS else ()
    return {m: x for m, x in inputs.layouts(config).items() if m not in heard}


def _masks(config, seen: Mapping[str, inputs.Layout], train: bool):
    """Shapes of the masks of one clip; in training those of the decoded tokens."""
    masks, decode = {}, config.objective.decode
    for m, cut in seen.items():
        hidden = masking.count(config.mask[m].kind, cut.grid, config.mask[m].ratio)
        index = lambda n: jax.ShapeDtypeStruct((1, n), jnp.int32)
        masks[m] = masking.Mask(index(cut.n - hidden), index(hidden))
        if train and decode.share < 1:
            rule = dict(grid=cut.grid, kind=decode.kind, share=decode.share)
            part = functools.partial(masking.part, jax.random.key(0), **rule)
            masks[m] = jax.eval_shape(part, masks[m])
    return masks


def _pretraining(config, train: bool) -> Counts:
    seen, decoder = _seen(config), config.model.decoder
    masks, objective = _masks(config, seen, train), objective_of(config)
    width, cls = size_of(config.model).width, int(config.model.cls_token)
    values = lambda m: losses.target_size(
        config.objective.target[m], seen[m].f, seen[m].frames
    )
    sequences = jax.eval_shape(
        lambda x: {m: (s.kept, s.masked) for m, s in objective.sequences(x).items()},
        masks,
    )
    predicted = jax.eval_shape(objective.predicted, masks)
    kept = {m: mask.kept.shape[1] for m, mask in masks.items()}
    encoded = {m: k + cls for m, k in kept.items()}
    lengths = {m: [x.shape[1] for x in parts] for m, parts in sequences.items()}
    decoded = {m: sum(parts) + cls for m, parts in lengths.items()}
    counts = {
        "embed": sum(k * seen[m].f * width for m, k in kept.items()),
        "encoder": _encoder(config, encoded, train=True),
        "decoder_embed": sum(encoded.values()) * width * decoder.width,
        "decoder": _decoder(decoder, decoded, {m: x[1] for m, x in lengths.items()}),
        "predict": sum(
            x.shape[1] * decoder.width * values(m) for m, x in predicted.items()
        ),
    }
    if config.model.fusion in maskenhancer.FUSIONS:
        counts |= _sound(config)
        counts["meet"] = _meet(config, sum(decoded.values()), decoder.width)
    return counts


def _decoder(decoder, tokens: Tokens, masked: Tokens) -> int:
    """Of sequences with this many tokens, so many of them mask tokens."""
    stack = Stack(decoder.width, decoder.depth, decoder.mlp)
    if decoder.kind != "cross":
        return FUSIONS[DECODERS[decoder.kind]](stack, tokens, True)
    one = [layer(q, tokens[m] - q, stack.width, stack.mlp) for m, q in masked.items()]
    return stack.depth * sum(one)


def _finetuning(config, classes, train: bool) -> Counts:
    model, seen = config.model, _seen(config)
    width, cls = size_of(model).width, int(model.cls_token)
    outputs = sum(classes.values()) if isinstance(classes, Mapping) else classes
    head = width * outputs
    if model.representation:
        head = model.representation * (width + outputs)
    tokens = {m: cut.n + cls for m, cut in seen.items()}
    channels = {"rgb": 1, "spectrogram": model.sound_channels}
    embed = sum(cut.n * cut.f * channels[m] * width for m, cut in seen.items())
    counts = {
        "embed": embed,
        "encoder": _encoder(config, tokens, train),
        "head": len(seen) * head,
    }
    if config.probe == "attentive":  # one query over all tokens, one vector
        n, mlp = sum(tokens.values()), size_of(model).mlp
        counts |= {"attentive": layer(1, n, width, mlp), "head": head}
    if model.fusion in maskenhancer.FUSIONS:
        counts |= _sound(config)
        flat = _sound_size(config)[1] * model.sound.filters[-1]
        counts["meet"] = flat * width + 2 * width**2
    return counts


# The sound of AV-MaskEnhancer.


def _sound(config) -> Counts:
    """Its convolutions, and squeeze and excitation."""
    sound = config.model.sound
    before = sound.filters[0]
    size = _strided(_heard(config), maskenhancer.STEM_STRIDE)
    total = math.prod(size) * 7 * 7 * before
    stages = zip(sound.filters, sound.blocks, maskenhancer.STRIDES, strict=True)
    for features, blocks, stride in stages:
        for j in range(blocks):
            step = (1, 1) if j else stride
            size = _strided(size, step)
            shortcut = before if step != (1, 1) or before != features else 0
            inputs_of = 9 * (before + features) + shortcut
            total += math.prod(size) * inputs_of * features
            total += 2 * features * (features // maskenhancer.REDUCTION)
            before = features
    return {"sound": total}


def _heard(config) -> tuple[int, int]:
    """Rows and coefficients of a clip's sound."""
    cut = inputs.layouts(config)["spectrogram"]
    return cut.n, cut.f


def _strided(size: tuple[int, int], stride: tuple[int, int]) -> tuple[int, int]:
    """What a convolution that is padded to keep the size leaves at this stride."""
    t, f = (-(-n // step) for n, step in zip(size, stride, strict=True))
    return t, f


def _sound_size(config) -> tuple[int, int]:
    """The size that the last stage leaves: times, and vectors of a clip."""
    size = _strided(_heard(config), maskenhancer.STEM_STRIDE)
    return functools.reduce(_strided, maskenhancer.STRIDES, size)


def _meet(config, n: int, width: int) -> int:
    """Where the sound meets the decoder's n tokens."""
    embed = _sound_size(config)[1] * config.model.sound.filters[-1] * width
    join = n * 2 * width**2
    if config.model.fusion == "concat":
        return embed + join
    apart = 2 * layer(n, n, width, 4 * width)
    return embed + join + apart + layer(n, n, 2 * width, 8 * width)
