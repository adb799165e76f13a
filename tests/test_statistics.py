"""Means of ratios and their intervals."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specjax.experiments import statistics

positive = st.floats(0.01, 100)


def test_the_interval_covers_as_often_as_it_says(monkeypatch):
    """Thirteen categories of five prompts, as `benchmarks/speed.py` has them, of means and spreads of their own."""
    monkeypatch.setattr(statistics, "RESAMPLES", 500)
    rng = np.random.default_rng(0)
    means, spreads = rng.normal(0.2, 0.4, 13), rng.uniform(0.05, 0.4, 13)
    trials, covered = 2000, 0
    for trial in range(trials):
        groups = np.exp(means[:, None] + spreads[:, None] * rng.normal(size=(13, 5)))
        low, high = statistics.bootstrap_interval(groups.tolist(), seed=trial) or (0.0, 0.0)
        covered += low <= np.exp(means.mean()) <= high
    # Drawing n of n in the place of n - 1 would cover 90 %.
    assert 0.915 <= covered / trials <= 0.96


@given(st.lists(st.lists(positive, min_size=2, max_size=6), min_size=1, max_size=5), positive)
@settings(max_examples=20, deadline=None)
def test_the_interval_moves_with_the_unit_and_lies_within_the_values(groups, unit):
    low, high = statistics.bootstrap_interval(groups) or (0.0, 0.0)
    scaled = statistics.bootstrap_interval([[unit * value for value in group] for group in groups])
    assert scaled == pytest.approx((unit * low, unit * high))
    values = [value for group in groups for value in group]
    assert min(values) * (1 - 1e-9) <= low <= high <= max(values) * (1 + 1e-9)


def test_one_prompt_of_a_category_has_no_interval():
    assert statistics.bootstrap_interval([[1.0, 2.0], [3.0]]) is None
    assert statistics.bootstrap_interval([]) is None
