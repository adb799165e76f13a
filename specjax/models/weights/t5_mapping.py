"""From the `config.json` and the tensors of a Hugging Face T5, mT5 or umT5 to `models.t5`.

Hugging Face stores a projection as `[out, in]`, with the heads' dimensions flattened; the model keeps the heads apart
and fuses projections that read the same input.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
from jax.sharding import Mesh

from specjax.models import linear, modules, t5
from specjax.models.config import ACTIVATIONS, T5Config
from specjax.models.weights import decoder_configs, mapping
from specjax.models.weights.lazy import Tensor
from specjax.parallel import sharding
from specjax.types import Tree

MODEL_TYPES = ("t5", "mt5", "umt5")
"""The `model_type`s of `config.json` that `models.t5` computes."""

HEAD = "lm_head.weight"


def _scales_outputs(raw: Mapping[str, Any]) -> bool:
    """Whether the last hidden state is scaled before the head, as T5 v1.0 does.

    T5 says so by `tie_word_embeddings` (false for T5 v1.1, which has a separate head), transformers 5 by
    `scale_decoder_outputs`. mT5 never scales.
    """
    if raw["model_type"] == "mt5":
        return False
    tied = raw.get("tie_word_embeddings", True) is not False
    return bool(raw.get("scale_decoder_outputs", tied)) if raw["model_type"] == "t5" else tied


def _feed_forward(raw: Mapping[str, Any]) -> tuple[str, bool]:
    """The activation, and whether it is gated."""
    name = raw.get("feed_forward_proj", "relu" if raw["model_type"] == "t5" else "gated-gelu")
    parts = name.split("-")
    gated, activation = len(parts) == 2 and parts[0] == "gated", parts[-1]
    if name == "gated-gelu":
        activation = "gelu_new"
    if activation not in ACTIVATIONS or len(parts) > 1 + gated:
        raise ValueError(
            f"feed_forward_proj={name!r} is not supported: specjax computes {', '.join(ACTIVATIONS)}, gated or not."
        )
    return activation, gated


def parse_config(raw: Mapping[str, Any], names: Collection[str] | None, dtype: str = "float32") -> T5Config:
    """The shape of a model from its `config.json`, as transformers 4 or 5 wrote it.

    Args:
      raw: the parsed file.
      names: the names of its tensors, which show whether the head is the embedding table; None where they are not
        known, and the file has to say so (transformers ties the two by default).
      dtype: "float32" or "bfloat16", that of the weights once loaded.

    Raises:
      ValueError: for an option that the model does not compute, or a missing entry.
    """
    with decoder_configs.naming_errors(raw):
        activation, gated = _feed_forward(raw)
        tied = raw.get("tie_word_embeddings", True) if names is None else HEAD not in names
        return T5Config(
            vocab_size=raw["vocab_size"],
            hidden_size=raw["d_model"],
            head_dim=raw["d_kv"],
            intermediate_size=raw["d_ff"],
            num_encoder_layers=raw["num_layers"],
            num_layers=raw.get("num_decoder_layers") or raw["num_layers"],
            num_heads=raw["num_heads"],
            num_buckets=raw.get("relative_attention_num_buckets", 32),
            max_distance=raw.get("relative_attention_max_distance", 128),
            norm_eps=raw.get("layer_norm_epsilon", 1e-6),
            activation=activation,
            gated=gated,
            tie_embeddings=bool(tied),
            scale_outputs=_scales_outputs(raw),
            bias_per_layer=raw["model_type"] == "umt5",
            start_token=_start_token(raw),
            dtype=dtype,
        )


def _start_token(raw: Mapping[str, Any]) -> int:
    """The token that the decoder's sequences begin with: by default the padding token."""
    start = raw.get("decoder_start_token_id")
    return int(raw.get("pad_token_id") or 0) if start is None else int(start)


def _projections(c: T5Config, layer: str) -> dict[str, tuple[int, int]]:
    """The matrices of a layer, `[out, in]`."""
    inner = c.num_heads * c.head_dim
    if layer != "DenseReluDense":
        return {**dict.fromkeys("qkv", (inner, c.hidden_size)), "o": (c.hidden_size, inner)}
    up = ("wi_0", "wi_1") if c.gated else ("wi",)
    return {
        **dict.fromkeys(up, (c.intermediate_size, c.hidden_size)),
        "wo": (c.hidden_size, c.intermediate_size),
    }


