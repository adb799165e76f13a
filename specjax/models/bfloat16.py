"""Moves bfloat16 arrays as integers on CPUs, the only way to update them there in place."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array


def moved(move: Callable[..., Array], arrays: tuple[Array, ...], *places: Array | None) -> Array:
    """`move(*arrays, *places)`, where `move` only moves values.

    XLA:CPU has no gather, slice or update of bfloat16 arrays: it converts the whole array to float32 and back, in every
    step of a loop. So bfloat16 is moved as integers there.

    Args:
      move: such as `jnp.take` or a slice update; linear in `arrays`.
      arrays: the arrays, all of one dtype.
      *places: integer indices, or None.
    """
    if arrays[0].dtype != jnp.bfloat16:
        return move(*arrays, *places)

    @jax.custom_jvp
    def as_bits(arrays: tuple[Array, ...], places: tuple[Array | None, ...]) -> Array:
        bits = move(*(jax.lax.bitcast_convert_type(x, jnp.uint16) for x in arrays), *places)
        return jax.lax.bitcast_convert_type(bits, jnp.bfloat16)

    @as_bits.defjvp
    def _(primals: Any, tangents: Any) -> tuple[Array, Array]:
        # Integers have no derivative: without this rule, training would not update what is looked up.
        return as_bits(*primals), move(*tangents[0], *primals[1])

    return jax.lax.platform_dependent(
        arrays, places, cpu=as_bits, default=lambda arrays, places: move(*arrays, *places)
    )
