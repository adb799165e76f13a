"""The experiment of Leviathan et al. 2022, in the small: from files of pairs to the paper's tables."""

import json
import pathlib
import random
import runpy

import pytest

import specjax
from specjax import launch, theory
from specjax.experiments import continuations, leviathan, results, tasks
from specjax.experiments.reports import leviathan as leviathan_report
from specjax.experiments.reports.leviathan import Measured
from specjax.experiments.store import Store

WORDS = ["".join(random.Random(i).choices("abcdefghiklmnoprstu", k=3 + i % 5)) for i in range(80)]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Sentences and their words reversed."""
    directory, rng = tmp_path_factory.mktemp("pairs"), random.Random(0)
    for name, number in (("train", 400), ("valid", 20), ("test", 24)):
        texts = [[rng.choice(WORDS) for _ in range(rng.randint(4, 9))] for _ in range(number)]
        lines = [json.dumps({"input": " ".join(text), "target": " ".join(text[::-1])}) for text in texts]
        (directory / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return directory


def command(
    pairs, workdir, *more, config="mini_ende", timed=("bigram", "small"), lenience=(0.5,), temperatures=(0.0, 1.0)
):
    files = [f"--config.{name}={pairs / name}.jsonl" for name in ("train", "valid", "test")]
    small = ["--config.training.vocab_size=64", f"--config.temperatures={temperatures}", "--config.tables=(2,)"]
    steps = [f"--config.models.{name}.num_steps=4" for name in ("target", "base", "small")]
    args = ["launch", f"--config=configs/leviathan/{config}.py:tiny", f"--workdir={workdir}", "--nocompilation_cache"]
    return [
        *args,
        *files,
        *small,
        *steps,
        f"--config.lenience={lenience}",
        f"--config.timed_drafts={timed}",
        *more,
    ]


@pytest.mark.slow
def test_from_pairs_to_the_tables_of_the_paper(pairs, tmp_path, capfd):
    assert launch.main(command(pairs, tmp_path)) == 0, capfd.readouterr().err
    rows = json.loads((tmp_path / "results.json").read_text())
    assert {(row["draft"], row["temperature"]) for row in rows} == {
        (draft, t) for draft in ("bigram", "small") for t in (0.0, 1.0)
    }
    assert all(set(results.FIRST) <= set(row) for row in rows)
    assert all(row["identical"] == 1.0 for row in rows if row["temperature"] == 0)
    cells = json.loads((tmp_path / "cells.json").read_text())["cells"]
    alphas = {name: cell for name, cell in cells.items() if name.startswith("alpha")}
    assert len(alphas) == 6
    assert all(0 <= cell["alpha"] <= 1 and cell["num_tokens"] >= 64 for cell in alphas.values())
    summary = (tmp_path / "summary.md").read_text()
    assert "7 / 0.75 / 3.4x" in summary
    slower = any(row["measured_speedup"] < 1 and row["verdict"] != "noise" for row in rows)
    assert ("SLOWER" in summary) == slower
    for name in ("speedup.png", "acceptance.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
        assert f"({name})" in summary
    # Once more: everything is found, and nothing is measured again.
    capfd.readouterr()
    assert launch.main(command(pairs, tmp_path)) == 0
    assert json.loads((tmp_path / "cells.json").read_text())["cells"] == cells
    # With other settings it is refused.
    assert launch.main(command(pairs, tmp_path, "--config.seed=1")) == 1
    assert "seed: 0 before, 1 now" in capfd.readouterr().err


@pytest.mark.slow
def test_an_inflated_target_writes_the_text_of_the_small_one_with_distilled_drafts(pairs, tmp_path, capfd):
    given = command(pairs, tmp_path, config="inflated_ende", timed=("distilled",), lenience=(), temperatures=(0.0,))
    assert launch.main(given) == 0, capfd.readouterr().err
    rows = json.loads((tmp_path / "results.json").read_text())
    assert {(row["draft"], row["temperature"]) for row in rows} == {("distilled", 0.0)}
    assert all(row["identical"] == 1.0 for row in rows)
    cells = json.loads((tmp_path / "cells.json").read_text())["cells"]
    assert cells[leviathan.SAME_TEXTS] == 1.0
    drafts = {key.split(", ")[1] for key in cells if key.startswith("alpha")}
    assert drafts == {"bigram", "base", "small", "base_distilled", "distilled"}
    label = "same text at temperature 0 for 100% of the timed prompts"
    summary = (tmp_path / "summary.md").read_text()
    assert label in summary
    assert "## Distilled drafts" in summary
    assert label in capfd.readouterr().out.replace("\n", " ")
    loaded = specjax.load(tmp_path / "models" / "distilled" / "model").config
    assert (loaded.num_layers, loaded.hidden_size) == (1, 32)
    assert specjax.load(tmp_path / "models" / "base_distilled" / "model").config.num_layers == 1


@pytest.mark.slow
def test_language_models_learn_and_write_what_follows_the_first_words(pairs, tmp_path, capfd):
    files = [f"--config.{name}={pairs / name}.jsonl" for name in ("train", "valid", "test")]
    flags = [*files, f"--workdir={tmp_path}", "--nocompilation_cache", "--config.temperatures=(1.0,)"]
    assert launch.main(["launch", "--config=configs/leviathan/mini_gpt.py:tiny", *flags]) == 0, capfd.readouterr().err
    cells = json.loads((tmp_path / "cells.json").read_text())["cells"]
    assert {key for key in cells if key.startswith("alpha")} == {
        f"alpha, {draft}, T=1{truncated}" for draft in ("unigram", "bigram", "small") for truncated in ("", ", top 40")
    }
    assert "| small | " in (tmp_path / "summary.md").read_text()


def test_continuations_are_texts_without_their_first_words(tmp_path):
    source = tmp_path / "data.jsonl"
    lines = [{"input": "one two  three\nfour", "target": "x"}, {"input": "too short", "target": "y"}]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    pairs = continuations.write(str(source), tmp_path / "texts" / "test.jsonl", 2, whole=False)
    assert json.loads(pathlib.Path(pairs).read_text()) == {"input": "one two", "target": " three four"}
    whole = continuations.write(str(source), tmp_path / "texts" / "train.jsonl", 2, whole=True)
    assert json.loads(pathlib.Path(whole).read_text()) == {"text": "one two three four"}
    with pytest.raises(ValueError, match="no input of more than prompt_words=4 words"):
        continuations.write(str(source), tmp_path / "none.jsonl", 4, whole=True)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.inflate.hidden_size=8", "config.inflate.hidden_size=8: the model has 32; give more, or 0"),
        ("--config.models.base.distil=small2", "config.models.base.distil='small2': a draft"),
        ("--config.models.target.distil=layers", "config.models.target.distil='layers': a draft"),
        ("--config.models.small.distil=small", "begins as one of layers, base; else"),
        ("--config.test=missing.jsonl", "missing.jsonl does not exist"),
        ("--config.metric=meteor", "config.metric='meteor'"),
        ("--config.num_draft_tokens=(0,)", "config.num_draft_tokens=(0,)"),
        ("--config.num_prompts=0", "config.num_prompts=0"),
        ("--config.train=", "config.train is empty"),
        ("--config.models.target.sauce=x", "no key 'models.target.sauce'"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_line(flag, message, pairs, tmp_path, capfd):
    assert launch.main(command(pairs, tmp_path, flag)) == 1
    error = capfd.readouterr().err.strip()
    assert message in error
    assert "\n" not in error
    assert not (tmp_path / "models").exists()


def test_the_store_finds_what_it_has_and_refuses_what_is_not_its_own(tmp_path):
    store = Store(tmp_path, {"seed": 0}, overwrite=False)
    assert store.get("a", lambda: {"x": 1.5}) == {"x": 1.5}
    again = Store(tmp_path, {"seed": 0}, overwrite=False)
    assert again.get("a", pytest.fail) == {"x": 1.5}
    with pytest.raises(ValueError, match="seed: 0 before, 1 now"):
        Store(tmp_path, {"seed": 1}, overwrite=False)
    assert Store(tmp_path, {"seed": 1}, overwrite=True).cells == {}
    (tmp_path / "cells.json").write_text("{")
    with pytest.raises(ValueError, match="is broken"):
        Store(tmp_path, {"seed": 0}, overwrite=False)


def row(draft, temperature, k, alpha, c, scoring, error):
    """A cell whose clock is off from the prediction by a factor."""
    return {
        "draft": draft,
        "temperature": temperature,
        "num_draft_tokens": k,
        "acceptance_rate": alpha,
        "block_efficiency": theory.expected_tokens(alpha, k),
        "cost_ratio": c,
        "score_cost": scoring,
        "predicted_speedup": theory.walltime_factor(alpha, k, c),
        "measured_speedup": theory.walltime_factor(alpha, k, c, scoring) * error,
        "verdict": "gain" if error > 0.9 else "loss",
        "identical": 1.0,
        "acceptance_by_position": [alpha] * k,
    }


def measured(error):
    rows = [row("small", t, k, 0.75, 0.02, 1.2, error) for t in (0.0, 1.0) for k in (1, 7)]
    return Measured(
        name="x",
        paper="ende",
        metric="bleu",
        label="",
        about="About.",
        sizes={"target": 100, "small": 10},
        alpha={"small": {0.0: (0.75, 99), 1.0: (0.75, 99)}},
        alpha_top_k={"small": {40: (0.8, 99)}},
        rows=rows,
        quality={0.0: {"plain": 20.0, "small": 20.0}, 1.0: {"plain": 15.0, "small": 15.5}},
        lenience={"small": {1.0: 0.6, 0.5: 0.7}},
        distilled={},
        seconds={"measuring": 60.0},
    )


def test_the_report_holds_the_clock_against_the_theorem():
    close, far = leviathan_report.findings(measured(0.9)), leviathan_report.findings(measured(0.5))
    assert close[0].startswith("4 of 4 cells lie within 15 %")
    assert far[0].startswith("0 of 4 cells lie within 15 %")
    assert any("SLOWER" in text for text in far)
    # K c + scoring is all that a step takes in `close`, but for a tenth; and half of it in `far`.
    assert "takes 1.42 plain ones (median); its model calls account for 1.28" in close[1]
    assert "takes 2.56 plain ones (median); its model calls account for 1.28" in far[1]
    table = leviathan_report.table_2(measured(1.0))
    first = dict(zip(table[0], table[1], strict=True))
    assert first["Thm 3.8"] == f"{theory.walltime_factor(0.75, 7, 0.02):.2f}x"
    assert first["with scoring"] == first["measured"] == f"{theory.walltime_factor(0.75, 7, 0.02, 1.2):.2f}x"
    assert first["K"] == first["best K predicted"] == "7"
    assert first["paper: K / alpha / measured"] == "7 / 0.75 / 3.4x"
    table = leviathan_report.table_3(measured(1.0))
    assert table[1] == ["small", "10", "0", "0.750", "0.75", "99"]
    assert table[3] == ["small", "10", "1, top 40", "0.800", "-", "99"]
    table = leviathan_report.table_3(measured(1.0)._replace(paper="lm1b"))
    assert [line[4] for line in table[1:]] == ["0.88", "0.89", "0.74"]
    assert leviathan_report.table_5(measured(1.0))[1] == ["small", "0.60 (0.62)", "0.70 (0.71)"]


def test_the_report_says_whose_text_and_whose_cost_it_shows():
    valid = [{"step": 0, "alpha": 0.5, "agreement": 0.4}, {"step": 90, "alpha": 0.75, "agreement": 0.7}]
    inflated = measured(0.9)._replace(label="Of two models.", distilled={"small": valid})
    assert leviathan_report.findings(inflated)[0] == "**Of two models.**"
    summary = leviathan_report.summary(inflated)
    assert "- **Of two models.**" in summary
    assert "| small | 90 | 0.500 | 0.750 | 0.400 | 0.700 |" in summary
    assert "Distilled" not in leviathan_report.summary(measured(0.9))


def test_metrics_are_those_of_the_libraries():
    texts = ["the cat sat on the mat today", "a dog barks"]
    assert tasks.bleu(texts, texts) == pytest.approx(100.0)
    assert tasks.rouge2(texts, texts) == pytest.approx(100.0)
    assert tasks.bleu(texts, ["no word of it is there", "at all none"]) < 10
    assert tasks.rouge2(["a b c"], ["a b d"]) == pytest.approx(50.0)


@pytest.mark.parametrize(
    "name",
    [
        "t5_xxl_ende",
        "t5_xxl_cnndm",
        "lm1b_gpt",
        "mini_ende",
        "mini_synopsis",
        "inflated_ende",
        "inflated_synopsis",
        "experiment",
    ],
)
def test_every_config_is_whole(name):
    path = f"configs/leviathan/{name}.py"
    config = runpy.run_path(path)["get_config"]()
    assert config.experiment == "leviathan"
    assert f"--config={path}" in runpy.run_path(path)["__doc__"]
    assert "target" in config.models
    assert len(config.models) > 1
    if name.startswith("t5"):
        assert config.models.target.source == "google/t5-v1_1-xxl"
