"""Shapes of published models, without weights, by name: for planning and for models made from scratch.

    config = presets.get("chinchilla_70b")  # or presets.chinchilla_70b

All are bfloat16; `dataclasses.replace(config, dtype="float32")` changes that.

For Gopher, Chinchilla and their draft, the papers give the layers, heads, widths, vocabulary, RMSNorm and a
feed-forward of four times the width. The rotary positions are ours (the papers use Transformer-XL's relative ones), and
so is GELU (they name no activation). So these shapes lack one projection of `hidden_size ** 2` per layer, by which
Transformer-XL computes keys for distances: `chinchilla_70b` has 64.7e9 parameters.
"""

import dataclasses
from typing import Any

from specjax.models.config import DecoderConfig, Experts, Llama3RopeScaling, ModelConfig, T5Config


def _gopher(num_layers: int, hidden_size: int, num_heads: int) -> DecoderConfig:
    """Rae et al. 2021, arXiv 2112.11446, section 3.1: RMSNorm, 32,000 SentencePieces, 2048 tokens of context."""
    return DecoderConfig(
        vocab_size=32000,
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=128,
        max_position=2048,
        gated=False,
        activation="gelu",
        tie_embeddings=True,
        dtype="bfloat16",
    )


def _gpt(num_layers: int, hidden_size: int, num_heads: int, **others: Any) -> DecoderConfig:
    """GPT-2's architecture: learned positions, LayerNorm, biases everywhere, a feed-forward of four times the width."""
    return DecoderConfig(
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=hidden_size // num_heads,
        positions="learned",
        norm="layer",
        gated=False,
        tie_embeddings=True,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        dtype="bfloat16",
        **others,
    )


def _opt(num_layers: int, hidden_size: int, num_heads: int) -> DecoderConfig:
    """Zhang et al. 2022, arXiv 2205.01068, table 1; the vocabulary is that of the released weights."""
    return _gpt(num_layers, hidden_size, num_heads, vocab_size=50272, max_position=2048, activation="relu")


def _llama3(num_layers: int, hidden_size: int, num_heads: int, intermediate_size: int) -> DecoderConfig:
    """Llama 3 (Grattafiori et al. 2024, arXiv 2407.21783, table 3), with the vocabulary of the released weights.

    Llama 3.1, of the same shapes, stretches its rotary angles to 131072 positions.
    """
    return DecoderConfig(
        vocab_size=128256,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=8,
        head_dim=128,
        max_position=8192,
        rope_theta=500000.0,
        dtype="bfloat16",
    )


def _llama3_2(num_layers: int, hidden_size: int, num_heads: int, head_dim: int) -> DecoderConfig:
    """The text models of Llama 3.2, as released: a tied head, angles stretched by 32 to 131072 positions."""
    return dataclasses.replace(
        _llama3(num_layers, hidden_size, num_heads, 8192),
        head_dim=head_dim,
        max_position=131072,
        rope_scaling=Llama3RopeScaling(32.0, 1.0, 4.0, 8192),
        tie_embeddings=True,
    )


def _qwen3(
    num_layers: int, hidden_size: int, num_heads: int, intermediate_size: int, num_kv_heads: int = 8, **others: Any
) -> DecoderConfig:
    """Qwen3 (arXiv 2505.09388, tables 1 and 2), with the vocabulary of the released weights."""
    return DecoderConfig(
        vocab_size=151936,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=128,
        max_position=40960,
        rope_theta=1e6,
        norm_eps=1e-6,
        qk_norm=True,
        dtype="bfloat16",
        **others,
    )


def _t5_v1_1(hidden_size: int, intermediate_size: int, num_layers: int, num_heads: int) -> T5Config:
    """T5 v1.1 (Shazeer 2020, arXiv 2002.05202, and the released weights): gated GELU, a head of its own."""
    return T5Config(
        vocab_size=32128,
        hidden_size=hidden_size,
        head_dim=64,
        intermediate_size=intermediate_size,
        num_encoder_layers=num_layers,
        num_layers=num_layers,
        num_heads=num_heads,
        activation="gelu_new",
        gated=True,
        tie_embeddings=False,
        scale_outputs=False,
        dtype="bfloat16",
    )


chinchilla_70b = _gopher(80, 8192, 64)
"""Hoffmann et al. 2022, arXiv 2203.15556, table 4."""

chinchilla_draft_4b = _gopher(8, 6144, 48)
"""The draft of Chen et al. 2023, arXiv 2302.01318: wide and shallow."""

gopher_7b = _gopher(32, 4096, 32)
"""The 7.1B model of Rae et al. 2021, table 1: a draft of the usual proportions, to compare the wide one with."""

gpt2 = _gpt(12, 768, 12, vocab_size=50257, max_position=1024, activation="gelu_new")
"""The smallest model of Radford et al. 2019, as released."""

opt_125m = _opt(12, 768, 12)
opt_66b = _opt(64, 9216, 72)
opt_175b = _opt(96, 12288, 96)

llama3_8b = _llama3(32, 4096, 32, 14336)
llama3_70b = _llama3(80, 8192, 64, 28672)

