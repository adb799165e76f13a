"""Plans: the table of chips, costs against closed forms, what does not fit, and the decode step compiled for TPUs."""

import dataclasses
import json
import pathlib
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import usual
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from specjax import drafters, experiments, launch, theory
from specjax.decoding import verify
from specjax.models import families, presets
from specjax.models.config import DecoderConfig, Experts, T5Config
from specjax.models.quantisation import Quantisation
from specjax.models.weights import checkpoint, shapes
from specjax.planning import aot, chips, hlo, libtpu, plan
from specjax.serving import programs as serving
from specjax.serving.choices import choices_of, sampling_of
from specjax.serving.grammars import GrammarTable
from specjax.serving.requests import Options
from specjax.types import Draft

ROOT = pathlib.Path(__file__).parents[1]
PLAN = str(ROOT / "configs" / "plan.py")

needs_libtpu = pytest.mark.skipif(
    not libtpu.is_available(), reason="libtpu is not installed, which compiles for TPUs: pip install -e '.[tpu]'"
)

WIDE = DecoderConfig(
    vocab_size=1024,
    hidden_size=512,
    intermediate_size=1024,
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    head_dim=128,
    max_position=32768,
    dtype="bfloat16",
)
NARROW = dataclasses.replace(WIDE, hidden_size=256, intermediate_size=512, num_heads=4)
T5 = T5Config(
    vocab_size=1024,
    hidden_size=512,
    head_dim=128,
    intermediate_size=1024,
    num_encoder_layers=2,
    num_layers=2,
    num_heads=4,
    gated=True,
    activation="gelu_new",
    tie_embeddings=False,
    scale_outputs=False,
    dtype="bfloat16",
)
FAMILIES = {"decoder": (WIDE, NARROW), "t5": (T5, dataclasses.replace(T5, hidden_size=256, intermediate_size=512))}
# All-reduces of a layer: after attention, after cross-attention, after the feed-forward.
A_LAYER = {"decoder": 2, "t5": 3}


def setup_of(family: str = "decoder", topology: str = "v5e:2x2", **values) -> plan.Setup:
    target, draft = FAMILIES[family]
    rest: dict[str, Any] = {"num_draft_tokens": 3, "prompt_tokens": 16, "max_new_tokens": 32} | values
    return plan.Setup(target, draft, chips.parse(topology), **rest)


# --- Chips


def test_figures_of_the_table_are_plausible():
    for name, chip in chips.CHIPS.items():
        assert name == chip.name
        # Where memory-bound ends, in operations a byte: as data sheets have it, from 150 to 600.
        assert 150 < chip.flops / chip.bandwidth < 600, name
        assert 15e9 < chip.memory < 210e9, name
        # Reading all of the memory takes between 10 and 50 ms.
        assert 0.01 < chip.memory / chip.bandwidth < 0.05, name
        assert chip.bandwidth / 10 < chip.interconnect < chip.bandwidth, name
        assert "http" in chip.source, name
        assert chip.latency_source
    assert {"v4", "v5e", "v5p", "v6e", "v7x"} == {name for name, chip in chips.CHIPS.items() if chip.tpu}
    assert {"A100", "H100", "H200", "B200"} == {name for name, chip in chips.CHIPS.items() if not chip.tpu}


def test_topologies_are_parsed():
    assert chips.parse("v4:2x2x4").num_chips == 16
    assert chips.parse("v4:2x2x4").name == "v4:2x2x4"
    assert chips.parse("v7x:2x2x1").num_devices == 8
    assert chips.parse("H100:8").num_devices == 8


@pytest.mark.parametrize("name", ["v9:2x2", "v5e:2x2x2", "v4:2x2", "H100:two", "v5e", "v5e:0x2", "H100:16"])
def test_a_topology_that_does_not_exist_names_those_that_do(name):
    with pytest.raises(ValueError, match=rf"topology='{name}'.*(v5e:2x2|v4:2x2x2|H100:8)"):
        chips.parse(name)


def test_an_all_reduce_takes_the_way_there_and_back_and_its_bytes():
    v4 = chips.parse("v4:2x2x4")
    # Hops to the farthest of 2 x 2 x 4: 1 + 1 + 3; there and back 10 us.
    assert chips.all_reduce_seconds(v4, 16, 0) == pytest.approx(10e-6)
    assert chips.all_reduce_seconds(v4, 4, 0) == pytest.approx(6e-6)
    # 4 x 4 x 4 closes to rings: 2 + 2 + 2.
    assert chips.all_reduce_seconds(chips.parse("v4:4x4x4"), 64, 0) == pytest.approx(12e-6)
    assert chips.all_reduce_seconds(v4, 1, 1e9) == 0
    sent = chips.all_reduce_seconds(v4, 16, 1e9) - chips.all_reduce_seconds(v4, 16, 0)
    assert sent == pytest.approx(2 * 15 / 16 * 1e9 / 300e9)
    assert chips.all_reduce_seconds(chips.parse("H100:8"), 8, 0) == pytest.approx(3.6e-6 + 14 * 0.47e-6)


# --- Programs


PROGRAM = """
HloModule jit_f, is_scheduled=true, input_output_alias={ {0}: (0, {}, may-alias) }
%body (p: bf16[1,4,64,128]) -> bf16[1,4,64,128] {
  %all-reduce.1 = f32[5,8192]{1,0:T(8,128)S(3)} all-reduce(%x), channel_id=1, metadata={op_name="jit(f)/target_call/dot_general"}
  %ar = (u32[1,128]{1,0:T(1,128)}, f32[]{:T(128)}) all-reduce-start(%a, %b), to_apply=%add
  %ag = (bf16[8,16]{1,0:T(8,128)(2,1)}, bf16[32,16]{1,0:T(8,128)(2,1)}) all-gather-start(%y), dimensions={0}
  %agd = bf16[32,16]{1,0:T(8,128)(2,1)} all-gather-done(%ag)
  %cp = s32[3]{0} collective-permute(%z), source_target_pairs={{0,1}}
  %cs = (bf16[1,4,64,128]{3,2,1,0:T(8,128)(2,1)S(1)}, bf16[1,4,64,128]{3,2,1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%p)
  ROOT %copy.2 = bf16[1,4,64,128]{3,2,1,0:T(8,128)(2,1)} copy(%p), metadata={op_name="jit(f)/while/body"}
}
"""  # noqa: E501


