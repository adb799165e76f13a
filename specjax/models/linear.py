"""The matrices of all models: how one is stored, in float32, bfloat16 or int8, and the product with it.

A model declares a `Matrix` by its shape and logical axes, and calls it; only this module knows the precision in which
it is stored.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from specjax.models import bfloat16, cpu_products, modules
from specjax.parallel import sharding


def outputs_first(dtype: jax.typing.DTypeLike) -> bool:
    """Whether a matrix of this dtype is stored `[out, in]`.

    CPUs multiply bfloat16 and int8 up to three times faster where the weights of one output lie together, and float32
    where those of one input do. TPUs and GPUs are equally fast with both.
    """
    return jnp.dtype(dtype).itemsize <= 2


def rotated(num_axes: int, first: int) -> tuple[int, ...]:
    """The axes from `first` on, then those before it."""
    return (*range(first, num_axes), *range(first))


def stored(num_axes: int, num_contracted: int, dtype: jax.typing.DTypeLike) -> tuple[int, ...]:
    """The order in which the axes of a matrix, inputs before outputs, lie in memory."""
    return rotated(num_axes, num_contracted if outputs_first(dtype) else 0)


class Matrix(nnx.Module):
    """A linear map from the last axes of its argument to new ones.

    Attributes:
      values: the weights, in the order that `stored` gives for their dtype.
      scale: what each output of an int8 matrix is multiplied by, in float32; None where the weights are floats.
      num_contracted: how many axes of the argument are inputs.
    """

    def __init__(
        self,
        rngs: nnx.Rngs,
        shape: Sequence[int],
        axes: sharding.Axes,
        dtype: str,
        *,
        int8: bool = False,
        init: nnx.Initializer | None = None,
        num_contracted: int = 1,
    ):
        """Declares the parameters.

        Args:
          rngs: random numbers.
          shape: the inputs' dimensions, then the outputs'.
          axes: the logical axes of these dimensions.
          dtype: the dtype of the weights where they are floats.
          int8: whether they are rounded to eight bits (`quantise`).
          init: by default normal with standard deviation 0.02.
          num_contracted: how many dimensions are the inputs'.
        """
        make = init or nnx.initializers.normal(0.02)
        order = stored(len(shape), num_contracted, "int8" if int8 else dtype)
        weight = make(rngs.params(), tuple(shape), jnp.dtype(dtype))
        weight = jnp.transpose(weight, stored(len(shape), num_contracted, dtype))
        values, scale = quantise(weight, num_contracted) if int8 else (weight, None)
        self.num_contracted = num_contracted
        self.values = modules.variable(values, [axes[i] for i in order], num_contracted=num_contracted)
        self.scale = None if scale is None else modules.variable(scale, axes[num_contracted:])

    def __call__(self, x: Float[Array, "B T *i"]) -> Float[Array, "B T *o"]:
        """The product, in float32."""
        if self.scale is None:
            return product(x, self.values[...], self.num_contracted)
        return product_int8(x, self.values[...], self.scale[...], self.num_contracted)

    def look_up(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """The weights of the outputs with these indices: a head `D -> V` read as an embedding table.

        Like the function `look_up`: in float32, and indices beyond the last output read the last.
        """
        if tokens.size == 1:
            # XLA:GPU makes a slice of the lookup of one token, and gathers a table that is split over devices for it.
            return self.look_up(jnp.concatenate([tokens, tokens], axis=1))[:, :1]
        values = self.values[...]
        if not outputs_first(values.dtype):
            tokens = jnp.minimum(tokens, values.shape[1] - 1)
            return jnp.moveaxis(jnp.take(values, tokens, axis=1), 0, -1).astype(jnp.float32)
        found = look_up(values, tokens)
        if self.scale is None:
            return found
        return found * look_up(self.scale[...][:, None], tokens)


def is_matrix(contracted: Any) -> bool:
    """Whether a part of the tree `families.num_contracted` belongs to a `Matrix`."""
    return isinstance(contracted, dict) and bool(contracted.get("values"))


def look_up(table: Float[Array, "V D"] | Int[Array, "V D"], tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """The embeddings of tokens, in float32.

    Ids beyond the table read its last row, since a draft may know fewer tokens than its target.
    """
    tokens = jnp.minimum(tokens, table.shape[0] - 1)
    if tokens.size == 1:  # As above.
        return look_up(table, jnp.concatenate([tokens, tokens], axis=1))[:, :1]
    return bfloat16.moved(lambda table, tokens: jnp.take(table, tokens, axis=0), (table,), tokens).astype(jnp.float32)


def with_extra(
    x: Float[Array, "B T D"], tokens: Int[Array, "B T"], extra: Float[Array, "X U"] | None, vocab_size: int
) -> Float[Array, "B T D"]:
    """The embeddings x of tokens, except that ids from `vocab_size` on read the rows of `extra` (`Block.embeddings`).

    Raises:
      ValueError: for embeddings of another width.
    """
    if extra is None:
        return x
    if extra.shape[-1] != x.shape[-1]:
        raise ValueError(f"embeddings of shape {list(extra.shape)}: this model's have {x.shape[-1]} entries each.")
    own = jnp.take(extra.astype(x.dtype), jnp.maximum(tokens - vocab_size, 0), axis=0, mode="clip")
    return jnp.where((tokens >= vocab_size)[..., None], own, x)


def _as_matrices(x: Array, weight: Array, num_contracted: int) -> tuple[Array, Array, tuple[int, ...]]:
    """The rows of x, the weight as a matrix in its own layout, and the shape of their product."""
    split = weight.ndim - num_contracted if outputs_first(weight.dtype) else num_contracted
    outputs = weight.shape[:split] if outputs_first(weight.dtype) else weight.shape[split:]
    kept = x.shape[: x.ndim - num_contracted]
    matrix = weight.reshape(math.prod(weight.shape[:split]), -1)
    return x.reshape(math.prod(kept), -1), matrix, (*kept, *outputs)


def _dot(x: Array, weight: Array, num_contracted: int) -> Array:
    # The outputs' axes stay apart: merged after another axis, one that is split over devices would be gathered.
    summed = range(weight.ndim - num_contracted, weight.ndim) if outputs_first(weight.dtype) else range(num_contracted)
    contracted = (tuple(range(x.ndim - num_contracted, x.ndim)), tuple(summed))
    return jax.lax.dot_general(x, weight, (contracted, ((), ())), preferred_element_type=jnp.float32)


def _dot_on_cpu(x: Array, weight: Array, num_contracted: int) -> Array:
    rows, matrix, shape = _as_matrices(x, weight, num_contracted)
    if cpu_products.is_supported(len(rows), weight.dtype):
        return cpu_products.product(rows, matrix).reshape(shape)
    if not outputs_first(weight.dtype):
        return _dot(x, weight, num_contracted)
    # XLA:CPU turns a one-row bf16 product into a vector kernel that converts every weight to float32 first, six times
    # slower than two rows. It would transpose a weight of more axes to `[in, out]`, by a copy in every call, and it
    # multiplies few rows by a tall matrix up to 1.4 times faster where the matrix is on the left.
    padded = jnp.concatenate([rows, jnp.zeros_like(rows)]) if len(rows) == 1 else rows
    out = jax.lax.dot_general(matrix, padded, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    return out[:, : len(rows)].T.reshape(shape)


def product(x: Float[Array, "B T *i"], weight: Float[Array, "..."], num_contracted: int = 1) -> Float[Array, "B T *o"]:
    """The product over the last `num_contracted` axes of x, in the weight's dtype, accumulated in float32."""
    on_cpu, elsewhere = (functools.partial(dot, num_contracted=num_contracted) for dot in (_dot_on_cpu, _dot))
    return jax.lax.platform_dependent(x.astype(weight.dtype), weight, cpu=on_cpu, default=elsewhere)


