"""The pre-norm transformer: MLP, attention, block, stack, and the table of sizes."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from av_mae import ConfigError, attention, choose, depth

# name: (width, depth, heads); the MLP is four times the width. Sizes of ViT
# (Dosovitskiy et al. 2021, Table 1; Ti of DeiT), as Scenic and VideoMAE use them.
VARIANTS = {
    "Ti": (192, 12, 3),
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "H": (1280, 32, 16),
}


@dataclasses.dataclass(frozen=True)
class Size:
    """A model's size: width d, depth, heads, MLP width, patch side and tubelet."""

    width: int
    depth: int
    heads: int
    mlp: int
    side: int
    tubelet: int


def size_of(model) -> Size:
    """Reads `model.variant` ("L/16x2") and the explicit sizes that override it (not 0).

    Raises ConfigError when the variant is not one of the table.
    """
    match = re.fullmatch(r"(\w+)/(\d+)x(\d+)", model.variant)
    if not match or match[1] not in VARIANTS:
        raise ConfigError(
            f"model.variant is {model.variant!r}: write a size of "
            f"{', '.join(VARIANTS)}, a slash, patch side x tubelet, as in 'L/16x2'."
        )
    width, depth, heads = VARIANTS[match[1]]
    width = model.width or width
    heads = model.heads or heads
    if width % heads:
        raise ConfigError(
            f"model.heads is {heads}, which does not divide the width {width}: choose "
            "a number of heads that does."
        )
    return Size(
        width=width,
        depth=model.depth or depth,
        heads=heads,
        mlp=model.mlp or 4 * width,
        side=int(match[2]),
        tubelet=int(match[3]),
    )


@dataclasses.dataclass(frozen=True)
class Compute:
    """How blocks are computed: beyond rounding it changes no number."""

    dtype: jnp.dtype = jnp.dtype("float32")  # of activations and products
    attention: str = "auto"  # a name of attention.KINDS
    scan: bool = False  # whether one traced layer serves all
    remat: str = "none"  # a name of depth.REMAT


@dataclasses.dataclass(frozen=True)
class BlockOptions:
    """What all blocks of a stack share.

    Defaults are Scenic's: LayerNorm epsilon 1e-6, GELU by tanh, biases everywhere, and
    stochastic depth that does not rescale what survives (`drop_path_rescale=False`;
    VideoMAE, as timm, divides by the probability of survival). VideoMAE has GELU by
    erf and no bias of the keys, and in its larger recipes layer scale (CaiT, Touvron et
    al. 2021): each branch times a learned vector that begins at `layer_scale`. The norm
    after the last block has an epsilon of its own in Hugging Face's decoder (1e-5).
    """

    heads: int
    mlp: int
    drop_path_rescale: bool = False
    eps: float = 1e-6
    gelu: str = "tanh"
    key_bias: bool = True
    layer_scale: float = 0.0  # 0: none
    qkv_init: str = "xavier"  # a name of QKV_INITS
    last_eps: float | None = None  # of the norm after the last block; None: eps
    compute: Compute = Compute()

    @property
    def dtype(self) -> jnp.dtype:
        """Of activations and products."""
        return self.compute.dtype


