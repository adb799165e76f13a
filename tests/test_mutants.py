"""Bugs that others have shipped, and our own, planted one by one: each must fail the check that it is meant for.

The checks are those that the sound code passes elsewhere, on the same kind of batches; the end of the run names which
check caught which bug.
"""

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    Group,
    Pair,
    Sample,
    assert_always_accepted,
    assert_exact,
    assert_stops,
    random_prompts,
    right_pad,
    run,
    sample,
    texts,
    usual,
    with_rows,
)

from specjax import decoding, drafters, sampling, testing
from specjax.decoding import step as decode_step
from specjax.decoding import verify
from specjax.decoding.verify import Rule
from specjax.decoding.verify import exact as exact_rules
from specjax.sampling import automaton, processors, tree
from specjax.state import DecodeState
from specjax.types import Drafter, Proposal, StepKeys, Verdict

TARGET, TABLE = testing.tabular(0)
DRAFT, DRAFT_TABLE = testing.tabular(1)
LONG, LONG_TABLE = testing.tabular(20, order=5)
GROUPS = [
    Group((0, 1, 2, 0, 1, 2), 20_000),
    Group((3, 1, 3, 1), 20_000, temperature=0.7, top_p=0.85),
    Group((1, 0, 1, 0, 1), 20_000, top_k=3),
    Group((2,), 5_000, budget=2),
]
WITH_HISTORY = [
    Group((0, 1, 2, 0, 1, 2), 20_000, repetition_penalty=2.5),
    Group((3, 1, 3, 1), 20_000, presence_penalty=1.5, frequency_penalty=0.5),
    Group((1, 0, 1, 0, 1), 20_000, no_repeat_ngram_size=2),
    Group((0, 3), 10_000, grammar=((1, 0, 0, 1), (0, 1, 1, -1))),
]

EXACT_RULES = (verify.rejection, verify.block, verify.coupled)

TEXTS = random_prompts(60, 4)
COUNTS = drafters.count_ngrams(TEXTS, vocab_size=4)
CORPUS = drafters.index_corpus(TEXTS, vocab_size=4)

Check = Callable[..., None]


def by_model(k: int = 2) -> Pair:
    return Pair(TARGET, TABLE, drafters.model(DRAFT, num_draft_tokens=k), DRAFT_TABLE)


def by_tree() -> Pair:
    return Pair(TARGET, TABLE, drafters.model(DRAFT, topology=(2, 2)), DRAFT_TABLE)


def by_lookup() -> Pair:
    return Pair(TARGET, TABLE, drafters.ngram(num_draft_tokens=3, min_match=1))


def by_table() -> Pair:
    return Pair(TARGET, TABLE, drafters.table(COUNTS, num_draft_tokens=3).drafter, COUNTS.params)


def by_retrieval() -> Pair:
    return Pair(TARGET, TABLE, drafters.retrieval(CORPUS, num_draft_tokens=3, min_match=1).drafter, CORPUS.params)


# The checks.


def exact(pair: Pair, *, rule: Rule = verify.rejection, step: Any = decoding.decode_step, groups: Any = GROUPS) -> None:
    assert_exact(sample(pair, groups, rule=rule, step=step))


def stops(pair: Pair, *, rule: Rule = verify.rejection, step: Any = decoding.decode_step) -> None:
    groups = [g._replace(rows=500, budget=9) for g in GROUPS]
    assert_stops(sample(pair, groups, rule=rule, step=step, stop_tokens=[3]))


def perfect(pair: Pair, *, rule: Rule = verify.rejection, step: Any = decoding.decode_step) -> None:
    prompts = random_prompts(8, 4)
    state = decoding.prefill(
        pair.target,
        pair.drafter,
        pair.params,
        right_pad(prompts, 16),
        max_new_tokens=45,
        options=sampling.options(8, temperature=1.0),
        step_cost=4.05,
        max_len=72,
    )
    assert_always_accepted(run(pair, rule, state, step))


