"""Retrieval from a datastore: the draft is what follows the text's last tokens in a corpus.

REST: He et al. 2023, arXiv 2311.08252. A suffix array finds the longest match; its continuations, weighted by how often
they occur, are the draft's distribution: one chain is drawn from it, at temperature 0 the most frequent branch. With a
depth, the most frequent continuations are a tree, as in REST.
"""

import functools
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from specjax.drafters import chain, store, trie
from specjax.limits import check_num_draft_tokens, check_size
from specjax.text.tokenizer import Tokenizer
from specjax.types import Context, Draft, Drafter, Params, Proposal, Topology

KIND = "retrieval"
_END = -1
"""Follows every text of the corpus, and fills reads beyond the end. It is not a token, so that no match crosses it."""


class Index(NamedTuple):
    """A corpus and its suffix array.

    Attributes:
      tokens: `[N]` the texts, with a -1 after each.
      suffixes: `[M]` the positions of all tokens, in the order of the sequences that begin there, compared by their
        first `depth` tokens.
    """

    tokens: Int[Array, " N"]
    suffixes: Int[Array, " M"]


class Datastore(NamedTuple):
    """An indexed corpus, from which the drafter `retrieval` drafts.

    Attributes:
      params: the index; its arrays are arguments of the loop.
      tokenizer: the tokenizer of the token ids, or None.
      vocab_size: V of the corpus.
      depth: how many tokens the suffix array is sorted by: the longest match that can be looked up.
      info: what was indexed, as JSON values.
    """

    params: Index
    tokenizer: Tokenizer | None
    vocab_size: int
    depth: int
    info: dict[str, Any]


class Matches(NamedTuple):
    """The occurrences in the corpus of the longest match of a text's last tokens.

    Attributes:
      begin: `[]` the index of the first of them in the suffix array.
      number: `[]` how many there are.
      size: `[]` the match's length in tokens; 0: none.
    """

    begin: Int[Array, ""]
    number: Int[Array, ""]
    size: Int[Array, ""]


def suffix_array(tokens: Int[np.ndarray, " N"], depth: int) -> Int[np.ndarray, " N"]:
    """The positions of all tokens, ordered by at least the first `depth` tokens from there on, then by position.

    Prefix doubling (Manber, Myers 1990): the ranks by h tokens, taken in pairs, give those by 2 h. Beyond the end, the
    rank is the lowest.

    Args:
      tokens: `[N]` at least -1.
      depth: at least 1.
    """
    rank = tokens.astype(np.int64) + 2
    known = 1
    while known < depth:
        after = np.zeros_like(rank)
        after[:-known] = rank[known:]
        rank = np.unique(rank * (rank.max() + 1) + after, return_inverse=True)[1] + 1
        known *= 2
    return np.argsort(rank, kind="stable")


def index_corpus(
    texts: Sequence[Sequence[int] | np.ndarray],
    *,
    vocab_size: int,
    depth: int = 16,
    max_tokens: int = 50_000_000,
    tokenizer: Tokenizer | None = None,
) -> Datastore:
    """Indexes texts. The datastore takes 8 bytes per token.

    Args:
      texts: token ids.
      vocab_size: V; ids lie below it.
      depth: the longest match that can be looked up. Within this depth, the tokens after a match are sorted too, so
        that an evenly spaced sample has the continuations in their proportions.
      max_tokens: texts are left out, from the first that would exceed this on.
      tokenizer: the tokenizer of the ids, which is kept with the datastore.

    Raises:
      ValueError: for numbers that make no sense, no tokens, or tokens beyond the vocabulary.
    """
    if depth < 1:
        raise ValueError(f"depth={depth}: at least 1.")
    length = np.cumsum([len(text) + 1 for text in texts])
    kept = int(np.searchsorted(length, max_tokens, side="right"))
    if texts and not kept:
        raise ValueError(f"max_tokens={max_tokens} is less than the first text's {len(texts[0])} tokens: raise it.")
    joined = store.join(texts[:kept], vocab_size)
    ends = length[:kept] - np.arange(1, kept + 1)
    tokens = np.insert(joined.tokens, ends, _END).astype(np.int32)
    suffixes = suffix_array(tokens, depth)[kept:].astype(np.int32)
    index = Index(jnp.asarray(tokens), jnp.asarray(suffixes))
    info = {
        "vocab_size": vocab_size,
        "depth": depth,
        "texts": kept,
        "tokens": len(joined.tokens),
        "dropped": {"max_tokens": len(texts) - kept},
        "bytes": sum(array.nbytes for array in index),
    }
    return Datastore(index, tokenizer, vocab_size, depth, info)


