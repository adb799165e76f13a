"""Suffix lookup: the draft follows the majority of the places where the longest suffix of the text occurred before.

SuffixDecoding: Oliaro et al. 2024, arXiv 2411.04975 (suffix trees over earlier outputs, frequencies as scores, drafts
as long as the match allows). SAM decoding: Hu et al. 2024, arXiv 2411.10666 (a suffix automaton finds the longest match
of any length).

An online suffix automaton answers one question: at which earlier places does the longest suffix of the text end that
occurred before? The lengths of the common suffixes answer it too, and take one vector operation a token:

    matched[i] = (text[i] == last) (matched_before[i - 1] + 1),

the number of tokens that the text up to place i and the whole text end with in common. The greatest of them is the
length of the automaton's suffix link, and the places that have it are its end positions. The work is O(L) for each
committed token, without a pointer to follow, so that all rows advance in one operation.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from specjax.drafters import store, trie
from specjax.limits import check_num_draft_tokens, check_size
from specjax.types import AnyDrafter, Context, Draft, Drafter, Feedback, Params, Proposal, Topology

_NONE = -1
"""Parts corpus, source and text, and fills what is not written. It is not a token, so that no match crosses it."""


class State(NamedTuple):
    """What has been read, and how far the end of the text agrees with each place of it.

    Attributes:
      source: `[B, S + 2]` a copy of the text's first token, what an encoder has read, and -1; `[B, 0]` without one.
      text: `[B, L]` the text; -1 beyond it.
      matched: `[B, M]` how many tokens the text's end has in common with corpus, source and text up to each place: M is
        the sum of their sizes.
      length: `[B]` tokens of text.
    """

    source: Int[Array, "B S"]
    text: Int[Array, "B L"]
    matched: Int[Array, "B M"]
    length: Int[Array, " B"]


class _Options(NamedTuple):
    """The numbers of `suffix`, and the sizes of corpus and tree."""

    num_draft_tokens: int
    depth: int
    min_match: int
    max_match: int
    tokens_per_match: float
    min_probability: float
    num_occurrences: int
    lengths: tuple[int, ...]
    corpus_size: int


def advance(
    past: Int[Array, " M"], matched: Int[Array, " M"], token: Int[Array, ""], at: Int[Array, ""]
) -> Int[Array, " M"]:
    """The lengths of the common suffixes after one more token of the text.

    Args:
      past: `[M]` what is searched, with the text at its end, the new token included.
      matched: `[M]` before it.
      token: the new token.
      at: its place in `past`. Only places before it count: the text's end is no earlier occurrence of itself.
    """
    is_earlier = jnp.arange(past.shape[0]) < at
    return jnp.where((past == token) & is_earlier, jnp.roll(matched, 1) + 1, 0)


def continuations(
    past: Int[Array, " M"], matched: Int[Array, " M"], length: Int[Array, ""], begin: int, options: _Options
) -> tuple[Int[Array, "C D"], Int[Array, " C"], Int[Array, ""]]:
    """What follows each occurrence of the longest suffix of the text, the most recent occurrence first.

    Where a copy would run past the end of the text, it goes on periodically, as the copied tokens themselves would be
    looked up next.

    Args:
      past: `[M]` what is searched.
      matched: `[M]` the lengths of the common suffixes.
      length: tokens of text.
      begin: the place at which the text begins.
      options: of the drafter.

    Returns:
      `[C, D]` tokens; `[C]` how many of them there are; the length of the match. A match of the whole text counts,
      however short: an encoder-decoder's text begins as a copy of its source.
    """
    longest = jnp.max(matched)
    counts = (longest > 0) & ((longest >= options.min_match) | (longest == length))
    place = jnp.arange(past.shape[0], dtype=jnp.int32)
    # Places are numbered from 1, so that 0 is none.
    is_one = counts & (matched >= jnp.minimum(longest, options.max_match))
    found = jax.lax.top_k(jnp.where(is_one, place + 1, 0), min(options.num_occurrences, past.shape[0]))[0]
    end = found - 1
    period = jnp.where(end >= begin, begin + length - 1 - end, options.depth + 1)
    index = end[:, None] + 1 + jnp.arange(options.depth) % jnp.maximum(period, 1)[:, None]
    tokens = past.at[index].get(mode="fill", fill_value=_NONE)
    known = jnp.cumprod((tokens >= 0) & (found > 0)[:, None], axis=1)
    return tokens, jnp.sum(known, axis=1, dtype=jnp.int32), longest


def suffix(
    *,
    num_draft_tokens: int = 7,
    depth: int | None = None,
    min_match: int = 2,
    max_match: int | None = None,
    tokens_per_match: float = 4.0,
    min_probability: float = 0.2,
    num_occurrences: int = 32,
    lengths: tuple[int, ...] = (),
    corpus: Sequence[Sequence[int] | np.ndarray] | None = None,
) -> AnyDrafter:
    """Drafts what mostly followed the longest suffix of the text that occurred before.

    It reads prompt and text, for an encoder-decoder the source, and a corpus of earlier answers where one is given. All
    of its choices follow from the text alone, so every rule stays exact. `ngram` looks at one occurrence of at most 8
    tokens and always copies K tokens; this drafter finds matches of any length, has all occurrences vote, and drafts
    less where the match is short or the votes differ.

    Args:
      num_draft_tokens: K, the most tokens drafted in a step.
      depth: None drafts a chain, the majority's tokens. A number D below K drafts a tree of at most K nodes and D
        levels: of all continuations, the K most frequent prefixes (SuffixDecoding, Algorithm 1).
      min_match: the shortest match that counts, in tokens.
      max_match: longer matches count as equal to it, so that more occurrences vote; None: no bound.
      tokens_per_match: the most tokens on a path, for each token of the match (alpha of SuffixDecoding, section 3.2).
      min_probability: a draft ends before the first token whose path has a smaller relative frequency than this among
        the occurrences; 0: never.
      num_occurrences: the most occurrences that vote, the most recent ones.
      lengths: of a chain, shorter lengths whose scoring has programs of its own (`Topology.lengths`).
      corpus: token ids of texts, which are searched as if they stood before the text. Every committed token compares
        itself with all of them: for a corpus of more than some 10^5 tokens, `retrieval` is faster.

    Returns:
      a `Drafter`, or with a corpus a `Draft`, whose parameters are its tokens.

    Raises:
      ValueError: for numbers that make no sense, or an empty corpus.
    """
    check_num_draft_tokens(num_draft_tokens)
    if depth is not None:
        check_size("depth", depth, 1, max(num_draft_tokens - 1, 1))
    longest = 2**31 - 1 if max_match is None else max_match
    if not 1 <= min_match <= longest:
        raise ValueError(f"min_match={min_match} and max_match={max_match}: need 1 <= min_match <= max_match.")
    if not tokens_per_match > 0:
        raise ValueError(f"tokens_per_match={tokens_per_match}: above 0; a large number is no bound.")
    if not 0 <= min_probability <= 1:
        raise ValueError(f"min_probability={min_probability}: a probability, from 0 (off) to 1.")
    check_size("num_occurrences", num_occurrences)
    tokens = None if corpus is None else join(corpus)
    options = _Options(
        num_draft_tokens,
        num_draft_tokens if depth is None else depth,
        min_match,
        longest,
        float(tokens_per_match),
        float(min_probability),
        num_occurrences,
        tuple(lengths),
        0 if tokens is None else tokens.shape[0],
    )
    return _drafter(options) if tokens is None else Draft(_drafter(options), tokens)


def join(corpus: Sequence[Sequence[int] | np.ndarray]) -> Int[Array, " C"]:
    """The texts of a corpus one behind the other, with a -1 after each.

    Raises:
      ValueError: where there is no token, or one that is no token id.
    """
    joined = store.join(corpus, 2**31 - 1)
    ends = np.flatnonzero(joined.place == 0)[1:]
    return jnp.asarray(np.append(np.insert(joined.tokens, ends, _NONE), _NONE), jnp.int32)


def _chain(options: _Options, tokens: Array, length: Array, longest: Array) -> tuple[Array, Array]:
    """`[K]` the majority's tokens, and how many of them are proposed."""
    chain, share = trie.vote(tokens, length)
    sure = (jnp.cumprod(share) >= options.min_probability) & (share > 0)
    return chain, jnp.minimum(jnp.sum(jnp.cumprod(sure), dtype=jnp.int32), _reach(options, longest))


