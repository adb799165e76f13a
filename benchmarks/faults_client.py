"""The clients of `faults.py`: requests with known answers, wrong requests, and clients that leave.

They speak HTTP/1.1 over plain sockets, one connection each, so that a client may leave at any byte, and so that bytes
behind an answer, such as those of a second one, are seen.
"""

import asyncio
import contextlib
import json
import random
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

TEXT = (
    "the cat sat on the mat and then it ran to see who was there. a dog was there and the dog ran to the cat. then the "
    "cat sat on a dog and it was on the mat to see. who sat on the mat and who ran to see the dog? it was a cat and "
    "then a dog. there was a cat on the mat and there was a dog on the mat. then it sat and it ran and it was there to "
    "see the cat and the dog and the mat."
)
"""Prompts are pieces of this, in words that tests' small vocabularies have too."""


class Case(NamedTuple):
    """A request whose answer is known.

    Attributes:
      prompt: its token ids.
      fields: the other fields of its body.
    """

    prompt: tuple[int, ...]
    fields: dict[str, Any]

    def body(self, *, stream: bool = False) -> dict[str, Any]:
        """What is sent to /v1/completions."""
        return {"prompt": list(self.prompt), "stream": stream, **self.fields}


class Wrong(NamedTuple):
    """A request that must be refused.

    Attributes:
      name: what is wrong with it.
      status: the answer it must get.
      body: what is sent.
      path: where to.
      method: how.
      kind: its content type.
    """

    name: str
    status: int
    body: bytes
    path: str = "/v1/completions"
    method: str = "POST"
    kind: str = "application/json"


class Answer(NamedTuple):
    """What a client has seen.

    Attributes:
      id: of the request, as it was sent.
      status: of the answer; 0 where there was none.
      headers: of the answer.
      texts: the text of each choice as far as it came; empty where the answer is an error.
      error: the error of the answer, or of the stream; None where there is none.
      complete: whether the answer came to its end.
      left: whether the client left before that.
      extra: how many bytes came behind the answer.
    """

    id: str
    status: int
    headers: dict[str, str]
    texts: tuple[str, ...]
    error: Any
    complete: bool
    left: bool
    extra: int


