"""A draft model that proposes a tree whose shape follows its own probabilities (EAGLE-2, arXiv 2406.16858)."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from specjax import control, sampling
from specjax.drafters.catch_up import catch_up, learn, read_last, set_length
from specjax.drafters.model_tree import apply_alone
from specjax.limits import check_num_draft_tokens
from specjax.sampling import processors, tree
from specjax.types import Block, Context, Drafter, Feedback, History, Model, Params, Proposal, Topology, Tree


class Dynamic(NamedTuple):
    """The size of a dynamic tree. The defaults are EAGLE-3's (arXiv 2503.01840).

    Attributes:
      width: how many nodes of each depth are continued, and how many continuations of each of them are considered.
      depth: D, the draft calls of a step.
      num_nodes: N, how many of all nodes considered are proposed: the most probable ones.
    """

    width: int = 10
    depth: int = 7
    num_nodes: int = 59


def check(dynamic: Dynamic) -> None:
    """Refuses a tree that cannot be.

    Raises:
      ValueError: naming the numbers.
    """
    width, depth, num_nodes = dynamic
    if width < 1 or depth < 1:
        raise ValueError(f"dynamic={dynamic}: width and depth are at least 1.")
    check_num_draft_tokens(num_nodes)
    considered = width + (depth - 1) * width**2
    if not depth < num_nodes <= considered:
        raise ValueError(
            f"dynamic={dynamic}: num_nodes lies between depth + 1 = {depth + 1} and the {considered} nodes that are "
            "considered, width + (depth - 1) width^2."
        )


class _Level(NamedTuple):
    """The nodes considered at one depth, `W * k` for each row: k after each of W nodes.

    Attributes:
      tokens: -1 where there is none.
      scores: the log-probability of the path to each node under the draft.
      parent: the parent of each, by its place among all nodes considered; -1 is the last committed token.
    """

    tokens: Int[Array, "B C"]
    scores: Float[Array, "B C"]
    parent: Int[Array, "B C"]


class _Frontier(NamedTuple):
    """The k nodes of one depth that are continued, and all that were fed so far, F of them.

    Attributes:
      place: of each of the k among all nodes considered.
      scores: of each of the k.
      tokens: `[B, F]` of all nodes fed, depth by depth.
      parent: `[B, F]` the parent of each among the nodes fed; -1 is the last committed token.
      sees: `[B, k, F]` which of them each of the k attends to.
    """

    place: Int[Array, "B k"]
    scores: Float[Array, "B k"]
    tokens: Int[Array, "B F"]
    parent: Int[Array, "B F"]
    sees: Bool[Array, "B k F"]


def _log_probs(logits: Float[Array, "B W V"], history: History, context: Context) -> Float[Array, "B W V"]:
    """The draft's log-probabilities of the tokens that the options allow, -inf for all others."""
    logits = sampling.match_vocab(logits.astype(jnp.float32), context.vocab_size)
    logits = processors.process(logits, context.sampling.penalties, history)
    is_sampled = (context.sampling.temperature > 0)[:, None, None]
    allowed = ~is_sampled | (sampling.warp.warp(logits, context.sampling) > 0)
    found = jnp.where(allowed, jax.nn.log_softmax(logits, axis=-1), -jnp.inf)
    return jnp.where(jnp.isnan(found), -jnp.inf, found)


def _expand(
    log_probs: Float[Array, "B W V"], width: int, scores: Float[Array, "B W"], place: Int[Array, "B W"]
) -> _Level:
    """The `width` most probable continuations of each of W nodes."""
    best, tokens = sampling.warp.top(log_probs, width)
    total = scores[..., None] + best
    rows = total.shape[0]
    return _Level(
        jnp.where(total > -jnp.inf, tokens, -1).reshape(rows, -1),
        total.reshape(rows, -1),
        jnp.broadcast_to(place[..., None], total.shape).reshape(rows, -1),
    )


def _next_frontier(level: _Level, begin: int, width: int, before: _Frontier | None) -> _Frontier:
    """The `width` most probable nodes of a level, the first ones in a tie; `begin` is the place of its first node."""
    scores, chosen = jax.lax.top_k(level.scores, width)
    rows = chosen.shape[0]
    tokens = jnp.maximum(jnp.take_along_axis(level.tokens, chosen, axis=1), 0)
    itself = jnp.broadcast_to(jnp.eye(width, dtype=bool), (rows, width, width))
    if before is None:
        return _Frontier(chosen + begin, scores, tokens, jnp.full((rows, width), -1, jnp.int32), itself)
    above = chosen // width
    fed = before.tokens.shape[1]
    sees = jnp.take_along_axis(before.sees, above[..., None], axis=1)
    return _Frontier(
        chosen + begin,
        scores,
        jnp.concatenate([before.tokens, tokens], axis=1),
        jnp.concatenate([before.parent, above + (fed - width)], axis=1),
        jnp.concatenate([sees, itself], axis=2),
    )


