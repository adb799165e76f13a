"""The layers of the decoder-only models, as Flax NNX modules, and what all models share.

Every parameter names its logical axes beside its shape.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from specjax.models import bits
from specjax.models import cache as cache_lib
from specjax.models.config import DecoderConfig, LinearRopeScaling
from specjax.parallel import sharding

ACTIVATIONS = {
    "relu": jax.nn.relu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "silu": jax.nn.silu,
}

View = tuple[tuple[Float[Array, "B T half"], Float[Array, "B T half"]] | None, Bool[Array, "B T S"]]
"""What a layer knows of positions: cosine and sine of the rotary angles (None: no rotation), and the attention mask."""


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
      axes: the logical axes, in the order of `shape`.
      dtype: of the parameter.
      init: by default normal with deviation 0.02.
      num_contracted: how many dimensions are inputs, which `linear` contracts; 0: it is not a matrix.
    """
    if len(shape) != len(axes):
        raise ValueError(f"A parameter of shape {tuple(shape)} needs as many logical axes, not {tuple(axes)}.")
    order = stored(len(shape), num_contracted, dtype)
    make = init or nnx.initializers.normal(0.02)
    value = jnp.transpose(make(rngs.params(), tuple(shape), jnp.dtype(dtype)), order)
    return nnx.Param(value, axes=tuple(axes[i] for i in order), num_contracted=num_contracted)


def outputs_first(dtype: jax.typing.DTypeLike) -> bool:
    """Whether a matrix of this dtype is stored `[out, in]`.

    CPUs multiply bfloat16 and int8 up to three times faster where the weights of one output lie together, and float32
    where those of one input do. TPUs and GPUs do not mind.
    """
    return jnp.dtype(dtype).itemsize <= 2


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

    def product(a: Array, b: Array) -> Array:
        return jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)

    # XLA:CPU multiplies few rows by a tall matrix up to 1.4 times faster where the matrix is on the left.
    out = jax.lax.platform_dependent(rows, matrix, cpu=lambda rows, matrix: product(matrix, rows).T, default=product)
    return out.reshape(*kept, *outputs)


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


