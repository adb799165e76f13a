"""The finished parts of a run in its work directory, so that the same command with the same config continues it.

Runs differ in what they finish: the cells of a sweep (`Store.get`), the rows of prompts (`RowStore.add`), or one thing
as a whole (`Store.holds`). Files are written atomically, so that an interrupted run leaves whole files. What is read
back decides what is measured and reported, so it is checked first.
"""

import itertools
import json
import pathlib
import shutil
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from specjax import files
from specjax.experiments import results
from specjax.experiments.results import Row
from specjax.parallel import distributed

_REMEDY = "choose another --workdir, or give --overwrite to delete that run"
_BROKEN = (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError)


def clear(directory: pathlib.Path, names: Iterable[str], kept: str = "") -> None:
    """Deletes files and directories of a run, except the one that is at the path `kept` or contains it."""
    spared = pathlib.Path(kept).expanduser().resolve() if kept else None
    for path in (directory / name for name in names):
        if spared is not None and path.resolve() in (spared, *spared.parents):
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _checksum(content: Mapping[str, Any]) -> int:
    """CRC-32 of everything but the checksum."""
    values = {key: value for key, value in content.items() if key != "checksum"}
    return zlib.crc32(json.dumps(json.loads(results.to_json(values)), sort_keys=True).encode())


def _read_object(path: pathlib.Path) -> Row:
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or not content:
        raise ValueError(f"it says {content!r}")
    return content


def _read_cells(path: pathlib.Path) -> tuple[Row, Row, float]:
    content = _read_object(path)
    if content["checksum"] != _checksum(content):
        raise ValueError("its checksum does not match its content")
    return content["settings"], content["cells"], content["seconds"]


class Store:
    """The finished parts of a run.

    Attributes:
      directory: the work directory.
      config: the config of the run; that of an earlier run in the same directory must be equal.
      path: the file of the cells.
      cells: the finished cells, by key.
      seconds: how long they took.
    """

    def __init__(
        self,
        directory: str | pathlib.Path,
        config: Mapping[str, Any],
        *,
        overwrite: bool = False,
        names: Sequence[str] = (),
    ):
        """Opens the directory; `overwrite` deletes the cells of an earlier run in it, and the files of these `names`.

        Raises:
          ValueError: where an earlier run had another config, or its files are broken.
        """
        self.directory = pathlib.Path(directory)
        self.path = self.directory / "cells.json"
        self.config: Row = json.loads(results.to_json(dict(config)))
        self.cells: dict[str, Any] = {}
        self.seconds = 0.0
        if overwrite:
            clear(self.directory, ("cells.json", *names))
        if self.path.exists():
            before, self.cells, self.seconds = self.parse("cells.json", _read_cells)
            self._check_config(before)

    def parse(self, name: str, parser: Callable[[pathlib.Path], Any]) -> Any:
        """The content of a file of the run.

        Raises:
          ValueError: where it is broken, naming the remedy.
        """
        path = self.directory / name
        try:
            return parser(path)
        except _BROKEN as error:
            raise ValueError(f"{path} is broken ({error!r}): {_REMEDY}.") from error

    def _check_config(self, before: Row) -> None:
        differ = [key for key in sorted({*before, *self.config}) if before.get(key) != self.config.get(key)]
        if differ:
            changes = ", ".join(
                f"{key if key.isprintable() else repr(key)}: {before.get(key)!r} before, {self.config.get(key)!r} now"
                for key in differ[:4]
            )
            raise ValueError(f"{self.directory} holds a run with another config ({changes}): {_REMEDY}.")

    def holds(self, name: str) -> bool:
        """Whether there is a file that a run with the same config wrote.

        Raises:
          ValueError: where the run had another config, or an unknown one.
        """
        if not (self.directory / name).exists():
            return False
        path = self.directory / "config.json"
        if not path.exists():
            raise ValueError(f"{path} is missing, so that the config of {name} is unknown: {_REMEDY}.")
        self._check_config(self.parse("config.json", _read_object))
        return True

    def write(self, name: str, text: str) -> None:
        """Writes a file of the run."""
        self.directory.mkdir(parents=True, exist_ok=True)
        files.write(self.directory / name, text)

    def write_config(self) -> None:
        """Writes `config.json`, which identifies the run."""
        self.write("config.json", results.to_json(self.config))

    def write_samples(self, samples: Sequence[Row]) -> None:
        """Writes `samples.jsonl`: the texts."""
        self.write("samples.jsonl", "".join(f"{json.dumps(sample, ensure_ascii=False)}\n" for sample in samples))

    def get(self, key: str, compute: Callable[[], Any]) -> Any:
        """The cell of a key, computed and written where it is missing."""
        if key not in self.cells:
            begin = time.perf_counter()
            # Later cells may depend on the times of this one.
            self.cells[key] = distributed.from_first(json.loads(results.to_json(compute())))
            self.seconds += time.perf_counter() - begin
            content = {"settings": self.config, "seconds": self.seconds, "cells": self.cells}
            self.write(self.path.name, results.to_json(content | {"checksum": _checksum(content)}))
        return self.cells[key]


