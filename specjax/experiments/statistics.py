"""Means of ratios, and how far to trust them."""

from collections.abc import Sequence

import numpy as np

RESAMPLES = 10_000
"""Bootstrap samples of an interval."""


def geometric_mean(values: Sequence[float]) -> float:
    """exp of the mean log."""
    return float(np.exp(np.mean(np.log(values))))


def bootstrap_interval(
    groups: Sequence[Sequence[float]], *, level: float = 0.95, seed: int = 0
) -> tuple[float, float] | None:
    """An interval of the geometric mean over all values, for other prompts of the same categories.

    The categories are fixed and their prompts are a sample, so values are drawn with replacement within each group. Of
    a group of n, n - 1 are drawn: drawing n would give a variance that is too small by a factor of (n - 1) / n, 0.8 for
    five prompts (Rao and Wu 1988, "Resampling inference with complex survey data", with m = n - 1). The interval lies
    between percentiles of the resampled means, and covers the mean with the probability `level`.

    Returns:
      the bounds; None where a group has fewer than two values, of which nothing can be drawn.
    """
    logs = [np.log(np.asarray(group, np.float64)) for group in groups]
    if not logs or min(map(len, logs)) < 2:
        return None
    rng = np.random.default_rng(seed)
    total = np.zeros(RESAMPLES)
    for group in logs:
        drawn = rng.integers(len(group), size=(RESAMPLES, len(group) - 1))
        # The weight of a category in the mean is the number of its values.
        total += len(group) * group[drawn].mean(axis=1)
    means = np.exp(total / sum(map(len, logs)))
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
