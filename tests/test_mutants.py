"""Bugs that others have shipped, planted one by one: each must fail the check that it is meant for.

The checks are those of `test_exactness`, on the same kind of batches; the run's names say which check caught which bug.
"""

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
)

from specjax import decode, drafters, sampling, testing, verify
from specjax.types import DecodeState, Drafter, Proposal, Verdict
from specjax.verify import Rule

TARGET, TABLE = testing.tabular(0)
DRAFT, DRAFT_TABLE = testing.tabular(1)
LONG, LONG_TABLE = testing.tabular(20, order=5)
GROUPS = [
    Group((0, 1, 2, 0, 1, 2), 20_000),
    Group((3, 1, 3, 1), 20_000, temperature=0.7, top_p=0.85),
    Group((1, 0, 1, 0, 1), 20_000, top_k=3),
    Group((2,), 5_000, budget=2),
]


def by_model(k: int = 2) -> Pair:
    return Pair(TARGET, TABLE, drafters.model(DRAFT, num_draft_tokens=k), DRAFT_TABLE)


def exact(pair: Pair, *, rule: Rule = verify.rejection, step: Any = decode.decode_step) -> None:
    assert_exact(sample(pair, GROUPS, rule=rule, step=step))


def stops(pair: Pair, *, rule: Rule = verify.rejection, step: Any = decode.decode_step) -> None:
    groups = [g._replace(rows=500, budget=9) for g in GROUPS]
    assert_stops(sample(pair, groups, rule=rule, step=step, stop_tokens=[3]), 3)


def perfect(pair: Pair, *, rule: Rule = verify.rejection, step: Any = decode.decode_step) -> None:
    prompts = random_prompts(8, 4)
    state = decode.prefill(
        pair.target,
        pair.drafter,
        pair.params,
        right_pad(prompts, 16),
        max_new_tokens=45,
        options=sampling.options(8, temperature=1.0),
        step_cost=100.0,
        max_len=72,
    )
    assert_always_accepted(run(pair, rule, state, step))


# Rules.


def _rule(
    accept: Callable[[Any, Any], Any] = lambda p, q: p / q,
    residual: Callable[[Any, Any], Any] = lambda p, q: jnp.maximum(p - q, 0.0),
    bonus_row: Callable[[Any, int], Any] = lambda n, k: n,
    bonus: Callable[[Any], Any] = lambda p: p,
    cut: Callable[[Any], Any] = lambda n: n,
) -> Rule:
    """A second rejection sampler, sound by default, with a hole for each bug."""

    def judge(key: Any, target_probs: Any, proposal: Proposal) -> Verdict:
        k = proposal.tokens.shape[0]
        draft = verify.draft_probs(proposal, target_probs.shape[-1])
        key_accept, key_last = jax.random.split(key)
        index = jnp.arange(k), proposal.tokens
        accepted = jax.random.uniform(key_accept, (k,)) < accept(target_probs[:-1], draft)[index]
        n = jnp.sum(jnp.cumprod(accepted & (jnp.arange(k) < proposal.length)), dtype=jnp.int32)
        n_cut = cut(n)
        if k == 0:
            weights = target_probs[0]
        else:
            left = residual(target_probs[n_cut], draft[jnp.minimum(n_cut, k - 1)])
            full = n_cut >= proposal.length
            weights = jnp.where(full, bonus(target_probs[bonus_row(n_cut, k)]), left)
            weights = jnp.where(jnp.sum(weights) > 0, weights, target_probs[n_cut])
        last = sampling.categorical(key_last, weights)
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
}


def test_the_rule_without_a_hole_passes():
    exact(by_model(), rule=_rule())


@pytest.mark.parametrize("bug", RULES)
def test_exactness_catches_rule(bug: str):
    with pytest.raises(AssertionError, match="not distributed"):
        exact(by_model(), rule=RULES[bug])


# Drafters.


def _proposes(pair: Pair, propose: Callable[..., Any]) -> Pair:
    return pair._replace(drafter=pair.drafter._replace(propose=propose))


def argmax_with_soft_probs() -> Pair:
    pair = by_model(1)

    def propose(params, state, context):
        proposal, state = pair.drafter.propose(params, state, context)
        return proposal._replace(tokens=jnp.argmax(proposal.probs, axis=-1).astype(jnp.int32)), state

    return _proposes(pair, propose)