def best_nodes(levels: list[_Level], num_nodes: int) -> tuple[Int[Array, "B N"], Int[Array, "B N"]]:
    """The tokens and parents of the most probable nodes of all levels, parents before their children.

    A path is never more probable than a part of it, and in a tie the node of smaller place is taken: so the parent of
    each of them is among them.
    """
    tokens, scores, parent = (jnp.concatenate(x, axis=1) for x in zip(*levels, strict=True))
    chosen = jnp.sort(jax.lax.top_k(scores, num_nodes)[1], axis=1)
    # The new index of each node considered: how many of those before it were chosen.
    is_chosen = jnp.any(chosen[:, :, None] == jnp.arange(scores.shape[1]), axis=1)
    index = jnp.cumsum(is_chosen, axis=1, dtype=jnp.int32) - 1
    above = jnp.take_along_axis(parent, chosen, axis=1)
    above = jnp.where(above < 0, -1, jnp.take_along_axis(index, jnp.maximum(above, 0), axis=1))
    return jnp.take_along_axis(tokens, chosen, axis=1), above


Rollout = tuple[Int[Array, "B N"], Int[Array, "B N"], Any]
"""The tokens and the parents of all nodes, and the draft's cache."""


def topology(dynamic: Dynamic) -> Topology:
    """The shape of what is proposed."""
    return Topology(dynamic.num_nodes, dynamic.depth)


def more_entries(dynamic: Dynamic) -> int:
    """How many nodes more may be fed to the draft than are proposed, for which alone the text buffer has room."""
    return max(0, (dynamic.depth - 1) * dynamic.width - dynamic.num_nodes)


def nothing(dynamic: Dynamic, cache: Any, context: Context) -> Rollout:
    """A rollout before there is anything in it."""
    none = jnp.zeros((context.max_draft.shape[0], dynamic.num_nodes), jnp.int32)
    return none, none - 1, cache


def grow(
    draft: Model, dynamic: Dynamic, params: Tree, logits: Float[Array, "B 1 V"], cache: Any, context: Context
) -> Rollout:
    """Expands the tree depth by depth, with one call of the draft for each.

    Args:
      draft: the draft model.
      dynamic: the size of the tree.
      params: the draft's parameters.
      logits: the draft's, after the text.
      cache: its cache of the whole text.
      context: of the step.
    """
    width, depth, num_nodes = dynamic
    rows = context.max_draft.shape[0]
    root = jnp.zeros((rows, 1)), jnp.full((rows, 1), -1, jnp.int32)
    levels = [_expand(_log_probs(logits, context.history, context), width, *root)]
    frontier = None
    for level in range(1, depth):
        begin = sum(found.scores.shape[1] for found in levels[:-1])
        frontier = _next_frontier(levels[-1], begin, width, frontier)
        tokens = frontier.tokens[:, -width:]
        block = Block(tokens, jnp.full((rows, width), level - 1, jnp.int32), frontier.sees)
        logits, cache = apply_alone(draft, params, block, cache, jnp.any(context.max_draft > 0))
        shape = tree.shape(frontier.parent, level)
        history = tree.follow(context.history, frontier.tokens, shape, level, context.sampling.penalties)
        history = tree.select(history, np.arange(shape.depth.shape[1])[-width:])
        levels.append(_expand(_log_probs(logits, history, context), width, frontier.scores, frontier.place))
    return *best_nodes(levels, num_nodes), cache


def proposal(dynamic: Dynamic, tokens: Int[Array, "B N"], parent: Int[Array, "B N"], context: Context) -> Proposal:
    """What a rollout proposes for the rows that draft."""
    length = jnp.where(context.max_draft > 0, dynamic.num_nodes, 0).astype(jnp.int32)
    return Proposal(tokens, length, None, parent)


@functools.cache
def drafter(draft: Model, dynamic: Dynamic) -> Drafter:
    """Drafts a dynamic tree. The state is the draft's cache.

    Args:
      draft: the draft model.
      dynamic: the size of the tree, which `check` has passed.
    """
    deepest = dynamic.depth + 1

    def init(batch_size: int, max_len: int, max_source: int = 0) -> Any:
        return draft.init_cache(batch_size, max_len + more_entries(dynamic), max_source)

    def rollout(params: Tree, cache: Any, context: Context) -> Rollout:
        cache = catch_up(draft, params, cache, context.history, missing=deepest, chunk=deepest)
        # A step adds at most D + 1 tokens, which are read here.
        logits, cache = read_last(draft, params, cache, context.history, deepest)
        return grow(draft, dynamic, params, logits, cache, context)

    def propose(params: Params, state: Any, cache: Any, context: Context) -> tuple[Proposal, Any, Any]:
        tokens, parent, state = control.once(
            jnp.any(context.max_draft > 0),
            lambda carry: rollout(params.draft, carry[2], context),
            nothing(dynamic, state, context),
        )
        return proposal(dynamic, tokens, parent, context), state, cache

    def update(params: Params, state: Any, feedback: Feedback) -> Any:
        if feedback.inputs is not None:
            return learn(draft, params.draft, state, feedback.inputs)
        return set_length(draft, state, jnp.minimum(state.length, feedback.length - 1))

    return Drafter(init, propose, update, topology(dynamic))
