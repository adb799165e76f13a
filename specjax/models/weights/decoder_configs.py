"""Converts the `config.json` of decoder-only families, as of transformers 4 or 5, to the fields of `DecoderConfig`.

A parser raises ValueError for an option that the decoder does not compute, KeyError for a missing entry, and any Python
error for one of the wrong type; `naming_errors` turns these into sentences.
"""

import contextlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from specjax.limits import check_flag, check_number, check_size
from specjax.models.config import LIMITS, DecoderConfig, LinearRopeScaling, Llama3RopeScaling

Raw = Mapping[str, Any]
"""The parsed file."""

Fields = dict[str, Any]
"""Fields of `DecoderConfig`, all but its dtype."""

_ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_new",
    "gelu_pytorch_tanh": "gelu_new",
    "silu": "silu",
    "swish": "silu",
}


_SIZES = {
    **dict.fromkeys(("vocab_size",), LIMITS["vocab_size"]),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model"), LIMITS["hidden_size"]),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "d_ff"), LIMITS["intermediate_size"]),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers"), LIMITS["num_layers"]),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "num_key_value_heads"), LIMITS["num_heads"]),
    **dict.fromkeys(("head_dim", "d_kv", "rotary_dim"), LIMITS["head_dim"]),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "sliding_window"), LIMITS["max_position"]),
    **dict.fromkeys(("sliding_window_pattern", "_sliding_window_pattern"), LIMITS["num_layers"]),
    **dict.fromkeys(("relative_attention_num_buckets",), LIMITS["num_buckets"]),
    **dict.fromkeys(("relative_attention_max_distance",), LIMITS["max_distance"]),
}
"""The entries that, where a file has them, are positive whole numbers, and the largest value of each."""

_NUMBERS = ("rope_theta", "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping")
_NUMBERS += ("rope_local_base_freq", "rms_norm_eps", "layer_norm_epsilon")

_FLAGS = ("tie_word_embeddings", "attention_bias", "mlp_bias", "enable_bias", "use_sliding_window")
_FLAGS += ("scale_attn_weights", "scale_decoder_outputs")


@contextlib.contextmanager
def naming_errors(raw: Raw) -> Iterator[None]:
    """Checks the entries of a `config.json` before anything is computed from them, and names what is wrong.

    Args:
      raw: the parsed file.

    Raises:
      ValueError: for an entry that is missing, of the wrong type or out of range.
    """
    for name in _NUMBERS:
        if raw.get(name) is not None:
            check_number(name, raw[name], positive=not name.endswith(("eps", "epsilon")))
    for name in _FLAGS:
        if raw.get(name) is not None:
            check_flag(name, raw[name])
    for name, most in _SIZES.items():
        if raw.get(name) is not None:
            check_size(name, raw[name], high=most)
    try:
        yield
    except KeyError as error:
        raise ValueError(f"The model's config.json lacks {error.args[0]!r:.80}.") from None
    except (TypeError, AttributeError, LookupError, ArithmeticError, RecursionError) as error:
        raise ValueError(
            f"The model's config.json has an entry of the wrong type ({error}): download it again."
        ) from error


def _activation(raw: Raw, name: str, default: str) -> str:
    value = raw.get(name) or default
    if value not in _ACTIVATIONS:
        raise ValueError(f"{name}={value!r} is not supported: specjax computes {', '.join(map(repr, _ACTIVATIONS))}.")
    return _ACTIVATIONS[value]


def _require(raw: Raw, **wanted: Any) -> None:
    """Refuses options with another value than the only one that specjax computes; None is the default."""
    for name, value in wanted.items():
        if raw.get(name) not in (None, value):
            raise ValueError(
                f"{name}={raw[name]!r} is not supported: for {raw['model_type']}, specjax computes {name}={value!r} "
                "only. Choose another model."
            )


