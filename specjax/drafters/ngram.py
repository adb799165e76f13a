"""Prompt lookup: the draft is what followed the last tokens where they stood before.

Saxena 2023 (prompt lookup decoding); LLMA, arXiv 2304.04487.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from specjax.types import Context, Drafter, Feedback, Inputs, ModelOutput, Proposal, Tree


def lookup(
    tokens: Int[Array, " L"], length: Int[Array, ""], num_draft_tokens: int, min_match: int, max_match: int
) -> tuple[Int[Array, " K"], Int[Array, ""]]:
    """Finds the longest earlier occurrence of the text's last tokens, the most recent of equals.

    Where the copy would run past the end of the text, it goes on periodically, as the copied tokens themselves would be
    looked up next.

    Args:
      tokens: `[L]` the text buffer.
      length: tokens of text in it.
      num_draft_tokens: K.
      min_match: the shortest match that counts, in tokens.
      max_match: the longest that is told apart from longer ones.

    Returns:
      `[K]` the tokens that follow the match, and the length of the match (0: none).
    """
    size = tokens.shape[0]
    end = jnp.arange(size)
    matched = jnp.zeros(size, jnp.int32)
    running = end < length - 1
    for back in range(max_match):
        # The token `back` before the end of the text, against the token `back` before every place.
        wanted = tokens[jnp.maximum(length - 1 - back, 0)]
        running = running & (jnp.roll(tokens, back) == wanted) & (end >= back) & (length > back)
        matched = matched + running
    best = jnp.argmax(matched * size + end)
    match = matched[best]
    period = jnp.maximum(length - 1 - best, 1)
    draft = tokens[best + 1 + jnp.arange(num_draft_tokens) % period]
    return draft, jnp.where(match >= min_match, match, 0)


@functools.cache
def ngram(*, num_draft_tokens: int = 7, min_match: int = 2, max_match: int = 8) -> Drafter:
    """Drafts by looking the last tokens up in prompt and text; no model, no parameters, no host.

    A row without a match of at least `min_match` tokens drafts nothing; a step in which no row drafts is a plain one.

    Args:
      num_draft_tokens: K, the most tokens copied in a step.
      min_match: the shortest match that counts. One token alone predicts little.
      max_match: the longest match that is told apart from longer ones.

    Raises:
      ValueError: for K < 0, or matches that make no sense.
    """
    if num_draft_tokens < 0:
        raise ValueError(f"num_draft_tokens={num_draft_tokens} is negative; 0 is plain decoding.")
    if not 1 <= min_match <= max_match:
        raise ValueError(f"min_match={min_match} and max_match={max_match}: need 1 <= min_match <= max_match.")

    def init(params: Tree, inputs: Inputs, target_output: ModelOutput, max_len: int) -> tuple[()]:
        del params, inputs, target_output, max_len
        return ()

    def propose(params: Tree, state: tuple[()], context: Context) -> tuple[Proposal, tuple[()]]:
        del params
        draft, match = jax.vmap(lambda t, n: lookup(t, n, num_draft_tokens, min_match, max_match))(
            context.history.tokens, context.history.length
        )
        length = jnp.where(match > 0, context.max_draft, 0)
        return Proposal(draft, jnp.minimum(length, num_draft_tokens), None), state

    def update(params: Tree, state: tuple[()], feedback: Feedback) -> tuple[()]:
        del params, feedback
        return state

    return Drafter(init, propose, update, num_draft_tokens)
