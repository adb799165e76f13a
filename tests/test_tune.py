"""Policies replayed over traces, the oracle, and the command that chooses what pays."""

import ast
import inspect
import json
import re
import types
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import save_tiny_decoder

import specjax
from specjax import drafters, launch, metrics
from specjax.api import prepare
from specjax.experiments import drafting, policies, traces, tune, tuned
from specjax.experiments.policies import Costs, Policy, Programs
from specjax.experiments.reports import tune as report
from specjax.experiments.traces import Trace
from specjax.experiments.tuned import Tuned
from specjax.types import Batch

DEPTH = 5


def costs(draft: float, scores: list[float]) -> Costs:
    return Costs(jnp.arange(len(scores) + 1) * draft, jnp.asarray([1.0, *scores]))


def trace(matched: Sequence[int] | np.ndarray, confidence: np.ndarray | None = None) -> Trace:
    """A text in which so many drafted tokens are right at each position, as far as the text goes."""
    right = np.minimum(matched, len(matched) - 1 - np.arange(len(matched)))
    confidence = np.ones((len(matched), DEPTH)) if confidence is None else confidence
    return Trace(np.zeros(len(matched), int), np.full(len(matched), DEPTH), np.maximum(right, 0), confidence)


def programs(costs: Costs) -> Programs:
    """A program for every number of draft tokens."""
    return policies.in_lengths(costs, tuple(range(1, DEPTH)), DEPTH)


@pytest.fixture(scope="module")
def texts() -> list[Trace]:
    rng = np.random.default_rng(0)
    return [trace(rng.geometric(1 - alpha, 120) - 1) for alpha in (0.1, 0.5, 0.9)]


COSTS = costs(0.05, [1.1, 1.1, 1.1, 1.6, 1.6])
EACH = programs(COSTS)


def test_a_replay_adds_up_the_steps():
    # Positions 0, then 3 (two accepted), then 4 (none), then 5: the end, where nothing fits.
    found = policies.replay(policies.fixed(2), [trace([2, 0, 0, 0, 5, 5])], EACH)
    assert found.longest == 6
    assert found.steps == [3]
    assert found.drafted == [2 + 2 + 1]
    # The last step has room for one draft token, which is right, and the token after it.
    assert found.time == pytest.approx(2 * (0.1 + 1.1) + 0.05 + 1.1)
    assert policies.replay(policies.fixed(0), [trace([2] * 9)], EACH).time == 9


def test_a_step_of_a_batch_costs_what_its_longest_row_asks_for():
    # The first row drafts 2 and has both accepted twice; the second drafts 2, 2, 2, 1, 0, of which none is.
    found = policies.replay(policies.fixed(2), [trace([2, 0, 0, 2, 0, 0]), trace([0] * 5)], EACH)
    assert found.steps.tolist() == [2, 5]
    assert found.drafted.tolist() == [4, 2 + 2 + 2 + 1]
    assert found.longest == 6
    assert found.time == pytest.approx(3 * (0.1 + 1.1) + (0.05 + 1.1) + 1)
    # A draft that one row has to end goes on for the other, whose call the step pays for.
    unsure = np.full((5, DEPTH), 0.1)
    texts = [trace([0] * 5, unsure), trace([0] * 5)]
    policy = policies.confident(policies.fixed(4), 0.5)
    found = policies.replay(policy, texts, EACH)
    assert found.time == pytest.approx(sum(float(COSTS.step[k]) for k in (4, 3, 2, 1, 0)))
    alone = policies.replay(policy, texts[:1], EACH)
    assert alone.time == pytest.approx(4 * float(COSTS.step[1]) + 1)


def test_a_threshold_pays_for_the_call_that_found_the_draft_unsure():
    confidence = np.tile([0.9, 0.4, 0.9, 0.9, 0.9], (4, 1))
    policy = policies.confident(policies.fixed(DEPTH), 0.5)
    # The token at the place where the draft is unsure is proposed too, and here accepted: two, then the target's own.
    found = policies.replay(policy, [trace([3, 0, 0, 0], confidence)], EACH)
    assert found.steps == [2]
    assert found.time == pytest.approx(float(COSTS.step[2]) + 1)
    # The program that scores has one length, and drafting so many calls as were made.
    found = policies.replay(policy, [trace([3, 0, 0, 0], confidence)], policies.in_lengths(COSTS, (), DEPTH))
    assert found.time == pytest.approx(2 * 0.05 + 1.6 + 1)


def test_groups_are_filled_up():
    some = [trace([0] * size) for size in range(1, 6)]
    lengths = [[len(text.text) for text in texts] for texts in policies.groups(some, 2)]
    assert lengths == [[1, 2], [3, 4], [5, 1]]
    assert [len(texts) for texts in policies.groups(some[:1], 3)] == [3]


