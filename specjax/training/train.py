"""The training step: one jitted function from state and batch to state and metrics.

Parameters and the optimiser's moments are float32 and split over the mesh by the rules of inference
(`families.param_axes`), batches over `data`; the compiler adds up the gradients. A copy of the parameters in
`TrainConfig.dtype` is made within the step for the matrix products.
"""

import functools
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Key

from specjax.models import families
from specjax.models.config import ModelConfig
from specjax.parallel import sharding
from specjax.training import optimizers
from specjax.training.config import TrainConfig
from specjax.types import Batch, Dropout, Tree


class TrainState(NamedTuple):
    """The state that a step updates.

    Attributes:
      params: the parameters, float32.
      optimizer: the state of the optimiser.
      step: `[]` how many steps were made.
    """

    params: Tree
    optimizer: Any
    step: Int[Array, ""]


class Sums(NamedTuple):
    """Sums over the targets of a batch.

    Attributes:
      loss: the sum of weight times loss.
      square: the sum of weight times the squared log-normaliser.
      weight: the sum of the weights.
      measures: by name, the sums of weight times whatever else is reported.
    """

    loss: Float[Array, ""]
    square: Float[Array, ""]
    weight: Float[Array, ""]
    measures: dict[str, Float[Array, ""]]


Rows = tuple[Batch, Key[Array, " B"] | None]
"""Some rows of a batch, with the keys of their dropout."""

Objective = Callable[[Float[Array, "B T V"], Batch, Tree], Sums]
"""What is minimised: `(logits, batch, frozen) -> Sums`, where `frozen` are parameters that are not trained."""


Loss = Callable[[Tree, Batch, Tree, Any], Sums]
"""What a step minimises: `(params, batch, frozen, keys) -> Sums`, with the keys of dropout, or None."""


class Metrics(NamedTuple):
    """The metrics of a step.

    Attributes:
      loss: the mean loss of a target, before the step.
      grad_norm: the norm of the gradient, before it is clipped.
      learning_rate: the learning rate of the step.
      num_targets: the sum of the weights.
      num_tokens: the number of tokens that encoder and decoder read, padding excluded.
      measures: the means of what else the objective measures.
    """

    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    learning_rate: Float[Array, ""]
    num_targets: Float[Array, ""]
    num_tokens: Int[Array, ""]
    measures: dict[str, Float[Array, ""]]


def abstract_state(
    model_config: ModelConfig, config: TrainConfig, mesh: Mesh | None = None, rules: sharding.Rules = sharding.RULES
) -> TrainState:
    """The state with each array replaced by a `jax.ShapeDtypeStruct`.

    A moment with a parameter's shape is split like the parameter; smaller ones, such as Adafactor's, are replicated.

    Raises:
      ValueError: for a model that is not float32, or a mesh that does not divide its axes.
    """
    if model_config.dtype != "float32":
        raise ValueError(
            f"dtype={model_config.dtype!r}: parameters are trained in float32. Give TrainConfig that dtype, which "
            "is then used for the matrix products alone."
        )
    return split_state(families.abstract_params(model_config), families.param_axes(model_config), config, mesh, rules)


def split_state(
    params: Tree, axes: Tree, config: TrainConfig, mesh: Mesh | None = None, rules: sharding.Rules = sharding.RULES
) -> TrainState:
    """`abstract_state` of any parameters.

    Args:
      params: their `jax.ShapeDtypeStruct`s.
      axes: their logical axes.
      config: how they are trained.
      mesh: where the state goes; None for the default device.
      rules: logical to mesh axes.

    Raises:
      ValueError: for a mesh that does not divide the axes.
    """
    moments = jax.eval_shape(optimizers.optimizer(config).init, params)
    state = TrainState(params, moments, jax.ShapeDtypeStruct((), jnp.int32))  # pyright: ignore[reportArgumentType]
    if mesh is None:
        one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), state)
    whole = NamedSharding(mesh, PartitionSpec())

    def split(x: jax.ShapeDtypeStruct, axes: sharding.Axes) -> jax.ShapeDtypeStruct:
        place = sharding.named_sharding(mesh, x.shape, axes, rules)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    def copied(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole)

    params = jax.tree.map(split, state.params, axes)
    moments = optax.tree_map_params(
        optimizers.optimizer(config),
        lambda x, param: (
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=param.sharding) if x.shape == param.shape else copied(x)
        ),
        state.optimizer,
        params,
        transform_non_params=copied,
    )
    return TrainState(params, moments, copied(state.step))  # pyright: ignore[reportArgumentType]


