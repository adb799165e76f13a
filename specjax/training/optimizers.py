"""Optimisers and schedules by name."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from specjax.training.config import TrainConfig
from specjax.types import Tree

Schedule = Callable[[Any], Any]
"""Maps the number of steps made to the learning rate of the next."""


def schedule(config: TrainConfig) -> Schedule:
    """The learning rate: a linear warm-up to the peak, then what `config.schedule` names.

    "cosine" ends at `final_fraction` of the peak (arXiv 1608.03983, eq. 5); "inverse_sqrt" falls with the root of the
    step, as in T5 (arXiv 1910.10683, section 3.1.2).
    """
    peak, warmup = config.learning_rate, config.warmup_steps

    def rate(step: Any) -> Any:
        grown = jnp.minimum((step + 1) / max(warmup, 1), 1.0)
        if config.schedule == "inverse_sqrt":
            return peak * grown * jnp.sqrt(max(warmup, 1) / jnp.maximum(step + 1, max(warmup, 1)))
        if config.schedule == "constant":
            return peak * grown
        done = jnp.clip((step + 1 - warmup) / max(config.num_steps - warmup, 1), 0.0, 1.0)
        wave = 0.5 * (1 + jnp.cos(math.pi * done))
        return peak * grown * (config.final_fraction + (1 - config.final_fraction) * wave)

    return rate


def _is_decayed(params: Tree) -> Tree:
    """Which parameters are decayed: all but norms and biases, which have one axis."""
    return jax.tree.map(lambda x: x.ndim > 1, params)


def adamw(rate: Schedule, config: TrainConfig) -> optax.GradientTransformation:
    """AdamW (arXiv 1711.05101)."""
    return optax.adamw(
        rate, b1=config.beta1, b2=config.beta2, weight_decay=config.weight_decay, eps=1e-9, mask=_is_decayed
    )


def adafactor(rate: Schedule, config: TrainConfig) -> optax.GradientTransformation:
    """Adafactor (arXiv 1804.04235), whose steps are relative to the size of the parameters, as in T5."""

    def decayed(step: Any) -> Any:
        return config.weight_decay * rate(step)

    decay = decayed if config.weight_decay else None
    return optax.adafactor(rate, weight_decay_rate=decay, weight_decay_mask=_is_decayed)


_OPTIMIZERS = {"adamw": adamw, "adafactor": adafactor}


def named(name: str) -> Callable[[Schedule, TrainConfig], optax.GradientTransformation]:
    """The maker of the optimiser of that name, one of `config.OPTIMIZERS`."""
    return _OPTIMIZERS[name]


@functools.cache
def optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """The optimiser of a configuration, after the clipping of the gradient's norm."""
    make = _OPTIMIZERS[config.optimizer] if isinstance(config.optimizer, str) else config.optimizer
    made = make(schedule(config), config)
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), made) if config.clip_norm else made


@functools.cache
def keeping_zeros(name: str) -> Callable[[Schedule, TrainConfig], optax.GradientTransformation]:
    """The optimiser of that name, under which parameters that are exactly zero stay zero: those of a sparse model."""

    def mask(updates: Tree, params: Tree | None) -> Tree:
        return jax.tree.map(lambda update, x: jnp.where(x == 0, 0.0, update), updates, params)

    def make(rate: Schedule, config: TrainConfig) -> optax.GradientTransformation:
        return optax.chain(_OPTIMIZERS[name](rate, config), optax.stateless(mask))

    make.__qualname__ = f"{name}, zeros kept"  # Part of the identity of a run.
    return make
