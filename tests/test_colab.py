"""The notebooks of `colab/`: each is its source, executed, and says nothing of the machine; `-m slow` executes them."""

import importlib.util
import pathlib
import platform
import re

import nbformat
import pytest

from specjax.experiments import notebooks
from specjax.experiments.reports import notebook as report

ROOT = pathlib.Path(__file__).parents[1]


def _build():
    spec = importlib.util.spec_from_file_location("colab_build", ROOT / "colab" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = _build()
each = pytest.mark.parametrize("name", build.NAMES)


def written(name: str):
    return nbformat.read(ROOT / "colab" / f"{name}.ipynb", as_version=4)


def outputs(notebook) -> str:
    """All that a notebook shows, but its pictures."""
    shown = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    texts = [output.get("text", "") for output in shown]
    texts += [str(text) for output in shown for kind, text in output.get("data", {}).items() if "image" not in kind]
    return "\n".join(texts)


def test_the_folder_has_these_notebooks_and_no_others():
    assert sorted(path.stem for path in (ROOT / "colab" / "src").glob("*.py")) == sorted(build.NAMES)
    assert sorted(path.stem for path in (ROOT / "colab").glob("*.ipynb")) == sorted(build.NAMES)


@each
def test_a_notebook_is_its_source(name):
    source, notebook = build.read(name), written(name)
    said = f"python colab/build.py {name} was not run after the last change of its source"
    assert [(cell.cell_type, cell.source) for cell in notebook.cells] == [
        (cell.cell_type, cell.source) for cell in source.cells
    ], said
    nbformat.validate(notebook)


@each
def test_a_notebook_was_executed_without_an_error(name):
    code = [cell for cell in written(name).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    kinds = {output.output_type for cell in code for output in cell.outputs}
    assert "error" not in kinds
    assert "the smallest sizes" not in outputs(written(name)), "the committed outputs are those of a test"


@each
def test_a_notebook_says_nothing_of_the_machine(name):
    said = outputs(written(name))
    assert platform.node() not in said.split()
    assert not re.search(r"(?<![\w.:/])/(home|root|tmp|work|usr|content|Users)/", said)


@each
def test_badges_open_the_right_file(name):
    badge = build.badge(name)
    assert f"/github/{build.REPOSITORY}/blob/main/colab/{name}.ipynb)" in badge
    assert build.read(name).cells[0].source.startswith(badge)
    assert badge in (ROOT / "README.md").read_text(encoding="utf-8")


def test_all_notebooks_are_set_up_in_the_same_way():
    cells = [cell.source for name in build.NAMES for cell in build.read(name).cells]
    installing = [source for source in cells if source.startswith("# @title Install specjax")]
    assert len(installing) == len(build.NAMES)
    found = set(installing)
    assert len(found) == 1
    assert f'"https://github.com/{build.REPOSITORY}"' in found.pop()


@pytest.mark.parametrize(
    ("num_accepted", "kinds"),
    [
        (0, ["rejected", "of the target", "dropped", "dropped"]),
        (2, ["accepted", "accepted", "rejected", "of the target"]),
        (3, ["accepted", "accepted", "accepted", "of the target"]),
    ],
)
def test_the_tokens_of_a_step_are_drawn_in_the_order_of_their_places(num_accepted, kinds):
    boxes = report._boxes(report.Step([5, 6, 7], num_accepted, 9))
    assert [kind for _, kind in boxes] == kinds
    assert [token for token, kind in boxes if kind != "of the target"] == [5, 6, 7]


def test_a_config_runs_as_its_command_does(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert notebooks.run("data.py", "data", sets=("prompts",), num_prompts=3) == pathlib.Path("data")
    said = capsys.readouterr().out
    flags = "\"--config.sets=('prompts',)\" --config.num_prompts=3"
    assert said.startswith(f"$ python -m specjax.launch --config=configs/data.py {flags} --workdir=data\n")
    assert len((tmp_path / "data" / "prompts.jsonl").read_text(encoding="utf-8").splitlines()) == 3
    with pytest.raises(KeyError, match="num_prompt"):
        notebooks.run("data.py", "data", num_prompt=3)
    with pytest.raises(FileNotFoundError, match="clone the repository"):
        notebooks.config("nothing.py")


def test_the_page_of_a_run_is_shown_below_its_plots(tmp_path):
    (tmp_path / "summary.md").write_text("# Run\n\n![speed](b.png)\n\n## Costs\n", encoding="utf-8")
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(name.encode())
    plot, page = report.results(tmp_path)
    assert plot.forms == {"image/png": b"b.png"}
    assert page.text == "### Run\n\n#### Costs\n"
    (tmp_path / "summary.md").write_text("# Run\n", encoding="utf-8")
    assert [shown.text for shown in report.results(tmp_path)] == ["a.png", "b.png", "### Run\n"]


@each
@pytest.mark.slow
def test_a_notebook_runs_in_small(name):
    notebook = build.read(name)
    build.execute(notebook, small=True)
    assert "the smallest sizes" in outputs(notebook)
