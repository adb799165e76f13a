"""Prompts are read in chunks, from the longest prefix on that is cached."""

import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from specjax.decoding.prefill import Text
from specjax.serving import programs as device_programs
from specjax.serving.device import Device
from specjax.serving.prefix import PrefixCache
from specjax.serving.requests import TokenLogprobs
from specjax.serving.sequences import Request
from specjax.state import Logprobs
from specjax.types import Inputs


class Reading:
    """A prompt that is being read, or has been.

    Attributes:
      request: whose.
      text: what has been read of it.
      position: the tokens that have been read.
      cached: those of them that came from the prefix cache.
      edges: the positions at which it is to be kept.
      is_complete: whether all has been read.
      inserted: how many of the request's sequences have begun.
      started: when the reading began, by `time.monotonic`.
    """

    def __init__(self, request: Request, text: Text, position: int, edges: set[int]):
        """Begins at a position."""
        self.request, self.text, self.position, self.cached, self.edges = request, text, position, position, edges
        self.is_complete, self.inserted, self.started = False, 0, time.monotonic()
        self.scores: list[tuple[Logprobs, int]] = []

    def prompt_logprobs(self) -> tuple[TokenLogprobs, ...] | None:
        """Of the prompt's tokens, where they were asked for; waits for the device."""
        number = self.request.options.prompt_logprobs
        if number is None:
            return None
        found = [TokenLogprobs(None, {})]
        for scores, count in self.scores:
            token, top_tokens, top = (np.asarray(x)[0] for x in scores)
            found += [
                TokenLogprobs(float(token[i]), top_of(top_tokens[i, :number], top[i, :number])) for i in range(count)
            ]
        return tuple(found)


def top_of(tokens: Any, logprobs: Any) -> dict[int, float]:
    """The most probable tokens at a position and their log-probabilities."""
    return dict(zip(tokens.tolist(), logprobs.tolist(), strict=True))


class Reader:
    """Reads one chunk at a time, so that a long prompt does not hold up those who decode."""

    def __init__(self, device: Device, prefix_bytes: int):
        """Nothing is read yet.

        Args:
          device: the device.
          prefix_bytes: the most memory of the prefix cache; 0: none.
        """
        self._device = device
        sizes = device.programs.sizes
        self._chunk = device.chunk_widths[-1]
        self._encodes = device.programs.target.start_token is not None
        self.prefix = PrefixCache(self._chunk, 0 if self._encodes else prefix_bytes)
        self._sizes = [self._chunk]
        while self._sizes[-1] < sizes.max_len:
            self._sizes.append(min(2 * self._sizes[-1], sizes.max_len))
        self.kept = tuple(self._sizes) if self.prefix.max_bytes else ()

    def warm(self) -> None:
        """Runs what keeps and restores prefixes."""
        for size in self.kept:
            jax.block_until_ready(self._restore(self._trim(self._device.begin(), size)))

    def _trim(self, text: Text, size: int) -> Text:
        return device_programs.trim(self._device.programs, text, size)

    def _restore(self, kept: Text) -> Text:
        return device_programs.restore(self._device.programs, kept)

    def start(self, request: Request) -> Reading:
        """Begins with what is known of a prompt."""
        prompt, salt = request.prompt, request.options.cache_salt
        if request.options.prompt_logprobs is not None or self._encodes:
            return Reading(request, self._device.begin(), 0, set())
        match = self.prefix.find(prompt, salt)
        text = self._device.begin() if match.text is None else self._restore(match.text)
        last_edge = (len(prompt) - 1) // self._chunk * self._chunk
        return Reading(request, text, match.length, {match.fork, last_edge} - {0})

    def step(self, reading: Reading) -> None:
        """Starts one more chunk."""
        prompt, at = reading.request.prompt, reading.position
        if self._encodes:
            reading.text = self._device.read(reading.text, self._encoded(prompt))
            reading.position, reading.is_complete = len(prompt), True
            return
        count = min(self._chunk, len(prompt) - at)
        width = next(width for width in self._device.chunk_widths if width >= count)
        inputs = self._inputs(prompt[at : at + count], width, reading.request.options.prediction or ())
        if reading.request.options.prompt_logprobs is None:
            reading.text = self._device.read(reading.text, inputs)
        else:
            following = np.zeros((1, width), np.int32)
            after = prompt[at + 1 : at + count + 1]
            following[0, : len(after)] = after
            reading.text, scores = self._device.read_scored(reading.text, inputs, following)
            reading.scores.append((scores, len(after)))
        reading.position = at = at + count
        reading.is_complete = at == len(prompt)
        if at in reading.edges:
            self._keep(reading)

    def _keep(self, reading: Reading) -> None:
        prompt, salt = reading.request.prompt[: reading.position], reading.request.options.cache_salt
        if self.prefix.max_bytes and not self.prefix.has(prompt, salt):
            size = next(size for size in self._sizes if size >= reading.position)
            kept = self._trim(reading.text, size)
            self.prefix.keep(prompt, salt, kept, sum(x.nbytes for x in jax.tree.leaves(kept)))

    def _inputs(self, tokens: Sequence[int], width: int, prediction: Sequence[int]) -> Inputs:
        padded: Any = np.zeros((1, width), np.int32)
        padded[0, : len(tokens)] = tokens
        length: Any = np.full(1, len(tokens), np.int32)
        size = self._device.programs.sizes.max_source
        if not size:
            return Inputs(padded, length)
        source: Any = np.zeros((1, size), np.int32)
        source[0, : len(prediction)] = prediction
        return Inputs(padded, length, source, 0 * length + len(prediction))

    def _encoded(self, prompt: Sequence[int]) -> Inputs:
        programs = self._device.programs
        source: Any = np.zeros((1, programs.sizes.max_source), np.int32)
        source[0, : len(prompt)] = prompt
        width = self._device.chunk_widths[0]
        start: Any = np.full((1, width), programs.target.start_token, np.int32)
        one: Any = np.ones(1, np.int32)
        return Inputs(start, one, source, len(prompt) * one)
