"""The audiovisual masked autoencoder: patches → kept tokens → encoder → predictions.

Audiovisual MAE (Georgescu et al., ICCV 2023), §3. The encoder sees the kept tokens
alone; pixels are gathered before the embedding. The decoder's sequence is [kept…, mask
tokens…] with positions gathered by index: a transformer does not mind the order, so
nothing is scattered back, and predictions exist only for masked tokens.

Parameters: embed/<m>, encoder/<stack>/block_<i>, decoder_embed/{<m>, mask_token_<m>},
decoder/<stack>/block_<i>, predict/<m>.
"""

from collections.abc import Mapping

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from av_mae import choose, tokens
from av_mae.fusion import Fusion, Present, build_encoder
from av_mae.masking import Mask, take
from av_mae.transformer import Linear, block_options, dtype_of, size_of

Patches = Mapping[str, Float[Array, "b _n _f"]]
Masks = Mapping[str, Mask]


class Embeddings(nn.Module):
    """Flat patches to tokens with positions, one linear map for each modality."""

    width: int
    positions: str
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, patches: Patches, masks: Masks | None = None):
        encoded = {}
        for m, x in patches.items():
            index = None if masks is None else masks[m].kept
            n = x.shape[1]
            x = x if index is None else take(x, index)
            x = Linear((self.width,), dtype=self.dtype, name=m)(x.astype(self.dtype))
            place = tokens.Positions(self.positions, n, name=f"positions_{m}")
            encoded[m] = place(x, index)
        return encoded


class MaskTokens(nn.Module):
    """Encoded kept tokens to the decoder's sequences [kept…, mask tokens…] [b n d]."""

    width: int
    positions: str
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, encoded: Mapping[str, Float[Array, "b _k d"]], masks: Masks):
        sequences = {}
        for m, x in encoded.items():
            x = Linear((self.width,), dtype=self.dtype, name=m)(x)
            zeros = nn.initializers.zeros
            token = self.param(f"mask_token_{m}", zeros, (1, 1, self.width))
            shape = (*masks[m].masked.shape, self.width)
            x = jnp.concatenate([x, jnp.broadcast_to(token.astype(x.dtype), shape)], 1)
            index = jnp.concatenate([masks[m].kept, masks[m].masked], axis=1)
            n = index.shape[1]
            place = tokens.Positions(self.positions, n, name=f"positions_{m}")
            sequences[m] = place(x, index)
        return sequences


class Predict(nn.Module):
    """Decoded tokens to flat patches, from zero (as Scenic begins)."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, decoded: Mapping[str, Array], features: Mapping[str, int]):
        init = dict(kernel_init=nn.initializers.zeros, dtype=self.dtype)
        return {
            m: Linear((features[m],), name=m, **init)(x) for m, x in decoded.items()
        }


class Autoencoder(nn.Module):
    """patches {m: [b n f]}, masks {m: Mask} → predictions {m: [b m f]}."""

    embed: Embeddings
    encoder: Fusion
    decoder_embed: MaskTokens
    decoder: Fusion
    predict: Predict

    def __call__(
        self,
        patches: Patches,
        masks: Masks,
        present: Present = None,
        train: bool = False,
    ) -> dict[str, Float[Array, "b _m _f"]]:
        encoded = self.encoder(self.embed(patches, masks), present, train)
        sequences = self.decoder_embed(encoded, masks)
        decoded = self.decoder(sequences, present, train)
        hidden = {m: x[:, masks[m].kept.shape[1] :] for m, x in decoded.items()}
        return self.predict(hidden, {m: x.shape[-1] for m, x in patches.items()})


# The paper's names for decoders are those of the fusion table, except this one.
DECODERS = {"shared": "shared", "separate": "separate", "joint": "early"}


def build(config) -> Autoencoder:
    """The model that `config.model` and `config.compute` describe.

    Raises ConfigError for a name that is not in its table.
    """
    model, decoder = config.model, config.model.decoder
    size = size_of(model)
    dtype = dtype_of(config.compute)
    kind = choose("model.decoder.kind", decoder.kind, DECODERS)
    coder = Fusion(
        kind, decoder.depth, block_options(model, decoder.heads, decoder.mlp, dtype)
    )
    return Autoencoder(
        embed=Embeddings(size.width, model.positions, dtype),
        encoder=build_encoder(model, size, dtype),
        decoder_embed=MaskTokens(decoder.width, model.positions, dtype),
        decoder=coder,
        predict=Predict(dtype),
    )
