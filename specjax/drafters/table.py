"""N-gram tables with back-off, counted from a corpus: the cheapest drafts there are.

Leviathan et al. 2022, section 4, drafts with unigrams and bigrams. The estimate is interpolated absolute discounting
(Ney, Essen, Kneser 1994): for a context h seen c(h) times,

    p(w | h) = max(c(h w) - d, 0) / c(h) + backoff(h) p(w | h without its oldest token),

and what the discount d and all pruning take away is backoff(h), so that every distribution sums to 1. Unigrams back off
to the uniform distribution: no token has probability 0.
"""

import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from specjax import sampling
from specjax.drafters import chain, model_tree, store, table_tree
from specjax.limits import check_num_draft_tokens
from specjax.text.tokenizer import Tokenizer
from specjax.types import Context, Draft, Drafter, Params, Proposal, Topology

KIND = "ngram"


class Trie(NamedTuple):
    """The contexts, read from their newest token backwards: one walk from the root passes those of every length.

    Nodes are in breadth-first order, so that the children of a node are adjacent, by ascending token. Node 0 is the
    empty context, whose distribution is dense.

    Attributes:
      token: `[N]` the oldest token of each node's context; -1 for the root.
      children: `[N + 1]` the children of node i are the nodes `children[i]` to `children[i + 1] - 1`.
      successors: `[N + 1]` its successors are the entries `successors[i]` to `successors[i + 1] - 1`.
      backoff: `[N]` the weight of the distribution after a context that is one token shorter.
      successor: `[E]` the tokens that follow, those of a node by descending frequency; padded at the end.
      weight: `[E]` their discounted probabilities.
      unigram: `[V]` the distribution without context.
    """

    token: Int[Array, " N"]
    children: Int[Array, " N+1"]
    successors: Int[Array, " N+1"]
    backoff: Float[Array, " N"]
    successor: Int[Array, " E"]
    weight: Float[Array, " E"]
    unigram: Float[Array, " V"]


class Table(NamedTuple):
    """A counted table, from which the drafter `table` drafts.

    Attributes:
      params: the trie; its arrays are arguments of the loop.
      tokenizer: the tokenizer of the token ids, or None.
      vocab_size: V of the table.
      order: N; a distribution depends on the last N - 1 tokens.
      max_successors: the most successors that a context has.
      info: what was counted and what was dropped, as JSON values.
    """

    params: Trie
    tokenizer: Tokenizer | None
    vocab_size: int
    order: int
    max_successors: int
    info: dict[str, Any]


class _Level(NamedTuple):
    """All contexts of one length, numbered from 0, and their successors."""

    parent: np.ndarray
    token: np.ndarray
    owner: np.ndarray
    successor: np.ndarray
    weight: np.ndarray
    times: np.ndarray


def _discount(count: np.ndarray) -> float:
    """d = n1 / (n1 + 2 n2), from the numbers of n-grams seen once and twice (Ney, Essen, Kneser 1994)."""
    once, twice = int(np.sum(count == 1)), int(np.sum(count == 2))
    # Kept below 1, where n-grams seen once would be lost, and above 0, where no mass would be left to back off with.
    return float(np.clip(once / max(once + 2 * twice, 1), 0.1, 0.9))


def _unigram(tokens: np.ndarray, vocab_size: int) -> tuple[np.ndarray, float]:
    count = np.bincount(tokens, minlength=vocab_size)
    discount = _discount(count)
    probs = np.maximum(count - discount, 0) / len(tokens)
    return probs + (1 - probs.sum()) / vocab_size, discount


def _ranks(owner: np.ndarray) -> np.ndarray:
    """The index of each entry among those of its owner, for ascending owners."""
    starts = np.flatnonzero(np.append(True, owner[1:] != owner[:-1])) if len(owner) else owner
    return np.arange(len(owner)) - np.repeat(starts, np.diff(np.append(starts, len(owner))))


