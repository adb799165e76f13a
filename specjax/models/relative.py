"""Relative positions as T5 has them (Raffel et al. 2019, arXiv 1910.10683, section 2.1), and what is copied by them."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from specjax.models.config import T5Config


def buckets(config: T5Config, *, bidirectional: bool) -> np.ndarray:
    """The bucket of every relative position (Raffel et al. 2019, section 2.1).

    Small distances have a bucket each; greater ones share buckets that widen logarithmically up to `max_distance`,
    beyond which there is one. An encoder uses one half of the buckets for what comes after a token.

    Returns:
      `[2 M + 1]` int32, M = `max_distance`: the buckets of the distances query - key from -M to M.
    """
    # In float32, step by step as published: at a bucket's edge, rounding decides.
    distance = np.arange(-config.max_distance, config.max_distance + 1)
    number, first = config.num_buckets, np.zeros_like(distance)
    if bidirectional:
        number //= 2
        first, distance = np.where(distance < 0, number, 0), np.abs(distance)
    else:
        distance = np.maximum(distance, 0)
    exact = number // 2
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact)) / np.float32(
        math.log(config.max_distance / exact)
    )
    wide = np.minimum(exact + (ratio * np.float32(number - exact)).astype(np.int32), number - 1)
    return (first + np.where(distance < exact, distance, wide)).astype(np.int32)


def relative_bias(
    config: T5Config,
    table: Float[Array, "buckets H"],
    distance: Int[Array, "B T S"],
    *,
    bidirectional: bool,
) -> Float[Array, "B H T S"]:
    """The bias that is added to the attention scores, by relative position.

    Args:
      config: the shape.
      table: the parameters.
      distance: how many positions each of the S keys is before the query.
      bidirectional: whether tokens attend to those after them.
    """
    by_distance = table.astype(jnp.float32).T[:, buckets(config, bidirectional=bidirectional)]
    far = config.max_distance
    return jnp.moveaxis(by_distance[:, jnp.clip(distance, -far, far) + far], 0, 1)


def places(segments: Int[Array, "B S"]) -> Int[Array, "B S"]:
    """The position of each token of packed rows in its segment, from 0."""
    index = jnp.broadcast_to(jnp.arange(segments.shape[1]), segments.shape)
    is_first = jnp.concatenate([jnp.ones_like(segments[:, :1]), jnp.diff(segments, axis=1)], axis=1) != 0
    return index - jax.lax.cummax(jnp.where(is_first, index, 0), axis=1)


def copied(
    config: T5Config,
    table: Float[Array, "buckets 1"],
    distance: Int[Array, "B T S"],
    sees: Bool[Array, "B T S"],
    source: Float[Array, "B S D"],
) -> Float[Array, "B T D"]:
    """A copy of the source for each of T tokens: its embeddings, weighted by how far they stand from the token.

    SpecDec's drafter (Xia et al. 2022, arXiv 2203.16487, and the authors' code) reads it in the place of the embeddings
    of its masks. There the weights come of learned positions and the source's content; here, where positions are
    relative, of a bias of each distance, as in attention.

    Args:
      config: the shape.
      table: the parameters: the bias of each bucket.
      distance: the position of each token minus that of each token of the source.
      sees: which tokens of the source each attends to.
      source: the embeddings of the source.
    """
    scores = relative_bias(config, table, distance, bidirectional=True)[:, 0]
    weights = jax.nn.softmax(jnp.where(sees, scores, -1e9), axis=-1)
    return jnp.einsum("bts,bsd->btd", weights, source.astype(jnp.float32))
