"""The answers of both endpoints, whole or as frames of a stream."""

import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from specjax.serving.errors import ApiError, dumps, failed
from specjax.serving.exchange import Exchange, Gain
from specjax.serving.openai import ChatRequest, Common, CompletionRequest
from specjax.serving.requests import Usage
from specjax.serving.spelling import Marks, Offsets, Speller
from specjax.serving.tools import Reader
from specjax.serving.translate import Plan

FINGERPRINT = "specjax"

Json = dict[str, Any]


class Head(NamedTuple):
    """What is the same in all frames of an answer.

    Attributes:
      id: of the answer.
      model: the name that is served.
      created: seconds since 1970.
    """

    id: str
    model: str
    created: int

    def json(self, kind: str) -> Json:
        """The first fields."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": FINGERPRINT,
        }


def head(prefix: str, model: str, request_id: str) -> Head:
    """A new answer's."""
    return Head(f"{prefix}-{request_id}", model, int(time.time()))


def usage_json(usages: Sequence[Usage], n: int, completion_tokens: int | None = None) -> Json:
    """OpenAI's usage of all choices; a prompt counts once, whatever n is."""
    prompts = usages[::n]
    prompt = sum(usage.prompt_tokens for usage in prompts)
    completion = sum(usage.completion_tokens for usage in usages) if completion_tokens is None else completion_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(usage.cached_tokens for usage in prompts)},
        "completion_tokens_details": {
            "accepted_prediction_tokens": sum(usage.accepted_prediction for usage in usages),
            "rejected_prediction_tokens": sum(usage.rejected_prediction for usage in usages),
            "reasoning_tokens": 0,
        },
    }


def metrics_json(usages: Sequence[Usage]) -> Json | None:
    """What speculation did for a request with one choice, under vLLM's names; None for several choices."""
    if len(usages) != 1 or not usages[0].steps:
        return None
    usage = usages[0]
    reached = [usage.draft_steps, *usage.accepted_at]
    return {
        "speculative_decoding": {
            "mean_acceptance_length": 1 + usage.accepted / max(usage.draft_steps, 1),
            "draft_acceptance_rate": usage.accepted / usage.drafted if usage.drafted else None,
            # Entry i: steps that accepted exactly i draft tokens.
            "acceptance_histogram": [more - fewer for more, fewer in zip(reached, [*reached[1:], 0], strict=True)],
            "num_spec_steps": usage.draft_steps,
            "num_draft_tokens": usage.drafted,
            "num_accepted_draft_tokens": usage.accepted,
            "num_steps": usage.steps,
        }
    }


@runtime_checkable
class Shape(Protocol):
    """How an endpoint writes its choices. One object serves one answer."""

    def opening(self) -> Iterator[tuple[str, Json]]:
        """Frames before any text: the object and the choice of each."""
        ...

    def piece(self, gain: Gain) -> Json | None:
        """The choice of a frame, or None where there is nothing to say yet."""
        ...

    def whole(self, choice: int, gain: Gain) -> Json:
        """The choice of an answer that is not streamed."""
        ...

    def around(self, gains: Sequence[Gain]) -> Json:
        """Further fields of such an answer."""
        ...

    kind: str
    frame_kind: str


def _stop_reason(gain: Gain, eos: Sequence[int]) -> int | str | None:
    """vLLM's: what ended the text, where that is not the end-of-sequence token."""
    return None if gain.stop in eos else gain.stop


