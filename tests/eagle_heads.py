"""Random EAGLE heads in the published layouts, and what they compute, written in torch: a reference for test_eagle."""

import functools
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from safetensors import torch as safetensors

from specjax import drafters
from specjax.api.pretrained import Pretrained
from specjax.models import eagle
from specjax.models.config import DecoderConfig
from specjax.models.eagle import EagleConfig
from specjax.types import Block, Inputs, Model

WIDTH, INNER, HEADS, KV_HEADS, HEAD_DIM = 16, 24, 4, 2, 4
VOCAB, KNOWN = 24, 9
LAYERS = 7
"""Of the target, whose width is that of the heads."""

Tensors = dict[str, torch.Tensor]


class Layout(NamedTuple):
    """A published layout.

    Attributes:
      layer: how the names of the layer's tensors begin.
      raw: what `config.json` says.
      file: the name of the weights.
      taps: the hidden states of the target that the head reads, from 0, the embedding.
      version: 1 or 3.
      extra: tensors that only this layout has.
      norm_before_residual: see `EagleConfig`.
      norm_output: see `EagleConfig`.
      theta: the base of the rotary angles.
    """

    layer: str
    raw: dict[str, Any]
    file: str
    taps: tuple[int, ...]
    version: int = 3
    extra: Callable[[], Tensors] = dict
    norm_before_residual: bool = False
    norm_output: bool = False
    theta: float = 10000.0


def _norm(size: int) -> torch.Tensor:
    return 1 + 0.2 * torch.randn(size)


COMMON = {
    "model_type": "llama",
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "num_hidden_layers": 1,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "vocab_size": VOCAB,
    "torch_dtype": "float16",
}

