"""When a measured speedup is believed, on synthetic timings."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specjax.experiments import noise
from specjax.experiments.noise import GAIN, LOSS, NOISE, UNEXPLAINED, UNKNOWN, Timings


def batches(seed: int, speedup: float, spread: float, repeats: int, prompts: int) -> list[Timings]:
    """Timings of texts of several lengths; both sides scatter by the same share."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(prompts):
        tokens = int(rng.integers(20, 200))
        plain, ours = np.exp(spread * rng.normal(size=(2, repeats))) * tokens * [[0.01], [0.01 / speedup]]
        found.append(Timings(plain.tolist(), ours.tolist(), tokens))
    return found


def judge(some: list[Timings], run: list[Timings], explained: float) -> dict:
    measured = sum(np.median(b.plain) for b in some) / sum(np.median(b.speculative) for b in some)
    return noise.judge(float(measured), explained, some, noise.scatter(run), check_size=True)


def wrong(speedup: float, repeats: int, prompts: int, single: bool, trials: int = 150) -> float:
    """How often the interval misses the true speedup."""
    missed = 0
    for seed in range(trials):
        run = batches(seed, speedup, 0.1, repeats, prompts)
        found = judge(run[:1] if single else run, run, speedup)
        missed += not found["speedup_low"] <= speedup <= found["speedup_high"]
    return missed / trials


@pytest.mark.parametrize(("repeats", "prompts"), [(1, 6), (2, 1), (2, 6), (3, 1), (3, 6), (5, 2)])
@pytest.mark.parametrize("single", [True, False])
def test_the_interval_covers_the_true_speedup(repeats, prompts, single):
    """Five times in a hundred it does not; medians of three are taken for a little less sure than they are."""
    assert 0 < wrong(1.0, repeats, prompts, single) <= 0.1


@pytest.mark.parametrize("spread", [0.01, 0.03, 0.1, 0.3])
@pytest.mark.parametrize("repeats", [1, 2, 3])
def test_noise_is_seldom_a_gain_or_a_loss(spread, repeats):
    """Nothing was gained, and the calls are just on the wrong side: the spread alone has to say so."""
    verdicts = []
    for seed in range(20):
        run = batches(seed, 1.0, spread, repeats, 6)
        verdicts += [judge([one], run, explained)["verdict"] for one in run for explained in (0.99, 1.01)]
    assert sum(verdict in (GAIN, LOSS) for verdict in verdicts) <= 0.05 * len(verdicts)


@pytest.mark.parametrize(("speedup", "verdict"), [(1.3, GAIN), (3.0, GAIN), (0.75, LOSS), (0.4, LOSS)])
@pytest.mark.parametrize("repeats", [1, 2, 3])
def test_what_is_beyond_the_noise_is_seen(speedup, verdict, repeats):
    for seed in range(10):
        run = batches(seed, speedup, 0.02, repeats, 6)
        assert {judge(some, run, speedup)["verdict"] for some in ([run[0]], run)} == {verdict}
        # The calls say the contrary.
        assert judge(run, run, 1 / speedup)["verdict"] == UNEXPLAINED


seconds = st.lists(st.floats(1e-4, 1e3), min_size=1, max_size=4)
timings = st.builds(
    lambda pairs, tokens: Timings([a for a, _ in pairs], [b for _, b in pairs], tokens),
    st.lists(st.tuples(st.floats(1e-4, 1e3), st.floats(1e-4, 1e3)), min_size=1, max_size=4),
    st.integers(1, 500),
)
runs = st.lists(timings, min_size=1, max_size=5)


@given(runs, st.floats(0.01, 1.0))
@settings(max_examples=60, deadline=None)
def test_calls_that_gain_nothing_are_never_a_gain(run, explained):
    assert judge(run, run, explained)["verdict"] != GAIN
    assert judge(run[:1], run, explained)["verdict"] != GAIN
    assert judge(run, run, 1 / explained)["verdict"] != LOSS


@given(runs, st.floats(0.1, 10), st.floats(0.01, 100))
@settings(max_examples=60, deadline=None)
def test_the_unit_of_time_is_of_no_account(run, explained, unit):
    scaled = [Timings([unit * s for s in b.plain], [unit * s for s in b.speculative], b.plain_tokens) for b in run]
    before, after = noise.half_width(run, noise.scatter(run)), noise.half_width(scaled, noise.scatter(scaled))
    assert after == (None if before is None else pytest.approx(before, rel=1e-6))


@given(runs)
@settings(max_examples=60, deadline=None)
def test_swapping_the_sides_mirrors_the_interval(run):
    if max(len(b.plain) for b in run) < 2:
        return
    swapped = [Timings(b.speculative, b.plain, b.plain_tokens) for b in run]
    ours, theirs = judge(run, run, 1.0), judge(swapped, swapped, 1.0)
    assert ours["speedup_low"] == pytest.approx(1 / theirs["speedup_high"], rel=1e-6)


@given(st.floats(0.01, 100), st.floats(0.01, 100), st.floats(1.0, 10), st.floats(1.0, 10))
@settings(max_examples=60, deadline=None)
def test_more_spread_never_makes_a_gain(measured, explained, factor, more):
    if noise.verdict(measured, explained, factor, check_size=False) == NOISE:
        assert noise.verdict(measured, explained, factor * more, check_size=False) == NOISE


def test_one_timing_has_no_spread():
    one = [Timings([1.0], [0.5], 10)]
    assert noise.scatter(one) is None
    assert judge(one, one, 2.0) == {"speedup_low": None, "speedup_high": None, "verdict": UNKNOWN}


def test_a_speedup_far_beyond_the_calls_is_not_explained():
    assert noise.verdict(1.37, 1.01, 1.01, check_size=True) == UNEXPLAINED
    assert noise.verdict(1.37, 1.01, 1.01, check_size=False) == GAIN
    assert noise.verdict(1.37, 1.2, 1.01, check_size=True) == GAIN
