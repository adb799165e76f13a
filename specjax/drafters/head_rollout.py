"""Rollouts of a head over the target's hidden states: shared by `feature_head` and `eagle`.

A head reads each token with the target's hidden states at the token before it. Behind the text it goes on with its own
states in their place. So it is a draft model whose cache also has these states, and chains and trees are rolled out as
those of any draft model.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from specjax import control
from specjax.drafters import model_dynamic, model_tree, rollout
from specjax.drafters.children import Children
from specjax.drafters.model_dynamic import Dynamic
from specjax.limits import check_num_draft_tokens
from specjax.models import cache as cache_lib
from specjax.models import layers
from specjax.models.config import DecoderConfig
from specjax.parallel import sharding
from specjax.types import Block, Context, Drafter, Feedback, Model, ModelOutput, Params, Proposal


class HeadCache(NamedTuple):
    """The keys and values of the head's layer, and the states that it drafts from.

    Attributes:
      keys: one `[B, kv_heads, S, head_dim]` array.
      values: one array of the same shape.
      length: `[B]` how many tokens of the text have entries, made from the target's hidden states (see `models.cache`).
      states: `[B, 1 + U, D]` the state after the last of them, then those after the entries of drafts behind it.
      feature: `[B, F, E]` the target's hidden states at the last token that it has read.
    """

    keys: tuple[Float[Array, "B H S W"]]
    values: tuple[Float[Array, "B H S W"]]
    length: Int[Array, " B"]
    states: Float[Array, "B U D"]
    feature: Float[Array, "B F E"]


Step = Callable[..., tuple[Float[Array, "B T D"], Float[Array, "B H S W"], Float[Array, "B H S W"]]]
"""`(params, seen, tokens, positions, mask, keys, values, start, is_own=) -> (states, keys, values)`.

`params` are those of both sides; the rest is as for `models.eagle.EagleHead.step`, with tokens for embeddings.
"""

Logits = Callable[[Params, Float[Array, "B T D"]], Float[Array, "B T V"]]
"""`(params, states) -> logits` of all of the target's tokens; -inf for those that the head does not know."""


class Head(NamedTuple):
    """A head for a target, as pure functions of the parameters of both.

    Attributes:
      step: reads tokens.
      logits: of what `step` gives.
      layer: the shape of its layer.
      taps: the hidden states of the target that it reads.
      target_size: E, their width.
      sees_first: whether tokens attend to the first token of a text, which has no feature before it.
      vocab_size: V of the target.
      max_len: the longest sequence of the target.
      rules: logical to mesh axes.
    """

    step: Step
    logits: Logits
    layer: DecoderConfig
    taps: tuple[int, ...]
    target_size: int
    sees_first: bool
    vocab_size: int
    max_len: int
    rules: sharding.Rules = sharding.RULES


class Plan(NamedTuple):
    """A head, and U, how many drafts have entries at a time."""

    head: Head
    num_behind: int


def drafter(
    head: Head,
    *,
    num_draft_tokens: int | None = None,
    min_confidence: float = 0.0,
    lengths: tuple[int, ...] = (),
    topology: str | Sequence[int] | Sequence[Sequence[int]] | None = None,
    children: Children,
    dynamic: Dynamic | None = None,
    default: int,
) -> Drafter:
    """A drafter of the head: a chain, a tree, or a dynamic tree.

    Args:
      head: the head; equal ones make equal drafters.
      num_draft_tokens: K, for a chain; None: `default`.
      min_confidence: as for `drafters.model`.
      lengths: of a chain, as for `drafters.model`.
      topology: the shape of a tree, as for `drafters.model`.
      children: as for `drafters.model`.
      dynamic: the size of a dynamic tree, as for `drafters.model`.
      default: see above.

    Raises:
      ValueError: for sizes that cannot be, or do not go together.
    """
    if not 0 <= min_confidence <= 1:
        raise ValueError(f"min_confidence={min_confidence}: a probability, from 0 (off) to 1.")
    given = dynamic if dynamic is not None else topology
    if given is None:
        num_draft_tokens = default if num_draft_tokens is None else num_draft_tokens
        check_num_draft_tokens(num_draft_tokens)
        if not num_draft_tokens:
            raise ValueError("num_draft_tokens=0 drafts nothing: give at least 1, or drafter=None.")
        return _chain(Plan(head, 1), num_draft_tokens, min_confidence, tuple(lengths))
    if num_draft_tokens is not None or min_confidence or lengths or (dynamic is not None and topology is not None):
        name = "topology" if dynamic is None else "dynamic"
        raise ValueError(
            f"{name}={given} says what is drafted: leave out num_draft_tokens, lengths and min_confidence, and give "
            "topology or dynamic, not both."
        )
    if dynamic is not None:
        model_dynamic.check(dynamic)
        return _dynamic(Plan(head, max(1, (dynamic.depth - 1) * dynamic.width)), dynamic)
    assert topology is not None
    parents = {parent for level in model_tree.parse(topology) for parent in level.parents} - {-1}
    plan = Plan(head, max(1, len(parents)))
    return _tree(plan, model_tree.plan(as_model(plan), topology, children))


