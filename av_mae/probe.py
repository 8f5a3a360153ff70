"""Probes: what is trained on an encoder that stays as it is.

`linear` trains the heads alone, on the pooled features (with `model.head_norm` its
LayerNorm too). `attentive` trains a pooling by cross-attention and the heads: one
learned query attends to all tokens of all modalities (V-JEPA, Bardes et al. 2024,
"Revisiting Feature Prediction for Learning Visual Representations from Video", and
before it the attentive probing of Chen et al. 2022, "Context Autoencoder for
Self-Supervised Representation Learning"). `full` is finetuning: everything is trained.
"""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from av_mae.transformer import BlockOptions, Linear, Mlp

# config.probe: the parameters that learn, a regex of whole names. `meet` joins the
# sound that a model hears beside its encoder (av_mae/maskenhancer.py) to the features.
TRAINED = {
    "full": ".*",
    "linear": r"(head(_\w+)?|meet)/.*",
    "attentive": r"(head(_\w+)?|representation|attentive)/.*",
}


class AttentivePool(nn.Module):
    """Tokens of all modalities → one vector: V-JEPA's block of cross-attention.

    The query q [d] is learned (normal .02, cut off at twice that); q + attention(q,
    norm(tokens)), then + mlp(norm(·)). Tokens of a modality that a clip lacks are not
    attended to.
    """

    options: BlockOptions

    @nn.compact
    def __call__(
        self,
        tokens: Mapping[str, Float[Array, "b _ d"]],
        present: Mapping[str, Bool[Array, " b"]] | None = None,
    ) -> Float[Array, "b d"]:
        options = self.options
        x, exist = _join(tokens, present)
        b, _, d = x.shape
        heads, linear = options.heads, dict(dtype=options.dtype)
        norm = lambda name: nn.LayerNorm(options.eps, dtype=options.dtype, name=name)
        init = nn.initializers.truncated_normal(0.02)
        query = self.param("query", init, (1, 1, d), jnp.float32)
        query = jnp.broadcast_to(query.astype(options.dtype), (b, 1, d))
        q = Linear((heads, d // heads), name="to_query", **linear)(query)
        kv = Linear((2, heads, d // heads), name="key_value", **linear)
        kv = kv(norm("norm_1")(x))  # b n 2 heads e
        mask = None if exist is None else exist[:, None, None, :]  # b 1 1 n
        y = jax.nn.dot_product_attention(q, kv[:, :, 0], kv[:, :, 1], mask=mask)
        y = query + Linear((d,), axes=2, name="out", **linear)(y)
        return (y + Mlp(options, name="mlp")(norm("norm_2")(y)))[:, 0]


def _join(tokens, present) -> tuple[Array, Array | None]:
    """All tokens in one sequence [b n d], and which of them exist [b n]."""
    x = jnp.concatenate(list(tokens.values()), axis=1)
    if present is None:
        return x, None
    exist = [jnp.repeat(present[m][:, None], y.shape[1], 1) for m, y in tokens.items()]
    return x, jnp.concatenate(exist, axis=1)
