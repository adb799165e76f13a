"""Trained heads that draft several tokens in parallel from one hidden state of the target (`models.parallel_heads`).

**Which hidden state.** A text of n tokens has its first n - 1 in the target's cache: the last one was drawn from the
logits after the token before it, and is read together with the next drafts. So the newest hidden state is that of token
n - 2, counted from 0. The target's own head has made the last token of it, and head k (from 1) makes of it the draft of
token n - 1 + k: head 1 drafts the first token that is not known. `Feedback.features` has that hidden state after every
step, at the last token of the accepted path. A prompt is read whole, its last token included, and that token is read
again by the first step; so after a prompt it is the hidden state of the last token but one. Behind a prompt of one
token there is none, and the heads read zeros: as behind the start token of an encoder-decoder, whose first step drafts
nothing of worth.

**What is exact.** Each head's distribution depends on the text alone, not on the draft tokens before it. On a chain
each token is drawn from it and states it, so every exact rule applies. In a tree the children of all nodes of a depth
are drawn from the same distribution, by one draw (`Topology.shares_draws`): recursive rejection tests one node of a
depth at most, so that is exact under `rejection` and `coupled`, and refused under `traversal`.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from specjax import control, sampling
from specjax.drafters import chain, children, model_tree, rollout, store
from specjax.drafters.children import Children, without_replacement
from specjax.limits import check_num_draft_tokens
from specjax.models import parallel_heads as heads
from specjax.models.config import ModelConfig
from specjax.models.parallel_heads import ParallelHeadsConfig
from specjax.parallel import sharding
from specjax.sampling import tree
from specjax.types import Context, Draft, Drafter, Feedback, Params, Proposal, Topology, Tree


class Heads(NamedTuple):
    """Trained heads.

    Attributes:
      config: their shape.
      params: their parameters.
      vocabulary: the `store.fingerprint` of the target's tokenizer, or None where it is not known.
    """

    config: ParallelHeadsConfig
    params: Tree
    vocabulary: str | None = None


class State(NamedTuple):
    """The target's last hidden states.

    Attributes:
      feature: `[B, D]` float32, at the token before the last committed one: what the heads read; zeros before there is
        one.
      newest: `[B, D]` float32, at the last token that the target has read: after a prompt, that of the next chunk's
        beginning.
    """

    feature: Float[Array, "B D"]
    newest: Float[Array, "B D"]


Read = Callable[[Params, Float[Array, "B D"]], Float[Array, "B K V"]]
"""The logits of K heads from a hidden state: a function that is equal to others that compute the same."""


@dataclasses.dataclass(frozen=True)
class Reader:
    """`Read` of heads for a target. Equal ones compile once.

    Attributes:
      heads: the shape of the heads, in the dtype of the target.
      target: that of the target.
    """

    heads: ParallelHeadsConfig
    target: ModelConfig

    def __call__(self, params: Params, hidden: Float[Array, "B D"]) -> Float[Array, "B K V"]:
        """The logits of all heads."""
        return heads.logits(self.heads, params.draft, self.target, params.target, hidden[:, None])[:, 0]


class Plan(NamedTuple):
    """How heads draft.

    Attributes:
      read: makes the logits.
      num_heads: how many heads there are, at least as many as are drafted with.
      width: D.
      tap: the index of the target's last hidden state (`Drafter.taps`).
    """

    read: Read
    num_heads: int
    width: int
    tap: int


def draft(
    given: Heads,
    target: Any,
    num_draft_tokens: int | None = None,
    min_confidence: float = 0.0,
    lengths: tuple[int, ...] = (),
    topology: str | Sequence[int] | Sequence[Sequence[int]] | None = None,
    kind: Children = without_replacement,
) -> Draft:
    """Drafts with parallel heads: what `drafters.medusa` and `drafters.blockwise` share, and document.

    Raises:
      ValueError: as they say.
    """
    config, have = target.config, given.config
    if have.hidden_size != config.hidden_size or not target.model.num_layers:
        raise ValueError(
            f"The heads read hidden states of width {have.hidden_size}, but the target's have {config.hidden_size}: "
            "give the target that they were trained for."
        )
    if given.vocabulary and target.tokenizer is not None and store.fingerprint(target.tokenizer) != given.vocabulary:
        raise ValueError("The vocabularies do not match: the heads were trained for a target with another tokenizer.")
    if not 0 <= min_confidence <= 1:
        raise ValueError(f"min_confidence={min_confidence}: a probability, from 0 (off) to 1.")
    shape, params = heads.cast(have, given.params, config.dtype)
    mesh = sharding.mesh_of(target.params)
    if mesh is not None:
        params = sharding.shard(params, heads.axes(shape), mesh)
    plan = Plan(Reader(shape, config), have.num_heads, have.hidden_size, target.model.num_layers)
    if topology is None:
        k = have.num_heads if num_draft_tokens is None else num_draft_tokens
        check_num_draft_tokens(k)
        if not 1 <= k <= have.num_heads:
            raise ValueError(
                f"num_draft_tokens={k}: these are {have.num_heads} heads, each of which drafts one token; give 1 to "
                f"{have.num_heads}."
            )
        drafter = of_chain(plan, k, min_confidence, tuple(lengths))
    elif num_draft_tokens is not None or min_confidence or lengths:
        raise ValueError(
            f"topology={topology} says what is drafted: leave out num_draft_tokens, lengths and min_confidence."
        )
    else:
        # What is chosen is the same after all nodes of a depth, but nothing is drawn.
        shares = kind is not children.most_probable
        grown = model_tree.plan(target.model, topology, kind, shares_draws=shares)
        if len(grown.levels) > have.num_heads:
            raise ValueError(
                f"topology={topology} is {len(grown.levels)} deep, but there are {have.num_heads} heads, one for each "
                "depth: give a shallower tree, or more heads."
            )
        drafter = of_tree(plan, grown)
    return Draft(drafter, params, target.tokenizer, target.model.max_len)


def _init(plan: Plan) -> Any:
    def init(batch_size: int, max_len: int, max_source: int = 0) -> State:
        del max_len, max_source
        nothing = jnp.zeros((batch_size, plan.width))
        return State(nothing, nothing)

    return init


def _update(params: Params, state: State, feedback: Feedback) -> State:
    """The hidden state at the token before the last committed one."""
    del params
    features, count = feedback.features[:, :, 0].astype(jnp.float32), feedback.num_tokens

    def at(place: Int[Array, " B"]) -> Float[Array, "B D"]:
        return jnp.take_along_axis(features, jnp.maximum(place, 0)[:, None, None], axis=1)[:, 0]

    feature = newest = at(count - 1)
    if feedback.context is None:
        # Of a prompt the last token is read too; the one before may lie in the chunk before.
        feature = jnp.where((count > 1)[:, None], at(count - 2), state.newest)
    some = (count > 0)[:, None]
    return State(jnp.where(some, feature, state.feature), jnp.where(some, newest, state.newest))


def _logits(plan: Plan, params: Params, state: State, context: Context) -> Float[Array, "B K V"]:
    """The logits of all heads; zeros where no row drafts."""
    rows = len(context.max_draft)
    nothing = jnp.zeros((rows, plan.num_heads, context.vocab_size))

    def read(_: Array) -> Array:
        return sampling.match_vocab(plan.read(params, state.feature), context.vocab_size)

    return control.once(jnp.any(context.max_draft > 0), read, nothing)


@functools.lru_cache(maxsize=64)
def of_chain(plan: Plan, num_draft_tokens: int, min_confidence: float = 0.0, lengths: tuple[int, ...] = ()) -> Drafter:
    """Drafts a chain of K tokens, the k-th by head k."""

    def propose(params: Params, state: State, cache: Any, context: Context) -> tuple[Proposal, State, Any]:
        logits = _logits(plan, params, state, context)[:, :num_draft_tokens]

        def predict(place: Int[Array, ""]) -> Float[Array, "B V"]:
            return jax.lax.dynamic_index_in_dim(logits, place, axis=1, keepdims=False)

        length, confidence = jnp.minimum(context.max_draft, num_draft_tokens), None
        threshold = rollout.threshold(min_confidence, context)
        if threshold is not None:
            # Known before any token is drawn: a draft ends after the first place where its head is less sure.
            confidence = jnp.exp(jnp.max(logits, axis=-1) - jax.nn.logsumexp(logits, axis=-1))
            places = jnp.arange(num_draft_tokens, dtype=jnp.int32)
            unsure = jnp.min(jnp.where(confidence < threshold[:, None], places, num_draft_tokens - 1), axis=-1)
            length = jnp.minimum(length, unsure + 1)
        drawn = chain.draw(predict, lambda place, token: place + 1, jnp.int32(0), length, context)
        return drawn._replace(confidence=confidence), state, cache

    return Drafter(_init(plan), propose, _update, Topology.chain(num_draft_tokens, lengths), (plan.tap,))


@functools.lru_cache(maxsize=64)
def of_tree(plan: Plan, grown: model_tree.Plan) -> Drafter:
    """Drafts a tree: the children of all nodes of depth k (from 0) are found by head k + 1."""
    topology, depth = grown.topology, grown.topology.depth

    def propose(params: Params, state: State, cache: Any, context: Context) -> tuple[Proposal, State, Any]:
        parent = jnp.broadcast_to(
            jnp.asarray(topology.parents, jnp.int32), (len(context.max_draft), topology.num_nodes)
        )

        def fill(carry: model_tree.Rollout) -> model_tree.Rollout:
            tokens, probs, inner = carry
            logits = sampling.match_vocab(plan.read(params, state.feature), context.vocab_size)
            shape = tree.shape(parent, depth)
            for k in range(depth):
                of_depth = logits[:, k : k + 1]
                tokens, probs = model_tree.place_level(grown, k, of_depth, tokens, probs, shape, context)
            return tokens, probs, inner

        nothing = model_tree.nothing(grown, (), context)
        tokens, probs, _ = control.once(jnp.any(context.max_draft > 0), fill, nothing)
        return model_tree.proposal(grown, tokens, probs, context), state, cache

    return Drafter(_init(plan), propose, _update, topology, (plan.tap,))
