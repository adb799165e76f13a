"""Attention of a few queries to the entries of a cache, which all models share."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from specjax.models import bfloat16

BLOCK = 256
"""The entries that CPUs read at a time where a cache has more."""

_LEAST = jnp.finfo(jnp.float32).min


def softcap(x: Float[Array, "..."], cap: float | None) -> Float[Array, "..."]:
    """`c tanh(x / c)`, which bounds x to (-c, c) (Gemma 2, arXiv 2408.00118, section 2); None: x."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def attend(
    query: Float[Array, "B T H G E"],
    keys: Float[Array, "B H S E"],
    values: Float[Array, "B H S E"],
    mask: Bool[Array, "#B T S"],
    bias: Float[Array, "#B H T S"] | None = None,
    cap: float | None = None,
    *,
    in_cache: bool = False,
    drop: Callable[[Array], Array] = lambda weights: weights,
) -> Float[Array, "B T H G E"]:
    """Softmax attention of G query heads per key/value head, with softmax and sums in float32.

    The queries of a group are gathered as rows of one matrix per key/value head: XLA:CPU runs that product two to eight
    times faster than the einsum over the five axes.

    Args:
      query: the scaled queries of T tokens.
      keys: the keys of S tokens.
      values: the values of the same S tokens.
      mask: which of the S tokens each of the T attends to.
      bias: is added to the scores.
      cap: the bound of the scores, see `softcap`.
      in_cache: the S tokens are the entries of a cache, of which only the first may be in use: CPUs read no block of
        entries that no query attends to. Has no derivative.
      drop: dropout of the weights `[B, H, T, G, S]`; not with `in_cache`.
    """
    rows, time, heads, group, size = query.shape
    matrix = jnp.swapaxes(query, 1, 2).reshape(rows, heads, time * group, size)
    if in_cache and keys.shape[2] > BLOCK:
        mixed = jax.lax.platform_dependent(
            matrix,
            keys,
            values,
            mask,
            bias,
            cpu=functools.partial(_by_blocks, cap=cap),
            default=functools.partial(_whole, cap=cap),
        )
    else:
        mixed = _whole(matrix, keys, values, mask, bias, cap, drop)
    return jnp.swapaxes(mixed.reshape(rows, heads, time, group, size), 1, 2)


_BATCH = ((0, 1), (0, 1))


def _scores(matrix: Array, keys: Array, mask: Array, bias: Array | None, cap: float | None) -> Array:
    """`[B, H, T, G, S]`, the least float32 where a query does not attend."""
    scores = jax.lax.dot_general(matrix, keys, (((3,), (3,)), _BATCH), preferred_element_type=jnp.float32)
    rows, heads, _, entries = scores.shape
    scores = softcap(scores.reshape(rows, heads, mask.shape[1], -1, entries), cap)
    if bias is not None:
        scores = scores + bias[:, :, :, None]
    return jnp.where(mask[:, None, :, None, :], scores, _LEAST)


def _mix(weights: Array, values: Array) -> Array:
    """`[B, H, T * G, E]` the sums of the values, by weights `[B, H, T, G, S]`."""
    weights = weights.astype(values.dtype).reshape(*weights.shape[:2], -1, weights.shape[-1])
    return jax.lax.dot_general(weights, values, (((3,), (2,)), _BATCH), preferred_element_type=jnp.float32)


def _whole(
    matrix: Float[Array, "B H Q E"],
    keys: Float[Array, "B H S E"],
    values: Float[Array, "B H S E"],
    mask: Bool[Array, "#B T S"],
    bias: Float[Array, "#B H T S"] | None,
    cap: float | None,
    drop: Callable[[Array], Array] = lambda weights: weights,
) -> Float[Array, "B H Q E"]:
    return _mix(drop(jax.nn.softmax(_scores(matrix, keys, mask, bias, cap), axis=-1)), values)


def _by_blocks(
    matrix: Float[Array, "B H Q E"],
    keys: Float[Array, "B H S E"],
    values: Float[Array, "B H S E"],
    mask: Bool[Array, "#B T S"],
    bias: Float[Array, "#B H T S"] | None,
    cap: float | None,
) -> Float[Array, "B H Q E"]:
    """The same sums block by block, from the first to the last that a query attends to (arXiv 1805.02867, alg. 3)."""
    size = keys.shape[2]
    used, place = jnp.any(mask, axis=(0, 1)), jnp.arange(size)
    first, end = jnp.min(jnp.where(used, place, size)), jnp.max(jnp.where(used, place + 1, 0))

    def read(number: Int[Array, ""], carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        largest, total, mixed = carry
        number, own_keys, own_values = jax.lax.optimization_barrier((number, keys, values))
        # The last block may begin within the one before it, whose entries count once.
        begin = jnp.minimum(number * BLOCK, size - BLOCK)

        def block(x: Array, axis: int) -> Array:
            return jax.lax.dynamic_slice_in_dim(x, begin, BLOCK, axis)

        own_keys, own_values = (
            bfloat16.moved(lambda x, at: jax.lax.dynamic_slice_in_dim(x, at, BLOCK, 2), (x,), begin)
            for x in (own_keys, own_values)
        )
        own_mask = block(mask, 2) & (begin + jnp.arange(BLOCK) >= number * BLOCK)
        scores = _scores(matrix, own_keys, own_mask, None if bias is None else block(bias, 3), cap)
        above = jnp.maximum(largest, jnp.max(scores, axis=-1))
        weights = jnp.where(own_mask[:, None, :, None, :], jnp.exp(scores - above[..., None]), 0.0)
        scale = jnp.exp(largest - above)
        by_query = scale.reshape(*scale.shape[:2], -1, 1)
        return above, total * scale + jnp.sum(weights, axis=-1), mixed * by_query + _mix(weights, own_values)

    rows, heads, queries, _ = matrix.shape
    each = (rows, heads, mask.shape[1], queries // mask.shape[1])
    begin = jnp.full(each, _LEAST), jnp.zeros(each), jnp.zeros(matrix.shape, jnp.float32)
    _, total, mixed = jax.lax.fori_loop(first // BLOCK, -(-end // BLOCK), read, begin)
    # The largest weight is 1: only a query that attends to nothing has a sum below.
    return mixed / jnp.maximum(total, 1.0).reshape(rows, heads, queries, 1)