_LAYERS = {
    "encoder": ("SelfAttention", "DenseReluDense"),
    "decoder": ("SelfAttention", "EncDecAttention", "DenseReluDense"),
}


def tensor_shapes(config: T5Config) -> dict[str, tuple[int, ...]]:
    """The Hugging Face name and shape of every tensor that a model of this shape has."""
    c = config
    shapes: dict[str, tuple[int, ...]] = {"shared.weight": (c.vocab_size, c.hidden_size)}
    if not c.tie_embeddings:
        shapes[HEAD] = (c.vocab_size, c.hidden_size)
    for side, number in (("encoder", c.num_encoder_layers), ("decoder", c.num_layers)):
        shapes[f"{side}.final_layer_norm.weight"] = (c.hidden_size,)
        for block in range(number):
            for i, layer in enumerate(_LAYERS[side]):
                prefix = f"{side}.block.{block}.layer.{i}."
                shapes[f"{prefix}layer_norm.weight"] = (c.hidden_size,)
                for name, shape in _projections(c, layer).items():
                    shapes[f"{prefix}{layer}.{name}.weight"] = shape
            if block == 0 or c.bias_per_layer:
                bias = f"{side}.block.{block}.layer.0.SelfAttention.relative_attention_bias.weight"
                shapes[bias] = (c.num_buckets, c.num_heads)
    return shapes


def _heads(c: T5Config, get: Callable[[str], Tensor], prefix: str, names: str) -> Tensor:
    """Projections `D -> heads, one for each name, head_dim`."""
    parts = [get(f"{prefix}{name}.weight").T.reshape(-1, c.num_heads, c.head_dim) for name in names]
    return np.stack(parts, axis=2)


def _out(c: T5Config, get: Callable[[str], Tensor], prefix: str) -> Tensor:
    """The projection `heads, head_dim -> D`."""
    return get(f"{prefix}o.weight").T.reshape(c.num_heads, c.head_dim, c.hidden_size)


def _block(c: T5Config, get: Callable[[str], Tensor], prefix: str, is_decoder: bool, has_bias: bool) -> Tree:
    """The arrays of a layer, inputs before outputs."""
    own, cross = f"{prefix}0.SelfAttention.", f"{prefix}1.EncDecAttention."
    last = 2 if is_decoder else 1
    mlp = f"{prefix}{last}.DenseReluDense."
    up = [get(f"{mlp}{name}.weight").T for name in (("wi_0", "wi_1") if c.gated else ("wi",))]
    tree: Tree = {
        "attention_norm": get(f"{prefix}0.layer_norm.weight"),
        "attention": {"qkv": _heads(c, get, own, "qkv"), "out": _out(c, get, own)},
        "mlp_norm": get(f"{prefix}{last}.layer_norm.weight"),
        "mlp": {"up": np.stack(up, axis=1), "down": get(f"{mlp}wo.weight").T},
    }
    if has_bias:
        tree["attention"]["bias"] = get(f"{own}relative_attention_bias.weight")
    if is_decoder:
        tree["cross_norm"] = get(f"{prefix}1.layer_norm.weight")
        query = _heads(c, get, cross, "q")[:, :, 0]
        tree["cross"] = {"query": query, "key_value": _heads(c, get, cross, "kv"), "out": _out(c, get, cross)}
    return tree


