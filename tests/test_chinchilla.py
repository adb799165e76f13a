"""The experiment of Chen et al. 2023, in the small: from prompts to the paper's table and plots."""

import json
import runpy

import numpy as np
import pytest
from helpers import WORDS, save_tiny_decoder

from specjax import launch
from specjax.experiments.reports import chinchilla as chinchilla_report
from specjax.experiments.reports.chinchilla import Measured, Sampling
from specjax.experiments.tasks import human_eval, prompting, sandbox


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    # A word that ends a line, so that some texts end early.
    return save_tiny_decoder(tmp_path_factory.mktemp("target"), 1, ["stop\n"])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    texts = [" ".join(WORDS[(i * j) % len(WORDS)] for j in range(4 + i % 3)) for i in range(1, 12)]
    path.write_text("".join(json.dumps({"input": text, "target": text}) + "\n" for text in texts))
    return path


def command(config, target, workdir, *more):
    return [
        "launch",
        f"--config=configs/chinchilla/{config}.py:tiny",
        f"--config.target={target}",
        f"--workdir={workdir}",
        "--nocompilation_cache",
        "--config.dtype=float32",
        *more,
    ]


@pytest.mark.slow
def test_summaries_with_and_without_speculation(target, data, tmp_path, capfd):
    few = ["--config.num_draft_tokens=(0, 3)", "--config.batch_sizes=(2,)", "--config.quality_draft_tokens=3"]
    few += ["--config.num_timed=3", f"--config.data={data}"]
    arguments = command("xsum", target, tmp_path, *few, "--config.num_samples=2", "--config.num_problems=3")
    assert launch.main(arguments) == 0, capfd.readouterr().err
    rows = json.loads((tmp_path / "results.json").read_text())
    cells = {(row["temperature"], row["top_p"], row["batch_size"], row["num_draft_tokens"]) for row in rows}
    assert cells == {(t, p, 2, k) for t, p in ((1.0, 0.8), (0.0, 1.0)) for k in (0, 3)}
    for row in rows:
        assert [batch["rows"] for batch in row["clock"]] == [2, 1]
        assert sum(batch["tokens"] for batch in row["clock"]) == row["num_tokens"]
        assert row["identical"] == (1.0 if row["temperature"] == 0 else None)
        assert chinchilla_report.efficiency(row) == pytest.approx(
            row["num_tokens"] / row["target_calls"] / (row["num_draft_tokens"] + 1)
        )
    # The draft is judged: the target's own texts of the same seed, greedy, are the same on both sides.
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    greedy = {
        side: [s["text"] for s in samples if (s["side"], s["sampling"]) == (side, "greedy")]
        for side in ("plain", "speculative")
    }
    assert greedy["plain"] == greedy["speculative"]
    assert len(greedy["plain"]) == 6
    assert all("\n" not in s["text"][:-1] for s in samples)
    assert any(s["text"].endswith("stop\n") for s in samples)
    summary = (tmp_path / "summary.md").read_text()
    assert "16 TPU v4" in summary
    assert "ROUGE-2, greedy" in summary
    assert (tmp_path / "figure1.png").read_bytes()[:4] == (tmp_path / "spread.png").read_bytes()[:4] == b"\x89PNG"
    # Once more: nothing is measured again.
    before = (tmp_path / "cells.json").read_text()
    assert launch.main(arguments) == 0
    assert (tmp_path / "cells.json").read_text() == before
    assert launch.main([*arguments, "--config.seed=1"]) == 1
    assert "seed: 0 before, 1 now" in capfd.readouterr().err


