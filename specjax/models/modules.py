"""The boundary between Flax NNX modules, which declare parameters, and the pure functions of everything else.

A module class is built once, abstractly, and its structure is kept: `merge` binds parameters to it inside a jitted
function, and the other functions here describe the parameters without computing any.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from specjax.parallel import sharding
from specjax.types import Tree

Build = Callable[..., nnx.Module]
"""A module class: `(config, rules, rngs) -> module`."""


def variable(value: jax.Array, axes: sharding.Axes, *, num_contracted: int = 0) -> nnx.Param:
    """A parameter with its metadata: its logical axes, and for a matrix how many of them products sum over.

    Raises:
      ValueError: where there are not as many axes as the value has dimensions.
    """
    if value.ndim != len(axes):
        raise ValueError(f"A parameter of shape {value.shape} needs one logical axis per dimension, not {tuple(axes)}.")
    return nnx.Param(value, axes=tuple(axes), num_contracted=num_contracted)


def parameter(
    rngs: nnx.Rngs, shape: Sequence[int], axes: sharding.Axes, dtype: str, *, init: nnx.Initializer | None = None
) -> nnx.Param:
    """A parameter that is not a matrix: its shape, logical axes, dtype and initialiser in one place.

    Args:
      rngs: random numbers.
      shape: the shape of the array.
      axes: the logical axis of each dimension.
      dtype: the dtype of the array.
      init: by default normal with standard deviation 0.02.
    """
    make = init or nnx.initializers.normal(0.02)
    return variable(make(rngs.params(), tuple(shape), jnp.dtype(dtype)), axes)


STACKED = ("layers", "experts")
"""The logical axes along which arrays of one kind are stacked: an array of the others lies behind each index."""


def num_stacked(axes: sharding.Axes) -> int:
    """How many of the first axes are `STACKED`."""
    return next((i for i, axis in enumerate(axes) if axis not in STACKED), len(axes))


def mark_stacked(state: nnx.State, axis: str) -> nnx.State:
    """Notes in the metadata of a module's state that all its arrays have been stacked along a new first axis."""
    for _, variable in nnx.to_flat_state(state):
        variable.set_metadata("axes", (axis, *variable.get_metadata()["axes"]))
    return state


class _OneKey(nnx.Rngs):
    """The same key for every parameter: shapes need no others, and counting keys while tracing takes quadratic time."""

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


def traced_once(layer: nnx.Module, method: str = "__call__", *, remat: bool = False) -> Callable[..., Any]:
    """A method of the layer, traced and lowered once for all layers of the same structure and shapes.

    Tracing is most of what a call waits for where its programs are in the compilation cache. XLA inlines the calls.
    With `remat`, gradients compute it again from its inputs (arXiv 1604.06174).
    """
    definition, params = nnx.split(layer)
    call = functools.partial(_call, definition, method)
    return functools.partial(jax.checkpoint(call) if remat else call, params)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _call(definition: Any, method: str, params: Any, *arguments: Any) -> Any:
    return getattr(nnx.merge(definition, params), method)(*arguments)


def abstract(build: Build, config: Any) -> Tree:
    """The parameter tree with each array replaced by a `jax.ShapeDtypeStruct`: nested dicts, layers keyed by number."""
    return nnx.to_pure_dict(_split(build, config, sharding.RULES)[1])


def metadata(build: Build, config: Any, name: str) -> Tree:
    """The parameter tree with each array replaced by its metadata of that name (`variable`)."""
    flat = nnx.to_flat_state(_split(build, config, sharding.RULES)[1])
    return nnx.traversals.unflatten_mapping({path: variable.get_metadata()[name] for path, variable in flat})


def initial(build: Build, config: Any, key: jax.Array) -> Tree:
    """Random parameters, as each declares them."""
    return nnx.to_pure_dict(nnx.state(build(config, sharding.RULES, nnx.Rngs(key)), nnx.Param))
