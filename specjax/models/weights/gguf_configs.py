"""Converts the metadata of GGUF files to `DecoderConfig`, by the architectures of llama.cpp."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from specjax.limits import check_number, check_size
from specjax.models.config import (
    LIMITS,
    DecoderConfig,
    Experts,
    LinearRopeScaling,
    Llama3RopeScaling,
    LongRopeScaling,
    RopeScaling,
)

_LLAMA3, _SHORT, _LONG = "rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"

ROPE_FACTORS = (_LLAMA3, _SHORT, _LONG)
"""Tensors of divisors of the rotary angles, one for each: how llama.cpp stores the scaling of Llama 3 and of Phi-3."""

Fields = dict[str, Any]
"""Fields of `DecoderConfig`, all but its dtype."""

Factors = Mapping[str, np.ndarray]
"""Those of `ROPE_FACTORS` that a file has."""


def _decimal(value: Any) -> float:
    """The decimal number that was rounded to float32: 1e-5 for 9.999999747378752e-06."""
    return float(str(np.float32(value)))


class _Metadata:
    """The entries of an architecture, with its name left out, and what else the shape depends on."""

    def __init__(self, fields: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]], factors: Factors):
        self.arch, self.tensors, self.factors = str(fields["general.architecture"]), tensors, factors
        self._fields = fields

    def __getitem__(self, name: str) -> Any:
        return self._fields[f"{self.arch}.{name}"]

    def get(self, name: str, default: Any = None) -> Any:
        return self._fields.get(f"{self.arch}.{name}", default)


def _linear(m: _Metadata) -> LinearRopeScaling | None:
    kind, factor = m.get("rope.scaling.type", "none"), m.get("rope.scaling.factor", 1.0)
    if kind not in ("none", "linear"):
        raise ValueError(f"Rope scaling {kind!r} is not supported in GGUF files: specjax knows 'none' and 'linear'.")
    if kind == "none" or factor == 1.0:
        return None
    if _LLAMA3 in m.factors:
        raise ValueError(f"The file has both linear rope scaling and {_LLAMA3}: specjax knows one at a time.")
    return LinearRopeScaling(_decimal(factor))


def _checked_factors(name: str, factors: np.ndarray, half: int) -> np.ndarray:
    if factors.shape != (half,) or not np.isfinite(factors).all() or factors.min() <= 0:
        raise ValueError(f"{name} is not {half} numbers above 0: download the file again.")
    return factors


def _llama3_scaling(factors: np.ndarray, head_dim: int, theta: float) -> Llama3RopeScaling:
    """Recovers Llama 3's scaling from the factors that divide each angle.

    Files do not hold its four numbers. All but the factor are the same for every Llama 3.1, 3.2 and 3.3; whether they
    explain the factors is checked.
    """
    half = head_dim // 2
    factors = _checked_factors(_LLAMA3, factors, half)
    scaling = Llama3RopeScaling(float(factors.max()), 1.0, 4.0, 8192)
    frequencies = theta ** (-np.arange(half) / half)
    turns = scaling.original_max_position * frequencies / (2 * np.pi)
    keep = np.clip((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor), 0, 1)
    expected = 1.0 / (keep + (1.0 - keep) / scaling.factor)
    if not np.allclose(factors, expected, rtol=1e-3):
        raise ValueError(
            f"{_LLAMA3} is not Llama 3's scaling by {scaling.factor:g} from {scaling.original_max_position} "
            "positions: specjax knows no other. Load the model's safetensors instead."
        )
    return scaling


_SIZES = {
    "attention.head_count": "num_heads",
    "attention.head_count_kv": "num_kv_heads",
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "block_count": "num_layers",
    "context_length": "max_position",
    "attention.sliding_window": "sliding_window",
    "embedding_length": "hidden_size",
    "expert_count": "num_experts",
    "expert_feed_forward_length": "intermediate_size",
    "expert_used_count": "num_experts",
    "feed_forward_length": "intermediate_size",
    "rope.dimension_count": "head_dim",
    "rope.scaling.original_context_length": "max_position",
}
"""The entries that are sizes, and the configuration fields whose limits apply to them."""


_MAY_BE_ZERO = ("attention.sliding_window", "expert_count", "expert_used_count", "expert_feed_forward_length")
"""Where zero stands for none."""

_NUMBERS = (
    "rope.freq_base",
    "rope.freq_base_swa",
    "rope.scaling.factor",
    "rope.scaling.attn_factor",
    "final_logit_softcapping",
)
_NUMBERS += ("attention.layer_norm_rms_epsilon",)


def _check_fields(fields: Mapping[str, Any], arch: str) -> None:
    """Checks the entries that are used, where the file has them."""
    for name, field in _SIZES.items():
        low = 0 if name in _MAY_BE_ZERO else 1
        if (value := fields.get(f"{arch}.{name}")) is not None:
            check_size(f"{arch}.{name}", value, low=low, high=LIMITS[field])
    for name in _NUMBERS:
        if (value := fields.get(f"{arch}.{name}")) is not None:
            check_number(f"{arch}.{name}", value, positive=not name.endswith("epsilon"))


def _common(m: _Metadata) -> Fields:
    """What all architectures have in common."""
    heads, hidden = m["attention.head_count"], m["embedding_length"]
    head_dim = m.get("attention.key_length") or hidden // heads
    if (value := m.get("attention.value_length", head_dim)) != head_dim:
        raise ValueError(f"{m.arch}.attention.value_length={value}, but heads are {head_dim} wide: they must be equal.")
    return {
        "vocab_size": next(iter(m.tensors["token_embd.weight"]), 0),
        "hidden_size": hidden,
        "intermediate_size": m["feed_forward_length"],
        "num_layers": m["block_count"],
        "num_heads": heads,
        "num_kv_heads": m.get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position": m["context_length"],
        "rope_theta": _decimal(m.get("rope.freq_base", 10000.0)),
        "norm_eps": _decimal(m["attention.layer_norm_rms_epsilon"]),
        "tie_embeddings": "output.weight" not in m.tensors,
        "qkv_bias": "blk.0.attn_q.bias" in m.tensors,
        "output_bias": "blk.0.attn_output.bias" in m.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in m.tensors,
        "sliding_window": m.get("attention.sliding_window") or None,
        "qk_norm": "blk.0.attn_q_norm.weight" in m.tensors,
    }


def _whole_heads(m: _Metadata, fields: Fields) -> Fields:
    """All dimensions of a head are rotated; the scaling, where there is one."""
    head_dim = fields["head_dim"]
    if (value := m.get("rope.dimension_count", head_dim)) != head_dim:
        raise ValueError(f"{m.arch}.rope.dimension_count={value}, but heads are {head_dim} wide: they must be equal.")
    scaling: RopeScaling | None = _linear(m)
    if _LLAMA3 in m.factors:
        scaling = _llama3_scaling(m.factors[_LLAMA3], head_dim, fields["rope_theta"])
    return {**fields, "rope_scaling": scaling}


def _llama(m: _Metadata) -> Fields:
    """Llama, Mistral, Mixtral, Qwen2 and Qwen3, with or without experts, whose probabilities are renormalised."""
    fields = _whole_heads(m, _common(m))
    if number := m.get("expert_count", 0):
        fields["experts"] = Experts(number, m["expert_used_count"])
        fields["intermediate_size"] = m.get("expert_feed_forward_length") or fields["intermediate_size"]
    return fields


def _gemma3(m: _Metadata) -> Fields:
    """Gemma 3; where files do not say which layers have a window, and their angles, llama.cpp's defaults."""
    fields = _whole_heads(m, _common(m))
    layers, softcap = fields["num_layers"], m.get("final_logit_softcapping")
    # The model of 62 layers, with 27e9 parameters, divides by the root of another width than that of its heads.
    width = fields["hidden_size"] // fields["num_heads"] if layers == 62 else fields["head_dim"]
    period = m.get("attention.sliding_window_pattern", 6)
    check_size(f"{m.arch}.attention.sliding_window_pattern", period, high=LIMITS["num_layers"])
    full = tuple(layer for layer in range(layers) if (layer + 1) % period == 0)
    has_windows = fields["sliding_window"] is not None and len(full) < layers
    return {
        **fields,
        "norm": "rms_plus_one",
        "activation": "gelu_new",
        "post_norms": True,
        "scale_embeddings": True,
        "query_scale": width**-0.5,
        "logit_softcap": None if softcap is None else _decimal(softcap),
        "global_layers": full if has_windows else (),
        "local_rope_theta": _decimal(m.get("rope.freq_base_swa", 10000.0)) if has_windows else None,
    }