# The one run of this experiment from end to end.
@pytest.mark.budget(60)
@pytest.mark.parametrize("execute", ["True", pytest.param("False", marks=pytest.mark.slow)])
def test_programs_are_run_when_asked_for_alone(execute, target, tmp_path, monkeypatch, capfd):
    ran = []

    def judge(exam, limits):
        ran.append((exam, limits))
        return sandbox.PASSED if "third" in exam.test else "AssertionError: "

    problems = [human_eval.Problem(str(i), "the cat", "third" if i == 2 else "", "f") for i in range(4)]
    monkeypatch.setattr(sandbox, "judge", lambda limits, unsafe: judge)
    monkeypatch.setattr(human_eval, "problems", lambda: problems)
    few = ["--config.num_draft_tokens=(1,)", "--config.batch_sizes=(2,)", "--config.num_timed=2"]
    few.append("--config.quality_draft_tokens=1")
    same = [f"--config.draft={target}", "--config.num_samples=2", f"--config.execute={execute}"]
    same += ["--config.draft_quantise=int8", "--config.min_confidence=0.1"]
    assert launch.main(command("humaneval", target, tmp_path, *few, *same)) == 0, capfd.readouterr().err
    said = capfd.readouterr().out
    execute = execute == "True"
    assert len(ran) == (16 if execute else 0)
    assert ("16 programs that the model writes will be run" in said) == execute
    assert ("--config.execute=True would run 16" in said) != execute
    summary = (tmp_path / "summary.md").read_text()
    assert f"draft {target} (int8) that stops where less than 0.1 sure" in summary
    assert ("pass@1 25.0" in summary) == execute
    assert ("pass@2 25.0" in summary) == execute
    assert {row["drafter"] for row in json.loads((tmp_path / "results.json").read_text())} == {"model"}


