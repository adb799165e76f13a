"""A head over the target's hidden states, which predicts the token after the next.

EAGLE (Li et al. 2024, arXiv 2401.15077) with the fused features of EAGLE-3 (Li et al. 2025, arXiv 2503.01840). At the
token of position i, the head sees the target's hidden states at position i - 1, from several layers, and the embedding
of the token itself, which the target has written but not read yet. One transformer layer of its own attends to these
pairs, and gives an estimate of the target's last hidden state at position i. The target's own output matrix, cut to the
rows of frequent tokens, makes logits of it. Further tokens are drafted with the estimate in the place of the hidden
states.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from specjax.models import decoder, layers, linear, modules
from specjax.models.attention_choice import Seen
from specjax.models.config import DecoderConfig
from specjax.parallel import sharding
from specjax.types import Tree


@dataclasses.dataclass(frozen=True)
class FeatureHeadConfig:
    """The shape of a head.

    Attributes:
      layer: that of its layer; `vocab_size` is the number of tokens that it can draft, `hidden_size` the target's.
      taps: the hidden states of the target that it reads (`types.Model.with_taps`).
    """

    layer: DecoderConfig
    taps: tuple[int, ...]


class FeatureHead(nnx.Module):
    """The input maps and the layer. `features` and `state` map to the same width: a row has the one or the other."""

    sees_first = True
    """Tokens attend to the first token of a text, whose feature is zero."""

    def __init__(self, config: FeatureHeadConfig, rules: sharding.Rules, rngs: nnx.Rngs):
        """Declares the parameters."""
        c = config.layer
        width, zeros = c.hidden_size, nnx.initializers.zeros_init()
        self.config = config
        self.features = linear.Matrix(rngs, (len(config.taps) * width, width), ("features", "embed"), c.dtype)
        self.state = linear.Matrix(rngs, (width, width), ("features", "embed"), c.dtype)
        self.token = linear.Matrix(rngs, (width, width), ("features", "embed"), c.dtype)
        self.bias = modules.parameter(rngs, (width,), ("embed",), c.dtype, init=zeros)
        self.layer = layers.Layer(c, rules, rngs)

    def combine(
        self, seen: Float[Array, "B T *F D"], embedding: Float[Array, "B T D"], *, is_own: bool
    ) -> Float[Array, "B T D"]:
        """The layer's input: what came before each token, and its embedding.

        Args:
          seen: the target's hidden states `[B, T, F, D]`, or the head's own estimates `[B, T, D]`.
          embedding: of the tokens.
          is_own: which of them `seen` is.
        """
        before = self.state(seen) if is_own else self.features(flatten(seen))
        return before + self.token(normed(embedding)) + self.bias[...].astype(jnp.float32)

    def step(
        self,
        seen: Float[Array, "B T *F D"],
        embedding: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        mask: Bool[Array, "B T S"],
        keys: Float[Array, "B H S E"],
        values: Float[Array, "B H S E"],
        start: Int[Array, " B"] | None,
        *,
        is_own: bool,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B H S E"], Float[Array, "B H S E"]]:
        """The head at some tokens: its estimates of the target's last hidden states, its keys and values.

        The arguments are those of `eagle.EagleHead.step`.
        """
        angles = positions[:, :, None] * layers.rope_frequencies(self.config.layer)
        x = self.combine(seen, embedding, is_own=is_own)
        view = layers.View((jnp.cos(angles), jnp.sin(angles)), Seen(mask))
        return self.layer(x, view, keys, values, start)

    def logits(self, state: Float[Array, "B T D"], rows: Float[Array, "W D"]) -> Float[Array, "B T W"]:
        """The logits of the tokens whose rows of the target's output matrix these are."""
        return linear.product(state, rows if linear.outputs_first(rows.dtype) else rows.T)


def normed(x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """A root-mean-square norm without a scale: the map that follows has one."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def flatten(features: Float[Array, "B T F D"]) -> Float[Array, "B T _"]:
    """The hidden states of all taps of a token, each normed, in one vector."""
    return normed(features.astype(jnp.float32)).reshape(*features.shape[:2], -1)


def bind(config: FeatureHeadConfig, params: Tree) -> FeatureHead:
    """The head with these parameters."""
    return modules.merge(FeatureHead, config, sharding.RULES, params)


def initial(config: FeatureHeadConfig, key: jax.Array) -> Tree:
    """Random parameters; the layer's outputs are zero, so that it begins as the identity."""
    params = modules.initial(FeatureHead, config, key)
    for part, name in (("attention", "out"), ("mlp", "down")):
        matrix = params["layer"][part][name]
        matrix["values"] = jnp.zeros_like(matrix["values"])
    return params


def cast(config: FeatureHeadConfig, params: Tree, dtype: str) -> tuple[FeatureHeadConfig, Tree]:
    """The same head in another dtype, which may store its matrices in another order."""
    axes, inputs = (modules.metadata(FeatureHead, config, name) for name in ("axes", "num_contracted"))
    layer = dataclasses.replace(config.layer, dtype=dtype)
    return dataclasses.replace(config, layer=layer), linear.cast(params, axes, inputs, config.layer.dtype, dtype)


def embed(config: DecoderConfig, params: Tree, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """The target's embeddings of tokens, without any learned positions."""
    target = modules.merge(decoder.module(config), config, sharding.RULES, params)
    return target.head.look_up(tokens) if config.tie_embeddings else linear.look_up(target.embedding[...], tokens)


def output_rows(config: DecoderConfig, params: Tree, tokens: Int[np.ndarray, " W"]) -> Float[Array, "W D"]:
    """The rows of the target's output matrix for these tokens, in the target's dtype."""
    target = modules.merge(decoder.module(config), config, sharding.RULES, params)
    return target.head.look_up(jnp.asarray(tokens)[None])[0].astype(config.dtype)


def target_logits(config: DecoderConfig, params: Tree, state: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
    """The logits that the target's own output matrix makes of estimates of its last hidden states."""
    return modules.merge(decoder.module(config), config, sharding.RULES, params).logits(state)
