"""Whether a row drafts in this step: speculation must never cost more than it brings.

A drafting step takes the time of `step_cost` plain steps and emits `1 + accepted` tokens, so it pays while the mean of
`accepted` exceeds `step_cost - 1`. Each row keeps that mean. A row whose drafts do not pay pauses until the time that
it lost is a small share of the whole, at least twice as long after every failure, and then tries once more. Each row
uses its own counters alone: its pauses, and so its text, do not depend on its neighbours.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from specjax.state import Adaptation

MEMORY = 0.75
"""Weight of the past in the running mean of accepted tokens."""
FIRST_PAUSE, LAST_PAUSE = 8, 128
"""Plain steps before a row tries again: at least at first, and at most."""
TRIAL_SHARE = 0.05
"""The share of the time until the next attempt that a failed one may have cost."""


def init(batch_size: int) -> Adaptation:
    """Every row may draft, and is assumed to gain one token per step at first."""
    return Adaptation(
        jnp.ones(batch_size, jnp.float32),
        jnp.zeros(batch_size, jnp.int32),
        jnp.full(batch_size, FIRST_PAUSE, jnp.int32),
    )


def drafts(adaptation: Adaptation) -> Bool[Array, " B"]:
    """Which rows may draft now."""
    return adaptation.pause == 0


def update(
    adaptation: Adaptation, proposed: Int[Array, " B"], accepted: Int[Array, " B"], step_cost: Float[Array, ""]
) -> Adaptation:
    """Updates the running mean and the pauses after a step.

    Args:
      adaptation: before the step.
      proposed: `[B]` draft tokens proposed; 0 in a plain step.
      accepted: `[B]` draft tokens accepted.
      step_cost: time of a drafting step over that of a plain step.
    """
    drafted = proposed > 0
    gain = jnp.where(drafted, MEMORY * adaptation.gain + (1 - MEMORY) * accepted, adaptation.gain)
    # A step that pays raises the mean at once, so that one attempt after a pause is enough.
    gain = jnp.where(drafted & (1 + accepted >= step_cost), jnp.maximum(gain, accepted.astype(jnp.float32)), gain)
    losing = drafted & (1 + gain < step_cost)
    winning = drafted & ~losing
    lost = jnp.maximum(step_cost - 1 - accepted, 0.0)
    wait = jnp.maximum(adaptation.backoff, jnp.ceil(lost / TRIAL_SHARE).astype(jnp.int32))
    wait = jnp.minimum(wait, LAST_PAUSE)
    pause = jnp.where(losing, wait, jnp.maximum(adaptation.pause - 1, 0))
    backoff = jnp.where(losing, jnp.minimum(2 * wait, LAST_PAUSE), adaptation.backoff)
    return Adaptation(gain, pause, jnp.where(winning, FIRST_PAUSE, backoff))