def _rope(
    raw: Raw, max_position: int, default: float = 10000.0
) -> tuple[float, Llama3RopeScaling | LinearRopeScaling | None]:
    """The base of the rotary angles and their scaling."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    theta = float(rope.get("rope_theta", raw.get("rope_theta", default)))
    if (partial := rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))) != 1.0:
        raise ValueError(f"partial_rotary_factor={partial}: for this family, specjax rotates whole heads only.")
    kind = rope.get("rope_type", rope.get("type", "default"))
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


def _windows(raw: Raw, default: list[bool]) -> Fields:
    """Which layers have the window.

    Args:
      raw: the parsed file, whose `layer_types` name each layer's attention.
      default: whether each layer has a window where that entry is missing.
    """
    kinds = raw.get("layer_types") or ["sliding_attention" if slides else "full_attention" for slides in default]
    if unknown := set(kinds) - {"sliding_attention", "full_attention"}:
        raise ValueError(f"layer_types with {sorted(unknown)[0]!r} are not supported: choose another model.")
    full = tuple(i for i, kind in enumerate(kinds) if kind == "full_attention")
    window = raw.get("sliding_window", 4096)
    if window is None or len(full) == len(kinds):
        return {}
    return {"sliding_window": int(window), "global_layers": full}


def _llama(raw: Raw) -> Fields:
    """Llama, Mistral and Qwen2."""
    kind, layers = raw["model_type"], raw["num_hidden_layers"]
    hidden, heads, max_position = raw["hidden_size"], raw["num_attention_heads"], raw["max_position_embeddings"]
    theta, scaling = _rope(raw, max_position)
    llama_bias = kind == "llama" and bool(raw.get("attention_bias", False))
    fields = {
        "vocab_size": raw["vocab_size"],
        "hidden_size": hidden,
        "intermediate_size": raw["intermediate_size"],
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": raw.get("num_key_value_heads") or heads,
        "head_dim": raw.get("head_dim") or hidden // heads,
        "max_position": max_position,
        "rope_theta": theta,
        "rope_scaling": scaling,
        "norm_eps": raw.get("rms_norm_eps", 1e-6),
        "tie_embeddings": bool(raw.get("tie_word_embeddings", False)),
        "activation": _activation(raw, "hidden_act", "silu"),
        "qkv_bias": kind == "qwen2" or llama_bias,
        "output_bias": llama_bias,
        "mlp_bias": kind == "llama" and bool(raw.get("mlp_bias", False)),
    }
    if kind == "mistral":
        fields["sliding_window"] = raw.get("sliding_window", 4096)
    if kind == "qwen2" and raw.get("use_sliding_window", False):
        first = raw.get("max_window_layers", 28)
        fields |= _windows(raw, [layer >= first for layer in range(layers)])
    return fields


def _gemma(raw: Raw, rope: tuple[float, Llama3RopeScaling | LinearRopeScaling | None]) -> Fields:
    """What Gemma 2 and 3 have in common; the defaults are transformers'."""
    _require(raw, use_bidirectional_attention=False)
    bias = bool(raw.get("attention_bias", False))
    return {
        "vocab_size": raw["vocab_size"],
        "hidden_size": raw["hidden_size"],
        "intermediate_size": raw["intermediate_size"],
        "num_layers": raw["num_hidden_layers"],
        "num_heads": raw["num_attention_heads"],
        "num_kv_heads": raw["num_key_value_heads"],
        "head_dim": raw.get("head_dim", 256),
        "max_position": raw["max_position_embeddings"],
        "rope_theta": rope[0],
        "rope_scaling": rope[1],
        "norm_eps": raw.get("rms_norm_eps", 1e-6),
        "tie_embeddings": bool(raw.get("tie_word_embeddings", True)),
        "activation": _activation(raw, "hidden_activation", "gelu_pytorch_tanh"),
        "qkv_bias": bias,
        "output_bias": bias,
        "norm": "rms_plus_one",
        "post_norms": True,
        "scale_embeddings": True,
        "query_scale": raw.get("query_pre_attn_scalar", 256) ** -0.5,
    }


def _gemma2(raw: Raw) -> Fields:
    """Gemma 2 (arXiv 2408.00118): every other layer has a window, from the first on."""
    layers = raw["num_hidden_layers"]
    return {
        **_gemma(raw, _rope(raw, raw["max_position_embeddings"])),
        **_windows(raw, [layer % 2 == 0 for layer in range(layers)]),
        "attention_softcap": raw.get("attn_logit_softcapping", 50.0),
        "logit_softcap": raw.get("final_logit_softcapping", 30.0),
    }


def _gemma3(raw: Raw) -> Fields:
    """The text model of Gemma 3 (arXiv 2503.19786): five layers with a window, then one without."""
    if raw.get("attn_logit_softcapping") is not None:
        raise ValueError(f"attn_logit_softcapping={raw['attn_logit_softcapping']}: transformers' Gemma 3 ignores it.")
    layers, max_position = raw["num_hidden_layers"], raw["max_position_embeddings"]
    nested = raw.get("rope_parameters") or {}
    if "full_attention" in nested:
        rope = _rope({"rope_parameters": nested["full_attention"]}, max_position, 1e6)
        local = _rope({"rope_parameters": nested.get("sliding_attention")}, max_position)
    else:
        rope, local = _rope(raw, max_position, 1e6), (float(raw.get("rope_local_base_freq", 1e4)), None)
    if local[1] is not None:
        raise ValueError(
            "rope_parameters stretch the angles of layers with a window: specjax stretches only the other layers'."
        )
    period = raw.get("sliding_window_pattern") or raw.get("_sliding_window_pattern") or 6
    windows = _windows(raw, [(layer + 1) % period != 0 for layer in range(layers)])
    return {
        **_gemma(raw, rope),
        **windows,
        "qk_norm": True,
        "logit_softcap": raw.get("final_logit_softcapping"),
        "local_rope_theta": local[0] if windows else None,
    }