def test_collectives_are_read_by_kind_and_bytes():
    found = hlo.collectives(PROGRAM)
    assert [(c.kind, c.size_in_bytes) for c in found] == [
        ("all-reduce", 5 * 8192 * 4),
        ("all-reduce", 128 * 4 + 4),
        ("all-gather", 32 * 16 * 2),
        ("collective-permute", 12),
    ]
    assert found[0].op_name == "jit(f)/target_call/dot_general"


def test_a_copy_within_the_main_memory_is_found_and_a_prefetch_is_none():
    found = hlo.copies(PROGRAM, [(1, 4, 64, 128)])
    assert len(found) == 1
    assert "copy.2" in found[0]
    with pytest.raises(ValueError, match="no array of shape"):
        hlo.copies(PROGRAM, [(7, 7)])


GPU_PROGRAM = """
HloModule jit_f
%fused_add (p: f32[4]) -> f32[4] {
  ROOT %add.1 = f32[4]{0} add(%p, %p)
}
%max (a: f32[], b: f32[]) -> f32[] {
  ROOT %maximum.1 = f32[] maximum(%a, %b)
}
%body (arg: (s32[], f32[4])) -> (s32[], f32[4]) {
  %arg = (s32[], f32[4]{0}) parameter(0)
  %gte = f32[4]{0} get-tuple-element(%arg), index=1
  %fusion.1 = f32[4]{0} fusion(%gte), kind=kLoop, calls=%fused_add
  %gemm = (f32[4]{0}, s8[64]{0}) custom-call(%fusion.1), custom_call_target="__cublas$gemm"
  %reduce.1 = f32[]{:T(128)} reduce(%gte, %zero), dimensions={0}, to_apply=%max
  ROOT %tuple = (s32[], f32[4]{0}) tuple(%n, %fusion.1)
}
ENTRY %main (x: f32[4]) -> f32[4] {
  %copy.1 = f32[4]{0} copy(%x)
  %while.1 = (s32[], f32[4]{0}) while(%init), condition=%cond, body=%body
  %while.2 = (s32[], f32[4]{0}) while(%while.1), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %cond.1 = f32[4]{0} conditional(%p, %a, %b), true_computation=%t, false_computation=%f
}
"""


def test_kernels_are_counted_once_and_loops_whose_rounds_are_unknown():
    # The sum and the maximum inside of a fusion and a reduction are no kernels of their own.
    assert hlo.kernels(GPU_PROGRAM) == hlo.Kernels(fusions=1, library_calls=1, others=2, host_predicates=2)


def test_an_update_that_is_not_in_place_is_a_copy():
    cache = jax.ShapeDtypeStruct((4, 64, 8), jnp.float32)

    def update(x):
        return jax.lax.dynamic_update_slice(x, jnp.ones((4, 1, 8)), (0, 3, 0))

    donated = jax.jit(update, donate_argnums=0).lower(cache).compile().as_text()
    kept = jax.jit(update).lower(cache).compile().as_text()
    assert not hlo.copies(donated or "", [cache.shape])
    assert hlo.copies(kept or "", [cache.shape])


# --- Costs


@pytest.mark.parametrize("tokens", [1, 2, 5])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_cost_of_a_decoders_call_is_the_closed_form(tokens: int, dtype: str):
    setup = dataclasses.replace(setup_of(batch_size=2), target=dataclasses.replace(WIDE, dtype=dtype))
    cost = plan.call_cost(setup, "target")(tokens)
    c, rows, devices = dataclasses.replace(WIDE, dtype=dtype), 2, 4
    size = np.dtype(jnp.dtype(dtype)).itemsize
    layer = (
        c.hidden_size * c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads) + 3 * c.hidden_size * c.intermediate_size
    )
    matrices = c.num_layers * layer + c.hidden_size * c.vocab_size
    attention = 2 * 2 * c.num_layers * c.num_heads * c.head_dim * setup.buffer
    assert cost.flops == pytest.approx(rows * tokens * (2 * matrices + attention) / devices)
    norms = (2 * c.num_layers + 1) * c.hidden_size
    assert cost.parameter_bytes == pytest.approx(size * (matrices / devices + norms))
    cache = 2 * c.num_layers * rows * c.num_kv_heads * setup.buffer * c.head_dim * size
    assert cost.cache_bytes == pytest.approx(cache / devices, rel=1e-3)
    # Two a layer, and the lookup in the split table.
    assert cost.all_reduces == 2 * c.num_layers + 1
    assert cost.all_reduce_bytes == 4 * rows * tokens * c.hidden_size * cost.all_reduces


@pytest.mark.parametrize("how", ["", "int8"])
@pytest.mark.parametrize("tokens", [1, 5])
def test_the_experts_that_tokens_choose_are_read(tokens: int, how: str):
    mixture = families.with_quantisation(dataclasses.replace(WIDE, experts=Experts(8, 2)), how)
    dense = dataclasses.replace(mixture, experts=None)
    one, other = (
        plan.call_cost(dataclasses.replace(setup_of(batch_size=2), target=config), "target")(tokens)
        for config in (mixture, dense)
    )
    matrices = WIDE.num_layers * 3 * WIDE.hidden_size * WIDE.intermediate_size
    router = WIDE.num_layers * WIDE.hidden_size * 8
    # Two experts compute what one feed-forward does, twice.
    assert one.flops - other.flops == pytest.approx(2 * 2 * tokens * (matrices / 4 + router), rel=1e-6)
    distinct = 8 * (1 - (6 / 8) ** (2 * tokens))
    scales = 4 * WIDE.num_layers * (2 * WIDE.intermediate_size / 4 + WIDE.hidden_size) if how else 0
    each = matrices / 4 * (1 if how else 2) + scales
    assert one.parameter_bytes - other.parameter_bytes == pytest.approx((distinct - 1) * each + 2 * router, rel=1e-6)
    assert one[2:] == other[2:]


