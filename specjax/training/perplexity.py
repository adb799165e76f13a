"""The perplexity of real text under a model, in whatever precision it is stored."""

import functools
import math
from collections.abc import Sequence

import jax
import numpy as np

from specjax.api.pretrained import Pretrained
from specjax.models.config import ModelConfig
from specjax.parallel import sharding
from specjax.training import data, train
from specjax.training.data import Text
from specjax.training.train import Sums
from specjax.types import Batch, Tree


@functools.partial(jax.jit, static_argnums=0)
def _sums(config: ModelConfig, params: Tree, batch: Batch) -> Sums:
    return train.sums(config, params, batch)


def perplexity(
    model: Pretrained,
    texts: Sequence[Text],
    *,
    target_length: int = 256,
    source_length: int = 256,
    batch_size: int = 4,
) -> float:
    """e to the mean cross-entropy of the tokens of some texts; longer texts are cut.

    Args:
      model: the model, with its tokenizer.
      texts: the texts, as `data.encode` reads them; of a text with an input, the target alone counts.
      target_length: T, the tokens of a row, which several texts share.
      source_length: of an encoder-decoder, S, the tokens of its source.
      batch_size: rows of a call, a multiple of the mesh's `data` axis.

    Raises:
      ValueError: for a model without a tokenizer, or texts that it cannot read.
    """
    if model.tokenizer is None:
        raise ValueError("The model has no tokenizer, which turns texts into tokens: save one beside it.")
    mesh = sharding.mesh_of(model.params)
    lengths = {"target_length": target_length, "source_length": source_length}
    encoded = data.encode(texts, model.tokenizer, start_token=model.model.start_token, **lengths)
    packed = data.dataset(encoded, start_token=model.model.start_token, seed=0, **lengths)
    total = np.zeros(2)
    with sharding.on_mesh(mesh):
        for batch in packed.in_order(batch_size, mesh):
            sums = _sums(model.config, model.params, batch)
            total += [float(sums.loss), float(sums.weight)]
    mean = total[0] / total[1]
    return math.exp(mean) if mean < 700 else math.inf
