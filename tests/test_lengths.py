"""Drafts of several lengths, each with a program of its own: the text is the same, and steps are narrow."""

from typing import Any

import jax
import numpy as np
import pytest
from helpers import usual

from specjax import decoding, drafters, metrics, sampling, testing
from specjax.decoding import verify
from specjax.drafters import contract
from specjax.state import DecodeState
from specjax.types import Drafter, Params, Topology

K = 5
PROMPTS = [[1, 2, 3, 1, 2, 3, 1, 2], [5, 6, 7], [4, 4, 4, 4, 4]]


@pytest.fixture(scope="module")
def model():
    return testing.tiny_decoder(0)


COSTS = [1.1, 1.2, 1.9, 2.0, 2.1]


def decode(model, drafter: Drafter, draft_params=(), *, step_cost: Any = 0.0) -> DecodeState:
    target, params = model
    both = Params(params, draft_params)
    inputs = decoding.pad_prompts(PROMPTS)
    options = sampling.options(len(PROMPTS), temperature=[0.0, 1.0, 0.7])
    state = decoding.prefill(
        target, drafter, both, inputs, max_new_tokens=[20, 9, 14], options=options, step_cost=step_cost, max_len=64
    )
    return decoding.generate(target, drafter, verify.coupled, both, state)


def texts(state) -> list[list[int]]:
    rows = state.rows
    return [row[:n].tolist() for row, n in zip(np.asarray(rows.tokens), np.asarray(rows.length), strict=True)]


def made(kind: str, model, lengths: tuple[int, ...]) -> tuple[Drafter, object]:
    target, params = model
    if kind == "model":
        return drafters.model(target, num_draft_tokens=K, lengths=lengths), params
    return getattr(drafters, kind)(num_draft_tokens=K, lengths=lengths), ()


@pytest.fixture(scope="module")
def plain(model) -> list[list[int]]:
    return texts(decode(model, drafters.none()))


CELLS = [(kind, lengths) for kind in ("ngram", "model", "suffix") for lengths in ((), (2,), (1, 3))]


@pytest.mark.parametrize(("kind", "lengths"), usual(CELLS, ("model", (1, 3))))
def test_the_text_does_not_depend_on_the_lengths(kind: str, lengths: tuple[int, ...], model, plain: list[list[int]]):
    drafter, params = made(kind, model, lengths)
    state = decode(model, drafter, params, step_cost=COSTS)
    assert texts(state) == plain
    by_length = np.asarray(state.rows.stats.steps_by_length)
    assert by_length.shape == (len(PROMPTS), len(lengths) + 1)
    assert (by_length.sum(axis=1) == np.asarray(state.rows.stats.draft_steps)).all()


def test_a_step_is_scored_at_the_shortest_length_that_holds_all_drafts(model):
    # A draft equal to the target has all tokens accepted; rows with room for few draft few.
    drafter, params = made("model", model, (1, 3))
    state = decode(model, drafter, params)
    steps = np.asarray(state.rows.stats.steps_by_length)
    assert steps[0, -1] >= 2  # 20 tokens: steps of 6.
    assert steps[:, :2].sum() > 0  # The ends of the texts.
    assert (np.asarray(state.rows.stats.accepted) == np.asarray(state.rows.stats.proposed)).all()


def test_only_as_many_tokens_are_drafted_as_rows_may_use():
    """The calls of the draft, counted on the device; programs that call back are compiled in every run: small ones."""
    target, params = testing.tabular(0)
    calls = []

    def apply(params, block, cache):
        jax.debug.callback(lambda: calls.append(1))
        return target.apply(params, block, cache)

    counted = target._replace(apply=apply)
    for lengths, most in (((), K), ((2,), 2)):
        drafter = drafters.model(counted, num_draft_tokens=K, lengths=lengths)
        inputs = decoding.pad_prompts([[1, 2, 3]])
        state = decoding.prefill(target, drafter, Params(params, params), inputs, max_new_tokens=3, max_len=64)
        jax.effects_barrier()
        calls.clear()
        decoding.advance(target, drafter, verify.greedy, Params(params, params), state, np.int32(1))
        jax.effects_barrier()
        assert len(calls) == most, lengths


def test_measured_costs_and_what_they_account_for():
    costs = metrics.Costs(2.0, 4.0, 1.0, 4, ((1, 0.2, 2.0), (3, 0.4, 3.0)))
    assert costs.by_length == pytest.approx((1.1, 1.7, 2.5))
    assert costs.step_costs == pytest.approx((1.1, 1.7, 1.7, 2.5))
    summary = metrics.Summary(20, 12, 9, [4, 3, 2], 0.5, 2.0, [], [])
    assert costs.spent(summary) == pytest.approx(3 + 4 * 1.1 + 3 * 1.7 + 2 * 2.5)
    assert costs.accounted_speedup(summary) == pytest.approx(20 / costs.spent(summary))


@pytest.mark.slow
def test_costs_are_measured_for_each_length(model):
    target, params = model
    drafter, draft_params = made("model", model, (2,))
    both = Params(params, draft_params)
    state = decoding.prefill(target, drafter, both, decoding.pad_prompts(PROMPTS), max_new_tokens=9, max_len=64)
    costs = metrics.measure_costs(target, drafter, both, state, calls=1, repeats=1)
    assert [length for length, *_ in costs.shorter] == [2]
    assert len(costs.step_costs) == K
    assert min(costs.by_length) > 0


@pytest.mark.parametrize(
    "lengths", [(K,), (0,), (3, 2), (2, 2)], ids=["as long as K", "nothing", "not rising", "one twice"]
)
def test_lengths_that_make_no_sense_are_refused(lengths):
    with pytest.raises(ValueError, match="rising numbers of draft tokens below K=5"):
        contract.check(drafters.ngram(num_draft_tokens=K)._replace(topology=Topology.chain(K, lengths)))


def test_trees_have_no_lengths(model):
    with pytest.raises(ValueError, match="leave out num_draft_tokens, lengths and min_confidence"):
        drafters.model(model[0], topology=(2, 1), lengths=(1,))
    with pytest.raises(ValueError, match="for chains without probes"):
        contract.check(drafters.ngram(num_draft_tokens=4, depth=2, lengths=(1,)))


@pytest.mark.parametrize("step_cost", [[1.0], [1.0, 2.0, float("nan")], -1.0])
def test_wrong_costs_are_refused(step_cost, model):
    target, params = model
    with pytest.raises(ValueError, match="step_cost="):
        decoding.prefill(
            target,
            drafters.ngram(num_draft_tokens=3),
            Params(params, ()),
            decoding.pad_prompts(PROMPTS),
            max_new_tokens=4,
            step_cost=step_cost,
        )