def test_an_encoder_is_held_but_not_read():
    setup = setup_of("t5")
    cost = plan.call_cost(setup, "target")(1)
    params = families.abstract_params(T5)
    encoder = sum(x.size for x in jax.tree.leaves({k: v for k, v in params.items() if "encoder" in k})) * 2
    held = plan.memory(setup).target_parameters
    assert encoder > 0
    assert cost.parameter_bytes < held - 0.9 * encoder / 4
    assert cost.all_reduces == 3 * T5.num_layers + 1


def test_rows_are_split_over_data_and_a_replicated_draft_needs_no_collectives():
    one, two = (setup_of(batch_size=4, data=data) for data in (1, 2))
    whole, half = (plan.call_cost(setup, "target")(1) for setup in (one, two))
    assert half.flops == pytest.approx(whole.flops)
    assert half.parameter_bytes == pytest.approx(2 * whole.parameter_bytes, rel=0.01)
    assert half.cache_bytes == pytest.approx(whole.cache_bytes, rel=0.01)
    draft = plan.call_cost(setup_of(draft_replicated=True), "draft")(1)
    assert draft.all_reduces == 0
    assert draft.parameter_bytes > 3.9 * plan.call_cost(setup_of(), "draft")(1).parameter_bytes


def test_heads_that_do_not_divide_are_repeated_or_replicated_and_named():
    four, eight = setup_of(), setup_of(topology="v5e:2x4")
    # Eight query heads with four key/value heads: on eight devices, each has one of both.
    assert plan.placed_config(eight, "target") == dataclasses.replace(WIDE, num_kv_heads=8)
    assert plan.replicated(eight, "target") == plan.replicated(four, "target") == []
    cost, fewer = (plan.call_cost(setup, "target")(1) for setup in (eight, four))
    assert cost.all_reduces == fewer.all_reduces
    assert cost.cache_bytes == pytest.approx(fewer.cache_bytes, rel=0.01)
    assert cost.parameter_bytes < 0.6 * fewer.parameter_bytes
    # Four query heads cannot be shared by eight devices.
    assert plan.replicated(eight, "draft") == ["kv_heads"]
    cost, fewer = (plan.call_cost(setup, "draft")(1) for setup in (eight, four))
    # Attention's product needs no sum over devices that all have it whole.
    assert cost.all_reduces == fewer.all_reduces - NARROW.num_layers


def test_scanned_layers_hold_and_read_what_unrolled_ones_do():
    setup = setup_of(batch_size=4, data=2)
    scanned = dataclasses.replace(setup, target=dataclasses.replace(WIDE, scan_layers=True))
    placed = plan.shard(scanned, plan.abstract_mesh(scanned))
    assert sum(plan.memory(scanned)) == plan.local_bytes((placed.params, placed.state))
    assert plan.memory(scanned) == plan.memory(setup)
    assert plan.call_cost(scanned, "target")(3) == plan.call_cost(setup, "target")(3)


def test_the_forecast_is_theorem_3_8():
    forecast = plan.forecast([0.01, 0.01, 0.01, 0.02], [0.0, 0.001, 0.002, 0.003], 0.8)
    assert [forecast.cost_ratio(k) for k in (1, 2, 3)] == pytest.approx([0.1] * 3)
    assert forecast.milliseconds[0] == pytest.approx(10)
    assert forecast.milliseconds[2] == pytest.approx(10 / theory.walltime_factor(0.8, 2, 0.1))
    assert forecast.milliseconds[3] == pytest.approx(10 / theory.walltime_factor(0.8, 3, 0.1, 2.0))
    assert forecast.best == int(np.argmin(forecast.milliseconds))


def test_collectives_of_compiled_calls_take_the_place_of_computed_ones():
    cost = plan.with_collectives(plan.call_cost(setup_of(), "target"), {1: (10, 100.0), 4: (13, 400.0)})
    assert [(cost(t).all_reduces, cost(t).all_reduce_bytes) for t in (1, 2, 7)] == [(10, 100), (11, 200), (16, 700)]
    alone = plan.with_collectives(plan.call_cost(setup_of(), "draft"), {2: (10, 100.0)})
    assert (alone(3).all_reduces, alone(3).all_reduce_bytes) == (10, 150)


# --- What does not fit


def small_memory(setup: plan.Setup, memory: int) -> plan.Setup:
    """The same plan on chips with less memory."""
    chip = dataclasses.replace(setup.topology.chip, memory=memory)
    return dataclasses.replace(setup, topology=dataclasses.replace(setup.topology, chip=chip))


@pytest.mark.parametrize("family", list(FAMILIES))
def test_memory_is_that_of_the_arguments_of_the_step(family: str):
    setup = plan.with_layers(setup_of(family, batch_size=4, data=2), 3, 2)
    placed, memory = plan.shard(setup, plan.abstract_mesh(setup)), plan.memory(setup)
    assert sum(memory) == plan.local_bytes((placed.params, placed.state))
    assert memory.target_cache == plan.local_bytes(placed.state.rows.cache)


def test_what_fits_needs_no_remedy():
    found = plan.fit(setup_of())
    assert found.fits
    assert found.remedies == []
    assert found.needed == sum(plan.memory(setup_of()))


