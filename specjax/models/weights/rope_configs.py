"""Converts what a `config.json` says of rotary positions."""

import math
from collections.abc import Mapping
from typing import Any

from specjax.limits import check_number, check_size
from specjax.models.config import LIMITS, LinearRopeScaling, Llama3RopeScaling, LongRopeScaling, RopeScaling

Raw = Mapping[str, Any]
"""The parsed file."""


def read(raw: Raw, max_position: int, default: float = 10000.0) -> tuple[float, RopeScaling | None]:
    """The base of the rotary angles and their scaling.

    Args:
      raw: the parsed file.
      max_position: the longest text.
      default: the base of a file that names none.

    Raises:
      ValueError: for a kind of scaling that the decoder does not compute.
    """
    rope = _entries(raw)
    theta = float(rope.get("rope_theta", raw.get("rope_theta", default)))
    if (partial := rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))) != 1.0:
        raise ValueError(f"partial_rotary_factor={partial}: for this family, specjax rotates whole heads only.")
    kind = _kind(rope)
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, LinearRopeScaling(float(rope["factor"]))
    if kind == "llama3":
        original = rope.get("original_max_position_embeddings", raw.get("original_max_position_embeddings"))
        return theta, Llama3RopeScaling(
            factor=float(rope["factor"]),
            low_freq_factor=float(rope["low_freq_factor"]),
            high_freq_factor=float(rope["high_freq_factor"]),
            original_max_position=int(original or max_position),
        )
    raise ValueError(f"rope type {kind!r} is not supported: choose a model with 'default', 'linear' or 'llama3'.")


def read_phi3(raw: Raw, head_dim: int) -> dict[str, Any]:
    """The rotary fields of `DecoderConfig` for Phi-3 and Phi-4: heads that are rotated in part, LongRoPE.

    A model with LongRoPE gets the positions of its first training, for which transformers computes the same; see
    `config.LongRopeScaling`.

    Args:
      raw: the parsed file.
      head_dim: the width of a head.

    Raises:
      ValueError: for another kind of scaling.
    """
    rope, most = _entries(raw), raw["max_position_embeddings"]
    theta = float(rope.get("rope_theta", raw.get("rope_theta", 10000.0)))
    partial = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))
    check_number("partial_rotary_factor", partial)
    fields = {"rope_theta": theta, "rotary_dim": None if partial == 1.0 else int(head_dim * partial)}
    kind = _kind(rope)
    if kind == "default":
        return {**fields, "max_position": most}
    if kind not in ("longrope", "su", "yarn"):  # Early files have other names for it.
        raise ValueError(f"rope type {kind!r} is not supported: choose a Phi model with 'default' or 'longrope'.")
    original = rope.get("original_max_position_embeddings", raw.get("original_max_position_embeddings"))
    original = 4096 if original is None else original
    check_size("original_max_position_embeddings", original, high=LIMITS["max_position"])
    factor = rope.get("attention_factor")
    if factor is None:
        # Section 3.3 of the paper, by the ratio of the lengths.
        ratio = max(rope.get("factor") or most / original, 1.0)
        factor = math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1.0 else 1.0
    short, long = (tuple(float(value) for value in rope[f"{name}_factor"]) for name in ("short", "long"))
    scaling = LongRopeScaling(short, long, original, float(factor))
    return {**fields, "max_position": min(most, original), "rope_scaling": scaling}


def _entries(raw: Raw) -> Raw:
    return raw.get("rope_parameters") or raw.get("rope_scaling") or {}


def _kind(rope: Raw) -> Any:
    return rope.get("rope_type", rope.get("type", "default"))
