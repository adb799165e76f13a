"""Rules that give up exactness to accept more. They have `exact=False`, and are called with a number: `lenient(.3)`."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from specjax import sampling
from specjax.decoding.verify import trees
from specjax.decoding.verify.exact import own_draws, rejection_judge
from specjax.decoding.verify.rule import Accepts, Judge, Rule, of_drafts, verdict
from specjax.types import Proposal, StepKeys, Verdict


def _draws(accepts: Accepts) -> tuple[Judge, Judge]:
    """Two judges that accept by a criterion; the next token is drawn from the target, or is its argmax.

    Of a tree they accept the longest path of nodes that all meet it, and among equals the most probable one (Medusa,
    arXiv 2401.10774, section 2.3.1).
    """

    def judge(
        keys: StepKeys, target_probs: Float[Array, "T V"], proposal: Proposal, choose: Callable[[Array, Array], Array]
    ) -> Verdict:
        if proposal.parent is None:
            accepted = accepts(target_probs[:-1], proposal)
            return verdict(target_probs, proposal, accepted, lambda n: choose(keys.token[n], target_probs[n]))
        max_depth = keys.token.shape[0] - 1
        end = trees.longest_path(target_probs, proposal, accepts, max_depth)
        return trees.verdict_at(proposal, end, lambda n: choose(keys.token[n], target_probs[end]), max_depth)

    def best(_: Array, probs: Float[Array, " V"]) -> Array:
        return sampling.argmax(probs)

    return functools.partial(judge, choose=sampling.categorical), functools.partial(judge, choose=best)


def _within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name}={value} is outside [{low}, {high}].")


@functools.cache
def lenient(lenience: float) -> Rule:
    """Accepts with probability min(1, target(x) / (l draft(x))) (Leviathan et al. 2022, appendix A.5). Not exact.

    No token has more than 1/l times its probability under the target. At temperature 0, x is accepted where
    target(x) >= l max target, in the target's distribution at temperature 1 (the paper prints the inequality the other
    way round).

    Args:
      lenience: l in (0, 1]; 1 is `rejection`.

    Raises:
      ValueError: for l outside (0, 1].
    """
    if not 0 < lenience <= 1:
        raise ValueError(f"lenience={lenience} is outside (0, 1]; 1 is exact.")

    def near_best(target: Float[Array, "K V"], proposal: Proposal) -> Bool[Array, " K"]:
        return of_drafts(target, proposal) >= lenience * jnp.max(target, axis=-1)

    judge = functools.partial(rejection_judge, lenience=lenience)
    return Rule(judge, f"lenient:{lenience:g}", exact=False, at_zero=_draws(near_best)[1])


def typical(epsilon: float = 0.09, delta: float = 0.3) -> Rule:
    """Typical acceptance: target(x) > min(epsilon, delta exp(-entropy)) (Medusa, arXiv 2401.10774, §2.3.1). Not exact.

    Args:
      epsilon: the probability that is always enough.
      delta: the threshold relative to exp(-entropy), where the target is uncertain.

    Raises:
      ValueError: for numbers outside [0, 1].
    """
    _within("epsilon", epsilon, 0, 1)
    _within("delta", delta, 0, 1)
    return _typical(epsilon, delta)


# Equal numbers give the same rule, which is a static argument of the loop: nothing is compiled twice.
@functools.cache
def _typical(epsilon: float, delta: float) -> Rule:
    def is_typical(target: Float[Array, "K V"], proposal: Proposal) -> Bool[Array, " K"]:
        entropy = jnp.sum(jax.scipy.special.entr(target), axis=-1)
        return of_drafts(target, proposal) > jnp.minimum(epsilon, delta * jnp.exp(-entropy))

    drawn, best = _draws(is_typical)
    return Rule(drawn, f"typical:{epsilon:g},{delta:g}", exact=False, at_zero=best, trees=True)


def top_k(k: int, gap: float = float("inf")) -> Rule:
    """Accepts the target's k most probable tokens (blockwise decoding, arXiv 1811.03115, §5.1). Not exact.

    With a gap, only those whose log-probability is at most that far below the best (SpecDec, arXiv 2203.16487, eq. 7:
    top-beta within tau).

    Args:
      k: how many tokens; all ties at the cut count.
      gap: in nats.

    Raises:
      ValueError: for k < 1 or a negative gap.
    """
    if k < 1:
        raise ValueError(f"k={k}: at least 1.")
    if not gap >= 0:
        raise ValueError(f"gap={gap}: at least 0.")
    return _top_k(k, gap)


@functools.cache
def _top_k(k: int, gap: float) -> Rule:
    def among_best(target: Float[Array, "K V"], proposal: Proposal) -> Bool[Array, " K"]:
        of_draft = of_drafts(target, proposal)
        rank = jnp.sum(target > of_draft[:, None], axis=-1)
        distance = jnp.log(jnp.max(target, axis=-1)) - jnp.log(of_draft)
        return (rank < k) & (distance <= gap) & (of_draft > 0)

    drawn, best = _draws(among_best)
    name = f"top_k:{k}" if gap == float("inf") else f"top_k:{k},{gap:g}"
    return Rule(drawn, name, exact=False, at_zero=best, trees=True)


@functools.cache
def distance(epsilon: int) -> Rule:
    """Accepts x where |x - y| <= epsilon for the target's own token y (arXiv 1811.03115, §5.2). Not exact.

    For vocabularies whose ids are values on a scale, such as pixels.

    Args:
      epsilon: in ids; 0 accepts the target's own token alone.

    Raises:
      ValueError: for a negative epsilon.
    """
    if epsilon < 0:
        raise ValueError(f"epsilon={epsilon} is negative.")

    def judge(keys: StepKeys, target_probs: Float[Array, "T V"], proposal: Proposal) -> Verdict:
        own = own_draws(keys, target_probs, proposal)
        return verdict(target_probs, proposal, jnp.abs(proposal.tokens - own[:-1]) <= epsilon, lambda n: own[n])

    def best(keys: StepKeys, target_probs: Float[Array, "T V"], proposal: Proposal) -> Verdict:
        del keys
        own = sampling.argmax(target_probs)
        return verdict(target_probs, proposal, jnp.abs(proposal.tokens - own[:-1]) <= epsilon, lambda n: own[n])

    return Rule(judge, f"distance:{epsilon}", exact=False, at_zero=best)
