"""Whatever drafts, and however much of it is accepted: the text is the target's, in distribution and for each row."""

import functools
import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    Group,
    Pair,
    Sample,
    assert_always_accepted,
    assert_drafts_accepted,
    assert_exact,
    assert_stops,
    p_value,
    random_prompts,
    right_pad,
    sample,
    texts,
    usual,
    with_rows,
)

from specjax import decoding, drafters, sampling, testing, theory
from specjax.decoding import adaptive, verify
from specjax.state import DecodeState
from specjax.types import Params

TARGET, TABLE = testing.tabular(0)
DRAFT, DRAFT_TABLE = testing.tabular(1)
PADDED, PADDED_TABLE = testing.tabular(2, padding=2)
NARROW, NARROW_TABLE = testing.tabular(3, vocab_size=3)

OPTIONS = {
    "temperature 1": {},
    "temperature .7": {"temperature": 0.7},
    "top_k 2": {"top_k": 2},
    "top_p .8": {"top_p": 0.8},
    "min_p .3": {"min_p": 0.3},
}


def pair(drafter: str, k: int) -> Pair:
    if drafter == "none":
        return Pair(TARGET, TABLE, drafters.none())
    if drafter.startswith("ngram"):
        return Pair(TARGET, TABLE, drafters.ngram(num_draft_tokens=k, min_match=int(drafter[-1])))
    draft, table = {
        "model": (DRAFT, DRAFT_TABLE),
        "model, wider vocabulary": (PADDED, PADDED_TABLE),
        "model, narrower vocabulary": (NARROW, NARROW_TABLE),
    }[drafter]
    return Pair(TARGET, TABLE, drafters.model(draft, num_draft_tokens=k), table)


PAIRS = [
    ("none", 0),
    ("ngram 1", 1),
    ("ngram 1", 3),
    ("model", 1),
    ("model", 3),
    ("model, wider vocabulary", 3),
]


def ragged(options: str) -> list[Group]:
    """2e5 texts of 4 tokens from repetitive prompts (so that lookups match), some of 2 tokens, and greedy rows."""
    few = [Group((2,), 10_000, budget=2), Group((1, 0, 1, 0, 1), 100, budget=3, temperature=0.0)]
    a, b = (0, 1, 2, 0, 1, 2), (3, 1, 3, 1)
    if options == "mixed":
        each = [*OPTIONS.values(), {"temperature": 1.3, "top_k": 3, "top_p": 0.9, "min_p": 0.05}]
        return [Group(p, 17_000, **each[i]) for p in (a, b) for i in range(6)] + few
    return [Group(a, 102_000, **OPTIONS[options]), Group(b, 102_000, **OPTIONS[options]), *few]


# `test_matrix` has a smaller sample of every option in every run.
@pytest.mark.slow
@pytest.mark.parametrize("options", [*OPTIONS, "mixed"])
@pytest.mark.parametrize(("drafter", "k"), PAIRS)
def test_texts_of_a_ragged_batch_are_distributed_as_the_target(drafter: str, k: int, options: str):
    result = sample(pair(drafter, k), ragged(options))
    assert_exact(result)
    assert_drafts_accepted(result)


@pytest.mark.slow
@pytest.mark.parametrize("options", ["temperature 1", pytest.param("mixed", marks=pytest.mark.slow)])
def test_exact_where_the_draft_knows_fewer_tokens_than_the_target(options: str):
    result = sample(pair("model, narrower vocabulary", 3), ragged(options))
    assert_exact(result)
    assert_drafts_accepted(result)


@pytest.mark.slow
@pytest.mark.parametrize("drafter", ["ngram 1", "model"])
def test_exact_while_rows_pause_their_drafts(drafter: str):
    # At this cost a row pauses at once after a rejection.
    result = sample(pair(drafter, 1), ragged("mixed"), step_cost=1.5)
    assert_exact(result)
    stats = result.state.rows.stats
    steps, drafted = np.asarray(stats.target_calls), np.asarray(stats.draft_steps)
    assert ((drafted > 0) & (drafted < steps - 1)).any(), "no row paused"
    assert (np.asarray(result.state.rows.adaptation.pause) > 0).any()
    assert_drafts_accepted(result)


