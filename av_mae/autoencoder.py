"""The audiovisual masked autoencoder: patches → kept tokens → encoder → predictions.

Audiovisual MAE (Georgescu et al., ICCV 2023), §3. The encoder sees the kept tokens
alone; pixels are gathered before the embedding. The decoder's sequence is [kept…, mask
tokens…] with positions gathered by index: a transformer does not mind the order, so
nothing is scattered back, and predictions exist only for the tokens in the loss.

Parameters: embed/{<m>, positions_<m>, modality_<m>, cls_<m>},
encoder/<stack>/block_<i>, decoder_embed/{<m>, mask_token_<m>, positions_<m>,
modality_<m>}, decoder/<stack>/block_<i>, predict/<m>.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from av_mae import MODALITIES, ConfigError, choose, inputs, losses, tokens
from av_mae.fusion import Fusion, Present, build_encoder
from av_mae.masking import DECODE, Mask, take
from av_mae.transformer import (
    BlockOptions,
    Linear,
    Stack,
    block_options,
    dtype_of,
    size_of,
)

# Of fewer rows than the masks where several masks are drawn for a clip.
Patches = Mapping[str, Float[Array, "_ _n _f"]]
Masks = Mapping[str, Mask]
Encoded = Mapping[str, Float[Array, "b _k d"]]
Grids = Mapping[str, tuple[int, ...]]


# What the decoder reads and predicts.


class Sequence(NamedTuple):
    """The decoder's sequence of one modality: [encoded tokens…, mask tokens…].

    source: the modality whose encoded tokens stand in it; table: the modality whose
    positions (and embedding) these get; kept: which of them; masked: the positions of
    the mask tokens, which are the tokens that are predicted.
    """

    source: str
    table: str
    kept: Int[Array, "b k"]
    masked: Int[Array, "b m"]


def _reconstruct(masks: Masks) -> dict[str, Sequence]:
    """Each modality from its own kept tokens."""
    return {m: Sequence(m, m, *mask) for m, mask in masks.items()}


def _others(masks: Masks) -> dict[str, str]:
    """{modality: the other one}."""
    a, b = masks
    return {a: b, b: a}


def _inpaint(masks: Masks) -> dict[str, Sequence]:
    """Each modality's masked tokens from the other's kept tokens, at their places."""
    return {
        m: Sequence(other, other, masks[other].kept, masks[m].masked)
        for m, other in _others(masks).items()
    }


def _inpaint_scenic(masks: Masks) -> dict[str, Sequence]:
    """As Scenic's code has it: the slots of a modality's own positions are dealt out.

    The other modality's k kept tokens take slots 0…k-1, mask tokens all later ones,
    whichever tokens were masked.
    """
    sequences = {}
    for m, other in _others(masks).items():
        b, k = masks[other].kept.shape
        n = masks[m].kept.shape[1] + masks[m].masked.shape[1]
        if k >= n:
            raise ConfigError(
                f"objective.inpaint_layout is 'scenic', but the {k} kept tokens of "
                f"{other} leave none of the {n} slots of {m}: make mask.{other}.ratio "
                "larger, or choose the layout 'own'."
            )
        slots = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), (b, n))
        sequences[m] = Sequence(other, m, slots[:, :k], slots[:, k:])
    return sequences


OBJECTIVES = {"reconstruct": _reconstruct, "inpaint": _inpaint}
LAYOUTS = {"own": _inpaint, "scenic": _inpaint_scenic}


@dataclasses.dataclass(frozen=True)
class Objective:
    """Which tokens are predicted, and from which.

    kind: a name of OBJECTIVES; layout: of inpainting, a name of LAYOUTS; unmasked: with
    `reconstruct`, whether the kept tokens are predicted too.
    """

    kind: str = "reconstruct"
    layout: str = "own"
    unmasked: bool = False

    def sequences(self, masks: Masks) -> dict[str, Sequence]:
        """The decoder's sequence of each modality."""
        table = LAYOUTS if self.kind == "inpaint" else OBJECTIVES
        return table[self.layout if self.kind == "inpaint" else self.kind](masks)

    def predicted(self, masks: Masks) -> dict[str, Int[Array, "b _p"]]:
        """Indices of the tokens in the loss, in the order of the predictions."""
        found = self.sequences(masks)
        if not self.unmasked:
            return {m: s.masked for m, s in found.items()}
        return {m: jnp.concatenate([s.kept, s.masked], 1) for m, s in found.items()}

    def present(self, masks: Masks, present: Present) -> Present:
        """Clips that have a modality and what it is predicted from."""
        if present is None:
            return None
        found = self.sequences(masks)
        return {m: present[m] & present[s.source] for m, s in found.items()}


