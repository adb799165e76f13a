"""From the tensors of a decoder under Hugging Face's names to the fused parameters of `decoder`.

The names are those of Llama, and of Gemma for what Llama lacks; `naming` has those of other families. Hugging Face
stores a projection as `[out, in]`, with the heads' dimensions flattened; the decoder keeps heads apart, fuses
projections that read the same input, and stores them as `linear.stored` says. One array is read, fused, cast and placed
at a time, and only the parts of it that this process's devices hold.
"""

import functools
import operator
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from specjax.models import decoder, linear, modules
from specjax.models.config import DecoderConfig, ModelConfig
from specjax.models.weights import blocks
from specjax.models.weights.lazy import Tensor
from specjax.parallel import sharding
from specjax.types import Tree

Tensors = Callable[[str], Tensor] | Mapping[str, Tensor]
"""Tensors by their Hugging Face names."""

HARMLESS = (
    "rotary_emb.inv_freq",
    "lm_head.weight",
    "coder.embed_tokens.weight",
    "EncDecAttention.relative_attention_bias.weight",
    ".attn.bias",
    ".attn.masked_bias",
)
"""Endings of the names of tensors that some files hold although no model reads them: copies, and leftovers."""

Place = Callable[[Tensor, Any, Any], Any]
"""`(array, axes, contracted)`: places one array, whose inputs' axes come first, as its logical axes say.

The last two are its parts of `families.param_axes` and `families.num_contracted`; for a matrix they are dicts, and so
is the result.
"""


def placer(config: ModelConfig, mesh: Mesh | None, rules: sharding.Rules) -> Place:
    """A function that converts an array to the order and dtype in which the model stores it, and places it.

    The records of `blocks` become a quantised matrix.
    """
    dtype = jnp.dtype(config.dtype)

    def place(array: Tensor, axes: Any, contracted: Any) -> Any:
        if not linear.is_matrix(contracted):
            first = modules.num_stacked(axes)
            order = linear.stored(array.ndim - first, contracted, dtype)
            return put(np.transpose(array, linear.behind(first, order)), axes, dtype)
        inputs, first = contracted["values"], modules.num_stacked(axes["values"])
        if array.dtype.names is None:
            return {"values": place(array, axes["values"], inputs)}
        order = linear.behind(first, linear.rotated(array.ndim - first, inputs))
        records = np.asarray(np.transpose(array, order))
        parts = blocks.rounded(records, inputs, has_offset="offset" in axes)
        return {name: put(part, axes[name], part.dtype) for name, part in parts.items()}

    def put(array: Tensor, axes: Any, dtype: np.dtype) -> jax.Array:
        # Copies: on CPUs, JAX may keep the buffer itself, which could be a view of a memory-mapped file.
        if mesh is None:
            return jax.device_put(np.array(array, dtype=dtype, order="C"))
        where = sharding.named_sharding(mesh, array.shape, axes, rules)
        parts: dict[str, np.ndarray] = {}  # devices that hold the same part read it once

        def read(region: Any) -> np.ndarray:
            if (key := str(region)) not in parts:
                parts[key] = np.array(array[region], dtype=dtype, order="C")
            return parts[key]

        return jax.make_array_from_callback(array.shape, where, read)

    return place


def unpermute(rows: Tensor, num_heads: int, rotated: int | None = None) -> Tensor:
    """Reorders the rows of a query or key projection that rotate as neighbours to the order of `layers.rotate`.

    llama.cpp and GPT-J rotate neighbouring rows (2 i, 2 i + 1) of a head; `layers.rotate`, as Hugging Face's Llama,
    rotates rows (i, i + rotated / 2). This separates the interleaved halves.

    Args:
      rows: `[num_heads * head_dim, ...]`.
      num_heads: the number of heads in it.
      rotated: how many of a head's first rows are rotated; None for all.
    """
    heads = rows.reshape(num_heads, -1, *rows.shape[1:])
    turned, rest = np.split(heads, [heads.shape[1] if rotated is None else rotated], axis=1)
    return np.concatenate([turned[:, 0::2], turned[:, 1::2], rest], axis=1).reshape(rows.shape)


def _norms(c: DecoderConfig) -> dict[str, str]:
    """The norms of a layer: tensor names by parameter name."""
    norms = {"attention_norm": "input_layernorm"} if c.pre_norms else {}
    if c.pre_norms and not c.parallel:
        norms["mlp_norm"] = "pre_feedforward_layernorm" if c.post_norms else "post_attention_layernorm"
    if c.post_norms:
        norms |= {"attention_post_norm": "post_attention_layernorm", "mlp_post_norm": "post_feedforward_layernorm"}
    return norms


def _norm_parts(c: DecoderConfig) -> dict[str, str]:
    """The parts of a norm: the ending of the parameter's name by that of the tensor's."""
    return {"weight": "", "bias": "_bias"} if c.norm == "layer" else {"weight": ""}


def _feed_forwards(c: DecoderConfig) -> list[str]:
    """What the names of a layer's feed-forwards begin with: one, or each expert."""
    return [f"experts.{number}." for number in range(c.experts.number)] if c.experts else [""]


