"""The server on Ray: its arguments, the file that deploys it, and two replicas of which one is killed under load."""

import asyncio
import contextlib
import http.client
import importlib
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from helpers import WORDS, save_tiny_decoder

pytest.importorskip("uvicorn", reason="the server needs its extra: pip install -e '.[serve]'")

from specjax import launch, ray_app

ROOT = pathlib.Path(__file__).parents[1]
HERE = "ray is not installed: pip install -e '.[ray]'"


# Arguments.


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({}, "--target is missing"),
        ({"target": "x", "num_replica": 2}, "Unknown command line flag 'num_replica'"),
        ({"target": "x", "num_slots": "many"}, "num_slots"),
        ({"target": "x", "num_replicas": 0}, "num_replicas"),
        ({"target": "x", "port": 8001}, "port is not an argument here"),
        ({"target": "x", "num_replicas": 4, "max_replicas": 2}, "max_replicas=2 is less than num_replicas=4"),
    ],
)
def test_wrong_arguments_are_named(args, message):
    with pytest.raises(launch.UsageError, match=re.escape(message)):
        ray_app.parse(args)


def test_arguments_are_flags():
    values = ray_app.parse({"target": "x", "num_slots": "3", "access_log": False, "api_key": ["a", "b"], "max_n": 2})
    assert (values.num_slots, values.access_log, values.api_key, values.max_n) == (3, False, ["a", "b"], 2)
    assert (values.num_replicas, values.max_replicas) == (1, 0)


def test_slots_bound_what_a_replica_is_given():
    values = ray_app.parse({"target": "x", "num_slots": 4, "shutdown_timeout": 7, "num_tpus": 4, "num_replicas": 2})
    options = ray_app.replica_options(values)
    assert (options["num_replicas"], options["max_ongoing_requests"]) == (2, 8)
    assert options["ray_actor_options"] == {"num_cpus": 1.0, "num_gpus": 0.0, "resources": {"TPU": 4}}
    # What a replica may take to end lies within what the ingress may take, and both beyond what requests may.
    ends = [one["graceful_shutdown_timeout_s"] for one in (options, ray_app.ingress_options(values))]
    assert 7 < ends[0] < ends[1]


def test_the_number_of_replicas_follows_requests_by_slot():
    values = ray_app.parse({"target": "x", "num_slots": 4, "num_replicas": 2, "max_replicas": 6})
    options = ray_app.replica_options(values)
    assert "num_replicas" not in options
    assert options["autoscaling_config"] == {"min_replicas": 2, "max_replicas": 6, "target_ongoing_requests": 4.0}


# A replica.


class Engine:
    alive = False

    def close(self, timeout: float) -> None:
        """Ray has a replica do this at its end."""


def test_a_replica_without_an_engine_is_replaced(monkeypatch):
    class Left(BaseException):
        pass

    def leave(code: int) -> None:
        raise Left(code)

    replica = object.__new__(ray_app.Replica)
    engine: Any = Engine()
    replica._engine = engine
    monkeypatch.setattr(ray_app.os, "_exit", leave)
    with pytest.raises(RuntimeError, match="has died"):
        asyncio.run(replica.check_health())
    call: Any = None
    with pytest.raises(Left, match="3"):
        asyncio.run(anext(replica.answer(call)))
    engine.alive = True
    asyncio.run(replica.check_health())


# The file.


def test_the_file_is_what_ray_takes():
    config = yaml.safe_load((ROOT / "launch" / "ray.yaml").read_text())
    assert set(config) == {"proxy_location", "http_options", "applications"}
    assert config["proxy_location"] in ("EveryNode", "HeadOnly", "Disabled")
    assert set(config["http_options"]) <= {"host", "port", "root_path", "request_timeout_s", "keep_alive_timeout_s"}
    (application,) = config["applications"]
    known = {"name", "route_prefix", "import_path", "runtime_env", "deployments", "args", "logging_config"}
    assert set(application) <= known
    module, name = application["import_path"].split(":")
    assert callable(getattr(importlib.import_module(module), name))
    values = ray_app.parse(application["args"])
    assert values.max_replicas > values.num_replicas > 1
    assert not values.api_key  # the dashboard shows arguments


