"""Trains parallel heads (`drafters.medusa`, `drafters.blockwise`) for a target that is frozen.

The target's hidden states are computed for each batch. At the token of position i, head k (from 1) learns the token at
i + 1 + k, or the target's distribution of it. Losses are added with the weights 0.8^(k - 1), as Medusa's are (arXiv
2401.10774, section 2.2.1, where the weight of head k is 0.8^k; a common factor is the learning rate's). Blockwise
decoding trains one random head in a step, since the memory did not suffice for all (arXiv 1811.03115, section 6); here
all are trained.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from specjax.api.pretrained import Pretrained
from specjax.drafters import store
from specjax.drafters.parallel_heads import Heads
from specjax.models import families
from specjax.models import parallel_heads as heads
from specjax.models.config import ModelConfig
from specjax.models.parallel_heads import ParallelHeadsConfig
from specjax.models.weights import checkpoint
from specjax.training import divergences, fit, train
from specjax.training.config import TrainConfig
from specjax.training.curve import Line
from specjax.training.data import Dataset
from specjax.training.fit import Learner, Source
from specjax.training.train import Metrics, Sums, TrainState
from specjax.types import Batch, Tree

TEXT = "text"
"""What stands for a divergence where heads learn the tokens of the text, by cross-entropy."""

RANKS = 10
"""How many of a head's most probable tokens are compared with the target's: Medusa's trees have so many children."""

DECAY = 0.8
"""The weight of a head's loss, relative to that of the head before it."""


class Shifted(NamedTuple):
    """What head k is compared with at every token.

    Attributes:
      targets: `[B, T]` the tokens that it predicts.
      weight: `[B, T]` their loss weights; 0 where the text has ended.
    """

    targets: Array
    weight: Float[Array, "B T"]


def shifted(batch: Batch, k: int) -> Shifted:
    """The tokens k + 1 places behind each token, in its own text.

    Args:
      batch: the texts; `batch.targets` are one place behind.
      k: the number of the head, from 1.
    """

    def move(x: Any) -> Any:
        return jnp.pad(x[:, k:], ((0, 0), (0, min(k, x.shape[1]))))

    same = (move(batch.segments) == batch.segments) & (batch.segments > 0)
    return Shifted(move(batch.targets), jnp.where(same, move(batch.weights), 0.0))


def last_hidden(target: ModelConfig, params: Tree, batch: Batch) -> Float[Array, "B T D"]:
    """The target's last hidden states, after its final norm, at the tokens of a batch."""
    with_taps = families.model(target).with_taps
    assert with_taps is not None  # Every family has layers.
    features = with_taps((-1,)).features
    assert features is not None
    return features(params, batch)[:, :, 0]


