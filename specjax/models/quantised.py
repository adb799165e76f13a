"""Products with matrices in eight or four bits (`quantisation`), which are read in that size.

TPUs and GPUs convert the weights as they read them, and multiply in bfloat16, or integers with integers where
activations are int8 and an output has one scale. CPUs multiply in float32.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from specjax.models import cpu_products
from specjax.models.quantisation import Quantisation, Rounded, dequantise, split

MAX_ROWS = 16
"""The most rows whose products with each group are written down on GPUs; more share a matrix that is converted once."""


def round_rows(x: Float[Array, "B T *i"], num_contracted: int) -> tuple[Float[Array, "B T *i"], Float[Array, "..."]]:
    """Activations as whole numbers from -127 to 127, and the scale of each row (Dettmers et al. 2022, 2208.07339)."""
    inputs = tuple(range(x.ndim - num_contracted, x.ndim))
    step = jnp.maximum(jnp.max(jnp.abs(x), axis=inputs, keepdims=True), 1e-30) / 127
    return jnp.round(x / step), step


def product(
    x: Float[Array, "B T *i"], weight: Rounded, num_contracted: int, how: Quantisation
) -> Float[Array, "B T *o"]:
    """The product over the last `num_contracted` axes of x with a rounded matrix, in float32."""
    x, step = x.astype(jnp.float32), None
    if how.activations:
        x, step = round_rows(x, num_contracted)

    def on_cpu(x: Array, weight: Rounded) -> Array:
        if how == Quantisation(8):
            return _exact(x, weight, num_contracted)
        rows = math.prod(x.shape[: x.ndim - num_contracted])
        if cpu_products.is_supported(rows, weight.values.dtype) and (how.bits == 8 or x.shape[-1] % 2 == 0):
            return _by_rows(x, weight, num_contracted)
        return _in_float32(x, weight, num_contracted)

    def elsewhere(x: Array, weight: Rounded) -> Array:
        if how.group is None:
            dtype = jnp.int8 if how.activations else jnp.bfloat16
            return _dot(x.astype(dtype), weight.values.astype(dtype), num_contracted).astype(jnp.float32) * weight.scale
        return _dot(x.astype(jnp.bfloat16), dequantise(weight, num_contracted).astype(jnp.bfloat16), num_contracted)

    def on_cuda(x: Array, weight: Rounded) -> Array:
        few = math.prod(x.shape[: x.ndim - num_contracted]) <= MAX_ROWS
        return _by_groups(x, weight, num_contracted) if how.group and few else elsewhere(x, weight)

    out = jax.lax.platform_dependent(x, weight, cpu=on_cpu, cuda=on_cuda, default=elsewhere)
    if step is None:
        return out
    return out * step.reshape(*step.shape[: x.ndim - num_contracted], *[1] * (out.ndim - x.ndim + num_contracted))


def _dot(x: Array, weight: Array, num_contracted: int) -> Array:
    inputs, summed = (tuple(range(a.ndim - num_contracted, a.ndim)) for a in (x, weight))
    wide = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
    return jax.lax.dot_general(x, weight, ((inputs, summed), ((), ())), preferred_element_type=wide)


def _by_rows(x: Array, weight: Rounded, num_contracted: int) -> Array:
    kept, outputs = (a.shape[: a.ndim - num_contracted] for a in (x, weight.values))
    flat = jax.tree.map(lambda a: a.reshape(math.prod(outputs), -1), weight)
    return cpu_products.product_rounded(x.reshape(math.prod(kept), -1), flat).reshape(*kept, *outputs)


def _by_groups(x: Array, weight: Rounded, num_contracted: int) -> Array:
    """The products of the groups, each multiplied by its scale, and added up.

    XLA:GPU converts integers within its kernels of products, but writes a matrix that is multiplied by scales to memory
    first, at four times the bytes of int4. The products of groups are few bytes as long as rows are few.
    """
    values, scale, offset = weight
    groups = scale.shape[scale.ndim - num_contracted :]
    x, values = (a.reshape(split(a.shape, groups)) for a in (x, values))
    # Of both, the last axes are numbers of groups and what is in one, in turn.
    number, within = ([tuple(range(a.ndim - 2 * num_contracted + i, a.ndim, 2)) for a in (x, values)] for i in range(2))
    dot = ((within[0], within[1]), (number[0], number[1]))
    parts = jax.lax.dot_general(
        x.astype(jnp.bfloat16), values.astype(jnp.bfloat16), dot, preferred_element_type=jnp.float32
    )
    kept = x.ndim - 2 * num_contracted

    def of_parts(a: Array, num_outputs: int) -> Array:
        """Moves the numbers of groups to the front, as in `parts`, and makes room for the rows."""
        moved = jnp.moveaxis(a, range(num_outputs, a.ndim), range(num_contracted))
        return jnp.expand_dims(moved, tuple(range(num_contracted, num_contracted + kept)))

    outputs = scale.ndim - num_contracted
    parts = parts * of_parts(scale, outputs)
    if offset is not None:
        sums = jnp.moveaxis(jnp.sum(x, axis=within[0]), range(kept, kept + num_contracted), range(num_contracted))
        parts = parts + jnp.expand_dims(sums, tuple(range(sums.ndim, parts.ndim))) * of_parts(offset, outputs)
    return jnp.sum(parts, axis=tuple(range(num_contracted)))


def _in_float32(x: Array, weight: Rounded, num_contracted: int) -> Array:
    return _dot(x, dequantise(weight, num_contracted), num_contracted)


def _exact(x: Array, weight: Rounded, num_contracted: int) -> Array:
    """The product with one scale for each output, as XLA:CPU makes it fast: int8 times int8.

    Every x is rounded to 15 bits, relative to the largest of its row, and split into an upper and a lower int8 part,
    which are two rows of one product. Sums of integers are exact, so a result does not depend on how many rows there
    are.
    """
    values, scale, _ = weight
    outputs, kept = values.shape[: values.ndim - num_contracted], x.shape[: x.ndim - num_contracted]
    rows, matrix = x.reshape(math.prod(kept), -1), values.reshape(math.prod(outputs), -1)
    step = jnp.maximum(jnp.max(jnp.abs(rows), axis=1, keepdims=True), 1e-30) / (127 * 128)
    whole = jnp.round(rows / step).astype(jnp.int32)
    both = jnp.concatenate([whole >> 7, whole & 127]).astype(jnp.int8)
    product = jax.lax.dot_general(matrix, both, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
    upper, lower = jnp.split(product.T.astype(jnp.float32), 2)
    return ((128 * upper + lower) * step).reshape(*kept, *outputs) * scale
