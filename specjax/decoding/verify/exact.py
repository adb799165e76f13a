"""The exact rules: whatever they accept, the text is distributed as the target's."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from specjax import sampling
from specjax.decoding.verify import trees
from specjax.decoding.verify.rule import (
    Rule,
    accept,
    agree,
    draft_probs,
    draft_row,
    greedy_judge,
    of_drafts,
    residual_or,
    verdict,
)
from specjax.sampling import tree
from specjax.types import Proposal, StepKeys, Verdict


def rejection_judge(
    keys: StepKeys, target_probs: Float[Array, "T V"], proposal: Proposal, *, lenience: float = 1.0
) -> Verdict:
    """Speculative sampling of one row's chain, with a lenience that is 1 for the exact rule."""
    draft = draft_probs(proposal, target_probs.shape[-1])

    # Algorithm 1, "determine the number of accepted guesses": r_i > p_i(x_i) / q_i(x_i) rejects. Appendix A.5
    # multiplies q by the lenience first.
    r = sampling.uniform(keys.accept, proposal.tokens.shape)
    accepted = r * lenience * of_drafts(draft, proposal) < of_drafts(target_probs, proposal)

    # "Adjust the distribution if needed": p'(x) = norm(max(0, p - q)) after a rejection, p after full acceptance.
    def last(n: Int[Array, ""]) -> Int[Array, ""]:
        return sampling.categorical(keys.token[n], residual_or(target_probs[n], 1.0, draft_row(draft, n, proposal)))

    return verdict(target_probs, proposal, accepted, last)


def block_acceptance(
    target_probs: Float[Array, "T V"], proposal: Proposal
) -> tuple[Float[Array, " T"], Float[Array, " T"]]:
    """p_i and h_i of block verification, i = 0 .. K (Sun et al. 2024, Algorithm 2).

    Returns:
      p: `[K + 1]`, the chance that the first i draft tokens are accepted, given them.
      h: `[K + 1]`, the chance that exactly i are accepted, given that no longer prefix is accepted; h_0 = 1.
    """
    k = proposal.tokens.shape[0]
    draft = draft_probs(proposal, target_probs.shape[-1])

    def times(p: Array, ratio: Array) -> tuple[Array, Array]:
        p = jnp.minimum(p * ratio, 1.0)
        return p, p

    # A token of target probability 0 is never accepted, even where the draft also states 0 for it.
    of_target = of_drafts(target_probs, proposal)
    ratios = jnp.where(of_target > 0, of_target / of_drafts(draft, proposal), 0.0)
    p = jnp.concatenate([jnp.ones(1), jax.lax.scan(times, jnp.ones(()), ratios)[1]])
    # R_i = sum_x max(p_i target(x | x_1 .. x_i) - draft(x | x_1 .. x_i), 0)
    remaining = jnp.sum(jnp.maximum(p[:k, None] * target_probs[:k] - draft, 0.0), axis=-1)
    # In this order: what remains may be far smaller than 1.
    rest = remaining + (1.0 - p[:k])
    # Where `rest` is 0, p_i = 1 and the draft equals the target.
    h = jnp.append(jnp.where(rest <= 0, 1.0, remaining / rest), 0.0)
    position = jnp.arange(k + 1)
    h = jnp.where(position == proposal.length, p, jnp.where(position > proposal.length, 0.0, h))
    return p, h.at[0].set(1.0)


def _block(keys: StepKeys, target_probs: Float[Array, "T V"], proposal: Proposal) -> Verdict:
    draft = draft_probs(proposal, target_probs.shape[-1])
    p, h = block_acceptance(target_probs, proposal)
    # tau = max{i : eta_i <= h_i}: every prefix is tried, the longest that passes wins.
    eta = sampling.uniform(keys.accept, h.shape)
    tau = jnp.max(jnp.where(eta < h, jnp.arange(h.shape[0]), 0)).astype(jnp.int32)
    # tau < K: the next token from norm(max(0, p_tau target - draft)); tau = K: from the target.
    residual = residual_or(target_probs[tau], p[tau], draft_row(draft, tau, proposal))
    residual = jnp.where(tau < proposal.length, residual, target_probs[tau])
    return accept(proposal, tau, sampling.categorical(keys.token[tau], residual))


