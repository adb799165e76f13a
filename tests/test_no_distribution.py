"""Positions without a distribution (NaN, or every token forbidden), behind stops and rejected drafts.

Plain decoding never gets there, so speculation must not fail there, nor let what it met there change the text.

The loops are compiled at XLA's lowest level (`sample(step=...)`): compilation is most of what these tests take.
"""

import dataclasses
import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import Group, Pair, Sample, assert_exact, run, sample, tokenizer_of, usual

from specjax import decoding, drafters, sampling, testing
from specjax.decoding import step as decode_step
from specjax.decoding import verify
from specjax.decoding.verify import Rule
from specjax.models import cache, decoder
from specjax.sampling import automaton
from specjax.types import Context, Drafter, Params, Proposal, StepKeys, Topology

FORBIDDEN, STOP = 2, 3
TARGET, TABLE = testing.tabular(0)
DRAFT, DRAFT_TABLE = testing.tabular(1)
# The draft proposes stops more often than the target takes them, so that some are rejected.
DRAFT_TABLE = DRAFT_TABLE.at[:, 3].add(1.5)

RULES = [
    verify.rejection,
    verify.block,
    verify.coupled,
    verify.observe,
    verify.lenient(0.5),
    verify.typical(),
    verify.top_k(2),
]

GROUPS = [
    Group((0, 1, 0, 1), 6_000),
    Group((1, 0, 0), 6_000, temperature=0.7, top_p=0.9),
    Group((0, 1, 1), 300, temperature=0.0),
]


def with_holes(table: Any, hole: float, *, forbid: bool) -> Any:
    """A table of order 2 without a distribution behind the stop and the token that the target forbids."""
    table = np.array(table).reshape(4, 4, 4)
    if forbid:
        table[:, :, FORBIDDEN] = -np.inf
    table[:, [FORBIDDEN, STOP]] = hole
    return jnp.asarray(table.reshape(16, 4))


def speculate(drafter: str, rule: Rule, hole: float, groups: list[Group] = GROUPS, **options: Any) -> Sample:
    """Texts of a target with such holes; the draft proposes what the target forbids, and goes on behind its stops."""
    table = with_holes(TABLE, hole, forbid=True)
    pair = {
        "none": Pair(TARGET, table, drafters.none()),
        "ngram": Pair(TARGET, table, drafters.ngram(num_draft_tokens=3, min_match=1)),
        "model": Pair(
            TARGET, table, drafters.model(DRAFT, num_draft_tokens=3), with_holes(DRAFT_TABLE, hole, forbid=False)
        ),
        "tree": Pair(
            TARGET, table, drafters.model(DRAFT, topology=(2, 2)), with_holes(DRAFT_TABLE, hole, forbid=False)
        ),
        "sound model": Pair(TARGET, table, drafters.model(DRAFT, num_draft_tokens=3), DRAFT_TABLE),
    }[drafter]
    return sample(pair, groups, rule=rule, **{"stop_tokens": [STOP], "step": decoding.decode_step, **options})


CELLS = [("model", rule, np.nan) for rule in RULES]
CELLS += [
    ("sound model", verify.block, np.nan),
    ("model", verify.block, -np.inf),
    ("sound model", verify.rejection, -np.inf),
    *(("tree", rule, hole) for rule in (verify.rejection, verify.traversal) for hole in (np.nan, -np.inf)),
]


IN_EVERY_RUN = [("model", verify.block, np.nan)]


@pytest.mark.parametrize(
    ("drafter", "rule", "hole"),
    [cell if cell in IN_EVERY_RUN else pytest.param(*cell, marks=pytest.mark.slow) for cell in CELLS],
    ids=lambda cell: getattr(cell, "name", str(cell)),
)
def test_a_hole_behind_a_stop_or_a_forbidden_draft_is_no_failure(drafter: str, rule: Rule, hole: float):
    result = speculate(drafter, rule, hole)
    assert not (np.asarray(result.state.rows.failed_at) >= 0).any()
    if rule.exact:
        assert_exact(result)
    stopped = np.asarray(result.state.rows.length) < np.array([len(g.prompt) + g.budget for g in GROUPS])[result.owner]
    assert 0.1 < stopped.mean() < 1, "no draft went on behind a stop"
    if rule is not verify.observe:
        assert np.asarray(result.state.rows.stats.accepted).sum() > 100
    assert FORBIDDEN not in np.concatenate([result.new_tokens(i).ravel() for i in range(len(GROUPS))])
    # Overlaps of positions that nobody judged are not counted.
    assert np.isfinite(np.asarray(result.state.rows.stats.overlap)).all()