@pytest.mark.slow
def test_the_file_is_valid_for_ray_itself():
    schema = pytest.importorskip("ray.serve.schema", reason=HERE)
    config = yaml.safe_load((ROOT / "launch" / "ray.yaml").read_text())
    found = schema.ServeDeploySchema.model_validate(config).model_dump(exclude_unset=True)
    assert found["applications"][0]["args"] == config["applications"][0]["args"]
    extra = set(config["http_options"]) - set(schema.HTTPOptionsSchema.model_fields)
    extra |= set(config["applications"][0]) - set(schema.ServeApplicationSchema.model_fields)
    assert not extra  # ray ignores fields that it does not know


# A cluster.

CLUSTER = """
import json, sys, time
import ray
from ray import serve
from specjax import ray_app

args, port, name, delays = json.loads(sys.argv[1]), int(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4])
if delays:
    given = ray_app.replica_options
    ray_app.replica_options = lambda values: (
        given(values) | {"autoscaling_config": given(values)["autoscaling_config"] | delays}
    )
ray.init(num_cpus=4, object_store_memory=80 * 2**20, include_dashboard=False, log_to_driver=True)
serve.start(http_options={"port": port})
serve.run(ray_app.app(args), name=name)
print("it runs", flush=True)
sys.stdin.read()
serve.shutdown()
ray.shutdown()
"""
"""A cluster of this machine, until its input ends."""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as one:
        return one.getsockname()[1]


