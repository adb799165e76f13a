"""Decoder-only language models as `Model`s: the Llama family (SmolLM2, Mistral) and Qwen2/2.5."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from specjax import sharding
from specjax.models import cache as cache_lib
from specjax.models import layers
from specjax.models.cache import Cache
from specjax.models.config import DecoderConfig
from specjax.types import Inputs, Model, ModelOutput, Tree


class Decoder(nnx.Module):
    """Embedding, blocks, final norm, head. The table of a tied model is stored as the head is: `D -> V`."""

    def __init__(self, config: DecoderConfig, rules: sharding.Rules, rngs: nnx.Rngs):
        """Declares the parameters."""
        c = config
        self.config, self.rules = config, rules
        if not c.tie_embeddings:
            self.embedding = layers.parameter(rngs, (c.vocab_size, c.hidden_size), ("vocab", "embed"), c.dtype)
        self.layers = nnx.List([layers.Block(c, rules, rngs) for _ in range(c.num_layers)])
        self.norm = layers.parameter(rngs, (c.hidden_size,), ("embed",), c.dtype, init=nnx.initializers.ones_init())
        head = (c.hidden_size, c.vocab_size)
        self.head = layers.parameter(rngs, head, ("embed", "vocab"), c.dtype, num_contracted=1)

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Looks tokens up; ids beyond the table read its last row (a draft may know fewer tokens than its target)."""
        tokens = jnp.minimum(tokens, self.config.vocab_size - 1)
        table = self.head[...] if self.config.tie_embeddings else self.embedding[...]
        if self.config.tie_embeddings and not layers.outputs_first(table.dtype):
            return jnp.moveaxis(jnp.take(table, tokens, axis=1), 0, -1).astype(jnp.float32)
        return jnp.take(table, tokens, axis=0).astype(jnp.float32)

    def hidden(
        self, tokens: Int[Array, "B T"], cache: Cache, start: Int[Array, " B"] | None
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """The last hidden states of T tokens that stand at `start ..` of each row, and the cache with them in it."""
        begin = jnp.zeros(tokens.shape[0], jnp.int32) if start is None else start
        positions = begin[:, None] + jnp.arange(tokens.shape[1])
        angles = positions[:, :, None] * layers.rope_frequencies(self.config)
        rope = jnp.cos(angles), jnp.sin(angles)
        slots = jnp.arange(cache.keys[0].shape[2])
        mask = slots <= positions[:, :, None]
        if self.config.sliding_window is not None:
            mask &= slots > positions[:, :, None] - self.config.sliding_window
        x = self.embed(tokens)
        keys, values = list(cache.keys), list(cache.values)
        for i, block in enumerate(self.layers):
            x, keys[i], values[i] = block(x, rope, mask, keys[i], values[i], start)
        x = layers.rms_norm(x, self.norm[...], self.config.norm_eps)
        return x, Cache(tuple(keys), tuple(values), cache.length)

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """The head, in float32."""
        return sharding.constrain(layers.linear(hidden, self.head[...]), ("batch", "tokens", "vocab"), self.rules)


@functools.cache
def _graph(config: DecoderConfig, rules: sharding.Rules) -> tuple[Any, Any]:
    """The structure of the module and its abstract state: the border between NNX and pure pytrees."""
    return nnx.split(nnx.eval_shape(lambda: Decoder(config, rules, nnx.Rngs(0))), nnx.Param)


def abstract_params(config: DecoderConfig) -> Tree:
    """The parameter tree with a `jax.ShapeDtypeStruct` in each array's place: nested dicts, layers keyed by number."""
    return nnx.to_pure_dict(_graph(config, sharding.RULES)[1])


def _metadata(config: DecoderConfig, name: str) -> Tree:
    state = _graph(config, sharding.RULES)[1]
    flat = {path: variable.get_metadata()[name] for path, variable in nnx.to_flat_state(state)}
    return nnx.traversals.unflatten_mapping(flat)


def param_axes(config: DecoderConfig) -> Tree:
    """The parameter tree with its logical axes in each array's place."""
    return _metadata(config, "axes")


def num_contracted(config: DecoderConfig) -> Tree:
    """The parameter tree with the number of inputs' dimensions in each array's place; 0 for what is no matrix."""
    return _metadata(config, "num_contracted")


def cast(config: DecoderConfig, params: Tree, dtype: str) -> tuple[DecoderConfig, Tree]:
    """The same model in another dtype, which may store its matrices in another order."""

    def convert(x: Array, inputs: int) -> Array:
        if layers.outputs_first(config.dtype):
            x = jnp.transpose(x, layers.rotated(x.ndim, x.ndim - inputs))
        return jnp.transpose(x, layers.stored(x.ndim, inputs, dtype)).astype(dtype)

    return dataclasses.replace(config, dtype=dtype), jax.tree.map(convert, params, num_contracted(config))


def init_params(config: DecoderConfig, key: jax.Array) -> Tree:
    """Random parameters (normal, deviation 0.02; norms one)."""
    return nnx.to_pure_dict(nnx.state(Decoder(config, sharding.RULES, nnx.Rngs(key)), nnx.Param))


def model(config: DecoderConfig, rules: sharding.Rules = sharding.RULES) -> Model:
    """The pure functions of a decoder. Equal configurations give the same `Model`, so that nothing is retraced.

    Args:
      config: the shape.
      rules: logical to mesh axes, for its activations and cache under `jax.set_mesh`.
    """
    return _model(config, rules)


@functools.cache
def _model(config: DecoderConfig, rules: sharding.Rules) -> Model:
    def module(params: Tree) -> Decoder:
        return nnx.merge(_graph(config, rules)[0], nnx.State(params))

    def init_cache(batch_size: int, max_len: int) -> Cache:
        empty = cache_lib.init(
            config.num_layers, batch_size, config.num_kv_heads, max_len, config.head_dim, config.dtype
        )
        constrain = functools.partial(cache_lib.constrain, rules=rules)
        return Cache(tuple(map(constrain, empty.keys)), tuple(map(constrain, empty.values)), empty.length)

    def prefill(params: Tree, inputs: Inputs, cache: Cache) -> tuple[ModelOutput, Cache]:
        decoder = module(params)
        hidden, cache = decoder.hidden(inputs.tokens, cache, None)
        last = jnp.take_along_axis(hidden, (inputs.length - 1)[:, None, None], axis=1)
        return ModelOutput(decoder.logits(last), hidden), cache._replace(length=inputs.length)

    def apply(params: Tree, tokens: Int[Array, "B T"], cache: Cache) -> tuple[ModelOutput, Cache]:
        decoder = module(params)
        hidden, cache = decoder.hidden(tokens, cache, cache.length)
        cache = cache._replace(length=cache.length + tokens.shape[1])
        return ModelOutput(decoder.logits(hidden), hidden), cache

    return Model(init_cache, prefill, apply, config.vocab_size, config.max_position)