def _texts(pair: Pair, rule: Rule, rows: slice, step: Any = decoding.decode_step) -> list[list[int]]:
    """Texts of some of 16 requests, each with its own seed, whose batch is those rows."""
    prompts = random_prompts(16, 4)[rows]
    state = decoding.prefill(
        pair.target,
        pair.drafter,
        pair.params,
        right_pad(prompts, 16),
        max_new_tokens=20,
        options=sampling.options(len(prompts), temperature=1.0),
        seeds=list(range(16))[rows],
        step_cost=0.0,
        max_len=48,
    )
    return texts(run(pair, rule, state, step))


def same_text(pair: Pair, *, rule: Rule = verify.coupled, step: Any = decoding.decode_step) -> None:
    """Coupled text is that of plain decoding."""
    plain = Pair(pair.target, pair.table, drafters.none())
    assert _texts(pair, rule, slice(16), step) == _texts(plain, rule, slice(16)), "text differs from plain decoding's"


def own_seed(pair: Pair, *, rule: Rule = verify.rejection, step: Any = decoding.decode_step) -> None:
    """A row's text does not depend on its neighbours."""
    together = _texts(pair, rule, slice(16), step)
    assert together[5:7] == _texts(pair, rule, slice(5, 7), step), "text differs with the batch"


def often_accepted(pair: Pair, *, rule: Rule = verify.coupled, step: Any = decoding.decode_step) -> None:
    """Coupled drafts are accepted with probability at least (1 - TV) / (1 + TV)."""
    result = sample(pair, [Group((0, 1), 20_000)], rule=rule, step=step)
    proposed, accepted, overlap = (
        float(np.asarray(x, np.float64).sum()) for x in result.state.rows.stats[2:4] + result.state.rows.stats[5:]
    )
    # The bound is convex in TV, so the mean of TV gives a bound below the mean of the bounds.
    beta = overlap / proposed
    assert accepted / proposed > beta / (2 - beta) - 0.01, f"{accepted / proposed:.3f} accepted, overlap {beta:.3f}"


def sound_counters(pair: Pair, *, rule: Rule = verify.rejection, step: Any = decoding.decode_step) -> None:
    """No more is accepted than was judged, and what is emitted is what was accepted and one token a call."""
    stats = (state := sample(pair, GROUPS, rule=rule, step=step).state).rows.stats
    proposed, accepted = (np.asarray(x).sum(axis=1) for x in (stats.proposed, stats.accepted))
    assert (accepted <= proposed).all(), f"acceptance rate {accepted.sum() / proposed.sum():.2f} of a row above 1"
    emitted = np.asarray(state.rows.length) - np.asarray(state.rows.prompt_length)
    assert (emitted <= accepted + np.asarray(stats.target_calls)).all(), "more tokens than the counters know"


def survives_jit(state: DecodeState) -> None:
    """What goes into a jitted function comes out of it, field by field."""
    after = jax.jit(lambda x: x)(state)
    for before, now in (
        (state, after),
        (state.rows, after.rows),
        (state.rows.cache, after.rows.cache),
        (state.rows.stats, after.rows.stats),
    ):
        for name in before._fields:
            lost = getattr(before, name) is not None and getattr(now, name) is None
            assert not lost, f"field {name} is None after jit"


SOUND = [(check, rule) for check in (exact, stops, own_seed, sound_counters) for rule in EXACT_RULES]
SOUND += [(check, verify.coupled) for check in (same_text, often_accepted)]


# The matrix holds rules to the same in every run.
@pytest.mark.slow
@pytest.mark.parametrize(("check", "rule"), SOUND, ids=lambda cell: getattr(cell, "name", None) or cell.__name__)
def test_sound_code_passes(check: Check, rule: Rule):
    check(by_model(), rule=rule)


@pytest.mark.slow
def test_sound_code_passes_with_options_that_read_the_text():
    exact(by_model(3), groups=WITH_HISTORY)


# Rules.


