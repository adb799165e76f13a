"""A tokenizer of bytes and an engine that answers by a script, for tests of the server."""

import json
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from specjax.serving import process
from specjax.serving.requests import (
    Closed,
    Completion,
    Increment,
    Listener,
    Options,
    Overloaded,
    Snapshot,
    TokenLogprobs,
    Usage,
)
from specjax.serving.server import Server, Settings
from specjax.text.tokenizer import Tokenizer, _byte_of_letter

HERMES = (
    "{% if tools %}<|im_start|>system\nTools:{% for tool in tools %} {{ tool | tojson }}{% endfor %}<|im_end|>\n"
    "{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls "
    'or [] %}<tool_call>{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
    "</tool_call>{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
EOS = 256
OPTIONS, SETTINGS = Options(), Settings()


def byte_tokenizer(template: str | None = HERMES) -> Tokenizer:
    """Token i is the byte i; then <|im_end|>, <|im_start|>."""
    vocab = _byte_of_letter()
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|im_end|>", "<|im_start|>"])
    return Tokenizer(backend, special_tokens={"eos_token": "<|im_end|>"}, chat_template=template)


Script = Callable[[Sequence[int], Options, int], str]
"""From prompt, options and sequence to the text that is answered, before it is stopped."""


def echo(prompt: Sequence[int], options: Options, index: int) -> str:
    return bytes(token for token in prompt if token < 256).decode("utf-8", "replace")


class FakeSubmission:
    def __init__(self, engine: "FakeEngine", prompt: list[int], options: Options, timeout: float | None):
        self.prompt, self.options, self.engine = prompt, options, engine
        self.begin, self.timeout = time.monotonic(), timeout
        self.cancelled = threading.Event()
        self.own: queue.SimpleQueue[Increment] = queue.SimpleQueue()
        self.listens = False

    def __iter__(self) -> Iterator[Increment]:
        left = self.options.n
        while left:
            part = self.own.get()
            left -= part.finish_reason is not None
            yield part

    def result(self) -> list[Completion]:
        raise NotImplementedError

    def cancel(self) -> None:
        self.cancelled.set()
        self.engine.cancellations += 1


class FakeEngine:
    """A thread that answers requests one after another, a few tokens at a time.

    Attributes:
      burst: tokens of an increment.
      delay: seconds between increments.
      running: sequences that have a slot, so to speak.
    """

    num_draft_tokens = 4

    def __init__(
        self,
        script: Script = echo,
        *,
        template: str | None = HERMES,
        burst: int = 3,
        delay: float = 0.0,
        max_len: int = 512,
        max_queued: int = 64,
    ):
        self.tokenizer, self.vocab_size, self.max_len = byte_tokenizer(template), 300, max_len
        self.script, self.burst, self.delay, self.max_queued = script, burst, delay, max_queued
        self.alive, self.ready, self.closed = True, True, False
        self.open: list[FakeSubmission] = []
        self.seen: list[Options] = []
        self.prompts: list[list[int]] = []
        self.timeouts: list[float | None] = []
        self.cancellations = 0
        self.most_running = 0
        self.counts = Snapshot(num_slots=8, capacity_tokens=8 * max_len)
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._listener: Listener = lambda parts: None
        self._die: str | None = None
        self._texts: dict[tuple[int, int], Iterator[Increment]] = {}
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        return len(self.open)

    def submit(
        self,
        prompt: str | Sequence[int],
        options: Options = OPTIONS,
        *,
        timeout: float | None = None,
        listen: bool = False,
    ) -> FakeSubmission:
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        if self.closed or not self.alive:
            raise Closed("The engine is shutting down.")
        if options.temperature > 1.9:
            raise ValueError("temperature=2: this engine takes less than 1.9.")
        with self._lock:
            if sum(one.options.n for one in self.open) + options.n > self.max_queued:
                raise Overloaded("The queue is full: try again.", 2.5)
            submission = FakeSubmission(self, ids, options, timeout)
            submission.listens = listen
            self.open.append(submission)
            self.seen.append(options)
            self.prompts.append(ids)
            self.timeouts.append(timeout)
        self._wake.set()
        return submission

    def listen(self, listener: Listener) -> None:
        self._listener = listener

    def snapshot(self) -> Snapshot:
        return self.counts._replace(running=self.running, used_tokens=sum(len(one.prompt) for one in self.open))

    def close(self, timeout: float = 0.0) -> None:
        self.closed = True
        end = time.monotonic() + timeout
        while self.open and time.monotonic() < end and self.alive:
            time.sleep(0.01)
        for submission in list(self.open):
            submission.cancelled.set()
        while self.open and self.alive and time.monotonic() < end + 2:
            time.sleep(0.005)
        self.alive = False

    def die(self) -> None:
        self.alive = False

    def _increments(self, submission: FakeSubmission, index: int) -> Iterator[Increment]:
        options = submission.options
        text = self.script(submission.prompt, options, index)
        stop: int | str | None = EOS
        cut = min((text.find(one) for one in options.stop_strings if one in text), default=-1)
        if cut >= 0:
            stop = next(one for one in options.stop_strings if text.startswith(one, cut))
            text = text[: cut + len(stop) * options.include_stop]
        ends = isinstance(stop, str) or EOS in (options.stop_tokens or ())
        tokens = [*text.encode("utf-8", "surrogateescape"), *([EOS] if stop == EOS and ends else [])]
        reason = "stop" if ends and len(tokens) <= options.max_new_tokens else "length"
        tokens = tokens[: options.max_new_tokens]
        entry = self._logprobs(options.logprobs)
        sent, held = 0, b""
        of_prompt = None
        if options.prompt_logprobs is not None and index == 0:
            found = self._logprobs(options.prompt_logprobs)
            of_prompt = (TokenLogprobs(None, {}), *(found(token) for token in submission.prompt[1:]))
        usage = Usage(
            len(submission.prompt), 1, len(tokens), max(len(tokens) // 2, 1), 4, 8, 5, (3, 2), 2, 1, 0.1, 0.2, 0.3
        )
        while True:
            some = tokens[sent : sent + self.burst]
            sent += len(some)
            last = sent >= len(tokens)
            held += bytes(token for token in some if token < 256)
            whole = held.decode("utf-8", "replace") if last else _complete(held)
            held = held[len(whole.encode()) :] if not last else b""
            yield Increment(
                index,
                whole,
                tuple(some),
                tuple(i % self.burst > 0 for i in range(len(some))),
                tuple(entry(token) for token in some) if options.logprobs is not None else None,
                of_prompt,
                reason if last else None,
                stop if last and reason == "stop" else None,
                None,
                usage if last else None,
            )
            of_prompt = None
            if last:
                return

    def _logprobs(self, count: int | None) -> Callable[[int], TokenLogprobs]:
        def entry(token: int) -> TokenLogprobs:
            best = [token, *(i for i in range(97, 120) if i != token)][: count or 0]
            return TokenLogprobs(-0.5, {other: -0.5 - i for i, other in enumerate(best)})

        return entry

    def _turn(self) -> None:
        said: list[tuple[Any, Increment]] = []
        with self._lock:
            open_now = list(self.open)
        self.most_running = max(self.most_running, len(open_now))
        for submission in open_now:
            late = submission.timeout is not None and time.monotonic() > submission.begin + submission.timeout
            over = "cancelled" if submission.cancelled.is_set() else "timeout" if late else None
            for index in range(submission.options.n):
                key = id(submission), index
                texts = self._texts.setdefault(key, self._increments(submission, index))
                part = Increment(index, finish_reason=over, usage=Usage()) if over else next(texts, None)
                if part is not None:
                    said.append((submission, part))
            if all(next_is_over(self, submission, i, said) for i in range(submission.options.n)):
                with self._lock:
                    self.open.remove(submission)
                for index in range(submission.options.n):
                    self._texts.pop((id(submission), index), None)
        listening = [(one, part) for one, part in said if one.listens]
        for one, part in said:
            if not one.listens:
                one.own.put(part)
        if listening:
            self._listener(listening)

    def _run(self) -> None:
        done: set[tuple[int, int]] = set()
        self.done = done
        while self.alive:
            self._wake.wait(0.05)
            self._wake.clear()
            while self.open and self.alive:
                self._turn()
                time.sleep(self.delay)


def next_is_over(engine: FakeEngine, submission: FakeSubmission, index: int, said: list[tuple[Any, Increment]]) -> bool:
    """Whether the sequence has ended, now or before."""
    ended = any(one is submission and part.index == index and part.finish_reason for one, part in said)
    texts = engine._texts[id(submission), index]
    return ended or getattr(texts, "gi_frame", None) is None


def _complete(data: bytes) -> str:
    for cut in range(4):
        try:
            return data[: len(data) - cut].decode()
        except UnicodeDecodeError:
            continue
    return data.decode("utf-8", "replace")


class Live:
    """A server in a thread, on a free port of the loopback."""

    running: process.Running
    port: int

    def __init__(self, engine: Any, settings: Settings = SETTINGS, place: process.Place | None = None):
        self.engine, self.server = engine, Server(engine, settings)
        self.code: int | None = None
        ready = threading.Event()

        def started(running: process.Running) -> None:
            self.running, self.port = running, running.port
            ready.set()

        place = place or process.Place(port=0, shutdown_timeout=2.0, poll=0.05)

        def serve() -> None:
            self.code = process.run(self.server, place, started=started, signals=False)

        self.thread = threading.Thread(target=serve, daemon=True)
        self.thread.start()
        assert ready.wait(20), "the server did not start"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(self, path: str, body: dict[str, Any]) -> socket.socket:
        """A connection on which a request has been sent, and whose answer nobody reads yet."""
        client = socket.create_connection(("127.0.0.1", self.port), timeout=10)
        raw = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(raw)}\r\n\r\n"
        )
        client.sendall(head.encode() + raw)
        return client

    def close(self) -> None:
        self.running.stop_soon()
        self.thread.join(20)
        assert not self.thread.is_alive()


def wait_until(check: Callable[[], bool], seconds: float = 5.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if check():
            return True
        time.sleep(0.01)
    return check()
