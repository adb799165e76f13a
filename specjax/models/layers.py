"""The layers of the decoder, as Flax NNX modules. Every parameter names its logical axes beside its shape."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from specjax import sharding
from specjax.models import cache as cache_lib
from specjax.models.config import DecoderConfig, LinearRopeScaling


def parameter(
    rngs: nnx.Rngs, shape: Sequence[int], axes: sharding.Axes, dtype: str, init: Callable | None = None
) -> nnx.Param:
    """One parameter: its shape, logical axes, dtype and initialiser (default: normal, deviation 0.02) in one place."""
    if len(shape) != len(axes):
        raise ValueError(f"A parameter of shape {tuple(shape)} needs as many logical axes, not {tuple(axes)}.")
    make = init or nnx.initializers.normal(0.02)
    return nnx.Param(make(rngs.params(), tuple(shape), jnp.dtype(dtype)), axes=tuple(axes))


def _dot(x: Array, weight: Array, num_contracted: int) -> Array:
    contracted = (tuple(range(x.ndim - num_contracted, x.ndim)), tuple(range(num_contracted)))
    return jax.lax.dot_general(x, weight, (contracted, ((), ())), preferred_element_type=jnp.float32)


def linear(x: Float[Array, "B T *i"], weight: Float[Array, "..."], num_contracted: int = 1) -> Float[Array, "B T *o"]:
    """`x @ weight` over the last `num_contracted` axes of x, in the weight's dtype, accumulated in float32."""
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


def attend(
    query: Float[Array, "B T H G E"],
    keys: Float[Array, "B H S E"],
    values: Float[Array, "B H S E"],
    mask: Bool[Array, "B T S"],
) -> Float[Array, "B T H G E"]:
    """Softmax attention of G query heads a key/value head, softmax and sums in float32.

    The queries of a group are gathered as rows of one matrix per key/value head: XLA:CPU runs that product two to eight
    times faster than the einsum over the five axes.
    """
    rows, time, heads, group, size = query.shape
    matrix = jnp.swapaxes(query, 1, 2).reshape(rows, heads, time * group, size)
    batch = ((0, 1), (0, 1))
    scores = jax.lax.dot_general(matrix, keys, (((3,), (3,)), batch), preferred_element_type=jnp.float32)
    scores = scores.reshape(rows, heads, time, group, -1)
    scores = jnp.where(mask[:, None, :, None, :], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype).reshape(rows, heads, time * group, -1)
    mixed = jax.lax.dot_general(weights, values, (((3,), (2,)), batch), preferred_element_type=jnp.float32)
    return jnp.swapaxes(mixed.reshape(rows, heads, time, group, size), 1, 2)


class Attention(nnx.Module):
    """Grouped-query attention (arXiv 2305.13245) over the cache.

    The projections are fused per key/value head: `[D, kv_heads, queries per group + key + value, head_dim]`, so that
    one product makes all three and the split over `kv_heads` cuts none of them.
    """

    def __init__(self, config: DecoderConfig, rules: sharding.Rules, rngs: nnx.Rngs):
        """Declares the parameters."""
        c, group = config, config.num_heads // config.num_kv_heads
        self.config, self.rules = config, rules
        heads = (c.num_kv_heads, group + 2, c.head_dim)
        head_axes = ("kv_heads", "heads_per_group", "head_dim")
        self.qkv = parameter(rngs, (c.hidden_size, *heads), ("embed", *head_axes), c.dtype)
        self.out = parameter(rngs, (c.num_kv_heads, group, c.head_dim, c.hidden_size), (*head_axes, "embed"), c.dtype)
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
        self.gate_up = parameter(rngs, (c.hidden_size, 2, c.intermediate_size), ("embed", "gate_up", "mlp"), c.dtype)
        self.down = parameter(rngs, (c.intermediate_size, c.hidden_size), ("mlp", "embed"), c.dtype)
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
        self.attention_norm = parameter(rngs, (config.hidden_size,), ("embed",), config.dtype, ones)
        self.attention = Attention(config, rules, rngs)
        self.mlp_norm = parameter(rngs, (config.hidden_size,), ("embed",), config.dtype, ones)
        self.mlp = FeedForward(config, rngs)

    def __call__(self, x: Float[Array, "B T D"], rope, mask, keys, values, start):
        """The residual stream after the layer, and the layer's updated keys and values."""
        mixed, keys, values = self.attention(
            rms_norm(x, self.attention_norm[...], self.eps), rope, mask, keys, values, start
        )
        x = x + mixed
        return x + self.mlp(rms_norm(x, self.mlp_norm[...], self.eps)), keys, values