def _rule(
    accept: Callable[[Any, Any], Any] = lambda p, q: p / q,
    residual: Callable[[Any, Any], Any] = lambda p, q: jnp.maximum(p - q, 0.0),
    bonus_row: Callable[[Any, int], Any] = lambda n, k: n,
    bonus: Callable[[Any], Any] = lambda p: p,
    cut: Callable[[Any], Any] = lambda n: n,
) -> Rule:
    """A second rejection sampler, sound by default, with a hole for each bug."""

    def judge(keys: StepKeys, target_probs: Any, proposal: Proposal) -> Verdict:
        k = proposal.tokens.shape[0]
        draft = verify.draft_probs(proposal, target_probs.shape[-1])
        index = jnp.arange(k), proposal.tokens
        accepted = jax.random.uniform(keys.accept, (k,)) < accept(target_probs[:-1], draft)[index]
        n = jnp.sum(jnp.cumprod(accepted & (jnp.arange(k) < proposal.length)), dtype=jnp.int32)
        n_cut = cut(n)
        if k == 0:
            weights = target_probs[0]
        else:
            left = residual(target_probs[n_cut], draft[jnp.minimum(n_cut, k - 1)])
            full = n_cut >= proposal.length
            weights = jnp.where(full, bonus(target_probs[bonus_row(n_cut, k)]), left)
            weights = jnp.where(jnp.sum(weights) > 0, weights, target_probs[n_cut])
        last = sampling.categorical(keys.token[0], weights)
        position = jnp.arange(k + 1)
        drafts = jnp.append(proposal.tokens, 0)
        tokens = jnp.where(position < n_cut, drafts, jnp.where(position == n_cut, last, 0))
        return Verdict(tokens.astype(jnp.int32), n_cut)

    return Rule(judge, "mutant", exact=True)


_batch_minimum: Any = jax.custom_batching.custom_vmap(lambda n: n)


@_batch_minimum.def_vmap
def _(axis_size: int, in_batched: Any, n: Any) -> Any:
    del in_batched
    # Over four rows, as over a small batch: of 10^4, one has always rejected at once.
    padded = jnp.pad(n, (0, -axis_size % 4), constant_values=99).reshape(-1, 4)
    return jnp.repeat(padded.min(axis=1), 4)[:axis_size], True


def sharpened(p: Any) -> Any:
    return p**2 / jnp.sum(p**2)


def greedy_acceptance(p: Any, q: Any) -> Any:
    del q
    return (p >= p.max(axis=-1, keepdims=True)).astype(jnp.float32)


RULES = {
    "residual not subtracted": _rule(residual=lambda p, q: p),
    "residual not clipped at the draft's": _rule(residual=lambda p, q: jnp.abs(p - q)),
    "all rows cut to the smallest accepted count, with a residual sample": _rule(cut=_batch_minimum),
    "bonus from the row before": _rule(bonus_row=lambda n, k: jnp.minimum(n, k - 1)),
    "residual drawn although all were accepted": _rule(
        bonus_row=lambda n, k: jnp.minimum(n, k - 1), bonus=lambda p: 1.0 - p
    ),
    "temperature of the bonus differs from the rest": _rule(bonus=sharpened),
    "accepts only the target's argmax": _rule(accept=greedy_acceptance),
    "accepts where the target is likelier than the draft, else never": _rule(
        accept=lambda p, q: (p >= q).astype(jnp.float32)
    ),
    "ratio upside down": _rule(accept=lambda p, q: q / p),
    "draft noise used again for the token that follows": dataclasses.replace(verify.rejection, coupled=True),
    "draft noise used again in block verification": dataclasses.replace(verify.block, coupled=True),
    "a lossy rule called exact": dataclasses.replace(verify.lenient(0.5), exact=True),
}


@pytest.mark.slow
def test_the_rule_without_a_hole_passes():
    exact(by_model(), rule=_rule())


@pytest.mark.parametrize("bug", usual(RULES, "residual not subtracted"))
def test_exactness_catches_rule(bug: str, catches: Any):
    with catches(bug, "joint distribution", "not distributed"):
        exact(by_model(), rule=RULES[bug])


def _block(monkeypatch: pytest.MonkeyPatch, change: Callable[..., tuple[Any, Any]]) -> None:
    sound = verify.block_acceptance
    monkeypatch.setattr(exact_rules, "block_acceptance", lambda t, proposal: change(*sound(t, proposal), t, proposal))


def _token_by_token(p: Any, h: Any, target_probs: Any, proposal: Proposal) -> tuple[Any, Any]:
    # The joint ratio is replaced by that of each token alone.
    draft = verify.draft_probs(proposal, target_probs.shape[-1])
    index = jnp.arange(proposal.tokens.shape[0]), proposal.tokens
    alone = jnp.minimum(target_probs[index] / draft[index], 1.0)
    own = jnp.append(jnp.ones(1), alone)
    return own, h.at[-1].set(own[-1])


