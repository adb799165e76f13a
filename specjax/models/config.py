"""The shapes of models, apart from their weights."""

import dataclasses
import itertools
import types
import typing
from collections.abc import Sequence
from typing import Any, ClassVar

from specjax.limits import check_flag, check_number, check_size
from specjax.models.quantisation import Quantisation

DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Llama3RopeScaling:
    """Llama 3.1's stretching of the low rotary frequencies (Grattafiori et al. 2024, arXiv 2407.21783, §3.4.1)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int

    def __post_init__(self):
        for name in ("factor", "low_freq_factor", "high_freq_factor"):
            check_number(name, getattr(self, name))
        check_size("original_max_position", self.original_max_position)
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor={self.low_freq_factor} is not below high_freq_factor={self.high_freq_factor}: the "
                "frequencies between them are stretched in part."
            )


@dataclasses.dataclass(frozen=True)
class LinearRopeScaling:
    """All positions divided by a factor (position interpolation, arXiv 2306.15595)."""

    factor: float

    def __post_init__(self):
        check_number("factor", self.factor)


@dataclasses.dataclass(frozen=True)
class LongRopeScaling:
    """LongRoPE (Ding et al. 2024, arXiv 2402.13753), as Phi-3 and Phi-4-mini have it: a divisor for each angle.

    There are two sets of divisors. transformers takes the long one from the moment that a text grows beyond
    `original_max_position`, so that the keys it has cached are not those of a fresh prefill. Here the set is that of
    `DecoderConfig.max_position`, for texts of all lengths.

    Attributes:
      short: the divisors of models whose `max_position` is at most `original_max_position`.
      long: those of the others.
      original_max_position: the length of the texts of the first training.
      attention_factor: what cosine and sine are multiplied by.
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    original_max_position: int
    attention_factor: float = 1.0

    def __post_init__(self):
        check_size("original_max_position", self.original_max_position)
        check_number("attention_factor", self.attention_factor)
        for name in ("short", "long"):
            for value in getattr(self, name):
                check_number(f"{name} factor", value)


RopeScaling = Llama3RopeScaling | LinearRopeScaling | LongRopeScaling


@dataclasses.dataclass(frozen=True)
class Experts:
    """A mixture of experts (Shazeer et al. 2017, arXiv 1701.06538): feed-forwards of which each token is sent to a few.

    A router gives every token a distribution over the experts; the most probable ones read it, and their outputs are
    added up, each times its probability.

    Attributes:
      number: how many experts a layer has.
      chosen: how many of them read a token.
      renormalise: whether the probabilities of the chosen ones are divided by their sum.
    """

    number: int
    chosen: int
    renormalise: bool = True

    def __post_init__(self):
        check_size("experts.number", self.number, high=LIMITS["num_experts"])
        check_size("experts.chosen", self.chosen, high=LIMITS["num_experts"])
        check_flag("experts.renormalise", self.renormalise)
        if self.chosen > self.number:
            raise ValueError(
                f"experts.chosen={self.chosen}: a layer has {self.number} experts; choose at most as many."
            )


ACTIVATIONS = ("relu", "gelu", "gelu_new", "silu")
"""The activations of a feed-forward: "gelu" is the exact one, "gelu_new" its approximation by tanh."""

POSITIONS = ("rotary", "learned")
"""How a decoder encodes positions: it rotates queries and keys, or adds a learned table to the embeddings."""

ATTENTIONS = ("auto", "einsum", "kernel")
"""How a decoder attends to its cache: by XLA's products, or on TPUs and CUDA GPUs by a kernel; "auto" is either."""

NORMS = ("rms", "rms_plus_one", "layer")
"""What a decoder normalises by: the root mean square (times w, or times 1 + w), or LayerNorm with a bias."""


LIMITS = {
    "vocab_size": 2**24,
    "hidden_size": 2**20,
    "intermediate_size": 2**22,
    "num_layers": 2**12,
    "num_encoder_layers": 2**12,
    "num_heads": 2**14,
    "num_kv_heads": 2**14,
    "head_dim": 2**14,
    "max_position": 2**31 - 1,
    "rotary_dim": 2**14,
    "sliding_window": 2**31 - 1,
    "num_buckets": 2**16,
    "max_distance": 2**31 - 1,
    "num_experts": 2**14,
}
"""The largest value of each size; every published model is far below. All are at least 1."""


def _check_fields(config: Any) -> None:
    """Checks that every field has its declared type: a size within `LIMITS`, a finite number, True or False."""
    for field in dataclasses.fields(config):
        name, value = field.name, getattr(config, field.name)
        kinds = typing.get_args(field.type) if isinstance(field.type, types.UnionType) else (field.type,)
        if value is None and types.NoneType in kinds:
            continue
        if name in LIMITS:
            check_size(name, value, high=LIMITS[name])
        elif bool in kinds:
            check_flag(name, value)
        elif float in kinds:
            check_number(name, value, positive=name != "norm_eps")
        elif int in kinds:
            check_size(name, value, low=0)