@pytest.mark.slow
def test_exact_while_rows_choose_how_many_tokens_they_draft():
    chosen = drafters.model(testing.tabular(1)[0], num_draft_tokens=3, lengths=(1,))
    whole = pair("model", 3)._replace(drafter=chosen)
    result = sample(whole, ragged("mixed"), step_cost=[1.1, 1.5, 1.6])
    assert_exact(result)
    steps = np.asarray(result.state.rows.stats.proposed)
    assert (steps.sum(axis=0) > 1_000).all(), "some number of tokens was never drafted"
    assert (np.asarray(result.state.rows.adaptation.judged)[:, 1] == 0).any(), "every row drafted two tokens"


@pytest.mark.slow
@pytest.mark.parametrize("drafter", ["ngram 1", "model"])
def test_exact_where_a_row_drafts_again_after_its_pause(drafter: str, monkeypatch: pytest.MonkeyPatch):
    # The first pause is then as short as it gets.
    monkeypatch.setattr(adaptive, "TRIAL_SHARE", 0.5)
    # Texts longer than the first pause, of two tokens, so that all 4,096 of them can be enumerated.
    (target, table), (draft, draft_table) = (testing.tabular(seed, vocab_size=2) for seed in (8, 9))
    chosen = (
        drafters.ngram(num_draft_tokens=1, min_match=1)
        if drafter != "model"
        else drafters.model(draft, num_draft_tokens=1)
    )
    budget = adaptive.FIRST_PAUSE + 4
    groups = [Group((0, 1, 1, 0, 1), 100_000, budget=budget), Group((1, 0), 30_000, budget=budget, temperature=0.7)]
    result = sample(Pair(target, table, chosen, draft_table), groups, step_cost=1.5, step=decoding.decode_step)
    assert_exact(result)
    stats = result.state.rows.stats
    rejected = np.asarray(stats.draft_steps) - np.asarray(stats.accepted).sum(axis=1)
    assert ((rejected > 0) & (np.asarray(stats.target_calls) > adaptive.FIRST_PAUSE)).sum() > 10_000, "no row paused"
    # Two failed attempts have a whole pause between them.
    assert (rejected >= 2).sum() > 1_000, "no row drafted again"


@pytest.mark.slow
def test_exact_where_tokens_are_forbidden_and_tied():
    target, table = testing.tabular(4, zeros=0.3, ties=True)
    draft, draft_table = testing.tabular(5, zeros=0.3, ties=True)
    result = sample(Pair(target, table, drafters.model(draft, num_draft_tokens=2), draft_table), ragged("mixed"))
    assert_exact(result)
    assert_drafts_accepted(result)


@pytest.mark.slow
def test_exact_where_the_target_remembers_more_than_two_tokens():
    target, table = testing.tabular(6, vocab_size=3, order=5)
    draft, draft_table = testing.tabular(7, vocab_size=3, order=5)
    result = sample(
        Pair(target, table, drafters.model(draft, num_draft_tokens=3), draft_table),
        [Group((0, 1, 2, 0, 1, 2), 100_000, budget=5), Group((2, 1), 50_000, budget=4)],
    )
    assert_exact(result)
    assert_drafts_accepted(result)


def test_the_exactness_check_sees_a_slightly_wrong_temperature():
    result = sample(pair("none", 0), ragged("temperature 1"))
    claimed = result._replace(groups=[g._replace(temperature=1.05) for g in result.groups])
    assert p_value(result, 0) > 1e-3
    assert p_value(claimed, 0) < 1e-8


