"""Candidate continuations merged into one tree: prefixes that they share become shared nodes (SpecInfer, REST).

SpecInfer, arXiv 2305.09781, section 4.1, merges token trees; REST, arXiv 2311.08252, section 3.2, keeps the most
frequent prefixes of what it retrieved.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from specjax.types import Proposal


class Nodes(NamedTuple):
    """The nodes of a tree, parents before their children; of one row, or of all.

    Attributes:
      tokens: `[N]` the token of each node; -1 beyond the number of nodes.
      parent: `[N]` the node that each continues; -1 for the first tokens, and beyond the number of nodes.
      weight: `[N]` the weight of each node, not rising; 0 beyond the number of nodes.
      number: `[]` how many nodes there are.
    """

    tokens: Int[Array, "*B N"]
    parent: Int[Array, "*B N"]
    weight: Float[Array, "*B N"]
    number: Int[Array, "*B"]

    def proposal(self, max_draft: Int[Array, " B"]) -> Proposal:
        """The nodes of all rows as a proposal; rows with `max_draft` 0 propose none."""
        return Proposal(self.tokens, jnp.where(max_draft > 0, self.number, 0), None, self.parent)


def _shared(chains: Int[Array, "C K"], proposed: Bool[Array, "C K"]) -> Bool[Array, "C C K"]:
    """Whether two chains have their first k + 1 tokens in common."""
    equal = (chains[:, None] == chains[None]) & proposed[:, None] & proposed[None]
    return jnp.cumprod(equal, axis=-1).astype(bool)


def merge(chains: Int[Array, "C K"], length: Int[Array, " C"], weight: Float[Array, "C K"], num_nodes: int) -> Nodes:
    """Merges the candidates of one row into a tree, and keeps its heaviest nodes.

    A node is a prefix of candidates, and its weight is the sum of theirs. Of equal weights, the shallower node is kept,
    then that of the earlier candidate. As weights do not rise along a candidate, no node is kept without its parent.

    Args:
      chains: C candidates of at most K tokens.
      length: the number of tokens of each; 0 leaves a candidate out.
      weight: of each token, above 0; along a candidate it must not rise. Equal to 1, the weights are counts.
      num_nodes: N.

    Returns:
      N nodes, the heaviest first.
    """
    count, depth = chains.shape
    proposed = jnp.arange(depth) < length[:, None]
    shared = _shared(chains, proposed)
    # A prefix belongs to the first of the candidates that begin with it.
    owner = jnp.argmax(shared, axis=1).astype(jnp.int32)
    is_node = proposed & (owner == jnp.arange(count)[:, None])
    heavy = jnp.where(is_node, jnp.sum(jnp.where(shared, weight[None], 0.0), axis=1), 0.0)

    levels = jnp.broadcast_to(jnp.arange(depth, dtype=jnp.int32), chains.shape)
    order = jnp.lexsort((levels.ravel(), -heavy.ravel()))
    place = jnp.zeros(order.shape, jnp.int32).at[order].set(jnp.arange(order.shape[0], dtype=jnp.int32))
    place = place.reshape(chains.shape)
    above = jnp.roll(owner, 1, axis=1), jnp.maximum(levels - 1, 0)
    parent = jnp.where(levels > 0, place[above], -1)

    kept = order[:num_nodes]
    missing = num_nodes - kept.shape[0]
    number = jnp.minimum(jnp.sum(is_node, dtype=jnp.int32), num_nodes)
    is_kept = jnp.arange(num_nodes) < number

    def take(values: Array, empty: float) -> Array:
        return jnp.where(is_kept, jnp.pad(values.ravel()[kept], (0, missing)), empty)

    return Nodes(take(chains, -1), take(parent, -1), take(heavy, 0.0), number)


def cut(nodes: Nodes, least: Float[Array, ""]) -> Nodes:
    """The nodes of at least that weight."""
    is_kept = nodes.weight >= least
    number = jnp.minimum(nodes.number, jnp.sum(is_kept, dtype=jnp.int32))
    return Nodes(
        jnp.where(is_kept, nodes.tokens, -1),
        jnp.where(is_kept, nodes.parent, -1),
        jnp.where(is_kept, nodes.weight, 0.0),
        number,
    )


def vote(chains: Int[Array, "C K"], length: Int[Array, " C"]) -> tuple[Int[Array, " K"], Float[Array, " K"]]:
    """The chain that follows the majority of the candidates, token by token.

    Candidates vote while they agree with the tokens chosen before; of equal votes, the first candidate's token wins.

    Args:
      chains: C candidates of at most K tokens.
      length: the number of tokens of each.

    Returns:
      `[K]` tokens, and the share of each among the candidates that agree with the tokens before it and go on; 0 where
      there is no such candidate.
    """
    proposed = jnp.arange(chains.shape[1]) < length[:, None]

    def choose(
        agrees: Bool[Array, " C"], column: tuple[Int[Array, " C"], Bool[Array, " C"]]
    ) -> tuple[Array, tuple[Array, Array]]:
        token, known = column
        agrees &= known
        voters = jnp.sum(agrees, dtype=jnp.float32)
        votes = jnp.sum((token[:, None] == token) & agrees, axis=1) * agrees
        best = jnp.argmax(votes)
        return agrees & (token == token[best]), (token[best], votes[best] / jnp.maximum(voters, 1.0))

    _, (tokens, share) = jax.lax.scan(choose, length > 0, (chains.T, proposed.T))
    return tokens, share
