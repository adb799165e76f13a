"""What can be done with a model of any family, given its configuration."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from specjax import sharding
from specjax.models import decoder, graph, layers, t5
from specjax.models.config import DecoderConfig, ModelConfig, T5Config
from specjax.types import Model, Tree

_MODULES: dict[type, graph.Build] = {DecoderConfig: decoder.Decoder, T5Config: t5.T5}
_MODELS = {DecoderConfig: decoder.model, T5Config: t5.model}


def model(config: ModelConfig, rules: sharding.Rules = sharding.RULES) -> Model:
    """The pure functions of a model. Equal configurations give the same `Model`, so that nothing is retraced.

    Args:
      config: the shape.
      rules: logical to mesh axes, for its activations and cache under `jax.set_mesh`.
    """
    build: Any = _MODELS[type(config)]
    return build(config, rules)


def abstract_params(config: ModelConfig) -> Tree:
    """The parameter tree with a `jax.ShapeDtypeStruct` in each array's place: nested dicts, layers keyed by number."""
    return graph.abstract(_MODULES[type(config)], config)


def param_axes(config: ModelConfig) -> Tree:
    """The parameter tree with its logical axes in each array's place."""
    return graph.metadata(_MODULES[type(config)], config, "axes")


def num_contracted(config: ModelConfig) -> Tree:
    """The parameter tree with the number of inputs' dimensions in each array's place; 0 for what is no matrix."""
    return graph.metadata(_MODULES[type(config)], config, "num_contracted")


def init_params(config: ModelConfig, key: jax.Array) -> Tree:
    """Random parameters, as each layer declares them."""
    return graph.initial(_MODULES[type(config)], config, key)


def num_params(config: ModelConfig) -> int:
    """How many numbers the parameters are."""
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config)))


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


def cast(config: ModelConfig, params: Tree, dtype: str) -> tuple[ModelConfig, Tree]:
    """The same model in another dtype, which may store its matrices in another order."""

    def convert(x: jax.Array, inputs: int) -> jax.Array:
        if layers.outputs_first(config.dtype):
            x = jnp.transpose(x, layers.rotated(x.ndim, x.ndim - inputs))
        return jnp.transpose(x, layers.stored(x.ndim, inputs, dtype)).astype(dtype)

    return dataclasses.replace(config, dtype=dtype), jax.tree.map(convert, params, num_contracted(config))
