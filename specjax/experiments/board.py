"""TensorBoard beside `train.jsonl`: the same numbers as event files, in `tensorboard/` of a work directory."""

import contextlib
import importlib.util
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from specjax.experiments.settings import Check
from specjax.training.fit import Report

DIRECTORY = "tensorboard"
"""The directory of the event files."""

INSTALLED = Check(
    lambda wanted: not wanted or importlib.util.find_spec("tensorboardX") is not None,
    "tensorboardX is not installed: pip install -e '.[tensorboard]', or leave it False",
)
"""The check of `config.tensorboard`, before anything is loaded."""

Line = Mapping[str, Any]


class Board:
    """The event files of one run.

    They are made of the lines of the run from its first step, which a resumed run reports again: files of an earlier
    process are deleted when the first lines come, and so no step has two points.
    """

    def __init__(self, workdir: str | pathlib.Path):
        """Opens `tensorboard/` of a work directory, without the files of before."""
        from tensorboardX import SummaryWriter

        directory = pathlib.Path(workdir) / DIRECTORY
        for path in directory.glob("events.out.tfevents.*"):
            path.unlink()
        self._writer = SummaryWriter(logdir=str(directory), flush_secs=5)

    def __call__(self, lines: Sequence[Line]) -> None:
        """Writes the numbers of lines: as valid/NAME those of a validation, which has `valid_loss`, else as train/NAME.

        A list of numbers, such as acceptance by position, becomes NAME/1, NAME/2 and so on.
        """
        for line in lines:
            group = "valid" if "valid_loss" in line else "train"
            for name, value in line.items():
                if name != "step":
                    self._add(f"{group}/{name.removeprefix('valid_')}", value, line["step"])

    def _add(self, tag: str, value: Any, step: int) -> None:
        if isinstance(value, list | tuple):
            for position, part in enumerate(value, start=1):
                self._add(f"{tag}/{position}", part, step)
        else:
            self._writer.add_scalar(tag, float(value), step)

    def close(self) -> None:
        """Ends the files."""
        self._writer.close()


@contextlib.contextmanager
def beside(report: Report, workdir: str | pathlib.Path, wanted: bool) -> Iterator[Report]:
    """A report that also writes to TensorBoard, where that is wanted; the files end with the block."""
    if not wanted:
        yield report
        return
    with contextlib.closing(Board(workdir)) as board:

        def both(lines: list[dict[str, Any]]) -> None:
            board(lines)
            report(lines)

        yield both
