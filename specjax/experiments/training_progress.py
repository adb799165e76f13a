"""The progress of a training on the screen."""

import collections
import time
from collections.abc import Callable
from typing import Any

from specjax.experiments.reports import train as report
from specjax.experiments.reports.display import View
from specjax.training.curve import Line
from specjax.training.fit import Learner, Run

_LINE_EVERY = 20.0
"""Seconds between two lines of progress where there is no terminal."""


def loss_of(line: Line) -> str:
    """What a validation says about a language model."""
    return f"validation loss {line['valid_loss']:.4f}, perplexity {report.perplexity(line['valid_loss']):.2f}"


class Progress:
    """A bar on a terminal, else a line now and then; a line for every validation."""

    def __init__(self, view: View, run: Run | Learner, bar: Any, describe: Callable[[Line], str] = loss_of):
        """Shows a run on a bar of `View.progress`; `describe` puts the line of a validation into words."""
        self.view, self.run, self.bar, self.describe = view, run, bar, describe
        self.losses: collections.deque[float] = collections.deque(maxlen=report.RECENT)
        self.shown = time.monotonic()
        self.is_first = True

    def __call__(self, lines: list[Line]) -> None:
        """Takes the new lines of the curve."""
        steps = [line for line in lines if "loss" in line]
        self.losses.extend(line["loss"] for line in steps)
        if steps:
            self._step(steps[-1])
        if self.is_first:
            # The first lines are those of an earlier run.
            self.is_first = False
            if steps:
                self.view.line(f"Going on after step {steps[-1]['step']} of {self.run.config.num_steps}.")
            return
        for line in lines:
            if "valid_loss" in line:
                self.view.line(f"Step {line['step']}: {self.describe(line)}.")

    def _step(self, line: Line) -> None:
        loss = sum(self.losses) / len(self.losses)
        status = f"loss {loss:.3f}, {line['tokens_per_second']:.0f} tokens/s"
        self.bar.update(self.bar.task_ids[0], completed=line["step"], status=status)
        now = time.monotonic()
        if not self.view.console.is_terminal and not self.is_first and now - self.shown > _LINE_EVERY:
            self.shown = now
            left = (self.run.config.num_steps - line["step"]) * line["seconds"]
            self.view.line(
                f"Step {line['step']} of {self.run.config.num_steps}: {status}, {left / 60:.1f} minutes left"
            )
