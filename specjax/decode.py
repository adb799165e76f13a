"""The loop: draft, score, verify, commit, update; all rows, all on the device.

A text of n tokens always has its first n - 1 in the target's cache; the last is fed together with the next drafts, so
that one call of T = K + 1 tokens gives the K + 1 distributions that verification needs. Plain decoding is the same
loop with the drafter `none` (K = 0).
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from specjax import adaptive, automaton, distributed, processors, sampling, verify
from specjax.drafters import contract
from specjax.types import (
    Adaptation,
    Automaton,
    Context,
    DecodeState,
    Drafter,
    Feedback,
    History,
    Inputs,
    Logprobs,
    Model,
    Params,
    Proposal,
    SamplingOptions,
    Stats,
    StepKeys,
    Verdict,
)
from specjax.verify import Rule

DEFAULT_STEP_COST = 1.2
"""Time of a drafting step over that of a plain step, where nobody has measured it."""

MAX_NEW_TOKENS = 1 << 24
"""The most that a request may ask for; positions and counters are int32."""

BUFFER_MULTIPLE = 64
"""Buffers are rounded up to this many tokens at least, so that few programs serve all lengths."""

# Roles of the random numbers. A key is `fold_in(fold_in(seed[row], place), role)`, and place is that of a token in the
# text: no key is used twice, and none depends on a row's neighbours. What a step decides as a whole (drafts, and how
# many are accepted) uses its first place, since every step starts at a new one.
_DRAFT, _ACCEPT, _TOKEN = 0, 1, 2


class _Judged(NamedTuple):
    """What scoring and verification give: the cache, and for all rows what `_judge` documents."""

    cache: Any
    verdict: Verdict
    overlap: Float[Array, "B K"]
    failed: Bool[Array, " B"]
    hidden: Float[Array, "B T D"]
    logprobs: Logprobs | None


def buffer_length(limit: int, num_draft_tokens: int) -> int:
    """The buffer that texts of at most `limit` tokens need: a step may write K tokens beyond its text."""
    return _round_up(limit + num_draft_tokens + 1, BUFFER_MULTIPLE)


def _round_up(size: int, least: int) -> int:
    """To one of eight sizes an octave, all multiples of `least`: few programs, and little padding in a long one."""
    step = max(least, (1 << (size - 1).bit_length()) // 16)
    return -(-size // step) * step


def pad_prompts(prompts: Sequence[Sequence[int]], width: int | None = None) -> Inputs:
    """Right-pads prompts of token ids.

    Args:
      prompts: token ids.
      width: to how many tokens; by default to the next of few widths, so that few programs read them all.

    Raises:
      ValueError: for an empty prompt, or none at all, or one that is longer than the width.
    """
    if not prompts:
        raise ValueError("There are no prompts: give at least one.")
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"Prompt {i} is empty: give at least one token, such as the beginning-of-text token.")
    longest = max(map(len, prompts))
    width = _round_up(longest, 16) if width is None else width
    if longest > width:
        raise ValueError(f"A prompt of {longest} tokens does not fit prompt_width={width}: raise it.")
    tokens = np.zeros((len(prompts), width), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    return Inputs(jnp.asarray(tokens), jnp.asarray([len(p) for p in prompts], jnp.int32))


def read_inputs(target: Model, prompts: Sequence[Sequence[int]], width: int | None = None) -> Inputs:
    """Prompts as a target reads them: an encoder-decoder with its encoder, and its texts begin with its start token.

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
    """`[B]` int32, how many tokens each row may add, from one number or one a row."""
    is_one = isinstance(max_new_tokens, str) or not isinstance(max_new_tokens, (Sequence, np.ndarray))
    budgets = [max_new_tokens] * rows if is_one else list(max_new_tokens)
    if len(budgets) != rows:
        raise ValueError(f"{len(budgets)} values of max_new_tokens for {rows} rows: give one, or one a row.")
    for budget in budgets:
        if not isinstance(budget, int | np.integer):
            raise TypeError(f"max_new_tokens={budget!r}: give a whole number, or one a row.")
        if not 0 <= budget <= MAX_NEW_TOKENS:
            raise ValueError(f"max_new_tokens={budget} is outside [0, {MAX_NEW_TOKENS}].")
    return np.array(budgets, np.int32)


