"""Heads that predict several tokens in parallel from one hidden state of a target.

At a token of position i, whose hidden state the target's own head turns into a distribution of the token at i + 1, head
k (from 1) gives one of the token at i + 1 + k. Two architectures: the residual blocks of Medusa (Cai et al. 2024, arXiv
2401.10774, section 2.1.1), and the feed-forward layer of blockwise parallel decoding (Stern et al. 2018, arXiv
1811.03115, section 6).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from specjax.limits import check_size
from specjax.models import families, linear, modules
from specjax.models.config import DTYPES, LIMITS, ModelConfig, T5Config
from specjax.parallel import sharding
from specjax.types import Tree

MAX_HEADS = 64
"""The most heads; published checkpoints have five or fewer."""


@dataclasses.dataclass(frozen=True)
class ParallelHeadsConfig:
    """The shape of parallel heads.

    Attributes:
      kind: "medusa", a residual block x + SiLU(W x + b) or several for each head, or "blockwise", one feed-forward
        layer x + W2 relu(W1 x + b1) + b2 whose outputs are those of all heads.
      num_heads: K, the draft tokens of a step. Blockwise decoding counts the target's own head too: its k is K + 1.
      hidden_size: D, the width of the target's hidden state.
      num_layers: the residual blocks of a Medusa head.
      inner_size: the width within the feed-forward layer of blockwise heads, for all of them together; 0 for Medusa.
      output_size: V, where each head has an output matrix of its own, as Medusa's published ones do; 0: the target's
        own head makes logits of their states.
      dtype: "float32" or "bfloat16", that of the weights.
    """

    kind: str
    num_heads: int
    hidden_size: int
    num_layers: int = 1
    inner_size: int = 0
    output_size: int = 0
    dtype: str = "float32"

    def __post_init__(self):
        check_size("num_heads", self.num_heads, high=MAX_HEADS)
        check_size("hidden_size", self.hidden_size, high=LIMITS["hidden_size"])
        check_size("output_size", self.output_size, low=0, high=LIMITS["vocab_size"])
        check_size("num_layers", self.num_layers, high=MAX_HEADS)
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r}: choose one of {', '.join(KINDS)}.")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r}: choose one of {', '.join(DTYPES)}.")
        low = 1 if self.kind == "blockwise" else 0
        check_size("inner_size", self.inner_size, low=low, high=LIMITS["intermediate_size"] if low else 0)


class ResidualBlock(nnx.Module):
    """`x + SiLU(W x + b)`, the identity at first: W and b are zero."""

    def __init__(self, config: ParallelHeadsConfig, rngs: nnx.Rngs):
        """Declares the parameters."""
        c, zeros = config, nnx.initializers.zeros_init()
        self.linear = linear.Matrix(rngs, (c.hidden_size, c.hidden_size), ("embed", "mlp"), c.dtype, init=zeros)
        self.bias = modules.parameter(rngs, (c.hidden_size,), ("mlp",), c.dtype, init=zeros)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The block."""
        return x + jax.nn.silu(self.linear(x) + self.bias[...].astype(jnp.float32))


