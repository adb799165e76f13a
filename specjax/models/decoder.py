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

from specjax.models import attention, attention_choice, layers, linear, modules, quantisation
from specjax.models import cache as cache_lib
from specjax.models.attention_choice import Attend, Choice, Seen
from specjax.models.cache import Cache
from specjax.models.config import DecoderConfig
from specjax.models.dropout import within
from specjax.models.experts import distinct_experts
from specjax.parallel import sharding
from specjax.types import NO_SKIPS, Batch, Block, Dropout, Inputs, Model, ModelOutput, Skips, Tree

PREFILL_CHUNK = 512
"""The most tokens of a prompt that are read at a time: attention scores grow with the square of its length."""


Views = Mapping[bool, layers.View]
"""The views of layers without and with a window."""


class Decoder(nnx.Module):
    """Embedding, blocks, final norm, head. The embedding table of a tied model is the head, `D -> V`."""

    taps: tuple[int, ...] = ()
    """The hidden states that are the features of its outputs (`types.Model.with_taps`)."""

    skips: Skips = NO_SKIPS
    """The sublayers that it leaves out (`types.Model.with_skips`)."""

    remat: bool = False
    """Whether gradients compute each layer again from its inputs, instead of keeping what is within it."""

    def __init__(self, config: DecoderConfig, rules: sharding.Rules, rngs: nnx.Rngs):
        """Declares the parameters."""
        c = config
        self.config, self.rules = config, rules
        if not c.tie_embeddings:
            self.embedding = modules.parameter(rngs, (c.vocab_size, c.hidden_size), ("vocab", "embed"), c.dtype)
        if c.positions == "learned":
            table = (c.max_position, c.hidden_size)
            self.position_embedding = modules.parameter(rngs, table, ("positions", "embed"), c.dtype)
        blocks = [layers.Layer(c, rules, rngs) for _ in range(c.num_layers)]
        self.layers: Any = _stack(blocks) if c.scan_layers else nnx.List(blocks)
        layers.declare_norm(self, "norm", c, rngs)
        head = (c.hidden_size, c.head_size)
        self.head = linear.Matrix(rngs, head, ("embed", "vocab"), c.dtype, how=c.head_quantisation)
        if c.head_bias:
            self.head_bias = modules.parameter(rngs, (c.head_size,), ("vocab",), c.dtype)

    def embed(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], extra: Float[Array, "X U"] | None = None
    ) -> Float[Array, "B T D"]:
        """Looks up the embeddings of tokens, and learned positions.

        Ids beyond the table read `extra`, and without it the table's last row (a draft may know fewer tokens than its
        target). So do positions: only padding, and drafts beyond the limit of a sequence, are at such positions.
        """
        c = self.config
        x = self.head.look_up(tokens) if c.tie_embeddings else linear.look_up(self.embedding[...], tokens)
        x = linear.with_extra(x, tokens, extra, c.vocab_size)
        if c.scale_embeddings:
            x = x * np.asarray(math.sqrt(c.hidden_size), jnp.dtype(c.dtype)).astype(np.float32)
        if c.positions == "learned":
            x = x + linear.look_up(self.position_embedding[...], positions)
        return x

    def view(self, windowed: bool, seen: Seen, distance: Int[Array, "B T S"], attend: Attend) -> layers.View:
        """The view of layers with or without a window."""
        c, rope = self.config, None
        assert seen.positions is not None
        if c.positions == "rotary":
            rope = layers.rotation(c, seen.positions, windowed=windowed)
        if windowed and c.sliding_window is not None:
            seen = seen._replace(mask=seen.mask & (distance < c.sliding_window))
        if c.sliding_window is not None:
            seen = seen._replace(window=jnp.int32(c.sliding_window if windowed else attention_choice.EVERY))
        return layers.View(rope, seen, attend)

    def attend(self, block: Block, cache: Cache, start: Int[Array, " B"] | None) -> Attend:
        """How the layers attend to the cache: chosen from shapes, see `attention_choice`."""
        if start is None:
            return attention_choice.Einsum()
        rows, width = block.tokens.shape
        # Devices that rows are split over read the same parameters.
        mesh = jax.sharding.get_abstract_mesh()
        (axis,) = sharding.dividing((rows,), ("batch",), mesh, self.rules)
        own = rows if axis is None else rows / mesh.shape[axis]
        width = width if block.sees is None else block.sees.shape[-1]
        return attention_choice.of(choice(self.config, own, width, cache.keys[0].shape[-2]), self.rules)

    def hidden(
        self,
        block: Block,
        cache: Cache,
        start: Int[Array, " B"] | None,
        packed: Batch | None = None,
        dropout: Dropout | None = None,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B T F D"], Cache]:
        """The last hidden states of a block after `start` entries, those of the taps, and the updated cache.

        A training batch fills an empty cache (`start` is None), and the segments of a row do not attend to each other.
        """
        rows, width = block.tokens.shape
        begin = jnp.zeros(rows, jnp.int32) if start is None else start
        positions = begin[:, None] + (jnp.arange(width) if block.depth is None else block.depth)
        mask, distance = layers.visible(cache.keys[0].shape[-2], positions, begin, block.sees)
        bits = attention_choice.bits(block.sees, positions - begin[:, None])
        if packed is not None:
            positions = packed.positions
            mask &= layers.same_segment(packed.segments, packed.segments)
        windowed = [self.config.is_windowed(i) for i in range(self.config.num_layers)]
        seen, attend = Seen(mask, begin, bits, positions), self.attend(block, cache, start)
        views = {kind: self.view(kind, seen, distance, attend) for kind in sorted(set(windowed))}
        if start is not None and block.sees is not None:
            start = start + (block.sees.shape[-1] - width)
        x = self.embed(block.tokens, positions, block.embeddings)
        x, keys, values, states = self.run_layers(x, views, windowed, cache, start, dropout)
        x = layers.normalize(self, "norm", self.config, x)
        states[self.config.num_layers] = x
        features = [states[tap] for tap in self.taps]
        return (
            x,
            jnp.stack(features, axis=2) if features else x[:, :, None][:, :, :0],
            Cache(keys, values, cache.length),
        )

    def run_layers(
        self,
        x: Float[Array, "B T D"],
        views: Views,
        windowed: list[bool],
        cache: Cache,
        start: Int[Array, " B"] | None,
        dropout: Dropout | None = None,
    ) -> tuple[Float[Array, "B T D"], tuple[Array, ...], tuple[Array, ...], dict[int, Array]]:
        """The residual stream after all layers, the cache's keys and values, and the stream before each layer."""
        keys, values, states = list(cache.keys), list(cache.values), {}
        for i, block in enumerate(self.layers):
            states[i], view, dropped = x, views[windowed[i]], within(dropout, i)
            attends, feeds = i not in self.skips.attention, i not in self.skips.mlp
            if attends:
                run = modules.traced_once(block, "__call__" if feeds else "attend", remat=self.remat)
                x, keys[i], values[i] = run(x, view, keys[i], values[i], start, None, dropped)
            elif feeds:
                x = modules.traced_once(block, "feed_forward")(x, None, dropped)
        return x, tuple(keys), tuple(values), states

    def read(
        self, tokens: Int[Array, "B P"], cache: Cache
    ) -> tuple[Float[Array, "B P D"], Float[Array, "B P F D"], Cache]:
        """`hidden` for prompts, in chunks of equal width; the last chunk may read some tokens again."""
        rows, width = tokens.shape
        num_chunks = -(-width // PREFILL_CHUNK)
        if num_chunks == 1:
            return self.hidden(Block(tokens), cache, cache.length)
        size = -(-width // num_chunks)
        starts = jnp.minimum(jnp.arange(num_chunks) * size, width - size)

        def read_chunk(carry: Any, start: Array) -> tuple[Any, None]:
            found, features, cache = carry
            chunk = jax.lax.dynamic_slice_in_dim(tokens, start, size, axis=1)
            hidden, tapped, cache = self.hidden(Block(chunk), cache, cache.length + start)
            found = jax.lax.dynamic_update_slice_in_dim(found, hidden, start, axis=1)
            return (found, jax.lax.dynamic_update_slice_in_dim(features, tapped, start, axis=1), cache), None

        empty = jnp.zeros((rows, width, self.config.hidden_size), jnp.float32)
        taps = jnp.zeros((rows, width, len(self.taps), self.config.hidden_size), jnp.float32)
        found, features, cache = jax.lax.scan(read_chunk, (empty, taps, cache), starts)[0]
        # NaN does not pass through the cache from one chunk to the next, but it must not be overlooked.
        broken = jnp.cumsum(jnp.isnan(jnp.sum(found, axis=-1)), axis=1) > 0
        return jnp.where(broken[..., None], jnp.nan, found), features, cache

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """The head, in float32."""
        logits = self.head(hidden)
        if self.config.head_bias:
            logits = logits + self.head_bias[...].astype(jnp.float32)
        logits = attention.softcap(logits, self.config.logit_softcap)
        logits = layers.all_logits(logits, self.config.head_tokens, self.config.vocab_size)
        return sharding.constrain(logits, ("batch", "tokens", "vocab"), self.rules)


def _stack(blocks: list[layers.Layer]) -> layers.Layer:
    """One block whose parameters are those of all blocks, stacked along a leading axis `layers`."""
    definition, first = nnx.split(blocks[0])
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), first, *(nnx.state(block) for block in blocks[1:]))
    return nnx.merge(definition, modules.mark_stacked(stacked, "layers"))


class ScannedDecoder(Decoder):
    """A `Decoder` that runs one layer's program in a loop over the stacked parameters and cache of all layers."""

    def run_layers(self, x, views, windowed, cache, start, dropout=None):
        """Like `Decoder.run_layers`."""
        definition, params = nnx.split(self.layers)
        is_tapped = any(tap < self.config.num_layers for tap in self.taps)

        def run_layer(carry: tuple[Array, Array, Array], layer: Any) -> tuple[tuple[Array, Array, Array], Array | None]:
            params, number, is_windowed = layer
            view = next(iter(views.values()))
            if len(views) == 2:
                view = jax.tree.map(lambda yes, no: jnp.where(is_windowed, yes, no), views[True], views[False])
            x, keys, values = carry
            dropped = within(dropout, number)
            after = nnx.merge(definition, params)(x, view, keys, values, start, number, dropped)
            return after, x if is_tapped else None

        numbers = jnp.arange(self.config.num_layers)
        carry = x, cache.keys[0], cache.values[0]
        run = jax.checkpoint(run_layer, prevent_cse=False) if self.remat else run_layer
        (x, keys, values), before = jax.lax.scan(run, carry, (params, numbers, jnp.asarray(windowed)))
        return x, (keys,), (values,), {} if before is None else dict(enumerate(before))


def module(config: DecoderConfig) -> type[Decoder]:
    """The module that computes a configuration."""
    return ScannedDecoder if config.scan_layers else Decoder


def repeat_kv_heads(config: DecoderConfig, mesh: Mesh | AbstractMesh | None, rules: sharding.Rules) -> DecoderConfig:
    """The shape with key/value heads repeated, so that each device has one.

    Where a mesh splits the heads over more devices than there are key/value heads, but no more than there are query
    heads, each device gets one key/value head with its own queries: weights and queries stay split, no product needs
    another all-reduce, and no device caches more than one head.

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
def choice(config: DecoderConfig, rows: float, tokens: int, entries: int) -> Choice:
    """How a call attends to its cache.

    Args:
      config: the shape.
      rows: those that a device has, or its share of one.
      tokens: the tokens of a row.
      entries: the length of the cache's buffer.
    """
    reads = 0.0
    for path, x in jax.tree_util.tree_leaves_with_path(modules.abstract(module(config), config)):
        names = {getattr(key, "key", None) for key in path}
        if names & {"embedding", "position_embedding"}:
            continue  # Only some rows of them are read.
        experts = config.experts if "experts" in names else None
        share = distinct_experts(experts, rows * tokens) / experts.number if experts else 1.0
        reads += share * x.size * quantisation.bits(x.dtype) / 8
    each = 2 * config.num_layers * config.num_kv_heads * config.head_dim * quantisation.bits(config.dtype) / 8
    least = attention_choice.MAX_TOKENS if config.sliding_window is None else config.sliding_window
    return attention_choice.choose(config.attention, tokens, least, reads, rows * entries * each)


def _empty_cache(config: DecoderConfig, rules: sharding.Rules, batch_size: int, max_len: int) -> Cache:
    empty = cache_lib.init(config.num_layers, batch_size, config.num_kv_heads, max_len, config.head_dim, config.dtype)
    if config.scan_layers:
        empty = cache_lib.stack(empty)
    constrain = functools.partial(cache_lib.constrain, rules=rules)
    return Cache(tuple(map(constrain, empty.keys)), tuple(map(constrain, empty.values)), empty.length)


@functools.cache
def model(config: DecoderConfig, rules: sharding.Rules, taps: tuple[int, ...] = (), skips: Skips = NO_SKIPS) -> Model:
    """The pure functions of a decoder. Equal configurations give the same `Model`, so that nothing is retraced.

    Args:
      config: the shape.
      rules: logical to mesh axes, for its activations and cache under `jax.set_mesh`.
      taps: the hidden states that are its features (`types.Model.with_taps`).
      skips: the sublayers that it leaves out (`types.Model.with_skips`).
    """

    def bind(params: Tree) -> Decoder:
        decoder = modules.merge(module(config), config, rules, params)
        decoder.taps, decoder.skips = taps, skips
        return decoder

    def init_cache(batch_size: int, max_len: int, max_source: int = 0) -> Cache:
        del max_source
        return _empty_cache(config, rules, batch_size, max_len)

    def prefill(params: Tree, inputs: Inputs, cache: Cache) -> tuple[ModelOutput, Cache]:
        decoder = bind(params)
        hidden, features, cache = decoder.read(inputs.tokens, cache)
        last = jnp.take_along_axis(hidden, jnp.maximum(inputs.length - 1, 0)[:, None, None], axis=1)
        return ModelOutput(decoder.logits(last), features), cache_lib.commit(cache, None, inputs.length)

    def apply(params: Tree, block: Block, cache: Cache) -> tuple[ModelOutput, Cache]:
        decoder = bind(params)
        hidden, features, cache = decoder.hidden(block, cache, cache.length)
        return ModelOutput(decoder.logits(hidden), features), cache

    def score(
        params: Tree,
        batch: Batch,
        *,
        remat: bool = False,
        dropout: Dropout | None = None,
        embeddings: Float[Array, "X E"] | None = None,
    ) -> Float[Array, "B T V"]:
        decoder = bind(params)
        decoder.remat = remat
        empty = init_cache(*batch.tokens.shape)
        block = Block(batch.tokens, None, batch.sees, embeddings)
        return decoder.logits(decoder.hidden(block, empty, None, batch, dropout)[0])

    def features(params: Tree, batch: Batch) -> Float[Array, "B T F D"]:
        return bind(params).hidden(Block(batch.tokens), init_cache(*batch.tokens.shape), None, batch)[1]

    def with_taps(taps: tuple[int, ...]) -> Model:
        return model(config, rules, layers.from_zero(taps, config.num_layers), skips)

    def with_skips(skips: Skips) -> Model:
        return model(config, rules, taps, layers.known_skips(skips, config.num_layers))

    return Model(
        init_cache,
        prefill,
        apply,
        cache_lib.commit,
        config.vocab_size,
        config.max_position,
        score=score,
        with_taps=with_taps,
        with_skips=None if config.scan_layers else with_skips,
        num_layers=config.num_layers,
        features=features,
    )
