"""The report of a distillation: its facts, and the curves of its loss and acceptance rate."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from specjax.experiments.reports import plots
from specjax.experiments.reports import train as report
from specjax.experiments.reports.tables import page

Line = dict[str, Any]
"""A line of `train.jsonl`: of a step, or of a validation."""


def described(line: Line) -> str:
    """What a validation says."""
    return f"alpha {line['alpha']:.4f}, greedy agreement {line['agreement']:.4f}, divergence {line['valid_loss']:.4f}"


def facts(shape: Mapping[str, int], steps: Sequence[Line], valid: Sequence[Line]) -> list[tuple[str, str]]:
    """The facts of a finished run, by name; `shape` as in `train.facts`, with the target's `target_parameters`."""
    best = max(valid, key=lambda line: line["alpha"])
    parameters = ("draft parameters", f"{shape['parameters']}, of the target's {shape['target_parameters']}")
    return report.learned(parameters, "divergence", steps, valid, best, described, shape["batch_size"])


def summary(name: str, found: Sequence[tuple[str, str]]) -> str:
    """The text of `summary.md`."""
    note = (
        "Alpha is the mean of the sum of min(p, q) over the tokens of the target's own continuations of held-out "
        "prompts: the acceptance rate of rejection at this temperature. Greedy agreement is that at temperature 0, on "
        "the same texts. The curves of training are on what each step learns, which is other text where the draft "
        "writes some of it (`mix.draft`), and with dropout where there is any."
    )
    return page(f"# {name}", report.listed(found), note, "![Divergence and acceptance rate by step](distill.png)")


def figure(steps: Sequence[Line], valid: Sequence[Line]) -> Figure:
    """The loss by step, and the acceptance rate of training and held-out texts."""
    figure, (left, right) = plots.panels(2, 5, 3.6)
    at = [line["step"] for line in valid]
    number = [line["step"] for line in steps]
    left.plot(number, [line["loss"] for line in steps], color=plots.BLUE, linewidth=0.8, alpha=0.6, label="training")
    left.plot(at, [line["valid_loss"] for line in valid], "o-", color=plots.ORANGE, markersize=3, label="held out")
    right.plot(number, [line["alpha"] for line in steps], color=plots.BLUE, linewidth=0.8, alpha=0.6, label="training")
    right.plot(at, [line["alpha"] for line in valid], "o-", color=plots.ORANGE, markersize=3, label="held out")
    plots.finish(left, "Divergence", "step", "per token", legend=True)
    plots.finish(right, "Acceptance rate", "step", "alpha", legend=True)
    return figure
