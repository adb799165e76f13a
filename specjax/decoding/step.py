"""One step: propose, score, verify, commit; all rows, all on the device.

A text of n tokens always has its first n - 1 in the target's cache; the last is fed together with the next drafts, so
that one call of T = N + 1 tokens gives the N + 1 distributions that verification needs. Plain decoding is the same
loop with the drafter `none` (N = 0).
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from specjax import control, sampling
from specjax.decoding import adaptive, verify
from specjax.decoding import logprobs as logprobs_lib
from specjax.decoding.verify import Rule
from specjax.drafters import contract
from specjax.sampling import automaton, processors, tree
from specjax.state import Adaptation, DecodeState, Logprobs, Stats
from specjax.types import (
    Automaton,
    Block,
    Context,
    Drafter,
    Feedback,
    History,
    Model,
    ModelOutput,
    Params,
    Proposal,
    SamplingOptions,
    StepKeys,
    Topology,
    Verdict,
)

# Roles of the random numbers. A key is `fold_in(fold_in(seed[row], position), role)`, with the position of a token in
# its sequence: no key is used twice, and none depends on a row's neighbours. What a step decides as a whole (drafts,
# and how many are accepted) uses its first position, since every step starts at a new one.
_DRAFT, _ACCEPT, _TOKEN = 0, 1, 2


class _Scored(NamedTuple):
    """The results of the target's call and the rule, as `_score` documents them."""

    cache: Any
    verdict: Verdict
    overlap: Float[Array, "B D"]
    failed: Bool[Array, " B"]
    output: ModelOutput
    logprobs: Logprobs | None


class _Drafted(NamedTuple):
    """The results of the drafter's call, as `_draft` documents them."""

    proposal: Proposal
    drafter: Any
    cache: Any
    context: Context
    keys: StepKeys
    num_read: Int[Array, " B"]


def decode_step(
    target: Model,
    drafter: Drafter,
    rule: Rule,
    params: Params,
    state: DecodeState,
    fixed_shape: bool = False,
) -> DecodeState:
    """One step of speculative decoding for all rows (Leviathan et al. 2022, Algorithm 1).

    Args:
      target: the model whose distribution the text has.
      drafter: the drafter.
      rule: the acceptance rule.
      params: the parameters of both.
      state: before the step.
      fixed_shape: always score N + 1 tokens, even where no row drafts (see `docs/exactness.md`, numerics).

    Returns:
      The state after it: every row that is not done has gained between 1 and D + 1 tokens.

    Raises:
      ValueError: for a rule that cannot judge the drafter's proposals.
    """
    verify.check(rule, drafter.topology)
    rows, topology = state.rows, drafter.topology
    running = ~rows.done
    proposal, drafter_state, cache, context, keys, num_read = _draft(target, drafter, rule, params, state)

    # Score and verify. Where no row drafts, this is a plain decoding step and costs no more.
    lengths = topology.all_lengths
    widths = (topology.num_nodes + 1,) if fixed_shape else (1, *(k + 1 for k in lengths))
    score = functools.partial(_score, target, rule, params, state, proposal, keys, topology)
    scored = _at_width(score, widths, 1 + jnp.max(num_read), cache)
    verdict, n = scored.verdict, scored.verdict.num_accepted

    # Commit: up to the first stop, within the row's budget, and nothing that was drawn from NaN.
    position = jnp.arange(topology.depth + 1)
    is_judged = running[:, None] & (position[:-1] <= n[:, None]) & _has_draft(proposal, verdict)
    draft_failed = _draft_failed(proposal, verdict, is_judged)
    failed = running & (scored.failed | draft_failed)
    stops, stop_states = _stops(state, verdict.tokens)
    emitted = jnp.where(failed, n, n + 1)
    first_stop = _first(stops & (position < emitted[:, None]))
    # A row that has reached its stop token needs no distribution after it.
    failed &= first_stop >= n
    emitted = jnp.minimum(jnp.minimum(emitted, first_stop + 1), rows.limit - rows.length)
    emitted = jnp.where(running, emitted, 0)
    length = rows.length + emitted
    cache = target.commit(scored.cache, verdict.path, emitted)

    # Update the drafter and the counters.
    features = _on_path(scored.output.features[:, : topology.num_nodes + 1], verdict.path)
    feedback = Feedback(verdict.tokens, emitted, length, features, scored.output, context=context)
    is_accepted = is_judged & (position[:-1] < n[:, None])
    # The probability of acceptance where it is known, for chains under exact rules; otherwise whether it was accepted.
    overlap = scored.overlap if rule.exact and topology.is_chain else is_accepted.astype(jnp.float32)
    own = jnp.minimum(adaptive.num_drafts(rows.adaptation, state.shared.step_costs), rows.limit - rows.length - 1)
    learned = adaptive.update(rows.adaptation, own, num_read, is_judged, n, state.shared.step_costs)
    after = rows._replace(
        tokens=_write(rows.tokens, verdict.tokens, rows.length),
        from_draft=_write(rows.from_draft, position < n[:, None], rows.length),
        length=length,
        done=rows.done | failed | (first_stop < emitted) | (length >= rows.limit),
        failed_at=jnp.where(failed, rows.length + n, rows.failed_at),
        draft_failed=rows.draft_failed | (failed & draft_failed),
        stop_state=_after(stop_states, emitted),
        grammar_state=_after(_trace(state.shared.grammar, rows.grammar_state, verdict.tokens), emitted),
        logprobs=jax.tree.map(lambda old, new: _write(old, new, rows.length), rows.logprobs, scored.logprobs),
        adaptation=_select(running, learned, rows.adaptation),
        cache=cache,
        drafter=contract.update(drafter, params, drafter_state, feedback),
        stats=_count(rows.stats, running, num_read, n, is_judged, is_accepted, overlap, lengths),
    )
    return state._replace(rows=after)


