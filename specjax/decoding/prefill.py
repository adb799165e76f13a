"""From a request to the initial state of the loop: prompts are read, and options and seeds laid out by row."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from specjax import sampling
from specjax.decoding import adaptive, buffers
from specjax.drafters import contract
from specjax.sampling import automaton, processors
from specjax.state import DecodeState, Logprobs, Rows, Shared, Stats
from specjax.types import Automaton, Drafter, Feedback, Inputs, Model, Params, SamplingOptions

DEFAULT_STEP_COST = 1.2
"""Time of a drafting step over that of a plain step, where it has not been measured."""


def _pad_stop_tokens(stop_tokens: Sequence[int] | Sequence[Sequence[int]], rows: int) -> Int[Array, "B X"]:
    """The stop tokens of each row, padded with -1 to a multiple of eight, so that a few more do not recompile."""
    given: list[Any] = list(stop_tokens)
    is_one = not any(isinstance(entry, Sequence | np.ndarray) for entry in given)
    each = [sorted(set(given))] if is_one else [sorted(set(row)) for row in given]
    if not is_one and len(each) != rows:
        raise ValueError(f"{len(each)} lists of stop_tokens for {rows} rows: give one list, or one for each row.")
    width = max(8, -(-max(map(len, each)) // 8) * 8)
    padded = np.array([row + [-1] * (width - len(row)) for row in each], np.int32)
    return jnp.asarray(np.broadcast_to(padded, (rows, width)))


def spread_seeds(seed: Any, count: int) -> list[int]:
    """One seed per sequence: those that are given, or `seed + i` for sequence i.

    Args:
      seed: what a user gave: one whole number, or one for each sequence.
      count: the number of sequences.

    Raises:
      ValueError: for a seed outside [0, 2^32), or the wrong number of seeds.
      TypeError: for one that is not a whole number.
    """
    seeds = list(seed) if isinstance(seed, (Sequence, np.ndarray)) and not isinstance(seed, str) else [seed]
    for one in seeds:
        if not isinstance(one, int | np.integer):
            raise TypeError(f"seed={one!r}: give a whole number, or one for each of {count} sequences.")
    if isinstance(seed, int | np.integer):
        seeds = [int(seed) + i for i in range(count)]
    if len(seeds) != count:
        raise ValueError(f"{len(seeds)} seeds for {count} sequences: give one, or one for each.")
    for one in map(int, seeds):
        if not 0 <= one < 2**32:
            last = " (sequence i uses seed + i)" if isinstance(seed, int | np.integer) and count > 1 else ""
            raise ValueError(f"seed={one} is outside [0, 2^32){last}: choose another.")
    return [int(one) for one in seeds]


def row_keys(seeds: UInt32[Array, " B"]) -> Array:
    """One random key per row from one seed per row."""
    return jax.vmap(jax.random.key)(seeds)


def step_costs(step_cost: float | Sequence[float], depth: int) -> np.ndarray:
    """The time of a step by the number of its draft tokens, over that of a plain step.

    Args:
      step_cost: as for `prefill`.
      depth: D, of the drafter.

    Returns:
      `[D + 1]` float32, 1 for a plain step.

    Raises:
      ValueError: for costs that make no sense, or the wrong number of them.
    """
    given = np.asarray(step_cost, np.float32)
    if given.ndim > 1 or (given.ndim == 1 and len(given) != depth):
        raise ValueError(
            f"step_cost={step_cost}: give one number, or {depth}, one for each number of draft tokens up to the depth."
        )
    if not np.all(np.isfinite(given)) or np.any(given < 0):
        raise ValueError(f"step_cost={step_cost}: times are not negative; 0 always drafts.")
    return np.append(1.0, np.broadcast_to(given, (depth,))).astype(np.float32)


@functools.partial(jax.jit, static_argnames=("target", "drafter", "max_len", "top_logprobs"))
def _prefill(
    target: Model,
    drafter: Drafter,
    params: Params,
    inputs: Inputs,
    limit: Int[Array, " B"],
    seed: Array,
    options: SamplingOptions,
    stop_tokens: Int[Array, "B X"],
    stop_strings: Automaton | None,
    grammar: Automaton | None,
    grammar_state: Int[Array, " B"],
    step_costs: Float[Array, " C"],
    max_len: int,
    top_logprobs: int | None,
) -> DecodeState:
    rows, width = inputs.tokens.shape
    max_source = 0 if inputs.source is None else inputs.source.shape[1]
    output, cache = target.prefill(params.target, inputs, target.init_cache(rows, max_len, max_source))
    tokens = jnp.zeros((rows, max_len), jnp.int32).at[:, :width].set(inputs.tokens)
    prompt = Feedback(inputs.tokens, inputs.length, inputs.length, output.features, output, inputs)
    drafter_state = contract.update(drafter, params, drafter.init(rows, max_len, max_source), prompt)
    # The first step scores the last prompt token again, together with the first drafts: no step is special.
    cache = target.commit(cache, None, jnp.full(rows, -1, jnp.int32))
    text = Text(tokens, inputs.length, cache, drafter_state)
    settings = Settings(limit, seed, options, stop_tokens, grammar_state, jnp.full(rows, top_logprobs is not None))
    return DecodeState(new_rows(drafter, text, settings, top_logprobs), Shared(stop_strings, grammar, step_costs))


class Text(NamedTuple):
    """Prompts that have been read.

    Attributes:
      tokens: `[B, L]` the text buffer.
      length: `[B]` tokens in it.
      cache: the target's cache, of all but the last token.
      drafter: the drafter's state.
    """

    tokens: Int[Array, "B L"]
    length: Int[Array, " B"]
    cache: Any
    drafter: Any


class Settings(NamedTuple):
    """What each row has chosen; the fields are those of `Rows`."""

    limit: Int[Array, " B"]
    seed: Array
    sampling: SamplingOptions
    stop_tokens: Int[Array, "B X"]
    grammar_state: Int[Array, " B"]
    wants_logprobs: Bool[Array, " B"]


def new_rows(drafter: Drafter, text: Text, settings: Settings, top_logprobs: int | None) -> Rows:
    """Rows that have not decoded anything yet.

    Args:
      drafter: the drafter.
      text: their prompts.
      settings: their options.
      top_logprobs: how many log-probabilities are kept for each position beside that of the token; None: none at all.
    """
    rows, max_len = text.tokens.shape
    topology, logprobs = drafter.topology, None
    if top_logprobs is not None:
        top = (rows, max_len, top_logprobs)
        logprobs = Logprobs(jnp.zeros(top[:2], jnp.float32), jnp.zeros(top, jnp.int32), jnp.zeros(top, jnp.float32))
    none = jnp.zeros(rows, jnp.int32)
    return Rows(
        tokens=text.tokens,
        from_draft=jnp.zeros((rows, max_len), bool),
        length=text.length,
        prompt_length=text.length,
        limit=settings.limit,
        done=text.length >= settings.limit,
        failed_at=none - 1,
        draft_failed=jnp.zeros(rows, bool),
        seed=settings.seed,
        sampling=settings.sampling,
        stop_tokens=settings.stop_tokens,
        stop_state=none,
        grammar_state=settings.grammar_state,
        logprobs=logprobs,
        wants_logprobs=settings.wants_logprobs,
        adaptation=adaptive.init(rows, topology.depth),
        cache=text.cache,
        drafter=text.drafter,
        stats=Stats(
            none,
            none,
            jnp.zeros((rows, topology.depth), jnp.int32),
            jnp.zeros((rows, topology.depth), jnp.int32),
            jnp.zeros((rows, topology.depth + 1), jnp.int32),
            jnp.zeros((rows, len(topology.all_lengths)), jnp.int32),
            jnp.zeros(rows, jnp.float32),
        ),
    )


def prefill(
    target: Model,
    drafter: Drafter,
    params: Params,
    inputs: Inputs,
    *,
    max_new_tokens: Any,
    options: SamplingOptions | None = None,
    seeds: Any = None,
    stop_tokens: Sequence[int] | Sequence[Sequence[int]] = (),
    stop_strings: Automaton | None = None,
    grammar: Automaton | Sequence[Automaton | None] | None = None,
    top_logprobs: int | None = None,
    step_cost: float | Sequence[float] = DEFAULT_STEP_COST,
    max_len: int | None = None,
) -> DecodeState:
    """Reads the prompts into the caches of both sides.

    Args:
      target: the model whose distribution the text will have.
      drafter: the drafter.
      params: the parameters of both.
      inputs: padded prompts (`read_inputs`).
      max_new_tokens: how many tokens each row may add; one number, or one per row.
      options: sampling options; greedy by default.
      seeds: one per row; by default 0, 1, 2 ...
      stop_tokens: token ids that end a row; one list, or one for each row.
      stop_strings: an automaton that ends a row when it is in its last state (`automaton.stop_strings`).
      grammar: an automaton that says which tokens may follow, or one (or None) per row.
      top_logprobs: a number n keeps the log-probability of every new token, and of the n most probable ones.
      step_cost: time of a drafting step over that of a plain step (see `adaptive`); 0 always drafts. Or a list of D
        numbers: of a step with 1, 2, ... draft tokens.
      max_len: the length of the buffer; by default the smallest that holds everything (`buffer_length`).

    Raises:
      ValueError: where a text does not fit the buffer or the model, or an option makes no sense.
    """
    rows = inputs.tokens.shape[0]
    num_read = drafter.topology.num_read
    limit, max_len = buffers.text_limits(inputs, max_new_tokens, num_read, max_len, {"target": target})
    if top_logprobs is not None and not 0 <= top_logprobs <= target.vocab_size:
        raise ValueError(f"top_logprobs={top_logprobs} is outside [0, {target.vocab_size}].")
    penalties = options.penalties if options is not None else None
    if penalties is not None:
        beyond = processors.unknown_tokens(penalties, target.vocab_size)
        if beyond:
            raise ValueError(
                f"logit_bias or suppress_tokens names token {beyond[0]}, but the vocabulary has {target.vocab_size}."
            )
    grammars = [grammar] * rows if grammar is None or isinstance(grammar, Automaton) else list(grammar)
    if len(grammars) != rows:
        raise ValueError(f"{len(grammars)} grammars for {rows} rows: give one, or one per row.")
    starts = np.zeros(rows, np.int32)
    if any(g is not None for g in grammars):
        grammar, starts = automaton.combine(grammars)
    for name, table in {"stop_strings": stop_strings, "grammar": grammar}.items():
        if isinstance(table, Automaton) and table.token_class.shape[0] != target.vocab_size:
            raise ValueError(
                f"The automaton of {name} knows {table.token_class.shape[0]} tokens, but the target's vocabulary has "
                f"{target.vocab_size}: build it with vocab_size={target.vocab_size}."
            )
    seeds = spread_seeds(0 if seeds is None else seeds, rows)
    return _prefill(
        target,
        drafter,
        params,
        inputs,
        jnp.asarray(limit, jnp.int32),
        row_keys(jnp.asarray(seeds, jnp.uint32)),
        options if options is not None else sampling.options(rows),
        _pad_stop_tokens(stop_tokens, rows),
        stop_strings,
        grammar if isinstance(grammar, Automaton) else None,
        jnp.asarray(starts, jnp.int32),
        jnp.asarray(step_costs(step_cost, drafter.topology.depth)),
        max_len,
        top_logprobs,
    )


@functools.partial(jax.jit, static_argnames=("times",))
def repeat(state: DecodeState, times: int, seeds: UInt32[Array, " N"]) -> DecodeState:
    """Several texts for each prompt from one prefill: every row is repeated `times` times, the copies adjacent.

    Args:
      state: from `prefill`.
      times: how many texts for each prompt.
      seeds: `[B * times]` one per row of the result.
    """
    rows = jax.tree.map(lambda x: jnp.repeat(x, times, axis=0), state.rows)
    return state._replace(rows=rows._replace(seed=row_keys(seeds)))
