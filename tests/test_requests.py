"""What a call may ask for: values of the wrong kind or size are named, and equal meanings are equal."""

import warnings
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import specjax
from specjax import decoding, drafters, limits, testing
from specjax.decoding import verify
from specjax.types import StepKeys

PROMPTS = [[3, 1, 4, 1, 5], [9, 2]]


@pytest.fixture(scope="module")
def target() -> specjax.Pretrained:
    model, params = testing.tiny_decoder(0)
    return specjax.Pretrained(model, params, None, None)  # pyright: ignore[reportArgumentType]


def generate(target: specjax.Pretrained, **options: Any) -> specjax.Generation:
    return specjax.generate(target, PROMPTS, **{"max_new_tokens": 4, "stop_tokens": (), **options})


@pytest.mark.parametrize("seed", [3, np.int64(3), np.uint8(3), [3, 4], np.array([3, 4]), (np.int32(3), 4), True + 2])
def test_equal_seeds_of_any_kind_give_equal_text(target: specjax.Pretrained, seed: Any):
    assert generate(target, seed=seed, temperature=1.0).tokens == generate(target, seed=3, temperature=1.0).tokens


@pytest.mark.parametrize("seed", [-1, 2**32, 2**70, 2**32 - 1, [0, -5], np.array([1, 2**40]), [1], [1, 2, 3]])
def test_seeds_that_are_none_are_refused_with_the_range(target: specjax.Pretrained, seed: Any):
    with pytest.raises(ValueError, match=r"outside \[0, 2\^32\)|seeds for 2 sequences"):
        generate(target, seed=seed)


@pytest.mark.parametrize("seed", [2.5, "7", None, [1, 2.0], np.float32(3), [None, 1]])
def test_seeds_of_another_type_are_refused(target: specjax.Pretrained, seed: Any):
    with pytest.raises(TypeError, match="whole number"):
        generate(target, seed=seed)


def test_the_largest_seed_is_one(target: specjax.Pretrained):
    assert decoding.spread_seeds(2**32 - 2, 2) == [2**32 - 2, 2**32 - 1]
    assert len(generate(target, seed=[2**32 - 1, 0]).tokens) == 2


@pytest.mark.parametrize("budget", [2.7, [1, 2.5], "3", None, np.float64(4)])
def test_budgets_that_are_no_whole_numbers_are_refused(target: specjax.Pretrained, budget: Any):
    with pytest.raises(TypeError, match="max_new_tokens="):
        generate(target, max_new_tokens=budget)


@pytest.mark.parametrize("budget", [-1, 2**24 + 1, 2**31, 2**63, 10**30, [1, 2**33]])
def test_budgets_out_of_range_are_refused_before_anything_is_allocated(target: specjax.Pretrained, budget: Any):
    with pytest.raises(ValueError, match="max_new_tokens="):
        generate(target, max_new_tokens=budget)


@pytest.mark.parametrize("k", [-1, limits.MAX_DRAFT_TOKENS + 1, 10**6, 2**40])
@pytest.mark.parametrize("family", ["none", "ngram", "model", "table", "retrieval"])
def test_draft_lengths_out_of_range_are_refused(family: str, k: int):
    sources = {
        "model": lambda: testing.tiny_decoder(0)[0],
        "table": lambda: drafters.count_ngrams([[1, 2, 3]], vocab_size=4),
        "retrieval": lambda: drafters.index_corpus([[1, 2, 3]], vocab_size=4),
    }
    source = [sources[family]()] if family in sources else []
    with pytest.raises(ValueError, match=f"num_draft_tokens={k}"):
        getattr(drafters, family)(*source, num_draft_tokens=k)


def test_a_stream_of_nothing_yields_what_generate_returns(target: specjax.Pretrained):
    (only,) = specjax.stream(target, PROMPTS, max_new_tokens=0, stop_tokens=())
    assert only == generate(target, max_new_tokens=0)
    assert only.tokens == [[], []]
    assert only.finish_reason == ["length", "length"]


# Rules and drafters by name.


def test_a_rule_may_be_given_by_name(target: specjax.Pretrained):
    options: dict[str, Any] = {"drafter": drafters.ngram(num_draft_tokens=2), "temperature": 1.0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        by_name = generate(target, verify="lenient:0.3", **options)
        assert by_name.tokens == generate(target, verify=verify.lenient(0.3), **options).tokens


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"verify": verify.lenient}, "verify.lenient is not called"),
        ({"verify": verify.top_k}, "verify.top_k is not called"),
        ({"verify": "lenyent:0.3"}, "'lenyent:0.3' is not known"),
        ({"verify": "lenient:7"}, "lenience=7"),
        ({"verify": 3}, "verify=3 is not a rule"),
        ({"drafter": drafters.ngram}, "drafters.ngram is not called"),
        ({"drafter": drafters.model}, "drafters.model is not called"),
        ({"drafter": "ngram"}, "drafter is a str"),
    ],
)
def test_what_is_no_rule_or_drafter_is_told_what_to_write(target: specjax.Pretrained, options: Any, message: str):
    with pytest.raises((TypeError, ValueError), match=message):
        generate(target, **options)


def _accept_nothing(keys: StepKeys, target_probs: Any, proposal: Any) -> Any:
    return verify.observe.function(keys, target_probs, proposal)


@pytest.mark.parametrize("temperature", [0.0, 1.0, [0.0, 1.0]])
def test_a_rule_that_does_not_say_what_it_does_at_temperature_0_warns(target: specjax.Pretrained, temperature: Any):
    own = verify.Rule(_accept_nothing, "own", exact=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        generate(target, verify=own, temperature=temperature)
    said = [str(w.message) for w in caught if "at_zero" in str(w.message)]
    assert len(said) == (temperature != 1.0)


def test_rules_that_say_what_they_do_at_temperature_0_do_not_warn():
    assert verify.replaced_at_zero(verify.Rule(_accept_nothing, "own", exact=True))
    built_in = [rule for rule in verify.RULES.values() if isinstance(rule, verify.Rule)]
    for rule in [*built_in, verify.lenient(0.3), verify.Rule(_accept_nothing, "own", True, at_zero=_accept_nothing)]:
        assert not verify.replaced_at_zero(rule)


def test_a_wrong_drafter_is_named_where_the_step_is_traced(target: specjax.Pretrained):
    sound = drafters.ngram(num_draft_tokens=2)

    def propose(params: Any, state: Any, cache: Any, context: Any) -> Any:
        proposal, *rest = sound.propose(params, state, cache, context)
        return proposal._replace(tokens=proposal.tokens[:, :1]), *rest

    with pytest.raises(ValueError, match=r"The drafter is wrong: propose .* tokens of shape \[2, 1\]"):
        generate(target, drafter=sound._replace(propose=propose))


def test_the_memory_of_a_wrong_drafter_is_checked_too(target: specjax.Pretrained):
    sound = drafters.none()

    def update(params: Any, state: Any, feedback: Any) -> Any:
        return jnp.zeros(3)

    with pytest.raises(TypeError, match="changes the structure of the state"):
        generate(target, drafter=sound._replace(update=update))