def soft_tokens_without_probs() -> Pair:
    # No bug: a one-hot draft is removed from the residual whole, however the token was chosen.
    pair = by_model(1)

    def propose(params, state, context):
        proposal, state = pair.drafter.propose(params, state, context)
        return proposal._replace(probs=None), state

    return _proposes(pair, propose)


def truncated_for_the_rule_only() -> Pair:
    pair = by_model(1)

    def propose(params, state, context):
        loose = context.sampling._replace(top_p=jnp.ones_like(context.sampling.top_p))
        proposal, state = pair.drafter.propose(params, state, context._replace(sampling=loose))
        strict = sampling.probabilities(jnp.log(proposal.probs), context.sampling._replace(temperature=loose.top_p))
        return proposal._replace(probs=strict), state

    return _proposes(pair, propose)


def wider_vocabulary_cut_after_the_softmax() -> Pair:
    draft, table = testing.tabular(2, padding=2)
    pair = Pair(TARGET, TABLE, drafters.model(draft, num_draft_tokens=1), table)

    def propose(params, state, context):
        proposal, state = pair.drafter.propose(params, state, context._replace(vocab_size=6))
        return proposal._replace(probs=proposal.probs[..., :4]), state

    return _proposes(pair, propose)


def one_hot_of_another_token() -> Pair:
    pair = Pair(TARGET, TABLE, drafters.ngram(num_draft_tokens=1, min_match=1))

    def propose(params, state, context):
        proposal, state = pair.drafter.propose(params, state, context)
        return proposal._replace(probs=jax.nn.one_hot((proposal.tokens + 1) % 4, 4)), state

    return _proposes(pair, propose)


DRAFTERS = {
    "argmax drafts with soft probabilities": argmax_with_soft_probs,
    "draft truncated for the rule but not for sampling": truncated_for_the_rule_only,
    "wider vocabulary cut after the softmax": wider_vocabulary_cut_after_the_softmax,
    "probabilities of another token": one_hot_of_another_token,
}


@pytest.mark.parametrize("bug", DRAFTERS)
def test_exactness_catches_drafter(bug: str):
    with pytest.raises(AssertionError, match="not distributed"):
        exact(DRAFTERS[bug]())


def test_sampled_drafts_may_be_called_deterministic():
    exact(soft_tokens_without_probs())


def test_perfect_acceptance_catches_a_draft_cache_that_is_not_caught_up():
    pair = Pair(LONG, LONG_TABLE, drafters.model(LONG, num_draft_tokens=3), LONG_TABLE)
    perfect(pair)

    def propose(params, cache, context):
        claimed = jnp.maximum(cache.length, context.length - 1)
        return pair.drafter.propose(params, cache._replace(length=claimed), context)

    with pytest.raises(AssertionError, match="drafts were accepted"):
        perfect(_proposes(pair, propose))


# Random keys and distributions inside the step.


