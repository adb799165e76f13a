"""Policies replayed over traces, the oracle, and the command that chooses what pays."""

import json
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import save_tiny_decoder

import specjax
from specjax import drafters, launch
from specjax.experiments import policies, traces, tune, tuned
from specjax.experiments.policies import Costs, Policy
from specjax.experiments.traces import Trace

DEPTH = 5


def costs(draft: float, scores: list[float]) -> Costs:
    return Costs(jnp.arange(len(scores) + 1) * draft, jnp.asarray([1.0, *scores]))


def trace(matched: Sequence[int] | np.ndarray, proposed: int = DEPTH) -> Trace:
    """A text in which so many drafted tokens are right at each position, as far as the text goes."""
    right = np.minimum(matched, len(matched) - 1 - np.arange(len(matched)))
    return Trace(np.zeros(len(matched), int), np.full(len(matched), proposed), np.maximum(right, 0))


@pytest.fixture(scope="module")
def texts() -> list[Trace]:
    rng = np.random.default_rng(0)
    return [trace(rng.geometric(1 - alpha, 120) - 1) for alpha in (0.1, 0.5, 0.9)]


COSTS = costs(0.05, [1.1, 1.1, 1.1, 1.6, 1.6])


def test_a_replay_adds_up_the_steps():
    # Positions 0, then 3 (two accepted), then 4 (none), then 5: the end, where nothing fits.
    found = policies.replay(policies.fixed(2), trace([2, 0, 0, 0, 5, 5]), COSTS)
    assert found.num_tokens == 6
    assert found.steps == 3
    assert found.wanted == 2 + 2 + 1
    # The last step has room for one draft token, which is right, and the token after it.
    assert found.time == pytest.approx(2 * (0.1 + 1.1) + 0.05 + 1.1)
    assert policies.replay(policies.fixed(0), trace([2] * 9), COSTS).time == 9


@pytest.mark.parametrize("policy", [policies.fixed(3), policies.plus_two_minus_one(), policies.expected_value()])
def test_nothing_is_faster_than_the_oracle(policy: Policy, texts: list[Trace]):
    for text in texts:
        least = policies.oracle(text, COSTS)
        assert policies.replay(policy, text, COSTS).time >= least.time - 1e-3
        assert least.time <= least.num_tokens


def test_the_oracle_finds_the_least_time_of_all_ways():
    rng = np.random.default_rng(1)
    for _ in range(20):
        text = trace(rng.integers(0, 3, 7))

        def least(at: int, text: Trace = text) -> float:
            if at == len(text.matched):
                return 0.0
            ways = range(min(int(text.matched[at]), len(text.matched) - at - 1) + 1)
            return min(float(COSTS.step[k]) + least(at + k + 1) for k in ways)

        assert policies.oracle(text, COSTS).time == pytest.approx(least(0), rel=1e-5)


def test_the_loops_choice_beats_every_fixed_number_where_texts_differ(texts: list[Trace]):
    def time(policy: Policy) -> float:
        return sum(policies.replay(policy, text, COSTS).time for text in texts)

    own = time(policies.expected_value())
    assert own < min(time(policies.fixed(k)) for k in range(DEPTH + 1))
    assert own < time(policies.plus_two_minus_one())
    # Long drafts where they are right, short ones where they are not.
    drafted = [policies.replay(policies.expected_value(), text, COSTS) for text in texts]
    means = [found.wanted / found.steps for found in drafted]
    assert means[0] < means[1] < means[2]


def test_in_lengths_a_step_costs_what_its_program_costs():
    used = policies.in_lengths(COSTS, (2,), 4)
    assert np.asarray(used.score).tolist()[:5] == pytest.approx([1.0, 1.1, 1.1, 1.6, 1.6])
    assert np.asarray(used.draft).tolist()[:5] == pytest.approx([0.0, 0.1, 0.1, 0.2, 0.2])
    assert float(used.score[5]) > 1e5


def test_the_best_chain_has_the_lengths_that_pay(texts: list[Trace]):
    k, lengths, speedup = tune.best_chain(texts, costs(0.0, [1.1, 1.1, 1.1, 2.2, 2.2]))
    assert 3 in (*lengths, k)
    assert speedup > 1
    # Scoring is free: the longest, and no program but that.
    assert tune.best_chain(texts, costs(0.0, [1.0] * DEPTH))[:2] == (DEPTH, ())
    # Nothing pays.
    assert tune.best_chain(texts[:1], costs(1.0, [2.0] * DEPTH))[0] == 0


def test_acceptance_by_rank_counts_the_ranks_of_tokens_after_good_ones():
    found = [np.array([0, 1, 9, 0] * 10)]
    first, second, *_ = tune.acceptance_by_rank(found, num_ranks=2, depth=2)
    assert first == pytest.approx([0.5, 0.25])
    # After a 9, which no tree of two ranks has, nothing is judged.
    assert second == pytest.approx([9 / 29, 10 / 29])


