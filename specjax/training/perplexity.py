"""What real text says of a model, in whatever precision it is stored: its perplexity, and its acceptance as a draft."""

import functools
import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from specjax import sampling
from specjax.api.pretrained import Pretrained
from specjax.models.config import ModelConfig
from specjax.parallel import sharding
from specjax.training import data, divergences, train
from specjax.training.data import Text
from specjax.training.train import Sums
from specjax.types import Batch, Model, Tree


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
    total = np.zeros(2)
    lengths = {"target_length": target_length, "source_length": source_length}
    with sharding.on_mesh(sharding.mesh_of(model.params)):
        for batch in _batches(model, texts, batch_size, lengths):
            sums = _sums(model.config, model.params, batch)
            total += [float(sums.loss), float(sums.weight)]
    mean = total[0] / total[1]
    return math.exp(mean) if mean < 700 else math.inf


def _batches(model: Pretrained, texts: Sequence[Text], batch_size: int, lengths: dict[str, int]) -> Iterator[Batch]:
    """The texts in order."""
    if model.tokenizer is None:
        raise ValueError("The model has no tokenizer, which turns texts into tokens: save one beside it.")
    start_token = model.model.start_token
    encoded = data.encode(texts, model.tokenizer, start_token=start_token, **lengths)
    packed = data.dataset(encoded, start_token=start_token, seed=0, **lengths)
    return packed.in_order(batch_size, sharding.mesh_of(model.params))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _accepted(target: Model, draft: Model, params: tuple[Tree, Tree], batch: Batch) -> Float[Array, " 2"]:
    """The sum over the tokens of a batch of the chance that a draft token is accepted there, and their number."""
    assert target.score is not None
    assert draft.score is not None
    p = target.score(params[0], batch)
    q = sampling.match_vocab(draft.score(params[1], batch), p.shape[-1])
    accepted = divergences.acceptance(jax.nn.log_softmax(p, axis=-1), jax.nn.log_softmax(q, axis=-1))
    return jnp.stack([jnp.sum(accepted * batch.weights), jnp.sum(batch.weights)])


def acceptance_rate(
    target: Pretrained,
    draft: Pretrained,
    texts: Sequence[Text],
    *,
    target_length: int = 256,
    source_length: int = 256,
    batch_size: int = 4,
) -> float:
    """alpha at temperature 1 over the tokens of some texts: the mean of `sum_x min(target(x), draft(x))`.

    That is the chance that `rejection` accepts the first draft token after each of them (Leviathan et al. 2022,
    corollary 3.6), which needs no decoding and has little noise.

    Args:
      target: the target, with its tokenizer.
      draft: a model of the same vocabulary.
      texts: as for `perplexity`, and so are the others.
      target_length: T.
      source_length: S.
      batch_size: rows of a call.

    Raises:
      ValueError: as `perplexity` does.
    """
    total = np.zeros(2)
    lengths = {"target_length": target_length, "source_length": source_length}
    with sharding.on_mesh(sharding.mesh_of(target.params)):
        for batch in _batches(target, texts, batch_size, lengths):
            total += np.asarray(_accepted(target.model, draft.model, (target.params, draft.params), batch))
    return float(total[0] / total[1])