def _levels(
    texts: store.Texts, order: int, vocab_size: int, context_tokens: int, min_count: int, max_successors: int
) -> tuple[list[_Level], dict[str, Any]]:
    """Contexts of 1 to N - 1 tokens, and statistics of the counts."""
    at = np.flatnonzero(texts.place >= context_tokens)
    node = np.zeros(len(at), np.int64)
    levels: list[_Level] = []
    seen, discounts, rare, crowded = [], [], 0, 0
    for back in range(1, order):
        within = texts.place[at] >= back
        at, node = at[within], node[within]
        # The number of a context is its rank by its shorter context's number, then by its oldest token: breadth first.
        context, node = np.unique(node * vocab_size + texts.tokens[at - back], return_inverse=True)
        gram, count = np.unique(node * vocab_size + texts.tokens[at], return_counts=True)
        total = np.bincount(node, minlength=len(context))
        owner, successor = np.divmod(gram, vocab_size)
        discounts.append(_discount(count))
        seen.append(len(gram))
        weight = (count - discounts[-1]) / total[owner]
        by_count = np.lexsort((successor, -count, owner))
        by_count = by_count[count[by_count] >= min_count]
        rare += len(gram) - len(by_count)
        kept = by_count[_ranks(owner[by_count]) < max_successors]
        crowded += len(by_count) - len(kept)
        parent, token = np.divmod(context, vocab_size)
        levels.append(_Level(parent, token, owner[kept], successor[kept], weight[kept], count[kept]))
    info = {"seen": seen, "discounts": discounts, "dropped": {"min_count": rare, "max_successors": crowded}}
    return levels, info


def _prune(levels: list[_Level], max_entries: int) -> tuple[list[_Level], int]:
    """Drops the rarest n-grams beyond `max_entries`, in a tie the longest first; also returns how many."""
    count = np.concatenate([level.times for level in levels] or [np.zeros(0, np.int64)])
    excess = max(len(count) - max_entries, 0)
    if not excess:
        return levels, 0
    depth = np.repeat(np.arange(len(levels)), [len(level.times) for level in levels])
    keep = np.zeros(len(count), bool)
    keep[np.lexsort((depth, -count))[:max_entries]] = True
    pruned = []
    for level, kept in zip(levels, np.split(keep, np.cumsum([len(level.times) for level in levels])[:-1]), strict=True):
        pruned.append(
            level._replace(
                owner=level.owner[kept],
                successor=level.successor[kept],
                weight=level.weight[kept],
                times=level.times[kept],
            )
        )
    return pruned, excess


def _trie(levels: list[_Level], unigram: np.ndarray, max_successors: int) -> Trie:
    """Contexts that have successors left, numbered through all levels.

    If a context is left, so are its shorter ones: their n-grams are at least as frequent, and pruning takes the rarest
    first, in a tie the longest.
    """
    token, parent, owner = [np.full(1, -1)], [np.zeros(0, np.int64)], []
    number, first = np.zeros(1, np.int64), 1
    for level in levels:
        kept = np.bincount(level.owner, minlength=len(level.token)) > 0
        above, number = number, first + np.cumsum(kept) - 1
        token.append(level.token[kept])
        parent.append(above[level.parent[kept]])
        owner.append(number[level.owner])
        first += int(kept.sum())
    entries = np.concatenate([*owner, np.zeros(0, np.int64)]).astype(np.int64)
    weights = np.concatenate([*(level.weight for level in levels), np.zeros(max_successors)]).astype(np.float32)
    successor = np.concatenate([*(level.successor for level in levels), np.zeros(max_successors)]).astype(np.int32)
    listed = np.bincount(entries, weights=weights[: len(entries)], minlength=first)

    def begins(owners: np.ndarray, start: int) -> np.ndarray:
        return start + np.append(0, np.cumsum(np.bincount(owners, minlength=first)))

    return Trie(
        jnp.asarray(np.concatenate(token), jnp.int32),
        jnp.asarray(begins(np.concatenate(parent), 1), jnp.int32),
        jnp.asarray(begins(entries, 0), jnp.int32),
        jnp.asarray(np.maximum(1 - listed, 0), jnp.float32),
        jnp.asarray(successor),
        jnp.asarray(weights),
        jnp.asarray(unigram, jnp.float32),
    )