BLOCK = {
    "block verification forgets p in the residual": lambda p, h, t, proposal: (jnp.ones_like(p), h),
    "block verification accepts the last prefix by h, not by p": lambda p, h, t, proposal: (p, h.at[-1].set(h[-2])),
    "block verification takes each token's own ratio": _token_by_token,
}


@pytest.mark.slow
@pytest.mark.parametrize("bug", BLOCK)
def test_exactness_catches_block_verification(bug: str, monkeypatch: pytest.MonkeyPatch, catches: Any):
    _block(monkeypatch, BLOCK[bug])
    with catches(bug, "joint distribution", "not distributed"):
        exact(by_model(3), rule=dataclasses.replace(verify.block, name=bug))


# Drafters.


def _proposes(pair: Pair, propose: Callable[..., Any]) -> Pair:
    return pair._replace(drafter=pair.drafter._replace(propose=propose))


def _states(pair: Pair, change: Callable[[Proposal], Proposal]) -> Pair:
    """The drafter, with another proposal made of its own."""

    def propose(params, state, cache, context):
        proposal, *rest = pair.drafter.propose(params, state, cache, context)
        return change(proposal), *rest

    return _proposes(pair, propose)


def most_probable(proposal: Proposal) -> Proposal:
    assert proposal.probs is not None
    return proposal._replace(tokens=jnp.argmax(proposal.probs, axis=-1).astype(jnp.int32))


def of_the_first_place(proposal: Proposal) -> Proposal:
    assert proposal.probs is not None
    return proposal._replace(probs=jnp.broadcast_to(proposal.probs[:, :1], proposal.probs.shape))


def without_backoff(proposal: Proposal) -> Proposal:
    """Only what the longest context lists, as if nothing were left to back off with."""
    assert proposal.probs is not None
    least = jnp.min(proposal.probs, axis=-1, keepdims=True)
    return proposal._replace(probs=(proposal.probs - least) / jnp.sum(proposal.probs - least, axis=-1, keepdims=True))


def without_improbable(proposal: Proposal) -> Proposal:
    """Ends before the first token that is itself improbable, not behind a place at which none was probable."""
    assert proposal.probs is not None
    chosen = jnp.take_along_axis(proposal.probs, proposal.tokens[..., None], axis=-1)[..., 0]
    sure = jnp.cumprod(chosen >= 0.3, axis=-1).sum(axis=-1)
    return proposal._replace(length=jnp.minimum(proposal.length, sure))


def narrowed(proposal: Proposal) -> Proposal:
    assert proposal.probs is not None
    return proposal._replace(probs=jnp.exp2(jnp.round(jnp.log2(proposal.probs))))


def truncated_for_the_rule_only() -> Pair:
    pair = by_model(1)

    def propose(params, state, cache, context):
        loose = context.sampling._replace(top_p=jnp.ones_like(context.sampling.top_p))
        proposal, *rest = pair.drafter.propose(params, state, cache, context._replace(sampling=loose))
        assert proposal.probs is not None
        strict = sampling.warp.warp(jnp.log(proposal.probs), context.sampling._replace(temperature=loose.top_p))
        return proposal._replace(probs=strict), *rest

    return _proposes(pair, propose)


def wider_vocabulary_cut_after_the_softmax() -> Pair:
    draft, table = testing.tabular(2, padding=2)
    pair = Pair(TARGET, TABLE, drafters.model(draft, num_draft_tokens=1), table)

    def propose(params, state, cache, context):
        proposal, *rest = pair.drafter.propose(params, state, cache, context._replace(vocab_size=6))
        assert proposal.probs is not None
        known = proposal.probs[..., :4]
        # Stated as if the draft had been sampled from it; cut without being scaled up, it would be exact.
        return proposal._replace(probs=known / jnp.sum(known, axis=-1, keepdims=True)), *rest

    return _proposes(pair, propose)


