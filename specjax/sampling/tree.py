"""Trees of draft tokens: what each node attends to, its depth, the text before it, and the path that is accepted.

A target reads a tree in one call (SpecInfer, arXiv 2305.09781, section 4.2): its nodes follow the last committed token
in one block, each attends only to itself and its ancestors, and its depth gives its position.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from specjax.sampling import automaton
from specjax.types import Automaton, Block, History, Penalties, Probes, Proposal


class Shape(NamedTuple):
    """The shape of a tree as a block of T = N + 1 tokens: the last committed token, then the nodes.

    Attributes:
      parent: `[B, T]` the parent of each token in the block; that of the root is the root.
      sees: `[B, T, T]` whether each token attends to another: its ancestors and itself.
      depth: `[B, T]` the number of its ancestors.
    """

    parent: Int[Array, "B T"]
    sees: Bool[Array, "B T T"]
    depth: Int[Array, "B T"]


def shape(parent: Int[Array, "B N"], max_depth: int) -> Shape:
    """The shape of a tree of at most `max_depth` levels below the root, from the parents of its nodes."""
    rows, num_nodes = parent.shape
    in_block = jnp.concatenate([jnp.zeros((rows, 1), jnp.int32), parent + 1], axis=1)
    index = jnp.arange(num_nodes + 1)
    up = jnp.broadcast_to(index, in_block.shape)
    sees = up[..., None] == index
    for _ in range(max_depth):
        up = jnp.take_along_axis(in_block, up, axis=1)
        sees |= up[..., None] == index
    return Shape(in_block, sees, jnp.sum(sees, axis=-1, dtype=jnp.int32) - 1)


def ancestors(parents: Sequence[int]) -> Bool[np.ndarray, "N N"]:
    """Which nodes of a tree that is known beforehand each sees: itself, and those above it."""
    sees = np.eye(len(parents), dtype=bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            sees[node] |= sees[parent]
    return sees


def elders(parents: Sequence[int], node: int) -> set[int]:
    """The nodes given which one was drawn: those above it, and its elder siblings."""
    above = np.flatnonzero(ancestors(parents)[node]).tolist()
    siblings = [i for i in range(node) if parents[i] == parents[node]]
    return {*above, *siblings} - {node}


def with_probes(block: Block, probes: Probes) -> Block:
    """A block of the last committed token and the nodes, followed by probes, which none of them sees.

    Args:
      block: `[B, T]`; a chain may leave out depth and `sees`.
      probes: `[B, M]`.
    """
    rows, size = block.tokens.shape
    depth, sees = block.depth, block.sees
    if depth is None or sees is None:
        index = jnp.arange(size, dtype=jnp.int32)
        depth = jnp.broadcast_to(index, block.tokens.shape)
        sees = jnp.broadcast_to(index[:, None] >= index, (rows, size, size))
    hidden = jnp.zeros((rows, size, probes.tokens.shape[1]), bool)
    above = jnp.concatenate([sees, hidden], axis=2)
    return Block(
        jnp.concatenate([block.tokens, probes.tokens], axis=1),
        jnp.concatenate([depth, probes.depth], axis=1),
        jnp.concatenate([above, probes.sees], axis=1),
        probes.embeddings,
    )


def trace(table: Automaton, state: Int[Array, " B"], tokens: Int[Array, "B N"], tree: Shape, max_depth: int) -> Array:
    """`[B, N + 1]` the state of an automaton after each token of the block, along its path."""
    block = jnp.concatenate([jnp.zeros_like(tokens[:, :1]), tokens], axis=1)
    states = jnp.broadcast_to(state[:, None], block.shape)
    for level in range(1, max_depth + 1):
        after = automaton.advance(table, jnp.take_along_axis(states, tree.parent, axis=1), block)
        states = jnp.where(tree.depth == level, after, states)
    return states


def texts(
    tokens: Int[Array, "B L"], length: Int[Array, " B"], drafts: Int[Array, "B N"], tree: Shape
) -> Int[Array, "B T L"]:
    """The text before the token that follows each token of the block: the committed tokens, then its path."""
    behind = jnp.arange(tokens.shape[1]) - length[:, None]
    block = jnp.concatenate([jnp.zeros_like(drafts[:, :1]), drafts], axis=1)

    def of_row(text: Array, behind: Array, block: Array, sees: Array, depth: Array) -> Array:
        # The node of each depth on a path: after a text of n tokens, that of depth 1 is at position n.
        on_path = sees[:, None, :] & (depth == behind[:, None] + 1)
        found = jnp.sum(jnp.where(on_path, block, 0), axis=-1)
        return jnp.where(jnp.any(on_path, axis=-1) & (behind >= 0), found, text)

    return jax.vmap(of_row)(tokens, behind, block, tree.sees, tree.depth)


def walk(
    own: Int[Array, " T"], is_distribution: Bool[Array, " T"], proposal: Proposal, max_depth: int
) -> tuple[Int[Array, " P"], Int[Array, ""]]:
    """The path of one row along which every node is the target's own token.

    Args:
      own: the target's token after each token of the block.
      is_distribution: whether the target has a distribution there.
      proposal: the tree.
      max_depth: D.

    Returns:
      the path in the block, which begins with 0, the root, and ends with repetitions; and the number of nodes on it.
    """
    assert proposal.parent is not None
    proposed = jnp.arange(proposal.tokens.shape[0]) < proposal.length

    def descend(carry: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], Array]:
        at, going = carry
        is_next = proposed & (proposal.parent == at - 1) & (proposal.tokens == own[at]) & is_distribution[at]
        going &= jnp.any(is_next)
        at = jnp.where(going, jnp.argmax(is_next).astype(jnp.int32) + 1, at)
        return (at, going), at

    start = jnp.zeros((), jnp.int32), jnp.ones((), bool)
    _, below = jax.lax.scan(descend, start, None, length=max_depth)
    path = jnp.concatenate([jnp.zeros(1, jnp.int32), below])
    return path, jnp.sum(path[1:] != path[:-1], dtype=jnp.int32)


def path_to(parent: Int[Array, " N"], node: Int[Array, ""], max_depth: int) -> tuple[Int[Array, " P"], Int[Array, ""]]:
    """The path to a node of one row's tree.

    Args:
      parent: of each node; -1 is the last committed token.
      node: its index in the block; 0 is the last committed token.
      max_depth: D.

    Returns:
      the path in the block, `[D + 1]`, which begins with 0, the root, and ends with repetitions of the node; and the
      number of nodes on it.
    """
    found = shape(parent[None], max_depth)
    depth = found.depth[0]
    is_there = found.sees[0, node] & (depth == jnp.arange(max_depth + 1)[:, None])
    path = jnp.where(jnp.any(is_there, axis=-1), jnp.argmax(is_there, axis=-1), node)
    return path.astype(jnp.int32), depth[node]


def has_child(proposal: Proposal, path: Int[Array, "B P"]) -> Bool[Array, "B D"]:
    """Whether each node of the path but the last was continued by a node of the proposal that could be accepted."""
    assert proposal.parent is not None
    proposed = (jnp.arange(proposal.tokens.shape[1]) < proposal.length[:, None]) & (proposal.tokens >= 0)
    return jnp.any(proposed[:, None] & (proposal.parent[:, None] == path[:, :-1, None] - 1), axis=-1)


def follow(
    history: History, tokens: Int[Array, "B N"], tree: Shape, max_depth: int, penalties: Penalties | None
) -> History:
    """The history before the token that follows each token of a block, along its path (see `processors.follow`).

    Args:
      history: before the first (T = 1).
      tokens: of the nodes.
      tree: the shape of the block.
      max_depth: D.
      penalties: of the options, or None, in which case the texts are not needed.
    """
    state = jnp.broadcast_to(history.grammar_state, tree.depth.shape)
    if history.grammar is not None:
        state = trace(history.grammar, history.grammar_state[:, 0], tokens, tree, max_depth)
    text = history.tokens
    if penalties is not None:
        text = texts(text, history.length, tokens, tree)
    return history._replace(tokens=text, length=history.length[:, None] + tree.depth, grammar_state=state)


def select(history: History, at: np.ndarray) -> History:
    """The part of a history from `follow` that belongs to some tokens of the block."""
    text = history.tokens if history.tokens.ndim == 2 else history.tokens[:, at]
    return history._replace(tokens=text, length=history.length[:, at], grammar_state=history.grammar_state[:, at])
