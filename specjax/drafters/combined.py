"""What drafters made of several drafters share (`merged`, `first_of`)."""

from collections.abc import Sequence
from typing import Any

from specjax.drafters import contract
from specjax.types import Draft, Drafter, Feedback, ModelOutput


def drafting(parts: Sequence[Any]) -> list[Draft]:
    """The parts that draft tokens.

    Args:
      parts: drafters, each a `Drafter` or a `Draft`.

    Raises:
      ValueError: for fewer than two that draft, or parts of different vocabularies.
      TypeError: for a part that is not a drafter.
    """
    found = [draft for draft in (contract.check(part) for part in parts) if draft.num_draft_tokens]
    if not found:
        raise ValueError(f"parts={list(parts)!r}: none of them drafts a token; give at least one that does.")
    if len(found) == 1:
        raise ValueError("parts: only one of them drafts tokens; give that drafter itself.")
    tokenizers = [draft.tokenizer for draft in found if draft.tokenizer is not None]
    for other in tokenizers[1:]:
        ours, theirs = tokenizers[0].vocab(), other.vocab()
        if any(ours.get(token, i) != i for token, i in theirs.items()):
            raise ValueError("parts: their vocabularies do not match, but all drafts are judged by one target.")
    return found


def together(drafter: Drafter, parts: Sequence[Draft]) -> Draft:
    """A drafter made of parts, with the tuple of their parameters."""
    tokenizers = [draft.tokenizer for draft in parts if draft.tokenizer is not None]
    bounds = [draft.max_len for draft in parts if draft.max_len is not None]
    return Draft(
        drafter,
        tuple(draft.params for draft in parts),
        tokenizers[0] if tokenizers else None,
        min(bounds, default=None),
    )


def with_features(feedback: Feedback, begin: int, end: int) -> Feedback:
    """The feedback with the features of one part's taps."""
    output = ModelOutput(feedback.output.logits, feedback.output.features[:, :, begin:end])
    return feedback._replace(features=feedback.features[:, :, begin:end], output=output)
