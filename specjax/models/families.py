"""The model families: one table that describes each of them, and functions for a model of any family.

A family is a class of shapes, a module that declares parameters, pure functions over these, and a reader of published
weights.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from specjax.models import decoder, linear, modules, quantisation, t5
from specjax.models.attention_choice import Choice
from specjax.models.config import ATTENTIONS, DecoderConfig, ModelConfig, T5Config
from specjax.models.quantisation import Quantisation
from specjax.models.weights import decoder_configs, naming, t5_mapping
from specjax.parallel import sharding
from specjax.types import Model, Tree


class Family(NamedTuple):
    """One kind of model, apart from its shape.

    Attributes:
      config: the class of its shapes.
      module: `config -> module class`, which declares the parameters.
      model: `(config, rules) -> Model`.
      placed: `(config, mesh, rules) -> config`, the shape as it is placed on a mesh (or None).
      attention: `(config, rows, tokens, entries) -> Choice`, how a call attends to its cache (`decoder.choice`).
      can_scan: whether its layers can be scanned (`stack_layers`).
      model_types: the `model_type`s of `config.json` that `parse` takes.
      parse: `(config.json, names of the tensors or None, dtype) -> config`.
      read: reads the parameters from published tensors, such as `weights.naming.read`.
    """

    config: type[Any]
    module: Callable[[Any], modules.Build]
    model: Callable[[Any, sharding.Rules], Model]
    placed: Callable[[Any, Mesh | AbstractMesh | None, sharding.Rules], Any]
    attention: Callable[[Any, float, int, int], Choice]
    can_scan: bool
    model_types: tuple[str, ...]
    parse: Callable[[Mapping[str, Any], Collection[str] | None, str], Any]
    read: Callable[..., tuple[Any, Tree]]


_BIASED = "has a bias, which the kernel lacks"

FAMILIES = {
    "decoder": Family(
        config=DecoderConfig,
        module=decoder.module,
        model=decoder.model,
        placed=decoder.repeat_kv_heads,
        attention=decoder.choice,
        can_scan=True,
        model_types=tuple(decoder_configs.PARSERS),
        parse=decoder_configs.parse_config,
        read=naming.read,
    ),
    "t5": Family(
        config=T5Config,
        module=lambda config: t5.T5,
        model=t5.model,
        placed=lambda config, mesh, rules: config,
        attention=lambda config, rows, tokens, entries: Choice("einsum", f"its attention {_BIASED}"),
        can_scan=False,
        model_types=t5_mapping.MODEL_TYPES,
        parse=t5_mapping.parse_config,
        read=t5_mapping.read,
    ),
}
"""By the name that checkpoints and training runs use. A new family is added here, and nowhere else."""

_BY_CONFIG = {family.config: name for name, family in FAMILIES.items()}


def name_of(config: ModelConfig) -> str:
    """The family of a shape, a name of `FAMILIES`."""
    return _BY_CONFIG[type(config)]


def of(config: ModelConfig) -> Family:
    """The family of a shape."""
    return FAMILIES[name_of(config)]


def published(model_type: Any) -> Family:
    """The family of a `model_type` of `config.json`.

    Raises:
      ValueError: for one that no family computes.
    """
    for family in FAMILIES.values():
        if model_type in family.model_types:
            return family
    known = ", ".join(name for family in FAMILIES.values() for name in family.model_types)
    raise ValueError(f"model_type {model_type!r} is not supported: specjax loads {known}.")


def model(config: ModelConfig, rules: sharding.Rules = sharding.RULES) -> Model:
    """The pure functions of a model. Equal configurations give the same `Model`, so that nothing is retraced.

    Args:
      config: the shape.
      rules: logical to mesh axes, for its activations and cache under `jax.set_mesh`.
    """
    return of(config).model(config, rules)


def placed(config: ModelConfig, mesh: Mesh | AbstractMesh | None, rules: sharding.Rules) -> ModelConfig:
    """The shape of a model as it is placed on a mesh, where its key/value heads may be repeated (`decoder`)."""
    return of(config).placed(config, mesh, rules)


def _module(config: ModelConfig) -> modules.Build:
    return of(config).module(config)


def abstract_params(config: ModelConfig) -> Tree:
    """The parameter tree with each array replaced by a `jax.ShapeDtypeStruct`: nested dicts, layers keyed by number."""
    return modules.abstract(_module(config), config)


def param_axes(config: ModelConfig) -> Tree:
    """The parameter tree with each array replaced by its logical axes."""
    return modules.metadata(_module(config), config, "axes")


def num_contracted(config: ModelConfig) -> Tree:
    """The parameter tree with each array replaced by the number of its input dimensions; 0 if it is not a matrix."""
    return modules.metadata(_module(config), config, "num_contracted")


def init_params(config: ModelConfig, key: jax.Array) -> Tree:
    """Random parameters, as each layer declares them."""
    return modules.initial(_module(config), config, key)


def embeddings(config: ModelConfig, params: Tree, tokens: Int[Array, "B T"]) -> Float[Array, "B T E"]:
    """The rows of a model's embedding table for some tokens, in float32, before positions are added or they are scaled.

    They are on the scale of `Block.embeddings`.
    """
    model = modules.merge(_module(config), config, sharding.RULES, params)
    tied = config.tie_embeddings
    return model.head.look_up(tokens) if tied else linear.look_up(model.embedding[...], tokens)


def num_params(config: ModelConfig) -> int:
    """The number of parameters, without the scales of quantised matrices."""
    floats = dataclasses.replace(config, quantisation=None, head_quantisation=None)
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(floats)))


def num_bytes(params: Tree) -> int:
    """The memory of parameters, or of their shapes, in bytes: scales included, and two int4 in a byte, as XLA packs."""
    return sum(math.ceil(leaf.size * quantisation.bits(leaf.dtype) / 8) for leaf in jax.tree.leaves(params))


def cast(config: ModelConfig, params: Tree, dtype: str) -> tuple[ModelConfig, Tree]:
    """The same model in another dtype, which may store its matrices in another order.

    Raises:
      ValueError: for a model that is quantised.
    """
    if dtype == config.dtype:
        return config, params
    if found := quantised_as(config):
        raise ValueError(f"dtype={dtype!r}: this model is {found} in {config.dtype}; choose that, or quantise it anew.")

    cast_params = linear.cast(params, param_axes(config), num_contracted(config), config.dtype, dtype)
    return dataclasses.replace(config, dtype=dtype), cast_params


def with_attention(config: ModelConfig, attention: str) -> ModelConfig:
    """The shape of a model that attends to its cache in this way, one of `config.ATTENTIONS`.

    Raises:
      ValueError: for another way, or the kernel in an encoder-decoder.
    """
    if isinstance(config, T5Config):
        if attention == "kernel" or attention not in ATTENTIONS:
            raise ValueError(f"attention={attention!r}: the attention of an encoder-decoder {_BIASED}; leave it out.")
        return config
    return dataclasses.replace(config, attention=attention)


def quantised_as(config: ModelConfig) -> str:
    """How a model is quantised, as `quantise` takes it; empty where it is not."""
    return quantisation.spell(config.quantisation, config.head_quantisation)


def with_quantisation(config: ModelConfig, how: str) -> ModelConfig:
    """The shape of a model that is quantised.

    Args:
      config: the shape.
      how: as `quantise` takes it; empty for the shape as it is.

    Raises:
      ValueError: for another text, matrices that do not divide into the groups, or a model that is quantised already.
    """
    if not how:
        return config
    if found := quantised_as(config):
        raise ValueError(f"quantise={how!r}: this model is {found} already; leave it out, or load the model in floats.")
    layers, head = quantisation.parse(how)
    config = dataclasses.replace(config, quantisation=layers, head_quantisation=head)
    abstract_params(config)  # Whether everything divides.
    return config


def quantise(config: ModelConfig, params: Tree, how: str) -> tuple[ModelConfig, Tree]:
    """The same model with its matrices in eight or four bits.

    As a draft, it proposes nearly the same tokens in a fraction of the memory, and the text keeps the target's
    distribution exactly; as a target, it is another model. `training.perplexity` says how far it is from the first.

    Args:
      config: the shape of a model whose layers are not scanned yet.
      params: its parameters.
      how: such as "int8", "int4:64" or "int4:64,head=int8" (`quantisation.parse`).

    Raises:
      ValueError: for another text, matrices that do not divide into the groups, a model that is quantised already, or
        layers that are scanned already.
    """
    quantised = with_quantisation(config, how)
    if config.scan_layers:
        raise ValueError(
            f"quantise={how!r}: layers are quantised before they are scanned, and these are scanned already."
        )

    def walk(tree: Any, contracted: Any, axes: Any, how: Quantisation | None) -> Any:
        if how is None or not isinstance(tree, dict):
            return tree
        if not linear.is_matrix(contracted):
            return {name: walk(x, contracted[name], axes[name], how) for name, x in tree.items()}
        rounded = functools.partial(linear.quantise, num_contracted=contracted["values"], how=how)
        # One expert at a time: rounding needs several copies of what it rounds.
        each = functools.partial(jax.lax.map, rounded) if modules.num_stacked(axes["values"]) else rounded
        return each(tree["values"])

    layers, head = quantisation.parse(how)
    inputs, axes = num_contracted(config), param_axes(config)
    return quantised, {
        name: walk(part, inputs[name], axes[name], head if name == "head" else layers) for name, part in params.items()
    }


def stack_layers(config: ModelConfig, params: Tree) -> tuple[ModelConfig, Tree]:
    """The same model with `scan_layers`: its layers' parameters stacked, on the same devices and split as before.

    For a moment, both forms of the parameters are in memory.

    Args:
      config: the shape of a decoder-only model.
      params: its parameters.

    Raises:
      ValueError: for an encoder-decoder.
    """
    if not of(config).can_scan:
        raise ValueError("scan_layers=True: only decoder-only models are scanned; leave it out for an encoder-decoder.")
    if config.scan_layers:
        return config, params

    def stack(*leaves: jax.Array) -> jax.Array:
        # On one device, the result lies where the arrays do, and may be moved as they may.
        place, here = None, leaves[0].sharding
        if isinstance(here, NamedSharding):
            place = NamedSharding(here.mesh, PartitionSpec(None, *here.spec))
        return jax.jit(lambda *leaves: jnp.stack(leaves), out_shardings=place)(*leaves)

    layers_params = [params["layers"][i] for i in range(config.num_layers)]
    stacked = jax.tree.map(stack, *layers_params)
    return dataclasses.replace(config, scan_layers=True), params | {"layers": stacked}