@functools.cache
def failures(drafter: str, rule: Rule) -> np.ndarray:
    """Rows by the position at which they failed, where no stop ends them before."""
    table = with_holes(TABLE, np.nan, forbid=True)
    pair = Pair(TARGET, table, drafters.model(DRAFT, num_draft_tokens=3), DRAFT_TABLE)
    pair = pair if drafter == "model" else Pair(TARGET, table, drafters.none())
    state = sample(pair, [Group((0, 1, 0), 20_000)], rule=rule, step=decoding.decode_step).state
    assert not np.asarray(state.rows.draft_failed).any()
    return np.bincount(np.asarray(state.rows.failed_at) + 1, minlength=8)


@pytest.mark.slow
@pytest.mark.parametrize(
    "rule", [pytest.param(verify.rejection, marks=pytest.mark.slow), verify.block], ids=lambda rule: rule.name
)
def test_a_hole_that_text_reaches_fails_where_plain_decoding_does(rule: Rule):
    plain, ours = failures("none", verify.rejection), failures("model", rule)
    assert plain[5:8].min() > 100
    np.testing.assert_allclose(ours, plain, atol=5 * np.sqrt(20_000 / 4))


@pytest.mark.slow
def test_stop_strings_end_a_proposal_as_stop_tokens_do():
    # The string "dd" is two tokens 3; behind it, the target has no distribution.
    tokenizer = tokenizer_of("a b c d")
    table = np.array(TABLE).reshape(4, 4, 4)
    table[STOP, STOP] = np.nan
    table = jnp.asarray(table.reshape(16, 4))
    stopping = automaton.stop_strings(["dd"], tokenizer, vocab_size=4)
    drafter, params, rows = drafters.model(DRAFT, num_draft_tokens=3), Params(table, DRAFT_TABLE), 2_000
    state = decoding.prefill(
        TARGET,
        drafter,
        params,
        decoding.pad_prompts([[0, 1]] * rows),
        max_new_tokens=16,
        options=sampling.options(rows, temperature=1.0),
        stop_strings=stopping,
        step_cost=0.0,
    )
    state = run(Pair(TARGET, table, drafter, DRAFT_TABLE), verify.block, state, decoding.decode_step)
    assert not (np.asarray(state.rows.failed_at) >= 0).any()
    assert (np.asarray(state.rows.length) < 18).mean() > 0.1


# Grammars and n-grams that may not repeat, together.

ALTERNATE = ((1, -1, -1, 2), (-1, 0, -1, -1), (2, 2, 2, 2))
"""`(0 1)* 3`, then anything."""

TOGETHER = [
    Group((0, 1, 0, 1), 4_000, no_repeat_ngram_size=2, grammar=ALTERNATE),
    Group((0, 1, 0, 1), 300, temperature=0.0, no_repeat_ngram_size=2, grammar=ALTERNATE),
    Group((2, 1, 0), 8_000, no_repeat_ngram_size=3, grammar=((1, 1, 0, -1), (0, 0, 1, 0))),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("drafter", "rule"),
    [
        ("model", verify.coupled),
        pytest.param("ngram", verify.block, marks=pytest.mark.slow),
        pytest.param("model", verify.rejection, marks=pytest.mark.slow),
        pytest.param("model, sure", verify.block, marks=pytest.mark.slow),
    ],
    ids=lambda cell: getattr(cell, "name", str(cell)),
)
def test_exact_where_a_grammar_and_no_repeat_leave_few_tokens(drafter: str, rule: Rule):
    pair = {
        "ngram": Pair(TARGET, TABLE, drafters.ngram(num_draft_tokens=3, min_match=1)),
        "model": Pair(TARGET, TABLE, drafters.model(DRAFT, num_draft_tokens=3), DRAFT_TABLE),
        "model, sure": Pair(TARGET, TABLE, drafters.model(DRAFT, num_draft_tokens=3, min_confidence=0.3), DRAFT_TABLE),
    }[drafter]
    result = sample(pair, TOGETHER, rule=rule, stop_tokens=[STOP], step=decoding.decode_step)
    assert_exact(result)
    # The greedy row has its own text, whoever is beside it.
    assert (result.new_tokens(1)[:, 0] == STOP).all()