def step_keys(seed: Array, length: Int[Array, " B"], depth: int) -> tuple[Array, StepKeys]:
    """The keys of a step: `[B, D]` for drafting, and those of verification."""

    def of_row(seed: Array, length: Array) -> tuple[Array, StepKeys]:
        positions = jax.vmap(lambda i: jax.random.fold_in(seed, length + i))(jnp.arange(depth + 1))
        tokens = jax.vmap(lambda key: jax.random.fold_in(key, _TOKEN))(positions)
        drafts = jax.random.split(jax.random.fold_in(positions[0], _DRAFT), depth)
        return drafts, StepKeys(jax.random.fold_in(positions[0], _ACCEPT), tokens)

    return jax.vmap(of_row)(seed, length)


def _draft(target: Model, drafter: Drafter, rule: Rule, params: Params, state: DecodeState) -> _Drafted:
    """Has the drafter propose what each row is to draft.

    Returns:
      the proposal; the drafter's state; the target's cache; what the drafter saw; the keys of verification; and how
      many tokens behind the last committed one each row needs read.
    """
    rows, topology, costs = state.rows, drafter.topology, state.shared.step_costs
    # Where no token depends on how the text is cut into steps, the rows choose together.
    together = jnp.asarray(rule.exact) & (rule.coupled | jnp.all(rows.sampling.temperature == 0))
    own = adaptive.num_drafts(rows.adaptation, costs)
    wanted = jnp.where(together, adaptive.num_drafts_together(rows.adaptation, costs, ~rows.done), own)
    # A row that drafts needs room for its drafts and the token that follows them.
    room = jnp.where(rows.done, 0, jnp.minimum(wanted, rows.limit - rows.length - 1))
    draft_keys, keys = step_keys(rows.seed, rows.length, topology.depth)
    context = context_of(target, drafter, rule, state, room, draft_keys, keys)
    proposal, drafter_state, cache = propose(drafter, params, state, context)
    if topology.is_chain and proposal.probes is None:
        kept = adaptive.kept_together(rows.adaptation, costs, proposal.length, ~rows.done)
        proposal = proposal._replace(length=jnp.where(together, kept, proposal.length))
    return _Drafted(proposal, drafter_state, cache, context, keys, _num_read(proposal, room))


def context_of(
    target: Model,
    drafter: Drafter,
    rule: Rule,
    state: DecodeState,
    room: Int[Array, " B"],
    draft_keys: Array,
    keys: StepKeys,
) -> Context:
    """What the drafter may look at when it proposes.

    Args:
      target: the target.
      drafter: the drafter.
      rule: the acceptance rule; a coupled one makes the draft sample with the noise that the target samples with.
      state: before the step.
      room: `[B]` the deepest draft token that each row can use.
      draft_keys: `[B, D]` for drafting.
      keys: those of verification.
    """
    chosen = keys.token[:, : drafter.topology.depth] if rule.coupled else draft_keys
    return Context(history_of(state), chosen, room, state.rows.sampling, target.vocab_size, rule.coupled)


