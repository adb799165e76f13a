"""The relay before replicas: which requests are repeated, what clients see of a death, and answers of all replicas."""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

import pytest
from serving_fakes import FakeEngine, echo

pytest.importorskip("uvicorn", reason="the server needs its extra: pip install -e '.[serve]'")

from specjax.serving import errors, relay
from specjax.serving.relay import Bounds, Call, Lost, Relay, Whole
from specjax.serving.server import Server, Settings, application

START = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]}
STREAM = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream; charset=x")]}
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
BOUNDS = Bounds(max_body=1000, request_timeout=5.0, short_timeout=0.2, pause=0.0)

Part = Any
"""A message, an error that is raised in its place, or seconds to wait."""


def piece(text: str, more: bool = True) -> dict[str, Any]:
    return {"type": "http.response.body", "body": text.encode(), "more_body": more}


class Replicas:
    """Answers by a script: the messages of the first replica that is asked, of the second, and so on."""

    def __init__(self, *scripts: Sequence[Part]):
        self.scripts, self.calls, self.closed = list(scripts), [], 0
        self.everywhere: list[Whole] = []

    async def ask(self, call: Call) -> AsyncGenerator[list[Any], None]:
        self.calls.append(call)
        try:
            for part in self.scripts[len(self.calls) - 1]:
                if isinstance(part, Exception):
                    raise part
                if isinstance(part, float):
                    await asyncio.sleep(part)
                else:
                    yield [part]
        finally:
            self.closed += 1

    async def ask_all(self, call: Call) -> list[Whole]:
        self.calls.append(call)
        return self.everywhere


async def send_to(app: Any, path: str, bodies: Sequence[bytes] = (b"{}",), method: str = "POST") -> list[Any]:
    """The messages that a client is sent."""
    left, sent = list(bodies), []

    async def receive() -> Any:
        if not left:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": method, "path": path, "headers": [(b"accept", b"*/*")], "client": ("x", 1)}
    await app(scope, receive, send)
    return sent


def through(replicas: Replicas, path: str, *bodies: bytes, method: str = "POST") -> tuple[int, bytes]:
    """Status and body of what a client is sent."""
    relaying = Relay(replicas.ask, replicas.ask_all, BOUNDS)
    start, *rest = asyncio.run(send_to(relaying, path, bodies or (b"{}",), method))
    assert start["type"] == "http.response.start"
    assert [message.get("more_body", False) for message in rest] == [True] * (len(rest) - 1) + [False]
    return start["status"], b"".join(message["body"] for message in rest)


def message_of(body: bytes) -> str:
    return json.loads(body)["error"]["message"]


def test_an_answer_passes():
    replicas = Replicas([START, piece("yes", False)])
    assert through(replicas, COMPLETIONS, b'{"prompt":', b' "a"}') == (200, b"yes")
    (call,) = replicas.calls
    assert (call.method, call.path, call.body, call.prompt) == ("POST", COMPLETIONS, b'{"prompt": "a"}', "a")
    assert (call.headers, call.client) == (((b"accept", b"*/*"),), ("x", 1))


@pytest.mark.parametrize(
    "before", [[], [START], [START, piece("half of an ")], [{**START, "status": 503}, piece("no", False)]]
)
def test_a_whole_answer_is_repeated_until_it_is_complete(before):
    replicas = Replicas([*before, Lost("died")], [START, piece("yes", False)])
    assert through(replicas, COMPLETIONS) == (200, b"yes")
    assert len(replicas.calls) == replicas.closed == 2


def test_a_stream_is_repeated_until_its_first_token():
    begun = [STREAM, piece("role ")]
    replicas = Replicas([*begun, Lost("died")], [*begun, piece("a "), piece("b", False)])
    assert through(replicas, CHAT) == (200, b"role a b")
    assert len(replicas.calls) == 2


@pytest.mark.parametrize(("path", "opening"), [(CHAT, [piece("role ")]), (COMPLETIONS, [])])
def test_a_stream_with_tokens_ends_with_an_error_that_its_client_sees(path, opening):
    replicas = Replicas([STREAM, *opening, piece("token "), Lost("died")], [STREAM, piece("again", False)])
    status, body = through(replicas, path)
    text, event, done, end = body.decode().replace("token ", "token \n\n").split("\n\n")
    assert (status, text.split()[-1], done, end) == (200, "token", "data: [DONE]", "")
    error = json.loads(event.removeprefix("data: "))["error"]
    assert "send the request again" in error["message"]
    assert error["code"] == "service_unavailable"
    assert len(replicas.calls) == 1


def test_what_kills_its_replica_does_not_kill_them_all():
    replicas = Replicas(*[[Lost("died")]] * 5)
    status, body = through(replicas, COMPLETIONS)
    assert (status, len(replicas.calls)) == (503, relay.TRIES)
    assert "3 replicas in turn died" in message_of(body)


def test_a_full_queue_is_said_and_not_tried_again():
    replicas = Replicas([errors.overloaded("full", 1.0)])
    status, body = through(replicas, COMPLETIONS)
    assert (status, message_of(body), len(replicas.calls)) == (429, "full", 1)


def test_an_answer_that_ends_too_early_is_an_error():
    status, body = through(Replicas([START, piece("half")]), COMPLETIONS)
    assert status == 500
    assert "too early" in message_of(body)


def test_a_bug_is_said():
    status, body = through(Replicas([KeyError("no")]), COMPLETIONS)
    assert (status, message_of(body)) == (500, "The relay failed (KeyError): this is a bug.")


def test_a_body_that_is_too_large_reaches_no_replica():
    replicas = Replicas()
    assert through(replicas, COMPLETIONS, b"x" * 600, b"x" * 600)[0] == 413
    assert not replicas.calls