def cases(pool: Sequence[int], max_len: int, new_tokens: int, number: int, seed: int) -> list[Case]:
    """Requests of all kinds: short and long prompts, greedy and sampled, one and two choices, stops, log-probabilities.

    Args:
      pool: token ids; a prompt is a piece of these, repeated where it is longer.
      max_len: the most tokens of a prompt and its answer.
      new_tokens: the most tokens of an answer.
      number: how many.
      seed: of what is chosen.
    """
    rng, found = random.Random(seed), []
    room = max_len - new_tokens
    for i in range(number):
        length = rng.randint(max(room // 2, 1), room) if i % 4 == 3 else rng.randint(1, max(min(24, room // 2), 1))
        fields: dict[str, Any] = {"max_tokens": new_tokens, "seed": rng.randrange(2**31), "temperature": 0.0}
        if i % 3 == 1:
            fields["temperature"] = 0.8
        if i % 6 == 5:
            fields["n"] = 2
        if i % 5 == 4:
            fields["logprobs"] = 1
        if i % 8 == 6:
            fields["stop"] = [" dog"]
        if i % 2 == 0:
            fields["ignore_eos"] = True
        found.append(Case(piece(pool, length, rng), fields))
    return found


def piece(pool: Sequence[int], length: int, rng: random.Random) -> tuple[int, ...]:
    """A prompt of so many tokens, from a random place of the pool on."""
    begin = rng.randrange(len(pool))
    return tuple(pool[(begin + i) % len(pool)] for i in range(length))


def wrong(prompt: Sequence[int]) -> list[Wrong]:
    """Requests that must be refused, each for another reason."""

    def body(**fields: Any) -> bytes:
        return json.dumps({"prompt": list(prompt), "max_tokens": 4, **fields}).encode()

    return [
        Wrong("a prompt that is an object", 400, body(prompt={"a": 1})),
        Wrong("an empty prompt", 400, body(prompt=[])),
        Wrong("temperature 5", 400, body(temperature=5)),
        Wrong("n = 0", 400, body(n=0)),
        Wrong("more tokens than fit", 400, body(max_tokens=10**7)),
        Wrong("another model", 404, body(model="nobody")),
        Wrong("half a JSON object", 400, b'{"prompt": '),
        Wrong("plain text", 415, body(), kind="text/plain"),
        Wrong("another path", 404, body(), path="/v1/nothing"),
        Wrong("another method", 405, b"", method="DELETE"),
    ]


class Client:
    """Sends requests to one server."""

    def __init__(self, host: str, port: int):
        self.host, self.port = host, port

    async def complete(self, case: Case, *, stream: bool, leave: float | None = None, cut: bool = False) -> Answer:
        """One request for a text.

        Args:
          case: the request.
          stream: whether its answer is to come in pieces.
          leave: the client leaves after so many seconds; None: it stays.
          cut: whether only a half of the body is sent.
        """
        raw = json.dumps(case.body(stream=stream)).encode()
        return await self.send("POST", "/v1/completions", raw, leave=leave, cut=cut)

    async def refused(self, request: Wrong) -> Answer:
        """One request that must be refused."""
        return await self.send(request.method, request.path, request.body, kind=request.kind)

    async def get(self, path: str) -> str:
        """A page of the server.

        Raises:
          ConnectionError: where it does not answer 200.
        """
        return (await self._page("GET", path, b"")).decode()

    async def post(self, path: str, value: Any) -> Any:
        """The JSON that a path answers to some JSON.

        Raises:
          ConnectionError: where it does not answer 200.
        """
        return json.loads(await self._page("POST", path, json.dumps(value).encode()))

    async def _page(self, method: str, path: str, body: bytes) -> bytes:
        _, raw = await self._exchange(self._head(method, path, len(body)) + body, 60.0)
        reply = parse(raw)
        if reply is None or reply.status != 200:
            raise ConnectionError(f"{method} {path} was answered {reply.status if reply else 'with nothing'}.")
        return reply.body

    def _head(self, method: str, path: str, length: int, kind: str = "application/json", name: str = "") -> bytes:
        lines = [f"{method} {path} HTTP/1.1", f"host: {self.host}:{self.port}", "connection: close"]
        if length:
            lines += [f"content-type: {kind}", f"content-length: {length}"]
        if name:
            lines.append(f"x-request-id: {name}")
        return ("\r\n".join(lines) + "\r\n\r\n").encode()

    async def send(
        self,
        method: str,
        path: str,
        body: bytes,
        *,
        kind: str = "application/json",
        leave: float | None = None,
        cut: bool = False,
    ) -> Answer:
        """One request, on a connection of its own, with an id of its own."""
        name = uuid.uuid4().hex
        head = self._head(method, path, len(body), kind, name)
        left, raw = await self._exchange(head + (body[: len(body) // 2] if cut else body), leave)
        return _answer(name, left, raw)

    async def _exchange(self, sent: bytes, leave: float | None) -> tuple[bool, bytes]:
        """Whether the client left, and the bytes until then or until the server closed the connection."""
        raw, left, writer = bytearray(), False, None
        try:
            reader, writer = await asyncio.open_connection(self.host, self.port)
            writer.write(sent)
            await writer.drain()
            async with asyncio.timeout(leave):
                while data := await reader.read(2**16):
                    raw += data
        except TimeoutError:
            left = True
        except OSError:
            pass  # The server ended the connection: what came until then tells whether that was an answer.
        finally:
            if writer is not None:
                if left:
                    writer.transport.abort()
                else:
                    writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()
        return left, bytes(raw)


class Reply(NamedTuple):
    """An HTTP response.

    Attributes:
      status: its status.
      headers: by their names in lower case.
      body: as far as it came.
      complete: whether it came to its end.
      extra: bytes behind it.
    """

    status: int
    headers: dict[str, str]
    body: bytes
    complete: bool
    extra: int


def parse(raw: bytes) -> Reply | None:
    """The response that a connection begins with; None where its head is not whole."""
    head, found, rest = raw.partition(b"\r\n\r\n")
    if not found:
        return None
    first, *lines = head.decode("latin-1").split("\r\n")
    status = int(first.split(" ")[1])
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if headers.get("transfer-encoding") != "chunked":
        length = int(headers.get("content-length", 0))
        return Reply(status, headers, rest[:length], len(rest) >= length, max(len(rest) - length, 0))
    body = bytearray()
    while True:
        size, found, rest = rest.partition(b"\r\n")
        if not found or not size:
            return Reply(status, headers, bytes(body), False, 0)
        length = int(size, 16)
        if len(rest) < length + 2:
            return Reply(status, headers, bytes(body), False, 0)
        body += rest[:length]
        rest = rest[length + 2 :]
        if not length:
            return Reply(status, headers, bytes(body), True, len(rest))


def _answer(request_id: str, left: bool, raw: bytes) -> Answer:
    reply = parse(raw)
    if reply is None:
        return Answer(request_id, 0, {}, (), None, False, left, 0)
    texts: tuple[str, ...] = ()
    error, complete = None, reply.complete
    if reply.headers.get("content-type", "").startswith("text/event-stream"):
        texts, error, ended = read_events(reply.body)
        complete = complete and ended
    elif complete:
        value: dict[str, Any] = {}
        with contextlib.suppress(ValueError):
            value = json.loads(reply.body)
        error = value.get("error", {}) if reply.status >= 400 else None
        texts = tuple(choice["text"] for choice in value.get("choices", ()))
    return Answer(request_id, reply.status, reply.headers, texts, error, complete, left, reply.extra)


def read_events(body: bytes) -> tuple[tuple[str, ...], Any, bool]:
    """The texts of a stream's choices, its error, and whether it came to its end."""
    parts: dict[int, str] = {}
    error, ended = None, False
    for event in body.split(b"\n\n")[:-1]:
        if not event.startswith(b"data: "):
            continue
        data = event.removeprefix(b"data: ")
        if data == b"[DONE]":
            ended = True
            continue
        value: Mapping[str, Any] = json.loads(data)
        error = value.get("error", error)
        for choice in value.get("choices", ()):
            parts[choice["index"]] = parts.get(choice["index"], "") + choice["text"]
    return tuple(parts[i] for i in sorted(parts)), error, ended
