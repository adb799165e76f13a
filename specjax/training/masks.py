"""Embeddings for mask tokens, trained with all else frozen: what PaSS and prompt tokens read in the place of tokens.

PaSS (Monea et al. 2023, arXiv 2311.13581) trains an embedding for each look-ahead token; prompt tokens (Chen et al.
2024, arXiv 2405.18628) do so from the target's own distributions, by a divergence that counts less the further ahead
the token is. K embeddings of the target's width are all that is trained (`drafters.mask_tokens(embeddings=...)`,
`drafters.parallel_masks(embeddings=...)`).
"""

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from specjax.api.pretrained import Pretrained
from specjax.models import families
from specjax.training import divergences, masked
from specjax.training.data import Dataset
from specjax.training.divergences import Divergence
from specjax.training.masked import Places
from specjax.types import Batch, Model, Tree


class Quality(NamedTuple):
    """What the masks say about the tokens after them, on average over texts, by place: [0] behind the first mask.

    Attributes:
      loss: `[K]` the divergence from the target's own distribution, in nats where that is its unit.
      alpha: `[K]` the sum of min(p, q): how often `rejection` accepts the token at temperature 1 where those before it
        were (Leviathan et al. 2022, corollary 3.6).
      same: `[K]` how often the most probable token is the target's: the same at temperature 0.
    """

    loss: Float[Array, " K"]
    alpha: Float[Array, " K"]
    same: Float[Array, " K"]


class FitState(NamedTuple):
    """What a step updates.

    Attributes:
      embeddings: `[K, E]` float32, on the scale of the target's embedding table.
      optimizer: the state of the optimiser.
    """

    embeddings: Float[Array, "K E"]
    optimizer: Any


class Masks(NamedTuple):
    """What is trained, and how. Equal ones compile once.

    Attributes:
      model: the target.
      number: K, how many masks are read one after the other.
      divergence: between the target's distribution and that behind a mask.
      num_points: behind how many tokens of a row the masks are read in a step, chosen at random.
      decay: the weight of a place's loss, relative to that of the place before it.
      learning_rate: the peak, which falls to 0 as a cosine.
      num_steps: how many steps are made in all.
      seed: of the points.
    """

    model: Model
    number: int
    divergence: Divergence = divergences.forward_kl
    num_points: int = 32
    decay: float = 0.8
    learning_rate: float = 0.01
    num_steps: int = 200
    seed: int = 0

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """Adam."""
        return optax.adam(optax.cosine_decay_schedule(self.learning_rate, self.num_steps))


def of(target: Pretrained, number: int, **options: Any) -> Masks:
    """What is to be trained.

    Args:
      target: the target.
      number: K, at least 1. `drafters.mask_tokens` drafts K tokens with them, `drafters.parallel_masks` K + 1.
      **options: the fields of `Masks` that differ from their defaults.

    Raises:
      ValueError: for no mask, or a target that cannot be trained.
    """
    if number < 1:
        raise ValueError(f"num_masks={number}: at least 1.")
    if target.model.score is None:
        raise ValueError("The target has no `score`, by which texts are read in training: give a model of a family.")
    return Masks(target.model, number, **options)


def init(masks: Masks, target: Pretrained, mask_token: int) -> FitState:
    """The state that training begins from: every mask reads the embedding of one token of the vocabulary.

    Args:
      masks: what is trained.
      target: the target.
      mask_token: the id of that token. `drafters.mask_tokens(mask_token=...)` drafts what these say.

    Raises:
      ValueError: for an id that is not in the vocabulary.
    """
    if not 0 <= mask_token < target.model.vocab_size:
        raise ValueError(f"mask_token={mask_token}: an id of the vocabulary, from 0 to {target.model.vocab_size - 1}.")
    begin = families.embeddings(target.config, target.params, jnp.full((1, masks.number), mask_token))[0]
    return FitState(begin, masks.optimizer.init(begin))


def points(masks: Masks, batch: Batch, step: int) -> Places:
    """Where the masks of a step are read: they depend on the seed and the step's number alone."""
    rows, width = batch.tokens.shape
    rng = np.random.default_rng([masks.seed, step])
    return masked.choose(rows, width, [min(masks.num_points, width)] * masks.number, rng)


