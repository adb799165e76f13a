"""The T5 family as `Model`s: T5 (Raffel et al. 2019, arXiv 1910.10683), T5 v1.1, Flan-T5, mT5, umT5.

The encoder runs once, in `prefill`; what the decoder needs of it, the keys and values of the cross-attention, lies in
the cache next to those of the text. From then on an encoder-decoder is a decoder like any other.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from specjax.models import cache as cache_lib
from specjax.models import feed_forward, layers, linear, modules, relative
from specjax.models.attention import attend
from specjax.models.config import T5Config
from specjax.models.dropout import drop, within
from specjax.models.linear import Matrix
from specjax.models.relative import relative_bias
from specjax.parallel import sharding
from specjax.types import NO_SKIPS, Batch, Block, Dropout, Inputs, Model, ModelOutput, Skips, Tree

NO_LIMIT = 2**31 - 1
"""Relative positions have no end."""


class Cache(NamedTuple):
    """Keys and values of every decoder layer.

    The invariant of `models.cache` holds for `keys`, `values` and `length`; the others are written once.

    Attributes:
      keys: the keys of the text, one `[B, heads, L, head_dim]` array per layer.
      values: in the same layout as `keys`.
      length: `[B]` the number of valid entries of each row.
      source_keys: the keys of the encoder's output, one `[B, heads, S, head_dim]` array per layer; S = 0 before the
        prefill.
      source_values: in the same layout as `source_keys`.
      source_length: `[B]` the number of tokens of each row's source.
      source_inputs: its embeddings, where masks read a copy of them (`T5Config.copy_source`); else nothing.
    """

    keys: tuple[Float[Array, "B H L E"], ...]
    values: tuple[Float[Array, "B H L E"], ...]
    length: Int[Array, " B"]
    source_keys: tuple[Float[Array, "B H S E"], ...]
    source_values: tuple[Float[Array, "B H S E"], ...]
    source_length: Int[Array, " B"]
    source_inputs: tuple[Float[Array, "B S D"], ...] = ()


def _normal(*deviations: float) -> nnx.Initializer:
    """Normal initialiser; several deviations are one for each entry of the second-to-last axis."""

    def make(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
        scale = jnp.asarray(deviations)[:, None] if len(deviations) > 1 else max(deviations)
        return (jax.random.normal(key, shape) * scale).astype(dtype)

    return make


class SelfAttention(nnx.Module):
    """Attention without a scale, with positions as a bias; one product computes queries, keys and values."""

    def __init__(self, config: T5Config, rules: sharding.Rules, rngs: nnx.Rngs, *, has_bias: bool):
        """Declares the parameters; the standard deviations are those of T5's initialisation."""
        c, self.rules = config, rules
        heads, deviation = (c.num_heads, 3, c.head_dim), c.hidden_size**-0.5
        self.qkv = Matrix(
            rngs,
            (c.hidden_size, *heads),
            ("embed", "kv_heads", "qkv", "head_dim"),
            c.dtype,
            how=c.quantisation,
            init=_normal(deviation * c.head_dim**-0.5, deviation, deviation),
        )
        self.out = _out(c, rngs)
        if has_bias:
            shape = (c.num_buckets, c.num_heads)
            self.bias = modules.parameter(rngs, shape, ("buckets", "kv_heads"), c.dtype, init=_normal(deviation))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        mask: Bool[Array, "#B T S"],
        bias: Float[Array, "#B H T S"],
        keys: Float[Array, "B H S E"],
        values: Float[Array, "B H S E"],
        start: Int[Array, " B"] | None,
        dropout: Dropout | None = None,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B H S E"], Float[Array, "B H S E"]]:
        """Writes the tokens' keys and values into the cache, and attends to the entries that `mask` allows."""
        qkv = self.qkv(x)
        keys = cache_lib.constrain(cache_lib.write(keys, qkv[:, :, :, 1], start), self.rules)
        new_values, broken = qkv[:, :, :, 2], None
        if start is not None:
            new_values, broken = cache_lib.contain(new_values)
        values = cache_lib.constrain(cache_lib.write(values, new_values, start), self.rules)
        query = qkv[:, :, :, :1].astype(keys.dtype)
        dropped = functools.partial(drop, dropout=dropout, place="attention weights")
        mixed = attend(query, keys, values, mask, bias, in_cache=start is not None, drop=dropped)
        if broken is not None:
            mixed = jnp.where(broken[:, :, :, None], jnp.nan, mixed)
        return self.out(mixed[:, :, :, 0]), keys, values