@functools.cache
def _ragged_greedy(kind: str) -> tuple:
    """Target, its parameters, a draft and its, prompts, budgets."""
    if kind == "decoder":
        (target, params), (draft, draft_params) = testing.tiny_decoder(0), testing.tiny_decoder(1)
        size, rows = 61, 9
    else:
        target, params = testing.tabular(10, order=3, ties=True, zeros=0.2)
        # Half the contexts agree, so that drafts are accepted.
        draft, other = testing.tabular(11, order=3, ties=True)
        draft_params = jnp.where((jnp.arange(64) % 2 == 0)[:, None], params, other)
        size, rows = 4, 64
    budgets = np.random.default_rng(1).integers(0, 30, rows).tolist()
    return target, params, draft, draft_params, random_prompts(rows, size), budgets


def _greedy(kind: str, drafter, draft_params=None) -> DecodeState:
    target, params, _, _, prompts, budgets = _ragged_greedy(kind)
    both = Params(params, draft_params)
    state = decoding.prefill(
        target, drafter, both, decoding.pad_prompts(prompts), max_new_tokens=budgets, step_cost=0.0, max_len=64
    )
    return decoding.generate(target, drafter, verify.rejection, both, state)


@pytest.mark.parametrize(
    ("kind", "drafter", "k"),
    [
        ("decoder", "ngram 1", 4),
        *(
            pytest.param(*cell, marks=pytest.mark.slow)
            for cell in (
                *(("table", drafter, 1) for drafter in ("ngram 1", "model", "self")),
                *(("table", drafter, 4) for drafter in ("ngram 1", "model", "self")),
                ("decoder", "model", 1),
                ("decoder", "self", 4),
                ("table", "ngram 2", 4),
                *(("decoder", drafter, 4) for drafter in ("ngram 2", "model")),
                *(("decoder", drafter, 0) for drafter in ("ngram 1", "model")),
            )
        ),
    ],
)
def test_greedy_text_equals_plain_decoding_token_for_token(kind: str, drafter: str, k: int):
    _, params, draft, draft_params, prompts, budgets = _ragged_greedy(kind)
    if drafter.startswith("ngram"):
        got = _greedy(kind, drafters.ngram(num_draft_tokens=k, min_match=int(drafter[-1])))
    elif drafter == "self":
        target = _ragged_greedy(kind)[0]
        got = _greedy(kind, drafters.model(target, num_draft_tokens=k), params)
        if k:
            assert_always_accepted(got)
    else:
        got = _greedy(kind, drafters.model(draft, num_draft_tokens=k), draft_params)
    assert texts(got) == texts(_greedy(kind, drafters.none()))
    assert [len(t) for t in texts(got)] == [len(p) + b for p, b in zip(prompts, budgets, strict=True)]
    if k and not (kind == "decoder" and drafter == "model"):  # Two random decoders agree on nothing.
        assert np.asarray(got.rows.stats.accepted).sum() > 0


def test_greedy_text_of_a_table_is_its_argmax_and_the_first_of_equals():
    _, table, _, _, prompts, budgets = _ragged_greedy("table")
    table, wanted = np.asarray(table), []
    assert any((row == row.max()).sum() > 1 for row in table), "no ties at the top"
    for prompt, budget in zip(prompts, budgets, strict=True):
        text = list(prompt)
        for _ in range(budget):
            a, b, c = [0, 0, 0, *text][-3:]
            text.append(int(table[16 * a + 4 * b + c].argmax()))
        wanted.append(text)
    assert texts(_greedy("table", drafters.none())) == wanted


def test_greedy_text_of_the_tiny_decoder_is_not_constant():
    new = [t[-20:] for t in texts(_greedy("decoder", drafters.none())) if len(t) > 30]
    assert new
    assert all(len(set(t)) > 1 for t in new)
    assert max(len(set(t)) for t in new) > 8


def _sampled(drafter, draft_params, prompts, seeds, *, step_cost=0.0, budgets=24, temperature=None, order=5):
    target, table = testing.tabular(20, order=order)
    both = Params(table, draft_params)
    options = sampling.options(len(prompts), temperature=temperature or [1.0] * len(prompts))
    state = decoding.prefill(
        target,
        drafter,
        both,
        right_pad(prompts, 16),
        max_new_tokens=budgets,
        options=options,
        seeds=seeds,
        step_cost=step_cost,
        max_len=64,
    )
    return target, both, state