# A draft that knows none of the tokens that the options leave.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("min_confidence", "rule"),
    [
        (0.3, verify.block),
        pytest.param(0.0, verify.rejection, marks=pytest.mark.slow),
        pytest.param(0.0, verify.coupled, marks=pytest.mark.slow),
    ],
    ids=lambda cell: getattr(cell, "name", str(cell)),
)
def test_a_draft_that_knows_no_allowed_token_ends_its_proposal(min_confidence: float, rule: Rule):
    # The target has one token more than the draft, and the grammar asks for it after every odd number of tokens.
    narrow, narrow_table = testing.tabular(3, vocab_size=3)
    only_the_new_one = ((1, 1, 1, 0), (-1, -1, -1, 0))
    groups = [
        Group((0, 1, 2), 8_000, grammar=only_the_new_one),
        Group((1, 2), 300, temperature=0.0, grammar=only_the_new_one),
        Group((2, 1), 8_000, budget=3, logit_bias=((0, -np.inf), (1, -np.inf), (2, -np.inf))),
    ]
    drafter = drafters.model(narrow, num_draft_tokens=3, min_confidence=min_confidence)
    result = sample(Pair(TARGET, TABLE, drafter, narrow_table), groups, rule=rule, step=decoding.decode_step)
    assert_exact(result)
    proposed = np.asarray(result.state.rows.stats.proposed)
    assert proposed[result.owner == 0].sum() > 0
    assert not proposed[result.owner == 2].any()


@pytest.mark.slow
@pytest.mark.parametrize("shape", usual(["chain", "tree"], "chain"))
def test_a_draft_of_nan_is_still_named(shape: str):
    drafter = drafters.model(DRAFT, topology=(2, 1) if shape == "tree" else None)
    pair = Pair(TARGET, TABLE, drafter, jnp.full_like(DRAFT_TABLE, jnp.nan))
    with pytest.raises(FloatingPointError, match="The draft's logits"):
        sample(pair, [Group((0, 1), 4)])


# Drafters that do what they should not.


@functools.cache
def proposing(token: int, length: int | None = None) -> Drafter:
    """Proposes one token everywhere."""

    def propose(params: Any, state: Any, cache: Any, context: Context) -> tuple[Proposal, Any, Any]:
        del params
        rows, k = context.keys.shape
        tokens = jnp.full((rows, k), token, jnp.int32)
        wanted = context.max_draft if length is None else jnp.full(rows, length, jnp.int32)
        return Proposal(tokens, wanted, None), state, cache

    nothing: Any = lambda *_: ()  # noqa: E731
    return Drafter(nothing, propose, lambda params, state, feedback: state, Topology.chain(3))


OWN = [verify.distance(1), *RULES]


@pytest.mark.parametrize("rule", usual(OWN, verify.rejection, verify.coupled), ids=lambda rule: rule.name)
def test_an_id_outside_the_vocabulary_is_never_accepted(rule: Rule):
    probs = jnp.asarray(np.random.default_rng(0).dirichlet(np.ones(4), 3), jnp.float32)
    outside = jnp.asarray([-1, 4, 7, 2**31 - 1, -(2**31)], jnp.int32)

    def judge(function: Any, stated: Any, token: Any, key: Any) -> Any:
        proposal = Proposal(jnp.full(2, token, jnp.int32), jnp.int32(2), stated)
        return function(StepKeys(key, jax.random.split(key, 3)), probs, proposal)

    for function in (rule.function, rule.at_zero):
        for stated in (None, jnp.zeros((2, 4))):
            one = functools.partial(judge, function, stated)
            over_keys = jax.vmap(jax.vmap(one, in_axes=(None, 0)), in_axes=(0, None))
            verdict = over_keys(outside, jax.random.split(jax.random.key(1), 50))
            assert (np.asarray(verdict.num_accepted) == 0).all()
            first = np.asarray(verdict.tokens)[..., 0]
            assert ((first >= 0) & (first < 4)).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("token", "length", "rule"),
    [
        (9, None, verify.rejection),
        (1, -5, verify.block),
        (-1, 3, verify.block),
        (1, 99, verify.rejection),
    ],
    ids=lambda cell: getattr(cell, "name", str(cell)),
)
def test_the_loop_is_exact_whatever_ids_and_lengths_a_drafter_gives(token: int, length: int | None, rule: Rule):
    groups = [Group((0, 1, 2), 6_000), Group((3,), 500, 1)]
    assert_exact(sample(Pair(TARGET, TABLE, proposing(token, length)), groups, rule=rule, step=decoding.decode_step))


