"""A norm of its own for an early exit: the scale before the head is trained, and all else is frozen.

The final norm of a model is made for its last layer. What an intermediate layer leaves in the residual stream differs
in the size of its entries, which a scale of one number an entry can correct (`drafters.early_exit(norm=...)`).
"""

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from specjax.api.pretrained import Pretrained
from specjax.training.data import Dataset
from specjax.types import Batch, Model, Skips, Tree


class Agreement(NamedTuple):
    """How near the early exit's next-token distributions q are to the target's p, on average over tokens of text.

    Attributes:
      kl: KL(p || q), in nats.
      alpha: the sum of min(p, q): the chance that `rejection` accepts a first draft token at temperature 1 (Leviathan
        et al. 2022, corollary 3.6).
      same: the share of tokens after which both have the same most probable token: alpha at temperature 0.
    """

    kl: float
    alpha: float
    same: float


class FitState(NamedTuple):
    """What a step updates.

    Attributes:
      scale: `[E]` float32, the norm's.
      optimizer: the state of the optimiser.
    """

    scale: Float[Array, " E"]
    optimizer: Any


class Exit(NamedTuple):
    """A target, and what it is without its layers from one on.

    Attributes:
      model: the target.
      early: the early exit.
      learning_rate: the peak of the learning rate, which falls to 0 as a cosine.
      num_steps: how many steps are made in all.
    """

    model: Model
    early: Model
    learning_rate: float = 0.1
    num_steps: int = 200

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """Adam."""
        return optax.adam(optax.cosine_decay_schedule(self.learning_rate, self.num_steps))


def of(target: Pretrained, layer: int, *, learning_rate: float = 0.1, num_steps: int = 200) -> Exit:
    """What is to be trained.

    Args:
      target: the target.
      layer: how many layers the exit runs, at least 1.
      learning_rate: the peak of the learning rate.
      num_steps: how many steps will be made in all.

    Raises:
      ValueError: for a layer that is not before the last one, or a target whose layers are scanned, or that has no
        final norm with a scale.
    """
    model = target.model
    if model.with_skips is None or model.score is None or not isinstance(target.params, dict):
        raise ValueError("The early exit skips layers: load the target without scan_layers.")
    if not 1 <= layer < model.num_layers:
        raise ValueError(f"layer={layer}: the target has {model.num_layers} layers; run 1 to {model.num_layers - 1}.")
    if "norm" not in target.params:
        raise ValueError("The target's final norm has no scale, so there is nothing to train.")
    early = model.with_skips(Skips.of_layers(range(layer, model.num_layers)))
    return Exit(model, early, learning_rate, num_steps)


def init(exits: Exit, params: Tree) -> FitState:
    """The state that training begins from: the target's final norm."""
    scale = params["norm"].astype(jnp.float32)
    return FitState(scale, exits.optimizer.init(scale))


def _log_probs(
    exits: Exit, params: Tree, scale: Float[Array, " E"], batch: Batch
) -> tuple[Float[Array, "B T V"], Float[Array, "B T V"]]:
    """Those of the target and of the early exit, after each token."""
    assert exits.model.score is not None
    assert exits.early.score is not None
    own = params | {"norm": scale.astype(params["norm"].dtype)}
    whole = jax.nn.log_softmax(exits.model.score(params, batch), axis=-1)
    return jax.lax.stop_gradient(whole), jax.nn.log_softmax(exits.early.score(own, batch), axis=-1)


def _mean(values: Float[Array, "B T"], batch: Batch) -> Float[Array, ""]:
    return jnp.sum(values * batch.weights) / jnp.maximum(jnp.sum(batch.weights), 1.0)


@functools.partial(jax.jit, static_argnums=0)
def step(exits: Exit, params: Tree, state: FitState, batch: Batch) -> tuple[FitState, Float[Array, ""]]:
    """One step of the optimiser on the mean KL(p || q) of a batch; the target's parameters are constants.

    Args:
      exits: what is trained.
      params: the target's.
      state: before the step.
      batch: the texts.

    Returns:
      the state after the step, and the KL before it, in nats.
    """

    def loss(scale: Float[Array, " E"]) -> Float[Array, ""]:
        p, q = _log_probs(exits, params, scale, batch)
        return _mean(jnp.sum(jnp.exp(p) * (p - q), axis=-1), batch)

    value, gradient = jax.value_and_grad(loss)(state.scale)
    updates, moments = exits.optimizer.update(gradient, state.optimizer, state.scale)
    scale = optax.apply_updates(state.scale, updates)
    assert isinstance(scale, jax.Array)
    return FitState(scale, moments), value


def fit(
    exits: Exit, params: Tree, data: Dataset, *, batch_size: int = 4, steps: range | None = None, state: Any = None
) -> tuple[FitState, list[float]]:
    """Fits the norm's scale on texts, from the target's own distributions.

    Args:
      exits: what is trained, from `of`.
      params: the target's parameters.
      data: the texts (`training.data`).
      batch_size: rows of a step.
      steps: which of the steps are made; None: all.
      state: before these; None: the target's final norm.

    Returns:
      the state after them, whose `scale` is `drafters.early_exit(norm=...)`, and the KL before each step.
    """
    state = init(exits, params) if state is None else state
    losses = []
    for number in range(exits.num_steps) if steps is None else steps:
        state, loss = step(exits, params, state, data.batch(number, batch_size))
        losses.append(loss)
    return state, [float(loss) for loss in losses]


@functools.partial(jax.jit, static_argnums=0)
def _sums(exits: Exit, params: Tree, scale: Float[Array, " E"], batch: Batch) -> Float[Array, " 4"]:
    p, q = _log_probs(exits, params, scale, batch)
    kl = jnp.sum(jnp.exp(p) * (p - q), axis=-1)
    alpha = jnp.sum(jnp.exp(jnp.minimum(p, q)), axis=-1)
    same = jnp.argmax(p, axis=-1) == jnp.argmax(q, axis=-1)
    return jnp.stack([jnp.sum(x * batch.weights) for x in (kl, alpha, same, jnp.ones_like(kl))])


def agreement(exits: Exit, params: Tree, scale: Any, batches: Iterable[Batch]) -> Agreement:
    """How near the early exit is to the target on texts.

    Args:
      exits: the target and its early exit.
      params: the target's parameters.
      scale: `[E]` of the exit's norm.
      batches: the texts, such as `Dataset.in_order`.
    """
    sums = [_sums(exits, params, jnp.asarray(scale, jnp.float32), batch) for batch in batches]
    kl, alpha, same, weight = np.sum(jax.device_get(sums), axis=0).tolist()
    return Agreement(kl / weight, alpha / weight, same / weight)
