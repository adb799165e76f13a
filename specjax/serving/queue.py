"""The requests that wait: bounded in sequences and in tokens, so that an overloaded engine says so at once."""

import threading
from collections import deque
from collections.abc import Callable

from specjax.serving.requests import Closed, Overloaded
from specjax.serving.sequences import Request


class RequestQueue:
    """Requests in the order in which they came. Thread-safe.

    A request counts until its sequences have slots (`leave`), and is open until all of them have ended (`close_one`).
    """

    def __init__(self, max_sequences: int, max_tokens: int):
        """An empty queue.

        Args:
          max_sequences: the most sequences that may wait.
          max_tokens: the most tokens of prompts that may wait.
        """
        self._limits = max_sequences, max_tokens
        self._waiting: deque[Request] = deque()
        self._accepts = True
        self.changed = threading.Condition()
        self.sequences = self.tokens = self.open = 0

    def put(self, request: Request, seconds_each: float) -> None:
        """Adds a request; one that finds an empty queue is always taken.

        Args:
          request: the request.
          seconds_each: about how long a waiting sequence takes to get a slot.

        Raises:
          Overloaded: where the queue is full.
          Closed: after `refuse`.
        """
        with self.changed:
            if not self._accepts:
                raise Closed("The engine takes no more requests: it is shutting down, or it has died.")
            sequences = self.sequences + request.options.n
            tokens = self.tokens + len(request.prompt)
            if self.sequences and (sequences > self._limits[0] or tokens > self._limits[1]):
                raise Overloaded(
                    f"{self.sequences} sequences with {self.tokens} tokens of prompts wait already, and at most "
                    f"{self._limits[0]} with {self._limits[1]} may: try again later.",
                    retry_after=max(1.0, self.sequences * seconds_each),
                )
            self.sequences, self.tokens = sequences, tokens
            self.open += 1
            self._waiting.append(request)
            self.changed.notify_all()

    def pop(self) -> Request | None:
        """The next request; it still counts as waiting."""
        with self.changed:
            return self._waiting.popleft() if self._waiting else None

    def is_waiting(self) -> bool:
        """Whether there is a next request."""
        return bool(self._waiting)

    def drop(self, is_gone: Callable[[Request], object]) -> list[Request]:
        """Takes out the requests for which this is true; they no longer count."""
        with self.changed:
            gone = [request for request in self._waiting if is_gone(request)]
            if gone:
                self._waiting = deque(request for request in self._waiting if not is_gone(request))
        for request in gone:
            self.leave(request.options.n, len(request.prompt))
        return gone

    def leave(self, sequences: int, tokens: int) -> None:
        """So many sequences, and tokens of prompts, no longer wait."""
        with self.changed:
            self.sequences -= sequences
            self.tokens -= tokens
            self.changed.notify_all()

    def close_one(self) -> None:
        """All sequences of a request have ended."""
        with self.changed:
            self.open -= 1
            self.changed.notify_all()

    def refuse(self) -> None:
        """Takes no more requests."""
        with self.changed:
            self._accepts = False
            self.changed.notify_all()

    def wake(self) -> None:
        """Wakes those who wait for a change."""
        with self.changed:
            self.changed.notify_all()
