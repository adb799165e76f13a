"""The loss curve: `train.jsonl`, a line for every step and every look at the validation loss."""

import json
import os
import pathlib
from collections.abc import Iterable
from typing import Any

Line = dict[str, Any]


class Curve:
    """The file and its lines.

    Attributes:
      path: the file.
      lines: in order of their steps. A step has `step`, `loss`, `grad_norm`, `learning_rate`, `num_targets`,
        `num_tokens`, `seconds` and `tokens_per_second` (of the report it is in); a validation `step`, `valid_loss`.
    """

    def __init__(self, path: str | pathlib.Path, step: int):
        """Opens the file of a run that goes on after a step: what was written of later ones will be written again.

        Args:
          path: the file; an empty one is made.
          step: how many steps the run has made.

        Raises:
          ValueError: where the file lacks steps before that one.
        """
        self.path = pathlib.Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.lines: list[Line] = [line for line in self._read() if line["step"] <= step]
        if len([line for line in self.lines if "loss" in line]) != step:
            raise ValueError(
                f"{self.path} lacks some of the {step} steps that the checkpoint has made: choose another --workdir, "
                "or give --overwrite."
            )
        partial = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        partial.write_text("".join(json.dumps(line) + "\n" for line in self.lines), encoding="utf-8")
        os.replace(partial, self.path)

    def _read(self) -> list[Line]:
        if not self.path.is_file():
            return []
        lines = []
        for text in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                line = json.loads(text)
                lines += [line] if isinstance(line["step"], int) else []
            except (ValueError, TypeError, KeyError):
                break  # The line that was being written when the run was killed.
        return lines

    def add(self, lines: Iterable[Line]) -> None:
        """Appends lines to the file."""
        lines = list(lines)
        self.lines += lines
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)

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
        """The validation of least loss, the first of equal ones."""
        return min(self.valid, key=lambda line: line["valid_loss"], default=None)
