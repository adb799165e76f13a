"""The key/value cache, and the one invariant that speculation rests on.

**Invariant.** For every row, entries `0 .. length - 1` of every layer are exactly those that a fresh prefill of the
row's first `length` tokens would write. Entries at or beyond `length` are stale: attention never sees them before
they are overwritten, since a call writes its own tokens at `length ..` before it attends, and a query at position p
attends to entries `0 .. p` only. So a rejected draft is undone by setting `length[row]`; nothing is copied or cleared.

**Layout.** One array per layer, `[B, kv_heads, S, head_dim]`: the form that XLA updates in place inside a donated
`while_loop`. Stacked layers, or S before the heads, are copied whole on every step.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from specjax import sharding

# Above this many rows, a write is one batched scatter instead of one slice update a row: the compiled program
# would grow with rows x layers.
MAX_UNROLLED_ROWS = 8

AXES = ("batch", "kv_heads", "length", "head_dim")


class Cache(NamedTuple):
    """Keys and values of every layer.

    Attributes:
      keys: one `[B, kv_heads, S, head_dim]` array per layer.
      values: likewise.
      length: `[B]` the number of valid entries of each row.
    """

    keys: tuple[Float[Array, "B H S D"], ...]
    values: tuple[Float[Array, "B H S D"], ...]
    length: Int[Array, " B"]


def init(num_layers: int, batch_size: int, num_kv_heads: int, max_len: int, head_dim: int, dtype: str) -> Cache:
    """An empty cache for `batch_size` rows of at most `max_len` tokens."""

    def zeros() -> tuple[Array, ...]:
        return tuple(jnp.zeros((batch_size, num_kv_heads, max_len, head_dim), dtype) for _ in range(num_layers))

    return Cache(zeros(), zeros(), jnp.zeros(batch_size, jnp.int32))


def axes(num_layers: int) -> Cache:
    """The logical axes of every entry."""
    return Cache((AXES,) * num_layers, (AXES,) * num_layers, ("batch",))  # pyright: ignore[reportArgumentType]


def write(
    buffer: Float[Array, "B H S D"], new: Float[Array, "B T H D"], start: Int[Array, " B"] | None
) -> Float[Array, "B H S D"]:
    """Writes T new entries of each row at that row's own position (None: all rows at 0, as in a prefill).

    The caller sees to it that `start + T < S`: XLA would shift a write that does not fit, over valid entries. (A lone
    token of a lone row is written twice, the second time beyond the length.)
    """
    new = jnp.swapaxes(new, 1, 2).astype(buffer.dtype)
    if start is None:
        return jax.lax.dynamic_update_slice(buffer, new, (0, 0, 0, 0))
    rows = buffer.shape[0]
    if rows == 1 and new.shape[2] == 1:
        # One entry more, beyond the length: XLA:CPU computes a lone entry twice, for the result and for attention, and
        # copies the cache to do so.
        new = jnp.concatenate([new, new], axis=2)
    # With one key/value head (multi-query attention), XLA:CPU copies the cache around each of several row updates.
    one_head = rows > 1 and buffer.shape[1] == 1
    if rows > MAX_UNROLLED_ROWS or one_head or not jax.sharding.get_abstract_mesh().empty:
        return jax.vmap(lambda b, n, s: jax.lax.dynamic_update_slice(b, n, (0, s, 0)))(buffer, new, start)
    for row in range(rows):
        buffer = jax.lax.dynamic_update_slice(buffer, new[row : row + 1], (row, 0, start[row], 0))
    return buffer


def constrain(buffer: Float[Array, "B H S D"], rules: sharding.Rules) -> Float[Array, "B H S D"]:
    """Keeps a layer's keys or values sharded as declared."""
    return sharding.constrain(buffer, AXES, rules)
