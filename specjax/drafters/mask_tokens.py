"""Mask tokens: the target reads placeholders behind its text, and what it says there is the next draft.

PaSS: Monea et al. 2023, arXiv 2311.13581, whose look-ahead tokens are read in a call of their own (`parallel_masks`).
Here every draft token carries its own, so that one call both verifies a draft and makes the next (prompt tokens: Chen
et al. 2024, arXiv 2405.18628).
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from specjax import sampling
from specjax.limits import MAX_DRAFT_TOKENS, check_num_draft_tokens, check_size
from specjax.types import Context, Draft, Drafter, Feedback, Params, Probes, Proposal, Topology, Tree


class Ids(NamedTuple):
    """What the target reads as masks.

    Attributes:
      tokens: the id of the mask of each place; with embeddings, the row of each in them.
      embedded: whether the masks read embeddings of their own, those of `params.draft`.
    """

    tokens: tuple[int, ...]
    embedded: bool = False

    def read(self, params: Tree, vocab_size: int) -> tuple[tuple[int, ...], Float[Array, "K E"] | None]:
        """The ids that a block has, and the embeddings that those beyond the vocabulary read (`Block.embeddings`).

        Args:
          params: the drafter's.
          vocab_size: V of the target.
        """
        if not self.embedded:
            return self.tokens, None
        return tuple(vocab_size + row for row in self.tokens), params["embeddings"]


def ids_of(mask_token: int | Sequence[int] | None, embeddings: Any, number: int) -> Ids:
    """The masks of `number` places, from what a user gave.

    Raises:
      ValueError: for a negative id, a number of ids or embeddings that is not `number`, or both of them, or none.
    """
    if (mask_token is None) == (embeddings is None):
        raise ValueError(
            f"mask_token={mask_token}, embeddings={'None' if embeddings is None else 'an array'}: give one of them, "
            "ids of the vocabulary or trained embeddings."
        )
    if embeddings is not None:
        if jnp.ndim(embeddings) != 2 or len(embeddings) != number:
            raise ValueError(f"embeddings of shape {list(jnp.shape(embeddings))}: one row for each of {number} masks.")
        return Ids(tuple(range(number)), embedded=True)
    tokens: list[Any] = list(mask_token) if isinstance(mask_token, Sequence) else [mask_token] * number
    for token in tokens:
        check_size("mask_token", token, 0)
    if len(tokens) != number:
        raise ValueError(f"mask_token={mask_token} names {len(tokens)} tokens: give one, or {number}, one a mask.")
    return Ids(tuple(map(int, tokens)))


def with_embeddings(drafter: Drafter, embeddings: Any) -> Any:
    """The drafter, together with the embeddings of its masks where it has some: a `Draft`."""
    return drafter if embeddings is None else Draft(drafter, {"embeddings": jnp.asarray(embeddings)})


class _Masks(NamedTuple):
    """The K masks behind each of the K + 1 tokens that a step judges, one token's after the other.

    Attributes:
      tokens: `[M]` their ids; M = K (K + 1).
      depth: `[M]` their positions behind the last committed token.
      sees: `[M, K + 1 + M]` the tokens up to the one that they follow, then the masks before them behind the same one.
    """

    tokens: Int[np.ndarray, " M"]
    depth: Int[np.ndarray, " M"]
    sees: Bool[np.ndarray, "M W"]


def _masks(tokens: tuple[int, ...]) -> _Masks:
    k = len(tokens)
    behind, place = np.divmod(np.arange(k * (k + 1)), k)
    sees_text = np.arange(k + 1) <= behind[:, None]
    sees_masks = (behind == behind[:, None]) & (place <= place[:, None])
    depth = (behind + place + 1).astype(np.int32)
    return _Masks(np.tile(np.asarray(tokens, np.int32), k + 1), depth, np.concatenate([sees_text, sees_masks], axis=1))


def mask_tokens(
    *, mask_token: int | Sequence[int] | None = None, embeddings: Any = None, num_draft_tokens: int = 3
) -> Any:
    """Drafts what the target says behind K mask tokens, without a model or further calls.

    A step reads K draft tokens and K masks behind each of the K + 1 tokens that it judges: K (K + 2) tokens besides the
    last one. Mask j stands for the j-th token after the one that it follows, whatever that will be, so its output is a
    draft of the token after. The masks behind the last accepted token give the next draft, their argmax at any
    temperature.

    A target that has not been trained to read a mask predicts little behind it: with an ordinary token, expect few
    tokens per call more than one. PaSS trains an embedding for each of K look-ahead tokens with all else frozen, O(E)
    parameters beside the target's (arXiv 2311.13581, abstract); those are `embeddings`, which the target reads in the
    place of rows of its table, so that its own parameters are neither changed nor copied.

    Args:
      mask_token: the id of the mask, such as that of padding, or K ids, one for each place; None with embeddings.
      embeddings: `[K, E]` what the mask of each place reads, on the scale of the target's embedding table, or None.
      num_draft_tokens: K; at least 1.

    Returns:
      a `Draft` with embeddings, otherwise a `Drafter`.

    Raises:
      ValueError: for K < 1, a negative id, a number of ids or embeddings that is not K, both or none of them, or more
        tokens in a step than `limits.MAX_DRAFT_TOKENS`. The call of the target, for embeddings of another width.
    """
    check_num_draft_tokens(num_draft_tokens)
    if not 0 < num_draft_tokens * (num_draft_tokens + 2) <= MAX_DRAFT_TOKENS:
        raise ValueError(
            f"num_draft_tokens={num_draft_tokens}: from 1 to {int((MAX_DRAFT_TOKENS + 1) ** 0.5) - 1}, since a step "
            "reads K (K + 2) tokens."
        )
    return with_embeddings(_drafter(ids_of(mask_token, embeddings, num_draft_tokens)), embeddings)


@functools.cache
def _drafter(ids: Ids) -> Drafter:
    k = len(ids.tokens)
    num_probes = k * (k + 1)

    def init(batch_size: int, max_len: int, max_source: int = 0) -> Int[Array, "B K"]:
        del max_len, max_source
        return jnp.zeros((batch_size, k), jnp.int32)

    def propose(
        params: Params, state: Int[Array, "B K"], cache: Any, context: Context
    ) -> tuple[Proposal, Int[Array, "B K"], Any]:
        rows = state.shape[0]
        tokens, embeddings = ids.read(params.draft, context.vocab_size)
        masks = [jnp.broadcast_to(x, (rows, *x.shape)) for x in _masks(tokens)]
        probes = Probes(masks[0], masks[1], masks[2], embeddings)
        return Proposal(state, jnp.minimum(context.max_draft, k), None, probes=probes), state, cache

    def update(params: Params, state: Int[Array, "B K"], feedback: Feedback) -> Int[Array, "B K"]:
        del params
        logits, count, context = feedback.output.logits, feedback.num_tokens[:, None], feedback.context
        if context is None:
            # No mask has been read behind a prompt: its next token is known, and stands in for those after it.
            return jnp.where(count > 0, sampling.argmax(logits[:, -1:]), state)
        said = sampling.argmax(logits[:, k + 1 :]).reshape(-1, k + 1, k)
        # Of the T = K + 1 tokens of the call, the first `count` are text now, and the last of these was read.
        last = jnp.maximum(count - 1, 0)
        of_last = jnp.take_along_axis(said, last[..., None], axis=1)[:, 0]
        moved = jnp.take_along_axis(state, jnp.minimum(count + jnp.arange(k), k - 1), axis=1)
        return jnp.where((context.max_draft > 0)[:, None], of_last, moved)

    return Drafter(init, propose, update, Topology.chain(k)._replace(num_probes=num_probes))
