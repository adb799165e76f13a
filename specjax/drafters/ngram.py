"""Prompt lookup: the draft is what followed the last tokens where they occurred before.

Saxena 2023 (prompt lookup decoding); LLMA, arXiv 2304.04487. For an encoder-decoder, the source is searched too, and a
text is first drafted as a copy of it (aggressive decoding, Sun et al. 2021, arXiv 2106.04970).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from specjax.drafters import source as sources
from specjax.drafters.source import Source
from specjax.limits import check_num_draft_tokens
from specjax.types import Context, Drafter, Feedback, Params, Proposal, Topology


def lookup(
    tokens: Int[Array, " L"],
    length: Int[Array, ""],
    num_draft_tokens: int,
    min_match: int,
    max_match: int,
    source: Int[Array, " S"],
    source_length: Int[Array, ""],
) -> tuple[Int[Array, " K"], Int[Array, ""]]:
    """Finds the longest earlier occurrence of the text's last tokens, the most recent one in a tie.

    Where the copy would run past the end of the text, it goes on periodically, as the copied tokens themselves would be
    looked up next.

    Args:
      tokens: `[L]` the text buffer.
      length: tokens of text in it.
      num_draft_tokens: K.
      min_match: the shortest match that counts, in tokens. A match of the whole text counts, however short.
      max_match: the longest match; longer ones count as equal to it.
      source: `[S]` what an encoder has read, which counts as the oldest text, after a copy of the text's first token;
        S = 0 where there is none.
      source_length: the number of its tokens.

    Returns:
      `[K]` the tokens that follow the match, and how many of them there are (0: no match).
    """
    offset = source.shape[0] + 1 if source.shape[0] else 0
    past = jnp.concatenate([tokens[:1], source, tokens]) if offset else tokens
    place = jnp.arange(past.shape[0])
    in_text = place >= offset
    begin = jnp.where(in_text, offset, 0)
    # The position of the last token of source and of text, after which there is nothing.
    last = jnp.where(in_text, offset + length - 1, source_length)
    matched = jnp.zeros(past.shape[0], jnp.int32)
    running = place < last
    for back in range(max_match):
        # The token `back` before the end of the text, compared with the token `back` before every position.
        wanted = tokens[jnp.maximum(length - 1 - back, 0)]
        running = running & (jnp.roll(past, back) == wanted) & (place - back >= begin) & (length > back)
        matched = matched + running
    best = jnp.argmax(matched * past.shape[0] + place)
    match, period = matched[best], jnp.maximum(last[best] - best, 1)
    draft = past[best + 1 + jnp.arange(num_draft_tokens) % period]
    available = jnp.where(in_text[best], num_draft_tokens, jnp.minimum(period, num_draft_tokens))
    return draft, jnp.where((match >= min_match) | (match == length), available, 0)


@functools.cache
def ngram(*, num_draft_tokens: int = 7, min_match: int = 2, max_match: int = 8) -> Drafter:
    """Drafts by looking up the last tokens in prompt and text, on the device, without a model or parameters.

    For an encoder-decoder, the source is searched as well. A row without a match of at least `min_match` tokens drafts
    nothing; a step in which no row drafts is a plain one.

    Args:
      num_draft_tokens: K, the most tokens copied in a step.
      min_match: the shortest match that counts. One token alone predicts little.
      max_match: the longest match; longer ones count as equal to it.

    Raises:
      ValueError: for K < 0 or above `limits.MAX_DRAFT_TOKENS`, or matches that make no sense.
    """
    check_num_draft_tokens(num_draft_tokens)
    if not 1 <= min_match <= max_match:
        raise ValueError(f"min_match={min_match} and max_match={max_match}: need 1 <= min_match <= max_match.")

    def init(batch_size: int, max_len: int, max_source: int = 0) -> Source:
        del max_len
        return sources.init(batch_size, max_source)

    def propose(params: Params, state: Source, cache: Any, context: Context) -> tuple[Proposal, Source, Any]:
        del params
        find = functools.partial(lookup, num_draft_tokens=num_draft_tokens, min_match=min_match, max_match=max_match)
        text, source = context.history, state
        draft, available = jax.vmap(lambda t, n, s, m: find(t, n, source=s, source_length=m))(
            text.tokens, text.length, source.tokens, source.length
        )
        return Proposal(draft, jnp.minimum(available, context.max_draft), None), state, cache

    def update(params: Params, state: Source, feedback: Feedback) -> Source:
        del params
        return sources.update(state, feedback)

    return Drafter(init, propose, update, Topology.chain(num_draft_tokens))