DRAFTERS = {
    "argmax drafts with soft probabilities": lambda: _states(by_model(1), most_probable),
    "draft truncated for the rule but not for sampling": truncated_for_the_rule_only,
    "wider vocabulary cut after the softmax and scaled up": wider_vocabulary_cut_after_the_softmax,
    "probabilities of another token": lambda: _states(
        by_lookup(), lambda p: p._replace(probs=jax.nn.one_hot((p.tokens + 1) % 4, 4))
    ),
    "draft probabilities rounded after the draft was sampled": lambda: _states(by_model(1), narrowed),
    "improbable draft tokens dropped": lambda: _states(by_model(2), without_improbable),
    "back-off mass left out of what a table states": lambda: _states(by_table(), without_backoff),
    "histogram of the continuations not updated along the path": lambda: _states(by_retrieval(), of_the_first_place),
}


@pytest.mark.slow
@pytest.mark.parametrize("bug", DRAFTERS)
def test_exactness_catches_drafter(bug: str, catches: Any):
    with catches(bug, "joint distribution", "not distributed"):
        exact(DRAFTERS[bug]())


@pytest.mark.slow
def test_sampled_drafts_may_be_called_deterministic():
    # No bug: a one-hot draft is removed from the residual whole, however the token was chosen.
    exact(_states(by_model(1), lambda p: p._replace(probs=None)))


@pytest.mark.slow
def test_perfect_acceptance_catches_a_draft_cache_that_is_not_caught_up(catches: Any):
    pair = Pair(LONG, LONG_TABLE, drafters.model(LONG, num_draft_tokens=3), LONG_TABLE)
    perfect(pair)

    def propose(params, state, cache, context):
        claimed = jnp.maximum(state.length, context.history.length - 1)
        return pair.drafter.propose(params, state._replace(length=claimed), cache, context)

    with catches("a paused row's draft cache goes stale", "perfect acceptance", "drafts were accepted"):
        perfect(_proposes(pair, propose))


@pytest.mark.slow
def test_the_acceptance_bound_catches_coupling_without_shared_noise(catches: Any):
    with catches("coupled draft draws with its own noise", "acceptance bound", "overlap"):
        often_accepted(by_model(), rule=dataclasses.replace(verify.coupled, coupled=False))


# Random keys inside the step.


def _keys(monkeypatch: pytest.MonkeyPatch, change: Callable[..., tuple[Any, StepKeys]]) -> None:
    sound = decode_step.step_keys
    monkeypatch.setattr(decode_step, "step_keys", lambda seed, length, k: change(*sound(seed, length, k), seed, length))


def _one_key_for_acceptance_and_token(drafts: Any, keys: StepKeys, seed: Any, length: Any) -> tuple[Any, StepKeys]:
    del seed, length
    return drafts, StepKeys(keys.token[:, 0], jnp.broadcast_to(keys.token[:, :1], keys.token.shape))


def _noise_of_the_step(drafts: Any, keys: StepKeys, seed: Any, length: Any) -> tuple[Any, StepKeys]:
    del seed, length
    own = jax.vmap(lambda key: jax.random.split(key, keys.token.shape[1]))(keys.accept)
    return drafts, keys._replace(token=own)


def _one_stream(drafts: Any, keys: StepKeys, seed: Any, length: Any) -> tuple[Any, StepKeys]:
    rows = jax.vmap(jax.random.fold_in)(jnp.broadcast_to(seed[:1], seed.shape), jnp.arange(len(length)) + length)
    return drafts, StepKeys(rows, jax.vmap(lambda key: jax.random.split(key, keys.token.shape[1]))(rows))


KEYS: dict[str, tuple[Callable[..., Any], Check, str, str, Rule]] = {
    "one key for acceptance and residual": (
        _one_key_for_acceptance_and_token,
        exact,
        "joint distribution",
        "not distributed",
        verify.rejection,
    ),
    "coupled noise of the step, not of the position": (
        _noise_of_the_step,
        same_text,
        "same text",
        "plain decoding's",
        verify.coupled,
    ),
    "one random stream for all requests": (_one_stream, own_seed, "own seed", "with the batch", verify.rejection),
}


