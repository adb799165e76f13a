"""The launcher and the comparison that it runs, end to end, on a tiny random model."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from helpers import WORDS, save_tiny_decoder

from specjax import experiments, launch
from specjax.experiments import compare as compare_experiment

ROOT = pathlib.Path(__file__).parents[1]
COMPARE = str(ROOT / "configs" / "compare.py")
QUICKSTART = str(ROOT / "configs" / "quickstart.py")
ROW_KEYS = """
    task target draft drafter verify exact temperature num_draft_tokens batch_size num_prompts num_tokens
    acceptance_rate block_efficiency cost_ratio predicted_speedup measured_speedup tokens_per_second
    baseline_tokens_per_second identical device jax_version step_cost score_cost accounted_speedup
    accepted_histogram acceptance_by_position compile_seconds speedup_low speedup_high verdict
    dtype max_new_tokens seed
"""


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> str:
    return save_tiny_decoder(tmp_path_factory.mktemp("target"), 0)


@pytest.fixture(scope="module")
def draft(tmp_path_factory) -> str:
    return save_tiny_decoder(tmp_path_factory.mktemp("draft"), 1)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    prompts = [" ".join(WORDS[(i * j) % len(WORDS)] for j in range(4 + i % 5)) for i in range(1, 41)]
    path.write_text(
        "".join(json.dumps({"category": f"kind {i % 2}", "id": i, "input": p}) + "\n" for i, p in enumerate(prompts))
    )
    return str(path)


def _arguments(config: str = COMPARE, **values) -> list[str]:
    return ["launch", f"--config={config}", *(f"--{key.replace('__', '.')}={value}" for key, value in values.items())]


def _compare(target: str, data: str, workdir: pathlib.Path, **values) -> list[str]:
    defaults = {"target": target, "data": data, "num_prompts": 3, "max_new_tokens": 16, "repeats": 1}
    keys = {f"config__{key}": value for key, value in (defaults | values).items()}
    return _arguments(**keys, workdir=workdir, compilation_cache=False)


def _rows(workdir: pathlib.Path) -> list[dict]:
    return json.loads((workdir / "results.json").read_text())


def _measurements(rows: list[dict]) -> list[dict]:
    """Rows without what is judged by the spread of all timings of a run."""
    judged = ("speedup_low", "speedup_high", "verdict")
    return [{key: value for key, value in row.items() if key not in judged} for row in rows]


def test_all_files_and_keys(target, data, tmp_path, capsys):
    assert launch.main(_compare(target, data, tmp_path, batch_size=2)) == 0
    assert {path.name for path in tmp_path.iterdir()} >= {"config.json", "results.json", "summary.md", "samples.jsonl"}
    assert (tmp_path / "speedup.png").read_bytes().startswith(b"\x89PNG")
    rows = _rows(tmp_path)
    assert [row["num_prompts"] for row in rows] == [1, 1, 1, 3]
    for row in rows:
        assert set(row) >= set(ROW_KEYS.split())
        assert row["identical"] == 1.0
        assert row["tokens_per_second"] > 0
        assert len(row["accepted_histogram"]) == row["num_draft_tokens"] + 1 == 5
        assert sum(row["accepted_histogram"]) == row["target_calls"]
    total = rows[-1]
    assert total["task"] == "all"
    assert total["num_tokens"] == sum(row["num_tokens"] for row in rows[:-1]) == 3 * 16
    # The rows of a batch share its time: batches are added up, not rows.
    assert total["seconds"] == pytest.approx(rows[0]["seconds"] + rows[2]["seconds"])
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    for sample in samples:
        assert sample["text"] == sample["baseline_text"] == "".join(text for text, _ in sample["accepted"])
    output = capsys.readouterr().out
    assert "identical" in output
    assert "identical to plain decoding on 3 of 3" in (tmp_path / "summary.md").read_text()


@pytest.mark.slow
def test_a_draft_model_and_a_rerun(target, draft, data, tmp_path, capsys):
    arguments = _compare(target, data, tmp_path, drafter="model", draft=draft, num_draft_tokens=2)
    assert launch.main(arguments) == 0
    rows = _rows(tmp_path)
    assert rows[-1]["draft"] == draft
    assert rows[-1]["cost_ratio"] > 0
    assert rows[-1]["identical"] == 1.0
    assert (tmp_path / "acceptance.png").exists()
    capsys.readouterr()
    assert launch.main(arguments) == 0
    assert _rows(tmp_path) == rows
    assert "3 of 3 prompts are finished" in capsys.readouterr().out
    assert launch.main([*arguments, "--config.max_new_tokens=8"]) == 1
    error = capsys.readouterr().err
    assert "max_new_tokens: 16 before, 8 now" in error
    assert "--overwrite" in error
    plain = ["--config.drafter=none", "--config.draft=", "--config.num_prompts=1", "--overwrite"]
    assert launch.main([*arguments, *plain]) == 0
    assert _rows(tmp_path)[-1]["num_prompts"] == 1
    assert _rows(tmp_path)[-1]["num_draft_tokens"] == 0


@pytest.mark.slow
def test_sampled_text_is_not_called_identical(target, data, tmp_path, capsys):
    arguments = _compare(target, data, tmp_path, temperature=1.0, top_k=5, step_cost=0, show_text=True, num_prompts=2)
    assert launch.main(arguments) == 0
    rows = _rows(tmp_path)
    assert all(row["identical"] is None for row in rows)
    assert rows[0]["step_cost"] == 0
    output = capsys.readouterr().out
    assert "same distribution" in output
    assert json.loads((tmp_path / "samples.jsonl").read_text().splitlines()[1])["prompt"] in output


@pytest.mark.slow
def test_coupled_text_is_called_identical_though_it_is_sampled(target, draft, data, tmp_path):
    options = {"verify": "coupled", "drafter": "model", "draft": draft, "temperature": 1.0, "step_cost": 0}
    options |= {"draft_quantise": "int8", "min_confidence": 0.1}
    options |= {"repetition_penalty": 1.3, "stop_strings": "('cat sat',)"}
    arguments = _compare(target, data, tmp_path, batch_size=3, fixed_shape=True, **options)
    assert launch.main(arguments) == 0
    rows = _rows(tmp_path)
    assert [row["identical"] for row in rows] == [1.0] * 4
    assert rows[-1]["verify"] == "coupled"
    assert rows[-1]["exact"] is True
    assert rows[-1]["repetition_penalty"] == 1.3
    for line in (tmp_path / "samples.jsonl").read_text().splitlines():
        text = json.loads(line)["text"]
        assert text
        assert "cat sat" not in text or text.endswith("cat sat")


def test_a_grammar_needs_a_token_to_end_with(target, data, tmp_path, capsys):
    assert launch.main(_compare(target, data, tmp_path, regex="(the|cat)+")) == 1
    assert "stop_tokens=[]: a text needs at least one to end" in capsys.readouterr().err


@pytest.mark.slow
def test_a_rule_that_is_not_exact_says_so(target, data, tmp_path, capsys):
    with pytest.warns(UserWarning, match=r"verify=lenient:0\.3 is not exact"):
        assert launch.main(_compare(target, data, tmp_path, verify="lenient:0.3", temperature=1.0)) == 0
    assert {row["exact"] for row in _rows(tmp_path)} == {False}
    assert "ANOTHER distribution (the rule is not exact)" in capsys.readouterr().out
    assert "rule `lenient:0.3` (NOT exact)" in (tmp_path / "summary.md").read_text()


@pytest.mark.slow
def test_interrupt(target, data, tmp_path):
    """In a process of its own: interrupted after the first row, and continued by the same command."""
    command = [sys.executable, "-m", "specjax.launch"]
    command += _compare(target, data, tmp_path, num_prompts=40, max_new_tokens=100, repeats=3)[1:]
    environment = os.environ | {"SPECJAX_CACHE": str(tmp_path / "cache")}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        deadline = time.monotonic() + 100
        while not (tmp_path / "results.json").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        try:
            _, error = process.communicate(timeout=5)
        except subprocess.TimeoutExpired:
            # Python ignores what is raised in a callback of its garbage collector: press once more.
            process.send_signal(signal.SIGINT)
            _, error = process.communicate(timeout=30)
    assert process.returncode == 130, error.decode()
    assert "Traceback" not in error.decode().split("Interrupted")[-1]
    assert "results.json" in error.decode()
    finished = len(_rows(tmp_path)) - 1
    assert 1 <= finished < 40
    assert not list(tmp_path.glob(".*"))
    before = _measurements(_rows(tmp_path)[:finished])
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert f"{finished} of 40 prompts are finished" in done.stdout
    rows = _rows(tmp_path)
    assert _measurements(rows[:finished]) == before
    assert [row["prompt"] for row in rows[:-1]] == list(range(40))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (_arguments(config__nope=1), ["'nope'", "num_draft_tokens", "batch_size"]),
        ([*_arguments(), "--noconfig.nope"], ["'nope'", "num_draft_tokens"]),
        (_arguments(nope=1), ["--nope", "--workdir", "--overwrite"]),
        ([*_arguments(), "stray"], ["'stray'", "--workdir"]),
        (_arguments(config__batch_size="many"), ["batch_size", "many"]),
        (_arguments("configs/missing.py"), ["configs/missing.py", "--config=FILE"]),
        (_arguments(str(ROOT / "specjax" / "theory.py")), ["theory.py", "get_config"]),
        (["launch"], ["--config=FILE"]),
        (["launch", "--config.seed=1"], ["--config=FILE"]),
        (_arguments(config__data="missing.jsonl"), ["missing.jsonl", "--config.data"]),
        (_arguments(), ["config.data", "--config.data="]),
        (_arguments(config__drafter="magic"), ["magic", "model, ngram, suffix"]),
        (_arguments(QUICKSTART, config__verify="magic"), ["verify='magic'", "rejection, block, traversal, coupled"]),
        (_arguments(QUICKSTART, config__verify="lenient:2"), ["lenience=2", "lenient:0.3"]),
        (_arguments(QUICKSTART, config__regex="a", config__json_schema="b"), ["choose one"]),
        (_arguments(QUICKSTART, config__drafter="model"), ["--config.draft=SOURCE"]),
        (_arguments(config__repeats=0), ["repeats=0", "at least 1"]),
        (_arguments(QUICKSTART, config__min_confidence=2.0), ["min_confidence=2.0", "probability"]),
        (_arguments(QUICKSTART, config__draft_quantise="int8"), ["draft_quantise='int8'", "--config.drafter=model"]),
        (_arguments(config__experiment="sweep"), ["'sweep'", "compare"]),
        (_arguments(QUICKSTART, config__num_prompts=99), ["6 prompts", "99"]),
        (_arguments(QUICKSTART, config__target="/no/such/model"), ["/no/such/model", "does not exist"]),
    ],
)
def test_errors_are_one_line(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert launch.main([*arguments, "--nocompilation_cache"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    for word in words:
        assert word in error


@pytest.mark.slow
def test_a_failed_start_does_not_claim_the_workdir(target, data, tmp_path, capsys):
    assert launch.main(_compare("/no/such/model", data, tmp_path)) == 1
    assert launch.main(_compare(target, data, tmp_path, num_prompts=1)) == 0


def test_debug_shows_the_traceback(capsys):
    assert launch.main(_arguments(config__drafter="magic", debug=True, compilation_cache=False)) == 1
    assert "Traceback" in capsys.readouterr().err


def test_help(capsys):
    assert launch.main(["launch", "--help"]) == 0
    assert "--workdir" in capsys.readouterr().out
    assert launch.main([*_arguments(QUICKSTART), "--help"]) == 0
    assert "--config.num_draft_tokens=7" in capsys.readouterr().out


PAIRS = sorted(path for path in (ROOT / "configs" / "pairs").glob("*.py") if path.stem != "quantised_draft")  # A plan.


@pytest.mark.parametrize("path", PAIRS, ids=lambda path: path.stem)
def test_pairs_are_compare_with_values(path):
    _, compare = launch.parse(_arguments())
    _, pair = launch.parse(_arguments(str(path)))
    assert compare is not None
    assert pair is not None
    assert set(pair) == set(compare)
    pair.data = COMPARE  # a file that is there
    compare_experiment.check(pair)


@pytest.mark.parametrize(("name", "count"), [("quickstart", 6), ("edit", 8)])
def test_configs_of_prompts_are_compare_with_values(name: str, count: int):
    _, compare = launch.parse(_arguments())
    _, config = launch.parse(_arguments(str(ROOT / "configs" / f"{name}.py")))
    assert compare is not None
    assert config is not None
    assert set(config) == set(compare)
    experiments.get(str(config.experiment))
    compare_experiment.check(config)
    lines = pathlib.Path(str(config.data)).read_text().splitlines()
    assert len(lines) == count
    assert all(json.loads(line).keys() == {"category", "prompt"} for line in lines)


def test_starting_imports_neither_torch_nor_grain():
    code = (
        "import sys; from specjax import launch; from specjax.experiments import distill, train\n"
        "launch.main(['launch', '--help']); sys.exit(bool({'torch', 'grain'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, timeout=60)


OWN = """
import jax.numpy as jnp
import specjax
from specjax.decoding import verify
from specjax.types import Proposal

