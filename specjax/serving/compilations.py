"""Compiles programs in several threads before an engine serves, and counts compilations while it serves (none)."""

import concurrent.futures
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax

_MOST_THREADS = 8
"""Each compilation takes memory, and one thread cannot trace programs fast enough for more."""
_SECONDS = 1.0
"""Between two lines of progress."""
_EVENT = "/jax/core/compile/backend_compile_duration"


class Compilations:
    """Compilations of one thread, from `watch` on."""

    def __init__(self) -> None:
        """Counts nothing yet."""
        self.count = 0
        self._thread: int | None = None
        jax.monitoring.register_event_duration_secs_listener(self._heard)

    def watch(self) -> None:
        """Counts the compilations of the calling thread from now on."""
        self._thread = threading.get_ident()

    def stop(self) -> None:
        """Counts no more."""
        self._thread = None
        jax.monitoring.unregister_event_duration_listener(self._heard)

    def _heard(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        del duration_secs, kwargs
        if event == _EVENT and threading.get_ident() == self._thread:
            self.count += 1


class Program(NamedTuple):
    """A program that is to be compiled.

    Attributes:
      function: a function of `jax.jit`.
      arguments: makes its arguments; called once, when the program is traced.
    """

    function: Any
    arguments: Callable[[], tuple[Any, ...]]


def compile_all(stages: Iterable[Sequence[Program]], num_programs: int, say: Callable[[str], None]) -> None:
    """Compiles programs before they are called, which then finds them.

    The calling thread traces and lowers one after the other, which Python does on one thread at a time; a few threads
    compile what has been lowered, which XLA does without Python's lock.

    Args:
      stages: programs; the arguments of those of a stage may come from calls of those of the stages before.
      num_programs: in all stages, for the progress.
      say: told how many have been compiled, about once a second and at the end.
    """
    begin = told = time.perf_counter()
    num_done = 0

    def count(compiled: Iterable[concurrent.futures.Future[Any]]) -> None:
        nonlocal num_done, told
        for one in compiled:
            one.result()
            num_done += 1
            now = time.perf_counter()
            if now - told >= _SECONDS or num_done == num_programs:
                told = now
                say(f"compiled {num_done} of {num_programs} programs after {now - begin:.1f} s")

    with concurrent.futures.ThreadPoolExecutor(min(os.cpu_count() or 1, _MOST_THREADS), "specjax-compile") as pool:
        try:
            for stage in stages:
                running: set[concurrent.futures.Future[Any]] = set()
                for function, arguments in stage:
                    running.add(pool.submit(function.lower(*arguments()).compile))
                    done = {one for one in running if one.done()}
                    running -= done
                    count(done)
                count(concurrent.futures.as_completed(running))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
