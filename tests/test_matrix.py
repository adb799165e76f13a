"""Every drafter with every rule, on a ragged batch that holds every option, and ended in every way.

A new drafter, rule or option is covered by one more line in a list. What each rule promises is checked against an
enumeration of all texts, or against plain decoding: the same loop with K = 0.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import eagle_heads
import jax.numpy as jnp
import numpy as np
import pytest
import tabular_heads
from helpers import Group, Pair, Sample, assert_exact, p_value, random_prompts, sample
from tabular_heads import HEAD_TABLE, HEADS, TAPPED

from specjax import drafters, testing
from specjax.decoding import verify
from specjax.decoding.verify import Rule
from specjax.drafters import contract, parallel_heads
from specjax.types import Block, Drafter

TARGET, TABLE = testing.tabular(0)
DRAFT, DRAFT_TABLE = testing.tabular(1)
PADDED, PADDED_TABLE = testing.tabular(2, padding=2)
TEXTS = random_prompts(60, 4)
COUNTS = drafters.count_ngrams(TEXTS, vocab_size=4, max_successors=3)
CORPUS = drafters.index_corpus(TEXTS, vocab_size=4)

SUFFIX = contract.check(drafters.suffix(num_draft_tokens=3, min_match=1)).drafter
SUFFIX_TREE = contract.check(drafters.suffix(num_draft_tokens=5, depth=3, min_match=1)).drafter
LOOKUPS = drafters.merged([drafters.ngram(num_draft_tokens=3, min_match=1), SUFFIX_TREE])
MERGED = drafters.merged(
    [
        drafters.model(DRAFT, num_draft_tokens=2),
        drafters.ngram(num_draft_tokens=3, min_match=1),
        drafters.table(COUNTS, num_draft_tokens=2),
    ]
)
FIRST = drafters.first_of([drafters.ngram(num_draft_tokens=3), drafters.model(DRAFT, num_draft_tokens=2)])


def tree_of(children: Any) -> Drafter:
    return drafters.model(DRAFT, topology=(2, 2, 1), children=children)


def unsure(params: Any, block: Block, cache: Any) -> Any:
    """The target as it would be without some of its layers: other logits, the same cache."""
    output, cache = TARGET.apply(params, block, cache)
    return output._replace(logits=0.5 * (output.logits + jnp.roll(output.logits, 1, axis=-1))), cache


SKIPPING = TARGET._replace(with_skips=lambda skips: TARGET._replace(apply=unsure), num_layers=1)

EAGLE_TAPPED, EAGLE_TARGET, EAGLE = eagle_heads.on_tables(TARGET)


def eagle(**shape: Any) -> Pair:
    """A random EAGLE-3 head that drafts three of the four tokens, over features that tell the target's last two."""
    draft = drafters.eagle(EAGLE, EAGLE_TARGET, **shape)
    return Pair(EAGLE_TAPPED, TABLE, draft.drafter, draft.params)


