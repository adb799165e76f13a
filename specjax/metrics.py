"""Metrics of speculation: acceptance, block efficiency, costs, and the speedup that they predict."""

import bisect
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from specjax import decoding, sampling, theory
from specjax.decoding import verify
from specjax.sampling import tree
from specjax.state import DecodeState, Stats
from specjax.types import Block, Drafter, Feedback, Model, Params, Topology


@dataclasses.dataclass(frozen=True)
class Summary:
    """The counters of one row, or the sums over several rows.

    Attributes:
      num_tokens: new tokens, the stop token included.
      target_calls: steps.
      draft_steps: steps in which a draft token or a probe was read.
      steps_by_length: those by the shortest of `Topology.all_lengths` that held the drafts of all rows.
      acceptance_rate: alpha, the mean of `sum_x min(target(x), draft(x))` over the draft positions whose prefix was
        accepted; None where nothing was drafted.
      block_efficiency: tokens per target call.
      histogram: `[K + 1]` steps by number of accepted draft tokens.
      acceptance_by_position: `[K]` share of the draft tokens accepted at each position, among those judged there; None
        where none was judged.
    """

    num_tokens: int
    target_calls: int
    draft_steps: int
    steps_by_length: list[int]
    acceptance_rate: float | None
    block_efficiency: float
    histogram: list[int]
    acceptance_by_position: list[float | None]


def _summary(stats: Any, num_tokens: int) -> Summary:
    proposed, accepted = np.asarray(stats.proposed), np.asarray(stats.accepted)
    judged = int(proposed.sum())
    calls = int(stats.target_calls)
    return Summary(
        num_tokens=num_tokens,
        target_calls=calls,
        draft_steps=int(stats.draft_steps),
        steps_by_length=[int(n) for n in stats.steps_by_length],
        acceptance_rate=float(stats.overlap) / judged if judged else None,
        block_efficiency=num_tokens / calls if calls else 0.0,
        histogram=[int(n) for n in stats.histogram],
        acceptance_by_position=[int(a) / int(n) if n else None for a, n in zip(accepted, proposed, strict=True)],
    )


def summarise(stats: Stats, num_tokens: Array | np.ndarray) -> tuple[Summary, list[Summary]]:
    """The summary of all rows together, and that of each row.

    Args:
      stats: the counters of a `DecodeState`, on the device or not; rows of several runs may be concatenated.
      num_tokens: `[B]` new tokens of each row.
    """
    host = jax.tree.map(np.asarray, stats)
    tokens = np.asarray(num_tokens)
    rows = [_summary(jax.tree.map(lambda x, i=i: x[i], host), int(n)) for i, n in enumerate(tokens)]
    return _summary(jax.tree.map(lambda x: x.sum(axis=0), host), int(tokens.sum())), rows


