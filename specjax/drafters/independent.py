"""Drafts from distributions that are all known before a token is drawn: one for each depth, which the text alone gives.

What is drawn at one depth does not change those of the next. So each token states the distribution that it was drawn
from, options included, and every exact rule judges it: shared by drafters that predict several tokens in one call.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from specjax.drafters import chain, model_tree
from specjax.sampling import tree
from specjax.types import Context, Proposal


def draw_chain(logits: Float[Array, "B K V"], length: Int[Array, " B"], context: Context) -> Proposal:
    """A chain of K tokens, each drawn from the distribution of its place.

    Args:
      logits: of each place, V the target's.
      length: the most tokens that each row proposes.
      context: of the step.
    """

    def predict(place: Int[Array, ""]) -> Float[Array, "B V"]:
        return jax.lax.dynamic_index_in_dim(logits, place, axis=1, keepdims=False)

    return chain.draw(predict, lambda place, token: place + 1, jnp.int32(0), length, context)


def grow(
    plan: model_tree.Plan, logits: Float[Array, "B D V"], carry: model_tree.Rollout, context: Context
) -> model_tree.Rollout:
    """A tree, in which the children of all nodes of a depth come from the distribution of that depth.

    Args:
      plan: the tree, of depth D.
      logits: of each depth.
      carry: `model_tree.nothing`; its cache is handed back.
      context: of the step.
    """
    tokens, probs, cache = carry
    topology, rows = plan.topology, len(context.max_draft)
    parent = jnp.broadcast_to(jnp.asarray(topology.parents, jnp.int32), (rows, topology.num_nodes))
    shape = tree.shape(parent, topology.depth)
    for depth in range(topology.depth):
        behind = plan.behind(depth)
        of_depth = jnp.repeat(logits[:, depth : depth + 1], len(behind), axis=1)
        tokens, probs = model_tree.place(plan, depth, behind, of_depth, tokens, probs, shape, context)
    return tokens, probs, cache
