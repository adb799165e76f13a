"""Prompts and buffers, padded to a few sizes, so that a few programs serve all lengths."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from specjax.parallel import distributed
from specjax.types import Inputs, Model

MAX_NEW_TOKENS = 1 << 24
"""The most new tokens that a request may ask for; positions and counters are int32."""

BUFFER_MULTIPLE = 64
"""Buffers are rounded up to multiples of at least this many tokens, so that a few programs serve all lengths."""


def buffer_length(limit: int, num_read: int) -> int:
    """The buffer length for texts of at most `limit` tokens: a step may write `num_read` tokens beyond the text."""
    return round_up(limit + num_read + 1, BUFFER_MULTIPLE)


def round_up(size: int, least: int) -> int:
    """Rounds up to one of eight sizes per octave, all multiples of `least`: few programs, and little padding."""
    step = max(least, (1 << (size - 1).bit_length()) // 16)
    return -(-size // step) * step


def pad_prompts(prompts: Sequence[Sequence[int]], width: int | None = None) -> Inputs:
    """Right-pads prompts of token ids.

    Args:
      prompts: token ids.
      width: the padded length; by default the next of a few lengths, so that a few programs read all prompts.

    Raises:
      ValueError: for an empty prompt, no prompts at all, or a prompt that is longer than the width.
    """
    if not prompts:
        raise ValueError("There are no prompts: give at least one.")
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"Prompt {i} is empty: give at least one token, such as the beginning-of-text token.")
    longest = max(map(len, prompts))
    width = round_up(longest, 16) if width is None else width
    if longest > width:
        raise ValueError(f"A prompt of {longest} tokens does not fit prompt_width={width}: raise it.")
    tokens = np.zeros((len(prompts), width), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    return Inputs(jnp.asarray(tokens), jnp.asarray([len(p) for p in prompts], jnp.int32))


def read_inputs(target: Model, prompts: Sequence[Sequence[int]], width: int | None = None) -> Inputs:
    """Prompts as a target reads them: an encoder-decoder encodes them, and its text begins with the start token.

    Args:
      target: the target.
      prompts: token ids.
      width: see `pad_prompts`.

    Raises:
      ValueError: as `pad_prompts` does.
    """
    padded = pad_prompts(prompts, width)
    if target.start_token is None:
        return padded
    rows = len(prompts)
    start, one = jnp.full((rows, 1), target.start_token, jnp.int32), jnp.ones(rows, jnp.int32)
    return Inputs(start, one, source=padded.tokens, source_length=padded.length)


def _budgets(max_new_tokens: Any, rows: int) -> np.ndarray:
    """`[B]` int32, how many tokens each row may add, from one number or one per row."""
    is_one = isinstance(max_new_tokens, str) or not isinstance(max_new_tokens, (Sequence, np.ndarray))
    budgets = [max_new_tokens] * rows if is_one else list(max_new_tokens)
    if len(budgets) != rows:
        raise ValueError(f"{len(budgets)} values of max_new_tokens for {rows} rows: give one, or one per row.")
    for budget in budgets:
        if not isinstance(budget, int | np.integer):
            raise TypeError(f"max_new_tokens={budget!r}: give a whole number, or one per row.")
        if not 0 <= budget <= MAX_NEW_TOKENS:
            raise ValueError(f"max_new_tokens={budget} is outside [0, {MAX_NEW_TOKENS}].")
    return np.array(budgets, np.int32)


def text_limits(
    inputs: Inputs,
    max_new_tokens: Any,
    num_read: int,
    max_len: int | None,
    models: Mapping[str, Model],
) -> tuple[np.ndarray, int]:
    """Checks that texts fit the buffer and the models.

    Args:
      inputs: padded prompts.
      max_new_tokens: how many tokens each row may add; one number, or one per row.
      num_read: how many draft tokens and probes a step may write after a text (`Topology.num_read`).
      max_len: the length of the buffer, or None for the smallest that holds everything.
      models: the models that will read the texts, by their names in error messages.

    Returns:
      `[B]` the length at which each row stops, and the length of the buffer.

    Raises:
      ValueError: where something does not fit.
      TypeError: for max_new_tokens that are not whole numbers.
    """
    rows, width = inputs.tokens.shape
    lengths, budget = distributed.to_host(inputs.length), _budgets(max_new_tokens, rows)
    limit = lengths + budget
    longest, k = int(limit.max()), num_read
    texts = f"A prompt of {int(lengths.max())} tokens (padded to {width}) with {int(budget.max())} new tokens"
    if max_len is None:
        max_len = max(buffer_length(longest, k), width)
    if max(longest + k + 1, width) > max_len:
        raise ValueError(
            f"{texts} and {k + 1} more that a step may write does not fit a buffer of {max_len} tokens: raise max_len, "
            "or lower max_new_tokens."
        )
    for name, model in models.items():
        if longest > model.max_len:
            raise ValueError(
                f"{texts} makes {longest}, but the {name} knows {model.max_len} positions: shorten the prompt or lower "
                "max_new_tokens."
            )
    return limit, max_len