@pytest.mark.slow
def test_what_does_not_fit_says_what_would():
    setup = setup_of(batch_size=32, max_new_tokens=4000)
    setup = dataclasses.replace(setup, target=dataclasses.replace(WIDE, dtype="float32"))
    memory = plan.memory(setup)
    room = memory.target_parameters + memory.draft_parameters + (memory.target_cache + memory.draft_cache) // 5
    tight = small_memory(setup, room)
    found = plan.fit(tight, overhead=1000)
    assert not found.fits
    text = "; ".join(found.remedies)
    batch, new = (int(re.search(rf"--config.{key}=(\d+)", text)[1]) for key in ("batch_size", "max_new_tokens"))  # pyright: ignore[reportOptionalSubscript]
    # The largest batch fits, and one more does not; the same of the buffer.
    for size, fits in ((batch, True), (batch + 1, False)):
        assert plan.fit(dataclasses.replace(tight, batch_size=size), 1000).fits is fits
    assert 1 < batch < 32
    for tokens, fits in ((new, True), (new + 64, False)):
        assert plan.fit(dataclasses.replace(tight, max_new_tokens=tokens), 1000).fits is fits
    # More devices split the rows, since four heads do not divide over more than four.
    name, data = re.search(r"--config.topology=(\S+) --config.data=(\d+)", text).groups()  # pyright: ignore[reportOptionalMemberAccess]
    more = dataclasses.replace(tight.topology, shape=chips.parse(name).shape)
    assert more.num_chips > 4
    assert plan.fit(dataclasses.replace(tight, topology=more, data=int(data)), 1000).fits
    half = dataclasses.replace(more, shape=(*sorted(more.shape)[:-1], max(more.shape) // 2))
    assert not plan.fit(dataclasses.replace(tight, topology=half, data=min(int(data), half.num_chips)), 1000).fits


def test_bfloat16_is_a_remedy_where_it_is_enough():
    wide = tuple(dataclasses.replace(c, dtype="float32") for c in FAMILIES["decoder"])
    setup = dataclasses.replace(setup_of(), target=wide[0], draft=wide[1])
    found = plan.fit(small_memory(setup, int(0.6 * sum(plan.memory(setup)))))
    assert any("bfloat16" in remedy for remedy in found.remedies)
    assert not any("batch" in remedy for remedy in found.remedies), "a batch of one cannot be smaller"


def test_a_quantised_draft_is_a_remedy_where_it_is_enough():
    setup = setup_of()
    memory = plan.memory(setup)
    small = {how: families.with_quantisation(setup.draft, how) for how in ("int8", "int4:64")}
    sizes = {how: plan.memory(dataclasses.replace(setup, draft=draft)) for how, draft in small.items()}
    for how, size in sizes.items():
        found = plan.fit(small_memory(setup, sum(size)))
        assert any(f"--config.draft_quantise={how}" in remedy for remedy in found.remedies), how
        assert plan.fit(small_memory(dataclasses.replace(setup, draft=small[how]), sum(size))).fits
    assert sizes["int4:64"].draft_parameters < sizes["int8"].draft_parameters < memory.draft_parameters
    assert sizes["int8"][2:] == memory[2:]


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_quantised_model_computes_as_much_and_reads_less(family: str):
    setup = setup_of(family)
    floats = plan.call_cost(setup, "target")(5)
    for how, most in (("int8", 0.6), ("int4:64", 0.4)):
        small = dataclasses.replace(setup, target=families.with_quantisation(setup.target, how))
        cost = plan.call_cost(small, "target")(5)
        assert cost.flops == floats.flops, how
        assert cost.parameter_bytes < most * floats.parameter_bytes, how
        assert cost[2:] == floats[2:], how


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_draft_tokens": 0}, "num_draft_tokens=0"),
        ({"batch_size": 3, "data": 2}, "batch_size=3 does not divide over data=2"),
        ({"data": 3}, "data=3 does not divide the 4 devices"),
        ({"prompt_tokens": 0}, "prompt_tokens=0"),
    ],
)
def test_setups_that_make_no_sense(values, words):
    with pytest.raises(ValueError, match=words):
        setup_of(**values)


# --- Shapes


def test_shapes_are_read_from_presets_directories_and_checkpoints(tmp_path):
    assert shapes.read("chinchilla_70b", "float32") == dataclasses.replace(
        presets.PRESETS["chinchilla_70b"], dtype="float32"
    )
    assert shapes.read(_directory(tmp_path / "llama")).hidden_size == 512
    tiny = dataclasses.replace(WIDE, hidden_size=16, intermediate_size=16, head_dim=8, vocab_size=8)
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / checkpoint.CONFIG_FILE).write_text(json.dumps(checkpoint.describe(tiny, {})))
    assert shapes.read(tmp_path / "saved") == tiny
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        shapes.read(tmp_path / "empty")


@pytest.mark.parametrize("tied", [True, False])
def test_the_shape_of_a_t5_needs_no_weights(tied: bool, tmp_path):
    raw = {"model_type": "t5", "vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    raw |= {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": tied}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config = shapes.read(tmp_path)
    assert isinstance(config, T5Config)
    assert config.tie_embeddings is tied


# --- The command


def _directory(path: pathlib.Path, config: DecoderConfig = WIDE) -> str:
    """A directory that holds a shape and no weights."""
    raw = {
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": 4096,
    }
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(raw))
    return str(path)


def _launch(tmp_path: pathlib.Path, **values) -> list[str]:
    if "target" not in values:
        values["target"] = _directory(tmp_path / "target")
        values["draft"] = _directory(tmp_path / "draft", NARROW)
    keys = {"num_draft_tokens": 3, "prompt_tokens": 16, "max_new_tokens": 32} | values
    arguments = [f"--config.{key}={value}" for key, value in keys.items()]
    return ["launch", f"--config={PLAN}", *arguments, f"--workdir={tmp_path / 'run'}", "--nocompilation_cache"]


def _rows(tmp_path: pathlib.Path) -> list[dict]:
    return json.loads((tmp_path / "run" / "results.json").read_text())


def test_gpus_are_planned_without_a_compiler(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("specjax.planning.cuda.is_available", lambda: False)
    arguments = _launch(tmp_path, topology="H100:4", batch_size=2)
    assert launch.main(arguments) == 0
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "config.json",
        "results.json",
        "summary.md",
        "plan.png",
    }
    (row,) = _rows(tmp_path)
    assert row["compiled"] is False
    assert row["fits"] is True
    assert row["step"] is None
    chip = chips.CHIPS["H100"]
    first = row["calls"][1]
    assert (first["side"], first["tokens"]) == ("target", 1)
    assert first["memory_ms"] == pytest.approx(1e3 * (first["parameter_bytes"] + first["cache_bytes"]) / chip.bandwidth)
    assert first["ms"] == pytest.approx(max(first["arithmetic_ms"], first["memory_ms"]) + first["collectives_ms"])
    assert len(row["ms_per_token_by_draft_tokens"]) == 17
    summary = (tmp_path / "run" / "summary.md").read_text()
    assert "Nothing was compiled: every column is computed" in summary
    assert "predictions" in summary
    assert "nvidia.com" in summary
    output = capsys.readouterr().out
    assert "Fits" in output
    assert "Target: attention by XLA's products over the whole buffer (attention='einsum' says so" in output
    assert "Computed from shapes" in output
    assert "pip install -e '.[cuda-plan]'" in output
    assert launch.main(arguments) == 0
    assert "is finished in" in capsys.readouterr().out
    assert launch.main([*arguments, "--config.alpha=0.5"]) == 1
    assert "another config" in capsys.readouterr().err