class CrossAttention(nnx.Module):
    """Attention from the text to the encoder's output."""

    def __init__(self, config: T5Config, rules: sharding.Rules, rngs: nnx.Rngs):
        """Declares the parameters."""
        c, self.rules, deviation = config, rules, config.hidden_size**-0.5
        self.dtype = c.dtype
        self.query = Matrix(
            rngs,
            (c.hidden_size, c.num_heads, c.head_dim),
            ("embed", "kv_heads", "head_dim"),
            c.dtype,
            how=c.quantisation,
            init=_normal(deviation * c.head_dim**-0.5),
        )
        self.key_value = Matrix(
            rngs,
            (c.hidden_size, c.num_heads, 2, c.head_dim),
            ("embed", "kv_heads", "qkv", "head_dim"),
            c.dtype,
            how=c.quantisation,
            init=_normal(deviation),
        )
        self.out = _out(c, rngs)

    def read(self, encoded: Float[Array, "B S D"]) -> tuple[Float[Array, "B H S E"], Float[Array, "B H S E"]]:
        """The keys and values of the encoder's output."""
        both = jnp.swapaxes(self.key_value(encoded).astype(self.dtype), 1, 2)
        keys, values = both[:, :, :, 0], both[:, :, :, 1]
        return cache_lib.constrain(keys, self.rules), cache_lib.constrain(values, self.rules)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        mask: Bool[Array, "B T S"],
        keys: Float[Array, "B H S E"],
        values: Float[Array, "B H S E"],
        dropout: Dropout | None = None,
    ) -> Float[Array, "B T D"]:
        """Attends to the source."""
        query = self.query(x)[:, :, :, None].astype(keys.dtype)
        dropped = functools.partial(drop, dropout=dropout, place="cross-attention weights")
        mixed = attend(query, keys, values, mask, drop=dropped)
        return self.out(mixed[:, :, :, 0])


def _out(c: T5Config, rngs: nnx.Rngs) -> Matrix:
    """The projection from the heads back to the residual."""
    init = _normal((c.num_heads * c.head_dim) ** -0.5)
    shape, axes = (c.num_heads, c.head_dim, c.hidden_size), ("kv_heads", "head_dim", "embed")
    return Matrix(rngs, shape, axes, c.dtype, how=c.quantisation, init=init, num_contracted=2)


class FeedForward(nnx.Module):
    """`down(activation(x in))`, or, gated (arXiv 2002.05202), `down(activation(x gate) * x up)` by one product."""

    def __init__(self, config: T5Config, rngs: nnx.Rngs):
        """Declares the parameters."""
        c = config
        self.activation = c.activation
        up = (c.hidden_size, 2 if c.gated else 1, c.intermediate_size)
        init = _normal(c.hidden_size**-0.5)
        self.up = Matrix(rngs, up, ("embed", "gate_up", "mlp"), c.dtype, how=c.quantisation, init=init)
        down, init = (c.intermediate_size, c.hidden_size), _normal(c.intermediate_size**-0.5)
        self.down = Matrix(rngs, down, ("mlp", "embed"), c.dtype, how=c.quantisation, init=init)

    def __call__(self, x: Float[Array, "B T D"], dropout: Dropout | None = None) -> Float[Array, "B T D"]:
        """The layer's contribution to the residual."""
        up = self.up(x)
        inner = feed_forward.ACTIVATIONS[self.activation](up[:, :, 0])
        return self.down(drop(inner * up[:, :, 1] if up.shape[2] == 2 else inner, dropout, "inner"))


