"""Trains parallel heads together with their target: Medusa-2 (Cai et al. 2024, arXiv 2401.10774, section 2.2.2).

The target's parameters change, so the result is **another target**: text that is decoded with these heads is exactly
that of the new target, not that of the original, and the new target is written beside the heads.

What is minimised is the paper's combined loss: the target's own plus `head_weight` (lambda_0) times that of the heads.
The target's own loss is the cross-entropy of the text, or a divergence from the original target, which keeps the new
one near it (self-distillation, section 2.3.2). The paper adapts large targets by matrices of low rank;
here all parameters are trained. The heads are trained alone in the first steps, so that their first, large gradients do
not reach the target, and the target has a smaller learning rate, which then grows over as many steps as the warm-up
has.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from specjax.api import pretrained
from specjax.drafters.parallel_heads import Heads
from specjax.models import families
from specjax.models import parallel_heads as heads
from specjax.training import divergences, fit, optimizers, parallel_heads, train
from specjax.training.config import TrainConfig
from specjax.training.fit import Learner
from specjax.training.parallel_heads import TEXT, HeadLoss, Run
from specjax.training.train import Metrics, Sums, TrainState
from specjax.types import Batch, Tree

TARGET = "target"
"""The directory of the new target, in that of the heads; `specjax.load` reads it."""


class Joint(NamedTuple):
    """How the target is trained with its heads.

    Attributes:
      head_weight: the weight of the heads' loss beside the target's own (lambda_0).
      target_rate: the target's learning rate, as a fraction of that of the heads; the paper's is a quarter.
      head_steps: the first steps, in which the heads are trained alone.
      target_loss: the target's own: `TEXT`, or a name of `divergences`, from the original target.
    """

    head_weight: float = 0.2
    target_rate: float = 0.25
    head_steps: int = 0
    target_loss: str = TEXT


class JointState(NamedTuple):
    """The parameters that are trained.

    Attributes:
      heads: those of the heads.
      target: those of the target.
    """

    heads: Tree
    target: Tree


@dataclasses.dataclass(frozen=True)
class JointLoss:
    """The combined loss (`train.Loss`) of `JointState`, whose frozen parameters are the original target's.

    Attributes:
      heads: the loss of the heads, whose target is the new one.
      joint: how they are added.
      trains_target: whether there is a gradient to the target.
    """

    heads: HeadLoss
    joint: Joint
    trains_target: bool = True

    def __call__(self, params: JointState, batch: Batch, frozen: Tree, keys: Any) -> Sums:
        """The sums over the targets of a batch; `target_loss` and `heads_loss` are the parts of the loss."""
        del keys
        given = params.target if self.trains_target else jax.lax.stop_gradient(params.target)
        config, target = families.cast(self.heads.target, given, self.heads.dtype)
        hidden = parallel_heads.last_hidden(config, target, batch)
        logits = heads.bind_target(config, target).logits(hidden)
        own = self._own(logits, batch, frozen)
        found = dataclasses.replace(self.heads, target=config).of_hidden(params.heads, batch, target, hidden)
        parts = {"target_loss": own.loss, "heads_loss": found.loss}
        loss = own.loss + self.joint.head_weight * found.loss
        square = own.square + self.joint.head_weight * found.square
        return Sums(loss, square, own.weight, jax.lax.stop_gradient(parts | found.measures))

    def _own(self, logits: Float[Array, "B T V"], batch: Batch, frozen: Tree) -> Sums:
        """The target's own loss."""
        of_text = train.cross_entropy(logits, batch)
        if self.joint.target_loss == TEXT:
            return of_text
        of_original = parallel_heads.last_hidden(self.heads.target, frozen, batch)
        original = jax.lax.stop_gradient(heads.bind_target(self.heads.target, frozen).logits(of_original))
        log_p, log_q = (jax.nn.log_softmax(x / self.heads.temperature, axis=-1) for x in (original, logits))
        loss = jnp.sum(batch.weights * divergences.named(self.joint.target_loss)(log_p, log_q))
        return of_text._replace(loss=loss)


class _Made(NamedTuple):
    """How many steps were made."""

    steps: Array


@functools.cache
def _optimizer(name: str, joint: Joint) -> Any:
    """The optimiser of that name, whose updates of the target are `Joint.target_rate` of what they would be.

    An update is proportional to its learning rate, so this is a learning rate of the target's own.
    """

    def make(rate: optimizers.Schedule, config: TrainConfig) -> optax.GradientTransformation:
        def init(params: Tree) -> _Made:
            del params
            return _Made(jnp.zeros((), jnp.int32))

        def update(updates: Any, state: Any, params: Tree | None = None) -> tuple[Any, Any]:
            del params
            made = state.steps - joint.head_steps + 1
            share = joint.target_rate * jnp.clip(made / max(config.warmup_steps, 1), 0.0, 1.0)
            target = jax.tree.map(lambda x: share * x, updates.target)
            return updates._replace(target=target), _Made(state.steps + 1)

        return optax.chain(optimizers.named(name)(rate, config), optax.GradientTransformation(init, update))

    make.__qualname__ = f"{name}, {joint.target_rate} of it for the target after step {joint.head_steps}"
    return make