def tensor_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """The name and shape of every tensor that a model of this shape has."""
    c = config
    queries, keys = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (c.vocab_size, c.hidden_size)}
    if c.positions == "learned":
        shapes["model.embed_positions.weight"] = (c.max_position, c.hidden_size)
    if not c.tie_embeddings:
        shapes["lm_head.weight"] = (c.vocab_size, c.hidden_size)
    if c.head_bias:
        shapes["lm_head.bias"] = (c.vocab_size,)
    projections = {
        "self_attn.q_proj": (queries, c.hidden_size, c.qkv_bias),
        "self_attn.k_proj": (keys, c.hidden_size, c.qkv_bias),
        "self_attn.v_proj": (keys, c.hidden_size, c.qkv_bias),
        "self_attn.o_proj": (c.hidden_size, queries, c.output_bias),
    }
    for mlp in _feed_forwards(c):
        projections[f"mlp.{mlp}up_proj"] = (c.intermediate_size, c.hidden_size, c.mlp_bias)
        projections[f"mlp.{mlp}down_proj"] = (c.hidden_size, c.intermediate_size, c.mlp_bias)
        if c.gated:
            projections[f"mlp.{mlp}gate_proj"] = projections[f"mlp.{mlp}up_proj"]
    if c.experts:
        projections["mlp.gate"] = (c.experts.number, c.hidden_size, False)
    norms = ["model.norm"]
    for layer in range(c.num_layers):
        prefix = f"model.layers.{layer}."
        norms += [prefix + name for name in _norms(c).values()]
        for name, (outputs, inputs, bias) in projections.items():
            shapes[f"{prefix}{name}.weight"] = (outputs, inputs)
            if bias:
                shapes[f"{prefix}{name}.bias"] = (outputs,)
        if c.qk_norm:
            sizes = (queries, keys) if c.qk_norm_whole else (c.head_dim, c.head_dim)
            shapes |= {f"{prefix}self_attn.{n}_norm.weight": (size,) for n, size in zip("qk", sizes, strict=True)}
    for name in norms:
        shapes |= {f"{name}.{kind}": (c.hidden_size,) for kind in _norm_parts(c)}
    return shapes


def check_names(expected: Collection[str], names: Collection[str], source: str) -> None:
    """Checks that the tensors of a file are those of the model, no fewer and no more.

    Args:
      expected: the Hugging Face names of the model's tensors.
      names: those of the file's.
      source: what to call the file in the error.

    Raises:
      ValueError: for a missing tensor, or an unexpected one, without which the model would compute something else.
    """
    wanted, found = set(expected), set(names)
    harmless = {name for name in found if name.endswith(HARMLESS)}
    for problem, group in (("lacks", wanted - found), ("has unexpected", found - wanted - harmless)):
        if group:
            shown = sorted(group)
            more = f" and {len(shown) - 3} more" if len(shown) > 3 else ""
            raise ValueError(
                f"{source} {problem} tensors {', '.join(shown[:3])}{more}: its configuration does not describe its "
                "weights, or the model is a variant that specjax does not know."
            )


def checked(tensors: Tensors, shapes: Mapping[str, tuple[int, ...]]) -> Callable[[str], Tensor]:
    """A function that returns tensors by name, with their shapes checked."""

    def get(name: str) -> Tensor:
        try:
            array = tensors[name] if isinstance(tensors, Mapping) else tensors(name)
        except KeyError:
            raise ValueError(f"Tensor {name!r} is missing from the weights.") from None
        if array.shape != shapes[name]:
            raise ValueError(
                f"Tensor {name!r} has shape {tuple(array.shape)}, but the configuration asks for {shapes[name]}: "
                "configuration and weights are not of the same model."
            )
        return array

    return get


def repeat_kv_heads(
    config: DecoderConfig, repeated: DecoderConfig, tensors: Callable[[str], Tensor]
) -> Callable[[str], Tensor]:
    """The tensors with heads repeated as in `decoder.repeat_kv_heads`.

    Args:
      config: the shape of the tensors.
      repeated: the same shape with more key/value heads.
      tensors: the tensors by name.
    """
    heads, times = config.num_kv_heads, repeated.num_kv_heads // config.num_kv_heads
    repeated_parts = ("k_proj", "v_proj", "k_norm") if config.qk_norm_whole else ("k_proj", "v_proj")

    def get(name: str) -> Tensor:
        array = tensors(name)
        if times == 1 or name.split(".")[-2] not in repeated_parts:
            return array
        each = array.reshape(heads, 1, config.head_dim, *array.shape[1:])
        return np.concatenate([each] * times, axis=1).reshape(times * array.shape[0], *array.shape[1:])

    return get