llama3_2_1b = _llama3_2(16, 2048, 32, 64)
llama3_2_3b = _llama3_2(28, 3072, 24, 128)

qwen3_0_6b = _qwen3(28, 1024, 16, 3072, tie_embeddings=True)
qwen3_1_7b = _qwen3(28, 2048, 16, 6144, tie_embeddings=True)
qwen3_4b = _qwen3(36, 2560, 32, 9728, tie_embeddings=True)
qwen3_8b = _qwen3(36, 4096, 32, 12288)
qwen3_14b = _qwen3(40, 5120, 40, 17408)
qwen3_32b = _qwen3(64, 5120, 64, 25600)
qwen3_30b_a3b = _qwen3(48, 2048, 32, 768, num_kv_heads=4, experts=Experts(128, 8))
"""A mixture of 128 experts, of which a token is sent to eight: 3.3e9 of its parameters."""

mixtral_8x7b = DecoderConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    max_position=32768,
    rope_theta=1e6,
    experts=Experts(8, 2),
    dtype="bfloat16",
)
"""Jiang et al. 2024, arXiv 2401.04088, table 1."""

phi4_mini = DecoderConfig(
    vocab_size=200064,
    hidden_size=3072,
    intermediate_size=8192,
    num_layers=32,
    num_heads=24,
    num_kv_heads=8,
    head_dim=128,
    max_position=4096,
    rotary_dim=96,
    tie_embeddings=True,
    dtype="bfloat16",
)
"""Phi-4-mini (arXiv 2503.01743) for texts of up to 4096 tokens, without the divisors of its angles, which are in its
files (`config.LongRopeScaling`)."""

olmo2_7b = DecoderConfig(
    vocab_size=100352,
    hidden_size=4096,
    intermediate_size=11008,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    max_position=4096,
    rope_theta=500000.0,
    norm_eps=1e-6,
    pre_norms=False,
    post_norms=True,
    qk_norm=True,
    qk_norm_whole=True,
    dtype="bfloat16",
)
"""OLMo et al. 2024, arXiv 2501.00656, as released."""

gemma2_2b = DecoderConfig(
    vocab_size=256000,
    hidden_size=2304,
    intermediate_size=9216,
    num_layers=26,
    num_heads=8,
    num_kv_heads=4,
    head_dim=256,
    max_position=8192,
    norm_eps=1e-6,
    tie_embeddings=True,
    sliding_window=4096,
    dtype="bfloat16",
    norm="rms_plus_one",
    activation="gelu_new",
    post_norms=True,
    scale_embeddings=True,
    query_scale=256**-0.5,
    attention_softcap=50.0,
    logit_softcap=30.0,
    global_layers=tuple(range(1, 26, 2)),
)
"""Gemma 2 2B (arXiv 2408.00118, table 1), as released; the table's feed-forward counts gate and up together."""

t5_v1_1_small = _t5_v1_1(512, 1024, 8, 6)
t5_v1_1_base = _t5_v1_1(768, 2048, 12, 12)
t5_v1_1_large = _t5_v1_1(1024, 2816, 24, 16)
t5_v1_1_xl = _t5_v1_1(2048, 5120, 24, 32)
t5_v1_1_xxl = _t5_v1_1(4096, 10240, 24, 64)
"""The target of Leviathan et al. 2022, arXiv 2211.17192; small, base and large are its drafts."""

PRESETS: dict[str, ModelConfig] = {
    "chinchilla_70b": chinchilla_70b,
    "chinchilla_draft_4b": chinchilla_draft_4b,
    "gopher_7b": gopher_7b,
    "gpt2": gpt2,
    "opt_125m": opt_125m,
    "opt_66b": opt_66b,
    "opt_175b": opt_175b,
    "llama3_8b": llama3_8b,
    "llama3_70b": llama3_70b,
    "llama3_2_1b": llama3_2_1b,
    "llama3_2_3b": llama3_2_3b,
    "qwen3_0_6b": qwen3_0_6b,
    "qwen3_1_7b": qwen3_1_7b,
    "qwen3_4b": qwen3_4b,
    "qwen3_8b": qwen3_8b,
    "qwen3_14b": qwen3_14b,
    "qwen3_32b": qwen3_32b,
    "qwen3_30b_a3b": qwen3_30b_a3b,
    "mixtral_8x7b": mixtral_8x7b,
    "phi4_mini": phi4_mini,
    "olmo2_7b": olmo2_7b,
    "gemma2_2b": gemma2_2b,
    "t5_v1_1_small": t5_v1_1_small,
    "t5_v1_1_base": t5_v1_1_base,
    "t5_v1_1_large": t5_v1_1_large,
    "t5_v1_1_xl": t5_v1_1_xl,
    "t5_v1_1_xxl": t5_v1_1_xxl,
}


def get(name: str) -> ModelConfig:
    """The shape of that name.

    Raises:
      ValueError: for an unknown name.
    """
    if name not in PRESETS:
        raise ValueError(f"No preset is named {name!r}: choose one of {', '.join(PRESETS)}.")
    return PRESETS[name]
