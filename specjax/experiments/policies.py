"""Ways to choose the number of draft tokens of a step, replayed over what a drafter would have proposed (`traces`).

A replay needs no model and takes no time on a clock: the same texts, the same drafts and the same measured costs for
every policy, so that policies differ by nothing but what they choose. The texts of a batch are replayed side by side,
as the loop decodes them: a step costs what its longest row asks for, and every row goes on at its own pace.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from specjax.decoding import adaptive
from specjax.drafters.skip import START, WANTED_RATE, Threshold
from specjax.drafters.skip import learn as learn_threshold
from specjax.experiments.traces import Trace


def _never(state: Any) -> Float[Array, ""]:
    del state
    return jnp.float32(0)


class Together(NamedTuple):
    """How the rows of a batch choose together; functions see the states of all rows.

    Attributes:
      choose: `(states, step_costs[D + 1], running[B]) -> k[B]`, in the place of `Policy.choose`.
      keep: `(states, step_costs[D + 1], proposed[B], running[B]) -> [B]`, how many of the proposed tokens are scored.
    """

    choose: Callable[[Any, Float[Array, " C"], Bool[Array, " B"]], Int[Array, " B"]]
    keep: Callable[[Any, Float[Array, " C"], Int[Array, " B"], Bool[Array, " B"]], Int[Array, " B"]]


class Policy(NamedTuple):
    """Chooses how many tokens to draft. Functions see one text.

    Attributes:
      init: `depth -> state`.
      choose: `(state, step_costs[D + 1]) -> k`, the most draft tokens of the next step.
      learn: `(state, k, proposed, is_judged[D], accepted, step_costs) -> state`, after it.
      threshold: `state -> p`: the next draft ends after the first token at whose place the draft was less confident.
      calls_by_token: whether a draft of n tokens calls the draft model n times, and not as often as the program of a
        longer length does (`Topology.lengths`): so it is where a threshold may end it.
      together: how the rows of a batch choose together; None: each chooses for itself.
    """

    init: Callable[[int], Any]
    choose: Callable[[Any, Float[Array, " C"]], Int[Array, ""]]
    learn: Callable[..., Any]
    threshold: Callable[[Any], Float[Array, ""]] = _never
    calls_by_token: bool = False
    together: Together | None = None


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
    """What the loop does with greedy texts (`decoding.adaptive`): the most expected tokens per time, of all rows."""

    def of_rows(states: Any) -> Any:
        return jax.tree.map(lambda x: x[:, 0], states)

    def learn(state: Any, k: Array, proposed: Array, is_judged: Array, accepted: Array, costs: Array) -> Any:
        return adaptive.update(state, k[None], proposed[None], is_judged[None], accepted[None], costs)

    return Policy(
        lambda depth: adaptive.init(1, depth),
        lambda state, costs: adaptive.num_drafts(state, costs)[0],
        learn,
        together=Together(
            lambda states, costs, running: adaptive.num_drafts_together(of_rows(states), costs, running),
            lambda states, costs, proposed, running: adaptive.kept_together(of_rows(states), costs, proposed, running),
        ),
    )


@functools.cache
def confident(policy: Policy, threshold: float) -> Policy:
    """A policy whose drafts end where the draft is less confident than that, as with `min_confidence`."""
    return policy._replace(threshold=lambda state: jnp.float32(threshold), calls_by_token=True)


@functools.cache
def draft_and_verify(num_draft_tokens: int, first: float = START) -> Policy:
    """At most K, with a threshold on the confidence that follows the acceptance rate (`drafters.skip(adaptive=True)`).

    Draft & Verify (arXiv 2309.08168), section 3.3.
    """

    def init(depth: int) -> Threshold:
        del depth
        return Threshold(jnp.full(1, first), jnp.full(1, WANTED_RATE), jnp.zeros(1, jnp.int32))

    def learn(state: Threshold, k: Array, proposed: Array, is_judged: Array, accepted: Array, costs: Array) -> Any:
        del k, is_judged, costs
        return learn_threshold(state._replace(drafted=proposed[None]), accepted[None], num_draft_tokens)

    return Policy(init, lambda state, costs: jnp.int32(num_draft_tokens), learn, lambda state: state.threshold[0], True)


class Costs(NamedTuple):
    """The times of the parts of a step of a batch by the number of draft tokens, in plain steps.

    Attributes:
      draft: `[D + 1]` of drafting that many.
      score: `[D + 1]` of scoring that many and the last token; 1 for none.
    """

    draft: Float[Array, " C"]
    score: Float[Array, " C"]

    @property
    def step(self) -> Float[Array, " C"]:
        """`[D + 1]` of whole steps."""
        return self.draft + self.score


class Programs(NamedTuple):
    """The costs of a drafter with programs for some lengths (`Topology.lengths`).

    Attributes:
      costs: of a step by the number of its draft tokens: those of the program that it runs.
      calls: `[D + 1]` the times of so many calls of the drafter, for drafts that may end anywhere.
    """

    costs: Costs
    calls: Float[Array, " C"]

    def of(self, policy: Policy) -> Costs:
        """The costs of the steps of a policy."""
        return self.costs._replace(draft=self.calls) if policy.calls_by_token else self.costs


def in_lengths(costs: Costs, lengths: tuple[int, ...], most: int) -> Programs:
    """The costs of a drafter of at most `most` tokens whose programs have these lengths."""
    ends = np.array((0, *lengths, most))
    depth = costs.draft.shape[0] - 1
    at = ends[np.minimum(np.searchsorted(ends, np.arange(depth + 1)), len(ends) - 1)]
    beyond = np.arange(depth + 1) > most
    whole = Costs(*(jnp.asarray(np.where(beyond, 1e6, np.asarray(part)[at]), jnp.float32) for part in costs))
    return Programs(whole, costs.draft)


Group = Sequence[Trace]
"""The texts of a batch."""


def groups(some: Sequence[Trace], batch_size: int) -> list[Group]:
    """Batches of so many texts, in order; the last one is filled up with the first texts again."""
    count = -(-len(some) // batch_size) * batch_size
    again = list(itertools.islice(itertools.cycle(some), count))
    return [again[i : i + batch_size] for i in range(0, count, batch_size)]


class Replay(NamedTuple):
    """What a policy made of the texts of a batch.

    Attributes:
      time: of all steps, in plain steps of the batch.
      longest: tokens of the longest text, which are the steps of plain decoding.
      steps: `[B]` steps of each row.
      drafted: `[B]` draft tokens that were asked for, over all steps; where a threshold ended a draft, up to there.
    """

    time: float
    longest: int
    steps: np.ndarray
    drafted: np.ndarray

    @property
    def speedup(self) -> float:
        """The time of plain decoding over that of the steps."""
        return self.longest / self.time


class _Row(NamedTuple):
    """Where a text is in its replay: its position, its steps, the tokens drafted in them, and the policy's state."""

    at: Any
    steps: Any
    drafted: Any
    state: Any