class Layer(nnx.Module):
    """One layer of either side: self-attention, cross-attention in the decoder, feed-forward, each after a norm."""

    def __init__(self, config: T5Config, rules: sharding.Rules, rngs: nnx.Rngs, *, is_decoder: bool, has_bias: bool):
        """Declares the parameters."""
        c, self.eps = config, config.norm_eps
        self.attention_norm = _norm(c, rngs)
        self.attention = SelfAttention(c, rules, rngs, has_bias=has_bias)
        if is_decoder:
            self.cross_norm = _norm(c, rngs)
            self.cross = CrossAttention(c, rules, rngs)
        self.mlp_norm = _norm(c, rngs)
        self.mlp = FeedForward(c, rngs)

    def __call__(self, x: Float[Array, "B T D"], mask, bias, keys, values, start, source=None, dropout=None):
        """The residual stream after the layer, and the layer's updated keys and values.

        In the decoder, `source` is which tokens of the source each token attends to, and their keys and values.
        """
        x, keys, values = self.attend(x, mask, bias, keys, values, start, source, dropout)
        return self.feed_forward(x, dropout), keys, values

    def attend(self, x: Float[Array, "B T D"], mask, bias, keys, values, start, source=None, dropout=None):
        """The layer without its feed-forward."""
        normed = layers.rms_norm(x, self.attention_norm[...], self.eps)
        mixed, keys, values = self.attention(normed, mask, bias, keys, values, start, dropout)
        x = x + drop(mixed, dropout, "attention")
        if source is not None:
            mixed = self.cross(layers.rms_norm(x, self.cross_norm[...], self.eps), *source, dropout=dropout)
            x = x + drop(mixed, dropout, "cross-attention")
        return x, keys, values

    def feed_forward(self, x: Float[Array, "B T D"], dropout: Dropout | None = None) -> Float[Array, "B T D"]:
        """The layer without its attention."""
        return x + drop(self.mlp(layers.rms_norm(x, self.mlp_norm[...], self.eps), dropout), dropout, "mlp")


def _norm(c: T5Config, rngs: nnx.Rngs) -> nnx.Param:
    return modules.parameter(rngs, (c.hidden_size,), ("embed",), c.dtype, init=nnx.initializers.ones_init())


