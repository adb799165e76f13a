"""GGUF's blocks of 32 weights as small integers with a scale, kept instead of dequantised.

https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h has the layouts: Q8_0 is `d * q` with q from -128 to
127; Q4_0 is `d * (q - 8)` and Q4_1 `d * q + m` with q from 0 to 15, the first half of a block in the lower half of each
byte, the second in the upper. d and m are float16.

A tensor is an array of records, one for each weight, of its integer and the scale and offset of its block: so whatever
rearranges a tensor of floats rearranges blocks too, as long as the inputs of a block stay together.
"""

from collections.abc import Collection

import jax.numpy as jnp
import numpy as np

from specjax.models.quantisation import Quantisation, num_groups

KEPT = {"Q8_0": Quantisation(8, 32), "Q4_0": Quantisation(4, 32), "Q4_1": Quantisation(4, 32, offset=True)}
"""The types of tensors that are kept, as what."""

SIZE = 32
"""The weights of a block."""


def common(kinds: Collection[str]) -> Quantisation | None:
    """The way to store tensors of all these types without rounding any; None where some type is not kept."""
    if not kinds or any(kind not in KEPT for kind in kinds):
        return None
    found = [KEPT[kind] for kind in kinds]
    return Quantisation(max(how.bits for how in found), SIZE, offset=any(how.offset for how in found))


def read(data: np.ndarray, kind: str, how: Quantisation) -> np.ndarray:
    """The records of a tensor, `[outputs, inputs]`.

    Args:
      data: its bytes, `[outputs, bytes of a row]`.
      kind: its type, one of `KEPT`.
      how: a way to store it (`common`).
    """
    number = 2 if kind == "Q4_1" else 1
    block = 2 * number + (SIZE if kind == "Q8_0" else SIZE // 2)
    data = data.reshape(len(data), -1, block)
    halves = np.ascontiguousarray(data[:, :, : 2 * number]).view("<f2").astype(np.float32)
    packed = data[:, :, 2 * number :]
    scale, offset = halves[:, :, :1], np.float32(0)
    if kind == "Q8_0":
        values = packed.view(np.int8)
    else:
        values = np.concatenate([packed & 15, packed >> 4], axis=-1).astype(np.int8) - 8
        if kind == "Q4_1":
            offset = halves[:, :, 1:] + 8 * scale
    records = np.empty(values.shape, [(f"int{how.bits}", "i1"), ("scale", "f4"), ("offset", "f4")])
    for name, part in zip(records.dtype.names or (), (values, scale, offset), strict=True):
        records[name] = part
    return records.reshape(len(data), -1)


def rounded(records: np.ndarray, num_contracted: int, *, has_offset: bool) -> dict[str, np.ndarray]:
    """The parameters of a quantised `linear.Matrix`.

    Args:
      records: `[outputs..., inputs...]`.
      num_contracted: how many of its axes are the inputs'.
      has_offset: whether the matrix has offsets.
    """
    kind = (records.dtype.names or ("",))[0]
    inputs = records.shape[records.ndim - num_contracted :]
    groups = num_groups(inputs, Quantisation(8, SIZE))
    first = (..., *(slice(None, None, size // number) for size, number in zip(inputs, groups, strict=True)))
    parts = {"values": records[kind].astype(jnp.dtype(kind)), "scale": records["scale"][first]}
    return parts | ({"offset": records["offset"][first]} if has_offset else {})