def objective_of(config) -> Objective:
    """The objective of `config.objective`; ConfigError where it makes no sense."""
    objective = config.objective
    choose("objective.kind", objective.kind, OBJECTIVES)
    choose("objective.inpaint_layout", objective.inpaint_layout, LAYOUTS)
    if objective.kind == "inpaint" and len(config.modalities) != len(MODALITIES):
        raise ConfigError(
            "objective.kind is 'inpaint', which predicts each modality from the other, "
            f"but modalities is {tuple(config.modalities)}: use both, or choose "
            "'reconstruct'."
        )
    if objective.kind == "inpaint" and objective.unmasked:
        raise ConfigError(
            "objective.unmasked is True, but 'inpaint' has no kept tokens of the "
            "modality that it predicts: set it to False, or choose 'reconstruct'."
        )
    _check_decoded(config)
    return Objective(objective.kind, objective.inpaint_layout, objective.unmasked)


def _check_decoded(config):
    """ConfigError where what is decoded does not fit the rest of the objective."""
    objective, decode = config.objective, config.objective.decode
    choose("objective.decode.kind", decode.kind, tuple(DECODE))
    part = decode.kind != "all" and decode.share < 1
    if decode.kind == "running_cell" and 4 * decode.share not in (1, 2, 3, 4):
        raise ConfigError(
            f"objective.decode.share is {decode.share}, but a running cell shows 1 to "
            "4 of 4 places: set it to 0.25, 0.5, 0.75 or 1.0, or objective.decode.kind "
            "to 'random'."
        )
    if part and objective.kind == "inpaint" and objective.inpaint_layout == "scenic":
        raise ConfigError(
            f"objective.decode.share is {decode.share}, but "
            "objective.inpaint_layout 'scenic' deals out all slots: set it to 1.0, or "
            "choose the layout 'own'."
        )
    if objective.unmasked and config.model.decoder.kind == "cross":
        raise ConfigError(
            "objective.unmasked is True, but model.decoder.kind 'cross' decodes masked "
            "tokens alone: set it to False, or choose another decoder."
        )


# The model.


class Embeddings(nn.Module):
    """Flat patches to tokens with positions, one linear map for each modality.

    Scenic's further options: `modality_embeddings` adds a learned vector to all tokens
    of a modality; `cls_token` puts a learned token before them, without position but
    for the positions `sinusoidal_cls`; `sound_channels` gives sound so many equal
    channels (VGGSound's classifier has three). `grids` are those of the modalities,
    where the positions ask for their axes.
    """

    width: int
    positions: str
    dtype: jnp.dtype
    modality_embeddings: bool = False
    cls_token: bool = False
    sound_channels: int = 1
    grids: Grids | None = None

    @nn.compact
    def __call__(self, patches: Patches, masks: Masks | None = None):
        encoded, zeros = {}, nn.initializers.zeros
        for m, x in patches.items():
            index = None if masks is None else masks[m].kept
            grid = _grid(self.positions, self.grids, m, x.shape[1])
            x = x if index is None else take(x, index)
            if m == "spectrogram" and self.sound_channels > 1:
                times = (*x.shape, self.sound_channels)
                x = jnp.broadcast_to(x[..., None], times).reshape(*x.shape[:-1], -1)
            x = Linear((self.width,), dtype=self.dtype, name=m)(x.astype(self.dtype))
            place = tokens.Positions(self.positions, grid, name=f"positions_{m}")
            x = place(x, index)
            if self.modality_embeddings:
                vector = self.param(f"modality_{m}", zeros, (1, 1, self.width))
                x = x + vector.astype(x.dtype)
            if self.cls_token:
                token = self.param(f"cls_{m}", zeros, (1, 1, self.width))
                if self.positions == "sinusoidal_cls":
                    token = token + tokens.sinusoid(1, self.width)
                token = jnp.broadcast_to(token.astype(x.dtype), (len(x), 1, self.width))
                x = jnp.concatenate([token, x], axis=1)
            encoded[m] = x
        return encoded