def replicas(name: str) -> list[int]:
    """The processes of the replicas of an application, which Ray names."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if path.read_bytes().startswith(f"ray::ServeReplica:{name}:Replica".encode()):
                found.append(int(path.parent.name))
    return sorted(found)


class Cluster:
    def __init__(self, port: int, name: str, log: pathlib.Path):
        self.port, self.name, self.log = port, name, log

    def send(self, path: str, body: Any = None) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            headers = {"content-type": "application/json"}
            connection.request("GET" if body is None else "POST", path, body and json.dumps(body), headers)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()


@contextlib.contextmanager
def run(path: pathlib.Path, delays: dict[str, float], **changes: Any) -> Iterator[Cluster]:
    """The application on a cluster of this machine.

    Args:
      path: an empty directory.
      delays: in the place of Ray's own, which are minutes.
      **changes: of the application's arguments.
    """
    pytest.importorskip("ray.serve", reason=HERE)
    # Ray's sockets need a short path.
    short = tempfile.mkdtemp(prefix="rt")
    args = {
        "target": save_tiny_decoder(path / "target", 0),
        "served_model_name": "m",
        "dtype": "float32",
        "num_slots": 2,
        "max_len": 128,
        "max_prediction": 0,
        "prefix_mib": 1,
        "num_cpus": 1,
        "compilation_cache": False,
        "shutdown_timeout": 5,
    } | changes
    port, name = free_port(), f"specjax{os.getpid()}"
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "RAY_TMPDIR": short,
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    log = path / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-c", CLUSTER, json.dumps(args), str(port), name, json.dumps(delays)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
        try:
            end = time.monotonic() + 300
            while "it runs" not in log.read_text() and time.monotonic() < end and process.poll() is None:
                time.sleep(0.5)
            assert "it runs" in log.read_text(), log.read_text()
            yield Cluster(port, name, log)
            process.communicate(timeout=60)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            shutil.rmtree(short, ignore_errors=True)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    with run(tmp_path_factory.mktemp("cluster"), {}, num_replicas=2) as cluster:
        yield cluster


def request(i: int, stream: bool) -> dict[str, Any]:
    """A prompt of its own, greedy, so that its text is known."""
    prompt = " ".join(WORDS[(i * 7 + j * (i % 5 + 1)) % len(WORDS)] for j in range(3 + i % 5))
    return {"prompt": prompt, "max_tokens": 60, "temperature": 0, "ignore_eos": True, "stream": stream}


def text_of(answer: tuple[int, str], stream: bool) -> str | None:
    """The text of an answer; None where a stream ended with an error, which a client sends again."""
    status, body = answer
    assert status == 200, body
    if not stream:
        return json.loads(body)["choices"][0]["text"]
    assert body.endswith("data: [DONE]\n\n")
    events = [json.loads(one[6:]) for one in body.split("\n\n") if one.startswith("data: {")]
    if "error" in events[-1]:
        assert "send the request again" in events[-1]["error"]["message"]
        return None
    return "".join(event["choices"][0]["text"] for event in events if event["choices"])


@pytest.mark.slow
def test_all_replicas_are_in_the_metrics(cluster):
    assert cluster.send("/health")[0] == cluster.send("/ready")[0] == 200
    assert json.loads(cluster.send("/v1/models")[1])["data"][0]["id"] == "m"
    status, body = cluster.send("/metrics")
    names = re.findall(r'^specjax:engine_alive\{engine="([^"]+)",model_name="m"\} 1.0$', body, re.MULTILINE)
    assert (status, len(set(names))) == (200, 2)
    assert body.count("# HELP specjax:engine_alive ") == 1
    assert cluster.send("/v1/completions", {"prompt": "the", "max_tokens": "x"})[0] == 400
    assert cluster.send("/nothing")[0] == 404


@pytest.mark.slow
def test_the_death_of_a_replica_under_load_leaves_no_request_without_its_answer(cluster):
    number, sent_again, wrong = 120, [], []
    first = {i: text_of(cluster.send("/v1/completions", request(i, False)), False) for i in range(20)}
    assert len(set(first.values())) > 5  # prompts are told apart
    before = replicas(cluster.name)
    assert len(before) == 2, cluster.log.read_text()
    left, answered, lock = list(range(number)), {}, threading.Lock()

    def client() -> None:
        while True:
            with lock:
                if not left:
                    return
                i = left.pop()
            stream, text = i % 3 == 0, None
            try:
                while text is None:
                    text = text_of(cluster.send("/v1/completions", request(i % 20, stream)), stream)
                    if text is None:
                        sent_again.append(i)
            except Exception as error:
                wrong.append((i, repr(error)))
                return
            with lock:
                answered[i] = text

    clients = [threading.Thread(target=client) for _ in range(12)]
    for one in clients:
        one.start()
    while len(answered) < number // 6:
        time.sleep(0.01)
        assert not wrong
    os.kill(before[0], signal.SIGKILL)
    at_death = len(answered)
    for one in clients:
        one.join(240)
    assert not wrong
    assert sorted(answered) == list(range(number))
    assert all(text == first[i % 20] for i, text in answered.items())
    assert at_death < number // 2  # it died under load
    log = cluster.log.read_text()
    assert "was lost" in log, log  # and had requests
    end = time.monotonic() + 120
    while len(replicas(cluster.name)) < 2 and time.monotonic() < end:
        time.sleep(0.5)
    after = replicas(cluster.name)
    assert before[0] not in after
    assert len(after) == 2
    print(f"{len(sent_again)} streams were sent again of {number} requests; {at_death} had been answered at the death")


def wait_for(cluster: Cluster, number: int, seconds: float = 180.0) -> None:
    """Waits until the application has so many replicas."""
    end = time.monotonic() + seconds
    while (now := len(replicas(cluster.name))) != number:
        assert time.monotonic() < end, f"{now} replicas, not {number}: {cluster.log.read_text()}"
        time.sleep(0.5)


@pytest.mark.slow
def test_replicas_follow_the_load_and_go_again(tmp_path):
    """Ray's autoscaler itself, with shorter delays than its 30 s up and 10 minutes down."""
    delays = {"upscale_delay_s": 2.0, "downscale_delay_s": 4.0, "metrics_interval_s": 0.5, "look_back_period_s": 2.0}
    with run(tmp_path, delays, num_replicas=1, max_replicas=2) as cluster:
        first = [text_of(cluster.send("/v1/completions", request(i, False)), False) for i in range(8)]
        time.sleep(6.0)
        assert len(replicas(cluster.name)) == 1  # a request at a time needs no second one
        wrong, number, ends = [], [0] * 8, threading.Event()

        def client(i: int) -> None:
            try:
                while not ends.is_set():
                    text = text_of(cluster.send("/v1/completions", request(i, False)), False)
                    number[i] += 1
                    assert text == first[i]
            except Exception as error:
                wrong.append((i, repr(error)))

        clients = [threading.Thread(target=client, args=(i,)) for i in range(8)]
        for one in clients:
            one.start()
        try:
            wait_for(cluster, 2)  # eight requests at a time, two slots
            end = time.monotonic() + 180
            while cluster.send("/metrics")[1].count("\nspecjax:engine_alive{") < 2 and time.monotonic() < end:
                time.sleep(1.0)
        finally:
            ends.set()
            for one in clients:
                one.join(120)
        assert not wrong
        assert min(number) > 0
        pattern = r"^vllm:generation_tokens_total\{[^}]*\} [0-9.e+]+$"
        assert len(re.findall(pattern, cluster.send("/metrics")[1], re.MULTILINE)) == 2
        wait_for(cluster, 1)
        assert text_of(cluster.send("/v1/completions", request(0, False)), False) == first[0]
