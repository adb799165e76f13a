"""Other engines for `serving.py` under the same clients: transformers' continuous batching, llama.cpp, any server.

None is a dependency of specjax. `transformers` runs in this process. `llama.cpp` is its own server: `llama-server`,
where that is on the path, else `python -m llama_cpp.server`, which answers one request after the other (`pip install
'llama-cpp-python[server]'` compiles it). It gets a GGUF file of the rounded weights. `http_server` is one that runs
already and speaks OpenAI's protocol.
"""

import asyncio
import contextlib
import functools
import http.client
import importlib.util
import itertools
import json
import pathlib
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import peers


class Times(NamedTuple):
    """What a request has seen: seconds to its first token, seconds per token after it, and its new tokens."""

    first: float
    each: float
    tokens: int


Ask = Callable[[Sequence[int]], Times]
"""One request, from the token ids of its prompt."""


class Missing(Exception):
    """An engine that is not here; the message says how to install it."""


class Clock:
    """The times of a request, from now on."""

    def __init__(self):
        self._begin, self._first, self._last = time.perf_counter(), 0.0, 0.0

    def tick(self) -> None:
        """Tokens have come."""
        self._last = time.perf_counter()
        self._first = self._first or self._last

    def times(self, tokens: int) -> Times:
        """What has been seen, after so many tokens."""
        return Times(self._first - self._begin, (self._last - self._first) / max(tokens - 1, 1), tokens)


@functools.cache
def _transformers_model(path: pathlib.Path, dtype: str, threads: int) -> Any:
    return peers.transformers_model(path, dtype, threads)


@contextlib.contextmanager
def transformers(work: peers.Work, clients: int) -> Iterator[Ask]:
    """Continuous batching of transformers, as many requests at once as there are clients.

    Its attention is torch's (`sdpa`) with a mask over the cache entries of all requests, since its kernels for paged
    attention need a GPU. Prefixes are not shared, as in the engines of specjax that are measured here.
    """
    if importlib.util.find_spec("torch") is None:
        raise Missing("transformers is left out: pip install torch transformers.")
    import torch
    from transformers import ContinuousBatchingConfig, GenerationConfig

    model = _transformers_model(work.path, work.dtype, work.threads)
    generation = GenerationConfig(
        max_new_tokens=work.max_new_tokens, do_sample=False, eos_token_id=list(work.stop_tokens), pad_token_id=0
    )
    page = 64
    batching = ContinuousBatchingConfig(
        page_size=page,
        # It admits nobody while less than 15 % of its blocks are free.
        num_blocks=int(clients * (-(-work.context // page) + 1) / 0.8) + 2,
        max_batch_tokens=256,
        max_requests_per_batch=clients,
        allow_block_sharing=False,
    )
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    names = map(str, itertools.count())

    async def one(manager: Any, prompt: Sequence[int]) -> Times:
        said: asyncio.Queue[Any] = asyncio.Queue()
        name, clock = next(names), Clock()
        manager.register_result_handler(name, said.put_nowait)
        manager.add_request(list(prompt), request_id=name, streaming=True, max_new_tokens=work.max_new_tokens)
        while True:
            part = await said.get()
            if part.error is not None:
                raise RuntimeError(f"transformers failed on a request: {part.error}")
            clock.tick()
            if part.is_finished():
                return clock.times(len(part.generated_tokens))

    try:
        with (
            torch.inference_mode(),
            model.continuous_batching_context_manager(
                generation_config=generation, continuous_batching_config=batching, timeout=30
            ) as manager,
        ):
            yield lambda prompt: asyncio.run_coroutine_threadsafe(one(manager, prompt), loop).result()
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


def ask_http(url: str, work: peers.Work, prompt: Sequence[int]) -> Times:
    """One streamed request to a server that speaks OpenAI's protocol, at `url/completions`.

    Where the stream tells no usage, its pieces are counted, which are a token each in `llama_cpp.server`.

    Raises:
      RuntimeError: where it answers with an error.
    """
    place = urllib.parse.urlsplit(url)
    body = {
        "prompt": list(prompt),
        "max_tokens": work.max_new_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "cache_prompt": False,  # llama.cpp's, which else keeps the prefix of the last request.
    }
    clock, pieces, tokens = Clock(), 0, None
    connection = http.client.HTTPConnection(place.hostname or "127.0.0.1", place.port or 80, timeout=3600)
    with contextlib.closing(connection):
        connection.request("POST", f"{place.path}/completions", json.dumps(body), {"content-type": "application/json"})
        answer = connection.getresponse()
        if answer.status != 200:
            raise RuntimeError(f"{url} answered {answer.status}: {answer.read()[:300].decode('utf-8', 'replace')}")
        for line in answer:
            if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
                continue
            event = json.loads(line.removeprefix(b"data: "))
            if event.get("error"):
                raise RuntimeError(f"{url} failed on a request: {event['error']}")
            if any(choice.get("text") for choice in event.get("choices", ())):
                clock.tick()
                pieces += 1
            tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
    return clock.times(pieces if tokens is None else tokens)


@contextlib.contextmanager
def http_server(url: str, work: peers.Work, clients: int) -> Iterator[Ask]:
    """A server that runs already, by its URL, which ends in /v1."""
    yield functools.partial(ask_http, url, work)


def llama_command(path: pathlib.Path, work: peers.Work, clients: int, port: int) -> list[str]:
    """The command that starts llama.cpp's server.

    Raises:
      Missing: where neither of its two servers is installed.
    """
    threads = str(work.threads)
    if found := shutil.which("llama-server"):
        size = str(clients * work.context)
        slots = ["--parallel", str(clients), "--ctx-size", size, "--cont-batching"]
        return [found, "--model", str(path), *slots, "--threads", threads, "--port", str(port)]
    if all(importlib.util.find_spec(name) for name in ("llama_cpp", "uvicorn", "sse_starlette")):
        size = ["--n_ctx", str(work.context), "--n_threads", threads, "--n_threads_batch", threads]
        return [sys.executable, "-m", "llama_cpp.server", "--model", str(path), *size, "--port", str(port)]
    raise Missing("llama.cpp is left out: put llama-server on the path, or pip install 'llama-cpp-python[server]'.")


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def _wait(process: subprocess.Popen[bytes], port: int, seconds: float) -> None:
    """Waits until a server lists its models.

    Raises:
      RuntimeError: where it ends or takes longer.
    """
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        with contextlib.suppress(OSError, http.client.HTTPException), contextlib.closing(connection):
            connection.request("GET", "/v1/models")
            if connection.getresponse().status == 200:
                return
        time.sleep(0.1)
    raise RuntimeError(f"llama.cpp's server did not start (code {process.poll()}) within {seconds:.0f} s.")


@contextlib.contextmanager
def llama_cpp(work: peers.Work, clients: int) -> Iterator[Ask]:
    """llama.cpp's server, with a slot for each client.

    Raises:
      Missing: where it is not installed.
      RuntimeError: where it does not start.
    """
    port = _free_port()
    llama_command(work.path, work, clients, port)  # Before anything is written.
    path = peers.rewritten(work.path, work.dtype, {"float32": "F32", "bfloat16": "BF16"}[work.dtype])
    process = subprocess.Popen(
        llama_command(path, work, clients, port), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        _wait(process, port, 120.0)
        yield functools.partial(ask_http, f"http://127.0.0.1:{port}/v1", work)
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


PEERS: dict[str, Callable[[peers.Work, int], contextlib.AbstractContextManager[Ask]]] = {
    "transformers": transformers,
    "llama.cpp": llama_cpp,
}
"""Engines by the names of their sides."""
