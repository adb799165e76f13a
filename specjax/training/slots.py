"""Texts in which masks are read, for models that predict several tokens in one call, and what these learn from them."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from specjax.models.config import ModelConfig
from specjax.training import masked, train
from specjax.training.data import Dataset
from specjax.training.masked import Kind
from specjax.training.train import Sums
from specjax.types import Batch, Tree


@dataclasses.dataclass(frozen=True, eq=False)
class MaskedTexts(Dataset):
    """Packed texts with masks behind their tokens: what a step reads is determined by the seed and its number.

    Attributes:
      mask_token: the id of the mask.
      counts: behind how many tokens of a row there is a mask of each place (`masked.counts`).
      kind: how the masks are read.
    """

    mask_token: int
    counts: tuple[int, ...]
    kind: Kind

    def _with_masks(self, batch: Batch, number: int) -> Batch:
        rng = np.random.default_rng([self.seed, number])
        rows, width = batch.tokens.shape
        places = masked.choose(rows, width, self.counts, rng)
        ids = jnp.full(len(self.counts), self.mask_token, jnp.int32)
        return masked.insert(batch, places, ids, kind=self.kind)

    def batch(self, step: int, batch_size: int, mesh: Mesh | None = None) -> Batch:
        """What a step of training reads: `[batch_size, T + M]`, the masks after the text of each row."""
        return self._with_masks(super().batch(step, batch_size, mesh), step)

    def in_order(self, batch_size: int, mesh: Mesh | None = None) -> Iterator[Batch]:
        """All rows once, each with its masks; the last batch is padded with empty rows."""
        for number, batch in enumerate(super().in_order(batch_size, mesh)):
            yield self._with_masks(batch, number)

    @property
    def objective(self) -> "LookAhead":
        """What a model learns from these texts."""
        text = (self.target_length,)
        return LookAhead(0, text + self.counts) if self.kind.learns_text else LookAhead(text[0], self.counts)


def with_masks_of(data: Dataset, mask_token: int, counts: tuple[int, ...], kind: Kind) -> MaskedTexts:
    """Texts with masks behind their tokens, as `MaskedTexts` has them.

    Raises:
      ValueError: for texts that have the mask's token.
    """
    if any((example.text == mask_token).any() for example in data.examples):
        raise ValueError(f"mask_token={mask_token}: some text has this token; give an id that no text has.")
    fields = {field.name: getattr(data, field.name) for field in dataclasses.fields(Dataset)}
    return MaskedTexts(**fields, mask_token=mask_token, counts=counts, kind=kind)


def adapted(config: ModelConfig, mask_token: int) -> ModelConfig:
    """The shape of a model that knows its mask, as `drafters.pard` and `drafters.nonautoregressive` read it.

    Raises:
      ValueError: for an id that the model has no embedding of.
    """
    return dataclasses.replace(config, mask_token=mask_token)


@dataclasses.dataclass(frozen=True)
class LookAhead:
    """The objective: cross-entropy behind tokens and masks alike. Equal ones compile once.

    It measures how often the most probable token of each draft position is the text's, `same_1` and so on: where the
    texts are the target's own greedy ones, the acceptance rate at temperature 0.

    Attributes:
      begin: where in a row the outputs of the first draft position begin.
      sizes: how many there are of each position, one after the other.
    """

    begin: int
    sizes: tuple[int, ...]

    def __call__(self, logits: Float[Array, "B W V"], batch: Batch, frozen: Tree) -> Sums:
        """The sums over the targets of a batch."""
        found = train.cross_entropy(logits, batch, frozen)
        right = (jnp.argmax(logits, axis=-1) == batch.targets).astype(jnp.float32)
        ends = self.begin + np.cumsum(self.sizes)
        measures: dict[str, Any] = {}
        for number, (begin, end) in enumerate(zip((self.begin, *ends[:-1]), ends, strict=True), start=1):
            weights = batch.weights[:, begin:end]
            share = jnp.sum(weights * right[:, begin:end]) / jnp.maximum(jnp.sum(weights), 1.0)
            # Means over all targets are reported: so this is the mean of the batches, each by its size.
            measures[f"same_{number}"] = share * found.weight
        return found._replace(measures=measures)
