"""The feed-forward of a decoder's layer, and of each expert of a mixture."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from specjax.models.config import DecoderConfig
from specjax.models.linear import Matrix
from specjax.models.modules import parameter

ACTIVATIONS = {
    "relu": jax.nn.relu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "silu": jax.nn.silu,
}


class FeedForward(nnx.Module):
    """A feed-forward; where it is gated (arXiv 2002.05202), the gate and up projections are fused into one product."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        """Declares the parameters. Without a gate, `gate_up` is the up projection alone."""
        c = config
        self.config = config
        inner = (2 if c.gated else 1, c.intermediate_size)
        up, up_axes = (c.hidden_size, *inner), ("embed", "gate_up", "mlp")
        self.gate_up = Matrix(rngs, up, up_axes, c.dtype, how=c.quantisation)
        down = (c.intermediate_size, c.hidden_size)
        self.down = Matrix(rngs, down, ("mlp", "embed"), c.dtype, how=c.quantisation)
        if c.mlp_bias:
            self.gate_up_bias = parameter(rngs, inner, ("gate_up", "mlp"), c.dtype)
            self.down_bias = parameter(rngs, (c.hidden_size,), ("embed",), c.dtype)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """`down(activation(gate(x)) * up(x))`, or `down(activation(up(x)))`."""
        gate_up = self.gate_up(x)
        if self.config.mlp_bias:
            gate_up = gate_up + self.gate_up_bias[...].astype(jnp.float32)
        inner = ACTIVATIONS[self.config.activation](gate_up[:, :, 0])
        out = self.down(inner * gate_up[:, :, 1] if self.config.gated else inner)
        if self.config.mlp_bias:
            out = out + self.down_bias[...].astype(jnp.float32)
        return out
