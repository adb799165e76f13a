"""The key/value cache, and the one invariant that speculation rests on.

**Invariant.** For every row, entries `0 .. length - 1` of every layer are exactly those that a fresh prefill of the
row's first `length` tokens would write. Entries at or beyond `length` are stale: attention never sees them before
they are overwritten, since a call writes its own tokens at `length ..` before it attends, and a query at position p
attends to entries `0 .. p` only (in a tree, to its own path); and values are finite (`contain`), since 0 * NaN is NaN.
So rejecting a draft means not committing it; nothing is copied or cleared. The accepted path of a tree is moved to
where a prefill would have written it (`commit`): keys are rotated by their depth in the tree, which is their position.

**Layout.** One array per layer, `[B, kv_heads, S, head_dim]`: the form that XLA updates in place inside a donated
`while_loop`. With S before the heads, it is copied whole on every step. Where one layer's program is run for all
layers (`DecoderConfig.scan_layers`), they share one array, `[B, layers, kv_heads, S, head_dim]`.
"""

import functools
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from specjax import control
from specjax.models import attention, bfloat16
from specjax.parallel import sharding

# Above this many rows, a write is one batched scatter instead of one slice update per row: the compiled program
# would grow with rows x layers.
MAX_UNROLLED_ROWS = 8

AXES = ("batch", "kv_heads", "length", "head_dim")
STACKED_AXES = ("batch", "layers", "kv_heads", "length", "head_dim")


class Cache(NamedTuple):
    """Keys and values of every layer.

    Attributes:
      keys: one `[B, kv_heads, S, head_dim]` array per layer, or a single `[B, layers, kv_heads, S, head_dim]`.
      values: in the same layout as `keys`.
      length: `[B]` the number of valid entries of each row.
    """

    keys: tuple[Float[Array, "B *L H S D"], ...]
    values: tuple[Float[Array, "B *L H S D"], ...]
    length: Int[Array, " B"]


def init(num_layers: int, batch_size: int, num_kv_heads: int, max_len: int, head_dim: int, dtype: str) -> Cache:
    """An empty cache for `batch_size` rows of at most `max_len` tokens."""

    def zeros() -> tuple[Array, ...]:
        return tuple(jnp.zeros((batch_size, num_kv_heads, max_len, head_dim), dtype) for _ in range(num_layers))

    return Cache(zeros(), zeros(), jnp.zeros(batch_size, jnp.int32))


def stack(cache: Cache) -> Cache:
    """The same cache with all layers in one array."""
    return cache._replace(keys=(jnp.stack(cache.keys, axis=1),), values=(jnp.stack(cache.values, axis=1),))


def axes_of(num_axes: int) -> tuple[str | None, ...]:
    """The logical axes of an array in any family's cache; an array of any other rank has rows first."""
    rows = ("batch", *[None] * (num_axes - 1))
    return {len(AXES): AXES, len(STACKED_AXES): STACKED_AXES}.get(num_axes, rows)


def write(
    buffer: Float[Array, "B *L H S D"],
    new: Float[Array, "B T H D"],
    start: Int[Array, " B"] | None,
    layer: Int[Array, ""] | None = None,
) -> Float[Array, "B *L H S D"]:
    """Writes T new entries of each row at that row's own position (None: all rows at 0, as in a prefill).

    The caller ensures that `start + T < S`: XLA would shift a write that does not fit, over valid entries. (With one
    row and one token, the token is written twice, the second time beyond the length.)

    Args:
      buffer: keys or values of a layer, or of all.
      new: the new entries.
      start: where each row's new entries begin.
      layer: which layer to write, where the buffer holds all of them.
    """
    new = jnp.swapaxes(new, 1, 2).astype(buffer.dtype)
    if layer is not None:
        new = new[:, None]
    rows = buffer.shape[0]
    if rows == 1 and new.shape[-2] == 1 and start is not None:
        # One entry more, beyond the length: XLA:CPU computes a single entry twice, for the result and for attention,
        # and copies the cache to do so.
        new = jnp.concatenate([new, new], axis=-2)
    # With one key/value head (multi-query attention), XLA:CPU copies the cache around each of several row updates.
    one_head = rows > 1 and buffer.shape[-3] == 1
    together = rows > MAX_UNROLLED_ROWS or one_head or not jax.sharding.get_abstract_mesh().empty

    def update(buffer: Array, new: Array, start: Array | None, layer: Array | None) -> Array:
        where = () if layer is None else (layer,)
        if start is None:
            return jax.lax.dynamic_update_slice(buffer, new, (0, *where, 0, 0, 0))
        if together:
            return jax.vmap(lambda b, n, s: jax.lax.dynamic_update_slice(b, n, (*where, 0, s, 0)))(buffer, new, start)
        for row in range(rows):
            buffer = jax.lax.dynamic_update_slice(buffer, new[row : row + 1], (row, *where, 0, start[row], 0))
        return buffer

    if rows == 1 and buffer.shape[-2] <= attention.BLOCK:
        # Updated as integers, a single row is computed twice too, and copied. Its conversions are small.
        return control.in_order(update(buffer, new, start, layer))
    return control.in_order(bfloat16.moved(update, (buffer, new), start, layer))