def save_datastore(datastore: Datastore, directory: str | pathlib.Path) -> None:
    """Writes a datastore and its tokenizer, so that `load_datastore` reads them back bit for bit."""
    store.write(directory, KIND, datastore.params._asdict(), datastore.info, datastore.tokenizer)


def load_datastore(path: str | pathlib.Path, *, tokenizer: Tokenizer | None = None) -> Datastore:
    """Reads a datastore that `save_datastore` wrote.

    Args:
      path: its directory, or the file in it.
      tokenizer: the tokenizer of its ids, for a directory without one.

    Raises:
      FileNotFoundError: where there is no such file.
      ValueError: for another kind or format, a truncated or damaged file, or another vocabulary.
    """
    arrays, info, tokenizer = store.read(path, KIND, Index._fields, tokenizer)
    index = Index(**{name: jnp.asarray(array) for name, array in arrays.items()})
    return Datastore(index, tokenizer, info["vocab_size"], info["depth"], info)


def _search(index: Index, pattern: Int[Array, " C"], size: Int[Array, ""], *, beyond: bool) -> Int[Array, ""]:
    """The first index in the suffix array not below the pattern's first `size` tokens, or with `beyond` above them."""
    place = jnp.arange(pattern.shape[0])

    def before(rank: Array) -> Bool[Array, ""]:
        at = index.suffixes[jnp.minimum(rank, index.suffixes.shape[0] - 1)]
        tokens = index.tokens.at[at + place].get(mode="fill", fill_value=_END)
        differs = (tokens != pattern) & (place < size)
        first = jnp.argmax(differs)
        return jnp.where(jnp.any(differs), tokens[first] < pattern[first], beyond)

    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low + high) // 2
        below = (low < high) & before(middle)
        return jnp.where(below, middle + 1, low), jnp.where(below, high, middle)

    num = index.suffixes.shape[0]
    return jax.lax.fori_loop(0, num.bit_length(), halve, (jnp.zeros((), jnp.int32), jnp.full((), num, jnp.int32)))[0]


def lookup(index: Index, last: Int[Array, " C"], min_match: int) -> Matches:
    """Finds the longest match of a text's last tokens in the corpus.

    Args:
      index: the corpus.
      last: `[C]` the last tokens of the text, the newest first; -1 before its beginning. C is the longest match.
      min_match: the shortest match that counts.
    """
    longest = last.shape[0]

    def of_size(size: Array) -> Matches:
        pattern = last[jnp.maximum(size - 1 - jnp.arange(longest), 0)]
        begin, end = _search(index, pattern, size, beyond=False), _search(index, pattern, size, beyond=True)
        # A pattern longer than the text begins with a -1, as no suffix does.
        return Matches(begin, end - begin, jnp.where(end > begin, size, 0))

    matches = jax.vmap(of_size)(jnp.arange(min_match, longest + 1, dtype=jnp.int32))
    best = jnp.argmax(matches.size)
    return jax.tree.map(lambda x: x[best], matches)


