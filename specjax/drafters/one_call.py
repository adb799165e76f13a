"""Drafters of a model of their own that predicts K tokens in one call, from masks behind the text.

They differ in what the call reads and where its predictions are (`Read`); what is drawn from these, and how the model's
cache follows the text, is the same.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from specjax import control, sampling
from specjax.drafters import independent, model_tree
from specjax.drafters.catch_up import catch_up, learn, set_length
from specjax.drafters.children import Children
from specjax.limits import check_num_draft_tokens, check_size
from specjax.types import Block, Context, Draft, Drafter, Feedback, History, Model, Params, Proposal, Topology, Tree


class Asked(NamedTuple):
    """One call.

    Attributes:
      block: the last tokens of the text, K + 1 of them, as many as a step adds at most, then masks.
      begin: `[B]` where the block begins in each text; a text of fewer tokens is read from its beginning.
      at: `[B, K]` which outputs of the block are the predictions of the next K tokens.
    """

    block: Block
    begin: Int[Array, " B"]
    at: Int[Array, "B K"]


class Reader(NamedTuple):
    """A model that reads masks, and how.

    Attributes:
      draft: the model.
      mask_token: the id of the mask.
      depth: K, how many tokens it predicts in a call.
      read: what a call reads, `(reader, history) -> Asked`.
    """

    draft: Model
    mask_token: int
    depth: int
    read: "Callable[[Reader, History], Asked]"


def window(
    reader: Reader, history: History, masks: int
) -> tuple[Int[Array, "B T"], Int[Array, " B"], Int[Array, " B"]]:
    """The last K + 1 tokens of each text and so many masks; a shorter text has more masks behind it.

    Returns:
      the token ids; where they begin in each text; and the index among them of the text's last token.
    """
    begin = jnp.maximum(history.length - reader.depth - 1, 0)
    place = begin[:, None] + jnp.arange(reader.depth + 1 + masks)
    text = jnp.take_along_axis(history.tokens, jnp.minimum(place, history.tokens.shape[1] - 1), axis=1)
    tokens = jnp.where(place < history.length[:, None], text, reader.mask_token)
    return tokens, begin, history.length - 1 - begin


def mask_of(draft: Any, mask_token: int | None, made_by: str) -> int:
    """The id of the mask: the one that is given, or that of the draft's configuration.

    Raises:
      ValueError: for none, or an id that is not in the draft's vocabulary.
    """
    if mask_token is None and not isinstance(draft, Model):
        mask_token = draft.config.mask_token
    if mask_token is None:
        raise ValueError(
            f"This draft names no mask token: give a model that was trained to read one ({made_by}), or mask_token=ID."
        )
    inner = draft if isinstance(draft, Model) else draft.model
    check_size("mask_token", mask_token, 0, inner.vocab_size - 1)
    return int(mask_token)


def make(
    draft: Any,
    mask_token: int,
    read: Callable[[Reader, History], Asked],
    *,
    num_draft_tokens: int | None,
    min_confidence: float,
    lengths: tuple[int, ...],
    topology: str | Sequence[int] | Sequence[Sequence[int]] | None,
    children: Children,
) -> Any:
    """The drafter of a model: a `Draft` for a `Pretrained`, a `Drafter` for a `Model`; the arguments are `pard`'s.

    Raises:
      ValueError: for K < 1 or too large, a confidence that is not a probability, or a topology together with the sizes
        of a chain.
    """
    inner: Model = draft if isinstance(draft, Model) else draft.model
    if not 0 <= min_confidence <= 1:
        raise ValueError(f"min_confidence={min_confidence}: a probability, from 0 (off) to 1.")
    if topology is None:
        num_draft_tokens = 8 if num_draft_tokens is None else num_draft_tokens
        check_num_draft_tokens(num_draft_tokens)
        if num_draft_tokens < 1:
            raise ValueError(f"num_draft_tokens={num_draft_tokens}: at least 1; drafters.none() decodes plainly.")
        drafter = chain(Reader(inner, mask_token, num_draft_tokens, read), min_confidence, tuple(lengths))
    elif num_draft_tokens is not None or min_confidence or lengths:
        raise ValueError(
            f"topology={topology} says what is drafted: leave out num_draft_tokens, lengths and min_confidence."
        )
    else:
        plan = model_tree.plan(inner, topology, children)
        drafter = tree(plan, Reader(inner, mask_token, plan.topology.depth, read))
    return drafter if isinstance(draft, Model) else Draft(drafter, draft.params, draft.tokenizer, inner.max_len)


def _init(reader: Reader) -> Any:
    def init(batch_size: int, max_len: int, max_source: int = 0) -> Any:
        # A call writes up to 2 K + 1 entries, however short the text is.
        return reader.draft.init_cache(batch_size, max(max_len, 2 * reader.depth + 2), max_source)

    return init


def look_ahead(reader: Reader, params: Tree, cache: Any, context: Context) -> tuple[Float[Array, "B K V"], Any]:
    """The draft's logits of the next K tokens, and its cache of the whole text, without the masks.

    Where no row drafts, nothing is read.
    """
    draft, depth, history = reader.draft, reader.depth, context.history
    asked = reader.read(reader, history)

    def read(carry: tuple[Array, Any]) -> tuple[Array, Any]:
        cache = catch_up(draft, params, carry[1], history, missing=depth + 1, chunk=depth + 1)
        output, cache = draft.apply(params, asked.block, set_length(draft, cache, asked.begin))
        logits = jnp.take_along_axis(output.logits, asked.at[..., None], axis=1)
        return logits, draft.commit(cache, None, history.length - asked.begin)

    nothing = jnp.zeros((len(asked.begin), depth, draft.vocab_size), jnp.float32)
    logits, cache = control.once(jnp.any(context.max_draft > 0), read, (nothing, cache))
    return sampling.match_vocab(logits, context.vocab_size), cache


def _update(draft: Model, params: Params, state: Any, feedback: Feedback) -> Any:
    if feedback.inputs is not None:
        return learn(draft, params.draft, state, feedback.inputs)
    # What was drafted was never fed: the next call reads what was accepted, as text.
    return set_length(draft, state, jnp.minimum(state.length, feedback.length - 1))


@functools.cache
def chain(reader: Reader, min_confidence: float = 0.0, lengths: tuple[int, ...] = ()) -> Drafter:
    """Drafts a chain. The state is the draft's cache."""

    k = reader.depth

    def propose(params: Params, state: Any, cache: Any, context: Context) -> tuple[Proposal, Any, Any]:
        logits, state = look_ahead(reader, params.draft, state, context)
        length = jnp.minimum(context.max_draft, k)
        if not min_confidence:
            return independent.draw_chain(logits, length, context), state, cache
        confidence = jnp.exp(jnp.max(logits, axis=-1) - jax.nn.logsumexp(logits, axis=-1))
        sure = jnp.cumprod(confidence[:, :-1] >= min_confidence, axis=1, dtype=jnp.int32)
        length = jnp.minimum(length, 1 + jnp.sum(sure, axis=1))
        return independent.draw_chain(logits, length, context)._replace(confidence=confidence), state, cache

    update = functools.partial(_update, reader.draft)
    return Drafter(_init(reader), propose, update, Topology.chain(k, lengths))


@functools.cache
def tree(plan: model_tree.Plan, reader: Reader) -> Drafter:
    """Drafts a tree of the reader's depth."""

    def propose(params: Params, state: Any, cache: Any, context: Context) -> tuple[Proposal, Any, Any]:
        def draft(carry: model_tree.Rollout) -> model_tree.Rollout:
            logits, after = look_ahead(reader, params.draft, carry[-1], context)
            return independent.grow(plan, logits, (*carry[:-1], after), context)

        nothing = model_tree.nothing(plan, state, context)
        tokens, probs, state = control.once(jnp.any(context.max_draft > 0), draft, nothing)
        return model_tree.proposal(plan, tokens, probs, context), state, cache

    return Drafter(_init(reader), propose, functools.partial(_update, plan.draft), plan.topology)
