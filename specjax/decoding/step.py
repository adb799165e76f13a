"""One step: propose, score, verify, commit; all rows, all on the device.


A text of n tokens always has its first n - 1 in the target's cache; the last is fed together with the next drafts, so
that one call of T = K + 1 tokens gives the K + 1 distributions that verification needs. Plain decoding is the same
loop with the drafter `none` (K = 0).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from specjax import sampling
from specjax.decoding import adaptive, verify
from specjax.decoding.verify import Rule
from specjax.drafters import contract
from specjax.sampling import automaton, processors
from specjax.types import (
    Adaptation,
    Automaton,
    Context,
    DecodeState,
    Drafter,
    Feedback,
    History,
    Logprobs,
    Model,
    Params,
    Proposal,
    SamplingOptions,
    Stats,
    StepKeys,
    Verdict,
)

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