@dataclasses.dataclass(frozen=True)
class Costs:
    """Measured times of the parts of one step, in seconds.

    Attributes:
      plain: the target reads one token per row.
      score: the target reads K + 1 tokens per row.
      draft: the drafter proposes K tokens per row.
      num_draft_tokens: K; of a tree its depth, the most tokens of it that can become text.
      shorter: `(length, draft, score)` for each of `Topology.lengths`.
    """

    plain: float
    score: float
    draft: float
    num_draft_tokens: int
    shorter: tuple[tuple[int, float, float], ...] = ()

    @property
    def cost_ratio(self) -> float:
        """c: the time of one draft token over that of one target call (Leviathan et al. 2022, Definition 3.7)."""
        return self.draft / self.num_draft_tokens / self.plain if self.num_draft_tokens else 0.0

    @property
    def score_cost(self) -> float:
        """The time of scoring K + 1 tokens over that of scoring one; the paper takes it as 1."""
        return self.score / self.plain

    @property
    def step_cost(self) -> float:
        """The time of a drafting step over that of a plain step."""
        return (self.draft + self.score) / self.plain

    @property
    def by_length(self) -> tuple[float, ...]:
        """The same for a step of each of `Topology.all_lengths`."""
        return (*((draft + score) / self.plain for _, draft, score in self.shorter), self.step_cost)

    @property
    def step_costs(self) -> tuple[float, ...]:
        """The same for a step with 1, 2, ... K draft tokens: what `generate(step_cost=...)` takes."""
        lengths = [length for length, _, _ in self.shorter]
        return tuple(self.by_length[bisect.bisect_left(lengths, k)] for k in range(1, self.num_draft_tokens + 1))

    def predicted_speedup(self, alpha: float | None) -> float:
        """Theorem 3.8 with the measured c, which assumes K drafts in every step and no cost of scoring them."""
        if alpha is None or not self.num_draft_tokens:
            return 1.0
        return theory.walltime_factor(min(alpha, 1.0), self.num_draft_tokens, self.cost_ratio)

    def accounted_speedup(self, summary: Summary) -> float:
        """The time of plain decoding over that of the steps taken, with drafting steps at their measured cost."""
        spent = self.spent(summary)
        return summary.num_tokens / spent if spent else 1.0

    def spent(self, summary: Summary, least: float = 0.0) -> float:
        """The time of the steps taken, in plain steps; no drafting step counts less than `least`."""
        drafting = zip(summary.steps_by_length, self.by_length, strict=False)
        plain_steps = summary.target_calls - summary.draft_steps
        return plain_steps + sum(steps * max(cost, least) for steps, cost in drafting)


class _Timed:
    """A jitted loop `run(carry, n)` of n rounds on the device, which donates or replaces its carry."""

    def __init__(self, run: Callable[[Any, int], Any], carry: Any):
        """Compiles and warms up."""
        self.run, self.carry = run, jax.block_until_ready(run(carry, 1))

    def per_call(self, calls: int) -> float:
        """Seconds per round, from `calls` rounds more than one, so that starting the program does not count."""
        marks = [time.perf_counter()]
        for rounds in (1, 1 + calls):
            self.carry = jax.block_until_ready(self.run(self.carry, rounds))
            marks.append(time.perf_counter())
        first, rest = marks[1] - marks[0], marks[2] - marks[1]
        # On a busy machine one round may take longer than all of them do later.
        return (rest - first) / calls if rest > 1.5 * first else rest / (1 + calls)


def _scoring(target: Model, params: Params, state: DecodeState, topology: Topology, width: int) -> _Timed:
    """Rounds in which the target reads one token per row, or the block of a step with drafts (and probes)."""
    rows = state.rows.length.shape[0]

    def block_of(tokens: Array) -> Block:
        if width == 1 or (topology.is_chain and not topology.num_probes):
            return Block(tokens)
        if topology.parents is not None and not topology.num_probes:
            parents, depth = jnp.asarray(topology.parents, jnp.int32), topology.depth
        else:
            # A tree that only the loop knows costs what any tree of as many tokens does that the compiler can't know.
            parents, depth = jax.lax.optimization_barrier(jnp.full(topology.num_read, -1, jnp.int32)), 1
        shape = tree.shape(jnp.broadcast_to(parents, (rows, *parents.shape)), depth)
        return Block(tokens, shape.depth, shape.sees)

    @jax.jit
    def run(params: Any, carry: Any, n: Array) -> Any:
        def body(_: Any, carry: Any) -> Any:
            cache, tokens = carry
            output, cache = target.apply(params, block_of(tokens), cache)
            # The next round depends on these logits, so that none of the work is optimised away.
            return cache, sampling.argmax(output.logits)

        return jax.lax.fori_loop(0, n, body, carry)

    carry = jax.tree.map(jnp.copy, state.rows.cache), jnp.zeros((rows, width), jnp.int32)
    return _Timed(lambda carry, n: run(params.target, carry, n), carry)


