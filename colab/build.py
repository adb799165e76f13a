"""Executes the notebooks: makes colab/NAME.ipynb, with its outputs, of colab/src/NAME.py.

    pip install -e '.[colab]'
    python colab/build.py                  # all of them, with the specjax and the packages of this environment
    python colab/build.py quickstart       # one
    python colab/build.py --clean          # each in a new virtual environment, as its first cell installs it
    python colab/build.py --small --check  # all in their smallest sizes, as a test: nothing is written
    python colab/build.py quickstart --set='PROMPT=Why is the sky blue?' --check   # another value
    python colab/build.py --repository=OWNER/NAME   # for a fork: changes where notebooks and pages point to

The sources are scripts in jupytext's percent format, which are edited, compared and reviewed as text. A notebook runs
in an empty directory, and says nothing of the machine it ran on but its kind.

`--clean` also writes the times into colab/times.json, and their table into colab/README.md. A notebook that this commit
has executed so is skipped, so that the same command continues an interrupted one; `--again` does not skip.
"""

import argparse
import ast
import os
import pathlib
import re
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jupytext
import nbclient
import nbformat
from nbformat import NotebookNode

import clean_runs

HERE = pathlib.Path(__file__).parent
REPOSITORY = "specjax/specjax"
"""Where the notebooks are opened and installed from, on GitHub: OWNER/NAME. `--repository` changes it in all files."""

NAMES = (
    "speculative_decoding_from_scratch",
    "quickstart",
    "which_draft_pays",
    "serve_a_model",
    "shard_and_plan",
    "t5_xxl_and_t5_mini",
    "chinchilla_style",
    "train_a_draft",
    "train_a_head",
)
"""In the order in which they are best read."""

INSTALLS = "# @title Install specjax"
"""How the cell begins that installs specjax."""


def badge(name: str) -> str:
    """The badge that opens a notebook in Colab, in Markdown."""
    address = f"https://colab.research.google.com/github/{REPOSITORY}/blob/main/colab/{name}.ipynb"
    return f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({address})"


def read(name: str) -> NotebookNode:
    """The notebook of a source, without outputs."""
    notebook = jupytext.read(HERE / "src" / f"{name}.py", fmt="py:percent")
    for number, cell in enumerate(notebook.cells):
        # Numbers in place of random ids, and forms in place of code where a cell begins with a title.
        cell.id = f"cell-{number}"
        if cell.source.startswith("# @title"):
            cell.metadata["cellView"] = "form"
    notebook.metadata = {
        "accelerator": "NONE",
        "colab": {"name": f"{name}.ipynb", "provenance": [], "toc_visible": True},
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return notebook


def fill(notebook: NotebookNode, values: Mapping[str, Any]) -> None:
    """Gives constants of a notebook other values, such as the fields of its forms.

    Args:
      notebook: is changed.
      values: by the name of the constant: capitals at the beginning of a line.

    Raises:
      ValueError: for a constant that the notebook does not have.
    """
    # A value that goes on in the next line is none of these.
    constant = re.compile(r"^([A-Z][A-Z0-9_]*) = (?!.*[\[({,]$).*?(?=  # @param|$)", re.MULTILINE)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    known = {name for cell in code for name in constant.findall(cell.source)}
    if unknown := sorted(set(values) - known):
        listed = ", ".join(sorted(known))
        raise ValueError(f"{', '.join(unknown)}: the notebook has no such constant; it has {listed}.")

    def filled(match: re.Match[str]) -> str:
        return f"{match[1]} = {values[match[1]]!r}" if match[1] in values else match[0]

    for cell in code:
        cell.source = constant.sub(filled, cell.source)


def execute(
    notebook: NotebookNode,
    *,
    small: bool,
    timeout: int = 3600,
    kernel: clean_runs.Kernel | None = None,
    told: Callable[[int, float], None] = lambda number, seconds: None,
) -> tuple[float, float]:
    """Runs a notebook in an empty directory, and writes the outputs into it.

    Args:
      notebook: is changed.
      small: whether to take the smallest sizes.
      timeout: seconds that a cell may take.
      kernel: what runs it; None: the Python of this process, with the specjax of this clone.
      told: is called after every cell, with its number from 1 and the seconds that it took.

    Returns:
      the seconds of the cell that installs specjax, and those of all cells.
    """
    if kernel is None:
        paths = [str(HERE.parent), os.environ.get("PYTHONPATH", "")]
        kernel = clean_runs.Kernel("python3", os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))})
    seconds = [0.0] * len(notebook.cells)
    begin = 0.0

    def begins(cell: NotebookNode, cell_index: int) -> None:
        nonlocal begin
        begin = time.perf_counter()

    def ends(cell: NotebookNode, cell_index: int, execute_reply: Any) -> None:
        seconds[cell_index] = time.perf_counter() - begin
        told(cell_index + 1, seconds[cell_index])

    with tempfile.TemporaryDirectory() as directory:
        nbclient.NotebookClient(
            notebook,
            timeout=timeout,
            kernel_name=kernel.name,
            resources={"metadata": {"path": directory}},
            on_cell_execute=begins,
            on_cell_executed=ends,
        ).execute(env=kernel.environment | {"SMALL": "1" if small else ""})
    installing = [cell.source.startswith(INSTALLS) for cell in notebook.cells]
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            _clean(cell)
    return sum(x for x, installs in zip(seconds, installing, strict=True) if installs), sum(seconds)


