"""Acceptance rules: `(keys, target_probs, proposal) -> Verdict`, for one row; the loop `vmap`s them.

`target_probs` is `[T, V]` with T = N + 1: for a chain, row i is the target's distribution of the token at draft
position i, given the text and the draft tokens before it; for a tree, row i + 1 is that of the token after node i, and
row 0 that of the first token. Target and draft distributions are those that `sampling.probabilities` returns. Where a
paper counts draft tokens from 1, x_i is `proposal.tokens[i - 1]`.

`greedy`, `rejection`, `block` and `coupled` are exact, and so is `observe`, which only measures. The others give up
exactness to accept more; they have `exact=False`, and are called with a number: `lenient(0.3)`.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from specjax import sampling
from specjax.sampling import tree
from specjax.types import Proposal, StepKeys, Verdict

Judge = Callable[[StepKeys, Float[Array, "T V"], Proposal], Verdict]


def _verdict(
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
    can_be = (position < proposal.length) & _is_known(target_probs, proposal)
    can_be &= _of_drafts(target_probs, proposal) >= 0
    run = jnp.cumprod(accepted & can_be)
    n = jnp.sum(run, dtype=jnp.int32)
    return _accept(proposal, n, last(n))


def _accept(proposal: Proposal, n: Int[Array, ""], last: Int[Array, ""]) -> Verdict:
    """The first n draft tokens, then `last`."""
    position = jnp.arange(proposal.tokens.shape[0] + 1)
    drafts = jnp.concatenate([proposal.tokens, jnp.zeros(1, jnp.int32)])
    tokens = jnp.where(position < n, drafts, jnp.where(position == n, last, 0))
    return Verdict(tokens.astype(jnp.int32), n)


def _agree(own: Int[Array, " T"], keys: StepKeys, target_probs: Float[Array, "T V"], proposal: Proposal) -> Verdict:
    """Accepts draft tokens while they are the target's own; its next token follows them."""
    if proposal.parent is None:
        return _verdict(target_probs, proposal, proposal.tokens == own[:-1], lambda n: own[n])
    is_distribution = ~jnp.isnan(jnp.sum(target_probs, axis=-1))
    path, n = tree.walk(own, is_distribution, proposal, keys.token.shape[0] - 1)
    # The token of each node on the path is the target's own after the node before it.
    return Verdict(jnp.where(jnp.arange(path.shape[0]) <= n, own[path], 0), n, path)


def _greedy(keys: StepKeys, target_probs: Float[Array, "T V"], proposal: Proposal) -> Verdict:
    return _agree(sampling.argmax(target_probs), keys, target_probs, proposal)


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
    """

    function: Judge
    name: str
    exact: bool
    coupled: bool = False
    at_zero: Judge = _greedy
    trees: bool = False

    def __call__(self, keys: StepKeys, target_probs: Float[Array, "T V"], proposal: Proposal) -> Verdict:
        """Judges one row's proposal."""
        return self.function(keys, target_probs, proposal)


def draft_probs(proposal: Proposal, vocab_size: int) -> Float[Array, "K V"]:
    """The distribution of each draft token; one-hot for a drafter that states none."""
    if proposal.probs is None:
        return jax.nn.one_hot(proposal.tokens, vocab_size, dtype=jnp.float32)
    return proposal.probs


def _is_known(probs: Float[Array, "T V"], proposal: Proposal) -> Bool[Array, " K"]:
    """Whether each draft token is one of the V of the vocabulary."""
    return (proposal.tokens >= 0) & (proposal.tokens < probs.shape[-1])


def _of_drafts(probs: Float[Array, "T V"], proposal: Proposal) -> Float[Array, " K"]:
    """The probability of each draft token; 0 for a token outside the vocabulary."""
    size = probs.shape[-1]
    found = probs[jnp.arange(proposal.tokens.shape[0]), jnp.clip(proposal.tokens, 0, size - 1)]
    return jnp.where(_is_known(probs, proposal), found, 0.0)