def _drafting(target: Model, drafter: Drafter, params: Params, state: DecodeState, length: int) -> _Timed:
    """Rounds in which the drafter proposes up to `length` tokens, with the code of the loop."""
    rows, depth = state.rows.length.shape[0], drafter.topology.depth
    read = Block(jnp.zeros((rows, drafter.topology.num_read + 1), jnp.int32))

    def propose(params: Params, state: DecodeState, carried: Any, shift: Array) -> tuple[Any, Array, Any]:
        drafter_state, cache = carried
        moved = state.rows._replace(drafter=drafter_state, cache=cache, length=state.rows.length + shift)
        state = state._replace(rows=moved)
        room = jax.lax.optimization_barrier(jnp.full(rows, length, jnp.int32))
        keys = decoding.step_keys(state.rows.seed, state.rows.length, depth)
        context = decoding.context_of(target, drafter, verify.rejection, state, room, *keys)
        proposal, drafter_state, cache = decoding.propose(drafter, params, state, context)
        shapes = jax.eval_shape(lambda: target.apply(params.target, read, state.rows.cache)[0])
        # What a drafter computes from the output counts, so the compiler must not know that it is 0.
        output = jax.lax.optimization_barrier(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes))
        nothing = jnp.zeros((rows, depth + 1), jnp.int32)
        features = output.features[:, : depth + 1]
        feedback = Feedback(nothing, nothing[:, 0], state.rows.length, features, output, context=context)
        # Token ids are never below -1, but the compiler cannot know: the next round has to wait for this one.
        shift = jnp.minimum(jnp.sum(proposal.tokens + 1, axis=-1), 0)
        # The distributions are part of the work, though they are not used here.
        return (drafter.update(params, drafter_state, feedback), cache), shift, proposal.probs

    @jax.jit
    def run(params: Params, state: DecodeState, carry: Any, n: Array) -> Any:
        return jax.lax.fori_loop(0, n, lambda _, carry: propose(params, state, *carry[:2]), carry)

    # A drafter that runs the target's layers writes into the target's cache, which the loop carries for it.
    start = jax.tree.map(jnp.copy, (state.rows.drafter, state.rows.cache)), jnp.zeros(rows, jnp.int32)
    probs = jax.eval_shape(propose, params, state, *start)[2]
    carry = *start, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), probs)
    return _Timed(lambda carry, n: run(params, state, carry, n), carry)


def measure_costs(
    target: Model, drafter: Drafter, params: Params, state: DecodeState, *, calls: int = 6, repeats: int = 7
) -> Costs:
    """Times the parts of a step at this state's batch, buffer and lengths, each in a loop on the device.

    The loops are timed in turn, and ratios are medians over the turns: a machine whose speed drifts distorts neither.

    Args:
      target: the target.
      drafter: the drafter.
      params: the parameters of both.
      state: from `decode.prefill`, with the same drafter. It is copied, not consumed.
      calls: the least number of rounds of each timed loop.
      repeats: how often each loop is timed; the median counts.
    """
    k, topology = drafter.topology.depth, drafter.topology
    # A tree is scored whole; D is its length here.
    lengths = (*topology.lengths, k) if k else ()
    widths = (1, *(length + 1 for length in topology.lengths), topology.num_read + 1)
    loops = [_scoring(target, params, state, topology, width) for width in widths]
    loops += [_drafting(target, drafter, params, state, length) for length in lengths]
    # A model that takes about a millisecond is called more often, or the overhead of timing would dominate.
    calls = max(calls, min(64, int(0.03 / loops[0].per_call(calls))))
    seconds = np.asarray([[loop.per_call(calls) for loop in loops] for _ in range(repeats)])
    plain = float(np.median(seconds[:, 0]))
    ratios = np.median(seconds / seconds[:, :1], axis=0)
    if not k:
        return Costs(plain, plain * float(ratios[1]), 0.0, 0)
    score, draft = (plain * ratios[1 : 1 + len(lengths)]).tolist(), (plain * ratios[1 + len(lengths) :]).tolist()
    return Costs(plain, score[-1], draft[-1], k, tuple(zip(topology.lengths, draft, score, strict=False)))
