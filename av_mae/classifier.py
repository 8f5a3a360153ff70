"""The finetuning model: patches → encoder → pool → head, logits of each modality.

As MBT in Scenic's AV-MAE finetuning: each modality is pooled apart, one linear head
serves them all, the training loss is the mean of the modalities' own losses, and at
test the logits are averaged over the modalities that the clip has. VideoMAE puts a
LayerNorm between pool and head. Clips with labels of several kinds (verb and noun) have
a linear head for each, on the same features. An attentive probe (av_mae/probe.py) pools
the tokens of all modalities together, and so has one row of logits, `joint`.

Parameters: embed/<m>, encoder/<stack>/block_<i>, attentive, head_norm, representation,
head or head_<name>.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from av_mae import choose
from av_mae.autoencoder import Embeddings, Patches, build_embeddings
from av_mae.fusion import (
    Fusion,
    Present,
    Tokens,
    build_encoder,
    mean_over_present,
    settings_of,
)
from av_mae.probe import TRAINED, AttentivePool
from av_mae.transformer import block_options, size_of

# One head's number of classes, or those of several heads by name.
Classes = int | Mapping[str, int]
# A head's logits, or those of several heads by name.
Logits = Float[Array, "b _k"] | Mapping[str, Float[Array, "b _k"]]


def highest(x: Float[Array, "b n d"]) -> Float[Array, "b d"]:
    """The maximum over the tokens, with the gradient to the first token that has it.

    The gradient of jnp.max looks for x == max(x) and divides by how many there are.
    XLA may compute x twice, and round it differently: then there are none, and NaN.
    """
    index = jnp.argmax(x, axis=1, keepdims=True)  # b 1 d
    return jnp.take_along_axis(x, index, axis=1)[:, 0]


# The features, and the logits, of all modalities together.
JOINT = "joint"

# `token` is the CLS token where the model has one (`model.cls_token`), else the first
# patch's (VideoMAE without mean pooling). Scenic calls these gap, gmp, gsp and token.
POOLS = {
    "mean": lambda x: jnp.mean(x, axis=1),
    "max": highest,
    "sum": lambda x: jnp.sum(x, axis=1),
    "token": lambda x: x[:, 0],
}


@dataclasses.dataclass(frozen=True)
class HeadOptions:
    """What lies between the pooled features and the logits, in this order.

    norm: a LayerNorm with epsilon `eps` (VideoMAE's fc_norm); representation: width of
    a dense layer with tanh (Scenic's pre_logits), 0 for none; dropout: its rate in
    training; init: scale of the head's first kernel, itself of deviation .02 cut off at
    twice that (VideoMAE), 0 for a head that begins at zero (Scenic).
    """

    norm: bool = False
    eps: float = 1e-6
    representation: int = 0
    dropout: float = 0.0
    init: float = 0.0


class Classifier(nn.Module):
    """patches {m: [b n f]} → logits {m: [b k]} in float32.

    `heads` are pairs (name, classes). The name '' is a head alone, whose logits are an
    array; the logits of several are dicts by name. A model that is only probed
    (`frozen`) encodes in training as it does at test; `attentive` pools its tokens
    together instead of `pool`.
    """

    heads: tuple[tuple[str, int], ...]
    pool: str
    frozen: bool
    attentive: AttentivePool | None
    options: HeadOptions
    embed: Embeddings
    encoder: Fusion

    def setup(self):
        options = self.options
        if options.norm:
            self.head_norm = nn.LayerNorm(options.eps)
        if options.representation:
            self.representation = nn.Dense(options.representation)
        self.dropout = nn.Dropout(options.dropout)
        for name, classes in self.heads:
            init = _head_init(options.init)
            setattr(self, _head_name(name), nn.Dense(classes, kernel_init=init))

    def __call__(
        self, patches: Patches, present: Present = None, train: bool = False
    ) -> dict[str, Logits]:
        encoded = self.encode(patches, present, train and not self.frozen)
        return self.classify(self.features(encoded, present), train)

    def encode(
        self, patches: Patches, present: Present = None, train: bool = False
    ) -> dict[str, Float[Array, "b _n d"]]:
        """The encoder's tokens of each modality, CLS token first where there is one."""
        return self.encoder(self.embed(patches), present, train)

    def features(
        self, encoded: Tokens, present: Present = None
    ) -> dict[str, Float[Array, "b _d"]]:
        """What the heads see of each modality: pooled, normalised, float32."""
        if self.attentive:
            pooled = {JOINT: self.attentive(encoded, present)}
        else:
            pooled = {m: POOLS[self.pool](x) for m, x in encoded.items()}
        features = {}
        for m, x in pooled.items():
            x = x.astype(jnp.float32)
            if self.options.norm:
                x = self.head_norm(x)
            if self.options.representation:
                x = jnp.tanh(self.representation(x))
            features[m] = x
        return features

    def classify(
        self, features: Mapping[str, Float[Array, "b _d"]], train: bool = False
    ) -> dict[str, Logits]:
        """The logits of each modality, by the same heads."""
        logits = {}
        for m, x in features.items():
            x = self.dropout(x, deterministic=not train)
            each = {name: getattr(self, _head_name(name))(x) for name, _ in self.heads}
            logits[m] = each.get("", each)
        return logits


def _head_name(name: str) -> str:
    return f"head_{name}" if name else "head"


def _head_init(scale: float):
    if scale == 0.0:
        return nn.initializers.zeros
    return nn.initializers.truncated_normal(0.02 * scale)


def combine(logits: Mapping[str, Logits], present: Present = None) -> Logits:
    """Logits of a clip: the mean over the modalities that it has."""
    if present is not None:
        present = {m: having(present, m) for m in logits}
    mean = lambda *each: mean_over_present(
        dict(zip(logits, each, strict=True)), present
    )
    return jax.tree.map(mean, *logits.values())


def having(present: Present, m: str) -> Bool[Array, " b"] | None:
    """Which clips have what the logits `m` come from; None where all do."""
    if present is None:
        return None
    return jnp.stack(list(present.values())).any(axis=0) if m == JOINT else present[m]


def heads_of(classes: Classes) -> tuple[tuple[str, int], ...]:
    """The heads as pairs (name, classes); a single one has the name ''."""
    if isinstance(classes, Mapping):
        return tuple(classes.items())
    return (("", classes),)


def build(config, classes: Classes) -> Classifier:
    """The model that `config.model` describes, for this many classes.

    classes: a number, or {head: number} where clips have labels of several kinds.
    """
    model = config.model
    size = size_of(model)
    choose("model.pool", model.pool, POOLS)
    choose("probe", config.probe, TRAINED)
    attentive = None
    if config.probe == "attentive":
        options = block_options(model, size.heads, size.mlp, config.compute)
        attentive = AttentivePool(options)
    return Classifier(
        heads=heads_of(classes),
        pool=model.pool,
        frozen=config.probe != "full",
        attentive=attentive,
        options=HeadOptions(
            norm=model.head_norm,
            eps=model.head_eps,
            representation=model.representation,
            dropout=model.head_dropout,
            init=model.head_init,
        ),
        embed=build_embeddings(config, model.sound_channels),
        encoder=build_encoder(model, size, config.compute),
    )


# Starting from a pretrained (or finetuned) model.

# Parameters that a source need not have, and those of it that need not be used.
ALWAYS_FRESH = (
    *(r"head(_\w+)?/.*", "representation/.*", "attentive/.*", "encoder/bottleneck"),
)
NEVER_USED = (*ALWAYS_FRESH, "decoder/.*", "decoder_embed/.*", "predict/.*")
FINAL_NORMS = r"encoder/(\w+/)?norm/.*"


def _is(model, name: str, default: bool = False) -> bool:
    """A yes-or-no field of a source's `model`, which an older release may lack."""
    return model[name] if name in model else default


def _place(model, m: str, i: int) -> str:
    """Where layer i of modality m lies in the encoder of `config.model`."""
    if model.fusion == "mid":
        depth = size_of(model).depth
        joint = i - (depth - settings_of(model, depth)["fusion_layers"])
        return f"encoder/{m}/block_{i}" if joint < 0 else f"encoder/joint/block_{joint}"
    stack = {"early": "joint", "shared": "shared"}.get(model.fusion, m)
    return f"encoder/{'shared' if _is(model, 'share_encoder') else stack}/block_{i}"


def _norm_place(model, m: str) -> str:
    """Where the last norm lies that modality m goes through."""
    stacks = {"early": "joint/", "mid": "joint/", "shared": "shared/"}
    stacks["separate"] = f"{m}/"
    return f"encoder/{stacks.get(model.fusion, '')}norm"


def _norm_is_kept(theirs, ours) -> bool:
    """Scenic's rule: norms of separate encoders do not become that of a joint one."""
    return theirs.fusion != "separate" or ours.fusion == "separate"


def sources(theirs, config) -> tuple[tuple[str, str], ...]:
    """Where a finetuning parameter comes from: (regex of ours, name in the source).

    `theirs` and `config` are two whole configs. A layer of a modality comes from the
    layer that the modality goes through at the same depth in the source, so that the
    joint layers of a `mid` encoder become the last layers of every modality's stack,
    and a `shared` or `early` encoder is copied to every stack; layers that several
    modalities share come from the first of them that the source has. These are Scenic's
    rules where it has one.
    """
    pairs = {}
    known = [m for m in config.modalities if m in theirs.modalities]
    for m in known:
        for i in range(size_of(config.model).depth):
            ours = _place(config.model, m, i)
            pairs.setdefault(ours, _place(theirs.model, m, i))
        if _norm_is_kept(theirs.model, config.model):
            ours = _norm_place(config.model, m)
            pairs.setdefault(ours, _norm_place(theirs.model, m))
    return tuple(
        (f"{ours}/(.*)", rf"{source}/\1")
        for ours, source in pairs.items()
        if ours != source
    )


def expected_gaps(theirs, config) -> tuple[list[str], list[str]]:
    """Regexes of parameters that may stay fresh, of sources that may stay unused."""
    fresh, unused = list(ALWAYS_FRESH), list(NEVER_USED)
    ours = config.model
    if ours.fusion != theirs.model.fusion:
        unused.append(r"encoder/(rgb|spectrogram)/norm/.*")
        fresh.append(r"encoder/(rgb|spectrogram)/norm/.*")
    if not _norm_is_kept(theirs.model, ours):
        fresh.append("encoder/norm/.*")
    if _is(ours, "share_encoder"):
        unused.append("encoder/(rgb|spectrogram)/.*")
    if config.probe != "full" and size_of(ours).depth < size_of(theirs.model).depth:
        unused.append(r"encoder/(\w+/)?block_\d+/.*")  # a probe of an earlier layer
    # What one of the two models has, and the other has not.
    if not _is(theirs.model, "norm", True):
        fresh.append(FINAL_NORMS)
    if not _is(ours, "norm", True):
        unused.append(FINAL_NORMS)
    for field, name in (("cls_token", "cls"), ("modality_embeddings", "modality")):
        if _is(ours, field) != _is(theirs.model, field):
            gap = fresh if _is(ours, field) else unused
            gap.append(rf"embed/{name}_\w+")
    for absent in set(theirs.modalities) - set(config.modalities):
        unused += [rf"embed/(\w+_)?{absent}(/.*)?", rf"encoder/{absent}/.*"]
    return fresh, unused


def key_bias(bias: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """The biases of query, key and value from those of query and value, or back.

    A key's bias adds the same to all scores of a query, which softmax takes away: a key
    bias of zero, and none, are the same function.
    """
    if len(shape) != 3 or bias.shape[1:] != tuple(shape[1:]):
        return bias
    if (len(bias), shape[0]) == (2, 3):
        return np.stack([bias[0], np.zeros_like(bias[0]), bias[1]])
    return bias[::2] if (len(bias), shape[0]) == (3, 2) else bias


def equal_channels(kernel: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """A kernel [f d] of sound for three equal channels instead of one, or back.

    The same function: equal shares of it, or their sum. Scenic's code copies the kernel
    whole, so that its finetuning begins with sound three times as loud.
    """
    if shape[0] == 3 * len(kernel):
        return np.repeat(kernel / 3, 3, axis=0)
    if len(kernel) == 3 * shape[0]:
        return kernel.reshape(shape[0], 3, -1).sum(axis=1)
    return kernel


ADAPT = (
    (r"encoder/.*/attention/qkv/bias", key_bias),
    ("embed/spectrogram/kernel", equal_channels),
)