DRAFTERS = {
    "none": Pair(TARGET, TABLE, drafters.none()),
    "ngram": Pair(TARGET, TABLE, drafters.ngram(num_draft_tokens=3, min_match=1)),
    "suffix": Pair(TARGET, TABLE, SUFFIX),
    "suffix, tree": Pair(TARGET, TABLE, SUFFIX_TREE),
    "aggressive": Pair(TARGET, TABLE, drafters.aggressive(num_draft_tokens=3)),
    "model": Pair(TARGET, TABLE, drafters.model(DRAFT, num_draft_tokens=3), DRAFT_TABLE),
    "model, sure": Pair(TARGET, TABLE, drafters.model(DRAFT, num_draft_tokens=3, min_confidence=0.35), DRAFT_TABLE),
    "model, other padding": Pair(TARGET, TABLE, drafters.model(PADDED, num_draft_tokens=2), PADDED_TABLE),
    "model, tree": Pair(TARGET, TABLE, drafters.model(DRAFT, topology=(2, 2, 1)), DRAFT_TABLE),
    "jacobi": Pair(TARGET, TABLE, drafters.jacobi(num_draft_tokens=3)),
    "lookahead": Pair(TARGET, TABLE, drafters.lookahead(window=3, ngram=3, guesses=3, num_buckets=4)),
    "mask_tokens": Pair(TARGET, TABLE, drafters.mask_tokens(mask_token=1, num_draft_tokens=2)),
    "parallel_masks": Pair(TARGET, TABLE, drafters.parallel_masks(TARGET, mask_token=1, num_draft_tokens=3)),
    "parallel_masks, tree": Pair(TARGET, TABLE, drafters.parallel_masks(TARGET, mask_token=1, topology=(2, 2))),
    "medusa": Pair(TAPPED, TABLE, parallel_heads.of_chain(HEADS, 3), HEAD_TABLE),
    "medusa, sure": Pair(TAPPED, TABLE, parallel_heads.of_chain(HEADS, 2, min_confidence=0.45), HEAD_TABLE),
    "medusa, tree": Pair(TAPPED, TABLE, tabular_heads.tree(drafters.children.without_replacement), HEAD_TABLE),
    "medusa, tree with replacement": Pair(
        TAPPED, TABLE, tabular_heads.tree(drafters.children.with_replacement), HEAD_TABLE
    ),
    "medusa, tree of the most probable": Pair(
        TAPPED, TABLE, tabular_heads.tree(drafters.children.most_probable), HEAD_TABLE
    ),
    "pard": Pair(TARGET, TABLE, drafters.pard(DRAFT, mask_token=1, num_draft_tokens=3), DRAFT_TABLE),
    "pard, tree": Pair(TARGET, TABLE, drafters.pard(DRAFT, mask_token=1, topology=(2, 2)), DRAFT_TABLE),
    "pard, other padding": Pair(TARGET, TABLE, drafters.pard(PADDED, mask_token=1, num_draft_tokens=2), PADDED_TABLE),
    "nonautoregressive": Pair(
        TARGET, TABLE, drafters.nonautoregressive(DRAFT, mask_token=1, num_draft_tokens=3), DRAFT_TABLE
    ),
    "model, tree with replacement": Pair(TARGET, TABLE, tree_of(drafters.children.with_replacement), DRAFT_TABLE),
    "model, tree of the most probable": Pair(TARGET, TABLE, tree_of(drafters.children.most_probable), DRAFT_TABLE),
    "model, tree, other padding": Pair(TARGET, TABLE, drafters.model(PADDED, topology=(3, 1)), PADDED_TABLE),
    "model, dynamic tree": Pair(
        TARGET, TABLE, drafters.model(DRAFT, dynamic=drafters.Dynamic(width=3, depth=3, num_nodes=6)), DRAFT_TABLE
    ),
    "ngram, tree": Pair(TARGET, TABLE, drafters.ngram(num_draft_tokens=5, min_match=1, depth=3)),
    "table, tree": Pair(TARGET, TABLE, drafters.table(COUNTS, topology=(2, 1, 1)).drafter, COUNTS.params),
    "retrieval, tree": Pair(
        TARGET, TABLE, drafters.retrieval(CORPUS, num_draft_tokens=5, depth=2, min_match=1).drafter, CORPUS.params
    ),
    "merged": Pair(TARGET, TABLE, LOOKUPS.drafter, LOOKUPS.params),
    "merged, sampled": Pair(TARGET, TABLE, MERGED.drafter, (DRAFT_TABLE, (), COUNTS.params)),
    "first_of": Pair(TARGET, TABLE, FIRST.drafter, ((), DRAFT_TABLE)),
    "skip": Pair(
        TARGET, TABLE, drafters.skip(SKIPPING, mlp=(0,), num_draft_tokens=3, min_confidence=0.3, adaptive=True)
    ),
    "skip, tree": Pair(TARGET, TABLE, drafters.skip(SKIPPING, mlp=(0,), topology=(2, 2, 1))),
    "eagle": eagle(num_draft_tokens=3),
    "eagle, tree": eagle(topology=(2, 2, 1)),
    "eagle, dynamic tree": eagle(dynamic=drafters.Dynamic(width=3, depth=3, num_nodes=6)),
    "table": Pair(TARGET, TABLE, drafters.table(COUNTS, num_draft_tokens=3).drafter, COUNTS.params),
    "retrieval": Pair(
        TARGET, TABLE, drafters.retrieval(CORPUS, num_draft_tokens=3, num_occurrences=8).drafter, CORPUS.params
    ),
}

PARITY = ((1, 0, 0, 1), (0, 1, 1, -1))
"""After an odd number of tokens 1 and 2, token 3 is forbidden."""

OPTIONS: dict[str, dict[str, Any]] = {
    "temperature 1": {},
    "temperature .7": {"temperature": 0.7},
    "greedy": {"temperature": 0.0},
    "top_k": {"top_k": 2},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.3},
    "typical_p": {"typical_p": 0.6},
    "epsilon_cutoff": {"epsilon_cutoff": 0.2},
    "repetition_penalty": {"repetition_penalty": 1.8},
    "presence and frequency": {"presence_penalty": 0.7, "frequency_penalty": 0.4},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "logit_bias": {"logit_bias": ((0, 1.0), (2, -np.inf))},
    "min_new_tokens": {"min_new_tokens": 2},
    "grammar": {"grammar": PARITY},
    "all at once": {
        "temperature": 1.3,
        "top_k": 3,
        "top_p": 0.95,
        "min_p": 0.02,
        "typical_p": 0.9,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.3,
        "frequency_penalty": -0.2,
        "logit_bias": ((1, 0.5),),
        "min_new_tokens": 1,
        "grammar": PARITY,
    },
}

