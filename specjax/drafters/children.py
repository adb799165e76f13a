"""How the children of the nodes of a tree are found from a draft's logits: functions for `drafters.model(children=)`.

Each states what its tokens were drawn from, given their elder siblings, as `Proposal.probs` asks. At temperature 0 all
take the most probable tokens, in order, as chosen ones.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from specjax import control, sampling
from specjax.types import SamplingOptions

Found = tuple[Int[Array, "B W k"], Float[Array, "B W k V"] | None]
"""The k children of each of W nodes, in the order in which they were drawn, and what each was drawn from.

A token of -1 is not proposed. None: all were chosen deterministically.
"""

Children = Callable[[Float[Array, "B W V"], int, Key[Array, "B W"], SamplingOptions], Found]
"""`(logits, k, keys, options)`: from the draft's logits after each of W nodes, after all penalties; a key for each."""


def has_no_token(logits: Float[Array, "B W V"], probs: Float[Array, "B W V"]) -> Bool[Array, "B W"]:
    """Whether the options forbid every token that the draft knows; NaN logits are another matter, an error."""
    # A sum, since XLA:CPU may leave NaN out of a maximum.
    return jnp.isnan(jnp.sum(probs, axis=-1)) & (jnp.sum(logits, axis=-1) < jnp.inf)


def _where_sampled(
    options: SamplingOptions, sampled: Callable[[], Float[Array, "B W V"]], logits: Float[Array, "B W V"]
) -> Float[Array, "B W V"]:
    """Scores by which children are ranked: `sampled()`, and in rows of temperature 0 the logits. Never NaN."""
    is_sampled = options.temperature > 0
    scores = jax.lax.cond(
        jnp.any(is_sampled), lambda: jnp.where(is_sampled[:, None, None], sampled(), logits), lambda: logits
    )
    scores = control.alike(scores, logits)
    return jnp.where(jnp.isnan(scores), -jnp.inf, scores)


def _ranked(scores: Float[Array, "B W V"], number: int) -> Int[Array, "B W k"]:
    """The tokens of the greatest scores; -1 where no finite one is left."""
    best, tokens = sampling.warp.top(scores, number)
    return jnp.where(best > -jnp.inf, tokens, -1)


def _stated(
    tokens: Int[Array, "B W k"],
    drawn_from: Float[Array, "B W k V"],
    logits: Float[Array, "B W V"],
    probs: Float[Array, "B W V"],
    options: SamplingOptions,
) -> Found:
    """The tokens with their distributions: one-hot at temperature 0, NaN where the logits are."""
    one_hot = jax.nn.one_hot(tokens, logits.shape[-1], dtype=jnp.float32)
    drawn_from = jnp.where((options.temperature > 0)[:, None, None, None], drawn_from, one_hot)
    empty = has_no_token(logits, probs)[..., None]
    # Nodes without a distribution are proposed, so that the row ends with an error where they are judged.
    broken = jnp.isnan(jnp.sum(probs, axis=-1))[..., None] & ~empty
    tokens = jnp.where(empty, -1, jnp.where(broken, 0, tokens))
    drawn_from = jnp.where((tokens < 0)[..., None], 0.0, drawn_from)
    return tokens, jnp.where(broken[..., None], jnp.nan, drawn_from)


def without_replacement(
    logits: Float[Array, "B W V"], number: int, keys: Key[Array, "B W"], options: SamplingOptions
) -> Found:
    """Drawn one after another, none twice: the Gumbel top-k (Kool et al. 2019, arXiv 1903.06059), in its order.

    Each child was drawn from q without its elder siblings, renormalised. Of all kinds it is accepted most often
    (Sequoia, arXiv 2402.12374; recursive speculative decoding, arXiv 2402.14160).
    """
    probs = sampling.warp.warp(logits, options)
    noise = jax.vmap(jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[-1:])))
    tokens = _ranked(_where_sampled(options, lambda: jnp.log(probs) + noise(keys), logits), number)

    def leave_out(left: Array, token: Array) -> tuple[Array, Array]:
        total = jnp.sum(left, axis=-1, keepdims=True)
        rest = jnp.where(jnp.arange(left.shape[-1]) == token[..., None], 0.0, left)
        return rest, left / jnp.where(total > 0, total, 1.0)

    _, drawn_from = jax.lax.scan(leave_out, probs, jnp.moveaxis(tokens, -1, 0))
    return _stated(tokens, jnp.moveaxis(drawn_from, 0, 2), logits, probs, options)


def with_replacement(
    logits: Float[Array, "B W V"], number: int, keys: Key[Array, "B W"], options: SamplingOptions
) -> Found:
    """Drawn independently, each from q itself (SpecInfer, arXiv 2305.09781): children may be equal."""
    probs = sampling.warp.warp(logits, options)

    def draw() -> Array:
        each = jax.vmap(jax.vmap(lambda key: jax.random.split(key, number)))(keys)
        return jax.vmap(jax.vmap(jax.vmap(sampling.categorical, (0, None))))(each, probs)

    best = _ranked(_where_sampled(options, lambda: logits, logits), number)
    is_sampled = options.temperature > 0
    drawn = jax.lax.cond(jnp.any(is_sampled), draw, lambda: best)
    tokens = jnp.where(is_sampled[:, None, None], drawn, best)
    return _stated(
        tokens, jnp.broadcast_to(probs[:, :, None], (*tokens.shape, probs.shape[-1])), logits, probs, options
    )


def most_probable(
    logits: Float[Array, "B W V"], number: int, keys: Key[Array, "B W"], options: SamplingOptions
) -> Found:
    """The most probable tokens at every temperature: chosen, not drawn (EAGLE-2, arXiv 2406.16858)."""
    del keys

    def allowed() -> Array:
        return jnp.where(sampling.warp.warp(logits, options) > 0, logits, -jnp.inf)

    return _ranked(_where_sampled(options, allowed, logits), number), None


def of_the_position(
    logits: Float[Array, "B W V"], number: int, keys: Key[Array, "B W"], options: SamplingOptions
) -> Found:
    """What the noise of the position prefers, which all W nodes share: for the rule `coupled`, whose target uses it.

    A drafter takes this kind wherever `Context.coupled` says so.
    """

    def noisy() -> Array:
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[-1:]))(keys[:, 0])
        return jnp.log(sampling.warp.warp(logits, options)) + noise[:, None]

    return _ranked(_where_sampled(options, noisy, logits), number), None


def find(
    children: Children,
    logits: Float[Array, "B W V"],
    number: int,
    key: Any,
    options: SamplingOptions,
    coupled: bool,
    shared: bool = False,
) -> Found:
    """The children of W nodes of one depth, by `children`, or by what the rule `coupled` needs.

    Args:
      children: the kind.
      logits: the draft's after each node, after all penalties.
      number: k.
      key: `[B]` of the position.
      options: of the rows.
      coupled: whether `key` is the one with which the target draws.
      shared: whether all W nodes share a draw, rather than having one each (`Topology.shares_draws`).
    """
    rows, width, _ = logits.shape
    together = jnp.broadcast_to(key[:, None], (rows, width))
    if coupled:
        return of_the_position(logits, number, together, options)
    if shared:
        return children(logits, number, together, options)
    own = jax.vmap(lambda key: jax.vmap(lambda node: jax.random.fold_in(key, node))(jnp.arange(width)))(key)
    return children(logits, number, own, options)
