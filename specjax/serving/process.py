"""Runs a server in this process: signals, draining within a bound, and an end where the engine dies."""

import asyncio
import contextlib
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

import uvicorn

from specjax.serving.server import Server, application

log = logging.getLogger("specjax.serve")

FAILED, DIED = 1, 3
"""The exit codes where the application could not start, and where the engine died."""


class Place(NamedTuple):
    """Where a server listens, and how it ends.

    Attributes:
      host: the address.
      port: 0: a free one.
      shutdown_timeout: seconds that accepted requests may take to end after SIGTERM; 0: they are cancelled at once.
      poll: seconds between looks at the engine.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    shutdown_timeout: float = 30.0
    poll: float = 0.5


HERE = Place()


class _Uvicorn(uvicorn.Server):
    """uvicorn without its own signal handlers, which would raise the signal again at the end."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves signals to `run`."""
        yield


class Running:
    """A server that runs, on an event loop of the thread that called `serve`."""

    def __init__(self, server: Server, place: Place):
        self._server, self._place = server, place
        self._loop: asyncio.AbstractEventLoop | None = None
        self.code = 0
        self.app = application(server)
        config = uvicorn.Config(
            self.app,
            host=place.host,
            port=place.port,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=65,  # Longer than the 60 s of usual load balancers, which would else race with it.
            # A backstop: by then the engine has cancelled what was left.
            timeout_graceful_shutdown=int(place.shutdown_timeout) + 5,
        )
        self._uvicorn = _Uvicorn(config)

    @property
    def port(self) -> int:
        """Where it listens."""
        return self._uvicorn.servers[0].sockets[0].getsockname()[1]

    def stop(self) -> None:
        """Refuses new requests, lets accepted ones end within the bound, and stops; a second call stops at once."""
        if self._server.draining:
            self._uvicorn.force_exit = True
        self._server.draining = True
        self._uvicorn.should_exit = True
        threading.Thread(target=self._close, daemon=True, name="close-engine").start()

    def stop_soon(self) -> None:
        """`stop`, from another thread."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # It has ended already.
                self._loop.call_soon_threadsafe(self.stop)

    def _close(self) -> None:
        self._server.engine.close(self._place.shutdown_timeout)

    async def _watch(self, started: Callable[["Running"], None]) -> None:
        while not self._uvicorn.started:
            await asyncio.sleep(0.01)
        log.info("listening at http://%s:%d", self._place.host, self.port)
        started(self)
        while True:
            if not self._server.engine.alive and not self._server.draining:
                log.error("the engine has died: the server ends with code %d", DIED)
                self.code = DIED
                # The watch of the application answers the requests that wait; give it its turn.
                await asyncio.sleep(2 * self._place.poll)
                self._server.draining = True
                self._uvicorn.should_exit = True
                return
            await asyncio.sleep(self._place.poll)

    async def serve(self, started: Callable[["Running"], None], signals: bool) -> int:
        """Serves until `stop`."""
        self._loop = asyncio.get_running_loop()
        if signals:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._loop.add_signal_handler(number, self.stop)
        watch = asyncio.ensure_future(self._watch(started))
        try:
            await self._uvicorn.serve()
        finally:
            watch.cancel()
        return self.code if self._uvicorn.started else FAILED


def check_free(place: Place) -> None:
    """Refuses an address that is taken; uvicorn would exit inside the loop.

    Raises:
      OSError: where it is taken or not this machine's.
    """
    if place.port == 0:
        return
    family = socket.AF_INET6 if ":" in place.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((place.host, place.port))
        except OSError as error:
            raise OSError(
                f"The server cannot listen at {place.host}:{place.port} ({error.strerror}): give another --port."
            ) from error


def run(
    server: Server,
    place: Place = HERE,
    *,
    started: Callable[[Running], None] = lambda running: None,
    signals: bool = True,
) -> int:
    """Serves until SIGTERM or SIGINT, which drain, or until the engine dies; then closes the engine.

    Args:
      server: the endpoints.
      place: where to listen, and how long to drain.
      started: called on the loop once connections are taken.
      signals: whether to handle signals, for which this must be the main thread.

    Returns:
      the exit code: 0, or `DIED`.

    Raises:
      OSError: where the address is taken.
    """
    check_free(place)
    code = asyncio.run(Running(server, place).serve(started, signals))
    server.engine.close(0.0)
    return code
