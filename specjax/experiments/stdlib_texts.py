"""Files of prompts, texts and pairs that need no network: they are made from texts that come with Python.

The language reference (`pydoc_data`, shipped with CPython under the PSF licence) gives running text; the docstrings of
the standard library give pairs of a description and its first line, its summary.
"""

import ast
import pathlib
import sysconfig
import zlib
from collections.abc import Iterator
from typing import Any

Line = dict[str, Any]

_ASKED = {
    "summary": "Summarise this passage in two sentences.\n\n{text}",
    "rewrite": "Rewrite this passage in simpler words, and keep every fact.\n\n{text}",
    "question": "Read this passage, and name the three most important facts in it.\n\n{text}",
    "copy-edit": "Repeat this passage word for word, but write British English.\n\n{text}",
}
"""The instructions of prompts, by category."""

_LENGTH = (300, 1500)
"""Characters of a passage."""

_SPLITS = {"test": 1, "valid": 1, "train": 18}
"""The share of each split, in twentieths of the pairs."""


def topics() -> dict[str, str]:
    """Python's language reference, by topic.

    Raises:
      OSError: where this Python comes without it.
    """
    try:
        from pydoc_data.topics import topics as found
    except ImportError as error:
        raise OSError(
            "This Python has no pydoc_data (its documentation): install the whole standard library, or give files of "
            "your own."
        ) from error
    return found


def passages() -> list[str]:
    """Paragraphs of the language reference that are prose, neither short nor long."""
    found = []
    for _, text in sorted(topics().items()):
        for block in text.split("\n\n"):
            words = " ".join(block.split())
            if words[:1].isalpha() and words.endswith(".") and "::=" not in words and len(words) <= _LENGTH[1]:
                found.append(words)
    return list(dict.fromkeys(found))


def prompts(number: int) -> Iterator[Line]:
    """Prompts over passages, each category in turn."""
    long = [text for text in passages() if len(text) >= _LENGTH[0]]
    for i, text in enumerate(long[:number]):
        category = list(_ASKED)[i % len(_ASKED)]
        yield {"category": category, "id": i, "prompt": _ASKED[category].format(text=text)}


def corpus() -> Iterator[Line]:
    """The paragraphs, as texts to count."""
    for text in passages():
        yield {"text": text}


def _docstrings(path: pathlib.Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


def pairs(folder: str = "") -> dict[str, list[Line]]:
    """By split, the docstrings of the standard library, or of one package of it.

    `input` is the description, `target` its first line.
    """
    root = pathlib.Path(sysconfig.get_paths()["stdlib"], folder)
    found: dict[str, str] = {}
    for path in sorted(root.rglob("*.py")):
        if not {"site-packages", "dist-packages", "test", "tests", "idlelib"} & set(path.relative_to(root).parts):
            for text in _docstrings(path):
                head, _, rest = text.partition("\n\n")
                head, rest = (" ".join(part.split()) for part in (head, rest))
                if 10 <= len(head) <= 100 and 80 <= len(rest) <= _LENGTH[1]:
                    found.setdefault(rest, head)
    splits: dict[str, list[Line]] = {name: [] for name in _SPLITS}
    names = [name for name, share in _SPLITS.items() for _ in range(share)]
    for rest, head in found.items():
        splits[names[zlib.crc32(rest.encode()) % len(names)]].append({"input": rest, "target": head})
    return splits
