"""Checkpoints of a run, by orbax, and the identity of the run that they belong to.

Each has a directory, named by its step, with the state, the run's identity, and `checksums.json`, written last.
"""

import json
import pathlib
import zlib
from collections.abc import Mapping
from typing import Any

import orbax.checkpoint as ocp

from specjax import files
from specjax.models.weights.checkpoint import FORMAT
from specjax.training.train import TrainState

CHECKSUMS = "checksums.json"

_REMEDY = "choose another --workdir, or give --overwrite to delete that run"


class RunMismatch(ValueError):
    """A checkpoint that belongs to another run."""


def _checksums(directory: pathlib.Path) -> dict[str, int]:
    """CRC-32 of every file: orbax reads a flipped byte as data."""
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != CHECKSUMS)
    return {path.relative_to(directory).as_posix(): zlib.crc32(path.read_bytes()) for path in files}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, directory: str | pathlib.Path, identity: Mapping[str, Any], keep: int = 2):
        """Opens or makes the directory.

        Args:
          directory: used by this run alone.
          identity: JSON values; a run is continued only where they are equal.
          keep: how many of the newest checkpoints are kept.
        """
        self.directory = pathlib.Path(directory).absolute()
        self.identity = json.loads(json.dumps({"format": FORMAT, **identity}))
        self.directory.mkdir(parents=True, exist_ok=True)
        # Steps donate the state, so a save has to finish reading it before it returns.
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(self.directory, options=options, item_names=("state", "identity"))

    def close(self) -> None:
        """Closes the directory."""
        self._manager.close()

    def save(self, state: TrainState) -> int:
        """Saves a state, unless its step is saved already; returns the step."""
        step = int(state.step)
        if self._manager.latest_step() == step:
            return step
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),  # pyright: ignore[reportCallIssue]
            identity=ocp.args.JsonSave(self.identity),  # pyright: ignore[reportCallIssue]
        )
        directory = self.directory / str(step)
        try:
            self._manager.save(step, args=items)
            self._manager.wait_until_finished()
        except OSError as error:
            raise files.cannot_write(directory, error) from error
        files.write(directory / CHECKSUMS, json.dumps(_checksums(directory)))
        return step

    def restore(self, abstract: TrainState) -> TrainState | None:
        """The newest state, or None where there is none.

        Args:
          abstract: its shapes, dtypes and shardings.

        Raises:
          RunMismatch: for a checkpoint of a run with another identity, naming what differs.
          ValueError: for a corrupt one.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        directory = self.directory / str(step)
        remedy = f"delete {directory} to resume from the checkpoint before it, if there is one, or give --overwrite."
        self._check_files(directory, remedy)
        try:
            items = ocp.args.Composite(identity=ocp.args.JsonRestore())  # pyright: ignore[reportCallIssue]
            self._check_identity(self._manager.restore(step, args=items)["identity"])
            items = ocp.args.Composite(
                state=ocp.args.StandardRestore(abstract)  # pyright: ignore[reportCallIssue]
            )
            return self._manager.restore(step, args=items)["state"]
        except RunMismatch:
            raise
        except Exception as error:  # orbax and tensorstore raise a dozen types for a damaged directory
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(f"Checkpoint {directory} is corrupt ({reason[:200]}): {remedy}") from error

    def _check_files(self, directory: pathlib.Path, remedy: str) -> None:
        path = directory / CHECKSUMS
        if not path.is_file():
            return  # The run ended between the checkpoint and this file; orbax's own files are complete.
        try:
            expected, found = json.loads(path.read_text(encoding="utf-8")), _checksums(directory)
            damaged = [name for name in sorted({*expected, *found}) if found.get(name) != expected.get(name)]
        except (ValueError, AttributeError, TypeError, RecursionError):
            damaged = [CHECKSUMS]
        if damaged:
            what = "is damaged" if (directory / str(damaged[0])).is_file() else "is missing"
            raise ValueError(f"Checkpoint {directory} is corrupt ({damaged[0]} {what}): {remedy}")

    def _check_identity(self, before: Any) -> None:
        old, new = _flat(before), _flat(self.identity)
        differ = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
        if differ:
            changes = ", ".join(f"{name}: {old.get(name)!r} before, {new.get(name)!r} now" for name in differ[:4])
            raise RunMismatch(f"{self.directory} holds a run with another configuration ({changes}): {_REMEDY}.")
