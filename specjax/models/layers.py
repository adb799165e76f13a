"""The layers of the decoder-only models, as Flax NNX modules, and what all models share.

Every parameter names its logical axes beside its shape.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from specjax import sharding
from specjax.models import cache as cache_lib
from specjax.models.config import DecoderConfig, LinearRopeScaling


def parameter(
    rngs: nnx.Rngs,
    shape: Sequence[int],
    axes: sharding.Axes,
    dtype: str,
    *,
    init: Callable | None = None,
    num_contracted: int = 0,
) -> nnx.Param:
    """One parameter: its shape, logical axes, dtype and initialiser in one place.

    Args:
      rngs: random numbers.
      shape: of a matrix, the inputs' dimensions, then the outputs'; `stored` says how they lie in memory.
      axes: the logical axes, likewise.
      dtype: of the parameter.
      init: by default normal with deviation 0.02.
      num_contracted: how many dimensions are the inputs' that `linear` multiplies; 0: it is no matrix.
    """
    if len(shape) != len(axes):
        raise ValueError(f"A parameter of shape {tuple(shape)} needs as many logical axes, not {tuple(axes)}.")
    order = stored(len(shape), num_contracted, dtype)
    make = init or nnx.initializers.normal(0.02)
    value = jnp.transpose(make(rngs.params(), tuple(shape), jnp.dtype(dtype)), order)
    return nnx.Param(value, axes=tuple(axes[i] for i in order), num_contracted=num_contracted)


def outputs_first(dtype: jax.typing.DTypeLike) -> bool:
    """Whether a matrix of this dtype is stored `[out, in]`.

    CPUs multiply bfloat16 up to three times faster where the weights of one output lie together, and float32 where
    those of one input do. TPUs and GPUs do not mind.
    """
    return jnp.dtype(dtype).itemsize == 2


def rotated(num_axes: int, first: int) -> tuple[int, ...]:
    """The axes from `first` on, then those before it."""
    return (*range(first, num_axes), *range(first))


def stored(num_axes: int, num_contracted: int, dtype: jax.typing.DTypeLike) -> tuple[int, ...]:
    """The order in which the axes of a matrix, inputs before outputs, lie in memory."""
    return rotated(num_axes, num_contracted if outputs_first(dtype) else 0)


def _dot(x: Array, weight: Array, num_contracted: int) -> Array:
    if not outputs_first(weight.dtype):
        contracted = (tuple(range(x.ndim - num_contracted, x.ndim)), tuple(range(num_contracted)))
        return jax.lax.dot_general(x, weight, (contracted, ((), ())), preferred_element_type=jnp.float32)
    # As matrices: XLA would bring a weight of more axes into the order `[in, out]`, by a copy in every call.
    kept, outputs = x.shape[: x.ndim - num_contracted], weight.shape[: weight.ndim - num_contracted]
    rows, matrix = x.reshape(math.prod(kept), -1), weight.reshape(math.prod(outputs), -1)
    product = jax.lax.dot_general(rows, matrix, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    return product.reshape(*kept, *outputs)


def linear(x: Float[Array, "B T *i"], weight: Float[Array, "..."], num_contracted: int = 1) -> Float[Array, "B T *o"]:
    """The product over the last `num_contracted` axes of x, in the weight's dtype, accumulated in float32."""
    x = x.astype(weight.dtype)
    if weight.dtype != jnp.bfloat16 or x.shape[0] * x.shape[1] > 1:
        return _dot(x, weight, num_contracted)

    # XLA:CPU turns a one-row bf16 product into a vector kernel that converts every weight to float32 first, six
    # times slower than two rows.
    def two_rows(x: Array, weight: Array) -> Array:
        padded = jnp.concatenate([x, jnp.zeros_like(x)], axis=1)
        return _dot(padded, weight, num_contracted)[:, :1]

    return jax.lax.platform_dependent(
        x, weight, cpu=two_rows, default=lambda x, weight: _dot(x, weight, num_contracted)
    )