def _tree(options: _Options, tokens: Array, length: Array, longest: Array) -> trie.Nodes:
    """The most frequent prefixes."""
    within = jnp.minimum(length, _reach(options, longest))
    weight = jnp.ones(tokens.shape, jnp.float32)
    nodes = trie.merge(tokens, within, weight, options.num_draft_tokens)
    return trie.cut(nodes, options.min_probability * jnp.sum(length > 0, dtype=jnp.float32))


def _reach(options: _Options, longest: Int[Array, ""]) -> Int[Array, ""]:
    """How many tokens a match of that length lets a path have."""
    reach = jnp.ceil(longest.astype(jnp.float32) * options.tokens_per_match)
    return jnp.minimum(reach, options.depth).astype(jnp.int32)


def _learn(state: State, feedback: Feedback) -> State:
    """The state with a new source and the new tokens of the text, but with the old `matched`."""
    prompt, source = feedback.inputs, state.source
    is_new = jnp.arange(feedback.tokens.shape[1]) < feedback.num_tokens[:, None]
    tokens = jnp.where(is_new, feedback.tokens, _NONE)
    write = jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice(row, new, (at,)))
    text = write(state.text, tokens, feedback.length - feedback.num_tokens)
    if prompt is not None and prompt.source is not None and prompt.source_length is not None:
        known = jnp.arange(prompt.source.shape[1]) < prompt.source_length[:, None]
        source = source.at[:, 1:-1].set(jnp.where(known, prompt.source, _NONE))
    if source.shape[1]:
        # A text begins as a copy of its source: the text's first token stands before the source, too.
        source = source.at[:, 0].set(text[:, 0])
    return State(source, text, state.matched, feedback.length)