def init(
    model_config: ModelConfig,
    config: TrainConfig,
    mesh: Mesh | None = None,
    rules: sharding.Rules = sharding.RULES,
    params: Tree | None = None,
) -> TrainState:
    """The state that training begins from, each device's part made on that device.

    Args:
      model_config: the model's shape, float32.
      config: its seed determines the parameters.
      mesh: where the state goes; None for the default device.
      rules: logical to mesh axes.
      params: the parameters to begin with; None for random ones.

    Raises:
      ValueError: as `abstract_state`.
    """

    places = jax.tree.map(lambda x: x.sharding, abstract_state(model_config, config, mesh, rules))
    if params is not None:
        return begin(config, places, params)

    def make(key: jax.Array) -> TrainState:
        return _first(config, families.init_params(model_config, key))

    return jax.jit(make, out_shardings=places)(jax.random.key(config.seed))


def _first(config: TrainConfig, params: Tree) -> TrainState:
    return TrainState(params, optimizers.optimizer(config).init(params), jnp.zeros((), jnp.int32))


def begin(config: TrainConfig, places: TrainState, params: Tree) -> TrainState:
    """The state that training begins from with given parameters, which are copied.

    Args:
      config: how they are trained.
      places: where each array of the state goes.
      params: the parameters, float32.
    """

    def make(given: Tree) -> TrainState:
        return _first(config, jax.tree.map(jnp.array, given))

    return jax.jit(make, out_shardings=places)(jax.device_put(params, places.params))


def cross_entropy(logits: Float[Array, "B T V"], batch: Batch, frozen: Tree = ()) -> Sums:
    """The objective of training on texts: cross-entropy in nats, added up in float32."""
    del frozen
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    # Not a gather, which would collect logits that are split over the vocabulary.
    is_target = jnp.arange(logits.shape[-1]) == batch.targets[:, :, None]
    loss = normaliser - jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
    weight = batch.weights
    return Sums(jnp.sum(weight * loss), jnp.sum(weight * normaliser**2), jnp.sum(weight), {})


def sums(
    model_config: ModelConfig,
    params: Tree,
    batch: Batch,
    *,
    objective: Objective = cross_entropy,
    frozen: Tree = (),
    remat: bool = False,
    dropout: Dropout | None = None,
) -> Sums:
    """The loss of a batch.

    Args:
      model_config: the shape, with the parameters' dtype.
      params: the parameters.
      batch: the batch.
      objective: what is minimised.
      frozen: parameters that the objective reads and that are not trained.
      remat: whether the gradient computes the layers again (`TrainConfig.remat`).
      dropout: that of the model, and of no frozen one; None where it is not trained.

    Raises:
      ValueError: for a batch without a source, where the model is an encoder-decoder.
    """
    score = families.model(model_config).score
    assert score is not None  # Every family trains.
    return objective(score(params, batch, remat=remat, dropout=dropout), batch, frozen)


def _mean(
    config: TrainConfig,
    loss: Loss,
    params: Tree,
    frozen: Tree,
    total: Float[Array, ""],
    batch: Batch,
    keys: Key[Array, " B"] | None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """A microbatch's part of what is minimised, and of the loss and the measures; `total` is the weight of all."""
    added = loss(params, batch, frozen, keys)
    means = {name: value / total for name, value in {"loss": added.loss, **added.measures}.items()}
    return (added.loss + config.z_loss * added.square) / total, means


def _dropout_keys(config: TrainConfig, step: Int[Array, ""], number: int) -> Key[Array, " B"] | None:
    """A key for each row of the batch, so that microbatches drop what the whole batch drops; None without dropout."""
    if not config.dropout:
        return None
    key = jax.random.fold_in(jax.random.key(config.seed), np.uint32(zlib.crc32(b"dropout")))
    return jax.random.split(jax.random.fold_in(key, step), number)


def _microbatches(rows: Any, number: int) -> Any:
    """`[number, B / number, ...]`, split so that each microbatch has rows on every device without moving any."""
    return jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, number, *x.shape[1:]), 0, 1), rows)


