"""The order of the house: which room may import which, and how long a file or a function may grow."""

import ast
import pathlib
from collections.abc import Iterator

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "specjax"
FILES = sorted(PACKAGE.rglob("*.py"))

LEVELS = (
    ("types", "state", "protocols", "theory", "files", "limits", "control"),
    ("text", "parallel"),
    ("sampling", "models"),
    ("drafters", "decoding"),
    ("metrics", "planning", "testing", "conformance"),
    ("api",),
    ("training", "serving"),
    ("experiments",),
    ("launch",),
    ("serve",),
    ("ray_app", "ray_router"),
    ("cli",),
)
"""Rooms and files, the lowest first: each imports those of its own level and below."""
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}

LONGEST_FILE, LONGEST_FUNCTION = 500, 60


def name(path: pathlib.Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def imported(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """The line of each import of the package, and the room that it reads, those within functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "specjax":
            modules = [f"specjax.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports name the whole path"
            modules = [node.module or ""]
        else:
            continue
        for module in modules:
            if module.startswith("specjax."):
                yield node.lineno, module.split(".")[1]


@pytest.mark.parametrize(
    "path", [path for path in FILES if path.parent != PACKAGE or path.stem != "__init__"], ids=name
)
def test_no_import_runs_up(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert room in LEVEL, f"{room} has no level: give it one in LEVELS"
    found = imported(ast.parse(path.read_text(encoding="utf-8")))
    up = [f"line {line}: {other}" for line, other in found if LEVEL[other] > LEVEL[room]]
    assert not up, f"{name(path)} imports what lies above {room}: {', '.join(up)}"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_files_and_functions_are_short(path):
    text = path.read_text(encoding="utf-8")
    lines = len(text.splitlines())
    assert lines <= LONGEST_FILE, f"{name(path)} has {lines} lines: split it by what it would be changed for"
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    for function in functions:
        lines = (function.end_lineno or 0) - function.lineno + 1
        if ast.get_docstring(function) is not None:
            lines -= (function.body[0].end_lineno or 0) - function.body[0].lineno + 1
        assert lines <= LONGEST_FUNCTION, f"{name(path)}: {function.name} has {lines} lines of code"
