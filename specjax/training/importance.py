"""What a trained model can do without, measured on calibration texts: the units that `prune` leaves out."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from specjax.models import families
from specjax.models.config import ModelConfig
from specjax.training import prune, train
from specjax.training.prune import Gates
from specjax.types import Batch, Tree

Report = Callable[[int, int], None]
"""Takes how many layers of how many are measured."""

Scores = dict[str, dict[str, np.ndarray]]
"""A number for every unit, as in `prune.Gates`."""


@functools.partial(jax.jit, static_argnums=0)
def _loss(config: ModelConfig, params: Tree, gates: Gates, batch: Batch) -> Float[Array, " 2"]:
    """The sum of the losses of a batch's targets, and their number, with some gates."""
    sums = train.sums(config, prune.gated(config, params, gates), batch)
    return jnp.stack([sums.loss, sums.weight])


def mean_loss(config: ModelConfig, params: Tree, batches: Sequence[Batch], gates: Gates | None = None) -> float:
    """The mean cross-entropy of the targets of some batches, in nats; e to this power is the perplexity.

    Args:
      config: the shape.
      params: the parameters.
      batches: the texts.
      gates: a factor for every unit; None: all ones.
    """
    gates = prune.open_gates(config) if gates is None else gates
    total = np.zeros(2)
    for batch in batches:
        total += np.asarray(_loss(config, params, gates, batch))
    return float(total[0] / total[1])


def removal_costs(
    config: ModelConfig,
    params: Tree,
    batches: Sequence[Batch],
    report: Report = lambda done, total: None,
) -> dict[str, np.ndarray]:
    """By how much the loss of the calibration texts rises where one layer alone is removed.

    The order is that of the perplexity criterion of Kim et al. 2024 (Shortened LLaMA, arXiv 2402.02834).

    Args:
      config: the shape; neither quantised nor scanned.
      params: the parameters.
      batches: the calibration texts.
      report: called with how many layers of how many are measured.

    Returns:
      By stack, `[L]` nats for each token.
    """
    gates, whole = prune.open_gates(config), mean_loss(config, params, batches)
    places = [(stack, layer) for stack, number in prune.stacks(config).items() for layer in range(number)]
    found = {stack: np.zeros(number) for stack, number in prune.stacks(config).items()}
    for done, (stack, layer) in enumerate(places):
        report(done, len(places))
        closed = gates | {stack: gates[stack] | {prune.LAYER: gates[stack][prune.LAYER].at[layer].set(0)}}
        found[stack][layer] = mean_loss(config, params, batches, closed) - whole
    return found


@functools.partial(jax.jit, static_argnums=0)
def _squared_gradient(config: ModelConfig, params: Tree, batch: Batch) -> Gates:
    def loss(gates: Gates) -> Float[Array, ""]:
        sums = train.sums(config, prune.gated(config, params, gates), batch)
        return sums.loss / jnp.maximum(sums.weight, 1.0)

    return jax.tree.map(jnp.square, jax.grad(loss)(prune.open_gates(config)))


def taylor(config: ModelConfig, params: Tree, batches: Sequence[Batch]) -> Scores:
    """The first-order estimate of what each unit's removal costs (Molchanov et al. 2019, arXiv 1906.10771, with gates).

    The importance of a gate z = 1 on a unit's output is the mean over batches of (dL/dz)^2, the square of the change of
    the loss that a first-order expansion predicts for z = 0; that of heads is Michel et al. 2019 (arXiv
    1905.10650), whose absolute value orders a single batch's heads alike.

    Args:
      config: the shape; neither quantised nor scanned.
      params: the parameters.
      batches: the calibration texts. The loss is the cross-entropy of their targets: that of distillation has no
        gradient where draft and target agree.
    """
    total = jax.tree.map(jnp.zeros_like, prune.open_gates(config))
    for batch in batches:
        total = jax.tree.map(jnp.add, total, _squared_gradient(config, params, batch))
    return jax.tree.map(lambda x: np.asarray(x) / len(batches), total)


def best(scores: Float[np.ndarray, " N"], number: int) -> tuple[int, ...]:
    """The units of the greatest scores, in ascending order; the first of equal ones."""
    return tuple(sorted(np.argsort(-scores, kind="stable")[:number].tolist()))


def best_units(scores: Scores, heads: int, width: int) -> dict[str, dict[str, list[tuple[int, ...]]]]:
    """`prune.Kept`: the heads and channels of the greatest scores in every layer."""
    numbers = {"attention": heads, "cross": heads, prune.MLP: width}
    return {
        stack: {part: [best(row, numbers[part]) for row in rows] for part, rows in parts.items() if part in numbers}
        for stack, parts in scores.items()
    }


class Sizes(NamedTuple):
    """What is left of a model.

    Attributes:
      layers: the number of layers of each stack.
      heads: the key/value heads of an attention.
      width: the inner width of the feed-forwards.
      sparsity: the share of zeros in every matrix of the layers.
    """

    layers: Mapping[str, int]
    heads: int
    width: int
    sparsity: float = 0.0


def shrink(
    config: ModelConfig,
    params: Tree,
    sizes: Sizes,
    batches: Sequence[Batch],
    *,
    dtype: str = "float32",
    report: Report = lambda done, total: None,
) -> tuple[ModelConfig, Tree]:
    """A model without its least important layers, then heads and channels, then weights.

    Args:
      config: the shape; neither quantised nor scanned.
      params: the parameters.
      sizes: what is left.
      batches: the calibration texts.
      dtype: that of the products by which importance is measured.
      report: called while layers are measured.

    Returns:
      The shape and the parameters, float32.

    Raises:
      ValueError: for a model that cannot be pruned.
    """
    prune.check(config)
    config, params = families.cast(config, params, "float32")
    if dict(sizes.layers) != prune.stacks(config):
        costs = removal_costs(*families.cast(config, params, dtype), batches, report)
        kept = {stack: best(cost, sizes.layers[stack]) for stack, cost in costs.items()}
        config, params = prune.keep_layers(config, params, kept)
    if (sizes.heads, sizes.width) != (prune.num_heads(config), config.intermediate_size):
        scores = taylor(*families.cast(config, params, dtype), batches)
        config, params = prune.keep_units(config, params, best_units(scores, sizes.heads, sizes.width))
    return config, prune.by_magnitude(config, params, sizes.sparsity) if sizes.sparsity else params
