"""Matrices in eight or four bits: how that is said, how weights are rounded, and what rounded ones stand for.

A weight is stored as a small integer q and stands for `scale * q`, or `scale * q + offset`, where all inputs of an
output share the two numbers, or every group of 32, 64 or 128 inputs has its own. These are also the blocks of GGUF's
types Q8_0, Q4_0 and Q4_1. Values are `[outputs..., inputs...]`; scales and offsets are float32 `[outputs...]`, or
`[outputs..., groups along the inputs...]`.

The rounding is to the nearest integer (Jacob et al. 2018, arXiv 1712.05877, eq. 1); that of four bits chooses, of
several scales, the one with the least squared error, since few weights are as large as the largest.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

BITS = (4, 8)
"""The widths of stored weights."""

GROUPS = (32, 64, 128)
"""How many neighbouring inputs may share a scale."""

EXAMPLES = "int8, int4:64 (a scale for every 64 inputs), int4:64+int8 (int8 activations too), int4:64,head=int8"
"""Some spellings, for messages."""

KEEP = "keep"
"""What `load` takes for the blocks that a file has, in the place of a spelling."""

_FLOATS = "floats"
"""What is not quantised, where something else is."""

_SPELLING = re.compile(r"int(?P<bits>[48])(:(?P<group>\d+))?(?P<offset>:offset)?(\+int(?P<activations>8))?")

_SHRUNK = 12
"""How many scales are tried for four bits: that of the largest weight, and smaller ones, down to half of it."""


@dataclasses.dataclass(frozen=True)
class Quantisation:
    """How a matrix is stored. `str` spells it as `parse` reads it.

    Attributes:
      bits: 8 or 4.
      group: how many neighbouring inputs share a scale, one of `GROUPS`; None: all inputs of an output.
      offset: whether each scale has an offset, so that weights need not lie around zero; for groups.
      activations: 8 rounds the rows that the matrix is multiplied with to eight bits, each with a scale of its own;
        None leaves them as they are.
    """

    bits: int = 8
    group: int | None = None
    offset: bool = False
    activations: int | None = None

    def __post_init__(self):
        if self.bits not in BITS or self.activations not in (None, 8) or self.group not in (None, *GROUPS):
            raise ValueError(
                f"{self!r}: weights have {' or '.join(map(str, BITS))} bits, groups {', '.join(map(str, GROUPS))} "
                f"inputs, and activations 8 bits or None. In words, one of {EXAMPLES}."
            )
        if self.offset and self.group is None:
            raise ValueError(f"{self!r}: only groups have offsets; give group={GROUPS[0]}, or offset=False.")

    def __str__(self) -> str:
        group = f":{self.group}" if self.group else ""
        activations = f"+int{self.activations}" if self.activations else ""
        return f"int{self.bits}{group}{':offset' if self.offset else ''}{activations}"


class Rounded(NamedTuple):
    """A matrix in small integers.

    Attributes:
      values: `[outputs..., inputs...]`, int8 or int4.
      scale: float32, as the module says.
      offset: like `scale`; None where weights lie around zero.
    """

    values: Int[Array, "..."]
    scale: Float[Array, "..."]
    offset: Float[Array, "..."] | None


def parse(text: str) -> tuple[Quantisation | None, Quantisation | None]:
    """How the matrices of the layers, and that of the head, are stored.

    Args:
      text: "int8" or "int4", then ":32", ":64" or ":128" for groups of so many inputs, ":offset" for offsets, "+int8"
        for int8 activations; ",head=" and the same again where the head differs. "floats" on one side of that leaves
        it as it is (None).

    Raises:
      ValueError: for anything else, with some that can be chosen.
    """
    layers, comma, head = text.partition(",head=")
    if layers == (head if comma else layers) == _FLOATS:
        raise ValueError(f"quantise={text!r} leaves everything as it is: leave it out, or give {EXAMPLES}.")
    return _one(layers, text), _one(head if comma else layers, text)


def is_known(text: str) -> bool:
    """Whether `load` takes a text."""
    if text == KEEP:
        return True
    try:
        parse(text)
    except ValueError:
        return False
    return True


def _one(spelled: str, text: str) -> Quantisation | None:
    if spelled == _FLOATS:
        return None
    match = _SPELLING.fullmatch(spelled)
    if match is None or (match["group"] and int(match["group"]) not in GROUPS):
        raise ValueError(f"quantise={text!r} is not known: give {EXAMPLES}; groups have {', '.join(map(str, GROUPS))}.")
    number = {name: int(value) for name in ("bits", "group", "activations") if (value := match[name])}
    return Quantisation(**number, offset=match["offset"] is not None)


def spell(layers: Quantisation | None, head: Quantisation | None) -> str:
    """The text that `parse` reads as these; empty where nothing is quantised."""
    if layers == head:
        return str(layers or "")
    return f"{layers or _FLOATS},head={head or _FLOATS}"


def bits(dtype: jax.typing.DTypeLike) -> int:
    """The bits of a stored number: 4 for an int4, of which XLA packs two into a byte, whatever `nbytes` says."""
    dtype = jnp.dtype(dtype)
    return jnp.iinfo(dtype).bits if jnp.issubdtype(dtype, jnp.integer) else 8 * dtype.itemsize


def num_groups(inputs: Sequence[int], how: Quantisation) -> tuple[int, ...]:
    """The number of groups along each dimension of the inputs, of which the last ones are grouped first.

    Args:
      inputs: the dimensions.
      how: how the matrix is stored.

    Raises:
      ValueError: where the inputs do not divide into such groups.
    """
    if how.group is None:
        return (1,) * len(inputs)
    shape, rest = list(inputs), how.group
    for axis in reversed(range(len(shape))):
        taken = math.gcd(shape[axis], rest)
        shape[axis], rest = shape[axis] // taken, rest // taken
        if rest == 1:
            return tuple(shape)
        if shape[axis] != 1:
            break
    fitting = [str(group) for group in GROUPS if inputs[-1] % group == 0]
    raise ValueError(
        f"{how}: a matrix of {' x '.join(map(str, inputs))} inputs does not divide into groups of {how.group}: choose "
        f"{'groups of ' + ' or '.join(fitting) if fitting else f'int{how.bits}, without groups'}."
    )


def split(shape: Sequence[int], groups: Sequence[int]) -> tuple[int, ...]:
    """The shape of values with each dimension of the inputs split into groups and what is in one."""
    outputs, inputs = shape[: len(shape) - len(groups)], shape[len(shape) - len(groups) :]
    pairs = ((number, size // number) for size, number in zip(inputs, groups, strict=True))
    return (*outputs, *(size for pair in pairs for size in pair))


def spread(x: Float[Array, "..."], shape: Sequence[int], num_contracted: int) -> Float[Array, "..."]:
    """Scales or offsets, as an array that broadcasts against values of this shape which are split into groups."""
    outputs = len(shape) - num_contracted
    groups = x.shape[outputs:] or (1,) * num_contracted
    return x.reshape(*shape[:outputs], *(size for number in groups for size in (number, 1)))


def dequantise(rounded: Rounded, num_contracted: int) -> Float[Array, "..."]:
    """What the values stand for, in float32, in their order."""
    values, scale, offset = rounded
    shape = values.shape
    groups = scale.shape[len(shape) - num_contracted :] or (1,) * num_contracted
    weight = values.reshape(split(shape, groups)).astype(jnp.float32) * spread(scale, shape, num_contracted)
    if offset is not None:
        weight = weight + spread(offset, shape, num_contracted)
    return weight.reshape(shape)


def quantise(weight: Float[Array, "..."], num_contracted: int, how: Quantisation) -> Rounded:
    """Rounds a matrix.

    Eight bits are 1/127 of the largest weight that shares the scale.

    Args:
      weight: `[outputs..., inputs...]`.
      num_contracted: how many of its axes are the inputs'.
      how: the bits, groups and offsets.

    Raises:
      ValueError: where the inputs do not divide into the groups.
    """
    shape, outputs = weight.shape, weight.ndim - num_contracted
    groups = num_groups(shape[outputs:], how)
    grouped = weight.astype(jnp.float32).reshape(split(shape, groups))
    within = tuple(range(outputs + 1, grouped.ndim, 2))
    low, high = -(2 ** (how.bits - 1)), 2 ** (how.bits - 1) - 1
    offset = None
    if how.offset:
        least, most = (reduce(grouped, axis=within, keepdims=True) for reduce in (jnp.min, jnp.max))
        scale = _positive(most - least) / (high - low)
        offset = least - low * scale
        values = grouped - offset
    else:
        values = grouped
        largest = jnp.max(jnp.abs(grouped), axis=within, keepdims=True)
        scale = _positive(largest) / high
        if how.bits == 4:
            scale = _best_scale(grouped, largest, within)
    rounded = jnp.clip(jnp.round(values / scale), low, high).astype(jnp.int8 if how.bits == 8 else jnp.int4)

    def folded(x: Array) -> Array:
        return x.reshape(*shape[:outputs], *(groups if how.group else ()))

    return Rounded(rounded.reshape(shape), folded(scale), None if offset is None else folded(offset))


def _positive(x: Array) -> Array:
    """Where all weights of a group are equal, the scale does not matter, but it must not be zero."""
    return jnp.where(x > 0, x, 1.0)


def _best_scale(grouped: Array, largest: Array, within: tuple[int, ...]) -> Array:
    """Of several scales, that whose values are nearest to the weights.

    The largest weight becomes -8, which there is one more of than of positive values: so a scale may be negative.
    """
    most = jnp.max(grouped, axis=within, keepdims=True)
    whole = jnp.where(most == largest, -1.0, 1.0) * _positive(largest) / 8

    def better(found: tuple[Array, Array], factor: Array) -> tuple[tuple[Array, Array], None]:
        scale = whole * factor
        error = grouped - scale * jnp.clip(jnp.round(grouped / scale), -8, 7)
        error = jnp.sum(error * error, axis=within, keepdims=True)
        best, least = found
        return (jnp.where(error < least, scale, best), jnp.minimum(error, least)), None

    nothing = (whole, jnp.full_like(whole, jnp.inf))
    return jax.lax.scan(better, nothing, jnp.linspace(1.0, 0.5, _SHRUNK))[0][0]
