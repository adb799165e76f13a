"""Plots as PNG, without a display: what all of them share, and those of a comparison."""

import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from specjax.experiments import noise
from specjax.experiments.reports import compare, printable, tables
from specjax.experiments.results import Row

BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#666666"
COLORS = (BLUE, ORANGE, "#009e73", "#cc79a7", "#e69f00", GREY)
"""The colors of lines, in order: those of Okabe and Ito, which differ with every kind of color vision."""
MARKERS = "osDv^P"
"""The markers of lines, in order, so that no line is told from another by its color alone."""
STYLES = tuple(zip(COLORS, MARKERS, strict=True))
"""Color and marker of the lines, in order."""
WIDEST = 9.6
"""Inches of the widest figure: the letters of a wider one could not be read in a column of a README."""
DPI = 130
"""Pixels per inch of the files."""


def panels(number: int, width: float, height: float) -> tuple[Figure, Sequence[Axes]]:
    """A figure with panels side by side, each `width` by `height` inches, or narrower where that would be too wide."""
    figure = Figure(figsize=(min(number * width, WIDEST), height), layout="constrained")
    return figure, np.atleast_1d(figure.subplots(1, number)).tolist()


def finish(axes: Axes, title: str, x: str, y: str, *, legend: bool = False) -> None:
    """Gives a panel its title and labels, and removes the lines above it and to its right."""
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    if legend:
        axes.legend(facecolor="white", edgecolor="none", framealpha=0.8, fontsize=8)


def save(directory: pathlib.Path, figures: Mapping[str, Figure]) -> list[str]:
    """Writes figures, and returns the names of their files."""
    for name, figure in figures.items():
        figure.savefig(directory / name, dpi=DPI)
    return list(figures)


def by_position(axes: Axes, rates: Sequence[float | None], color: str, label: str = "", marker: str = "o") -> list[int]:
    """Draws acceptance by position in the draft, from 1; returns the positions at which something was judged."""
    positions = [i + 1 for i, rate in enumerate(rates) if rate is not None]
    axes.plot(positions, [rate for rate in rates if rate is not None], f"{marker}-", color=color, label=label)
    return positions


def acceptance(total: Row) -> Figure:
    """Acceptance by draft position, and how many draft tokens the steps accepted."""
    figure, (left, right) = panels(2, 4.5, 3.4)
    rates, judged = total["acceptance_by_position"], total["proposed_by_position"]
    for i in by_position(left, rates, BLUE):
        xy = (i, rates[i - 1])
        left.annotate(f"n={judged[i - 1]}", xy, (0, 7), textcoords="offset points", ha="center", fontsize=7)
    left.set_ylim(0, 1.12)
    left.set_xlim(0.5, len(rates) + 0.5)
    left.set_xticks(range(1, len(rates) + 1))
    finish(left, "Accepted, of those judged there", "position in the draft", "share")
    steps = total["accepted_histogram"]
    undrafted = total["target_calls"] - total["draft_steps"]
    right.bar_label(right.bar(range(len(steps)), [steps[0] - undrafted, *steps[1:]], color=BLUE), fontsize=8)
    right.set_xticks(range(len(steps)))
    left_out = f"\n({undrafted} steps that drafted nothing are left out)" if undrafted else ""
    finish(right, "Steps by accepted draft tokens", f"accepted draft tokens{left_out}", "steps")
    return figure


def speedup(rows: Sequence[Row]) -> Figure:
    """Measured speedup of each prompt (or task) and of all, with what the measured costs account for."""
    figure, (axes,) = panels(1, 8, 1.2 + 0.36 * len(rows))
    y = range(len(rows))[::-1]
    values = [row["measured_speedup"] for row in rows]
    colors = [{noise.GAIN: BLUE, noise.LOSS: ORANGE}.get(row["verdict"], GREY) for row in rows]
    axes.barh(y, values, color=colors, height=0.62)
    for height, row in zip(y, rows, strict=True):
        axes.text(0.01, height, tables.speedup(row), va="center", fontsize=8, color="white")
    accounted = [row["accounted_speedup"] for row in rows]
    axes.plot(accounted, y, "D", color="black", markersize=4, label="accounted for by the costs of a step")
    axes.axvline(1, color=GREY, linewidth=1, linestyle="--")
    axes.set_yticks(y, [printable.plot(compare.label(row)) for row in rows])
    axes.set_xlim(0, 1.1 * max(1.0, *values, *accounted))
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    finish(axes, "Speculative over plain decoding (orange: slower; grey: noise or unexplained)", "measured speedup", "")
    return figure


def write(directory: pathlib.Path, shown: Sequence[Row]) -> list[str]:
    """Writes the plots of a comparison, for the rows that its table shows, and returns their file names."""
    drafted = {"acceptance.png": acceptance(shown[-1])} if shown[-1]["draft_steps"] else {}
    return save(directory, drafted | {"speedup.png": speedup(shown)})