@dataclasses.dataclass(frozen=True)
class HeadLoss:
    """The loss of parallel heads (`train.Loss`), whose frozen parameters are the target's. Equal ones compile once.

    Attributes:
      heads: the shape of the heads, in float32.
      target: that of the target.
      divergence: a name of `divergences`, by which heads learn the target's distributions, or `TEXT`.
      dtype: that of the heads' products.
      temperature: of both distributions of a divergence, and of `overlap`.
      decay: the weight of a head's loss, relative to that of the head before it.
      measures: whether acceptance is measured too: for head k (from 1) the sums `greedy_k`, of how often its most
        probable token is the target's, `overlap_k`, of sum min(p, q), `ranks_k` `[RANKS]`, of how often its r-th most
        probable token is the target's, and `weight_k`, of the weights of them all.
    """

    heads: ParallelHeadsConfig
    target: ModelConfig
    divergence: str
    dtype: str = "float32"
    temperature: float = 1.0
    decay: float = DECAY
    measures: bool = False

    def __call__(self, params: Tree, batch: Batch, frozen: Tree, keys: Any) -> Sums:
        """The sums over the targets of a batch."""
        del keys
        return self.of_hidden(params, batch, frozen, jax.lax.stop_gradient(last_hidden(self.target, frozen, batch)))

    def of_hidden(self, params: Tree, batch: Batch, frozen: Tree, hidden: Float[Array, "B T D"]) -> Sums:
        """The sums over the targets of a batch, whose hidden states are known.

        Args:
          params: the heads.
          batch: the texts.
          frozen: the target's parameters, whose distributions are learnt; only as those that the heads go through is
            there a gradient to them.
          hidden: the target's last hidden states.
        """
        config, cast = heads.cast(self.heads, params, self.dtype)
        logits = heads.logits(config, cast, self.target, frozen, hidden)
        log_p = None
        if self.measures or self.divergence != TEXT:
            own = jax.lax.stop_gradient(heads.bind_target(self.target, frozen).logits(hidden))
            log_p = jax.nn.log_softmax(own / self.temperature, axis=-1)
        loss, square, measures = jnp.zeros(()), jnp.zeros(()), {}
        for k in range(1, self.heads.num_heads + 1):
            of_head, known = logits[:, :, k - 1], shifted(batch, k)
            normaliser = jax.nn.logsumexp(of_head, axis=-1)
            square += jnp.sum(known.weight * normaliser**2)
            moved = None if log_p is None else jnp.pad(log_p[:, k:], ((0, 0), (0, min(k, log_p.shape[1])), (0, 0)))
            loss += self.decay ** (k - 1) * jnp.sum(known.weight * self._of_head(of_head, normaliser, known, moved))
            if self.measures and moved is not None:
                measures |= self._measured(k, of_head, moved, known.weight)
        return Sums(loss, square, jnp.sum(batch.weights), jax.lax.stop_gradient(measures))

    def _of_head(self, logits: Array, normaliser: Array, known: Shifted, log_p: Array | None) -> Float[Array, "B T"]:
        """The loss of one head at every token."""
        if self.divergence == TEXT or log_p is None:
            # Not a gather, which would collect logits that are split over the vocabulary.
            is_target = jnp.arange(logits.shape[-1]) == known.targets[:, :, None]
            return normaliser - jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
        log_q = jax.nn.log_softmax(logits / self.temperature, axis=-1)
        return divergences.named(self.divergence)(log_p, log_q)

    def _measured(self, k: int, logits: Array, log_p: Array, weight: Array) -> dict[str, Array]:
        log_q = jax.nn.log_softmax(logits / self.temperature, axis=-1)
        best = jnp.argmax(log_p, axis=-1)
        # Not a gather, as above.
        of_best = jnp.max(jnp.where(jnp.arange(log_q.shape[-1]) == best[..., None], log_q, -jnp.inf), axis=-1)
        rank = jnp.sum(log_q > of_best[..., None], axis=-1)
        return {
            f"greedy_{k}": jnp.sum(weight * (jnp.argmax(log_q, axis=-1) == best)),
            f"ranks_{k}": jnp.sum(weight[..., None] * (rank[..., None] == jnp.arange(RANKS)), axis=(0, 1)),
            f"overlap_{k}": jnp.sum(weight * divergences.acceptance(log_p, log_q)),
            f"weight_{k}": jnp.sum(weight),
        }


class Run(NamedTuple):
    """A training run of heads.

    Attributes:
      heads: their shape, float32.
      target: what they draft for; its parameters are not changed.
      config: how they are trained.
      loss: what is minimised, without measures.
      data: the texts to learn.
      valid: held-out texts.
      export: `(heads, directory)`, writes them.
      identity: what else determines the run, as JSON values.
      mesh: where they are trained; None for the default device.
    """

    heads: ParallelHeadsConfig
    target: Pretrained
    config: TrainConfig
    loss: HeadLoss
    data: Source
    valid: Dataset
    export: Any
    identity: Mapping[str, Any] = {}
    mesh: Mesh | None = None


