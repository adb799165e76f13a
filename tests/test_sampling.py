"""Probabilities without sorting are those that sorting gives, ours in numpy and transformers' in torch."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    EpsilonLogitsWarper,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from specjax import sampling, testing
from specjax.types import SamplingOptions


@functools.cache
def _compiled():
    return jax.jit(sampling.warp.warp)


def probabilities(logits: np.ndarray, **options) -> np.ndarray:
    """Of one row: `[V] -> [V]`."""
    rows = sampling.options(1, **options)
    return np.asarray(_compiled()(jnp.asarray(logits, jnp.float32)[None, None], rows))[0, 0]


# Multiples of 1/8, so that ties abound and float32 keeps other logits apart.
LOGIT = st.one_of(st.integers(-40, 40).map(lambda i: i / 8), st.just(-np.inf), st.sampled_from([0.0, 1.0]))
LOGITS = st.sampled_from([1, 2, 5, 9]).flatmap(lambda size: st.lists(LOGIT, min_size=size, max_size=size))
OPTIONS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.3, 0.7, 1.0, 2.0]),
        "top_k": st.sampled_from([0, 1, 2, 3, 20]),
        "top_p": st.sampled_from([1.0, 0.95, 0.8, 0.5, 0.1]),
        "min_p": st.sampled_from([0.0, 0.02, 0.3, 1.0]),
        "typical_p": st.sampled_from([1.0, 0.9, 0.5, 0.1]),
        "epsilon_cutoff": st.sampled_from([0.0, 0.01, 0.2, 0.9]),
    }
)


def near_a_cut(logits: np.ndarray, options: dict) -> bool:
    """Whether float32 and float64 may disagree about a token at a border: a hair to either side decides otherwise."""
    wanted = testing.distribution(logits, **options) > 0
    rng = np.random.default_rng(0)
    for name in ("top_p", "min_p", "typical_p", "epsilon_cutoff"):
        for hair in (1 - 3e-5, 1 + 3e-5):
            moved: dict[str, Any] = options | {name: min(options[name] * hair, 1.0)}
            if ((testing.distribution(logits, **moved) > 0) != wanted).any():
                return True
    # Typical sampling orders tokens by the distance of two sums, which may tie but for rounding.
    shaken = [logits + 1e-5 * rng.standard_normal(len(logits)) for _ in range(3)]
    return options["typical_p"] < 1 and any(((testing.distribution(x, **options) > 0) != wanted).any() for x in shaken)


def assert_as_sorted(logits: list[float], options: dict) -> None:
    values = np.asarray(logits)
    assume(np.isfinite(values).any())
    assume(not near_a_cut(values, options))
    got = probabilities(values, **options)
    wanted = testing.distribution(values, **options)
    assert ((got > 0) == (wanted > 1e-30)).all()
    np.testing.assert_allclose(got, wanted, atol=2e-6)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(LOGITS, OPTIONS)
def test_probabilities_equal_a_sorting_implementation(logits: list[float], options: dict):
    assert_as_sorted(logits, options)


@pytest.mark.slow
@settings(max_examples=600, deadline=None, derandomize=True)
@given(LOGITS, OPTIONS)
def test_more_probabilities_equal_a_sorting_implementation(logits: list[float], options: dict):
    assert_as_sorted(logits, options)


@pytest.mark.parametrize("size", [7, 1000])
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.6},
        {"temperature": 1.0, "top_k": 3},
        {"temperature": 1.7, "top_p": 0.8},
        {"temperature": 0.5, "top_p": 0.9},
        {"temperature": 1.5, "min_p": 0.1},
        {"temperature": 0.7, "top_k": 40, "top_p": 0.95, "min_p": 0.02},
        {"temperature": 3.0, "top_k": 5, "top_p": 0.6},
        {"temperature": 1.0, "typical_p": 0.7},
        {"temperature": 0.8, "top_k": 30, "typical_p": 0.3},
        {"temperature": 1.0, "epsilon_cutoff": 0.01},
        {"temperature": 2.0, "epsilon_cutoff": 0.9},
        {"temperature": 0.9, "top_p": 0.95, "typical_p": 0.9, "epsilon_cutoff": 3e-3},
    ],
)
def test_probabilities_equal_those_of_transformers(options: dict, size: int):
    rng = np.random.default_rng(0)
    for _ in range(20):
        logits = rng.standard_normal(size) * 3
        scores: Any = torch.tensor(logits)[None]
        ids: Any = torch.zeros((1, 1), dtype=torch.long)
        for name, warper in (
            ("temperature", TemperatureLogitsWarper),
            ("top_k", TopKLogitsWarper),
            ("top_p", TopPLogitsWarper),
            ("min_p", MinPLogitsWarper),
            ("typical_p", TypicalLogitsWarper),
            ("epsilon_cutoff", EpsilonLogitsWarper),
        ):
            if name in options:
                scores = warper(options[name])(ids, scores)
        wanted = torch.softmax(scores, -1)[0].numpy()
        got = probabilities(logits, **options)
        assert ((got > 0) == (wanted > 0)).all()
        np.testing.assert_allclose(got, wanted, atol=1e-6)
        np.testing.assert_allclose(testing.distribution(logits, **options), wanted, atol=1e-9)


def test_near_equal_logits_are_told_apart_by_top_k():
    logits = np.float32(1.0) + np.arange(8, dtype=np.float32) * np.float32(2**-22)
    kept = probabilities(logits, temperature=1.0, top_k=3) > 0
    np.testing.assert_array_equal(kept, np.arange(8) >= 5)


@pytest.mark.parametrize("temperature", [1e-3, 1.0, 1e5, 1e6])
def test_top_k_ranks_logits_whatever_the_temperature_rounds(temperature: float):
    for logits in (
        np.array([2.0, 1.0, 3.0, 2.5]),
        np.array([-1e30, 1e-30, -1e-30, 0.0]),
        np.array([0.0, -0.0, -1, -2]),
    ):
        order = np.argsort(-logits, kind="stable")
        for k in (1, 2, 3):
            wanted = np.isin(np.arange(4), np.flatnonzero(logits >= logits[order[k - 1]]))
            got = probabilities(logits, temperature=temperature, top_k=k)
            assert (got[~wanted] == 0).all()
            if temperature > 1:
                np.testing.assert_allclose(got[wanted].sum(), 1, atol=1e-6)


@pytest.mark.parametrize("tiny", [1e-45, 1e-300, 5e-324, 1e-39])
@pytest.mark.parametrize("option", ["top_p", "typical_p", "temperature", "min_p", "epsilon_cutoff", "presence_penalty"])
def test_numbers_that_float32_rounds_to_nothing_keep_their_meaning(option: str, tiny: float):
    logits = np.array([0.5, 2.0, 1.0])
    got = probabilities(logits, **{"temperature": 1.0, option: tiny})
    np.testing.assert_allclose(got.sum(), 1, atol=1e-6)
    if option in ("top_p", "temperature"):
        np.testing.assert_array_equal(got > 0, [False, True, False])


def test_uniform_numbers_are_finer_than_23_bits_and_below_1():
    draws = np.asarray(sampling.uniform(jax.random.key(0), (1 << 22,)), np.float64)
    assert draws.min() > 0
    assert draws.max() < 1
    # `jax.random.uniform` has no numbers between 0 and 2^-23.
    assert (draws * 2**23 % 1 != 0).mean() > 0.4
    np.testing.assert_allclose(np.histogram(draws, 16, (0, 1))[0] / draws.size, 1 / 16, atol=1e-3)


def test_ties_at_a_cut_are_all_kept():
    logits = np.array([1.0, 1.0, 1.0, 0.0])
    for options in ({"top_k": 1}, {"top_k": 2}, {"top_p": 0.1}):
        np.testing.assert_allclose(probabilities(logits, temperature=1.0, **options), [1 / 3] * 3 + [0], atol=1e-7)


@pytest.mark.parametrize("k", [1, 3, 6])
def test_the_largest_are_those_of_top_k_and_the_first_of_equals(k: int):
    x = jnp.asarray([[[3.0, -1.0, 3.0, 2.0, -jnp.inf, 3.0, 2.0]], [[-jnp.inf] * 6 + [0.5]]])
    (values, indices), (wanted, at) = sampling.warp.top(x, k), jax.lax.top_k(x, k)
    np.testing.assert_array_equal(values, wanted)
    finite = np.asarray(wanted) > -np.inf
    np.testing.assert_array_equal(np.asarray(indices)[finite], np.asarray(at)[finite])


def test_greedy_is_one_hot_at_the_first_of_equals():
    np.testing.assert_array_equal(probabilities(np.array([0.0, 2.0, 2.0, -np.inf]), temperature=0.0), [0, 1, 0, 0])


def test_a_one_hot_distribution_survives_every_option():
    logits = np.array([-np.inf, 3.0, -np.inf])
    options = {"temperature": 0.5, "top_k": 3, "top_p": 0.5, "min_p": 0.5}
    np.testing.assert_array_equal(probabilities(logits, **options), [0, 1, 0])


def test_a_large_vocabulary_is_cut_exactly():
    logits = np.random.default_rng(1).standard_normal(50_000).astype(np.float32)
    for k in (1, 17, 49_999):
        kept = probabilities(logits, temperature=1.0, top_k=k) > 0
        assert set(np.flatnonzero(kept)) == set(np.argsort(logits)[-k:])


@pytest.mark.parametrize(
    ("bad", "temperature"),
    [
        ([0.0, np.nan, 1.0], 0.0),
        ([0.0, np.nan, 1.0], 1.0),
        ([np.nan] * 3, 0.0),
        ([np.nan] * 3, 1.0),
        ([0.0, 1.0, np.inf], 1.0),
        ([-np.inf] * 3, 1.0),
        ([-np.inf] * 3, 0.0),
    ],
)
def test_logits_that_are_not_numbers_never_become_probabilities(bad: list[float], temperature: float):
    cuts = {"top_k": 2, "top_p": 0.5, "min_p": 0.1, "typical_p": 0.5, "epsilon_cutoff": 0.1}
    for options in ({}, cuts):
        assert np.isnan(probabilities(np.array(bad), temperature=temperature, **options)).any()


def test_rows_of_a_batch_do_not_influence_each_other():
    logits = jnp.asarray(np.random.default_rng(2).standard_normal((6, 3, 11)) * 2, jnp.float32)
    options: dict[str, Any] = {
        "temperature": [0.0, 1.0, 0.7, 1.0, 1.0, 0.5],
        "top_k": [0, 0, 3, 0, 0, 4],
        "top_p": [1.0, 1.0, 1.0, 0.8, 1.0, 0.9],
        "min_p": [0.0, 0.0, 0.0, 0.0, 0.2, 0.1],
        "typical_p": [1.0, 0.8, 1.0, 1.0, 1.0, 0.9],
        "epsilon_cutoff": [0.0, 0.0, 0.1, 0.0, 0.0, 0.05],
    }
    together = np.asarray(_compiled()(logits, sampling.options(6, **options)))
    for row in range(6):
        alone = sampling.options(1, **{name: values[row] for name, values in options.items()})
        np.testing.assert_array_equal(np.asarray(_compiled()(logits[row : row + 1], alone))[0], together[row])
        for position in range(3):
            wanted = testing.distribution(
                np.asarray(logits)[row, position], **{name: values[row] for name, values in options.items()}
            )
            np.testing.assert_allclose(together[row, position], wanted, atol=1e-6)


def test_sample_draws_from_the_distribution_and_greedy_rows_take_the_argmax():
    rows = 100_000
    probs = np.tile(np.array([0.5, 0.0, 0.3, 0.2], np.float32), (rows, 1))
    temperature = [0.0 if row % 10 == 0 else 1.0 for row in range(rows)]
    probs[::10] = np.array([0, 0, 1, 0], np.float32)
    options = sampling.options(rows, temperature=temperature)
    keys = jax.vmap(jax.random.key)(jnp.arange(rows))
    drawn = np.asarray(jax.jit(sampling.sample)(keys, jnp.asarray(probs), options))
    assert (drawn[::10] == 2).all()
    sampled = np.delete(drawn, np.s_[::10])
    assert testing.g_test(np.bincount(sampled, minlength=4), np.array([0.5, 0.0, 0.3, 0.2])) > 1e-4


def test_options_are_spread_over_the_rows():
    options = sampling.options(3, temperature=[0.0, 0.5, 1.0], top_k=4)
    assert isinstance(options, SamplingOptions)
    assert options.top_k.tolist() == [4, 4, 4]
    assert options.temperature.tolist() == [0.0, 0.5, 1.0]


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("temperature", -0.1, r"temperature=-0\.1 .* \[0"),
        ("temperature", float("nan"), r"temperature=nan"),
        ("top_p", 0.0, r"top_p=0\.0 .* \(0"),
        ("top_p", 1.5, r"top_p=1\.5 .* 1"),
        ("min_p", 2.0, r"min_p=2\.0"),
        ("top_k", -1, r"top_k=-1"),
        ("top_k", [1, 2, 2**40], r"top_k=.* is outside"),
        ("typical_p", 0.0, r"typical_p=0\.0"),
        ("epsilon_cutoff", 2.0, r"epsilon_cutoff=2\.0"),
        ("top_p", [0.5, 0.5], r"top_p has shape \(2,\): give one value, or one for each of 3 rows"),
    ],
)
def test_bad_options_are_named_with_their_value_and_bounds(name: str, value, remedy: str):
    with pytest.raises(ValueError, match=remedy):
        sampling.options(3, **{name: value})


def test_options_that_do_not_exist_are_refused_with_those_that_do():
    with pytest.raises(TypeError, match=r"No option top_q: there are temperature, .*repetition_penalty"):
        sampling.options(1, top_q=0.5)


def test_g_test_accepts_the_truth_and_nothing_impossible():
    probs = np.array([0.5, 0.3, 0.2, 0.0])
    counts = np.random.default_rng(0).multinomial(10_000, probs)
    assert testing.g_test(counts, probs) > 1e-3
    assert testing.g_test(counts[[1, 0, 2, 3]], probs) < 1e-12
    assert testing.g_test(counts + np.array([0, 0, 0, 1]), probs) == 0.0
    with pytest.raises(ValueError, match="sum to"):
        testing.g_test(counts, probs * 2)


def test_g_test_is_uniform_under_the_truth():
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.ones(40))
    values = np.array([testing.g_test(rng.multinomial(20_000, probs), probs) for _ in range(500)])
    assert 0.4 < values.mean() < 0.6
    assert (values < 0.05).mean() < 0.1


@pytest.mark.parametrize(("trials", "outcomes"), [(8_000, 256), (102_000, 64)])
def test_errors_of_the_stated_size_are_seen_and_much_smaller_ones_are_not(trials: int, outcomes: int):
    rng = np.random.default_rng(1)
    probs = rng.dirichlet(np.full(outcomes, 5.0))
    # The hardest error to see: all outcomes off by the same factor.
    sign = np.where(np.cumsum(probs[np.argsort(probs)]) < 0.5, 1.0, -1.0)[np.argsort(np.argsort(probs))]

    def caught(distance: float) -> float:
        wrong = np.maximum(probs * (1 + 2 * distance * sign), 0)
        wrong /= wrong.sum()
        return float(np.mean([testing.g_test(rng.multinomial(trials, wrong), probs) < 1e-5 for _ in range(100)]))

    error = testing.smallest_error(trials, outcomes)
    assert caught(1.1 * error) > 0.95
    assert caught(0.2 * error) < 0.05
