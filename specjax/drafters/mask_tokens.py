"""Mask tokens: the target reads placeholders behind its text, and what it says there is the next draft.

PaSS: Monea et al. 2023, arXiv 2311.13581, whose look-ahead tokens are read in a call of their own. Here every draft
token carries its own, so that one call both verifies a draft and makes the next (prompt tokens: Chen et al. 2024, arXiv
2405.18628).
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, overload

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from specjax import sampling
from specjax.limits import MAX_DRAFT_TOKENS, check_num_draft_tokens, check_size
from specjax.types import AnyDrafter, Context, Draft, Drafter, Feedback, Params, Probes, Proposal, Topology


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


@overload
def mask_tokens(
    *, mask_token: int | Sequence[int] | None = None, num_draft_tokens: int | None = None, embeddings: None = None
) -> Drafter: ...


@overload
def mask_tokens(*, num_draft_tokens: int | None = None, embeddings: Array | np.ndarray) -> Draft: ...


def mask_tokens(
    *, mask_token: int | Sequence[int] | None = None, num_draft_tokens: int | None = None, embeddings: Any = None
) -> AnyDrafter:
    """Drafts what the target says behind K mask tokens, without a model or further calls.

    A step reads K draft tokens and K masks behind each of the K + 1 tokens that it judges: K (K + 2) tokens besides the
    last one. Mask j stands for the j-th token after the one that it follows, whatever that will be, so its output is a
    draft of the token after. The masks behind the last accepted token give the next draft, their argmax at any
    temperature.

    A target that has not been trained to read a mask predicts little behind it: with an ordinary token, expect few
    tokens per call more than one. PaSS (section 2) adds K embeddings to a frozen model and trains nothing else: give
    them as `embeddings`. They are the drafter's parameters, and the target's table is neither copied nor changed.

    Args:
      mask_token: the id of the mask, such as that of padding, or K ids, one for each place.
      num_draft_tokens: K; at least 1, by default the number of ids or embeddings, or 3.
      embeddings: `[K, E]`, what the masks read in the place of a token's embedding; instead of `mask_token`.

    Returns:
      a `Draft` with embeddings, otherwise a `Drafter`.

    Raises:
      ValueError: for K < 1, a negative id, a number of ids or embeddings that is not K, both or neither of them, or
        more tokens in a step than `limits.MAX_DRAFT_TOKENS`. While the loop is traced, for embeddings of another width
        than the target's.
    """
    tokens, params = parse(mask_token, num_draft_tokens, embeddings)
    num_draft_tokens = len(tokens)
    if not 0 < num_draft_tokens * (num_draft_tokens + 2) <= MAX_DRAFT_TOKENS:
        raise ValueError(
            f"num_draft_tokens={num_draft_tokens}: from 1 to {int((MAX_DRAFT_TOKENS + 1) ** 0.5) - 1}, since a step "
            "reads K (K + 2) tokens."
        )
    drafter = _drafter(tokens)
    return drafter if params is None else Draft(drafter, params)


def parse(
    mask_token: int | Sequence[int] | None, num_draft_tokens: int | None, embeddings: Any
) -> tuple[tuple[int, ...], dict[str, Array] | None]:
    """The ids of the K masks, and the parameters of a draft with embeddings, whose ids are never read.

    Raises:
      ValueError: as `mask_tokens`.
    """
    if (mask_token is None) == (embeddings is None):
        raise ValueError("Give either mask_token=..., ids of the target's table, or embeddings=..., trained vectors.")
    params = None
    if embeddings is not None:
        params = {"embeddings": jnp.asarray(embeddings)}
        if params["embeddings"].ndim != 2:
            raise ValueError(f"embeddings of shape {list(params['embeddings'].shape)}: give [K, E].")
    name = f"mask_token={mask_token}" if embeddings is None else "embeddings"
    given = (0,) * params["embeddings"].shape[0] if params else mask_token
    assert given is not None  # As checked above.
    number = num_draft_tokens
    if number is None:
        number = len(given) if isinstance(given, Sequence) else 3
    check_num_draft_tokens(number)
    tokens = tuple(given) if isinstance(given, Sequence) else (given,) * number
    for token in tokens:
        check_size("mask_token", token, 0)
    if len(tokens) != number:
        raise ValueError(f"{name} names {len(tokens)} tokens: give one id, or num_draft_tokens={len(tokens)}.")
    return tuple(map(int, tokens)), params


def given_embeddings(params: Params, rows: int, repeats: int = 1) -> Float[Array, "B M E"] | None:
    """What the masks of all rows read instead of a token's embedding, the K of them `repeats` times; None: tokens."""
    if not isinstance(params.draft, dict) or "embeddings" not in params.draft:
        return None
    table = jnp.tile(params.draft["embeddings"], (repeats, 1))
    return jnp.broadcast_to(table, (rows, *table.shape))


@functools.cache
def _drafter(tokens: tuple[int, ...]) -> Drafter:
    k, masks = len(tokens), _masks(tokens)
    num_probes = k * (k + 1)

    def init(batch_size: int, max_len: int, max_source: int = 0) -> Int[Array, "B K"]:
        del max_len, max_source
        return jnp.zeros((batch_size, k), jnp.int32)

    def propose(
        params: Params, state: Int[Array, "B K"], cache: Any, context: Context
    ) -> tuple[Proposal, Int[Array, "B K"], Any]:
        rows = state.shape[0]
        probes = Probes(
            *(jnp.broadcast_to(x, (rows, *x.shape)) for x in masks),
            embeddings=given_embeddings(params, rows, repeats=k + 1),
        )
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
