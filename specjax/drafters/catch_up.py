"""How a draft model keeps up with the text: shared by all drafters that have a cache of their own."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from specjax.types import Block, History, Inputs, Model, Tree


def set_length(draft: Model, cache: Any, length: Int[Array, " B"]) -> Any:
    """The cache with `length` committed entries; they must have been written."""
    return draft.commit(cache, None, length - cache.length)


def learn(draft: Model, params: Tree, cache: Any, inputs: Inputs) -> Any:
    """Reads a prompt, or a chunk of one."""
    return draft.prefill(params, inputs, cache)[1]


def _window(tokens: Int[Array, "B L"], start: Int[Array, " B"], size: int) -> Int[Array, "B T"]:
    """`size` tokens of each row from that row's own position."""
    return jax.vmap(lambda row, at: jax.lax.dynamic_slice(row, (at,), (size,)))(tokens, start)


def catch_up(draft: Model, params: Tree, cache: Any, history: History, *, missing: int, chunk: int) -> Any:
    """Reads the text that plain steps have added, until the cache lacks the last `missing` tokens.

    Args:
      draft: the draft model.
      params: its parameters.
      cache: its cache.
      history: the text.
      missing: how many of the last tokens `read_last` will read later in any case.
      chunk: tokens per call.
    """
    needed = jnp.maximum(history.length - missing, 0)

    def is_behind(cache: Any) -> Array:
        # Every row counts: `read_last` rewrites the last tokens even of a row that does not draft now.
        return jnp.any(cache.length < needed)

    def read(cache: Any) -> Any:
        begin = cache.length
        _, cache = draft.apply(params, Block(_window(history.tokens, begin, chunk)), cache)
        return draft.commit(cache, None, jnp.minimum(begin + chunk, needed) - begin)

    return jax.lax.while_loop(is_behind, read, cache)


def read_last(draft: Model, params: Tree, cache: Any, history: History, size: int) -> tuple[Float[Array, "B 1 W"], Any]:
    """The draft's logits after the text, and its cache of the whole text.

    Args:
      draft: the draft model.
      params: its parameters.
      cache: of all but the last `size` tokens, at least.
      history: the text.
      size: how many tokens are read; a shorter text is read from its beginning.
    """
    begin = jnp.maximum(history.length - size, 0)
    cache = set_length(draft, cache, begin)
    output, cache = draft.apply(params, Block(_window(history.tokens, begin, size)), cache)
    last = (history.length - 1 - begin)[:, None, None]
    return jnp.take_along_axis(output.logits, last, axis=1), draft.commit(cache, None, history.length - begin)