def _visible(
    head: Head, cache: HeadCache, positions: Int[Array, "B T"], length: Int[Array, " B"], sees: Any
) -> Bool[Array, "B T S"]:
    size = cache.keys[0].shape[-2]
    mask, _ = layers.visible(size, positions, length, sees)
    return mask if head.sees_first else mask & ((jnp.arange(size) > 0) | (positions == 0)[..., None])


def _parents(sees: Bool[Array, "B T W"]) -> Int[Array, "B T"]:
    """The place in `HeadCache.states` of the token before each: the last that it attends to besides itself."""
    width, total = sees.shape[1:]
    own = jnp.arange(total) == (total - width + jnp.arange(width))[:, None]
    return jnp.max(jnp.where(sees & ~own, jnp.arange(total, dtype=jnp.int32) + 1, 0), axis=-1)


@functools.cache
def as_model(plan: Plan) -> Model:
    """The head as a draft model, for the rollouts that all drafters with a model share. Its `params` are `Params`."""
    head, layer = plan.head, plan.head.layer

    def init_cache(batch_size: int, max_len: int, max_source: int = 0) -> HeadCache:
        del max_source
        empty = cache_lib.init(1, batch_size, layer.num_kv_heads, max_len, layer.head_dim, layer.dtype)
        keys, values = (cache_lib.constrain(x[0], head.rules) for x in (empty.keys, empty.values))
        states = jnp.zeros((batch_size, 1 + plan.num_behind, layer.hidden_size))
        feature = jnp.zeros((batch_size, len(head.taps), head.target_size))
        return HeadCache((keys,), (values,), empty.length, states, feature)

    def prefill(params: Any, inputs: Any, cache: Any) -> Any:
        raise NotImplementedError("A head reads a prompt's hidden states (`Drafter.update`), not its tokens alone.")

    def apply(params: Any, block: Block, cache: HeadCache) -> tuple[ModelOutput, HeadCache]:
        rows, width = block.tokens.shape
        depth = jnp.arange(width) if block.depth is None else block.depth
        sees = jnp.ones((rows, 1, 1), bool) if block.sees is None else block.sees
        earlier = sees.shape[-1] - width
        positions = cache.length[:, None] + depth
        mask = _visible(head, cache, positions, cache.length, sees)
        before = jnp.take_along_axis(cache.states, _parents(sees)[..., None], axis=1)
        start, entries = cache.length + earlier, (cache.keys[0], cache.values[0])
        state, keys, values = head.step(params, before, block.tokens, positions, mask, *entries, start, is_own=True)
        states = cache.states.at[:, 1 + earlier : 1 + earlier + width].set(state)
        output = ModelOutput(head.logits(params, state), state[:, :, None][:, :, :0])
        return output, cache._replace(keys=(keys,), values=(values,), states=states)

    def commit(cache: HeadCache, path: Any, count: Int[Array, " B"]) -> HeadCache:
        assert path is None
        last = jnp.take_along_axis(cache.states, count[:, None, None], axis=1)
        return cache._replace(length=cache.length + count, states=cache.states.at[:, :1].set(last))

    return Model(init_cache, prefill, apply, commit, head.vocab_size, head.max_len)


