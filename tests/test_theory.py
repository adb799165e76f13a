"""The formulas give the numbers that Leviathan et al. 2022 print."""

import doctest
import math

import numpy as np
import pytest

from specjax import theory


@pytest.mark.parametrize(
    ("alpha", "k", "operations", "speed"),
    [
        (0.6, 2, 1.53, 1.96),
        (0.7, 3, 1.58, 2.53),
        (0.8, 2, 1.23, 2.44),
        (0.8, 5, 1.63, 3.69),
        (0.9, 2, 1.11, 2.71),
        (0.9, 10, 1.60, 6.86),
    ],
)
def test_table_1(alpha: float, k: int, operations: float, speed: float):
    assert round(theory.operations_factor(alpha, k, 0.0), 2) == operations
    assert round(theory.walltime_factor(alpha, k, 0.0), 2) == speed


@pytest.mark.parametrize(
    ("k", "alpha", "c", "printed"),
    [
        (7, 0.75, 0.02, 3.2),
        (7, 0.80, 0.04, 3.3),
        (7, 0.82, 0.11, 2.5),
        (7, 0.62, 0.02, 2.3),
        (5, 0.68, 0.04, 2.4),
        (3, 0.71, 0.11, 2.0),
        (5, 0.65, 0.02, 2.4),
        (5, 0.73, 0.04, 2.6),
        (3, 0.74, 0.11, 2.0),
        (5, 0.53, 0.02, 1.9),
        (3, 0.55, 0.04, 1.8),
        (3, 0.56, 0.11, 1.6),
    ],
)
def test_predictions_of_tables_2_and_4(k: int, alpha: float, c: float, printed: float):
    # Printed from unrounded alpha and c: 0.71 and 0.56 at c = 0.11 come out 0.06 lower from the rounded ones.
    assert abs(theory.walltime_factor(alpha, k, c) - printed) < 0.07


def test_a_bigram_draft_gives_1_25():
    assert round(theory.walltime_factor(0.2, 3, 0.0), 2) == 1.25


@pytest.mark.parametrize(
    ("alphas", "factors"),
    [
        # Table 5, EnDe with T5-small at temperature 1, lenience 1, .5, .3, .1. (The paper's text states 2.5, 3.1, 3.6
        # and 5, which Theorem 3.8 does not give for any K.)
        ((0.62, 0.71, 0.76, 0.84), (2.33, 2.94, 3.45, 4.79)),
        # The same at temperature 0.
        ((0.75, 0.75, 0.80, 0.87), (3.33, 3.33, 4.00, 5.63)),
    ],
)
def test_the_best_factors_of_the_lenience_experiments(alphas: tuple[float, ...], factors: tuple[float, ...]):
    c = 0.015
    for alpha, factor in zip(alphas, factors, strict=True):
        k = theory.best_num_draft_tokens(alpha, c)
        assert theory.walltime_factor(alpha, k, c) == pytest.approx(factor, abs=0.006)


def test_expected_tokens_is_the_mean_of_the_process_it_describes():
    for alpha in (0.0, 0.3, 0.9, 1.0):
        for k in (0, 1, 4):
            runs = [alpha**n * (1 - alpha) for n in range(k)] + [alpha**k]
            assert theory.expected_tokens(alpha, k) == pytest.approx(np.dot(runs, np.arange(1, k + 2)))
    assert theory.expected_tokens(0.6, 400) == pytest.approx(theory.oracle_tokens(0.6))
    assert theory.oracle_tokens(1.0) == math.inf


@pytest.mark.parametrize("alpha", [0.05, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("c", [0.0, 0.04, 0.4])
def test_a_draft_pays_exactly_where_some_k_beats_plain_decoding(alpha: float, c: float):
    best = theory.best_num_draft_tokens(alpha, c)
    factors = [theory.walltime_factor(alpha, k, c) for k in range(65)]
    assert factors[best] == max(factors)
    assert (best > 0) == theory.pays(alpha, c)
    if theory.pays(alpha, c):
        assert theory.guaranteed_factor(alpha, c) == factors[1]
        assert factors[best] >= theory.guaranteed_factor(alpha, c) > 1


def test_a_dear_score_makes_drafts_shorter():
    free = theory.best_num_draft_tokens(0.8, 0.05)
    dear = theory.best_num_draft_tokens(0.8, 0.05, lambda k: 1 + 0.2 * k)
    assert 0 < dear < free
    assert theory.best_num_draft_tokens(0.8, 0.05, lambda k: 9.0) == 0


@pytest.mark.parametrize(("alpha", "k", "named"), [(1.2, 2, "alpha=1.2"), (0.5, -1, "num_draft_tokens=-1")])
def test_impossible_arguments_are_named(alpha: float, k: int, named: str):
    with pytest.raises(ValueError, match=named):
        theory.expected_tokens(alpha, k)


def test_doctests():
    result = doctest.testmod(theory)
    assert result.attempted >= 5
    assert result.failed == 0
