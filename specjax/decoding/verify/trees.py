"""Judges of trees of draft tokens, where text is sampled.

Both rules read the children of a node in the order of their indices, which is the order in which they were drawn, and
`probs` as `Proposal` defines it: what each node was sampled from, given its ancestors and its elder siblings. So one
rule serves every kind of children: drawn without replacement (q without the elder siblings, renormalised), drawn
independently (q itself), chosen deterministically (one-hot), or drawn from several drafts (each from its own q).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from specjax import sampling
from specjax.decoding.verify.rule import Accepts, of_drafts
from specjax.sampling import tree
from specjax.types import Proposal, StepKeys, Verdict


def passes(coin: Float[Array, ""], draft: Float[Array, ""] | float, target: Float[Array, ""]) -> Bool[Array, ""]:
    """Whether a coin in [0, 1) accepts with probability min(1, target / draft): never where the target says 0."""
    return coin * draft < target


def verdict_at(proposal: Proposal, node: Int[Array, ""], last: Callable[[Array], Array], max_depth: int) -> Verdict:
    """The verdict that accepts the path to a node of the block; `last(n)` chooses the token that follows its n nodes.

    Args:
      proposal: the tree.
      node: its index in the block that the target read; 0 accepts nothing.
      last: from the number of accepted nodes.
      max_depth: D.
    """
    assert proposal.parent is not None
    path, n = tree.path_to(proposal.parent, node, max_depth)
    position = jnp.arange(max_depth + 1)
    drafts = jnp.append(proposal.tokens[jnp.maximum(path[1:] - 1, 0)], 0)
    return Verdict(jnp.where(position < n, drafts, jnp.where(position == n, last(n), 0)).astype(jnp.int32), n, path)


class _Nodes(NamedTuple):
    """A tree as the walks read it: by index in the block, in which 0 is the last committed token.

    Attributes:
      tokens: `[T]`; that of the root is not read.
      parent: `[T]` in the block.
      can_be: `[T]` whether the node is proposed, after a token at which the target has a distribution.
      probs: `[N, V]` what each node but the root was sampled from; None: each was chosen deterministically.
    """

    tokens: Int[Array, " T"]
    parent: Int[Array, " T"]
    can_be: Bool[Array, " T"]
    probs: Float[Array, "N V"] | None

    def next_child(self, at: Int[Array, ""], after: Int[Array, ""]) -> Int[Array, ""]:
        """The first child of node `at` whose index is greater than `after`; T where there is none."""
        size = self.tokens.shape[0]
        index = jnp.arange(size, dtype=jnp.int32)
        is_child = self.can_be & (self.parent == at) & (index > after)
        return jnp.min(jnp.where(is_child, index, size))

    def drawn_from(self, node: Int[Array, ""], vocab_size: int) -> Float[Array, " V"]:
        """The distribution that a node was sampled from."""
        if self.probs is None:
            return jax.nn.one_hot(self.tokens[node], vocab_size, dtype=jnp.float32)
        return self.probs[node - 1]

    def of(self, probs: Float[Array, " V"], node: Int[Array, ""]) -> Float[Array, ""]:
        """The probability of a node's token; 0 for one outside the vocabulary."""
        # A sum rather than an index, for which XLA:GPU gathers a vocabulary that is split over devices.
        return jnp.sum(jnp.where(jnp.arange(probs.shape[0]) == self.tokens[node], probs, 0.0))


def _nodes(target_probs: Float[Array, "T V"], proposal: Proposal) -> _Nodes:
    assert proposal.parent is not None
    proposed = (jnp.arange(proposal.tokens.shape[0]) < proposal.length) & (proposal.tokens >= 0)
    is_distribution = ~jnp.isnan(jnp.sum(target_probs, axis=-1))
    zero = jnp.zeros(1, jnp.int32)
    return _Nodes(
        jnp.concatenate([zero, proposal.tokens]),
        jnp.concatenate([zero, proposal.parent + 1]),
        jnp.concatenate([jnp.zeros(1, bool), proposed & is_distribution[proposal.parent + 1]]),
        proposal.probs,
    )


def _residual(
    target: Float[Array, " V"], scale: Float[Array, ""] | float, draft: Float[Array, " V"]
) -> tuple[Float[Array, " V"], Float[Array, ""]]:
    """norm(max(0, scale * target - draft)) and its mass; the target itself where rounding leaves nothing."""
    residual = jnp.maximum(scale * target - draft, 0.0)
    mass = jnp.sum(residual)
    return jnp.where(mass > 0, residual / mass, target), mass