def propose(drafter: Drafter, params: Params, state: DecodeState, context: Context) -> tuple[Proposal, Any, Any]:
    """The drafts of all rows at the beginning of a step, the drafter's state, and the target's cache.

    Args:
      drafter: the drafter.
      params: the parameters of both.
      state: before the step.
      context: from `context_of`.
    """
    proposal, drafter_state, cache = contract.propose(drafter, params, state.rows.drafter, state.rows.cache, context)
    return _within_text(state, proposal, context.max_draft, drafter.topology), drafter_state, cache


def _num_read(proposal: Proposal, room: Int[Array, " B"]) -> Int[Array, " B"]:
    """0 for the rows that need nothing but their last token read: those without drafts, and without room for probes."""
    return proposal.length if proposal.probes is None else jnp.maximum(proposal.length, room)


def history_of(state: DecodeState) -> History:
    """The text before the next token of each row."""
    rows = state.rows
    return History(
        rows.tokens,
        rows.length,
        rows.prompt_length,
        rows.stop_tokens,
        state.shared.grammar,
        rows.grammar_state[:, None],
    )


def _first(found: Bool[Array, "B T"]) -> Int[Array, " B"]:
    """The first position of each row at which `found` is true; T where there is none."""
    size = found.shape[-1]
    return jnp.min(jnp.where(found, jnp.arange(size, dtype=jnp.int32), size), axis=-1, initial=size)


def _after(states: Int[Array, "B T"], count: Int[Array, " B"]) -> Int[Array, " B"]:
    """The state after the first `count` tokens, from an automaton's states before and after each token."""
    return jnp.take_along_axis(states, count[:, None], axis=1)[:, 0]


def _write(buffer: Array, new: Array, at: Int[Array, " B"]) -> Array:
    """Writes a row's new entries after its text."""
    return jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice_in_dim(row, new, at, 0))(buffer, new, at)


def _on_path(x: Shaped[Array, "B T *rest"], path: Int[Array, "B P"] | None) -> Shaped[Array, "B _ *rest"]:
    """The entries of the tokens on the accepted path; for a chain all entries, in order."""
    if path is None:
        return x
    return jnp.take_along_axis(x, path.reshape(*path.shape, *[1] * (x.ndim - 2)), axis=1)


def _trace(table: Automaton | None, state: Int[Array, " B"], tokens: Int[Array, "B T"]) -> Int[Array, "B T+1"]:
    """An automaton's states before each token and after the last; without an automaton the state does not change."""
    if table is None:
        return jnp.broadcast_to(state[:, None], (tokens.shape[0], tokens.shape[1] + 1))
    return automaton.trace(table, state, tokens)


def _is_stop(tokens: Int[Array, "B T"], stop_tokens: Int[Array, "B X"]) -> Bool[Array, "B T"]:
    return jnp.any(tokens[:, :, None] == stop_tokens[:, None], axis=-1) & (tokens >= 0)


def _ends(table: Automaton, states: Int[Array, "B T"]) -> Bool[Array, "B T"]:
    """Whether a stop string has occurred: the automaton is in its last state."""
    return states == table.next_state.shape[0] - 1


def _stops(state: DecodeState, tokens: Int[Array, "B T"]) -> tuple[Bool[Array, "B T"], Int[Array, "B T+1"]]:
    """Whether each of the tokens after a text ends it, and the states of its stop strings before and after each."""
    stops, strings = _is_stop(tokens, state.rows.stop_tokens), state.shared.stop_strings
    states = _trace(strings, state.rows.stop_state, tokens)
    return stops if strings is None else stops | _ends(strings, states[:, 1:]), states


def _within_text(state: DecodeState, proposal: Proposal, room: Int[Array, " B"], topology: Topology) -> Proposal:
    """The proposal without the tokens beyond the row's budget or after its first stop, which are never text.

    Whether a token is left out depends on its ancestors alone, so exact rules stay exact.
    """
    if proposal.parent is None:
        end = jnp.minimum(_first(_stops(state, proposal.tokens)[0]) + 1, room)
        return proposal._replace(length=jnp.clip(proposal.length, 0, end))
    shape, strings = tree.shape(proposal.parent, topology.depth), state.shared.stop_strings
    stops = _is_stop(proposal.tokens, state.rows.stop_tokens)
    if strings is not None:
        states = tree.trace(strings, state.rows.stop_state, proposal.tokens, shape, topology.depth)
        stops |= _ends(strings, states[:, 1:])
    above = shape.sees[:, 1:, 1:] & ~jnp.eye(topology.num_nodes, dtype=bool)
    is_out = jnp.any(above & stops[:, None], axis=-1) | (shape.depth[:, 1:] > room[:, None])
    tokens = jnp.where(is_out, -1, proposal.tokens)
    return proposal._replace(tokens=tokens, length=jnp.where(room > 0, jnp.clip(proposal.length, 0), 0))


