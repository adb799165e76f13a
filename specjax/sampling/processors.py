"""Logit processors, applied before logits become a distribution: penalties, bias, forbidden tokens, grammars.

Each processor is written for one position of one sequence: `(logits[V], tokens[L], length, options...) -> logits[V]`,
the logits of the token at position `length`, given `tokens[:length]`. `process` maps them over the rows and over the
positions of a draft block, where the draft tokens count as text for the positions after them. So plain decoding,
drafting, verification and the bonus token all see the same distribution. Names, meaning and order are those of
transformers. Presence and frequency penalties, which transformers lacks, are those of the OpenAI and vLLM interfaces,
on the new text alone.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from specjax import control
from specjax.sampling import automaton
from specjax.types import History, Penalties

PerRow = float | Sequence[float] | np.ndarray
"""An option: one value for all rows, or one per row."""

NO_TOKEN = 2**31 - 1
"""A token id beyond every vocabulary, which pads `Penalties.bias_tokens`."""


def spread(name: str, value: Any, batch_size: int, dtype: Any, low: float, high: float, *, above: bool = False) -> Any:
    """One value per row in host memory, from one value or a list of them.

    Numbers that float32 would round to 0 are rounded away from it instead: 0 is often the value that means "off".

    Raises:
      ValueError: for a value outside [low, high] (with `above`: (low, high]), or the wrong number of values.
      TypeError: for a value that is not a number.
    """
    try:
        values = np.asarray(value, np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}={value!r}: give one number, or one for each of {batch_size} rows.") from error
    if values.shape not in ((), (batch_size,)):
        raise ValueError(f"{name} has shape {values.shape}: give one value, or one for each of {batch_size} rows.")
    if not np.all((values > low if above else values >= low) & (values <= high)):
        raise ValueError(f"{name}={value} is outside {'(' if above else '['}{low}, {high}].")
    if np.issubdtype(dtype, np.integer) and not np.all(values == np.round(values)):
        raise ValueError(f"{name}={value} is not a whole number.")
    if dtype == jnp.float32:
        least = np.finfo(np.float32).smallest_normal
        values = np.where((values != 0) & (np.abs(values) < least), np.copysign(least, values), values)
    return np.broadcast_to(values, (batch_size,)).astype(dtype)


def penalties(
    batch_size: int,
    *,
    repetition_penalty: PerRow = 1.0,
    presence_penalty: PerRow = 0.0,
    frequency_penalty: PerRow = 0.0,
    no_repeat_ngram_size: PerRow = 0,
    min_new_tokens: PerRow = 0,
    logit_bias: Mapping[int, float] | Sequence[Mapping[int, float]] | None = None,
    suppress_tokens: Sequence[int] | None = None,
) -> Penalties | None:
    """Checks the options and broadcasts them to the rows.

    Args:
      batch_size: B.
      repetition_penalty: from 1e-6 to 1e6; 1: off (Keskar et al. 2019, arXiv 1909.05858).
      presence_penalty: any number; 0: off.
      frequency_penalty: any number; 0: off.
      no_repeat_ngram_size: at least 0; 0: off.
      min_new_tokens: at least 0.
      logit_bias: from tokens to numbers added to their logits, one mapping for all rows or one per row; -inf forbids a
        token.
      suppress_tokens: tokens that are forbidden in every row.

    Returns:
      the options in host memory, or None where no row uses any.

    Raises:
      ValueError: naming the option and its value.
    """
    rows = [logit_bias or {}] * batch_size if logit_bias is None or isinstance(logit_bias, Mapping) else [*logit_bias]
    if len(rows) != batch_size:
        raise ValueError(f"logit_bias has {len(rows)} mappings: give one, or one for each of {batch_size} rows.")
    rows = [
        {int(t): float(b) for t, b in row.items()} | {int(t): -np.inf for t in suppress_tokens or ()} for row in rows
    ]
    for row in rows:
        for token, bias in row.items():
            if not 0 <= token < NO_TOKEN:
                raise ValueError(f"logit_bias or suppress_tokens names token {token}: ids are not negative.")
            if np.isnan(bias) or bias > np.finfo(np.float32).max:
                raise ValueError(f"logit_bias of token {token} is {bias}: give a finite number, or -inf to forbid it.")
    numbers: dict[str, tuple[Any, Any, float, float]] = {
        "repetition_penalty": (repetition_penalty, jnp.float32, 1e-6, 1e6),
        "presence_penalty": (presence_penalty, jnp.float32, -1e6, 1e6),
        "frequency_penalty": (frequency_penalty, jnp.float32, -1e6, 1e6),
        "no_repeat_ngram_size": (no_repeat_ngram_size, jnp.int32, 0, 2**20),
        "min_new_tokens": (min_new_tokens, jnp.int32, 0, 2**30),
    }
    arrays = {
        name: spread(name, value, batch_size, dtype, low, high) for name, (value, dtype, low, high) in numbers.items()
    }
    idle = all(bool(np.all(x == (name == "repetition_penalty"))) for name, x in arrays.items())
    if idle and not any(rows):
        return None
    # Padded, so that a few more or fewer of them do not recompile.
    width = -(-max(map(len, rows)) // 8) * 8
    tokens: Any = np.full((batch_size, width), NO_TOKEN, np.int32)
    bias: Any = np.zeros((batch_size, width), np.float32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], bias[i, : len(row)] = list(row), list(row.values())
    return Penalties(**arrays, bias_tokens=tokens, bias=bias)


def unknown_tokens(options: Penalties, vocab_size: int) -> list[int]:
    """Tokens of `bias_tokens` that are not in the vocabulary."""
    tokens = np.unique(np.asarray(options.bias_tokens))
    return tokens[(tokens >= vocab_size) & (tokens != NO_TOKEN)].tolist()


def _counts(
    tokens: Int[Array, " L"], begin: Int[Array, ""] | int, end: Int[Array, ""], vocab_size: int
) -> Int[Array, " V"]:
    place = jnp.arange(tokens.shape[0])
    within = (place >= begin) & (place < end)
    return jnp.zeros(vocab_size, jnp.int32).at[tokens].add(within.astype(jnp.int32), mode="drop")


def repetition(
    logits: Float[Array, " V"], tokens: Int[Array, " L"], length: Int[Array, ""], penalty: Float[Array, ""]
) -> Float[Array, " V"]:
    """Makes every token of prompt and text less likely (arXiv 1909.05858, §4.1)."""
    seen = _counts(tokens, 0, length, logits.shape[0]) > 0
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def presence_and_frequency(
    logits: Float[Array, " V"],
    tokens: Int[Array, " L"],
    length: Int[Array, ""],
    prompt_length: Int[Array, ""],
    presence: Float[Array, ""],
    frequency: Float[Array, ""],
) -> Float[Array, " V"]:
    """Subtracts `presence` from the tokens of the new text, and `frequency` for every time that they occur in it."""
    count = _counts(tokens, prompt_length, length, logits.shape[0])
    return logits - presence * (count > 0) - frequency * count


def no_repeat_ngram(
    logits: Float[Array, " V"], tokens: Int[Array, " L"], length: Int[Array, ""], size: Int[Array, ""]
) -> Float[Array, " V"]:
    """Forbids the tokens that would complete an n-gram that is already in prompt and text."""
    place = jnp.arange(tokens.shape[0])

    def match(back: Array, running: Bool[Array, " L"]) -> Bool[Array, " L"]:
        # The token `back` before the next one, compared with the token `back` before every position.
        return running & (jnp.roll(tokens, back) == tokens[jnp.maximum(length - back, 0)])

    running = (place < length) & (place >= size - 1) & (size > 0) & (length >= size - 1)
    running = jax.lax.fori_loop(1, size, match, running)
    repeats = jnp.zeros(logits.shape[0], bool).at[tokens].max(running, mode="drop")
    return jnp.where(repeats, -jnp.inf, logits)


def min_new(
    logits: Float[Array, " V"],
    tokens: Int[Array, " L"],
    length: Int[Array, ""],
    prompt_length: Int[Array, ""],
    stop_tokens: Int[Array, " E"],
    minimum: Int[Array, ""],
) -> Float[Array, " V"]:
    """Forbids the stop tokens while the text has fewer than `minimum` new tokens."""
    del tokens
    size = logits.shape[0]
    # A negative index would count from the end.
    is_stop = jnp.zeros(size, bool).at[jnp.where(stop_tokens >= 0, stop_tokens, size)].set(True, mode="drop")
    return jnp.where(is_stop & (length - prompt_length < minimum), -jnp.inf, logits)


def add_bias(
    logits: Float[Array, " V"],
    tokens: Int[Array, " L"],
    length: Int[Array, ""],
    bias_tokens: Int[Array, " M"],
    bias: Float[Array, " M"],
) -> Float[Array, " V"]:
    """Adds a number to the logits of some tokens."""
    del tokens, length
    return logits.at[bias_tokens].add(bias, mode="drop")


def process(logits: Float[Array, "B T V"], options: Penalties | None, history: History) -> Float[Array, "B T V"]:
    """The logits after all processors; those that no row of the batch uses are skipped at run time.

    Args:
      logits: `[B, T, V]` float32.
      options: the penalties, or None.
      history: the text before each of the T tokens.

    Returns:
      `[B, T, V]`; -inf where a token is forbidden.
    """
    # In a tree, each token has a text of its own.
    is_tree = history.tokens.ndim == 3
    positions = history.length
    if positions.ndim == 1:
        positions = positions[:, None] + jnp.arange(logits.shape[1])

    def apply(used: Array, processor: Callable[..., Array], logits: Array, *row_options: Array) -> Array:
        def everywhere(logits: Array) -> Array:
            options_axes = (None,) * len(row_options)
            over_positions = jax.vmap(processor, in_axes=(0, 0 if is_tree else None, 0, *options_axes))
            return jax.vmap(over_positions)(logits, history.tokens, positions, *row_options)

        return control.alike(jax.lax.cond(jnp.any(used), everywhere, lambda logits: logits, logits), logits)

    if options is not None:
        o, prompt = options, history.prompt_length
        stops = history.stop_tokens
        if o.bias.shape[1]:
            logits = apply(o.bias != 0, add_bias, logits, o.bias_tokens, o.bias)
        logits = apply(o.repetition_penalty != 1, repetition, logits, o.repetition_penalty)
        logits = apply(
            (o.presence_penalty != 0) | (o.frequency_penalty != 0),
            presence_and_frequency,
            logits,
            prompt,
            o.presence_penalty,
            o.frequency_penalty,
        )
        logits = apply(o.no_repeat_ngram_size > 0, no_repeat_ngram, logits, o.no_repeat_ngram_size)
        logits = apply(o.min_new_tokens > 0, min_new, logits, prompt, stops, o.min_new_tokens)
    if (grammar := history.grammar) is not None:

        def masked(logits: Array) -> Array:
            return jnp.where(automaton.allowed(grammar, history.grammar_state), logits, -jnp.inf)

        used = jnp.any(history.grammar_state >= 0)
        logits = control.alike(jax.lax.cond(used, masked, lambda logits: logits, logits), logits)
    return logits


def follow(history: History, tokens: Int[Array, "B K"], options: Penalties | None) -> History:
    """The history before each of K + 1 tokens: the first, and those that follow each of `tokens`.

    Args:
      history: before the first (T = 1).
      tokens: `[B, K]` the tokens at the following positions.
      options: the penalties, or None, in which case the tokens are not read.
    """
    state = history.grammar_state
    if history.grammar is not None:
        state = automaton.trace(history.grammar, state[:, 0], tokens)
    else:
        state = jnp.broadcast_to(state, (state.shape[0], tokens.shape[1] + 1))
    text = history.tokens
    if options is not None:
        write = jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice(row, new, (at,)))
        text = write(text, tokens, history.length)
    return history._replace(tokens=text, grammar_state=state)


def extend(history: History, token: Int[Array, " B"], options: Penalties | None) -> History:
    """The history (T = 1) after one more token of each row."""
    after = follow(history, token[:, None], options)
    return after._replace(length=history.length + 1, grammar_state=after.grammar_state[:, 1:])