_NUMBERS = (*results.OF_BATCH, *results.OF_PROMPT, "prompt", "batch", "num_draft_tokens", "batch_size", "temperature")
_COSTS = ("cost_ratio", "score_cost")
_LISTS = (*results.BY_POSITION, *results.REPEATS)
_TEXTS = ("task", "id", "target", "draft", "drafter", "verify", "dtype", "device", "jax_version")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < float("inf")


def _check_row(row: Row, number: int) -> None:
    """Checks what derived fields, tables and plots are computed from.

    Raises:
      ValueError: naming the field.
    """
    wrong = [name for name in (*_NUMBERS, *_COSTS) if not _is_number(row[name])]
    wrong += [name for name in _LISTS if type(row[name]) is not list or not all(map(_is_number, row[name]))]
    wrong += [name for name in _TEXTS if type(row[name]) is not str]
    wrong += [name for name in results.COMMON if name not in row]
    told = row["step_cost"] if type(row["step_cost"]) is list else [row["step_cost"]]
    wrong += ["step_cost"] if not told or not all(map(_is_number, told)) else []
    wrong += [] if all(map(_is_number, itertools.chain(*row["shorter_costs"]))) else ["shorter_costs"]
    wrong += [name for name in results.REPEATS if not row[name] or min(row[name]) <= 0]
    if row["prompt"] != number:
        wrong.append("prompt")
    if wrong:
        raise ValueError(f"row {number}: {wrong[0]}={row.get(wrong[0])!r}")


def _read_rows(path: pathlib.Path) -> list[Row]:
    """The rows of prompts, in order; the last row, of all prompts, has to be derivable from them."""
    *rows, total = json.loads(path.read_text(encoding="utf-8"))
    for number, row in enumerate(rows):
        _check_row(row, number)
    if total["task"] != "all" or total["num_prompts"] != len(rows):
        raise ValueError("the row of all prompts is missing")
    # What follows from counters and times is not read but derived anew.
    rows = results.judged([results.derive(row) for row in rows])
    results.combine(rows, "all")
    return rows


def _read_samples(path: pathlib.Path) -> list[Row]:
    samples = [sample for _, sample in files.read_json_lines(path)]
    for number, sample in enumerate(samples):
        if type(sample["prompt"]) is not str:
            raise ValueError(f"sample {number}: prompt={sample['prompt']!r}")
    return samples


class RowStore(Store):
    """The rows of finished prompts, and their texts.

    Attributes:
      rows: finished rows, one per prompt.
      samples: the texts of the same prompts.
    """

    FILES = ("config.json", "samples.jsonl", "results.json", "summary.md", "acceptance.png", "speedup.png")

    def __init__(self, directory: str | pathlib.Path, config: Mapping[str, Any], *, overwrite: bool = False):
        """Opens or makes the directory, as `Store` does, and reads the rows."""
        super().__init__(directory, config, overwrite=overwrite, names=self.FILES)
        self.rows: list[Row] = self.parse("results.json", _read_rows) if self.holds("results.json") else []
        self.write_config()
        has_samples = (self.directory / "samples.jsonl").exists()
        self.samples: list[Row] = self.parse("samples.jsonl", _read_samples) if has_samples else []
        # The rows are written last: samples without rows are from a batch that was not finished.
        missing = len(self.samples) - len(self.rows)
        if not 0 <= missing <= max(int(config.get("batch_size", 1)), 1):
            path = self.directory / ("samples.jsonl" if missing < 0 else "results.json")
            found = f"{len(self.rows)} prompts in results.json, {len(self.samples)} in samples.jsonl"
            raise ValueError(f"{path} is broken, since prompts are missing from it ({found}): {_REMEDY}.")
        self.samples = self.samples[: len(self.rows)]

    def add(self, rows: Sequence[Row], samples: Sequence[Row]) -> None:
        """Writes the rows of a batch, and the row of all prompts so far."""
        self.rows = results.judged([*self.rows, *rows])
        self.samples += samples
        self.write_samples(self.samples)
        self.write("results.json", results.to_json([*self.rows, results.combine(self.rows, "all")]))

    def check_resumable(self, prompts: Sequence[str], device: str) -> None:
        """Checks that the finished rows are from the same prompts on the same device.

        Raises:
          ValueError: where it was not.
        """
        if len(self.rows) > len(prompts):
            raise ValueError(f"{self.directory} holds a run over more prompts; the data file has changed: {_REMEDY}.")
        for row, sample in zip(self.rows, self.samples, strict=True):
            found = ""
            if row["device"] != device:
                found = f"rows measured on {row['device']}, but this is {device}"
            elif sample["prompt"] != prompts[row["prompt"]]:
                found = "a run over other prompts; the data file has changed"
            if found:
                raise ValueError(f"{self.directory} holds {found}: {_REMEDY}.")
