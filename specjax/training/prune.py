"""Pruning of trained models: fewer layers, heads or feed-forward channels (a smaller model), or fewer nonzero weights.

What is left out is chosen by `importance`. Stacks are "layers" for a decoder-only model, "encoder" and "decoder" for an
encoder-decoder; the parts of a layer are "attention", "cross" (in the decoder of an encoder-decoder) and "mlp". The
units of an attention are its key/value heads, each with the query heads that it serves; those of a feed-forward are the
channels of its inner width.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from specjax.models import families, linear
from specjax.models.config import DecoderConfig, ModelConfig, T5Config
from specjax.training import drafts
from specjax.types import Tree

LAYER, MLP = "layer", "mlp"
"""The names of the gates of whole layers, and of feed-forward channels."""

_AXIS = {"attention": "kv_heads", "cross": "kv_heads", MLP: "mlp"}
"""The logical axis of each part's units."""

_OUTPUT = {"attention": "out", "cross": "out", MLP: "down"}
"""The matrix that adds each part's units to the residual stream."""

Gates = dict[str, dict[str, Float[Array, "..."]]]
"""A number for every unit, by stack: `layer` `[L]`, `attention` and `cross` `[L, heads]`, `mlp` `[L, width]`."""

Kept = Mapping[str, Mapping[str, Sequence[Sequence[int]]]]
"""By stack and part, the units that each layer keeps, in ascending order."""


def check(config: ModelConfig) -> None:
    """Refuses models that cannot be pruned.

    Raises:
      ValueError: for a quantised model, one whose layers are scanned, or a mixture of experts.
    """
    if isinstance(config, DecoderConfig) and config.experts:
        raise ValueError(f"experts={config.experts}: a mixture of experts is not pruned. Choose a dense model.")
    if how := families.quantised_as(config):
        raise ValueError(
            f"quantise={how!r}: a quantised model is not pruned. Load it without, prune it, and quantise what is left."
        )
    if config.scan_layers:
        raise ValueError("scan_layers=True: scanned layers are not pruned. Load the model without; scan what is left.")


def stacks(config: ModelConfig) -> dict[str, int]:
    """How many layers each stack has."""
    if isinstance(config, T5Config):
        return {"encoder": config.num_encoder_layers, "decoder": config.num_layers}
    return {"layers": config.num_layers}


def num_heads(config: ModelConfig) -> int:
    """The units of an attention: key/value heads; in an encoder-decoder each serves one query head."""
    return config.num_heads if isinstance(config, T5Config) else config.num_kv_heads


def open_gates(config: ModelConfig) -> Gates:
    """A one for every unit: the gates of the whole model."""
    found: Gates = {}
    for stack, number in stacks(config).items():
        heads = jnp.ones((number, num_heads(config)))
        found[stack] = {LAYER: jnp.ones(number), "attention": heads, MLP: jnp.ones((number, config.intermediate_size))}
        if stack == "decoder":
            found[stack]["cross"] = heads
    return found


def gated(config: ModelConfig, params: Tree, gates: Gates) -> Tree:
    """The parameters of a model in which each unit's contribution to the residual stream is multiplied by its gate.

    A gate of 0 removes the unit (where a layer's outputs are normed before they are added, as in Gemma, a removed unit
    is one that the norm does not see). Nothing is compiled anew for other gates.

    Args:
      config: the shape; neither quantised nor scanned.
      params: the parameters.
      gates: as `open_gates`.
    """
    axes = families.param_axes(config)

    def times(x: Array, gate: Array) -> Array:
        return (x * gate).astype(x.dtype)

    def close(stack: str, number: int) -> Tree:
        own, layer = gates[stack], dict(params[stack][number])
        whole = own[LAYER][number]
        for part in _AXIS.keys() & layer.keys():
            name, inner = _OUTPUT[part], dict(layer[part])
            where = axes[stack][number][part][name]["values"]
            gate = own[part][number] * whole
            along = [gate.size if axis == _AXIS[part] else 1 for axis in where]
            inner[name] = inner[name] | {"values": times(inner[name]["values"], gate.reshape(along))}
            if (bias := f"{name}_bias") in inner:
                inner[bias] = times(inner[bias], whole)
            layer[part] = inner
        for bias in [name for name in layer if name.endswith("_post_norm_bias")]:
            layer[bias] = times(layer[bias], whole)
        return layer

    return params | {stack: {i: close(stack, i) for i in range(n)} for stack, n in stacks(config).items()}


