"""Makes text of users and models safe to show in a terminal, a Markdown table and a plot."""

import re

_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, which move the cursor or clear the screen; characters that change the direction of writing;
halves of surrogate pairs, which cannot be encoded."""


def text(raw: str) -> str:
    """A text whose unprintable characters are replaced by U+FFFD; line ends and tabs stay."""
    return _UNPRINTABLE.sub("\ufffd", raw.replace("\r\n", "\n"))


def line(raw: str) -> str:
    """The same on one line."""
    return re.sub(r"\s+", " ", text(raw)).strip()


def markdown(raw: str) -> str:
    """A cell of a Markdown table: on one line, without characters that end the cell or begin a tag, a link or code."""
    return re.sub(r"([\\|<`\[\]])", r"\\\1", line(raw))


def plot(raw: str) -> str:
    """A label of a plot, in which a dollar sign does not begin a formula."""
    return line(raw).replace("$", r"\$")
