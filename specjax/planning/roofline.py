"""The time of a call at the roofline, and the gain that speculation should bring.

The time of a call is the larger of its arithmetic at the chip's peak and its bytes at the memory's peak, plus its
all-reduces, each of which waits for the slowest hop: nothing overlaps with them while one token follows another.
So it is a prediction, and a lower bound.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from specjax import theory
from specjax.planning import chips, kinds
from specjax.planning.cost import Cost, costs
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


class StepTimes(NamedTuple):
    """Seconds of the calls of a step, one after the other.

    Attributes:
      plain: of a target call that scores one token: plain decoding's step.
      drafting: of all calls that make the draft.
      scoring: of the target call that judges it.
    """

    plain: float
    drafting: float
    scoring: float

    @property
    def total(self) -> float:
        """Of a step that drafts."""
        return self.drafting + self.scoring

    @property
    def pays_above(self) -> float:
        """The tokens per step above which it is faster than plain decoding."""
        return self.total / self.plain

    def milliseconds(self, tokens_per_step: float) -> float:
        """The time of a token, where a step writes so many of them in each row."""
        return 1e3 * self.total / tokens_per_step

    def speedup(self, tokens_per_step: float) -> float:
        """Over plain decoding, where a step writes so many tokens in each row; below 1 it loses."""
        return tokens_per_step / self.pays_above


def step_times(setup: Setup, cost: Mapping[str, Callable[[int], Cost]] | None = None) -> StepTimes:
    """The time of a step by what the kind of draft reads in it: what any drafter gains or loses on a chip.

    Multiply out with measured acceptances: `step_times(setup).speedup(theory.tokens_per_step(acceptances))`.

    Args:
      setup: the plan.
      cost: of each call, by name; None: `costs` of the plan.
    """
    cost = costs(setup) if cost is None else cost

    def seconds(call: str, tokens: int) -> float:
        return times(setup, cost[call](tokens)).total

    drafting = sum(reads.times * seconds(reads.call, reads.tokens) for reads in setup.step.drafting)
    return StepTimes(seconds(kinds.TARGET, 1), drafting, seconds(kinds.TARGET, setup.step.scored))


class Forecast(NamedTuple):
    """What speculation should bring, from times at the roofline.

    Attributes:
      target: seconds of a target call that scores T = 1, 2 ... tokens.
      drafting: seconds of all calls that draft K = 0, 1, 2 ... tokens.
      alpha: the acceptance rate that is assumed.
      milliseconds: the time per token with K = 0, 1, 2 ... draft tokens per step, in which each row writes one token.
      best: the K of the least time.
    """

    target: list[float]
    drafting: list[float]
    alpha: float
    milliseconds: list[float]
    best: int

    def cost_ratio(self, num_draft_tokens: int) -> float:
        """c: the time of drafting a token, of K, over that of a target call that scores one."""
        return self.drafting[num_draft_tokens] / (num_draft_tokens * self.target[0])


def forecast(target: Sequence[float], drafting: Sequence[float], alpha: float) -> Forecast:
    """Theorem 3.8 of Leviathan et al. 2022 over roofline times: drafting and scoring K tokens have their own times.

    Args:
      target: seconds of a target call that scores T = 1, 2 ... tokens.
      drafting: seconds of drafting K = 0, 1, 2 ... tokens; for a draft model K times a call.
      alpha: the acceptance rate.
    """
    pairs = zip(drafting, target, strict=True)
    milliseconds = [1e3 * (make + score) / theory.expected_tokens(alpha, k) for k, (make, score) in enumerate(pairs)]
    # The smallest K in a tie.
    best = min(range(len(milliseconds)), key=milliseconds.__getitem__)
    return Forecast(list(target), list(drafting), alpha, milliseconds, best)