def test_several_drafts_stand_beside_each_other_and_what_does_not_fit_is_said(tmp_path, capsys):
    large = dataclasses.replace(WIDE, vocab_size=4_000_000, hidden_size=4096)
    values = {
        "target": _directory(tmp_path / "large", large),
        "topology": "H100:1",
        "dtype": "float32",
        "compile": False,
    }
    directory = _directory(tmp_path / "draft", NARROW)
    arguments = _launch(tmp_path, draft=f"{directory},{directory}-other", **values)
    _directory(tmp_path / "draft-other", dataclasses.replace(NARROW, num_layers=4))
    assert launch.main(arguments) == 0
    assert [row["draft"] for row in _rows(tmp_path)] == [directory, f"{directory}-other"]
    assert "## The drafts beside each other" in (tmp_path / "run" / "summary.md").read_text()
    output = capsys.readouterr().out
    assert "DOES NOT FIT" in output
    assert "--config.dtype=bfloat16" in output


def test_published_speedups_stand_beside_those_of_the_plan_on_every_topology(tmp_path):
    target, draft = _directory(tmp_path / "target"), _directory(tmp_path / "draft", NARROW)
    values = {"topology": "v4:1x1x1,H100:1", "compile": False, "published": f'(("EnDe","{draft}",3,0.8,2.8),)'}
    assert launch.main(_launch(tmp_path, target=target, draft=draft, **values)) == 0
    rows = _rows(tmp_path)
    assert [row["topology"] for row in rows] == ["v4:1x1x1", "H100:1"]
    for row in rows:
        (cell,) = row["published"]
        assert (cell["task"], cell["alpha"], cell["measured_speedup"]) == ("EnDe", 0.8, 2.8)
        assert cell["theorem_speedup"] == pytest.approx(theory.walltime_factor(0.8, 3, row["cost_ratio"]))
        assert cell["predicted_speedup"] == pytest.approx(
            theory.expected_tokens(0.8, 3)
            * row["target_ms_by_tokens"][0]
            / (row["target_ms_by_tokens"][3] + 3 * row["draft_ms"])
        )
    images = {path.name for path in (tmp_path / "run").glob("*.png")}
    assert images == {"plan_v4_1x1x1.png", "plan_H100_1.png"}
    assert "| EnDe | 3 | 0.80 | 2.8x |" in (tmp_path / "run" / "summary.md").read_text()


def test_the_plan_of_t5_xxl_has_the_sizes_of_the_paper():
    _, config = launch.parse(["launch", f"--config={ROOT / 'configs' / 'leviathan' / 'plan_xxl.py'}"])
    config: Any = config
    drafts = config.draft.split(",")
    sizes = [families.num_params(presets.get(name)) / 1e6 for name in (config.target, *drafts)]
    # 11B, and 77M, 250M and 800M (Leviathan et al. 2022, section 4.1).
    assert sizes == pytest.approx([11135, 77, 248, 783], rel=0.01)
    assert {draft for _, draft, *_ in config.published} == set(drafts)
    assert len(config.published) == 12


@pytest.mark.slow
@needs_libtpu
def test_tpus_are_planned_end_to_end(tmp_path):
    assert launch.main(_launch(tmp_path, topology="v5e:2x2")) == 0
    (row,) = _rows(tmp_path)
    assert row["compiled"] is True
    assert row["extrapolated"] is False
    assert row["compiled_layers"] == {"target": [2], "draft": [2]}
    assert row["step"]["cache_copies"] == 0
    target = {call["tokens"]: call for call in row["calls"] if call["side"] == "target"}
    assert list(target) == [1, 2, 3, 4]
    # Two a layer, one for the embedding, and sampling's.
    assert target[1]["computed_all_reduces"] == 5
    assert 5 < target[1]["collectives"] < 12
    assert target[4]["compiled_flops"] == pytest.approx(target[4]["flops"], rel=0.1)
    summary = (tmp_path / "run" / "summary.md").read_text()
    assert "Compiled with layers: target 2 and draft 2; these are all layers" in summary
    assert "| target call | all-reduce |" in summary


