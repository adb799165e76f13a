"""A trained T5 made larger, so that it computes the same logits at the cost of the larger model.

Theorem 3.8 of Leviathan et al. 2022 (arXiv 2211.17192) is about a target whose calls are expensive. Where only small
models can be trained, a small model that is inflated stands in for it: its texts, and with them the acceptance rates,
are those of the small model, and its calls take the time of the large one. Like the widening of Net2Net (Chen et al.
2015, arXiv 1511.05641) the expansion preserves the function, by zeros where a new part would write:

- the residual stream has new entries, which stay zero: embeddings and the outputs of attention and feed-forward write
  zeros into them;
- new heads, new dimensions within heads, new inner dimensions of the feed-forward and new layers read the stream with
  random weights, and the projections of their results back into the stream are zero; of the new dimensions within a
  head, the keys are zero, so that the scores of attention stay what they were;
- the root mean square of D entries and D' - D zeros is smaller by sqrt(D / D'), so the scales of the norms are
  multiplied by sqrt(D / D'), and what a norm adds to the variance by D / D'.

Every new weight is an element of a parameter, an argument of the compiled program. So all of them are read from memory
and multiplied, whatever their value.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from specjax.models import families
from specjax.models.config import ModelConfig, T5Config
from specjax.parallel import sharding
from specjax.types import Tree

SIZES = ("hidden_size", "head_dim", "intermediate_size", "num_encoder_layers", "num_layers", "num_heads")
"""What can grow."""

_WRITES = ("out", "down")
"""The matrices that write into the residual stream."""

_KEYS = {"qkv": 1, "key_value": 0}
"""Where a fused projection has its keys, on the logical axis "qkv"."""


def shape(config: ModelConfig, sizes: Mapping[str, int]) -> T5Config:
    """The shape of the inflated model.

    Args:
      config: the shape of the model.
      sizes: new values of some of `SIZES`; 0 keeps a size.

    Raises:
      ValueError: for a model that is no T5 or is quantised, a size that cannot grow, or one below the model's.
    """
    if not isinstance(config, T5Config):
        raise ValueError(
            f"inflate: this model is a {families.name_of(config)}, and only encoder-decoders (T5) are inflated."
        )
    if how := families.quantised_as(config):
        raise ValueError(f"inflate: this model is quantised ({how}); load it in float32 or bfloat16.")
    for name, value in sizes.items():
        if name not in SIZES:
            raise ValueError(f"inflate.{name}={value} cannot grow: choose among {', '.join(SIZES)}.")
        if value and value < getattr(config, name):
            raise ValueError(
                f"inflate.{name}={value}: the model has {getattr(config, name)}; give more, or 0 to keep it."
            )
    grown: dict[str, Any] = {name: value for name, value in sizes.items() if value}
    ratio = config.hidden_size / grown.get("hidden_size", config.hidden_size)
    return dataclasses.replace(config, norm_eps=config.norm_eps * ratio, **grown)


def inflate(config: ModelConfig, params: Tree, sizes: Mapping[str, int], *, seed: int = 0) -> tuple[T5Config, Tree]:
    """A larger model that computes the same logits, but for rounding.

    The hidden states that `types.Model.with_taps` gives are wider than the model's.

    Args:
      config: the shape of the model.
      params: its parameters, on one device.
      sizes: new values of some of `SIZES`; 0 keeps a size.
      seed: that of the random weights, which no logit depends on.

    Returns:
      The shape of the larger model and its parameters, in the model's dtype on the default device.

    Raises:
      ValueError: for sizes that `shape` refuses.
    """
    larger = shape(config, sizes)
    assert isinstance(config, T5Config)  # `shape` refuses others.
    axes, rng = families.param_axes(larger), np.random.default_rng(seed)

    def fill(path: tuple[str | int, ...], new: Any, old: Any) -> Any:
        if isinstance(new, dict):
            old = old or {}
            return {name: fill((*path, name), part, old.get(name)) for name, part in new.items()}
        names = tuple(str(name) for name in path)
        values = _new_values(names, new.shape, _of(axes, path), config, rng)
        if old is not None:
            corner = tuple(slice(size) for size in old.shape)
            values[corner] = np.asarray(old, np.float32) * _norm_factor(names, config, larger)
        return jnp.asarray(values, new.dtype)

    return larger, fill((), families.abstract_params(larger), params)


def _of(tree: Tree, path: tuple[str | int, ...]) -> sharding.Axes:
    for name in path:
        tree = tree[name]
    return tree


def _new_values(
    path: tuple[str, ...], size: tuple[int, ...], axes: sharding.Axes, config: T5Config, rng: np.random.Generator
) -> np.ndarray:
    """What is in a parameter of the larger model beside the model's own values, in float32."""
    if path[-1].endswith("norm"):
        return np.ones(size, np.float32)
    matrix = path[-2] if path[-1] == "values" else path[-1]
    if matrix in _WRITES or matrix == "embedding" or (matrix == "head" and config.tie_embeddings):
        return np.zeros(size, np.float32)
    values = 0.02 * rng.standard_normal(size, np.float32)
    if matrix in _KEYS:
        place: dict[str | None, Any] = {"qkv": _KEYS[matrix], "head_dim": slice(config.head_dim, None)}
        values[tuple(place.get(axis, slice(None)) for axis in axes)] = 0.0
    return values


def _norm_factor(path: tuple[str, ...], config: T5Config, larger: T5Config) -> float:
    """What the model's own values are multiplied by: 1, but for the scales of norms."""
    if not path[-1].endswith("norm"):
        return 1.0
    ratio = math.sqrt(config.hidden_size / larger.hidden_size)
    # A scaled head divides by the root of the width, the larger one.
    return 1.0 if path == ("norm",) and config.scale_outputs else ratio