def _gpt(raw: Raw) -> Fields:
    """What GPT-2, GPTBigCode and GPT-J have in common."""
    hidden, heads = raw["n_embd"], raw["n_head"]
    return {
        "vocab_size": raw["vocab_size"],
        "hidden_size": hidden,
        "intermediate_size": raw.get("n_inner") or 4 * hidden,
        "num_layers": raw["n_layer"],
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": hidden // heads,
        "max_position": raw["n_positions"],
        "norm": "layer",
        "norm_eps": raw.get("layer_norm_epsilon", 1e-5),
        "gated": False,
        "mlp_bias": True,
    }


def _gpt2(raw: Raw) -> Fields:
    """GPT-2, and GPTBigCode, which is GPT-2 with one key/value head."""
    _require(raw, add_cross_attention=False, scale_attn_by_inverse_layer_idx=False)
    big_code = raw["model_type"] == "gpt_bigcode"
    fields = _gpt(raw)
    if big_code:
        _require(raw, multi_query=True)
        fields["num_kv_heads"] = 1
    return {
        **fields,
        "activation": _activation(raw, "activation_function", "gelu_pytorch_tanh" if big_code else "gelu_new"),
        "tie_embeddings": bool(raw.get("tie_word_embeddings", True)),
        "positions": "learned",
        "qkv_bias": True,
        "output_bias": True,
        "query_scale": None if raw.get("scale_attn_weights", True) else 1.0,
    }


def _gptj(raw: Raw) -> Fields:
    """GPT-J (https://github.com/kingoflolz/mesh-transformer-jax)."""
    if raw.get("rotary_dim", 64) is None:
        raise ValueError("rotary_dim=null: specjax computes GPT-J with a number there. Choose another model.")
    return {
        **_gpt(raw),
        "activation": _activation(raw, "activation_function", "gelu_new"),
        "tie_embeddings": bool(raw.get("tie_word_embeddings", False)),
        "rotary_dim": raw.get("rotary_dim", 64),
        "parallel": True,
        "head_bias": True,
    }


def _opt(raw: Raw) -> Fields:
    """OPT (arXiv 2205.01068), all but OPT-350M, whose norms come after its layers."""
    hidden, heads = raw["hidden_size"], raw["num_attention_heads"]
    _require(
        raw,
        do_layer_norm_before=True,
        _remove_final_layer_norm=False,
        layer_norm_elementwise_affine=True,
        word_embed_proj_dim=hidden,
    )
    bias = bool(raw.get("enable_bias", True))
    return {
        "vocab_size": raw["vocab_size"],
        "hidden_size": hidden,
        "intermediate_size": raw["ffn_dim"],
        "num_layers": raw["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": hidden // heads,
        "max_position": raw["max_position_embeddings"],
        "positions": "learned",
        "norm": "layer",
        "norm_eps": 1e-5,
        "activation": _activation(raw, "activation_function", "relu"),
        "gated": False,
        "tie_embeddings": bool(raw.get("tie_word_embeddings", True)),
        "qkv_bias": bias,
        "output_bias": bias,
        "mlp_bias": bias,
    }


PARSERS = {
    "llama": _llama,
    "mistral": _llama,
    "qwen2": _llama,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "gpt2": _gpt2,
    "gpt_bigcode": _gpt2,
    "gptj": _gptj,
    "opt": _opt,
}
"""Parsers by `model_type`."""


def parse_config(raw: Raw, names: Collection[str] | None = None, dtype: str = "float32") -> DecoderConfig:
    """The shape of a decoder-only model.

    Args:
      raw: the parsed file.
      names: the names of its tensors; unused.
      dtype: "float32" or "bfloat16", that of the weights once loaded.

    Raises:
      ValueError: for an option that the decoder does not compute, or a missing entry.
    """
    del names
    with naming_errors(raw):
        return DecoderConfig(**PARSERS[raw["model_type"]](raw), dtype=dtype)