@pytest.mark.slow
@needs_libtpu
def test_what_xla_finds_no_room_for_does_not_fit(tmp_path, capsys):
    large = dataclasses.replace(WIDE, vocab_size=4_000_000, hidden_size=4096)
    values = {"target": _directory(tmp_path / "large", large), "draft": _directory(tmp_path / "draft", NARROW)}
    assert launch.main(_launch(tmp_path, topology="v5e:1x1", **values)) == 0
    (row,) = _rows(tmp_path)
    assert (row["exhausted"], row["fits"], row["compiled"]) == (True, False, False)
    output = capsys.readouterr().out
    assert "DOES NOT FIT" in output
    assert "XLA finds no room" in output
    assert "chips need" in output


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"topology": "v9:2x2"}, "topology='v9:2x2': no chip 'v9'; write one of v4:2x2x2, v5e:2x2"),
        ({"topology": "v5e:4"}, "v5e takes the 2 sizes"),
        ({"target": ""}, "config.target is empty"),
        ({"target": "chinchilla_70b", "draft": "/no/such/shape"}, "/no/such/shape"),
        ({"layers": "some"}, "config.layers='some'"),
        ({"alpha": 2}, "config.alpha=2"),
        ({"draft_sharding": "half"}, "config.draft_sharding='half'"),
        ({"max_draft_tokens": 1}, "config.max_draft_tokens=1"),
        ({"published": '(("EnDe","small",20,0.5,2.0),)'}, "config.published has K = 20"),
        ({"verify": "magic"}, "verify='magic'"),
    ],
)
def test_errors_are_one_line(values, words, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert launch.main(_launch(tmp_path, **values)) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert words in error
    assert not (tmp_path / "run").exists()


@needs_libtpu
def test_a_slice_that_libtpu_does_not_know_is_one_line(tmp_path, capsys):
    assert launch.main(_launch(tmp_path, topology="v5e:3x5")) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: topology='v5e:3x5': libtpu does not know it")
    assert error.count("\n") == 1


def test_without_the_cuda_plugin_the_error_names_the_remedy(monkeypatch):
    monkeypatch.setattr("specjax.planning.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match=r"Compiling for H100:8 needs .*pip install -e '.\[cuda-plan\]'"):
        aot.make_mesh(chips.parse("H100:8"), 1)


def test_without_libtpu_the_error_names_the_remedy(monkeypatch):
    monkeypatch.setattr("specjax.planning.libtpu.is_available", lambda: False)
    with pytest.raises(ValueError, match=r"pip install -e '.\[tpu\]'"):
        aot.make_mesh(chips.parse("v5e:2x2"), 1)


@pytest.mark.parametrize("path", ["plan.py", "plan_eagle.py", "chinchilla/plan_70b.py", "leviathan/plan_xxl.py"])
def test_configs_name_the_experiment(path):
    _, config = launch.parse(["launch", f"--config={ROOT / 'configs' / path}"])
    assert config is not None
    experiments.get(str(config.experiment))
    _, base = launch.parse(["launch", f"--config={PLAN}"])
    assert base is not None
    assert set(config) == set(base)


# --- The gate: the decode step, compiled for chips that are not here


KERNEL = {True: "tpu_custom_call", False: "__gpu$xla.gpu.triton"}
"""How a program calls a Pallas kernel, on TPUs and on GPUs."""

GATE = [
    (family, chip) for family in FAMILIES for chip in ("v4:2x2x1", "v5e:2x2", "v6e:2x2", "H100:1", "H100:4", "H100:8")
]


def gate_setup(family: str, topology: str, **values: Any) -> plan.Setup:
    """One layer with 16 heads, and a buffer of which each device's keys could not hide among the temporaries."""
    heads = {"num_heads": 16} | ({"num_kv_heads": 16} if family == "decoder" else {})
    setup = setup_of(family, topology, **({"max_len": 16384} | values))
    # XLA may gather a table of a small vocabulary, which costs nothing.
    heads |= {"vocab_size": 32768}
    wide, narrow = (dataclasses.replace(setup.side(side), **heads) for side in plan.SIDES)
    return plan.with_layers(dataclasses.replace(setup, target=wide, draft=narrow), 1, 1)


def gate_mesh(setup: plan.Setup) -> Mesh:
    chip = setup.topology.chip
    if not aot.is_available(chip):
        pytest.skip(
            f"the compiler for {chip.name} is not installed: pip install -e '.[{'tpu' if chip.tpu else 'cuda-plan'}]'"
        )
    return aot.make_mesh(setup.topology, 1)


@pytest.mark.budget(60)
@pytest.mark.parametrize(("family", "topology"), usual(GATE, ("decoder", "v5e:2x2")))
def test_the_compiled_step_copies_no_cache_and_gathers_nothing(family: str, topology: str):
    setup = gate_setup(family, topology)
    mesh = gate_mesh(setup)
    placed = plan.shard(setup, mesh)
    cached = jax.config.values["jax_enable_compilation_cache"]
    compiled = aot.step(setup, mesh)
    program = aot.read(compiled, aot.cache_shapes(placed.state.rows.cache, placed.state.rows.drafter))
    assert KERNEL[setup.topology.chip.tpu] not in compiled.as_text()
    assert jax.config.values["jax_enable_compilation_cache"] == cached, "a plan leaves the compilation cache as it was"
    assert program.cache_copies == 0
    assert program.gathered_bytes == 0, "neither parameters nor logits nor caches"
    devices = setup.topology.num_devices
    # On TPUs, T5's bias by position has the heads last, which XLA pads to 128: one more array of that size.
    arrays = {"decoder": 1, "t5": 2}[family]
    assert program.temporary_bytes < arrays * setup.buffer * (16 // devices) * 128 * 2
    # All of the donated state comes out where it went in, but for what is smaller than a page.
    assert program.output_bytes - program.alias_bytes < 4096
    assert program.alias_bytes > plan.memory(setup).target_cache + plan.memory(setup).draft_cache
    if devices == 1:
        assert not program.collectives
        return

    layers, k = setup.target.num_layers, setup.num_draft_tokens
    assert {kind for _, kind in program.collectives} == {"all-reduce"}
    count, _, largest = program.collectives["target_call", "all-reduce"]
    # A target call of one token and one of K + 1: so many a layer, and the lookup of the tokens.
    assert count == 2 * (A_LAYER[family] * layers + 1)
    assert largest == (k + 1) * setup.target.hidden_size * 4
    # Sampling and verification send maxima and sums, a few bytes a token, whatever the size of the vocabulary.
    for part in ("drafting", ""):
        assert program.collectives[part, "all-reduce"][2] <= 1024 < 4 * setup.target.vocab_size / 4 + 1


INT8, INT4, PLAIN_INT4 = (
    {"quantisation": how, "head_quantisation": how} for how in (Quantisation(8), Quantisation(4, 64), Quantisation(4))
)
VARIANTS: list[tuple[dict[str, Any], str, str]]
VARIANTS = [(INT8, family, chip) for family in FAMILIES for chip in ("v5e:2x2", "H100:1", "H100:4")]
VARIANTS += [(how, "decoder", chip) for how in (INT4, PLAIN_INT4) for chip in ("v5e:2x2", "H100:1", "H100:4")]
VARIANTS += [(INT4, "t5", chip) for chip in ("v5e:2x2", "H100:1")]
# So long a buffer is most of what a call reads: "auto" takes the kernel.
BY_KERNEL = {"attention": "auto"}
VARIANTS += [(BY_KERNEL, "decoder", chip) for chip in ("v5e:2x2", "H100:1", "H100:4")]
# The experts of few tokens are sliced out of their stack: a copy of the stack would not fit into what is allowed.
VARIANTS += [({"experts": Experts(16, 2)}, "decoder", chip) for chip in ("v5e:2x2", "H100:1", "H100:4")]
# With XLA's products, GPUs write a scanned layer's slice of the cache to memory (docs/limits.md).
VARIANTS.append(({"scan_layers": True}, "decoder", "v5e:2x2"))
VARIANTS += [({"scan_layers": True} | BY_KERNEL, "decoder", chip) for chip in ("v5e:2x2", "H100:1", "H100:4")]


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "family", "topology"), VARIANTS)
def test_small_weights_and_scanned_layers_are_read_in_place(variant: dict[str, Any], family: str, topology: str):
    setup = gate_setup(family, topology)
    mesh = gate_mesh(setup)
    wide, narrow = (dataclasses.replace(setup.side(side), **variant) for side in plan.SIDES)
    setup = dataclasses.replace(setup, target=wide, draft=narrow)
    placed = plan.shard(setup, mesh)
    compiled = aot.step(setup, mesh)
    program = aot.read(compiled, aot.cache_shapes(placed.state.rows.cache, placed.state.rows.drafter))
    assert (KERNEL[setup.topology.chip.tpu] in compiled.as_text()) is ("attention" in variant)
    assert program.cache_copies == 0
    assert program.gathered_bytes == 0
    # Neither the head in bfloat16 nor a layer's keys are among the temporaries.
    devices = setup.topology.num_devices
    assert program.temporary_bytes < wide.vocab_size * wide.hidden_size * 2 / devices
    assert program.temporary_bytes < setup.buffer * (16 // devices) * 128 * 2


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:2x2", "H100:1", "H100:4"])
def test_the_kernel_of_a_batch_copies_no_cache(topology: str):
    """Grouped heads, a window in one of two layers, and rows that are written one by one."""
    setup = gate_setup("decoder", topology, batch_size=8)
    mesh = gate_mesh(setup)
    shape: dict[str, Any] = {"num_layers": 2, "num_kv_heads": 4, "sliding_window": 1024, "global_layers": (1,)}
    target = dataclasses.replace(setup.target, attention="kernel", attention_softcap=50.0, **shape)
    setup = dataclasses.replace(setup, target=target, draft=dataclasses.replace(setup.draft, attention="kernel"))
    placed = plan.shard(setup, mesh)
    compiled = aot.step(setup, mesh)
    program = aot.read(compiled, aot.cache_shapes(placed.state.rows.cache, placed.state.rows.drafter))
    assert compiled.as_text().count(KERNEL[setup.topology.chip.tpu]) > 0
    assert program.cache_copies == 0
    assert program.gathered_bytes == 0
    keys = min(x.size * 2 // setup.topology.num_devices for x in placed.state.rows.cache.keys)
    assert program.temporary_bytes < keys


@pytest.mark.slow
def test_gpus_choose_experts_without_the_host():
    setup = gate_setup("decoder", "H100:1")
    mesh = gate_mesh(setup)
    setup = dataclasses.replace(setup, target=dataclasses.replace(setup.target, experts=Experts(16, 2)))
    placed = plan.shard(setup, mesh)
    program = aot.read(aot.target_call(setup, mesh, 4), aot.cache_shapes(placed.state.rows.cache))
    assert program.host_predicates == 0


def of_tree(placed: plan.Sharded) -> Draft:
    return Draft(drafters.model(placed.models["draft"], topology=(2, 2, 1)), placed.params.draft)


def of_lengths(placed: plan.Sharded) -> Draft:
    drafter = drafters.model(placed.models["draft"], num_draft_tokens=3, lengths=(1,))
    return Draft(drafter, placed.params.draft)


def of_lookup_or_skips(placed: plan.Sharded) -> Draft:
    skips = drafters.skip(placed.models["target"], attention=(0,), num_draft_tokens=1)
    return drafters.first_of([drafters.ngram(num_draft_tokens=3), skips])


def of_dynamic_tree(placed: plan.Sharded) -> Draft:
    shape = drafters.Dynamic(width=2, depth=3, num_nodes=5)
    return Draft(drafters.model(placed.models["draft"], dynamic=shape), placed.params.draft)


def of_skips(placed: plan.Sharded) -> Draft:
    return Draft(drafters.skip(placed.models["target"], attention=(0,), num_draft_tokens=3), ())


def of_skips_tree(placed: plan.Sharded) -> Draft:
    return Draft(drafters.skip(placed.models["target"], mlp=(0,), topology=(2, 2, 1)), ())


def of_lookahead(placed: plan.Sharded) -> Draft:
    return Draft(drafters.lookahead(window=3, ngram=4, guesses=2), ())


def of_text(placed: plan.Sharded) -> Draft:
    parts = [
        drafters.suffix(num_draft_tokens=3),
        drafters.ngram(num_draft_tokens=6, depth=3),
        drafters.jacobi(num_draft_tokens=3),
    ]
    return drafters.merged(parts)


OTHERS = [
    (of_lengths, verify.rejection),
    (of_lookup_or_skips, verify.rejection),
    (of_tree, verify.coupled),
    (of_tree, verify.rejection),
    (of_tree, verify.traversal),
    (of_dynamic_tree, verify.coupled),
    (of_skips, verify.rejection),
    (of_skips_tree, verify.traversal),
    (of_lookahead, verify.coupled),
    (of_text, verify.rejection),
]


@pytest.mark.slow
@pytest.mark.parametrize(("make", "rule"), OTHERS, ids=lambda x: getattr(x, "name", None) or x.__name__)
@pytest.mark.parametrize(("family", "topology"), GATE)
def test_other_drafters_copy_no_cache_and_gather_nothing(
    family: str, topology: str, make: Callable[[plan.Sharded], Draft], rule: verify.Rule
):
    setup = gate_setup(family, topology)
    mesh = gate_mesh(setup)
    placed = plan.shard(setup, mesh)
    compiled = aot.step(setup, mesh, rule, make)
    program = aot.read(compiled, aot.cache_shapes(placed.state.rows.cache, placed.state.rows.drafter))
    assert program.cache_copies == 0
    assert program.gathered_bytes == 0
    assert program.output_bytes - program.alias_bytes < 4096


# --- The gate of the engine: its own programs, which serve many users


SIZES = {"num_stop_tokens": 32, "num_biases": 304, "num_top": 20, "max_steps": 16}


def outcome(function: Any, *arguments: Any) -> Any:
    """What a program returns, as shapes, placed as the compiled program leaves it."""
    lowered = function.lower(*arguments)
    placed = aot._compile(lowered).output_shardings
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), lowered.out_info, placed
    )


class Serving(NamedTuple):
    """What the programs of an engine are given."""

    programs: serving.Programs
    params: Any
    state: Any
    text: Any
    choices: Any


def of_model(placed: plan.Sharded) -> Draft:
    return Draft(placed.drafter, placed.params.draft)


def of_lookup(placed: plan.Sharded) -> Draft:
    lengths = tuple(range(1, placed.drafter.topology.num_nodes))
    return Draft(drafters.ngram(num_draft_tokens=placed.drafter.topology.num_nodes, lengths=lengths), ())


def of_nothing(placed: plan.Sharded) -> Draft:
    del placed
    return Draft(drafters.none(), ())


ENGINES = [(of_model, "v5e:2x2"), (of_lookup, "H100:1"), (of_nothing, "H100:1")]


def engine_of(setup: plan.Setup, mesh: Mesh, make: Callable[[plan.Sharded], Draft]) -> Serving:
    """An engine on chips that are not here."""
    placed = plan.shard(setup, mesh)
    draft = make(placed)
    sizes = serving.Sizes(max_len=setup.buffer, max_source=64, grammar_states=64, grammar_classes=32, **SIZES)
    programs = serving.Programs(placed.models["target"], draft.drafter, verify.coupled, sizes)
    vocab_size = setup.target.vocab_size
    options = Options()
    sampling = sampling_of(options, sizes, vocab_size)
    choices = choices_of(options, sizes, sampling, (), limit=1)
    whole = NamedSharding(mesh, PartitionSpec())

    def put(tree: Any) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), np.asarray(x).dtype, sharding=whole), tree)

    costs = put(np.ones(draft.drafter.topology.depth + 1, np.float32))
    table = put(GrammarTable(vocab_size, sizes.grammar_states, sizes.grammar_classes).table())
    choices = put(choices)
    with jax.set_mesh(mesh):
        state = outcome(serving.empty, programs, setup.batch_size, choices, costs, table)
        text = outcome(serving.begin, programs)
    return Serving(programs, placed.params._replace(draft=draft.params), state, text, choices)