def _grid(positions: str, grids: Grids | None, m: str, n: int) -> tuple[int, ...]:
    """The grid for these positions: (n,) where its axes do not matter."""
    if positions in ("sinusoidal", "sinusoidal_cls", "learned") or grids is None:
        return (n,)
    return tuple(grids[m])


class MaskTokens(nn.Module):
    """Encoded tokens to the decoder's sequences [CLS?, encoded…, mask tokens…].

    `sequences` is what they are made of, by default each modality's own tokens. The
    options are those of `Embeddings`; `bias` is that of the linear maps into the
    decoder (VideoMAE has none).
    """

    width: int
    positions: str
    dtype: jnp.dtype
    bias: bool = True
    modality_embeddings: bool = False
    grids: Grids | None = None

    @nn.compact
    def __call__(
        self,
        encoded: Encoded,
        masks: Masks,
        sequences: Mapping[str, Sequence] | None = None,
    ):
        biased = None if self.bias else ()
        linear = lambda m: Linear(
            (self.width,), biased=biased, dtype=self.dtype, name=m
        )
        encoded = {m: linear(m)(x) for m, x in encoded.items()}
        places = {m: self._place(m, masks[m]) for m in encoded}
        result = {}
        sequences = sequences or _reconstruct(masks)
        for m, (source, table, kept, masked) in sequences.items():
            x = encoded[source]
            extra = x.shape[1] - kept.shape[1]  # 1 with a CLS token
            zeros = nn.initializers.zeros
            token = self.param(f"mask_token_{m}", zeros, (1, 1, self.width))
            token = token.astype(x.dtype)
            hidden = jnp.broadcast_to(token, (*masked.shape, self.width))
            parts = [
                x[:, :extra],
                places[table](x[:, extra:], kept),
                places[m](hidden, masked),
            ]
            result[m] = jnp.concatenate(parts, axis=1)
        return result

    def _place(self, m: str, mask: Mask):
        """The function (tokens, indices) → tokens with positions (and embedding)."""
        n = mask.kept.shape[1] + mask.masked.shape[1]
        if self.grids is not None:  # a part of the tokens may be in no mask
            n = math.prod(self.grids[m])
        grid = _grid(self.positions, self.grids, m, n)
        place = tokens.Positions(self.positions, grid, name=f"positions_{m}")
        if not self.modality_embeddings:
            return place
        zeros = nn.initializers.zeros
        vector = self.param(f"modality_{m}", zeros, (1, 1, self.width))
        return lambda x, index: place(x, index) + vector.astype(x.dtype)


class CrossDecoder(nn.Module):
    """Mask tokens attend to the encoded tokens of their sequence, not to each other.

    CrossMAE (Fu et al. 2024, "Rethinking Patch Dependence for Masked Autoencoders"),
    §3.2, without its weighted sum over the encoder's layers: every block sees the last
    layer's tokens, with positions. One stack serves all modalities. `counts` are the
    numbers of mask tokens, which alone are decoded.
    """

    depth: int
    options: BlockOptions
    norm: bool = True

    @nn.compact
    def __call__(
        self,
        tokens: Mapping[str, Array],
        present: Present,
        train: bool,
        counts: Mapping[str, int],
    ) -> dict[str, Array]:
        stack = Stack(self.options, (0.0,) * self.depth, self.norm, name="shared")
        return {
            m: stack(x[:, -counts[m] :], None, train, x[:, : -counts[m]])
            for m, x in tokens.items()
        }