class Chat:
    """The choices of /v1/chat/completions."""

    kind, frame_kind = "chat.completion", "chat.completion.chunk"

    def __init__(self, request: ChatRequest, plan: Plan, speller: Speller, eos: Sequence[int]):
        self._plan, self._speller, self._eos = plan, speller, eos
        self._as_ids, self._ids = bool(request.return_tokens_as_token_ids), bool(request.return_token_ids)
        self._readers = [Reader(plan.tools) for _ in range(plan.n)]
        drafts = request.stream_options is not None and request.stream_options.include_drafts
        self._marks = [Marks(speller) for _ in range(plan.n)] if drafts else []

    def opening(self) -> Iterator[tuple[str, Json]]:
        """The role of each choice."""
        for i in range(self._plan.n):
            delta = {"role": "assistant", "content": ""}
            yield self.frame_kind, {"index": i, "delta": delta, "finish_reason": None, "logprobs": None}

    def _logprobs(self, gain: Gain) -> Json | None:
        if self._plan.logprobs is None:
            return None
        content = self._speller.chat(gain.tokens, gain.logprobs, self._plan.logprobs, self._as_ids)
        return {"content": content, "refusal": None}

    def piece(self, gain: Gain) -> Json | None:
        """The delta of a frame."""
        reader, last = self._readers[gain.choice], gain.finish_reason is not None
        content, calls = reader.read(gain.text, last)
        logprobs = self._logprobs(gain) if gain.tokens else None
        if not (content or calls or last or logprobs or (self._ids and gain.tokens)):
            return None
        delta: Json = {"content": content} if content or not calls else {}
        if calls:
            delta["tool_calls"] = [call.json(streamed=True) for call in calls]
        out: Json = {"index": gain.choice, "delta": delta, "logprobs": logprobs, "finish_reason": None}
        if last:
            out |= {
                "finish_reason": reader.reason(str(gain.finish_reason)),
                "stop_reason": _stop_reason(gain, self._eos),
            }
        if self._ids:
            out["token_ids"] = list(gain.tokens)
        if self._marks:
            pieces = self._marks[gain.choice].take(gain.text, gain.tokens, gain.from_draft)
            out["drafts"] = [{"text": text, "from_draft": drafted} for text, drafted in pieces]
        return out

    def whole(self, choice: int, gain: Gain) -> Json:
        """The message of an answer."""
        reader = self._readers[choice]
        content, calls = reader.read(gain.text, True)
        message: Json = {"role": "assistant", "content": content if content or not calls else None, "refusal": None}
        if calls:
            message["tool_calls"] = [call.json() for call in calls]
        out: Json = {
            "index": choice,
            "message": message,
            "logprobs": self._logprobs(gain),
            "finish_reason": reader.reason(str(gain.finish_reason)),
            "stop_reason": _stop_reason(gain, self._eos),
        }
        return out | ({"token_ids": list(gain.tokens)} if self._ids else {})

    def around(self, gains: Sequence[Gain]) -> Json:
        """Log-probabilities and ids of the prompt."""
        out: Json = {"prompt_token_ids": list(self._plan.prompts[0])} if self._ids else {}
        if self._plan.prompt_logprobs is not None:
            found = gains[0].prompt_logprobs or ()
            out["prompt_logprobs"] = self._speller.prompt(self._plan.prompts[0], found, self._plan.prompt_logprobs)
        return out


class Completion:
    """The choices of /v1/completions."""

    kind = frame_kind = "text_completion"

    def __init__(self, request: CompletionRequest, plan: Plan, speller: Speller, eos: Sequence[int]):
        self._plan, self._speller, self._eos = plan, speller, eos
        as_ids, self._ids = bool(request.return_tokens_as_token_ids), bool(request.return_token_ids)
        count = plan.n * len(plan.prompts)
        top = plan.logprobs or 0
        self._offsets = [Offsets(speller, top, as_ids) for _ in range(count)]
        self._of_prompt: dict[int, Any] = {}
        self._begun: set[int] = set()

    def opening(self) -> Iterator[tuple[str, Json]]:
        """Nothing: the first text opens the stream."""
        return iter(())

    def _content(self, gain: Gain) -> tuple[str, tuple[int, ...], Json | None]:
        """Text, tokens and log-probabilities, with those of the prompt before the first ones where they are echoed."""
        plan, choice = self._plan, gain.choice
        prompt = choice // plan.n
        if gain.prompt_logprobs is not None:
            self._of_prompt[prompt] = gain.prompt_logprobs
        text = gain.text if plan.answer else ""
        tokens = gain.tokens if plan.answer else ()
        logprobs = gain.logprobs if plan.answer else ()
        if plan.echo and choice not in self._begun:
            text = plan.echo[prompt] + text
            if plan.logprobs is not None:
                tokens = (*plan.prompts[prompt], *tokens)
                logprobs = (*self._of_prompt.get(prompt, ()), *logprobs)
        self._begun.add(choice)
        found = None if plan.logprobs is None else self._offsets[choice].take(tokens, logprobs)
        return text, tokens, found

    def piece(self, gain: Gain) -> Json | None:
        """The choice of a frame."""
        last = gain.finish_reason is not None
        text, tokens, logprobs = self._content(gain)
        if not (text or last or (logprobs and tokens) or (self._ids and gain.tokens)):
            return None
        out: Json = {"index": gain.choice, "text": text, "logprobs": logprobs, "finish_reason": None}
        if last:
            out |= self._end(gain)
        return out | ({"token_ids": list(gain.tokens)} if self._ids else {})

    def _end(self, gain: Gain) -> Json:
        if not self._plan.answer:
            return {"finish_reason": "length", "stop_reason": None}
        return {"finish_reason": gain.finish_reason, "stop_reason": _stop_reason(gain, self._eos)}

    def whole(self, choice: int, gain: Gain) -> Json:
        """The choice of an answer."""
        text, _, logprobs = self._content(gain)
        out: Json = {"index": choice, "text": text, "logprobs": logprobs, **self._end(gain)}
        prompt = choice // self._plan.n
        if self._plan.prompt_logprobs is not None:
            ids, found = self._plan.prompts[prompt], self._of_prompt.get(prompt, ())
            out["prompt_logprobs"] = self._speller.prompt(ids, found, self._plan.prompt_logprobs)
        if self._ids:
            out |= {"token_ids": list(gain.tokens), "prompt_token_ids": list(self._plan.prompts[prompt])}
        return out

    def around(self, gains: Sequence[Gain]) -> Json:
        """Nothing more."""
        return {}