def _clean(cell: NotebookNode) -> None:
    """Joins the printed lines of a cell, and leaves out logs, which name files and times of day."""
    kept: list[NotebookNode] = []
    for output in cell.outputs:
        if output.output_type == "stream" and output.name == "stderr":
            continue
        if output.output_type == "stream" and kept and kept[-1].output_type == "stream":
            kept[-1].text += output.text
        else:
            kept.append(output)
    for output in kept:
        if output.output_type == "stream":
            # What a progress bar has overwritten.
            output.text = re.sub(r"[^\n]*\r(?!\n)", "", output.text)
    cell.outputs = kept


def rename(old: str, new: str, root: pathlib.Path) -> list[pathlib.Path]:
    """Changes the repository's name in all files that address it on GitHub.

    Args:
      old: OWNER/NAME as it is now.
      new: OWNER/NAME as it is to be.
      root: of the clone.

    Returns:
      the files that were changed.

    Raises:
      ValueError: for a name that is not OWNER/NAME.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", new):
        raise ValueError(f"{new!r} is not the name of a repository: write OWNER/NAME.")
    kinds, places = (".md", ".py", ".ipynb", ".toml", ".cff", ".yml"), ("colab", "docs", ".")
    address = re.compile(rf"(github\.com/|/github/){re.escape(old)}(?![\w-])")
    changed = []
    for place in places:
        found = (root / place).rglob("*") if place != "." else root.glob("*")
        for path in sorted(path for path in found if path.suffix in kinds and path.is_file()):
            text = path.read_text(encoding="utf-8")
            after = address.sub(rf"\g<1>{new}", text)
            if path.name == "build.py":
                after = after.replace(f'REPOSITORY = "{old}"', f'REPOSITORY = "{new}"')
            if after != text:
                path.write_text(after, encoding="utf-8")
                changed.append(path)
    return changed


def _value(text: str) -> tuple[str, Any]:
    """The name and the value of `NAME=VALUE`: a Python literal, or else a text."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r}: write NAME=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(NAMES)}; all where none is named")
    parser.add_argument("--small", action="store_true", help="the smallest sizes")
    parser.add_argument("--check", action="store_true", help="only see whether they run; write nothing")
    parser.add_argument("--clean", action="store_true", help="each in an environment of its own; write the times")
    parser.add_argument("--again", action="store_true", help="with --clean: also those that this commit has executed")
    parser.add_argument("--set", type=_value, action="append", default=[], metavar="NAME=VALUE", help="of a form")
    parser.add_argument("--repository", metavar="OWNER/NAME", help="change where notebooks and pages point to")
    arguments = parser.parse_args(argv)
    if unknown := sorted(set(arguments.names) - set(NAMES)):
        parser.error(f"{', '.join(unknown)}: there is no such notebook; choose from {', '.join(NAMES)}.")
    if arguments.set and not arguments.check:
        parser.error("--set needs --check: a notebook in the repository has the values of its source.")
    return arguments


def _show(title: str, cells: int) -> Callable[[int, float], None]:
    """Prints a line as a notebook runs, which a terminal overwrites."""

    def told(number: int, seconds: float) -> None:
        if sys.stdout.isatty():
            print(f"\r{title}: cell {number} of {cells}, {seconds:.0f} s ", end="", flush=True)
        elif seconds > 30:
            print(f"{title}: cell {number} of {cells} took {seconds:.0f} s", flush=True)

    return told


def main(argv: Sequence[str] | None = None) -> None:
    """Builds the notebooks that are named, or all."""
    arguments = _parse(argv)
    if arguments.repository:
        changed = rename(REPOSITORY, arguments.repository, HERE.parent)
        print("\n".join(str(path.relative_to(HERE.parent)) for path in changed))
        return
    names = arguments.names or NAMES
    record = clean_runs.Record(HERE)
    for number, name in enumerate(names, start=1):
        title = f"[{number} of {len(names)}] {name}"
        if arguments.clean and not arguments.again and not arguments.small and record.has(name):
            print(f"{title}: executed before at this commit", flush=True)
            continue
        notebook = read(name)
        fill(notebook, dict(arguments.set))
        options = {"small": arguments.small, "told": _show(title, len(notebook.cells))}
        if arguments.clean:
            print(f"{title}: making an environment", flush=True)
            with clean_runs.kernel(HERE.parent, REPOSITORY) as kernel:
                installing, seconds = execute(notebook, kernel=kernel, **options)
        else:
            installing, seconds = execute(notebook, **options)
        if not arguments.check:
            nbformat.write(notebook, HERE / f"{name}.ipynb")
        if arguments.clean and not arguments.small:
            record.add(name, installing, seconds - installing)
            record.write_table(NAMES)
        print(f"\r{title}: {seconds:.0f} s, {installing:.0f} of them to install specjax", flush=True)


if __name__ == "__main__":
    main()
