"""How many tokens a row drafts in this step: speculation must never cost more than it brings.

A step that drafts k tokens takes the time of `step_costs[k]` plain steps and emits one token more than it has accepted.
Each row counts how often each position of its drafts was accepted, and drafts the k with the most expected tokens per
time:

    (1 + a_1 + a_1 a_2 + ... + a_1 ... a_k) / step_costs[k],   a_i: the chance of position i, if all before it were.

That is Theorem 3.8 of Leviathan et al. 2022 with a chance for each position and measured costs. Where k = 0 is best, a
row pauses until the time that its last attempt lost is a small share of the whole, at least twice as long after every
failure, and forgets half of what it has seen, so that it tries again.

What decides is known before the tokens of the step are drawn, so the text stays exact. All rows of a batch wait for its
longest draft, so where no token depends on how a text is cut into steps (all rows greedy, or the rule `coupled`), the
rows choose together what pays for all of them (`num_drafts_together`, `kept_together`). Otherwise each row uses its own
counters alone, so that its text does not depend on its neighbours.

`docs/results/adaptive.md` compares this with other schedules.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from specjax.state import Adaptation

MEMORY = 0.9
"""Weight of the past in the counts of each position, per time that the position is judged."""
PRIOR, HOPE = 2.0, 0.7
"""Each position begins as if the estimate of the one before it (of the first: this chance) had been seen so often."""
FIRST_HOPE = 0.9
"""The chance of each position where a row tries, so that expensive drafts are tried at all."""
FORGET = 0.5
"""What is left of the counts at the beginning of a pause, so that a row tries again after it."""
FIRST_PAUSE, LAST_PAUSE = 8, 128
"""Plain steps before a row tries again: at least at first, and at most."""
TRIAL_SHARE = 0.05
"""The share of the time until the next attempt that a failed one may have cost."""


def init(batch_size: int, depth: int) -> Adaptation:
    """Nothing has been judged yet.

    Args:
      batch_size: B.
      depth: D, the most draft tokens that can become text in a step.
    """
    nothing = jnp.zeros((batch_size, depth), jnp.float32)
    return Adaptation(nothing, nothing, jnp.zeros(batch_size, jnp.int32), jnp.full(batch_size, FIRST_PAUSE, jnp.int32))


def acceptance(adaptation: Adaptation) -> Float[Array, "B D"]:
    """The chance that each position is accepted if all before it were, as each row has seen it.

    A position that has rarely been judged is taken to be like the one before it.
    """
    total = adaptation.judged + PRIOR
    # a_i = (accepted_i + PRIOR a_(i - 1)) / total_i, a linear recurrence: `weight` and `own` of several steps combine.
    weight, own = jax.lax.associative_scan(
        lambda before, after: (before[0] * after[0], after[1] + after[0] * before[1]),
        (PRIOR / total, adaptation.accepted / total),
        axis=1,
    )
    return own + weight * HOPE


def _best(chance: Float[Array, "B D"], step_costs: Float[Array, " C"]) -> Int[Array, " B"]:
    """The number of draft tokens with the most expected tokens per time; the largest in a tie, and where all cost 0."""
    more = jnp.cumsum(jnp.cumprod(chance, axis=1), axis=1)
    tokens = jnp.pad(1.0 + more, ((0, 0), (1, 0)), constant_values=1.0)
    # Not a quotient by a tiny number: the last of many tokens that are hardly ever accepted vanish in the sum.
    value = jnp.where(step_costs > 0, tokens / step_costs, jnp.inf)
    return (value.shape[1] - 1 - jnp.argmax(value[:, ::-1], axis=1)).astype(jnp.int32)


def num_drafts(adaptation: Adaptation, step_costs: Float[Array, " C"]) -> Int[Array, " B"]:
    """How many tokens each row is to draft now.

    Where nothing has been judged yet, or a pause is over and what was judged still says none, drafts are hoped to be
    good.

    Args:
      adaptation: before the step.
      step_costs: `[D + 1]` the time of a step by the number of its draft tokens, over that of a plain step, which is
        the first entry.
    """
    chance = acceptance(adaptation)
    best = jnp.where(jnp.sum(adaptation.judged, axis=1) == 0, 0, _best(chance, step_costs))
    hoped = _best(jnp.maximum(chance, FIRST_HOPE), step_costs)
    return jnp.where(adaptation.pause > 0, 0, jnp.where(best > 0, best, hoped))


def _expected(adaptation: Adaptation, step_costs: Float[Array, " C"]) -> Float[Array, "B C"]:
    """The expected tokens of a step beyond the first, by the number of draft tokens."""
    chance = acceptance(adaptation)
    is_new = jnp.sum(adaptation.judged, axis=1) == 0
    hopes = (adaptation.pause == 0) & (is_new | (_best(chance, step_costs) == 0))
    chance = jnp.where(hopes[:, None], jnp.maximum(chance, FIRST_HOPE), chance)
    # A row that pauses is no reason to draft; where others are, it drafts along.
    chance = jnp.where((adaptation.pause > 0)[:, None], 0.0, chance)
    return jnp.pad(jnp.cumsum(jnp.cumprod(chance, axis=1), axis=1), ((0, 0), (1, 0)))


def _best_for_all(
    more: Float[Array, "B C"], step_costs: Float[Array, " C"], running: Bool[Array, " B"]
) -> Int[Array, ""]:
    """The number of draft tokens with the most expected tokens of all running rows per time."""
    tokens = jnp.sum(jnp.where(running[:, None], 1.0 + more, 0.0), axis=0)
    value = jnp.where(step_costs > 0, tokens / step_costs, jnp.inf)
    return (len(value) - 1 - jnp.argmax(value[::-1])).astype(jnp.int32)


def num_drafts_together(
    adaptation: Adaptation, step_costs: Float[Array, " C"], running: Bool[Array, " B"]
) -> Int[Array, " B"]:
    """How many tokens each row is to draft now so that it pays for the batch: one number for all running rows.

    Args:
      adaptation: before the step.
      step_costs: as for `num_drafts`.
      running: `[B]` the rows that are not done.
    """
    best = _best_for_all(_expected(adaptation, step_costs), step_costs, running)
    return jnp.where(running, best, 0)


def kept_together(
    adaptation: Adaptation, step_costs: Float[Array, " C"], length: Int[Array, " B"], running: Bool[Array, " B"]
) -> Int[Array, " B"]:
    """How many of its proposed tokens each row keeps so that it pays for the batch: lookup often finds nothing.

    Whether a chain is cut depends on how many tokens are proposed, not on which.

    Args:
      adaptation: before the step.
      step_costs: as for `num_drafts`.
      length: `[B]` how many tokens each row proposes.
      running: `[B]` the rows that are not done.
    """
    number = jnp.minimum(jnp.arange(step_costs.shape[0]), length[:, None])
    more = jnp.take_along_axis(_expected(adaptation, step_costs), number, axis=1)
    return jnp.minimum(length, _best_for_all(more, step_costs, running))


def update(
    adaptation: Adaptation,
    wanted: Int[Array, " B"],
    proposed: Int[Array, " B"],
    is_judged: Bool[Array, "B D"],
    accepted: Int[Array, " B"],
    step_costs: Float[Array, " C"],
) -> Adaptation:
    """Counts what was accepted, and begins a pause where drafting does not pay: a step has lost, and no other number of
    draft tokens is expected to gain.

    Args:
      adaptation: before the step.
      wanted: `[B]` draft tokens that pay for the row by itself (`num_drafts`).
      proposed: `[B]` those that it did; 0 in a plain step, which teaches nothing.
      is_judged: `[B, D]` whether a token was proposed at this position after accepted ones.
      accepted: `[B]` draft tokens accepted.
      step_costs: as for `num_drafts`.
    """
    position, drafted = jnp.arange(is_judged.shape[1]), proposed > 0
    # A step that read something and proposed nothing (`Probes`) has lost as much as one whose first token is rejected.
    is_judged = is_judged | ((position == 0) & drafted[:, None])
    is_accepted = is_judged & (position < accepted[:, None])
    count = [
        jnp.where(is_judged, MEMORY * old + new, old)
        for old, new in ((adaptation.judged, is_judged), (adaptation.accepted, is_accepted))
    ]
    learned = adaptation._replace(judged=count[0], accepted=count[1])
    cost = step_costs[jnp.minimum(proposed, step_costs.shape[0] - 1)]
    gains = 1 + accepted >= cost
    backoff = jnp.where(drafted & gains, FIRST_PAUSE, adaptation.backoff)
    is_hopeless = jnp.where(drafted, ~gains & (_best(acceptance(learned), step_costs) == 0), wanted == 0)
    loses = (adaptation.pause == 0) & is_hopeless
    lost = jnp.where(drafted, jnp.maximum(cost - 1 - accepted, 0.0), 0.0)
    wait = jnp.minimum(jnp.maximum(backoff, jnp.ceil(lost / TRIAL_SHARE).astype(jnp.int32)), LAST_PAUSE)
    kept = jnp.where(loses, FORGET, 1.0)[:, None]
    return Adaptation(
        learned.judged * kept,
        learned.accepted * kept,
        jnp.where(loses, wait, jnp.maximum(adaptation.pause - 1, 0)),
        jnp.where(loses, jnp.minimum(2 * wait, LAST_PAUSE), backoff),
    )
