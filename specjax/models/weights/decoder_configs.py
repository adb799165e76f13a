"""Converts the `config.json` of decoder-only families, as of transformers 4 or 5, to the fields of `DecoderConfig`.

A parser raises ValueError for an option that the decoder does not compute, KeyError for a missing entry, and any Python
error for one of the wrong type; `naming_errors` turns these into sentences.
"""

import contextlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from specjax.limits import check_flag, check_number, check_size
from specjax.models.config import LIMITS, DecoderConfig, Experts, RopeScaling
from specjax.models.weights import rope_configs

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
    **dict.fromkeys(("moe_intermediate_size",), LIMITS["intermediate_size"]),
    **dict.fromkeys(("num_experts", "num_local_experts", "num_experts_per_tok"), LIMITS["num_experts"]),
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
_FLAGS += ("scale_attn_weights", "scale_decoder_outputs", "norm_topk_prob")


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


def _common(raw: Raw) -> Fields:
    """What the families after Llama have in common."""
    hidden, heads = raw["hidden_size"], raw["num_attention_heads"]
    return {
        "vocab_size": raw["vocab_size"],
        "hidden_size": hidden,
        "intermediate_size": raw["intermediate_size"],
        "num_layers": raw["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": raw.get("num_key_value_heads") or heads,
        "head_dim": raw.get("head_dim") or hidden // heads,
        "max_position": raw["max_position_embeddings"],
        "norm_eps": raw.get("rms_norm_eps", 1e-6),
        "tie_embeddings": bool(raw.get("tie_word_embeddings", False)),
        "activation": _activation(raw, "hidden_act", "silu"),
    }


def _rotary(raw: Raw, default: float = 10000.0) -> Fields:
    theta, scaling = rope_configs.read(raw, raw["max_position_embeddings"], default)
    return {"rope_theta": theta, "rope_scaling": scaling}


def _biases(raw: Raw) -> Fields:
    """Biases of all four projections of attention, or of none."""
    bias = bool(raw.get("attention_bias", False))
    return {"qkv_bias": bias, "output_bias": bias}


def _upper_windows(raw: Raw) -> Fields:
    """The layers from a certain one on have a window."""
    if not raw.get("use_sliding_window", False):
        return {}
    first = raw.get("max_window_layers", 28)
    return _windows(raw, [layer >= first for layer in range(raw["num_hidden_layers"])])


def _llama(raw: Raw) -> Fields:
    """Llama, of any version."""
    return _common(raw) | _rotary(raw) | _biases(raw) | {"mlp_bias": bool(raw.get("mlp_bias", False))}


def _mistral(raw: Raw) -> Fields:
    """Mistral 7B (arXiv 2310.06825)."""
    return _common(raw) | _rotary(raw) | {"sliding_window": raw.get("sliding_window", 4096)}


def _mixtral(raw: Raw) -> Fields:
    """Mixtral (arXiv 2401.04088): the probabilities of the chosen experts are divided by their sum."""
    experts = Experts(raw.get("num_local_experts", 8), raw.get("num_experts_per_tok", 2))
    window = raw.get("sliding_window")
    return _common(raw) | _rotary(raw, 1e6) | {"sliding_window": window, "experts": experts}


def _qwen2(raw: Raw) -> Fields:
    """Qwen2 and Qwen2.5 (arXiv 2407.10671)."""
    return _common(raw) | _rotary(raw) | {"qkv_bias": True} | _upper_windows(raw)


def _qwen3(raw: Raw) -> Fields:
    """Qwen3 (arXiv 2505.09388): queries and keys are normed head by head."""
    fields = _common({"head_dim": 128, **raw})
    return fields | _rotary(raw) | _biases(raw) | {"qk_norm": True} | _upper_windows(raw)


def _qwen3_moe(raw: Raw) -> Fields:
    """Qwen3's mixtures of experts, whose layers are all alike."""
    _require(raw, decoder_sparse_step=1)
    if raw.get("mlp_only_layers"):
        raise ValueError(f"mlp_only_layers={raw['mlp_only_layers']}: specjax computes experts in all layers only.")
    chosen, renormalise = raw.get("num_experts_per_tok", 8), bool(raw.get("norm_topk_prob", False))
    # transformers 5 writes one of the two names.
    number = raw["num_experts"] if "num_experts" in raw else raw["num_local_experts"]
    experts = Experts(number, chosen, renormalise)
    fields = _common(raw) | _rotary(raw) | _biases(raw) | {"qk_norm": True, "experts": experts}
    if raw.get("use_sliding_window", False):
        fields["sliding_window"] = raw.get("sliding_window", 4096)
    return fields | {"intermediate_size": raw["moe_intermediate_size"]}


def _phi3(raw: Raw) -> Fields:
    """Phi-3 (arXiv 2404.14219), Phi-4 and Phi-4-mini."""
    fields = _common({"rms_norm_eps": 1e-5, **raw})
    return fields | rope_configs.read_phi3(raw, fields["head_dim"]) | {"sliding_window": raw.get("sliding_window")}


def _olmo2(raw: Raw) -> Fields:
    """OLMo 2 (arXiv 2501.00656): norms after attention and feed-forward, and over all heads of queries and keys."""
    norms = {"pre_norms": False, "post_norms": True, "qk_norm": True, "qk_norm_whole": True}
    return _common({"rms_norm_eps": 1e-5, **raw}) | _rotary(raw) | _biases(raw) | norms


def _gemma(raw: Raw, rope: tuple[float, RopeScaling | None]) -> Fields:
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
        **_gemma(raw, rope_configs.read(raw, raw["max_position_embeddings"])),
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
        rope = rope_configs.read({"rope_parameters": nested["full_attention"]}, max_position, 1e6)
        local = rope_configs.read({"rope_parameters": nested.get("sliding_attention")}, max_position)
    else:
        rope, local = rope_configs.read(raw, max_position, 1e6), (float(raw.get("rope_local_base_freq", 1e4)), None)
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


_GEMMA3 = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131072,
}
"""What the published files of Gemma 3 leave out of `text_config`: transformers' defaults."""


def _gemma3_multimodal(raw: Raw) -> Fields:
    """The text model within Gemma 3's files for text and images."""
    text = raw["text_config"]
    if text.get("model_type", "gemma3_text") != "gemma3_text":
        raise ValueError(f"text_config has model_type={text['model_type']!r:.80}: specjax computes 'gemma3_text'.")
    tied = {"tie_word_embeddings": raw.get("tie_word_embeddings", True)}
    merged = {**_GEMMA3, **tied, **text, "model_type": "gemma3_text"}
    with naming_errors(merged):
        return _gemma3(merged)


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
    "mistral": _mistral,
    "mixtral": _mixtral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
    "phi3": _phi3,
    "olmo2": _olmo2,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "gemma3": _gemma3_multimodal,
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
        # PARD's drafts name their mask (arXiv 2504.18583); -1 is what its training writes where there is none.
        mask = raw.get("pard_token")
        mask_token = None if mask is None or mask == -1 else mask
        return DecoderConfig(**PARSERS[raw["model_type"]](raw), dtype=dtype, mask_token=mask_token)