def keep_layers(config: ModelConfig, params: Tree, kept: Mapping[str, Sequence[int]]) -> tuple[ModelConfig, Tree]:
    """The model of some of the layers, in float32.

    Args:
      config: the shape; neither quantised nor scanned.
      params: the parameters.
      kept: by stack, the layers that stay; a stack that is not named keeps all.

    Raises:
      ValueError: for a model that cannot be pruned, or layers that it does not have.
    """
    check(config)
    whole = {stack: tuple(range(number)) for stack, number in stacks(config).items()}
    _check_stacks(config, kept)
    chosen = whole | {stack: tuple(numbers) for stack, numbers in kept.items()}
    for stack, numbers in chosen.items():
        _check_units(f"kept[{stack!r}]", numbers, len(whole[stack]))
    if isinstance(config, T5Config):
        return drafts.from_layers(config, params, chosen["decoder"], chosen["encoder"])
    return drafts.from_layers(config, params, chosen["layers"])


def keep_units(config: ModelConfig, params: Tree, kept: Kept) -> tuple[ModelConfig, Tree]:
    """The model with fewer heads or feed-forward channels, in the dtype that it has.

    Every layer may keep other units, but all the same number of them, since one shape describes all. Where the layers
    of an encoder-decoder share one relative position bias but not the heads that stay, each gets a bias of its own.

    Args:
      config: the shape; neither quantised nor scanned.
      params: the parameters.
      kept: what stays. Parts that are not named keep everything; an encoder-decoder has one number of heads and one
        width for all its attentions and feed-forwards.

    Raises:
      ValueError: for a model that cannot be pruned, units that it does not have, or numbers that differ.
    """
    check(config)
    _check_stacks(config, kept)
    changes: dict[str, Any] = {}
    parts = {(stack, part): chosen for stack, named in kept.items() for part, chosen in named.items()}
    heads = _number(config, {place: rows for place, rows in parts.items() if place[1] != MLP}, num_heads(config))
    width = _number(config, {place: rows for place, rows in parts.items() if place[1] == MLP}, config.intermediate_size)
    if isinstance(config, T5Config):
        changes = {"num_heads": heads, "intermediate_size": width}
        if not config.bias_per_layer and any(
            _differ(kept.get(stack, {}).get("attention", ())) for stack in stacks(config)
        ):
            config, params = _own_biases(config, params)
    else:
        group = config.num_heads // config.num_kv_heads
        changes = {"num_heads": heads * group, "num_kv_heads": heads, "intermediate_size": width}
    axes = families.param_axes(config)
    found = dict(params)
    for (stack, part), rows in parts.items():
        found[stack] = {
            i: layer | {part: _take(layer[part], axes[stack][i][part], _AXIS[part], rows[i])}
            for i, layer in found[stack].items()
        }
    return dataclasses.replace(config, **changes), found


def _take(tree: Tree, axes: Tree, name: str, chosen: Sequence[int]) -> Tree:
    """The chosen entries along the axis of that name, in every array that has one."""
    indices = jnp.asarray(chosen)

    def take(x: Array, names: Sequence[str]) -> Array:
        return jnp.take(x, indices, axis=names.index(name)) if name in names else x

    return jax.tree.map(take, tree, axes)


def _differ(rows: Sequence[Sequence[int]]) -> bool:
    return len({tuple(row) for row in rows}) > 1


def _own_biases(config: T5Config, params: Tree) -> tuple[T5Config, Tree]:
    """The same encoder-decoder with a position bias in every layer."""
    found = dict(params)
    for stack in stacks(config):
        bias = params[stack][0]["attention"]["bias"]
        found[stack] = {
            i: layer | {"attention": layer["attention"] | {"bias": bias}} for i, layer in params[stack].items()
        }
    return dataclasses.replace(config, bias_per_layer=True), found


