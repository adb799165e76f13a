"""A second, smaller model drafts (Leviathan et al. 2022; Chen et al. 2023)."""

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from specjax import control
from specjax.drafters import model_tree, rollout
from specjax.drafters.catch_up import catch_up, learn, read_last, set_length
from specjax.limits import check_num_draft_tokens
from specjax.types import Context, Draft, Drafter, Feedback, Model, Params, Proposal, Topology, Tree


def model(
    draft: Any,
    *,
    num_draft_tokens: int | None = None,
    min_confidence: float = 0.0,
    topology: Sequence[int] | Sequence[Sequence[int]] | None = None,
) -> Any:
    """Drafts with another model of the same vocabulary.

    A row's draft ends before the first position at which the options leave none of the tokens that the draft knows.
    With `min_confidence`, it ends after the first token at whose position the draft's most probable token was less
    probable than that: what would follow is rarely accepted. (Transformers' assisted generation has such a threshold.)
    The text stays exact, since where a draft ends depends only on the tokens before that position, never on the one
    drawn there.

    With a topology it drafts a tree: for each node the most probable continuations, or above temperature 0 those that
    the noise of `verify.coupled` prefers. Trees are judged by the rules `greedy` (temperature 0) and `coupled`.

    Args:
      draft: a `Model`, whose parameters the caller passes to the loop, or a `Pretrained`, which brings them.
      num_draft_tokens: K, for a chain; by default 4.
      min_confidence: from 0, which always drafts K tokens, to 1; a probability under the draft, before any option.
      topology: the shape of a tree: how many children every node has, by depth, such as `(3, 2, 1)`; or its nodes as
        paths, such as `[(0,), (1,), (0, 0)]`, each a list of ranks among siblings (Medusa, arXiv 2401.10774, §2.3.2).
        None: a chain.

    Returns:
      a `Draft` for a `Pretrained`, a `Drafter` for a `Model`.

    Raises:
      ValueError: for K < 0 or above `limits.MAX_DRAFT_TOKENS`, a confidence that is not a probability, a topology that
        is not a tree, or a topology together with one of the others.
    """
    if not 0 <= min_confidence <= 1:
        raise ValueError(f"min_confidence={min_confidence}: a probability, from 0 (off) to 1.")
    inner: Model = draft if isinstance(draft, Model) else draft.model
    if topology is None:
        num_draft_tokens = 4 if num_draft_tokens is None else num_draft_tokens
        check_num_draft_tokens(num_draft_tokens)
        drafter = _drafter(rollout.Chain(inner, num_draft_tokens), min_confidence)
    else:
        if num_draft_tokens is not None or min_confidence:
            raise ValueError(
                f"topology={topology} says how many tokens are drafted: leave out num_draft_tokens and min_confidence."
            )
        drafter = model_tree.drafter(inner, model_tree.parse(topology))
    if isinstance(draft, Model):
        return drafter
    return Draft(drafter, draft.params, draft.tokenizer, inner.max_len, inner)


@functools.cache
def _drafter(chain: rollout.Chain, min_confidence: float) -> Drafter:
    """The state is the draft's cache, whose `length` counts its committed entries (see `models.cache`)."""

    def roll_out(params: Tree, cache: Any, context: Context) -> rollout.Rollout:
        cache = catch_up(chain.draft, params, cache, context.history, missing=2, chunk=chain.num_draft_tokens + 1)
        # The first call feeds the last two tokens: after full acceptance the cache lacks both (the last draft token was
        # chosen but never fed), and otherwise the first of them is merely written again.
        logits, cache = read_last(chain.draft, params, cache, context.history, 2)
        threshold = jnp.full(context.max_draft.shape, min_confidence) if min_confidence else None
        return rollout.draw(chain, params, logits, cache, context, threshold)

    def propose(params: Params, state: Any, cache: Any, context: Context) -> tuple[Proposal, Any, Any]:
        if not chain.num_draft_tokens:
            tokens, probs, count, state = rollout.none(chain, state, context)
        else:
            tokens, probs, count, state = control.once(
                jnp.any(context.max_draft > 0),
                lambda none: roll_out(params.draft, none[-1], context),
                rollout.none(chain, state, context),
            )
        return Proposal(tokens, jnp.minimum(context.max_draft, count), probs), state, cache

    def update(params: Params, state: Any, feedback: Feedback) -> Any:
        if feedback.inputs is not None:
            return learn(chain.draft, params.draft, state, feedback.inputs)
        # K - 1 of the K draft tokens were fed; the accepted ones are text, the others are rolled back.
        return set_length(chain.draft, state, jnp.minimum(state.length, feedback.length - 1))

    return Drafter(chain.draft.init_cache, propose, update, Topology.chain(chain.num_draft_tokens))
