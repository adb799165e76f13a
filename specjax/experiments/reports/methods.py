"""The page, the lines and the plot of a comparison of drafters."""

import pathlib
from collections.abc import Sequence

from matplotlib.figure import Figure

from specjax.experiments.reports import plots, tables
from specjax.experiments.results import Row


def with_roofline(row: Row, draft_reads: float) -> Row:
    """The row with what an accelerator that is bound by the bytes of its weights would make of it, at batch 1.

    There a call costs the bytes that it reads, however many tokens it scores. Overheads, caches and lookups are left
    out: it is a bound.

    Args:
      row: of `results`.
      draft_reads: the bytes that the draft of a step reads, over those of the target.
    """
    spent = row["target_calls"] + row["draft_steps"] * draft_reads
    return row | {"draft_reads": draft_reads, "bandwidth_speedup": row["num_tokens"] / spent}


def line(row: Row) -> str:
    """A finished measurement."""
    same = "" if row["identical"] is None else f", {row['num_identical']} of {row['num_prompts']} texts identical"
    return (
        f"{row['drafter']}, temperature {row['temperature']:g}: {row['block_efficiency']:.2f} tokens per call, a step "
        f"costs {_step(row):.2f}, {row['measured_speedup']:.2f}x{same}"
    )


def _step(row: Row) -> float:
    """The time of a drafting step over that of a plain step."""
    return row["cost_ratio"] * row["num_draft_tokens"] + row["score_cost"]


def _table(rows: Sequence[Row]) -> str:
    columns: tables.Columns = (
        ("drafter", lambda row: row["drafter"]),
        ("rule", lambda row: row["verify"]),
        ("tokens per call", lambda row: f"{row['block_efficiency']:.2f}"),
        ("accepted", lambda row: tables.number(row["acceptance_rate"], ".2f")),
        ("draft costs", lambda row: f"{row['cost_ratio'] * row['num_draft_tokens']:.2f}"),
        ("scoring costs", lambda row: f"{row['score_cost']:.2f}"),
        ("speedup", tables.speedup),
        ("accounted for", lambda row: f"{row['accounted_speedup']:.2f}x"),
        ("bound by bandwidth", lambda row: f"{row['bandwidth_speedup']:.2f}x"),
        ("identical", lambda row: "" if row["identical"] is None else f"{row['num_identical']}/{row['num_prompts']}"),
    )
    ordered = sorted(rows, key=lambda row: -row["measured_speedup"])
    return tables.markdown(tables.table(columns, ordered))


def summary(name: str, rows: Sequence[Row], images: Sequence[str]) -> str:
    """The text of `summary.md`."""
    parts = []
    for temperature in dict.fromkeys(row["temperature"] for row in rows):
        some = [row for row in rows if row["temperature"] == temperature]
        best = max(some, key=lambda row: row["measured_speedup"])
        parts += [
            f"## Temperature {temperature:g}",
            f"Fastest here: {best['drafter']}, {best['measured_speedup']:.2f}x plain decoding. Most tokens per call: "
            f"{max(some, key=lambda row: row['block_efficiency'])['drafter']}.",
            _table(some),
        ]
    first = rows[0]
    return tables.page(
        f"# {name}",
        f"{first['target']}, {first['dtype']}, {first['num_prompts']} prompts of {first['max_new_tokens']} new tokens, "
        f"batch 1, {first['device']}, jax {first['jax_version']}. Costs are in plain steps; the draft is always made. "
        '"Accounted for" is what tokens per call and these costs explain; "bound by bandwidth" is the bound of an '
        "accelerator on which a call costs the bytes of the weights that it reads.",
        *(f"![{image}]({image})" for image in images),
        *parts,
    )


def figure(rows: Sequence[Row]) -> Figure:
    """Tokens per call and measured speedup of every drafter, a panel for each temperature."""
    temperatures = list(dict.fromkeys(row["temperature"] for row in rows))
    most = max(sum(row["temperature"] == temperature for row in rows) for temperature in temperatures)
    drawn, panels = plots.panels(len(temperatures), 6.4, 1.2 + 0.3 * most)
    for axes, temperature in zip(panels, temperatures, strict=True):
        some = [row for row in rows if row["temperature"] == temperature]
        some.sort(key=lambda row: row["measured_speedup"])
        y, speed = range(len(some)), [row["measured_speedup"] for row in some]
        tokens = [row["block_efficiency"] for row in some]
        axes.barh(y, speed, color=[plots.BLUE if x > 1 else plots.ORANGE for x in speed], height=0.6, label="speedup")
        axes.plot(tokens, y, "D", color="black", markersize=4, label="tokens per call")
        axes.axvline(1, color=plots.GREY, linewidth=1, linestyle="--")
        axes.set_yticks(y, [row["drafter"] for row in some], fontsize=8)
        plots.finish(axes, f"Temperature {temperature:g}", "times plain decoding", "", legend=True)
    return drawn


def plot(directory: pathlib.Path, rows: Sequence[Row]) -> list[str]:
    """Writes the plot, and returns the name of its file."""
    return plots.save(directory, {"methods.png": figure(rows)})