@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames="objective", donate_argnums=2)
def train_step(
    model_config: ModelConfig,
    config: TrainConfig,
    state: TrainState,
    batch: Batch,
    frozen: Tree = (),
    *,
    objective: Objective = cross_entropy,
) -> tuple[TrainState, Metrics]:
    """One step of the optimiser on the mean loss of all targets of a batch.

    Args:
      model_config: the shape of the parameters, float32.
      config: how to train.
      state: what the step starts from; it is donated.
      batch: `[batch_size, T]`.
      frozen: parameters that the objective reads and that are not trained.
      objective: what is minimised; equal ones compile once.

    Returns:
      The state after the step, and its metrics. Gradients of microbatches are added up with one normaliser, so that
      their number changes nothing but rounding.
    """

    def loss(params: Tree, batch: Batch, frozen: Tree, keys: Key[Array, " B"] | None) -> Sums:
        cast = families.cast(model_config, params, config.dtype)
        dropout = None if keys is None else Dropout(config.dropout, keys)
        return sums(*cast, batch, objective=objective, frozen=frozen, remat=config.remat, dropout=dropout)

    return _updated(config, loss, state, batch, frozen)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def update(
    config: TrainConfig, loss: Loss, state: TrainState, batch: Batch, frozen: Tree = ()
) -> tuple[TrainState, Metrics]:
    """`train_step` of parameters that are no model of their own.

    Args:
      config: how to train.
      loss: what is minimised; equal ones compile once.
      state: what the step starts from; it is donated.
      batch: `[batch_size, T]`.
      frozen: parameters that the loss reads and that are not trained.
    """
    return _updated(config, loss, state, batch, frozen)


def _updated(
    config: TrainConfig, loss: Loss, state: TrainState, batch: Batch, frozen: Tree
) -> tuple[TrainState, Metrics]:
    total = jnp.maximum(jnp.sum(batch.weights), 1.0)
    differentiate = jax.grad(functools.partial(_mean, config, loss), has_aux=True)

    def gradient(part: Rows) -> tuple[Tree, dict[str, Float[Array, ""]]]:
        return differentiate(state.params, frozen, total, *part)

    def add(carry: Any, part: Rows) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, carry, gradient(part)), None

    rows: Rows = batch, _dropout_keys(config, state.step, batch.tokens.shape[0])
    if config.num_microbatches == 1:
        grads, means = gradient(rows)
    else:
        parts = _microbatches(rows, config.num_microbatches)
        shapes = jax.eval_shape(gradient, jax.tree.map(lambda x: x[0], parts))
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        (grads, means), _ = jax.lax.scan(add, nothing, parts)
    optimizer = optimizers.optimizer(config)
    updates, moments = optimizer.update(grads, state.optimizer, state.params)
    num_tokens = jnp.sum(batch.segments > 0)
    if batch.source_segments is not None:
        num_tokens += jnp.sum(batch.source_segments > 0)
    rate = jnp.asarray(optimizers.schedule(config)(state.step), jnp.float32)
    mean = means.pop("loss")
    metrics = Metrics(mean, optax.tree.norm(grads), rate, jnp.sum(batch.weights), num_tokens, means)
    return TrainState(optax.apply_updates(state.params, updates), moments, state.step + 1), metrics


@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames="objective")
def eval_step(
    model_config: ModelConfig,
    dtype: str,
    params: Tree,
    batch: Batch,
    frozen: Tree = (),
    *,
    objective: Objective = cross_entropy,
) -> Sums:
    """The loss of a batch, in the dtype that it is trained in."""
    return sums(*families.cast(model_config, params, dtype), batch, objective=objective, frozen=frozen)
