"""Continuous batching with speculation: requests come and go while the others decode.

One thread owns the device (`scheduler` says what it does). The batch takes one of a few sizes, so that few requests do
not pay for many, and every program is compiled before the engine is ready.
"""

import threading
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from specjax.api.pretrained import Pretrained
from specjax.api.request import encode
from specjax.decoding.prefill import step_costs
from specjax.decoding.verify import coupled
from specjax.parallel import sharding
from specjax.serving import capacity, warmup
from specjax.serving.compilations import Compilations
from specjax.serving.device import Device
from specjax.serving.queue import RequestQueue
from specjax.serving.reader import Reader
from specjax.serving.requests import Completion, Increment, Listener, Options, Overloaded, Snapshot
from specjax.serving.scheduler import Scheduler
from specjax.serving.sequences import Request


class Engine:
    """Decodes the requests of many users in one batch; each gets the text that it would get alone.

        with specjax.Engine(target, drafter=specjax.drafters.ngram(num_draft_tokens=7)) as engine:
            for increment in engine.submit("Once upon a time", max_new_tokens=64):
                print(increment.text, end="", flush=True)

    With the rule `coupled`, the default, a text depends on its prompt and seed alone: it is that of `specjax.generate`
    with the same rule, token for token, up to rounding (`docs/exactness.md`).

    Attributes:
      tokenizer: of the target, or None.
      vocab_size: of the target.
      max_len: the longest sequence, prompt included, in tokens.
      num_draft_tokens: the most draft tokens of a step.
      alive: whether its thread runs.
      ready: whether everything is compiled.
    """

    def __init__(
        self,
        target: Pretrained,
        *,
        drafter: Any = None,
        verify: Any = coupled,
        num_slots: int = 8,
        max_len: int | None = None,
        batch_sizes: Sequence[int] | None = None,
        chunk_widths: Sequence[int] | None = None,
        max_prediction: int = 0,
        num_top: int = 20,
        prefix_bytes: int = 256 << 20,
        grammar_states: int = 2048,
        grammar_classes: int = 1024,
        max_queued_requests: int = 256,
        max_queued_tokens: int = 1 << 20,
        interval: float = 0.05,
        step_cost: float | Sequence[float] | None = None,
        score_prompts: bool = True,
        say: Callable[[str], None] = lambda line: None,
    ):
        """Compiles everything, measures what steps cost, and starts the thread.

        Args:
          target: the model whose distribution the texts have.
          drafter: the drafter; None decodes plainly.
          verify: the acceptance rule (`specjax.verify`) or its name.
          num_slots: the most sequences that decode at once.
          max_len: the longest sequence, prompt included, in tokens; by default what the target knows, at most 2,048.
          batch_sizes: the sizes that the batch takes, the largest being `num_slots`; by default powers of two on CPUs,
            where a step's time grows with them, and powers of eight elsewhere.
          chunk_widths: prompts are read in chunks of the last width; their last chunks are padded to one of these. A
            wide chunk takes less time per token, those who decode wait for it longer, and prefixes are kept at its
            multiples. By default 16, 64, 128 and 256, as far as they fit.
          max_prediction: the longest `Options.prediction`, in tokens, that drafts may be looked up in; for an
            encoder-decoder the longest prompt (0: 512).
          num_top: the most log-probabilities of a position that a request may ask for.
          prefix_bytes: the most memory of the prefix cache; 0: none.
          grammar_states: the states of the grammars of all running requests together.
          grammar_classes: the classes of tokens that they distinguish together.
          max_queued_requests: the most sequences that may wait.
          max_queued_tokens: the most tokens of prompts that may wait.
          interval: about how many seconds a call takes, between two increments of a sequence.
          step_cost: as for `generate`, for all sizes of the batch; 0 always drafts as many tokens as possible. None:
            the cost of a step is measured for each size, so that the batch drafts what pays for it.
          score_prompts: whether log-probabilities of prompts may be asked for.
          say: told of every part of the preparation.

        Raises:
          ValueError: for sizes that make no sense or do not fit the memory, or a drafter that does not fit the target.
          RuntimeError: where the preparation fails.
        """
        setting = capacity.settle(
            target,
            drafter,
            verify,
            num_slots=num_slots,
            max_len=max_len,
            batch_sizes=batch_sizes,
            chunk_widths=chunk_widths,
            max_source=max_prediction,
            num_top=num_top,
            grammar=(grammar_states, grammar_classes),
        )
        self.tokenizer, self.vocab_size, self.max_len = target.tokenizer, target.model.vocab_size, setting.max_len
        self.num_draft_tokens = setting.programs.drafter.num_draft_tokens
        self._target, self._setting, self._score_prompts = target, setting, score_prompts
        self._queue = RequestQueue(max_queued_requests, max_queued_tokens)
        self._compilations = Compilations()
        self._listener: Listener | None = None
        self._scheduler: Scheduler | None = None
        self._closing = self.ready = False
        self.alive = True
        self._failure = ""
        arguments = (prefix_bytes, interval, step_cost, say)
        self._thread = threading.Thread(target=self._run, args=arguments, name="specjax-engine", daemon=True)
        self._thread.start()
        with self._queue.changed:
            self._queue.changed.wait_for(lambda: self.ready or not self.alive)
        if not self.alive:
            raise RuntimeError(f"The engine could not start: {self._failure}")

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(
        self,
        prompt: str | Sequence[int],
        options: Options | None = None,
        *,
        timeout: float | None = None,
        listen: bool = False,
        **choices: Any,
    ) -> Request:
        """Queues a request, and returns at once. Thread-safe.

        Args:
          prompt: a text, or token ids.
          options: what the request chooses.
          timeout: seconds after which it ends with "timeout", wherever it is.
          listen: its increments go to the engine's listener in the place of the request's own queue.
          **choices: fields of `Options`, in the place of those of `options`.

        Returns:
          the request: iterating yields its increments, and `result()` waits for its completions.

        Raises:
          ValueError: for options that make no sense or a prompt that does not fit, naming value and remedy.
          TypeError: for an option that does not exist.
          Overloaded: where the queue is full.
          Closed: where the engine shuts down or has died.
        """
        options = Options(**choices) if options is None else options._replace(**choices)
        (tokens,) = encode(self._target, [prompt])
        sampling, stop_tokens = capacity.check(self._setting, tokens, options, score_prompts=self._score_prompts)
        capacity.check_timeout(timeout)
        request = Request(tokens, options, sampling, stop_tokens, timeout=timeout, listen=listen, wake=self._queue.wake)
        self._queue.put(request, self._scheduler.seconds_each() if self._scheduler is not None else 1.0)
        return request

    def generate(
        self, prompts: Iterable[str | Sequence[int]], options: Options | Sequence[Options] | None = None, **choices: Any
    ) -> list[Completion]:
        """Decodes many prompts, as many at a time as there are slots.

        Args:
          prompts: texts, or token ids.
          options: for all, or one for each.
          **choices: fields of `Options`, for all.

        Returns:
          the completions in the order of the prompts, the `n` of one prompt adjacent.

        Raises:
          ValueError: as `submit` does.
          RuntimeError: where one fails.
        """
        given = list(prompts)
        each = [options] * len(given) if options is None or isinstance(options, Options) else list(options)
        requests: list[Request] = []
        try:
            for prompt, own in zip(given, each, strict=True):
                requests.append(self._submit_patiently(prompt, own, choices))
            return [completion for request in requests for completion in request.result()]
        except BaseException:
            for request in requests:
                request.cancel()
            raise

    def _submit_patiently(self, prompt: Any, options: Options | None, choices: Any) -> Request:
        while True:
            try:
                return self.submit(prompt, options, **choices)
            except Overloaded:
                with self._queue.changed:
                    self._queue.changed.wait(0.05)

    def listen(self, listener: Listener) -> None:
        """Sets who is told of the increments of requests that were submitted with `listen`."""
        self._listener = listener

    def snapshot(self) -> Snapshot:
        """Its state now. Thread-safe."""
        if self._scheduler is None:
            return Snapshot()
        return self._scheduler.snapshot()._replace(compilations=self._compilations.count)

    def close(self, timeout: float = 0.0) -> None:
        """Refuses new requests, waits so many seconds for accepted ones, cancels the rest, and ends its thread."""
        self._queue.refuse()
        with self._queue.changed:
            self._queue.changed.wait_for(lambda: not self._queue.open or not self.alive, timeout)
        self._closing = True
        self._queue.wake()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self, prefix_bytes: int, interval: float, step_cost: Any, say: Callable[[str], None]) -> None:
        """What the engine's thread does."""
        reason, error = "cancelled", None
        try:
            with sharding.on_mesh(self._setting.mesh):
                self._prepare(prefix_bytes, interval, step_cost, say)
                self._serve()
        except BaseException as failure:
            traceback.print_exc()
            reason, error = "error", f"The engine has died of {type(failure).__name__}: {failure}"
            self._failure = error
        self._queue.refuse()
        self.alive = self.ready = False
        self._compilations.stop()
        if self._scheduler is not None:
            self._scheduler.end_all(reason, error)
            self._hand_out(self._scheduler)
        self._queue.wake()

    def _prepare(self, prefix_bytes: int, interval: float, step_cost: Any, say: Callable[[str], None]) -> None:
        s = self._setting
        table = s.grammars.table()
        device = Device(s.programs, s.params, s.batch_sizes, s.chunk_widths, s.choices, table, s.mesh)
        reader = Reader(device, prefix_bytes)
        warmup.warm(device, reader, score_prompts=self._score_prompts and not s.encodes, say=say)
        if step_cost is not None:
            device.step_costs = dict.fromkeys(s.batch_sizes, step_costs(step_cost, s.programs.drafter.topology.depth))
        device.allocate(s.batch_sizes[0])
        device.set_grammar(table)
        self._compilations.watch()
        self._scheduler = Scheduler(s, device, reader, self._queue, interval)
        self.ready = True
        self._queue.wake()

    def _serve(self) -> None:
        scheduler = self._scheduler
        assert scheduler is not None
        while not self._closing:
            is_busy = scheduler.turn()
            self._hand_out(scheduler)
            with self._queue.changed:
                if not is_busy and not self._queue.is_waiting() and not self._closing:
                    # Nobody waits, so nothing can run out of time.
                    self._queue.changed.wait()

    def _hand_out(self, scheduler: Scheduler) -> None:
        news, scheduler.news = scheduler.news, []
        heard: list[tuple[Request, Increment]] = []
        for request, increment in news:
            if request.listen:
                heard.append((request, increment))
            else:
                request.put(increment)
        if heard and self._listener is not None:
            self._listener(heard)
