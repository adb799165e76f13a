"""Two processes, each with half of the devices, run one experiment as one process does."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest
from helpers import WORDS, save_tiny_decoder, virtual_devices
from jax.sharding import AbstractMesh, PartitionSpec

from specjax import launch
from specjax.parallel import distributed, sharding

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.slow
def test_two_processes_write_what_one_writes(tmp_path):
    target = save_tiny_decoder(tmp_path / "target", 0, ["more"])
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": " ".join(WORDS[i : i + 5])}) + "\n" for i in range(3)))
    keys = {"target": target, "data": data, "max_new_tokens": 12, "repeats": 1, "batch_size": 2, "temperature": 1.0}
    keys["verify"] = "coupled"
    argv = [sys.executable, "-m", "specjax.launch", f"--config={ROOT / 'configs' / 'compare.py'}"]
    argv += [f"--config.{key}={value}" for key, value in keys.items()] + ["--nocompilation_cache"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    env = virtual_devices(2) | {"PYTHONPATH": str(ROOT), "JAX_NUM_PROCESSES": "2", "JAX_COORDINATOR_ADDRESS": address}
    several = [*argv, "--distributed", "--config.mesh_data=2", "--config.mesh_model=2"]
    processes = [
        subprocess.Popen(
            [*several, f"--workdir={tmp_path / f'out{i}'}"],
            env=env | {"JAX_PROCESS_ID": str(i)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    said = [process.communicate(timeout=400) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], [error[-2000:] for _, error in said]
    # What carries arrays between CPUs prints as well.
    for word in ("Loading", "identical", "Results:"):
        assert word in said[0][0]
        assert word not in said[1][0]
    assert not (tmp_path / "out1").exists()
    assert launch.main(["launch", *argv[3:], f"--workdir={tmp_path / 'one'}"]) == 0
    together, alone = (
        [json.loads(line) for line in (tmp_path / name / "samples.jsonl").read_text().splitlines()]
        for name in ("out0", "one")
    )
    assert [sample["text"] for sample in together] == [sample["text"] for sample in alone]
    assert len({sample["text"] for sample in alone}) == 3
    (row,) = [row for row in json.loads((tmp_path / "out0" / "results.json").read_text()) if row["task"] == "all"]
    assert row["identical"] == 1.0
    assert "4 devices" in row["device"]


def test_processes_that_nobody_introduces_are_an_error(tmp_path, monkeypatch, capfd):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    config = f"--config={ROOT / 'configs' / 'compare.py'}"
    assert launch.main(["launch", config, "--distributed", f"--workdir={tmp_path}", "--nocompilation_cache"]) == 1
    assert "set JAX_COORDINATOR_ADDRESS=HOST:PORT" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES='two' is not a number"),
        ({"JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID=2 with JAX_NUM_PROCESSES=2: the first is 0, the last 1"),
        ({"JAX_PROCESS_ID": "-1"}, "JAX_PROCESS_ID=-1"),
        ({"JAX_NUM_PROCESSES": "0"}, "JAX_NUM_PROCESSES=0: at least 1"),
        ({"JAX_COORDINATOR_ADDRESS": "somewhere"}, "JAX_COORDINATOR_ADDRESS='somewhere' is not HOST:PORT"),
        ({"SPECJAX_JOIN_TIMEOUT": "long"}, "SPECJAX_JOIN_TIMEOUT='long' is not a number"),
    ],
)
def test_a_wrong_variable_is_named(changed, message, monkeypatch):
    told = {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"} | changed
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        distributed.initialize()


@pytest.mark.parametrize(
    ("place", "missing"),
    [(0, "process 1 to come to 127.0.0.1:"), (1, "process 0, which does not answer at 127.0.0.1:")],
)
def test_a_process_says_whom_it_waits_for_and_ends(place, missing):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    code = "from specjax.parallel import distributed; distributed._PAUSE = 0.5; distributed.initialize()"
    told = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(place)}
    env = os.environ | told | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "SPECJAX_JOIN_TIMEOUT": "1.5"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if "waits for" in line or "error:" in line]
    assert lines[0].startswith(f"Process {place} of 2 waits for {missing}")
    assert f"error: Process {place} of 2 waited" in lines[-1]
    assert "SPECJAX_JOIN_TIMEOUT" in lines[-1]
    assert "Check failure stack trace" not in done.stderr


def test_help_names_the_variables(capfd):
    assert launch.main(["launch", "--help"]) == 0
    said = capfd.readouterr().out
    for name in ("JAX_COORDINATOR_ADDRESS=HOST:PORT", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "SPECJAX_JOIN_TIMEOUT"):
        assert name in said


def test_what_does_not_divide_is_kept_whole_by_a_flag(tmp_path, capfd):
    mesh = AbstractMesh((1, 2, 1), ("data", "model", "width"))
    with pytest.raises(ValueError, match=r"--config\.mesh_whole=kv_heads"):
        sharding.named_sharding(mesh, (3, 8), ("kv_heads", "head_dim"))
    rules = sharding.with_whole(" kv_heads,vocab")
    assert sharding.named_sharding(mesh, (3, 8), ("kv_heads", "head_dim"), rules).spec == PartitionSpec(None, None)
    assert sharding.named_sharding(mesh, (3, 8), ("embed", "mlp"), rules).spec == PartitionSpec(None, "model")
    assert sharding.with_whole("") == sharding.RULES
    config = f"--config={ROOT / 'configs' / 'compare.py'}"
    data = [f"--config.data={ROOT / 'LICENSE'}", f"--workdir={tmp_path}", "--nocompilation_cache"]
    assert launch.main(["launch", config, *data, "--config.mesh_whole=heads"]) == 1
    assert "config.mesh_whole='heads': 'heads' is not split" in capfd.readouterr().err


def test_one_process_agrees_with_itself(tmp_path):
    assert distributed.from_first({"a": [1, None]}) == {"a": [1, None]}
    assert distributed.mirror(tmp_path) == tmp_path