class T5(nnx.Module):
    """Embedding, encoder, decoder, head. The embedding table of a tied model is the head, `D -> V`."""

    taps: tuple[int, ...] = ()
    """The decoder's hidden states that are the features of its outputs (`types.Model.with_taps`)."""

    skips: Skips = NO_SKIPS
    """The decoder's sublayers that it leaves out (`types.Model.with_skips`)."""

    remat: bool = False
    """Whether gradients compute each layer again from its inputs, instead of keeping what is within it."""

    def __init__(self, config: T5Config, rules: sharding.Rules, rngs: nnx.Rngs):
        """Declares the parameters."""
        c = config
        self.config, self.rules = config, rules
        if not c.tie_embeddings:
            table = (c.vocab_size, c.hidden_size)
            self.embedding = modules.parameter(rngs, table, ("vocab", "embed"), c.dtype, init=_normal(1.0))

        def stack(number: int, is_decoder: bool) -> Any:
            bias = [i == 0 or c.bias_per_layer for i in range(number)]
            return nnx.List([Layer(c, rules, rngs, is_decoder=is_decoder, has_bias=has_bias) for has_bias in bias])

        self.encoder, self.encoder_norm = stack(c.num_encoder_layers, False), _norm(c, rngs)
        self.decoder, self.norm = stack(c.num_layers, True), _norm(c, rngs)
        init = _normal(1.0 if c.tie_embeddings and c.scale_outputs else c.hidden_size**-0.5)
        head, axes = (c.hidden_size, c.head_size), ("embed", "vocab")
        self.head = Matrix(rngs, head, axes, c.dtype, how=c.head_quantisation, init=init)
        if c.copy_source:
            zeros = nnx.initializers.zeros_init()
            self.copy_bias = modules.parameter(rngs, (c.num_buckets, 1), ("buckets", None), c.dtype, init=zeros)

    def embed(self, tokens: Int[Array, "B T"], extra: Float[Array, "X U"] | None = None) -> Float[Array, "B T D"]:
        """Looks tokens up.

        Ids beyond the table read `extra`, and without it the table's last row (a draft may know fewer tokens than its
        target).
        """
        c = self.config
        x = self.head.look_up(tokens) if c.tie_embeddings else linear.look_up(self.embedding[...], tokens)
        return linear.with_extra(x, tokens, extra, c.vocab_size)

    def encode(
        self, source: Int[Array, "B S"], mask: Bool[Array, "B S S"], dropout: Dropout | None = None
    ) -> Float[Array, "B S D"]:
        """The encoder's output; each token attends to those that `mask` allows."""
        c, (rows, size), dropout = self.config, source.shape, within(dropout, "encoder")
        x, bias = drop(self.embed(source), dropout, "embedding"), None
        empty = jnp.zeros((rows, c.num_heads, size, c.head_dim), c.dtype)
        for i, block in enumerate(self.encoder):
            if bias is None or c.bias_per_layer:
                positions = jnp.arange(size)
                distance = (positions[:, None] - positions)[None]
                bias = relative_bias(c, block.attention.bias[...], distance, bidirectional=True)
            run = modules.traced_once(block, remat=self.remat)
            x, _, _ = run(x, mask, bias, empty, empty, None, None, within(dropout, i))
        return drop(layers.rms_norm(x, self.encoder_norm[...], c.norm_eps), dropout, "output")

    def hidden(
        self,
        block: Block,
        cache: Cache,
        start: Int[Array, " B"] | None,
        packed: Batch | None = None,
        dropout: Dropout | None = None,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B T F D"], Cache]:
        """The decoder's last hidden states of a block after `start` entries, those of the taps, and the cache.

        A training batch fills an empty cache (`start` is None), and the segments of a row do not attend to each other.
        """
        c, tokens = self.config, block.tokens
        begin = jnp.zeros(tokens.shape[0], jnp.int32) if start is None else start
        positions = begin[:, None] + (jnp.arange(tokens.shape[1]) if block.depth is None else block.depth)
        mask, distance = layers.visible(cache.keys[0].shape[2], positions, begin, block.sees)
        if start is not None and block.sees is not None:
            start = start + (block.sees.shape[-1] - tokens.shape[1])
        size = cache.source_keys[0].shape[2]
        sees = jnp.arange(size) < cache.source_length[:, None, None]
        sees = jnp.broadcast_to(sees, (*tokens.shape, size))
        if packed is not None:
            assert packed.source_segments is not None  # `score` has checked it.
            mask &= layers.same_segment(packed.segments, packed.segments)
            sees = layers.same_segment(packed.segments, packed.source_segments)
        dropout, x = within(dropout, "decoder"), self.embed(tokens, block.embeddings)
        if c.copy_source:
            at, origin = positions, jnp.arange(size)[None]
            if packed is not None and packed.source_segments is not None:
                at, origin = packed.positions, relative.places(packed.source_segments)
            distance_to_source = at[:, :, None] - origin[:, None]
            found = relative.copied(c, self.copy_bias[...], distance_to_source, sees, cache.source_inputs[0])
            x = jnp.where((tokens == c.mask_token)[..., None], found, x)
        x, bias, states = drop(x, dropout, "embedding"), None, {}
        keys, values = list(cache.keys), list(cache.values)
        for i, layer in enumerate(self.decoder):
            states[i], dropped = x, within(dropout, i)
            if bias is None or c.bias_per_layer:
                bias = relative_bias(c, layer.attention.bias[...], distance, bidirectional=False)
            source = sees, cache.source_keys[i], cache.source_values[i]
            attends, feeds = i not in self.skips.attention, i not in self.skips.mlp
            if attends:
                run = modules.traced_once(layer, "__call__" if feeds else "attend", remat=self.remat)
                x, keys[i], values[i] = run(x, mask, bias, keys[i], values[i], start, source, dropped)
            elif feeds:
                x = modules.traced_once(layer, "feed_forward")(x, dropped)
        x = drop(layers.rms_norm(x, self.norm[...], c.norm_eps), dropout, "output")
        states[c.num_layers] = x
        features = [states[tap] for tap in self.taps]
        tapped = jnp.stack(features, axis=2) if features else x[:, :, None][:, :, :0]
        return x, tapped, cache._replace(keys=tuple(keys), values=tuple(values))

    def read(
        self, encoded: Float[Array, "B S D"], source: Int[Array, "B S"], length: Int[Array, " B"], cache: Cache
    ) -> Cache:
        """The cache with the keys and values of the encoder's output, and what masks copy of the source."""
        both = [block.cross.read(encoded) for block in self.decoder]
        keys, values = zip(*both, strict=True)
        inputs = (self.embed(source).astype(self.config.dtype),) if self.config.copy_source else ()
        return cache._replace(source_keys=keys, source_values=values, source_length=length, source_inputs=inputs)

    def read_source(self, inputs: Inputs, cache: Cache) -> Cache:
        """The cache with the keys and values of the prompts' sources.

        Raises:
          ValueError: for prompts without a source.
        """
        if inputs.source is None or inputs.source_length is None:
            raise ValueError(
                "An encoder-decoder reads inputs.source, which is None: its target is a decoder-only model, or the "
                "prompts were not made for it. Use an encoder-decoder target, or a decoder-only draft."
            )
        known = jnp.arange(inputs.source.shape[1]) < inputs.source_length[:, None]
        encoded = self.encode(inputs.source, jnp.broadcast_to(known[:, None], (*known.shape, known.shape[1])))
        return self.read(encoded, inputs.source, inputs.source_length, cache)

    def read_batch(
        self,
        batch: Batch,
        cache: Cache,
        dropout: Dropout | None = None,
        embeddings: Float[Array, "X E"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B T F D"], Cache]:
        """`hidden` of a training batch, with an empty cache.

        Raises:
          ValueError: for a batch without a source.
        """
        if batch.source is None or batch.source_segments is None:
            raise ValueError("An encoder-decoder trains on batches with a source, and this one's is None.")
        encoded = self.encode(batch.source, layers.same_segment(batch.source_segments, batch.source_segments), dropout)
        cache = self.read(encoded, batch.source, jnp.zeros(batch.source.shape[0], jnp.int32), cache)
        return self.hidden(Block(batch.tokens, None, batch.sees, embeddings), cache, None, batch, dropout)

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """The head, in float32."""
        if self.config.scale_outputs:
            hidden = hidden * self.config.hidden_size**-0.5
        logits = layers.all_logits(self.head(hidden), self.config.head_tokens, self.config.vocab_size)
        return sharding.constrain(logits, ("batch", "tokens", "vocab"), self.rules)


def _empty_cache(config: T5Config, rules: sharding.Rules, batch_size: int, max_len: int, max_source: int) -> Cache:
    def empty(size: int) -> tuple[Array, ...]:
        text = cache_lib.init(config.num_layers, batch_size, config.num_heads, size, config.head_dim, config.dtype)
        return tuple(cache_lib.constrain(x, rules) for x in text.keys)

    none = jnp.zeros(batch_size, jnp.int32)
    inputs = (jnp.zeros((batch_size, max_source, config.hidden_size), config.dtype),) if config.copy_source else ()
    return Cache(empty(max_len), empty(max_len), none, empty(max_source), empty(max_source), none, inputs)


@functools.cache
def model(config: T5Config, rules: sharding.Rules, taps: tuple[int, ...] = (), skips: Skips = NO_SKIPS) -> Model:
    """The pure functions of an encoder-decoder. Equal configurations give the same `Model`.

    Args:
      config: the shape.
      rules: logical to mesh axes, for its activations and cache under `jax.set_mesh`.
      taps: the decoder's hidden states that are its features (`types.Model.with_taps`).
      skips: the decoder's sublayers that it leaves out (`types.Model.with_skips`).
    """

    def module(params: Tree) -> T5:
        t5 = modules.merge(T5, config, rules, params)
        t5.taps, t5.skips = taps, skips
        return t5

    def init_cache(batch_size: int, max_len: int, max_source: int = 0) -> Cache:
        return _empty_cache(config, rules, batch_size, max_len, max_source)

    def prefill(params: Tree, inputs: Inputs, cache: Cache) -> tuple[ModelOutput, Cache]:
        t5 = module(params)
        cache = t5.read_source(inputs, cache)
        hidden, features, cache = t5.hidden(Block(inputs.tokens), cache, cache.length)
        last = jnp.take_along_axis(hidden, jnp.maximum(inputs.length - 1, 0)[:, None, None], axis=1)
        return ModelOutput(t5.logits(last), features), cache_lib.commit(cache, None, inputs.length)

    def apply(params: Tree, block: Block, cache: Cache) -> tuple[ModelOutput, Cache]:
        t5 = module(params)
        hidden, features, cache = t5.hidden(block, cache, cache.length)
        return ModelOutput(t5.logits(hidden), features), cache

    def score(
        params: Tree,
        batch: Batch,
        *,
        remat: bool = False,
        dropout: Dropout | None = None,
        embeddings: Float[Array, "X E"] | None = None,
    ) -> Float[Array, "B T V"]:
        t5 = module(params)
        t5.remat = remat
        return t5.logits(t5.read_batch(batch, init_cache(*batch.tokens.shape), dropout, embeddings)[0])

    def features(params: Tree, batch: Batch) -> Float[Array, "B T F D"]:
        return module(params).read_batch(batch, init_cache(*batch.tokens.shape))[1]

    def with_taps(taps: tuple[int, ...]) -> Model:
        return model(config, rules, layers.from_zero(taps, config.num_layers), skips)

    def with_skips(skips: Skips) -> Model:
        return model(config, rules, taps, layers.known_skips(skips, config.num_layers))

    decoded = config.vocab_size, NO_LIMIT, config.start_token
    return Model(
        init_cache,
        prefill,
        apply,
        cache_lib.commit,
        *decoded,
        score,
        with_taps,
        with_skips,
        config.num_layers,
        features,
    )
