"""The search for sublayers that a target can leave out of its own drafts, from the command to a comparison."""

import json
import re
import sys

import pytest
from helpers import save_tiny_decoder

from specjax import launch
from specjax.experiments import skip_search
from specjax.experiments.reports import skip_search as report
from specjax.types import Skips


def command(target, data, workdir):
    return [
        "launch",
        "--config=configs/skip_search.py",
        f"--config.target={target}",
        f"--config.data={data}",
        f"--workdir={workdir}",
        "--nocompilation_cache",
        "--config.num_prompts=1",
        "--config.max_new_tokens=8",
        "--config.num_trials=2",
        "--config.min_confidence=0.0",
    ]


# A search compiles a program for each set of sublayers.
@pytest.mark.slow
def test_a_search_finds_sublayers_goes_on_and_is_compared(tmp_path, capfd, monkeypatch):
    target = save_tiny_decoder(tmp_path / "target", 0)
    data = tmp_path / "prompts.jsonl"
    data.write_text(json.dumps({"prompt": "the cat sat on the mat"}) + "\n")
    workdir = tmp_path / "skips"

    # Interrupted in the middle of the second trial.
    measure = skip_search.Search.measure
    tried = []

    def interrupted(search, skips):
        if len(tried) == 1:
            raise KeyboardInterrupt
        tried.append(skips)
        return measure(search, skips)

    monkeypatch.setattr(skip_search.Search, "measure", interrupted)
    assert launch.main(command(target, data, workdir)) in (
        130,
        143,
    )  # 143 where another test of this process was terminated.
    monkeypatch.setattr(skip_search.Search, "measure", measure)
    assert launch.main(command(target, data, workdir)) == 0, capfd.readouterr().err
    said = capfd.readouterr().out
    assert "1 of 2 trials are finished" in said
    rows = json.loads((workdir / "results.json").read_text())
    assert 1 <= len(rows) <= 2
    assert Skips(tuple(rows[0]["attention"]), tuple(rows[0]["mlp"])) == tried[0]
    best = max(rows, key=lambda row: row["measured_speedup"])
    found = skip_search.load(workdir)
    assert found == Skips(tuple(best["attention"]), tuple(best["mlp"]))
    assert re.search(r"\| trial \| attention skipped", (workdir / "summary.md").read_text())
    assert (workdir / "skip_search.png").stat().st_size > 10_000
    done = launch.main(
        [
            *("launch", "--config=configs/compare.py", f"--config.target={target}", f"--config.data={data}"),
            *("--config.drafter=skip", f"--config.draft={workdir}", "--config.max_new_tokens=8"),
            *("--nocompilation_cache", "--config.repeats=1", f"--workdir={tmp_path / 'compared'}"),
        ]
    )
    assert done == 0, capfd.readouterr().err
    row = json.loads((tmp_path / "compared" / "results.json").read_text())[0]
    assert (row["drafter"], row["identical"]) == ("skip", 1.0)


def test_the_first_guesses_are_the_sublayers_that_matter_least():
    importance = {("attention", 0): 0.9, ("mlp", 0): 0.2, ("attention", 1): 0.1, ("mlp", 1): 0.3}
    guesses = skip_search.first_guesses(importance, 3)
    assert guesses == [[("attention", 1)], [("attention", 1), ("mlp", 0)], [("attention", 1), ("mlp", 0), ("mlp", 1)]]
    assert skip_search.skips_of(guesses[-1]) == Skips((1,), (0, 1))


def test_without_optuna_the_remedy_is_named(tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "optuna", None)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "the cat"}\n')
    assert launch.main(command("nowhere", tmp_path / "prompts.jsonl", tmp_path / "run")) == 1
    assert "The search needs optuna: pip install 'specjax[search]'." in capfd.readouterr().err


def test_mistakes_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"skip_search\.py makes it"):
        skip_search.load(tmp_path)
    (tmp_path / "skips.json").write_text('{"attention": [1]}')
    with pytest.raises(ValueError, match="is broken"):
        skip_search.load(tmp_path)


def test_what_does_not_pay_is_said():
    row = {"trial": 0, "attention": [1, 2, 3, 7], "mlp": [], "acceptance_rate": 0.5, "block_efficiency": 1.5}
    lost, won = row | {"measured_speedup": 0.9}, row | {"measured_speedup": 1.2}
    assert report.finding(lost, 60).startswith("Nothing pays: the best drafts, without 4 of 60 sublayers, are 0.90x")
    assert "1.20x as fast" in report.finding(won, 60)
    assert report._layers([1, 2, 3, 7]) == "1-3, 7"