def spaced(count: Int[Array, ""], number: int) -> Int[Array, " S"]:
    """floor(n count / S) for the S numbers n; the product itself would not fit 32 bits."""
    n = jnp.arange(number, dtype=jnp.int32)
    return n * (count // number) + n * (count % number) // number


def occurrences(index: Index, matches: Matches, num_occurrences: int) -> tuple[Int[Array, " S"], Bool[Array, " S"]]:
    """Evenly spaced occurrences of a match, or all of them where there are few.

    Returns:
      `[S]` the position of the token after each, and whether there is such an occurrence.
    """
    n = jnp.arange(num_occurrences, dtype=jnp.int32)
    few = matches.number <= num_occurrences
    rank = matches.begin + jnp.where(few, n, spaced(matches.number, num_occurrences))
    there = (n < matches.number) & (matches.size > 0)
    return index.suffixes[jnp.minimum(rank, index.suffixes.shape[0] - 1)] + matches.size, there


def _next(index: Index, at: Int[Array, "*S"]) -> Int[Array, "*S"]:
    return index.tokens.at[at].get(mode="fill", fill_value=_END)


def histogram(index: Index, at: Int[Array, " S"], alive: Bool[Array, " S"], vocab_size: int) -> Float[Array, " V"]:
    """How many of the occurrences that are alive continue with each token; at the end of a text there is none."""
    token = _next(index, at)
    known = alive & (token >= 0)
    return jnp.zeros(vocab_size).at[jnp.where(known, token, vocab_size)].add(1.0, mode="drop")


def retrieval(
    source: Datastore,
    *,
    num_draft_tokens: int = 4,
    min_match: int = 2,
    max_match: int = 8,
    num_occurrences: int = 64,
    depth: int | None = None,
) -> Draft:
    """Drafts what follows the text's last tokens in a corpus; a row without a match drafts nothing.

    A chain is drawn from the continuations, and states their frequencies. A tree has the most frequent ones, as in
    REST, section 3.2: it is chosen deterministically, and states no probabilities.

    Args:
      source: from `load_datastore` or `index_corpus`.
      num_draft_tokens: K.
      min_match: the shortest match that counts, in tokens.
      max_match: the longest match; longer ones count as equal to it.
      num_occurrences: the most occurrences in the corpus that are counted for one distribution.
      depth: None drafts a chain. A number D below K drafts a tree of at most K nodes and D levels.

    Raises:
      ValueError: for numbers that make no sense, or a `max_match` above the datastore's depth.
    """
    check_num_draft_tokens(num_draft_tokens)
    if not 1 <= min_match <= max_match:
        raise ValueError(f"min_match={min_match} and max_match={max_match}: need 1 <= min_match <= max_match.")
    if max_match > source.depth:
        raise ValueError(
            f"max_match={max_match} is more than the datastore's depth of {source.depth}: lower it, or index the "
            "corpus with a greater depth."
        )
    if num_occurrences < 1:
        raise ValueError(f"num_occurrences={num_occurrences}: at least 1.")
    if depth is None or depth == num_draft_tokens == 1:
        drafter = _drafter(num_draft_tokens, min_match, max_match, num_occurrences)
    else:
        check_size("depth", depth, 1, max(num_draft_tokens - 1, 1))
        drafter = _tree_drafter(num_draft_tokens, depth, min_match, max_match, num_occurrences)
    return Draft(drafter, source.params, source.tokenizer)


@functools.cache
def _drafter(num_draft_tokens: int, min_match: int, max_match: int, num_occurrences: int) -> Drafter:
    def propose(params: Params, state: tuple[()], cache: Any, context: Context) -> tuple[Proposal, tuple[()], Any]:
        index: Index = params.draft

        def find(last: Int[Array, " C"]) -> tuple[Array, Array]:
            return occurrences(index, lookup(index, last, min_match), num_occurrences)

        def predict(carry: tuple[Array, Array]) -> Float[Array, "B V"]:
            count = jax.vmap(lambda at, alive: histogram(index, at, alive, context.vocab_size))(*carry)
            return jnp.log(count)

        def advance(carry: tuple[Array, Array], token: Int[Array, " B"]) -> tuple[Array, Array]:
            at, alive = carry
            return at + 1, alive & (_next(index, at) == token[:, None])

        start = jax.vmap(find)(chain.last_tokens(context.history, max_match))
        length = jnp.where(jnp.any(start[1], axis=1), context.max_draft, 0)
        return chain.draw(predict, advance, start, length, context), state, cache

    return Drafter(chain.init, propose, chain.update, Topology.chain(num_draft_tokens))


@functools.cache
def _tree_drafter(num_nodes: int, depth: int, min_match: int, max_match: int, num_occurrences: int) -> Drafter:
    def grow(index: Index, last: Int[Array, " C"], vocab_size: int) -> trie.Nodes:
        """The most frequent prefixes of what follows one row's text."""
        at, there = occurrences(index, lookup(index, last, min_match), num_occurrences)
        tokens = _next(index, at[:, None] + jnp.arange(depth))
        known = jnp.cumprod((tokens >= 0) & (tokens < vocab_size) & there[:, None], axis=1)
        return trie.merge(tokens, jnp.sum(known, axis=1, dtype=jnp.int32), jnp.ones(tokens.shape), num_nodes)

    def propose(params: Params, state: tuple[()], cache: Any, context: Context) -> tuple[Proposal, tuple[()], Any]:
        last = chain.last_tokens(context.history, max_match)
        nodes = jax.vmap(lambda row: grow(params.draft, row, context.vocab_size))(last)
        return nodes.proposal(context.max_draft), state, cache

    return Drafter(chain.init, propose, chain.update, Topology(num_nodes, depth))
