"""What the engine's thread does, turn by turn: who is read, who decodes, for how long, and who has ended.

A turn ends the requests that were cancelled, puts prompts that have been read into free slots, starts a call of a few
steps for all running rows, starts to read one more chunk of the next prompt, and then hands out what the call before
has brought, while the device works on.
"""

import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from specjax.sampling.automaton import DEAD
from specjax.serving.capacity import Setting
from specjax.serving.choices import choices_of
from specjax.serving.device import Device, Rows, to_host
from specjax.serving.programs import Results
from specjax.serving.queue import RequestQueue
from specjax.serving.reader import Reader, Reading, top_of
from specjax.serving.requests import Increment, Snapshot, TokenLogprobs
from specjax.serving.sequences import Answer, News, Request

_PATIENCE = 8
"""Turns for which a smaller batch has to suffice before the batch shrinks."""
_MEMORY = 0.8
"""Weight of the past in the time of a step."""


class Scheduler:
    """The rows of an engine. One thread calls it."""

    def __init__(self, setting: Setting, device: Device, reader: Reader, queue: RequestQueue, interval: float):
        """After the warm-up.

        Args:
          setting: of the engine.
          device: with an empty batch.
          reader: of prompts.
          queue: of those that wait.
          interval: about how many seconds a call is to take.
        """
        self._setting, self._device, self._reader, self._queue = setting, device, reader, queue
        self._interval = interval
        self._reading: Reading | None = None
        self._read: deque[Reading] = deque()
        self._slots: list[Answer | None] = [None] * device.batch_size
        self._stopping: set[int] = set()
        self._pending: tuple[Results, list[Answer | None]] | None = None
        self._spare_turns = 0
        self._step_seconds, self._last_end = dict(device.step_seconds), 0.0
        self._unfinished: dict[int, int] = {}
        self._seconds = (0.0, 0)  # Of slots that were taken, and how many sequences have taken them.
        self.news: list[tuple[Request, Increment]] = []
        slots = max(device.batch_sizes)
        self.totals = Snapshot(num_slots=slots, capacity_tokens=slots * setting.max_len)

    # One turn.

    def turn(self) -> bool:
        """One turn; whether there is anything left to do."""
        self._drop()
        self._admit()
        call = self._start_call()
        self._read_on()
        if self._pending is not None:
            self._take(*self._pending)
        self._pending = call
        if call is None:
            self._last_end = 0.0  # What comes next does not follow without a break.
        return call is not None or self._reading is not None or bool(self._read) or self._queue.is_waiting()

    def snapshot(self) -> Snapshot:
        """The state now; may be called from any thread."""
        running = [answer for answer in list(self._slots) if answer is not None]
        used = sum(len(answer.request.prompt) + answer.usage.completion_tokens for answer in running)
        return self.totals._replace(
            running=len(running),
            waiting=self._queue.sequences,
            used_tokens=used,
            prefix_bytes=self._reader.prefix.num_bytes,
        )

    def seconds_each(self) -> float:
        """About how long a sequence that waits takes to get a slot."""
        seconds, ended = self._seconds
        return seconds / ended if ended else 1.0

    def end_all(self, reason: str, error: str | None) -> None:
        """Ends every request."""
        for request in self._queue.drop(lambda request: True):
            self._end_from(request, 0, reason, error)
        for reading in self._readings():
            self._forget(reading, reason, error)
        for slot, answer in enumerate(self._slots):
            if answer is not None:
                self._end(slot, answer, answer.end(reason, error))

    # Requests that end before their time.

    def _drop(self) -> None:
        """Ends the requests that were cancelled or have run out of time, wherever they are."""
        now = time.monotonic()
        for request in self._queue.drop(lambda request: request.why_gone(now)):
            self._end_from(request, 0, request.why_gone(now))
        for reading in self._readings():
            if why := reading.request.why_gone(now):
                self._forget(reading, why)
        for slot, answer in enumerate(self._slots):
            if answer is not None and (why := answer.request.why_gone(now)):
                self._stopping.add(slot)
                self._end(slot, answer, answer.end(why))

    def _readings(self) -> list[Reading]:
        return [reading for reading in (self._reading, *self._read) if reading is not None]

    def _forget(self, reading: Reading, reason: str, error: str | None = None) -> None:
        """Ends the sequences of a prompt that have not begun."""
        if reading is self._reading:
            self._reading = None
        else:
            self._read.remove(reading)
        request = reading.request
        self._queue.leave(request.options.n - reading.inserted, 0 if reading.inserted else len(request.prompt))
        self._end_from(request, reading.inserted, reason, error)

    def _end_from(self, request: Request, begin: int, reason: str, error: str | None = None) -> None:
        """Ends the sequences of a request from one on, which have no slots."""
        for index in range(begin, request.options.n):
            self._tell(request, Answer(request, index, self._setting.tokenizer, 0).end(reason, error))

    # From prompts to slots.

    def _admit(self) -> None:
        """Puts prompts that have been read into slots, growing the batch where it is full."""
        while self._read:
            reading = self._read[0]
            if reading.request.options.max_new_tokens == 0:
                answer = self._begin(reading)
                self._tell(reading.request, answer.end("length"))
            elif not self._insert(reading):
                return
        self._shrink()

    def _insert(self, reading: Reading) -> bool:
        """Begins the next sequence of a prompt, where there is room for it and its grammar."""
        request, options = reading.request, reading.request.options
        if not self._make_room(options.n - reading.inserted):
            return False
        grammar_state: int | None = DEAD
        if options.grammar is not None:
            is_new = not self._setting.grammars.has(options.grammar)
            grammar_state = self._setting.grammars.add(options.grammar)
            if grammar_state is None:
                return False  # Those that run have to end first.
            if is_new:
                self._device.set_grammar(self._setting.grammars.table())
        begin = 1 if self._setting.encodes else len(request.prompt)
        choices = choices_of(
            options,
            self._setting.programs.sizes,
            request.sampling,
            request.stop_tokens,
            limit=begin + options.max_new_tokens,
            index=reading.inserted,
            grammar_state=grammar_state,
        )
        slot = self._slots.index(None)
        self._device.insert(slot, reading.text, choices)
        self._stopping.discard(slot)
        self._slots[slot] = self._begin(reading)
        return True

    def _begin(self, reading: Reading) -> Answer:
        """The next sequence of a prompt has begun."""
        request, index = reading.request, reading.inserted
        answer = Answer(request, index, self._setting.tokenizer, reading.cached)
        now = time.monotonic()
        answer.usage = answer.usage._replace(
            queue_seconds=reading.started - request.submitted, prefill_seconds=now - reading.started
        )
        if index == 0 and (scores := reading.prompt_logprobs()) is not None:
            self._tell(request, Increment(index=0, prompt_logprobs=scores))
        self._queue.leave(1, 0 if index else len(request.prompt))
        reading.inserted += 1
        if reading.inserted == request.options.n:
            self._read.remove(reading)
        return answer

    def _make_room(self, number: int) -> bool:
        """Whether there is a free slot, after growing the batch for as many more rows."""
        if None in self._slots:
            return True
        larger = [size for size in self._device.batch_sizes if size > len(self._slots)]
        if not larger:
            return False
        needed = len(self._slots) + number
        size = next((size for size in larger if size >= needed), larger[-1])
        self._resize([*range(len(self._slots)), *[-1] * (size - len(self._slots))])
        return True

    def _shrink(self) -> None:
        """Makes the batch smaller where a smaller one has sufficed for a while and nobody waits."""
        taken = [slot for slot, answer in enumerate(self._slots) if answer is not None]
        size = next(size for size in self._device.batch_sizes if size >= max(len(taken), 1))
        is_spare = size < len(self._slots) and self._reading is None and not self._queue.is_waiting()
        self._spare_turns = self._spare_turns + 1 if is_spare else 0
        if self._spare_turns > _PATIENCE or (is_spare and not taken):
            self._resize([*taken, *[-1] * (size - len(taken))])
            self._spare_turns = 0

    def _resize(self, source: Sequence[int]) -> None:
        self._device.resize(source)
        self._slots = [self._slots[old] if old >= 0 else None for old in source]
        self._stopping = {new for new, old in enumerate(source) if old in self._stopping and old >= 0}

    def _read_on(self) -> None:
        """Reads one more chunk of the next prompt; one prompt may be ready before a slot is free."""
        if self._reading is None and not self._read and (request := self._queue.pop()) is not None:
            self._reading = self._reader.start(request)
            self._count(
                prompt_tokens=len(request.prompt),
                prefix_queries=len(request.prompt) if self._reader.prefix.max_bytes else 0,
                prefix_hits=self._reading.cached,
            )
        if self._reading is not None:
            self._reader.step(self._reading)
            if self._reading.is_complete:
                self._read.append(self._reading)
                self._reading = None

    # Calls.

    def _start_call(self) -> tuple[Results, list[Answer | None]] | None:
        """Starts a call for all running rows; None where there are none."""
        answers = [answer for answer in self._slots if answer is not None]
        if not answers:
            return None
        size = len(self._slots)
        stop = np.zeros(size, bool)
        stop[list(self._stopping)] = True
        self._stopping.clear()
        waits = bool(self._read) or self._reading is not None or self._queue.is_waiting()
        steps = int(np.clip(self._interval / self._step_seconds[size], 1, self._setting.programs.sizes.max_steps))
        if any(answer.first_token is None for answer in answers):
            steps = 1  # The first token is not to wait for others.
        return self._device.advance(stop, steps, leave_early=waits), list(self._slots)

    def _take(self, results: Results, answers: list[Answer | None]) -> None:
        """Hands out what a call has brought."""
        wants = any(a is not None and a.request.options.logprobs is not None and not a.is_closed for a in answers)
        rows = to_host(self._setting.programs, results, with_logprobs=wants)
        self._time(rows, answers)
        for slot, answer in enumerate(answers):
            if answer is None or answer.is_closed:
                continue
            before, increment = answer.usage, answer.take(news_of(rows, slot, answer))
            self._count_gain(before, answer)
            if increment is None:
                continue
            now = self._slots.index(answer)
            if increment.finish_reason is None:
                self._tell(answer.request, increment)
            else:
                if not rows.numbers["done"][slot]:
                    self._stopping.add(now)
                self._end(now, answer, increment)

    def _time(self, rows: Rows, answers: list[Answer | None]) -> None:
        """Learns how long a step takes, from calls that followed each other without a break."""
        now, size = time.monotonic(), len(answers)
        steps = max(
            (rows.numbers["steps"][slot] - answer.usage.steps for slot, answer in enumerate(answers) if answer),
            default=0,
        )
        if steps > 0 and self._reading is None and self._last_end:
            each = (now - self._last_end) / steps
            self._step_seconds[size] = _MEMORY * self._step_seconds[size] + (1 - _MEMORY) * min(each, 1.0)
        self._last_end = now

    def _end(self, slot: int, answer: Answer, last: Increment) -> None:
        """Frees a slot."""
        self._slots[slot] = None
        took = (answer.usage.prefill_seconds + answer.usage.decode_seconds) / max(self._device.batch_sizes)
        self._seconds = self._seconds[0] + took, self._seconds[1] + 1
        if (grammar := answer.request.options.grammar) is not None:
            self._setting.grammars.remove(grammar)
        self._tell(answer.request, last)

    def _tell(self, request: Request, increment: Increment) -> None:
        self.news.append((request, increment))
        if increment.finish_reason is not None:
            rest = self._unfinished.get(id(request), request.options.n) - 1
            self._unfinished[id(request)] = rest
            if not rest:
                del self._unfinished[id(request)]
                self._queue.close_one()

    # Counters.

    def _count(self, **gained: int) -> None:
        self.totals = self.totals._replace(**{name: getattr(self.totals, name) + n for name, n in gained.items()})

    def _count_gain(self, before: Any, answer: Answer) -> None:
        after = answer.usage
        steps = after.steps - before.steps
        self._count(
            generated_tokens=after.completion_tokens - before.completion_tokens,
            draft_steps=after.draft_steps - before.draft_steps,
            drafted=after.drafted - before.drafted,
            accepted=after.accepted - before.accepted,
        )
        old = before.accepted_at or (0,) * len(after.accepted_at)
        gained = [a - b for a, b in zip(after.accepted_at, old, strict=True)]
        total = self.totals.accepted_at or (0,) * len(gained)
        mean = self.totals.num_draft_tokens
        if steps:
            mean = _MEMORY * mean + (1 - _MEMORY) * (after.drafted - before.drafted) / steps
        self.totals = self.totals._replace(
            accepted_at=tuple(a + b for a, b in zip(total, gained, strict=True)), num_draft_tokens=mean
        )


def news_of(rows: Rows, slot: int, answer: Answer) -> News:
    """What a call has brought one row."""
    number: dict[str, int] = {name: int(column[slot]) for name, column in rows.numbers.items()}
    count = number["length"] - number["begin"]
    logprobs = None
    if (top := answer.request.options.logprobs) is not None and rows.logprobs is not None:
        token, top_tokens, best = (x[slot] for x in rows.logprobs)
        logprobs = [TokenLogprobs(float(token[i]), top_of(top_tokens[i, :top], best[i, :top])) for i in range(count)]
    error = None
    if number["failed_at"] >= 0:
        side = "draft" if number["draft_failed"] else "target"
        error = (
            f"The {side}'s logits are NaN at position {number['failed_at']}, or the options forbid every token there: "
            "the text before it is valid."
        )
    return News(
        rows.tokens[slot, :count].tolist(),
        rows.from_draft[slot, :count].tolist(),
        logprobs,
        is_done=bool(number["done"]),
        error=error,
        steps=number["steps"],
        draft_steps=number["draft_steps"],
        drafted=number["drafted"],
        accepted_at=tuple(rows.accepted[slot].tolist()),
    )
