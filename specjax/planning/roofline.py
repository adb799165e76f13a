"""The time of a call at the roofline, and the gain that speculation should bring.

The time of a call is the larger of its arithmetic at the chip's peak and its bytes at the memory's peak, plus its
all-reduces, each of which waits for the slowest hop: nothing overlaps with them while one token follows another.
So it is a prediction, and a lower bound.
"""

from typing import NamedTuple

from specjax import theory
from specjax.planning import chips
from specjax.planning.cost import Cost
from specjax.planning.setup import Setup


class Times(NamedTuple):
    """Seconds of a call at the roofline.

    Attributes:
      arithmetic: at the chip's peak rate.
      memory: reading parameters and cache at the memory's peak rate.
      collectives: all-reduces, one after the other.
    """

    arithmetic: float
    memory: float
    collectives: float

    @property
    def total(self) -> float:
        """Arithmetic and memory overlap; collectives wait for both."""
        return max(self.arithmetic, self.memory) + self.collectives


def times(setup: Setup, cost: Cost) -> Times:
    """The least time that a call takes, from its cost."""
    chip, group = setup.topology.chip, setup.mesh_shape[1]
    one = chips.all_reduce_seconds(setup.topology, group, cost.all_reduce_bytes / max(cost.all_reduces, 1.0))
    return Times(
        cost.flops / (chip.flops / chip.devices),
        (cost.parameter_bytes + cost.cache_bytes) / (chip.bandwidth / chip.devices),
        cost.all_reduces * one,
    )


class Forecast(NamedTuple):
    """What speculation should bring, from times at the roofline.

    Attributes:
      target: seconds of a target call that scores T = 1, 2 ... tokens.
      draft: seconds of a draft call of one token.
      cost_ratio: c.
      alpha: the acceptance rate that is assumed.
      milliseconds: the time per token with K = 0, 1, 2 ... draft tokens per step, in which each row writes one token.
      best: the K of the least time.
    """

    target: list[float]
    draft: float
    cost_ratio: float
    alpha: float
    milliseconds: list[float]
    best: int


def forecast(target: list[float], draft: float, alpha: float) -> Forecast:
    """Theorem 3.8 of Leviathan et al. 2022 over roofline times, where scoring K + 1 tokens has its own time.

    Args:
      target: seconds of a target call that scores T = 1, 2 ... tokens.
      draft: seconds of a draft call of one token.
      alpha: the acceptance rate.
    """
    c, most = draft / target[0], len(target) - 1

    def score_cost(k: int) -> float:
        return target[k] / target[0]

    milliseconds = [1e3 * target[0] / theory.walltime_factor(alpha, k, c, score_cost(k)) for k in range(most + 1)]
    best = theory.best_num_draft_tokens(alpha, c, score_cost, max_draft_tokens=most)
    return Forecast(target, draft, c, alpha, milliseconds, best)
