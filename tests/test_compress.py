"""The table of smaller models: its rows, and what is refused."""

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from test_distill import make_target
from test_training import copies, write_texts

import specjax
from specjax import launch
from specjax.api.pretrained import Pretrained
from specjax.models import families
from specjax.training import data, perplexity, prune

CONFIG = str(pathlib.Path(__file__).parents[1] / "configs" / "compress.py")


@pytest.fixture(scope="module")
def given_files(tmp_path_factory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("files")
    for kind in ("decoder", "t5"):
        target = make_target(kind, num_layers=2)
        specjax.save(target, directory / kind)
        config, params = prune.keep_layers(target.config, target.params, {list(prune.stacks(target.config))[-1]: (0,)})
        specjax.save(Pretrained(families.model(config), params, target.tokenizer, config), directory / f"{kind}-pruned")
    path = write_texts(directory / "data.jsonl", copies(12))
    kinds = ("decoder", "decoder-pruned", "t5")
    return {"data": path} | {kind: str(directory / kind) for kind in kinds}


TINY = {
    "quantised": "('int8',)",
    "num_prompts": 2,
    "max_new_tokens": 6,
    "num_draft_tokens": 2,
    "repeats": 1,
    "num_texts": 6,
    "target_length": 24,
}


def command(workdir: pathlib.Path, files: dict[str, str], kind: str = "decoder", **values) -> list[str]:
    given = {"target": files[kind], "data": files["data"], "texts": files["data"], "source_length": 24}
    given |= {"pruned": f"('{files[kind]}-pruned',)"} | TINY | values
    flags = [f"--config.{key}={value}" for key, value in given.items()]
    return ["launch", f"--config={CONFIG}", f"--workdir={workdir}", "--nocompilation_cache", *flags]


def test_perplexity_is_that_of_the_targets(given_files):
    target = specjax.load(given_files["decoder"])
    assert target.model.score is not None
    texts = [data.Text("a b", "c d"), data.Text(None, "e f")]
    lengths: Any = {"target_length": 24, "source_length": 24}
    assert target.tokenizer is not None
    encoded = data.encode(texts, target.tokenizer, start_token=None, **lengths)
    packed = data.dataset(encoded, start_token=None, seed=0, **lengths)
    batch = packed.batch(0, 1)
    log = jax.nn.log_softmax(jax.jit(target.model.score)(target.params, batch))
    own = jnp.take_along_axis(log, batch.targets[:, :, None], axis=-1)[:, :, 0]
    expected = jnp.exp(-jnp.sum(own * batch.weights) / jnp.sum(batch.weights))
    assert perplexity.perplexity(target, texts, batch_size=1, **lengths) == pytest.approx(float(expected), rel=1e-5)
    with pytest.raises(ValueError, match="has no tokenizer"):
        perplexity.perplexity(target._replace(tokenizer=None), texts)
    # The chance that a draft token is accepted there, for the target itself and for another model.
    draft = specjax.load(given_files["decoder-pruned"])
    assert draft.model.score is not None
    found = [perplexity.acceptance_rate(target, x, texts, batch_size=1, **lengths) for x in (target, draft)]
    assert found[0] == pytest.approx(1, abs=1e-5)
    other = jax.nn.softmax(jax.jit(draft.model.score)(draft.params, batch))
    overlap = jnp.sum(jnp.minimum(jnp.exp(log), other), axis=-1)
    assert found[1] == pytest.approx(float(jnp.sum(overlap * batch.weights) / jnp.sum(batch.weights)), rel=1e-5)
    assert found[1] < 0.99


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["decoder", "t5"])
def test_launched(kind, given_files, tmp_path, capsys):
    values = {"metric": "rouge2"} if kind == "t5" else {}
    if kind == "t5":
        pytest.importorskip("rouge_score")
    given = command(tmp_path, given_files, kind, **values)
    assert launch.main(given) == 0, capsys.readouterr().err
    rows = json.loads((tmp_path / "results.json").read_text())
    assert [(row["name"].partition(",")[0], row["role"]) for row in rows] == [
        ("the target", "alone"),
        ("quantised", "alone"),
        ("quantised", "draft"),
        ("pruned", "alone"),
        ("pruned", "draft"),
    ]
    whole, quantised, with_quantised, pruned, with_pruned = rows
    assert with_quantised["bytes"] == whole["bytes"] + quantised["bytes"]
    assert quantised["bytes"] < pruned["bytes"] < whole["bytes"]
    for row in (with_quantised, with_pruned):
        assert (row["num_identical"], row["perplexity"], row["metric"]) == (2, whole["perplexity"], whole["metric"])
        assert 0 <= row["acceptance_rate"] <= 1
        assert 0 < row["alpha"] < 1
    assert min(with_quantised["acceptance_rate"], with_quantised["alpha"]) > 0.5
    assert whole["alpha"] is quantised["alpha"] is None
    assert pruned["perplexity"] != whole["perplexity"]
    assert (whole["metric"] is None) == (kind == "decoder")
    text = (tmp_path / "summary.md").read_text()
    assert "| the target, drafted for by: quantised, int8 |" in text
    # The same command measures nothing again.
    assert launch.main(given) == 0
    assert json.loads((tmp_path / "results.json").read_text()) == rows


@pytest.mark.budget(30)
def test_nothing_is_timed_where_nothing_is_repeated(given_files, tmp_path, capsys):
    assert launch.main(command(tmp_path, given_files, repeats=0, quantised="()")) == 0, capsys.readouterr().err
    rows = json.loads((tmp_path / "results.json").read_text())
    assert [row["ms_per_token"] for row in rows] == [None] * 3
    assert [row["alpha"] is None for row in rows] == [True, True, False]
    assert rows[2]["perplexity"] == rows[0]["perplexity"] != rows[1]["perplexity"]
    text = (tmp_path / "summary.md").read_text()
    assert "| what writes | parameters | perplexity | alpha |" in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"texts": ""}, ["--config.texts=TEXTS"]),
        ({"data": "nowhere.jsonl"}, ["nowhere.jsonl does not exist"]),
        ({"quantised": "('int3',)"}, ["config.quantised='int3'", "int8"]),
        ({"quantised": "('int8','int8')"}, ["name quantised, int8 twice"]),
        ({"quantised": "('int4:128',)"}, ["int4:128", "does not divide"]),
        ({"metric": "rouge2"}, ["config.metric='rouge2'", "leave it out"]),
        ({"metric": "meteor"}, ["config.metric='meteor'", "rouge2"]),
        ({"max_prompt_tokens": 1}, ["config.max_prompt_tokens=1", "longer"]),
    ],
)
def test_errors_are_one_line(changes, words, given_files, tmp_path, capsys):
    assert launch.main(command(tmp_path, given_files, **changes)) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    for word in words:
        assert word in error
