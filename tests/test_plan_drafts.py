"""Plans of drafts that are no chain of a model: EAGLE heads, parallel heads, masks, trees; what they cost and gain."""

import dataclasses
import json
import pathlib
from typing import Any

import pytest

from specjax import drafters, launch, theory
from specjax.experiments import plan_drafts
from specjax.models import eagle, presets
from specjax.models.config import DecoderConfig
from specjax.models.eagle import EagleConfig
from specjax.models.parallel_heads import ParallelHeadsConfig
from specjax.planning import aot, chips, kinds, plan
from specjax.planning.kinds import Reads, Step

ROOT = pathlib.Path(__file__).parents[1]
D, KNOWN, LAYERS = 512, 256, 4

TARGET = DecoderConfig(1024, D, 1024, LAYERS, 8, 4, 128, 4096, dtype="bfloat16")
HEAD = eagle.like(TARGET, (1, 2, 4), KNOWN)
MEDUSA = ParallelHeadsConfig("medusa", 3, D, dtype="bfloat16")
TREE = drafters.Dynamic(width=3, depth=4, num_nodes=10)

DRAFTS: dict[str, tuple[kinds.Kind, Any, int]] = {
    "eagle": (kinds.eagle(), HEAD, 3),
    "eagle tree": (kinds.eagle(TREE), HEAD, 10),
    "eagle of all tokens": (kinds.eagle(), eagle.like(TARGET, (1, 2, 4)), 3),
    "eagle 1": (kinds.eagle(), eagle.like(TARGET, (4,), version=1), 3),
    "medusa": (kinds.PARALLEL_HEADS, MEDUSA, 3),
    "pard": (kinds.PARD, dataclasses.replace(TARGET, num_layers=2), 3),
    "tree of a model": (kinds.model(TREE), dataclasses.replace(TARGET, num_layers=2), 10),
    "masks": (kinds.MASKS, None, 3),
    "fused masks": (kinds.FUSED_MASKS, None, 3),
}


def setup_of(name: str, topology: str = "v5e:2x2", **values: Any) -> plan.Setup:
    kind, draft, k = DRAFTS[name]
    rest: dict[str, Any] = {"num_draft_tokens": k, "prompt_tokens": 16, "max_new_tokens": 32} | values
    return plan.Setup(TARGET, draft, chips.parse(topology), kind=kind, **rest)


def test_the_calls_of_a_step():
    """What each way to draft reads in a step of three tokens, or of a tree of ten nodes."""
    found = {name: setup_of(name).step for name in DRAFTS}
    head = Step((Reads("first draft", 4), Reads("draft", 1, 2)), 4)
    assert found == {
        "eagle": head,
        "eagle of all tokens": head,
        "eagle 1": head,
        "eagle tree": Step((Reads("first draft", 5), Reads("draft", 3, 3)), 11),
        "medusa": Step((Reads("draft", 1),), 4),
        "pard": Step((Reads("draft", 6),), 4),
        "tree of a model": Step((Reads("draft", 5), Reads("draft", 3, 3)), 11),
        "masks": Step((Reads("target", 3),), 4),
        "fused masks": Step((), 16),
    }
    assert kinds.eagle().step(HEAD, 1) == Step((Reads("first draft", 2),), 2)
    assert kinds.MODEL.step(TARGET, 3) == Step((Reads("draft", 1, 3),), 4)


@pytest.mark.parametrize("name", DRAFTS)
def test_the_steps_that_are_planned_are_those_of_the_drafters(name: str):
    setup = setup_of(name)
    topology = plan.shard(setup, plan.abstract_mesh(setup)).drafter.topology
    assert topology.num_read + 1 == setup.step.scored
    assert topology.num_nodes == setup.num_draft_tokens


@pytest.mark.parametrize("name", ["eagle", "eagle tree", "medusa", "fused masks"])
def test_memory_is_that_of_the_arguments_of_the_step(name: str):
    setup = setup_of(name, batch_size=4, data=2)
    placed, memory = plan.shard(setup, plan.abstract_mesh(setup)), plan.memory(setup)
    assert sum(memory) == plan.local_bytes((placed.params, placed.state))
    assert (memory.draft_parameters > 0) == (name != "fused masks")


