"""Prompts from a JSONL file."""

import pathlib
from typing import Any, NamedTuple

from specjax import files

KEYS = ("prompt", "input", "turns")
"""The keys of a line that may hold its prompt; the first that is present counts; for `turns`, its first entry."""

MAX_PROMPT = 2**22
"""The longest prompt, in characters: about a million tokens, more than the positions of any supported model."""


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
        """Its name in tables."""
        return name(self.task, self.id, self.number)


def name(task: str, id: str, number: int) -> str:
    """The name of a prompt in tables."""
    return f"{task} {id}".strip() or f"prompt {number}"


def text_of(line: dict[str, Any]) -> str | None:
    """The prompt of a line, or None where it has none."""
    for key in KEYS:
        if key in line:
            value = line[key]
            if key == "turns":
                value = value[0] if isinstance(value, list) and value else None
            return value if isinstance(value, str) and value else None
    return None


def _label(fields: dict[str, Any], keys: tuple[str, ...], where: str) -> str:
    """The value of the first of some keys that a line has, as text."""
    key = next((key for key in keys if key in fields), None)
    value = "" if key is None or fields[key] is None else fields[key]
    if not isinstance(value, str | int | float):
        raise ValueError(f"{where} has a {type(value).__name__} under {key!r}: write a string or a number there.")
    return str(value)


def _parse(fields: Any, number: int, where: str) -> Prompt:
    text = text_of(fields) if isinstance(fields, dict) else None
    if text is None:
        raise ValueError(f"{where} has no prompt: give it a string under one of {', '.join(map(repr, KEYS))}.")
    if len(text) > MAX_PROMPT:
        raise ValueError(
            f"{where} has a prompt of {len(text)} characters, and at most {MAX_PROMPT} are read: shorten it, or leave "
            "the line out."
        )
    return Prompt(number, text, _label(fields, ("category",), where), _label(fields, ("id", "question_id"), where))


def read(path: str | pathlib.Path, num_prompts: int = 0) -> list[Prompt]:
    """Reads the first prompts of a JSONL file, all where `num_prompts` is 0; one that ends in `.xz` is unpacked.

    A line's prompt is its `prompt`, its `input`, or the first of its `turns`. Empty lines are skipped.

    Raises:
      OSError: where it does not exist, is a directory, or cannot be read.
      ValueError: for a line that is not JSON or has no prompt, too few lines, or a file that is damaged.
    """
    path = pathlib.Path(path).expanduser()
    files.check_file(path, "The data file", "give a JSONL file (--config.data=FILE)")
    prompts: list[Prompt] = []
    for where, fields in files.read_json_lines(path):
        prompts.append(_parse(fields, len(prompts), where))
        if len(prompts) == num_prompts:
            break
    if len(prompts) < max(num_prompts, 1):
        raise ValueError(f"{path} has {len(prompts)} prompts, but {max(num_prompts, 1)} were asked for.")
    return prompts
