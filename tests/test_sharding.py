"""The decode step as one program on a mesh of 8 virtual devices, and the rules that place its arrays."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from specjax import sharding
from specjax.models import families
from specjax.models.config import DecoderConfig

PROGRAM = pathlib.Path(__file__).with_name("mesh_program.py")
CASES = [f"{name} {temperature}" for name in ("none", "ngram", "model", "t5") for temperature in (0.0, 1.0)]


@pytest.fixture(scope="module")
def report():
    """What `mesh_program` saw on `data` 2 x `model` 4; its devices have to exist before JAX starts."""
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, str(PROGRAM)], env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", CASES)
def test_text_on_the_mesh_is_the_text_of_one_device(report, case):
    assert report["devices"] == 8
    one, mesh = report["cases"][case]
    assert one == mesh
    assert len({tuple(row) for row in one}) == len(one), "rows that all write the same text would prove little"


def test_cache_is_split_over_rows_and_heads_and_stays_so(report):
    rows, heads, *rest = report["cache_shape"]
    assert report["cache_shard"] == [rows // 2, heads // 4, *rest]
    assert report["cache_shard_after"] == report["cache_shard"]


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


def test_every_parameter_names_one_axis_a_dimension():
    config = DecoderConfig(64, 32, 64, 2, 4, 2, 8, 64, qkv_bias=True, output_bias=True, mlp_bias=True)
    shapes, axes = families.abstract_params(config), families.param_axes(config)
    leaves, treedef = jax.tree.flatten(shapes)
    for shape, names in zip(leaves, treedef.flatten_up_to(axes), strict=True):
        assert len(shape.shape) == len(names)
        sharding.partition_spec(names, sharding.RULES)
    assert sum(int(np.prod(s.shape)) for s in leaves) > 0