def contain(values: Float[Array, "B T H D"]) -> tuple[Float[Array, "B T H D"], Bool[Array, "B T H D"]]:
    """New values for the cache, with 0 in place of those that are not finite, and a mask of these.

    Entries that a query does not see have a weight of 0, but 0 * NaN is NaN: one draft token whose embedding is NaN
    would spoil the tokens before it. A token that attends to such an entry of its own has to become NaN; the mask says
    which.
    """
    broken = ~jnp.isfinite(values)
    return jnp.where(broken, 0.0, values), broken


CacheLike = TypeVar("CacheLike", bound=Any)
"""A NamedTuple that has the fields of `Cache`, and possibly others."""


def commit(cache: CacheLike, path: Int[Array, "B P"] | None, count: Int[Array, " B"]) -> CacheLike:
    """Keeps entries of the last block (see `types.Model.commit`).

    Args:
      cache: the cache of any model.
      path: the kept entries in order, counted from `length`; those beyond `count` are ignored. None: they are in place
        already.
      count: how many are kept.
    """
    if path is not None and path.shape[1] > 1:
        place = jnp.arange(path.shape[1])
        out_of_place = (path != place) & (place < count[:, None])
        move = functools.partial(_move, path=path, length=cache.length)
        # Often nothing but the root is kept, or a first branch: to move all layers takes a tenth of a step.
        keys, values = control.once(
            jnp.any(out_of_place), lambda both: jax.tree.map(move, both), (cache.keys, cache.values)
        )
        cache = cache._replace(keys=keys, values=values)
    return cache._replace(length=cache.length + count)


def _move(
    buffer: Float[Array, "B *L H S D"], path: Int[Array, "B P"], length: Int[Array, " B"]
) -> Float[Array, "B *L H S D"]:
    """Writes the entries `length + path` of each row to `length ..`; the first of them is in place already."""
    rows, size, width = buffer.shape[0], *buffer.shape[-2:]
    heads = buffer.reshape(rows, -1, size, width)

    def entry(heads: Array, at: Array) -> Array:
        return jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, 1, axis=1))(heads, at)[:, :, 0]

    def read(heads: Array, at: Array) -> Array:
        # One entry at a time, in a loop: XLA:CPU fuses a gather of them with the write that follows, and then copies
        # the cache; XLA:TPU copies it into another layout for such a gather.
        _, kept = jax.lax.scan(lambda _, at: (None, entry(heads, at)), None, at.T)
        return jnp.moveaxis(kept, 0, 2)

    kept = bfloat16.moved(read, (heads,), length[:, None] + path[:, 1:])
    return write(heads, jnp.swapaxes(kept, 1, 2), length + 1).reshape(buffer.shape)


def of_layer(buffer: Float[Array, "B *L H S D"], layer: Int[Array, ""] | None) -> Float[Array, "B H S D"]:
    """The keys or values of one layer: the whole buffer, or that layer of it."""
    if layer is None:
        return buffer
    return bfloat16.moved(lambda b, i: jax.lax.dynamic_index_in_dim(b, i, axis=1, keepdims=False), (buffer,), layer)


def constrain(buffer: Float[Array, "B *L H S D"], rules: sharding.Rules) -> Float[Array, "B *L H S D"]:
    """Keeps keys or values sharded as declared."""
    return sharding.constrain(buffer, axes_of(buffer.ndim), rules)
