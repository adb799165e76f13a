"""Parallel speculative sampling: one call of the target drafts K tokens behind mask tokens, the next verifies them.

PaSS: Monea et al. 2023, arXiv 2311.13581. The two calls alternate; `mask_tokens` makes one of them, and reads more.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from specjax import control
from specjax.drafters import chain, independent, model_tree
from specjax.drafters.children import Children, most_probable
from specjax.drafters.mask_tokens import Ids, ids_of, with_embeddings
from specjax.limits import check_num_draft_tokens
from specjax.types import Block, Context, Drafter, Model, Params, Proposal, Topology


def parallel_masks(
    target: Any,
    *,
    mask_token: int | Sequence[int] | None = None,
    embeddings: Any = None,
    num_draft_tokens: int | None = None,
    topology: str | Sequence[int] | Sequence[Sequence[int]] | None = None,
    children: Children = most_probable,
) -> Any:
    """Drafts K tokens by one more call of the target, which reads the text's last token and K - 1 masks (PaSS).

    The drafting call writes behind the text, in the target's own cache, and the verifying call overwrites all of that:
    no key of a mask is ever committed. The first draft token is drawn from the target's own distribution, so it is
    accepted unless rounding differs; mask j stands for draft token j, and its output is the distribution of the token
    after it.

    That distribution depends on the text alone, not on the draft tokens before it. So each token is sampled from a
    distribution that is known before it is drawn, and states it: exact under every rule, and `rejection` accepts by
    probabilities rather than by a guess. A step reads 2 K + 1 tokens in two calls, where `mask_tokens` reads (K + 1)^2
    in one: choose this where K is large, or tokens cost more than calls do.

    With a topology, the children of every node of a depth are found in the distribution of that depth's mask: for
    `(3, 2)` all six pairs of its three and two most probable tokens, the Cartesian product of Medusa (arXiv 2401.10774,
    section 2.1.2).

    Args:
      target: the target that will be decoded, a `Pretrained` or its `Model`.
      mask_token: the id of the mask, or K - 1 ids, one for each place; None with embeddings.
      embeddings: `[K - 1, E]` what the mask of each place reads (`mask_tokens`), or None.
      num_draft_tokens: K, for a chain, at least 1; by default 4, or one more than there are embeddings.
      topology: the shape of a tree of depth K, as in `drafters.model`; None: a chain.
      children: how the children of a node of a tree are found, as there; by default they are the most probable ones.

    Returns:
      a `Draft` with embeddings, otherwise a `Drafter`.

    Raises:
      ValueError: for K < 1 or too large, a negative id, a number of ids or embeddings that is not K - 1, both or none
        of them, or a topology together with num_draft_tokens. The call of the target, for embeddings of another width.
    """
    model: Model = target if isinstance(target, Model) else target.model
    if topology is not None:
        if num_draft_tokens is not None:
            raise ValueError(f"topology={topology} says what is drafted: leave out num_draft_tokens.")
        plan = model_tree.plan(model, topology, children)
        return with_embeddings(_tree(plan, ids_of(mask_token, embeddings, len(plan.levels) - 1)), embeddings)
    if num_draft_tokens is None:
        num_draft_tokens = 4 if embeddings is None else len(embeddings) + 1
    check_num_draft_tokens(num_draft_tokens)
    if num_draft_tokens < 1:
        raise ValueError(f"num_draft_tokens={num_draft_tokens}: at least 1; drafters.none() decodes plainly.")
    ids = ids_of(mask_token, embeddings, num_draft_tokens - 1)
    return with_embeddings(_chain(model, ids), embeddings)


def look_ahead(
    target: Model, ids: Ids, params: Params, cache: Any, context: Context
) -> tuple[Float[Array, "B K V"], Any]:
    """The target's logits after the text's last token and after each mask behind it, and its cache, of the same length.

    Where no row drafts, nothing is read.
    """
    tokens, embeddings = ids.read(params.draft, context.vocab_size)
    masks = jnp.broadcast_to(jnp.asarray(tokens, jnp.int32), (len(context.max_draft), len(tokens)))
    block = Block(jnp.concatenate([chain.last_tokens(context.history, 1), masks], axis=1), embeddings=embeddings)
    return model_tree.apply_alone(target, params.target, block, cache, jnp.any(context.max_draft > 0))


@functools.cache
def _chain(target: Model, ids: Ids) -> Drafter:
    k = len(ids.tokens) + 1

    def propose(params: Params, state: tuple[()], cache: Any, context: Context) -> tuple[Proposal, tuple[()], Any]:
        logits, cache = look_ahead(target, ids, params, cache, context)
        return independent.draw_chain(logits, jnp.minimum(context.max_draft, k), context), state, cache

    return Drafter(chain.init, propose, chain.update, Topology.chain(k))


@functools.cache
def _tree(plan: model_tree.Plan, ids: Ids) -> Drafter:
    def propose(params: Params, state: tuple[()], cache: Any, context: Context) -> tuple[Proposal, tuple[()], Any]:
        def draft(carry: model_tree.Rollout) -> model_tree.Rollout:
            logits, cache = look_ahead(plan.draft, ids, params, carry[-1], context)
            return independent.grow(plan, logits, (*carry[:-1], cache), context)

        nothing = model_tree.nothing(plan, cache, context)
        tokens, probs, cache = control.once(jnp.any(context.max_draft > 0), draft, nothing)
        return model_tree.proposal(plan, tokens, probs, context), state, cache

    return Drafter(chain.init, propose, chain.update, plan.topology)
