"""Control flow that leaves large arrays where they are: neither copied nor gathered."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.experimental import shard_alike
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Bool

Carry = TypeVar("Carry")


def once(needed: Bool[Array, ""], function: Callable[[Carry], Carry], carry: Carry) -> Carry:
    """`function(carry)` where it is needed, otherwise the carry, by a loop of at most one round.

    XLA gives the two sides of a `cond` buffers of their own, so that a cache which both return is copied in every step:
    on CPUs where a side updates it, on GPUs also where a side only returns it. A loop updates its carry in place.

    Args:
      needed: whether to call it.
      function: returns a pytree of the same structure, shapes and dtypes.
      carry: its argument.
    """

    def body(state: tuple[Array, Carry]) -> tuple[Array, Carry]:
        return jnp.zeros((), bool), function(state[1])

    return jax.lax.while_loop(lambda state: state[0], body, (needed, carry))[1]


def alike(result: Any, array: Any) -> Any:
    """The result of a `cond`, split over devices as an array of the same shape is.

    Where nothing says how a result is split, XLA may gather it whole on every device, as it does on GPUs. Without a
    mesh (`jax.set_mesh`) there is nothing to say, and it must not be said: jax numbers what is alike as the process
    goes on, so that no later process would find the program among those that it has kept.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return result
    return shard_alike.shard_alike(result, array)[0]


def in_order(array: Array) -> Array:
    """The same array, whose last axis lies together in memory, as that of arguments does.

    XLA:GPU would carry the keys of a cache through a loop in the order that suits a product in it, and transpose them
    whole before and after the loop: in every step, where the loop is `once`. Arrays on several devices are left alone,
    since XLA would gather what has to be in order.
    """
    if jax.sharding.get_abstract_mesh().size > 1:
        return array
    order = Layout(tuple(range(array.ndim)))
    return jax.lax.platform_dependent(array, cuda=lambda x: with_layout_constraint(x, order), default=lambda x: x)