def _residual_or(
    target: Float[Array, " V"], scale: Float[Array, ""] | float, draft: Float[Array, " V"]
) -> Float[Array, " V"]:
    """max(0, scale * target - draft), not normalised; the target itself where rounding leaves nothing.

    Two equal distributions leave nothing, but then only rounding can cause a rejection.
    """
    residual = jnp.maximum(scale * target - draft, 0.0)
    return jnp.where(jnp.sum(residual) > 0, residual, target)


def _draft_row(draft: Float[Array, "K V"], n: Int[Array, ""], proposal: Proposal) -> Float[Array, " V"]:
    """The draft's distribution at position n; zero beyond the proposal, where the residual is the target itself."""
    if not proposal.tokens.shape[0]:
        return jnp.zeros(draft.shape[1])
    return jnp.where(n < proposal.length, draft[jnp.minimum(n, draft.shape[0] - 1)], 0.0)


def _rejection(
    keys: StepKeys, target_probs: Float[Array, "T V"], proposal: Proposal, *, lenience: float = 1.0
) -> Verdict:
    draft = draft_probs(proposal, target_probs.shape[-1])

    # Algorithm 1, "determine the number of accepted guesses": r_i > p_i(x_i) / q_i(x_i) rejects. Appendix A.5
    # multiplies q by the lenience first.
    r = sampling.uniform(keys.accept, proposal.tokens.shape)
    accepted = r * lenience * _of_drafts(draft, proposal) < _of_drafts(target_probs, proposal)

    # "Adjust the distribution if needed": p'(x) = norm(max(0, p - q)) after a rejection, p after full acceptance.
    def last(n: Int[Array, ""]) -> Int[Array, ""]:
        return sampling.categorical(keys.token[n], _residual_or(target_probs[n], 1.0, _draft_row(draft, n, proposal)))

    return _verdict(target_probs, proposal, accepted, last)


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
    of_target = _of_drafts(target_probs, proposal)
    ratios = jnp.where(of_target > 0, of_target / _of_drafts(draft, proposal), 0.0)
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
    residual = _residual_or(target_probs[tau], p[tau], _draft_row(draft, tau, proposal))
    residual = jnp.where(tau < proposal.length, residual, target_probs[tau])
    return _accept(proposal, tau, sampling.categorical(keys.token[tau], residual))


def _own(keys: StepKeys, target_probs: Float[Array, "T V"], proposal: Proposal) -> Int[Array, " T"]:
    """The target's own draw at every position, given that all drafts before it are accepted."""
    token_keys = keys.token
    if proposal.parent is not None:
        token_keys = token_keys[tree.shape(proposal.parent[None], token_keys.shape[0] - 1).depth[0]]
    return jax.vmap(sampling.categorical)(token_keys, target_probs)


def _coupled(keys: StepKeys, target_probs: Float[Array, "T V"], proposal: Proposal) -> Verdict:
    return _agree(_own(keys, target_probs, proposal), keys, target_probs, proposal)


def _nothing(keys: StepKeys, proposal: Proposal, last: Int[Array, ""]) -> Verdict:
    tokens = jnp.zeros(keys.token.shape[0], jnp.int32)
    return Verdict(tokens.at[0].set(last), tokens[0], None if proposal.parent is None else tokens)


def _observe(keys: StepKeys, target_probs: Float[Array, "T V"], proposal: Proposal) -> Verdict:
    return _nothing(keys, proposal, sampling.categorical(keys.token[0], target_probs[0]))


def _observe_greedy(keys: StepKeys, target_probs: Float[Array, "T V"], proposal: Proposal) -> Verdict:
    return _nothing(keys, proposal, sampling.argmax(target_probs[0]))