@pytest.mark.slow
@pytest.mark.parametrize("bug", KEYS)
def test_checks_catch_keys(bug: str, monkeypatch: pytest.MonkeyPatch, catches: Any):
    change, check, name, match, rule = KEYS[bug]
    _keys(monkeypatch, change)
    with catches(bug, name, match):
        check(by_model(), rule=rule)


@pytest.mark.slow
def test_exactness_catches_one_key_for_all_steps(monkeypatch: pytest.MonkeyPatch, catches: Any):
    sound = jax.random.fold_in

    def fold_in(key, data):
        return key if not isinstance(data, int) else sound(key, data)

    monkeypatch.setattr(jax.random, "fold_in", fold_in)
    with catches("one key for all steps", "joint distribution", "not distributed"):
        exact(by_model())


# Distributions inside the step.


def _top_p_first_where_a_draft_is_scored(patch: pytest.MonkeyPatch) -> None:
    sound = sampling.warp.warp

    def warp(logits, options):
        if logits.shape[1] == 1:  # Plain steps and drafts.
            return sound(logits, options)
        ones = jnp.ones_like(options.top_p)
        cut = sound(logits, options._replace(temperature=ones))
        return sound(jnp.log(cut), options._replace(top_k=jnp.zeros_like(options.top_k), top_p=ones))

    patch.setattr(sampling.warp, "warp", warp)


def _history_of_the_first_place(patch: pytest.MonkeyPatch) -> None:
    sound = processors.process

    def process(logits, options, history):
        if logits.shape[1] == 1:
            return sound(logits, options, history)
        rows = [
            sound(logits[:, i : i + 1], options, history._replace(grammar_state=history.grammar_state[:, i : i + 1]))
            for i in range(logits.shape[1])
        ]
        return jnp.concatenate(rows, axis=1)

    patch.setattr(processors, "process", process)


def _bonus_not_processed(patch: pytest.MonkeyPatch) -> None:
    sound = processors.process

    def process(logits, options, history):
        done = sound(logits, options, history)
        return done if logits.shape[1] == 1 else done.at[:, -1].set(logits[:, -1])

    patch.setattr(processors, "process", process)


def _grammar_not_advanced(patch: pytest.MonkeyPatch) -> None:
    def trace(table, state, tokens):
        del table
        return jnp.broadcast_to(state[:, None], (state.shape[0], tokens.shape[1] + 1))

    patch.setattr(automaton, "trace", trace)


def _penalties_on_the_prompt(patch: pytest.MonkeyPatch) -> None:
    sound = processors.presence_and_frequency

    def presence(logits, tokens, length, prompt_length, *options):
        return sound(logits, tokens, length, prompt_length * 0, *options)

    patch.setattr(processors, "presence_and_frequency", presence)


DISTRIBUTIONS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], list[Group]]] = {
    "top-p before temperature where a draft is scored": (_top_p_first_where_a_draft_is_scored, GROUPS),
    "penalties that do not see the drafts before a position": (_history_of_the_first_place, WITH_HISTORY),
    "penalties left out where the bonus token is drawn": (_bonus_not_processed, WITH_HISTORY),
    "grammar state not advanced inside the draft block": (_grammar_not_advanced, WITH_HISTORY),
    "presence penalty counts the prompt": (_penalties_on_the_prompt, WITH_HISTORY),
}


@pytest.mark.slow
@pytest.mark.parametrize("bug", DISTRIBUTIONS)
def test_exactness_catches_distribution(bug: str, monkeypatch: pytest.MonkeyPatch, catches: Any):
    plant, groups = DISTRIBUTIONS[bug]
    plant(monkeypatch)
    with catches(bug, "joint distribution", "not distributed"):
        exact(by_model(3), groups=groups)


@pytest.mark.slow
def test_exactness_catches_a_draft_cut_to_the_vocabulary_by_wrapping(monkeypatch: pytest.MonkeyPatch, catches: Any):
    draft, table = testing.tabular(2, padding=2)
    module = importlib.import_module("specjax.drafters.model")

    # Tokens are drawn from the wide distribution and folded into the narrow one, which is stated as if it had been cut.
    def categorical(keys, probs, options):
        del options
        wide = jnp.concatenate([probs, probs[:, :2]], axis=1)
        return jax.vmap(sampling.categorical)(keys, wide) % 4

    monkeypatch.setattr(module.sampling, "sample", categorical)
    with catches("draft folded into a narrower vocabulary", "joint distribution", "not distributed"):
        exact(Pair(TARGET, TABLE, drafters.model(draft, num_draft_tokens=1), table))