def _check_stacks(config: ModelConfig, names: Iterable[str]) -> None:
    for name in names:
        if name not in stacks(config):
            raise ValueError(f"kept[{name!r}]: this {families.name_of(config)} has {', '.join(stacks(config))}.")


def _check_units(name: str, chosen: Sequence[int], number: int) -> None:
    if not chosen or list(chosen) != sorted(set(chosen)) or chosen[0] < 0 or chosen[-1] >= number:
        raise ValueError(f"{name}={tuple(chosen)}: one or more of 0 to {number - 1}, in ascending order, each once.")


def _number(config: ModelConfig, chosen: Mapping[tuple[str, str], Sequence[Sequence[int]]], whole: int) -> int:
    """How many units every layer keeps of the parts that share this number."""
    sizes = set()
    for (stack, part), rows in chosen.items():
        if part not in _AXIS or (part == "cross" and stack != "decoder"):
            raise ValueError(f"kept[{stack!r}][{part!r}]: {stack} has no such part; it has attention and mlp.")
        if len(rows) != stacks(config)[stack]:
            raise ValueError(f"kept[{stack!r}][{part!r}] has {len(rows)} rows: one for each layer.")
        for i, row in enumerate(rows):
            _check_units(f"kept[{stack!r}][{part!r}][{i}]", row, whole)
            sizes.add(len(row))
    kind = sorted({part for _, part in chosen})
    expected = _places(config, is_mlp=kind == [MLP])
    if sizes and sizes != {whole} and set(chosen) != expected:
        missing = ", ".join(f"{stack}.{part}" for stack, part in sorted(expected - set(chosen)))
        raise ValueError(f"kept lacks {missing}, which shares its size with {', '.join(kind)}: name what it keeps too.")
    if len(sizes) > 1:
        raise ValueError(f"kept has {sorted(sizes)} units of {', '.join(kind)}: the same number in every layer.")
    return sizes.pop() if sizes else whole


def _places(config: ModelConfig, *, is_mlp: bool) -> set[tuple[str, str]]:
    """The parts of all stacks that have the same number of units."""
    found = {(stack, MLP if is_mlp else "attention") for stack in stacks(config)}
    return found | ({("decoder", "cross")} if isinstance(config, T5Config) and not is_mlp else set())


def by_magnitude(config: ModelConfig, params: Tree, sparsity: float) -> Tree:
    """The parameters with the smallest weights of every matrix set to zero (Han et al. 2015, arXiv 1506.02626).

    Embeddings, the head, norms and biases stay whole. The matrices keep their shapes: neither memory nor time is saved
    without a sparse format.

    Args:
      config: the shape; neither quantised nor scanned.
      params: the parameters.
      sparsity: the share of each matrix that is zero afterwards, rounded to whole weights: from 0 to below 1.

    Raises:
      ValueError: for another share, or a model that cannot be pruned.
    """
    check(config)
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity={sparsity}: a share from 0 to below 1.")

    def prune(x: Array) -> Array:
        number = round(sparsity * x.size)
        smallest = jnp.argsort(jnp.abs(x).reshape(-1))[:number]
        return x.reshape(-1).at[smallest].set(0).reshape(x.shape)

    return _on_matrices(config, params, jax.jit(prune))


def sparsity(config: ModelConfig, params: Tree) -> float:
    """The share of zeros in the matrices of all layers."""
    found: list[tuple[int, int]] = []

    def count(x: Array) -> Array:
        found.append((int(jnp.sum(x == 0)), x.size))
        return x

    _on_matrices(config, params, count)
    return sum(zeros for zeros, _ in found) / sum(size for _, size in found)


def _on_matrices(config: ModelConfig, params: Tree, function: Any) -> Tree:
    """Applies a function to the weights of every matrix of the layers."""
    contracted = families.num_contracted(config)

    def walk(tree: Tree, inputs: Tree) -> Tree:
        if not isinstance(tree, dict):
            return tree
        if linear.is_matrix(inputs):
            return tree | {"values": function(tree["values"])}
        return {name: walk(part, inputs[name]) for name, part in tree.items()}

    return params | {stack: walk(params[stack], contracted[stack]) for stack in stacks(config)}
