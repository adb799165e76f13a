"""The border between Flax NNX modules and the pure functions over pytrees that everything else is made of."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from specjax.parallel import sharding
from specjax.types import Tree

Build = Callable[..., nnx.Module]
"""A module class: `(config, rules, rngs) -> module`."""


class _OneKey(nnx.Rngs):
    """The same key for every parameter: shapes need no other, and to count keys while tracing takes quadratic time."""

    def params(self) -> jax.Array:
        """The key."""
        return jax.random.key(0)


@functools.cache
def _split(build: Build, config: Any, rules: sharding.Rules) -> tuple[Any, Any]:
    """The structure of the module and its abstract state."""
    return nnx.split(nnx.eval_shape(lambda: build(config, rules, _OneKey(0))), nnx.Param)


def merge(build: Build, config: Any, rules: sharding.Rules, params: Tree) -> Any:
    """The module with these parameters."""
    return nnx.merge(_split(build, config, rules)[0], nnx.State(params))


def abstract(build: Build, config: Any) -> Tree:
    """The parameter tree with each array replaced by a `jax.ShapeDtypeStruct`: nested dicts, layers keyed by number."""
    return nnx.to_pure_dict(_split(build, config, sharding.RULES)[1])


def metadata(build: Build, config: Any, name: str) -> Tree:
    """The parameter tree with each array replaced by what `layers.parameter` noted under that name."""
    flat = nnx.to_flat_state(_split(build, config, sharding.RULES)[1])
    return nnx.traversals.unflatten_mapping({path: variable.get_metadata()[name] for path, variable in flat})


def initial(build: Build, config: Any, key: jax.Array) -> Tree:
    """Random parameters, as each declares them."""
    return nnx.to_pure_dict(nnx.state(build(config, sharding.RULES, nnx.Rngs(key)), nnx.Param))