def _xavier(rng, shape, dtype=jnp.float32, *, heads: int):
    """Xavier-uniform for query, key and value apart (Scenic), side by side."""
    d, columns = shape
    init = nn.initializers.xavier_uniform()
    keys = jax.random.split(rng, 3)
    return jnp.concatenate([init(k, (d, columns // 3), dtype) for k in keys], axis=1)


def _aligned(rng, shape, dtype=jnp.float32, *, heads: int):
    """Queries equal keys, orthonormal in each head, so that like attends to like.

    After Mimetic Initialization (Trockman & Kolter, ICML 2023), whose observation is
    that trained W_q W_kᵀ look like the identity: tokens attend to near places from the
    first step. Values are Xavier-uniform.
    """
    d, columns = shape
    width = columns // 3
    first, *keys = jax.random.split(rng, 1 + heads)
    init = nn.initializers.orthogonal()
    same = jnp.concatenate([init(k, (d, width // heads), dtype) for k in keys], axis=1)
    values = nn.initializers.xavier_uniform()(first, (d, width), dtype)
    return jnp.concatenate([same, same, values], axis=1)


def _xavier_pair(rng, shape, dtype=jnp.float32):
    """Xavier-uniform for key and value apart, side by side."""
    d, columns = shape
    init = nn.initializers.xavier_uniform()
    keys = jax.random.split(rng)
    return jnp.concatenate([init(k, (d, columns // 2), dtype) for k in keys], axis=1)


QKV_INITS = {"xavier": _xavier, "aligned": _aligned}


def dtype_of(compute) -> jnp.dtype:
    """The type that `config.compute.dtype` names, for activations and products."""
    return jnp.dtype(choose("compute.dtype", compute.dtype, ("float32", "bfloat16")))


def compute_of(compute) -> Compute:
    """How `config.compute` says that blocks are computed; ConfigError for a name."""
    return Compute(
        dtype=dtype_of(compute),
        attention=choose("compute.attention", compute.attention, attention.KINDS),
        scan=compute.scan,
        remat=choose("compute.remat", compute.remat, tuple(depth.REMAT)),
    )


def block_options(
    model, heads: int, mlp: int, compute, last_eps: float | None = None
) -> BlockOptions:
    """The options of `config.model` for blocks of this many heads and MLP width.

    compute is `config.compute`.
    """
    block = model.block
    return BlockOptions(
        heads,
        mlp,
        drop_path_rescale=model.drop_path_rescale,
        eps=block.eps,
        gelu=choose("model.block.gelu", block.gelu, ("tanh", "erf")),
        key_bias=block.key_bias,
        layer_scale=block.layer_scale,
        qkv_init=choose("model.block.qkv_init", block.qkv_init, tuple(QKV_INITS)),
        last_eps=last_eps,
        compute=compute_of(compute),
    )


class Linear(nn.Module):
    """A dense layer over the last `axes` axes of x, with kernel [*inputs, *features].

    Computed as one product of two matrices: XLA's CPU backend takes three times as long
    for the gradient of the same product with a batch axis (measured at 64×96×128→512).
    First values are drawn for the flat matrix, as flax's DenseGeneral does. `biased`
    are the indices of the first axis of features that have a bias: all by default.
    """

    features: tuple[int, ...]
    axes: int = 1
    kernel_init: Callable = nn.initializers.lecun_normal()
    bias_init: Callable = nn.initializers.zeros
    biased: tuple[int, ...] | None = None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        rows, inputs = x.shape[: -self.axes], x.shape[-self.axes :]
        flat = (math.prod(inputs), math.prod(self.features))

        def init(rng, shape):
            return self.kernel_init(rng, flat, jnp.float32).reshape(shape)

        kernel = self.param("kernel", init, (*inputs, *self.features))
        y = x.astype(self.dtype).reshape(-1, flat[0])
        y = y @ kernel.astype(self.dtype).reshape(flat)
        if self.biased != ():
            y = y + self._bias().astype(self.dtype).reshape(1, -1)
        return y.reshape(*rows, *self.features)

    def _bias(self) -> Float[Array, "..."]:
        """The bias [*features], zero where there is none."""
        if self.biased is None:
            return self.param("bias", self.bias_init, self.features, jnp.float32)
        shape = (len(self.biased), *self.features[1:])
        bias = self.param("bias", self.bias_init, shape, jnp.float32)
        return jnp.zeros(self.features).at[jnp.array(self.biased)].set(bias)


class Attention(nn.Module):
    """Multi-head attention; softmax statistics in float32.

    Self-attention with one QKV product, or with `context` attention to those tokens
    alone, whose key and value are one product. `present` says which keys exist.
    """

    options: BlockOptions

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b n d"],
        present: Bool[Array, "b k"] | None = None,
        context: Float[Array, "b k d"] | None = None,
    ) -> Float[Array, "b n d"]:
        d = x.shape[-1]
        query, key, value = self._projected(x, context)
        compute = self.options.compute
        x = attention.attend(
            query, key, value, present, compute.attention, compute.dtype
        )
        return Linear(
            (d,),
            axes=2,
            kernel_init=nn.initializers.xavier_uniform(),
            dtype=self.options.dtype,
            name="out",
        )(x)

    def _projected(self, x: Array, context: Array | None) -> tuple[Array, ...]:
        """Query, key and value, each b n heads e."""
        heads, dtype = self.options.heads, self.options.dtype
        size = (heads, x.shape[-1] // heads)
        bias = self.options.key_bias
        if context is None:
            init = functools.partial(QKV_INITS[self.options.qkv_init], heads=heads)
            qkv = Linear(
                (3, *size),
                kernel_init=init,
                biased=None if bias else (0, 2),
                dtype=dtype,
                name="qkv",
            )(x)  # b n 3 heads e
            return qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        xavier = nn.initializers.xavier_uniform()
        query = Linear(size, kernel_init=xavier, dtype=dtype, name="query")(x)
        both = Linear(
            (2, *size),
            kernel_init=_xavier_pair,
            biased=None if bias else (1,),
            dtype=dtype,
            name="key_value",
        )(context)
        return query, both[:, :, 0], both[:, :, 1]


class Mlp(nn.Module):
    """Two linear layers with a GELU between (Scenic's initial values)."""

    options: BlockOptions

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        init = dict(
            kernel_init=nn.initializers.xavier_uniform(),
            bias_init=nn.initializers.normal(1e-6),
            dtype=self.options.dtype,
        )
        hidden = Linear((self.options.mlp,), name="in", **init)(x)
        hidden = nn.gelu(hidden, approximate=self.options.gelu == "tanh")
        return Linear(x.shape[-1:], name="out", **init)(hidden)


def drop_path(
    x: Float[Array, "b n d"], drop: depth.Drop | None, rescale: bool
) -> Float[Array, "b n d"]:
    """Stochastic depth: drops an example's whole branch; None drops nothing."""
    if drop is None:
        return x
    alive = jax.random.bernoulli(drop.key, drop.keep, (len(x), 1, 1)).astype(x.dtype)
    return x * alive / (drop.keep.astype(x.dtype) if rescale else 1.0)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); `drop` may drop either branch.

    With `context` the tokens attend to it and not to each other.
    """

    options: BlockOptions

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b n d"],
        present: Bool[Array, "b k"] | None = None,
        context: Float[Array, "b k d"] | None = None,
        drop: depth.Drop | None = None,
    ) -> Float[Array, "b n d"]:
        options, drops = self.options, depth.two(drop)
        norm = dict(epsilon=options.eps, dtype=options.dtype)
        y = nn.LayerNorm(name="norm_1", **norm)(x)
        y = Attention(options, name="attention")(y, present, context)
        y = self._scaled(y, "scale_1")
        x = x + drop_path(y, drops[0], options.drop_path_rescale)
        y = nn.LayerNorm(name="norm_2", **norm)(x)
        y = self._scaled(Mlp(options, name="mlp")(y), "scale_2")
        return x + drop_path(y, drops[1], options.drop_path_rescale)

    def _scaled(self, y: Array, name: str) -> Array:
        """Layer scale, where the options have it."""
        if self.options.layer_scale == 0.0:
            return y
        init = nn.initializers.constant(self.options.layer_scale)
        return y * self.param(name, init, y.shape[-1:], jnp.float32).astype(y.dtype)


def drop_path_rates(rate: float, depth: int) -> tuple[float, ...]:
    """Rates rising linearly from 0 in the first layer to `rate` in the last."""
    return tuple(rate * i / max(depth - 1, 1) for i in range(depth))


def last_norm(options: BlockOptions, **name) -> nn.LayerNorm:
    """The LayerNorm after the last block."""
    eps = options.eps if options.last_eps is None else options.last_eps
    return nn.LayerNorm(eps, dtype=options.dtype, **name)


class Stack(nn.Module):
    """Blocks block_0 … and a final LayerNorm; one drop path rate for each block."""

    options: BlockOptions
    rates: tuple[float, ...]
    final_norm: bool = True

    def setup(self):
        for i in range(len(self.rates)):
            setattr(self, f"block_{i}", Block(self.options))
        if self.final_norm:
            self.norm = last_norm(self.options)

    def layer(
        self,
        i: int,
        x: Array,
        present: Array | None = None,
        context: Array | None = None,
        drop: depth.Drop | None = None,
    ) -> Array:
        """Block i alone."""
        return getattr(self, f"block_{i}")(x, present, context, drop)

    def parameters(self, i: int):
        """Those of block i."""
        return self.variables["params"][f"block_{i}"]

    def detached(self) -> Block:
        """A block that is bound to no parameters."""
        return Block(self.options, parent=None)

    def drop(self, i: int, train: bool) -> depth.Drop | None:
        """What drop path draws for block i; None where no block drops anything."""
        if not train or not any(self.rates):
            return None
        keep = jnp.float32(1.0 - self.rates[i])
        return depth.Drop(keep, self.make_rng("drop_path"))

    def __call__(
        self,
        x: Float[Array, "b n d"],
        present: Bool[Array, "b k"] | None = None,
        train: bool = False,
        context: Float[Array, "b k d"] | None = None,
    ) -> Float[Array, "b n d"]:
        one = lambda calls, x: calls["self"](x, present, context)
        x = depth.through({"self": self}, range(len(self.rates)), one, x, train)
        return self.norm(x) if self.final_norm else x
