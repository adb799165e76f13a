"""When a measured speedup is believed.

Both sides decode a batch `repeats` times in turn, and the medians of their seconds are compared. A speedup is a gain
or a loss only where two things agree:

1. The spread. The logarithms of the seconds of one side and batch scatter around their mean; their deviation s is
   pooled over both sides and all batches of a run, with as many degrees of freedom as there are timings beyond the
   first of each. A median of R timings has the variance s^2 / R for R <= 2, and at most s^2 pi / (2 R) for more. With
   the logarithm of the measured speedup as its centre, the interval of Student's t at 95 % must exclude 1. For the
   sum of several batches, the variance of each side is weighted by the square of its share of the seconds.
   With one repeat a timing has no spread of its own: then s is that of plain decoding's seconds per token over the
   batches, which share one buffer and would take equally long on a quiet machine. One batch timed once has none.
2. The calls. `explained` is what the model's calls account for: plain steps for all tokens over the steps really taken,
   each drafting one at its measured cost, but at least at that of a plain step, since it scores more tokens. It must
   lie on the same side of 1. With batch size 1, the interval must also come within a factor of `TOLERANCE` of it; in
   larger batches sequences end at different times, so that the calls are a rough guess. A text of 1.00 tokens per call
   is thus never a gain, whatever the measured time is.

`verdict` is "gain" or "loss" where both agree, "noise" where 1 lies in the interval, "unexplained" where the interval
excludes 1 but the calls do not say why, and "unknown" where there is no spread to compare with.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.special import stdtrit

LEVEL = 0.95
"""How often the interval of a speedup covers the true one."""
TOLERANCE = 1.25
"""How far a believed speedup may lie beyond what the calls explain: costs are measured once, at one length."""

GAIN, LOSS, NOISE, UNEXPLAINED, UNKNOWN = "gain", "loss", "noise", "unexplained", "unknown"
MARKS = {GAIN: "", LOSS: "", NOISE: " ~", UNEXPLAINED: " ?", UNKNOWN: " ?"}
"""The mark after a speedup in tables."""


class Timings(NamedTuple):
    """The seconds of all repeats of one batch.

    Attributes:
      plain: seconds of plain decoding.
      speculative: seconds with speculation.
      plain_tokens: new tokens of plain decoding.
    """

    plain: Sequence[float]
    speculative: Sequence[float]
    plain_tokens: int


class Scatter(NamedTuple):
    """The scatter of the logarithms of timings: their standard deviation and its degrees of freedom."""

    deviation: float
    freedom: int


def scatter(batches: Sequence[Timings]) -> Scatter | None:
    """The scatter of a run's timings, or None where there is only one."""
    sides = [np.log(side) for batch in batches for side in (batch.plain, batch.speculative)]
    freedom = sum(len(side) - 1 for side in sides)
    if not freedom:
        # Plain decoding takes equally long for each token, whatever the text.
        sides = [np.log([batch.plain[0] / batch.plain_tokens for batch in batches if batch.plain_tokens])]
        freedom = len(sides[0]) - 1
    if freedom < 1:
        return None
    squares = sum(float(np.sum((side - side.mean()) ** 2)) for side in sides)
    return Scatter(math.sqrt(squares / freedom), freedom)


def _variance(seconds: Sequence[Sequence[float]]) -> float:
    """The variance of the logarithm of the summed medians of batches, in units of the variance of one timing."""
    medians = np.asarray([np.median(side) for side in seconds])
    of_median = np.asarray([1 / len(side) if len(side) <= 2 else math.pi / 2 / len(side) for side in seconds])
    return float(np.sum((medians / medians.sum()) ** 2 * of_median))


def half_width(batches: Sequence[Timings], of: Scatter | None) -> float | None:
    """The factor between a speedup over some batches and the ends of its interval."""
    if of is None:
        return None
    variance = _variance([batch.plain for batch in batches]) + _variance([batch.speculative for batch in batches])
    quantile = float(stdtrit(of.freedom, (1 + LEVEL) / 2))
    return math.exp(min(quantile * of.deviation * math.sqrt(variance), 700.0))


def verdict(measured: float, explained: float, factor: float | None, *, check_size: bool = True) -> str:
    """Whether a measured speedup is believed, from what the calls explain and the factor of `half_width`.

    With `check_size`, the interval also has to come near what the calls explain.
    """
    if factor is None:
        return UNKNOWN
    low, high = measured / factor, measured * factor
    if low <= 1 <= high:
        return NOISE
    if low > 1:
        return GAIN if explained > 1 and not (check_size and low > TOLERANCE * explained) else UNEXPLAINED
    return LOSS if explained < 1 and not (check_size and high * TOLERANCE < explained) else UNEXPLAINED


def judge(
    measured: float, explained: float, batches: Sequence[Timings], of: Scatter | None, *, check_size: bool
) -> dict[str, Any]:
    """The fields of a row that say whether its speedup is believed: the interval's ends and the verdict."""
    factor = half_width(batches, of)
    return {
        "speedup_low": None if factor is None else measured / factor,
        "speedup_high": None if factor is None else measured * factor,
        "verdict": verdict(measured, explained, factor, check_size=check_size),
    }
