"""The loop: steps until every row is done, in one jitted program."""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from specjax.decoding.step import decode_step
from specjax.decoding.verify import Rule
from specjax.parallel import distributed
from specjax.state import DecodeState
from specjax.types import Drafter, Model, Params

CompilerOptions = tuple[tuple[str, str | bool | int | float], ...]
"""Options of XLA for one program, names and values; empty for those that XLA has."""

_HOW: dict[str, Any] = {"static_argnames": ("target", "drafter", "rule", "fixed_shape"), "donate_argnames": ("state",)}


@functools.partial(jax.jit, **_HOW)
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


@functools.cache
def compiled_with(options: CompilerOptions) -> Callable[..., DecodeState]:
    """`advance`, compiled with these options of XLA.

    Raises:
      ValueError: when called, for an option that XLA does not have, or a value that it does not take.
    """
    if not options:
        return advance
    jitted: Any = advance
    run = jax.jit(jitted.__wrapped__, **_HOW, compiler_options=dict(options))

    def checked(*arguments: Any) -> DecodeState:
        try:
            return run(*arguments)
        except jax.errors.JaxRuntimeError as error:
            if "compile option" not in str(error) and "setting option" not in str(error):
                raise
            said = str(error).splitlines()[0]
            raise ValueError(f"compiler_options={dict(options)}: XLA refuses them ({said}).") from error

    return checked


def as_options(options: Mapping[str, str | bool | int | float] | None) -> CompilerOptions:
    """A mapping of names to values, or None, in an order of its own."""
    return tuple(sorted((options or {}).items()))


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
    compiler_options: CompilerOptions = (),
) -> DecodeState:
    """Decodes until every row is done: one jitted `while_loop`. The state is donated.

    Args:
      target: the model whose distribution the text has.
      drafter: the drafter.
      rule: the acceptance rule.
      params: the parameters of both.
      state: from `prefill`.
      fixed_shape: every target call scores K + 1 tokens per row (see `decode_step`).
      compiler_options: options of XLA for the loop.

    Raises:
      FloatingPointError: for NaN logits, or options that forbid every token.
      ValueError: for compiler options that XLA refuses.
    """
    run = compiled_with(compiler_options)
    state = run(target, drafter, rule, params, state, np.int32(2**31 - 1), fixed_shape)
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
    compiler_options: CompilerOptions = (),
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
      compiler_options: options of XLA for the loop.

    Yields:
      the state so far. The next step donates it: read it before asking for the next.

    Raises:
      FloatingPointError: for NaN logits, or options that forbid every token.
      ValueError: for steps < 1, or compiler options that XLA refuses.
    """
    if steps < 1:
        raise ValueError(f"steps={steps}: at least 1.")
    run, done = compiled_with(compiler_options), False
    while not done:  # Texts whose budget is 0 are yielded, too.
        state = run(target, drafter, rule, params, state, np.int32(steps), fixed_shape)
        check(state)
        done = bool(jnp.all(state.rows.done))
        yield state
