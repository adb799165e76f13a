"""The report of a training of heads: its facts, and the curves of its loss and of the acceptance by position."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from specjax.experiments.reports import plots
from specjax.experiments.reports import train as report
from specjax.experiments.reports.tables import page

Line = dict[str, Any]
"""A line of `train.jsonl`: of a step, or of a validation."""


def tokens_per_call(line: Line) -> float:
    """The tokens of a call at temperature 0, if each position is accepted as often as the validation says."""
    return float(1 + np.sum(np.cumprod(line["greedy"])))


def described(line: Line) -> str:
    """What a validation says."""
    greedy, sampled = (" ".join(f"{rate:.3f}" for rate in line[name]) for name in ("greedy", "overlap"))
    return (
        f"acceptance by position, greedy {greedy} ({tokens_per_call(line):.2f} tokens per call), sampled {sampled}; "
        f"loss {line['valid_loss']:.4f}"
    )


def facts(
    shape: Mapping[str, int], steps: Sequence[Line], valid: Sequence[Line], is_joint: bool = False
) -> list[tuple[str, str]]:
    """The facts of a finished run, by name.

    Args:
      shape: `batch_size`, the number of `parameters`, and that of the target, `target_parameters`.
      steps: the lines of the steps.
      valid: those of the validations.
      is_joint: whether the target was trained with the heads.
    """
    best = min(valid, key=lambda line: line["valid_loss"]) if is_joint else max(valid, key=tokens_per_call)
    parameters = ("parameters of the heads", f"{shape['parameters']}, beside the target's {shape['target_parameters']}")
    found = report.learned(parameters, "loss", steps, valid, best, described, shape["batch_size"])
    if is_joint:
        change = f"{valid[0]['target_loss']:.4f} before, {best['target_loss']:.4f} in `model/target/`"
        found.append(("the target's own loss on held-out texts", change))
    return found


ANOTHER = (
    "**The target was trained with the heads (Medusa-2): the result is another target,** `model/target/`. The heads "
    "draft for it alone, acceptance is measured against it, and text that is decoded with them is exactly its own, not "
    "that of the original. What it is worth is for an evaluation of the new target to say."
)
"""What a summary says of a target that was trained with its heads."""


def summary(name: str, found: Sequence[tuple[str, str]], is_joint: bool = False) -> str:
    """The text of `summary.md`."""
    note = (
        "Acceptance is measured on the target's own continuations of held-out prompts, at each position given that the "
        "tokens before it are the text's: greedy, how often a head's most probable token is the target's; sampled, the "
        "mean of the sum of min(p, q), the acceptance rate of rejection. Tokens per call is 1 + a1 + a1 a2 + ... of "
        "the greedy rates. The loss is added over the heads, with the weights 0.8^(k - 1)"
        + (", and its `head_weight` to the target's own." if is_joint else ".")
    )
    said = (ANOTHER, note) if is_joint else (note,)
    return page(f"# {name}", report.listed(found), *said, "![Loss and acceptance by step](heads.png)")


def figure(steps: Sequence[Line], valid: Sequence[Line]) -> Figure:
    """The loss by step, and the greedy acceptance of each position."""
    figure, (left, right) = plots.panels(2, 5, 3.6)
    at = [line["step"] for line in valid]
    left.plot(
        [line["step"] for line in steps],
        [line["loss"] for line in steps],
        color=plots.BLUE,
        linewidth=0.8,
        alpha=0.6,
        label="training",
    )
    left.plot(at, [line["valid_loss"] for line in valid], "o-", color=plots.ORANGE, markersize=3, label="held out")
    for position in range(len(valid[0]["greedy"])):
        color, marker = plots.STYLES[position % len(plots.STYLES)]
        rates = [line["greedy"][position] for line in valid]
        right.plot(at, rates, color=color, marker=marker, markersize=3, label=f"position {position + 1}")
    plots.finish(left, "Loss", "step", "all heads", legend=True)
    plots.finish(right, "Acceptance at temperature 0", "step", "rate", legend=True)
    return figure
