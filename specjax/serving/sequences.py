"""Requests and their sequences on the host: what they gain becomes increments."""

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from specjax.sampling.processors import NO_TOKEN
from specjax.serving.detokenise import Detokeniser
from specjax.serving.requests import Completion, Increment, Options, TokenLogprobs, Usage
from specjax.text.tokenizer import Tokenizer
from specjax.types import SamplingOptions

_Shown = tuple[int, bool, TokenLogprobs | None]
"""A token of a sequence, whether it was a draft token, and its log-probability."""

FAILED = ("cancelled", "timeout", "error")
"""The values of `Increment.finish_reason` for sequences that were not finished."""


class Request:
    """A request that an engine has accepted (`requests.Submission`)."""

    def __init__(
        self,
        prompt: Sequence[int],
        options: Options,
        sampling: SamplingOptions,
        stop_tokens: tuple[int, ...],
        *,
        timeout: float | None,
        listen: bool,
        wake: Callable[[], None],
    ):
        """Made by `Engine.submit`, which has checked everything."""
        self.prompt: Sequence[int] = list(prompt)
        self.options, self.sampling, self.stop_tokens = options, sampling, stop_tokens
        self.listen, self._wake = listen, wake
        self.submitted = time.monotonic()
        self.deadline = None if timeout is None else self.submitted + timeout
        self.is_cancelled = False
        self._increments: queue.SimpleQueue[Increment] = queue.SimpleQueue()
        self._open = options.n
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[Increment]:
        """Yields the increments of all sequences, each once, until all have ended."""
        while True:
            with self._lock:
                if not self._open:
                    return
            increment = self._increments.get()
            if increment.finish_reason is not None:
                with self._lock:
                    self._open -= 1
            yield increment

    def why_gone(self, now: float) -> str:
        """Why it is to end before its time, or an empty string.

        Args:
          now: `time.monotonic()`.
        """
        if self.is_cancelled:
            return "cancelled"
        return "timeout" if self.deadline is not None and now > self.deadline else ""

    def put(self, increment: Increment) -> None:
        """Called by the engine."""
        self._increments.put(increment)

    def cancel(self) -> None:
        """Frees its slots, or its place in the queue."""
        self.is_cancelled = True
        self._wake()

    def result(self) -> list[Completion]:
        """Waits for its end: one completion for each sequence.

        Raises:
          RuntimeError: for a request that was cancelled, timed out or failed, or whose increments were read already.
        """
        parts: list[list[Increment]] = [[] for _ in range(self.options.n)]
        for increment in self:
            parts[increment.index].append(increment)
        if not all(parts):
            raise RuntimeError("The increments of this request were read already: iterate, or ask for the result.")
        for of_sequence in parts:
            last = of_sequence[-1]
            if last.finish_reason in FAILED:
                raise RuntimeError(f"The request ended with {last.finish_reason}. {last.error or ''}".strip())
        return [_complete(of_sequence) for of_sequence in parts]


def _complete(parts: Sequence[Increment]) -> Completion:
    last = parts[-1]
    assert last.finish_reason is not None
    assert last.usage is not None
    wants = any(part.logprobs is not None for part in parts)
    prompts = [part.prompt_logprobs for part in parts if part.prompt_logprobs is not None]
    return Completion(
        text="".join(part.text for part in parts),
        tokens=[token for part in parts for token in part.tokens],
        from_draft=[is_draft for part in parts for is_draft in part.from_draft],
        logprobs=[one for part in parts for one in part.logprobs or ()] if wants else None,
        prompt_logprobs=list(prompts[0]) if prompts else None,
        finish_reason=last.finish_reason,
        stop=last.stop,
        usage=last.usage,
    )


class News:
    """What a call has brought one row, taken out of the device's results."""

    def __init__(
        self,
        tokens: list[int],
        from_draft: list[bool],
        logprobs: list[TokenLogprobs] | None,
        *,
        is_done: bool,
        error: str | None,
        steps: int,
        draft_steps: int,
        drafted: int,
        accepted_at: tuple[int, ...],
    ):
        """Counters count from the row's insertion."""
        self.tokens, self.from_draft, self.logprobs = tokens, from_draft, logprobs
        self.is_done, self.error = is_done, error
        self.steps, self.draft_steps, self.drafted, self.accepted_at = steps, draft_steps, drafted, accepted_at


