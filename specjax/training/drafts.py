"""Drafts made of their target: its vocabulary, and some of its layers or new ones."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from specjax.models import families
from specjax.models.config import DecoderConfig, ModelConfig, T5Config
from specjax.types import Tree


def spread(num_layers: int, number: int) -> tuple[int, ...]:
    """Layers at equal distances, the first and the last among them.

    Raises:
      ValueError: for more layers than there are.
    """
    if not 1 <= number <= num_layers:
        raise ValueError(f"num_layers={number}: from 1 to the target's {num_layers}.")
    return tuple(np.linspace(0, num_layers - 1, number).round().astype(int).tolist())


def _check(name: str, chosen: Sequence[int], num_layers: int) -> None:
    if not chosen or not all(0 <= layer < num_layers for layer in chosen):
        raise ValueError(f"{name}={tuple(chosen)}: one or more of the target's layers 0 to {num_layers - 1}.")


def with_changes(target: ModelConfig, changes: Mapping[str, int]) -> ModelConfig:
    """The target's shape in float32 with other numbers; 0 changes nothing.

    Raises:
      ValueError: for a number that its family does not have, or numbers that make no model.
    """
    given: dict[str, Any] = {name: value for name, value in changes.items() if value}
    known = {field.name for field in dataclasses.fields(target)}
    for name, value in given.items():
        if name not in known:
            raise ValueError(f"model.{name}={value} is not used by a {families.name_of(target)}: leave it 0.")
    if isinstance(target, DecoderConfig):
        layers = given.get("num_layers", target.num_layers)
        given["global_layers"] = tuple(layer for layer in target.global_layers if layer < layers)
    return dataclasses.replace(target, dtype="float32", **given)


def _picked(stack: Tree, chosen: Sequence[int]) -> Tree:
    return {i: stack[layer] for i, layer in enumerate(chosen)}


def _t5_layers(config: T5Config, stack: Tree, chosen: Sequence[int]) -> Tree:
    """Chosen layers of one side; the position bias that all layers share is the first layer's parameter."""
    picked = _picked(stack, chosen)
    if config.bias_per_layer:
        return picked
    first, bias = picked[0], stack[0]["attention"]["bias"]
    without = {
        i: layer | {"attention": {k: v for k, v in layer["attention"].items() if k != "bias"}}
        for i, layer in picked.items()
    }
    return without | {0: first | {"attention": first["attention"] | {"bias": bias}}}


def from_layers(
    target: ModelConfig, params: Tree, layers: Sequence[int], encoder_layers: Sequence[int] = ()
) -> tuple[ModelConfig, Tree]:
    """A draft of some of the target's layers, with its embeddings, its final norm and its head, in float32.

    Args:
      target: the shape of the target.
      params: its parameters.
      layers: the layers of the decoder, in the order in which the draft runs them.
      encoder_layers: those of the encoder of an encoder-decoder; empty: all.

    Returns:
      The draft's shape and its parameters, which share the arrays of the target where these are float32.

    Raises:
      ValueError: for layers that the target does not have, or a target whose layers are scanned.
    """
    if target.scan_layers:
        raise ValueError("The target's layers are scanned (scan_layers=True): load it without, to choose some of them.")
    config, params = families.cast(target, params, "float32")
    _check("init_layers", layers, target.num_layers)
    if isinstance(config, DecoderConfig):
        if encoder_layers:
            raise ValueError(f"init_encoder_layers={tuple(encoder_layers)}: a language model has no encoder.")
        kept = tuple(i for i, layer in enumerate(layers) if layer in config.global_layers)
        config = dataclasses.replace(config, num_layers=len(layers), global_layers=kept)
        return config, params | {"layers": _picked(params["layers"], layers)}
    encoder_layers = encoder_layers or range(target.num_encoder_layers)  # pyright: ignore[reportAttributeAccessIssue]
    _check("init_encoder_layers", encoder_layers, config.num_encoder_layers)
    sides = {
        "encoder": _t5_layers(config, params["encoder"], encoder_layers),
        "decoder": _t5_layers(config, params["decoder"], layers),
    }
    config = dataclasses.replace(config, num_layers=len(layers), num_encoder_layers=len(encoder_layers))
    return config, params | sides


def with_head(config: ModelConfig, params: Tree | None, tokens: Sequence[int]) -> tuple[ModelConfig, Tree | None]:
    """The same draft with a head over some tokens (`DecoderConfig.head_tokens`); it still reads all of them.

    Args:
      config: the shape of a draft with a whole head, float32.
      params: its parameters, or None.
      tokens: the ids that it may propose.
    """
    tokens = tuple(sorted({int(token) for token in tokens}))
    reduced = dataclasses.replace(config, head_tokens=tokens, tie_embeddings=False)
    if params is None:
        return reduced, None
    chosen = jnp.asarray(tokens)
    parts = {"head": {"values": params["head"]["values"][:, chosen]}}
    if config.tie_embeddings:
        parts["embedding"] = params["head"]["values"].T
    if "head_bias" in params:
        parts["head_bias"] = params["head_bias"][chosen]
    return reduced, params | parts


def most_frequent(texts: Iterable[Sequence[int]], number: int, always: Sequence[int], vocab_size: int) -> list[int]:
    """The most frequent tokens of some texts, with those that are `always` among them, filled up with the first ids."""
    counts = np.zeros(vocab_size, np.int64)
    for text in texts:
        counts += np.bincount(np.asarray(text, np.int64), minlength=vocab_size)
    counts[np.asarray(always, np.int64)] = np.iinfo(np.int64).max
    return np.sort(np.argsort(-counts, kind="stable")[:number]).tolist()
