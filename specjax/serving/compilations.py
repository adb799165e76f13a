"""Counts what is compiled while an engine serves: nothing, if all was compiled before."""

import threading

import jax

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