def test_a_trace_says_what_a_drafter_proposes_and_how_much_is_right(tmp_path):
    target = specjax.load(save_tiny_decoder(tmp_path / "target", 0))
    [found] = traces.record(target, [[1, 2, 3, 1, 2, 3, 1, 2]], drafters.ngram(num_draft_tokens=3), max_new_tokens=12)
    plain = specjax.generate(target, [[1, 2, 3, 1, 2, 3, 1, 2]], max_new_tokens=12).tokens[0]
    assert found.text.tolist() == plain
    assert found.proposed[0] == 3
    # A model that drafts for itself is right everywhere.
    own = drafters.model(target, num_draft_tokens=3)
    [right] = traces.record(target, [[1, 2, 3, 1, 2, 3, 1, 2]], own, max_new_tokens=12)
    assert right.matched.tolist() == right.proposed.tolist() == [3] * 9 + [2, 1, 0]
    # Nothing that a trace is recorded of is accepted, and yet all K tokens are asked for, up to the end of the text.
    chosen = drafters.ngram(num_draft_tokens=20, min_match=1)
    [longer] = traces.record(target, [[1, 2, 3, 1, 2, 3, 1, 2]], chosen, max_new_tokens=40)
    has_some = np.flatnonzero(longer.proposed[:19])
    assert len(has_some) > 5
    assert (longer.proposed[has_some] == 20).all()
    assert found.matched[0] == int(np.cumprod(np.array([3, 1, 2]) == plain[:3]).sum())
    assert (found.matched <= found.proposed).all()
    with pytest.raises(ValueError, match="a drafter of chains"):
        traces.record(target, [[1, 2]], drafters.ngram(num_draft_tokens=4, depth=2), max_new_tokens=2)


def test_ranks_are_those_of_the_draft(tmp_path):
    draft = specjax.load(save_tiny_decoder(tmp_path / "draft", 1))
    text = np.array(specjax.generate(draft, [[1, 2, 3]], max_new_tokens=9).tokens[0])
    assert (tune.ranks(draft.model, draft.params, np.concatenate([[1, 2, 3], text]), 3) == 0).all()


def command(files, workdir, *flags: str, config: str = "tune") -> list[str]:
    target, data = files
    place = [f"--config.target={target}", f"--config.data={data}", f"--workdir={workdir}", "--nocompilation_cache"]
    return ["launch", f"--config=configs/{config}.py", *place, "--config.max_new_tokens=8", *flags]


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setenv("SPECJAX_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "the cat sat on the mat", "category": "a"}, {"prompt": "who was there", "category": "b"}]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return save_tiny_decoder(tmp_path / "target", 0), data


@pytest.mark.budget(60)
def test_the_command_chooses_and_later_runs_find_the_choice(files, tmp_path, capfd):
    few = ["--config.num_draft_tokens=3"]
    before = command(files, tmp_path / "before", "--config.tuned=True", config="compare")
    assert launch.main(before) == 1
    assert "nothing was tuned on this machine for batch 1: run --config=configs/tune.py" in capfd.readouterr().err
    assert launch.main(command(files, tmp_path / "run", *few)) == 0, capfd.readouterr().err
    [row] = json.loads((tmp_path / "run" / "results.json").read_text())
    assert [kind["task"] for kind in row["categories"]] == ["a", "b"]
    assert min(kind["regret"] for kind in row["policies"]) > -1e-6
    page = (tmp_path / "run" / "summary.md").read_text()
    assert "| +2 / -1 |" in page
    assert "| oracle |" in page
    assert (tmp_path / "run" / "tune.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "run" / tune.FILE).read_text()) == [row["tuned"]]
    # It is resumed from what it has measured.
    assert launch.main(command(files, tmp_path / "run", *few)) == 0
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == [row]
    assert launch.main(command(files, tmp_path / "compare", "--config.tuned=True", config="compare")) == 0
    assert "As tuned: " in capfd.readouterr().out


@pytest.mark.slow
def test_the_command_finds_trees_for_a_draft_model(files, tmp_path, capfd):
    flags = ["--config.drafter=model", f"--config.draft={files[0]}", "--config.thresholds=(0.5,)"]
    assert launch.main(command(files, tmp_path / "run", "--config.num_draft_tokens=3", *flags)) == 0, (
        capfd.readouterr().err
    )
    [row] = json.loads((tmp_path / "run" / "results.json").read_text())
    assert "always 3, confidence 0.5" in [kind["policy"] for kind in row["policies"]]


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.drafter=model --config.draft=x --config.topology=(2,)", "this run finds the tree"),
        ("--config.num_draft_tokens=0", "num_draft_tokens=0: the most to try"),
        ("--config.drafter=jacobi", "has no chains of several lengths: choose from model, ngram"),
        ("--config.thresholds=(0.5,)", "drafter=ngram has no confidence"),
        ("--config.batch_sizes=(0,)", "batch_sizes=\\(0,\\)"),
    ],
)
def test_wrong_values_are_refused(flag, message, files, tmp_path, capfd):
    assert launch.main(command(files, tmp_path / "run", *flag.split())) == 1
    assert re.search(message, capfd.readouterr().err)


def test_a_broken_choice_is_named(files, tmp_path, monkeypatch):
    names = {"target": "t", "drafter": "ngram", "draft": "", "dtype": "float32"}
    chosen = type("Chosen", (), names | {"target_quantise": "", "draft_quantise": ""})
    path = tuned.save(chosen, 1, tuned.Tuned(3, (1,), (1.0, 1.1, 1.2), (), 1.5))
    assert tuned.load(chosen, 1) == tuned.Tuned(3, (1,), (1.0, 1.1, 1.2), (), 1.5)
    path.write_text("{}")
    with pytest.raises(ValueError, match="is broken"):
        tuned.load(chosen, 1)
    assert jax.device_count()  # Choices are kept by device.