@pytest.mark.parametrize("tokens", [1, 5])
def test_the_cost_of_a_heads_calls_is_the_closed_form(tokens: int):
    setup, rows, devices = setup_of("eagle", batch_size=2), 2, 4
    first, draft = (plan.call_cost(setup, name)(tokens) for name in ("first draft", "draft"))
    c = TARGET
    attention = 2 * D * c.head_dim * (c.num_heads + 2 * c.num_kv_heads) + D * c.head_dim * c.num_heads
    layer, head = attention + 3 * D * c.intermediate_size, D * KNOWN
    scores = 2 * 2 * c.num_heads * c.head_dim * setup.buffer
    # The norms, and where each of the target's tokens is among those of the head.
    others = 2 * 4 * D + 4 * c.vocab_size
    assert draft.parameter_bytes == pytest.approx(2 * (layer + head) / devices + others, rel=1e-3)
    # What maps the three hidden states to one is whole on each device.
    assert first.parameter_bytes - draft.parameter_bytes == 2 * 3 * D * D
    assert draft.flops == pytest.approx(rows * tokens * (2 * (layer + head) + scores) / devices, rel=1e-3)
    # The first call makes the logits of one token alone.
    wanted = 2 * rows * (tokens * 3 * D * D - (tokens - 1) * head / devices)
    assert first.flops - draft.flops == pytest.approx(wanted, rel=1e-3)
    cache, states = 2 * rows * c.num_kv_heads * setup.buffer * c.head_dim * 2, 4 * rows * 2 * D
    assert draft.cache_bytes == pytest.approx(cache / devices + states, rel=1e-3)
    # After attention, after the feed-forward, and the lookup in the target's split table.
    assert (draft.all_reduces, first.all_reduces) == (3, 3)


def test_a_head_without_an_output_matrix_reads_the_targets():
    whole, borrowed = (plan.call_cost(setup_of(name), "draft")(1) for name in ("eagle of all tokens", "eagle 1"))
    attention = D * TARGET.head_dim * (TARGET.num_heads + 2 * TARGET.num_kv_heads)
    fc = 2 * D * D
    assert borrowed.parameter_bytes - whole.parameter_bytes == pytest.approx(2 * (fc - attention / 4), rel=0.01)


def test_heads_are_all_computed_and_masks_cost_calls_of_the_target():
    setup = setup_of("medusa")
    one, five = (plan.call_cost(setup, "draft")(tokens) for tokens in (1, 5))
    assert one[:3] == five[:3], "heads read one hidden state, however many tokens were committed"
    assert one.parameter_bytes == pytest.approx(2 * (3 * D * D + D * TARGET.vocab_size) / 4, rel=0.02)
    masks = setup_of("masks")
    target = plan.call_cost(masks, "target")
    times = plan.step_times(masks)
    assert times.drafting == plan.times(masks, target(3)).total
    assert times.scoring == plan.times(masks, target(4)).total


def test_what_a_step_takes_and_gains():
    setup = setup_of("eagle")
    times, costs = plan.step_times(setup), plan.costs(setup)
    seconds = {name: plan.times(setup, costs[name](tokens)).total for name, tokens in (("draft", 1), ("target", 1))}
    first = plan.times(setup, costs["first draft"](4)).total
    assert times.plain == seconds["target"]
    assert times.drafting == pytest.approx(first + 2 * seconds["draft"])
    assert times.total == times.drafting + times.scoring
    tokens = theory.tokens_per_step([0.8, 0.5, 0.5])
    assert tokens == pytest.approx(1 + 0.8 + 0.4 + 0.2)
    assert times.milliseconds(tokens) == pytest.approx(1e3 * times.total / tokens)
    assert times.speedup(tokens) == pytest.approx(1e3 * times.plain / times.milliseconds(tokens))
    assert times.speedup(times.pays_above) == pytest.approx(1)
    deeper = plan.step_times(dataclasses.replace(setup, num_draft_tokens=4))
    assert deeper.drafting > times.drafting


def test_acceptances_by_position_are_chances():
    assert theory.tokens_per_step([]) == 1
    assert theory.tokens_per_step([0.7] * 4) == pytest.approx(theory.expected_tokens(0.7, 4))
    with pytest.raises(ValueError, match=r"alpha=1\.5 is not a probability"):
        theory.tokens_per_step([0.5, 1.5])


def test_numbers_of_draft_tokens_that_a_draft_does_not_have():
    with pytest.raises(ValueError, match="num_draft_tokens=4: this draft has 3"):
        setup_of("medusa", num_draft_tokens=4)
    with pytest.raises(ValueError, match="num_draft_tokens=9: this draft has 10"):
        setup_of("eagle tree", num_draft_tokens=9)


