"""The layers of the decoder-only models, as Flax NNX modules, and the norms that all models share.

Every parameter names its logical axes next to its shape; matrices are `linear.Matrix`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from specjax.models import cache as cache_lib
from specjax.models.attention_choice import Attend, Einsum, Seen
from specjax.models.config import DecoderConfig, LinearRopeScaling, LongRopeScaling
from specjax.models.dropout import drop
from specjax.models.experts import MixtureOfExperts
from specjax.models.feed_forward import FeedForward
from specjax.models.linear import Matrix
from specjax.models.modules import parameter
from specjax.parallel import sharding
from specjax.types import Dropout, Skips


class View(NamedTuple):
    """A layer's view of positions.

    Attributes:
      rope: cosine and sine of the rotary angles; None: no rotation.
      seen: which entries of the cache each token attends to.
      attend: how it attends to them.
    """

    rope: tuple[Float[Array, "B T half"], Float[Array, "B T half"]] | None
    seen: Seen
    attend: Attend = Einsum()


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
    """The factor of an RMS norm.

    For 1 + w, w is stored, as in published files, and the sum is float32: bfloat16 would round it to steps of 1/128.
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


NEVER = -1e9
"""The logit of a token that a reduced head lacks: its probability is 0, unless options forbid all others."""


def all_logits(logits: Float[Array, "B T N"], tokens: Sequence[int], vocab_size: int) -> Float[Array, "B T V"]:
    """The logits of all tokens, from those of some of them.

    So the distribution is one over the whole vocabulary, and rejection judges what was drawn from it as ever: with a
    reduced vocabulary (Zhao et al. 2025, arXiv 2502.14856) a draft proposes fewer tokens, and the text stays exact.

    Args:
      logits: those of a reduced head.
      tokens: its tokens, ascending; empty for all.
      vocab_size: V.
    """
    if not tokens:
        return logits
    # Read from a row that ends in NEVER, and not written to the places of the tokens: scatters are slow.
    place = np.full(vocab_size, len(tokens))
    place[np.asarray(tokens)] = np.arange(len(tokens))
    return jnp.take(jnp.pad(logits, ((0, 0), (0, 0), (0, 1)), constant_values=NEVER), place, axis=-1)


