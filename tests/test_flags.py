"""Wrong command lines, each of which ends in one line, before any model is loaded; and what --help says."""

import os
import pathlib
import re
import signal

import pytest

from specjax import launch
from specjax.api import pretrained
from specjax.experiments import failures, keys, results

ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = ROOT / "configs"

OWN = """
import specjax
from specjax.decoding import verify

def drafter(num_draft_tokens):
    return specjax.drafters.ngram(num_draft_tokens=num_draft_tokens, min_match=1)

def fixed():
    return specjax.drafters.ngram(num_draft_tokens=3)

def asks(num_draft_tokens, secret):
    return drafter(num_draft_tokens)

rule = verify.Rule(verify.rejection.function, "mine", exact=False)
stolen = verify.Rule(verify.rejection.function, "block", exact=True)
number = 3

def judge(keys, target_probs, proposal):
    return None

def broken():
    raise KeyError("oops")
"""

Q = "quickstart"
"""(config, flags, words that the line has): each is one class of mistake."""
WRONG = [
    # Files and flags.
    ("", [], ["--config=FILE"]),
    ("", ["--config.seed=1"], ["needs a config file"]),
    ("", ["--config="], ["--config is empty"]),
    ("", ["--config=missing.py"], ["'missing.py' does not exist"]),
    ("", ["--config=configs/quikstart.py"], ["Did you mean", "configs/quickstart.py'?"]),
    ("", ["--config=plan_70b"], ["Did you mean", "configs/chinchilla/plan_70b.py'?"]),
    ("", ["--config=."], ["'.' is a directory"]),
    ("", ["--config=bad.py"], ["bad.py is not a config (SyntaxError"]),
    ("", ["--config=exits.py"], ["exits.py is not a config (SystemExit"]),
    ("", ["--config=list.py"], ["must return a ConfigDict"]),
    ("chinchilla/xsum", ["--config={config}:huge"], ["is not a variant"]),
    (Q, ["--nope"], ["Unknown flag --nope"]),
    (Q, ["--workdri=x"], ["Did you mean --workdir?"]),
    (Q, ["--overwrit"], ["Did you mean --overwrite?"]),
    (Q, ["stray"], ["'stray'"]),
    (Q, ["--overwrite=maybe"], ["overwrite", "maybe"]),
    (Q, ["--workdir="], ["--workdir is empty"]),
    (Q, ["--workdir=  "], ["--workdir is empty"]),
    (Q, ["--workdir=own.py"], ["own.py is a file"]),
    (Q, ["--workdir=own.py/runs"], ["own.py"]),
    # Keys and their types.
    (Q, ["--config.drafer=ngram"], ["Did you mean 'drafter'?"]),
    (Q, ["--config.num_drafts=3"], ["Did you mean 'num_draft_tokens'?"]),
    (Q, ["--config.temprature=1"], ["Did you mean 'temperature'?"]),
    (Q, ["--noconfig.nope"], ["no key 'nope'"]),
    ("train", ["--config.hidden_size=3"], ["Did you mean 'model.hidden_size'?"]),
    ("train", ["--config.model=3"], ["no key 'model'", "model.hidden_size"]),
    (Q, ["--config.batch_size=many"], ["batch_size", "many"]),
    (Q, ["--config.batch_size=1.5"], ["batch_size", "1.5"]),
    (Q, ["--config.batch_size="], ["batch_size"]),
    (Q, ["--config.temperature=hot"], ["temperature", "hot"]),
    (Q, ["--config.show_text=maybe"], ["show_text", "maybe"]),
    (
        "chinchilla/xsum",
        ["--config.data=x", "--config.num_draft_tokens=four"],
        ["num_draft_tokens=('four',): write it as (0, 1, 2"],
    ),
    ("chinchilla/xsum", ["--config.data=x", "--config.samplings=(1.0,0.8)"], ["write it as ((1.0, 0.8), (0.0, 1.0))"]),
    ("leviathan/mini_ende", ["--config.temperatures=hot"], ["write it as (0.0, 1.0)"]),
    # Values.
    (Q, ["--config.experiment=sweep"], ["'sweep'", "compare"]),
    (
        Q,
        ["--config.drafter=magic"],
        ["choose one of model, ngram, suffix,", "early_exit, or FILE.py:FUNCTION"],
    ),
    (Q, ["--config.drafter="], ["choose one of"]),
    (Q, ["--config.drafter=model"], ["--config.draft=SOURCE"]),
    (Q, ["--config.drafter=table", "--config.draft=nowhere"], ["'nowhere' does not exist"]),
    (Q, ["--config.draft=x"], ["is not used by drafter=ngram"]),
    (Q, ["--config.drafter=eagle"], ["config.drafter='eagle' needs a draft: give --config.draft=SOURCE"]),
    (Q, ["--config.dynamic=(4,3,8)"], ["config.dynamic=(4, 3, 8) is not used by drafter=ngram", "model, eagle"]),
    (Q, ["--config.drafter=eagle", "--config.draft=x", "--config.dynamic=(4,3)"], ["give (width, depth, num_nodes)"]),
    (Q, ["--config.drafter=eagle", "--config.draft=x", "--config.dynamic=(4,3,3)"], ["between depth + 1 = 4 and"]),
    (Q, ["--config.draft_quantise=int4:64"], ["draft_quantise='int4:64'"]),
    (Q, ["--config.min_confidence=2.0"], ["min_confidence=2.0"]),
    (Q, ["--config.min_confidence=nan"], ["min_confidence=nan"]),
    (Q, ["--config.min_match=0"], ["min_match=0: from 1 to 64"]),
    (Q, ["--config.drafter=jacobi", "--config.num_draft_tokens=0"], ["num_draft_tokens=0", "jacobi needs at least 1"]),
    (Q, ["--config.drafter=lookahead", "--config.window=0"], ["window=0: from 1 to 256"]),
    (Q, ["--config.min_match=1000000"], ["min_match=1000000: from 1 to 64"]),
    (Q, ["--config.num_draft_tokens=1000000"], ["num_draft_tokens=1000000: from 0 to 1024"]),
    (Q, ["--config.num_draft_tokens=-1"], ["num_draft_tokens=-1"]),
    (Q, ["--config.seed=-1"], ["seed=-1: from 0 to 4294967295"]),
    (Q, ["--config.seed=4294967296"], ["seed=4294967296"]),
    (Q, ["--config.seed=4294967295", "--config.num_prompts=3"], ["seed=4294967295", "seed + i"]),
    (Q, ["--config.temperature=-1.0"], ["config.temperature=-1.0"]),
    (Q, ["--config.temperature=inf"], ["config.temperature=inf is not a finite number"]),
    (Q, ["--config.temperature=nan"], ["config.temperature=nan"]),
    (Q, ["--config.top_k=-1"], ["config.top_k=-1"]),
    (Q, ["--config.top_k=99999999999"], ["config.top_k=99999999999"]),
    (Q, ["--config.top_p=0.0"], ["config.top_p=0.0"]),
    (Q, ["--config.top_p=1.5"], ["config.top_p=1.5"]),
    (Q, ["--config.min_p=2.0"], ["config.min_p=2.0"]),
    (Q, ["--config.typical_p=0.0"], ["config.typical_p=0.0"]),
    (Q, ["--config.epsilon_cutoff=-0.1"], ["config.epsilon_cutoff=-0.1"]),
    (Q, ["--config.repetition_penalty=0.0"], ["config.repetition_penalty=0.0"]),
    (Q, ["--config.no_repeat_ngram_size=-2"], ["config.no_repeat_ngram_size=-2"]),
    (Q, ["--config.min_new_tokens=-1"], ["config.min_new_tokens=-1"]),
    (Q, ["--config.step_cost=nan"], ["step_cost=nan"]),
    (Q, ["--config.repeats=0"], ["repeats=0: at least 1"]),
    (Q, ["--config.max_new_tokens=0"], ["max_new_tokens=0: at least 1"]),
    (Q, ["--config.num_prompts=-1"], ["num_prompts=-1"]),
    (Q, ["--config.num_prompts=99"], ["6 prompts"]),
    (Q, ["--config.batch_size=1000000000"], ["batch_size=1000000000: at most"]),
    (Q, ["--config.batch_size=3", "--config.mesh_data=2"], ["batch_size=3 is not a multiple of mesh_data=2"]),
    (Q, ["--config.dtype=float8"], ["dtype='float8'"]),
    (Q, ["--config.chat=yes"], ["chat='yes'"]),
    (Q, ["--config.regex=a", "--config.json_schema=b"], ["choose one"]),
    (Q, ["--config.json_schema=missing.json"], ["json_schema='missing.json' is not a file"]),
    (Q, ["--config.target="], ["config.target is empty"]),
    (Q, ["--config.data="], ["config.data is empty"]),
    (Q, ["--config.data=missing.jsonl"], ["missing.jsonl does not exist"]),
    (Q, ["--config.data=."], ["is a directory"]),
    (Q, ["--config.data=own.py"], ["own.py, line 2, is not JSON"]),
    # Rules.
    (Q, ["--config.verify=magic"], ["verify='magic' is not known"]),
    (Q, ["--config.verify="], ["verify='' is not known"]),
    (Q, ["--config.verify=lenient"], ["Write it as lenient:0.3"]),
    (Q, ["--config.verify=lenient:2"], ["lenience=2"]),
    (Q, ["--config.verify=top_k:2.5"], ["is not a whole number"]),
    (Q, ["--config.verify=greedy", "--config.temperature=1.0"], ["temperature 0, not 1.0"]),
    (Q, ["--config.verify=missing.py:rule"], ["the file missing.py does not exist"]),
    (Q, ["--config.verify=own.py"], ["write own.py:NAME"]),
    (Q, ["--config.verify=own.py:nope"], ["defines no 'nope'; it defines drafter, fixed, asks, rule"]),
    (Q, ["--config.verify=own.py:number"], ["is a int, not a specjax.verify.Rule"]),
    (Q, ["--config.verify=own.py:judge"], ["verify.Rule(judge, name='judge', exact=False)"]),
    (Q, ["--config.verify=own.py:stolen"], ["is called 'block' as a rule of specjax"]),
    (Q, ["--config.verify=own.py:broken"], ["own.py:broken fails in its function (KeyError"]),
    (Q, ["--config.verify=bad.py:rule"], ["bad.py cannot be run (SyntaxError"]),
    # Drafters of one's own.
    (Q, ["--config.drafter=missing.py:f"], ["the file missing.py does not exist"]),
    (Q, ["--config.drafter=./:f"], ["is a directory"]),
    (Q, ["--config.drafter=own.py:"], ["write own.py:NAME"]),
    (Q, ["--config.drafter=own.py:nope"], ["defines no 'nope'"]),
    (Q, ["--config.drafter=own.py:number"], ["name a function that returns a specjax.Drafter"]),
    (Q, ["--config.drafter=own.py:asks"], ["takes secret, which specjax does not give"]),
    (Q, ["--config.drafter=exits.py:f"], ["exits.py cannot be run (SystemExit"]),
    (Q, ["--config.drafter=raises.py:f"], ["raises.py cannot be run (ZeroDivisionError"]),
    (Q, ["--config.drafter=data.txt:f"], ["choose one of"]),
    # Other experiments.
    ("count", [], ["config.data is empty"]),
    ("count", ["--config.data=."], ["is a directory"]),
    ("count", ["--config.data=own.py", "--config.kind=tree"], ["kind='tree'"]),
    ("plan", [], ["config.target is empty"]),
    ("plan", ["--config.target=llama3_8b", "--config.draft=llama3_8b", "--config.verify=x"], ["verify='x'"]),
    ("plan", ["--config.target=llama3_8b", "--config.draft=llama3_8b", "--config.topology=v9:1"], ["v9"]),
    ("train", [], ["config.data"]),
    ("chinchilla/xsum", [], ["config.data is empty"]),
    ("chinchilla/xsum", ["--config.data=x", "--config.drafter=table"], ["choose one of model, ngram, or FILE.py"]),
    ("chinchilla/xsum", ["--config.data=x", "--config.num_draft_tokens=(1,99999)"], ["num_draft_tokens=99999"]),
    ("leviathan/mini_ende", [], ["config.test is empty"]),
    ("data", ["--config.sets=('nope',)"], ["choose from prompts, corpus"]),
    ("data", ["--config.sets=()"], ["choose from prompts, corpus"]),
    ("data", ["--config.num_prompts=0"], ["num_prompts=0"]),
]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> pathlib.Path:
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "bad.py").write_text("def f(:\n")
    (tmp_path / "exits.py").write_text("raise SystemExit(3)\n")
    (tmp_path / "raises.py").write_text("1 / 0\n")
    (tmp_path / "list.py").write_text("def get_config(): return [1]\n")
    monkeypatch.chdir(tmp_path)

    def load(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(pretrained, "load", load)
    monkeypatch.setattr(pretrained, "load_tokenizer", load)
    return tmp_path


@pytest.mark.parametrize(("config", "flags", "words"), WRONG, ids=lambda value: " ".join(map(str, value))[:60])
def test_a_wrong_command_line_ends_in_one_line(config: str, flags: list[str], words: list[str], folder, capsys):
    path = str(CONFIGS / f"{config}.py")
    given = [flag.replace("{config}", path) for flag in flags]
    begin = [f"--config={path}"] if config and not any(flag.startswith("--config=") for flag in given) else []
    assert launch.main(["launch", *begin, *given, "--nocompilation_cache"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    for word in words:
        assert word in error


def test_a_bug_of_specjax_is_told_from_a_mistake(folder, monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise KeyError("inner")

    monkeypatch.setattr(launch, "_run", broken)
    arguments = ["launch", f"--config={CONFIGS / 'quickstart.py'}"]
    assert launch.main(arguments) == failures.BUG
    error = capsys.readouterr().err
    assert "this is a bug of specjax. Please report it with what --debug prints." in error
    assert error.count("\n") == 1
    assert launch.main([*arguments, "--debug"]) == failures.BUG
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "words", "code"),
    [
        (MemoryError(), "Out of memory (MemoryError): lower --config.batch_size", 1),
        (RuntimeError("RESOURCE_EXHAUSTED: 3 GB"), "Out of memory", 1),
        (OSError(28, "No space left on device", "x.json"), "The disk is full", 1),
        (ModuleNotFoundError("No module named 'optax'", name="optax"), "The package optax is missing", 1),
        (ModuleNotFoundError("No module named 'specjax.x'", name="specjax.x"), "this is a bug", 2),
        (PermissionError(13, "Permission denied", "x"), "Permission denied: 'x'", 1),
        (FloatingPointError("not numbers"), "not numbers", 1),
        (ValueError("from elsewhere"), "ValueError: from elsewhere (--debug shows where it comes from)", 1),
        (RecursionError("too deep"), "this is a bug", 2),
        (IndexError(), "IndexError: this is a bug", 2),
    ],
)
def test_failures_are_explained(error: Exception, words: str, code: int):
    text, exit_code = failures.explain(error)
    assert words in text
    assert exit_code == code


def test_an_error_of_a_library_is_not_ours_where_the_clone_is_called_specjax():
    code = compile("raise ValueError('bad')", "/home/me/specjax/.venv/lib/library.py", "exec")
    with pytest.raises(ValueError, match="bad") as caught:
        exec(code)
    assert failures.explain(caught.value)[0].startswith("ValueError: bad (--debug")


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "Interrupted"), (signal.SIGTERM, 143, "Terminated")]
)
def test_a_signal_ends_in_one_line(number: int, code: int, word: str, folder, monkeypatch, capsys):
    before = signal.signal(number, launch._stop)
    monkeypatch.setattr(launch, "_run", lambda *args: os.kill(os.getpid(), number))
    try:
        assert launch.main(["launch", f"--config={CONFIGS / 'quickstart.py'}"]) == code
    finally:
        signal.signal(number, before)
    error = capsys.readouterr().err
    assert re.fullmatch(
        rf"{word}: no row was finished in runs/quickstart-\w{{8}}/; the same command continues.", error.strip()
    )


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.py")), ids=lambda path: str(path.relative_to(CONFIGS)))
def test_help_explains_every_key(path: pathlib.Path):
    argument = ":1" if path.parts[-2:] == ("leviathan", "experiment.py") else ""
    _, config = launch.parse(["launch", f"--config={path}{argument}"])
    assert config is not None
    shown = keys.describe(config, path)
    known = keys.flatten(config)
    assert [line.partition("=")[0].strip() for line in shown[::2]] == [f"--config.{key}" for key in known]
    bare = {key.rpartition(".")[2] for key, line in zip(known, shown[1::2], strict=True) if ". " not in line}
    assert bare <= {"experiment"}


def test_help_names_choices(capsys):
    assert launch.main(["launch", f"--config={CONFIGS / 'compare.py'}", "--help"]) == 0
    output = capsys.readouterr().out
    assert "--config.drafter='ngram'\n      a string. model, ngram, suffix, aggressive" in output
    assert "Exact: rejection, block, coupled" in output
    assert "lenient:0.3, typical:0.09,0.3" in output


def test_sampling_options_of_a_config_are_those_that_are_checked():
    _, config = launch.parse(["launch", f"--config={CONFIGS / 'compare.py'}"])
    assert config is not None
    assert set(results.SAMPLING) <= set(config)
