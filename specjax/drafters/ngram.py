"""Prompt lookup: the draft is what followed the last tokens where they occurred before.

Saxena 2023 (prompt lookup decoding); LLMA, arXiv 2304.04487. For an encoder-decoder, the source is searched too, and a
text is first drafted as a copy of it (aggressive decoding, Sun et al. 2021, arXiv 2106.04970).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from specjax.drafters import source as sources
from specjax.drafters import trie
from specjax.drafters.source import Source
from specjax.limits import check_num_draft_tokens, check_size
from specjax.types import Context, Drafter, Feedback, Params, Proposal, Topology

_DECAY = 0.8
"""The weight of each token of a copy relative to the one before it, where copies compete for the nodes of a tree."""


class _Found(NamedTuple):
    """All places of what is searched: a source and the text of one row.

    Attributes:
      past: `[M]` the tokens.
      matched: `[M]` how many tokens up to each place are those that the text ends with.
      in_text: `[M]` whether the place is one of the text, not of the source.
      last: `[M]` the place of the last token of source or text, behind which there is nothing.
    """

    past: Int[Array, " M"]
    matched: Int[Array, " M"]
    in_text: Bool[Array, " M"]
    last: Int[Array, " M"]


def _compare(
    tokens: Int[Array, " L"],
    length: Int[Array, ""],
    max_match: int,
    source: Int[Array, " S"],
    source_length: Int[Array, ""],
) -> _Found:
    """Compares the end of the text with all places; the arguments are those of `lookup`."""
    offset = source.shape[0] + 1 if source.shape[0] else 0
    past = jnp.concatenate([tokens[:1], source, tokens]) if offset else tokens
    place = jnp.arange(past.shape[0])
    in_text = place >= offset
    begin = jnp.where(in_text, offset, 0)
    last = jnp.where(in_text, offset + length - 1, source_length)
    matched = jnp.zeros(past.shape[0], jnp.int32)
    running = place < last
    # Slices of one padded array are read where they lie, all in one pass; what `jnp.roll` returns is written each time.
    padded = jnp.pad(past, (max_match, 0))
    for back in range(max_match):
        # The token `back` before the end of the text, compared with the token `back` before every position.
        wanted = tokens[jnp.maximum(length - 1 - back, 0)]
        before = padded[max_match - back : padded.shape[0] - back]
        running = running & (before == wanted) & (place - back >= begin) & (length > back)
        matched = matched + running
    return _Found(past, matched, in_text, last)


def _copy(
    found: _Found, end: Int[Array, ""], length: Int[Array, ""], size: int, min_match: int
) -> tuple[Int[Array, " K"], Int[Array, ""]]:
    """`[K]` the tokens behind a match that ends at that place, and how many there are."""
    match, period = found.matched[end], jnp.maximum(found.last[end] - end, 1)
    draft = found.past[end + 1 + jnp.arange(size) % period]
    available = jnp.where(found.in_text[end], size, jnp.minimum(period, size))
    return draft, jnp.where((match >= min_match) | (match == length), available, 0)


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
    found = _compare(tokens, length, max_match, source, source_length)
    best = jnp.argmax(found.matched * found.past.shape[0] + jnp.arange(found.past.shape[0]))
    return _copy(found, best, length, num_draft_tokens, min_match)


def lookup_tree(
    tokens: Int[Array, " L"],
    length: Int[Array, ""],
    num_draft_tokens: int,
    min_match: int,
    max_match: int,
    source: Int[Array, " S"],
    source_length: Int[Array, ""],
    *,
    depth: int,
    num_candidates: int,
) -> trie.Nodes:
    """Merges what follows the longest earlier occurrences of the text's last tokens into a tree.

    Each occurrence weighs half as much as the one before it, and each token of its copy a little less than the one
    before it: the first copy is the longest path, and later ones branch from it.

    Args:
      tokens: `[L]` the text buffer.
      length: tokens of text in it.
      num_draft_tokens: K, the most nodes.
      min_match: as for `lookup`.
      max_match: as for `lookup`.
      source: `[S]` as for `lookup`.
      source_length: the number of its tokens.
      depth: the most tokens of each copy.
      num_candidates: how many occurrences are merged: the longest, and of equal ones the most recent.
    """
    found = _compare(tokens, length, max_match, source, source_length)
    size = found.past.shape[0]
    rank = found.matched * size + jnp.arange(size, dtype=jnp.int32)
    best = jax.lax.top_k(rank, min(num_candidates, size))[1]
    chains, available = jax.vmap(lambda end: _copy(found, end, length, depth, min_match))(best)
    weight = 0.5 ** jnp.arange(best.shape[0])[:, None] * _DECAY ** jnp.arange(depth)
    return trie.merge(chains, jnp.where(found.matched[best] > 0, available, 0), weight, num_draft_tokens)


@functools.cache
def ngram(
    *,
    num_draft_tokens: int = 7,
    min_match: int = 2,
    max_match: int = 8,
    depth: int | None = None,
    num_candidates: int = 8,
    lengths: tuple[int, ...] = (),
) -> Drafter:
    """Drafts by looking up the last tokens in prompt and text, on the device, without a model or parameters.

    For an encoder-decoder, the source is searched as well. A row without a match of at least `min_match` tokens drafts
    nothing; a step in which no row drafts is a plain one.

    Args:
      num_draft_tokens: K, the most tokens copied in a step.
      min_match: the shortest match that counts. One token alone predicts little.
      max_match: the longest match; longer ones count as equal to it.
      depth: None drafts a chain, the copy behind one match. A number D below K drafts a tree of at most K nodes and D
        levels: the copies behind several matches, whose common beginnings are shared.
      num_candidates: how many matches a tree has at most.
      lengths: of a chain, shorter lengths whose scoring has programs of its own (`Topology.lengths`).

    Raises:
      ValueError: for K < 0 or above `limits.MAX_DRAFT_TOKENS`, matches that make no sense, or a depth that leaves no
        room for a tree.
    """
    check_num_draft_tokens(num_draft_tokens)
    if not 1 <= min_match <= max_match:
        raise ValueError(f"min_match={min_match} and max_match={max_match}: need 1 <= min_match <= max_match.")
    if depth is not None:
        check_size("depth", depth, 1, max(num_draft_tokens - 1, 1))
        check_size("num_candidates", num_candidates)
    matches: dict[str, int] = {
        "num_draft_tokens": num_draft_tokens,
        "min_match": min_match,
        "max_match": max_match,
    }

    def init(batch_size: int, max_len: int, max_source: int = 0) -> Source:
        del max_len
        return sources.init(batch_size, max_source)

    def propose(params: Params, state: Source, cache: Any, context: Context) -> tuple[Proposal, Source, Any]:
        del params
        text, room = context.history, context.max_draft
        rows = text.tokens, text.length, state.tokens, state.length
        if depth is None or depth == num_draft_tokens:
            find = functools.partial(lookup, **matches)
            draft, available = jax.vmap(lambda t, n, s, m: find(t, n, source=s, source_length=m))(*rows)
            return Proposal(draft, jnp.minimum(available, room), None), state, cache
        grow = functools.partial(lookup_tree, **matches, depth=depth, num_candidates=num_candidates)
        nodes = jax.vmap(lambda t, n, s, m: grow(t, n, source=s, source_length=m))(*rows)
        return nodes.proposal(room), state, cache

    def update(params: Params, state: Source, feedback: Feedback) -> Source:
        del params
        return sources.update(state, feedback)

    topology = Topology(num_draft_tokens, num_draft_tokens if depth is None else depth, lengths=lengths)
    return Drafter(init, propose, update, topology)
