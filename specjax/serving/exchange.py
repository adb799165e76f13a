"""From the engine's thread to the event loop: what each HTTP request has gained since it was last looked at."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import NamedTuple

from specjax.serving.errors import ApiError, failed, timed_out, unavailable
from specjax.serving.requests import Engine, Increment, Submission, TokenLogprobs, Usage
from specjax.serving.translate import Plan


class Gain(NamedTuple):
    """What one choice of an answer has gained; the fields are those of `Increment`, several of which may be merged.

    Attributes:
      choice: its index in the answer, prompt * n + sequence.
    """

    choice: int
    text: str
    tokens: tuple[int, ...]
    from_draft: tuple[bool, ...]
    logprobs: tuple[TokenLogprobs, ...]
    prompt_logprobs: tuple[TokenLogprobs, ...] | None
    finish_reason: str | None
    stop: int | str | None
    usage: Usage | None


def _merged(choice: int, parts: Sequence[Increment]) -> Gain:
    last = parts[-1]
    of_prompt = [part.prompt_logprobs for part in parts if part.prompt_logprobs is not None]
    return Gain(
        choice,
        "".join(part.text for part in parts),
        tuple(token for part in parts for token in part.tokens),
        tuple(drafted for part in parts for drafted in part.from_draft),
        tuple(entry for part in parts for entry in part.logprobs or ()),
        of_prompt[0] if of_prompt else None,
        last.finish_reason,
        last.stop,
        last.usage,
    )


def _failure(part: Increment) -> ApiError | None:
    """The error that ends a request, where an increment is one."""
    if part.finish_reason == "timeout":
        return timed_out("The request took longer than this server allows: ask for fewer tokens.")
    if part.finish_reason == "cancelled":
        return unavailable("The request was cancelled, since the server shuts down: send it again.")
    if part.finish_reason == "error":
        return failed(f"The engine failed on this request ({part.error or 'no reason given'}).")
    return None


class Observer(NamedTuple):
    """What is told of requests as they go on, for metrics.

    Attributes:
      first: seconds from the request's arrival to its first token.
      tokens: how many tokens came after how many seconds.
      ended: `(submission, increment, seconds since arrival)`, for the last increment of a sequence.
    """

    first: Callable[[float], None] = lambda seconds: None
    tokens: Callable[[int, float], None] = lambda count, seconds: None
    ended: Callable[[Submission, Increment, float], None] = lambda submission, part, seconds: None


class Exchange:
    """The submissions of one HTTP request, and what they have gained and the request has not read yet."""

    def __init__(self, office: "Office"):
        self._office = office
        self._begin = time.monotonic()
        self._submissions: dict[int, tuple[int, Submission]] = {}
        self._unread: dict[int, list[Increment]] = {}
        self._last: dict[int, float] = {}
        self._changed = asyncio.Event()
        self._error: ApiError | None = None
        self._n, self._closed = 1, False
        self.num_tokens: dict[int, int] = {}
        self.usages: dict[int, Usage] = {}

    @property
    def done(self) -> bool:
        """Whether every choice has ended."""
        return len(self.usages) == self._n * max(len(self._submissions), 1)

    def open(self, plan: Plan) -> None:
        """Submits every prompt, or none where one is refused.

        Raises:
          ApiError: where the engine refuses one.
        """
        self._n = plan.n
        try:
            for i, (prompt, options) in enumerate(zip(plan.prompts, plan.options, strict=True)):
                submission = self._office.submit(prompt, options)
                self._submissions[id(submission)] = i, submission
                self._office.add(submission, self)
        except BaseException:
            self.close()
            raise

    def put(self, submission: Submission, part: Increment) -> None:
        """Takes an increment; on the event loop."""
        prompt, _ = self._submissions[id(submission)]
        choice, now = prompt * self._n + part.index, time.monotonic()
        if choice in self.usages:
            return
        observer = self._office.observer
        if part.tokens:
            if choice not in self._last:
                observer.first(now - self._begin)
            else:
                observer.tokens(len(part.tokens), now - self._last[choice])
            self._last[choice] = now
        self.num_tokens[choice] = self.num_tokens.get(choice, 0) + len(part.tokens)
        if part.finish_reason is not None:
            self.usages[choice] = part.usage or Usage(
                prompt_tokens=len(submission.prompt), completion_tokens=self.num_tokens[choice]
            )
            observer.ended(submission, part, now - self._begin)
            self._error = self._error or _failure(part)
        self._unread.setdefault(choice, []).append(part)
        self._changed.set()

    def fail(self, error: ApiError) -> None:
        """Ends the request with an error; on the event loop."""
        self._error = self._error or error
        self._changed.set()

    async def gains(self, ping: float = 15.0) -> AsyncIterator[list[Gain]]:
        """What the choices gain, merged since the last look, until all have ended; an empty list after `ping` seconds.

        Raises:
          ApiError: where a sequence fails, after what came before.
        """
        while True:
            try:
                # Before Python 3.12, `wait_for` may lose a cancellation that comes together with the event.
                async with asyncio.timeout(ping):
                    await self._changed.wait()
            except TimeoutError:
                yield []
                continue
            self._changed.clear()
            unread, self._unread = self._unread, {}
            gains = [_merged(choice, unread[choice]) for choice in sorted(unread)]
            if self._error is not None:
                if gains:
                    yield [gain._replace(finish_reason=None) for gain in gains]
                raise self._error
            if gains:
                yield gains
            if self.done:
                return

    def close(self) -> None:
        """Frees the slots and queue places of what has not ended. Never blocks, and may be called repeatedly."""
        if self._closed:
            return
        self._closed = True
        for prompt, submission in self._submissions.values():
            self._office.remove(submission)
            if any(prompt * self._n + i not in self.usages for i in range(self._n)):
                submission.cancel()


class Office:
    """Hands what an engine's listener is told to the requests that wait for it, by one call into the loop each time."""

    def __init__(self, engine: Engine, observer: Observer, timeout: float | None = None):
        """Becomes the engine's listener; inside the event loop.

        Args:
          engine: the engine.
          observer: is told of requests.
          timeout: seconds after which a request ends; None: never.
        """
        self.engine, self.observer, self._timeout = engine, observer, timeout
        self._loop = asyncio.get_running_loop()
        self._exchanges: dict[int, Exchange] = {}
        engine.listen(self._listen)

    def submit(self, prompt: Sequence[int], options: object) -> Submission:
        """Submits to the engine; its increments come to this office."""
        return self.engine.submit(prompt, options, timeout=self._timeout, listen=True)  # type: ignore[arg-type]

    def exchange(self) -> Exchange:
        """For a new HTTP request."""
        return Exchange(self)

    def add(self, submission: Submission, exchange: Exchange) -> None:
        """From now on the submission's increments go there. No increment is lost, since both run on the loop."""
        self._exchanges[id(submission)] = exchange

    def remove(self, submission: Submission) -> None:
        """Forgets a submission."""
        self._exchanges.pop(id(submission), None)

    def fail(self, error: ApiError) -> None:
        """Ends every request with an error."""
        for exchange in set(self._exchanges.values()):
            exchange.fail(error)

    def __len__(self) -> int:
        return len(self._exchanges)

    def _listen(self, parts: Sequence[tuple[Submission, Increment]]) -> None:
        """On the engine's thread."""
        with contextlib.suppress(RuntimeError):  # The loop has ended, and nobody waits.
            self._loop.call_soon_threadsafe(self._deliver, list(parts))

    def _deliver(self, parts: Sequence[tuple[Submission, Increment]]) -> None:
        for submission, part in parts:
            exchange = self._exchanges.get(id(submission))
            if exchange is not None:
                exchange.put(submission, part)