@pytest.mark.slow
@pytest.mark.parametrize(("make", "topology"), ENGINES, ids=lambda x: getattr(x, "__name__", x))
def test_an_engine_copies_no_cache_and_gathers_no_more_than_logits(
    topology: str, make: Callable[[plan.Sharded], Draft]
):
    setup = gate_setup("decoder", topology, batch_size=4)
    mesh = gate_mesh(setup)
    engine = engine_of(setup, mesh, make)
    whole = NamedSharding(mesh, PartitionSpec())

    def scalar(dtype: Any, *shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=whole)

    with jax.set_mesh(mesh):
        steps = serving.advance.lower(
            engine.programs,
            engine.params,
            engine.state,
            scalar(bool, setup.batch_size),
            scalar(np.int32),
            scalar(bool),
        )
        put = serving.insert.lower(engine.programs, engine.state, scalar(np.int32), engine.text, engine.choices)
        caches = aot.cache_shapes(engine.state.rows.cache, engine.state.rows.drafter)
        found = {name: aot.read(aot._compile(one), caches) for name, one in (("advance", steps), ("insert", put))}
    keys = setup.batch_size * setup.buffer * (16 // setup.topology.num_devices) * 128 * 2
    # Of a vocabulary that is split, some logits are gathered (docs/limits.md); never parameters or caches.
    logits = setup.batch_size * (setup.num_draft_tokens + 1) * setup.target.vocab_size * 4
    gathered = 0 if setup.topology.num_devices == 1 else 8 * logits
    results = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(steps.out_info[1]))
    for name, program in found.items():
        assert program.cache_copies == 0, name
        assert program.gathered_bytes <= (gathered if name == "advance" else 0), name
        # Keys whose axes are exchanged around a loop are no copies by name, but are temporaries of this size.
        assert program.temporary_bytes < keys, name
        # All of the donated state comes out where it went in, and beside it the results of a call.
        new = results if name == "advance" else 0
        assert program.output_bytes - program.alias_bytes < 4 * new + 4096, name
        assert program.alias_bytes > 2 * keys, name


