"""Texts of users and models as a terminal, a Markdown table and a plot can show them."""

import re

_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, which move the cursor or clear the screen; what turns the direction of writing; halves of
surrogate pairs, which no encoding has."""


def text(raw: str) -> str:
    """A text whose unprintable characters are replaced by U+FFFD; line ends and tabs stay."""
    return _UNPRINTABLE.sub("\ufffd", raw.replace("\r\n", "\n"))


def line(raw: str) -> str:
    """The same in one line."""
    return re.sub(r"\s+", " ", text(raw)).strip()


def markdown(raw: str) -> str:
    """A cell of a Markdown table: in one line, without what would end the cell or begin a tag, a link or code."""
    return re.sub(r"([\\|<`\[\]])", r"\\\1", line(raw))


def plot(raw: str) -> str:
    """A label of a plot, in which a dollar sign begins no formula."""
    return line(raw).replace("$", r"\$")
