"""The drafter that proposes nothing: plain decoding, the oracle of the tests and the baseline of every measurement."""

import functools

import jax.numpy as jnp

from specjax.limits import check_num_draft_tokens
from specjax.types import Context, Drafter, Feedback, Inputs, ModelOutput, Proposal, Tree


@functools.cache
def none(*, num_draft_tokens: int = 0) -> Drafter:
    """The loop decodes one token a step with the target alone.

    Args:
      num_draft_tokens: room for this many drafts, none of which is ever made: with `fixed_shape`, every target call
        then has the shape that a drafter with this K gives it.

    Raises:
      ValueError: for a negative number.
    """
    check_num_draft_tokens(num_draft_tokens)

    def init(params: Tree, inputs: Inputs, target_output: ModelOutput, max_len: int) -> tuple[()]:
        del params, inputs, target_output, max_len
        return ()

    def propose(params: Tree, state: tuple[()], context: Context) -> tuple[Proposal, tuple[()]]:
        del params
        rows = context.max_draft.shape[0]
        return Proposal(jnp.zeros((rows, num_draft_tokens), jnp.int32), jnp.zeros(rows, jnp.int32), None), state

    def update(params: Tree, state: tuple[()], feedback: Feedback) -> tuple[()]:
        del params, feedback
        return state

    return Drafter(init, propose, update, num_draft_tokens)
