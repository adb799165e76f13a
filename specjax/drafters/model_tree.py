"""A draft model that proposes a static tree (SpecInfer, arXiv 2305.09781, section 4.1)."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from specjax import control, sampling
from specjax.drafters import children, topologies
from specjax.drafters.catch_up import catch_up, learn, read_last, set_length
from specjax.drafters.children import Children, Found
from specjax.limits import check_num_draft_tokens
from specjax.sampling import processors, tree
from specjax.types import Block, Context, Drafter, Feedback, History, Model, Params, Proposal, Topology, Tree


class Level(NamedTuple):
    """The nodes of one depth.

    Attributes:
      nodes: their indices, which are consecutive.
      parents: the parent of each; -1 is the last committed token.
      ranks: the rank of each among its siblings, most probable first.
    """

    nodes: tuple[int, ...]
    parents: tuple[int, ...]
    ranks: tuple[int, ...]


def parse(topology: str | Sequence[int] | Sequence[Sequence[int]]) -> tuple[Level, ...]:
    """The levels of a tree.

    Args:
      topology: children of every node by depth, all nodes as paths of ranks, or the name of a published tree (see
        `drafters.model`).

    Raises:
      ValueError: for a topology that is not a tree, or has too many nodes.
    """
    given: list[Any] = list(topologies.named(topology) if isinstance(topology, str) else topology)
    if given and all(isinstance(entry, int) and not isinstance(entry, bool) for entry in given):
        if any(width < 1 for width in given):
            raise ValueError(f"topology={topology}: every depth has at least one child a node.")
        check_num_draft_tokens(sum(itertools.accumulate(given, lambda a, b: a * b)))
        ranks = [range(width) for width in given]
        paths = [path for depth in range(1, len(given) + 1) for path in itertools.product(*ranks[:depth])]
    else:
        paths = sorted({tuple(path) for path in given}, key=lambda path: (len(path), path))
        check_num_draft_tokens(len(paths))
    number = {(): -1} | {path: i for i, path in enumerate(paths)}
    for path in paths:
        is_path = path and all(isinstance(rank, int) and rank >= 0 for rank in path)
        elder = (*path[:-1], path[-1] - 1) if is_path else ()
        if not is_path or path[:-1] not in number or (path[-1] > 0 and elder not in number):
            raise ValueError(
                f"topology={topology}: {path} has no parent, or no sibling before it; list the paths of all nodes, "
                "such as [(0,), (1,), (0, 0)]."
            )
    if not paths:
        raise ValueError(f"topology={topology} has no nodes: give the children by depth, such as (3, 2, 1).")
    levels = []
    for _, group in itertools.groupby(paths, len):
        of_depth = list(group)
        nodes = tuple(number[path] for path in of_depth)
        levels.append(Level(nodes, tuple(number[p[:-1]] for p in of_depth), tuple(p[-1] for p in of_depth)))
    return tuple(levels)


def _find(
    plan: "Plan", logits: Float[Array, "B W V"], number: int, depth: int, history: History, context: Context
) -> Found:
    """The children of W nodes of one depth, from the draft's logits after them."""
    logits = sampling.match_vocab(logits.astype(jnp.float32), context.vocab_size)
    logits = processors.process(logits, context.sampling.penalties, history)
    key, options = context.keys[:, depth], context.sampling
    return children.find(plan.kind, logits, number, key, options, context.coupled, plan.shares_draws)


def apply_alone(
    draft: Model, params: Tree, block: Block, cache: Any, is_needed: Bool[Array, ""]
) -> tuple[Float[Array, "B T W"], Any]:
    """The draft's logits after each token of a block, and its cache, by a loop of one round.

    Where two calls follow each other in one computation, XLA:CPU copies the cache between them.
    """
    shapes = jax.eval_shape(lambda: draft.apply(params, block, cache)[0].logits)

    def apply(carry: tuple[Array, Any]) -> tuple[Array, Any]:
        output, cache = draft.apply(params, block, carry[1])
        return output.logits, cache

    return control.once(is_needed, apply, (jnp.zeros(shapes.shape, shapes.dtype), cache))


