"""An editing task that needs no network: sentences with slips of the keyboard, and what they should be.

The texts are docstrings of the standard library (`stdlib_texts`); the slips are made here, from a seed.
"""

import zlib
from collections.abc import Iterator, Sequence

import numpy as np

from specjax.experiments import stdlib_texts
from specjax.experiments.stdlib_texts import Line

SLIP = 0.08
"""The chance that a word has a slip."""

_WORDS = (8, 24)
"""The fewest and the most words of a text."""


def misspelt(word: str, rng: np.random.Generator) -> str:
    """The word with two neighbouring letters swapped, one left out, or one typed twice."""
    at, kind = int(rng.integers(len(word) - 1)), int(rng.integers(3))
    middle = (word[at + 1] + word[at], word[at + 1], word[at] * 2 + word[at + 1])[kind]
    return word[:at] + middle + word[at + 2 :]


def edited(words: Sequence[str], rng: np.random.Generator) -> str:
    """The text with slips: in a word of four letters or more it is misspelt, a shorter one is left out."""
    slips = rng.random(len(words)) < SLIP
    found = [
        word if not slip else misspelt(word, rng) if len(word) >= 4 and word.isalpha() else ""
        for word, slip in zip(words, slips, strict=True)
    ]
    return " ".join(filter(None, found))


def _pieces(text: str) -> Iterator[list[str]]:
    """A text in pieces of at most the most words, without a last one that is too short."""
    words = text.split()
    for begin in range(0, len(words), _WORDS[1]):
        piece = words[begin : begin + _WORDS[1]]
        if len(piece) >= _WORDS[0]:
            yield piece


def edits() -> dict[str, list[Line]]:
    """By split, texts with slips as `input`, and without as `target`."""

    def line(words: list[str]) -> Line:
        text = " ".join(words)
        return {"input": edited(words, np.random.default_rng(zlib.crc32(text.encode()))), "target": text}

    return {
        split: [line(words) for pair in pairs for words in _pieces(pair["input"])]
        for split, pairs in stdlib_texts.pairs().items()
    }
