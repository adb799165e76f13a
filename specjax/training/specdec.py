"""Trains SpecDec's drafter, which fills slots behind a text, by glancing.

SpecDec (Xia et al. 2022, arXiv 2203.16487) trains slots behind a random beginning of each text, with glancing (GLAT,
Qian et al. 2020, arXiv 2008.07905): the model fills them once; for a share of as many slots as it had wrong, chosen at
random, the right tokens are shown; and it learns the others, given those. The share falls while it learns. Here slots
are read behind several tokens of a row at once.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key

from specjax.models import families
from specjax.models.config import ModelConfig, T5Config
from specjax.training import masked, slots
from specjax.training.data import Dataset
from specjax.training.slots import MaskedTexts
from specjax.types import Batch, Tree

FIRST, LAST = 0.5, 0.3
"""The share that is shown at the beginning of training and at its end, as published."""


def with_slots(data: Dataset, mask_token: int, num_slots: int, num_points: int) -> MaskedTexts:
    """Texts with slots behind some of their tokens.

    Args:
      data: the texts.
      mask_token: the id that all slots read, one that texts do not have.
      num_slots: K, how many slots are filled together.
      num_points: behind how many tokens of a row, chosen at random.

    Raises:
      ValueError: for no slot, or texts that have the mask's token.
    """
    if num_slots < 1:
        raise ValueError(f"num_slots={num_slots}: at least 1.")
    counts = (min(num_points, data.target_length),) * num_slots
    return slots.with_masks_of(data, mask_token, counts, masked.SLOTS)


def with_copies(config: ModelConfig, params: Tree) -> tuple[ModelConfig, Tree]:
    """The same drafter, whose slots read a copy of the source (`T5Config.copy_source`): its mean, before training.

    Args:
      config: the shape of a drafter that knows its mask (`slots.adapted`).
      params: its parameters.

    Raises:
      ValueError: for a model without a source.
    """
    if not isinstance(config, T5Config):
        raise ValueError("copy_source=True: only an encoder-decoder has a source to copy; set it False.")
    changed = dataclasses.replace(config, copy_source=True)
    return changed, params | {"copy_bias": jnp.zeros((config.num_buckets, 1), config.dtype)}


@functools.partial(jax.jit, static_argnums=(0, 1))
def glance(
    config: ModelConfig,
    sizes: tuple[int, int],
    params: Tree,
    batch: Batch,
    share: Float[Array, ""],
    key: Key[Array, ""],
) -> Batch:
    """Fills the slots of a batch once, and shows some of the right tokens (GLAT).

    Args:
      config: the shape of the model.
      sizes: T, the tokens of a row's text, and K, the slots that are filled together.
      params: its parameters.
      batch: of `with_slots`: after the text the slots, those of a place together.
      share: of as many tokens as are wrong, how many are shown.
      key: which ones.

    Returns:
      the batch in which shown slots read their token, and have no weight.
    """
    score = families.model(config).score
    assert score is not None  # Every family trains.
    rows, (width, num_slots) = len(batch.tokens), sizes

    def of_slots(values: Array) -> Array:
        """`[B, K, P]`."""
        return values[:, width:].reshape(rows, num_slots, -1)

    filled = jnp.argmax(score(params, batch), axis=-1)
    counts = of_slots(batch.weights) > 0
    wrong = jnp.sum(counts & (of_slots(filled) != of_slots(batch.targets)), axis=1, keepdims=True)
    noise = jnp.where(counts, jax.random.uniform(key, counts.shape), jnp.inf)
    rank = jnp.argsort(jnp.argsort(noise, axis=1), axis=1)
    shown = counts & (rank < jnp.round(share * wrong))
    whole = jnp.concatenate([jnp.zeros((rows, width), bool), shown.reshape(rows, -1)], axis=1)
    return batch._replace(
        tokens=jnp.where(whole, batch.targets, batch.tokens), weights=jnp.where(whole, 0.0, batch.weights)
    )


@dataclasses.dataclass(frozen=True, eq=False)
class GlancedTexts(MaskedTexts):
    """Texts with slots, some of which a step shows (`fit.Source`).

    Attributes:
      config: the shape of the model that learns.
      num_steps: of the run, over which the share falls from `first` to `last`.
      first: the share that is shown at the beginning; 0 with `last` of 0: no glancing.
      last: the share at the end.
      params: the model's parameters before the step (`at`).
    """

    config: ModelConfig
    num_steps: int
    first: float = FIRST
    last: float = LAST
    params: Any = None

    def at(self, step: int, params: Tree) -> "GlancedTexts":
        """The texts that a step reads, given the parameters before it."""
        del step
        return dataclasses.replace(self, params=params)

    def batch(self, step: int, batch_size: int, mesh: Mesh | None = None) -> Batch:
        """What a step of training reads, with some slots shown."""
        batch = super().batch(step, batch_size, mesh)
        if not self.first and not self.last:
            return batch
        share = self.first + (self.last - self.first) * step / max(self.num_steps, 1)
        key = jax.random.fold_in(jax.random.key(self.seed), step)
        sizes = self.target_length, len(self.counts)
        return glance(self.config, sizes, self.params, batch, jnp.float32(share), key)


def glanced(
    data: MaskedTexts, config: ModelConfig, num_steps: int, *, first: float = FIRST, last: float = LAST
) -> GlancedTexts:
    """Texts with slots, for a model that learns by glancing.

    Args:
      data: from `with_slots`.
      config: the shape of the model, float32.
      num_steps: of the run.
      first: the share of as many tokens as are wrong that is shown at the beginning.
      last: that at the end.

    Raises:
      ValueError: for shares that are none.
    """
    for name, share in (("first", first), ("last", last)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name}={share}: a share from 0 to 1.")
    fields = {field.name: getattr(data, field.name) for field in dataclasses.fields(MaskedTexts)}
    return GlancedTexts(**fields, config=config, num_steps=num_steps, first=first, last=last)