def text_limits(
    inputs: Inputs,
    max_new_tokens: Any,
    num_draft_tokens: int,
    max_len: int | None,
    models: Mapping[str, Model],
) -> tuple[np.ndarray, int]:
    """Checks that texts fit the buffer and the models.

    Args:
      inputs: padded prompts.
      max_new_tokens: how many tokens each row may add; one number, or one a row.
      num_draft_tokens: K.
      max_len: the length of the buffer, or None for the smallest that holds everything.
      models: the models that will read the texts, by what they are called in an error.

    Returns:
      `[B]` the length at which each row stops, and the length of the buffer.

    Raises:
      ValueError: where something does not fit.
      TypeError: for max_new_tokens that are no whole numbers.
    """
    rows, width = inputs.tokens.shape
    lengths, budget = distributed.to_host(inputs.length), _budgets(max_new_tokens, rows)
    limit = lengths + budget
    longest, k = int(limit.max()), num_draft_tokens
    texts = f"A prompt of {int(lengths.max())} tokens (padded to {width}) with {int(budget.max())} new tokens"
    if max_len is None:
        max_len = max(buffer_length(longest, k), width)
    if max(longest + k + 1, width) > max_len:
        raise ValueError(
            f"{texts} and K + 1 = {k + 1} more does not fit a buffer of {max_len} tokens: raise max_len, or lower "
            "max_new_tokens."
        )
    for name, model in models.items():
        if longest > model.max_len:
            raise ValueError(
                f"{texts} makes {longest}, but the {name} knows {model.max_len} positions: shorten the prompt or lower "
                "max_new_tokens."
            )
    return limit, max_len


def _pad_stop_tokens(stop_tokens: Sequence[int]) -> Int[Array, " E"]:
    """Padded with -1 to a multiple of eight, so that another few of them compile nothing."""
    tokens = sorted(set(stop_tokens))
    return jnp.asarray(tokens + [-1] * (-len(tokens) % 8 or 8 * (not tokens)), jnp.int32)