def quantise(weight: Float[Array, "..."], num_contracted: int) -> tuple[Int[Array, "..."], Float[Array, "..."]]:
    """A matrix in int8, `[out, in]`, and the float32 scale of each output, 1/127 of its largest weight.

    Args:
      weight: with its axes in the order of `stored`.
      num_contracted: how many of its axes are the inputs'.
    """
    if not outputs_first(weight.dtype):
        weight = jnp.transpose(weight, rotated(weight.ndim, num_contracted))
    inputs = tuple(range(weight.ndim - num_contracted, weight.ndim))
    weight = weight.astype(jnp.float32)
    largest = jnp.max(jnp.abs(weight), axis=inputs)
    scale = jnp.where(largest > 0, largest, 1.0) / 127
    return jnp.round(weight / jnp.expand_dims(scale, inputs)).astype(jnp.int8), scale


def product_int8(
    x: Float[Array, "B T *i"], weight: Int[Array, "..."], scale: Float[Array, "*o"], num_contracted: int = 1
) -> Float[Array, "B T *o"]:
    """The product with a matrix from `quantise`, in float32.

    CPUs multiply int8 by int8: every x is rounded to 15 bits, relative to the largest of its row, and split into an
    upper and a lower int8 part, which are two rows of one product. Sums of integers are exact, so a result does not
    depend on how many rows there are. Elsewhere the weights are converted to bfloat16 as they are read.
    """

    def integers(x: Array, weight: Array) -> Array:
        rows, matrix, shape = _as_matrices(x.astype(jnp.float32), weight, num_contracted)
        step = jnp.maximum(jnp.max(jnp.abs(rows), axis=1, keepdims=True), 1e-30) / (127 * 128)
        whole = jnp.round(rows / step).astype(jnp.int32)
        both = jnp.concatenate([whole >> 7, whole & 127]).astype(jnp.int8)
        product = jax.lax.dot_general(matrix, both, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
        upper, lower = jnp.split(product.T.astype(jnp.float32), 2)
        return ((128 * upper + lower) * step).reshape(shape)

    def floats(x: Array, weight: Array) -> Array:
        return _dot(x.astype(jnp.bfloat16), weight.astype(jnp.bfloat16), num_contracted)

    return jax.lax.platform_dependent(x, weight, cpu=integers, default=floats) * scale
