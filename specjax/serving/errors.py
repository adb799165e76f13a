"""Errors in the shape that OpenAI's clients read, and JSON that can always be sent."""

import json
from collections.abc import Mapping
from typing import Any


def dumps(value: Any) -> bytes:
    """A value as compact JSON in UTF-8; half surrogate pairs, which UTF-8 lacks, become question marks."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


class ApiError(Exception):
    """An answer that is an error.

    Attributes:
      status: the HTTP status.
      kind: OpenAI's `type`.
      param: the field that is wrong, or None.
      code: a word for programs, or None.
      headers: further headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.kind, self.param, self.code = status, kind, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The body of the answer, which is also the frame of a stream that fails."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}


def wrong(param: str | None, message: str, code: str | None = None) -> ApiError:
    """A 400: a field that is wrong, by its name."""
    return ApiError(400, message, param=param, code=code)


def overloaded(message: str, retry_after: float) -> ApiError:
    """A 429: the queue is full, and the client is told when to come back (whole seconds, at least 1)."""
    seconds = max(1, int(-(-retry_after // 1)))
    return ApiError(429, message, kind="rate_limit_error", code="queue_full", headers={"Retry-After": str(seconds)})


def unavailable(message: str) -> ApiError:
    """A 503: the server shuts down, or its engine has died."""
    return ApiError(503, message, kind="service_unavailable_error", code="service_unavailable")


def failed(message: str) -> ApiError:
    """A 500: the engine failed on this request."""
    return ApiError(500, message, kind="server_error", code="internal_error")


def timed_out(message: str) -> ApiError:
    """A 504 that clients are asked not to repeat, since the same request would take as long again."""
    return ApiError(504, message, kind="timeout_error", code="timeout", headers={"x-should-retry": "false"})
