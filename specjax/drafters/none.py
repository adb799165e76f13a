"""The drafter that proposes nothing: plain decoding, the oracle of the tests and the baseline of every measurement."""

import functools
from typing import Any

import jax.numpy as jnp

from specjax.drafters import chain
from specjax.limits import check_num_draft_tokens
from specjax.types import Context, Drafter, Params, Proposal, Topology, Tree


@functools.cache
def none(*, num_draft_tokens: int = 0) -> Drafter:
    """The loop decodes one token per step with the target alone.

    Args:
      num_draft_tokens: room for this many drafts, none of which is ever made: with `fixed_shape`, every target call
        then has the shape that a drafter with this K gives it.

    Raises:
      ValueError: for a negative number.
    """
    check_num_draft_tokens(num_draft_tokens)

    def propose(params: Params, state: Tree, cache: Any, context: Context) -> tuple[Proposal, Tree, Any]:
        del params
        rows = context.max_draft.shape[0]
        proposal = Proposal(jnp.zeros((rows, num_draft_tokens), jnp.int32), jnp.zeros(rows, jnp.int32), None)
        return proposal, state, cache

    return Drafter(chain.init, propose, chain.update, Topology.chain(num_draft_tokens))
