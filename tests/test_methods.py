"""Every drafter on the same prompts: the command, its table, and what is computed beside what is measured."""

import json

import pytest
from helpers import save_tiny_decoder

from specjax import launch
from specjax.api import pretrained
from specjax.experiments import drafting, methods
from specjax.experiments.reports import methods as report
from specjax.types import Skips

PROMPTS = [
    {"prompt": "the cat sat on the mat", "category": "a"},
    {"prompt": "the dog ran", "category": "a"},
    {"prompt": "who was there", "category": "b"},
]


ONE_CALL = ("pard", "nonautoregressive")


def command(target, data, workdir, *flags):
    few = ["--config.max_new_tokens=8", "--config.temperatures=(0.0,)", "--nocompilation_cache"]
    place = [f"--config.target={target}", f"--config.data={data}", f"--workdir={workdir}"]
    return ["launch", "--config=configs/methods.py", *place, *few, *flags]


@pytest.fixture
def files(tmp_path):
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in PROMPTS))
    return save_tiny_decoder(tmp_path / "target", 0), data, tmp_path / "run"


@pytest.mark.budget(60)
@pytest.mark.parametrize(
    ("names", "measured"),
    [
        (("mask_tokens",), ["mask_tokens"]),
        pytest.param(
            ("ngram", "jacobi", "lookahead"),
            ["ngram", "jacobi", "lookahead", "jacobi + ngram", "lookahead + ngram"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_drafters_are_measured_once_and_shown(names, measured, files, capfd):
    target, data, workdir = files
    flags = [f"--config.drafters={names!r}", "--config.mask_token=3"]
    assert launch.main(command(target, data, workdir, *flags)) == 0, capfd.readouterr().err
    rows = json.loads((workdir / "results.json").read_text())
    assert [row["drafter"] for row in rows] == measured
    assert all(row["identical"] == 1.0 and row["num_prompts"] == 2 for row in rows)
    assert all(0 < row["bandwidth_speedup"] <= row["block_efficiency"] + 1e-6 for row in rows)
    page = (workdir / "summary.md").read_text()
    assert "## Temperature 0" in page
    assert all(f"| {name} |" in page for name in measured)
    assert (workdir / "methods.png").stat().st_size > 10_000
    assert f"{len(measured)} measurements of 2 prompts; 0 are finished." in capfd.readouterr().out
    assert launch.main(command(target, data, workdir, *flags)) == 0
    assert f"{len(measured)} measurements of 2 prompts; {len(measured)} are finished." in capfd.readouterr().out
    assert json.loads((workdir / "results.json").read_text()) == rows


def test_a_target_without_layers_to_skip_is_named(files, capfd):
    target, data, workdir = files
    assert launch.main(command(target, data, workdir, "--config.drafters=('skip', 'ngram')")) == 1
    assert "skip need a target of two layers or more" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.drafters=('magic',)", "choose from ngram, ngram tree"),
        ("--config.drafters=('model',)", "needs a draft model: give --config.draft=SOURCE"),
        ("--config.drafters=('feature_head',)", "needs a trained head: give --config.head=NAME or PATH"),
        ("--config.drafters=('eagle',)", "needs heads: give --config.eagle=PATH"),
        ("--config.head=nowhere", "nowhere does not exist: give a directory, or the name of a trained head"),
        ("--config.skips=nowhere", "nowhere/skips.json does not exist"),
        ("--config.exit_share=1.0", "exit_share=1.0: between 0 and 1"),
    ],
)
def test_mistakes_are_named_before_anything_is_loaded(flag, message, tmp_path, capfd):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "x"}\n')
    assert launch.main(command("nowhere", tmp_path / "prompts.jsonl", tmp_path / "run", flag)) == 1
    assert message in capfd.readouterr().err


def test_a_draft_token_reads_the_share_of_the_weights_that_is_kept(files):
    side = methods.Side(None, pretrained.load(files[0]), None)  # pyright: ignore[reportArgumentType]
    assert methods._kept(side, Skips()) == 1.0
    attention, mlp = methods._kept(side, Skips((0,))), methods._kept(side, Skips(mlp=(0,)))
    assert 0 < attention < 1
    assert 0 < mlp < 1
    assert methods._kept(side, Skips((0,), (0,))) == pytest.approx(attention + mlp - 1)
    row = {"draft_steps": 10, "num_tokens": 30, "target_calls": 12}
    assert report.with_roofline(row, 0.0)["bandwidth_speedup"] == 2.5
    assert report.with_roofline(row, 2.0)["bandwidth_speedup"] == 30 / 32


def test_every_drafter_of_the_flags_is_in_the_table():
    """But for those whose drafts are counted in a corpus or were trained to draft in one call, and plain decoding."""
    named = {name.split(",")[0].removesuffix(" tree") for name in methods.METHODS}
    assert named == set(drafting.DRAFTERS) - {"merged", "table", "retrieval", "none", *ONE_CALL}
