"""The target drafts with some of its own sublayers left out: no second model, no second cache, no training.

Self-speculative decoding (Draft & Verify: Zhang et al. 2023, arXiv 2309.08168) skips attention and feed-forward
sublayers in the middle of the target; early exit skips all layers from one on.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from specjax import control
from specjax.drafters import chain, model_tree, rollout
from specjax.drafters.catch_up import read_last, set_length
from specjax.drafters.children import Children, without_replacement
from specjax.limits import check_num_draft_tokens
from specjax.types import Context, Draft, Drafter, Feedback, Model, Params, Proposal, Skips, Tree


class Threshold(NamedTuple):
    """When a row stops drafting (Draft & Verify, section 3.3, "adaptive draft-exiting"), and how it learns that.

    Attributes:
      threshold: `[B]` a draft ends after the first token at whose position the draft was less sure than that.
      rate: `[B]` the running acceptance rate.
      drafted: `[B]` how many tokens were drafted in this step.
    """

    threshold: Float[Array, " B"]
    rate: Float[Array, " B"]
    drafted: Int[Array, " B"]


START, WANTED_RATE, STEP, MEMORY_OF_RATE, MEMORY = 0.6, 0.9, 0.01, 0.5, 0.9
"""The threshold at first, the acceptance rate that is aimed at, the step, and the decay of the running averages."""


def learn(state: Threshold, num_accepted: Int[Array, " B"], num_draft_tokens: int) -> Threshold:
    """The state after a step (Draft & Verify, eq. 1 and 2): more caution where too little was accepted, else less.

    A row that drafted nothing learns nothing.

    Args:
      state: before the step.
      num_accepted: how many of the `state.drafted` tokens were accepted.
      num_draft_tokens: K; where all of them were drafted, the threshold is low enough.
    """
    drafted = state.drafted
    rate = MEMORY_OF_RATE * state.rate + (1 - MEMORY_OF_RATE) * num_accepted / jnp.maximum(drafted, 1)
    lower = jnp.where(drafted < num_draft_tokens, state.threshold - STEP, state.threshold)
    moved = jnp.where(rate < WANTED_RATE, state.threshold + STEP, lower)
    threshold = jnp.clip(MEMORY * state.threshold + (1 - MEMORY) * moved, 0.0, 1.0)
    some = drafted > 0
    return Threshold(jnp.where(some, threshold, state.threshold), jnp.where(some, rate, state.rate), drafted)


def skip(
    target: Any,
    *,
    attention: Sequence[int] = (),
    mlp: Sequence[int] = (),
    num_draft_tokens: int | None = None,
    min_confidence: float = 0.0,
    adaptive: bool = False,
    lengths: tuple[int, ...] = (),
    topology: str | Sequence[int] | Sequence[Sequence[int]] | None = None,
    children: Children = without_replacement,
) -> Drafter:
    """Drafts with the target itself, without some of its sublayers (Draft & Verify, arXiv 2309.08168).

    The draft reads the target's own parameters and its cache, in which it writes behind the text; the call that
    verifies overwrites all of that. Which sublayers can be left out depends on the target: `configs/skip_search.py`
    looks for them.

    Args:
      target: the target that will be decoded, a `Pretrained` or its `Model`.
      attention: the layers whose attention is left out, from 0.
      mlp: the layers whose feed-forward is left out.
      num_draft_tokens: K, for a chain; by default 4.
      min_confidence: a row's draft ends after the first token at whose position the draft's most probable token was
        less probable than that; 0: never. Only the tokens before that position matter, so exact rules stay exact.
      adaptive: that threshold follows the acceptance rate of each row (`learn`), from `min_confidence` on, or 0.6.
      lengths: of a chain, as in `drafters.model`.
      topology: the shape of a tree, as there; None: a chain.
      children: how the children of a node of a tree are found, as there.

    Raises:
      ValueError: for a layer that the target does not have, a target whose layers cannot be skipped, nothing to skip,
        K < 0 or too large, a confidence that is not a probability, or a topology together with what chains have.
    """
    model: Model = target if isinstance(target, Model) else target.model
    skips = Skips(tuple(attention), tuple(mlp))
    if not any(skips):
        raise ValueError("attention=(), mlp=(): nothing is skipped, so a draft costs as much as the text; name layers.")
    if not 0 <= min_confidence <= 1:
        raise ValueError(f"min_confidence={min_confidence}: a probability, from 0 (off) to 1.")
    if model.with_skips is None:
        raise ValueError(
            "The layers of this target cannot be skipped: it has none, or they are scanned (scan_layers=True). "
            "Load it without scan_layers, or choose another drafter, such as ngram."
        )
    draft = model.with_skips(skips)
    if topology is not None:
        if num_draft_tokens is not None or min_confidence or adaptive or lengths:
            raise ValueError(
                f"topology={topology} says what is drafted: leave out num_draft_tokens, min_confidence, adaptive and "
                "lengths."
            )
        return _tree(model_tree.plan(draft, topology, children))
    num_draft_tokens = 4 if num_draft_tokens is None else num_draft_tokens
    check_num_draft_tokens(num_draft_tokens)
    start = (min_confidence or START) if adaptive else min_confidence
    return _chain(rollout.Chain(draft, num_draft_tokens, tuple(lengths)), start, adaptive)


def early_exit(
    target: Any,
    layer: int,
    *,
    norm: Any = None,
    num_draft_tokens: int | None = None,
    min_confidence: float = 0.0,
    adaptive: bool = False,
    lengths: tuple[int, ...] = (),
    topology: str | Sequence[int] | Sequence[Sequence[int]] | None = None,
    children: Children = without_replacement,
) -> Any:
    """Drafts with the first layers of the target, its final norm and its head.

    With `topology=(k,)` the k most probable tokens of the layer are read together: so Predictive Pipelined Decoding
    (arXiv 2307.05908) begins the next token, on chips of their own; `theory.pipelined_factor` is what that would bring.

    Args:
      target: the target that will be decoded, a `Pretrained` or its `Model`.
      layer: how many layers are run, at least 1.
      norm: the scale of a norm of its own before the head, `[E]`, in the place of the target's final one
        (`specjax.training.exit_norm` fits it), or None.
      num_draft_tokens: K, for a chain; by default 4.
      min_confidence: a row's draft ends after the first token at whose position the early exit's most probable token
        was less probable than that; 0: never.
      adaptive: that threshold follows the acceptance rate of each row (`learn`), from `min_confidence` on, or 0.6.
      lengths: of a chain, as in `drafters.model`.
      topology: the shape of a tree, as there; None: a chain.
      children: how the children of a node of a tree are found, as there.

    Returns:
      a `Draft` with a norm of its own, otherwise a `Drafter`.

    Raises:
      ValueError: as `skip`, and for a layer that is not before the last one.
    """
    model: Model = target if isinstance(target, Model) else target.model
    if model.num_layers and not 1 <= layer < model.num_layers:
        raise ValueError(f"layer={layer}: the target has {model.num_layers} layers; run 1 to {model.num_layers - 1}.")
    rest = range(layer, model.num_layers or layer + 1)
    drafter = skip(
        model,
        attention=rest,
        mlp=rest,
        num_draft_tokens=num_draft_tokens,
        min_confidence=min_confidence,
        adaptive=adaptive,
        lengths=lengths,
        topology=topology,
        children=children,
    )
    return drafter if norm is None else Draft(drafter, {"norm": jnp.asarray(norm)})


def _own(params: Params) -> Tree:
    """The target's parameters, with those that the draft has in their place."""
    return {**params.target, **params.draft} if isinstance(params.draft, dict) else params.target


