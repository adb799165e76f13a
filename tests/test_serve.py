"""The command that serves: its flags, keys, and the process; and the files that deploy it."""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import yaml
from helpers import WORDS, save_tiny_decoder

pytest.importorskip("uvicorn", reason="the server needs its extra: pip install -e '.[serve]'")

from specjax import cli, serve

ROOT = pathlib.Path(__file__).parents[1]
DOCKERFILES = sorted((ROOT / "launch").glob("Dockerfile.*"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--target is missing"),
        (["--target=x", "--port=70000"], "port"),
        (["--target=x", "--nope=1"], "Unknown command line flag 'nope'"),
        (["--target=x", "y"], "Unknown argument 'y'"),
        (["--target=x", "--api_key_file=/does/not/exist"], "--api_key_file=/does/not/exist does not exist"),
        (["--target=/does/not/exist"], "/does/not/exist does not exist"),
    ],
)
def test_wrong_flags_end_in_a_line(argv, message, capsys):
    assert cli.main(["specjax", "serve", *argv, "--port=0", "--nocompilation_cache"][: 2 + len(argv)]) == 1
    said = capsys.readouterr().err.splitlines()
    assert message in said[-1]
    assert said[-1].startswith("error: ")


def test_help_explains_every_flag(capsys):
    assert serve.main(["serve", "--help"]) == 0
    said = capsys.readouterr().out
    values = serve.define_flags()
    names = [name for name in values if len(name) > 1]
    assert all(f"--{name}: {values[name].help}" in said for name in names)


def test_a_port_that_is_taken_is_said_before_anything_is_loaded(capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert serve.main(["serve", "--target=/does/not/exist", f"--port={port}"]) == 1
    assert f"cannot listen at 127.0.0.1:{port}" in capsys.readouterr().err


def test_keys_come_from_flags_file_and_environment(tmp_path, monkeypatch):
    file = tmp_path / "keys"
    file.write_text("# ours\nfile-1\n\n file-2 \n")
    monkeypatch.setenv("SPECJAX_API_KEYS", "env-1, env-2,")
    values = serve.parse(["serve", "--target=x", "--api_key=flag", "--api_key=file-1", f"--api_key_file={file}"])
    assert serve.read_keys(values) == ("flag", "file-1", "env-1", "env-2", "file-2")
    file.write_text("# none\n")
    with pytest.raises(Exception, match="has no key"):
        serve.read_keys(values)


def test_flags_reach_the_settings():
    values = serve.parse(["serve", "--target=x", "--served_model_name=y", "--request_timeout=0", "--max_n=3"])
    found = serve.settings(values)
    assert (found.model, found.request_timeout, found.limits.n) == ("y", None, 3)
    assert serve.settings(serve.parse(["serve", "--target=x"])).model == "x"


@pytest.mark.slow
def test_the_process_serves_and_ends_by_a_signal(tmp_path):
    target = save_tiny_decoder(tmp_path / "target", 0)
    flags = [f"--target={target}", "--dtype=float32", "--num_slots=2", "--max_len=64", "--port=0", "--max_prediction=0"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "specjax.serve", *flags, "--nocompilation_cache", "--prefix_mib=1"]
    log = (tmp_path / "log").open("w+")
    server = subprocess.Popen(command, env=environment, stderr=log)
    try:
        begin, found = time.monotonic(), None
        while found is None and time.monotonic() < begin + 300 and server.poll() is None:
            time.sleep(0.2)
            found = re.search(r"listening at (http://\S+)", (tmp_path / "log").read_text())
        assert found, (tmp_path / "log").read_text()
        body = json.dumps({"prompt": " ".join(WORDS[:3]), "max_tokens": 8, "temperature": 0, "ignore_eos": True})
        headers = {"content-type": "application/json"}
        request = urllib.request.Request(f"{found[1]}/v1/completions", body.encode(), headers)
        answer = json.load(urllib.request.urlopen(request, timeout=60))
        assert answer["usage"]["completion_tokens"] == 8
        metrics = urllib.request.urlopen(f"{found[1]}/metrics", timeout=10).read().decode()
        assert re.search(r"^specjax:compilations_total\S* 0.0$", metrics, re.MULTILINE)
        server.send_signal(signal.SIGTERM)
        assert server.wait(20) == 0, (tmp_path / "log").read_text()
    finally:
        server.kill()
        server.wait()


# Containers.


def documents() -> dict[str, dict]:
    return {one["kind"]: one for one in yaml.safe_load_all((ROOT / "launch" / "serve.yaml").read_text())}


def test_the_deployment_is_what_kubernetes_takes():
    found = documents()
    assert set(found) == {"Deployment", "Service"}
    deployment, service = found["Deployment"], found["Service"]
    assert (deployment["apiVersion"], service["apiVersion"]) == ("apps/v1", "v1")
    spec = deployment["spec"]
    labels = spec["template"]["metadata"]["labels"]
    assert spec["selector"]["matchLabels"] == labels == service["spec"]["selector"]
    known = {
        *("selector", "replicas", "strategy", "template"),
        *("minReadySeconds", "paused", "progressDeadlineSeconds", "revisionHistoryLimit"),
    }
    assert set(spec) <= known
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert all(re.fullmatch(r"[a-z0-9-]{1,15}", name) for name in ports)
    assert service["spec"]["ports"][0]["targetPort"] in ports
    for name, path in [("startupProbe", "/ready"), ("readinessProbe", "/ready"), ("livenessProbe", "/health")]:
        assert container[name]["httpGet"] == {"path": path, "port": "http"}
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}
    annotations = spec["template"]["metadata"]["annotations"]
    assert all(isinstance(value, str) for value in annotations.values())


def test_the_pod_has_time_to_drain():
    pod = documents()["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    values = serve.parse(["serve", *container["args"]])
    sleep = int(container["lifecycle"]["preStop"]["exec"]["command"][-1])
    assert sleep + values.shutdown_timeout + 5 <= pod["terminationGracePeriodSeconds"]
    assert container["env"][0]["name"] == serve.KEYS
    assert values.port == container["ports"][0]["containerPort"]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_a_dockerfile_copies_what_is_there_and_runs_the_server(path):
    text = path.read_text()
    instructions = [line.split(" ", 1) for line in text.splitlines() if line and not line.startswith(("#", " "))]
    kinds = {
        *("FROM", "RUN", "WORKDIR", "COPY", "USER", "ENV", "VOLUME", "EXPOSE", "ENTRYPOINT"),
    }
    assert {name for name, _ in instructions} == kinds
    for name, rest in instructions:
        if name == "COPY":
            assert all((ROOT / source).exists() for source in rest.split()[:-1])
        if name == "ENTRYPOINT":
            command = json.loads(rest)
            assert command[:3] == ["python", "-m", "specjax.serve"]
            assert serve.parse(["serve", *command[3:], "--target=x"]).host == "0.0.0.0"
    extras = re.search(r"'\.\[([\w,]+)\]'", text)
    assert extras
    assert {"serve", path.suffix[1:]} - {"cpu"} == set(extras[1].split(","))
    assert text.index("USER serve") < text.index("ENTRYPOINT")


def test_there_is_a_dockerfile_for_each_kind_of_machine():
    assert [path.suffix for path in DOCKERFILES] == [".cpu", ".cuda", ".tpu"]
