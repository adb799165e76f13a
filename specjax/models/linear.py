"""The matrices of all models: how one is stored, in float32, bfloat16, int8 or int4, and the product with it.

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

from specjax.models import bfloat16, cpu_products, modules, quantisation, quantised
from specjax.models.quantisation import Quantisation
from specjax.parallel import sharding


def outputs_first(dtype: jax.typing.DTypeLike) -> bool:
    """Whether a matrix of this dtype is stored `[out, in]`.

    CPUs multiply bfloat16 and integers up to three times faster where the weights of one output lie together, and
    float32 where those of one input do. TPUs and GPUs are equally fast with both.
    """
    return jnp.dtype(dtype).itemsize <= 2


def rotated(num_axes: int, first: int) -> tuple[int, ...]:
    """The axes from `first` on, then those before it."""
    return (*range(first, num_axes), *range(first))


def stored(num_axes: int, num_contracted: int, dtype: jax.typing.DTypeLike) -> tuple[int, ...]:
    """The order in which the axes of a matrix, inputs before outputs, lie in memory."""
    return rotated(num_axes, num_contracted if outputs_first(dtype) else 0)


def behind(num_stacked: int, order: Sequence[int]) -> tuple[int, ...]:
    """An order of axes that lie behind others, which stay in front (`modules.STACKED`)."""
    return (*range(num_stacked), *(num_stacked + axis for axis in order))


def converted(x: jax.Array, axes: sharding.Axes, num_contracted: int, before: str, after: str) -> jax.Array:
    """An array in another dtype, and in the order in which matrices of that dtype lie in memory.

    Args:
      x: the array, possibly of several matrices (`modules.STACKED`).
      axes: its logical axes.
      num_contracted: how many of the axes of each matrix are inputs; 0 for an array that is none.
      before: its dtype.
      after: the new one.
    """
    first = modules.num_stacked(axes)
    size = x.ndim - first
    if outputs_first(before):
        x = jnp.transpose(x, behind(first, rotated(size, size - num_contracted)))
    return jnp.transpose(x, behind(first, stored(size, num_contracted, after))).astype(after)


class Matrix(nnx.Module):
    """A linear map from the last axes of its argument to new ones.

    Attributes:
      values: the weights, in the order that `stored` gives for their dtype.
      scale: what the integers of a quantised matrix are multiplied by, in float32 (`quantisation`); None where the
        weights are floats.
      offset: what is added to them; None for nothing.
      num_contracted: how many axes of the argument are inputs.
      how: the way in which it is quantised, or None.
    """

    def __init__(
        self,
        rngs: nnx.Rngs,
        shape: Sequence[int],
        axes: sharding.Axes,
        dtype: str,
        *,
        how: Quantisation | None = None,
        init: nnx.Initializer | None = None,
        num_contracted: int = 1,
    ):
        """Declares the parameters.

        Args:
          rngs: random numbers.
          shape: the inputs' dimensions, then the outputs'.
          axes: the logical axes of these dimensions.
          dtype: the dtype of the weights where they are floats.
          how: how they are quantised; None: they are floats.
          init: by default normal with standard deviation 0.02.
          num_contracted: how many dimensions are the inputs'.
        """
        make = init or nnx.initializers.normal(0.02)
        self.num_contracted, self.how = num_contracted, how
        weight = make(rngs.params(), tuple(shape), jnp.dtype(dtype))
        if how is None:
            order = stored(len(shape), num_contracted, dtype)
            self.values = self._declare(jnp.transpose(weight, order), [axes[i] for i in order])
            self.scale = self.offset = None
            return
        # In the order that `stored` gives for integers.
        order = rotated(len(shape), num_contracted)
        rounded = quantisation.quantise(jnp.transpose(weight, order), num_contracted, how)
        self.values = self._declare(rounded.values, [axes[i] for i in order])
        shared = [axes[i] for i in order][: rounded.scale.ndim]
        self.scale = modules.variable(rounded.scale, shared)
        self.offset = None if rounded.offset is None else modules.variable(rounded.offset, shared)

    def _declare(self, values: jax.Array, axes: sharding.Axes) -> nnx.Param:
        return modules.variable(values, axes, num_contracted=self.num_contracted)

    def _rounded(self) -> quantisation.Rounded:
        assert self.scale is not None
        return quantisation.Rounded(
            self.values[...], self.scale[...], None if self.offset is None else self.offset[...]
        )

    def __call__(self, x: Float[Array, "B T *i"]) -> Float[Array, "B T *o"]:
        """The product, in float32."""
        if self.how is None:
            return product(x, self.values[...], self.num_contracted)
        return quantised.product(x, self._rounded(), self.num_contracted, self.how)

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
        if self.how is None:
            return look_up(values, tokens)
        tokens = jnp.minimum(tokens, values.shape[0] - 1)
        rows = jax.tree.map(lambda table: jnp.take(table, tokens, axis=0), self._rounded())
        return quantisation.dequantise(rows, self.num_contracted)


@functools.partial(jax.jit, static_argnames=("num_contracted", "how"))
def quantise(values: Float[Array, "..."], num_contracted: int, how: Quantisation) -> dict[str, jax.Array]:
    """The parameters of a quantised `Matrix`, from the values of one in floats, in the order of `stored`."""
    if not outputs_first(values.dtype):
        values = jnp.transpose(values, rotated(values.ndim, num_contracted))
    rounded = quantisation.quantise(values, num_contracted, how)
    return {name: x for name, x in rounded._asdict().items() if x is not None}


def cast(params: Any, axes: Any, num_contracted: Any, before: str, after: str) -> Any:
    """The parameters of a module in another dtype, which may store its matrices in another order.

    Args:
      params: floats.
      axes: the same tree, with the logical axes of each (`modules.metadata`).
      num_contracted: the same tree, with the number of axes that are inputs of each.
      before: their dtype.
      after: the new one.
    """

    def convert(x: Any, axes: Any, inputs: int) -> Any:
        return converted(jnp.asarray(x), axes, inputs, before, after)

    return jax.tree.map(convert, params, axes, num_contracted)


def is_matrix(contracted: Any) -> bool:
    """Whether a part of the tree `families.num_contracted` belongs to a `Matrix`."""
    return isinstance(contracted, dict) and bool(contracted.get("values"))


def look_up(table: Float[Array, "V D"], tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
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