def test_programs_that_cannot_be_isolated_are_refused_before_anything_is_loaded(monkeypatch, tmp_path, capfd):
    gaps = sandbox.Isolation("no jail", ("reach the network of this machine",))
    monkeypatch.setattr(sandbox, "isolation", lambda limits: (gaps, "bubblewrap: bwrap is not installed"))
    arguments = command("humaneval", "nothing", tmp_path, "--config.draft=nothing")
    assert launch.main([*arguments, "--config.execute=True"]) == 1
    error = capfd.readouterr().err
    assert "they could reach the network of this machine (bubblewrap: bwrap is not installed)" in error
    assert "--config.execute=unsafe" in error
    sandbox.judge(sandbox.Limits(1.0, 1 << 30), unsafe=True)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.data=missing.jsonl", "missing.jsonl does not exist"),
        ("--config.data=", "config.data is empty"),
        ("--config.drafter=model", "needs a draft: give --config.draft=SOURCE"),
        ("--config.samplings=((1.0, 0.0),)", "(1.0, 0.0)"),
        ("--config.batch_sizes=(0,)", "config.batch_sizes=(0,)"),
        ("--config.num_timed=0", "config.num_timed=0"),
        ("--config.num_problems=50", "num_problems=50"),
        ("--config.num_shots=50", "num_shots=50"),
        ("--config.template=nothing", "The template 'nothing'"),
        ("--config.max_prompt_tokens=2", "max_prompt_tokens=2"),
        ("--config.task=chess", "config.task='chess'"),
        ("--config.execute=yes", "config.execute='yes': choose one of False, True, unsafe"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_line(flag, message, target, data, tmp_path, capfd):
    assert launch.main(command("xsum", target, tmp_path, f"--config.data={data}", flag)) == 1
    error = capfd.readouterr().err.strip()
    assert message in error
    assert "\n" not in error


def cell(k, seconds, steps, tokens=128, plain_seconds=2.0):
    """A cell of one text at batch 1 for each entry of `seconds`."""
    clock = [
        {
            "rows": 1,
            "seconds": s,
            "tokens": tokens,
            "steps": steps,
            "baseline_seconds": plain_seconds,
            "baseline_tokens": tokens,
            "baseline_steps": tokens,
        }
        for s in seconds
    ]
    return {
        "temperature": 1.0,
        "top_p": 0.8,
        "batch_size": 1,
        "num_draft_tokens": k,
        "acceptance_rate": 0.6 if k else None,
        "block_efficiency": tokens / steps,
        "measured_speedup": plain_seconds * len(seconds) / sum(seconds),
        "verdict": "gain",
        "identical": None,
        "clock": clock,
    }


def test_the_report_says_what_the_clock_says():
    rows = [cell(0, [2.0] * 4, 128), cell(4, [0.9, 1.0, 1.1, 2.0], 50), cell(2, [1.0] * 4, 64), cell(6, [2.5] * 4, 50)]
    scores = {"plain, nucleus 0.8, T=1": {"ROUGE-2": [10.0, 14.0]}}
    scores["speculative, nucleus 0.8, T=1"] = {"ROUGE-2": [11.0, 15.0]}
    measured = Measured("x", "xsum", "About.", rows, scores, 4, 60.0)
    (line,) = chinchilla_report.lines(rows)
    assert line.sampling == Sampling(1.0, 0.8)
    assert [row["num_draft_tokens"] for row in line.rows] == [0, 2, 4, 6]
    assert chinchilla_report.spread(rows[1:2]) == pytest.approx([1000, 2000, 2000])
    assert chinchilla_report.ms_per_token(rows[1]) == pytest.approx(5000 / 512)
    assert chinchilla_report.loop_ms(rows[1]) == pytest.approx(5000 / 200)
    assert chinchilla_report.efficiency(rows[1]) == pytest.approx(128 / 50 / 5)
    table = chinchilla_report.table_1(measured)
    assert [row[2] for row in table[1:]] == ["4", "2 (best)"]
    assert table[1][-3:] == ["ROUGE-2 11.2 -> 11.4", "14.1 -> 7.52", "1.92x"]
    assert table[1][3:5] == ["ROUGE-2 12.0 ± 2.0", "ROUGE-2 13.0 ± 2.0"]
    swept = dict(zip(*chinchilla_report.table_sweep(measured)[0:4:3], strict=True))
    assert (swept["128 tokens: P50"], swept["P90"]) == ("1000", "2000")
    found = chinchilla_report.findings(measured)
    assert any("fastest with K = 2, 2.00x plain" in text for text in found)
    assert any("SLOWER than plain decoding with K = 6 (0.80x)" in text for text in found)
    assert any("the difference is +1.00 ± 0.00" in text for text in found)


def test_a_text_that_ended_at_once_does_not_count_as_a_long_one():
    row = cell(2, [1.0, 1.1, 1.2, 1.3], 50)
    short = cell(2, [0.05], 1, tokens=1)["clock"]
    assert chinchilla_report.spread([row | {"clock": row["clock"] + short}]) == pytest.approx([1200, 1300, 1300])
    assert chinchilla_report.spread([row | {"clock": short}]) == pytest.approx([6400] * 3)


def test_the_loop_time_is_fitted_by_a_line():
    rows = [cell(k, [0.010 + 0.002 * k], 1) for k in (1, 2, 3, 5)] + [cell(0, [0.5], 1)]
    (line,) = chinchilla_report.lines(rows)
    slope, explained = chinchilla_report.loop_fit(line)
    assert slope == pytest.approx(2.0)
    assert explained == pytest.approx(1.0)
    assert np.isnan(chinchilla_report.loop_fit(line._replace(rows=line.rows[:3]))[0])


def test_prompts_show_examples_and_texts_end_where_they_should():
    prompt = prompting.few_shot("In: {input}\nOut: {target}", [("a {target}", "b")], "c")
    assert prompt == "In: a {target}\nOut: b\n\nIn: c\nOut:"
    assert prompting.few_shot("{input}>{target}<", [], "c") == "c>"
    with pytest.raises(ValueError, match="needs"):
        prompting.few_shot("{target} {input}", [], "c")
    text = "    return 1\n\ndef g():\n    pass\nclass A"
    assert prompting.truncate(text, human_eval.STOP_STRINGS) == "    return 1\n"
    assert prompting.truncate("nothing", ("\n",)) == "nothing"


@pytest.mark.parametrize("name", ["experiment", "xsum", "humaneval"])
def test_every_config_is_whole(name):
    path = f"configs/chinchilla/{name}.py"
    found = runpy.run_path(path)
    config = found["get_config"]()
    assert config.experiment == "chinchilla"
    assert f"--config={path}" in found["__doc__"]
    assert config.num_draft_tokens == tuple(range(8))
    assert config.quality_draft_tokens == 4
    for sampling in chinchilla_report.PAPER.get(config.paper, {}):
        assert tuple(sampling) in config.samplings
