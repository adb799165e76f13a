"""The loss curve: `train.jsonl`, a line for every step and every validation."""

import json
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

from specjax import files

Line = dict[str, Any]

Rank = Callable[[Line], float]
"""Maps the line of a validation to a number that is least for the best."""


def valid_loss(line: Line) -> float:
    """The loss of held-out texts."""
    return line["valid_loss"]


_STEP = ("loss", "grad_norm", "learning_rate", "num_targets", "num_tokens", "seconds", "tokens_per_second")
"""The fields of the line of a step, besides its number."""


def _parse(text: bytes) -> Line | None:
    """A line of the file; None where it is not a valid one."""
    try:
        line = json.loads(text.decode())
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict):
        return None
    names = ("valid_loss",) if "valid_loss" in line else _STEP
    is_whole = type(line.get("step")) is int and all(type(line.get(name)) in (int, float) for name in names)
    return line if is_whole else None


class Curve:
    """The file and its lines.

    Attributes:
      path: the file.
      lines: in order of their steps. A step has `step`, `loss`, `grad_norm`, `learning_rate`, `num_targets`,
        `num_tokens`, `seconds` and `tokens_per_second` (of the report it is in); a validation `step`, `valid_loss`; and
        both what else the objective measures.
      rank: what validations are compared by.
    """

    def __init__(self, path: str | pathlib.Path, step: int, rank: Rank = valid_loss):
        """Opens the file of a run that resumes after a step: lines of later steps are dropped, and written again.

        Args:
          path: the file; an empty one is made.
          step: how many steps the run has made.
          rank: what validations are compared by.

        Raises:
          ValueError: where the file lacks steps before that one, or a line other than the last is broken.
        """
        self.path, self.rank = pathlib.Path(path), rank
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.lines: list[Line] = [line for line in self._read() if line["step"] <= step]
        if [line["step"] for line in self.steps] != list(range(1, step + 1)):
            raise ValueError(
                f"{self.path} lacks some of the {step} steps that the checkpoint has made: choose another --workdir, "
                "or give --overwrite."
            )
        files.write(self.path, "".join(json.dumps(line) + "\n" for line in self.lines))

    def _read(self) -> list[Line]:
        """The lines of the file; one that was being written when the run was killed, the last, is left out."""
        if not self.path.is_file():
            return []
        *whole, rest = self.path.read_bytes().split(b"\n")
        lines = [_parse(text) for text in whole]
        if None in lines:
            raise ValueError(
                f"{self.path} is broken (line {lines.index(None) + 1} is neither a step nor a validation): choose "
                "another --workdir, or give --overwrite."
            )
        last = _parse(rest)
        return [line for line in [*lines, last] if line is not None]

    def add(self, lines: Iterable[Line]) -> None:
        """Appends lines to the file."""
        lines = list(lines)
        self.lines += lines
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
        except OSError as error:
            raise files.cannot_write(self.path, error) from error

    @property
    def steps(self) -> list[Line]:
        """The lines of steps."""
        return [line for line in self.lines if "loss" in line]

    @property
    def valid(self) -> list[Line]:
        """The lines of validations."""
        return [line for line in self.lines if "valid_loss" in line]

    @property
    def best(self) -> Line | None:
        """The best validation, the first of equal ones."""
        return min(self.valid, key=self.rank, default=None)

    @property
    def num_worse(self) -> int:
        """How many validations in a row, the last ones, are no better than the best."""
        return len(self.valid) - 1 - self.valid.index(self.best) if self.best is not None else 0