def rope_frequencies(config: DecoderConfig, *, windowed: bool = False) -> Float[Array, " half"]:
    """The rotary angles per position in radians (arXiv 2104.09864, eq. 15), stretched as configured."""
    half, theta, scaling = config.rotated // 2, config.rope_theta, config.rope_scaling
    if windowed and config.local_rope_theta is not None:
        theta, scaling = config.local_rope_theta, None
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if scaling is None:
        return frequencies
    if isinstance(scaling, LongRopeScaling):
        is_short = config.max_position <= scaling.original_max_position
        return frequencies / jnp.asarray(scaling.short if is_short else scaling.long, jnp.float32)
    if isinstance(scaling, LinearRopeScaling):
        return frequencies / scaling.factor
    turns = scaling.original_max_position * frequencies / (2 * jnp.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return frequencies * (keep + (1.0 - keep) / scaling.factor)


def rotation(
    config: DecoderConfig, positions: Int[Array, "B T"], *, windowed: bool = False
) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
    """Cosine and sine of the rotary angles at these positions, as `rotate` takes them."""
    angles = positions[:, :, None] * rope_frequencies(config, windowed=windowed)
    factor = getattr(config.rope_scaling, "attention_factor", 1.0)
    return (jnp.cos(angles), jnp.sin(angles)) if factor == 1.0 else (jnp.cos(angles) * factor, jnp.sin(angles) * factor)


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


def visible(
    size: int,
    positions: Int[Array, "B T"],
    length: Int[Array, " B"],
    sees: Bool[Array, "B T W"] | None,
) -> tuple[Bool[Array, "B T S"], Int[Array, "B T S"]]:
    """Which entries of a cache each token of a block attends to, and how many positions before it they are.

    Args:
      size: S, the number of entries of the cache.
      positions: the positions of the tokens.
      length: the number of committed entries.
      sees: see `Block.sees`.
    """
    slots = jnp.arange(size)
    distance = positions[:, :, None] - slots
    if sees is None:
        return distance >= 0, distance
    slots = slots - length[:, None, None]
    behind = jnp.broadcast_to(jnp.clip(slots, 0, sees.shape[-1] - 1), distance.shape)
    # The entries of a block that a token attends to are a path: as many positions apart as there are of them between.
    later = jnp.cumsum(sees[..., ::-1], axis=-1, dtype=jnp.int32)[..., ::-1]
    own = jnp.diagonal(later, sees.shape[-1] - sees.shape[-2], axis1=-2, axis2=-1)
    unseen = -sees.shape[-1]
    of_block = jnp.take_along_axis(jnp.where(sees, later - own[..., None], unseen), behind, axis=-1)
    of_block = jnp.where(slots < sees.shape[-1], of_block, unseen)
    return (slots < 0) | (of_block > unseen), jnp.where(slots < 0, distance, of_block)


def from_zero(taps: tuple[int, ...], num_layers: int) -> tuple[int, ...]:
    """Replaces negative indices of hidden states, which count from the last, by those that count from the first.

    Raises:
      ValueError: for an index out of range.
    """
    for tap in taps:
        if not -num_layers - 1 <= tap <= num_layers:
            raise ValueError(f"taps={taps}: a model of {num_layers} layers has the hidden states 0 to {num_layers}.")
    return tuple(tap % (num_layers + 1) for tap in taps)


def known_skips(skips: Skips, num_layers: int) -> Skips:
    """The sublayers to skip, without repetitions, in order.

    Raises:
      ValueError: for a layer that the model does not have.
    """
    for name, numbers in skips._asdict().items():
        for number in numbers:
            if not 0 <= number < num_layers:
                raise ValueError(f"Skips({name}={numbers}): a model of {num_layers} layers has 0 to {num_layers - 1}.")
    return Skips(*(tuple(sorted(set(numbers))) for numbers in skips))


def same_segment(queries: Int[Array, "B T"], keys: Int[Array, "B S"]) -> Bool[Array, "B T S"]:
    """Which tokens of packed rows are in the same segment; padding, segment 0, attends to padding."""
    return queries[:, :, None] == keys[:, None, :]


class Attention(nnx.Module):
    """Grouped-query attention (arXiv 2305.13245) over the cache.

    The projections are fused per key/value head, `D -> kv_heads, queries per group + key + value, head_dim`, so that
    one product makes all three and the split over `kv_heads` cuts none of them.
    """

    def __init__(self, config: DecoderConfig, rules: sharding.Rules, rngs: nnx.Rngs, inputs: int | None = None):
        """Declares the parameters; `inputs` is the width of what is read, by default that of the model."""
        c, group = config, config.num_heads // config.num_kv_heads
        self.config, self.rules = config, rules
        heads = (c.num_kv_heads, group + 2, c.head_dim)
        head_axes = ("kv_heads", "heads_per_group", "head_dim")
        self.qkv = Matrix(rngs, (inputs or c.hidden_size, *heads), ("embed", *head_axes), c.dtype, how=c.quantisation)
        out = (c.num_kv_heads, group, c.head_dim, c.hidden_size)
        self.out = Matrix(rngs, out, (*head_axes, "embed"), c.dtype, how=c.quantisation, num_contracted=3)
        if c.qkv_bias:
            self.qkv_bias = parameter(rngs, heads, head_axes, c.dtype)
        if c.output_bias:
            self.out_bias = parameter(rngs, (c.hidden_size,), ("embed",), c.dtype)
        if c.qk_norm:
            init = nnx.initializers.zeros_init() if c.norm == "rms_plus_one" else nnx.initializers.ones_init()
            # A scale for all heads, or for each of them.
            queries, keys = ((c.num_kv_heads, group), (c.num_kv_heads,)) if c.qk_norm_whole else ((), ())

            def scale(*heads: int) -> nnx.Param:
                axes = (*head_axes[: len(heads)], "head_dim")
                return parameter(rngs, (*heads, c.head_dim), axes, c.dtype, init=init)

            self.query_norm, self.key_norm = scale(*queries), scale(*keys)

    def __call__(
        self,
        x: Float[Array, "B T _"],
        view: View,
        keys: Float[Array, "B *L H S E"],
        values: Float[Array, "B *L H S E"],
        start: Int[Array, " B"] | None,
        layer: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B *L H S E"], Float[Array, "B *L H S E"]]:
        """Writes the tokens' keys and values into the cache, and attends to the entries that the view says.

        The cache is the layer's own, or that of all layers, of which this one has the index `layer`.
        """
        c = self.config
        group = c.num_heads // c.num_kv_heads
        qkv = self.qkv(x)
        if c.qkv_bias:
            qkv = qkv + self.qkv_bias[...].astype(jnp.float32)
        query_key = self.normed(qkv[:, :, :, : group + 1])
        if view.rope is not None:
            query_key = rotate(query_key, *view.rope)
        keys = cache_lib.constrain(cache_lib.write(keys, query_key[:, :, :, group], start, layer), self.rules)
        new_values, broken = qkv[:, :, :, group + 1], None
        if start is not None:
            new_values, broken = cache_lib.contain(new_values)
        values = cache_lib.constrain(cache_lib.write(values, new_values, start, layer), self.rules)
        query = query_key[:, :, :, :group] * (c.head_dim**-0.5 if c.query_scale is None else c.query_scale)
        query, cap, in_cache = query.astype(keys.dtype), c.attention_softcap, start is not None
        mixed = view.attend(query, keys, values, view.seen, layer, cap=cap, in_cache=in_cache)
        if broken is not None:
            mixed = jnp.where(broken[:, :, :, None], jnp.nan, mixed)
        out = self.out(mixed)
        if c.output_bias:
            out = out + self.out_bias[...].astype(jnp.float32)
        return out, keys, values

    def normed(self, query_key: Float[Array, "B T H G E"]) -> Float[Array, "B T H G E"]:
        """Each key/value head's queries, then its key, normed as configured."""
        c = self.config
        if not c.qk_norm:
            return query_key
        queries, keys = self.query_norm[...], self.key_norm[...]
        if not c.qk_norm_whole:
            scales = jnp.stack([queries] * (query_key.shape[3] - 1) + [keys])
            return rms_norm(query_key, scale_of(scales, c), c.norm_eps)
        parts = query_key[:, :, :, :-1], query_key[:, :, :, -1:]
        # The mean is one over all heads: where they are split over devices, it is that of all devices.
        roots = [jax.lax.rsqrt(jnp.mean(x * x, axis=(2, 3, 4), keepdims=True) + c.norm_eps) for x in parts]
        scales = scale_of(queries, c), scale_of(keys, c)[:, None]
        return jnp.concatenate(
            [x * root * scale.astype(jnp.float32) for x, root, scale in zip(parts, roots, scales, strict=True)], axis=3
        )


class Layer(nnx.Module):
    """One layer: attention and feed-forward, each after a norm (or both after one), added to the float32 residual."""

    def __init__(self, config: DecoderConfig, rules: sharding.Rules, rngs: nnx.Rngs):
        """Declares the parameters."""
        c = config
        self.config = config
        if c.pre_norms:
            declare_norm(self, "attention_norm", c, rngs)
        self.attention = Attention(c, rules, rngs)
        if c.pre_norms and not c.parallel:
            declare_norm(self, "mlp_norm", c, rngs)
        self.mlp = MixtureOfExperts(c, rules, rngs) if c.experts else FeedForward(c, rngs)
        if c.post_norms:
            declare_norm(self, "attention_post_norm", c, rngs)
            declare_norm(self, "mlp_post_norm", c, rngs)

    def __call__(self, x: Float[Array, "B T D"], view: View, keys, values, start, layer=None, dropout=None):
        """The residual stream after the layer, and the updated keys and values: its own, or those of all layers."""
        attended, keys, values = self.attend(x, view, keys, values, start, layer, dropout)
        # Where attention and feed-forward are parallel, both read the stream before the layer.
        return self.feed_forward(attended, x if self.config.parallel else attended, dropout), keys, values

    def attend(self, x: Float[Array, "B T D"], view: View, keys, values, start, layer=None, dropout=None):
        """The layer without its feed-forward."""
        normed = normalize(self, "attention_norm", self.config, x) if self.config.pre_norms else x
        mixed, keys, values = self.attention(normed, view, keys, values, start, layer)
        if self.config.post_norms:
            mixed = normalize(self, "attention_post_norm", self.config, mixed)
        return x + drop(mixed, dropout, "attention"), keys, values

    def feed_forward(
        self, x: Float[Array, "B T D"], before: Float[Array, "B T D"] | None = None, dropout: Dropout | None = None
    ) -> Float[Array, "B T D"]:
        """The layer without its attention: the stream x, to which is added what comes of the stream `before` (or x)."""
        norm, stream = "attention_norm" if self.config.parallel else "mlp_norm", x if before is None else before
        out = self.mlp(normalize(self, norm, self.config, stream) if self.config.pre_norms else stream)
        if self.config.post_norms:
            out = normalize(self, "mlp_post_norm", self.config, out)
        return x + drop(out, dropout, "mlp")
