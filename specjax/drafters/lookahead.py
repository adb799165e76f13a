"""Lookahead decoding: the target writes n-grams ahead of the text, and guesses with those that it wrote before.

Fu et al. 2024, arXiv 2402.02057. The lookahead branch is a window of N - 1 rows of W tokens, Jacobi iterates of W
trajectories; the verification branch reads G guesses out of a pool of the n-grams that the trajectories have left. One
call of the target reads both: the guesses as a tree, the window as probes.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from specjax import sampling
from specjax.drafters import chain, pool, trie
from specjax.limits import MAX_DRAFT_TOKENS, check_size
from specjax.types import Context, Drafter, Feedback, Inputs, Params, Probes, Proposal, Topology


class State(NamedTuple):
    """The state of lookahead decoding.

    Attributes:
      window: `[B, N - 1, W]` element (l, i) stands l + i positions behind the last committed token, whose place (0, 0)
        is; what the array holds there is not used.
      pool: `[B, H, G, N]` see `pool`.
    """

    window: Int[Array, "B R W"]
    pool: Int[Array, "B H G n"]


def mask(window: int, ngram: int) -> Bool[np.ndarray, "R W R W"]:
    """Which elements of the window each sees: those of row 0 up to its own column, then its own column down to itself.

    So element (l, i) continues the i + l tokens before it (Figure 2 of the paper).
    """
    row, column, other_row, other_column = np.ogrid[: ngram - 1, :window, : ngram - 1, :window]
    in_first_row = (other_row == 0) & (other_column <= column)
    in_own_column = (other_column == column) & (other_row <= row)
    return in_first_row | in_own_column


def _filled(inputs: Inputs, window: int, ngram: int) -> Int[Array, "B R W"]:
    """A first window out of the prompt: column i is a run of its tokens, begun i / W of the way through it."""
    tokens, length = _read(inputs)
    begin = jnp.arange(window) * length[:, None] // window
    at = (begin[:, None] + jnp.arange(ngram - 1)[:, None]) % jnp.maximum(length, 1)[:, None, None]
    return jnp.take_along_axis(tokens, at.reshape(len(tokens), -1), axis=1).reshape(at.shape)


def _read(inputs: Inputs) -> tuple[Int[Array, "B P"], Int[Array, " B"]]:
    """The tokens of a prompt: for an encoder-decoder, those of its source."""
    if inputs.source is None or inputs.source_length is None:
        return inputs.tokens, inputs.length
    return inputs.source, inputs.source_length


def guesses_of(found: Int[Array, "G m"], count: Int[Array, ""]) -> trie.Nodes:
    """The guesses of one row, the first `count` of those found, as a tree that has their common beginnings once."""
    number, size = found.shape
    length = jnp.where(jnp.arange(number) < count, size, 0)
    return trie.merge(found, length, jnp.ones(found.shape, jnp.float32), number * size)


@functools.cache
def lookahead(*, window: int = 10, ngram: int = 4, guesses: int = 7, num_buckets: int = 1024) -> Drafter:
    """Drafts n-grams that the target itself wrote ahead, without a model or parameters.

    A step reads G (N - 1) tokens of guesses and (N - 1) W - 1 tokens of the window besides the last token. It pays
    where reading that many tokens costs little more than reading one.

    The paper fills the window row by row in N - 2 calls, from random tokens of the prompt. Here it begins with runs of
    the prompt's tokens in all rows, which have moved out of it after N - 2 steps; until then its n-grams are such runs
    with a new last token. The n-grams of the prompt itself are in the pool from the start. The window's tokens are the
    target's argmax at any temperature; they only make guesses, so the text does not depend on it. Guesses with a common
    beginning share its nodes.

    Args:
      window: W, the number of trajectories; at least 1.
      ngram: N, the tokens of an n-gram; a guess has N - 1 of them. At least 3.
      guesses: G, the most guesses of a step, and the n-grams that a bucket of the pool keeps; at least 1.
      num_buckets: H, buckets of the pool; it takes 4 H G N bytes a row.

    Raises:
      ValueError: for numbers below these, or more tokens in a step than `limits.MAX_DRAFT_TOKENS`.
    """
    for name, value, least in (("window", window, 1), ("ngram", ngram, 3), ("guesses", guesses, 1)):
        check_size(name, value, least, MAX_DRAFT_TOKENS)
    check_size("num_buckets", num_buckets, 1, 1 << 20)
    num_nodes, num_probes = guesses * (ngram - 1), (ngram - 1) * window - 1
    if num_nodes + num_probes > MAX_DRAFT_TOKENS:
        raise ValueError(
            f"window={window}, ngram={ngram}, guesses={guesses}: a step would read {num_nodes + num_probes} tokens "
            f"behind the text; at most {MAX_DRAFT_TOKENS}."
        )
    topology = Topology(num_nodes, ngram - 1, num_probes=num_probes)
    # The element (0, 0) is the last committed token, which is the first of the block; the others are the probes.
    in_window = mask(window, ngram).reshape(num_probes + 1, num_probes + 1)[1:]
    sees = np.concatenate([in_window[:, :1], np.zeros((num_probes, num_nodes), bool), in_window[:, 1:]], axis=1)
    depth = np.add.outer(np.arange(ngram - 1), np.arange(window)).reshape(-1)[1:].astype(np.int32)

    def init(batch_size: int, max_len: int, max_source: int = 0) -> State:
        del max_len, max_source
        rows = jnp.zeros((batch_size, ngram - 1, window), jnp.int32)
        return State(rows, pool.empty(batch_size, num_buckets, guesses, ngram))

    def propose(params: Params, state: State, cache: Any, context: Context) -> tuple[Proposal, State, Any]:
        del params
        rows = context.max_draft.shape[0]
        found, count = pool.find(state.pool, chain.last_tokens(context.history, 1)[:, 0])
        nodes = jax.vmap(guesses_of)(found, count)
        probes = Probes(
            state.window.reshape(rows, -1)[:, 1:],
            jnp.broadcast_to(depth, (rows, num_probes)),
            jnp.broadcast_to(sees, (rows, *sees.shape)),
        )
        proposal = nodes.proposal(context.max_draft)._replace(probes=probes)
        return proposal._replace(parent=None) if topology.is_chain else proposal, state, cache

    def update(params: Params, state: State, feedback: Feedback) -> State:
        del params
        if feedback.inputs is not None:
            is_read = feedback.num_tokens > 0
            ngrams, is_valid = pool.windows(*_read(feedback.inputs), ngram)
            filled = jnp.where(is_read[:, None, None], _filled(feedback.inputs, window, ngram), state.window)
            return State(filled, pool.insert(state.pool, ngrams, is_valid & is_read[:, None]))
        context = feedback.context
        assert context is not None
        is_read = context.max_draft > 0
        current = chain.last_tokens(context.history, 1)[:, 0]
        # Each trajectory grows by the token that the target writes after it; all N of its tokens are an n-gram.
        grown = sampling.argmax(feedback.output.logits[:, -window:])
        whole = jnp.concatenate([state.window.at[:, 0, 0].set(current), grown[:, None]], axis=1)
        ngrams = jnp.swapaxes(whole, 1, 2)
        after = pool.insert(state.pool, ngrams, jnp.broadcast_to(is_read[:, None], ngrams.shape[:2]))
        # The window moves on by one position, however many tokens were accepted.
        return State(jnp.where(is_read[:, None, None], whole[:, 1:], state.window), after)

    return Drafter(init, propose, update, topology)
