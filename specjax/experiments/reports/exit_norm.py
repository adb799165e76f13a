"""The page and the plot of a fitted exit norm."""

import pathlib
from collections.abc import Sequence

from specjax.experiments.reports import plots, tables
from specjax.experiments.results import Row


def finding(row: Row) -> str:
    """What the norm changes, in a sentence."""
    return (
        f"On held-out text the exit after layer {row['layer']} agrees with the target more by "
        f"{row['alpha_after'] - row['alpha_before']:+.3f}: alpha {row['alpha_before']:.3f} before, "
        f"{row['alpha_after']:.3f} after; the same most probable token {row['same_before']:.1%} before, "
        f"{row['same_after']:.1%} after."
    )


def summary(name: str, row: Row, images: Sequence[str]) -> str:
    """The text of `summary.md`."""
    columns: tables.Columns = (
        ("norm", lambda which: {"before": "the target's final norm", "after": "its own"}[which]),
        ("KL, nats", lambda which: f"{row[f'kl_{which}']:.3f}"),
        ("alpha at temperature 1", lambda which: f"{row[f'alpha_{which}']:.3f}"),
        ("same most probable token", lambda which: f"{row[f'same_{which}']:.3f}"),
    )
    return tables.page(
        f"# {name}",
        finding(row),
        tables.markdown(tables.table(columns, ("before", "after"))),
        f"{row['target']}, {row['num_steps']} steps, {row['num_valid_tokens']} held-out tokens, {row['dtype']}, "
        f"{row['device']}.",
        *(f"![{image}]({image})" for image in images),
    )


def plot(directory: pathlib.Path, losses: Sequence[float]) -> list[str]:
    """Draws the loss of each step."""
    figure, (axes,) = plots.panels(1, 4.8, 3.4)
    axes.plot(range(1, len(losses) + 1), losses, color=plots.BLUE, linewidth=1)
    plots.finish(axes, "KL from the target to the exit, of each batch", "step", "nats")
    return plots.save(directory, {"exit_norm.png": figure})