def test_a_head_of_fewer_layers_reads_hidden_states_that_there_are():
    few = plan.with_layers(setup_of("eagle"), 2, 1)
    assert few.draft.taps == (1, 2, 2)
    assert few.target.num_layers == 2


# --- The command


def _raw(**values: Any) -> str:
    shape = {"model_type": "llama", "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 128}
    sizes = {"vocab_size": 1024, "hidden_size": D, "intermediate_size": 1024, "max_position_embeddings": 4096}
    return json.dumps(shape | sizes | values)


def _launch(tmp_path: pathlib.Path, **values: Any) -> list[str]:
    target = tmp_path / "target"
    target.mkdir()
    (target / "config.json").write_text(_raw(num_hidden_layers=6))
    keys = {"num_draft_tokens": 3, "prompt_tokens": 16, "max_new_tokens": 32, "compile": False, "topology": "H100:2"}
    arguments = [f"--config.{key}={value}" for key, value in (keys | values).items()]
    path = f"--config={ROOT / 'configs' / 'plan.py'}"
    return ["launch", path, f"--config.target={target}", *arguments, f"--workdir={tmp_path / 'run'}"]


def test_a_head_is_planned_with_trees_and_published_lengths(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture):
    lengths = '(("somebody",(3,),2.5,2.0,5.0),("paper",(3,4,10),3.0,0.0,0.0))'
    given = {"drafter": "eagle", "draft": f"eagle3:{KNOWN}", "trees": "((3,4,10),)", "lengths": lengths}
    assert launch.main([*_launch(tmp_path, **given), "--nocompilation_cache"]) == 0, capsys.readouterr().err
    (row,) = json.loads((tmp_path / "run" / "results.json").read_text())
    assert [(call["side"], call["tokens"]) for call in row["calls"][:3]] == [
        ("first draft", 4),
        ("draft", 1),
        ("target", 1),
    ]
    calls = {(call["side"], call["tokens"]): call["ms"] for call in row["calls"]}
    steps = {tuple(step["drafts"]): step for step in row["steps"]}
    assert list(steps) == [*((k,) for k in range(1, 17)), (3, 4, 10)]
    chain = steps[(3,)]
    assert chain["drafting_ms"] == pytest.approx(calls["first draft", 4] + 2 * calls["draft", 1])
    assert chain["ms"] == pytest.approx(chain["drafting_ms"] + calls["target", 4])
    assert chain["pays_above"] == pytest.approx(chain["ms"] / calls["target", 1])
    measured, not_measured = row["lengths"]
    assert measured["predicted_ms_per_token"] == pytest.approx(chain["ms"] / 2.5)
    assert (measured["measured_ms_per_token"], measured["measured_speedup"]) == (2.0, 2.5)
    assert not_measured["predicted_ms_per_token"] == pytest.approx(steps[3, 4, 10]["ms"] / 3)
    assert not_measured["measured_speedup"] is None
    summary = (tmp_path / "run" / "summary.md").read_text()
    assert "| tree, width 3, depth 4, 10 nodes |" in summary
    assert "| somebody | K = 3 | 2.50 |" in summary


@pytest.mark.parametrize(
    ("drafter", "draft"), [("medusa", "medusa:3"), ("blockwise", "blockwise:3"), ("mask_tokens", "")]
)
def test_other_drafts_are_planned(drafter: str, draft: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture):
    assert launch.main([*_launch(tmp_path, drafter=drafter, draft=draft), "--nocompilation_cache"]) == 0
    (row,) = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (row["drafter"], row["draft"]) == (drafter, draft or drafter)
    assert len(row["steps"]) == {"mask_tokens": 16}.get(drafter, 3)
    assert "Fits" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"drafter": "eagle"}, "config.draft is empty: give --config.draft=eagle3:TOKENS"),
        ({"drafter": "eagle", "draft": "eagle3:x"}, "config.draft='eagle3:x': write eagle3:TOKENS"),
        ({"drafter": "medusa", "draft": "medusa"}, "config.draft='medusa': write medusa:HEADS"),
        ({"drafter": "mask_tokens", "draft": "x"}, "config.draft='x': the target reads the masks itself"),
        ({"drafter": "medusa", "draft": "medusa:3", "trees": "((3,4,10),)"}, "drafter=medusa drafts none"),
        ({"drafter": "eagle", "draft": "eagle1", "trees": "((3,4),)"}, "give (width, depth, nodes)"),
        ({"drafter": "eagle", "draft": "eagle1", "trees": "((3,4,4),)"}, "between depth + 1 = 5 and"),
        ({"drafter": "eagle", "draft": "eagle1", "draft_quantise": "int8"}, "only a draft that is a model has it"),
        ({"drafter": "eagle", "draft": "eagle1", "lengths": '(("a",(99,),2.0,0.0,0.0),)'}, "config.lengths has"),
        ({"drafter": "hydra", "draft": "x"}, "config.drafter='hydra': choose one of model, eagle"),
    ],
)
def test_errors_are_one_line(values: dict, words: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture):
    assert launch.main([*_launch(tmp_path, **values), "--nocompilation_cache"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert words in error


def test_the_shape_of_a_published_head_needs_no_weights(tmp_path: pathlib.Path):
    (tmp_path / "config.json").write_text(_raw(num_hidden_layers=1, draft_vocab_size=KNOWN, intermediate_size=768))
    found = plan_drafts.DRAFTERS["eagle"].shape(str(tmp_path), TARGET, "bfloat16")
    assert isinstance(found, EagleConfig)
    assert (found.layer.vocab_size, found.layer.intermediate_size) == (KNOWN, 768)
    assert (found.target_size, found.taps) == (D, eagle.default_taps(LAYERS))


def test_the_head_of_llama_has_the_sizes_that_were_published():
    _, config = launch.parse(["launch", f"--config={ROOT / 'configs' / 'plan_eagle.py'}"])
    config: Any = config
    target = presets.get(config.target)
    head = plan_drafts.DRAFTERS[config.drafter].shape(config.draft, target, "bfloat16")
    # fc, queries, keys and values over twice the width, attention's output, feed-forward, 32000 tokens, four norms.
    matrices = 3 * 4096**2 + 8192 * (4096 + 2 * 1024) + 4096**2 + 3 * 4096 * 14336 + 32000 * 4096
    setup = plan.Setup(target, head, chips.parse("H100:1"), kind=kinds.eagle())
    assert plan.num_params(setup, "draft") == matrices + 4 * 4096
    assert head.taps == (2, 16, 29)


# --- The gate


@pytest.mark.slow
@pytest.mark.parametrize("name", ["eagle", "eagle tree", "eagle of all tokens"])
@pytest.mark.parametrize("topology", ["v5e:2x2", "H100:1"])
def test_the_compiled_step_of_a_head_copies_no_cache_and_gathers_nothing(name: str, topology: str):
    kind, _, k = DRAFTS[name]
    # A buffer of which each device's keys could not hide among the temporaries, and a vocabulary as large as they are.
    target = dataclasses.replace(TARGET, num_layers=1, num_heads=16, num_kv_heads=16, vocab_size=32768)
    known = 8192 if name != "eagle of all tokens" else 0
    head, length = eagle.like(target, (0, 1, 1), known), 16384
    setup = plan.Setup(target, head, chips.parse(topology), num_draft_tokens=k, max_len=length, kind=kind)
    if not aot.is_available(setup.topology.chip):
        pytest.skip("its compiler is not installed: pip install -e '.[tpu,cuda-plan]'")
    mesh = aot.make_mesh(setup.topology, 1)
    placed = plan.shard(setup, mesh)
    program = aot.read(aot.step(setup, mesh), aot.cache_shapes(placed.state.rows.cache, placed.state.rows.drafter))
    assert program.cache_copies == 0
    # The logits of the head's own tokens, of which the best of a tree's levels are found, and some indices.
    levels = (TREE.depth - 1) * TREE.width * 4 * known if name == "eagle tree" else 0
    assert program.gathered_bytes < levels + 1024, "neither parameters nor caches nor the target's logits"
    assert program.output_bytes - program.alias_bytes < 4096
    # On GPUs, XLA turns the target's keys and values around to move a tree's accepted path, whatever has drafted it.
    arrays = 3 if name == "eagle tree" and not setup.topology.chip.tpu else 1
    assert program.temporary_bytes < arrays * length * (16 // setup.topology.num_devices) * 128 * 2
    assert program.alias_bytes > plan.memory(setup).target_cache + plan.memory(setup).draft_cache
