"""Draws the plots of docs/results from the tables of its pages: `python docs/draw/results.py [NAME ...]`.

A plot is drawn by the same function as in a run, with the numbers of the tables, which are rounded. So all plots have
the present style, whenever their runs were. Each file says from which numbers it was drawn (`numbers` in the PNG's
texts), and a test fails where a table has changed since.
"""

import hashlib
import pathlib
import re
import sys
from collections.abc import Callable, Mapping, Sequence

from matplotlib.figure import Figure

from specjax.experiments.reports import chinchilla, leviathan, methods, plots, tune
from specjax.experiments.results import Row

RESULTS = pathlib.Path(__file__).parents[1] / "results"

Line = dict[str, str]
"""A line of a table: its cells by the names of the columns; of two columns of one name, the second is `NAME 2`."""


def tables(page: str) -> list[list[Line]]:
    """The tables of a page, in order.

    Args:
      page: such as "leviathan.md".
    """
    found: list[list[Line]] = []
    text = (RESULTS / page).read_text(encoding="utf-8")
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()]
        names = [name if header.index(name) == i else f"{name} 2" for i, name in enumerate(header)]
        found.append([dict(zip(names, row, strict=True)) for row in rows])
    return found


def table(page: str, *columns: str, number: int = 0) -> list[Line]:
    """The table of a page that has these columns; of several, that of this number.

    Raises:
      ValueError: where the page has none.
    """
    found = [lines for lines in tables(page) if set(columns) <= set(lines[0])]
    if len(found) <= number:
        listed = ", ".join(columns)
        raise ValueError(f"{page} has {len(found)} tables with the columns {listed}: its plot needs another.")
    return found[number]


def value(cell: str) -> float:
    """A number of a table: 1,234 or 1.25x or .59 or **2.68x** or 28.6%."""
    return float(cell.strip("*").replace(",", "").removesuffix("x").removesuffix("%"))


def _experiment(alphas: Mapping[str, Mapping[float, float]], rows: list[Row]) -> leviathan.Measured:
    """What the plots of `leviathan` read: alpha by draft and temperature, and the cells."""
    known = {draft: {t: (alpha, 0) for t, alpha in found.items()} for draft, found in alphas.items()}
    return leviathan.Measured("", "", "", "", "", {}, known, {}, rows, {}, {}, {}, {})


def _small(number: int) -> leviathan.Measured:
    """The first or the second experiment of leviathan.md."""
    alphas: dict[str, dict[float, float]] = {}
    for line in table("leviathan.md", "draft", "size", "T", "alpha", number=number):
        alphas.setdefault(line["draft"], {})[float(line["T"])] = value(line["alpha"])
    rates = {(line["draft"], line["T"]): line for line in table("leviathan.md", "draft", "T", "7", number=number)}
    rows: list[Row] = []
    for line in table("leviathan.md", "draft", "K", "scoring", "measured", "tok/call", number=number):
        by_position = [rates[line["draft"], line["T"]][str(i)] for i in range(1, 8)]
        rows.append(
            {
                "draft": line["draft"],
                "temperature": float(line["T"]),
                "num_draft_tokens": int(line["K"]),
                "cost_ratio": value(line["c"]),
                "score_cost": value(line["scoring"]),
                "measured_speedup": value(line["measured"]),
                "acceptance_by_position": [None if rate == "-" else value(rate) for rate in by_position],
            }
        )
    return _experiment(alphas, rows)


def _inflated() -> leviathan.Measured:
    alphas = {
        line["draft"]: {0.0: value(line["T = 0"]), 1.0: value(line["T = 1"])}
        for line in table("inflated.md", "draft", "parameters", "T = 0", "T = 1")
    }
    rows = [
        {
            "draft": "distilled",
            "temperature": float(line["T"]),
            "num_draft_tokens": int(line["K"]),
            "cost_ratio": value(line["c"]),
            "score_cost": value(line["scoring K + 1 tokens"]),
            "measured_speedup": value(line["by the clock"]),
        }
        for line in table("inflated.md", "T", "K", "c", "by the clock")
    ]
    return _experiment(alphas, rows)


def _sweep(number: int) -> list[chinchilla.Swept]:
    """The lines of the first or the second sweep of chinchilla.md."""
    swept: dict[str, list[Line]] = {}
    for line in table("chinchilla.md", "sampling", "batch", "tokens/loop", "loop ms", number=number):
        swept.setdefault(f"{line['sampling']}, batch {line['batch']}", []).append(line)
    sides = (("128 tokens: P50", "P90", "P99"), ("plain: P50", "P90 2", "P99 2"))
    return [
        chinchilla.Swept(
            label,
            [int(line["K"]) for line in lines],
            [value(line["loop ms"]) for line in lines],
            [value(line["tokens/loop"]) for line in lines],
            *([[value(line[column]) for column in columns] for line in lines] for columns in sides),
        )
        for label, lines in swept.items()
    ]


def _methods() -> list[Row]:
    columns = ("drafter", "tokens per call", "speedup")
    return [
        {
            "drafter": line["drafter"].partition(",")[0],
            "temperature": float(number),
            "block_efficiency": value(line["tokens per call"]),
            "measured_speedup": value(line["speedup"]),
        }
        for number in (0, 1)
        for line in table("methods.md", *columns, number=number)
    ]


def _policies() -> list[Row]:
    columns = ("policy", "speedup", "regret")
    return [
        {
            "batch_size": batch_size,
            "policies": [
                {"policy": line["policy"], "speedup": value(line["speedup"])}
                for line in table("adaptive.md", *columns, number=number)
            ],
        }
        for number, batch_size in enumerate((1, 4))
    ]


PLOTS: dict[str, tuple[Callable[[], object], Callable[..., Figure]]] = {
    "adaptive.png": (_policies, tune.figure),
    "humaneval_figure1.png": (lambda: _sweep(1), chinchilla.draw_figure_1),
    "humaneval_spread.png": (lambda: _sweep(1), chinchilla.draw_spread),
    "inflated_speedup.png": (_inflated, leviathan.speedup_plot),
    "methods.png": (_methods, methods.figure),
    "mini_ende_acceptance.png": (lambda: _small(0), leviathan.position_plot),
    "mini_ende_speedup.png": (lambda: _small(0), leviathan.speedup_plot),
    "mini_synopsis_acceptance.png": (lambda: _small(1), leviathan.position_plot),
    "mini_synopsis_speedup.png": (lambda: _small(1), leviathan.speedup_plot),
    "xsum_figure1.png": (lambda: _sweep(0), chinchilla.draw_figure_1),
    "xsum_spread.png": (lambda: _sweep(0), chinchilla.draw_spread),
}
"""By file: what reads its numbers, and what draws them."""


def fingerprint(numbers: object) -> str:
    """A short name of the numbers of a plot."""
    return hashlib.sha256(repr(numbers).encode()).hexdigest()[:16]


def main(names: Sequence[str] = ()) -> None:
    """Draws the plots that are named, or all.

    Raises:
      ValueError: for a plot that there is not, or a page without its table.
    """
    if unknown := sorted(set(names) - set(PLOTS)):
        raise ValueError(f"{', '.join(unknown)}: there is no such plot; choose from {', '.join(PLOTS)}.")
    for name in names or PLOTS:
        read, draw = PLOTS[name]
        numbers = read()
        draw(numbers).savefig(RESULTS / name, dpi=plots.DPI, metadata={"numbers": fingerprint(numbers)})
        print(RESULTS / name)


if __name__ == "__main__":
    main(sys.argv[1:])
