"""Ways to choose the number of draft tokens of a step, replayed over what a drafter would have proposed (`traces`).

A replay needs no model and takes no time on a clock: the same texts, the same drafts and the same measured costs for
every policy, so that policies differ by nothing but what they choose.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from specjax.decoding import adaptive
from specjax.experiments.traces import Trace


class Policy(NamedTuple):
    """Chooses how many tokens to draft. Functions see one text.

    Attributes:
      init: `depth -> state`.
      choose: `(state, step_costs[D + 1]) -> k`, the number of draft tokens of the next step.
      learn: `(state, k, proposed, is_judged[D], accepted, step_costs) -> state`, after it.
    """

    init: Callable[[int], Any]
    choose: Callable[[Any, Float[Array, " C"]], Int[Array, ""]]
    learn: Callable[..., Any]


@functools.cache
def fixed(num_draft_tokens: int) -> Policy:
    """K in every step."""

    def learn(state: Any, *seen: Any) -> Any:
        del seen
        return state

    return Policy(lambda depth: (), lambda state, costs: jnp.int32(num_draft_tokens), learn)


@functools.cache
def plus_two_minus_one(first: int = 5) -> Policy:
    """Two more where all were accepted, else one fewer: the heuristic schedule of transformers' assisted generation."""

    def learn(
        state: Array, k: Array, proposed: Array, is_judged: Bool[Array, " D"], accepted: Array, costs: Array
    ) -> Array:
        del k, is_judged
        moved = jnp.where(accepted == proposed, state + 2, jnp.maximum(state - 1, 1))
        return jnp.where(proposed > 0, jnp.minimum(moved, costs.shape[0] - 1), state)

    return Policy(lambda depth: jnp.int32(min(first, depth)), lambda state, costs: state, learn)


@functools.cache
def expected_value() -> Policy:
    """What the loop does (`decoding.adaptive`): the most expected tokens per time."""

    def learn(state: Any, k: Array, proposed: Array, is_judged: Array, accepted: Array, costs: Array) -> Any:
        return adaptive.update(state, k[None], proposed[None], is_judged[None], accepted[None], costs)

    return Policy(
        lambda depth: adaptive.init(1, depth), lambda state, costs: adaptive.num_drafts(state, costs)[0], learn
    )


class Costs(NamedTuple):
    """The times of the parts of a step by the number of draft tokens, in plain steps.

    Attributes:
      draft: `[D + 1]` of drafting that many. A draft that ends early, since its draft model is unsure, costs less.
      score: `[D + 1]` of scoring that many and the last token; 1 for none.
    """

    draft: Float[Array, " C"]
    score: Float[Array, " C"]

    @property
    def step(self) -> Float[Array, " C"]:
        """`[D + 1]` of whole steps."""
        return self.draft + self.score


class Replay(NamedTuple):
    """What a policy made of a text.

    Attributes:
      time: of all steps, in plain steps.
      num_tokens: of the text.
      steps: target calls.
      wanted: draft tokens that it asked for, over all steps.
    """

    time: float
    num_tokens: int
    steps: int
    wanted: int

    @property
    def speedup(self) -> float:
        """The time of plain decoding over that of the steps."""
        return self.num_tokens / self.time


@functools.partial(jax.jit, static_argnames="policy")
def _replay(
    policy: Policy, proposed: Int[Array, " T"], matched: Int[Array, " T"], end: Int[Array, ""], costs: Costs
) -> tuple[Array, Array, Array]:
    depth = costs.draft.shape[0] - 1

    def step(carry: Any) -> Any:
        at, time, steps, wanted, state = carry
        k = jnp.minimum(policy.choose(state, costs.step), end - at - 1)
        used = jnp.minimum(k, proposed[at])
        accepted = jnp.minimum(used, matched[at])
        is_judged = jnp.arange(depth) < jnp.minimum(accepted + 1, used)
        state = policy.learn(state, k, used, is_judged, accepted, costs.step)
        return at + accepted + 1, time + costs.step[used], steps + 1, wanted + k, state

    zero = jnp.int32(0)
    start = zero, jnp.float32(0), zero, zero, policy.init(depth)
    _, time, steps, wanted, _ = jax.lax.while_loop(lambda carry: carry[0] < end, step, start)
    return time, steps, wanted


def replay(policy: Policy, trace: Trace, costs: Costs) -> Replay:
    """Decodes a text again, with the drafts of its trace."""
    size = -(-len(trace.matched) // 128) * 128  # So that a few programs serve all texts.
    padded = [jnp.asarray(np.pad(x, (0, size - len(x))), jnp.int32) for x in (trace.proposed, trace.matched)]
    time, steps, wanted = _replay(policy, *padded, jnp.int32(len(trace.matched)), costs)
    return Replay(float(time), len(trace.matched), int(steps), int(wanted))


def oracle(trace: Trace, costs: Costs) -> Replay:
    """The least time of all, by dynamic programming from the end of the text: it knows what will be accepted."""
    draft, score = np.asarray(costs.draft), np.asarray(costs.score)
    size = len(trace.matched)
    best, choice = np.zeros(size + 1), np.zeros(size, int)
    for at in reversed(range(size)):
        most = min(int(trace.matched[at]), len(draft) - 1, size - at - 1)
        times = [draft[k] + score[k] + best[at + k + 1] for k in range(most + 1)]
        choice[at] = int(np.argmin(times))
        best[at] = times[choice[at]]
    at = steps = wanted = 0
    while at < size:
        steps, wanted, at = steps + 1, wanted + int(choice[at]), at + int(choice[at]) + 1
    return Replay(float(best[0]), size, steps, wanted)


def in_lengths(costs: Costs, lengths: tuple[int, ...], most: int) -> Costs:
    """The costs of a drafter of at most `most` tokens whose programs have these lengths (`Topology.lengths`)."""
    ends = np.array((0, *lengths, most))
    depth = costs.draft.shape[0] - 1
    at = ends[np.minimum(np.searchsorted(ends, np.arange(depth + 1)), len(ends) - 1)]
    beyond = np.arange(depth + 1) > most
    return Costs(*(jnp.asarray(np.where(beyond, 1e6, np.asarray(part)[at]), jnp.float32) for part in costs))