class MedusaStates(nnx.Module):
    """The residual blocks of each head."""

    def __init__(self, config: ParallelHeadsConfig, rngs: nnx.Rngs):
        """Declares the parameters."""
        self.heads = nnx.List(
            [nnx.List([ResidualBlock(config, rngs) for _ in range(config.num_layers)]) for _ in range(config.num_heads)]
        )

    def __call__(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T K D"]:
        """The state of each head."""
        states = []
        for blocks in self.heads:
            x = hidden
            for block in blocks:
                x = block(x)
            states.append(x)
        return jnp.stack(states, axis=2)


class BlockwiseStates(nnx.Module):
    """One feed-forward layer with the outputs of all heads, each added to what it reads; zero at first."""

    def __init__(self, config: ParallelHeadsConfig, rngs: nnx.Rngs):
        """Declares the parameters."""
        c, zeros = config, nnx.initializers.zeros_init()
        self.num_heads = c.num_heads
        self.up = linear.Matrix(rngs, (c.hidden_size, c.inner_size), ("embed", "mlp"), c.dtype)
        self.up_bias = modules.parameter(rngs, (c.inner_size,), ("mlp",), c.dtype, init=zeros)
        outputs = c.num_heads * c.hidden_size
        self.down = linear.Matrix(rngs, (c.inner_size, outputs), ("mlp", "embed"), c.dtype, init=zeros)
        self.down_bias = modules.parameter(rngs, (outputs,), ("embed",), c.dtype, init=zeros)

    def __call__(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T K D"]:
        """The state of each head."""
        inner = jax.nn.relu(self.up(hidden) + self.up_bias[...].astype(jnp.float32))
        added = self.down(inner) + self.down_bias[...].astype(jnp.float32)
        return hidden[:, :, None] + added.reshape(*hidden.shape[:2], self.num_heads, hidden.shape[-1])


KINDS: dict[str, Any] = {"medusa": MedusaStates, "blockwise": BlockwiseStates}
"""The architectures by name: `(config, rngs) -> module`, which maps hidden states to the states of all heads."""


class ParallelHeads(nnx.Module):
    """The states of all heads, and their output matrices where they have their own."""

    def __init__(self, config: ParallelHeadsConfig, rules: sharding.Rules, rngs: nnx.Rngs):
        """Declares the parameters."""
        c, self.rules = config, rules
        self.states = KINDS[c.kind](c, rngs)
        shape, axes, number = (c.hidden_size, c.output_size), ("embed", "vocab"), c.num_heads if c.output_size else 0
        self.outputs = nnx.List([linear.Matrix(rngs, shape, axes, c.dtype) for _ in range(number)])

    def own_logits(self, states: Float[Array, "B T K D"]) -> Float[Array, "B T K V"]:
        """The logits by the heads' own output matrices."""
        logits = [output(states[:, :, k]) for k, output in enumerate(self.outputs)]
        logits = [sharding.constrain(x, ("batch", "tokens", "vocab"), self.rules) for x in logits]
        return jnp.stack(logits, axis=2)


def bind(config: ParallelHeadsConfig, params: Tree) -> ParallelHeads:
    """The heads with these parameters."""
    return modules.merge(ParallelHeads, config, sharding.RULES, params)


def bind_target(config: ModelConfig, params: Tree) -> Any:
    """The target's module with its parameters, whose `logits` is its own head."""
    return modules.merge(families.of(config).module(config), config, sharding.RULES, params)


def logits(
    config: ParallelHeadsConfig, params: Tree, target: ModelConfig, target_params: Tree, hidden: Float[Array, "B T D"]
) -> Float[Array, "B T K V"]:
    """The logits of all heads, in float32.

    Args:
      config: the shape of the heads.
      params: their parameters.
      target: the shape of the target.
      target_params: its parameters, whose head is read where the heads have no output matrices of their own.
      hidden: the target's last hidden states, after its final norm.
    """
    heads = bind(config, params)
    states = heads.states(hidden)
    if config.output_size:
        return heads.own_logits(states)
    rows, width, number, size = states.shape
    # One product reads the target's matrix once for all heads.
    found = bind_target(target, target_params).logits(states.reshape(rows, width * number, size))
    return found.reshape(rows, width, number, -1)


def abstract(config: ParallelHeadsConfig) -> Tree:
    """The parameter tree with each array replaced by a `jax.ShapeDtypeStruct`."""
    return modules.abstract(ParallelHeads, config)


def axes(config: ParallelHeadsConfig) -> Tree:
    """The parameter tree with each array replaced by its logical axes."""
    return modules.metadata(ParallelHeads, config, "axes")


def initial(config: ParallelHeadsConfig, key: jax.Array, target: ModelConfig, target_params: Tree) -> Tree:
    """Parameters to begin with: every head is the target's own head, which predicts the token before its own.

    Args:
      config: the shape of the heads, in float32.
      key: of the random ones.
      target: the shape of the target.
      target_params: its parameters; own output matrices begin as copies of its head.

    Raises:
      ValueError: for own output matrices of another size than the target's.
    """
    params = modules.initial(ParallelHeads, config, key)
    if not config.output_size:
        return params
    if target.head_size != config.output_size:
        raise ValueError(
            f"output_size={config.output_size}: the target's head makes {target.head_size} logits, and own matrices "
            "begin as copies of it: give that number, or 0."
        )
    every = jnp.arange(config.output_size)[None]
    rows = bind_target(target, target_params).head.look_up(every)[0]
    if isinstance(target, T5Config) and target.scale_outputs:
        rows = rows * target.hidden_size**-0.5
    values = jnp.transpose(rows.T.astype(config.dtype), linear.stored(2, 1, config.dtype))
    return params | {"outputs": {k: {"values": values} for k in range(config.num_heads)}}


def cast(config: ParallelHeadsConfig, params: Tree, dtype: str) -> tuple[ParallelHeadsConfig, Tree]:
    """The same heads in another dtype, which may store its matrices in another order."""
    axes, inputs = (modules.metadata(ParallelHeads, config, name) for name in ("axes", "num_contracted"))
    return dataclasses.replace(config, dtype=dtype), linear.cast(params, axes, inputs, config.dtype, dtype)
