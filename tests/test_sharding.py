"""The decode step as one program on a mesh of 8 virtual devices, and the rules that place its arrays."""

import json
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from helpers import virtual_devices
from jax.sharding import PartitionSpec
from mesh_text_program import BEAMS, DEFAULT_LOGITS, DRAFTERS, EXPERTS, MESHES, RULES, SLOW

from specjax.models import families
from specjax.models.config import DecoderConfig
from specjax.parallel import sharding


def start(program: str, devices: int, *args: str) -> subprocess.Popen:
    """Starts a program of this directory with so many virtual devices, which have to exist before JAX starts."""
    command = [sys.executable, str(pathlib.Path(__file__).with_name(program)), *args]
    return subprocess.Popen(
        command, env=virtual_devices(devices), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def reports(*processes: subprocess.Popen) -> list[dict]:
    """What each printed; all are stopped where one fails."""
    try:
        found = [process.communicate(timeout=900) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, error) in zip(processes, found, strict=True):
        assert process.returncode == 0, error[-3000:]
    return [json.loads(out.splitlines()[-1]) for out, _ in found]


@pytest.fixture(scope="module")
def report():
    """What `mesh_program` saw on `data` 2 x `model` 4."""
    return reports(start("mesh_program.py", 8))[0]


@pytest.fixture(scope="module")
def texts():
    """What `mesh_text_program` decoded in one process."""
    return reports(start("mesh_text_program.py", 8))[0]


@pytest.fixture(scope="module")
def more_texts():
    """The rest of what it can decode."""
    return reports(start("mesh_text_program.py", 8, "slow"))[0]


@pytest.fixture(scope="module")
def texts_of_two():
    """What two processes of it decoded together."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    return reports(*(start("mesh_text_program.py", 2, port, str(index)) for index in range(2)))


def assert_same_text(case: list) -> None:
    (one, accepted), (mesh, accepted_on_mesh) = case
    assert one == mesh
    assert accepted == accepted_on_mesh
    assert len({tuple(row) for row in one}) > len(one) / 2, "rows that all write the same text would prove little"


def names(meshes):
    return [f"{name}: {', '.join(case)}" for name, (_, _, _, cases) in meshes.items() for case in cases]


def assert_text_of_one_device(report, case):
    assert report["devices"] == 8
    assert_same_text(report["cases"][case])
    if "model, " in case:
        assert report["cases"][case][0][1] > 0, "drafts that are never accepted would prove little"


@pytest.mark.parametrize("case", names(MESHES))
def test_text_on_a_mesh_is_the_text_of_one_device(texts, case):
    assert_text_of_one_device(texts, case)


def test_an_int4_model_on_a_mesh_is_that_of_one_device(texts):
    found = texts["int4"]
    assert found["error"] < 1e-3 * found["deviation"]
    assert found["held"] <= 0.5, "a model of which each device holds the whole would prove little"


HELD = {"experts, each split": 1 / 4, "experts, whole": 1 / 4, "experts, split twice": 1 / 4, "olmo2": 1 / 4}
"""What part of the experts, or of the feed-forward, each device holds."""


def assert_logits_of_one_device(found, name):
    assert found["error"] < 1e-4 * found["deviation"]
    assert found["held"] == HELD.get(name, 1.0)


@pytest.mark.parametrize("name", DEFAULT_LOGITS)
def test_experts_on_a_mesh_are_those_of_one_device(texts, name):
    found = texts["logits"][name]
    assert_logits_of_one_device(found, name)
    # After attention, after the experts (not after each of them), for the lookup of the tokens.
    assert found["all_reduces"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERTS)
def test_logits_on_a_mesh_are_those_of_one_device(more_texts, name):
    assert_logits_of_one_device(more_texts["logits"][name], name)


@pytest.mark.slow
@pytest.mark.parametrize("case", names(SLOW))
def test_more_text_on_a_mesh_is_the_text_of_one_device(more_texts, case):
    assert_text_of_one_device(more_texts, case)


def test_every_rule_and_drafter_is_decoded_on_a_mesh():
    decoded = {case for meshes in (MESHES, SLOW) for _, _, _, cases in meshes.values() for case in cases}
    assert {rule for _, _, rule in decoded} == {*RULES, BEAMS}
    assert {drafter for _, drafter, _ in decoded} == set(DRAFTERS)


@pytest.mark.slow
def test_text_of_two_processes_is_the_text_of_one_device(texts_of_two):
    for found in texts_of_two:
        assert (found["devices"], found["processes"]) == (4, 2)
        assert len(found["cases"]) > 1
        for case in found["cases"].values():
            assert_same_text(case)


@pytest.mark.slow
def test_cache_is_split_over_rows_and_heads_and_stays_so(report):
    rows, heads, *rest = report["cache_shape"]
    assert report["cache_shard"] == [rows // 2, heads // 4, *rest]
    assert report["cache_shard_after"] == report["cache_shard"]


@pytest.mark.slow
def test_cache_is_neither_copied_nor_gathered(report):
    assert report["cache_copies"] == 0
    assert report["collectives"]["all-reduce"] > 0
    assert "all-to-all" not in report["collectives"]
    assert report["gathered_bytes"] < report["cache_layer_bytes"] / 8


def test_rules_name_what_they_do_not_know():
    with pytest.raises(ValueError, match="'heds'"):
        sharding.partition_spec(("embed", "heds"), sharding.RULES)
    with pytest.raises(ValueError, match="'kv_hed'"):
        sharding.override(sharding.RULES, kv_hed=None)


def test_two_axes_of_an_array_cannot_share_a_mesh_axis():
    with pytest.raises(ValueError, match="one mesh axis cannot split two"):
        sharding.partition_spec(("vocab", "mlp"), sharding.RULES)


def test_a_size_that_does_not_divide_names_the_remedy():
    mesh = jax.sharding.AbstractMesh((1, 4), ("data", "model"))
    with pytest.raises(ValueError, match=r"'kv_heads' of size 3 .* override\(RULES, kv_heads=None\)"):
        sharding.named_sharding(mesh, (8, 3), ("embed", "kv_heads"))
    rules = sharding.override(sharding.RULES, kv_heads=None)
    spec = sharding.partition_spec(("embed", "kv_heads"), rules)
    assert spec == PartitionSpec(None, None)


def test_a_mesh_of_the_wrong_size_names_the_devices():
    with pytest.raises(ValueError, match="JAX sees"):
        sharding.make_mesh(data=3, model=5)


def test_what_is_replicated_and_what_is_split_twice():
    assert sharding.partition_spec(("batch", "mlp"), sharding.REPLICATED) == PartitionSpec("data", None)
    assert sharding.partition_spec(("embed", "mlp"), sharding.RULES_2D) == PartitionSpec("width", "model")


def test_every_parameter_names_one_axis_a_dimension():
    config = DecoderConfig(64, 32, 64, 2, 4, 2, 8, 64, qkv_bias=True, output_bias=True, mlp_bias=True)
    shapes, axes = families.abstract_params(config), families.param_axes(config)
    leaves, treedef = jax.tree.flatten(shapes)
    for shape, names in zip(leaves, treedef.flatten_up_to(axes), strict=True):
        assert len(shape.shape) == len(names)
        sharding.partition_spec(names, sharding.RULES)
    assert sum(int(np.prod(s.shape)) for s in leaves) > 0


@pytest.mark.slow
def test_an_engine_on_a_mesh_gives_the_texts_of_one_device():
    report = reports(start("mesh_engine_program.py", 8))[0]
    assert report["mesh"] == report["alone"]
    assert report["accepted"] > 0
    assert report["compilations"] == 0