def _up_to_nan(proposal: Proposal, target_probs: Float[Array, "B T V"]) -> Proposal:
    """The proposal up to the first position at which one side has no distribution: no rule can judge a token there.

    If all drafts before that position are accepted, the row fails there, as plain decoding would. A tree is judged node
    by node, and ends where the target has no distribution; nodes for which the draft has none are left out.
    """
    if proposal.parent is not None:
        return proposal._replace(tokens=jnp.where(_is_undrawn(proposal), -1, proposal.tokens))
    k = proposal.tokens.shape[1]
    broken = jnp.isnan(jnp.sum(target_probs, axis=-1))[:, :k]
    broken |= _is_undrawn(proposal)
    return proposal._replace(length=jnp.minimum(proposal.length, _first(broken)))


def _at_temperature_one(options: SamplingOptions) -> SamplingOptions:
    """The same options, but rows at temperature 0 keep their whole distribution."""
    return options._replace(temperature=jnp.where(options.temperature > 0, options.temperature, 1.0))


def apply_rule(
    rule: Rule,
    options: SamplingOptions,
    proposal: Proposal,
    keys: StepKeys,
    logits: Float[Array, "B T V"],
    history: History,
) -> tuple[Verdict, Float[Array, "B T V"]]:
    """The verdicts on the drafts of all rows, and the target's distributions that they are based on.

    Args:
      rule: the acceptance rule.
      options: of the rows.
      proposal: the drafts.
      keys: of the step.
      logits: `[B, T, V]` of the target, T = N + 1.
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


def _score(
    target: Model,
    rule: Rule,
    params: Params,
    state: DecodeState,
    proposal: Proposal,
    keys: StepKeys,
    topology: Topology,
    cache: Any,
    width: int,
) -> _Scored:
    """Scores the text's last token and the drafts in one target call, and applies the rule.

    Args:
      target: the target.
      rule: the acceptance rule.
      params: the parameters of both.
      state: before the step.
      proposal: the drafts.
      keys: of the step.
      topology: of the drafter.
      cache: the target's.
      width: how many tokens are judged: the last one and all nodes, behind which the target reads the probes; fewer of
        a chain (`Topology.lengths`); or the last one alone where no row drafts. The results are padded to the shapes of
        the first case.

    Returns:
      the cache; the verdict; the overlap at each draft position; whether the target's logits failed where the last
      token was chosen; the target's output; the log-probabilities of the verdict's tokens, where asked for.
    """
    rows, depth, num_nodes = state.rows, topology.depth, width - 1
    probs = None if proposal.probs is None else proposal.probs[:, :num_nodes]
    parent = None if not num_nodes or proposal.parent is None else proposal.parent
    judged = Proposal(proposal.tokens[:, :num_nodes], proposal.length, probs, parent)
    if parent is None:
        keys = keys._replace(token=keys.token[:, : num_nodes + 1])
    last = jnp.take_along_axis(rows.tokens, (rows.length - 1)[:, None], axis=1)
    block = Block(jnp.concatenate([last, judged.tokens], axis=1))
    penalties = rows.sampling.penalties
    if parent is None:
        history = processors.follow(history_of(state), judged.tokens, penalties)
    else:
        shape = tree.shape(parent, depth)
        # Nodes that are left out of the proposal are -1; they are read as some token that no proposed node sees.
        block = Block(jnp.maximum(block.tokens, 0), shape.depth, shape.sees)
        history = tree.follow(history_of(state), judged.tokens, shape, depth, penalties)
    if num_nodes and proposal.probes is not None:
        block = tree.with_probes(block, proposal.probes)
    output, cache = target.apply(params.target, block, cache)
    verdict, target_probs = apply_rule(rule, rows.sampling, judged, keys, output.logits[:, :width], history)
    broken = _on_path(jnp.isnan(jnp.sum(target_probs, axis=-1)), verdict.path)
    failed = _first(broken) <= verdict.num_accepted
    logprobs = None
    if rows.logprobs is not None:
        logits = _on_path(output.logits, verdict.path)
        logprobs = logprobs_lib.where_wanted(
            logits, verdict.tokens, rows.logprobs.top.shape[2], rows.wants_logprobs & ~rows.done
        )
    overlap = jax.vmap(verify.overlap)(target_probs, judged) if parent is None else jnp.zeros((len(last), depth))
    scored = _Scored(cache, verdict, overlap, failed, output, logprobs)
    return scored if width == topology.num_nodes + 1 else _widen(scored, topology, proposal)


def _widen(scored: _Scored, topology: Topology, proposal: Proposal) -> _Scored:
    """The results of a narrower step in the shapes of a step that judges all nodes."""

    def pad(x: Array, size: int) -> Array:
        return jnp.pad(x, ((0, 0), (0, size - x.shape[1])) + ((0, 0),) * (x.ndim - 2))

    depth, verdict = topology.depth, scored.verdict
    tokens = pad(verdict.tokens, depth + 1)
    return scored._replace(
        verdict=verdict._replace(tokens=tokens, path=None if proposal.parent is None else jnp.zeros_like(tokens)),
        overlap=pad(scored.overlap, depth),
        output=jax.tree.map(lambda x: pad(x, topology.num_read + 1), scored.output),
        logprobs=jax.tree.map(lambda x: pad(x, depth + 1), scored.logprobs),
    )


def _at_width(
    score: Callable[[Any, int], _Scored], widths: tuple[int, ...], least: Int[Array, ""], cache: Any
) -> _Scored:
    """`score` at the width that the step needs: the first of `widths` that is at least `least`, or else the last."""
    if len(widths) == 1:
        return score(cache, widths[0])
    shapes = jax.eval_shape(lambda cache: score(cache, widths[-1]), cache)
    scored = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes._replace(cache=None))._replace(cache=cache)
    for below, width in itertools.pairwise((0, *widths)):
        needed = least > below if width == widths[-1] else (least > below) & (least <= width)
        scored = control.once(needed, lambda scored, width=width: score(scored.cache, width), scored)
    return scored


def _has_draft(proposal: Proposal, verdict: Verdict) -> Bool[Array, "B D"]:
    """Whether a draft token was proposed for each position, after the accepted ones before it."""
    if proposal.parent is None:
        return jnp.arange(proposal.tokens.shape[1]) < proposal.length[:, None]
    assert verdict.path is not None
    return tree.has_child(proposal, verdict.path)


def _is_undrawn(proposal: Proposal) -> Bool[Array, "B N"]:
    """For which tokens the draft states a distribution that is none."""
    if proposal.probs is None:
        return jnp.zeros(proposal.tokens.shape, bool)
    return jnp.isnan(jnp.sum(proposal.probs, axis=-1))


def _draft_failed(proposal: Proposal, verdict: Verdict, is_judged: Bool[Array, "B D"]) -> Bool[Array, " B"]:
    """Whether the draft had no distribution where the text ended, at a position that was judged."""
    if proposal.probs is None:
        return jnp.zeros(is_judged.shape[0], bool)
    undrawn = _is_undrawn(proposal)
    if verdict.path is not None:
        undrawn = tree.has_child(proposal._replace(tokens=jnp.where(undrawn, proposal.tokens, -1)), verdict.path)
        undrawn &= jnp.arange(is_judged.shape[1]) == verdict.num_accepted[:, None]
    return jnp.any(is_judged & undrawn, axis=-1)


def _count(
    stats: Stats,
    running: Bool[Array, " B"],
    num_read: Int[Array, " B"],
    num_accepted: Int[Array, " B"],
    is_judged: Bool[Array, "B D"],
    is_accepted: Bool[Array, "B D"],
    overlap: Float[Array, "B D"],
    lengths: tuple[int, ...],
) -> Stats:
    position = jnp.arange(is_judged.shape[1] + 1)
    drafts, longest = running & (num_read > 0), jnp.max(num_read)
    at_length = jnp.arange(len(lengths)) == sum(longest > length for length in lengths[:-1])
    return Stats(
        stats.target_calls + running,
        stats.draft_steps + drafts,
        stats.proposed + is_judged,
        stats.accepted + is_accepted,
        stats.histogram + (running[:, None] & (position == num_accepted[:, None])),
        stats.steps_by_length + (drafts[:, None] & at_length),
        stats.overlap + jnp.sum(jnp.where(is_judged, overlap, 0.0), axis=-1),
    )


def _select(rows: Bool[Array, " B"], new: Adaptation, old: Adaptation) -> Adaptation:
    return jax.tree.map(lambda a, b: jax.vmap(jnp.where)(rows, a, b), new, old)
