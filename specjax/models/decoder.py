"""Decoder-only language models as `Model`s: one decoder, whose `DecoderConfig` says what it computes."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Float, Int

from specjax.models import cache as cache_lib
from specjax.models import layers, linear, modules
from specjax.models.cache import Cache
from specjax.models.config import DecoderConfig
from specjax.parallel import sharding
from specjax.types import Batch, Inputs, Model, ModelOutput, Tree

PREFILL_CHUNK = 512
"""Prompts are read at most so many tokens at a time: the scores of a whole one would grow with its square."""


Views = Mapping[bool, layers.View]
"""What layers without and with a window know of the tokens' places."""


class Decoder(nnx.Module):
    """Embedding, blocks, final norm, head. The table of a tied model is the head, `D -> V`."""

    def __init__(self, config: DecoderConfig, rules: sharding.Rules, rngs: nnx.Rngs):
        """Declares the parameters."""
        c = config
        self.config, self.rules = config, rules
        if not c.tie_embeddings:
            self.embedding = modules.parameter(rngs, (c.vocab_size, c.hidden_size), ("vocab", "embed"), c.dtype)
        if c.positions == "learned":
            table = (c.max_position, c.hidden_size)
            self.position_embedding = modules.parameter(rngs, table, ("positions", "embed"), c.dtype)
        blocks = [layers.Block(c, rules, rngs) for _ in range(c.num_layers)]
        self.layers: Any = _stack(blocks) if c.scan_layers else nnx.List(blocks)
        layers.declare_norm(self, "norm", c, rngs)
        head = (c.hidden_size, c.vocab_size)
        self.head = linear.Matrix(rngs, head, ("embed", "vocab"), c.dtype, int8=c.int8)
        if c.head_bias:
            self.head_bias = modules.parameter(rngs, (c.vocab_size,), ("vocab",), c.dtype)

    def embed(self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Looks tokens up, and learned positions.

        Ids beyond the table read its last row (a draft may know fewer tokens than its target), and so do positions: no
        text stands there, but padding may, and drafts beyond a text's limit.
        """
        c = self.config
        x = self.head.look_up(tokens) if c.tie_embeddings else linear.look_up(self.embedding[...], tokens)
        if c.scale_embeddings:
            x = x * np.asarray(math.sqrt(c.hidden_size), jnp.dtype(c.dtype)).astype(np.float32)
        if c.positions == "learned":
            x = x + linear.look_up(self.position_embedding[...], positions)
        return x

    def view(
        self, windowed: bool, places: Int[Array, "B T"], positions: Int[Array, "B T"], size: int, packed: Batch | None
    ) -> layers.View:
        """What layers with or without a window know of the tokens' places, in a cache of that size."""
        c, rope = self.config, None
        if c.positions == "rotary":
            angles = positions[:, :, None] * layers.rope_frequencies(c, windowed=windowed)
            rope = jnp.cos(angles), jnp.sin(angles)
        slots = jnp.arange(size)
        mask = slots <= places[:, :, None]
        if windowed and c.sliding_window is not None:
            mask &= slots > places[:, :, None] - c.sliding_window
        if packed is not None:
            mask &= layers.same_segment(packed.segments, packed.segments)
        return rope, mask

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        cache: Cache,
        start: Int[Array, " B"] | None,
        packed: Batch | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """The last hidden states of T tokens that stand at `start ..` of each row, and the cache with them in it.

        In a training batch, which fills the cache as a prefill does, the segments of a row do not see each other.
        """
        begin = jnp.zeros(tokens.shape[0], jnp.int32) if start is None else start
        places = begin[:, None] + jnp.arange(tokens.shape[1])
        positions = places if packed is None else packed.positions
        windowed = [self.config.is_windowed(i) for i in range(self.config.num_layers)]
        size = cache.keys[0].shape[-2]
        views = {kind: self.view(kind, places, positions, size, packed) for kind in sorted(set(windowed))}
        x, keys, values = self.run_layers(self.embed(tokens, positions), views, windowed, cache, start)
        x = layers.normalize(self, "norm", self.config, x)
        return x, Cache(keys, values, cache.length)

    def run_layers(
        self,
        x: Float[Array, "B T D"],
        views: Views,
        windowed: list[bool],
        cache: Cache,
        start: Int[Array, " B"] | None,
    ) -> tuple[Float[Array, "B T D"], tuple[Array, ...], tuple[Array, ...]]:
        """The residual stream after all layers, and the cache's keys and values."""
        keys, values = list(cache.keys), list(cache.values)
        for i, block in enumerate(self.layers):
            x, keys[i], values[i] = block(x, views[windowed[i]], keys[i], values[i], start)
        return x, tuple(keys), tuple(values)

    def read(self, tokens: Int[Array, "B P"], cache: Cache) -> tuple[Float[Array, "B P D"], Cache]:
        """`hidden` of whole prompts, in chunks of one width, of which the last may read some tokens again."""
        rows, width = tokens.shape
        num_chunks = -(-width // PREFILL_CHUNK)
        if num_chunks == 1:
            return self.hidden(tokens, cache, None)
        size = -(-width // num_chunks)
        starts = jnp.minimum(jnp.arange(num_chunks) * size, width - size)

        def read_chunk(carry: tuple[Array, Cache], start: Array) -> tuple[tuple[Array, Cache], None]:
            found, cache = carry
            chunk = jax.lax.dynamic_slice_in_dim(tokens, start, size, axis=1)
            hidden, cache = self.hidden(chunk, cache, jnp.full(rows, start))
            return (jax.lax.dynamic_update_slice_in_dim(found, hidden, start, axis=1), cache), None

        empty = jnp.zeros((rows, width, self.config.hidden_size), jnp.float32)
        found, cache = jax.lax.scan(read_chunk, (empty, cache), starts)[0]
        # NaN does not pass from a chunk to the next through the cache, but it must not be overlooked.
        broken = jnp.cumsum(jnp.isnan(jnp.sum(found, axis=-1)), axis=1) > 0
        return jnp.where(broken[..., None], jnp.nan, found), cache

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """The head, in float32."""
        logits = self.head(hidden)
        if self.config.head_bias:
            logits = logits + self.head_bias[...].astype(jnp.float32)
        logits = layers.softcap(logits, self.config.logit_softcap)
        return sharding.constrain(logits, ("batch", "tokens", "vocab"), self.rules)


def _stack(blocks: list[layers.Block]) -> layers.Block:
    """One block, each of whose parameters is that of all blocks, with an axis `layers` in front."""
    definition, first = nnx.split(blocks[0])
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), first, *(nnx.state(block) for block in blocks[1:]))
    for _, variable in nnx.to_flat_state(stacked):
        variable.set_metadata("axes", ("layers", *variable.get_metadata()["axes"]))
    return nnx.merge(definition, stacked)


class ScannedDecoder(Decoder):
    """A `Decoder` that runs one layer's program in a loop over the stacked parameters and cache of all."""

    def run_layers(self, x, views, windowed, cache, start):
        """As `Decoder.run_layers`."""
        definition, params = nnx.split(self.layers)

        def run_layer(carry: tuple[Array, Array, Array], layer: Any) -> tuple[tuple[Array, Array, Array], None]:
            params, number, is_windowed = layer
            view = next(iter(views.values()))
            if len(views) == 2:
                view = jax.tree.map(lambda yes, no: jnp.where(is_windowed, yes, no), views[True], views[False])
            x, keys, values = carry
            return nnx.merge(definition, params)(x, view, keys, values, start, number), None

        numbers = jnp.arange(self.config.num_layers)
        carry = x, cache.keys[0], cache.values[0]
        x, keys, values = jax.lax.scan(run_layer, carry, (params, numbers, jnp.asarray(windowed)))[0]
        return x, (keys,), (values,)


def module(config: DecoderConfig) -> type[Decoder]:
    """The module that computes a configuration."""
    return ScannedDecoder if config.scan_layers else Decoder


def repeat_kv_heads(config: DecoderConfig, mesh: Mesh | AbstractMesh | None, rules: sharding.Rules) -> DecoderConfig:
    """The shape with every key/value head as often as devices have to share it.

    Where a mesh splits the heads over more devices than there are, but no more than there are query heads, each device
    gets one head with the queries that are its own: weights and queries stay split, no product needs another
    all-reduce, and no device's cache is larger than it would be with that head whole.

    Args:
      config: the shape.
      mesh: where the parameters will be, or None.
      rules: logical to mesh axes.

    Returns:
      the shape, unchanged where the heads divide, or repeating does not help.
    """
    axis = dict(rules)["kv_heads"]
    if mesh is None or axis is None:
        return config
    devices = dict(mesh.shape).get(axis, 1)
    if config.num_kv_heads % devices == 0 or devices % config.num_kv_heads or config.num_heads % devices:
        return config
    return dataclasses.replace(config, num_kv_heads=devices)


@functools.cache
def model(config: DecoderConfig, rules: sharding.Rules) -> Model:
    """The pure functions of a decoder. Equal configurations give the same `Model`, so that nothing is retraced.

    Args:
      config: the shape.
      rules: logical to mesh axes, for its activations and cache under `jax.set_mesh`.
    """

    def bind(params: Tree) -> Decoder:
        return modules.merge(module(config), config, rules, params)

    def init_cache(batch_size: int, max_len: int) -> Cache:
        empty = cache_lib.init(
            config.num_layers, batch_size, config.num_kv_heads, max_len, config.head_dim, config.dtype
        )
        if config.scan_layers:
            empty = cache_lib.stack(empty)
        constrain = functools.partial(cache_lib.constrain, rules=rules)
        return Cache(tuple(map(constrain, empty.keys)), tuple(map(constrain, empty.values)), empty.length)

    def prefill(params: Tree, inputs: Inputs, cache: Cache) -> tuple[ModelOutput, Cache]:
        decoder = bind(params)
        hidden, cache = decoder.read(inputs.tokens, cache)
        last = jnp.take_along_axis(hidden, (inputs.length - 1)[:, None, None], axis=1)
        return ModelOutput(decoder.logits(last), hidden), cache._replace(length=inputs.length)

    def apply(params: Tree, tokens: Int[Array, "B T"], cache: Cache) -> tuple[ModelOutput, Cache]:
        decoder = bind(params)
        hidden, cache = decoder.hidden(tokens, cache, cache.length)
        cache = cache._replace(length=cache.length + tokens.shape[1])
        return ModelOutput(decoder.logits(hidden), hidden), cache

    def score(params: Tree, batch: Batch) -> Float[Array, "B T V"]:
        decoder = bind(params)
        return decoder.logits(decoder.hidden(batch.tokens, init_cache(*batch.tokens.shape), None, batch)[0])

    return Model(init_cache, prefill, apply, config.vocab_size, config.max_position, score=score)