# Steps.


def _then(change: Callable[[DecodeState, DecodeState, Drafter], DecodeState]) -> Any:
    """`decode_step`, then a change of the state that a bug would have made."""

    def step(target, drafter, rule, params, state):
        return change(state, decoding.decode_step(target, drafter, rule, params, state), drafter)

    return step


def not_rolled_back(old: DecodeState, new: DecodeState, drafter: Drafter) -> DecodeState:
    length = old.rows.cache.length + drafter.num_draft_tokens + 1
    return with_rows(new, cache=new.rows.cache._replace(length=length))


def rolled_back_one_too_few(old: DecodeState, new: DecodeState, drafter: Drafter) -> DecodeState:
    del old, drafter
    return with_rows(new, cache=new.rows.cache._replace(length=new.rows.cache.length + 1))


def same_rollback_for_all_rows(old: DecodeState, new: DecodeState, drafter: Drafter) -> DecodeState:
    del drafter
    emitted = jnp.max(new.rows.length - old.rows.length)
    return with_rows(new, cache=new.rows.cache._replace(length=old.rows.cache.length + emitted))


def accepted_counts_the_last_token(old: DecodeState, new: DecodeState, drafter: Drafter) -> DecodeState:
    del drafter
    extra = (new.rows.stats.target_calls - old.rows.stats.target_calls)[:, None]
    return with_rows(new, stats=new.rows.stats._replace(accepted=new.rows.stats.accepted + extra))


STEPS = {
    "target cache not rolled back": not_rolled_back,
    "target cache rolled back one too few": rolled_back_one_too_few,
    "all rows rolled back alike": same_rollback_for_all_rows,
}


@pytest.mark.slow
@pytest.mark.parametrize("bug", STEPS)
def test_exactness_catches_step(bug: str, catches: Any):
    with catches(bug, "joint distribution", "not distributed"):
        exact(by_model(), step=_then(STEPS[bug]))


@pytest.mark.slow
def test_the_counters_catch_an_acceptance_rate_above_1(catches: Any):
    with catches("the token that follows the drafts counts as accepted", "counters", "above 1"):
        sound_counters(by_model(), step=_then(accepted_counts_the_last_token))


# Trees.


def _a_path_is_not_moved(patch: pytest.MonkeyPatch) -> Pair:
    del patch
    pair = by_tree()
    return pair._replace(target=pair.target._replace(commit=lambda cache, _, n: pair.target.commit(cache, None, n)))


def _nodes_see_all_before_them(patch: pytest.MonkeyPatch) -> Pair:
    sound = tree.shape

    def shape(parent, max_depth):
        found = sound(parent, max_depth)
        size = found.sees.shape[-1]
        return found._replace(sees=jnp.broadcast_to(jnp.tri(size, dtype=bool), found.sees.shape))

    patch.setattr(decode_step.tree, "shape", shape)
    return by_tree()


def _penalties_see_the_nodes_before(patch: pytest.MonkeyPatch) -> Pair:
    def text(tokens, length, drafts, shape):
        write = jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice(row, new, (at,)))
        return jnp.broadcast_to(write(tokens, drafts, length)[:, None], (*shape.depth.shape, tokens.shape[1]))

    patch.setattr(tree, "texts", text)
    return by_tree()


def _noise_by_node(patch: pytest.MonkeyPatch) -> Pair:
    # A node's number in the place of its depth: siblings are judged by different draws.
    def own(keys, target_probs, proposal):
        del proposal
        token_keys = jax.vmap(lambda i: jax.random.fold_in(keys.accept, i))(jnp.arange(target_probs.shape[0]))
        return jax.vmap(sampling.categorical)(token_keys, target_probs)

    patch.setattr(exact_rules, "own_draws", own)
    return by_tree()


TREES: dict[str, tuple[Callable[[pytest.MonkeyPatch], Pair], list[Group]]] = {
    "the accepted path of a tree is not moved in the cache": (_a_path_is_not_moved, GROUPS),
    "siblings of a tree see each other": (_nodes_see_all_before_them, GROUPS),
    "penalties see nodes that are not on the path": (_penalties_see_the_nodes_before, WITH_HISTORY),
}