def _long_memory_drafters():
    # Alike enough that some rows win and others lose.
    draft, other = testing.tabular(21, order=5)
    _, table = testing.tabular(20, order=5)
    return {
        "none": (drafters.none(), None),
        "ngram": (drafters.ngram(num_draft_tokens=3, min_match=1), None),
        "model": (drafters.model(draft, num_draft_tokens=3), 0.5 * table + 0.5 * other),
    }


@pytest.mark.parametrize("step_cost", usual([0.0, 1.7, 2.5], 1.7))
@pytest.mark.parametrize("drafter", usual(["none", "ngram", "model"], "model"))
def test_a_row_decodes_to_the_same_text_alone_and_in_a_batch(drafter: str, step_cost: float):
    chosen, draft_params = _long_memory_drafters()[drafter]
    prompts, seeds = random_prompts(12, 4, seed=3), list(range(100, 112))
    temperature = [0.0, 1.0, 0.6] * 4
    target, both, state = _sampled(
        chosen, draft_params, prompts, seeds, step_cost=step_cost, budgets=40, temperature=temperature
    )
    together = decoding.generate(target, chosen, verify.rejection, both, state)
    together_texts = texts(together)
    for row, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        _, _, state = _sampled(
            chosen,
            draft_params,
            [prompt],
            [seed],
            step_cost=step_cost,
            budgets=40,
            temperature=temperature[row : row + 1],
        )
        alone = decoding.generate(target, chosen, verify.rejection, both, state)
        assert texts(alone)[0] == together_texts[row]
        # A greedy row alone may draft otherwise than among sampled ones; its text is the same.
        for counter in ("draft_steps", "target_calls", "histogram") if temperature[row] else ():
            assert (
                np.asarray(getattr(alone.rows.stats, counter))[0].tolist()
                == np.asarray(getattr(together.rows.stats, counter))[row].tolist()
            )


def test_other_seeds_give_other_texts_and_equal_seeds_equal_ones():
    target, both, state = _sampled(drafters.none(), None, [[1, 2]] * 3, [5, 6, 5])
    a, b, c = texts(decoding.generate(target, drafters.none(), verify.rejection, both, state))
    assert a == c != b


@pytest.mark.parametrize("drafter", usual(["ngram", "model"], "model"))
def test_k_0_is_plain_decoding(drafter: str):
    draft, draft_table = testing.tabular(21, order=5)
    k0 = drafters.ngram(num_draft_tokens=0) if drafter == "ngram" else drafters.model(draft, num_draft_tokens=0)
    prompts, seeds = random_prompts(8, 4), list(range(8))
    results = []
    for chosen in (k0, drafters.none()):
        params = draft_table if chosen is k0 and drafter == "model" else None
        target, both, state = _sampled(chosen, params, prompts, seeds)
        results.append(decoding.generate(target, chosen, verify.rejection, both, state))
    assert texts(results[0]) == texts(results[1])
    assert np.asarray(results[0].rows.stats.histogram).shape == (8, 1)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("drafter", ["ngram", "model"])
def test_stream_yields_the_tokens_of_generate(drafter: str, steps: int):
    chosen, draft_params = _long_memory_drafters()[drafter]
    prompts, seeds = random_prompts(8, 4), list(range(8))
    target, both, state = _sampled(chosen, draft_params, prompts, seeds, step_cost=1.7)
    whole = texts(decoding.generate(target, chosen, verify.rejection, both, state))
    _, _, state = _sampled(chosen, draft_params, prompts, seeds, step_cost=1.7)
    seen = [texts(s) for s in decoding.stream(target, chosen, verify.rejection, both, state, steps=steps)]
    assert seen[-1] == whole
    assert len(seen) > 2
    for before, after in itertools.pairwise(seen):
        assert all(b[: len(a)] == a for a, b in zip(before, after, strict=True)), "a committed token changed"