def _fuse_qkv(config: DecoderConfig, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each key/value head's query heads, then its key, then its value: `[kv_heads, group + 2, head_dim, ...]`."""
    heads = (config.num_kv_heads, -1, config.head_dim)
    return np.concatenate([x.reshape(*heads, *x.shape[1:]) for x in (q, k, v)], axis=1)


def attention_parts(c: DecoderConfig, get: Callable[[str], Tensor]) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """The parameters of `layers.Attention`, inputs first, from the tensors of its projections."""
    qkv = [get(f"{name}_proj.weight") for name in "qkv"]
    yield ("qkv",), np.moveaxis(_fuse_qkv(c, *qkv), -1, 0)
    yield ("out",), get("o_proj.weight").T.reshape(c.num_kv_heads, -1, c.head_dim, c.hidden_size)
    if c.qkv_bias:
        yield ("qkv_bias",), _fuse_qkv(c, *(get(f"{name}_proj.bias") for name in "qkv"))
    if c.output_bias:
        yield ("out_bias",), get("o_proj.bias")
    if c.qk_norm:
        heads = (c.num_kv_heads, -1, c.head_dim), (c.num_kv_heads, c.head_dim)
        for name, part, shape in zip(("query_norm", "key_norm"), "qk", heads, strict=True):
            scale = get(f"{part}_norm.weight")
            yield (name,), scale.reshape(shape) if c.qk_norm_whole else scale


def _feed_forward(c: DecoderConfig, get: Callable[[str], Tensor], name: str) -> Tensor:
    """One of a feed-forward's parameters."""
    inner = ("gate_proj", "up_proj") if c.gated else ("up_proj",)
    if name == "gate_up":
        return np.stack([get(f"{part}.weight").T for part in inner], axis=1)
    if name == "gate_up_bias":
        return np.stack([get(f"{part}.bias") for part in inner])
    return get("down_proj.weight").T if name == "down" else get("down_proj.bias")


def mlp_parts(c: DecoderConfig, get: Callable[[str], Tensor]) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """The parameters of a layer's feed-forward, or of its router and the experts, which are stacked."""
    if not c.experts:
        for name in ("gate_up", "down", *(("gate_up_bias", "down_bias") if c.mlp_bias else ())):
            yield (name,), _feed_forward(c, get, name)
        return

    def expert(prefix: str) -> Callable[[str], Tensor]:
        return lambda name: get(prefix + name)

    yield ("router",), get("gate.weight").T
    for name in ("gate_up", "down"):
        yield ("experts", name), np.stack([_feed_forward(c, expert(p), name) for p in _feed_forwards(c)], axis=0)


def from_huggingface(
    config: DecoderConfig, tensors: Tensors, *, mesh: Mesh | None = None, rules: sharding.Rules = sharding.RULES
) -> Tree:
    """The decoder's parameters from tensors under Hugging Face's names.

    Args:
      config: the shape, whose `dtype` the parameters get.
      tensors: the tensors, as a mapping or as a function of the name.
      mesh: where to place the parameters; None for the default device.
      rules: logical to mesh axes.

    Returns:
      The tree that `families.abstract_params(config)` describes.

    Raises:
      ValueError: for a tensor that is missing or has another shape, naming it.
    """
    get = checked(tensors, tensor_shapes(config))
    module = decoder.module(config)
    axes, contracted = (modules.metadata(module, config, name) for name in ("axes", "num_contracted"))
    place = placer(config, mesh, rules)

    def part(prefix: str) -> Callable[[str], Tensor]:
        return lambda name: get(prefix + name)

    def norm(prefix: str, name: str, axes: Tree) -> Tree:
        parts = _norm_parts(config).items()
        return {f"{name}{end}": place(get(f"{prefix}.{kind}"), axes[f"{name}{end}"], 0) for kind, end in parts}

    def top(name: str, tensor: Tensor) -> Any:
        return place(tensor, axes[name], contracted[name])

    def tree(parts: Iterator[tuple[tuple[str, ...], Tensor]], *metadata: Tree) -> Tree:
        found = {}
        for path, x in parts:
            found[path] = place(x, *(functools.reduce(operator.getitem, path, part) for part in metadata))
        return nnx.traversals.unflatten_mapping(found)

    params: Tree = {}
    if not config.tie_embeddings:
        params["embedding"] = top("embedding", get("model.embed_tokens.weight"))
    if config.positions == "learned":
        params["position_embedding"] = top("position_embedding", get("model.embed_positions.weight"))
    params["layers"] = {}
    for layer in range(config.num_layers):
        block, inputs, prefix = axes["layers"][layer], contracted["layers"][layer], f"model.layers.{layer}."
        attention = attention_parts(config, part(f"{prefix}self_attn."))
        mlp = mlp_parts(config, part(f"{prefix}mlp."))
        params["layers"][layer] = {
            name: tree(found, block[name], inputs[name]) for name, found in (("attention", attention), ("mlp", mlp))
        }
        for name, stem in _norms(config).items():
            params["layers"][layer] |= norm(prefix + stem, name, block)
    params |= norm("model.norm", "norm", axes)
    head = "model.embed_tokens.weight" if config.tie_embeddings else "lm_head.weight"
    params["head"] = top("head", get(head).T)
    if config.head_bias:
        params["head_bias"] = top("head_bias", get("lm_head.bias"))
    return params
