"""The finetuning model: patches → encoder → pool → head, logits of each modality.

As MBT in Scenic's AV-MAE finetuning: each modality is pooled apart, one linear head
serves them all, the training loss is the mean of the modalities' own losses, and at
test the logits are averaged over the modalities that the clip has.
"""

from collections.abc import Mapping

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from av_mae import choose
from av_mae.autoencoder import Embeddings, Patches
from av_mae.fusion import Fusion, Present, build_encoder, mean_over_present
from av_mae.transformer import dtype_of, size_of


def highest(x: Float[Array, "b n d"]) -> Float[Array, "b d"]:
    """The maximum over the tokens, with the gradient to the first token that has it.

    The gradient of jnp.max looks for x == max(x) and divides by how many there are.
    XLA may compute x twice, and round it differently: then there are none, and NaN.
    """
    index = jnp.argmax(x, axis=1, keepdims=True)  # b 1 d
    return jnp.take_along_axis(x, index, axis=1)[:, 0]


POOLS = {"mean": lambda x: jnp.mean(x, axis=1), "max": highest}


class Classifier(nn.Module):
    """patches {m: [b n f]} → logits {m: [b classes]} in float32."""

    classes: int
    pool: str
    embed: Embeddings
    encoder: Fusion

    @nn.compact
    def __call__(
        self, patches: Patches, present: Present = None, train: bool = False
    ) -> dict[str, Float[Array, "b _classes"]]:
        encoded = self.encoder(self.embed(patches), present, train)
        pooled = {m: POOLS[self.pool](x) for m, x in encoded.items()}
        # Scenic begins from zero logits.
        head = nn.Dense(self.classes, kernel_init=nn.initializers.zeros, name="head")
        return {m: head(x.astype(jnp.float32)) for m, x in pooled.items()}


def combine(
    logits: Mapping[str, Float[Array, "b k"]], present: Present = None
) -> Float[Array, "b k"]:
    """Logits of a clip: the mean over the modalities that it has."""
    return mean_over_present(logits, present)


def build(config, classes: int) -> Classifier:
    """The model that `config.model` describes, for this many classes."""
    model = config.model
    size = size_of(model)
    dtype = dtype_of(config.compute)
    choose("model.pool", model.pool, POOLS)
    return Classifier(
        classes=classes,
        pool=model.pool,
        embed=Embeddings(size.width, model.positions, dtype),
        encoder=build_encoder(model, size, dtype),
    )


# Parameters that finetuning never finds in a pretraining checkpoint, and those of the
# pretraining that it has no use for.
ALWAYS_FRESH = ("head/.*", "encoder/bottleneck")
NEVER_USED = ("decoder/.*", "decoder_embed/.*", "predict/.*")


def sources(pretrained, model) -> tuple[tuple[str, str], ...]:
    """Where a finetuning parameter comes from: (regex of ours, name in the source).

    `pretrained` and `model` are the two configs' `model`. Scenic's rules: the joint
    layers of a `mid` encoder become the last layers of every modality's stack and their
    norm the final norm; the norms at the end of the separate stacks are dropped; a
    `shared` or `early` encoder is copied to every stack.
    """
    if model.fusion == pretrained.fusion:
        return ()
    if model.fusion != "bottleneck":
        return ()
    one = {"shared": "shared", "early": "joint"}.get(pretrained.fusion)
    if one:
        return (
            (r"encoder/(?:rgb|spectrogram)/(block_\d+/.*)", rf"encoder/{one}/\1"),
            (r"encoder/norm/(.*)", rf"encoder/{one}/norm/\1"),
        )
    if pretrained.fusion == "separate":
        return ()
    first = size_of(pretrained).depth - pretrained.fusion_layers
    joint = tuple(
        (
            rf"encoder/(?:rgb|spectrogram)/block_{first + j}/(.*)",
            rf"encoder/joint/block_{j}/\1",
        )
        for j in range(pretrained.fusion_layers)
    )
    return joint + ((r"encoder/norm/(.*)", r"encoder/joint/norm/\1"),)


def expected_gaps(pretrained, model, modalities) -> tuple[list[str], list[str]]:
    """Regexes of parameters that may stay fresh, of sources that may stay unused."""
    fresh, unused = list(ALWAYS_FRESH), list(NEVER_USED)
    if model.fusion == "bottleneck" != pretrained.fusion:
        unused.append(r"encoder/(rgb|spectrogram)/norm/.*")
        if pretrained.fusion == "separate":
            fresh.append(r"encoder/norm/.*")
    for absent in {"rgb", "spectrogram"} - set(modalities):
        unused += [rf"embed/(positions_)?{absent}/.*", rf"encoder/{absent}/.*"]
        unused.append("encoder/bottleneck")  # nothing meets where one is alone
    return fresh, unused