@pytest.mark.slow
@pytest.mark.parametrize("bug", usual(TREES, "the accepted path of a tree is not moved in the cache"))
def test_exactness_catches_tree(bug: str, monkeypatch: pytest.MonkeyPatch, catches: Any):
    plant, groups = TREES[bug]
    pair = plant(monkeypatch)
    with catches(bug, "joint distribution", "not distributed"):
        exact(pair, rule=dataclasses.replace(verify.coupled, name=bug), groups=groups)


@pytest.mark.slow
def test_the_same_text_catches_noise_by_node(monkeypatch: pytest.MonkeyPatch, catches: Any):
    pair = _noise_by_node(monkeypatch)
    with catches("noise of a tree by node, not by position", "same text", "plain decoding's"):
        same_text(pair, rule=dataclasses.replace(verify.coupled, name="noise by node"))


@jax.tree_util.register_pytree_node_class
class Forgetful(testing.TabularCache):
    """A cache whose hand-written flattening leaves a field out."""

    def tree_flatten(self) -> tuple[tuple[Any, ...], None]:
        return (self.tokens, self.position), None

    @classmethod
    def tree_unflatten(cls, aux: None, children: tuple[Any, ...]) -> "Forgetful":
        del aux
        return cls(*children, None)  # pyright: ignore[reportArgumentType, reportCallIssue]


def test_a_round_trip_catches_a_field_that_is_lost_in_flattening(catches: Any):
    pair = by_model()
    state = decoding.prefill(pair.target, pair.drafter, pair.params, right_pad([[1, 2]], 8), max_new_tokens=4)
    survives_jit(state)
    with catches("a hand-written pytree drops a field", "round trip through jit", "field length is None"):
        survives_jit(with_rows(state, cache=Forgetful(*state.rows.cache)))


@pytest.mark.slow
def test_the_stop_check_catches_a_stop_token_ignored_inside_a_block(catches: Any):
    def only_the_last_token_stops(target, drafter, rule, params, state):
        deaf = with_rows(state, stop_tokens=jnp.full_like(state.rows.stop_tokens, -1))
        new = decoding.decode_step(target, drafter, rule, params, deaf)
        last = jnp.take_along_axis(new.rows.tokens, (new.rows.length - 1)[:, None], axis=1)[:, 0]
        stops = jnp.any(last[:, None] == state.rows.stop_tokens, axis=1)
        return with_rows(new, stop_tokens=state.rows.stop_tokens, done=new.rows.done | stops)

    with catches("a stop token inside an accepted block is overrun", "stop", r"row \d+ has"):
        stops(by_model(), step=only_the_last_token_stops)


@pytest.mark.slow
def test_row_dependence_is_what_the_batch_minimum_shows_as(catches: Any):
    """Rows cut to their neighbours' counts, but keeping their own accepted tokens, stay exact: only slow."""

    def cut_to_the_minimum(target, drafter, rule, params, state):
        new = decoding.decode_step(target, drafter, rule, params, state)
        emitted = (new.rows.length - state.rows.length)[: len(state.rows.length) // 4 * 4].reshape(-1, 4)
        running = jnp.where(state.rows.done[: emitted.size].reshape(-1, 4), 99, emitted)
        fewest = jnp.repeat(running.min(axis=1), 4)
        length = jnp.minimum(new.rows.length, state.rows.length + jnp.where(state.rows.done, 0, fewest))
        return with_rows(
            new,
            length=length,
            done=state.rows.done | (length >= state.rows.limit),
            cache=new.rows.cache._replace(length=length - 1),
        )

    result: Sample = sample(by_model(), GROUPS, step=cut_to_the_minimum)
    assert_exact(result)
    sound = sample(by_model(), GROUPS, step=decoding.decode_step)
    calls, fewer = (np.asarray(r.state.rows.stats.target_calls).sum() for r in (result, sound))
    with catches("all rows advance by the smallest accepted count", "number of calls", "calls"):
        assert calls <= fewer, f"{calls} calls in the place of {fewer}"
