"""Hands requests to replicas of a server, and repeats those whose replica died before their answer began.

`Relay` is the ASGI application that clients reach; `answer` and `whole` run a request on a replica. Nothing here knows
what starts the replicas and chooses among them: `specjax.ray_app` has Ray Serve do both.
"""

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from typing import Any, NamedTuple

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from specjax.serving import answers, errors
from specjax.serving.errors import ApiError
from specjax.serving.middleware import send_error, too_large

log = logging.getLogger("specjax.serve")

TRIES = 3
"""How many replicas a request is given at most: one that kills its replica must not kill all of them."""

OF_ALL = frozenset({"/health", "/ping", "/ready", "/metrics"})
"""Paths that every replica is asked for: the best answer counts, and metrics are those of all."""

PREFIX = 8192
"""Characters of a prompt that are compared to find the replica that has read them."""


class Lost(Exception):
    """The replica died, or stops, before its answer was complete."""


class Call(NamedTuple):
    """A request on its way to a replica.

    Attributes:
      method: of HTTP.
      path: below the application.
      query: as it was sent.
      headers: pairs of name, in lower case, and value.
      client: address and port, or None.
      body: whole.
      prompt: the beginning of its prompt, never empty; Ray's router reads this attribute.
    """

    method: str
    path: str
    query: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    client: tuple[str, int] | None
    body: bytes
    prompt: str


class Whole(NamedTuple):
    """A whole answer."""

    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes


class Bounds(NamedTuple):
    """What a relay allows.

    Attributes:
      max_body: the largest body, in bytes.
      request_timeout: seconds that a POST may take; None: any.
      short_timeout: seconds that any other request may take.
      pause: seconds before a request is repeated for the first time.
    """

    max_body: int = 4 * 2**20
    request_timeout: float | None = 3600.0
    short_timeout: float = 10.0
    pause: float = 0.2


Ask = Callable[[Call], AsyncGenerator[Sequence[Message], None]]
"""Has a replica answer, and yields ASGI messages as they come. Raises `Lost`, or an `ApiError` where none takes it."""

AskAll = Callable[[Call], Awaitable[Sequence[Whole]]]
"""The answers of all replicas that run."""