@pytest.mark.slow
@pytest.mark.parametrize(("drafter", "k"), [("ngram 1", 3), ("model", 3), ("none", 0)])
def test_a_stop_token_inside_an_accepted_block_ends_the_row_there(drafter: str, k: int):
    groups = [Group((0, 1, 2, 0, 1, 2), 2000, budget=9), Group((3, 1, 3, 1), 2000, budget=5)]
    result = sample(pair(drafter, k), groups, stop_tokens=[3])
    assert_stops(result)
    stopped = np.asarray(result.state.rows.length) < np.array([15, 9])[result.owner]
    assert 0.1 < stopped.mean() < 1


@pytest.mark.slow
def test_the_text_up_to_a_stop_token_is_distributed_as_the_target():
    # What follows the stop token is not text: the test sees it as a repetition of the stop token.
    groups = [Group((0, 1, 2, 0, 1, 2), 200_000)]
    result = sample(pair("model", 3), groups, stop_tokens=[3])
    tokens, length = np.asarray(result.state.rows.tokens)[:, 6:10], np.asarray(result.state.rows.length) - 6
    tokens = np.where(np.arange(4) < length[:, None], tokens, 3)
    exact = testing.enumerate_texts(TABLE, groups[0].prompt, 4)
    merged = np.zeros_like(exact)
    for text, prob in np.ndenumerate(exact):
        stop = text.index(3) if 3 in text else 4
        merged[text[:stop] + (3,) * (4 - stop)] += prob
    counts = np.bincount(np.ravel_multi_index(tuple(tokens.T), exact.shape), minlength=exact.size)
    assert testing.g_test(counts, merged) > 1e-4


@pytest.mark.slow
def test_stats_are_consistent_row_by_row():
    result = sample(pair("model", 3), [Group((0, 1, 2), 3000, budget=12), Group((1,), 500, budget=1)])
    stats, length = result.state.rows.stats, np.asarray(result.state.rows.length)
    histogram, proposed, accepted = (np.asarray(x) for x in (stats.histogram, stats.proposed, stats.accepted))
    assert (histogram.sum(axis=1) == np.asarray(stats.target_calls)).all()
    assert (accepted <= proposed).all()
    assert (accepted.sum(axis=1) == histogram @ np.arange(4)).all()
    # A position is judged only where all before it were accepted.
    assert (proposed[:, 1:] <= accepted[:, :-1]).all()
    assert (np.asarray(stats.draft_steps) <= np.asarray(stats.target_calls)).all()
    new = length - np.array([3, 1])[result.owner]
    assert (new == accepted.sum(axis=1) + np.asarray(stats.target_calls)).all()
    from_draft = np.asarray(result.state.rows.from_draft) & (np.arange(24) < length[:, None])
    assert (from_draft.sum(axis=1) == accepted.sum(axis=1)).all()
    overlap = np.asarray(stats.overlap)
    assert ((overlap >= 0) & (overlap <= proposed.sum(axis=1) + 1e-5)).all()


def _independent(k: int) -> tuple[Sample, float]:
    """Steps of a pair whose positions are all alike, and its true acceptance probability."""
    (target, table), (draft, draft_table) = testing.tabular(30, order=0), testing.tabular(31, order=0)
    chosen = Pair(target, table, drafters.model(draft, num_draft_tokens=k), draft_table)
    p, q = (testing.distribution(np.asarray(t)[0]) for t in (table, draft_table))
    groups = [Group((0, 1), 100_000, budget=k + 1)]

    def one_step(target, drafter, rule, params, state):
        state = decoding.decode_step(target, drafter, rule, params, state)
        return with_rows(state, done=jnp.ones_like(state.rows.done))

    return sample(chosen, groups, step=one_step), float(np.minimum(p, q).sum())


