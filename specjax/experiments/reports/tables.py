"""Tables and pages in Markdown."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from specjax.experiments import noise
from specjax.experiments.reports import printable

Table = Sequence[Sequence[str]]
"""Lines of cells; the first line is the header."""

Columns = Sequence[tuple[str, Callable[[Any], Any]]]
"""The heading of each column, and what its cell says about an item."""


def table(columns: Columns, items: Iterable[Any]) -> list[list[str]]:
    """A line for each item."""
    return [[heading for heading, _ in columns], *([str(cell(item)) for _, cell in columns] for item in items)]


def markdown(table: Table) -> str:
    """A table in Markdown."""
    lines = ["| " + " | ".join(map(printable.markdown, line)) + " |" for line in table]
    return "\n".join([lines[0], "|---" + "|---:" * (len(table[0]) - 1) + "|", *lines[1:]])


def bullets(lines: Iterable[str]) -> str:
    """A list in Markdown."""
    return "\n".join(f"- {line}" for line in lines)


def page(*parts: str) -> str:
    """The text of a file: paragraphs, without those that are empty."""
    return "\n\n".join(part for part in parts if part) + "\n"


def number(value: float | None, form: str) -> str:
    """A number in the format of a specification; a dash where there is none."""
    return "-" if value is None else format(value, form)


def speedup(row: dict[str, Any]) -> str:
    """The measured speedup of a row, marked where it is not to be believed."""
    return f"{row['measured_speedup']:.2f}x{noise.MARKS[row['verdict']]}"
