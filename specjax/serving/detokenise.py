"""Text that grows by tokens: characters that are not complete, and what may begin a stop string, are held back."""

import bisect
import math
from collections.abc import Sequence
from typing import NamedTuple

from specjax.text.tokenizer import Tokenizer

_BROKEN = "\ufffd"
_MOST_HELD = 8
"""Tokens after which a text that still ends within a character is taken as it is."""


class Gain(NamedTuple):
    """What a text has gained.

    Attributes:
      text: new characters that can be shown.
      num_tokens: how many further tokens belong to the text shown so far.
      stop: the stop string that ended it, or None.
    """

    text: str
    num_tokens: int
    stop: str | None


class Detokeniser:
    """The text of one sequence, token by token."""

    def __init__(self, tokenizer: Tokenizer | None, stop_strings: Sequence[str] = (), *, include_stop: bool = False):
        """Begins an empty text.

        Args:
          tokenizer: of the target; without one, texts are empty, and no stop string is found.
          stop_strings: what ends the text.
          include_stop: whether a stop string is part of the text.
        """
        self._tokenizer, self._stops, self._include = tokenizer, tuple(stop_strings), include_stop
        self._tokens: list[int] = []
        self._ends: list[float] = []  # Where the text of each token ends; infinity within a character.
        self._begin = 0  # From which token on the last characters are decoded anew.
        self._read = 0  # Up to which token they have been decoded.
        self._text, self._shown, self._counted = "", 0, 0

    def add(self, tokens: Sequence[int], *, is_last: bool) -> Gain:
        """Adds tokens.

        Args:
          tokens: the next tokens.
          is_last: whether the sequence ends with them, so that nothing is held back.

        Returns:
          what can be shown. After a stop string nothing more is to be added.
        """
        found = None
        for token in tokens:
            self._tokens.append(token)
            before = len(self._text)
            self._ends.append(math.inf)
            self._decode(is_last=False)
            if (found := self._find(before)) is not None:
                break
        if found is None and is_last and self._tokens:
            before = len(self._text)
            self._decode(is_last=True)
            found = self._find(before)
        if found is not None:
            at, stop = found
            return self._show(at + len(stop) if self._include else at, stop, cut=at)
        return self._show(len(self._text) if is_last else len(self._text) - self._held(), None)

    def _decode(self, *, is_last: bool) -> None:
        """Adds the characters that the last token has completed.

        The tokens before it that share characters or spaces with it are decoded with it, and their own text left out.
        """
        if self._tokenizer is not None:
            known = self._tokenizer.decode(self._tokens[self._begin : self._read])
            text = self._tokenizer.decode(self._tokens[self._begin :])
            if text.endswith(_BROKEN) and len(self._tokens) - self._read < _MOST_HELD and not is_last:
                return
            if len(text) > len(known):
                self._text += text[len(known) :]
                self._begin, self._read = self._read, len(self._tokens)
        # All tokens of a character end where it does.
        for i in range(len(self._ends) - 1, -1, -1):
            if self._ends[i] != math.inf:
                break
            self._ends[i] = len(self._text)

    def _find(self, before: int) -> tuple[int, str] | None:
        """The first stop string in the text that ends after its first `before` characters, and where it begins."""
        found = [
            (at, stop) for stop in self._stops if (at := self._text.find(stop, max(before - len(stop) + 1, 0))) >= 0
        ]
        return min(found, key=lambda pair: (pair[0], -len(pair[1]))) if found else None

    def _held(self) -> int:
        """How many of the last characters may begin a stop string."""
        longest = max(map(len, self._stops), default=0)
        for size in range(min(longest - 1, len(self._text)), 0, -1):
            if any(stop.startswith(self._text[-size:]) for stop in self._stops):
                return size
        return 0

    def _show(self, end: int, stop: str | None, cut: int | None = None) -> Gain:
        """What may be shown up to a place: its text, and the tokens whose text begins before it."""
        end = max(end, self._shown)
        text, self._shown = self._text[self._shown : end], end
        if stop is None:
            # A token belongs to what is shown when all of its text is.
            number = bisect.bisect_right(self._ends, end)
        else:
            # A token within which a stop string begins is part of the text; those of the string itself are not.
            last = end if self._include or cut is None else cut
            at = bisect.bisect_left(self._ends, last)
            number = bisect.bisect_right(self._ends, self._ends[at]) if last and at < len(self._ends) else 0
        gained, self._counted = max(number - self._counted, 0), max(number, self._counted)
        return Gain(text, gained, stop)