class _Drafted(NamedTuple):
    """A step of a row: tokens asked for at most, calls of the drafter, and tokens to be scored."""

    k: Array
    called: Array
    used: Array


def _draft(policy: Policy, row: _Row, trace: Trace, end: Array, wanted: Array) -> _Drafted:
    k = jnp.where(row.at < end, jnp.minimum(wanted, end - row.at - 1), 0)
    # The call that finds the draft unsure has been made, and what it drafts is proposed.
    unsure = trace.confidence[row.at] < policy.threshold(row.state)
    called = jnp.minimum(k, jnp.where(jnp.any(unsure), jnp.argmax(unsure) + 1, unsure.shape[0]))
    return _Drafted(k, called, jnp.minimum(called, trace.proposed[row.at]))


def _advance(policy: Policy, row: _Row, trace: Trace, end: Array, drafted: _Drafted, costs: Costs) -> _Row:
    accepted = jnp.minimum(drafted.used, trace.matched[row.at])
    is_judged = jnp.arange(costs.draft.shape[0] - 1) < jnp.minimum(accepted + 1, drafted.used)
    state = policy.learn(row.state, drafted.k, drafted.used, is_judged, accepted, costs.step)
    after = _Row(row.at + accepted + 1, row.steps + 1, row.drafted + drafted.called, state)
    return jax.tree.map(lambda new, old: jnp.where(row.at < end, new, old), after, row)


@functools.partial(jax.jit, static_argnames="policy")
def _replay(policy: Policy, batch: Trace, ends: Int[Array, " B"], costs: Costs) -> tuple[Array, _Row]:
    depth = costs.draft.shape[0] - 1

    def step(carry: tuple[Array, _Row]) -> tuple[Array, _Row]:
        time, rows = carry
        running, together = rows.at < ends, policy.together
        if together is None:
            wanted = jax.vmap(lambda row: policy.choose(row.state, costs.step))(rows)
        else:
            wanted = together.choose(rows.state, costs.step, running)
        drafted = jax.vmap(functools.partial(_draft, policy))(rows, batch, ends, wanted)
        if together is not None:
            drafted = drafted._replace(used=together.keep(rows.state, costs.step, drafted.used, running))
        time += costs.draft[jnp.max(drafted.called)] + costs.score[jnp.max(drafted.used)]
        return time, jax.vmap(functools.partial(_advance, policy, costs=costs))(rows, batch, ends, drafted)

    zeros = jnp.zeros_like(ends)
    states = jax.tree.map(lambda x: jnp.broadcast_to(x, (len(ends), *jnp.shape(x))), policy.init(depth))
    start = jnp.float32(0), _Row(zeros, zeros, zeros, states)
    return jax.lax.while_loop(lambda carry: jnp.any(carry[1].at < ends), step, start)


def replay(policy: Policy, texts: Group, programs: Programs) -> Replay:
    """Decodes the texts of a batch again, with the drafts of their traces."""
    ends = np.array([len(trace.text) for trace in texts])
    size = -(-int(ends.max()) // 128) * 128  # So that a few programs serve all texts.
    padded = (
        jax.tree.map(lambda x: np.pad(x, ((0, size - len(x)), *[(0, 0)] * (x.ndim - 1))), trace) for trace in texts
    )
    batch = jax.tree.map(lambda *x: jnp.asarray(np.stack(x)), *padded)
    time, rows = _replay(policy, batch, jnp.asarray(ends), programs.of(policy))
    return Replay(float(time), int(ends.max()), np.asarray(rows.steps), np.asarray(rows.drafted))


def oracle(texts: Group, programs: Programs) -> float:
    """The least time of all, for an oracle that knows what will be accepted.

    Of one text it is found by dynamic programming from its end. Of a batch this is a bound below all ways of choosing:
    the time of the slowest row, if the others never asked for more than it does.
    """
    step = np.asarray(programs.calls + programs.costs.score)
    return max(_least(trace, step) for trace in texts)


def _least(trace: Trace, step: np.ndarray) -> float:
    size = len(trace.matched)
    best = np.zeros(size + 1)
    for at in reversed(range(size)):
        most = min(int(trace.matched[at]), len(step) - 1, size - at - 1)
        best[at] = min(step[k] + best[at + k + 1] for k in range(most + 1))
    return float(best[0])