def _usages(exchange: Exchange, plan: Plan) -> list[Usage]:
    """Of all choices, in order; of those that still grow what is known."""
    count = plan.n * len(plan.prompts)
    growing = [Usage(len(plan.prompts[i // plan.n]), 0, exchange.num_tokens.get(i, 0)) for i in range(count)]
    return [exchange.usages.get(i, growing[i]) for i in range(count)]


def _cost(exchange: Exchange, plan: Plan) -> Json:
    return usage_json(_usages(exchange, plan), plan.n, None if plan.answer else 0)


async def whole(shape: Shape, top: Head, plan: Plan, exchange: Exchange) -> Json:
    """An answer that is not streamed.

    Raises:
      ApiError: where a sequence fails.
    """
    parts: dict[int, list[Gain]] = {}
    async for gains in exchange.gains():
        for gain in gains:
            parts.setdefault(gain.choice, []).append(gain)
    joined = [_joined(choice, parts[choice]) for choice in sorted(parts)]
    usages = _usages(exchange, plan)
    return {
        **top.json(shape.kind),
        "choices": [shape.whole(gain.choice, gain) for gain in joined],
        "usage": _cost(exchange, plan),
        "metrics": metrics_json(usages),
        **shape.around(joined),
    }


def _joined(choice: int, parts: Sequence[Gain]) -> Gain:
    last = parts[-1]
    of_prompt = [part.prompt_logprobs for part in parts if part.prompt_logprobs is not None]
    return last._replace(
        text="".join(part.text for part in parts),
        tokens=tuple(token for part in parts for token in part.tokens),
        from_draft=tuple(drafted for part in parts for drafted in part.from_draft),
        logprobs=tuple(entry for part in parts for entry in part.logprobs),
        prompt_logprobs=of_prompt[0] if of_prompt else None,
    )


def frame(value: Mapping[str, Any]) -> bytes:
    """One event of a stream."""
    return b"data: " + dumps(value) + b"\n\n"


DONE = b"data: [DONE]\n\n"
PING = b": waiting\n\n"


async def frames(shape: Shape, top: Head, plan: Plan, exchange: Exchange, request: Common) -> AsyncIterator[bytes]:
    """The events of a stream, those of one moment together; an error is an event, since the status is sent before."""
    options = request.stream_options
    with_usage = options is not None and bool(options.include_usage)
    always = options is not None and bool(options.continuous_usage_stats)

    def event(kind: str, choice: Json) -> bytes:
        extra: Json = {"usage": _cost(exchange, plan) if always else None} if with_usage or always else {}
        return frame({**top.json(kind), "choices": [choice], **extra})

    try:
        opening = b"".join(event(kind, choice) for kind, choice in shape.opening())
        if opening:
            yield opening
        async for gains in exchange.gains():
            choices = [shape.piece(gain) for gain in gains]
            found = b"".join(event(shape.frame_kind, choice) for choice in choices if choice is not None)
            if found or not gains:
                yield found or PING
        if with_usage:
            cost = {"usage": _cost(exchange, plan), "metrics": metrics_json(_usages(exchange, plan))}
            yield frame({**top.json(shape.frame_kind), "choices": [], **cost})
    except ApiError as error:
        yield frame(error.body())
    except Exception as error:
        yield frame(failed(f"The answer could not be written ({type(error).__name__}).").body())
        raise
    finally:
        exchange.close()
    yield DONE
