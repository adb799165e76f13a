"""Tokens as clients read them: their text and bytes, log-probabilities in both forms, and which text was drafted."""

import codecs
from collections.abc import Sequence
from typing import Any

from specjax.serving.requests import TokenLogprobs
from specjax.text.tokenizer import Tokenizer

LOWEST = -9999.0
"""What stands for a log-probability of minus infinity, which JSON lacks (OpenAI's number)."""


def finite(logprob: float) -> float:
    """A log-probability as JSON has it."""
    return max(float(logprob), LOWEST)


class Speller:
    """The text and bytes of single tokens."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._special = {
            i: token.content for i, token in tokenizer.backend.get_added_tokens_decoder().items() if token.special
        }
        try:
            self._bytes = tokenizer.token_bytes()
        except ValueError:  # The bytes of WordPiece's tokens depend on their neighbours.
            self._bytes = {}

    def adds(self, token: int) -> bytes:
        """What a token adds to a text, from which special tokens are left out."""
        if token in self._special:
            return b""
        if token in self._bytes:
            return self._bytes[token]
        return self._tokenizer.decode([token]).encode("utf-8", "replace")

    def bytes(self, token: int) -> bytes:
        """The bytes of a token; of a special one, those of its name."""
        return self._special[token].encode() if token in self._special else self.adds(token)

    def text(self, token: int, as_id: bool = False) -> str:
        """The text of a token, with a mark in the place of characters that are not complete.

        Args:
          token: its id.
          as_id: "token_id:ID" instead, which tells apart tokens of the same text (vLLM's form).
        """
        return f"token_id:{token}" if as_id else self.bytes(token).decode("utf-8", "replace")

    def chat(
        self, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs], num_top: int, as_ids: bool = False
    ) -> list[dict[str, Any]]:
        """The entries of `logprobs.content` of a chat."""

        def entry(token: int, logprob: float) -> dict[str, Any]:
            return {
                "token": self.text(token, as_ids),
                "logprob": finite(logprob),
                "bytes": list(self.bytes(token)),
            }

        return [
            entry(token, LOWEST if found.logprob is None else found.logprob)
            | {"top_logprobs": [entry(other, value) for other, value in list(found.top.items())[:num_top]]}
            for token, found in zip(tokens, logprobs, strict=True)
        ]

    def prompt(
        self, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs], num_top: int
    ) -> list[dict[str, Any] | None]:
        """vLLM's `prompt_logprobs`: for each token of a prompt but the first, a table by token id."""
        out: list[dict[str, Any] | None] = []
        for token, found in zip(tokens, logprobs, strict=True):
            if found.logprob is None:
                out.append(None)
                continue
            top = list(found.top.items())[:num_top]
            ranks = {other: rank for rank, (other, _) in enumerate(top, 1)}
            table = {token: found.logprob} | dict(top)
            out.append(
                {
                    str(i): {"logprob": finite(value), "rank": ranks.get(i), "decoded_token": self.text(i)}
                    for i, value in table.items()
                }
            )
        return out


class Offsets:
    """The log-probabilities of one text in the form of completions, whose offsets count on from chunk to chunk."""

    def __init__(self, speller: Speller, num_top: int, as_ids: bool = False):
        self._speller, self._num_top, self._as_ids, self._length = speller, num_top, as_ids, 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def take(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> dict[str, list[Any]]:
        """The next tokens: {tokens, token_logprobs, top_logprobs, text_offset}."""
        out: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token, found in zip(tokens, logprobs, strict=True):
            out["tokens"].append(self._speller.text(token, self._as_ids))
            out["text_offset"].append(self._length)
            self._length += len(self._decoder.decode(self._speller.adds(token)))
            out["token_logprobs"].append(None if found.logprob is None else finite(found.logprob))
            out["top_logprobs"].append(None if found.logprob is None else self._top(token, found))
        return out

    def _top(self, token: int, found: TokenLogprobs) -> dict[str, float]:
        """The most probable tokens and the token itself. Of tokens with the same text, the most probable one counts."""
        listed = list(found.top.items())[: self._num_top]
        if found.logprob is not None and all(other != token for other, _ in listed):
            listed.append((token, found.logprob))
        table: dict[str, float] = {}
        for other, value in listed:
            text = self._speller.text(other, self._as_ids)
            table[text] = max(table.get(text, LOWEST), finite(value))
        return table


class Marks:
    """Which pieces of a text came from accepted draft tokens."""

    def __init__(self, speller: Speller):
        self._speller = speller
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._ahead: list[tuple[str, bool]] = []
        self._begun = False

    def take(self, text: str, tokens: Sequence[int], from_draft: Sequence[bool]) -> list[tuple[str, bool]]:
        """The next text in pieces. The text may lag behind its tokens; what no token accounts for is not marked."""
        for token, drafted in zip(tokens, from_draft, strict=True):
            piece = self._decoder.decode(self._speller.adds(token))
            if not self._begun and piece:
                # Tokenizers strip the space before the first word.
                piece = piece[1:] if piece.startswith(" ") and text and not text.startswith(" ") else piece
                self._begun = True
            self._ahead.append((piece, bool(drafted)))
        pieces: list[tuple[str, bool]] = []
        while text:
            piece, drafted = self._ahead.pop(0) if self._ahead else (text, False)
            size = min(len(piece), len(text))
            if piece[size:]:
                self._ahead.insert(0, (piece[size:], drafted))
            if not size:
                continue
            if pieces and pieces[-1][1] == drafted:
                pieces[-1] = pieces[-1][0] + text[:size], drafted
            else:
                pieces.append((text[:size], drafted))
            text = text[size:]
        return pieces
