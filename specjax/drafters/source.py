"""What the encoder of an encoder-decoder has read: shared by drafters that copy from it."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

from specjax.types import Feedback


class Source(NamedTuple):
    """The sources of all rows.

    Attributes:
      tokens: `[B, S]`; S = 0 for models without an encoder.
      length: `[B]`.
    """

    tokens: Int[Array, "B S"]
    length: Int[Array, " B"]


def init(batch_size: int, max_source: int) -> Source:
    """No source yet."""
    return Source(jnp.zeros((batch_size, max_source), jnp.int32), jnp.zeros(batch_size, jnp.int32))


def update(source: Source, feedback: Feedback) -> Source:
    """The sources of new prompts; a step changes nothing."""
    prompt = feedback.inputs
    if prompt is None or prompt.source is None or prompt.source_length is None:
        return source
    return Source(prompt.source, prompt.source_length)