Rollout = tuple[Int[Array, "B N"], Float[Array, "B N V"] | None, Any]
"""The tokens of all nodes, what each was drawn from (None: chosen deterministically), and the draft's cache."""


class Plan(NamedTuple):
    """The tree that a draft model grows.

    Attributes:
      draft: the draft model.
      levels: from `parse`.
      kind: how children are found; the rule `coupled` has its own.
      shares_draws: whether the children of all nodes of a depth come from one draw (`Topology.shares_draws`).
    """

    draft: Model
    levels: tuple[Level, ...]
    kind: Children
    shares_draws: bool = False

    @property
    def topology(self) -> Topology:
        """The shape of what is proposed."""
        parents = tuple(itertools.chain.from_iterable(level.parents for level in self.levels))
        return Topology(len(parents), len(self.levels), parents, shares_draws=self.shares_draws)

    def behind(self, depth: int) -> list[int]:
        """The nodes whose children are the level of this depth, from 0; -1 is the last committed token."""
        return sorted(set(self.levels[depth].parents))


def plan(
    draft: Model,
    topology: str | Sequence[int] | Sequence[Sequence[int]],
    kind: Children,
    *,
    shares_draws: bool = False,
) -> Plan:
    """The tree that a model drafts (see `drafters.model`).

    Raises:
      ValueError: for a topology that is not a tree, or is a chain.
    """
    found = Plan(draft, parse(topology), kind, shares_draws)
    if found.topology.is_chain:
        raise ValueError("This topology is a chain: leave it out, and give num_draft_tokens.")
    return found


def nothing(plan: Plan, cache: Any, context: Context) -> Rollout:
    """A rollout before there is anything in it."""
    rows, size, num_nodes = context.max_draft.shape[0], context.vocab_size, plan.topology.num_nodes
    logits = jax.ShapeDtypeStruct((rows, 1, size), jnp.float32)
    _, probs = jax.eval_shape(
        lambda logits: children.find(
            plan.kind, logits, 1, context.keys[:, 0], context.sampling, context.coupled, plan.shares_draws
        ),
        logits,
    )
    stated = None if probs is None else jnp.zeros((rows, num_nodes, size))
    return jnp.zeros((rows, num_nodes), jnp.int32), stated, cache


def place(
    plan: Plan,
    depth: int,
    behind: list[int],
    logits: Float[Array, "B W U"],
    tokens: Int[Array, "B N"],
    probs: Float[Array, "B N V"] | None,
    shape: tree.Shape,
    context: Context,
) -> tuple[Int[Array, "B N"], Float[Array, "B N V"] | None]:
    """The tokens of all nodes and what they were drawn from, with those of one level in their places.

    Args:
      plan: the tree.
      depth: the level, from 0.
      behind: the W nodes that it continues.
      logits: the draft's, after each of these.
      tokens: of all nodes; those above the level are there already.
      probs: what they were drawn from, or None.
      shape: of the block of the last committed token and all nodes.
      context: of the step.
    """
    level, at = plan.levels[depth], np.asarray(behind) + 1
    history = tree.follow(context.history, tokens, shape, len(plan.levels), context.sampling.penalties)
    found = _find(plan, logits, max(level.ranks) + 1, depth, tree.select(history, at), context)
    row_of = np.asarray([behind.index(parent) for parent in level.parents])
    return jax.tree.map(
        lambda x, new: x.at[:, np.asarray(level.nodes)].set(new[:, row_of, np.asarray(level.ranks)]),
        (tokens, probs),
        found,
    )