STOPS: dict[str, tuple[int, ...]] = {"budget": (), "stop token": (3,)}

ROWS, MANY_ROWS = 8_000, 50_000
"""Of every option: in every run, and by hand (`pytest -m slow tests/test_matrix.py`)."""


def ragged(rows: int) -> list[Group]:
    """Rows of every option, from prompts of different lengths with different budgets."""
    prompts = [((0, 1, 2, 0, 1, 2), 4), ((3, 1, 3, 1), 4), ((2, 1), 3)]
    groups = []
    for i, options in enumerate(OPTIONS.values()):
        prompt, budget = prompts[i % len(prompts)]
        groups.append(Group(prompt, 500 if options.get("temperature") == 0 else rows, budget, **options))
    return groups


class Case(NamedTuple):
    """What was decoded, and what plain decoding made of the same rows (`Promise.plain`)."""

    drafter: str
    speculative: Sample
    plain: Sample


def assert_same_text(case: Case) -> None:
    ours, plain = case.speculative.state.rows, case.plain.state.rows
    np.testing.assert_array_equal(ours.length, plain.length)
    within = np.arange(ours.tokens.shape[1]) < np.asarray(ours.length)[:, None]
    np.testing.assert_array_equal(np.where(within, ours.tokens, 0), np.where(within, plain.tokens, 0))


def assert_distributed(case: Case) -> None:
    assert_exact(case.speculative)


def _conditionals(case: Case, group: int) -> list[tuple[np.ndarray, np.ndarray, int]]:
    """For each beginning of a group's texts: the counts of the next token, its exact distribution, and the trials."""
    result = case.speculative
    g = result.groups[group]
    exact = testing.enumerate_texts(result.pair.table, g.prompt, g.budget, result.stop_tokens, **g.options)
    counts = np.zeros(exact.shape)
    np.add.at(counts, tuple(result.new_tokens(group).T), 1)
    found = []
    for n in range(g.budget):
        rest = tuple(range(n + 1, g.budget))
        seen, probs = counts.sum(axis=rest), exact.sum(axis=rest)
        for beginning in np.ndindex(*exact.shape[:n]):
            trials = int(seen[beginning].sum())
            if trials and probs[beginning].sum() > 0:
                found.append((seen[beginning], probs[beginning] / probs[beginning].sum(), trials))
    return found


def assert_lenient(lenience: float) -> Callable[[Case], None]:
    """No token comes more often than 1/l times what the target says."""

    def check(case: Case) -> None:
        for group, g in enumerate(case.speculative.groups):
            if g.temperature == 0:
                continue
            for seen, probs, trials in _conditionals(case, group):
                bound = np.minimum(probs / lenience, 1.0)
                slack = 5 * np.sqrt(bound * (1 - bound) / trials) + 5 / trials
                assert (seen / trials <= bound + slack).all(), f"{g}: {seen} of {trials}, bound {bound}"

    return check


def assert_supported(case: Case) -> None:
    """What the rule accepts beyond the target's distribution, it still never gives probability 0 to nothing else."""
    for group, g in enumerate(case.speculative.groups):
        if g.temperature == 0:
            continue
        for seen, probs, _ in _conditionals(case, group):
            assert not seen[probs == 0].any(), f"{g}: a forbidden token was emitted: {seen}, {probs}"


def assert_only_biased(case: Case) -> None:
    """A rule that is not exact must differ from the target where it accepts drafts, or it is called lossy in vain."""
    assert_supported(case)
    result = case.speculative
    if case.drafter == "none":
        assert_exact(result)
    else:
        worst = min(p_value(result, i) for i, g in enumerate(result.groups) if g.temperature > 0)
        assert worst < 1e-6, "a lossy rule that looks exact"


def assert_accepts_nothing(case: Case) -> None:
    assert not np.asarray(case.speculative.state.rows.stats.accepted).any()


class Promise(NamedTuple):
    """A rule, what it promises, and the rule of the plain decoding that the promise speaks of."""

    rule: Rule
    checks: tuple[Callable[[Case], None], ...]
    plain: Rule = verify.coupled


