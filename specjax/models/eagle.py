"""The published heads over a target's hidden states: EAGLE and EAGLE-2 (version 1), and EAGLE-3 (version 3).

At the token of position i, a head reads the target's hidden states at position i - 1 and the embedding of the token
itself, which the target has written but not read yet, and predicts the token of position i + 1.

- EAGLE (Li et al. 2024, arXiv 2401.15077, section 4.1; EAGLE-2, arXiv 2406.16858, has the same head): one feature, the
  last hidden state. `fc` maps embedding and feature to the input of a layer without a norm before its attention. The
  layer's output estimates the next feature, of which the target's own output matrix makes logits.
- EAGLE-3 (Li et al. 2025, arXiv 2503.01840, section 3.1): the hidden states of several layers, which `fc` maps to one
  vector g. One layer's attention reads the norms of the embedding and of g side by side; its residual stream is g. A
  norm and an output matrix of the head's own, of a reduced vocabulary, make logits of the layer's output.

Further tokens are drafted with the layer's output in the place of the feature, or of g.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from specjax.models import layers, linear, modules
from specjax.models.attention_choice import Seen
from specjax.models.config import DecoderConfig
from specjax.parallel import sharding
from specjax.types import Tree


@dataclasses.dataclass(frozen=True)
class YarnScaling:
    """A stretching of the rotary angles, with which Model-Optimizer exports heads (YaRN, Peng et al. 2023, 2309.00071).

    Attributes:
      factor: by how much the slow angles are stretched.
      original_max_position: the longest sequence in training, in tokens.
      beta_fast: angles that turn more often than this over that length are kept.
      beta_slow: angles that turn less often than this are stretched whole; those between, in part.
      attention_factor: what queries and keys are multiplied by; None for 0.1 ln(factor) + 1.
    """

    factor: float
    original_max_position: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None

    @property
    def scale(self) -> float:
        """What queries and keys are multiplied by."""
        return 0.1 * math.log(self.factor) + 1.0 if self.attention_factor is None else self.attention_factor

    def stretched(self, frequencies: Float[Array, " half"], theta: float) -> Float[Array, " half"]:
        """The angles per position, from those of the base theta."""
        half = len(frequencies)

        def place(turns: float) -> float:
            """The index of the angle that turns so often over the original length."""
            return half * math.log(self.original_max_position / (turns * 2 * math.pi)) / math.log(theta)

        low = max(math.floor(place(self.beta_fast)), 0)
        high = min(math.ceil(place(self.beta_slow)), 2 * half - 1)
        ramp = jnp.clip((jnp.arange(half) - low) / (high - low if high != low else 0.001), 0.0, 1.0)
        return frequencies * (1.0 - ramp + ramp / self.factor)


@dataclasses.dataclass(frozen=True)
class EagleConfig:
    """The shape of a head.

    Attributes:
      layer: that of its layer, with the head's own rotary base; `vocab_size` is the number of tokens that it can draft.
      taps: the hidden states of the target that it reads (`types.Model.with_taps`), in the order of `fc`'s inputs.
      target_size: the width of these.
      version: 1 for EAGLE and EAGLE-2, 3 for EAGLE-3.
      num_embeddings: the rows of an embedding table of its own; 0: it reads the target's.
      own_head: whether it has an output matrix of its own; else the target's is used.
      fc_bias: whether `fc` has a bias.
      norm_before_residual: version 3: whether the residual stream begins with the norm of g (speculators).
      norm_before_fc: version 3: whether the concatenated hidden states are normed before `fc`.
      norm_features: version 3: whether each of the hidden states is normed before `fc`.
      norm_output: version 3: whether the next token is drafted from the normed output of the layer.
      yarn: how its rotary angles are stretched, in the place of `layer.rope_scaling`; None: they are not.
    """

    layer: DecoderConfig
    taps: tuple[int, ...]
    target_size: int
    version: int = 3
    num_embeddings: int = 0
    own_head: bool = True
    fc_bias: bool = False
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    norm_features: bool = False
    norm_output: bool = False
    yarn: YarnScaling | None = None

    def __post_init__(self):
        if self.version not in (1, 3):
            raise ValueError(f"version={self.version}: 1 for EAGLE and EAGLE-2, 3 for EAGLE-3.")
        if self.version == 1 and (len(self.taps) != 1 or self.target_size != self.layer.hidden_size):
            raise ValueError(
                f"taps={self.taps} of width {self.target_size}: EAGLE reads one hidden state, of its own width "
                f"{self.layer.hidden_size}; version 3 reads others."
            )

    @property
    def fc_inputs(self) -> int:
        """The width of what `fc` reads."""
        return 2 * self.layer.hidden_size if self.version == 1 else len(self.taps) * self.target_size


class EagleHead(nnx.Module):
    """The head's layer, and what makes its input and its logits."""

    sees_first = False
    """The first token of a text has no feature before it: it makes no pair that others attend to."""

    def __init__(self, config: EagleConfig, rules: sharding.Rules, rngs: nnx.Rngs):
        """Declares the parameters."""
        c, width = config.layer, config.layer.hidden_size
        ones = nnx.initializers.ones_init()
        self.config, self.rules = config, rules
        self.fc = linear.Matrix(rngs, (config.fc_inputs, width), (None, "embed"), c.dtype)
        if config.fc_bias:
            self.fc_bias = modules.parameter(rngs, (width,), ("embed",), c.dtype, init=nnx.initializers.zeros_init())
        self.attention = layers.Attention(c, rules, rngs, inputs=width if config.version == 1 else 2 * width)
        self.mlp = layers.FeedForward(c, rngs)
        names = ("mlp_norm",) if config.version == 1 else ("mlp_norm", "embedding_norm", "hidden_norm", "norm")
        for name in names:
            layers.declare_norm(self, name, c, rngs)
        if config.norm_before_fc:
            self.input_norm = modules.parameter(rngs, (config.fc_inputs,), (None,), c.dtype, init=ones)
        if config.norm_features:
            shape = (len(config.taps), config.target_size)
            self.feature_norms = modules.parameter(rngs, shape, (None, None), c.dtype, init=ones)
        if config.num_embeddings:
            self.embedding = modules.parameter(rngs, (config.num_embeddings, width), ("vocab", "embed"), c.dtype)
        if config.own_head:
            self.head = linear.Matrix(rngs, (width, c.vocab_size), ("embed", "vocab"), c.dtype)

    def fuse(self, features: Float[Array, "B T F E"]) -> Float[Array, "B T D"]:
        """The vector g of the target's hidden states (EAGLE-3)."""
        c = self.config
        if c.norm_features:
            features = layers.rms_norm(features, self.feature_norms[...], c.layer.norm_eps)
        x = features.reshape(*features.shape[:2], -1)
        if c.norm_before_fc:
            x = layers.rms_norm(x, self.input_norm[...], c.layer.norm_eps)
        return self._biased(self.fc(x))

    def _biased(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return x + self.fc_bias[...].astype(jnp.float32) if self.config.fc_bias else x

    def step(
        self,
        seen: Float[Array, "B T *F E"],
        embedding: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        mask: Bool[Array, "B T S"],
        keys: Float[Array, "B H S W"],
        values: Float[Array, "B H S W"],
        start: Int[Array, " B"] | None,
        *,
        is_own: bool,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B H S W"], Float[Array, "B H S W"]]:
        """The head at some tokens: what the next ones are drafted from, and its keys and values.

        Args:
          seen: the target's hidden states at the token before each, `[B, T, F, E]`, or the head's own states there,
            `[B, T, D]`.
          embedding: of the tokens.
          positions: of the tokens in the text.
          mask: which entries each attends to.
          keys: those of the tokens before, `S` of them at most.
          values: of the same shape.
          start: where each row's new entries begin; None: at 0.
          is_own: whether `seen` are the head's own states.
        """
        c, layer = self.config, self.config.layer
        if c.version == 1:
            feature = seen if is_own else seen[:, :, 0]
            residual = read = self._biased(self.fc(jnp.concatenate([embedding, feature], axis=-1)))
        else:
            residual = seen if is_own else self.fuse(seen)
            hidden = layers.normalize(self, "hidden_norm", layer, residual)
            read = jnp.concatenate([layers.normalize(self, "embedding_norm", layer, embedding), hidden], axis=-1)
            residual = hidden if c.norm_before_residual else residual
        view = layers.View(self._rope(positions), Seen(mask))
        mixed, keys, values = self.attention(read, view, keys, values, start)
        x = residual + mixed
        x = x + self.mlp(layers.normalize(self, "mlp_norm", layer, x))
        return layers.normalize(self, "norm", layer, x) if c.norm_output else x, keys, values

    def _rope(self, positions: Int[Array, "B T"]) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
        """Cosine and sine of the angles of tokens at these positions, times the factor of `yarn`."""
        layer, yarn = self.config.layer, self.config.yarn
        frequencies = layers.rope_frequencies(layer)
        if yarn is not None:
            frequencies = yarn.stretched(frequencies, layer.rope_theta)
        # The pairs of feature and token are counted from the first: that of the token of position 1.
        angles = (positions - 1)[:, :, None] * frequencies
        scale = 1.0 if yarn is None else yarn.scale
        return scale * jnp.cos(angles), scale * jnp.sin(angles)

    def before_head(self, state: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """What the output matrix reads of the states that `step` gives."""
        if self.config.version == 1 or self.config.norm_output:
            return state
        return layers.normalize(self, "norm", self.config.layer, state)

    def logits(self, state: Float[Array, "B T D"], rows: Float[Array, "W D"] | None = None) -> Float[Array, "B T W"]:
        """The logits of the tokens that the head can draft, by its own output matrix or by these rows of another."""
        x = self.before_head(state)
        if self.config.own_head:
            return self.head(x)
        assert rows is not None
        return x @ rows.astype(jnp.float32).T


def bind(config: EagleConfig, params: Tree, rules: sharding.Rules = sharding.RULES) -> EagleHead:
    """The head with these parameters."""
    return modules.merge(EagleHead, config, rules, params)


def initial(config: EagleConfig, key: jax.Array) -> Tree:
    """Random parameters."""
    return modules.initial(EagleHead, config, key)


def cast(config: EagleConfig, params: Tree, dtype: str) -> tuple[EagleConfig, Tree]:
    """The same head in another dtype, which may store its matrices in another order."""
    axes, inputs = (modules.metadata(EagleHead, config, name) for name in ("axes", "num_contracted"))
    layer = dataclasses.replace(config.layer, dtype=dtype)
    return dataclasses.replace(config, layer=layer), linear.cast(params, axes, inputs, config.layer.dtype, dtype)


def default_taps(num_layers: int) -> tuple[int, ...]:
    """The hidden states that EAGLE-3 reads of a target with so many layers: the inputs of layers 2, L / 2 and L - 3."""
    return (2, num_layers // 2, num_layers - 3)


def like(target: DecoderConfig, taps: tuple[int, ...], vocab_size: int = 0, *, version: int = 3) -> EagleConfig:
    """A head in the published form whose layer has the sizes of one of the target's: its own rotary base, no biases.

    The published head of Llama 3.1 8B is one, with 32000 tokens. Of a target with experts it has the width of one.

    Args:
      target: the shape of the target, whose dtype is the head's.
      taps: the hidden states that it reads; version 1 reads one.
      vocab_size: version 3: how many tokens it can draft, by an output matrix of its own; 0: all of the target's.
        Version 1 has none, and drafts all by the target's.
      version: 1 for EAGLE and EAGLE-2, 3 for EAGLE-3.
    """
    layer = DecoderConfig(
        (vocab_size if version == 3 else 0) or target.vocab_size,
        target.hidden_size,
        target.intermediate_size,
        1,
        target.num_heads,
        target.num_kv_heads,
        target.head_dim,
        target.max_position,
        norm_eps=target.norm_eps,
        dtype=target.dtype,
    )
    return EagleConfig(layer, taps, target.hidden_size, version, own_head=version == 3, fc_bias=version == 1)


def offsets(tokens: Int[np.ndarray, " W"]) -> Int[np.ndarray, " W"]:
    """`d2t`: how much larger the id of each token of the head is for the target."""
    return tokens.astype(np.int64) - np.arange(len(tokens))


def token_ids(d2t: Int[np.ndarray, " W"]) -> Any:
    """The target's ids of the tokens of a head, from `d2t`."""
    return d2t.astype(np.int64) + np.arange(len(d2t))
