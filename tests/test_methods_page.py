"""The table of methods (docs/methods.md): what it names exists, and every public drafter and rule is in it."""

import ast
import functools
import importlib
import inspect
import pathlib
import re
from typing import Any, NamedTuple

import pytest

from specjax import drafters, verify

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / "docs" / "methods.md"
LINK = re.compile(r"\[([^\]]+)\]\(([^)]+)\)")
ARXIV = re.compile(r"\d{4}\.\d{5}")

NO_METHOD = {
    *("save_feature_head", "is_feature_head", "save_table", "load_table"),
    *("save_masks", "load_masks"),
    *("save_datastore", "load_datastore", "index_corpus"),
    *("save_medusa", "save_blockwise", "load_blockwise"),
    *("save_datastore", "load_datastore", "index_corpus", "save_eagle", "load_eagle"),
}
"""Public functions of `specjax.drafters` that only keep what a drafter reads."""


class Method(NamedTuple):
    """A row, its links as (text, target)."""

    name: str
    papers: list[tuple[str, str]]
    functions: list[tuple[str, str]]
    tests: list[tuple[str, str]]
    results: list[tuple[str, str]]


def methods() -> list[Method]:
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| **")]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert all(len(row) == 4 for row in cells)
    return [Method(row[0].split("**")[1], *(LINK.findall(cell) for cell in row)) for row in cells]


METHODS = methods()


def found(path: str) -> Any:
    """What a dotted path names: an attribute of the longest part of it that is a module."""
    parts = path.split(".")
    for end in range(len(parts), 0, -1):
        try:
            module = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        return functools.reduce(getattr, parts[end:], module)
    raise AssertionError(f"{path} does not exist")


@functools.cache
def documented(page: str) -> list[str]:
    """What a page of the reference has."""
    return re.findall(r"^::: (\S+)", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.MULTILINE)


@functools.cache
def defined(file: str) -> set[str]:
    """The functions of a test file."""
    tree = ast.parse((PAGE.parent / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@functools.cache
def cited() -> set[str]:
    """The arXiv ids that the docstrings and comments of the package have."""
    sources = (path.read_text(encoding="utf-8") for path in (ROOT / "specjax").rglob("*.py"))
    return {number for source in sources for number in ARXIV.findall(source)}


def test_functions_exist_and_are_in_the_reference():
    for method in METHODS:
        assert method.functions, f"{method.name} has no function"
        for shown, target in method.functions:
            page, _, path = target.partition("#")
            assert path.endswith(f".{shown.strip('`').rpartition('.')[2]}"), f"{shown} leads to {path}"
            assert found(path) is not None
            has = any(path == name or path.startswith(f"{name}.") for name in documented(page))
            assert has, f"{page} lacks {path}"


def test_tests_exist():
    for method in METHODS:
        assert method.tests, f"{method.name} has no test"
        for shown, file in method.tests:
            assert shown.strip("`") in defined(file), f"{file} lacks {shown}"


def test_papers_are_those_that_the_code_cites():
    for method in METHODS:
        for number, target in method.papers:
            assert target == f"https://arxiv.org/abs/{number}"
            assert number in cited(), f"{method.name}: no docstring names {number}"


def test_results_exist():
    for method in METHODS:
        for _, target in method.results:
            assert (PAGE.parent / target.partition("#")[0]).is_file(), f"{method.name}: {target} does not exist"


def test_every_public_drafter_and_every_rule_has_a_row():
    named = {path.rpartition("#")[2] for method in METHODS for _, path in method.functions}
    public = {name for name in drafters.__all__ if inspect.isfunction(getattr(drafters, name))} - NO_METHOD
    assert {f"specjax.drafters.{name}" for name in public} <= named
    assert {f"specjax.decoding.verify.{name}" for name in verify.RULES} <= named
    assert {f"specjax.drafters.children.{name}" for name in ("with_replacement", "without_replacement")} <= named


def test_what_is_not_there_is_noticed():
    with pytest.raises(AttributeError):
        found("specjax.drafters.hydra")
    assert "test_that_nobody_wrote" not in defined("../tests/test_verify.py")
    assert "2999.99999" not in cited()
