"""Acceptance rules: `(key, target_probs, proposal) -> Verdict`, of one row; the loop `vmap`s them.

`target_probs` is `[T, V]` with T = K + 1: row i is the target's distribution of the token at draft position i, given
the text and the draft tokens before it. The rules see distributions only after `sampling.probabilities` has made them,
on both sides.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from specjax import sampling
from specjax.types import PRNGKey, Proposal, Verdict


@dataclasses.dataclass(frozen=True)
class Rule:
    """An acceptance rule.

    Attributes:
      function: `(key, target_probs[K + 1, V], proposal) -> Verdict`.
      name: as results and flags call it.
      exact: whether the text is distributed exactly as the target's.
    """

    function: Callable[[PRNGKey, Float[Array, "T V"], Proposal], Verdict]
    name: str
    exact: bool

    def __call__(self, key: PRNGKey, target_probs: Float[Array, "T V"], proposal: Proposal) -> Verdict:
        """Judges one row's proposal."""
        return self.function(key, target_probs, proposal)


def _verdict(proposal: Proposal, accepted: Bool[Array, " K"], last: Callable[[Array], Array]) -> Verdict:
    """Accepts the leading run of `accepted`; `last(n)` chooses the token that follows it."""
    k = proposal.tokens.shape[0]
    position = jnp.arange(k + 1)
    run = jnp.cumprod(accepted & (position[:k] < proposal.length))
    n = jnp.sum(run, dtype=jnp.int32)
    drafts = jnp.concatenate([proposal.tokens, jnp.zeros(1, jnp.int32)])
    tokens = jnp.where(position < n, drafts, jnp.where(position == n, last(n), 0))
    return Verdict(tokens.astype(jnp.int32), n)


def _greedy(key: PRNGKey, target_probs: Float[Array, "T V"], proposal: Proposal) -> Verdict:
    del key
    best = jnp.argmax(target_probs, axis=-1)
    # The argmax of what is not a number is a token too; nothing is accepted there.
    is_number = target_probs[jnp.arange(proposal.tokens.shape[0]), proposal.tokens] >= 0
    return _verdict(proposal, (proposal.tokens == best[:-1]) & is_number, lambda n: best[n])


def draft_probs(proposal: Proposal, vocab_size: int) -> Float[Array, "K V"]:
    """The distribution of each draft token; one-hot for a drafter that states none."""
    if proposal.probs is None:
        return jax.nn.one_hot(proposal.tokens, vocab_size, dtype=jnp.float32)
    return proposal.probs


def _rejection(key: PRNGKey, target_probs: Float[Array, "T V"], proposal: Proposal) -> Verdict:
    k, vocab_size = proposal.tokens.shape[0], target_probs.shape[-1]
    draft = draft_probs(proposal, vocab_size)
    key_accept, key_last = jax.random.split(key)

    # Algorithm 1, "determine the number of accepted guesses": r_i > p_i(x_i) / q_i(x_i) rejects.
    r = jax.random.uniform(key_accept, (k,))
    index = jnp.arange(k), proposal.tokens
    accepted = r * draft[index] < target_probs[index]

    # "Adjust the distribution if needed": p'(x) = norm(max(0, p - q)) after a rejection, p after full acceptance.
    def last(n: Int[Array, ""]) -> Int[Array, ""]:
        target = target_probs[n]
        if k == 0:
            return sampling.categorical(key_last, target)
        subtract = jnp.where(n < proposal.length, draft[jnp.minimum(n, k - 1)], 0.0)
        residual = jnp.maximum(target - subtract, 0.0)
        # Rounding can empty the residual of two equal distributions; then the target itself is the limit.
        residual = jnp.where(jnp.sum(residual) > 0, residual, target)
        return sampling.categorical(key_last, residual)

    return _verdict(proposal, accepted, last)


greedy = Rule(_greedy, "greedy", exact=True)
"""Accepts draft tokens while they are the target's argmax; the next token is the argmax after them.

Exact for temperature 0, where the target's distribution is one-hot (for other temperatures it decodes as if it were 0,
so the front door refuses that).
"""

rejection = Rule(_rejection, "rejection", exact=True)
"""Speculative sampling: Leviathan et al. 2022, Algorithm 1 = Chen et al. 2023, Algorithm 2.

Accepts draft token x with probability min(1, target(x) / draft(x)); the first rejection resamples from
norm(max(0, target - draft)) and ends the step; full acceptance draws one more token from the target. The result is
distributed as the target (Leviathan et al., appendix A.1), provided that each draft token was sampled from the
stated draft distribution.
"""

RULES: dict[str, Rule] = {rule.name: rule for rule in (greedy, rejection)}
"""By name, for flags."""


def overlap(target_probs: Float[Array, "T V"], proposal: Proposal) -> Float[Array, " K"]:
    """`sum_x min(target(x), draft(x))` at each draft position: the chance of acceptance, beta (Leviathan, Def. 3.1)."""
    if proposal.probs is None:
        return target_probs[jnp.arange(proposal.tokens.shape[0]), proposal.tokens]
    return jnp.sum(jnp.minimum(target_probs[:-1], proposal.probs), axis=-1)