@functools.cache
def _tree(plan: model_tree.Plan) -> Drafter:
    def propose(params: Params, state: Any, cache: Any, context: Context) -> tuple[Proposal, Any, Any]:
        length = cache.length

        def draft(carry: model_tree.Rollout) -> model_tree.Rollout:
            logits, cache = read_last(plan.draft, _own(params), carry[-1], context.history, 1)
            tokens, probs, cache = model_tree.grow(plan, _own(params), logits, (*carry[:-1], cache), context)
            return tokens, probs, set_length(plan.draft, cache, length)

        nothing = model_tree.nothing(plan, cache, context)
        tokens, probs, cache = control.once(jnp.any(context.max_draft > 0), draft, nothing)
        return model_tree.proposal(plan, tokens, probs, context), state, cache

    return Drafter(chain.init, propose, chain.update, plan.topology)


@functools.cache
def _chain(plan: rollout.Chain, start: float, adaptive: bool) -> Drafter:
    def init(batch_size: int, max_len: int, max_source: int = 0) -> Any:
        del max_len, max_source
        if not adaptive:
            return ()
        filled = jnp.full(batch_size, start, jnp.float32)
        return Threshold(filled, jnp.full(batch_size, WANTED_RATE, jnp.float32), jnp.zeros(batch_size, jnp.int32))

    def propose(params: Params, state: Any, cache: Any, context: Context) -> tuple[Proposal, Any, Any]:
        threshold = state.threshold if adaptive else rollout.threshold(start, context)
        length = cache.length

        def draft(carry: rollout.Rollout) -> rollout.Rollout:
            # The text's last token is not in the cache: it is read first, at the place where the target will read it.
            logits, cache = read_last(plan.draft, _own(params), carry.cache, context.history, 1)
            drawn = rollout.draw(plan, _own(params), logits, cache, context, threshold)
            return drawn._replace(cache=set_length(plan.draft, drawn.cache, length))

        drawn = rollout.none(plan, cache, context, threshold)
        if plan.num_draft_tokens:
            drawn = control.once(jnp.any(context.max_draft > 0), draft, drawn)
        proposal = drawn.proposal(context)
        return proposal, state._replace(drafted=proposal.length) if adaptive else state, drawn.cache

    def update(params: Params, state: Any, feedback: Feedback) -> Any:
        del params
        if not adaptive or feedback.context is None:
            return state
        # What other parts of a merged draft had accepted says nothing of this one.
        drafted = jnp.where(feedback.context.max_draft > 0, state.drafted, 0)
        accepted = jnp.clip(feedback.num_tokens - 1, 0, drafted)
        return learn(state._replace(drafted=drafted), accepted, plan.num_draft_tokens)

    return Drafter(init, propose, update, plan.topology)
