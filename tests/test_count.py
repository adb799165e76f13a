"""`configs/count.py`, end to end: from a file of texts to a draft that the comparison takes."""

import json
import lzma
import pathlib

import jax
import numpy as np
import pytest
from helpers import random_corpus, tokenizer_of

import specjax
from specjax import drafters, experiments, launch, testing
from specjax.experiments import texts
from specjax.models.config import DecoderConfig

ROOT = pathlib.Path(__file__).parents[1]
COUNT, COMPARE = (str(ROOT / "configs" / name) for name in ("count.py", "compare.py"))
WORDS = "▁a ▁b ▁c ▁d ▁e [unk] <s> </s>"
LETTERS = "abcde"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> str:
    directory = tmp_path_factory.mktemp("tokenizer")
    tokenizer_of(WORDS).save(directory)
    return str(directory)


def _lines(seed: int) -> list[dict[str, str]]:
    return [{"input": "e", "target": " ".join(LETTERS[t] for t in text)} for text in random_corpus(seed)]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("data")
    text = "".join(json.dumps(line) + "\n" for line in _lines(0))
    (directory / "train.jsonl.xz").write_bytes(lzma.compress(text.encode()))
    (directory / "valid.txt").write_text("\n\n".join(line["target"] for line in _lines(1)), encoding="utf-8")
    return {"train": str(directory / "train.jsonl.xz"), "valid": str(directory / "valid.txt")}


def _arguments(workdir: pathlib.Path, source: str, files: dict[str, str], **values) -> list[str]:
    keys = {"data": files["train"], "valid": files["valid"], "tokenizer": source} | values
    arguments = [f"--config.{key}={value}" for key, value in keys.items()]
    return ["launch", f"--config={COUNT}", *arguments, f"--workdir={workdir}", "--nocompilation_cache"]


def test_a_table_is_counted_saved_and_tried(tokenizer, data, tmp_path, capsys):
    arguments = _arguments(tmp_path, tokenizer, data, order=2, begin_token="<s>", end_token="</s>")
    assert launch.main(arguments) == 0
    output = capsys.readouterr().out
    assert "40 texts" in output
    assert "n-grams of 2 tokens kept" in output
    table = drafters.load_table(tmp_path)
    corpus = [[6, *text, 7] for text in random_corpus(0)]
    same = drafters.count_ngrams(corpus, vocab_size=8, order=2, context_tokens=1)
    jax.tree.map(np.testing.assert_array_equal, table.params, same.params)
    assert table.tokenizer is not None
    assert table.tokenizer.vocab() == tokenizer_of(WORDS).vocab()
    row = json.loads((tmp_path / "results.json").read_text())
    held_out = row["held_out"]
    # Half of all tokens are the one before plus one, a tenth are so by chance, and texts end.
    assert 0.3 < held_out["hit_rate"] < 0.7
    assert held_out["known_rate"] == 1
    assert 2 < held_out["perplexity"] < 5
    unigrams = [[6, *text, 7] for text in random_corpus(1)]
    assert held_out["tokens"] == sum(len(text) - 1 for text in unigrams)
    assert launch.main(arguments) == 0
    assert "is finished in" in capsys.readouterr().out
    assert launch.main([*arguments, "--config.order=1"]) == 1
    assert "another config" in capsys.readouterr().err
    assert launch.main([*arguments, "--config.order=1", "--overwrite"]) == 0
    assert drafters.load_table(tmp_path).order == 1
    worse = json.loads((tmp_path / "results.json").read_text())["held_out"]
    assert worse["perplexity"] > held_out["perplexity"]


def test_the_perplexity_is_that_of_the_definition(tokenizer, data, tmp_path):
    assert launch.main(_arguments(tmp_path, tokenizer, data, order=1, valid_tokens=5)) == 0
    unigram = np.asarray(drafters.load_table(tmp_path).params.unigram)
    tokens = np.concatenate([np.asarray(text) for text in random_corpus(1)])[:5]
    held_out = json.loads((tmp_path / "results.json").read_text())["held_out"]
    assert held_out["perplexity"] == pytest.approx(np.exp(-np.log(unigram[tokens]).mean()))
    assert held_out["hit_rate"] == pytest.approx((tokens == unigram.argmax()).mean())


