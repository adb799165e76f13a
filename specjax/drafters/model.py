"""A second, smaller model drafts (Leviathan et al. 2022; Chen et al. 2023)."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from specjax import control, sampling
from specjax.drafters import model_dynamic, model_tree
from specjax.drafters.catch_up import catch_up, learn, read_last, set_length
from specjax.drafters.children import Children, has_no_token, without_replacement
from specjax.drafters.model_dynamic import Dynamic
from specjax.limits import check_num_draft_tokens
from specjax.sampling import processors
from specjax.types import (
    Block,
    Context,
    Draft,
    Drafter,
    Feedback,
    History,
    Model,
    Params,
    Proposal,
    SamplingOptions,
    Topology,
    Tree,
)


def model(
    draft: Any,
    *,
    num_draft_tokens: int | None = None,
    min_confidence: float = 0.0,
    topology: str | Sequence[int] | Sequence[Sequence[int]] | None = None,
    children: Children = without_replacement,
    dynamic: Dynamic | None = None,
) -> Any:
    """Drafts with another model of the same vocabulary.

    A row's draft ends before the first position at which the options leave none of the tokens that the draft knows.
    With `min_confidence`, it ends after the first token at whose position the draft's most probable token was less
    probable than that: what would follow is rarely accepted. (Transformers' assisted generation has such a threshold.)
    The text stays exact, since where a draft ends depends only on the tokens before that position, never on the one
    drawn there.

    With a topology it drafts a tree, a call of the draft for each depth: above temperature 0 the continuations of each
    node are found by `children`, or, under the rule `coupled`, are those that its noise prefers; at temperature 0 they
    are the most probable ones. Trees are judged by `rejection`, `traversal` and `coupled`, and by `greedy`.

    Args:
      draft: a `Model`, whose parameters the caller passes to the loop, or a `Pretrained`, which brings them.
      num_draft_tokens: K, for a chain; by default 4.
      min_confidence: from 0, which always drafts K tokens, to 1; a probability under the draft, before any option.
      topology: the shape of a tree: how many children every node has, by depth, such as `(3, 2, 1)`; or its nodes as
        paths, such as `[(0,), (1,), (0, 0)]`, each a list of ranks among siblings (Medusa, arXiv 2401.10774, §2.3.2);
        or the name of a published tree (`drafters.topologies`). None: a chain.
      children: how the children of a node are found: `drafters.children.without_replacement`, `with_replacement`,
        `most_probable`, or a function like them.
      dynamic: the size of a tree whose shape follows the draft's probabilities (EAGLE-2, arXiv 2406.16858): the most
        probable nodes are continued and proposed, which are chosen, not drawn. None: no such tree.

    Returns:
      a `Draft` for a `Pretrained`, a `Drafter` for a `Model`.

    Raises:
      ValueError: for K < 0 or above `limits.MAX_DRAFT_TOKENS`, a confidence that is not a probability, a topology that
        is not a tree, or a topology together with one of the others.
    """
    if not 0 <= min_confidence <= 1:
        raise ValueError(f"min_confidence={min_confidence}: a probability, from 0 (off) to 1.")
    inner: Model = draft if isinstance(draft, Model) else draft.model
    sizes = num_draft_tokens is not None or bool(min_confidence)
    if dynamic is not None:
        if sizes or topology is not None:
            raise ValueError(f"dynamic={dynamic} says what is drafted: leave out topology and the sizes of chains.")
        model_dynamic.check(dynamic)
        drafter = model_dynamic.drafter(inner, dynamic)
    elif topology is None:
        num_draft_tokens = 4 if num_draft_tokens is None else num_draft_tokens
        check_num_draft_tokens(num_draft_tokens)
        drafter = _drafter(_Chain(inner, num_draft_tokens, min_confidence))
    else:
        if sizes:
            raise ValueError(
                f"topology={topology} says how many tokens are drafted: leave out num_draft_tokens and min_confidence."
            )
        drafter = model_tree.drafter(inner, model_tree.parse(topology), children)
    if isinstance(draft, Model):
        return drafter
    return Draft(drafter, draft.params, draft.tokenizer, inner.max_len, inner)


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


class _Chain(NamedTuple):
    """A draft model, and how far it drafts: K tokens, or until its top probability falls below `min_confidence`."""

    draft: Model
    num_draft_tokens: int
    min_confidence: float


_Rollout = tuple[Int[Array, "B K"], Float[Array, "B K V"], Int[Array, " B"], Any]
"""The draft tokens of all rows, the distribution of each, how many there are, and the draft's cache."""


def _extend(
    chain: _Chain, params: Tree, cache: Any, token: Int[Array, " B"], history: History, context: Context
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


def _skip(chain: _Chain, cache: Any, context: Context) -> _Rollout:
    """The rollout where no row drafts."""
    rows, k = context.max_draft.shape[0], chain.num_draft_tokens
    none = jnp.zeros(rows, jnp.int32)
    return jnp.zeros((rows, k), jnp.int32), jnp.zeros((rows, k, context.vocab_size)), none, cache


def _rollout(chain: _Chain, params: Tree, cache: Any, context: Context) -> _Rollout:
    """Draws K tokens for each row, each given those before it."""
    keys, going = jnp.swapaxes(context.keys, 0, 1), jnp.ones(context.max_draft.shape, bool)
    cache = catch_up(chain.draft, params, cache, context.history, missing=2, chunk=chain.num_draft_tokens + 1)

    # The first call feeds the last two tokens: after full acceptance the cache lacks both (the last draft token was
    # chosen but never fed), and otherwise the first of them is merely written again.
    logits, cache = read_last(chain.draft, params, cache, context.history, 2)
    first = _pick(logits, keys[0], context.history, context, going)
    if chain.min_confidence:
        return _while_sure(chain, params, cache, context, first, _confidence(logits) >= chain.min_confidence)

    def draft_one(carry: tuple[Any, Array, Array, History], key: Array) -> tuple[Any, tuple[Array, Array, Array]]:
        cache, token, going, history = carry
        logits, cache, history = _extend(chain, params, cache, token, history, context)
        token, probs, going = _pick(logits, key, history, context, going)
        return (cache, token, going, history), (token, probs, going)

    (cache, *_), rest = jax.lax.scan(draft_one, (cache, first[0], first[2], context.history), keys[1:])
    tokens, probs, going = (
        jnp.concatenate([a[:, None], jnp.swapaxes(b, 0, 1)], axis=1) for a, b in zip(first, rest, strict=True)
    )
    return tokens, probs, jnp.sum(going, axis=1, dtype=jnp.int32), cache


def _while_sure(
    chain: _Chain,
    params: Tree,
    cache: Any,
    context: Context,
    first: tuple[Array, Array, Array],
    sure: Bool[Array, " B"],
) -> _Rollout:
    """The rest of a rollout, until every row has come to a position at which the draft was unsure."""
    empty = _skip(chain, cache, context)
    tokens, probs = empty[0].at[:, 0].set(first[0]), empty[1].at[:, 0].set(first[1])

    def is_going_on(carry: Any) -> Array:
        position, sure = carry[0], carry[1]
        return (position < chain.num_draft_tokens) & jnp.any(sure & (position < context.max_draft))

    def draft_one(carry: Any) -> Any:
        position, sure, count, cache, history, tokens, probs = carry
        token = jax.lax.dynamic_index_in_dim(tokens, position - 1, axis=1, keepdims=False)
        logits, cache, history = _extend(chain, params, cache, token, history, context)
        token, drawn_from, going = _pick(logits, context.keys[:, position], history, context, sure)
        return (
            position + 1,
            going & (_confidence(logits) >= chain.min_confidence),
            count + going,
            cache,
            history,
            tokens.at[:, position].set(token),
            probs.at[:, position].set(drawn_from),
        )

    going = first[2]
    carry = jnp.int32(1), sure & going, going.astype(jnp.int32), cache, context.history, tokens, probs
    _, _, count, cache, _, tokens, probs = jax.lax.while_loop(is_going_on, draft_one, carry)
    return tokens, probs, count, cache


@functools.cache
def _drafter(chain: _Chain) -> Drafter:
    """The state is the draft's cache, whose `length` counts its committed entries (see `models.cache`)."""

    def propose(params: Params, state: Any, cache: Any, context: Context) -> tuple[Proposal, Any, Any]:
        if not chain.num_draft_tokens:
            tokens, probs, count, state = _skip(chain, state, context)
        else:
            tokens, probs, count, state = control.once(
                jnp.any(context.max_draft > 0),
                lambda skipped: _rollout(chain, params.draft, skipped[-1], context),
                _skip(chain, state, context),
            )
        return Proposal(tokens, jnp.minimum(context.max_draft, count), probs), state, cache

    def update(params: Params, state: Any, feedback: Feedback) -> Any:
        if feedback.inputs is not None:
            return learn(chain.draft, params.draft, state, feedback.inputs)
        # K - 1 of the K draft tokens were fed; the accepted ones are text, the others are rolled back.
        return set_length(chain.draft, state, jnp.minimum(state.length, feedback.length - 1))

    return Drafter(chain.draft.init_cache, propose, update, Topology.chain(chain.num_draft_tokens))
