"""The speed benchmark: which prompts it takes, its record, and its report. It measures nothing here."""

import json
import pathlib
import sys

import gguf
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "benchmarks"))
import speed  # pyright: ignore[reportMissingImports]
import speed_report  # pyright: ignore[reportMissingImports]
from absl import flags

from specjax.metrics import Costs


@pytest.fixture
def given(tmp_path):
    def parse(**values):
        flags.FLAGS.unparse_flags()
        flags.FLAGS(["speed", "--data=x", "--peers=", *(f"--{k}={v}" for k, v in values.items())])

    parse()
    yield parse
    flags.FLAGS.unparse_flags()


def data(tmp_path, categories: dict[str, list[int]]) -> str:
    path = tmp_path / "data.jsonl"
    rows = [{"question_id": i, "category": c, "turns": [f"q{i}", "x"]} for c, ids in categories.items() for i in ids]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_the_first_questions_of_each_category_are_taken(tmp_path):
    path = data(tmp_path, {"b": [9, 3, 20], "a": [4, 11, 5]})
    assert [q.id for q in speed.questions(path, 2)] == [3, 9, 4, 5]
    assert [q.id for q in speed.questions(path, 2, ["a"])] == [4, 5]
    with pytest.raises(ValueError, match="3 prompts of category 'b', fewer than --prompts_per_category=4"):
        speed.questions(path, 4)
    with pytest.raises(ValueError, match="0 prompts of category 'c'"):
        speed.questions(path, 1, ["c"])


def test_an_interrupted_run_goes_on(given, tmp_path, capsys):
    chosen = [speed.Question(i, "a", "") for i in range(3)]
    path, calls = tmp_path / "speed.json", []

    class Target:
        model = None

    def run(prompt):
        calls.append(prompt)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return [1, 2]

    runs = {"specjax plain": run, "specjax ngram": run}
    encoded = [[i] for i in range(3)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed.decoding, "read_inputs", lambda model, prompts: speed.decoding.pad_prompts(prompts))
        with pytest.raises(KeyboardInterrupt):
            speed.measure_all(speed.Record(path), runs, Target, chosen[:3], [[1], [2], [3] * 40])
        assert list(json.loads(path.read_text())["prompts"]) == ["0", "1"]
        calls.clear()
        rows = speed.measure_all(speed.Record(path), runs, Target, chosen, encoded)
    assert [row["id"] for row in rows] == [0, 1, 2]
    assert calls == [[2]] * 4
    assert "2 of 3 prompts are measured" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"settings": {}}', '{"settings": {}, "prompts": []}', "1"])
def test_a_record_of_something_else_is_refused(given, content, tmp_path):
    path = tmp_path / "speed.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"speed\.json is not a record of this benchmark: remove it"):
        speed.Record(path)


def test_a_record_of_other_settings_is_refused(given, tmp_path):
    record = speed.Record(tmp_path / "speed.json")
    record.write()
    given(max_new_tokens=5)
    with pytest.raises(ValueError, match="max_new_tokens: 128 before, 5 now"):
        speed.Record(tmp_path / "speed.json")


def test_the_report():
    modes = ["specjax plain", "specjax ngram", "transformers plain", "transformers lookup 3"]

    def row(id, category, *milliseconds):
        fields = {"id": id, "category": category, "new_tokens": 8, "identical": True}
        fields["agrees"] = {"specjax plain": True, "transformers plain": id == 3}
        return fields | {"milliseconds": dict(zip(modes, milliseconds, strict=True))}

    rows = [
        row(1, "a", 10, 5, 20, 10),
        row(2, "a", 10, 20, 20, 10),
        row(3, "b", 10, 5, 20, 10),
        row(4, "b", 8, 4, 8, 16),
    ]
    common = {"target": "t", "dtype": "float32", "max_new_tokens": 8, "num_draft_tokens": 7, "repeats": 1}
    common |= {"versions": {"jax": "1"}, "machine": "m"}
    overhead = {"specjax plain": 0.01, "specjax ngram": 0.02}
    text = speed_report.markdown(rows, modes, common, Costs(1.0, 1.5, 0.0, 7), overhead, "python benchmarks/speed.py")
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
    assert table[2].startswith("| a | 2 | 10.0 | 10.0 |")
    assert table[2].endswith("| 1.00x | 0.50 to 2.00 |")
    assert table[3].endswith("| 2.00x | 2.00 to 2.00 |")
    assert "| all | 4 |" in table[4]
    assert "1.41x (95 %: 1.00 to 2.00)" in table[4]
    assert "Slower than plain decoding on 1 of 4 prompts; the worst has 0.50x (a 2)" in text
    assert "1.00x (95 %" not in text.split("Without the first prompt")[1].splitlines()[0]
    assert "Plain specjax over plain transformers: 1.68x (95 %: 1.41 to 2.00); n-gram" in text
    assert "its best mode (transformers lookup 3): 1.68x" in text
    assert "Plain texts are identical on 1 of 4 prompts." in text


def test_an_engine_that_is_not_installed_is_left_out_with_a_message(monkeypatch, capsys):
    monkeypatch.setattr(speed.peers, "version", lambda name: "5" if name == "transformers" else None)
    assert speed.peers.installed(("transformers", "openvino")) == {"transformers": "5"}
    assert "openvino is left out: it is not installed (pip install openvino-genai)." in capsys.readouterr().err
    with pytest.raises(ValueError, match="--peers=vllm: there is no such engine; choose among transformers, llama"):
        speed.peers.installed(("vllm",))


def test_weights_for_other_engines_are_rounded_once_and_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("SPECJAX_CACHE", str(tmp_path / "cache"))
    values = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_uint32("llama.block_count", 3)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    writer.add_tensor("matrix", values)
    writer.add_tensor("norm", values[0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for dtype, stored in (("float32", "F32"), ("bfloat16", "BF16"), ("bfloat16", "F16")):
        copy = speed.peers.rewritten(tmp_path / "model.gguf", dtype, stored)
        reader = gguf.GGUFReader(copy)
        assert reader.fields["llama.block_count"].contents() == 3
        assert reader.fields["tokenizer.ggml.tokens"].contents() == ["a", "b"]
        kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
        assert kinds == {"matrix": stored, "norm": "F32"}
        got = {t.name: gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float32) for t in reader.tensors}
        rounded = np.asarray(jnp.asarray(values, dtype), np.float32)
        np.testing.assert_allclose(got["matrix"], rounded, rtol=0, atol=1e-7 if stored == "F16" else 0)
        np.testing.assert_array_equal(got["norm"], rounded[0])
        assert speed.peers.rewritten(tmp_path / "model.gguf", dtype, stored) == copy