def count_ngrams(
    texts: Sequence[Sequence[int] | np.ndarray],
    *,
    vocab_size: int,
    order: int = 3,
    min_count: int = 1,
    max_successors: int = 64,
    max_entries: int = 2_000_000,
    context_tokens: int = 0,
    tokenizer: Tokenizer | None = None,
) -> Table:
    """Counts n-grams of 1 to `order` tokens; none crosses from one text into another.

    The table takes at most 24 bytes for each of `max_entries`, and 4 for each token of the vocabulary.

    Args:
      texts: token ids.
      vocab_size: V; ids lie below it.
      order: N; 1 counts unigrams alone, 2 bigrams.
      min_count: n-grams of two tokens or more that occur fewer times are dropped.
      max_successors: the most tokens that a context lists, the most frequent ones. Every draft token reads this many
        for each context.
      max_entries: the most n-grams of two tokens or more that are kept; the rarest are dropped first.
      context_tokens: how many tokens at the beginning of each text are only context, and never drafted.
      tokenizer: the tokenizer of the ids, which is kept with the table.

    Raises:
      ValueError: for numbers that make no sense, no tokens, or tokens beyond the vocabulary.
    """
    least = {"order": (order, 1), "min_count": (min_count, 1), "max_successors": (max_successors, 1)}
    least |= {"max_entries": (max_entries, 0), "context_tokens": (context_tokens, 0)}
    for name, (value, low) in least.items():
        if value < low:
            raise ValueError(f"{name}={value}: at least {low}.")
    joined = store.join(texts, vocab_size)
    predicted = joined.tokens[joined.place >= context_tokens]
    if not len(predicted):
        raise ValueError(f"context_tokens={context_tokens} leaves no token of {len(texts)} texts to count: lower it.")
    unigram, discount = _unigram(predicted, vocab_size)
    levels, info = _levels(joined, order, vocab_size, context_tokens, min_count, max_successors)
    levels, excess = _prune(levels, max_entries)
    trie = _trie(levels, unigram, max_successors)
    info = {
        "order": order,
        "vocab_size": vocab_size,
        "max_successors": max_successors,
        "texts": len(texts),
        "tokens": len(joined.tokens),
        "contexts": int(trie.token.shape[0]) - 1,
        "entries": [len(level.times) for level in levels],
        "seen": info["seen"],
        "dropped": info["dropped"] | {"max_entries": excess},
        "discounts": [discount, *info["discounts"]],
        "bytes": sum(array.nbytes for array in trie),
    }
    return Table(trie, tokenizer, vocab_size, order, max_successors, info)


def save_table(table: Table, directory: str | pathlib.Path) -> None:
    """Writes a table and its tokenizer, so that `load_table` reads them back bit for bit."""
    store.write(directory, KIND, table.params._asdict(), table.info, table.tokenizer)


def load_table(path: str | pathlib.Path, *, tokenizer: Tokenizer | None = None) -> Table:
    """Reads a table that `save_table` wrote.

    Args:
      path: its directory, or the file in it.
      tokenizer: the tokenizer of its ids, for a directory without one.

    Raises:
      FileNotFoundError: where there is no such file.
      ValueError: for another kind or format, a truncated or damaged file, or another vocabulary.
    """
    arrays, info, tokenizer = store.read(path, KIND, Trie._fields, tokenizer)
    trie = Trie(**{name: jnp.asarray(array) for name, array in arrays.items()})
    return Table(trie, tokenizer, info["vocab_size"], info["order"], info["max_successors"], info)


def _child(trie: Trie, node: Int[Array, ""], token: Int[Array, ""]) -> tuple[Bool[Array, ""], Int[Array, ""]]:
    """Whether a node has a child of that token, and which."""
    size = trie.token.shape[0]
    end = trie.children[node + 1]

    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low + high) // 2
        below = (low < high) & (trie.token[jnp.minimum(middle, size - 1)] < token)
        return jnp.where(below, middle + 1, low), jnp.where(below, high, middle)

    low, _ = jax.lax.fori_loop(0, size.bit_length(), halve, (trie.children[node], end))
    return (low < end) & (trie.token[jnp.minimum(low, size - 1)] == token), low


