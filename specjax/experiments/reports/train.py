"""The report of a training: its facts, and the loss curve."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from specjax.experiments.reports import plots
from specjax.experiments.reports.tables import page

Line = dict[str, Any]
"""A line of `train.jsonl`: of a step, or of a validation."""

RECENT = 50
"""Steps that the reported training loss is the mean of."""


def perplexity(loss: float) -> float:
    """e to the loss."""
    return math.exp(loss) if loss < 700 else math.inf


def listed(found: Sequence[tuple[str, str]]) -> str:
    """Facts by name, as a table of Markdown."""
    return "\n".join(["| what | value |", "|---|---|", *(f"| {what} | {value} |" for what, value in found)])


def learned(
    parameters: tuple[str, str],
    loss: str,
    steps: Sequence[Line],
    valid: Sequence[Line],
    best: Line,
    described: Callable[[Line], str],
    batch_size: int,
) -> list[tuple[str, str]]:
    """The facts of a draft that has learned from a target, by name.

    Args:
      parameters: what they are called, and their number.
      loss: what the loss is called.
      steps: the lines of the steps.
      valid: those of the validations.
      best: the validation whose draft is kept.
      described: what a validation says.
      batch_size: rows of a step.
    """
    seconds, tokens = sum(line["seconds"] for line in steps), sum(line["num_tokens"] for line in steps)
    recent = [line["loss"] for line in steps[-RECENT:]]
    return [
        parameters,
        ("steps", f"{len(steps)} of {batch_size} rows"),
        ("tokens", f"{tokens:.0f}, of which {sum(line['num_targets'] for line in steps):.0f} targets"),
        ("time", f"{seconds / 60:.1f} minutes of steps; {tokens / max(seconds, 1e-9):.0f} tokens/s"),
        (f"{loss} (last {len(recent)} steps)", f"{sum(recent) / max(len(recent), 1):.4f}"),
        ("held out, before", described(valid[0])),
        ("held out, last", described(valid[-1])),
        ("held out, best", f"{described(best)}, at step {best['step']}, which `model/` holds"),
    ]


def facts(shape: Mapping[str, int], steps: Sequence[Line], valid: Sequence[Line]) -> list[tuple[str, str]]:
    """The facts of a finished run, by name, from the lines of its steps and validations.

    `shape` has the number of `parameters`, that of `logits`, the `batch_size`, and the number of rows in the `data`.
    """
    seconds, tokens = sum(line["seconds"] for line in steps), sum(line["num_tokens"] for line in steps)
    recent = [line["loss"] for line in steps[-RECENT:]]
    epochs = shape["batch_size"] * len(steps) / shape["data"]
    found = [
        ("parameters", f"{shape['parameters']} ({shape['logits']} logits)"),
        ("steps", f"{len(steps)} of {shape['batch_size']} rows, {epochs:.1f} epochs"),
        ("tokens", f"{tokens:.0f}, of which {sum(line['num_targets'] for line in steps):.0f} targets"),
        ("time", f"{seconds / 60:.1f} minutes of steps, compiling included; {tokens / seconds:.0f} tokens/s"),
        (f"training loss (last {len(recent)} steps)", f"{sum(recent) / len(recent):.4f}"),
    ]
    if valid:
        last, best = valid[-1]["valid_loss"], min(valid, key=lambda line: line["valid_loss"])
        found.append(("validation loss (last)", f"{last:.4f}, perplexity {perplexity(last):.2f}"))
        found.append(
            ("validation loss (least)", f"{best['valid_loss']:.4f} at step {best['step']}, which `model/` holds")
        )
    return found


def summary(name: str, found: Sequence[tuple[str, str]]) -> str:
    """The text of `summary.md`."""
    return page(f"# {name}", listed(found), "![Loss by step](loss.png)")


def figure(steps: Sequence[Line], valid: Sequence[Line]) -> Figure:
    """The loss of every step, its running mean over a fiftieth of the run, and that of held-out texts."""
    figure, (axes,) = plots.panels(1, 7, 3.6)
    number, loss = [line["step"] for line in steps], [line["loss"] for line in steps]
    size = max(len(loss) // 50, 1)
    summed = [0.0, *itertools.accumulate(loss)]
    mean = [(summed[i] - summed[max(i - size, 0)]) / min(i, size) for i in range(1, len(summed))]
    axes.plot(number, loss, color=plots.BLUE, linewidth=0.5, alpha=0.35)
    axes.plot(number, mean, color=plots.BLUE, linewidth=1.4, label="training")
    held_out = [line["valid_loss"] for line in valid]
    if valid:
        at = [line["step"] for line in valid]
        axes.plot(at, held_out, "o-", color=plots.ORANGE, markersize=3, label="validation")
    # The first steps of a run would leave no room for the rest.
    axes.set_ylim(top=1.15 * max([*mean[len(mean) // 10 :], *held_out[1:]]))
    plots.finish(axes, "Cross-entropy", "step", "nats per target token", legend=True)
    return figure
