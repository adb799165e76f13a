"""The plots of a run, as PNG, without a display."""

import itertools
import pathlib
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from specjax.experiments import noise, printable, report
from specjax.experiments.results import Row

_BLUE, _ORANGE, _GREY = "#3b6ea5", "#c8553d", "#666666"


def _clean(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)


def acceptance(total: Row) -> Figure:
    """Acceptance by draft position, and how many draft tokens the steps accepted."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    rates, judged = total["acceptance_by_position"], total["proposed_by_position"]
    places = [i for i, rate in enumerate(rates) if rate is not None]
    left.plot([i + 1 for i in places], [rates[i] for i in places], "o-", color=_BLUE)
    for i in places:
        left.annotate(f"n={judged[i]}", (i + 1, rates[i]), (0, 7), textcoords="offset points", ha="center", fontsize=7)
    left.set_ylim(0, 1.12)
    left.set_xlim(0.5, len(rates) + 0.5)
    left.set_xticks(range(1, len(rates) + 1))
    _clean(left, "Accepted, of those judged there", "position in the draft", "share")
    steps = total["accepted_histogram"]
    undrafted = total["target_calls"] - total["draft_steps"]
    right.bar_label(right.bar(range(len(steps)), [steps[0] - undrafted, *steps[1:]], color=_BLUE), fontsize=8)
    right.set_xticks(range(len(steps)))
    left_out = f"\n({undrafted} steps that drafted nothing are left out)" if undrafted else ""
    _clean(right, "Steps by accepted draft tokens", f"accepted draft tokens{left_out}", "steps")
    return figure


def speedup(rows: Sequence[Row]) -> Figure:
    """Measured speedup of each prompt (or task) and of all, with what the measured costs account for."""
    figure = Figure(figsize=(8, 1.2 + 0.36 * len(rows)), layout="constrained")
    axes = figure.subplots()
    y = range(len(rows))[::-1]
    values = [row["measured_speedup"] for row in rows]
    colors = [{noise.GAIN: _BLUE, noise.LOSS: _ORANGE}.get(row["verdict"], _GREY) for row in rows]
    axes.barh(y, values, color=colors, height=0.62)
    for place, row in zip(y, rows, strict=True):
        axes.text(0.01, place, report.speedup(row), va="center", fontsize=8, color="white")
    accounted = [row["accounted_speedup"] for row in rows]
    axes.plot(accounted, y, "D", color="black", markersize=4, label="accounted for by the costs of a step")
    axes.axvline(1, color=_GREY, linewidth=1, linestyle="--")
    axes.set_yticks(y, [printable.plot(report.label(row)) for row in rows])
    axes.set_xlim(0, 1.1 * max(1.0, *values, *accounted))
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    _clean(axes, "Speculative over plain decoding (orange: slower; grey: not to be told)", "measured speedup", "")
    return figure


def losses(steps: Sequence[Row], valid: Sequence[Row]) -> Figure:
    """The loss of every step, its running mean over a fiftieth of the run, and that of held-out texts."""
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    number = [line["step"] for line in steps]
    loss = [line["loss"] for line in steps]
    size = max(len(loss) // 50, 1)
    summed = [0.0, *itertools.accumulate(loss)]
    mean = [(summed[i] - summed[max(i - size, 0)]) / min(i, size) for i in range(1, len(summed))]
    axes.plot(number, loss, color=_BLUE, linewidth=0.5, alpha=0.35)
    axes.plot(number, mean, color=_BLUE, linewidth=1.4, label="training")
    if valid:
        places = [line["step"] for line in valid]
        axes.plot(places, [line["valid_loss"] for line in valid], "o-", color=_ORANGE, markersize=3, label="validation")
    # The first steps of a run would leave no room for the rest.
    axes.set_ylim(top=1.15 * max([*mean[len(mean) // 10 :], *(line["valid_loss"] for line in valid[1:])]))
    axes.legend(frameon=False, fontsize=8)
    _clean(axes, "Cross-entropy", "step", "nats per target token")
    return figure


def write(directory: pathlib.Path, shown: Sequence[Row]) -> list[str]:
    """Writes the plots of a run, of the rows that its table shows.

    Returns:
      their file names.
    """
    figures = {"speedup.png": speedup(shown)}
    if shown[-1]["draft_steps"]:
        figures = {"acceptance.png": acceptance(shown[-1])} | figures
    for name, figure in figures.items():
        figure.savefig(directory / name, dpi=130)
    return list(figures)


def plan(rows: Sequence[Row]) -> Figure:
    """Predicted time of a target call against the tokens that it scores, and of a token against K, for each draft."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    first = rows[0]
    times = first["target_ms_by_tokens"]
    left.plot(
        range(1, len(times) + 1),
        times,
        "o-",
        color=_BLUE,
        markersize=3,
        label=printable.plot(f"target: {first['target']}"),
    )
    for row, color in zip(rows, itertools.cycle((_ORANGE, _GREY, _BLUE)), strict=False):
        left.axhline(
            row["draft_ms"],
            color=color,
            linestyle="--",
            linewidth=1.2,
            label=printable.plot(f"draft, T = 1: {row['draft']}"),
        )
        by_k, best = row["ms_per_token_by_draft_tokens"], row["best_num_draft_tokens"]
        right.plot(
            range(len(by_k)),
            by_k,
            "o-",
            color=color,
            markersize=3,
            label=printable.plot(f"{row['draft']}, best K = {best}"),
        )
        right.plot(best, by_k[best], "D", color=color, markersize=7, fillstyle="none")
    for axes in (left, right):
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, fontsize=8)
    _clean(left, f"A call at the roofline of {first['topology']} (prediction)", "tokens T that it reads", "ms")
    _clean(right, f"A token at alpha = {first['alpha']:g} (prediction)", "draft tokens K a step", "ms")
    return figure
