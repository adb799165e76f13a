"""Divergences between the distributions of a target and of a draft, which distillation minimises.

Each maps log-probabilities `(log_p [..., V] of the target, log_q [..., V] of the draft)` to `[...]`, in nats unless it
says otherwise. Tokens that either side never writes have log-probabilities of -inf; values and gradients are finite.
Zhou et al. 2023 (DistillSpec, arXiv 2310.08461), section 4, compares the first four.
"""

import functools
import math
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

Divergence = Callable[[Float[Array, "*B V"], Float[Array, "*B V"]], Float[Array, "*B"]]

FLOOR = -100.0
"""What stands for log 0 inside a divergence: a token that the draft lacks costs its probability times this."""

_LEAST = 1e-9
"""Added to the acceptance rate before its logarithm."""


_NEVER = -1e6
"""Below this a token is never written: a reduced head gives a finite logit to the tokens that it lacks."""


def _floored(log_p: Float[Array, "*B V"]) -> Float[Array, "*B V"]:
    return jnp.where(log_p < _NEVER, FLOOR, log_p)


def forward_kl(log_p: Float[Array, "*B V"], log_q: Float[Array, "*B V"]) -> Float[Array, "*B"]:
    """KL(p || q), which covers whatever the target writes."""
    return jnp.sum(jnp.exp(log_p) * (_floored(log_p) - _floored(log_q)), axis=-1)


def reverse_kl(log_p: Float[Array, "*B V"], log_q: Float[Array, "*B V"]) -> Float[Array, "*B"]:
    """KL(q || p), which avoids whatever the target does not write."""
    return forward_kl(log_q, log_p)


def jsd(log_p: Float[Array, "*B V"], log_q: Float[Array, "*B V"], beta: float = 0.5) -> Float[Array, "*B"]:
    """The generalised Jensen-Shannon divergence: beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q."""
    log_p, log_q = _floored(log_p), _floored(log_q)
    log_m = jnp.logaddexp(math.log(beta) + log_p, math.log1p(-beta) + log_q)
    return beta * forward_kl(log_p, log_m) + (1 - beta) * forward_kl(log_q, log_m)


def acceptance(log_p: Float[Array, "*B V"], log_q: Float[Array, "*B V"]) -> Float[Array, "*B"]:
    """The sum of min(p, q): the probability that rejection accepts a token (Leviathan et al. 2022, corollary 3.6)."""
    return jnp.sum(jnp.minimum(jnp.exp(log_p), jnp.exp(log_q)), axis=-1)


def total_variation(log_p: Float[Array, "*B V"], log_q: Float[Array, "*B V"]) -> Float[Array, "*B"]:
    """Half the sum of |p - q|, from 0 to 1: one minus the acceptance rate."""
    return 0.5 * jnp.sum(jnp.abs(jnp.exp(log_p) - jnp.exp(log_q)), axis=-1)


def negative_log_acceptance(log_p: Float[Array, "*B V"], log_q: Float[Array, "*B V"]) -> Float[Array, "*B"]:
    """-log of the acceptance rate: its gradient does not vanish where the draft is far from the target."""
    return -jnp.log(acceptance(log_p, log_q) + _LEAST)


DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "total_variation": total_variation,
    "nla": negative_log_acceptance,
}
"""By name; "jsd:BETA" is `jsd` with that beta."""


@functools.cache
def named(name: str) -> Divergence:
    """The divergence of a name; equal names give the same function, so that nothing is compiled twice.

    Raises:
      ValueError: for an unknown name, or a beta outside (0, 1).
    """
    kind, _, beta = name.partition(":")
    if kind not in DIVERGENCES or (beta and kind != "jsd"):
        raise ValueError(f"divergence={name!r}: choose one of {', '.join(DIVERGENCES)}, or jsd:BETA.")
    if not beta:
        return DIVERGENCES[kind]
    try:
        value = float(beta)
    except ValueError:
        value = math.nan
    if not 0 < value < 1:
        raise ValueError(f"divergence={name!r}: beta is a number between 0 and 1, such as jsd:0.5.")
    return functools.partial(jsd, beta=value)
