"""Cuts a text where accepted draft tokens begin and end, so that they can be marked."""

from collections.abc import Iterable, Sequence

from specjax.text.tokenizer import Tokenizer

Segment = tuple[str, bool]
"""A stretch of text, and whether it consists of accepted draft tokens."""


def pieces(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[str]:
    """The text that each token adds; "" for a part of a character, whose last token gets the whole of it."""
    found: list[str] = []
    begin = end = 0
    for i in range(1, len(tokens) + 1):
        # Two or three tokens are decoded at a time: what a token looks like may depend on the one before it.
        before, now = tokenizer.decode(tokens[begin:end]), tokenizer.decode(tokens[begin:i])
        whole = now.startswith(before) and not now.endswith("\ufffd")
        found.append(now[len(before) :] if whole else "")
        if whole:
            begin, end = end, i
    return found


def merge(parts: Iterable[Segment]) -> list[Segment]:
    """Joins adjacent segments of the same kind, and leaves out empty ones."""
    merged: list[Segment] = []
    for text, accepted in parts:
        if merged and merged[-1][1] == accepted:
            merged[-1] = (merged[-1][0] + text, accepted)
        elif text:
            merged.append((text, accepted))
    return merged


def segments(tokenizer: Tokenizer, tokens: Sequence[int], from_draft: Sequence[bool]) -> list[Segment]:
    """The text of tokens, cut where accepted draft tokens begin and end."""
    return merge(zip(pieces(tokenizer, tokens), from_draft, strict=True))