def _update(head: Head, params: Params, cache: HeadCache, feedback: Feedback) -> HeadCache:
    """Reads the committed tokens, each with the target's hidden states at the token before it."""
    count, features = feedback.num_tokens, feedback.features
    if feedback.context is None:
        # A prompt's features are those of its own tokens; a step's begin with those of the token before.
        last = jnp.take_along_axis(features, jnp.maximum(count - 1, 0)[:, None, None, None], axis=1)
        features = jnp.concatenate([cache.feature[:, None], features[:, :-1]], axis=1)
    else:
        last = features[:, :1]
    begin = feedback.length - count
    positions = begin[:, None] + jnp.arange(feedback.tokens.shape[1])
    mask = _visible(head, cache, positions, begin, None)
    tokens, entries = jnp.maximum(feedback.tokens, 0), (cache.keys[0], cache.values[0])
    state, keys, values = head.step(params, features, tokens, positions, mask, *entries, begin, is_own=False)
    newest = jnp.take_along_axis(state, jnp.maximum(count - 1, 0)[:, None, None], axis=1)
    some = (count > 0)[:, None, None]
    return HeadCache(
        (keys,),
        (values,),
        jnp.where(count > 0, feedback.length, cache.length),
        cache.states.at[:, :1].set(jnp.where(some, newest, cache.states[:, :1])),
        jnp.where(some, last[:, 0], cache.feature),
    )


def _back(cache: HeadCache, before: HeadCache) -> HeadCache:
    """The cache after a rollout, of the text alone: the drafts' entries are stale."""
    return cache._replace(length=before.length, states=before.states)


def _updating(head: Head) -> Any:
    def update(params: Params, state: HeadCache, feedback: Feedback) -> HeadCache:
        return _update(head, params, state, feedback)

    return update


@functools.cache
def _chain(plan: Plan, num_draft_tokens: int, min_confidence: float, lengths: tuple[int, ...]) -> Drafter:
    draft = as_model(plan)
    chain = rollout.Chain(draft, num_draft_tokens, lengths)

    def propose(params: Params, state: HeadCache, cache: Any, context: Context) -> tuple[Proposal, HeadCache, Any]:
        threshold = rollout.threshold(min_confidence, context)

        def roll_out(none: rollout.Rollout) -> rollout.Rollout:
            logits = plan.head.logits(params, none.cache.states[:, :1])
            return rollout.draw(chain, params, logits, none.cache, context, threshold)

        nothing = rollout.none(chain, state, context, threshold)
        drawn = control.once(jnp.any(context.max_draft > 0), roll_out, nothing)
        return drawn.proposal(context), _back(drawn.cache, state), cache

    return Drafter(draft.init_cache, propose, _updating(plan.head), chain.topology, plan.head.taps)


@functools.lru_cache(maxsize=64)
def _tree(plan: Plan, grown: model_tree.Plan) -> Drafter:
    def propose(params: Params, state: HeadCache, cache: Any, context: Context) -> tuple[Proposal, HeadCache, Any]:
        def grow(carry: model_tree.Rollout) -> model_tree.Rollout:
            logits = plan.head.logits(params, carry[-1].states[:, :1])
            return model_tree.grow(grown, params, logits, carry, context)

        nothing = model_tree.nothing(grown, state, context)
        tokens, probs, after = control.once(jnp.any(context.max_draft > 0), grow, nothing)
        return model_tree.proposal(grown, tokens, probs, context), _back(after, state), cache

    return Drafter(as_model(plan).init_cache, propose, _updating(plan.head), grown.topology, plan.head.taps)


@functools.cache
def _dynamic(plan: Plan, dynamic: Dynamic) -> Drafter:
    draft = as_model(plan)

    def init(batch_size: int, max_len: int, max_source: int = 0) -> HeadCache:
        return draft.init_cache(batch_size, max_len + model_dynamic.more_entries(dynamic), max_source)

    def propose(params: Params, state: HeadCache, cache: Any, context: Context) -> tuple[Proposal, HeadCache, Any]:
        def grow(carry: model_dynamic.Rollout) -> model_dynamic.Rollout:
            logits = plan.head.logits(params, carry[-1].states[:, :1])
            return model_dynamic.grow(draft, dynamic, params, logits, carry[-1], context)

        nothing = model_dynamic.nothing(dynamic, state, context)
        tokens, parent, after = control.once(jnp.any(context.max_draft > 0), grow, nothing)
        return model_dynamic.proposal(dynamic, tokens, parent, context), _back(after, state), cache

    return Drafter(init, propose, _updating(plan.head), model_dynamic.topology(dynamic), plan.head.taps)