@pytest.mark.parametrize(
    "policy",
    [policies.fixed(3), policies.plus_two_minus_one(), policies.expected_value(), policies.draft_and_verify(DEPTH)],
)
def test_nothing_is_faster_than_the_oracle(policy: Policy, texts: list[Trace]):
    for batch in ([texts[0]], [texts[1]], texts):
        least = policies.oracle(batch, EACH)
        assert policies.replay(policy, batch, EACH).time >= least - 1e-3
        assert least <= 120


def test_the_oracle_finds_the_least_time_of_all_ways():
    rng = np.random.default_rng(1)
    for _ in range(20):
        text = trace(rng.integers(0, 3, 7))

        def least(at: int, text: Trace = text) -> float:
            if at == len(text.matched):
                return 0.0
            ways = range(min(int(text.matched[at]), len(text.matched) - at - 1) + 1)
            return min(float(COSTS.step[k]) + least(at + k + 1) for k in ways)

        assert policies.oracle([text], EACH) == pytest.approx(least(0), rel=1e-5)


def test_the_loops_choice_beats_every_fixed_number_where_texts_differ(texts: list[Trace]):
    def time(policy: Policy) -> float:
        return sum(policies.replay(policy, [text], EACH).time for text in texts)

    own = time(policies.expected_value())
    assert own < min(time(policies.fixed(k)) for k in range(DEPTH + 1))
    assert own < time(policies.plus_two_minus_one())
    # Long drafts where they are right, short ones where they are not.
    drafted = [policies.replay(policies.expected_value(), [text], EACH) for text in texts]
    means = [found.drafted[0] / found.steps[0] for found in drafted]
    assert means[0] < means[1] < means[2]


def test_rows_of_a_batch_choose_together(texts: list[Trace]):
    """As the loop does; each for itself, the row whose drafts are right makes all others wait."""
    batch, expensive = (
        [texts[0]] * 3 + [texts[2]],
        policies.in_lengths(COSTS._replace(score=2 * COSTS.score), (), DEPTH),
    )
    together = policies.replay(policies.expected_value(), batch, expensive)
    alone = policies.replay(policies.expected_value()._replace(together=None), batch, expensive)
    assert together.time < 0.95 * alone.time
    # Of one text both are the same.
    for text in texts:
        one = policies.replay(policies.expected_value(), [text], EACH)
        assert one.time == pytest.approx(
            policies.replay(policies.expected_value()._replace(together=None), [text], EACH).time, rel=0.02
        )


def test_in_lengths_a_step_costs_what_its_program_costs():
    used = policies.in_lengths(COSTS, (2,), 4)
    assert np.asarray(used.costs.score).tolist()[:5] == pytest.approx([1.0, 1.1, 1.1, 1.6, 1.6])
    assert np.asarray(used.costs.draft).tolist()[:5] == pytest.approx([0.0, 0.1, 0.1, 0.2, 0.2])
    assert np.asarray(used.calls).tolist() == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2, 0.25])
    assert float(used.costs.score[5]) > 1e5