def from_huggingface(
    config: T5Config, tensors: mapping.Tensors, *, mesh: Mesh | None = None, rules: sharding.Rules = sharding.RULES
) -> Tree:
    """The parameters from tensors under Hugging Face's names.

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
    get = mapping.checked(tensors, tensor_shapes(config))
    put = mapping.placer(config, mesh, rules)
    c = config
    axes, contracted = (modules.metadata(t5.T5, config, name) for name in ("axes", "num_contracted"))

    def place(tree: Tree, axes: Tree, contracted: Tree) -> Tree:
        if isinstance(tree, dict):
            return {name: place(x, axes[name], contracted[name]) for name, x in tree.items()}
        return put(tree, axes, contracted)

    params: Tree = {}
    for side, number in (("encoder", c.num_encoder_layers), ("decoder", c.num_layers)):
        params[side] = {}
        for i in range(number):
            tree = _block(c, get, f"{side}.block.{i}.layer.", side == "decoder", i == 0 or c.bias_per_layer)
            params[side][i] = place(tree, axes[side][i], contracted[side][i])
    top = {
        "encoder_norm": get("encoder.final_layer_norm.weight"),
        "norm": get("decoder.final_layer_norm.weight"),
        "head": get("shared.weight" if c.tie_embeddings else HEAD).T,
    }
    if not c.tie_embeddings:
        top["embedding"] = get("shared.weight")
    return params | place(top, axes, contracted)


def read(
    config: T5Config,
    model_type: str,
    names: Collection[str],
    tensors: Callable[[str], Tensor],
    *,
    source: str,
    mesh: Mesh | None,
    rules: sharding.Rules,
) -> tuple[T5Config, Tree]:
    """Like `naming.read`, for an encoder-decoder."""
    del model_type  # they all have the same names
    mapping.check_names(tensor_shapes(config), names, source)
    return config, from_huggingface(config, tensors, mesh=mesh, rules=rules)


def to_huggingface(config: T5Config, params: Tree) -> dict[str, np.ndarray]:
    """The inverse of `from_huggingface`: float32 tensors under Hugging Face's names.

    Args:
      config: the shape.
      params: the parameters.

    Raises:
      ValueError: for a quantised model.
    """
    if config.quantisation or config.head_quantisation:
        raise ValueError(
            "A quantised T5 has no tensors under Hugging Face's names: convert the model it was made from."
        )
    c = config

    def logical(x: Any, contracted: Any) -> Any:
        """The arrays with the axes in the order that the layers declare, inputs first."""
        if linear.is_matrix(contracted):
            return logical(x["values"], contracted["values"])
        if isinstance(x, dict):
            return {name: logical(part, contracted[name]) for name, part in x.items()}
        array = np.asarray(x, np.float32)
        return array.transpose(np.argsort(linear.stored(array.ndim, contracted, c.dtype)))

    tree = logical(params, modules.metadata(t5.T5, config, "num_contracted"))
    tensors = {
        "shared.weight": tree["head"].T if c.tie_embeddings else tree["embedding"],
        "encoder.final_layer_norm.weight": tree["encoder_norm"],
        "decoder.final_layer_norm.weight": tree["norm"],
    }
    if not c.tie_embeddings:
        tensors[HEAD] = tree["head"].T

    def attention(prefix: str, names: str, projections: np.ndarray, out: np.ndarray) -> None:
        for i, name in enumerate(names):
            tensors[f"{prefix}{name}.weight"] = projections[:, :, i].reshape(c.hidden_size, -1).T
        tensors[f"{prefix}o.weight"] = out.reshape(-1, c.hidden_size).T

    for side in ("encoder", "decoder"):
        for i, block in tree[side].items():
            prefix, last = f"{side}.block.{i}.layer.", len(_LAYERS[side]) - 1
            tensors[f"{prefix}0.layer_norm.weight"] = block["attention_norm"]
            attention(f"{prefix}0.SelfAttention.", "qkv", block["attention"]["qkv"], block["attention"]["out"])
            if "bias" in block["attention"]:
                tensors[f"{prefix}0.SelfAttention.relative_attention_bias.weight"] = block["attention"]["bias"]
            if side == "decoder":
                tensors[f"{prefix}1.layer_norm.weight"] = block["cross_norm"]
                cross = block["cross"]
                both = np.concatenate([cross["query"][:, :, None], cross["key_value"]], axis=2)
                attention(f"{prefix}1.EncDecAttention.", "qkv", both, cross["out"])
            tensors[f"{prefix}{last}.layer_norm.weight"] = block["mlp_norm"]
            mlp = f"{prefix}{last}.DenseReluDense."
            for j, name in enumerate(("wi_0", "wi_1") if c.gated else ("wi",)):
                tensors[f"{mlp}{name}.weight"] = block["mlp"]["up"][:, j].T
            tensors[f"{mlp}wo.weight"] = block["mlp"]["down"].T
    return {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
