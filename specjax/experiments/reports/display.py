"""The output of a run while it runs: in colour on a terminal, elsewhere as plain lines."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from specjax.experiments import noise
from specjax.experiments.reports import compare as report
from specjax.experiments.reports import printable, tables
from specjax.experiments.reports.accepted_text import Segment, merge, pieces
from specjax.experiments.results import Row
from specjax.text.tokenizer import Tokenizer

ACCEPTED = "underline green"
"""The style of accepted draft tokens on a terminal."""
MARKS = ("\u2039", "\u203a")
"""The marks around them elsewhere: single angle quotes."""
_PLAIN_WIDTH = 140


def shorten(text: str, size: int) -> str:
    """One line of at most `size` characters."""
    line = printable.line(text)
    return line if len(line) <= size else line[: size - 3] + "..."


class View:
    """The screen of a run."""

    def __init__(self, console: Console | None = None):
        """Shows on a console; by default on standard output."""
        self.console = console or Console(highlight=False)
        if not self.console.is_terminal:
            self.console.width = max(self.console.width, _PLAIN_WIDTH)

    @contextlib.contextmanager
    def status(self, message: str) -> Iterator[None]:
        """Shows that something is under way: a spinner on a terminal, else a line."""
        if not self.console.is_terminal:
            self.line(f"{message} ...")
            yield
            return
        with self.console.status(Text(printable.line(f"{message} ..."))):
            yield

    @contextlib.contextmanager
    def progress(
        self, total: int, done: int = 0, what: str = "prompts", *, remaining: bool = False
    ) -> Iterator[Progress]:
        """A bar over the prompts, or over something else, on terminals only. The caller advances it.

        With `remaining` it shows the time that is left, and before it the `status` that the caller updates.
        """
        name = TextColumn("{task.description}", markup=False)
        status = TextColumn("{task.fields[status]}", markup=False)
        time = (status, TextColumn("left"), TimeRemainingColumn()) if remaining else (TimeElapsedColumn(),)
        columns = (name, BarColumn(), MofNCompleteColumn(), *time)
        with Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as bar:
            bar.add_task(printable.line(what), total=total, completed=done, status="")
            yield bar

    def line(self, message: str, style: str = "") -> None:
        """Prints a line."""
        self.console.print(Text(printable.text(message), style), soft_wrap=not self.console.is_terminal)

    def legend(self) -> None:
        """Says how accepted draft tokens are marked."""
        example = Text("this", ACCEPTED) if self.console.is_terminal else Text(f"{MARKS[0]}this{MARKS[1]}")
        self.console.print(Text("Accepted draft tokens look like ") + example + Text("."))

    def prompt(self, title: str, text: str) -> None:
        """Announces a prompt."""
        self.console.print()
        if self.console.is_terminal:
            self.console.print(Rule(Text(printable.line(title)), align="left", style="dim"))
        else:
            self.line(f"== {printable.line(title)}")
        self.line(shorten(text, 240), "dim")
        self.console.print()

    def text(self, parts: Iterable[Segment]) -> None:
        """Prints text without a newline, accepted draft tokens marked."""
        for raw, accepted in parts:
            part = printable.text(raw)
            if self.console.is_terminal:
                self.console.print(Text(part, ACCEPTED if accepted else ""), end="", soft_wrap=True)
            else:
                self.console.print(Text(part.join(MARKS) if accepted else part), end="", soft_wrap=True)

    def stream(self, tokenizer: Tokenizer, states: Iterable[tuple[Sequence[int], Sequence[bool]]]) -> None:
        """Prints a text as it grows, from the tokens at each time and which of them are accepted draft tokens."""
        shown = 0
        for tokens, from_draft in states:
            parts = list(zip(pieces(tokenizer, tokens), from_draft, strict=True))
            self.text(merge(parts[shown:]))
            shown = len(parts)
        self.console.print()

    def row(self, row: Row) -> None:
        """A finished prompt in a line."""
        same = {None: "", 1.0: ", identical text"}.get(row["identical"], ", text DIFFERS from plain decoding's")
        self.line(
            f"{report.label(row)}: {row['baseline_tokens_per_second']:.1f} tokens/s plain, "
            f"{row['tokens_per_second']:.1f} speculative, {tables.speedup(row)}{same}",
            "bold yellow" if row["verdict"] == noise.LOSS else "bold",
        )

    def end(self, rows: Sequence[Row]) -> None:
        """The table, its legend and the findings that end a run."""
        shown = report.lines(rows)
        cells = [report.cells(row) for row in shown]
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=0)
        for i, name in enumerate(report.TERMINAL_HEADER):
            # Names of prompts are wrapped where there is no room for them; numbers and headings never are.
            widest = max(len(part) for part in (*name.split("\n"), *(line[i] for line in cells)))
            table.add_column(
                Text(name),
                justify="right" if i else "left",
                no_wrap=bool(i),
                overflow="fold",
                min_width=widest if i else len("prompt"),
            )
        for i, line in enumerate(cells):
            is_last = i == len(shown) - 1
            texts = (Text(printable.line(cell)) for cell in line)
            table.add_row(*texts, style="bold" if is_last else "", end_section=i == len(shown) - 2)
        self.console.print()
        self.console.print(table)
        for line in report.TERMINAL_LEGEND:
            self.line(line, "dim")
        self.console.print()
        for text, is_bad in report.findings(rows):
            self.line(text, "bold yellow" if is_bad else "bold")
