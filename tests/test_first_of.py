"""The draft of the first drafter that has one: against plain decoding, and what its parts are told."""

import importlib
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import Pair, context_of, random_prompts, right_pad, run, texts

from specjax import decoding, drafters, sampling, testing
from specjax.decoding import verify
from specjax.drafters import contract
from specjax.state import DecodeState
from specjax.types import Draft, Drafter, Feedback, ModelOutput, Params, Proposal, Topology

module: Any = importlib.import_module("specjax.drafters.first_of")

TARGET, DRAFT = testing.tabular(0), testing.tabular(1)


def lookup_then_model() -> Draft:
    lookup = drafters.ngram(num_draft_tokens=4, min_match=2)
    made = drafters.first_of([lookup, drafters.model(DRAFT[0], num_draft_tokens=2)])
    return made._replace(params=((), DRAFT[1]))


def decode(draft: Draft, step_cost: Any = 0.0) -> DecodeState:
    """16 ragged rows, half of them greedy."""
    pair = Pair(*TARGET, draft.drafter, draft.params)
    inputs = right_pad(random_prompts(16, 4), 16)
    options = sampling.options(16, temperature=[0.0, 1.0] * 8)
    state = decoding.prefill(
        pair.target,
        pair.drafter,
        pair.params,
        inputs,
        max_new_tokens=[24] * 15 + [1],
        options=options,
        step_cost=step_cost,
        max_len=64,
    )
    return run(pair, verify.coupled, state)


@pytest.fixture(scope="module")
def drafted() -> DecodeState:
    return decode(lookup_then_model())


def assert_cache_is_text(state: DecodeState) -> None:
    """What the model has in its cache is the text, whoever's draft was accepted."""
    rows = state.rows
    cache = rows.drafter.parts[1]
    known = np.arange(rows.tokens.shape[1]) < np.asarray(cache.length)[:, None]
    wrong = np.flatnonzero((known & (np.asarray(cache.tokens) != np.asarray(rows.tokens))).any(axis=1))
    assert not len(wrong), f"the cache of row {wrong[0]} is not its text"


def test_text_is_plain_decodings(drafted: DecodeState):
    assert texts(drafted) == texts(decode(Draft(drafters.none(), ())))


@pytest.mark.slow
def test_both_parts_have_drafts_accepted(drafted: DecodeState):
    assert np.asarray(drafted.rows.stats.histogram)[:, 3:].sum() > 0, "no draft of the lookup was accepted"
    alone = decode(contract.check(drafters.ngram(num_draft_tokens=4, min_match=2)))
    assert np.asarray(drafted.rows.stats.accepted).sum() > 1.2 * np.asarray(alone.rows.stats.accepted).sum()


def test_a_model_keeps_up_with_what_the_lookup_had_accepted(drafted: DecodeState):
    assert_cache_is_text(drafted)


@pytest.mark.slow
def test_a_model_that_drafts_beside_the_lookup_is_noticed(monkeypatch: pytest.MonkeyPatch, catches: Any):
    context = module._context
    module._drafter.cache_clear()
    monkeypatch.setattr(
        module, "_context", lambda whole, part, asked: context(whole, part, jnp.ones_like(whole.max_draft, bool))
    )
    with catches("a later part drafts where an earlier one has", "cache is the text", "is not its text"):
        assert_cache_is_text(decode(lookup_then_model()))
    module._drafter.cache_clear()


def proposing(tokens: list[int], length: list[int], asked: list[Any], told: list[Any]) -> Drafter:
    """A drafter that always proposes the same, and notes for which rows it is asked and what it is told."""

    def propose(params: Any, state: Any, cache: Any, context: Any) -> Any:
        asked.append(np.asarray(context.max_draft).tolist())
        found = jnp.broadcast_to(jnp.array(tokens, jnp.int32), (len(length), len(tokens)))
        return Proposal(found, jnp.minimum(jnp.array(length, jnp.int32), context.max_draft), None), state, cache

    def update(params: Any, state: Any, feedback: Any) -> Any:
        told.append((np.asarray(feedback.context.max_draft).tolist(), feedback.output.logits.shape[1]))
        return state

    nothing: Any = lambda *_: ()  # noqa: E731
    return Drafter(nothing, propose, update, Topology.chain(len(tokens)))


def test_a_row_takes_the_first_draft_and_later_parts_are_asked_and_told_of_the_others():
    asked, told = ([[], [], []] for _ in range(2))
    parts = [
        proposing([1, 2, 3], [3, 0, 0, 2], asked[0], told[0]),
        proposing([5], [1, 1, 0, 1], asked[1], told[1]),
        proposing([7, 8], [2, 2, 2, 2], asked[2], told[2]),
    ]
    draft = drafters.first_of(parts)
    assert draft.drafter.topology == Topology.chain(3, (1, 2))
    context = context_of([[0]] * 4, 3, 9, max_draft=[3, 3, 3, 0])
    params = Params((), draft.params)
    proposal, state, _ = draft.drafter.propose(params, draft.drafter.init(4, 16), (), context)
    assert asked == [[[3, 3, 3, 0]], [[0, 1, 1, 0]], [[0, 0, 2, 0]]]
    assert np.asarray(proposal.length).tolist() == [3, 1, 2, 0]
    assert np.asarray(proposal.tokens)[:3, 0].tolist() == [1, 5, 7]
    count = jnp.array([2, 1, 3, 1], jnp.int32)
    output = ModelOutput(jnp.zeros((4, 4, 9)), jnp.zeros((4, 4, 0, 2)))
    feedback = Feedback(jnp.ones((4, 4), jnp.int32), count, 1 + count, output.features, output, context=context)
    draft.drafter.update(params, state, feedback)
    assert told == [[([3, 0, 0, 0], 4)], [([0, 1, 0, 0], 2)], [([0, 0, 2, 0], 3)]]


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (lambda: [drafters.ngram(), drafters.suffix(num_draft_tokens=4, depth=2)], "is not a chain without probes"),
        (lambda: [drafters.ngram(), drafters.mask_tokens(mask_token=1, num_draft_tokens=2)], "without probes"),
        (lambda: [drafters.none(), drafters.ngram()], "only one of them"),
    ],
)
def test_parts_that_make_no_sense_are_said(parts: Any, words: str):
    with pytest.raises(ValueError, match=words):
        drafters.first_of(parts())


@pytest.mark.slow
def test_it_keeps_a_drafters_contract():
    assert contract.check(lookup_then_model()).num_draft_tokens == 4
    testing.check_drafter(lookup_then_model(), TARGET)
