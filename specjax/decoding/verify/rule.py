"""What all acceptance rules are made of: the `Rule`, the draft's distributions, and verdicts on one row."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from specjax import sampling
from specjax.sampling import tree
from specjax.types import Proposal, StepKeys, Verdict

Judge = Callable[[StepKeys, Float[Array, "T V"], Proposal], Verdict]
"""Judges one row's proposal, given the keys of the step and the target's distributions."""

Accepts = Callable[[Float[Array, "K V"], Proposal], Bool[Array, " K"]]
"""Says which draft tokens are accepted, given the target's distribution before each of them."""


def verdict(
    target_probs: Float[Array, "T V"],
    proposal: Proposal,
    accepted: Bool[Array, " K"],
    last: Callable[[Array], Array],
) -> Verdict:
    """Accepts the leading run of `accepted`; `last(n)` chooses the token that follows it.

    Whatever a criterion says, nothing is accepted beyond the proposal, outside the vocabulary, or where the target's
    distribution is NaN.
    """
    position = jnp.arange(proposal.tokens.shape[0])
    can_be = (position < proposal.length) & is_known(target_probs, proposal)
    can_be &= of_drafts(target_probs, proposal) >= 0
    run = jnp.cumprod(accepted & can_be)
    n = jnp.sum(run, dtype=jnp.int32)
    return accept(proposal, n, last(n))


def accept(proposal: Proposal, n: Int[Array, ""], last: Int[Array, ""]) -> Verdict:
    """The first n draft tokens, then `last`."""
    position = jnp.arange(proposal.tokens.shape[0] + 1)
    drafts = jnp.concatenate([proposal.tokens, jnp.zeros(1, jnp.int32)])
    tokens = jnp.where(position < n, drafts, jnp.where(position == n, last, 0))
    return Verdict(tokens.astype(jnp.int32), n)


def agree(own: Int[Array, " T"], keys: StepKeys, target_probs: Float[Array, "T V"], proposal: Proposal) -> Verdict:
    """Accepts draft tokens while they are the target's own; its next token follows them."""
    if proposal.parent is None:
        return verdict(target_probs, proposal, proposal.tokens == own[:-1], lambda n: own[n])
    is_distribution = ~jnp.isnan(jnp.sum(target_probs, axis=-1))
    path, n = tree.walk(own, is_distribution, proposal, keys.token.shape[0] - 1)
    # The token of each node on the path is the target's own after the node before it.
    return Verdict(jnp.where(jnp.arange(path.shape[0]) <= n, own[path], 0), n, path)


def greedy_judge(keys: StepKeys, target_probs: Float[Array, "T V"], proposal: Proposal) -> Verdict:
    """Accepts draft tokens while they are the target's argmax."""
    return agree(sampling.argmax(target_probs), keys, target_probs, proposal)


@dataclasses.dataclass(frozen=True)
class Rule:
    """An acceptance rule.

    Attributes:
      function: `(keys, target_probs[K + 1, V], proposal) -> Verdict`.
      name: its name in results and flags.
      exact: whether the text is distributed exactly as the target's.
      coupled: whether the drafter is to draw each token with the key that the target would draw it with.
      at_zero: the function for rows at temperature 0. For an exact rule that is `greedy`, on one-hot distributions. A
        rule that is not exact judges them on the target's distribution at temperature 1. The default is `greedy`, and
        `generate` warns where a rule keeps it.
      trees: whether it judges trees; all rules judge chains.
      own_draws: whether it needs draws of their own for the children of each node (see `Topology.shares_draws`).
    """

    function: Judge
    name: str
    exact: bool
    coupled: bool = False
    at_zero: Judge = greedy_judge
    trees: bool = False
    own_draws: bool = False

    def __call__(self, keys: StepKeys, target_probs: Float[Array, "T V"], proposal: Proposal) -> Verdict:
        """Judges one row's proposal."""
        return self.function(keys, target_probs, proposal)


def draft_probs(proposal: Proposal, vocab_size: int) -> Float[Array, "K V"]:
    """The distribution of each draft token; one-hot for a drafter that states none."""
    if proposal.probs is None:
        return jax.nn.one_hot(proposal.tokens, vocab_size, dtype=jnp.float32)
    return proposal.probs


def is_known(probs: Float[Array, "T V"], proposal: Proposal) -> Bool[Array, " K"]:
    """Whether each draft token is one of the V of the vocabulary."""
    return (proposal.tokens >= 0) & (proposal.tokens < probs.shape[-1])


def of_drafts(probs: Float[Array, "T V"], proposal: Proposal) -> Float[Array, " K"]:
    """The probability of each draft token; 0 for a token outside the vocabulary."""
    k, size = proposal.tokens.shape[0], probs.shape[-1]
    if k == 1:
        # XLA makes a slice of a look-up with one index, and gathers a vocabulary that is split over devices for it.
        return jnp.sum(jnp.where(jnp.arange(size) == proposal.tokens[:, None], probs[:k], 0.0), axis=-1)
    found = probs[jnp.arange(k), jnp.clip(proposal.tokens, 0, size - 1)]
    return jnp.where(is_known(probs, proposal), found, 0.0)


def residual_or(
    target: Float[Array, " V"], scale: Float[Array, ""] | float, draft: Float[Array, " V"]
) -> Float[Array, " V"]:
    """max(0, scale * target - draft), not normalised; the target itself where rounding leaves nothing.

    Two equal distributions leave nothing, but then only rounding can cause a rejection.
    """
    residual = jnp.maximum(scale * target - draft, 0.0)
    return jnp.where(jnp.sum(residual) > 0, residual, target)


def draft_row(draft: Float[Array, "K V"], n: Int[Array, ""], proposal: Proposal) -> Float[Array, " V"]:
    """The draft's distribution at position n; zero beyond the proposal, where the residual is the target itself."""
    if not proposal.tokens.shape[0]:
        return jnp.zeros(draft.shape[1])
    return jnp.where(n < proposal.length, draft[jnp.minimum(n, draft.shape[0] - 1)], 0.0)


def overlap(target_probs: Float[Array, "T V"], proposal: Proposal, lenience: float = 1.0) -> Float[Array, " K"]:
    """`sum_x min(target(x) / l, draft(x))` at each draft position: the chance of acceptance, beta.

    Leviathan et al. 2022, Definition 3.1 and Corollary 3.6; with a lenience l < 1, appendix A.5.
    """
    if proposal.probs is None:
        return jnp.minimum(of_drafts(target_probs, proposal) / lenience, 1.0)
    return jnp.sum(jnp.minimum(target_probs[:-1] / lenience, proposal.probs), axis=-1)