def test_the_best_chain_has_the_lengths_that_pay(texts: list[Trace]):
    one = policies.groups(texts, 1)
    k, lengths, speedup = tune.best_chain(one, costs(0.0, [1.1, 1.1, 1.1, 2.2, 2.2]))
    assert 3 in (*lengths, k)
    assert speedup > 1
    # Scoring is free: the longest, and no program but that.
    assert tune.best_chain(one, costs(0.0, [1.0] * DEPTH))[:2] == (DEPTH, ())
    # Nothing pays.
    assert tune.best_chain(one[:1], costs(1.0, [2.0] * DEPTH))[0] == 0
    # Side by side, rows with poor drafts pay for those of the others.
    assert tune.best_chain([texts], COSTS)[2] < max(tune.best_chain([[text]], COSTS)[2] for text in texts)


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
    own = drafters.model(target, num_draft_tokens=3, min_confidence=traces.LEAST_CONFIDENCE)
    [right] = traces.record(target, [[1, 2, 3, 1, 2, 3, 1, 2]], own, max_new_tokens=12)
    assert right.matched.tolist() == right.proposed.tolist() == [3] * 9 + [2, 1, 0]
    # It is as confident as the target is of its most probable token; n-grams do not say.
    whole = jnp.asarray([[1, 2, 3, 1, 2, 3, 1, 2, *plain]])
    ones = jnp.ones_like(whole)
    batch = Batch(whole, whole, ones, jnp.arange(20)[None], ones.astype(jnp.float32), None, None)
    assert target.model.score is not None
    sure = np.asarray(jax.nn.softmax(target.model.score(target.params, batch))).max(axis=-1)[0, 7:]
    for position in range(3):
        np.testing.assert_allclose(right.confidence[:9, position], sure[position : position + 9], rtol=1e-4)
    assert (found.confidence == 1).all()
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


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["moving", "fixed"])
def test_a_replay_takes_the_steps_of_the_loop(kind: str, tmp_path):
    """Two rows side by side, whose drafts a threshold ends."""
    target = specjax.load(save_tiny_decoder(tmp_path / "target", 0, num_layers=2))
    prompts, k = [[1, 2, 3, 1, 2, 3], [4, 5, 4]], 3
    options: dict[str, Any] = {"max_new_tokens": 24, "stop_tokens": ()}
    recorded = drafters.early_exit(target, 1, num_draft_tokens=k, min_confidence=traces.LEAST_CONFIDENCE)
    batch = traces.record(target, prompts, recorded, **options)
    seen = np.concatenate([found.confidence[found.proposed == k] for found in batch])
    middle = float(np.median(seen))
    assert seen.min() < middle < seen.max() < 1
    always = policies.fixed(k)
    moves = kind == "moving"
    drafter = drafters.early_exit(target, 1, num_draft_tokens=k, min_confidence=middle, adaptive=moves)
    policy = policies.draft_and_verify(k, middle) if moves else policies.confident(always, middle)
    found = specjax.generate(target, prompts, drafter=drafter, step_cost=0.0, **options)
    one_each = policies.in_lengths(costs(0.1, [1.0] * k), (1, 2), k)
    replayed = policies.replay(policy, batch, one_each)
    assert replayed.steps.tolist() == [row.target_calls for row in found.row_stats]
    # The threshold costs steps, or this would show nothing.
    assert replayed.steps.sum() > policies.replay(always, batch, one_each).steps.sum()


def test_each_length_is_timed_with_so_many_drafts(tmp_path):
    target = specjax.load(save_tiny_decoder(tmp_path / "target", 0))
    plain, seen = drafters.ngram(num_draft_tokens=3, lengths=(1,)), set()

    def propose(params: Any, state: Any, cache: Any, context: Any) -> Any:
        jax.debug.callback(lambda most: seen.add(int(most.max())), context.max_draft)
        return plain.propose(params, state, cache, context)

    request = prepare(target, [[1, 2, 3, 1, 2]], drafter=plain._replace(propose=propose), max_new_tokens=8)
    metrics.measure_costs(request.target.model, request.drafter, request.params, request.state, calls=1, repeats=1)
    jax.effects_barrier()
    assert seen == {1, 3}


@pytest.mark.parametrize("name", [name for name, entry in drafting.DRAFTERS.items() if entry.lengths])
def test_a_choice_is_shown_as_a_call_that_the_library_has(name: str):
    found = Tuned(7, (3,), (1.1,) * 7, (), 1.3)
    call = ast.parse(report._call(types.SimpleNamespace(drafter=name), found), mode="eval").body
    assert isinstance(call, ast.Call)
    assert ast.unparse(call.func) == f"specjax.drafters.{name}"
    given = {str(keyword.arg): None for keyword in call.keywords}
    inspect.signature(getattr(drafters, name)).bind(*call.args, **given)
    assert "num_draft_tokens=7, lengths=(3,)" in ast.unparse(call)


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
    flags = [
        "--config.drafter=model",
        f"--config.draft={files[0]}",
        "--config.thresholds=(0.5,)",
        "--config.batch_sizes=(2,)",
    ]
    assert launch.main(command(files, tmp_path / "run", "--config.num_draft_tokens=3", *flags)) == 0, (
        capfd.readouterr().err
    )
    [row] = json.loads((tmp_path / "run" / "results.json").read_text())
    names = [kind["policy"] for kind in row["policies"]]
    assert {"always 3, confidence 0.5", "always 3, confidence of Draft & Verify"} <= {*names}
    assert min(kind["regret"] for kind in row["policies"]) > -1e-6
    assert row["acceptance_by_rank"] == []  # Too few texts for it.


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
    chosen = types.SimpleNamespace(
        **names,
        target_quantise="",
        draft_quantise="",
        skip_attention=(),
        skip_mlp=(),
        exit_layer=1,
        num_fallback_tokens=1,
    )
    path = tuned.save(chosen, 1, tuned.Tuned(3, (1,), (1.0, 1.1, 1.2), (), 1.5))
    assert tuned.load(chosen, 1) == tuned.Tuned(3, (1,), (1.0, 1.1, 1.2), (), 1.5)
    path.write_text("{}")
    with pytest.raises(ValueError, match="is broken"):
        tuned.load(chosen, 1)
    assert jax.device_count()  # Choices are kept by device.