LAYOUTS = {
    # What the published configuration of Llama 3.1 8B leaves out is left out here.
    "EAGLE-3": Layout(
        "midlayer.",
        COMMON
        | {"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": KNOWN, "max_position_embeddings": 2048},
        "pytorch_model.bin",
        (2, LAYERS // 2, LAYERS - 3),
    ),
    "speculators": Layout(
        "layers.0.",
        {
            "architectures": ["Eagle3Speculator"],
            "speculators_model_type": "eagle3",
            "draft_vocab_size": KNOWN,
            "norm_before_residual": True,
            "eagle_aux_hidden_state_layer_ids": [1, 4, 6],
            "transformer_layer_config": COMMON | {"model_type": "qwen3", "head_dim": HEAD_DIM, "rope_theta": 1e6},
        },
        "model.safetensors",
        (1, 4, 6),
        norm_before_residual=True,
        theta=1e6,
        extra=lambda: {
            "embed_tokens.weight": torch.randn(VOCAB, WIDTH),
            "layers.0.self_attn.q_norm.weight": _norm(HEAD_DIM),
            "layers.0.self_attn.k_norm.weight": _norm(HEAD_DIM),
        },
    ),
    "Model-Optimizer": Layout(
        "layers.0.",
        COMMON
        | {
            "draft_vocab_size": KNOWN,
            "max_position_embeddings": 4096,
            "rope_theta": 2e4,
            "head_dim": HEAD_DIM,
            "rope_scaling": {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 64},
            "eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 2, 5], "use_aux_hidden_state": True},
        },
        "model.safetensors",
        (2, 3, 6),
        theta=2e4,
        extra=lambda: {"input_norm.weight": _norm(3 * WIDTH)},
    ),
    "EAGLE-3.1": Layout(
        "midlayer.",
        COMMON | {"draft_vocab_size": KNOWN, "norm_output": True},
        "model.safetensors",
        (2, LAYERS // 2, LAYERS - 3),
        norm_output=True,
        extra=lambda: {f"fc_norm.{i}.weight": _norm(WIDTH) for i in range(3)},
    ),
    "EAGLE": Layout(
        "layers.0.",
        COMMON | {"architectures": ["LlamaForCausalLM"], "max_sequence_length": 2048},
        "pytorch_model.bin",
        (LAYERS,),
        version=1,
        extra=lambda: {"embed_tokens.weight": torch.randn(VOCAB, WIDTH), "fc.bias": 0.3 * torch.randn(WIDTH)},
    ),
}


def tensors_of(layout: Layout, seed: int = 0) -> Tensors:
    """Random tensors under the layout's names."""
    torch.manual_seed(seed)
    reads = WIDTH if layout.version == 1 else 2 * WIDTH
    shapes = {
        "self_attn.q_proj": (HEADS * HEAD_DIM, reads),
        "self_attn.k_proj": (KV_HEADS * HEAD_DIM, reads),
        "self_attn.v_proj": (KV_HEADS * HEAD_DIM, reads),
        "self_attn.o_proj": (WIDTH, HEADS * HEAD_DIM),
        "mlp.gate_proj": (INNER, WIDTH),
        "mlp.up_proj": (INNER, WIDTH),
        "mlp.down_proj": (WIDTH, INNER),
    }
    found = {f"{layout.layer}{name}.weight": 0.4 * torch.randn(shape) for name, shape in shapes.items()}
    found[f"{layout.layer}post_attention_layernorm.weight"] = _norm(WIDTH)
    found["fc.weight"] = 0.3 * torch.randn(WIDTH, 2 * WIDTH if layout.version == 1 else 3 * WIDTH)
    if layout.version == 3:
        found |= {f"{layout.layer}{name}.weight": _norm(WIDTH) for name in ("input_layernorm", "hidden_norm")}
        found |= {"norm.weight": _norm(WIDTH), "lm_head.weight": torch.randn(KNOWN, WIDTH)}
        tokens = np.sort(np.random.default_rng(seed).permutation(VOCAB)[:KNOWN])
        found["d2t"] = torch.tensor(tokens - np.arange(KNOWN))
        found["t2d"] = torch.tensor(np.isin(np.arange(VOCAB), tokens))
    return found | layout.extra()


def save(directory: pathlib.Path, layout: Layout, tensors: Tensors) -> pathlib.Path:
    """Writes a head as it would be published."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(layout.raw))
    if layout.file.endswith(".bin"):
        torch.save(tensors, directory / layout.file)
    else:
        safetensors.save_file({name: x.contiguous() for name, x in tensors.items()}, directory / layout.file)
    return directory


def _rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)


def _rotated(x: torch.Tensor, position: int, layout: Layout) -> torch.Tensor:
    half = x.shape[-1] // 2
    frequencies, scale = layout.theta ** (-torch.arange(half, dtype=torch.float32) / half), 1.0
    if "rope_scaling" in layout.raw:
        from transformers import LlamaConfig
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        rope = layout.raw["rope_scaling"] | {"rope_theta": layout.theta}
        sizes: dict[str, Any] = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "head_dim": HEAD_DIM}
        config = LlamaConfig(**sizes, rope_parameters=rope, max_position_embeddings=4096)
        frequencies, scale = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    angles, (a, b) = position * frequencies, (x[..., :half], x[..., half:])
    return scale * torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], dim=-1)


class Reference:
    """The published computation, one pair of feature and token after the other."""

    def __init__(self, layout: Layout, tensors: Tensors, embeddings: torch.Tensor, head: torch.Tensor):
        """Takes the target's embeddings and output matrix `[V, D]`, for heads without their own."""
        self.layout, self.target_head = layout, head
        self.t = {name.removeprefix(layout.layer): x.float() for name, x in tensors.items()}
        self.embeddings = self.t.get("embed_tokens.weight", embeddings)
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []

    def _attend(self, x: torch.Tensor) -> torch.Tensor:
        place, t = len(self.keys), self.t
        query = (t["self_attn.q_proj.weight"] @ x).reshape(HEADS, HEAD_DIM)
        key = (t["self_attn.k_proj.weight"] @ x).reshape(KV_HEADS, HEAD_DIM)
        if "self_attn.q_norm.weight" in t:
            query, key = (_rms(a, t[f"self_attn.{n}_norm.weight"]) for a, n in ((query, "q"), (key, "k")))
        query, key = (_rotated(a, place, self.layout) for a in (query, key))
        self.keys.append(key)
        self.values.append((t["self_attn.v_proj.weight"] @ x).reshape(KV_HEADS, HEAD_DIM))
        keys, values = (torch.stack(a).repeat_interleave(HEADS // KV_HEADS, dim=1) for a in (self.keys, self.values))
        weights = torch.softmax(torch.einsum("hd,shd->hs", query, keys) / HEAD_DIM**0.5, dim=-1)
        return t["self_attn.o_proj.weight"] @ torch.einsum("hs,shd->hd", weights, values).reshape(-1)

    def step(self, feature: torch.Tensor, token: int, is_own: bool) -> torch.Tensor:
        """The state after one pair: hidden states of the target `[F, D]`, or the state before; and the next token."""
        t, layout, embedding = self.t, self.layout, self.embeddings[token]
        if layout.version == 1:
            x = t["fc.weight"] @ torch.cat([embedding, feature.reshape(-1)]) + t.get("fc.bias", torch.zeros(WIDTH))
            residual = read = x
        else:
            g = feature if is_own else self._fused(feature)
            hidden = _rms(g, t["hidden_norm.weight"])
            read = torch.cat([_rms(embedding, t["input_layernorm.weight"]), hidden])
            residual = hidden if layout.norm_before_residual else g
        x = residual + self._attend(read)
        y = _rms(x, t["post_attention_layernorm.weight"])
        gate = torch.nn.functional.silu(t["mlp.gate_proj.weight"] @ y)
        x = x + t["mlp.down_proj.weight"] @ (gate * (t["mlp.up_proj.weight"] @ y))
        return _rms(x, t["norm.weight"]) if layout.norm_output else x

    def _fused(self, feature: torch.Tensor) -> torch.Tensor:
        if "fc_norm.0.weight" in self.t:
            feature = torch.stack([_rms(x, self.t[f"fc_norm.{i}.weight"]) for i, x in enumerate(feature)])
        x = feature.reshape(-1)
        if "input_norm.weight" in self.t:
            x = _rms(x, self.t["input_norm.weight"])
        return self.t["fc.weight"] @ x

    def logits(self, state: torch.Tensor) -> np.ndarray:
        """`[V]`, -inf for tokens that the head does not know."""
        if self.layout.version == 1:
            return (self.target_head @ state).numpy()
        x = state if self.layout.norm_output else _rms(state, self.t["norm.weight"])
        out = torch.full((VOCAB,), -torch.inf)
        known = self.t["lm_head.weight"] @ x
        for i, offset in enumerate(self.t["d2t"].long().tolist()):
            out[i + offset] = known[i]
        return out.numpy()

    def chain(self, hidden: torch.Tensor, tokens: Sequence[int], drafts: Sequence[int]) -> list[np.ndarray]:
        """The logits after a text, and after each of some drafts behind it.

        Args:
          hidden: `[T, F, D]` the target's hidden states at the tokens of the text.
          tokens: T of them.
          drafts: the draft tokens.
        """
        state = torch.zeros(WIDTH)
        for i in range(1, len(tokens)):
            state = self.step(hidden[i - 1], tokens[i], False)
        found = [self.logits(state)]
        for token in drafts:
            state = self.step(state, token, True)
            found.append(self.logits(state))
        return found


FEATURES = np.random.default_rng(5).normal(size=(4, 3, 8)).astype(np.float32)
"""`[V, F, E]` the hidden states of a tabular target at each of its tokens."""


def on_tables(target: Model) -> tuple[Model, Pretrained, drafters.EagleHead]:
    """A tabular target of four tokens that has hidden states, and a random EAGLE-3 head that drafts three of them."""

    def seen(tokens: Any) -> Any:
        return jnp.take(FEATURES, jnp.clip(tokens, 0, 3), axis=0)

    def prefill(params: Any, inputs: Inputs, cache: Any) -> Any:
        output, cache = target.prefill(params, inputs, cache)
        return output._replace(features=seen(inputs.tokens)), cache

    def apply(params: Any, block: Block, cache: Any) -> Any:
        output, cache = target.apply(params, block, cache)
        return output._replace(features=seen(block.tokens)), cache

    model = target._replace(prefill=prefill, apply=apply)
    shape = DecoderConfig(4, 8, 8, 2, 1, 1, 4, max_position=target.max_len)
    return model, Pretrained(model, None, None, shape), _small_head()


@functools.cache
def _small_head() -> drafters.EagleHead:
    layer = DecoderConfig(3, 8, 8, 1, 2, 1, 4, max_position=64)
    config = EagleConfig(layer, (0, 1, 2), 8, num_embeddings=4)
    params = jax.tree.map(lambda x: 15 * x if x.ndim > 1 else x, eagle.initial(config, jax.random.key(0)))
    return drafters.EagleHead(config, params, np.asarray([0, 1, 3], np.int32))
