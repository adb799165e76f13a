"""Several drafters in one tree (SpecInfer, arXiv 2305.09781, section 4.1: merge-based token trees).

The target reads the drafts of all parts in one call, and a part that is wrong costs nothing but width.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from specjax.drafters import combined, contract
from specjax.limits import check_num_draft_tokens
from specjax.sampling import tree
from specjax.types import Context, Draft, Drafter, Feedback, Params, Probes, Proposal, Topology


class State(NamedTuple):
    """The parts' states, and what each proposed in this step.

    Attributes:
      parts: the state of each part.
      tokens: `[B, N_i]` the tokens that each part proposed; -1 where it proposed none.
      parents: `[B, N_i]` the parent of each within its part.
      owners: `[B, N_i]` the node of the merged tree that stands for each.
    """

    parts: tuple[Any, ...]
    tokens: tuple[Int[Array, "B _"], ...]
    parents: tuple[Int[Array, "B _"], ...]
    owners: tuple[Int[Array, "B _"], ...]


def share_nodes(
    tokens: Int[Array, " N"], parent: Int[Array, " N"], is_sampled: Bool[np.ndarray, " N"], depth: int
) -> tuple[Int[Array, " N"], Int[Array, " N"], Int[Array, " N"]]:
    """Merges nodes of one row that are the same path: the first of them stays, and takes the others' children.

    Args:
      tokens: `[N]`; -1 where there is no node.
      parent: `[N]` parents come before their children.
      is_sampled: `[N]` whether a node was sampled; such nodes come first, and are never merged into others.
      depth: the most levels.

    Returns:
      `[N]` tokens, -1 for the nodes that were merged into others; `[N]` parents; `[N]` the node that stands for each.
    """
    index = jnp.arange(tokens.shape[0], dtype=jnp.int32)
    stays = jnp.asarray(is_sampled) | (tokens < 0)
    owner = index

    def above() -> Int[Array, " N"]:
        return jnp.where(parent >= 0, owner[jnp.maximum(parent, 0)], -1)

    for _ in range(depth):
        # After the round for a level, each of its nodes knows the first node with its path.
        same = (tokens[:, None] == tokens) & (above()[:, None] == above()) & (tokens >= 0)
        owner = jnp.where(stays, index, jnp.argmax(same, axis=1).astype(jnp.int32))
    return jnp.where(owner == index, tokens, -1), above(), owner


def _nodes(proposal: Proposal) -> tuple[Int[Array, "B N"], Int[Array, "B N"]]:
    """The tokens of a chain or tree, -1 where none is proposed, and their parents."""
    index = jnp.arange(proposal.tokens.shape[1], dtype=jnp.int32)
    parent = jnp.broadcast_to(index - 1, proposal.tokens.shape) if proposal.parent is None else proposal.parent
    return jnp.where(index < proposal.length[:, None], proposal.tokens, -1), parent


def _behind(parent: Int[Array, "B N"], begin: int) -> Int[Array, "B N"]:
    """The parents of a part's nodes where its first node has the index `begin`."""
    return jnp.where(parent >= 0, parent + begin, -1)


def join(proposals: Sequence[Proposal], depth: int, vocab_size: int) -> tuple[Proposal, tuple[Int[Array, "B _"], ...]]:
    """One tree of the proposals of all parts, one behind the other, those that were sampled first.

    A node that was chosen deterministically is merged into an earlier node with the same path. A sampled node is not:
    whether it is proposed must not depend on its own token. That a deterministic node depends on the siblings that were
    sampled before it biases nothing: a rule that judges siblings in turn has, once it has rejected those, a residual
    distribution to draw from, and stays exact whichever token it then tries first. Where a part has sampled, each node
    has the distribution that it was sampled from, one-hot for the deterministic ones.

    Args:
      proposals: of the parts.
      depth: D of the tree.
      vocab_size: V.

    Returns:
      the tree; for each part, the node of the tree that stands for each of its nodes.
    """
    order = sorted(range(len(proposals)), key=lambda i: proposals[i].probs is None)
    found = [_nodes(proposals[i]) for i in order]
    sizes = [tokens.shape[1] for tokens, _ in found]
    begins = np.cumsum([0, *sizes]).tolist()
    tokens = jnp.concatenate([tokens for tokens, _ in found], axis=1)
    parent = jnp.concatenate([_behind(parent, at) for (_, parent), at in zip(found, begins[:-1], strict=True)], axis=1)
    is_sampled = np.repeat([proposals[i].probs is not None for i in order], sizes)
    share = functools.partial(share_nodes, is_sampled=is_sampled, depth=depth)
    tokens, parent, owner = jax.vmap(lambda tokens, parent: share(tokens, parent))(tokens, parent)
    length = jnp.where(jnp.any(tokens >= 0, axis=1), tokens.shape[1], 0).astype(jnp.int32)
    stated = [_stated(proposals[i], vocab_size) for i in order]
    probs = jnp.concatenate(stated, axis=1) if is_sampled.any() else None
    places = {part: owner[:, begins[k] : begins[k + 1]] for k, part in enumerate(order)}
    owners = tuple(places[part] for part in range(len(proposals)))
    probes = _join_probes(proposals, owners, tokens.shape[1], vocab_size)
    return Proposal(tokens, length, probs, parent, probes), owners