def own_draws(keys: StepKeys, target_probs: Float[Array, "T V"], proposal: Proposal) -> Int[Array, " T"]:
    """The target's own draw at every position, given that all drafts before it are accepted."""
    token_keys = keys.token
    if proposal.parent is not None:
        token_keys = token_keys[tree.shape(proposal.parent[None], token_keys.shape[0] - 1).depth[0]]
    return jax.vmap(sampling.categorical)(token_keys, target_probs)


def _coupled(keys: StepKeys, target_probs: Float[Array, "T V"], proposal: Proposal) -> Verdict:
    return agree(own_draws(keys, target_probs, proposal), keys, target_probs, proposal)


def _rejection(keys: StepKeys, target_probs: Float[Array, "T V"], proposal: Proposal) -> Verdict:
    judge = rejection_judge if proposal.parent is None else trees.recursive_rejection
    return judge(keys, target_probs, proposal)


def _traversal(keys: StepKeys, target_probs: Float[Array, "T V"], proposal: Proposal) -> Verdict:
    judge = _block if proposal.parent is None else trees.traversal
    return judge(keys, target_probs, proposal)


def _nothing(keys: StepKeys, proposal: Proposal, last: Int[Array, ""]) -> Verdict:
    tokens = jnp.zeros(keys.token.shape[0], jnp.int32)
    return Verdict(tokens.at[0].set(last), tokens[0], None if proposal.parent is None else tokens)


def _observe(keys: StepKeys, target_probs: Float[Array, "T V"], proposal: Proposal) -> Verdict:
    return _nothing(keys, proposal, sampling.categorical(keys.token[0], target_probs[0]))


def _observe_greedy(keys: StepKeys, target_probs: Float[Array, "T V"], proposal: Proposal) -> Verdict:
    return _nothing(keys, proposal, sampling.argmax(target_probs[0]))


greedy = Rule(greedy_judge, "greedy", exact=True, trees=True)
"""Accepts draft tokens while they are the target's argmax; the next token is the argmax after them.

Exact for temperature 0, where the target's distribution is one-hot. It decodes any other temperature as if it were 0,
so `generate` refuses that.
"""

rejection = Rule(_rejection, "rejection", exact=True, trees=True)
"""Speculative sampling: Leviathan et al. 2022, Algorithm 1 = Chen et al. 2023, Algorithm 2.

Accepts draft token x with probability min(1, target(x) / draft(x)); the first rejection resamples from
norm(max(0, target - draft)) and ends the step; full acceptance draws one more token from the target. The result is
distributed as the target (Leviathan et al., appendix A.1), provided that each draft token was sampled from the
stated draft distribution.

On a tree it is recursive rejection sampling: the children of a node are judged one after another, each rejection leaves
norm(max(0, target - draft)) as the target of the next child, and an accepted child's own children follow
(`trees.recursive_rejection` has the sources). It is exact for every kind of children, as `Proposal.probs` states them.
"""

block = Rule(_block, "block", exact=True)
"""Block verification: Sun et al. 2024, arXiv 2403.10444, Algorithm 2.

Judges the draft as a whole: a token that would be rejected alone can be saved by more probable ones before and after.
Exact like `rejection`, and in expectation it never accepts fewer tokens.
"""

traversal = Rule(_traversal, "traversal", exact=True, trees=True, own_draws=True)
"""Traversal verification: arXiv 2505.12398.

Judges a tree from its leaves: a path is accepted as a whole, or its last node is deleted and the rest of the tree gets
another chance, so that a node that would be rejected alone can be saved by those below it. Exact like `rejection` for
every kind of children, provided that the children of each node have a draw of their own: where all nodes of a depth
share one (`Topology.shares_draws`), what was seen below one node says something about the children of another. On a
chain it is `block`.
"""

coupled = Rule(_coupled, "coupled", exact=True, coupled=True, trees=True)
"""Gumbel coupling: arXiv 2408.07978.

Row and position fix one noise vector g. The target takes argmax(log target + g), the draft argmax(log draft + g);
drafts are accepted while they are equal. So the text is, token for token, that of plain decoding with the same seed,
for any drafter and K. A draft is accepted with probability at least (1 - TV) / (1 + TV), a little less than the 1 - TV
of `rejection`.
"""

observe = Rule(_observe, "observe", exact=True, at_zero=_observe_greedy, trees=True)
"""Accepts nothing: the text is plain decoding's, and `Stats.overlap` sums the acceptance probability at its positions.

So alpha is measured as E[sum_x min(target, draft)] on the target's own text (Leviathan et al. 2022, Table 3).
"""