def place_level(
    plan: Plan,
    depth: int,
    logits: Float[Array, "B 1 U"],
    tokens: Int[Array, "B N"],
    probs: Float[Array, "B N V"] | None,
    shape: tree.Shape,
    context: Context,
) -> tuple[Int[Array, "B N"], Float[Array, "B N V"] | None]:
    """`place` for a draft whose distribution at a depth is the same after all nodes.

    Where no option depends on the path to a node either, and the nodes share a draw, it is drawn once.

    Args:
      plan: the tree.
      depth: the level, from 0.
      logits: the draft's at this depth.
      tokens: of all nodes; those above the level are there already.
      probs: what they were drawn from, or None.
      shape: of the block of the last committed token and all nodes.
      context: of the step.
    """
    behind, level = plan.behind(depth), plan.levels[depth]
    depends_on_path = context.sampling.penalties is not None or context.history.grammar is not None
    draws_apart = not (plan.shares_draws or context.coupled or plan.kind is children.most_probable)
    if depends_on_path or draws_apart:
        of_nodes = jnp.repeat(logits, len(behind), axis=1)
        return place(plan, depth, behind, of_nodes, tokens, probs, shape, context)
    found = _find(plan, logits, max(level.ranks) + 1, depth, context.history, context)
    return jax.tree.map(
        lambda x, new: x.at[:, np.asarray(level.nodes)].set(new[:, 0, np.asarray(level.ranks)]), (tokens, probs), found
    )


def grow(plan: Plan, params: Tree, logits: Float[Array, "B 1 W"], carry: Rollout, context: Context) -> Rollout:
    """The tokens of all nodes, -1 where there is none, what they were drawn from, and the cache, level by level.

    Args:
      plan: the tree.
      params: the draft's parameters.
      logits: the draft's, after the text.
      carry: `nothing`, with the draft's cache of the whole text.
      context: of the step.
    """
    tokens, probs, cache = carry
    rows, depth, parents = context.max_draft.shape[0], len(plan.levels), plan.topology.parents
    assert parents is not None
    shape = tree.shape(jnp.broadcast_to(jnp.asarray(parents, jnp.int32), (rows, len(parents))), depth)
    ancestors = tree.ancestors(parents)
    before: list[int] = []
    for i in range(depth):
        tokens, probs = place(plan, i, plan.behind(i), logits, tokens, probs, shape, context)
        if i + 1 == depth:
            break
        # The nodes that have children are fed, level by level.
        behind = plan.behind(i + 1)
        before = before + behind
        sees = jnp.broadcast_to(ancestors[np.ix_(behind, before)], (rows, len(behind), len(before)))
        fed_tokens = jnp.maximum(tokens[:, np.asarray(behind)], 0)
        block = Block(fed_tokens, jnp.full((rows, len(behind)), i, jnp.int32), sees)
        logits, cache = apply_alone(plan.draft, params, block, cache, jnp.any(context.max_draft > 0))
    return tokens, probs, cache


def proposal(plan: Plan, tokens: Int[Array, "B N"], probs: Array | None, context: Context) -> Proposal:
    """What a rollout proposes for the rows that draft."""
    num_nodes, parents = plan.topology.num_nodes, plan.topology.parents
    parent = jnp.broadcast_to(jnp.asarray(parents, jnp.int32), tokens.shape)
    return Proposal(tokens, jnp.where(context.max_draft > 0, num_nodes, 0).astype(jnp.int32), probs, parent)


@functools.cache
def drafter(plan: Plan) -> Drafter:
    """Drafts a tree, with one call of the draft per level. The state is the draft's cache."""
    draft, depth = plan.draft, len(plan.levels)

    def rollout(params: Params, carry: Rollout, context: Context) -> Rollout:
        tokens, probs, cache = carry
        cache = catch_up(draft, params.draft, cache, context.history, missing=depth + 1, chunk=depth + 1)
        # A step adds at most D + 1 tokens, which are read here.
        logits, cache = read_last(draft, params.draft, cache, context.history, depth + 1)
        return grow(plan, params.draft, logits, (tokens, probs, cache), context)

    def propose(params: Params, state: Any, cache: Any, context: Context) -> tuple[Proposal, Any, Any]:
        tokens, probs, state = control.once(
            jnp.any(context.max_draft > 0),
            lambda carry: rollout(params, carry, context),
            nothing(plan, state, context),
        )
        return proposal(plan, tokens, probs, context), state, cache

    def update(params: Params, state: Any, feedback: Feedback) -> Any:
        if feedback.inputs is not None:
            return learn(draft, params.draft, state, feedback.inputs)
        # No node was committed: the next step reads what was accepted, in the call that reads the last token anyway.
        return set_length(draft, state, jnp.minimum(state.length, feedback.length - 1))

    return Drafter(draft.init_cache, propose, update, plan.topology)