def batches(run: Run) -> Iterator[Batch]:
    """The held-out texts, in the parts that a step has."""
    yield from run.valid.in_order(run.config.batch_size // run.config.num_microbatches, run.mesh)


_measure = jax.jit(lambda loss, params, batch, frozen: loss(params, batch, frozen, None), static_argnums=0)


def evaluate(run: Run, params: Tree) -> dict[str, Any]:
    """The loss and the acceptance by position on the held-out texts.

    Returns:
      `valid_loss`, the mean over all targets, in nats; `greedy`, a list: how often the most probable token of each head
      is the target's, given that the tokens before it are the text's, which is the acceptance rate at temperature 0;
      `overlap`, the mean of sum min(p, q), that at the temperature of the loss; and `ranks`, for each head how often
      its r-th most probable token is the target's, from which `theory.best_tree` makes a tree.
    """
    loss, totals = dataclasses.replace(run.loss, measures=True), {}
    for batch in batches(run):
        part = jax.device_get(_measure(loss, params, batch, run.target.params))
        for name, value in {"weight": part.weight, "loss": part.loss, **part.measures}.items():
            totals[name] = totals.get(name, 0.0) + np.asarray(value, np.float64)
    numbers = range(1, run.heads.num_heads + 1)
    rates = {
        name: [(totals[f"{name}_{k}"] / max(totals[f"weight_{k}"], 1.0)).tolist() for k in numbers]
        for name in ("greedy", "overlap", "ranks")
    }
    return {"valid_loss": float(totals["loss"] / max(totals["weight"], 1.0)), **rates}


def expected_tokens(line: Line) -> float:
    """The tokens of a call at temperature 0, from `greedy`, if each position were accepted as often as it says."""
    return float(1 + np.sum(np.cumprod(line["greedy"])))


def by_tokens(line: Line) -> float:
    """Ranks validations by the tokens of a call."""
    return -expected_tokens(line)


def check(run: Run) -> None:
    """Refuses what does not fit together.

    Raises:
      ValueError: naming the value and the remedy.
    """
    longest = run.target.model.max_len
    if run.data.target_length > longest:
        raise ValueError(f"target_length={run.data.target_length}, but the target knows {longest} positions: lower it.")
    if run.data.target_length <= run.heads.num_heads + 1:
        raise ValueError(
            f"target_length={run.data.target_length}: {run.heads.num_heads} heads predict up to "
            f"{run.heads.num_heads + 1} tokens ahead; raise it."
        )
    if run.mesh is not None:
        part, over = run.config.batch_size // run.config.num_microbatches, run.mesh.shape["data"]
        if part % over:
            raise ValueError(f"{part} rows of a microbatch do not divide over the {over} devices of mesh axis 'data'.")


def identity(run: Run) -> dict[str, Any]:
    """What has to be unchanged for a run to resume, as JSON values."""
    target = run.target
    return {
        "train": run.config.identity(),
        "heads": dataclasses.asdict(run.heads),
        "target_model": checkpoint.config_to_json(target.config),
        "vocabulary": None if target.tokenizer is None else store.fingerprint(target.tokenizer),
        "divergence": run.loss.divergence,
        "temperature": run.loss.temperature,
        "decay": run.loss.decay,
        "data_checksum": run.data.checksum,
        "valid_checksum": run.valid.checksum,
        "target_length": run.data.target_length,
        "source_length": run.data.source_length,
        **run.identity,
    }


def learner(run: Run) -> Learner:
    """The heads of a run as the training loop takes them (`fit.learn`).

    Raises:
      ValueError: for what does not fit together.
    """
    check(run)
    config, target = run.config, run.target
    shapes, axes = heads.abstract(run.heads), heads.axes(run.heads)
    known = None if target.tokenizer is None else store.fingerprint(target.tokenizer)

    def abstract() -> TrainState:
        return train.split_state(shapes, axes, config, run.mesh)

    def init() -> TrainState:
        places = jax.tree.map(lambda x: x.sharding, abstract())
        key = jax.random.key(config.seed)
        return train.begin(config, places, heads.initial(run.heads, key, target.config, target.params))

    def step(number: int, state: TrainState) -> tuple[TrainState, Metrics]:
        batch = run.data.at(number - 1, state.params).batch(number - 1, config.batch_size, run.mesh)
        return train.update(config, run.loss, state, batch, target.params)

    return Learner(
        config,
        identity(run),
        abstract,
        init,
        step,
        lambda params: evaluate(run, params),
        lambda params, directory: run.export(Heads(run.heads, params, known), directory),
        by_tokens,
        run.mesh,
        True,
    )


def fit_heads(run: Run, directory: Any, report: fit.Report | None = None) -> Any:
    """Trains heads, from the beginning or from where a run in the directory stopped (`fit.learn`).

    What is left in the directory: `checkpoints/`, `train.jsonl`, and `model/`, the heads with the most tokens per call.

    Args:
      run: what is trained.
      directory: used by this run alone.
      report: called with the new lines of the curve.

    Returns:
      the `curve.Curve`.

    Raises:
      KeyboardInterrupt, FloatingPointError, ValueError: as `fit.learn` does.
    """
    return fit.learn(learner(run), directory, report)


def num_params(config: ParallelHeadsConfig) -> int:
    """How many parameters heads have."""
    return sum(leaf.size for leaf in jax.tree.leaves(heads.abstract(config)))
