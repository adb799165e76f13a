"""The loop: draft, score, verify, commit, update; all rows, all on the device.

A text of n tokens always has its first n - 1 in the target's cache; the last is fed together with the next drafts, so
that one call of T = K + 1 tokens gives the K + 1 distributions that verification needs. Plain decoding is the same
loop with the drafter
`none` (K = 0).
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from specjax import adaptive, sampling, verify
from specjax.types import (
    Adaptation,
    Context,
    DecodeState,
    Drafter,
    Feedback,
    Inputs,
    Model,
    Params,
    Proposal,
    SamplingOptions,
    Stats,
    Verdict,
)
from specjax.verify import Rule

DEFAULT_STEP_COST = 1.2
"""Time of a drafting step over that of a plain step, where nobody has measured it."""

BUFFER_MULTIPLE = 64
"""Buffers are rounded up to this many tokens, so that few programs serve all lengths."""

# Roles of the random numbers of one step. A key is `fold_in(fold_in(seed[row], length[row]), role)`: every step
# starts at a new length, so no key is used twice, and none depends on a row's neighbours.
_DRAFT, _VERIFY = 0, 1


_Judged = tuple[Any, Verdict, Float[Array, "B K"], Bool[Array, " B"], Array]
"""See `_judge`."""


def buffer_length(limit: int, num_draft_tokens: int) -> int:
    """The buffer that texts of at most `limit` tokens need: a step may write K tokens beyond its text."""
    return -(-(limit + num_draft_tokens + 1) // BUFFER_MULTIPLE) * BUFFER_MULTIPLE


def pad_prompts(prompts: Sequence[Sequence[int]]) -> Inputs:
    """Right-pads prompts of token ids to the next of few widths.

    Raises:
      ValueError: for an empty prompt, or none at all.
    """
    if not prompts:
        raise ValueError("There are no prompts: give at least one.")
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"Prompt {i} is empty: give at least one token, such as the beginning-of-text token.")
    longest = max(map(len, prompts))
    # Eight buckets an octave, none under 16: few programs, and little of a long prefill is padding.
    step = max(16, (1 << (longest - 1).bit_length()) // 16)
    width = -(-longest // step) * step
    tokens = np.zeros((len(prompts), width), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    return Inputs(jnp.asarray(tokens), jnp.asarray([len(p) for p in prompts], jnp.int32))


def _pad_stop_tokens(stop_tokens: Sequence[int]) -> Int[Array, " E"]:
    """Padded with -1 to a multiple of eight, so that another few of them compile nothing."""
    tokens = sorted(set(stop_tokens))
    return jnp.asarray(tokens + [-1] * (-len(tokens) % 8 or 8 * (not tokens)), jnp.int32)


def row_keys(seeds: UInt32[Array, " B"]) -> Array:
    """One random key a row from one seed a row."""
    return jax.vmap(jax.random.key)(seeds)


@functools.partial(jax.jit, static_argnames=("target", "drafter", "max_len"))
def _prefill(
    target: Model,
    drafter: Drafter,
    params: Params,
    inputs: Inputs,
    limit: Int[Array, " B"],
    seed: Array,
    options: SamplingOptions,
    stop_tokens: Int[Array, " E"],
    step_cost: Float[Array, ""],
    max_len: int,
) -> DecodeState:
    rows, width = inputs.tokens.shape
    output, cache = target.prefill(params.target, inputs, target.init_cache(rows, max_len))
    tokens = jnp.zeros((rows, max_len), jnp.int32).at[:, :width].set(inputs.tokens)
    k = drafter.num_draft_tokens
    return DecodeState(
        tokens=tokens,
        from_draft=jnp.zeros((rows, max_len), bool),
        length=inputs.length,
        limit=limit,
        done=inputs.length >= limit,
        failed_at=jnp.full(rows, -1, jnp.int32),
        draft_failed=jnp.zeros(rows, bool),
        seed=seed,
        sampling=options,
        stop_tokens=stop_tokens,
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
    max_new_tokens: int | Sequence[int],
    options: SamplingOptions | None = None,
    seeds: Sequence[int] | None = None,
    stop_tokens: Sequence[int] = (),
    step_cost: float = DEFAULT_STEP_COST,
    max_len: int | None = None,
) -> DecodeState:
    """Reads the prompts into the caches of both sides.

    Args:
      target: the model whose distribution the text will have.
      drafter: what proposes.
      params: the parameters of both.
      inputs: padded prompts (`pad_prompts`).
      max_new_tokens: how many tokens each row may add; one number, or one a row.
      options: sampling options; greedy by default.
      seeds: one a row; by default 0, 1, 2 ...
      stop_tokens: token ids that end a row.
      step_cost: time of a drafting step over that of a plain step (see `adaptive`); 0 drafts whenever it can.
      max_len: the length of the buffer; by default the smallest that holds everything (`buffer_length`).

    Raises:
      ValueError: where a text does not fit the buffer or the model, or an option makes no sense.
    """
    k = drafter.num_draft_tokens
    rows = inputs.tokens.shape[0]
    lengths = np.asarray(inputs.length)
    budget = np.asarray(max_new_tokens, np.int32)
    if budget.shape not in ((), (rows,)):
        raise ValueError(f"{budget.size} values of max_new_tokens for {rows} rows: give one, or one a row.")
    budget = np.broadcast_to(budget, (rows,))
    if (budget < 0).any():
        raise ValueError(f"max_new_tokens={max_new_tokens} is negative.")
    limit = lengths + budget
    longest = int(limit.max())
    if max_len is None:
        max_len = max(buffer_length(longest, k), inputs.tokens.shape[1])
    if longest + k + 1 > max_len or inputs.tokens.shape[1] > max_len:
        raise ValueError(
            f"A prompt of {int(lengths.max())} tokens (padded to {inputs.tokens.shape[1]}) with {int(budget.max())} "
            f"new tokens and K + 1 = {k + 1} more does not fit a buffer of {max_len} tokens: raise max_len, or lower "
            "max_new_tokens."
        )
    if longest > target.max_len:
        raise ValueError(
            f"A prompt of {int(lengths.max())} tokens with {int(budget.max())} new ones makes {longest}, but the model "
            f"knows {target.max_len} positions: shorten the prompt or lower max_new_tokens."
        )
    seeds = list(range(rows)) if seeds is None else list(seeds)
    if len(seeds) != rows:
        raise ValueError(f"{len(seeds)} seeds for {rows} rows: give one a row.")
    return _prefill(
        target,
        drafter._replace(source=None),
        params,
        inputs,
        jnp.asarray(limit, jnp.int32),
        row_keys(jnp.asarray(seeds, jnp.uint32)),
        options if options is not None else sampling.options(rows),
        _pad_stop_tokens(stop_tokens),
        jnp.asarray(step_cost, jnp.float32),
        max_len,
    )


def _judge(target: Model, rule: Rule, params: Params, state: DecodeState, proposal: Proposal, keys: Array) -> _Judged:
    """Scores the text's last token and the draft in one target call, and applies the rule.

    Returns:
      the cache; the verdict; the overlap at each draft position; whether the target's logits failed where the last
      token was chosen; the hidden states.
    """
    last = jnp.take_along_axis(state.tokens, (state.length - 1)[:, None], axis=1)
    block = jnp.concatenate([last, proposal.tokens], axis=1)
    output, cache = target.apply(params.target, block, state.cache)
    target_probs = sampling.probabilities(output.logits, state.sampling)
    if rule.exact:
        # Every exact rule is `greedy` on one-hot distributions, which needs no noise.
        verdict = jax.lax.cond(
            jnp.any(state.sampling.temperature > 0),
            lambda: jax.vmap(rule)(keys, target_probs, proposal),
            lambda: jax.vmap(verify.greedy)(keys, target_probs, proposal),
        )
    else:
        verdict = jax.vmap(rule)(keys, target_probs, proposal)
    # Nothing is accepted beyond a distribution that is not a number, whatever the rule made of it.
    broken = jnp.any(jnp.isnan(target_probs), axis=-1)
    first_broken = jnp.where(jnp.any(broken, axis=-1), jnp.argmax(broken, axis=-1), block.shape[1])
    failed = first_broken <= verdict.num_accepted
    verdict = verdict._replace(num_accepted=jnp.minimum(verdict.num_accepted, first_broken).astype(jnp.int32))
    return cache, verdict, jax.vmap(verify.overlap)(target_probs, proposal), failed, output.hidden


def _judge_plain(
    target: Model, rule: Rule, params: Params, state: DecodeState, proposal: Proposal, keys: Array
) -> _Judged:
    """`_judge` for a step in which no row drafts: the target reads one token a row. Padded to the same shapes."""
    k = proposal.tokens.shape[1]
    none = Proposal(proposal.tokens[:, :0], proposal.length, None if proposal.probs is None else proposal.probs[:, :0])
    cache, verdict, overlap, failed, hidden = _judge(target, rule, params, state, none, keys)
    return (
        cache,
        Verdict(jnp.pad(verdict.tokens, ((0, 0), (0, k))), verdict.num_accepted),
        jnp.pad(overlap, ((0, 0), (0, k))),
        failed,
        jnp.pad(hidden, ((0, 0), (0, k), (0, 0))),
    )


def _run_if(
    predicate: Bool[Array, ""],
    judge: Callable[..., _Judged],
    state: DecodeState,
    proposal: Proposal,
    keys: Array,
    judged: _Judged,
) -> _Judged:
    """`judge(state, proposal, keys)` where the predicate holds, else `judged` unchanged.

    A `while_loop` of at most one round: XLA copies a cache that both sides of a `cond` update, on every step.
    """

    def body(carry: tuple[Array, _Judged]) -> tuple[Array, _Judged]:
        return jnp.zeros((), bool), judge(state._replace(cache=carry[1][0]), proposal, keys)

    return jax.lax.while_loop(lambda carry: carry[0], body, (predicate, judged))[1]


def decode_step(target: Model, drafter: Drafter, rule: Rule, params: Params, state: DecodeState) -> DecodeState:
    """One step of speculative decoding for all rows (Leviathan et al. 2022, Algorithm 1).

    Args:
      target: the model whose distribution the text has.
      drafter: what proposes.
      rule: the acceptance rule.
      params: the parameters of both.
      state: before the step.

    Returns:
      The state after it: every row that is not done has gained between 1 and K + 1 tokens.
    """
    k = drafter.num_draft_tokens
    step_keys = jax.vmap(jax.random.fold_in)(state.seed, state.length)
    draft_keys, verify_keys = (
        jax.vmap(lambda key, r=role: jax.random.fold_in(key, r))(step_keys) for role in (_DRAFT, _VERIFY)
    )
    running = ~state.done

    # Draft. A row that drafts needs room for its drafts and the token that follows them.
    may_draft = running & adaptive.drafts(state.adaptation)
    room = jnp.minimum(k, state.limit - state.length - 1)
    context = Context(
        state.tokens, state.length, draft_keys, jnp.where(may_draft, room, 0), state.sampling, target.vocab_size
    )
    proposal, drafter_state = drafter.propose(params.draft, state.drafter, context)

    # Score and verify. Where no row drafts, this is a plain decoding step and costs no more.
    judge = functools.partial(_judge, target, rule, params)
    plain = functools.partial(_judge_plain, target, rule, params)
    if k == 0:
        judged = judge(state, proposal, verify_keys)
    else:
        speculate = jnp.any(proposal.length > 0)
        shapes = jax.eval_shape(judge, state, proposal, verify_keys)[1:]
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        judged = _run_if(speculate, judge, state, proposal, verify_keys, (state.cache, *nothing))
        judged = _run_if(~speculate, plain, state, proposal, verify_keys, judged)
    cache, verdict, overlap, target_failed, hidden = judged

    # Commit: up to the first stop token, within the row's budget, and nothing whose distribution is not a number.
    position = jnp.arange(k + 1)
    n = verdict.num_accepted
    is_judged = running[:, None] & (position[:k] < proposal.length[:, None]) & (position[:k] <= n[:, None])
    draft_failed = jnp.zeros_like(target_failed)
    if proposal.probs is not None:
        draft_failed = jnp.any(is_judged & jnp.isnan(jnp.sum(proposal.probs, axis=-1)), axis=-1)
    failed = running & (target_failed | draft_failed)
    emitted = jnp.where(failed, n, n + 1)
    stops = jnp.isin(verdict.tokens, state.stop_tokens) & (position < emitted[:, None])
    first_stop = jnp.where(jnp.any(stops, axis=-1), jnp.argmax(stops, axis=-1), k + 1)
    emitted = jnp.minimum(jnp.minimum(emitted, first_stop + 1), state.limit - state.length)
    emitted = jnp.where(running, emitted, 0)
    length = state.length + emitted
    stopped = failed | (first_stop < emitted) | (length >= state.limit)

    write = jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice(row, new, (at,)))
    feedback = Feedback(verdict, length, hidden)
    is_accepted = is_judged & (position[:k] < n[:, None])
    stats = state.stats
    return state._replace(
        tokens=write(state.tokens, verdict.tokens, state.length),
        from_draft=write(state.from_draft, position < n[:, None], state.length),
        length=length,
        done=state.done | stopped,
        failed_at=jnp.where(failed, state.length + n, state.failed_at),
        draft_failed=state.draft_failed | (running & draft_failed),
        adaptation=_select(
            running, adaptive.update(state.adaptation, proposal.length, n, state.step_cost), state.adaptation
        ),
        # Roll back: what was rejected lies beyond the length.
        cache=cache._replace(length=length - 1),
        drafter=drafter.update(params.draft, drafter_state, feedback),
        stats=Stats(
            stats.target_calls + running,
            stats.draft_steps + (running & (proposal.length > 0)),
            stats.proposed + is_judged,
            stats.accepted + is_accepted,
            stats.histogram + (running[:, None] & (position == n[:, None])),
            stats.overlap + jnp.sum(jnp.where(is_judged, overlap, 0.0), axis=-1),
        ),
    )


def _select(rows: Bool[Array, " B"], new: Adaptation, old: Adaptation) -> Adaptation:
    return Adaptation(*(jnp.where(rows, a, b) for a, b in zip(new, old, strict=True)))


@functools.partial(jax.jit, static_argnames=("target", "drafter", "rule"), donate_argnames=("state",))
def advance(
    target: Model, drafter: Drafter, rule: Rule, params: Params, state: DecodeState, num_steps: Int[Array, ""] | int
) -> DecodeState:
    """Runs at most `num_steps` steps, fewer where all rows are done first. The state is donated.

    `drafter.source` must be None here (parameters are arguments); `generate` and `stream` see to it.
    """

    def unfinished(carry: tuple[Array, DecodeState]) -> Array:
        return (carry[0] < num_steps) & ~jnp.all(carry[1].done)

    def body(carry: tuple[Array, DecodeState]) -> tuple[Array, DecodeState]:
        return carry[0] + 1, decode_step(target, drafter, rule, params, carry[1])

    return jax.lax.while_loop(unfinished, body, (jnp.zeros((), jnp.int32), state))[1]


def check(state: DecodeState) -> None:
    """Raises where a row met logits that are not numbers.

    Raises:
      FloatingPointError: naming the row, the position, and the side.
    """
    failed_at = np.asarray(state.failed_at)
    for row in np.flatnonzero(failed_at >= 0):
        side = "draft" if bool(state.draft_failed[row]) else "target"
        raise FloatingPointError(
            f"The {side}'s logits are not numbers (NaN) at position {failed_at[row]} of row {row}: the text before "
            "it is sound. Check the weights, or decode in float32."
        )


def generate(target: Model, drafter: Drafter, rule: Rule, params: Params, state: DecodeState) -> DecodeState:
    """Decodes until every row is done: one jitted `while_loop`. The state is donated.

    Args:
      target: the model whose distribution the text has.
      drafter: what proposes.
      rule: the acceptance rule.
      params: the parameters of both.
      state: as `prefill` gave it.

    Raises:
      FloatingPointError: for logits that are not numbers.
    """
    state = advance(target, drafter._replace(source=None), rule, params, state, np.int32(2**31 - 1))
    check(state)
    return state


def stream(
    target: Model, drafter: Drafter, rule: Rule, params: Params, state: DecodeState, *, steps: int = 4
) -> Iterator[DecodeState]:
    """Decodes like `generate`, by the same program and to the same tokens, pausing every few steps.

    Args:
      target: the model whose distribution the text has.
      drafter: what proposes.
      rule: the acceptance rule.
      params: the parameters of both.
      state: as `prefill` gave it; donated.
      steps: how many steps lie between two pauses.

    Yields:
      the state so far. The next step donates it: read it before asking for the next.

    Raises:
      FloatingPointError: for logits that are not numbers.
      ValueError: for steps < 1.
    """
    if steps < 1:
        raise ValueError(f"steps={steps}: at least 1.")
    drafter = drafter._replace(source=None)
    while not bool(jnp.all(state.done)):
        state = advance(target, drafter, rule, params, state, np.int32(steps))
        check(state)
        yield state
