"""The configuration of a training run."""

import dataclasses
from collections.abc import Callable
from typing import Any

SCHEDULES = ("cosine", "inverse_sqrt", "constant")
OPTIMIZERS = ("adamw", "adafactor")

_POSITIVE = ("num_steps", "batch_size", "num_microbatches", "eval_every", "save_every", "log_every", "keep")
_NOT_NEGATIVE = (
    "learning_rate",
    "warmup_steps",
    "final_fraction",
    "weight_decay",
    "clip_norm",
    "z_loss",
    "dropout",
    "seed",
    "patience",
)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How a model is trained.

    Attributes:
      num_steps: how many steps the optimiser takes.
      batch_size: rows of a step, over all devices and microbatches.
      num_microbatches: parts of a batch whose gradients are added up, to save memory.
      optimizer: a name of `OPTIMIZERS`, or a function `(schedule, config) -> optax.GradientTransformation`.
      learning_rate: the peak of the schedule.
      schedule: a name of `SCHEDULES`: what follows the warm-up.
      warmup_steps: steps in which the learning rate grows linearly.
      final_fraction: the learning rate at the end of a cosine, as a fraction of the peak.
      weight_decay: the decay of matrices and tables, times the learning rate.
      beta1: decay of AdamW's mean of gradients.
      beta2: decay of its mean of their squares.
      clip_norm: the largest norm of the gradient; 0 does not clip.
      z_loss: weight of the squared log-normaliser in the loss, which keeps logits small (arXiv 2204.02311, section 5).
      dtype: that of the matrix products, "float32" or "bfloat16". Parameters and loss are float32 in both.
      remat: whether the backward pass computes each layer again from what goes into it (arXiv 1604.06174): less memory
        on accelerators, and about a third more work. XLA:CPU orders the work so that little memory is saved.
      dropout: the probability that a number is set to zero in the forward pass of a step (Srivastava et al. 2014): of
        what attention and feed-forward add to the residual stream of a language model; in a T5, also of embeddings,
        attention weights, what is within feed-forwards, and both stacks' outputs (arXiv 1910.10683, section 2.1).
      seed: determines the initial parameters, the order of the texts, and what is dropped.
      eval_every: steps between two validations.
      save_every: steps between two checkpoints.
      log_every: steps between two reports.
      keep: how many checkpoints are kept.
      patience: a run ends after this many validations in a row that are no better than the best; 0: never.
    """

    num_steps: int
    batch_size: int
    num_microbatches: int = 1
    optimizer: str | Callable[..., Any] = "adamw"
    learning_rate: float = 1e-3
    schedule: str = "cosine"
    warmup_steps: int = 0
    final_fraction: float = 0.1
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.98
    clip_norm: float = 1.0
    z_loss: float = 0.0
    dtype: str = "float32"
    remat: bool = False
    dropout: float = 0.0
    seed: int = 0
    eval_every: int = 500
    save_every: int = 500
    log_every: int = 10
    keep: int = 2
    patience: int = 0

    def __post_init__(self):
        for name in _POSITIVE:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: at least 1.")
        for name in _NOT_NEGATIVE:
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: at least 0.")
        if self.dropout >= 1:
            raise ValueError(f"dropout={self.dropout}: less than 1.")
        choices = {"schedule": SCHEDULES, "dtype": ("float32", "bfloat16")}
        if isinstance(self.optimizer, str):
            choices["optimizer"] = OPTIMIZERS
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(known)}.")
        if self.batch_size % self.num_microbatches:
            raise ValueError(
                f"batch_size={self.batch_size} is not a multiple of num_microbatches={self.num_microbatches}."
            )

    def identity(self) -> dict[str, Any]:
        """Everything that determines the parameters, as JSON values; a run resumes only if it is unchanged."""
        values = dataclasses.asdict(self)
        if not isinstance(self.optimizer, str):
            values["optimizer"] = getattr(self.optimizer, "__qualname__", repr(self.optimizer))
        free = ("save_every", "log_every", "keep", "patience")
        return {name: value for name, value in values.items() if name not in free}
