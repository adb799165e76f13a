"""Adapts a small model to masks, so that one call predicts K tokens (PARD, An et al. 2025, arXiv 2504.18583).

A text is read together with masks behind its tokens (`masked`), one token of the vocabulary for all of them, and the
loss is the cross-entropy of the text's own next tokens, behind tokens and masks alike. So the model still predicts the
next token, and learns to predict those after it. Of the masks of far places few are kept (`masked.counts`), which
saves most of the work. Parameters are those of the whole model; `fit` trains them as any other.
"""

from specjax.training import masked
from specjax.training.data import Dataset
from specjax.training.slots import MaskedTexts, with_masks_of

KEEP, LEAST = 0.7, 0.2
"""The share of the masks of a place that are kept, to the power of the place, and the least share, as published."""


def with_masks(
    data: Dataset, mask_token: int, num_masks: int, *, keep: float = KEEP, least: float = LEAST
) -> MaskedTexts:
    """Texts with masks behind their tokens.

    Args:
      data: the texts.
      mask_token: the id of the mask, one that texts do not have.
      num_masks: how many masks are read one after the other: K - 1 for drafts of K tokens.
      keep: masks of place i, from 1, are kept behind a share of keep^i of the tokens.
      least: the least share.

    Raises:
      ValueError: for no mask, shares that are none, or texts that have the mask's token.
    """
    if num_masks < 1:
        raise ValueError(f"num_masks={num_masks}: at least 1; a model without masks is trained by configs/train.py.")
    return with_masks_of(data, mask_token, masked.counts(data.target_length, num_masks, keep, least), masked.AHEAD)
