"""A second, smaller model drafts (Leviathan et al. 2022; Chen et al. 2023)."""

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from specjax import control
from specjax.drafters import model_dynamic, model_tree, rollout
from specjax.drafters.catch_up import catch_up, learn, read_last, set_length
from specjax.drafters.children import Children, without_replacement
from specjax.drafters.model_dynamic import Dynamic
from specjax.limits import check_num_draft_tokens
from specjax.types import Context, Draft, Drafter, Feedback, Model, Params, Proposal, Tree


def model(
    draft: Any,
    *,
    num_draft_tokens: int | None = None,
    min_confidence: float = 0.0,
    lengths: tuple[int, ...] = (),
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
      lengths: of a chain, shorter lengths with programs of their own (`Topology.lengths`): a step in which no row is to
        draft more tokens than one of these calls the draft so often, and the target scores that many. It pays where
        scoring more tokens takes longer, as on CPUs.
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
    sizes = num_draft_tokens is not None or bool(min_confidence) or bool(lengths)
    if dynamic is not None:
        if sizes or topology is not None:
            raise ValueError(f"dynamic={dynamic} says what is drafted: leave out topology and the sizes of chains.")
        model_dynamic.check(dynamic)
        drafter = model_dynamic.drafter(inner, dynamic)
    elif topology is None:
        num_draft_tokens = 4 if num_draft_tokens is None else num_draft_tokens
        check_num_draft_tokens(num_draft_tokens)
        drafter = _drafter(rollout.Chain(inner, num_draft_tokens, tuple(lengths)), min_confidence)
    else:
        if sizes:
            raise ValueError(
                f"topology={topology} says how many tokens are drafted: leave out num_draft_tokens, lengths and "
                "min_confidence."
            )
        drafter = model_tree.drafter(model_tree.plan(inner, topology, children))
    if isinstance(draft, Model):
        return drafter
    return Draft(drafter, draft.params, draft.tokenizer, inner.max_len, inner)


@functools.cache
def _drafter(chain: rollout.Chain, min_confidence: float) -> Drafter:
    """The state is the draft's cache, whose `length` counts its committed entries (see `models.cache`)."""

    def roll_out(params: Tree, cache: Any, context: Context, threshold: Any) -> rollout.Rollout:
        cache = catch_up(chain.draft, params, cache, context.history, missing=2, chunk=chain.num_draft_tokens + 1)
        # The first call feeds the last two tokens: after full acceptance the cache lacks both (the last draft token was
        # chosen but never fed), and otherwise the first of them is merely written again.
        logits, cache = read_last(chain.draft, params, cache, context.history, 2)
        return rollout.draw(chain, params, logits, cache, context, threshold)

    def propose(params: Params, state: Any, cache: Any, context: Context) -> tuple[Proposal, Any, Any]:
        threshold = rollout.threshold(min_confidence, context)
        drawn = rollout.none(chain, state, context, threshold)
        if chain.num_draft_tokens:
            needed = jnp.any(context.max_draft > 0)
            drawn = control.once(needed, lambda none: roll_out(params.draft, none.cache, context, threshold), drawn)
        proposal = drawn.proposal(context)
        # All but the last draft token were fed. Those that are not proposed cannot become text.
        fed = context.history.length + jnp.maximum(proposal.length - 1, 0)
        return proposal, set_length(chain.draft, drawn.cache, jnp.minimum(drawn.cache.length, fed)), cache

    def update(params: Params, state: Any, feedback: Feedback) -> Any:
        if feedback.inputs is not None:
            return learn(chain.draft, params.draft, state, feedback.inputs)
        # The accepted draft tokens are text, the others are rolled back.
        return set_length(chain.draft, state, jnp.minimum(state.length, feedback.length - 1))

    return Drafter(chain.draft.init_cache, propose, update, chain.topology)