@pytest.mark.parametrize("k", [1, 2])
def test_exactness_catches_draft_noise_reused_for_verification(k: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(decode, "_VERIFY", decode._DRAFT)
    with pytest.raises(AssertionError, match="not distributed"):
        exact(by_model(k))


def test_exactness_catches_one_key_for_acceptance_and_residual(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jax.random, "split", lambda key, num=2: jnp.stack([key] * num))
    with pytest.raises(AssertionError, match="not distributed"):
        exact(by_model(2))


def test_exactness_catches_top_p_before_temperature_where_a_draft_is_scored(monkeypatch: pytest.MonkeyPatch):
    sound = sampling.probabilities

    def probabilities(logits, options):
        if logits.shape[1] == 1:  # Plain steps and drafts.
            return sound(logits, options)
        ones = jnp.ones_like(options.top_p)
        cut = sound(logits, options._replace(temperature=ones))
        return sound(jnp.log(cut), options._replace(top_k=jnp.zeros_like(options.top_k), top_p=ones))

    monkeypatch.setattr(sampling, "probabilities", probabilities)
    with pytest.raises(AssertionError, match="not distributed"):
        exact(by_model())


def test_exactness_catches_a_draft_cut_to_the_vocabulary_by_wrapping(monkeypatch: pytest.MonkeyPatch):
    draft, table = testing.tabular(2, padding=2)
    module = importlib.import_module("specjax.drafters.model")

    # Tokens are drawn from the wide distribution and folded into the narrow one, which is stated as if it had been cut.
    def categorical(keys, probs, options):
        del options
        wide = jnp.concatenate([probs, probs[:, :2]], axis=1)
        return jax.vmap(sampling.categorical)(keys, wide) % 4

    monkeypatch.setattr(module.sampling, "sample", categorical)
    with pytest.raises(AssertionError, match="not distributed"):
        exact(Pair(TARGET, TABLE, drafters.model(draft, num_draft_tokens=1), table))


# Steps.


def _then(change: Callable[[DecodeState, DecodeState, Drafter], DecodeState]) -> Any:
    """`decode_step`, then a change of the state that a bug would have made."""

    def step(target, drafter, rule, params, state):
        return change(state, decode.decode_step(target, drafter, rule, params, state), drafter)

    return step


def not_rolled_back(old: DecodeState, new: DecodeState, drafter: Drafter) -> DecodeState:
    return new._replace(cache=new.cache._replace(length=old.cache.length + drafter.num_draft_tokens + 1))


def rolled_back_one_too_few(old: DecodeState, new: DecodeState, drafter: Drafter) -> DecodeState:
    del old, drafter
    return new._replace(cache=new.cache._replace(length=new.cache.length + 1))


def same_rollback_for_all_rows(old: DecodeState, new: DecodeState, drafter: Drafter) -> DecodeState:
    del drafter
    emitted = jnp.max(new.length - old.length)
    return new._replace(cache=new.cache._replace(length=old.cache.length + emitted))


STEPS = {
    "target cache not rolled back": not_rolled_back,
    "target cache rolled back one too few": rolled_back_one_too_few,
    "all rows rolled back alike": same_rollback_for_all_rows,
}


@pytest.mark.parametrize("bug", STEPS)
def test_exactness_catches_step(bug: str):
    with pytest.raises(AssertionError, match="not distributed"):
        exact(by_model(), step=_then(STEPS[bug]))


def test_exactness_catches_one_key_for_all_steps(monkeypatch: pytest.MonkeyPatch):
    sound = jax.random.fold_in

    def fold_in(key, data):
        return key if not isinstance(data, int) else sound(key, data)

    monkeypatch.setattr(jax.random, "fold_in", fold_in)
    with pytest.raises(AssertionError, match="not distributed"):
        exact(by_model())


def test_the_stop_check_catches_a_stop_token_ignored_inside_a_block():
    stops(by_model())

    def only_the_last_token_stops(target, drafter, rule, params, state):
        deaf = state._replace(stop_tokens=jnp.full_like(state.stop_tokens, -1))
        new = decode.decode_step(target, drafter, rule, params, deaf)
        last = jnp.take_along_axis(new.tokens, (new.length - 1)[:, None], axis=1)[:, 0]
        return new._replace(stop_tokens=state.stop_tokens, done=new.done | jnp.isin(last, state.stop_tokens))

    with pytest.raises(AssertionError, match=r"row \d+ has"):
        stops(by_model(), step=only_the_last_token_stops)


def test_row_dependence_is_what_the_batch_minimum_shows_as():
    """Rows cut to their neighbours' counts, but keeping their own accepted tokens, stay exact: only slow."""

    def cut_to_the_minimum(target, drafter, rule, params, state):
        new = decode.decode_step(target, drafter, rule, params, state)
        emitted = (new.length - state.length)[: len(state.length) // 4 * 4].reshape(-1, 4)
        running = jnp.where(state.done[: emitted.size].reshape(-1, 4), 99, emitted)
        fewest = jnp.repeat(running.min(axis=1), 4)
        length = jnp.minimum(new.length, state.length + jnp.where(state.done, 0, fewest))
        return new._replace(
            length=length, done=state.done | (length >= state.limit), cache=new.cache._replace(length=length - 1)
        )

    result: Sample = sample(by_model(), GROUPS, step=cut_to_the_minimum)
    assert_exact(result)
    sound = sample(by_model(), GROUPS, step=decode.decode_step)
    calls, fewer = (np.asarray(r.state.stats.target_calls).sum() for r in (result, sound))
    assert calls > fewer
