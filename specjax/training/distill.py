"""DistillSpec (Zhou et al. 2023, arXiv 2310.08461): a draft learns its target's distribution over the next token.

For texts y with prompts x, of either model or given (`own_text`), algorithm 1 minimises over the draft's parameters the
mean, over the tokens of y, of D(p(. | x, y_<t), q(. | x, y_<t)), where p is the target and q the draft.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from specjax.models import families
from specjax.models.config import ModelConfig
from specjax.training import divergences
from specjax.training.curve import Line
from specjax.training.divergences import Divergence
from specjax.training.train import Sums
from specjax.types import Batch, Tree

ALPHA, AGREEMENT = "alpha", "agreement"
"""The names of the measures: the acceptance rate at the temperature of distillation, and that of greedy decoding."""


def widened(logits: Float[Array, "B T U"], width: int) -> Float[Array, "B T V"]:
    """Logits over more tokens, which have no probability."""
    missing = ((0, 0), (0, 0), (0, width - logits.shape[-1]))
    return jnp.pad(logits, missing, constant_values=-jnp.inf) if missing[-1][1] > 0 else logits


@dataclasses.dataclass(frozen=True)
class Distillation:
    """The objective of distillation, whose frozen parameters are the target's. Equal ones compile once.

    Attributes:
      target: the shape of the target.
      divergence: what is minimised.
      temperature: that of both distributions; alpha and the divergence are those of sampling at this temperature.
    """

    target: ModelConfig
    divergence: Divergence
    temperature: float = 1.0

    def __call__(self, logits: Float[Array, "B T V"], batch: Batch, frozen: Tree) -> Sums:
        """The divergence of the draft's logits, with `alpha` and `agreement`, summed over the targets of a batch."""
        score = families.model(self.target).score
        assert score is not None  # Every family trains.
        target_logits = jax.lax.stop_gradient(score(frozen, batch))
        width = max(logits.shape[-1], target_logits.shape[-1])
        target_logits, draft_logits = widened(target_logits, width), widened(logits, width)
        log_p, log_q = (jax.nn.log_softmax(x / self.temperature, axis=-1) for x in (target_logits, draft_logits))
        square = jax.nn.logsumexp(logits, axis=-1) ** 2
        agrees = jnp.argmax(log_p, axis=-1) == jnp.argmax(log_q, axis=-1)

        def total(values: Float[Array, "B T"]) -> Float[Array, ""]:
            return jnp.sum(batch.weights * values)

        measures = {ALPHA: total(divergences.acceptance(log_p, log_q)), AGREEMENT: total(agrees.astype(jnp.float32))}
        loss = total(self.divergence(log_p, log_q))
        return Sums(loss, total(square), jnp.sum(batch.weights), jax.lax.stop_gradient(measures))


def by_alpha(line: Line) -> float:
    """Ranks validations by their acceptance rate."""
    return -line[ALPHA]
