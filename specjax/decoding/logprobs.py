"""Log-probabilities of the text under the target itself, before any option."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from specjax.state import Logprobs


def log_probabilities(logits: Float[Array, "B T V"], tokens: Int[Array, "B T"], num_top: int) -> Logprobs:
    """Log-probabilities under the logits' softmax.

    Args:
      logits: of the target.
      tokens: one for each position.
      num_top: how many of the most probable tokens are returned beside it.

    Returns:
      arrays of T positions in the place of L. The same token has the same number in both.
    """
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    top, top_tokens = jax.lax.top_k(log_probs, num_top)
    return Logprobs(jnp.take_along_axis(log_probs, tokens[..., None], axis=-1)[..., 0], top_tokens, top)


def where_wanted(
    logits: Float[Array, "B T V"], tokens: Int[Array, "B T"], num_top: int, wanted: Bool[Array, " B"]
) -> Logprobs:
    """`log_probabilities`, or zeros where no row wants them.

    Args:
      logits: as for `log_probabilities`.
      tokens: as for `log_probabilities`.
      num_top: as for `log_probabilities`.
      wanted: `[B]` which rows want them.
    """
    find = functools.partial(log_probabilities, logits, tokens, num_top)
    empty = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(find))
    return jax.lax.cond(jnp.any(wanted), find, lambda: empty)
