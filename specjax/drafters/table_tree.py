"""A static tree drafted with an n-gram table: after each node the most probable continuations."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from specjax import sampling
from specjax.drafters import chain
from specjax.drafters.model_tree import Level
from specjax.sampling import processors, tree
from specjax.types import Context, Drafter, Params, Proposal, Topology


def _after(last: Int[Array, "B C"], path: Int[Array, "B D"]) -> Int[Array, "B C"]:
    """The last tokens of a text that goes on with a path, the newest first."""
    return jnp.concatenate([path[:, ::-1], last], axis=1)[:, : last.shape[1]]


@functools.cache
def drafter(predict: Callable[[Any, Array], Array], order: int, levels: tuple[Level, ...]) -> Drafter:
    """Drafts a tree whose nodes are chosen deterministically, after the processors of the options.

    Args:
      predict: `(params, last [W, C]) -> [W, V]`, the distribution of the token after each of W texts, given their last
        C tokens.
      order: C + 1.
      levels: from `model_tree.parse`.
    """
    parents = tuple(itertools.chain.from_iterable(level.parents for level in levels))
    topology = Topology(len(parents), len(levels), parents)
    if topology.is_chain:
        raise ValueError("This topology is a chain: leave it out, and give num_draft_tokens.")
    paths: dict[int, tuple[int, ...]] = {-1: ()}
    for level in levels:
        paths |= {node: (*paths[above], node) for node, above in zip(level.nodes, level.parents, strict=True)}

    def rank(
        params: Any, tokens: Int[Array, "B N"], behind: list[int], shape: tree.Shape, context: Context
    ) -> Float[Array, "B W V"]:
        """The scores of the tokens after some nodes; -inf: never proposed."""
        last = chain.last_tokens(context.history, order - 1)
        texts = [_after(last, tokens[:, np.asarray(paths[node], int)]) for node in behind]
        probs = jax.vmap(lambda rows: predict(params, rows), in_axes=1, out_axes=1)(jnp.stack(texts, axis=1))
        logits = sampling.match_vocab(jnp.log(probs), context.vocab_size)
        history = tree.follow(context.history, tokens, shape, len(levels), context.sampling.penalties)
        at = np.asarray(behind) + 1
        return processors.process(logits, context.sampling.penalties, tree.select(history, at))

    def propose(params: Params, state: tuple[()], cache: Any, context: Context) -> tuple[Proposal, tuple[()], Any]:
        rows = context.max_draft.shape[0]
        parent = jnp.broadcast_to(jnp.asarray(parents, jnp.int32), (rows, len(parents)))
        shape = tree.shape(parent, len(levels))
        tokens = jnp.zeros((rows, len(parents)), jnp.int32)
        for level in levels:
            behind = sorted(set(level.parents))
            best, index = sampling.warp.top(rank(params.draft, tokens, behind, shape, context), max(level.ranks) + 1)
            row_of = np.asarray([behind.index(above) for above in level.parents])
            found, score = (x[:, row_of, np.asarray(level.ranks)] for x in (index, best))
            tokens = tokens.at[:, np.asarray(level.nodes)].set(jnp.where(score > -jnp.inf, found, -1))
        length = jnp.where(context.max_draft > 0, len(parents), 0).astype(jnp.int32)
        return Proposal(tokens, length, None, parent), state, cache

    return Drafter(chain.init, propose, chain.update, topology)