RULES = {
    "greedy": Promise(verify.greedy, (assert_same_text,), verify.greedy),
    "rejection": Promise(verify.rejection, (assert_distributed,)),
    "block": Promise(verify.block, (assert_distributed,)),
    "traversal": Promise(verify.traversal, (assert_distributed,)),
    "coupled": Promise(verify.coupled, (assert_distributed, assert_same_text)),
    "observe": Promise(verify.observe, (assert_same_text, assert_accepts_nothing)),
    "lenient": Promise(verify.lenient(0.5), (assert_lenient(0.5), assert_only_biased)),
    "typical": Promise(verify.typical(), (assert_only_biased,)),
    "top_k": Promise(verify.top_k(2), (assert_only_biased,)),
    "top_k_gap": Promise(verify.top_k(2, 1.0), (assert_only_biased,)),
    "distance": Promise(verify.distance(1), ()),
}


@functools.cache
def _plain(rule: Rule, stop: str, rows: int) -> Sample:
    return sample(DRAFTERS["none"], ragged(rows), rule=rule, stop_tokens=STOPS[stop])


def _is_exact_at_zero(case: Case) -> None:
    """Rows of temperature 0 have the text of plain decoding, token for token, whatever the exact rule."""
    result = case.speculative
    for group, g in enumerate(result.groups):
        if g.temperature == 0:
            np.testing.assert_array_equal(result.new_tokens(group), case.plain.new_tokens(group))


CELLS = [
    (drafter, rule, stop)
    for drafter, pair in DRAFTERS.items()
    for rule, promise in RULES.items()
    for stop in STOPS
    if pair.drafter.topology.is_chain or promise.rule.trees
    if not (pair.drafter.topology.shares_draws and promise.rule.own_draws)
]


IN_EVERY_RUN = {("model", "rejection", "stop token")}
"""Drafts that are sampled, with the rule of the papers.

The rules see every kind of proposal in `test_verify`, and `test_mutants` decodes trees in every run; all cells together
are decoded by hand.
"""
assert set(CELLS) >= IN_EVERY_RUN


@pytest.mark.budget(60)
@pytest.mark.parametrize(("drafter", "rule", "stop"), sorted(IN_EVERY_RUN))
def test_matrix(drafter: str, rule: str, stop: str):
    check_cell(drafter, rule, stop, ROWS)


@pytest.mark.slow
@pytest.mark.parametrize(("drafter", "rule", "stop"), CELLS)
def test_whole_matrix_with_more_rows(drafter: str, rule: str, stop: str):
    check_cell(drafter, rule, stop, MANY_ROWS)


def check_cell(drafter: str, rule: str, stop: str, rows: int) -> None:
    """Decodes all options with a drafter, a rule and a way to stop, and checks what the rule promises."""
    promise = RULES[rule]
    if drafter == "none":
        result = _plain(promise.rule, stop, rows)
    else:
        result = sample(DRAFTERS[drafter], ragged(rows), rule=promise.rule, stop_tokens=STOPS[stop])
    case = Case(drafter, result, _plain(promise.plain, stop, rows))
    for check in promise.checks:
        check(case)
    if promise.rule.exact:
        _is_exact_at_zero(case)
    stats = result.state.rows.stats
    depth = DRAFTERS[drafter].drafter.topology.depth
    emitted = np.asarray(result.state.rows.length) - np.asarray(result.state.rows.prompt_length)
    calls, proposed, accepted = (np.asarray(x) for x in (stats.target_calls, stats.proposed, stats.accepted))
    # At least one token a call, at most D + 1; what was accepted had been judged.
    assert ((emitted >= calls) & (emitted <= (depth + 1) * calls)).all()
    assert (accepted <= proposed).all()
    overlap = np.asarray(stats.overlap)
    assert ((overlap >= 0) & (overlap <= proposed.sum(axis=1) + 1e-3)).all()
    if depth and promise.rule is not verify.observe:
        assert accepted.sum(axis=0).min() > 100, f"drafts accepted by position: {accepted.sum(axis=0)}"


@pytest.mark.slow
def test_what_an_unsure_draft_did_not_draw_is_not_proposed():
    """In the matrix some row is always sure, so that every place is drawn; here none ever is."""
    pair = Pair(TARGET, TABLE, drafters.model(DRAFT, num_draft_tokens=3, min_confidence=1.0), DRAFT_TABLE)
    result = sample(pair, [Group((0, 1, 2), 20_000), Group((2, 1), 20_000, top_p=0.8)])
    assert_exact(result)
    proposed = np.asarray(result.state.rows.stats.proposed).sum(axis=0)
    assert proposed[0] > 0
    assert not proposed[1:].any()
