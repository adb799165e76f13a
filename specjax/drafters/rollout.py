"""K tokens from a draft model, each drawn given those before it: shared by all drafters of chains that run a model."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from specjax import control, sampling
from specjax.drafters.children import has_no_token
from specjax.sampling import processors
from specjax.types import Block, Context, History, Model, Proposal, SamplingOptions, Topology, Tree


def choose(
    logits: Float[Array, "B 1 W"], key: Array, history: History, options: SamplingOptions, vocab_size: int
) -> tuple[Int[Array, " B"], Float[Array, "B V"], Bool[Array, " B"]]:
    """A token for each row, its distribution, and whether the options left any of the tokens that the draft knows.

    Args:
      logits: of the draft.
      key: `[B]`.
      history: the text before the token (T = 1).
      options: of the rows.
      vocab_size: V of the target.
    """
    logits = sampling.match_vocab(logits, vocab_size)
    probs = sampling.probabilities(logits, options, history)[:, 0]
    going = ~has_no_token(logits, probs[:, None])[:, 0]
    probs = jnp.where(going[:, None], probs, 0.0)
    return sampling.sample(key, probs, options), probs, going


def _confidence(logits: Float[Array, "B 1 V"]) -> Float[Array, " B"]:
    """The probability of the most probable token."""
    return jnp.exp(jnp.max(logits, axis=-1) - jax.nn.logsumexp(logits, axis=-1))[:, 0]


class Chain(NamedTuple):
    """A draft model, and how many tokens it drafts.

    Attributes:
      draft: the model.
      num_draft_tokens: K, the most tokens of a draft.
      lengths: of `Topology`: a step in which no row may draft more tokens than one of these calls the model so often.
    """

    draft: Model
    num_draft_tokens: int
    lengths: tuple[int, ...] = ()

    @property
    def topology(self) -> Topology:
        """That of its drafter."""
        return Topology.chain(self.num_draft_tokens, self.lengths)


class Rollout(NamedTuple):
    """What the model has drafted.

    Attributes:
      tokens: `[B, K]` the draft tokens of all rows.
      probs: `[B, K, V]` the distribution that each was drawn from.
      length: `[B]` how many there are.
      cache: the draft's.
      confidence: `[B, K]` the probability of the draft's most probable token at the place of each; None without a
        threshold, where nobody asks for it.
    """

    tokens: Int[Array, "B K"]
    probs: Float[Array, "B K V"]
    length: Int[Array, " B"]
    cache: Any
    confidence: Float[Array, "B K"] | None = None

    def proposal(self, context: Context) -> Proposal:
        """The draft tokens that the rows can use."""
        length = jnp.minimum(context.max_draft, self.length)
        return Proposal(self.tokens, length, self.probs, confidence=self.confidence)


def _extend(
    chain: Chain, params: Tree, cache: Any, token: Int[Array, " B"], history: History, context: Context
) -> tuple[Float[Array, "B 1 W"], Any, History]:
    """The logits after one more token of each row."""
    history = processors.extend(history, token, context.sampling.penalties)
    output, cache = chain.draft.apply(params, Block(token[:, None]), cache)
    return output.logits, chain.draft.commit(cache, None, jnp.ones_like(token)), history


def _pick(
    logits: Float[Array, "B 1 W"], key: Array, history: History, context: Context, going: Bool[Array, " B"]
) -> tuple[Int[Array, " B"], Float[Array, "B V"], Bool[Array, " B"]]:
    """`choose` for the rows that still draft."""
    token, probs, some = choose(logits, key, history, context.sampling, context.vocab_size)
    return token, jnp.where(going[:, None], probs, 0.0), going & some


def threshold(min_confidence: float, context: Context) -> Float[Array, " B"] | None:
    """The same threshold for every row, as `draw` takes it; None for 0, which never ends a draft."""
    return jnp.full(context.max_draft.shape, min_confidence) if min_confidence else None


def none(chain: Chain, cache: Any, context: Context, threshold: Float[Array, " B"] | None = None) -> Rollout:
    """The rollout where no row drafts; the arguments are those of `draw`."""
    shape = context.max_draft.shape[0], chain.num_draft_tokens
    return Rollout(
        jnp.zeros(shape, jnp.int32),
        jnp.zeros((*shape, context.vocab_size)),
        jnp.zeros(shape[0], jnp.int32),
        cache,
        None if threshold is None else jnp.zeros(shape),
    )


def draw(
    chain: Chain,
    params: Tree,
    logits: Float[Array, "B 1 W"],
    cache: Any,
    context: Context,
    threshold: Float[Array, " B"] | None = None,
) -> Rollout:
    """Draws K tokens for each row, each given those before it.

    Args:
      chain: the draft model, and how far it drafts.
      params: its parameters.
      logits: the draft's, after the text.
      cache: its cache of the whole text.
      context: of the step.
      threshold: `[B]` a row's draft ends after the first token at whose position the draft's most probable token was
        less probable than that; None: it does not.
    """
    keys, going = jnp.swapaxes(context.keys, 0, 1), jnp.ones(context.max_draft.shape, bool)
    first = _pick(logits, keys[0], context.history, context, going)
    if threshold is not None:
        return _while_sure(chain, params, cache, context, first, _confidence(logits), threshold)

    def draft_one(carry: tuple[Any, Array, Array, History], key: Array) -> tuple[Any, tuple[Array, Array, Array]]:
        cache, token, going, history = carry
        logits, cache, history = _extend(chain, params, cache, token, history, context)
        token, probs, going = _pick(logits, key, history, context, going)
        return (cache, token, going, history), (token, probs, going)

    begin, *others = chain.topology.all_lengths
    carry, rest = jax.lax.scan(draft_one, (cache, first[0], first[2], context.history), keys[1:begin])
    drawn = tuple(jnp.concatenate([a[None], b]) for a, b in zip(first, rest, strict=True))
    if others:
        drawn = tuple(jnp.pad(x, ((0, others[-1] - begin), *[(0, 0)] * (x.ndim - 1))) for x in drawn)
    for end in others:

        def go_on(state: tuple[Any, Any], span: slice = slice(begin, end)) -> tuple[Any, Any]:
            carry, more = jax.lax.scan(draft_one, state[0], keys[span])
            return carry, tuple(x.at[span].set(new) for x, new in zip(state[1], more, strict=True))

        # A longer draft is drawn where some row may use it.
        carry, drawn = control.once(jnp.any(context.max_draft > begin), go_on, (carry, drawn))
        begin = end
    tokens, probs, going = (jnp.swapaxes(x, 0, 1) for x in drawn)
    return Rollout(tokens, probs, jnp.sum(going, axis=1, dtype=jnp.int32), carry[0])


def _while_sure(
    chain: Chain,
    params: Tree,
    cache: Any,
    context: Context,
    first: tuple[Array, Array, Array],
    confidence: Float[Array, " B"],
    threshold: Float[Array, " B"],
) -> Rollout:
    """The rest of a rollout, until every row has come to a position at which the draft was unsure."""
    token, drawn_from, going = first
    empty = none(chain, cache, context, threshold)
    assert empty.confidence is not None
    begin = Rollout(
        empty.tokens.at[:, 0].set(token),
        empty.probs.at[:, 0].set(drawn_from),
        going.astype(jnp.int32),
        cache,
        empty.confidence.at[:, 0].set(confidence),
    )

    def is_going_on(carry: Any) -> Array:
        position, sure = carry[:2]
        return (position < chain.num_draft_tokens) & jnp.any(sure & (position < context.max_draft))

    def draft_one(carry: Any) -> Any:
        position, sure, history, drawn = carry
        token = jax.lax.dynamic_index_in_dim(drawn.tokens, position - 1, axis=1, keepdims=False)
        logits, cache, history = _extend(chain, params, drawn.cache, token, history, context)
        token, drawn_from, going = _pick(logits, context.keys[:, position], history, context, sure)
        confidence = _confidence(logits)
        drawn = Rollout(
            drawn.tokens.at[:, position].set(token),
            drawn.probs.at[:, position].set(drawn_from),
            drawn.length + going,
            cache,
            drawn.confidence.at[:, position].set(confidence),
        )
        return position + 1, going & (confidence >= threshold), history, drawn

    carry = jnp.int32(1), going & (confidence >= threshold), context.history, begin
    return jax.lax.while_loop(is_going_on, draft_one, carry)[-1]