def _stated(proposal: Proposal, vocab_size: int) -> Float[Array, "B N V"]:
    """What the nodes of a part were sampled from."""
    if proposal.probs is None:
        return jax.nn.one_hot(proposal.tokens, vocab_size, dtype=jnp.float32)
    return proposal.probs


def _join_probes(
    proposals: Sequence[Proposal], owners: Sequence[Int[Array, "B _"]], num_nodes: int, vocab_size: int
) -> Probes | None:
    """The probes of all parts, one behind the other: each sees the nodes that stand for those of its part."""
    sizes = [0 if proposal.probes is None else proposal.probes.tokens.shape[1] for proposal in proposals]
    total, begins, seen = sum(sizes), np.cumsum([0, *sizes]).tolist(), []
    given = [proposal.probes for proposal in proposals if proposal.probes is not None]
    if not given:
        return None
    for i, proposal in enumerate(proposals):
        if proposal.probes is None:
            continue
        sees, own = proposal.probes.sees, owners[i].shape[1]
        stands_for = owners[i][:, :, None] == jnp.arange(num_nodes)
        nodes = jnp.any(sees[:, :, 1 : 1 + own, None] & stands_for[:, None], axis=2)
        around = ((0, 0), (0, 0), (begins[i], total - begins[i] - sizes[i]))
        seen.append(jnp.concatenate([sees[:, :, :1], nodes, jnp.pad(sees[:, :, 1 + own :], around)], axis=2))
    tokens, embeddings = _join_embeddings(given, vocab_size)
    depth = jnp.concatenate([probes.depth for probes in given], axis=1)
    return Probes(tokens, depth, jnp.concatenate(seen, axis=1), embeddings)


def _join_embeddings(given: Sequence[Probes], vocab_size: int) -> tuple[Int[Array, "B M"], Float[Array, "X E"] | None]:
    """The tokens of all probes, and one table of the embeddings that those beyond the vocabulary read."""
    tables, tokens, begin = [], [], 0
    for probes in given:
        tokens.append(jnp.where(probes.tokens >= vocab_size, probes.tokens + begin, probes.tokens))
        if probes.embeddings is not None:
            tables.append(probes.embeddings)
            begin += len(probes.embeddings)
    return jnp.concatenate(tokens, axis=1), jnp.concatenate(tables) if tables else None


def _agreed(
    tokens: Int[Array, "B N"], parent: Int[Array, "B N"], committed: Int[Array, "B T"], depth: int
) -> Int[Array, " B"]:
    """How many of the committed tokens are a path of a part's proposal."""
    shape = tree.shape(parent, depth)
    # The committed token that each node of the block would be followed by.
    own = jnp.take_along_axis(committed, jnp.minimum(shape.depth, committed.shape[1] - 1), axis=1)
    everywhere = jnp.ones(own.shape[1], bool)

    def of_row(own: Array, tokens: Array, parent: Array) -> Array:
        proposal = Proposal(tokens, jnp.asarray(tokens.shape[0], jnp.int32), None, parent)
        return tree.walk(own, everywhere, proposal, depth)[1]

    return jax.vmap(of_row)(own, tokens, parent)


def _shifted(x: Array, by: Int[Array, " B"]) -> Array:
    """The entries of each row from `by` on, the last one repeated."""
    index = jnp.minimum(by[:, None] + jnp.arange(x.shape[1]), x.shape[1] - 1)
    return jnp.take_along_axis(x, index.reshape(*index.shape, *[1] * (x.ndim - 2)), axis=1)


def split(feedback: Feedback, agreed: Int[Array, " B"]) -> tuple[Feedback, Feedback]:
    """What a step committed, as a part sees it whose own draft was accepted for `agreed` tokens, and then a remainder.

    A part may take accepted tokens for its own draft, as a draft model does whose cache has them. So it is told of a
    step that accepted what it proposed and of the token after that, and then of a step without drafts, whose
    `context.max_draft` is 0, that committed the rest, which another part proposed.
    """
    context = feedback.context
    if context is not None:
        context = context._replace(max_draft=jnp.zeros_like(context.max_draft))
    own = jnp.minimum(feedback.num_tokens, agreed + 1)
    rest = feedback.num_tokens - own
    first = feedback._replace(num_tokens=own, length=feedback.length - rest)
    second = feedback._replace(
        tokens=_shifted(feedback.tokens, own),
        num_tokens=rest,
        features=_shifted(feedback.features, own),
        context=context,
    )
    return first, second