def distribution(trie: Trie, last: Int[Array, " C"], max_successors: int) -> Float[Array, " V"]:
    """The distribution of the token that follows a text.

    Args:
      trie: the table.
      last: `[N - 1]` the last tokens of the text, the newest first; -1 before its beginning.
      max_successors: the most successors that a context of the table has.

    Returns:
      `[V]`, summing to 1.
    """
    probs, vocab_size = trie.unigram, trie.unigram.shape[0]
    node, found = jnp.zeros((), jnp.int32), jnp.ones((), bool)
    for back in range(last.shape[0]):
        is_child, child = _child(trie, node, last[back])
        found = found & is_child
        node = jnp.where(found, child, 0)
        begin = trie.successors[node]
        listed = found & (jnp.arange(max_successors) < trie.successors[node + 1] - begin)
        tokens = jax.lax.dynamic_slice(trie.successor, (begin,), (max_successors,))
        weights = jax.lax.dynamic_slice(trie.weight, (begin,), (max_successors,))
        probs = probs * jnp.where(found, trie.backoff[node], 1.0)
        probs = probs.at[jnp.where(listed, tokens, vocab_size)].add(weights, mode="drop")
    return probs


def table(
    source: Table,
    *,
    num_draft_tokens: int | None = None,
    topology: Sequence[int] | Sequence[Sequence[int]] | None = None,
) -> Draft:
    """Drafts with an n-gram table of the target's vocabulary.

    Args:
      source: from `load_table` or `count_ngrams`.
      num_draft_tokens: K, for a chain, which is drawn from the table's distributions; by default 4.
      topology: of a tree (see `drafters.model`): the most probable tokens after each node, chosen deterministically.

    Raises:
      ValueError: for K < 0 or above `limits.MAX_DRAFT_TOKENS`, a topology that is not a tree, or both.
    """
    if topology is None:
        num_draft_tokens = 4 if num_draft_tokens is None else num_draft_tokens
        check_num_draft_tokens(num_draft_tokens)
        drafter = _drafter(source.order, source.max_successors, num_draft_tokens)
    elif num_draft_tokens is not None:
        raise ValueError(f"topology={topology} says how many tokens are drafted: leave out num_draft_tokens.")
    else:
        levels = model_tree.parse(topology)
        drafter = table_tree.drafter(_predict(source.max_successors), source.order, levels)
    return Draft(drafter, source.params, source.tokenizer)


@functools.cache
def _predict(max_successors: int) -> Callable[[Trie, Int[Array, "B C"]], Float[Array, "B W"]]:
    """`distribution` for several texts; one function for each number, as a static argument."""
    return lambda trie, last: jax.vmap(lambda row: distribution(trie, row, max_successors))(last)


# Tables of one order and one bound give the same drafter, a static argument of the loop.
@functools.cache
def _drafter(order: int, max_successors: int, num_draft_tokens: int) -> Drafter:
    def propose(params: Params, state: tuple[()], cache: Any, context: Context) -> tuple[Proposal, tuple[()], Any]:
        def predict(last: Int[Array, "B C"]) -> Float[Array, "B W"]:
            probs = _predict(max_successors)(params.draft, last)
            return sampling.match_vocab(jnp.log(probs)[:, None], context.vocab_size)[:, 0]

        def advance(last: Int[Array, "B C"], token: Int[Array, " B"]) -> Int[Array, "B C"]:
            return jnp.concatenate([token[:, None], last], axis=1)[:, : order - 1]

        last = chain.last_tokens(context.history, order - 1)
        return chain.draw(predict, advance, last, context.max_draft, context), state, cache

    return Drafter(chain.init, propose, chain.update, Topology.chain(num_draft_tokens))
