"""The command `specjax`, and the list of configs."""

import io
import pathlib
import tomllib

import pytest
import yaml
from helpers import save_tiny_decoder

import specjax
from specjax import cli, launch

ROOT = pathlib.Path(__file__).parents[1]


def test_every_config_is_listed_with_a_line(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert cli.main(["specjax", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    listed = {path: lines[i + 1].strip() for i, path in enumerate(lines) if path.endswith(".py")}
    assert set(listed) == {str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.py")}
    assert all(len(line) > 20 for line in listed.values())


def test_configs_are_found_from_elsewhere(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert launch.main(["launch", "--list"]) == 0
    assert "quickstart.py" in capsys.readouterr().out
    monkeypatch.setattr(launch, "__file__", str(tmp_path / "site" / "specjax" / "launch.py"))
    assert launch.main(["launch", "--list"]) == 1
    assert "change to a clone of the repository" in capsys.readouterr().err


@pytest.mark.parametrize("name", cli.CONFIGS)
def test_a_config_has_a_command(name: str, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert cli.main(["specjax", name, "--help"]) == 0
    assert f"Keys of configs/{name}.py" in capsys.readouterr().out


@pytest.mark.budget(60)
def test_a_prompt_is_answered(tmp_path, capsys, monkeypatch):
    target = save_tiny_decoder(tmp_path / "target", 0)
    flags = [f"--target={target}", "--max_new_tokens=6", "--dtype=float32"]
    monkeypatch.setattr("specjax.api.keep_programs", lambda: None)
    assert cli.main(["specjax", "generate", "the cat sat on the mat", *flags]) == 0
    printed = capsys.readouterr().out
    assert "6 tokens in " in printed
    monkeypatch.setattr("sys.stdin", io.StringIO("the cat sat on the mat"))
    assert cli.main(["specjax", "generate", *flags]) == 0
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["server"], "Unknown command 'server': choose one of list, generate, serve, launch"),
        (["server"], "Did you mean 'serve'?"),
        (["generate", "two", "words"], "2 prompts: put the prompt in quotation marks"),
        (["generate", " "], "No prompt"),
        (["generate", "a", "--temprature=1"], "--temperature"),
        (["generate", "a", "--max_new_tokens=0"], "max_new_tokens"),
        (["generate", "a", "--target=nowhere/at/all"], "nowhere/at/all does not exist"),
    ],
)
def test_wrong_commands_are_named(argv, message, capsys):
    assert cli.main(["specjax", *argv]) == 1
    assert message in capsys.readouterr().err


def test_without_a_command_it_says_what_there_is(capsys):
    assert cli.main(["specjax"]) == 0
    assert "specjax generate" in capsys.readouterr().out


def test_generate_has_a_help(capsys):
    assert cli.main(["specjax", "generate", "--help"]) == 0
    said = capsys.readouterr().out
    assert "--max_new_tokens=256: The most new tokens." in said
    assert "--help=" not in said


def test_the_command_says_its_version(capsys):
    assert cli.main(["specjax", "--version"]) == 0
    assert capsys.readouterr().out == f"specjax {specjax.__version__}\n"


def test_the_version_is_said_once():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "specjax.__version__"}
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == specjax.__version__
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert f"version {specjax.__version__}." in changes or f"## {specjax.__version__}" in changes
