"""A second, smaller model drafts (Leviathan et al. 2022; Chen et al. 2023)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from specjax import sampling
from specjax.limits import check_num_draft_tokens
from specjax.sampling import processors
from specjax.types import Context, Drafter, Feedback, History, Inputs, Model, ModelOutput, Proposal, Tree


def model(draft: Any, *, num_draft_tokens: int = 4, min_confidence: float = 0.0) -> Drafter:
    """Drafts with another model of the same vocabulary.

    A row's draft ends before the first position at which the options leave none of the tokens that the draft knows.
    With `min_confidence`, drafting ends behind a token at whose place the draft gave its most probable token less than
    that: what would follow is rarely accepted. (Transformers' assisted generation has such a threshold.) The text stays
    exact, since where a draft ends depends on the tokens before that place only, never on the one drawn there.

    Args:
      draft: a `Model`, whose parameters the caller passes to the loop, or a `Pretrained`, which brings them.
      num_draft_tokens: K.
      min_confidence: from 0, which always drafts K tokens, to 1; a probability of the draft itself, without options.

    Raises:
      ValueError: for K < 0 or above `limits.MAX_DRAFT_TOKENS`, or a confidence that is no probability.
    """
    check_num_draft_tokens(num_draft_tokens)
    if not 0 <= min_confidence <= 1:
        raise ValueError(f"min_confidence={min_confidence}: a probability, from 0 (off) to 1.")
    if isinstance(draft, Model):
        return _drafter(draft, num_draft_tokens, min_confidence)
    return _drafter(draft.model, num_draft_tokens, min_confidence)._replace(source=draft)


def _confidence(logits: Float[Array, "B 1 V"]) -> Float[Array, " B"]:
    """The probability of the most probable token."""
    return jnp.exp(jnp.max(logits, axis=-1) - jax.nn.logsumexp(logits, axis=-1))[:, 0]


def _has_no_token(logits: Float[Array, "B 1 V"], probs: Float[Array, "B V"]) -> Bool[Array, " B"]:
    """Whether the options forbid every token that the draft knows; NaN logits are another matter, an error."""
    # A sum, since XLA:CPU may leave NaN out of a maximum.
    return jnp.isnan(jnp.sum(probs, axis=-1)) & (jnp.sum(logits, axis=-1) < jnp.inf)[:, 0]


def _window(tokens: Int[Array, "B L"], start: Int[Array, " B"], size: int) -> Int[Array, "B T"]:
    """`size` tokens of each row from that row's own position."""
    return jax.vmap(lambda row, at: jax.lax.dynamic_slice(row, (at,), (size,)))(tokens, start)


@functools.cache
def _drafter(draft: Model, num_draft_tokens: int, min_confidence: float) -> Drafter:
    """The state is the draft's cache, whose `length` counts its valid entries (see `models.cache`)."""
    k = num_draft_tokens

    def init(params: Tree, inputs: Inputs, target_output: ModelOutput, max_len: int) -> Any:
        del target_output
        return draft.prefill(params, inputs, draft.init_cache(inputs.tokens.shape[0], max_len))[1]

    def catch_up(params: Tree, cache: Any, context: Context) -> Any:
        """Reads the text that plain steps have added, K + 1 tokens a call; the cache then lacks the last two."""
        needed = jnp.maximum(context.history.length - 2, 0)

        def behind(cache: Any) -> Array:
            # Of every row: one that does not draft now has its last two tokens rewritten below all the same.
            return jnp.any(cache.length < needed)

        def read(cache: Any) -> Any:
            begin = cache.length
            _, cache = draft.apply(params, _window(context.history.tokens, begin, k + 1), cache)
            return cache._replace(length=jnp.minimum(begin + k + 1, needed))

        return jax.lax.while_loop(behind, read, cache)

    def choose(
        logits: Array, key: Array, history: History, context: Context, going: Array
    ) -> tuple[Array, Array, Array]:
        """A token of each row, what it was drawn from, and whether the draft still goes on, as `going` said so far."""
        logits = sampling.match_vocab(logits, context.vocab_size)
        probs = sampling.probabilities(logits, context.sampling, history)[:, 0]
        going = going & ~_has_no_token(logits, probs)
        probs = jnp.where(going[:, None], probs, 0.0)
        return sampling.sample(key, probs, context.sampling), probs, going

    def is_sure(logits: Array) -> Array:
        return _confidence(logits) >= min_confidence

    def rollout(params: Tree, cache: Any, context: Context) -> tuple[Array, Array, Array, Any]:
        """The tokens, their distributions, how many there are, and the cache."""
        cache = catch_up(params, cache, context)
        keys, length = jnp.swapaxes(context.keys, 0, 1), context.history.length

        # The first call feeds the last two tokens: after full acceptance the cache lacks both (the last draft token was
        # chosen but never fed), and otherwise the first of them is merely written again.
        begin = jnp.maximum(length - 2, 0)
        output, cache = draft.apply(params, _window(context.history.tokens, begin, 2), cache._replace(length=begin))
        last = (length - 1 - begin)[:, None, None]
        first_logits = jnp.take_along_axis(output.logits, last, axis=1)
        first = choose(first_logits, keys[0], context.history, context, jnp.ones(length.shape, bool))
        cache = cache._replace(length=length)
        if min_confidence:
            return while_sure(params, cache, context, first, is_sure(first_logits))

        def draft_one(carry: tuple[Any, Array, Array, History], key: Array) -> tuple[Any, tuple[Array, Array, Array]]:
            cache, token, going, history = carry
            history = processors.extend(history, token, context.sampling.penalties)
            output, cache = draft.apply(params, token[:, None], cache)
            token, probs, going = choose(output.logits, key, history, context, going)
            return (cache, token, going, history), (token, probs, going)

        (cache, *_), rest = jax.lax.scan(draft_one, (cache, first[0], first[2], context.history), keys[1:])
        tokens, probs, going = (
            jnp.concatenate([a[:, None], jnp.swapaxes(b, 0, 1)], axis=1) for a, b in zip(first, rest, strict=True)
        )
        return tokens, probs, jnp.sum(going, axis=1, dtype=jnp.int32), cache

    def while_sure(
        params: Tree, cache: Any, context: Context, first: tuple[Array, Array, Array], sure: Bool[Array, " B"]
    ) -> tuple[Array, Array, Array, Any]:
        """The rest of a rollout, until every row has come to a place at which the draft was unsure."""
        empty = skip(params, cache, context)
        tokens, probs = empty[0].at[:, 0].set(first[0]), empty[1].at[:, 0].set(first[1])

        def is_going_on(carry: Any) -> Array:
            place, sure = carry[0], carry[1]
            return (place < k) & jnp.any(sure & (place < context.max_draft))

        def draft_one(carry: Any) -> Any:
            place, sure, count, cache, history, tokens, probs = carry
            token = jax.lax.dynamic_index_in_dim(tokens, place - 1, axis=1, keepdims=False)
            history = processors.extend(history, token, context.sampling.penalties)
            output, cache = draft.apply(params, token[:, None], cache)
            token, drawn_from, going = choose(output.logits, context.keys[:, place], history, context, sure)
            return (
                place + 1,
                going & is_sure(output.logits),
                count + going,
                cache,
                history,
                tokens.at[:, place].set(token),
                probs.at[:, place].set(drawn_from),
            )

        going = first[2]
        carry = jnp.int32(1), sure & going, going.astype(jnp.int32), cache, context.history, tokens, probs
        _, _, count, cache, _, tokens, probs = jax.lax.while_loop(is_going_on, draft_one, carry)
        return tokens, probs, count, cache

    def skip(params: Tree, cache: Any, context: Context) -> tuple[Array, Array, Array, Any]:
        del params
        rows = context.max_draft.shape[0]
        none = jnp.zeros(rows, jnp.int32)
        return jnp.zeros((rows, k), jnp.int32), jnp.zeros((rows, k, context.vocab_size)), none, cache

    def propose(params: Tree, cache: Any, context: Context) -> tuple[Proposal, Any]:
        if k == 0:
            tokens, probs, count, cache = skip(params, cache, context)
        else:
            tokens, probs, count, cache = jax.lax.cond(
                jnp.any(context.max_draft > 0),
                lambda p, c: rollout(p, c, context),
                lambda p, c: skip(p, c, context),
                params,
                cache,
            )
        return Proposal(tokens, jnp.minimum(context.max_draft, count), probs), cache

    def update(params: Tree, cache: Any, feedback: Feedback) -> Any:
        del params
        # Of the K draft tokens, K - 1 were fed; those accepted are text, the others are rolled back.
        return cache._replace(length=jnp.minimum(cache.length, feedback.length - 1))

    return Drafter(init, propose, update, k)