@pytest.mark.parametrize("k", usual([1, 4], 4))
def test_acceptance_overlap_and_tokens_per_step_are_those_of_the_paper(k: int):
    result, alpha = _independent(k)
    stats, rows = result.state.rows.stats, 100_000
    proposed, accepted = (float(np.asarray(x).sum()) for x in (stats.proposed, stats.accepted))
    noise = 4.5 * np.sqrt(alpha * (1 - alpha) / proposed)
    assert 0.2 < alpha < 0.95
    assert abs(accepted / proposed - alpha) < noise
    # The mean of sum min(p, q) has no noise where all positions are alike.
    assert abs(float(np.asarray(stats.overlap, np.float64).sum()) / proposed - alpha) < 1e-5
    emitted = np.asarray(result.state.rows.length) - 2
    wanted = theory.expected_tokens(alpha, k)
    assert abs(emitted.mean() - wanted) < 4.5 * emitted.std() / np.sqrt(rows)


@pytest.mark.slow
def test_observing_sums_alpha_at_every_place_of_the_plain_text():
    (target, table), (draft, draft_table) = testing.tabular(32, order=1), testing.tabular(33, order=1)
    chosen = Pair(target, table, drafters.model(draft, num_draft_tokens=1), draft_table)
    result = sample(chosen, [Group((0, 1), 500, budget=4)], rule=verify.observe)
    p, q = (np.array([testing.distribution(row) for row in np.asarray(t)]) for t in (table, draft_table))
    # A table of order 1 looks at the last token alone; before the last place there is no room for a draft.
    last = np.concatenate([np.ones((500, 1), int), result.new_tokens(0)[:, :2]], axis=1)
    stats = result.state.rows.stats
    assert int(np.asarray(stats.proposed).sum()) == last.size
    wanted = np.minimum(p, q).sum(axis=1)[last].sum()
    assert abs(float(np.asarray(stats.overlap, np.float64).sum()) - wanted) < 1e-3


@pytest.mark.slow
def test_overlap_of_one_hot_drafts_is_the_accepted_share():
    stats = sample(pair("ngram 1", 3), ragged("temperature 1")).state.rows.stats
    proposed, accepted, overlap = (
        float(np.asarray(x, np.float64).sum()) for x in (stats.proposed, stats.accepted, stats.overlap)
    )
    assert abs(accepted - overlap) / proposed < 4.5 * 0.5 / np.sqrt(proposed)


@pytest.mark.parametrize("pauses", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_draft_equal_to_the_target_is_always_accepted(temperature: float, pauses: bool):
    # What is decoded while a row pauses must reach the draft's cache.
    target, table = testing.tabular(20, order=5)
    drafter = drafters.model(target, num_draft_tokens=3)
    prompts = random_prompts(8, 4)
    target, both, state = _sampled(
        drafter, table, prompts, list(range(8)), step_cost=0.0, budgets=45, temperature=[temperature] * 8
    )
    while pauses and not np.asarray(state.rows.done).all():
        state = with_rows(state, adaptation=state.rows.adaptation._replace(pause=jnp.arange(8, dtype=jnp.int32) % 4))
        state = decoding.advance(target, drafter, verify.rejection, both, state, np.int32(5))
    state = decoding.generate(target, drafter, verify.rejection, both, state)
    assert_always_accepted(state)
    assert (np.asarray(state.rows.stats.draft_steps) >= 3).all()


@pytest.mark.slow
def test_a_paused_row_keeps_a_whole_draft_cache_while_a_neighbour_drafts():
    # One row's draft is fully accepted, then nobody drafts, then its neighbour does, which lags one token less. The
    # table remembers far enough for the row's next draft to read a hole.
    target, table = testing.tabular(40, vocab_size=2, order=12)
    drafter = drafters.model(target, num_draft_tokens=3)
    both, rows = Params(table, table), 16
    state = decoding.prefill(
        target,
        drafter,
        both,
        right_pad([[0, 1]] * rows, 16),
        max_new_tokens=45,
        options=sampling.options(rows, temperature=1.0),
        step_cost=0.0,
        max_len=64,
    )
    pause = jnp.tile(jnp.asarray([0, 2], jnp.int32), rows // 2)
    state = with_rows(state, adaptation=state.rows.adaptation._replace(pause=pause))
    assert_always_accepted(decoding.generate(target, drafter, verify.rejection, both, state))
