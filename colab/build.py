"""Executes the notebooks: makes colab/NAME.ipynb, with its outputs, of colab/src/NAME.py.

    pip install -e '.[colab]'
    python colab/build.py                  # all of them
    python colab/build.py quickstart       # one
    python colab/build.py --small --check  # all in their smallest sizes, as a test: nothing is written

The sources are scripts in jupytext's percent format, which are edited, compared and reviewed as text. A notebook runs
in an empty directory, and says nothing of the machine it ran on but its kind.
"""

import argparse
import os
import pathlib
import re
import tempfile
import time

import jupytext
import nbclient
import nbformat
from nbformat import NotebookNode

HERE = pathlib.Path(__file__).parent
REPOSITORY = "specjax/specjax"
"""Where the notebooks are opened and installed from, on GitHub: OWNER/NAME. The sources and the README repeat it."""

NAMES = (
    "speculative_decoding_from_scratch",
    "quickstart",
    "which_draft_pays",
    "serve_a_model",
    "shard_and_plan",
    "t5_xxl_and_t5_mini",
    "chinchilla_style",
    "train_a_draft",
)
"""In the order in which they are best read."""


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


def execute(notebook: NotebookNode, *, small: bool, timeout: int = 3600) -> float:
    """Runs a notebook in an empty directory, and writes the outputs into it.

    Returns:
      the seconds that it took.
    """
    environment = os.environ | {"SMALL": "1" if small else "", "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "")}
    environment |= {"PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])}
    with tempfile.TemporaryDirectory() as directory:
        client = nbclient.NotebookClient(
            notebook, timeout=timeout, kernel_name="python3", resources={"metadata": {"path": directory}}
        )
        start = time.perf_counter()
        client.execute(env=environment)
        seconds = time.perf_counter() - start
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            _clean(cell)
    return seconds


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


def main(argv: list[str] | None = None) -> None:
    """Builds the notebooks that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--small", action="store_true", help="the smallest sizes")
    parser.add_argument("--check", action="store_true", help="only see whether they run; write nothing")
    arguments = parser.parse_args(argv)
    unknown = sorted(set(arguments.names) - set(NAMES))
    if unknown:
        parser.error(f"{', '.join(unknown)}: there is no such notebook; choose from {', '.join(NAMES)}.")
    for name in arguments.names or NAMES:
        notebook = read(name)
        seconds = execute(notebook, small=arguments.small)
        if not arguments.check:
            nbformat.write(notebook, HERE / f"{name}.ipynb")
        print(f"{name}: {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
