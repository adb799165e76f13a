"""A small model that was adapted to predict K tokens in one call, from masks behind the text, drafts.

PARD: An et al. 2025, arXiv 2504.18583. One token of the vocabulary, `pard_token` in the model's config.json, stands for
every token to come; `training.pard` adapts a model to it.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from specjax.drafters import one_call
from specjax.drafters.children import Children, most_probable
from specjax.drafters.one_call import Asked, Reader, mask_of, window
from specjax.types import Block, History


def pard(
    draft: Any,
    *,
    mask_token: int | None = None,
    num_draft_tokens: int | None = None,
    min_confidence: float = 0.0,
    lengths: tuple[int, ...] = (),
    topology: str | Sequence[int] | Sequence[Sequence[int]] | None = None,
    children: Children = most_probable,
) -> Any:
    """Drafts K tokens by one call of a small model, which reads the newest tokens and K - 1 masks behind them.

    The call gives the distribution of the next token, and behind each mask that of the token after the one that it
    stands for. These depend on the text alone, not on the draft tokens: each token states what it was drawn from, so
    that `rejection` and all other exact rules are. The masks' entries in the model's cache are never committed, and
    the next call overwrites them. Where a draft model of the usual kind is called K times, this one is called once.

    Args:
      draft: a model that was adapted to masks, a `Pretrained` whose `config.mask_token` names the mask, or a `Model`,
        whose parameters the caller passes to the loop.
      mask_token: the id of the mask, where `draft.config` does not name it or another is meant.
      num_draft_tokens: K, for a chain, at least 1; by default 8.
      min_confidence: a row's draft ends after the first place at which the draft's most probable token was less
        probable than that, before any option; 0: never. Whether a place is proposed depends on the text alone.
      lengths: of a chain, shorter lengths with programs of their own (`Topology.lengths`); the draft's call does not
        change.
      topology: the shape of a tree, as in `drafters.model`; the children of all nodes of a depth are found in the
        distribution of that depth. None: a chain.
      children: how they are found, as there; by default they are the most probable ones.

    Returns:
      a `Draft` for a `Pretrained`, a `Drafter` for a `Model`.

    Raises:
      ValueError: for K < 1 or too large, no mask token, one that is not in the draft's vocabulary, a confidence that is
        not a probability, or a topology together with the sizes of a chain.
    """
    mask = mask_of(draft, mask_token, "`pard_token` of its config.json, or configs/pard.py")
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
    """The newest tokens and K - 1 masks, causally: behind the text the next token is predicted, behind a mask the one
    after the token that it stands for.
    """
    tokens, begin, last = window(reader, history, reader.depth - 1)
    return Asked(Block(tokens), begin, last[:, None] + jnp.arange(reader.depth))