def _phi3(m: _Metadata) -> Fields:
    """Phi-3 and Phi-4; with LongRoPE, for texts as long as those of the first training (`config.LongRopeScaling`)."""
    fields = _common(m)
    if (kind := m.get("rope.scaling.type", "none")) not in ("none", "longrope"):
        raise ValueError(f"Rope scaling {kind!r} is not supported for {m.arch}: specjax knows 'none' and 'longrope'.")
    rotated = m.get("rope.dimension_count", fields["head_dim"])
    fields["rotary_dim"] = None if rotated == fields["head_dim"] else rotated
    if _SHORT not in m.factors and _LONG not in m.factors:
        return fields
    short, long = (_checked_factors(name, m.factors[name], rotated // 2) for name in (_SHORT, _LONG))
    most = m.get("rope.scaling.original_context_length", fields["max_position"])
    scaling = LongRopeScaling(
        tuple(map(_decimal, short)), tuple(map(_decimal, long)), most, _decimal(m.get("rope.scaling.attn_factor", 1.0))
    )
    return {**fields, "rope_scaling": scaling, "max_position": min(most, fields["max_position"])}


def _olmo2(m: _Metadata) -> Fields:
    """OLMo 2."""
    return {**_whole_heads(m, _common(m)), "pre_norms": False, "post_norms": True, "qk_norm_whole": True}


PARSERS: dict[str, Callable[[_Metadata], Fields]] = {
    "llama": _llama,
    "qwen2": _llama,
    "qwen3": _llama,
    "qwen3moe": _llama,
    "gemma3": _gemma3,
    "phi3": _phi3,
    "olmo2": _olmo2,
}
"""By `general.architecture`."""


def parse_config(
    fields: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]], factors: Factors, dtype: str
) -> DecoderConfig:
    """The shape of a model from a GGUF's metadata.

    Args:
      fields: the metadata.
      tensors: the GGUF name and shape of each tensor.
      factors: those of `ROPE_FACTORS` that the file has.
      dtype: "float32" or "bfloat16", that of the weights once loaded.

    Raises:
      ValueError: for an architecture or option that the decoder does not compute, or a missing entry.
    """
    arch = fields.get("general.architecture")
    if not isinstance(arch, str) or arch not in PARSERS:
        raise ValueError(
            f"GGUF architecture {arch!r:.80} is not supported: specjax loads {', '.join(PARSERS)} (Mistral, Mixtral "
            "and SmolLM2 are stored as llama)."
        )
    _check_fields(fields, arch)
    try:
        return DecoderConfig(**PARSERS[arch](_Metadata(fields, tensors, factors)), dtype=dtype)
    except KeyError as error:
        raise ValueError(f"The GGUF file lacks {error.args[0]!r}.") from None
