"""Texts whose beginning is a prompt: the files that a language model's experiment trains on and decodes."""

import json
import pathlib
from collections.abc import Iterator

from specjax import files
from specjax.experiments import texts


def split(text: str, num_words: int) -> tuple[str, str] | None:
    """The first words of a text and the rest, which begins with a space; None for a text of no more words."""
    words = text.split()
    if len(words) <= num_words:
        return None
    return " ".join(words[:num_words]), " " + " ".join(words[num_words:])


def _lines(source: str, num_words: int, *, whole: bool) -> Iterator[str]:
    for text in texts.read(source, "input"):
        parts = split(text, num_words)
        if parts is not None:
            line = {"text": "".join(parts)} if whole else {"input": parts[0], "target": parts[1]}
            yield json.dumps(line, ensure_ascii=False) + "\n"


def write(source: str, path: pathlib.Path, num_words: int, *, whole: bool) -> str:
    """Writes the `input`s of a file, as whole texts to train on, or as prompts with what follows them.

    Args:
      source: a file that `texts.read` reads.
      path: the JSONL file to write; its directory is made.
      num_words: how many words of a text are its prompt; texts of no more words are left out.
      whole: whether a line has the whole `text`, else `input` and `target`.

    Returns:
      The path.

    Raises:
      OSError: where a file cannot be read or written.
      ValueError: for a file without `input`s of more words.
    """
    content = "".join(_lines(source, num_words, whole=whole))
    if not content:
        raise ValueError(f"{source} has no input of more than prompt_words={num_words} words: lower it.")
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, content)
    return str(path)
