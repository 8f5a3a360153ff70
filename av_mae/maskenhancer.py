"""AV-MaskEnhancer: a video masked autoencoder whose decoder hears the clip's sound.

Diao, Cheng and Cheng (ICTAI 2023, arXiv:2309.08738). The video half is VideoMAE, built
of our parts. Of the whole clip's sound, 13 cepstral coefficients (`spectrogram.mfcc`)
pass through a ResNet with squeeze and excitation (TalkNet's, Tao et al. 2021), whose
mean over time leaves four vectors. These are dealt out in turn to the sequence of the
video's decoder and meet it there (`FUSIONS`); the loss is that of the masked video
patches alone. The finetuning model joins pooled video and sound before its head.

Parameters: those of the autoencoder or classifier, and sound/{stem, stem_norm,
stage_<i>_unit_<j>/…}, meet/{embed, to_video, to_sound, together, join}. The `mean` and
`variance` of a normalisation are no weights: training replaces them (`BatchNorm`).
"""

import dataclasses
import math
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int
from ml_collections import ConfigDict

from av_mae import MODALITIES, STATISTICS, ConfigError, autoencoder, choose, classifier
from av_mae.autoencoder import (
    Embeddings,
    Masks,
    MaskTokens,
    Objective,
    Patches,
    Predict,
)
from av_mae.fusion import Fusion, Present, Tokens
from av_mae.masking import Mask, take
from av_mae.transformer import Linear, dtype_of

# The sound encoder.

STRIDES = ((1, 1), (2, 2), (2, 2), (1, 1))  # of the four stages, (time, coefficient)
STEM_STRIDE = (2, 1)
REDUCTION = 8  # of squeeze and excitation
MOMENTUM = 0.1


def _uniform(bound: float):
    """Initial values within ± bound."""
    return lambda rng, shape, dtype=jnp.float32: jax.random.uniform(
        rng, shape, dtype, -bound, bound
    )


def _convolution(features: int, side: int, stride=(1, 1), dtype=jnp.float32, **name):
    """Without bias, from He's normal values over the outputs (as published)."""
    init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
    return nn.Conv(
        features,
        (side, side),
        stride,
        padding=side // 2,
        use_bias=False,
        kernel_init=init,
        dtype=dtype,
        **name,
    )


class BatchNorm(nn.Module):
    """Normalises channels: by the batch in training, by running statistics at test.

    The statistics are among the parameters, so that whatever keeps or reads parameters
    keeps them too; nothing flows back to them. What training should replace them with
    is put under the same names in the collection STATISTICS, where that is mutable. As
    PyTorch: momentum 0.1, epsilon 1e-5, the running variance unbiased. Clips that are
    not `present` do not count.
    """

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t f c"],
        present: Bool[Array, " b"] | None,
        train: bool,
    ) -> Float[Array, "b t f c"]:
        shape = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        mean = self.param("mean", nn.initializers.zeros, shape)
        variance = self.param("variance", nn.initializers.ones, shape)
        x = x.astype(jnp.float32)
        if train:
            running, (mean, variance, count) = (mean, variance), _moments(x, present)
            unbiased = variance * count / jnp.maximum(count - 1, 1)
            new = {"mean": mean, "variance": unbiased}
            for (name, value), old in zip(new.items(), running, strict=True):
                if self.is_mutable_collection(STATISTICS):
                    value = jnp.where(count > 0, old + MOMENTUM * (value - old), old)
                    self.put_variable(STATISTICS, name, jax.lax.stop_gradient(value))
        else:
            mean, variance = jax.lax.stop_gradient((mean, variance))
        y = (x - mean) * jax.lax.rsqrt(variance + 1e-5) * scale + bias
        return y.astype(self.dtype)


def _moments(x: Array, present: Array | None) -> tuple[Array, Array, Array]:
    """Mean and variance of each channel over the clips present, how many values."""
    weights = jnp.ones(len(x)) if present is None else present.astype(x.dtype)
    weights = weights[:, None, None, None]
    count = jnp.sum(weights) * x.shape[1] * x.shape[2]
    average = lambda y: jnp.sum(weights * y, (0, 1, 2)) / jnp.maximum(count, 1)
    mean = average(x)
    return mean, average((x - mean) ** 2), count