def _log_probs(
    masks: Masks, params: Tree, embeddings: Float[Array, "K E"], batch: Batch, places: Places
) -> tuple[Float[Array, "B M V"], Float[Array, "B M V"], Float[Array, "B M"]]:
    """The target's distribution and that behind each mask, of the same token, and the weight of each."""
    assert masks.model.score is not None
    width = batch.tokens.shape[1]
    both = masked.insert(batch, places, masks.model.vocab_size + jnp.arange(masks.number))
    logits = masks.model.score(params, both, embeddings=embeddings)
    at = jnp.minimum(masked.stands_for(places), width - 1)
    own = jnp.take_along_axis(jax.lax.stop_gradient(logits[:, :width]), at[..., None], axis=1)
    p, q = (jax.nn.log_softmax(x, axis=-1) for x in (own, logits[:, width:]))
    return p, q, both.weights[:, width:]


def _by_place(
    masks: Masks, values: Float[Array, "B M"], weights: Float[Array, "B M"], place: Int[Array, "B M"]
) -> Float[Array, " K"]:
    """The sum of weight times value, by place."""
    is_of = place == jnp.arange(masks.number)[:, None, None]
    return jnp.sum(jnp.where(is_of, values * weights, 0.0), axis=(1, 2))


@functools.partial(jax.jit, static_argnums=0)
def step(
    masks: Masks, params: Tree, state: FitState, batch: Batch, places: Places
) -> tuple[FitState, Float[Array, " K"]]:
    """One step of the optimiser on the mean divergences of all places, each weighted by `decay` to its number.

    Args:
      masks: what is trained.
      params: the target's, which are constants.
      state: before the step.
      batch: the texts.
      places: where masks are read behind them.

    Returns:
      the state after the step, and the mean divergence of each place before it.
    """

    def loss(embeddings: Float[Array, "K E"]) -> tuple[Float[Array, ""], Float[Array, " K"]]:
        p, q, weights = _log_probs(masks, params, embeddings, batch, places)
        total = _by_place(masks, jnp.ones_like(weights), weights, places.place)
        means = _by_place(masks, masks.divergence(p, q), weights, places.place) / jnp.maximum(total, 1.0)
        return jnp.sum(masks.decay ** jnp.arange(masks.number) * means), means

    gradient, means = jax.grad(loss, has_aux=True)(state.embeddings)
    updates, moments = masks.optimizer.update(gradient, state.optimizer, state.embeddings)
    embeddings = optax.apply_updates(state.embeddings, updates)
    assert isinstance(embeddings, jax.Array)
    return FitState(embeddings, moments), means


def fit(
    masks: Masks,
    params: Tree,
    data: Dataset,
    state: FitState,
    *,
    batch_size: int = 4,
    steps: range | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[FitState, Float[np.ndarray, "n K"]]:
    """Trains the embeddings on texts, from the target's own distributions.

    Args:
      masks: what is trained, from `of`.
      params: the target's parameters.
      data: the texts (`training.data`).
      state: before these steps, from `init` or from an earlier call.
      batch_size: rows of a step.
      steps: which of the steps are made; None: all.
      mesh: where the target is, or None.

    Returns:
      the state after them, and the loss of each place before each step.
    """
    losses = []
    for number in range(masks.num_steps) if steps is None else steps:
        batch = data.batch(number, batch_size, mesh)
        state, loss = step(masks, params, state, batch, points(masks, batch, number))
        losses.append(loss)
    return state, np.asarray(jax.device_get(losses)).reshape(-1, masks.number)


@functools.partial(jax.jit, static_argnums=0)
def _sums(
    masks: Masks, params: Tree, embeddings: Float[Array, "K E"], batch: Batch, places: Places
) -> Float[Array, "4 K"]:
    p, q, weights = _log_probs(masks, params, embeddings, batch, places)
    same = (jnp.argmax(p, axis=-1) == jnp.argmax(q, axis=-1)).astype(jnp.float32)
    measures = masks.divergence(p, q), divergences.acceptance(p, q), same, jnp.ones_like(weights)
    return jnp.stack([_by_place(masks, values, weights, places.place) for values in measures])


def judge(masks: Masks, params: Tree, embeddings: Any, batches: Iterable[Batch]) -> Quality:
    """What masks with these embeddings say on texts, each given that the text's own tokens precede them.

    Args:
      masks: the target and the number of masks; a batch's number is the step whose points are read.
      params: the target's parameters.
      embeddings: `[K, E]`.
      batches: texts, such as `Dataset.in_order`.
    """
    embeddings = jnp.asarray(embeddings, jnp.float32)
    sums = [_sums(masks, params, embeddings, batch, points(masks, batch, i)) for i, batch in enumerate(batches)]
    *measures, weight = np.sum(jax.device_get(sums), axis=0)
    return Quality(*(value / np.maximum(weight, 1e-9) for value in measures))