def _check(run: Run, joint: Joint) -> None:
    parallel_heads.check(run)
    if run.target.config.dtype != "float32":
        raise ValueError(
            f"The target is {run.target.config.dtype}: its parameters are trained in float32. Load it so, and give "
            "TrainConfig the dtype of the products."
        )
    if found := families.quantised_as(run.target.config):
        raise ValueError(f"The target is {found}, and cannot be trained: load it without.")
    if run.config.remat:
        raise ValueError("remat=True is not done for a target that is trained with its heads: leave it out.")
    if not 0 <= joint.head_steps < run.config.num_steps:
        raise ValueError(
            f"head_steps={joint.head_steps} of num_steps={run.config.num_steps}: fewer, or the target is not trained."
        )


_measure = jax.jit(lambda loss, params, batch, frozen: loss(params, batch, frozen, None), static_argnums=0)


def evaluate(run: Run, joint: Joint, params: JointState) -> dict[str, Any]:
    """`parallel_heads.evaluate` of the heads for the new target, on the same held-out texts.

    Returns:
      what it does, with the combined loss as `valid_loss`, and its parts, `target_loss` and `heads_loss`.
    """
    target = run.target._replace(params=params.target)
    of_heads = parallel_heads.evaluate(run._replace(target=target), params.heads)
    loss, totals = JointLoss(run.loss, joint, False), np.zeros(3)
    for batch in parallel_heads.batches(run):
        part = jax.device_get(_measure(loss, params, batch, run.target.params))
        totals += [part.loss, part.measures[f"{TARGET}_loss"], part.weight]
    combined, own = totals[:2] / max(totals[2], 1.0)
    return of_heads | {
        "valid_loss": float(combined),
        "target_loss": float(own),
        "heads_loss": of_heads["valid_loss"],
    }


def _export(run: Run, known: str | None, params: JointState, directory: Any) -> None:
    run.export(Heads(run.heads, params.heads, known), directory)
    pretrained.save(run.target._replace(params=params.target), directory / TARGET)


def learner(run: Run, joint: Joint) -> Learner:
    """The heads of a run and their target as the training loop takes them (`fit.learn`).

    Args:
      run: as for `parallel_heads.learner`; its target is what training begins from.
      joint: how the target is trained.

    Raises:
      ValueError: for what does not fit together.
    """
    _check(run, joint)
    target, config = run.target, dataclasses.replace(run.config, optimizer=_optimizer(str(run.config.optimizer), joint))
    identity: dict[str, Any] = parallel_heads.identity(run) | {"train": config.identity(), "joint": joint._asdict()}
    shapes = JointState(heads.abstract(run.heads), families.abstract_params(target.config))
    axes = JointState(heads.axes(run.heads), families.param_axes(target.config))

    def abstract() -> TrainState:
        return train.split_state(shapes, axes, config, run.mesh)

    def init() -> TrainState:
        places = jax.tree.map(lambda x: x.sharding, abstract())
        first = heads.initial(run.heads, jax.random.key(config.seed), target.config, target.params)
        return train.begin(config, places, JointState(first, target.params))

    def step(number: int, state: TrainState) -> tuple[TrainState, Metrics]:
        batch = run.data.at(number - 1, state.params).batch(number - 1, config.batch_size, run.mesh)
        loss = JointLoss(run.loss, joint, number > joint.head_steps)
        return train.update(config, loss, state, batch, target.params)

    def export(params: JointState, directory: Any) -> None:
        _export(run, identity["vocabulary"], params, directory)

    return Learner(
        config,
        identity,
        abstract,
        init,
        step,
        lambda params: evaluate(run, joint, params),
        export,
        mesh=run.mesh,
        looks_first=True,
    )


def fit_joint(run: Run, joint: Joint, directory: Any, report: fit.Report | None = None) -> Any:
    """Trains heads and their target, from the beginning or from where a run in the directory stopped (`fit.learn`).

    What is left in the directory: as `parallel_heads.fit_heads`, and `model/target/`, the new target, which is the one
    that the heads draft for. Both are those of the least combined loss: that with the most tokens per call might be a
    target that says the same for ever.

    Raises:
      KeyboardInterrupt, FloatingPointError, ValueError: as `fit.learn` does.
    """
    return fit.learn(learner(run, joint), directory, report)