@functools.cache
def _drafter(options: _Options) -> Drafter:
    def init(batch_size: int, max_len: int, max_source: int = 0) -> State:
        size = max_source + 2 if max_source else 0
        return State(
            jnp.full((batch_size, size), _NONE, jnp.int32),
            jnp.full((batch_size, max_len), _NONE, jnp.int32),
            jnp.zeros((batch_size, options.corpus_size + size + max_len), jnp.int32),
            jnp.zeros(batch_size, jnp.int32),
        )

    def past_of(params: Params, state: State) -> tuple[Int[Array, "B M"], int]:
        """All that is searched, and the place at which the text begins in it."""
        parts = [state.source, state.text]
        if options.corpus_size:
            parts.insert(0, jnp.broadcast_to(params.draft, (state.text.shape[0], options.corpus_size)))
        return jnp.concatenate(parts, axis=1), options.corpus_size + state.source.shape[1]

    def propose(params: Params, state: State, cache: Any, context: Context) -> tuple[Proposal, State, Any]:
        past, begin = past_of(params, state)
        find = functools.partial(continuations, begin=begin, options=options)
        found = jax.vmap(find)(past, state.matched, length=state.length)
        if options.depth == options.num_draft_tokens:
            tokens, length = jax.vmap(functools.partial(_chain, options))(*found)
            return Proposal(tokens, jnp.minimum(length, context.max_draft), None), state, cache
        nodes = jax.vmap(functools.partial(_tree, options))(*found)
        return nodes.proposal(context.max_draft), state, cache

    def update(params: Params, state: State, feedback: Feedback) -> State:
        begin = feedback.length - feedback.num_tokens
        state = _learn(state, feedback)
        past, offset = past_of(params, state)

        def read(matched: Array, new: tuple[Array, Array]) -> tuple[Array, None]:
            token, i = new
            after = jax.vmap(advance)(past, matched, token, offset + begin + i)
            return jnp.where((i < feedback.num_tokens)[:, None], after, matched), None

        tokens = feedback.tokens.T
        matched, _ = jax.lax.scan(read, state.matched, (tokens, jnp.arange(tokens.shape[0])))
        return state._replace(matched=matched)

    return Drafter(init, propose, update, Topology(options.num_draft_tokens, options.depth, lengths=options.lengths))
