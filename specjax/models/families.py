"""What can be done with a model of any family, given its configuration."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from specjax.models import decoder, linear, modules, t5
from specjax.models.config import DecoderConfig, ModelConfig, T5Config
from specjax.parallel import sharding
from specjax.types import Model, Tree

_MODELS = {DecoderConfig: decoder.model, T5Config: t5.model}


def model(config: ModelConfig, rules: sharding.Rules = sharding.RULES) -> Model:
    """The pure functions of a model. Equal configurations give the same `Model`, so that nothing is retraced.

    Args:
      config: the shape.
      rules: logical to mesh axes, for its activations and cache under `jax.set_mesh`.
    """
    build: Any = _MODELS[type(config)]
    return build(config, rules)


def _module(config: ModelConfig) -> modules.Build:
    return decoder.module(config) if isinstance(config, DecoderConfig) else t5.T5


def abstract_params(config: ModelConfig) -> Tree:
    """The parameter tree with a `jax.ShapeDtypeStruct` in each array's place: nested dicts, layers keyed by number."""
    return modules.abstract(_module(config), config)


def param_axes(config: ModelConfig) -> Tree:
    """The parameter tree with its logical axes in each array's place."""
    return modules.metadata(_module(config), config, "axes")


def num_contracted(config: ModelConfig) -> Tree:
    """The parameter tree with the number of inputs' dimensions in each array's place; 0 for what is no matrix."""
    return modules.metadata(_module(config), config, "num_contracted")


def init_params(config: ModelConfig, key: jax.Array) -> Tree:
    """Random parameters, as each layer declares them."""
    return modules.initial(_module(config), config, key)


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
    """The same model in another dtype, which may store its matrices in another order.

    Raises:
      ValueError: for a model whose matrices are int8.
    """
    if config.int8:
        raise ValueError(f"dtype={dtype!r}: this model is int8 in {config.dtype}; choose that, or quantise it anew.")

    def convert(x: jax.Array, inputs: int) -> jax.Array:
        if linear.outputs_first(config.dtype):
            x = jnp.transpose(x, linear.rotated(x.ndim, x.ndim - inputs))
        return jnp.transpose(x, linear.stored(x.ndim, inputs, dtype)).astype(dtype)

    def convert_stacked(x: jax.Array, inputs: int) -> jax.Array:
        return jax.vmap(lambda layer: convert(layer, inputs))(x)

    inputs, scanned = num_contracted(config), isinstance(config, DecoderConfig) and config.scan_layers
    converters = {"layers": convert_stacked} if scanned else {}
    return dataclasses.replace(config, dtype=dtype), {
        name: jax.tree.map(converters.get(name, convert), part, inputs[name]) for name, part in params.items()
    }


def quantise(config: ModelConfig, params: Tree) -> tuple[ModelConfig, Tree]:
    """The same model with its matrices in int8, rounded to 1/127 of each output's largest weight.

    As a draft it proposes nearly what it did, in half of the memory, and the target's distribution stays exact; as a
    target it is another model.

    Args:
      config: of a model whose layers are not scanned yet.
      params: its parameters.

    Raises:
      ValueError: for layers that are scanned already.
    """
    if config.int8:
        return config, params
    if isinstance(config, DecoderConfig) and config.scan_layers:
        raise ValueError("int8=True: layers are quantised before they are scanned, and these are scanned already.")
    quantised = jax.jit(linear.quantise, static_argnums=1)

    def walk(tree: Any, contracted: Any) -> Any:
        if not isinstance(tree, dict):
            return tree
        if linear.is_matrix(contracted):
            values, scale = quantised(tree["values"], contracted["values"])
            return {"values": values, "scale": scale}
        return {name: walk(x, contracted[name]) for name, x in tree.items()}

    return dataclasses.replace(config, int8=True), walk(params, num_contracted(config))


def stack_layers(config: ModelConfig, params: Tree) -> tuple[ModelConfig, Tree]:
    """The same model with `scan_layers`: its layers' parameters in one array each, where and as split as they were.

    For a moment there are both forms of the parameters.

    Args:
      config: of a decoder-only model.
      params: its parameters.

    Raises:
      ValueError: for an encoder-decoder.
    """
    if not isinstance(config, DecoderConfig):
        raise ValueError("scan_layers=True: only decoder-only models are scanned; leave it out for an encoder-decoder.")
    if config.scan_layers:
        return config, params

    def stack(*leaves: jax.Array) -> jax.Array:
        place = leaves[0].sharding
        if isinstance(place, NamedSharding):
            place = NamedSharding(place.mesh, PartitionSpec(None, *place.spec))
        return jax.jit(lambda *leaves: jnp.stack(leaves), out_shardings=place)(*leaves)

    layers_params = [params["layers"][i] for i in range(config.num_layers)]
    stacked = jax.tree.map(stack, *layers_params)
    return dataclasses.replace(config, scan_layers=True), params | {"layers": stacked}