class Unit(nn.Module):
    """Two convolutions, weighed by channel (squeeze and excitation), and a shortcut."""

    features: int
    stride: tuple[int, int]
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, present: Array | None, train: bool) -> Array:
        norm = lambda name, y: BatchNorm(self.dtype, name=name)(y, present, train)
        convolve = lambda name, y, side, stride: _convolution(
            self.features, side, stride, self.dtype, name=name
        )(y)
        y = norm("norm_1", nn.relu(convolve("conv_1", x, 3, self.stride)))
        y = norm("norm_2", convolve("conv_2", y, 3, (1, 1)))
        y = y * _weights(y, self.dtype)
        if self.stride != (1, 1) or x.shape[-1] != self.features:
            x = norm("shortcut_norm", convolve("shortcut", x, 1, self.stride))
        return nn.relu(x + y)


def _weights(y: Float[Array, "b t f c"], dtype) -> Float[Array, "b 1 1 c"]:
    """One weight for each channel, from the channels' means (within `Unit`)."""
    c = y.shape[-1]
    squeezed = nn.relu(_dense("squeeze", c // REDUCTION, jnp.mean(y, (1, 2)), dtype))
    return nn.sigmoid(_dense("excite", c, squeezed, dtype))[:, None, None]


def _dense(name: str, features: int, x: Array, dtype, bias: bool = True) -> Array:
    """A linear layer from PyTorch's initial values."""
    init = _uniform(1 / math.sqrt(x.shape[-1]))
    options = dict(use_bias=bias, kernel_init=init, bias_init=init, dtype=dtype)
    return nn.Dense(features, name=name, **options)(x)


class SoundEncoder(nn.Module):
    """Coefficients of a clip to a few vectors: [b t 13] → [b 4 filters[-1]].

    A stem and four stages of `blocks` units with `filters` channels; the mean over
    time. What is left of the 13 coefficients is four positions. A clip that is not
    `present` sounds like zeros.
    """

    filters: tuple[int, ...]
    blocks: tuple[int, ...]
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t f"],
        present: Bool[Array, " b"] | None = None,
        train: bool = False,
    ) -> Float[Array, "b p c"]:
        if present is not None:
            x = jnp.where(present[:, None, None], x, 0.0)
        x = x[..., None].astype(self.dtype)
        x = _convolution(self.filters[0], 7, STEM_STRIDE, self.dtype, name="stem")(x)
        x = nn.relu(BatchNorm(self.dtype, name="stem_norm")(x, present, train))
        stages = zip(self.filters, self.blocks, STRIDES, strict=True)
        for i, (features, blocks, stride) in enumerate(stages):
            for j in range(blocks):
                name = f"stage_{i}_unit_{j}"
                unit = Unit(features, (1, 1) if j else stride, self.dtype, name=name)
                x = unit(x, present, train)
        return jnp.mean(x, axis=1)


# How the sound meets the decoder's sequence.

HEADS = 8
DROPOUT = 0.1


class Meeting(nn.Module):
    """source + attention of the target's queries to the source, then an MLP.

    As published: norms after the sums (epsilon 1e-5), ReLU, eight heads, dropout .1 in
    training, and the first sum is with the source, not with the queries.
    """

    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, source: Float[Array, "b n d"], target: Float[Array, "b n d"], train: bool
    ) -> Float[Array, "b n d"]:
        d = source.shape[-1]
        drop = lambda x: nn.Dropout(DROPOUT, rng_collection="drop_path")(x, not train)
        norm = lambda name: nn.LayerNorm(1e-5, dtype=self.dtype, name=name)
        linear = lambda name, features, fan, **options: Linear(
            features,
            kernel_init=_uniform(1 / math.sqrt(fan)),
            dtype=self.dtype,
            name=name,
            **options,
        )
        # PyTorch draws queries, keys and values as one matrix [d 3d] (Xavier).
        heads, fan = (HEADS, d // HEADS), d / 1.5
        query = linear("query", heads, fan)(target)
        key, value = jnp.moveaxis(linear("key_value", (2, *heads), fan)(source), 2, 0)
        logits = jnp.einsum("bqhe,bkhe->bhqk", query, key) / math.sqrt(d // HEADS)
        weights = drop(nn.softmax(logits.astype(jnp.float32)).astype(self.dtype))
        x = jnp.einsum("bhqk,bkhe->bqhe", weights, value)
        x = norm("norm_1")(source + drop(linear("out", (d,), d, axes=2)(x)))
        bound = _uniform(1 / math.sqrt(d))
        hidden = drop(nn.relu(linear("mlp_in", (4 * d,), d, bias_init=bound)(x)))
        bound = _uniform(1 / math.sqrt(4 * d))
        y = linear("mlp_out", (d,), 4 * d, bias_init=bound)(hidden)
        return norm("norm_2")(x + drop(y))


def attention(video: Array, sound: Array, dtype, train: bool) -> Array:
    """Each attends to the other, then both, side by side, to themselves."""
    layer = lambda name, *pair: Meeting(dtype, name=name)(*pair, train)
    sound = layer("to_video", sound, video)
    video = layer("to_sound", video, sound)
    both = jnp.concatenate([video, sound], axis=-1)
    return layer("together", both, both)


def concat(video: Array, sound: Array, dtype, train: bool) -> Array:
    """Side by side."""
    return jnp.concatenate([video, sound], axis=-1)


FUSIONS = {"attention": attention, "concat": concat}
HEARD = ("spectrogram",)  # is neither masked nor predicted


class Meet(nn.Module):
    """The decoder's sequence [b n d] and the sound [b p c] → the sequence [b n d].

    `place` is each token's place in the published order, which deals out the sound:
    kept tokens by rising index, then masked ones.
    """

    kind: str
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self,
        video: Float[Array, "b n d"],
        sound: Float[Array, "b p c"],
        place: Int[Array, "b n"],
        train: bool = False,
    ) -> Float[Array, "b n d"]:
        d = video.shape[-1]
        sound = _dense("embed", d, sound, self.dtype, bias=False)
        sound = take(sound, place % sound.shape[1])
        both = FUSIONS[self.kind](video, sound, self.dtype, train)
        return _dense("join", d, both, self.dtype, bias=False)


def places(mask: Mask) -> Int[Array, "b n"]:
    """Places of [kept…, masked…] when each part is sorted by token index."""
    rank = lambda index: jnp.argsort(jnp.argsort(index, axis=1), axis=1)
    k = mask.kept.shape[1]
    return jnp.concatenate([rank(mask.kept), k + rank(mask.masked)], axis=1)


class Pretraining(nn.Module):
    """patches {rgb: [b n f], spectrogram: [b t 13]} → predictions {rgb: [b p g]}.

    The masks are those of the video alone.
    """

    embed: Embeddings
    encoder: Fusion
    decoder_embed: MaskTokens
    decoder: Fusion
    predict: Predict
    features: Mapping[str, int]
    objective: Objective
    sound: SoundEncoder
    meet: Meet

    def __call__(
        self,
        patches: Patches,
        masks: Masks,
        present: Present = None,
        train: bool = False,
    ) -> dict[str, Float[Array, "b _p _g"]]:
        encoded = self.encoder(self.embed({"rgb": patches["rgb"]}, masks), None, train)
        sequences = self.objective.sequences(masks)
        x = self.decoder_embed(encoded, masks, sequences)["rgb"]
        sound = self.sound(patches["spectrogram"], heard(present), train)
        x = self.meet(x, sound, places(masks["rgb"]), train)
        x = self.decoder({"rgb": x}, None, train)["rgb"]
        count = self.objective.predicted(masks)["rgb"].shape[1]
        return self.predict({"rgb": x[:, -count:]}, self.features)


def heard(present: Present) -> Bool[Array, " b"] | None:
    """Which clips have sound."""
    return None if present is None else present["spectrogram"]


class JoinPooled(nn.Module):
    """Pooled video [b d] and the sound [b p c] → [b d], linear in both."""

    @nn.compact
    def __call__(
        self, video: Float[Array, "b d"], sound: Float[Array, "b p c"]
    ) -> Float[Array, "b d"]:
        d = video.shape[-1]
        flat = sound.reshape(len(sound), -1).astype(jnp.float32)
        sound = _dense("embed", d, flat, jnp.float32, bias=False)
        both = jnp.concatenate([video, sound], axis=-1)
        return _dense("join", d, both, jnp.float32, bias=False)


class Finetuning(classifier.Classifier):
    """patches {rgb: [b n f], spectrogram: [b t 13]} → logits {rgb: [b k]}.

    The video's classifier, whose pooled and normalised features are joined with the
    sound before the head.
    """

    sound: SoundEncoder
    meet: JoinPooled

    def encode(
        self, patches: Patches, present: Present = None, train: bool = False
    ) -> dict[str, Float[Array, "b _n _d"]]:
        """The encoder's tokens of the video, and the vectors of the sound."""
        encoded = self.encoder(self.embed({"rgb": patches["rgb"]}), None, train)
        sound = self.sound(patches["spectrogram"], heard(present), train)
        return encoded | {"spectrogram": sound}

    def features(
        self, encoded: Tokens, present: Present = None
    ) -> dict[str, Float[Array, "b _d"]]:
        """What the head sees: video and sound joined."""
        video = super().features({"rgb": encoded["rgb"]})["rgb"]
        return {"rgb": self.meet(video, encoded["spectrogram"])}


def _video(config) -> ConfigDict:
    """The config of the video half alone."""
    video = ConfigDict(config.to_dict())
    video.modalities, video.model.fusion = ("rgb",), "separate"
    return video


def _parts(module: nn.Module) -> dict:
    """The parts that a module was made of."""
    names = [field.name for field in dataclasses.fields(module)]
    return {x: getattr(module, x) for x in names if x not in ("parent", "name")}


def _sound(config) -> SoundEncoder:
    sound = config.model.sound
    return SoundEncoder(
        tuple(sound.filters), tuple(sound.blocks), dtype_of(config.compute)
    )


def build(config) -> Pretraining:
    """The pretraining model that `config.model` describes, its fusion one of FUSIONS.

    Raises ConfigError for a name that is not in its table, or where there is no sound.
    """
    kind = choose("model.fusion", config.model.fusion, tuple(FUSIONS))
    _check(config)
    _check_whole(config)
    meet = Meet(kind, dtype_of(config.compute))
    parts = _parts(autoencoder.build(_video(config)))
    return Pretraining(**parts, sound=_sound(config), meet=meet)


def build_classifier(config, classes: classifier.Classes) -> Finetuning:
    """The finetuning model that `config.model` describes; its fusion is `concat`."""
    choose("model.fusion", config.model.fusion, ("concat",))
    _check(config)
    parts = _parts(classifier.build(_video(config), classes))
    return Finetuning(**parts, sound=_sound(config), meet=JoinPooled())


def _check(config):
    """ConfigError unless the input is what the sound encoder takes."""
    if tuple(config.modalities) != MODALITIES:
        raise ConfigError(
            f"modalities is {tuple(config.modalities)}, but model.fusion "
            f"{config.model.fusion!r} needs picture and sound: set it to {MODALITIES}, "
            "or model.fusion to 'separate'."
        )
    if config.spectrogram.preset != "mfcc":
        raise ConfigError(
            f"spectrogram.preset is {config.spectrogram.preset!r}, but model.fusion "
            f"{config.model.fusion!r} hears cepstral coefficients: set it to 'mfcc'."
        )


def _check_whole(config):
    """ConfigError unless every masked token of one mask is decoded from all others."""
    for field, value, wanted in (
        ("objective.masks_per_clip", config.objective.masks_per_clip, 1),
        ("objective.decode.kind", config.objective.decode.kind, "all"),
    ):
        if value != wanted:
            raise ConfigError(
                f"{field} is {value!r}, but model.fusion {config.model.fusion!r} "
                f"knows one mask, decoded whole: set it to {wanted!r}."
            )
    if config.model.decoder.kind == "cross":
        raise ConfigError(
            "model.decoder.kind is 'cross', but the sound of model.fusion "
            f"{config.model.fusion!r} meets a decoder that sees all tokens: set it to "
            "'shared'."
        )


def expected_gaps(theirs, config) -> tuple[list[str], list[str]]:
    """Regexes of parameters that may stay fresh, of sources that may stay unused.

    Of another config's parameters: where the sound meets the video differs between
    pretraining and finetuning, and a model of another fusion has no such sound.
    """
    ours = config.model.fusion in FUSIONS
    same = ours and theirs.model.fusion in FUSIONS and theirs.trainer == config.trainer
    parts = [] if same else ["meet/.*"]
    if not (ours and theirs.model.fusion in FUSIONS):
        parts.append("sound/.*")
    return (parts if ours else []), parts
