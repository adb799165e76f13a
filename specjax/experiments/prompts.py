"""Prompts from a JSONL file."""

import json
import lzma
import pathlib
from typing import Any, NamedTuple

KEYS = ("prompt", "input", "turns")
"""Where a line keeps its prompt, the first of them that it has; of `turns`, the first is taken."""


class Prompt(NamedTuple):
    """One line of the file.

    Attributes:
      number: which prompt of the file it is, from 0.
      text: the prompt.
      task: the line's `category`, or "".
      id: the line's `id` or `question_id`, or "".
    """

    number: int
    text: str
    task: str
    id: str

    @property
    def name(self) -> str:
        """What tables call it."""
        return name(self.task, self.id, self.number)


def name(task: str, id: str, number: int) -> str:
    """What tables call a prompt."""
    return f"{task} {id}".strip() or f"prompt {number}"


def _text(line: dict[str, Any]) -> str | None:
    for key in KEYS:
        if key in line:
            value = line[key]
            if key == "turns":
                value = value[0] if isinstance(value, list) and value else None
            return value if isinstance(value, str) and value else None
    return None


def _parse(line: str, number: int, where: str) -> Prompt:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON ({error.msg}): write one object a line.") from error
    text = _text(fields) if isinstance(fields, dict) else None
    if text is None:
        raise ValueError(f"{where} has no prompt: give it a text under one of {', '.join(map(repr, KEYS))}.")
    name = fields.get("id", fields.get("question_id", ""))
    return Prompt(number, text, str(fields.get("category", "")), str(name))


def read(path: str | pathlib.Path, num_prompts: int = 0) -> list[Prompt]:
    """Reads the first prompts of a file; one that ends in `.xz` is unpacked. Empty lines are skipped.

    Args:
      path: a JSONL file. A line's prompt is its `prompt`, its `input`, or the first of its `turns`.
      num_prompts: how many; 0 reads all.

    Raises:
      FileNotFoundError: where there is no such file.
      ValueError: for a line that is not JSON or has no prompt, or too few lines.
    """
    path = pathlib.Path(path).expanduser()
    if path.is_dir():
        raise IsADirectoryError(f"The data file {path} is a directory: give a file (--config.data=FILE).")
    if not path.is_file():
        raise FileNotFoundError(f"The data file {path} does not exist: give a JSONL file (--config.data=FILE).")
    prompts: list[Prompt] = []
    try:
        with lzma.open(path, "rt", encoding="utf-8") if path.suffix == ".xz" else path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if num_prompts and len(prompts) == num_prompts:
                    break
                if line.strip():
                    prompts.append(_parse(line, len(prompts), f"{path}, line {number},"))
    except (lzma.LZMAError, UnicodeDecodeError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as UTF-8 text ({error}).") from error
    if len(prompts) < max(num_prompts, 1):
        raise ValueError(f"{path} has {len(prompts)} prompts, but {max(num_prompts, 1)} were asked for.")
    return prompts