def test_a_datastore_is_indexed_saved_and_tried(tokenizer, data, tmp_path, capsys):
    assert launch.main(_arguments(tmp_path, tokenizer, data, kind="retrieval", depth=4)) == 0
    datastore = drafters.load_datastore(tmp_path)
    same = drafters.index_corpus(random_corpus(0), vocab_size=8, depth=4)
    jax.tree.map(np.testing.assert_array_equal, datastore.params, same.params)
    held_out = json.loads((tmp_path / "results.json").read_text())["held_out"]
    assert held_out["perplexity"] is None
    assert 0 < held_out["known_rate"] < 1
    assert held_out["hit_rate"] == pytest.approx(held_out["hit_rate_known"] * held_out["known_rate"])
    assert "something found" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ngram", "retrieval"])
def test_the_comparison_takes_the_draft(kind, tokenizer, data, tmp_path):
    assert launch.main(_arguments(tmp_path / "draft", tokenizer, data, kind=kind, valid="")) == 0
    config = DecoderConfig(
        vocab_size=8,
        hidden_size=32,
        intermediate_size=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        max_position=512,
    )
    model, params = testing.tiny_decoder(0, vocab_size=8)
    specjax.save(specjax.Pretrained(model, params, tokenizer_of(WORDS), config), tmp_path / "target")
    values = {
        "target": tmp_path / "target",
        "draft": tmp_path / "draft",
        "drafter": "table" if kind == "ngram" else kind,
        "data": data["train"],
        "num_prompts": 2,
        "max_new_tokens": 24,
        "repeats": 1,
        "step_cost": 0,
        "min_match": 1,
    }
    arguments = [f"--config.{key}={value}" for key, value in values.items()]
    arguments += [f"--workdir={tmp_path / 'run'}", "--nocompilation_cache"]
    assert launch.main(["launch", f"--config={COMPARE}", *arguments]) == 0
    total = json.loads((tmp_path / "run" / "results.json").read_text())[-1]
    assert total["identical"] == 1
    assert total["draft_steps"] > 0
    assert total["acceptance_rate"] > 0
    assert total["draft"] == str(tmp_path / "draft")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"kind": "magic"}, "config.kind='magic': choose one of ngram, retrieval"),
        ({"order": 0}, "config.order=0: at least 1"),
        ({"data": ""}, "config.data is empty"),
        ({"data": "/no/such/file"}, "/no/such/file does not exist"),
        ({"field": "body"}, "has no text under 'body': it has 'input', 'target'"),
        ({"tokenizer": "/no/such/tokenizer"}, "/no/such/tokenizer does not exist"),
        ({"end_token": "<end>"}, "config.end_token='<end>' is not a token"),
    ],
)
def test_errors_are_one_line(values, words, tokenizer, data, tmp_path, capsys):
    assert launch.main(_arguments(tmp_path, tokenizer, data, **values)) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert words in error


def test_the_config_names_an_experiment():
    _, config = launch.parse(["launch", f"--config={COUNT}"])
    assert config is not None
    experiments.get(str(config.experiment))


def test_texts_are_read_from_json_and_from_plain_text(tmp_path):
    lines = tmp_path / "x.jsonl"
    lines.write_text('{"text": "a", "input": "b"}\n\n{"input": "c"}\n')
    assert texts.read(lines) == ["a", "c"]
    assert texts.read(lines, "input") == ["b", "c"]
    assert texts.read(lines, num_texts=1) == ["a"]
    lines.write_text('{"text": "a"}\nnot json\n')
    with pytest.raises(ValueError, match="line 2, is not JSON"):
        texts.read(lines)
    plain = tmp_path / "x.txt"
    plain.write_text("one\ntwo\n\n\nthree\n")
    assert texts.read(plain) == ["one\ntwo", "three"]
    plain.write_text("\n")
    with pytest.raises(ValueError, match="has no texts"):
        texts.read(plain)
    (tmp_path / "x.xz").write_bytes(b"not packed")
    with pytest.raises(ValueError, match="cannot be read"):
        texts.read(tmp_path / "x.xz")
