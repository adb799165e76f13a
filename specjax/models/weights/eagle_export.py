"""Writes EAGLE heads in the layout of their authors, which `eagle_files` and other engines read."""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from specjax import files
from specjax.models import eagle
from specjax.models.config import LinearRopeScaling, Llama3RopeScaling
from specjax.models.eagle import EagleConfig
from specjax.models.weights.eagle_files import LAYER, NORMS
from specjax.types import Tree


def _named(config: EagleConfig, params: Tree) -> dict[str, np.ndarray]:
    """The tensors of a head by plain names: the inverse of `_params`."""
    c, dtype = config.layer, jnp.dtype(config.layer.dtype)
    # In float32, matrices have their inputs first.
    p = jax.tree.map(np.asarray, jax.device_get(eagle.cast(config, params, "float32")[1]))
    qkv, out = p["attention"]["qkv"]["values"], p["attention"]["out"]["values"]
    group = c.num_heads // c.num_kv_heads
    found = {"q": qkv[:, :, :group], "k": qkv[:, :, group], "v": qkv[:, :, group + 1]}
    named = {f"{LAYER}self_attn.{n}_proj.weight": x.reshape(len(x), -1).T for n, x in found.items()}
    named[f"{LAYER}self_attn.o_proj.weight"] = out.reshape(-1, out.shape[-1]).T
    gate_up = p["mlp"]["gate_up"]["values"]
    named |= {f"{LAYER}mlp.{n}_proj.weight": gate_up[:, i].T for i, n in enumerate(("gate", "up"))}
    named[f"{LAYER}mlp.down_proj.weight"] = p["mlp"]["down"]["values"].T
    named["fc.weight"] = p["fc"]["values"].T
    named |= {tensor: p[name] for name, tensor in NORMS.items() if name in p}
    for name, tensor in (
        ("fc_bias", "fc.bias"),
        ("input_norm", "input_norm.weight"),
        ("embedding", "embed_tokens.weight"),
    ):
        if name in p:
            named[tensor] = p[name]
    if config.own_head:
        named["lm_head.weight"] = p["head"]["values"].T
    if config.norm_features:
        named |= {f"fc_norm.{i}.weight": x for i, x in enumerate(p["feature_norms"])}
    return {name: x.astype(dtype) for name, x in named.items()}


def _json(config: EagleConfig, vocab_size: int) -> dict[str, Any]:
    """`config.json`, with every entry that `read` asks for."""
    c = config.layer
    scaling = c.rope_scaling
    rope: dict[str, Any] | None = None
    if isinstance(scaling, LinearRopeScaling):
        rope = {"type": "linear", "factor": scaling.factor}
    elif isinstance(scaling, Llama3RopeScaling):
        values = dataclasses.asdict(scaling)
        rope = {
            "rope_type": "llama3",
            "original_max_position_embeddings": values.pop("original_max_position"),
            **values,
        }
    elif config.yarn is not None:
        values = dataclasses.asdict(config.yarn)
        rope = {"rope_type": "yarn", "original_max_position_embeddings": values.pop("original_max_position"), **values}
    names = {1: "LlamaForCausalLM", 3: "LlamaForCausalLMEagle3"}
    return {
        "architectures": [names[config.version]],
        "model_type": "llama",
        "hidden_size": c.hidden_size,
        "target_hidden_size": config.target_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "hidden_act": c.activation,
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,
        "rope_scaling": rope,
        "max_position_embeddings": c.max_position,
        "vocab_size": vocab_size,
        "draft_vocab_size": c.vocab_size,
        "tie_word_embeddings": False,
        "norm_before_residual": config.norm_before_residual,
        "norm_output": config.norm_output,
        "eagle_aux_hidden_state_layer_ids": list(config.taps),
    }


def write(
    directory: str | pathlib.Path,
    config: EagleConfig,
    params: Tree,
    tokens: Int[np.ndarray, " W"] | None,
    vocab_size: int,
) -> None:
    """Writes a head in the layout of the authors, with safetensors, in place of what the directory held before.

    Args:
      directory: made if it does not exist.
      config: the head's shape.
      params: its parameters.
      tokens: the target's ids of the tokens that it can draft, in increasing order; None: all.
      vocab_size: V of the target.

    Raises:
      ValueError: for a head with biases or norms within its attention, which the layout lacks.
    """
    from safetensors.numpy import save_file

    c = config.layer
    if c.qkv_bias or c.output_bias or c.mlp_bias or c.qk_norm:
        raise ValueError("A head with biases or norms of queries and keys is not written: keep the files it came from.")
    name = "midlayer." if config.version == 3 else "layers.0."
    arrays = {
        key.replace(LAYER, name, 1) if key.startswith(LAYER) else key: x for key, x in _named(config, params).items()
    }
    if tokens is not None:
        arrays["d2t"] = eagle.offsets(tokens)
        arrays["t2d"] = np.isin(np.arange(vocab_size), tokens)
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with files.replacing(directory / "model.safetensors") as partial:
        save_file({key: np.ascontiguousarray(x) for key, x in arrays.items()}, partial)
    files.write(directory / "config.json", json.dumps(_json(config, vocab_size), indent=2) + "\n")