def test_requests_have_a_time():
    replicas = Replicas([2.0], [START, 30.0])
    assert through(replicas, "/v1/models", method="GET")[0] == 503  # no replica runs
    relaying = Relay(replicas.ask, replicas.ask_all, BOUNDS._replace(request_timeout=0.1))
    start, body = asyncio.run(send_to(relaying, COMPLETIONS))
    assert (start["status"], json.loads(body["body"])["error"]["code"]) == (504, "timeout")
    assert replicas.closed == 2


def test_ids_are_left_to_whoever_hands_requests_in():
    start = {**START, "headers": [(b"x-request-id", b"1"), (b"x-other", b"2")]}
    replicas = Replicas([start, piece("", False)])
    found = asyncio.run(send_to(Relay(replicas.ask, replicas.ask_all, BOUNDS), "/"))
    assert found[0]["headers"] == [(b"x-other", b"2")]


def test_metrics_are_those_of_all_replicas():
    replicas = Replicas()
    texts = [f"# HELP a The a.\n# TYPE a counter\na{{engine={i}}} {i}\n# HELP b B.\nb{{engine={i}}} 0\n" for i in "12"]
    head = ((b"content-type", b"text/plain"), (b"content-length", b"9"))
    replicas.everywhere = [Whole(200, head, text.encode()) for text in texts] + [Whole(503, (), b"dead")]
    assert through(replicas, "/metrics", method="GET") == (
        200,
        b"# HELP a The a.\n# TYPE a counter\na{engine=1} 1\na{engine=2} 2\n# HELP b B.\nb{engine=1} 0\nb{engine=2} 0\n",
    )
    start, _ = asyncio.run(send_to(Relay(replicas.ask, replicas.ask_all, BOUNDS), "/metrics", method="GET"))
    assert start["headers"] == [(b"content-type", b"text/plain")]  # the length was that of one replica
    replicas.everywhere = [Whole(401, (), b"key")] * 2
    assert through(replicas, "/metrics", method="GET") == (401, b"key")


def test_health_is_that_of_the_best_replica():
    replicas = Replicas()
    replicas.everywhere = [Whole(503, (), b"dead"), Whole(200, (), b"fine")]
    assert through(replicas, "/health", method="GET") == (200, b"fine")
    replicas.everywhere = [Whole(503, (), b"dead")]
    assert through(replicas, "/ready", method="GET")[0] == 503
    replicas.everywhere = []
    assert through(replicas, "/ping", method="GET")[0] == 503


@pytest.mark.parametrize(
    ("fields", "prompt"),
    [
        ({"prompt": "hello"}, "hello"),
        ({"prompt": ["a", "b"]}, "ab"),
        ({"prompt": [[1, 22], [3]]}, "1 22 3 "),
        ({"messages": [{"role": "system", "content": "s"}, {"content": [{"type": "text", "text": "t"}]}]}, "st"),
        ({"prompt": "x" * 9000}, "x" * 8192),
        ({"prompt": ""}, "/path"),
        ({"messages": [{"content": None}]}, "/path"),
        ([1], "/path"),
    ],
)
def test_the_beginning_of_a_prompt(fields, prompt):
    assert relay.beginning("/path", json.dumps(fields).encode()) == prompt


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[" * 100_000])
def test_what_is_no_json_has_a_path(body):
    assert relay.beginning("/path", body) == "/path"


# With the server itself.


def serve(check: Callable[[Any, Any], Any], engine: Any) -> Any:
    """Runs a check against the application of an engine."""

    async def run() -> Any:
        app = application(Server(engine, Settings(model="m")))
        async with app.router.lifespan_context(app):
            return await check(app, engine)

    try:
        return asyncio.run(run())
    finally:
        engine.close()


@pytest.mark.parametrize("stream", [False, True])
def test_the_server_answers_through_the_relay_as_alone(stream):
    body = json.dumps({"prompt": "some text", "max_tokens": 50, "stream": stream}).encode()

    async def check(app, engine):
        async def none(call: Call) -> list[Whole]:
            return []

        relaying = Relay(lambda call: relay.answer(app, call), none, BOUNDS)
        return [await send_to(one, COMPLETIONS, [body]) for one in (relaying, app)]

    through_relay, alone = serve(check, FakeEngine(echo))
    assert [one["status"] for one in (through_relay[0], alone[0])] == [200, 200]

    def texts(messages: list[Any]) -> str:
        said = b"".join(message.get("body", b"") for message in messages[1:]).decode()
        if not stream:
            return json.loads(said)["choices"][0]["text"]
        events = [json.loads(one[6:]) for one in said.split("\n\n") if one.startswith("data: {")]
        return "".join(event["choices"][0]["text"] for event in events if event["choices"])

    assert texts(through_relay) == texts(alone) == "some text"


def test_closing_an_answer_frees_its_slot():
    async def check(app, engine):
        call = Call("POST", COMPLETIONS, b"", (), None, b'{"prompt": "long", "stream": true}', "long")
        said = relay.answer(app, call)
        await anext(said)
        await said.aclose()
        for _ in range(500):
            if not engine.running:
                return engine.cancellations
            await asyncio.sleep(0.01)
        return 0

    assert serve(check, FakeEngine(lambda *_: "x" * 400, delay=0.05)) == 1


def test_whole_answers():
    async def check(app, engine):
        return [await relay.whole(app, Call("GET", path, b"", (), None, b"", path)) for path in ("/health", "/no")]

    health, missing = serve(check, FakeEngine(echo))
    assert (health.status, json.loads(health.body)) == (200, {"status": "ok"})
    assert missing.status == 404
