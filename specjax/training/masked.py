"""Training batches in which masks are read behind tokens of the text: placeholders for the tokens to come.

A mask of place j, from 0, behind the token at position t stands at position t + 1 + j, in the place of the text's token
there. It sees the text up to t and masks behind the same token, never the text that it stands for. One call reads a
text and the masks behind many of its tokens. How masks are read is a `Kind`.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from specjax.types import Batch


class Places(NamedTuple):
    """Where masks are read.

    Attributes:
      point: `[B, M]` the index in its row of the token that each mask is behind.
      place: `[B, M]` the number of each mask among those behind the same token, from 0. Where a token has the mask of a
        place, it has those of all smaller ones.
    """

    point: Int[Array, "B M"]
    place: Int[Array, "B M"]


class Kind(NamedTuple):
    """How masks are read and what they learn.

    Attributes:
      fills: whether a mask is filled with the token that it stands for; else what the model says there is about the
        token after, as behind any other token.
      both_ways: whether the masks behind a token see each other both ways; else those of smaller places alone.
      learns_text: whether the text's own tokens keep their loss.
    """

    fills: bool = False
    both_ways: bool = False
    learns_text: bool = True


AHEAD = Kind()
"""As a causal model reads: PaSS, prompt tokens, PARD."""

SLOTS = Kind(fills=True, both_ways=True, learns_text=False)
"""As a model that is not autoregressive does: SpecDec."""


def counts(width: int, number: int, keep: float = 1.0, least: float = 0.0) -> tuple[int, ...]:
    """How many tokens of a row of `width` have a mask of each place: a share of keep^i, and at least `least`.

    PARD's conditional drop of tokens (An et al. 2025, arXiv 2504.18583): the further ahead a place is, the fewer of its
    predictions are trained. With `keep` of 1 every token has all masks.

    Args:
      width: T.
      number: how many places there are.
      keep: r, above 0 and at most 1; place i from 1 is kept behind a share of r^i.
      least: the least share.

    Raises:
      ValueError: for shares outside of these bounds.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep={keep}: a share above 0, and at most 1, which keeps every mask.")
    if not 0 <= least <= 1:
        raise ValueError(f"least={least}: a share from 0 to 1.")
    return tuple(max(1, int(width * max(keep**i, least))) for i in range(1, number + 1))


def choose(rows: int, width: int, counts: Sequence[int], rng: np.random.Generator) -> Places:
    """Tokens of each row, chosen at random, with masks behind them.

    A token that has the mask of one place has those of all places before, which that mask has to see.

    Args:
      rows: B.
      width: T, the tokens of a row.
      counts: behind how many tokens there is a mask of each place; never rising.
      rng: where chance comes from.
    """
    order = np.stack([rng.permutation(width) for _ in range(rows)])
    point = np.concatenate([order[:, :count] for count in counts], axis=1)
    place = np.concatenate([np.full(count, place) for place, count in enumerate(counts)])
    return Places(jnp.asarray(point, jnp.int32), jnp.asarray(np.broadcast_to(place, point.shape), jnp.int32))


def stands_for(places: Places) -> Int[Array, "B M"]:
    """The index of the text's token that each mask stands for, and with whose target it is trained."""
    return places.point + 1 + places.place


def visible(places: Places, width: int, *, both_ways: bool = False) -> Bool[Array, "B W W"]:
    """Which tokens each token of a row sees, the masks after the text: `Batch.sees`.

    Args:
      places: the M masks.
      width: T, the tokens of the text; W = T + M.
      both_ways: see `Kind`.
    """
    rows, number = places.point.shape
    text = np.arange(width)
    sees_text = jnp.concatenate(
        [
            jnp.broadcast_to(text <= text[:, None], (rows, width, width)),
            text <= places.point[:, :, None],
        ],
        axis=1,
    )
    same = places.point[:, :, None] == places.point[:, None]
    earlier = places.place[:, None] <= places.place[:, :, None]
    seen = same if both_ways else same & earlier
    sees_masks = jnp.concatenate([jnp.zeros((rows, width, number), bool), seen], axis=1)
    return jnp.concatenate([sees_text, sees_masks], axis=2)


@functools.partial(jax.jit, static_argnames="kind")
def insert(batch: Batch, places: Places, ids: Int[Array, " K"], kind: Kind = AHEAD) -> Batch:
    """A batch of texts with masks behind some of their tokens.

    Args:
      batch: `[B, T]` texts.
      places: the M masks of each row.
      ids: the token id of the mask of each place.
      kind: how they are read.

    Returns:
      `[B, T + M]`: the texts, then the masks. A mask whose target is not in its text, or has no weight, has weight 0.
    """
    width = batch.tokens.shape[1]
    # The target of a token is the one after it.
    target = stands_for(places) - kind.fills
    at = jnp.minimum(target, width - 1)

    def of(values: Array, index: Array) -> Array:
        return jnp.take_along_axis(values, index, axis=1)

    segment = of(batch.segments, places.point)
    is_within = (target < width) & (of(batch.segments, at) == segment) & (segment > 0)
    masks = {
        "tokens": ids[places.place],
        "targets": of(batch.targets, at),
        "segments": segment,
        "positions": of(batch.positions, places.point) + 1 + places.place,
        "weights": jnp.where(is_within, of(batch.weights, at), 0.0),
    }
    joined = {
        name: jnp.concatenate([getattr(batch, name), new.astype(getattr(batch, name).dtype)], axis=1)
        for name, new in masks.items()
    }
    if not kind.learns_text:
        joined["weights"] = joined["weights"].at[:, :width].set(0.0)
    return batch._replace(**joined, sees=visible(places, width, both_ways=kind.both_ways))