def _check_head(config: Any) -> None:
    """Checks the tokens of a reduced head."""
    tokens = config.head_tokens
    if not tokens:
        return
    if any(a >= b for a, b in itertools.pairwise(tokens)) or tokens[0] < 0 or tokens[-1] >= config.vocab_size:
        raise ValueError(
            f"head_tokens has {len(tokens)} entries from {tokens[0]} to {tokens[-1]}: ids below "
            f"vocab_size={config.vocab_size}, in ascending order, each once."
        )
    if config.tie_embeddings:
        raise ValueError("tie_embeddings=True: a head of some tokens is no table of all embeddings; set it False.")


def _check_parts(config: "DecoderConfig") -> None:
    """Checks the switches of a decoder that depend on each other."""
    c = config
    if c.qk_norm_whole and not c.qk_norm:
        raise ValueError("qk_norm_whole=True says how queries and keys are normed: set qk_norm=True too.")
    if not c.pre_norms and (c.parallel or not c.post_norms):
        raise ValueError(
            f"pre_norms=False with post_norms={c.post_norms} and parallel={c.parallel}: a block without norms of its "
            "inputs has norms of its outputs, and no parallel parts."
        )
    if c.experts and (c.mlp_bias or (c.quantisation and c.quantisation.activations)):
        raise ValueError(
            f"experts={c.experts} with mlp_bias={c.mlp_bias} and quantisation={c.quantisation}: experts have no "
            "biases, and their activations are not rounded; choose a quantisation without '+int8'."
        )
    if isinstance(scaling := c.rope_scaling, LongRopeScaling):
        for name in ("short", "long"):
            if (number := len(getattr(scaling, name))) != c.rotated // 2:
                raise ValueError(
                    f"rope_scaling.{name} has {number} factors, but there are {c.rotated // 2} rotary angles: "
                    "one factor for each."
                )


def _check_mask(config: Any) -> None:
    """Checks that a mask has an embedding."""
    if config.mask_token is not None and config.mask_token >= config.vocab_size:
        raise ValueError(
            f"mask_token={config.mask_token}: an id of the vocabulary, below vocab_size={config.vocab_size}."
        )


