"""Around every request: its id, the API key, the size of its body, and a line in the access log, without prompts."""

import hashlib
import json
import logging
import re
import secrets
import time
import uuid
from collections.abc import Callable, Iterable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from specjax.serving.errors import ApiError, dumps

access = logging.getLogger("specjax.access")

OPEN = frozenset({"/", "/health", "/ping", "/ready", "/version", "/openapi.json"})
"""What needs no key. Everything else does: metrics and tokenisation tell of a server's users too."""

_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")


class Keys:
    """The API keys of a server, kept only as digests."""

    def __init__(self, keys: Iterable[str] = ()):
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys if key]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def check(self, scope: Scope) -> str:
        """Who sends a request: a word that is the same for the same key and does not tell it.

        Raises:
          ApiError: for a key that is missing or wrong. Every key is compared, each in constant time.
        """
        given = _header(scope, b"authorization")
        scheme, _, token = given.partition(" ")
        key = token.strip() if scheme.lower() == "bearer" else _header(scope, b"x-api-key")
        digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
        matches = [secrets.compare_digest(digest, known) for known in self._digests]
        if self._digests and not any(matches):
            what = "is wrong" if key else "is missing"
            raise ApiError(
                401,
                f"The API key {what}: send it as `Authorization: Bearer KEY`.",
                kind="authentication_error",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return digest.hex()[:16] if self._digests else ""


def _header(scope: Scope, name: bytes) -> str:
    values = [value for key, value in scope["headers"] if key == name]
    return values[0].decode("latin-1") if values else ""


def too_large(limit: int) -> ApiError:
    """A 413."""
    return ApiError(413, f"The body is larger than {limit} bytes: send less.", code="body_too_large")


async def send_error(send: Send, error: ApiError) -> None:
    """Sends an error as an answer."""
    body = dumps(error.body())
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
    raw = [(name.lower().encode(), value.encode("latin-1", "replace")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


class Guard:
    """The middleware, in plain ASGI, so that a disconnect still reaches the answer."""

    def __init__(self, app: ASGIApp, *, keys: Keys, max_body: int, refused: Callable[[int], None]):
        """Wraps an application.

        Args:
          app: the application.
          keys: the API keys; without any, everyone is let in.
          max_body: the largest body, in bytes.
          refused: told of the status of each request that does not reach the application.
        """
        self._app, self._keys, self._max_body, self._refused = app, keys, max_body, refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = _header(scope, b"x-request-id")
        request_id = given if _ID.fullmatch(given) else uuid.uuid4().hex
        state = scope.setdefault("state", {})
        state.update(request_id=request_id, caller="", record={})
        begin, status, started = time.monotonic(), 0, False

        async def send_with_id(message: Message) -> None:
            nonlocal status, started
            if message["type"] == "http.response.start":
                status, started = message["status"], True
                headers = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
                message = {**message, "headers": headers}
            await send(message)

        try:
            if scope["path"] not in OPEN and scope["method"] != "OPTIONS":
                state["caller"] = self._keys.check(scope)
            await self._app(scope, self._bounded(scope, receive), send_with_id)
        except ApiError as error:
            if started:
                raise
            self._refused(error.status)
            await send_error(send_with_id, error)
        finally:
            _log(scope, status, time.monotonic() - begin)

    def _bounded(self, scope: Scope, receive: Receive) -> Receive:
        """Receives no more than the largest body.

        Raises:
          ApiError: for a length that the request states itself and that is too large.
        """
        length = _header(scope, b"content-length")
        if length.isdigit() and int(length[:20]) > self._max_body:
            raise too_large(self._max_body)
        total = 0

        async def bounded() -> Message:
            nonlocal total
            message = await receive()
            total += len(message.get("body", b""))
            if message["type"] == "http.request" and total > self._max_body:
                raise too_large(self._max_body)
            return message

        return bounded


def _log(scope: Scope, status: int, seconds: float) -> None:
    """One line of JSON: who, what, how long, how many tokens; neither texts nor keys. 499: the client left."""
    if not access.isEnabledFor(logging.INFO):
        return
    record: dict[str, Any] = {
        "id": scope["state"]["request_id"],
        "method": scope["method"],
        "path": scope["path"][:200],
        "status": status or 499,
        "seconds": round(seconds, 4),
        "client": (scope.get("client") or ("", 0))[0],
        "caller": scope["state"]["caller"],
        **scope["state"]["record"],
    }
    access.info(json.dumps({name: value for name, value in record.items() if value != ""}))