def spread_seeds(seed: Any, count: int) -> list[int]:
    """One seed a sequence: those that are given, or `seed + i` for sequence i.

    Args:
      seed: what a user gave: one whole number, or one for each sequence.
      count: how many sequences there are.

    Raises:
      ValueError: for a seed outside [0, 2^32), or too few or many of them.
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
    """One random key a row from one seed a row."""
    return jax.vmap(jax.random.key)(seeds)


@functools.partial(jax.jit, static_argnames=("target", "drafter", "max_len", "top_logprobs"))
def _prefill(
    target: Model,
    drafter: Drafter,
    params: Params,
    inputs: Inputs,
    limit: Int[Array, " B"],
    seed: Array,
    options: SamplingOptions,
    stop_tokens: Int[Array, " E"],
    stop_strings: Automaton | None,
    grammar: Automaton | None,
    grammar_state: Int[Array, " B"],
    step_cost: Float[Array, ""],
    max_len: int,
    top_logprobs: int | None,
) -> DecodeState:
    rows, width = inputs.tokens.shape
    output, cache = target.prefill(params.target, inputs, target.init_cache(rows, max_len))
    tokens = jnp.zeros((rows, max_len), jnp.int32).at[:, :width].set(inputs.tokens)
    k = drafter.num_draft_tokens
    logprobs = None
    if top_logprobs is not None:
        top = (rows, max_len, top_logprobs)
        logprobs = Logprobs(jnp.zeros(top[:2], jnp.float32), jnp.zeros(top, jnp.int32), jnp.zeros(top, jnp.float32))
    return DecodeState(
        tokens=tokens,
        from_draft=jnp.zeros((rows, max_len), bool),
        length=inputs.length,
        prompt_length=inputs.length,
        limit=limit,
        done=inputs.length >= limit,
        failed_at=jnp.full(rows, -1, jnp.int32),
        draft_failed=jnp.zeros(rows, bool),
        seed=seed,
        sampling=options,
        stop_tokens=stop_tokens,
        stop_strings=stop_strings,
        stop_state=jnp.zeros(rows, jnp.int32),
        grammar=grammar,
        grammar_state=grammar_state,
        logprobs=logprobs,
        step_cost=step_cost,
        adaptation=adaptive.init(rows),
        # The first step scores the last prompt token again, beside the first drafts: no step is special.
        cache=cache._replace(length=inputs.length - 1),
        drafter=drafter.init(params.draft, inputs, output, max_len),
        stats=Stats(
            jnp.zeros(rows, jnp.int32),
            jnp.zeros(rows, jnp.int32),
            jnp.zeros((rows, k), jnp.int32),
            jnp.zeros((rows, k), jnp.int32),
            jnp.zeros((rows, k + 1), jnp.int32),
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
    stop_tokens: Sequence[int] = (),
    stop_strings: Automaton | None = None,
    grammar: Automaton | Sequence[Automaton | None] | None = None,
    top_logprobs: int | None = None,
    step_cost: float = DEFAULT_STEP_COST,
    max_len: int | None = None,
) -> DecodeState:
    """Reads the prompts into the caches of both sides.

    Args:
      target: the model whose distribution the text will have.
      drafter: what proposes.
      params: the parameters of both.
      inputs: padded prompts (`read_inputs`).
      max_new_tokens: how many tokens each row may add; one number, or one a row.
      options: sampling options; greedy by default.
      seeds: one a row; by default 0, 1, 2 ...
      stop_tokens: token ids that end a row.
      stop_strings: an automaton that ends a row when it is in its last state (`automaton.stop_strings`).
      grammar: an automaton that says which tokens may follow, or one (or None) a row.
      top_logprobs: keep the log-probability of every new token, and those of this many most probable ones.
      step_cost: time of a drafting step over that of a plain step (see `adaptive`); 0 drafts whenever it can.
      max_len: the length of the buffer; by default the smallest that holds everything (`buffer_length`).

    Raises:
      ValueError: where a text does not fit the buffer or the model, or an option makes no sense.
    """
    rows = inputs.tokens.shape[0]
    limit, max_len = text_limits(inputs, max_new_tokens, drafter.num_draft_tokens, max_len, {"target": target})
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
        raise ValueError(f"{len(grammars)} grammars for {rows} rows: give one, or one a row.")
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
        drafter._replace(source=None),
        params,
        inputs,
        jnp.asarray(limit, jnp.int32),
        row_keys(jnp.asarray(seeds, jnp.uint32)),
        options if options is not None else sampling.options(rows),
        _pad_stop_tokens(stop_tokens),
        stop_strings,
        grammar if isinstance(grammar, Automaton) else None,
        jnp.asarray(starts, jnp.int32),
        jnp.asarray(step_cost, jnp.float32),
        max_len,
        top_logprobs,
    )


@functools.partial(jax.jit, static_argnames=("times",))
def repeat(state: DecodeState, times: int, seeds: UInt32[Array, " N"]) -> DecodeState:
    """Several texts of each prompt from one prefill: every row `times` times, the copies side by side.

    Args:
      state: as `prefill` gave it.
      times: how many texts of each prompt.
      seeds: `[B * times]` one a row of the result.
    """
    shared = {
        "stop_tokens": state.stop_tokens,
        "stop_strings": state.stop_strings,
        "grammar": state.grammar,
        "step_cost": state.step_cost,
    }
    rows = jax.tree.map(lambda x: jnp.repeat(x, times, axis=0), state._replace(**dict.fromkeys(shared)))
    return rows._replace(**shared, seed=row_keys(seeds))


def history_of(state: DecodeState) -> History:
    """The text before the next token of each row."""
    return History(
        state.tokens,
        state.length,
        state.prompt_length,
        state.stop_tokens,
        state.grammar,
        state.grammar_state[:, None],
    )


def _at_temperature_one(options: SamplingOptions) -> SamplingOptions:
    """The same options, but rows of temperature 0 keep their whole distribution."""
    return options._replace(temperature=jnp.where(options.temperature > 0, options.temperature, 1.0))


def _first(found: Bool[Array, "B T"]) -> Int[Array, " B"]:
    """The first place of each row that holds; T where none does."""
    size = found.shape[-1]
    return jnp.min(jnp.where(found, jnp.arange(size, dtype=jnp.int32), size), axis=-1, initial=size)


def _stops(state: DecodeState, tokens: Int[Array, "B T"]) -> tuple[Bool[Array, "B T"], Int[Array, "B T+1"]]:
    """Whether each of the tokens behind a text ends it, and the states of its stop strings before each and after."""
    stops = jnp.isin(tokens, state.stop_tokens)
    states = _trace(state.stop_strings, state.stop_state, tokens)
    if state.stop_strings is not None:
        stops = stops | (states[:, 1:] == state.stop_strings.next_state.shape[0] - 1)
    return stops, states


def _within_text(state: DecodeState, proposal: Proposal, room: Int[Array, " B"]) -> Proposal:
    """The proposal without what lies beyond the row's budget, or behind its first stop, where there is no text.

    Whether a token is left out depends on those before it alone, so exact rules stay exact.
    """
    end = jnp.minimum(_first(_stops(state, proposal.tokens)[0]) + 1, room)
    return proposal._replace(length=jnp.clip(proposal.length, 0, end))


def _up_to_nan(proposal: Proposal, target_probs: Float[Array, "B T V"]) -> Proposal:
    """The proposal up to the first position at which one side has no distribution: no rule can judge a token there.

    If all drafts before that position are accepted, the row fails there, as plain decoding would.
    """
    k = proposal.tokens.shape[1]
    broken = jnp.isnan(jnp.sum(target_probs, axis=-1))[:, :k]
    if proposal.probs is not None:
        broken |= jnp.isnan(jnp.sum(proposal.probs, axis=-1))
    return proposal._replace(length=jnp.minimum(proposal.length, _first(broken)))


def apply_rule(
    rule: Rule,
    options: SamplingOptions,
    proposal: Proposal,
    keys: StepKeys,
    logits: Float[Array, "B T V"],
    history: History,
) -> tuple[Verdict, Float[Array, "B T V"]]:
    """The verdicts of all rows on their drafts, and the target's distributions that they were made from.

    Args:
      rule: the acceptance rule.
      options: of the rows.
      proposal: the drafts.
      keys: of the step.
      logits: `[B, T, V]` of the target, T = K + 1.
      history: the text before each of the T tokens.
    """
    target_probs = sampling.probabilities(logits, options, history)
    proposal = _up_to_nan(proposal, target_probs)
    is_sampled = options.temperature > 0
    if rule.exact:
        # Every exact rule is `greedy` on one-hot distributions, which needs no noise.
        verdict = jax.lax.cond(
            jnp.any(is_sampled),
            lambda: jax.vmap(rule)(keys, target_probs, proposal),
            lambda: jax.vmap(rule.at_zero)(keys, target_probs, proposal),
        )
        return verdict, target_probs
    soft = sampling.probabilities(logits, _at_temperature_one(options), history)
    verdict, at_zero = jax.vmap(rule)(keys, target_probs, proposal), jax.vmap(rule.at_zero)(keys, soft, proposal)
    return jax.tree.map(lambda a, b: jax.vmap(jnp.where)(is_sampled, a, b), verdict, at_zero), target_probs


def _logprobs(logits: Float[Array, "B T V"], tokens: Int[Array, "B T"], num_top: int) -> Logprobs:
    """Log-probabilities of the tokens at each of T places, and of the most probable ones."""
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    top, top_tokens = jax.lax.top_k(log_probs, num_top)
    return Logprobs(jnp.take_along_axis(log_probs, tokens[..., None], axis=-1)[..., 0], top_tokens, top)


def _judge(
    target: Model, rule: Rule, params: Params, state: DecodeState, proposal: Proposal, keys: StepKeys
) -> _Judged:
    """Scores the text's last token and the draft in one target call, and applies the rule.

    Returns:
      the cache; the verdict; the overlap at each draft position; whether the target's logits failed where the last
      token was chosen; the hidden states; the log-probabilities of the verdict's tokens, where asked for.
    """
    last = jnp.take_along_axis(state.tokens, (state.length - 1)[:, None], axis=1)
    block = jnp.concatenate([last, proposal.tokens], axis=1)
    output, cache = target.apply(params.target, block, state.cache)
    history = processors.follow(history_of(state), proposal.tokens, state.sampling.penalties)
    verdict, target_probs = apply_rule(rule, state.sampling, proposal, keys, output.logits, history)
    first_broken = _first(jnp.isnan(jnp.sum(target_probs, axis=-1)))
    failed = first_broken <= verdict.num_accepted
    logprobs = None
    if state.logprobs is not None:
        logprobs = _logprobs(output.logits, verdict.tokens, state.logprobs.top.shape[2])
    return _Judged(cache, verdict, jax.vmap(verify.overlap)(target_probs, proposal), failed, output.hidden, logprobs)


def _judge_plain(
    target: Model, rule: Rule, params: Params, state: DecodeState, proposal: Proposal, keys: StepKeys
) -> _Judged:
    """`_judge` for a step in which no row drafts: the target reads one token a row. Padded to the same shapes."""
    k = proposal.tokens.shape[1]
    none = Proposal(proposal.tokens[:, :0], proposal.length, None if proposal.probs is None else proposal.probs[:, :0])
    keys = keys._replace(token=keys.token[:, :1])
    judged = _judge(target, rule, params, state, none, keys)

    def widen(x: Array) -> Array:
        return jnp.pad(x, ((0, 0), (0, k)) + ((0, 0),) * (x.ndim - 2))

    return judged._replace(
        verdict=judged.verdict._replace(tokens=widen(judged.verdict.tokens)),
        overlap=widen(judged.overlap),
        hidden=widen(judged.hidden),
        logprobs=jax.tree.map(widen, judged.logprobs),
    )


def _run_if(
    predicate: Bool[Array, ""],
    judge: Callable[..., _Judged],
    state: DecodeState,
    proposal: Proposal,
    keys: StepKeys,
    judged: _Judged,
) -> _Judged:
    """`judge(state, proposal, keys)` where the predicate holds, else `judged` unchanged.

    A `while_loop` of at most one round: XLA copies a cache that both sides of a `cond` update, on every step.
    """

    def body(carry: tuple[Array, _Judged]) -> tuple[Array, _Judged]:
        return jnp.zeros((), bool), judge(state._replace(cache=carry[1].cache), proposal, keys)

    return jax.lax.while_loop(lambda carry: carry[0], body, (predicate, judged))[1]


def step_keys(seed: Array, length: Int[Array, " B"], num_draft_tokens: int) -> tuple[Array, StepKeys]:
    """The keys of a step: `[B, K]` for drafting, and those of verification."""

    def of_row(seed: Array, length: Array) -> tuple[Array, StepKeys]:
        places = jax.vmap(lambda i: jax.random.fold_in(seed, length + i))(jnp.arange(num_draft_tokens + 1))
        tokens = jax.vmap(lambda key: jax.random.fold_in(key, _TOKEN))(places)
        drafts = jax.random.split(jax.random.fold_in(places[0], _DRAFT), num_draft_tokens)
        return drafts, StepKeys(jax.random.fold_in(places[0], _ACCEPT), tokens)

    return jax.vmap(of_row)(seed, length)


def decode_step(
    target: Model, drafter: Drafter, rule: Rule, params: Params, state: DecodeState, fixed_shape: bool = False
) -> DecodeState:
    """One step of speculative decoding for all rows (Leviathan et al. 2022, Algorithm 1).

    Args:
      target: the model whose distribution the text has.
      drafter: what proposes.
      rule: the acceptance rule.
      params: the parameters of both.
      state: before the step.
      fixed_shape: always score K + 1 tokens, also where no row drafts (see `docs/exactness.md`, numerics).

    Returns:
      The state after it: every row that is not done has gained between 1 and K + 1 tokens.
    """
    k = drafter.num_draft_tokens
    draft_keys, keys = step_keys(state.seed, state.length, k)
    running = ~state.done

    # Draft. A row that drafts needs room for its drafts and the token that follows them.
    may_draft = running & adaptive.drafts(state.adaptation)
    room = jnp.where(may_draft, jnp.minimum(k, state.limit - state.length - 1), 0)
    # A coupled rule has the draft draw with the noise that the target draws with.
    draft_keys = keys.token[:, :k] if rule.coupled else draft_keys
    context = Context(history_of(state), draft_keys, room, state.sampling, target.vocab_size)
    proposal, drafter_state = contract.propose(drafter, params.draft, state.drafter, context)
    proposal = _within_text(state, proposal, room)

    # Score and verify. Where no row drafts, this is a plain decoding step and costs no more.
    judge = functools.partial(_judge, target, rule, params)
    plain = functools.partial(_judge_plain, target, rule, params)
    if k == 0 or fixed_shape:
        judged = judge(state, proposal, keys)
    else:
        speculate = jnp.any(proposal.length > 0)
        shapes = jax.eval_shape(judge, state, proposal, keys)
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes._replace(cache=None))
        nothing = nothing._replace(cache=state.cache)
        judged = _run_if(speculate, judge, state, proposal, keys, nothing)
        judged = _run_if(~speculate, plain, state, proposal, keys, judged)
    verdict, target_failed = judged.verdict, judged.failed

    # Commit: up to the first stop, within the row's budget, and nothing that was drawn from NaN.
    position = jnp.arange(k + 1)
    n = verdict.num_accepted
    is_judged = running[:, None] & (position[:k] < proposal.length[:, None]) & (position[:k] <= n[:, None])
    draft_failed = jnp.zeros_like(target_failed)
    if proposal.probs is not None:
        draft_failed = jnp.any(is_judged & jnp.isnan(jnp.sum(proposal.probs, axis=-1)), axis=-1)
    failed = running & (target_failed | draft_failed)
    emitted = jnp.where(failed, n, n + 1)
    stops, stop_states = _stops(state, verdict.tokens)
    first_stop = _first(stops & (position < emitted[:, None]))
    # A row that has come to its stop needs no distribution behind it.
    failed &= first_stop >= n
    emitted = jnp.minimum(jnp.minimum(emitted, first_stop + 1), state.limit - state.length)
    emitted = jnp.where(running, emitted, 0)
    length = state.length + emitted
    stopped = failed | (first_stop < emitted) | (length >= state.limit)

    def write(buffer: Array, new: Array) -> Array:
        """Writes a row's new entries behind its text."""
        lengthwise = jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice_in_dim(row, new, at, 0))
        return lengthwise(buffer, new, state.length)

    def after(states: Int[Array, "B T"]) -> Int[Array, " B"]:
        """Of an automaton's states before and after each token, that after the new text."""
        return jnp.take_along_axis(states, emitted[:, None], axis=1)[:, 0]

    feedback = Feedback(verdict, length, judged.hidden)
    is_accepted = is_judged & (position[:k] < n[:, None])
    # The chance of acceptance; of a rule that is not exact, what came of it.
    overlap = judged.overlap if rule.exact else is_accepted.astype(jnp.float32)
    stats = state.stats
    return state._replace(
        tokens=write(state.tokens, verdict.tokens),
        from_draft=write(state.from_draft, position < n[:, None]),
        length=length,
        done=state.done | stopped,
        failed_at=jnp.where(failed, state.length + n, state.failed_at),
        draft_failed=state.draft_failed | (failed & draft_failed),
        stop_state=after(stop_states),
        grammar_state=after(_trace(state.grammar, state.grammar_state, verdict.tokens)),
        logprobs=jax.tree.map(write, state.logprobs, judged.logprobs),
        adaptation=_select(
            running, adaptive.update(state.adaptation, proposal.length, n, state.step_cost), state.adaptation
        ),
        # Roll back: what was rejected lies beyond the length.
        cache=judged.cache._replace(length=length - 1),
        drafter=contract.update(drafter, params.draft, drafter_state, feedback),
        stats=Stats(
            stats.target_calls + running,
            stats.draft_steps + (running & (proposal.length > 0)),
            stats.proposed + is_judged,
            stats.accepted + is_accepted,
            stats.histogram + (running[:, None] & (position == n[:, None])),
            stats.overlap + jnp.sum(jnp.where(is_judged, overlap, 0.0), axis=-1),
        ),
    )