def _one_of(config: object, **choices: Sequence[str]) -> None:
    for name, known in choices.items():
        if (value := getattr(config, name)) not in known:
            raise ValueError(f"{name}={value!r}: choose one of {', '.join(known)}.")


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only model; the defaults of the switches are those of the Llama family.

    `presets` has published shapes. specjax loads Llama, SmolLM2, Mistral, Mixtral, Qwen2/2.5, Qwen3 with and without
    experts, Phi-3 and 4, OLMo 2, Gemma 2 and 3, GPT-2, GPT-J, OPT and GPTBigCode; a Chinchilla is `gated=False,
    activation="gelu"` without biases.

    Attributes:
      vocab_size: the width of the logits.
      hidden_size: the width of the residual stream.
      intermediate_size: the inner width of the feed-forward, or of each expert.
      num_layers: the number of blocks.
      num_heads: the number of query heads.
      num_kv_heads: the number of key/value heads; 1 is multi-query attention (arXiv 1911.02150).
      head_dim: the width of a head.
      max_position: the longest sequence; for learned positions, the length of their table.
      rope_theta: the base of the rotary angles.
      rope_scaling: how the rotary angles are stretched.
      norm_eps: what norms add to the variance.
      tie_embeddings: whether the head is the embedding table.
      qkv_bias: whether queries, keys and values have biases.
      output_bias: whether attention's output has one.
      mlp_bias: whether the feed-forward has biases.
      sliding_window: how many tokens, itself and those before it, a token attends to; None for all.
      dtype: that of weights, matrix products and cache, "float32" or "bfloat16"; the residual stream, the softmaxes and
        the logits are float32 in both.
      positions: one of `POSITIONS`.
      rotary_dim: how many of a head's first dimensions are rotated; None for all.
      norm: one of `NORMS`.
      activation: one of `ACTIVATIONS`.
      gated: whether the feed-forward is `down(activation(gate(x)) * up(x))`, else `down(activation(up(x)))`.
      parallel: whether attention and feed-forward read the same normed input (GPT-J), else one after the other.
      pre_norms: whether the inputs of a block's two parts are normed; False needs `post_norms` (OLMo 2).
      post_norms: whether the outputs of a block's two parts are normed, before they are added (Gemma, OLMo 2).
      qk_norm: whether queries and keys are normed, head by head, before they are rotated (Gemma 3, Qwen3).
      qk_norm_whole: whether that norm is one over all heads, with a scale for each of them (OLMo 2).
      head_bias: whether the head has a bias.
      scale_embeddings: whether embeddings are multiplied by the root of `hidden_size`, rounded to `dtype` (Gemma).
      query_scale: what queries are multiplied by; None for `head_dim ** -0.5`.
      attention_softcap: c of the `c tanh(x / c)` that bounds attention's scores (Gemma 2); None for no bound.
      logit_softcap: the same bound for the logits.
      global_layers: the layers, counted from 0, without the sliding window.
      experts: the mixture of experts in the place of every layer's feed-forward; None for no mixture.
      local_rope_theta: the base of the unstretched rotary angles of layers with a window (Gemma 3); None for the same
        angles as in the other layers.
      quantisation: how the layers' matrices are stored in eight or four bits (`families.quantise`); everything else
        stays in `dtype`. None: in `dtype` too. A quantised model is not trained.
      head_quantisation: the same for the head, which is the embedding table of a tied model.
      head_tokens: the tokens that the head computes logits of, in ascending order; all others are never written (see
        `layers.all_logits`). Empty for all tokens. For drafts, whose head may be most of their cost.
      mask_token: the id of the vocabulary that stands for a token to come, which the model was trained to read so
        (`drafters.pard`); None: there is none.
      attention: how it attends to its cache, one of `ATTENTIONS`; "auto" chooses one by how much a call reads
        (`attention_choice.choose`).
      scan_layers: whether one layer's program is compiled and run for every layer, on stacked parameters
        (`families.stack_layers`); else every layer is compiled. The text is the same; compilation takes less time, a
        step takes more (docs/results/layers.md).
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
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    dtype: str = "float32"
    positions: str = "rotary"
    rotary_dim: int | None = None
    norm: str = "rms"
    activation: str = "silu"
    gated: bool = True
    parallel: bool = False
    pre_norms: bool = True
    post_norms: bool = False
    qk_norm: bool = False
    qk_norm_whole: bool = False
    head_bias: bool = False
    scale_embeddings: bool = False
    query_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    global_layers: tuple[int, ...] = ()
    local_rope_theta: float | None = None
    experts: Experts | None = None
    quantisation: Quantisation | None = None
    head_quantisation: Quantisation | None = None
    head_tokens: tuple[int, ...] = ()
    mask_token: int | None = None
    attention: str = "einsum"
    scan_layers: bool = False

    start_token: ClassVar[None] = None

    def __post_init__(self):
        _check_fields(self)
        _check_head(self)
        _check_mask(self)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}: "
                "every key/value head serves the same number of query heads."
            )
        _one_of(self, dtype=DTYPES, positions=POSITIONS, norm=NORMS, activation=ACTIVATIONS, attention=ATTENTIONS)
        if self.positions == "rotary" and (self.rotated % 2 or not 0 < self.rotated <= self.head_dim):
            raise ValueError(
                f"rotary_dim={self.rotary_dim} with head_dim={self.head_dim}: an even number of a head's dimensions is "
                "rotated."
            )
        if self.sliding_window is None and (self.global_layers or self.local_rope_theta is not None):
            raise ValueError(
                f"global_layers={self.global_layers} and local_rope_theta={self.local_rope_theta} tell layers with a "
                "window from those without, but sliding_window is None: set it, or leave them out."
            )
        _check_parts(self)
        layers = range(self.num_layers)
        if not all(isinstance(layer, int) and layer in layers for layer in self.global_layers):
            raise ValueError(f"global_layers={self.global_layers}: the {self.num_layers} layers are counted from 0.")

    @property
    def head_size(self) -> int:
        """How many logits the head computes."""
        return len(self.head_tokens) or self.vocab_size

    @property
    def rotated(self) -> int:
        """How many dimensions of a head are rotated."""
        return self.head_dim if self.rotary_dim is None else self.rotary_dim

    def is_windowed(self, layer: int) -> bool:
        """Whether a layer attends to the last `sliding_window` tokens only."""
        return self.sliding_window is not None and layer not in self.global_layers


@dataclasses.dataclass(frozen=True)
class T5Config:
    """An encoder-decoder of the T5 family: T5 (arXiv 1910.10683), T5 v1.1, Flan-T5, mT5 and umT5.

    `bias_per_layer` gives every layer its own relative position bias (umT5), where T5's layers share the first's.
    `scale_outputs` divides the decoder's last hidden state by the root of the width before the head (T5 v1.0). `dtype`,
    `quantisation`, `head_quantisation`, `head_tokens` and `mask_token` are as in `DecoderConfig`. With `copy_source`,
    `mask_token` reads a copy of the source in the place of its embedding, as SpecDec's does (`relative.copied`).
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
    quantisation: Quantisation | None = None
    head_quantisation: Quantisation | None = None
    head_tokens: tuple[int, ...] = ()
    mask_token: int | None = None
    copy_source: bool = False

    attention: ClassVar[str] = "einsum"
    scan_layers: ClassVar[bool] = False

    def __post_init__(self):
        _check_fields(self)
        _check_head(self)
        _check_mask(self)
        if self.copy_source and self.mask_token is None:
            raise ValueError("copy_source=True: it is mask_token that reads a copy, and it is None; give its id.")
        _one_of(self, dtype=DTYPES, activation=ACTIVATIONS)
        if self.num_buckets < 4 or self.num_buckets % 4 or self.max_distance <= self.num_buckets // 2:
            raise ValueError(
                f"num_buckets={self.num_buckets} and max_distance={self.max_distance}: the buckets are halved twice, "
                "and the greatest distance has to be larger than those that have a bucket of their own."
            )

    @property
    def head_size(self) -> int:
        """How many logits the head computes."""
        return len(self.head_tokens) or self.vocab_size


ModelConfig = DecoderConfig | T5Config
"""The shape of any model that specjax computes."""