def rms_norm(x: Float[Array, "B T D"], scale: Float[Array, " D"], eps: float) -> Float[Array, "B T D"]:
    """Root-mean-square norm (arXiv 1910.07467) in float32."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * scale.astype(jnp.float32)


def rope_frequencies(config: DecoderConfig) -> Float[Array, " half"]:
    """The rotary angles per position in radians (arXiv 2104.09864, eq. 15), stretched as configured."""
    half = config.head_dim // 2
    frequencies = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if isinstance(scaling, LinearRopeScaling):
        return frequencies / scaling.factor
    turns = scaling.original_max_position * frequencies / (2 * jnp.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return frequencies * (keep + (1.0 - keep) / scaling.factor)


def rotate(
    x: Float[Array, "B T *h D"], cos: Float[Array, "B T half"], sin: Float[Array, "B T half"]
) -> Float[Array, "B T *h D"]:
    """Rotary positions: the two halves of the head dimension are the coordinates of each plane."""
    lift = (slice(None), slice(None)) + (None,) * (x.ndim - 3)
    cos, sin = cos[lift], sin[lift]
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def look_up(table: Float[Array, "..."], tokens: Int[Array, "B T"], *, transposed: bool) -> Float[Array, "B T D"]:
    """The embeddings of tokens, in float32; ids beyond the table read its last row.

    Args:
      table: `[V, D]`; or, transposed, a head `D -> V`, stored as `stored` says.
      tokens: a draft may know fewer of them than its target.
      transposed: whether the table is a head.
    """
    outputs_last = transposed and not outputs_first(table.dtype)
    tokens = jnp.minimum(tokens, table.shape[1 if outputs_last else 0] - 1)
    if outputs_last:
        return jnp.moveaxis(jnp.take(table, tokens, axis=1), 0, -1).astype(jnp.float32)
    return jnp.take(table, tokens, axis=0).astype(jnp.float32)


def same_segment(queries: Int[Array, "B T"], keys: Int[Array, "B S"]) -> Bool[Array, "B T S"]:
    """Which tokens of packed rows are of the same text; padding, segment 0, sees padding."""
    return queries[:, :, None] == keys[:, None, :]


def attend(
    query: Float[Array, "B T H G E"],
    keys: Float[Array, "B H S E"],
    values: Float[Array, "B H S E"],
    mask: Bool[Array, "#B T S"],
    bias: Float[Array, "#B H T S"] | None = None,
) -> Float[Array, "B T H G E"]:
    """Softmax attention of G query heads a key/value head, softmax and sums in float32.

    The queries of a group are gathered as rows of one matrix per key/value head: XLA:CPU runs that product two to eight
    times faster than the einsum over the five axes.

    Args:
      query: of T tokens, scaled.
      keys: of S tokens.
      values: likewise.
      mask: which tokens each sees.
      bias: what is added to the scores.
    """
    rows, time, heads, group, size = query.shape
    matrix = jnp.swapaxes(query, 1, 2).reshape(rows, heads, time * group, size)
    batch = ((0, 1), (0, 1))
    scores = jax.lax.dot_general(matrix, keys, (((3,), (3,)), batch), preferred_element_type=jnp.float32)
    scores = scores.reshape(rows, heads, time, group, -1)
    if bias is not None:
        scores = scores + bias[:, :, :, None]
    scores = jnp.where(mask[:, None, :, None, :], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype).reshape(rows, heads, time * group, -1)
    mixed = jax.lax.dot_general(weights, values, (((3,), (2,)), batch), preferred_element_type=jnp.float32)
    return jnp.swapaxes(mixed.reshape(rows, heads, time, group, size), 1, 2)


class Attention(nnx.Module):
    """Grouped-query attention (arXiv 2305.13245) over the cache.

    The projections are fused per key/value head, `D -> kv_heads, queries per group + key + value, head_dim`, so that
    one product makes all three and the split over `kv_heads` cuts none of them.
    """

    def __init__(self, config: DecoderConfig, rules: sharding.Rules, rngs: nnx.Rngs):
        """Declares the parameters."""
        c, group = config, config.num_heads // config.num_kv_heads
        self.config, self.rules = config, rules
        heads = (c.num_kv_heads, group + 2, c.head_dim)
        head_axes = ("kv_heads", "heads_per_group", "head_dim")
        self.qkv = parameter(rngs, (c.hidden_size, *heads), ("embed", *head_axes), c.dtype, num_contracted=1)
        out = (c.num_kv_heads, group, c.head_dim, c.hidden_size)
        self.out = parameter(rngs, out, (*head_axes, "embed"), c.dtype, num_contracted=3)
        if c.qkv_bias:
            self.qkv_bias = parameter(rngs, heads, head_axes, c.dtype)
        if c.output_bias:
            self.out_bias = parameter(rngs, (c.hidden_size,), ("embed",), c.dtype)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        rope: tuple[Float[Array, "B T half"], Float[Array, "B T half"]],
        mask: Bool[Array, "B T S"],
        keys: Float[Array, "B H S E"],
        values: Float[Array, "B H S E"],
        start: Int[Array, " B"] | None,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B H S E"], Float[Array, "B H S E"]]:
        """Writes the tokens' keys and values into the cache and attends to all that `mask` lets through."""
        group = self.config.num_heads // self.config.num_kv_heads
        qkv = linear(x, self.qkv[...])
        if self.config.qkv_bias:
            qkv = qkv + self.qkv_bias[...].astype(jnp.float32)
        query_key = rotate(qkv[:, :, :, : group + 1], *rope)
        keys = cache_lib.constrain(cache_lib.write(keys, query_key[:, :, :, group], start), self.rules)
        values = cache_lib.constrain(cache_lib.write(values, qkv[:, :, :, group + 1], start), self.rules)

        query = query_key[:, :, :, :group] * self.config.head_dim**-0.5
        mixed = attend(query.astype(keys.dtype), keys, values, mask)
        out = linear(mixed, self.out[...], num_contracted=3)
        if self.config.output_bias:
            out = out + self.out_bias[...].astype(jnp.float32)
        return out, keys, values