def merged(parts: Sequence[Any]) -> Draft:
    """Drafts with several drafters at once, whose drafts are verified as one tree.

    Any drafters will do: chains or trees, lookups, tables, models. Each keeps its own state and parameters, and those
    that draft with the target itself get its cache in turn, and their probes are read together. The tree has as many
    nodes as all parts together. Parts that sample draw independently of each other, as a rule that judges siblings in
    turn requires; under `verify.coupled`, all of them share the target's noise.

    Args:
      parts: drafters, each a `Drafter` or a `Draft`. The parameters of a plain `Drafter` that has some, such as a
        model's, take its place in the tuple `Params.draft`.

    Returns:
      a `Draft` whose parameters are the tuple of the parts'.

    Raises:
      ValueError: for no part that drafts, more than `limits.MAX_DRAFT_TOKENS` tokens in all, or parts of different
        vocabularies.
      TypeError: for a part that is not a drafter.
    """
    drafting = combined.drafting(parts)
    check_num_draft_tokens(sum(draft.num_draft_tokens for draft in drafting))
    return combined.together(_drafter(tuple(draft.drafter for draft in drafting)), drafting)


def _context(context: Context, part: Drafter, others: int) -> Context:
    """What a part sees: the keys of its own depth. Behind other parts that sample, they are keys of its own.

    Where the rule is coupled, they are the target's: it judges equality alone, so draws need not be independent.
    """
    depth = part.topology.depth
    keys = context.keys[:, :depth]
    if others and not context.coupled:
        keys = jax.vmap(jax.vmap(lambda key: jax.random.fold_in(key, others)))(keys)
    return context._replace(keys=keys, max_draft=jnp.minimum(context.max_draft, depth))


def _topology(parts: tuple[Drafter, ...]) -> Topology:
    shapes = [part.topology for part in parts]
    return Topology(
        sum(shape.num_nodes for shape in shapes),
        max(shape.depth for shape in shapes),
        num_probes=sum(shape.num_probes for shape in shapes),
        shares_draws=any(shape.shares_draws for shape in shapes),
    )


@functools.cache
def _drafter(parts: tuple[Drafter, ...]) -> Drafter:
    topology = _topology(parts)
    taps = tuple(tap for part in parts for tap in part.taps)

    def init(batch_size: int, max_len: int, max_source: int = 0) -> State:
        tokens, parents, owners = (
            tuple(jnp.full((batch_size, part.num_draft_tokens), -1, jnp.int32) for part in parts) for _ in range(3)
        )
        return State(tuple(part.init(batch_size, max_len, max_source) for part in parts), tokens, parents, owners)

    def propose(params: Params, state: State, cache: Any, context: Context) -> tuple[Proposal, State, Any]:
        proposals, states, sampled = [], [], 0
        for part, own, inner in zip(parts, params.draft, state.parts, strict=True):
            seen = _context(context, part, sampled)
            proposal, after, cache = contract.propose(part, Params(params.target, own), inner, cache, seen)
            proposals.append(proposal)
            states.append(after)
            sampled += proposal.probs is not None
        nodes = [_nodes(proposal) for proposal in proposals]
        proposal, owners = join(proposals, topology.depth, context.vocab_size)
        after = State(tuple(states), tuple(n[0] for n in nodes), tuple(n[1] for n in nodes), owners)
        return proposal, after, cache

    def update(params: Params, state: State, feedback: Feedback) -> State:
        states, begin, probes = [], 0, topology.num_nodes + 1
        for i, part in enumerate(parts):
            own = Params(params.target, params.draft[i])
            end = begin + len(part.taps)
            seen = combined.with_features(feedback, begin, end)
            begin = end
            if feedback.context is not None:
                seen = _of_part(seen, part, state.owners[i], probes)
                probes += part.topology.num_probes
            if feedback.inputs is not None:
                states.append(contract.update(part, own, state.parts[i], seen))
                continue
            agreed = _agreed(state.tokens[i], state.parents[i], feedback.tokens, part.topology.depth)
            inner = state.parts[i]
            for told in split(seen, agreed):
                inner = contract.update(part, own, inner, told)
            states.append(inner)
        return state._replace(parts=tuple(states))

    return Drafter(init, propose, update, topology, taps)


def _of_part(feedback: Feedback, part: Drafter, owners: Int[Array, "B N"], probes: int) -> Feedback:
    """The feedback with the output and the context of one part.

    Args:
      feedback: after a step.
      part: the part.
      owners: the node of the merged tree that stands for each of its nodes.
      probes: where its probes begin in the block that the target read.
    """
    assert feedback.context is not None
    rows = owners.shape[0]
    own = jnp.broadcast_to(probes + jnp.arange(part.topology.num_probes), (rows, part.topology.num_probes))
    at = jnp.concatenate([jnp.zeros((rows, 1), jnp.int32), owners + 1, own], axis=1)
    output = jax.tree.map(
        lambda x: jnp.take_along_axis(x, at.reshape(*at.shape, *[1] * (x.ndim - 2)), axis=1), feedback.output
    )
    return feedback._replace(output=output, context=_context(feedback.context, part, 0))
