"""From the tensors of a decoder under Hugging Face's names to the fused parameters of `decoder`.

The names are those of Llama, and of Gemma for what Llama lacks; `naming` has those of other families. Hugging Face
stores a projection as `[out, in]`, with the heads' dimensions flattened; the decoder keeps heads apart, fuses
projections that read the same input, and stores them as `linear.stored` says. One array is read, fused, cast and placed
at a time, and only the parts of it that this process's devices hold.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
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
            return put(np.transpose(array, linear.stored(array.ndim, contracted, dtype)), axes, dtype)
        inputs = contracted["values"]
        if array.dtype.names is None:
            return {"values": place(array, axes["values"], inputs)}
        records = np.asarray(np.transpose(array, linear.rotated(array.ndim, inputs)))
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
    norms = {"attention_norm": "input_layernorm"}
    if not c.parallel:
        norms["mlp_norm"] = "pre_feedforward_layernorm" if c.post_norms else "post_attention_layernorm"
    if c.post_norms:
        norms |= {"attention_post_norm": "post_attention_layernorm", "mlp_post_norm": "post_feedforward_layernorm"}
    return norms


def _norm_parts(c: DecoderConfig) -> dict[str, str]:
    """The parts of a norm: the ending of the parameter's name by that of the tensor's."""
    return {"weight": "", "bias": "_bias"} if c.norm == "layer" else {"weight": ""}


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
        "mlp.up_proj": (c.intermediate_size, c.hidden_size, c.mlp_bias),
        "mlp.down_proj": (c.hidden_size, c.intermediate_size, c.mlp_bias),
    }
    if c.gated:
        projections["mlp.gate_proj"] = projections["mlp.up_proj"]
    norms = ["model.norm"]
    for layer in range(c.num_layers):
        prefix = f"model.layers.{layer}."
        norms += [prefix + name for name in _norms(c).values()]
        for name, (outputs, inputs, bias) in projections.items():
            shapes[f"{prefix}{name}.weight"] = (outputs, inputs)
            if bias:
                shapes[f"{prefix}{name}.bias"] = (outputs,)
        if c.qk_norm:
            shapes |= {f"{prefix}self_attn.{name}_norm.weight": (c.head_dim,) for name in "qk"}
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

    def get(name: str) -> Tensor:
        array = tensors(name)
        if times == 1 or name.split(".")[-2] not in ("k_proj", "v_proj"):
            return array
        each = array.reshape(heads, 1, config.head_dim, *array.shape[1:])
        return np.concatenate([each] * times, axis=1).reshape(times * array.shape[0], *array.shape[1:])

    return get


def _fuse_qkv(config: DecoderConfig, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each key/value head's query heads, then its key, then its value: `[kv_heads, group + 2, head_dim, ...]`."""
    heads = (config.num_kv_heads, -1, config.head_dim)
    return np.concatenate([x.reshape(*heads, *x.shape[1:]) for x in (q, k, v)], axis=1)


def _attention(c: DecoderConfig, get: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
    qkv = [get(f"{name}_proj.weight") for name in "qkv"]
    yield "qkv", np.moveaxis(_fuse_qkv(c, *qkv), -1, 0)
    yield "out", get("o_proj.weight").T.reshape(c.num_kv_heads, -1, c.head_dim, c.hidden_size)
    if c.qkv_bias:
        yield "qkv_bias", _fuse_qkv(c, *(get(f"{name}_proj.bias") for name in "qkv"))
    if c.output_bias:
        yield "out_bias", get("o_proj.bias")
    if c.qk_norm:
        yield "query_norm", get("q_norm.weight")
        yield "key_norm", get("k_norm.weight")


def _mlp(c: DecoderConfig, get: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
    inner = ("gate_proj", "up_proj") if c.gated else ("up_proj",)
    yield "gate_up", np.stack([get(f"{name}.weight").T for name in inner], axis=1)
    yield "down", get("down_proj.weight").T
    if c.mlp_bias:
        yield "gate_up_bias", np.stack([get(f"{name}.bias") for name in inner])
        yield "down_bias", get("down_proj.bias")


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

    params: Tree = {}
    if not config.tie_embeddings:
        params["embedding"] = top("embedding", get("model.embed_tokens.weight"))
    if config.positions == "learned":
        params["position_embedding"] = top("position_embedding", get("model.embed_positions.weight"))
    params["layers"] = {}
    for layer in range(config.num_layers):
        block, inputs, prefix = axes["layers"][layer], contracted["layers"][layer], f"model.layers.{layer}."
        attention = _attention(config, part(f"{prefix}self_attn."))
        mlp = _mlp(config, part(f"{prefix}mlp."))
        params["layers"][layer] = {
            "attention": {n: place(x, block["attention"][n], inputs["attention"][n]) for n, x in attention},
            "mlp": {n: place(x, block["mlp"][n], inputs["mlp"][n]) for n, x in mlp},
        }
        for name, stem in _norms(config).items():
            params["layers"][layer] |= norm(prefix + stem, name, block)
    params |= norm("model.norm", "norm", axes)
    head = "model.embed_tokens.weight" if config.tie_embeddings else "lm_head.weight"
    params["head"] = top("head", get(head).T)
    if config.head_bias:
        params["head_bias"] = top("head_bias", get("lm_head.bias"))
    return params
