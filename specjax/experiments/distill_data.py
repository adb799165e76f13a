"""The prompts of a distillation, from a file."""

import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from specjax import api, files
from specjax.api.pretrained import Pretrained
from specjax.experiments import prompts
from specjax.training import data
from specjax.training.own_text import Lengths, Prompt


class Line(NamedTuple):
    """A line of the file.

    Attributes:
      prompt: what is asked, or None for a text alone, whose beginning is the prompt.
      text: the given text or answer, or None.
    """

    prompt: str | None
    text: str | None


def _parse(fields: Any, where: str) -> Line:
    values = fields if isinstance(fields, dict) else {}
    text, target = (values.get(name) if isinstance(values.get(name), str) else None for name in ("text", "target"))
    asked = prompts.text_of(values)
    if asked is None and text is None:
        raise ValueError(
            f"{where} has neither a prompt ({', '.join(map(repr, prompts.KEYS))}) nor 'text': it has "
            f"{files.listed(values)}."
        )
    return Line(asked, target) if asked is not None else Line(None, text)


def read(source: str) -> list[Line]:
    """Reads a JSONL file, unpacked where it ends in `.xz`, or a hub data set (`data.read`).

    A line has a prompt (`prompt`, `input`, or the first of `turns`), with or without its answer, `target`; or a `text`.

    Raises:
      OSError: where it cannot be read.
      ValueError: for a line that has none of these, or a file without lines.
    """
    if source.startswith(data.HUB):
        return [Line(text.input, text.target) for text in data.read(source)]
    path = pathlib.Path(source).expanduser()
    files.check_file(path, "The data file", f"give a JSONL file, or {data.HUB}NAME[:SPLIT]")
    lines = [_parse(fields, where) for where, fields in files.read_json_lines(path)]
    if not lines:
        raise ValueError(f"{source} has no lines.")
    return lines


def choose(lines: Sequence[Line], number: int, seed: int) -> list[Line]:
    """A random choice of that many lines, all where it is 0, in random order."""
    order = np.random.default_rng(seed).permutation(len(lines))
    return [lines[i] for i in order[: number or None].tolist()]


def encode(
    lines: Sequence[Line], target: Pretrained, lengths: Lengths, *, chat: bool, prompt_length: int, max_prompt: int
) -> list[Prompt]:
    """Tokenises prompts, with their given texts; those that are too long are left out.

    Args:
      lines: the lines.
      target: whose tokenizer, and chat template, are used.
      lengths: the shape of a row.
      chat: put prompts into the chat template.
      prompt_length: the tokens at the beginning of a text alone that are its prompt.
      max_prompt: the longest prompt in tokens.
    """
    assert target.tokenizer is not None
    end = data.end_token(target.tokenizer)
    begin = [i for i in [target.tokenizer.backend.token_to_id(target.tokenizer.bos_token or "")] if i is not None]
    found: list[Prompt] = []
    for line in lines:
        text = [] if line.text is None else target.tokenizer.encode(line.text, add_special_tokens=False)
        if line.prompt is None:
            asked = ([*begin, *text])[: max(prompt_length, 1)]
            context, given = (begin, text) if begin else (text[:1], text[1:])
        else:
            asked = api.encode(target, [line.prompt], chat=chat)[0]
            context, given = asked, text
        if not asked or len(asked) > max_prompt:
            continue
        source: list[int] = []
        if lengths.start_token is not None:
            source, context = asked, [lengths.start_token]
            given = text
        sizes = {"target_length": lengths.target_length, "source_length": lengths.source_length}
        example = None
        if line.text is not None:
            example = data.cut(source, context, [*given, end], **sizes)[0]
        found.append(Prompt(tuple(asked), example))
    return found