def beginning(path: str, body: bytes) -> str:
    """The first characters of a request's prompt, or its path where there is none; never empty."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        return path
    left = [fields.get("messages", fields.get("prompt"))] if isinstance(fields, dict) else []
    found, size = list[str](), 0
    while left and size < PREFIX:
        one = left.pop()
        if isinstance(one, list):
            left.extend(reversed(one))
        elif isinstance(one, dict):
            left.append(one.get("content", one.get("text")))
        elif isinstance(one, str | int):
            found.append(one if isinstance(one, str) else f"{one} ")
            size += len(found[-1])
    return "".join(found)[:PREFIX] or path


def merged(texts: Iterable[str]) -> str:
    """Several texts of Prometheus as one: each metric has its description once, and the samples of all texts.

    The samples of different texts have to differ in a label.
    """
    comments: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for text in texts:
        name = ""
        for line in text.splitlines():
            if line.startswith("# HELP "):
                name = line.split(" ", 3)[2]
            into = comments if line.startswith("#") else samples
            lines = into.setdefault(name, [])
            if line and not (into is comments and line in lines):
                lines.append(line)
    names = dict.fromkeys([*comments, *samples])
    return "".join(f"{line}\n" for name in names for line in [*comments.get(name, ()), *samples.get(name, ())])


async def answer(app: ASGIApp, call: Call) -> AsyncGenerator[list[Message], None]:
    """Has an application answer a request. Closing the iterator cancels the request, as a client does who leaves."""
    said: asyncio.Queue[Message | None] = asyncio.Queue()
    bodies = [call.body]

    async def receive() -> Message:
        if not bodies:
            await asyncio.Event().wait()  # The client is there for as long as the iterator is.
        return {"type": "http.request", "body": bodies.pop(), "more_body": False}

    async def send(message: Message) -> None:
        said.put_nowait(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "scheme": "http",
        "method": call.method,
        "path": call.path,
        "raw_path": call.path.encode(),
        "root_path": "",
        "query_string": call.query,
        "headers": list(call.headers),
        "client": call.client,
        "server": None,
    }

    async def run() -> None:
        await app(scope, receive, send)

    task = asyncio.ensure_future(run())
    task.add_done_callback(lambda _: said.put_nowait(None))
    try:
        while (message := await said.get()) is not None:
            yield [message]
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("the application failed on %s", call.path, exc_info=error)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def whole(app: ASGIApp, call: Call) -> Whole:
    """The answer of an application, once it is complete."""
    status, headers, body = 500, (), b""
    async for messages in answer(app, call):
        for message in messages:
            if message["type"] == "http.response.start":
                status, headers = message["status"], tuple(message["headers"])
            else:
                body += message.get("body", b"")
    return Whole(status, headers, body)


class _Reply:
    """What a client is sent of an answer: one that is not a stream once it is complete, a stream from its first token.

    Until then nothing has been sent, and another replica may begin anew.
    """

    def __init__(self, send: Send, num_opening: int):
        """Begins.

        Args:
          send: to the client.
          num_opening: the messages of a stream's body that come before its first token.
        """
        self._send, self._num_opening = send, num_opening
        self._held: list[Message] = []
        self._streams = self.begun = self.done = False

    def forget(self) -> None:
        """Drops what has not been sent."""
        self._held = []

    async def take(self, message: Message) -> None:
        """Takes the next message of a replica.

        Raises:
          Lost: where the replica says that it stops.
        """
        if message["type"] == "http.response.start":
            if message["status"] == 503:
                raise Lost("it takes no more requests")
            # Whoever hands the requests in adds their ids.
            headers = [(name, value) for name, value in message["headers"] if name != b"x-request-id"]
            message = {**message, "headers": headers}
            self._streams = any(
                name == b"content-type" and value.startswith(b"text/event-stream") for name, value in headers
            )
        self._held.append(message)
        self.done = message["type"] == "http.response.body" and not message.get("more_body", False)
        if self.done or self.begun or (self._streams and len(self._held) > 1 + self._num_opening):
            held, self._held = self._held, []
            for one in held:
                self.begun = True
                await self._send(one)

    async def fail(self, error: ApiError) -> None:
        """Ends with an error: an answer of its own, or an event where a stream has begun."""
        if not self.begun:
            await send_error(self._send, error)
        elif not self.done:
            last = answers.frame(error.body()) + answers.DONE
            await self._send({"type": "http.response.body", "body": last, "more_body": False})
        self.begun = self.done = True


class Relay:
    """The application that clients reach."""

    def __init__(self, ask: Ask, ask_all: AskAll, bounds: Bounds):
        """Relays.

        Args:
          ask: has one replica answer.
          ask_all: has all of them answer.
          bounds: what is allowed.
        """
        self._ask, self._ask_all, self._bounds = ask, ask_all, bounds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
        reply = _Reply(send, num_opening=1 if path == "/v1/chat/completions" else 0)
        limit, post = self._bounds.request_timeout, scope["method"] == "POST"
        try:
            async with asyncio.timeout(limit if post else self._bounds.short_timeout):
                call = await self._read(scope, path, receive)
                if path in OF_ALL:
                    await self._of_all(call, reply)
                else:
                    await self._repeat(call, reply)
        except TimeoutError:
            waited = errors.timed_out("The request took longer than this server allows: ask for fewer tokens.")
            await reply.fail(waited if post else errors.unavailable("No replica has answered: try again soon."))
        except ApiError as error:
            await reply.fail(error)
        except ClientDisconnect:
            return
        except Exception as error:
            log.exception("a request to %s failed", path)
            await reply.fail(errors.failed(f"The relay failed ({type(error).__name__}): this is a bug."))

    async def _read(self, scope: Scope, path: str, receive: Receive) -> Call:
        """The request, with its body.

        Raises:
          ApiError: for a body that is too large.
          ClientDisconnect: where the client left before its end.
        """
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self._bounds.max_body:
                raise too_large(self._bounds.max_body)
            if not message.get("more_body", False):
                break
        body = b"".join(parts)
        headers = tuple((bytes(name), bytes(value)) for name, value in scope["headers"])
        client = tuple(scope["client"]) if scope.get("client") else None
        return Call(scope["method"], path, scope.get("query_string", b""), headers, client, body, beginning(path, body))

    async def _of_all(self, call: Call, reply: _Reply) -> None:
        found = await self._ask_all(call)
        if not found:
            raise errors.unavailable("No replica runs: try again soon.")
        best = min(found, key=lambda one: one.status)
        if call.path == "/metrics" and best.status == 200:
            text = merged(one.body.decode() for one in found if one.status == 200)
            headers = tuple((name, value) for name, value in best.headers if name != b"content-length")
            best = best._replace(headers=headers, body=text.encode())
        start: dict[str, Any] = {"type": "http.response.start", "status": best.status, "headers": best.headers}
        try:
            await reply.take(start)
        except Lost:
            raise errors.unavailable("No replica is ready: try again soon.") from None
        await reply.take({"type": "http.response.body", "body": best.body, "more_body": False})

    async def _repeat(self, call: Call, reply: _Reply) -> None:
        """Has one replica after another answer, until one does, or the client has been sent a part.

        Raises:
          ApiError: where none did.
        """
        for attempt in range(TRIES):
            try:
                async with contextlib.aclosing(self._ask(call)) as said:
                    async for messages in said:
                        for message in messages:
                            await reply.take(message)
                if not reply.done:
                    raise errors.failed("A replica ended its answer too early: this is a bug.")
                return
            except Lost as error:
                log.warning("the replica of a request to %s was lost: %s", call.path, error)
                if reply.begun:
                    raise errors.unavailable(
                        "The replica died after a part of the answer was sent: send the request again."
                    ) from error
                reply.forget()
                await asyncio.sleep(self._bounds.pause * 2**attempt)
        raise errors.unavailable(f"{TRIES} replicas in turn died or stopped: send the request again later.")
