"""What goes into an engine and what comes out: options, increments, errors. No logic that needs a device."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from specjax.text.tokenizer import Tokenizer
from specjax.types import Automaton


class Options(NamedTuple):
    """What one request may choose. Names and meanings are those of `specjax.generate`.

    Attributes:
      max_new_tokens: the most new tokens of each sequence.
      temperature: 0 is greedy.
      top_k: 0 keeps all.
      top_p: 1 keeps all.
      min_p: 0 keeps all.
      typical_p: 1 keeps all.
      epsilon_cutoff: 0 keeps all.
      repetition_penalty: 1 is off.
      presence_penalty: 0 is off.
      frequency_penalty: 0 is off.
      no_repeat_ngram_size: 0 is off.
      min_new_tokens: stop tokens are forbidden before.
      logit_bias: added to the logits of these tokens; -inf forbids one.
      seed: sequence i of the request uses `seed + i`; in [0, 2^32).
      n: how many sequences are generated for the prompt.
      stop_tokens: token ids that end a sequence; None: the tokenizer's end-of-sequence tokens; (): none.
      stop_strings: texts that end a sequence; neither they nor what follows is part of its text.
      include_stop: whether a stop string is part of the text after all.
      grammar: an automaton that says which tokens may follow (`sampling.automaton`), or None.
      logprobs: a number n returns the log-probability of every new token, and of the n most probable ones, under the
        target itself (before any option); None: not asked for.
      prompt_logprobs: the same for the tokens of the prompt.
      prediction: token ids that the answer is likely to resemble (OpenAI's predicted outputs): drafts are looked up in
        them. They do not change the text's distribution.
      cache_salt: prompts share cached prefixes only with prompts of the same salt.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    min_new_tokens: int = 0
    logit_bias: Mapping[int, float] | None = None
    seed: int = 0
    n: int = 1
    stop_tokens: Sequence[int] | None = None
    stop_strings: Sequence[str] = ()
    include_stop: bool = False
    grammar: Automaton | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    prediction: Sequence[int] | None = None
    cache_salt: str = ""


class TokenLogprobs(NamedTuple):
    """The log-probability of a token at its position, and of the most probable tokens there.

    Attributes:
      logprob: of the token itself; None for the first token of a prompt, which nothing precedes.
      top: from token ids to log-probabilities, most probable first.
    """

    logprob: float | None
    top: dict[int, float]


class Usage(NamedTuple):
    """What a sequence cost, complete on its last increment.

    Attributes:
      prompt_tokens: tokens of the prompt.
      cached_tokens: those whose keys and values came from the prefix cache.
      completion_tokens: new tokens, the stop token included; none after a stop string.
      steps: calls of the target that the sequence took part in.
      draft_steps: those in which at least one token was drafted for it.
      drafted: draft tokens that were judged.
      accepted: draft tokens that were accepted.
      accepted_at: how many were accepted at each position of a draft.
      accepted_prediction: accepted draft tokens that came from the request's `prediction`.
      rejected_prediction: draft tokens from it that were not accepted.
      queue_seconds: from `submit` to the start of the prefill.
      prefill_seconds: of the prefill.
      decode_seconds: from the first new token to the last.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    steps: int = 0
    draft_steps: int = 0
    drafted: int = 0
    accepted: int = 0
    accepted_at: tuple[int, ...] = ()
    accepted_prediction: int = 0
    rejected_prediction: int = 0
    queue_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0


class Increment(NamedTuple):
    """What a sequence has gained since its last increment. Concatenated, `text` and `tokens` are the sequence.

    Attributes:
      index: which of the `n` sequences.
      text: the new text, special tokens left out; characters that are not complete yet and what may be the beginning of
        a stop string are held back. Empty without a tokenizer.
      tokens: the new token ids; those of a stop string are left out, like its text.
      from_draft: whether each was an accepted draft token.
      logprobs: of each token, or None where they were not asked for.
      prompt_logprobs: of the prompt's tokens, on the first increment of sequence 0, where they were asked for.
      finish_reason: None while the sequence grows; "stop", "length", "cancelled", "timeout" or "error" on its last
        increment.
      stop: the token id or the string that ended it.
      error: what went wrong, where `finish_reason` is "error".
      usage: on the last increment.
    """

    index: int  # pyright: ignore[reportIncompatibleMethodOverride]
    text: str = ""
    tokens: tuple[int, ...] = ()
    from_draft: tuple[bool, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    finish_reason: str | None = None
    stop: int | str | None = None
    error: str | None = None
    usage: Usage | None = None


class Completion(NamedTuple):
    """A whole sequence, as `Submission.result` and `Engine.generate` return it; the fields are those of `Increment`."""

    text: str
    tokens: list[int]
    from_draft: list[bool]
    logprobs: list[TokenLogprobs] | None
    prompt_logprobs: list[TokenLogprobs] | None
    finish_reason: str
    stop: int | str | None
    usage: Usage


class Snapshot(NamedTuple):
    """The state of an engine, for dashboards. Counters count from its start.

    Attributes:
      running: sequences that decode.
      waiting: sequences that wait for a slot, or are being prefilled.
      num_slots: the most that decode at once.
      used_tokens: tokens in the caches of running sequences.
      capacity_tokens: the most tokens that the slots hold.
      prefix_bytes: memory of the prefix cache.
      prompt_tokens: tokens of prompts that were read, cached ones included.
      prefix_queries: tokens of prompts that were looked up in the prefix cache.
      prefix_hits: those that were found.
      generated_tokens: new tokens.
      draft_steps: row steps in which at least one token was drafted.
      drafted: draft tokens that were judged.
      accepted: draft tokens that were accepted.
      accepted_at: accepted draft tokens by their position in the draft.
      num_draft_tokens: the mean number of tokens that running rows drafted in the last call; "K now".
      compilations: programs compiled since the engine was ready: 0 in a sound server.
    """

    running: int = 0
    waiting: int = 0
    num_slots: int = 0
    used_tokens: int = 0
    capacity_tokens: int = 0
    prefix_bytes: int = 0
    prompt_tokens: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    generated_tokens: int = 0
    draft_steps: int = 0
    drafted: int = 0
    accepted: int = 0
    accepted_at: tuple[int, ...] = ()
    num_draft_tokens: float = 0.0
    compilations: int = 0


class Overloaded(RuntimeError):
    """The queue is full.

    Attributes:
      retry_after: seconds after which it is worth trying again.
    """

    def __init__(self, message: str, retry_after: float):
        super().__init__(message)
        self.retry_after = retry_after


class Closed(RuntimeError):
    """The engine takes no more requests: it is shutting down, or it has died."""


@runtime_checkable
class Submission(Protocol):
    """A request that an engine has accepted. Iterating yields its increments, of all its sequences, in order."""

    prompt: Sequence[int]
    options: Options

    def __iter__(self) -> Iterator[Increment]: ...

    def result(self) -> list[Completion]:
        """Waits for its end: one completion for each of the `n` sequences.

        Raises:
          RuntimeError: for a request that was cancelled, timed out or failed.
        """
        ...

    def cancel(self) -> None:
        """Frees its slots, or its place in the queue; never blocks, and may be called from any thread, repeatedly."""
        ...


Listener = Callable[[Sequence[tuple[Submission, Increment]]], None]
"""Called on the engine's thread, once for each call of the device, with all that the requests have gained."""


@runtime_checkable
class Engine(Protocol):
    """What a server needs of an engine; `engine.Engine` is one.

    Attributes:
      tokenizer: of the target, or None.
      vocab_size: of the target.
      max_len: the longest sequence, prompt included, in tokens.
      num_draft_tokens: the most draft tokens of a step.
      alive: whether its thread runs. A dead engine answers nothing any more.
      ready: whether everything is compiled.
    """

    tokenizer: Tokenizer | None
    vocab_size: int
    max_len: int
    num_draft_tokens: int
    alive: bool
    ready: bool

    def submit(
        self, prompt: str | Sequence[int], options: Options = ..., *, timeout: float | None = None, listen: bool = False
    ) -> Submission:
        """Queues a request. Thread-safe, and returns at once.

        Args:
          prompt: a text, or token ids.
          options: what the request chooses.
          timeout: seconds after which it ends with "timeout", wherever it is.
          listen: its increments go to the engine's listener in the place of the submission's own queue.

        Raises:
          ValueError: for options that make no sense or a prompt that does not fit, naming value and remedy.
          Overloaded: where the queue is full.
          Closed: where it shuts down or has died.
        """
        ...

    def listen(self, listener: Listener) -> None:
        """Sets the listener."""
        ...

    def snapshot(self) -> Snapshot:
        """Its state now. Thread-safe."""
        ...

    def close(self, timeout: float = 0.0) -> None:
        """Refuses new requests, waits so many seconds for accepted ones, cancels the rest, and ends its thread."""
        ...