@pytest.mark.slow
def test_a_token_whose_embedding_is_nan_spoils_only_what_follows_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(decoder, "PREFILL_CHUNK", 16)
    target, params = testing.tiny_decoder(0)
    bad = 60
    spoiled = {**params, "embedding": params["embedding"].at[bad].set(jnp.nan)}
    prompts = [[3, 5, 7], [11, 2, 9, 4]]

    def text(drafter: Drafter, prompts: Any = prompts) -> Any:
        inputs = decoding.pad_prompts(prompts)
        state = decoding.prefill(target, drafter, Params(spoiled, None), inputs, max_new_tokens=12, step_cost=0.0)
        state = decoding.generate(target, drafter, verify.rejection, Params(spoiled, None), state)
        return np.asarray(state.rows.tokens)[:, :15]

    np.testing.assert_array_equal(text(proposing(bad)), text(drafters.none()))
    # In a prompt it is an error, in one that is read in chunks as well.
    for prompt in ([bad, 1, 1], [bad, *[1] * 30]):
        with pytest.raises(FloatingPointError, match="target"):
            text(drafters.none(), [prompt])


# Planted bugs: what the code did before it was mended.


def nan_is_certain_acceptance(patch: pytest.MonkeyPatch) -> None:
    sound = verify.block_acceptance

    def block_acceptance(target_probs: Any, proposal: Proposal) -> Any:
        p, h = sound(target_probs, proposal)
        # Said outright: whether a maximum hands NaN on depends on how XLA:CPU compiles it.
        return p, jnp.where(jnp.isnan(jnp.sum(target_probs, axis=-1)), 1.0, h)

    patch.setattr(verify, "block_acceptance", block_acceptance)
    patch.setattr(decode_step, "_up_to_nan", lambda proposal, target_probs: proposal)


def proposals_go_on_behind_nan_and_stops(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(decode_step, "_up_to_nan", lambda proposal, target_probs: proposal)
    patch.setattr(decode_step, "_within_text", lambda state, proposal, room, topology: proposal)


def ids_outside_the_vocabulary_read_the_last_token(patch: pytest.MonkeyPatch) -> None:
    def of_drafts(probs: Any, proposal: Proposal) -> Any:
        place = jnp.arange(proposal.tokens.shape[0])
        return probs[place, jnp.clip(proposal.tokens, 0, probs.shape[-1] - 1)]

    patch.setattr(verify, "_of_drafts", of_drafts)
    patch.setattr(verify, "_is_known", lambda probs, proposal: jnp.ones(proposal.tokens.shape, bool))


def check_holes(bug: str) -> None:
    # Of another name: JAX keeps what it has traced of an equal rule.
    result = speculate("model", dataclasses.replace(verify.block, name=bug), np.nan)
    failed = int((np.asarray(result.state.rows.failed_at) >= 0).sum())
    assert not failed, f"{failed} rows failed, or are not distributed as the target"
    assert_exact(result)


def check_ids(bug: str) -> None:
    pair, rule = Pair(TARGET, TABLE, proposing(9)), dataclasses.replace(verify.rejection, name=bug)
    assert_exact(sample(pair, [Group((0, 1, 2), 6_000)], rule=rule, step=decoding.decode_step))


BUGS = {
    "NaN is certain acceptance in block verification": (nan_is_certain_acceptance, check_holes),
    "a proposal goes on behind NaN and stops": (proposals_go_on_behind_nan_and_stops, check_holes),
    "ids outside the vocabulary read its last token": (ids_outside_the_vocabulary_read_the_last_token, check_ids),
}


@pytest.mark.slow
@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_caught(bug: str, monkeypatch: pytest.MonkeyPatch, catches: Any):
    plant, check = BUGS[bug]
    plant(monkeypatch)
    with catches(bug, "no distribution", "not distributed|budget"):
        check(bug)


@pytest.mark.slow
def test_a_draft_that_fails_where_it_knows_no_token_is_caught(monkeypatch: pytest.MonkeyPatch, catches: Any):
    module = importlib.import_module("specjax.drafters.model")
    monkeypatch.setattr(module, "_has_no_token", lambda logits, probs: jnp.zeros(probs.shape[0], bool))
    with catches("a draft without an allowed token fails the row", "no distribution", "budget|not distributed"):
        test_a_draft_that_knows_no_allowed_token_ends_its_proposal(0.0, verify.rejection)


def test_values_of_nan_that_reach_the_cache_are_caught(monkeypatch: pytest.MonkeyPatch, catches: Any):
    def attend(weight: Any) -> float:
        values, _ = cache.contain(jnp.asarray([[[[1.0]]], [[[np.nan]]]]))
        return float(jnp.sum(weight * values[:, 0, 0, 0]))

    assert attend(jnp.asarray([1.0, 0.0])) == 1
    monkeypatch.setattr(cache, "contain", lambda values: (values, ~jnp.isfinite(values)))
    with catches("values of NaN are cached", "no distribution", "not distributed"):
        assert np.isfinite(attend(jnp.asarray([1.0, 0.0]))), "NaN of an unseen entry: not distributed as the target"
