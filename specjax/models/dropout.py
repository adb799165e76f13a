"""Dropout (Srivastava et al. 2014, JMLR 15) in the forward pass of training, where models take it as an argument.

Masks depend on the key of a row and on the place in the model: not on the other rows, on how a batch is split, nor on
where it is computed. With None, which is all that decoding has, nothing is computed.
"""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from specjax.types import Dropout


def within(dropout: Dropout | None, place: str | int | Int[Array, ""]) -> Dropout | None:
    """The dropout of a part of a model, such as a layer, whose masks are its own."""
    if dropout is None:
        return None
    number = np.uint32(zlib.crc32(place.encode())) if isinstance(place, str) else place
    return dropout._replace(keys=jax.vmap(jax.random.fold_in, (0, None))(dropout.keys, number))


def drop(x: Float[Array, "B *shape"], dropout: Dropout | None, place: str) -> Float[Array, "B *shape"]:
    """Sets each number to zero with probability `rate`, and divides the others by 1 - rate: the expectation is x."""
    own = within(dropout, place)
    if own is None:
        return x
    keep = 1.0 - own.rate
    kept = jax.vmap(lambda key: jax.random.bernoulli(key, keep, x.shape[1:]))(own.keys)
    return jnp.where(kept, x / keep, 0.0)