class FeedForward(nnx.Module):
    """SwiGLU (arXiv 2002.05202), gate and up projections fused in one product."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        """Declares the parameters."""
        c = config
        self.config = config
        gate_up = (c.hidden_size, 2, c.intermediate_size)
        self.gate_up = parameter(rngs, gate_up, ("embed", "gate_up", "mlp"), c.dtype, num_contracted=1)
        down = (c.intermediate_size, c.hidden_size)
        self.down = parameter(rngs, down, ("mlp", "embed"), c.dtype, num_contracted=1)
        if c.mlp_bias:
            self.gate_up_bias = parameter(rngs, (2, c.intermediate_size), ("gate_up", "mlp"), c.dtype)
            self.down_bias = parameter(rngs, (c.hidden_size,), ("embed",), c.dtype)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """`down(silu(gate(x)) * up(x))`."""
        gate_up = linear(x, self.gate_up[...])
        if self.config.mlp_bias:
            gate_up = gate_up + self.gate_up_bias[...].astype(jnp.float32)
        out = linear(jax.nn.silu(gate_up[:, :, 0]) * gate_up[:, :, 1], self.down[...])
        if self.config.mlp_bias:
            out = out + self.down_bias[...].astype(jnp.float32)
        return out


class Block(nnx.Module):
    """One layer: attention and feed-forward, each behind a norm and added to the float32 residual."""

    def __init__(self, config: DecoderConfig, rules: sharding.Rules, rngs: nnx.Rngs):
        """Declares the parameters."""
        ones = nnx.initializers.ones_init()
        self.eps = config.norm_eps
        self.attention_norm = parameter(rngs, (config.hidden_size,), ("embed",), config.dtype, init=ones)
        self.attention = Attention(config, rules, rngs)
        self.mlp_norm = parameter(rngs, (config.hidden_size,), ("embed",), config.dtype, init=ones)
        self.mlp = FeedForward(config, rngs)

    def __call__(self, x: Float[Array, "B T D"], rope, mask, keys, values, start):
        """The residual stream after the layer, and the layer's updated keys and values."""
        mixed, keys, values = self.attention(
            rms_norm(x, self.attention_norm[...], self.eps), rope, mask, keys, values, start
        )
        x = x + mixed
        return x + self.mlp(rms_norm(x, self.mlp_norm[...], self.eps)), keys, values