@needs_libtpu
@pytest.mark.parametrize("temperature", [pytest.param(0.0, marks=pytest.mark.slow), 1.0])
def test_sampling_on_a_split_vocabulary_sends_a_few_numbers(temperature: float):
    setup = setup_of()
    mesh = aot.make_mesh(setup.topology, 1)
    shapes_of = aot.cache_shapes(plan.shard(setup, mesh).state.rows.drafter)
    program = aot.read(aot.draft_call(setup, mesh, temperature), shapes_of)
    count, size, _ = program.collectives["drafting", "all-reduce"]
    assert set(program.collectives) == {("drafting", "all-reduce"), ("draft_call", "all-reduce")}
    assert count <= 8
    assert size <= 64
    assert program.collectives["draft_call", "all-reduce"][0] == 2 * setup.draft.num_layers + 1


@pytest.mark.slow
@needs_libtpu
def test_what_is_extrapolated_from_few_layers_is_what_all_of_them_give():
    setup = plan.with_layers(setup_of(max_len=4096), 8, 6)
    mesh = aot.make_mesh(setup.topology, 1)
    few, every = (aot.extrapolate(setup, mesh, every_layer=every) for every in (False, True))
    assert few.layers == {"target": [2, 4], "draft": [2, 4]}
    assert every.layers == {"target": [8], "draft": [6]}
    assert (few.exact, every.exact) == (False, True)
    assert few.step.argument_bytes == pytest.approx(every.step.argument_bytes, rel=1e-3)
    assert few.step.alias_bytes == pytest.approx(every.step.alias_bytes, rel=1e-3)
    # Temporaries are not quite linear: they are those of the layer that needs most.
    assert few.step.temporary_bytes == pytest.approx(every.step.temporary_bytes, abs=2**21)
    assert few.step.code_bytes == pytest.approx(every.step.code_bytes, rel=0.2)
    for key, (count, size, largest) in every.step.collectives.items():
        assert few.step.collectives[key][0] == count
        assert few.step.collectives[key][1] == pytest.approx(size, rel=0.01)
        assert few.step.collectives[key][2] == largest
    for call in every.calls:
        assert few.calls[call].flops == pytest.approx(every.calls[call].flops, rel=0.02)
        assert few.calls[call].bytes_accessed is None
        assert (every.calls[call].bytes_accessed or 0) > 0
        assert few.calls[call].collectives == every.calls[call].collectives
