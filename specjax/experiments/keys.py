"""The keys of a config file with their comments, for `--help`."""

import ast
import difflib
import io
import pathlib
import re
import tokenize
from collections.abc import Iterable
from typing import Any

from ml_collections import ConfigDict


def flatten(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """The keys of a config and their values; those of a nested config are joined by a dot."""
    found: dict[str, Any] = {}
    for key in sorted(config):
        value = config[key]
        found |= flatten(value, f"{prefix}{key}.") if isinstance(value, ConfigDict) else {f"{prefix}{key}": value}
    return found


def _target(line: ast.stmt) -> str | None:
    """The key that a statement `config.KEY = ...` assigns to."""
    if not (isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Attribute)):
        return None
    names, node = [], line.targets[0]
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return ".".join(reversed(names)) if isinstance(node, ast.Name) and node.id == "config" else None


def comments(path: str | pathlib.Path) -> dict[str, str]:
    """The comment of each `config.KEY = ...` of a file: on its line, else in the lines above it."""
    source = pathlib.Path(path).read_text(encoding="utf-8")
    found: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            found[token.start[0]] = token.string.lstrip("# ").strip()
    lines = source.splitlines()
    by_key: dict[str, str] = {}
    for node in ast.walk(ast.parse(source)):
        key = _target(node) if isinstance(node, ast.stmt) else None
        if key is None or not isinstance(node, ast.stmt):
            continue
        text = found.get(node.end_lineno or node.lineno, "")
        above, parts = node.lineno - 1, []
        while not text and above >= 1 and lines[above - 1].lstrip().startswith("#"):
            parts.append(found[above])
            above -= 1
        text = text or " ".join(reversed(parts))
        # A variant of the same file may set a key again.
        by_key[key] = text or by_key.get(key, "")
    return by_key


def _imported(path: pathlib.Path) -> list[pathlib.Path]:
    """The config files that a config file runs to fill their values in."""
    names = re.findall(r"[\"']([\w/]+\.py)[\"']", path.read_text(encoding="utf-8"))
    folders = (path.parent, path.parent.parent)
    return [f for name in names for folder in folders if (f := folder / name).is_file() and f != path]


def all_comments(path: str | pathlib.Path, seen: tuple[pathlib.Path, ...] = ()) -> dict[str, str]:
    """The comments of a file, and of the files whose values it fills in."""
    path = pathlib.Path(path)
    found: dict[str, str] = {}
    for base in _imported(path):
        if base not in seen:
            found |= all_comments(base, (*seen, path))
    return found | {key: text for key, text in comments(path).items() if text or key not in found}


def _kind(value: Any) -> str:
    return {bool: "True or False", int: "a whole number", float: "a number", str: "a string"}.get(
        type(value), "a tuple, such as (1, 2)" if isinstance(value, tuple) else type(value).__name__
    )


def describe(config: ConfigDict, path: str | pathlib.Path) -> list[str]:
    """A line for each key with its value, and one with its type and comment."""
    texts = all_comments(path)
    lines = []
    for key, value in flatten(config).items():
        # The models of an experiment and their training have the same keys as other files.
        above, _, name = key.rpartition(".")
        places = (key, key.partition(".")[2], f"model.{name}", name, above)
        text = next((texts[place] for place in places if texts.get(place)), "")
        lines += [f"  --config.{key}={value!r}", f"      {_kind(value)}. {text}".rstrip()]
    return lines


def _same_kind(value: Any, default: Any) -> bool:
    """Whether an entry of a tuple is of the kind of another."""
    if isinstance(default, int | float) and not isinstance(default, bool):
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, type(default))


def wrong_tuple(config: ConfigDict, defaults: dict[str, Any]) -> str:
    """A sentence about the first key whose tuple has other kinds of entries than its default, or an empty string."""
    for key, value in flatten(config).items():
        default = defaults.get(key)
        if isinstance(default, tuple) and default and not all(_same_kind(entry, default[0]) for entry in value):
            return f"config.{key}={value}: write it as {default}."
    return ""


def suggest(name: str, known: Iterable[str]) -> str:
    """` Did you mean 'K'?` where a known name is similar, else nothing."""
    listed = list(known)
    near = difflib.get_close_matches(name, listed, n=1, cutoff=0.6)
    # A nested key is often written without the key above it.
    near = near or [key for key in listed if key.rpartition(".")[2] == name][:1]
    return f" Did you mean {near[0]!r}?" if near else ""
