"""A model fills K slots behind the text in one call, each of which sees the others: SpecDec's drafter.

SpecDec (Xia et al. 2022, arXiv 2203.16487): a deep encoder, a shallow decoder, and masks that are read together.
`training.specdec` trains it by glancing.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from specjax.drafters import one_call
from specjax.drafters.children import Children, most_probable
from specjax.drafters.one_call import Asked, Reader, mask_of, window
from specjax.types import Block, History


def nonautoregressive(
    draft: Any,
    *,
    mask_token: int | None = None,
    num_draft_tokens: int | None = None,
    min_confidence: float = 0.0,
    lengths: tuple[int, ...] = (),
    topology: str | Sequence[int] | Sequence[Sequence[int]] | None = None,
    children: Children = most_probable,
) -> Any:
    """Drafts K tokens by one call of a model that reads K masks behind the text, each of which sees all of them.

    What the model says at a mask is the token in its place. SpecDec's drafter is an encoder-decoder, with as deep an
    encoder as its target's and few layers in the decoder; any model of specjax may be one. As published, the decoder
    reads the whole text anew in every call, and its tokens see each other both ways. Here a token of the text sees
    those before it alone, so that its keys are computed once, and the masks see everything; and the position bias of
    a T5's decoder counts every later mask as near.

    The slots are independent given the text, and each token states what it was drawn from: `rejection` is exact.
    SpecDec's own rule is `verify.top_k(beta, tau)`, which accepts the target's `beta` most probable tokens within `tau`
    nats of the best, and is not.

    Args:
      draft: a model that was trained so, a `Pretrained` whose `config.mask_token` names the mask, or a `Model`, whose
        parameters the caller passes to the loop.
      mask_token: the id of the mask, where `draft.config` does not name it or another is meant.
      num_draft_tokens: K, for a chain, at least 1; by default 8.
      min_confidence: as in `drafters.pard`.
      lengths: as there.
      topology: as there.
      children: as there.

    Returns:
      a `Draft` for a `Pretrained`, a `Drafter` for a `Model`.

    Raises:
      ValueError: as `drafters.pard`.
    """
    mask = mask_of(draft, mask_token, "configs/specdec.py")
    return one_call.make(
        draft,
        mask,
        block_of,
        num_draft_tokens=num_draft_tokens,
        min_confidence=min_confidence,
        lengths=lengths,
        topology=topology,
        children=children,
    )


def block_of(reader: Reader, history: History) -> Asked:
    """The newest tokens, causally, and K masks that see all of them; each is the prediction of its own place."""
    tokens, begin, last = window(reader, history, reader.depth)
    place = jnp.arange(tokens.shape[1])
    is_mask = (place > last[:, None]) & (place <= last[:, None] + reader.depth)
    causal = place <= place[:, None]
    both_ways = is_mask[:, :, None] & (place <= last[:, None] + reader.depth)[:, None]
    at = last[:, None] + 1 + jnp.arange(reader.depth)
    return Asked(Block(tokens, sees=causal | both_ways), begin, at)