def recursive_rejection(keys: StepKeys, target_probs: Float[Array, "T V"], proposal: Proposal) -> Verdict:
    """Recursive rejection sampling on one row's tree.

    For children that were drawn independently, each from its own q, it is SpecInfer's multi-step speculative sampling
    (arXiv 2305.09781, section 4.3); for children that were drawn without replacement, the rule of Sequoia (arXiv
    2402.12374) and of recursive speculative decoding (arXiv 2402.14160).
    """
    nodes, size = _nodes(target_probs, proposal), target_probs.shape[-1]
    coins = sampling.uniform(keys.accept, proposal.tokens.shape)

    def is_judged(state: tuple[Array, Array, Array]) -> Array:
        return state[1] < nodes.tokens.shape[0]

    def judge(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        at, child, p = state
        q = nodes.drawn_from(child, size)
        accepted = passes(coins[child - 1], nodes.of(q, child), nodes.of(p, child))
        # Accepted: go on from the child, with the target's distribution after it. Else p <- norm(max(0, p - q)).
        p = jnp.where(accepted, target_probs[child], _residual(p, 1.0, q)[0])
        at = jnp.where(accepted, child, at)
        return at, nodes.next_child(at, child), p

    root = jnp.zeros((), jnp.int32)
    start = root, nodes.next_child(root, root), target_probs[0]
    at, _, p = jax.lax.while_loop(is_judged, judge, start)
    return verdict_at(proposal, at, lambda n: sampling.categorical(keys.token[n], p), keys.token.shape[0] - 1)


class _Walk(NamedTuple):
    """The state of traversal verification. Everything is kept for the path from the root to `at` alone.

    Attributes:
      at: the node that the walk stands at, in the block.
      after: the last node that it has come to; younger children of `at` have greater indices.
      depth: of `at`.
      a: `[D + 1]` the chance that what is accepted lies below each node of the path, or is the node.
      p: `[D + 1, V]` what is left of the target's distribution after each node of the path.
      accepted: whether `at` is the end of the accepted path.
    """

    at: Int[Array, ""]
    after: Int[Array, ""]
    depth: Int[Array, ""]
    a: Float[Array, " P"]
    p: Float[Array, "P V"]
    accepted: Bool[Array, ""]


class _Step(NamedTuple):
    """A move to the end of the path: the fields of `_Walk`, with what it writes at the new depth."""

    at: Int[Array, ""]
    after: Int[Array, ""]
    depth: Int[Array, ""]
    a: Float[Array, ""]
    p: Float[Array, " V"]


def traversal(keys: StepKeys, target_probs: Float[Array, "T V"], proposal: Proposal) -> Verdict:
    """Traversal verification of one row's tree (arXiv 2505.12398)."""
    nodes, (num_tokens, size) = _nodes(target_probs, proposal), target_probs.shape
    coins, max_depth = sampling.uniform(keys.accept, nodes.tokens.shape), keys.token.shape[0] - 1

    def descend(walk: _Walk, child: Int[Array, ""]) -> _Step:
        """To the first child that is left: a(child) = min(1, a(parent) p(x) / q(x))."""
        of_target = nodes.of(walk.p[walk.depth], child)
        of_draft = nodes.of(nodes.drawn_from(child, size), child)
        a = jnp.where(of_target > 0, jnp.minimum(1.0, walk.a[walk.depth] * of_target / of_draft), 0.0)
        return _Step(child, child, walk.depth + 1, a, target_probs[child])

    def delete(walk: _Walk) -> _Step:
        """Back to the parent: r = max(0, a p - q), R = sum r, a <- R / (R + 1 - a), p <- norm(r)."""
        depth = jnp.maximum(walk.depth - 1, 0)
        a = walk.a[depth]
        p, mass = _residual(walk.p[depth], a, nodes.drawn_from(jnp.maximum(walk.at, 1), size))
        rest = mass + (1.0 - a)
        # Where `rest` is 0, a = 1 and the draft equals the target.
        return _Step(nodes.parent[walk.at], walk.at, depth, jnp.where(rest > 0, mass / rest, 1.0), p)

    def move(walk: _Walk) -> _Walk:
        child = nodes.next_child(walk.at, walk.after)
        # A leaf, or a node whose children are all deleted, is accepted with probability a; the root always is.
        is_leaf = child == num_tokens
        accepted = is_leaf & passes(coins[walk.at], 1.0, walk.a[walk.depth])
        stay = _Step(walk.at, walk.after, walk.depth, walk.a[walk.depth], walk.p[walk.depth])
        step = jax.tree.map(
            lambda stay, up, down: jnp.where(accepted, stay, jnp.where(is_leaf, up, down)),
            *(stay, delete(walk), descend(walk, jnp.minimum(child, num_tokens - 1))),
        )
        a, p = walk.a.at[step.depth].set(step.a), walk.p.at[step.depth].set(step.p)
        return _Walk(step.at, step.after, step.depth, a, p, accepted)

    root = jnp.zeros((), jnp.int32)
    a, p = jnp.ones(max_depth + 1), jnp.broadcast_to(target_probs[0], (max_depth + 1, size))
    start = _Walk(root, root, root, a, p, jnp.zeros((), bool))
    # Every node is entered once and deleted once at most: the loop ends after 2 N + 1 rounds.
    end = jax.lax.while_loop(lambda walk: ~walk.accepted, move, start)
    p = end.p[end.depth]
    return verdict_at(proposal, end.at, lambda n: sampling.categorical(keys.token[n], p), max_depth)


def longest_path(
    target_probs: Float[Array, "T V"], proposal: Proposal, accepts: Accepts, max_depth: int
) -> Int[Array, ""]:
    """The end, in the block, of the longest path of accepted nodes, and among equals of the most probable one.

    Args:
      target_probs: of the block.
      proposal: the tree.
      accepts: says which nodes are accepted, given the target's distribution before each.
      max_depth: D.
    """
    assert proposal.parent is not None
    before = target_probs[proposal.parent + 1]
    is_good = _nodes(target_probs, proposal).can_be[1:] & accepts(before, proposal)
    shape = tree.shape(proposal.parent[None], max_depth)
    on_path, depth = shape.sees[0, :, 1:], shape.depth[0]
    whole = jnp.all(is_good | ~on_path, axis=-1)
    likelihood = jnp.sum(jnp.where(on_path, jnp.log(of_drafts(before, proposal)), 0.0), axis=-1)
    is_longest = whole & (depth == jnp.max(jnp.where(whole, depth, 0)))
    return jnp.argmax(jnp.where(is_longest, likelihood, -jnp.inf)).astype(jnp.int32)
