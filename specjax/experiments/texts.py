"""Texts from a file, to count or to index."""

import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

from specjax import files

FIELDS = ("target", "text", "input", "prompt")
"""The keys of a JSON object that may hold its text; the first that is present counts."""

_JSON = (".jsonl", ".json")


def _of_json(lines: Iterable[tuple[str, Any]], field: str) -> Iterator[str]:
    for where, values in lines:
        values = values if isinstance(values, dict) else {}
        keys = FIELDS if field == "auto" else (field,)
        text: Any = next((values[key] for key in keys if key in values), None)
        if not isinstance(text, str):
            wanted = " or ".join(map(repr, keys))
            raise ValueError(f"{where} has no text under {wanted}: it has {files.listed(values)}.")
        yield text


def _plain(lines: Iterable[tuple[int, str]]) -> Iterator[str]:
    parts: list[str] = []
    for _, line in lines:
        if line.strip():
            parts.append(line)
        elif parts:
            yield "".join(parts).rstrip("\n")
            parts = []
    if parts:
        yield "".join(parts).rstrip("\n")


def check(path: str | pathlib.Path) -> pathlib.Path:
    """The path of an existing file.

    Raises:
      FileNotFoundError: where there is no such file.
      IsADirectoryError: where it is a directory.
    """
    path = pathlib.Path(path).expanduser()
    files.check_file(path, "The data file", "give JSONL or plain text (--config.data=FILE)")
    return path


def read(path: str | pathlib.Path, field: str = "auto", num_texts: int = 0) -> list[str]:
    """Reads the first texts of a file, all where `num_texts` is 0; one that ends in `.xz` is unpacked.

    A file `.jsonl` or `.json` has one object on each line, whose text is the value of `field`, or of the first of
    `FIELDS` for "auto". Any other file is plain text, whose texts are separated by empty lines.

    Raises:
      OSError: where it does not exist, is a directory, or cannot be read.
      ValueError: for a line that is not JSON or has no text, or a file without texts or that is damaged.
    """
    path = check(path)
    is_json = (pathlib.Path(path.stem) if path.suffix == ".xz" else path).suffix in _JSON
    texts: list[str] = []
    for text in _of_json(files.read_json_lines(path), field) if is_json else _plain(files.read_lines(path)):
        texts.append(text)
        if len(texts) == num_texts:
            break
    if not texts:
        raise ValueError(f"{path} has no texts.")
    return texts
