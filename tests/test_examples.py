"""The pages of code in examples/, run on a tiny model; on real weights by `pytest -m slow`."""

import os
import pathlib
import runpy
import subprocess
import sys

import pytest
from helpers import save_tiny_decoder

from specjax.decoding.verify import Rule

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"
PROMPT = "the cat sat on the cat sat on the cat"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    # One word more makes 18 tokens, which two devices can split.
    return save_tiny_decoder(tmp_path_factory.mktemp("model"), 0, ["stop"])


@pytest.fixture(scope="module")
def draft(tmp_path_factory) -> str:
    return save_tiny_decoder(tmp_path_factory.mktemp("draft"), 1, ["stop"])


def example(name: str) -> dict:
    """What a file defines; its `main` is called by the test."""
    return runpy.run_path(str(EXAMPLES / name))


def in_a_process(name: str, *arguments: str) -> str:
    """What a file prints when it is run as a program."""
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent)}
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("with_draft_model", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_speculate(source, draft, with_draft_model, capsys):
    more = [f"--draft={draft}"] if with_draft_model else []
    example("speculate.py")["main"]([f"--target={source}", f"--prompt={PROMPT}", "--max_new_tokens=12", *more])
    said = capsys.readouterr().out
    assert "speedup" in said
    assert "identical text: True" in said


@pytest.mark.slow
def test_shard_over_a_mesh(source):
    # A process of its own: the number of virtual devices is fixed when JAX starts.
    said = in_a_process(
        "shard_over_a_mesh.py", f"--source={source}", "--model=2", f"--prompt={PROMPT}", "--prompt=a dog"
    )
    assert "mesh: {'data': 2, 'model': 2" in said
    assert "The text equals one device's." in said


@pytest.mark.slow
@pytest.mark.budget(60)
def test_write_a_drafter(source, capsys):
    example("write_a_drafter.py")["main"](source, PROMPT)
    said = capsys.readouterr().out
    assert "FAILED" not in said
    assert "proposed nothing" not in said
    assert "identical text: True" in said


@pytest.mark.slow
def test_write_a_rule(source, capsys):
    found = example("write_a_rule.py")
    assert isinstance(found["rule"], Rule)
    with pytest.warns(UserWarning, match="is not exact"):
        found["main"](source, PROMPT)
    said = capsys.readouterr().out
    assert "rejection: exact True" in said
    assert "near_best:0.3: exact False" in said


@pytest.mark.slow
@pytest.mark.parametrize("name", ["speculate.py", "shard_over_a_mesh.py", "write_a_drafter.py", "write_a_rule.py"])
def test_on_real_weights(name):
    said = in_a_process(name)
    assert "identical text: False" not in said
    assert "differs" not in said


@pytest.mark.slow
def test_bring_your_model(capsys):
    found = example("bring_your_model.py")
    found["main"]()
    said = capsys.readouterr().out.splitlines()
    assert [line.rpartition(", ")[2] for line in said] == ["same text: True"] * 3
    # A model is its own perfect draft: with three tokens a step, four are committed.
    assert said[1] == "a chain of its own: 4.00 tokens per call, same text: True"
