"""What a plan holds in each device's memory, computed from shapes."""

import functools
from typing import NamedTuple

import jax

from specjax.models import cache as cache_lib
from specjax.planning.setup import SIDES, Setup, abstract_mesh, local_bytes, place_params, shard, unrolled, with_layers
from specjax.types import Tree


class Memory(NamedTuple):
    """Bytes on each device while a text is decoded.

    Attributes:
      target_parameters: the target's parameters.
      draft_parameters: the draft's parameters.
      target_cache: the target's keys and values.
      draft_cache: the draft's keys and values.
      other: the rest of the loop's state.
    """

    target_parameters: int
    draft_parameters: int
    target_cache: int
    draft_cache: int
    other: int


@functools.lru_cache(maxsize=64)
def memory(setup: Setup) -> Memory:
    """The contents of each device's memory, without temporaries."""
    setup, mesh = unrolled(setup), abstract_mesh(setup)
    # Caches are traced with one layer: all are alike, and there may be many.
    state = shard(with_layers(setup, 1, 1), mesh).state

    def cache(tree: Tree, side: str) -> int:
        leaves = jax.tree.leaves(tree)
        layers = setup.num_layers(side)
        return sum(local_bytes([x]) * (layers if x.ndim == len(cache_lib.AXES) else 1) for x in leaves)

    caches = cache(state.rows.cache, "target"), cache(state.rows.drafter, "draft")
    other = local_bytes(state) - local_bytes(state.rows.cache) - local_bytes(state.rows.drafter)
    target, draft = (local_bytes(place_params(setup, side, mesh)) for side in SIDES)
    return Memory(target, draft, *caches, other)
