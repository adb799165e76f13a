"""The draft of the first drafter that has one, as where a lookup that finds nothing leaves the step to a model.

SAM Decoding combines its lookup with another drafter in this way (arXiv 2411.10666). Against a tree of all drafts
(`merged`), the target reads no more tokens than one drafter proposes, which pays where each of them takes time.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from specjax.drafters import combined, contract
from specjax.types import Context, Draft, Drafter, Feedback, Params, Proposal, Topology


class State(NamedTuple):
    """The parts' states, and which of them drafted in this step.

    Attributes:
      parts: the state of each part.
      drafted: `[B]` the number of the part whose draft was proposed; -1: none.
    """

    parts: tuple[Any, ...]
    drafted: Int[Array, " B"]


def first_of(parts: Sequence[Any]) -> Draft:
    """Drafts with the first of several drafters that proposes something, in each row and step.

    A later part is asked for the rows alone for which all parts before it propose nothing, and does nothing where
    there are none. So cheap drafters that are right when they propose come first: a lookup before a head or a model.

    The loop has a program for the length of each part: lookups of 7 tokens before a head that drafts one are scored
    with 8 tokens or with 2 (`Topology.lengths`).

    Args:
      parts: drafters of chains, each a `Drafter` or a `Draft`, without probes. The parameters of a plain `Drafter` that
        has some take its place in the tuple `Params.draft`.

    Returns:
      a `Draft` whose parameters are the tuple of the parts'.

    Raises:
      ValueError: for trees, fewer than two parts that draft, or parts of different vocabularies.
      TypeError: for a part that is not a drafter.
    """
    drafting = combined.drafting(parts)
    for draft in drafting:
        topology = draft.drafter.topology
        if not topology.is_chain or topology.num_probes:
            raise ValueError(f"parts: {topology} is not a chain without probes; drafters.merged takes such parts.")
    return combined.together(_drafter(tuple(draft.drafter for draft in drafting)), drafting)


def _topology(parts: Sequence[Drafter]) -> Topology:
    lengths = sorted({length for part in parts for length in part.topology.all_lengths})
    return Topology.chain(lengths[-1], tuple(lengths[:-1]))


def _context(context: Context, part: Drafter, is_asked: Any) -> Context:
    """What a part sees, which drafts for the rows alone in which it is asked."""
    depth = part.topology.depth
    room = jnp.where(is_asked, jnp.minimum(context.max_draft, depth), 0)
    return context._replace(keys=context.keys[:, :depth], max_draft=room)


def _padded(proposal: Proposal, depth: int) -> Proposal:
    """A chain of as many tokens as the longest part has."""
    assert proposal.parent is None
    more = depth - proposal.tokens.shape[1]
    tokens, probs, confidence = jax.tree.map(
        lambda x: jnp.pad(x, ((0, 0), (0, more), *[(0, 0)] * (x.ndim - 2))),
        (proposal.tokens, proposal.probs, proposal.confidence),
    )
    return proposal._replace(tokens=tokens, probs=probs, confidence=confidence)


def _either(one: Proposal, other: Proposal, vocab_size: int) -> Proposal:
    """The first proposal in the rows where it has a token, else the second."""
    is_first = one.length > 0
    if one.probs is None and other.probs is None:
        probs = None
    else:
        # What was not sampled was certain to be proposed.
        stated = (
            jax.nn.one_hot(x.tokens, vocab_size, dtype=jnp.float32) if x.probs is None else x.probs
            for x in (one, other)
        )
        probs = jnp.where(is_first[:, None, None], *stated)
    tokens = jnp.where(is_first[:, None], one.tokens, other.tokens)
    confidence = None
    if one.confidence is not None or other.confidence is not None:
        sure = (jnp.ones(x.tokens.shape) if x.confidence is None else x.confidence for x in (one, other))
        confidence = jnp.where(is_first[:, None], *sure)
    return Proposal(tokens, jnp.where(is_first, one.length, other.length), probs, confidence=confidence)


@functools.cache
def _drafter(parts: tuple[Drafter, ...]) -> Drafter:
    topology = _topology(parts)
    taps = tuple(tap for part in parts for tap in part.taps)

    def init(batch_size: int, max_len: int, max_source: int = 0) -> State:
        states = tuple(part.init(batch_size, max_len, max_source) for part in parts)
        return State(states, jnp.full(batch_size, -1, jnp.int32))

    def propose(params: Params, state: State, cache: Any, context: Context) -> tuple[Proposal, State, Any]:
        states, drafted, found = [], jnp.full_like(state.drafted, -1), None
        for i, (part, own, inner) in enumerate(zip(parts, params.draft, state.parts, strict=True)):
            asked = _context(context, part, drafted < 0)
            proposal, after, cache = contract.propose(part, Params(params.target, own), inner, cache, asked)
            states.append(after)
            drafted = jnp.where((drafted < 0) & (proposal.length > 0), i, drafted)
            proposal = _padded(proposal, topology.depth)
            found = proposal if found is None else _either(found, proposal, context.vocab_size)
        assert found is not None
        return found, State(tuple(states), drafted), cache

    def update(params: Params, state: State, feedback: Feedback) -> State:
        states, begin = [], 0
        for i, part in enumerate(parts):
            own, end = Params(params.target, params.draft[i]), begin + len(part.taps)
            seen = _of_part(combined.with_features(feedback, begin, end), part, state.drafted == i)
            states.append(contract.update(part, own, state.parts[i], seen))
            begin = end
        return state._replace(parts=tuple(states))

    return Drafter(init, propose, update, topology, taps)


def _of_part(feedback: Feedback, part: Drafter, has_drafted: Any) -> Feedback:
    """What a part is told: that it could not draft in the rows where another part did."""
    if feedback.context is None:
        return feedback
    output = jax.tree.map(lambda x: x[:, : part.topology.num_nodes + 1], feedback.output)
    return feedback._replace(output=output, context=_context(feedback.context, part, has_drafted))