def _trace(table: Automaton | None, state: Int[Array, " B"], tokens: Int[Array, "B T"]) -> Int[Array, "B T+1"]:
    """An automaton's states before each token and after the last; without an automaton the state stays."""
    if table is None:
        return jnp.broadcast_to(state[:, None], (tokens.shape[0], tokens.shape[1] + 1))
    return automaton.trace(table, state, tokens)


def _select(rows: Bool[Array, " B"], new: Adaptation, old: Adaptation) -> Adaptation:
    return Adaptation(*(jnp.where(rows, a, b) for a, b in zip(new, old, strict=True)))


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
    """Runs at most `num_steps` steps, fewer where all rows are done first. The state is donated.

    `drafter.source` must be None here (parameters are arguments); `generate` and `stream` see to it.
    """

    def unfinished(carry: tuple[Array, DecodeState]) -> Array:
        return (carry[0] < num_steps) & ~jnp.all(carry[1].done)

    def body(carry: tuple[Array, DecodeState]) -> tuple[Array, DecodeState]:
        return carry[0] + 1, decode_step(target, drafter, rule, params, carry[1], fixed_shape)

    return jax.lax.while_loop(unfinished, body, (jnp.zeros((), jnp.int32), state))[1]


def check(state: DecodeState) -> None:
    """Raises where a row met logits that are not numbers.

    Raises:
      FloatingPointError: naming the row, the position, and the side.
    """
    failed_at, draft_failed = distributed.to_host(state.failed_at), distributed.to_host(state.draft_failed)
    for row in np.flatnonzero(failed_at >= 0):
        side = "draft" if draft_failed[row] else "target"
        raise FloatingPointError(
            f"The {side}'s logits are not numbers (NaN) at position {failed_at[row]} of row {row}, or the options "
            "forbid every token there: the text before it is sound. Check the weights, use float32, or allow more."
        )