greedy = Rule(_greedy, "greedy", exact=True, trees=True)
"""Accepts draft tokens while they are the target's argmax; the next token is the argmax after them.

Exact for temperature 0, where the target's distribution is one-hot. It decodes any other temperature as if it were 0,
so `generate` refuses that.
"""

rejection = Rule(_rejection, "rejection", exact=True)
"""Speculative sampling: Leviathan et al. 2022, Algorithm 1 = Chen et al. 2023, Algorithm 2.

Accepts draft token x with probability min(1, target(x) / draft(x)); the first rejection resamples from
norm(max(0, target - draft)) and ends the step; full acceptance draws one more token from the target. The result is
distributed as the target (Leviathan et al., appendix A.1), provided that each draft token was sampled from the
stated draft distribution.
"""

block = Rule(_block, "block", exact=True)
"""Block verification: Sun et al. 2024, arXiv 2403.10444, Algorithm 2.

Judges the draft as a whole: a token that would be rejected alone can be saved by more probable ones before and after.
Exact like `rejection`, and in expectation it never accepts fewer tokens.
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


def _draws(accepts: Callable[[Float[Array, "K V"], Proposal], Bool[Array, " K"]]) -> tuple[Judge, Judge]:
    """Two judges that accept by a criterion; the next token is drawn from the target, or is its argmax."""

    def drawn(keys: StepKeys, target_probs: Float[Array, "T V"], proposal: Proposal) -> Verdict:
        accepted = accepts(target_probs[:-1], proposal)
        return _verdict(
            target_probs, proposal, accepted, lambda n: sampling.categorical(keys.token[n], target_probs[n])
        )

    def best(keys: StepKeys, target_probs: Float[Array, "T V"], proposal: Proposal) -> Verdict:
        del keys
        accepted = accepts(target_probs[:-1], proposal)
        return _verdict(target_probs, proposal, accepted, lambda n: sampling.argmax(target_probs[n]))

    return drawn, best


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
        return _of_drafts(target, proposal) >= lenience * jnp.max(target, axis=-1)

    judge = functools.partial(_rejection, lenience=lenience)
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
        return _of_drafts(target, proposal) > jnp.minimum(epsilon, delta * jnp.exp(-entropy))

    drawn, best = _draws(is_typical)
    return Rule(drawn, f"typical:{epsilon:g},{delta:g}", exact=False, at_zero=best)


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
        of_draft = _of_drafts(target, proposal)
        rank = jnp.sum(target > of_draft[:, None], axis=-1)
        distance = jnp.log(jnp.max(target, axis=-1)) - jnp.log(of_draft)
        return (rank < k) & (distance <= gap) & (of_draft > 0)

    drawn, best = _draws(among_best)
    name = f"top_k:{k}" if gap == float("inf") else f"top_k:{k},{gap:g}"
    return Rule(drawn, name, exact=False, at_zero=best)


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
        own = _own(keys, target_probs, proposal)
        return _verdict(target_probs, proposal, jnp.abs(proposal.tokens - own[:-1]) <= epsilon, lambda n: own[n])

    def best(keys: StepKeys, target_probs: Float[Array, "T V"], proposal: Proposal) -> Verdict:
        del keys
        own = sampling.argmax(target_probs)
        return _verdict(target_probs, proposal, jnp.abs(proposal.tokens - own[:-1]) <= epsilon, lambda n: own[n])

    return Rule(judge, f"distance:{epsilon}", exact=False, at_zero=best)


RULES: dict[str, Rule | Callable[..., Rule]] = {
    "greedy": greedy,
    "rejection": rejection,
    "block": block,
    "coupled": coupled,
    "observe": observe,
    "lenient": lenient,
    "typical": typical,
    "top_k": top_k,
    "distance": distance,
}
"""The rules by name, for flags; a value that is not a rule is a function of numbers that returns one."""


def overlap(target_probs: Float[Array, "T V"], proposal: Proposal, lenience: float = 1.0) -> Float[Array, " K"]:
    """`sum_x min(target(x) / l, draft(x))` at each draft position: the chance of acceptance, beta.

    Leviathan et al. 2022, Definition 3.1 and Corollary 3.6; with a lenience l < 1, appendix A.5.
    """
    if proposal.probs is None:
        return jnp.minimum(_of_drafts(target_probs, proposal) / lenience, 1.0)
    return jnp.sum(jnp.minimum(target_probs[:-1] / lenience, proposal.probs), axis=-1)


_EXAMPLES = {"lenient": "0.3", "typical": "0.09,0.3", "top_k": "3", "distance": "2"}
"""Example numbers for error messages, by the name of the function that makes a rule of them."""


def parse(rule: Any) -> Rule:
    """The rule that a user means: a `Rule`, or a name such as "rejection", "lenient:0.3" or "top_k:3,1.0".

    Raises:
      ValueError: for a name that is not known, or numbers that make no sense.
      TypeError: for any other object, such as `verify.lenient` without its number.
    """
    if isinstance(rule, Rule):
        return rule
    if isinstance(rule, str):
        return _named(rule)
    for name, numbers in _EXAMPLES.items():
        if rule is RULES[name]:
            raise TypeError(
                f"verify=verify.{name} is not called: write verify.{name}({', '.join(numbers.split(','))}), "
                f"or {f'{name}:{numbers}'!r}."
            )
    if callable(rule) and not isinstance(rule, type):
        called = getattr(rule, "__name__", None) or type(rule).__name__
        raise TypeError(
            f"verify={called} is a function, not a rule: write verify.Rule({called}, name={called!r}, exact=False)."
        )
    raise TypeError(f"verify={rule!r} is not a rule: give a verify.Rule, or one of the names {', '.join(RULES)}.")


def _named(text: str) -> Rule:
    head, colon, numbers = text.strip().partition(":")
    found = RULES.get(head)
    if found is None:
        raise ValueError(f"verify={text!r} is not known: choose one of {', '.join(RULES)}.")
    if isinstance(found, Rule):
        if colon:
            raise ValueError(f"verify={text!r}: {head} takes no number.")
        return found
    try:
        return found(*_numbers(found, numbers.split(",") if colon else []))
    except ValueError as error:
        raise ValueError(f"verify={text!r}: {error} Write it as {head}:{_EXAMPLES[head]}.") from error


def _numbers(make: Callable[..., Rule], texts: list[str]) -> list[int | float]:
    """The numbers in the name of a rule, in the types that `make` takes."""
    parameters = list(inspect.signature(make).parameters.values())
    needed = sum(parameter.default is parameter.empty for parameter in parameters)
    if not needed <= len(texts) <= len(parameters):
        names = ", ".join(parameter.name for parameter in parameters)
        raise ValueError(f"{len(texts)} numbers are given; it takes {names}.")
    values = []
    for parameter, text in zip(parameters, texts, strict=False):
        kind = "a whole number" if parameter.annotation is int else "a number"
        try:
            value = parameter.annotation(text)
        except ValueError as error:
            raise ValueError(f"{parameter.name}={text!r} is not {kind}.") from error
        # The rules compute in float32 and int32.
        if abs(value) >= 2**31 and value != float("inf"):
            raise ValueError(f"{parameter.name}={text} is too large.")
        if value and not jnp.float32(value):
            raise ValueError(f"{parameter.name}={text} is 0 in float32.")
        values.append(value)
    return values


def replaced_at_zero(rule: Rule) -> str:
    """The warning for a rule that judges rows at temperature 0 by default; empty for the rules of this module."""
    if rule.at_zero is not _greedy or any(rule is known for known in (greedy, rejection, block, coupled)):
        return ""
    return (
        f"verify={rule.name} has no `at_zero` of its own: at temperature 0 greedy takes its place, which accepts the "
        "target's most probable token alone. Give verify.Rule(..., at_zero=...) to judge such rows otherwise."
    )