def _integers(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    return jnp.clip(jnp.round(42 * jax.random.normal(key, shape)), -127, 127).astype(dtype)


def declare_matrix(
    module: nnx.Module,
    name: str,
    config: DecoderConfig,
    rngs: nnx.Rngs,
    shape: Sequence[int],
    axes: sharding.Axes,
    num_contracted: int = 1,
) -> None:
    """Declares a matrix, `name`, and if the configuration has int8 matrices its outputs' scales, `name_scale`."""
    dtype, init = ("int8", _integers) if config.int8 else (config.dtype, None)
    setattr(module, name, parameter(rngs, shape, axes, dtype, init=init, num_contracted=num_contracted))
    if config.int8:
        outputs, init = shape[num_contracted:], nnx.initializers.constant(0.02 / 42)
        setattr(module, f"{name}_scale", parameter(rngs, outputs, axes[num_contracted:], "float32", init=init))


def multiply(
    module: nnx.Module, name: str, x: Float[Array, "B T *i"], num_contracted: int = 1
) -> Float[Array, "B T *o"]:
    """The product with the matrix that `declare_matrix` declared, in float32."""
    weight, scale = getattr(module, name)[...], getattr(module, f"{name}_scale", None)
    if scale is None:
        return linear(x, weight, num_contracted)
    return linear_int8(x, weight, scale[...], num_contracted)


def quantise(weight: Float[Array, "..."], num_contracted: int) -> tuple[Int[Array, "..."], Float[Array, "..."]]:
    """A matrix in int8, `[out, in]`, and the float32 scale of each output: the largest weight is 127 of them.

    Args:
      weight: as `stored` says.
      num_contracted: how many of its axes are the inputs'.
    """
    if not outputs_first(weight.dtype):
        weight = jnp.transpose(weight, rotated(weight.ndim, num_contracted))
    inputs = tuple(range(weight.ndim - num_contracted, weight.ndim))
    weight = weight.astype(jnp.float32)
    largest = jnp.max(jnp.abs(weight), axis=inputs)
    scale = jnp.where(largest > 0, largest, 1.0) / 127
    return jnp.round(weight / jnp.expand_dims(scale, inputs)).astype(jnp.int8), scale


def linear_int8(
    x: Float[Array, "B T *i"], weight: Int[Array, "..."], scale: Float[Array, "*o"], num_contracted: int = 1
) -> Float[Array, "B T *o"]:
    """The product with a matrix of `quantise`, in float32.

    CPUs multiply int8 by int8: every x is rounded to 15 bits of its row's largest, and its upper and lower seven make
    two rows, of which no fewer are multiplied anyway (`linear`). Sums of integers are exact, so a result does not
    depend on how many rows there are. Elsewhere the weights are converted to bfloat16 as they are read.
    """
    kept, outputs = x.shape[: x.ndim - num_contracted], scale.shape
    rows, matrix = x.reshape(math.prod(kept), -1).astype(jnp.float32), weight.reshape(math.prod(outputs), -1)

    def integers(rows: Array, matrix: Array) -> Array:
        step = jnp.maximum(jnp.max(jnp.abs(rows), axis=1, keepdims=True), 1e-30) / (127 * 128)
        whole = jnp.round(rows / step).astype(jnp.int32)
        both = jnp.concatenate([whole >> 7, whole & 127]).astype(jnp.int8)
        product = jax.lax.dot_general(matrix, both, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
        upper, lower = jnp.split(product.T.astype(jnp.float32), 2)
        return (128 * upper + lower) * step

    def floats(rows: Array, matrix: Array) -> Array:
        return _dot(rows.astype(jnp.bfloat16), matrix.astype(jnp.bfloat16), 1)

    out = jax.lax.platform_dependent(rows, matrix, cpu=integers, default=floats)
    return (out * scale.reshape(-1)).reshape(*kept, *outputs)


def rms_norm(x: Float[Array, "... D"], scale: Float[Array, "... D"], eps: float) -> Float[Array, "... D"]:
    """Root-mean-square norm (arXiv 1910.07467) in float32."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * scale.astype(jnp.float32)


def declare_norm(module: nnx.Module, name: str, config: DecoderConfig, rngs: nnx.Rngs) -> None:
    """Declares a norm's scale, `name`, and a LayerNorm's bias, `name_bias`, as parameters of the module."""
    ones, zeros = nnx.initializers.ones_init(), nnx.initializers.zeros_init()
    shape, axes = (config.hidden_size,), ("embed",)
    init = zeros if config.norm == "rms_plus_one" else ones
    setattr(module, name, parameter(rngs, shape, axes, config.dtype, init=init))
    if config.norm == "layer":
        setattr(module, f"{name}_bias", parameter(rngs, shape, axes, config.dtype, init=zeros))


def scale_of(weight: Float[Array, "..."], config: DecoderConfig) -> Float[Array, "..."]:
    """What an RMS norm multiplies by.

    Of 1 + w, w is stored, as in published files, and the sum is float32: bfloat16 would round it to steps of 1/128.
    """
    return 1.0 + weight.astype(jnp.float32) if config.norm == "rms_plus_one" else weight


def normalize(module: nnx.Module, name: str, config: DecoderConfig, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """The norm that `declare_norm` declared, in float32."""
    weight = getattr(module, name)[...]
    if config.norm != "layer":
        return rms_norm(x, scale_of(weight, config), config.norm_eps)
    # LayerNorm: arXiv 1607.06450.
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    return rms_norm(centred, weight, config.norm_eps) + getattr(module, f"{name}_bias")[...].astype(jnp.float32)


def softcap(x: Float[Array, "..."], cap: float | None) -> Float[Array, "..."]:
    """`c tanh(x / c)`, which bounds x to (-c, c) (Gemma 2, arXiv 2408.00118, section 2); None: x."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def rope_frequencies(config: DecoderConfig, *, windowed: bool = False) -> Float[Array, " half"]:
    """The rotary angles per position in radians (arXiv 2104.09864, eq. 15), stretched as configured."""
    half, theta, scaling = config.rotated // 2, config.rope_theta, config.rope_scaling
    if windowed and config.local_rope_theta is not None:
        theta, scaling = config.local_rope_theta, None
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
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
    """Rotary positions: the two halves of the first `2 * half` dimensions are the coordinates of each plane."""
    lift = (slice(None), slice(None)) + (None,) * (x.ndim - 3)
    size = 2 * cos.shape[-1]
    cos, sin = cos[lift], sin[lift]
    a, b = jnp.split(x if size == x.shape[-1] else x[..., :size], 2, axis=-1)
    turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return turned if size == x.shape[-1] else jnp.concatenate([turned, x[..., size:]], axis=-1)


def look_up(
    table: Float[Array, "..."] | Int[Array, "V D"],
    tokens: Int[Array, "B T"],
    *,
    transposed: bool,
    scale: Float[Array, " V"] | None = None,
) -> Float[Array, "B T D"]:
    """The embeddings of tokens, in float32; ids beyond the table read its last row.

    Args:
      table: `[V, D]`; or, transposed, a head `D -> V`, stored as `stored` says.
      tokens: a draft may know fewer of them than its target.
      transposed: whether the table is a head.
      scale: of an int8 head's outputs.
    """
    outputs_last = transposed and not outputs_first(table.dtype)
    tokens = jnp.minimum(tokens, table.shape[1 if outputs_last else 0] - 1)
    if outputs_last:
        return jnp.moveaxis(jnp.take(table, tokens, axis=1), 0, -1).astype(jnp.float32)
    found = bits.moved(lambda table, tokens: jnp.take(table, tokens, axis=0), (table,), tokens).astype(jnp.float32)
    return found if scale is None else found * jnp.take(scale, tokens, axis=0)[..., None]


def visible(
    size: int,
    positions: Int[Array, "B T"],
    length: Int[Array, " B"],
    sees: Bool[Array, "B T W"] | None,
) -> tuple[Bool[Array, "B T S"], Int[Array, "B T S"]]:
    """Which entries of a cache each token of a block sees, and how many positions before it they stand.

    Args:
      size: S, entries of the cache.
      positions: of the tokens.
      length: the number of committed entries.
      sees: see `Block.sees`.
    """
    slots = jnp.arange(size)
    distance = positions[:, :, None] - slots
    if sees is None:
        return distance >= 0, distance
    slots = slots - length[:, None, None]
    behind = jnp.broadcast_to(jnp.clip(slots, 0, sees.shape[-1] - 1), distance.shape)
    # What a token sees of a block is a path that ends with itself.
    later = jnp.cumsum(sees[..., ::-1], axis=-1, dtype=jnp.int32)[..., ::-1] - 1
    of_block = jnp.take_along_axis(jnp.where(sees, later, -1), behind, axis=-1)
    of_block = jnp.where(slots < sees.shape[-1], of_block, -1)
    return (slots < 0) | (of_block >= 0), jnp.where(slots < 0, distance, of_block)


def from_zero(taps: tuple[int, ...], num_layers: int) -> tuple[int, ...]:
    """Numbers of hidden states, of which negative ones count from the last, counted from the first.

    Raises:
      ValueError: for a number that no hidden state has.
    """
    for tap in taps:
        if not -num_layers - 1 <= tap <= num_layers:
            raise ValueError(f"taps={taps}: a model of {num_layers} layers has the hidden states 0 to {num_layers}.")
    return tuple(tap % (num_layers + 1) for tap in taps)


def same_segment(queries: Int[Array, "B T"], keys: Int[Array, "B S"]) -> Bool[Array, "B T S"]:
    """Which tokens of packed rows are of the same text; padding, segment 0, sees padding."""
    return queries[:, :, None] == keys[:, None, :]


def attend(
    query: Float[Array, "B T H G E"],
    keys: Float[Array, "B H S E"],
    values: Float[Array, "B H S E"],
    mask: Bool[Array, "#B T S"],
    bias: Float[Array, "#B H T S"] | None = None,
    cap: float | None = None,
) -> Float[Array, "B T H G E"]:
    """Softmax attention of G query heads a key/value head, softmax and sums in float32.

    The queries of a group are gathered as rows of one matrix per key/value head: XLA:CPU runs that product two to eight
    times faster than the einsum over the five axes.

    Args:
      query: of T tokens, scaled.
      keys: of S tokens.
      values: of the same S tokens.
      mask: which tokens each sees.
      bias: what is added to the scores.
      cap: what bounds the scores, see `softcap`.
    """
    rows, time, heads, group, size = query.shape
    matrix = jnp.swapaxes(query, 1, 2).reshape(rows, heads, time * group, size)
    batch = ((0, 1), (0, 1))
    scores = jax.lax.dot_general(matrix, keys, (((3,), (3,)), batch), preferred_element_type=jnp.float32)
    scores = scores.reshape(rows, heads, time, group, -1)
    scores = softcap(scores, cap)
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
        declare_matrix(self, "qkv", c, rngs, (c.hidden_size, *heads), ("embed", *head_axes))
        out = (c.num_kv_heads, group, c.head_dim, c.hidden_size)
        declare_matrix(self, "out", c, rngs, out, (*head_axes, "embed"), num_contracted=3)
        if c.qkv_bias:
            self.qkv_bias = parameter(rngs, heads, head_axes, c.dtype)
        if c.output_bias:
            self.out_bias = parameter(rngs, (c.hidden_size,), ("embed",), c.dtype)
        if c.qk_norm:
            init = nnx.initializers.zeros_init() if c.norm == "rms_plus_one" else nnx.initializers.ones_init()
            self.query_norm = parameter(rngs, (c.head_dim,), ("head_dim",), c.dtype, init=init)
            self.key_norm = parameter(rngs, (c.head_dim,), ("head_dim",), c.dtype, init=init)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        view: View,
        keys: Float[Array, "B *L H S E"],
        values: Float[Array, "B *L H S E"],
        start: Int[Array, " B"] | None,
        layer: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B *L H S E"], Float[Array, "B *L H S E"]]:
        """Writes the tokens' keys and values into the cache and attends to all that the view's mask lets through.

        The cache is the layer's own, or that of all layers, of which this is number `layer`.
        """
        c, (rope, mask) = self.config, view
        group = c.num_heads // c.num_kv_heads
        qkv = multiply(self, "qkv", x)
        if c.qkv_bias:
            qkv = qkv + self.qkv_bias[...].astype(jnp.float32)
        query_key = qkv[:, :, :, : group + 1]
        if c.qk_norm:
            scales = jnp.stack([self.query_norm[...]] * group + [self.key_norm[...]])
            query_key = rms_norm(query_key, scale_of(scales, c), c.norm_eps)
        if rope is not None:
            query_key = rotate(query_key, *rope)
        keys = cache_lib.constrain(cache_lib.write(keys, query_key[:, :, :, group], start, layer), self.rules)
        new_values, broken = qkv[:, :, :, group + 1], None
        if start is not None:
            new_values, broken = cache_lib.contain(new_values)
        values = cache_lib.constrain(cache_lib.write(values, new_values, start, layer), self.rules)
        own_keys, own_values = cache_lib.of_layer(keys, layer), cache_lib.of_layer(values, layer)

        query = query_key[:, :, :, :group] * (c.head_dim**-0.5 if c.query_scale is None else c.query_scale)
        mixed = attend(query.astype(keys.dtype), own_keys, own_values, mask, cap=c.attention_softcap)
        if broken is not None:
            mixed = jnp.where(broken[:, :, :, None], jnp.nan, mixed)
        out = multiply(self, "out", mixed, num_contracted=3)
        if c.output_bias:
            out = out + self.out_bias[...].astype(jnp.float32)
        return out, keys, values


class FeedForward(nnx.Module):
    """A feed-forward; gated (arXiv 2002.05202), gate and up projections are fused in one product."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        """Declares the parameters. Ungated, `gate_up` is the up projection alone."""
        c = config
        self.config = config
        inner = (2 if c.gated else 1, c.intermediate_size)
        declare_matrix(self, "gate_up", c, rngs, (c.hidden_size, *inner), ("embed", "gate_up", "mlp"))
        declare_matrix(self, "down", c, rngs, (c.intermediate_size, c.hidden_size), ("mlp", "embed"))
        if c.mlp_bias:
            self.gate_up_bias = parameter(rngs, inner, ("gate_up", "mlp"), c.dtype)
            self.down_bias = parameter(rngs, (c.hidden_size,), ("embed",), c.dtype)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """`down(activation(gate(x)) * up(x))`, or `down(activation(up(x)))`."""
        gate_up = multiply(self, "gate_up", x)
        if self.config.mlp_bias:
            gate_up = gate_up + self.gate_up_bias[...].astype(jnp.float32)
        inner = ACTIVATIONS[self.config.activation](gate_up[:, :, 0])
        out = multiply(self, "down", inner * gate_up[:, :, 1] if self.config.gated else inner)
        if self.config.mlp_bias:
            out = out + self.down_bias[...].astype(jnp.float32)
        return out


class Layer(nnx.Module):
    """One layer: attention and feed-forward, each behind a norm (or both behind one), added to the float32 residual."""

    def __init__(self, config: DecoderConfig, rules: sharding.Rules, rngs: nnx.Rngs):
        """Declares the parameters."""
        c = config
        self.config = config
        declare_norm(self, "attention_norm", c, rngs)
        self.attention = Attention(c, rules, rngs)
        if not c.parallel:
            declare_norm(self, "mlp_norm", c, rngs)
        self.mlp = FeedForward(c, rngs)
        if c.post_norms:
            declare_norm(self, "attention_post_norm", c, rngs)
            declare_norm(self, "mlp_post_norm", c, rngs)

    def __call__(self, x: Float[Array, "B T D"], view: View, keys, values, start, layer=None):
        """The residual stream after the layer, and the updated keys and values: its own, or all of which it is one."""
        c = self.config
        normed = normalize(self, "attention_norm", c, x)
        mixed, keys, values = self.attention(normed, view, keys, values, start, layer)
        if c.post_norms:
            mixed = normalize(self, "attention_post_norm", c, mixed)
        x = x + mixed
        if not c.parallel:
            normed = normalize(self, "mlp_norm", c, x)
        out = self.mlp(normed)
        if c.post_norms:
            out = normalize(self, "mlp_post_norm", c, out)
        return x + out, keys, values
