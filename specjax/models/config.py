"""The shapes of models, apart from their weights."""

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


ACTIVATIONS = ("relu", "gelu", "gelu_new", "silu")
"""What T5's feed-forward may compute: "gelu" is the exact one, "gelu_new" its approximation by tanh."""


@dataclasses.dataclass(frozen=True)
class T5Config:
    """An encoder-decoder of the T5 family: T5 (arXiv 1910.10683), T5 v1.1, Flan-T5, mT5 and umT5.

    `bias_per_layer` gives every layer relative positions of its own (umT5), where T5's layers share the first's.
    `scale_outputs` divides the decoder's last hidden state by the root of the width before the head (T5 v1.0). `dtype`
    is as in `DecoderConfig`.
    """

    vocab_size: int
    hidden_size: int
    head_dim: int
    intermediate_size: int
    num_encoder_layers: int
    num_layers: int
    num_heads: int
    num_buckets: int = 32
    max_distance: int = 128
    norm_eps: float = 1e-6
    activation: str = "relu"
    gated: bool = False
    tie_embeddings: bool = True
    scale_outputs: bool = True
    bias_per_layer: bool = False
    start_token: int = 0
    dtype: str = "float32"

    def __post_init__(self):
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation={self.activation!r}: choose one of {', '.join(ACTIVATIONS)}.")
        if self.num_buckets < 4 or self.num_buckets % 4 or self.max_distance <= self.num_buckets // 2:
            raise ValueError(
                f"num_buckets={self.num_buckets} and max_distance={self.max_distance}: the buckets are halved twice, "
                "and the greatest distance has to lie beyond those that have a bucket of their own."
            )
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype={self.dtype!r}: choose 'float32' or 'bfloat16'.")


ModelConfig = DecoderConfig | T5Config
"""The shape of any model that specjax computes."""