class Answer:
    """One sequence of a request."""

    def __init__(self, request: Request, index: int, tokenizer: Tokenizer | None, cached_tokens: int):
        """A sequence that has no tokens yet.

        Args:
          request: whose.
          index: which of the request's.
          tokenizer: of the target.
          cached_tokens: of the prompt, that came from the prefix cache.
        """
        o = request.options
        self.request, self.index = request, index
        self._text = Detokeniser(tokenizer, o.stop_strings, include_stop=o.include_stop)
        self._held: list[_Shown] = []
        self.usage = Usage(prompt_tokens=len(request.prompt), cached_tokens=cached_tokens)
        self.first_token: float | None = None
        self.is_closed = False
        self._prediction = _Prediction(o.prediction) if o.prediction else None

    def take(self, news: News) -> Increment | None:
        """Takes in what a call has brought; None where there is nothing to show yet.

        After an increment with a finish reason the sequence is closed.
        """
        now = time.monotonic()
        self.first_token = self.first_token or now
        logprobs = news.logprobs or [None] * len(news.tokens)
        self._held += zip(news.tokens, news.from_draft, logprobs, strict=True)
        self.usage = self.usage._replace(
            steps=news.steps,
            draft_steps=news.draft_steps,
            drafted=news.drafted,
            accepted=sum(news.accepted_at),
            accepted_at=news.accepted_at,
            decode_seconds=now - self.first_token,
        )
        gain = self._text.add(news.tokens, is_last=news.is_done)
        reason, stop = None, None
        if gain.stop is not None:
            reason, stop = "stop", gain.stop
        elif news.error is not None:
            reason = "error"
        elif news.is_done:
            is_stop = bool(news.tokens) and news.tokens[-1] in self.request.stop_tokens
            reason, stop = ("stop", news.tokens[-1]) if is_stop else ("length", None)
        shown, self._held = self._held[: gain.num_tokens], self._held[gain.num_tokens :]
        self._count(shown)
        if reason is None and not shown and not gain.text:
            return None
        return self._increment(gain.text, shown, reason, stop, news.error)

    def end(self, reason: str, error: str | None = None) -> Increment:
        """Ends it for a reason that lies outside."""
        return self._increment("", [], reason, None, error)

    def _increment(
        self, text: str, shown: list[_Shown], reason: str | None, stop: int | str | None, error: str | None
    ) -> Increment:
        self.is_closed = reason is not None
        wants = self.request.options.logprobs is not None
        return Increment(
            index=self.index,
            text=text,
            tokens=tuple(token for token, _, _ in shown),
            from_draft=tuple(is_draft for _, is_draft, _ in shown),
            logprobs=tuple(one for _, _, one in shown if one is not None) if wants else None,
            finish_reason=reason,
            stop=stop,
            error=error,
            usage=self.usage if reason is not None else None,
        )

    def _count(self, shown: list[_Shown]) -> None:
        usage = self.usage._replace(completion_tokens=self.usage.completion_tokens + len(shown))
        if self._prediction is not None:
            self._prediction.add([token for token, _, _ in shown], [is_draft for _, is_draft, _ in shown])
            accepted = self._prediction.accepted
            usage = usage._replace(
                accepted_prediction=accepted, rejected_prediction=max(usage.drafted - usage.accepted, 0)
            )
        self.usage = usage


class _Prediction:
    """Counts the accepted draft tokens that stand in a request's prediction, behind the same token as in the text."""

    def __init__(self, tokens: Sequence[int]):
        padded = [NO_TOKEN, *tokens]
        self._pairs = set(zip(padded, tokens, strict=False))
        self._last = NO_TOKEN
        self.accepted = 0

    def add(self, tokens: Sequence[int], from_draft: Sequence[bool]) -> None:
        for token, is_draft in zip(tokens, from_draft, strict=True):
            self.accepted += is_draft and (self._last, token) in self._pairs
            self._last = token
