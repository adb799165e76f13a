"""The shape of a decoder-only model, apart from its weights."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Llama3RopeScaling:
    """Llama 3.1's stretching of the low rotary frequencies (Grattafiori et al. 2024, arXiv 2407.21783, §3.4.1)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclasses.dataclass(frozen=True)
class LinearRopeScaling:
    """All positions divided by a factor (position interpolation, arXiv 2306.15595)."""

    factor: float


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A decoder of the Llama family (Llama, SmolLM2, Mistral) or of Qwen2/2.5.

    `dtype` is that of weights, matrix products and cache: "float32" or "bfloat16"; the residual stream, the
    softmaxes and the logits are float32 in both. `sliding_window` limits attention to that many last tokens.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    rope_theta: float = 10000.0
    rope_scaling: Llama3RopeScaling | LinearRopeScaling | None = None
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    dtype: str = "float32"

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}: "
                "every key/value head serves the same number of query heads."
            )
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype={self.dtype!r}: choose 'float32' or 'bfloat16'.")
