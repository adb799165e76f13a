"""The page and the plot of trained mask tokens."""

import itertools
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from specjax.experiments.reports import plots, tables
from specjax.experiments.results import Row
from specjax.training.masks import Quality


def line(step: int, quality: Quality) -> str:
    """What a step found, for the screen."""
    same, alpha = (", ".join(f"{x:.3f}" for x in values) for values in (quality.same, quality.alpha))
    return f"Step {step}: acceptance by mask at temperature 0: {same}; at 1: {alpha}; loss {quality.loss[0]:.3f}."


def finding(rows: Sequence[Row]) -> str:
    """What training changes, in a sentence."""
    first, last = rows[0], rows[-1]
    return (
        f"Behind the first mask the most probable token is the target's {first['same'][0]:.1%} of the time before and "
        f"{last['same'][0]:.1%} after {last['step']} steps (alpha at temperature 1: {first['alpha'][0]:.3f} and "
        f"{last['alpha'][0]:.3f}), on held-out text."
    )


def summary(chosen: Any, rows: Sequence[Row], images: Sequence[str]) -> str:
    """The text of `summary.md`."""
    first, last = rows[0], rows[-1]

    def both(name: str) -> Any:
        return lambda place: f"{first[name][place]:.3f} / {last[name][place]:.3f}"

    columns: tables.Columns = (
        ("mask", lambda place: place + 1),
        ("acceptance at temperature 0, before / after", both("same")),
        ("alpha at temperature 1, before / after", both("alpha")),
        (f"{chosen.divergence}, before / after", both("loss")),
    )
    return tables.page(
        f"# {chosen.name}",
        finding(rows),
        tables.markdown(tables.table(columns, range(chosen.num_masks))),
        f"{chosen.target}, {last['step']} steps of {chosen.batch_size} rows of {chosen.target_length} tokens, "
        f"{chosen.num_points} of them with masks; {chosen.dtype}. Before training, every mask reads the embedding of "
        f"token {chosen.mask_token}.",
        *(f"![{image}]({image})" for image in images),
    )


def plot(directory: pathlib.Path, name: str, losses: Float[np.ndarray, "n K"], rows: Sequence[Row]) -> list[str]:
    """Draws the loss of each step, and the acceptance on held-out texts, by mask."""
    figure, (left, right) = plots.panels(2, 4.8, 3.4)
    for place, (color, marker) in zip(range(losses.shape[1]), itertools.cycle(plots.STYLES), strict=False):
        label = f"mask {place + 1}"
        left.plot(range(1, len(losses) + 1), losses[:, place], linewidth=1, color=color, label=label)
        steps, same = zip(*((row["step"], row["same"][place]) for row in rows), strict=True)
        right.plot(steps, same, marker=marker, color=color, label=label)
    plots.finish(left, "divergence from the target, of each batch", "step", "", legend=True)
    plots.finish(right, "acceptance at temperature 0, held-out text", "step", "", legend=True)
    return plots.save(directory, {name: figure})