class Predict(nn.Module):
    """Decoded tokens to what is predicted of a patch, from zero (as Scenic begins)."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, decoded: Mapping[str, Array], features: Mapping[str, int]):
        init = dict(kernel_init=nn.initializers.zeros, dtype=self.dtype)
        return {
            m: Linear((features[m],), name=m, **init)(x) for m, x in decoded.items()
        }


class Autoencoder(nn.Module):
    """patches {m: [b n f]}, masks {m: Mask} → predictions {m: [b p g]}.

    p are the tokens of `objective.predicted(masks)`, g the values of the target.
    """

    embed: Embeddings
    encoder: Fusion
    decoder_embed: MaskTokens
    decoder: Fusion | CrossDecoder
    predict: Predict
    features: Mapping[str, int]
    objective: Objective = Objective()

    def __call__(
        self,
        patches: Patches,
        masks: Masks,
        present: Present = None,
        train: bool = False,
    ) -> dict[str, Float[Array, "b _p _g"]]:
        encoded = self.encoder(self.embed(patches, masks), present, train)
        sequences = self.objective.sequences(masks)
        x = self.decoder_embed(encoded, masks, sequences)
        heard = self.objective.present(masks, present)
        decode = self.decoder
        if isinstance(decode, CrossDecoder):
            counts = {m: s.masked.shape[1] for m, s in sequences.items()}
            decode = functools.partial(decode, counts=counts)
        decoded = decode(x, heard, train)
        predicted = self.objective.predicted(masks)
        decoded = {m: x[:, -predicted[m].shape[1] :] for m, x in decoded.items()}
        return self.predict(decoded, self.features)


# model.decoder.kind: the paper's names are those of the fusion table, except `joint`;
# `cross` is no strategy of fusion but CrossDecoder.
DECODERS = {"shared": "shared", "separate": "separate", "joint": "early", "cross": None}


def build_embeddings(config, sound_channels: int = 1) -> Embeddings:
    """The first layer that `config.model` describes, the same for both trainers."""
    model = config.model
    return Embeddings(
        width=size_of(model).width,
        positions=model.positions,
        dtype=dtype_of(config.compute),
        modality_embeddings=model.modality_embeddings,
        cls_token=model.cls_token,
        sound_channels=sound_channels,
        grids={m: cut.grid for m, cut in inputs.layouts(config).items()},
    )


def build(config) -> Autoencoder:
    """The model that `config.model`, `.objective` and `.compute` describe.

    Raises ConfigError for a name that is not in its table, or a combination that makes
    no sense.
    """
    model, decoder = config.model, config.model.decoder
    size = size_of(model)
    dtype = dtype_of(config.compute)
    cuts = inputs.layouts(config)
    kind = choose("model.decoder.kind", decoder.kind, DECODERS)
    choose("model.decoder.positions", decoder.positions, tokens.POSITIONS)
    options = block_options(
        model, decoder.heads, decoder.mlp, config.compute, decoder.eps
    )
    return Autoencoder(
        embed=build_embeddings(config),
        encoder=build_encoder(model, size, config.compute),
        decoder_embed=MaskTokens(
            width=decoder.width,
            positions=decoder.positions,
            dtype=dtype,
            bias=decoder.bias,
            modality_embeddings=model.modality_embeddings,
            grids={m: cut.grid for m, cut in cuts.items()},
        ),
        decoder=Fusion(kind, decoder.depth, options, norm=decoder.norm)
        if kind
        else CrossDecoder(decoder.depth, options, decoder.norm),
        predict=Predict(dtype),
        features={
            m: losses.target_size(config.objective.target[m], cut.f, cut.frames)
            for m, cut in cuts.items()
        },
        objective=objective_of(config),
    )
