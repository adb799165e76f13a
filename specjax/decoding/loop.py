"""The loop: steps until every row is done, in one jitted program."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from specjax.decoding.step import decode_step
from specjax.decoding.verify import Rule
from specjax.parallel import distributed
from specjax.state import DecodeState
from specjax.types import Drafter, Model, Params


@functools.partial(jax.jit, static_argnames=("target", "drafter", "rule", "fixed_shape"), donate_argnames=("state",))
def advance(
    target: Model,
    drafter: Drafter,
    rule: Rule,
    params: Params,
    state: DecodeState,
    num_steps: Int[Array, ""] | int,
    fixed_shape: bool = False,
) -> DecodeState:
    """Runs at most `num_steps` steps, fewer where all rows are done first. The state is donated."""

    def unfinished(carry: tuple[Array, DecodeState]) -> Array:
        return (carry[0] < num_steps) & ~jnp.all(carry[1].rows.done)

    def body(carry: tuple[Array, DecodeState]) -> tuple[Array, DecodeState]:
        return carry[0] + 1, decode_step(target, drafter, rule, params, carry[1], fixed_shape)

    return jax.lax.while_loop(unfinished, body, (jnp.zeros((), jnp.int32), state))[1]


def check(state: DecodeState) -> None:
    """Raises an error where a row had NaN logits, or options that forbid every token.

    Raises:
      FloatingPointError: naming the row, the position, and the side.
    """
    failed_at, draft_failed = distributed.to_host(state.rows.failed_at), distributed.to_host(state.rows.draft_failed)
    for row in np.flatnonzero(failed_at >= 0):
        side = "draft" if draft_failed[row] else "target"
        raise FloatingPointError(
            f"The {side}'s logits are NaN at position {failed_at[row]} of row {row}, or the options forbid every token "
            "there: the text before it is valid. Check the weights, use float32, or allow more tokens."
        )


def generate(
    target: Model,
    drafter: Drafter,
    rule: Rule,
    params: Params,
    state: DecodeState,
    *,
    fixed_shape: bool = False,
) -> DecodeState:
    """Decodes until every row is done: one jitted `while_loop`. The state is donated.

    Args:
      target: the model whose distribution the text has.
      drafter: the drafter.
      rule: the acceptance rule.
      params: the parameters of both.
      state: from `prefill`.
      fixed_shape: every target call scores K + 1 tokens per row (see `decode_step`).

    Raises:
      FloatingPointError: for NaN logits, or options that forbid every token.
    """
    state = advance(target, drafter, rule, params, state, np.int32(2**31 - 1), fixed_shape)
    check(state)
    return state


def stream(
    target: Model,
    drafter: Drafter,
    rule: Rule,
    params: Params,
    state: DecodeState,
    *,
    steps: int = 4,
    fixed_shape: bool = False,
) -> Iterator[DecodeState]:
    """Decodes like `generate`, by the same program and to the same tokens, pausing every few steps.

    Args:
      target: the model whose distribution the text has.
      drafter: the drafter.
      rule: the acceptance rule.
      params: the parameters of both.
      state: from `prefill`; donated.
      steps: the number of steps between two pauses.
      fixed_shape: every target call scores K + 1 tokens per row (see `decode_step`).

    Yields:
      the state so far. The next step donates it: read it before asking for the next.

    Raises:
      FloatingPointError: for NaN logits, or options that forbid every token.
      ValueError: for steps < 1.
    """
    if steps < 1:
        raise ValueError(f"steps={steps}: at least 1.")
    done = False
    while not done:  # Texts whose budget is 0 are yielded, too.
        state = advance(target, drafter, rule, params, state, np.int32(steps), fixed_shape)
        check(state)
        done = bool(jnp.all(state.rows.done))
        yield state