def generate(
    target: Model, drafter: Drafter, rule: Rule, params: Params, state: DecodeState, *, fixed_shape: bool = False
) -> DecodeState:
    """Decodes until every row is done: one jitted `while_loop`. The state is donated.

    Args:
      target: the model whose distribution the text has.
      drafter: what proposes.
      rule: the acceptance rule.
      params: the parameters of both.
      state: as `prefill` gave it.
      fixed_shape: every target call scores K + 1 tokens a row (see `decode_step`).

    Raises:
      FloatingPointError: for logits that are not numbers.
    """
    state = advance(target, drafter._replace(source=None), rule, params, state, np.int32(2**31 - 1), fixed_shape)
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
      drafter: what proposes.
      rule: the acceptance rule.
      params: the parameters of both.
      state: as `prefill` gave it; donated.
      steps: how many steps lie between two pauses.
      fixed_shape: every target call scores K + 1 tokens a row (see `decode_step`).

    Yields:
      the state so far. The next step donates it: read it before asking for the next.

    Raises:
      FloatingPointError: for logits that are not numbers.
      ValueError: for steps < 1.
    """
    if steps < 1:
        raise ValueError(f"steps={steps}: at least 1.")
    drafter, done = drafter._replace(source=None), False
    while not done:  # Texts that may have no new token are yielded, too.
        state = advance(target, drafter, rule, params, state, np.int32(steps), fixed_shape)
        check(state)
        done = bool(jnp.all(state.done))
        yield state
