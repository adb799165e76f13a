"""The finished cells of a sweep on disk, so that an interrupted run goes on where it was."""

import json
import pathlib
import time
import zlib
from collections.abc import Callable
from typing import Any

from specjax import files
from specjax.experiments import results
from specjax.parallel import distributed

_REMEDY = "delete it, or give --overwrite, to measure again"


def _checksum(content: dict[str, Any]) -> int:
    """CRC-32 of everything but the checksum: what is read back decides what is measured and reported."""
    values = {key: value for key, value in content.items() if key != "checksum"}
    return zlib.crc32(json.dumps(json.loads(results.to_json(values)), sort_keys=True).encode())


class Store:
    """The finished cells of a run by what they measure, in `cells.json`, and the seconds that they took."""

    def __init__(self, directory: pathlib.Path, settings: dict[str, Any], *, overwrite: bool):
        """Opens or makes the file.

        Raises:
          ValueError: where it is broken, or an earlier run had other settings.
        """
        self.path = directory / "cells.json"
        if overwrite:
            self.path.unlink(missing_ok=True)
        self.settings: dict[str, Any] = json.loads(results.to_json(settings))
        self.cells: dict[str, Any] = {}
        self.seconds = 0.0
        if not self.path.exists():
            return
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            before, self.cells, self.seconds = content["settings"], content["cells"], content["seconds"]
            is_whole = content["checksum"] == _checksum(content)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{self.path} is broken ({error!r}): {_REMEDY}.") from error
        if not is_whole:
            raise ValueError(f"{self.path} is broken (it is not as it was written, by its checksum): {_REMEDY}.")
        differ = [key for key in sorted({*before, *self.settings}) if before.get(key) != self.settings.get(key)]
        if differ:
            key = differ[0]
            raise ValueError(
                f"{self.path} was measured with another config ({key}: {before.get(key)!r} before, "
                f"{self.settings.get(key)!r} now): choose another --workdir, or give --overwrite to measure again."
            )

    def get(self, key: str, compute: Callable[[], Any]) -> Any:
        """The cell of a key, computed and written where it is not there."""
        if key not in self.cells:
            begin = time.perf_counter()
            # The cells that follow may depend on what the clock of this one says.
            self.cells[key] = distributed.from_first(json.loads(results.to_json(compute())))
            self.seconds += time.perf_counter() - begin
            content = {"settings": self.settings, "seconds": self.seconds, "cells": self.cells}
            files.write(self.path, results.to_json(content | {"checksum": _checksum(content)}))
        return self.cells[key]