def copier(num_draft_tokens, target, draft):
    assert target.model.vocab_size == 17 and draft == "note"
    return specjax.drafters.ngram(num_draft_tokens=num_draft_tokens, min_match=1)

def wrong(num_draft_tokens):
    drafter = copier.__globals__["specjax"].drafters.ngram(num_draft_tokens=num_draft_tokens)
    def propose(params, state, cache, context):
        proposal, *rest = drafter.propose(params, state, cache, context)
        return (proposal._replace(tokens=proposal.tokens[:, :-1]), *rest)
    return drafter._replace(propose=propose)

def fails(num_draft_tokens):
    return specjax.drafters.ngram(num_draft_tokens=num_draft_tokens)._replace(propose=lambda *args: {}["key"])

def fixed():
    return specjax.drafters.ngram(num_draft_tokens=1)

def plain(num_draft_tokens):
    return 3

mine = verify.Rule(verify.rejection.function, "mine", exact=False)
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("own") / "my_own.py"
    path.write_text(OWN)
    return str(path)


@pytest.mark.slow
def test_a_drafter_and_a_rule_of_ones_own(target, data, own, tmp_path, capsys):
    options = {"drafter": f"{own}:copier", "draft": "note", "verify": f"{own}:mine", "num_prompts": 2}
    with pytest.warns(UserWarning, match="verify=mine has no `at_zero` of its own"):
        assert launch.main(_compare(target, data, tmp_path, **options)) == 0
    rows = _rows(tmp_path)
    assert {row["drafter"] for row in rows} == {"my_own.py:copier"}
    assert {row["verify"] for row in rows} == {"mine"}
    assert rows[-1]["identical"] == 1.0
    assert sum(rows[-1]["accepted_histogram"][1:]) > 0
    summary = (tmp_path / "summary.md").read_text()
    assert "my_own.py:copier" in summary
    assert "rule `mine` (NOT exact)" in summary


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("wrong", ["The drafter is wrong: ", "propose of wrong (my_own.py, line", "[B, K] = [1, 4]"]),
        ("fails", ["my_own.py:fails fails in its propose (KeyError: 'key')"]),
        ("fixed", ["returns a drafter of 1 tokens where 4 were asked for"]),
        ("plain", ["does not return a drafter: drafter is a int"]),
    ],
)
def test_a_drafter_of_ones_own_that_is_wrong_is_named(name, words, target, data, own, tmp_path, capsys):
    assert launch.main(_compare(target, data, tmp_path, drafter=f"{own}:{name}", num_prompts=1)) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for word in words:
        assert word in error


@pytest.mark.parametrize(
    ("kind", "experiment", "key"),
    [
        ("medusa", "heads", "num_heads"),
        ("blockwise", "heads", "inner_size"),
        ("eagle", "head", "taps"),
        ("feature_head", "head", "own_prompts"),
        ("pard", "pard", "keep_masks"),
        ("pass", "masks", "num_points"),
        ("specdec", "specdec", "glance_first"),
    ],
)
def test_the_kind_of_heads_chooses_the_keys(kind: str, experiment: str, key: str, capsys: pytest.CaptureFixture):
    path = str(ROOT / "configs" / "heads.py")
    for arguments in (_arguments(path, config__kind=kind), _arguments(f"{path}:{kind}")):
        _, config = launch.parse(arguments)
        assert config is not None
        assert (config.experiment, config.kind) == (experiment, kind)
        assert key in config
    assert launch.main([*_arguments(path, config__kind=kind), "--help"]) == 0
    assert f"--config.{key}=" in capsys.readouterr().out
