"""Shapes of models by name."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from specjax.models import presets
from specjax.models.config import ModelConfig
from specjax.models.families import FAMILIES


def _t5(width: int, head: int, inner: int, layers: int, heads: int) -> dict[str, Any]:
    names = ("hidden_size", "head_dim", "intermediate_size", "num_encoder_layers", "num_layers", "num_heads")
    return dict(zip(names, (width, head, inner, layers, layers, heads), strict=True))


def _decoder(width: int, head: int, inner: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "head_dim": head,
        "intermediate_size": inner,
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": heads,
        "max_position": 2048,
        "tie_embeddings": True,
    }


def _published(config: ModelConfig) -> dict[str, Any]:
    """A published shape, in the dtype that models are trained in."""
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in ("vocab_size", "dtype")}


SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "t5": {
        "0.4m": _t5(40, 20, 160, 1, 2),
        "1.5m": _t5(112, 28, 448, 1, 4),
        "6m": _t5(256, 64, 1024, 2, 4),
        "small": _published(presets.t5_v1_1_small),
        "base": _published(presets.t5_v1_1_base),
        "large": _published(presets.t5_v1_1_large),
    },
    "decoder": {
        "0.4m": _decoder(40, 20, 128, 2, 2),
        "1.5m": _decoder(112, 28, 320, 3, 4),
        "6m": _decoder(256, 64, 768, 4, 4),
    },
}
"""By kind and name. Names that are numbers count parameters, with a vocabulary of 8192; the others are T5 v1.1's."""


def model_config(kind: str, size: str, vocab_size: int, changes: Mapping[str, int] | None = None) -> ModelConfig:
    """The shape of a model.

    Args:
      kind: "t5" or "decoder".
      size: a name of `SIZES[kind]`.
      vocab_size: the width of the logits.
      changes: numbers that replace those of the size; 0 replaces nothing.

    Raises:
      ValueError: for an unknown kind, size or number, or numbers that make no model.
    """
    if kind not in SIZES:
        raise ValueError(f"kind={kind!r}: choose one of {', '.join(SIZES)}.")
    if size not in SIZES[kind]:
        raise ValueError(f"size={size!r} is not a {kind} size: choose one of {', '.join(SIZES[kind])}.")
    given = {name: value for name, value in (changes or {}).items() if value}
    config = FAMILIES[kind].config
    known = {field.name for field in dataclasses.fields(config)}
    for name, value in given.items():
        if name not in known:
            raise ValueError(f"model.{name}={value} is not used by a {kind}: leave it 0.")
        if value < 0:
            raise ValueError(f"model.{name}={value}: at least 1, or 0 for that of the size.")
    return config(vocab_size=vocab_size, **SIZES[kind][size] | given)
