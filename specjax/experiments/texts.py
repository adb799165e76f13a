"""Texts from a file, to count or to index."""

import json
import lzma
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

FIELDS = ("target", "text", "input", "prompt")
"""Where a line of JSON keeps its text, the first of them that it has."""

_JSON = (".jsonl", ".json")


def _of_json(file: Iterable[str], field: str, where: str) -> Iterator[str]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}, line {number}, is not JSON ({error.msg}): write one object a line.") from error
        values = values if isinstance(values, dict) else {}
        keys = FIELDS if field == "auto" else (field,)
        text: Any = next((values[key] for key in keys if key in values), None)
        if not isinstance(text, str):
            found = ", ".join(map(repr, values)) or "nothing"
            raise ValueError(
                f"{where}, line {number}, has no text under {' or '.join(map(repr, keys))}: it has {found}."
            )
        yield text


def _plain(file: Iterable[str]) -> Iterator[str]:
    lines: list[str] = []
    for line in file:
        if line.strip():
            lines.append(line)
        elif lines:
            yield "".join(lines).rstrip("\n")
            lines = []
    if lines:
        yield "".join(lines).rstrip("\n")


def check(path: str | pathlib.Path) -> pathlib.Path:
    """The path of a file that is there.

    Raises:
      FileNotFoundError: where there is no such file.
      IsADirectoryError: where it is a directory.
    """
    path = pathlib.Path(path).expanduser()
    if path.is_dir():
        raise IsADirectoryError(f"The data file {path} is a directory: give a file (--config.data=FILE).")
    if not path.is_file():
        raise FileNotFoundError(f"The file {path} does not exist: give JSONL or plain text (--config.data=FILE).")
    return path


def read(path: str | pathlib.Path, field: str = "auto", num_texts: int = 0) -> list[str]:
    """Reads the first texts of a file; one that ends in `.xz` is unpacked.

    Args:
      path: `.jsonl` or `.json` with one object a line; anything else is plain text, whose texts are parted by empty
        lines.
      field: which value of an object is its text; "auto": the first of `FIELDS`.
      num_texts: how many; 0 reads all.

    Raises:
      FileNotFoundError: where there is no such file.
      ValueError: for a line that is not JSON or has no text, or a file without texts.
    """
    path = check(path)
    packed = path.suffix == ".xz"
    is_json = (pathlib.Path(path.stem) if packed else path).suffix in _JSON
    texts: list[str] = []
    try:
        with lzma.open(path, "rt", encoding="utf-8") if packed else path.open(encoding="utf-8") as file:
            for text in _of_json(file, field, str(path)) if is_json else _plain(file):
                texts.append(text)
                if len(texts) == num_texts:
                    break
    except (lzma.LZMAError, UnicodeDecodeError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as UTF-8 text ({error}).") from error
    if not texts:
        raise ValueError(f"{path} has no texts.")
    return texts
