"""A chain drawn token by token: shared by drafters that know the next token's distribution without a model."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from specjax import sampling
from specjax.sampling import processors
from specjax.types import Context, Feedback, History, Params, Proposal, Tree


def last_tokens(history: History, size: int) -> Int[Array, "B C"]:
    """The last `size` tokens of each text, the newest first; -1 before its beginning."""
    at = history.length[:, None] - 1 - jnp.arange(size)
    tokens = jnp.take_along_axis(history.tokens, jnp.maximum(at, 0), axis=1)
    return jnp.where(at >= 0, tokens, -1)


def draw(
    predict: Callable[[Tree], Float[Array, "B V"]],
    advance: Callable[[Tree, Int[Array, " B"]], Tree],
    start: Tree,
    length: Int[Array, " B"],
    context: Context,
) -> Proposal:
    """Draws K tokens for each row, each given those before it, and states the distributions that they were drawn from.

    A row's proposal ends before the first position where its options leave none of the tokens that `predict` knows.
    That depends on the drafts before that position alone, so exact rules stay exact.

    Args:
      predict: the logits `[B, V]` of the next token, V the target's; -inf for tokens that are never drafted.
      advance: the argument of `predict` after one more token of each row.
      start: the argument of `predict` for the first token.
      length: `[B]` the most tokens to propose; where it is 0 for all rows, nothing is computed.
      context: of the step.
    """
    rows, k = context.keys.shape

    def draw_one(
        carry: tuple[Tree, History, Array], key: Array
    ) -> tuple[tuple[Tree, History, Array], tuple[Array, ...]]:
        inner, history, going = carry
        logits = predict(inner)[:, None]
        probs = sampling.probabilities(logits, context.sampling, history)[:, 0]
        going = going & ~jnp.isnan(jnp.sum(probs, axis=-1))
        probs = jnp.where(going[:, None], probs, 0.0)
        token = sampling.sample(key, probs, context.sampling)
        history = processors.extend(history, token, context.sampling.penalties)
        return (advance(inner, token), history, going), (token, probs, going)

    def rollout() -> tuple[Array, Array, Array]:
        carry = (start, context.history, length > 0)
        drawn = jax.lax.scan(draw_one, carry, jnp.swapaxes(context.keys, 0, 1))[1]
        tokens, probs, going = (jnp.swapaxes(x, 0, 1) for x in drawn)
        return tokens, probs, jnp.minimum(length, jnp.sum(going, axis=1, dtype=jnp.int32))

    def skip() -> tuple[Array, Array, Array]:
        return jnp.zeros((rows, k), jnp.int32), jnp.zeros((rows, k, context.vocab_size)), jnp.zeros(rows, jnp.int32)

    tokens, probs, length = jax.lax.cond(jnp.any(length > 0), rollout, skip)
    return Proposal(tokens, length, probs)


def init(batch_size: int, max_len: int, max_source: int = 0) -> tuple[()]:
    """The state of a drafter that looks only at the text: empty."""
    del batch_size, max_len, max_source
    return ()


def update(params: Params, state: tuple[()], feedback: Feedback) -> tuple[()]:
    """The state, which does not change."""
    del params, feedback
    return state
