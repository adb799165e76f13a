"""The drafter that proposes nothing: plain decoding, the oracle of the tests and the baseline of every measurement."""

import functools

import jax.numpy as jnp

from specjax.types import Context, Drafter, Feedback, Inputs, ModelOutput, Proposal, Tree


@functools.cache
def none() -> Drafter:
    """K = 0: the loop decodes one token a step with the target alone."""

    def init(params: Tree, inputs: Inputs, target_output: ModelOutput, max_len: int) -> tuple[()]:
        del params, inputs, target_output, max_len
        return ()

    def propose(params: Tree, state: tuple[()], context: Context) -> tuple[Proposal, tuple[()]]:
        del params
        rows = context.length.shape[0]
        return Proposal(jnp.zeros((rows, 0), jnp.int32), jnp.zeros(rows, jnp.int32), None), state

    def update(params: Tree, state: tuple[()], feedback: Feedback) -> tuple[()]:
        del params, feedback
        return state

    return Drafter(init, propose, update, 0)
