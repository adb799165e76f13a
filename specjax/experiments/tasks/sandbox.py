"""Tests a Python function that a model wrote, which may be wrong or hostile, and says whether it passes.

The program and its test are two processes, each in a jail (`jail.py`). The program's process defines the function and
answers calls, by values that are plain data; the test's process calls it, compares, and gives the verdict, which the
program can therefore neither read nor forge. Each has limits of time, address space and file sizes, and may start no
other process or thread. Before a jail is used, `isolation` checks all of this: a program of ours tries to break
out. `tests/test_sandbox.py` has the hostile programs that were tried.
"""

import contextlib
import functools
import os
import pathlib
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from io import FileIO
from typing import NamedTuple

from specjax.experiments.tasks import jail
from specjax.experiments.tasks.jailed import protocol

PASSED = "passed"
"""The outcome of a function that passes its test."""

TIMED_OUT = "timed out"


class Limits(NamedTuple):
    """The limits of each of the two processes.

    Attributes:
      seconds: the limit of wall-clock time, from when both are ready, and (rounded up) of CPU time.
      memory: bytes of address space.
    """

    seconds: float
    memory: int


class Exam(NamedTuple):
    """A program and its test.

    Attributes:
      program: the untrusted source.
      function: the name of the function that it defines.
      test: the trusted source: it calls `candidate`, and ends without an error if the function is right.
    """

    program: str
    function: str
    test: str


class Isolation(NamedTuple):
    """A way to jail a program, as it was found on this machine.

    Attributes:
      name: one of `jail.WAYS`.
      missing: what a program can do in it but should not, in words; empty where there is nothing.
    """

    name: str
    missing: tuple[str, ...]


_STARTING = 30.0
"""Seconds that two interpreters may take to start on a busy machine."""

# Numerical libraries start threads when they are imported, and fail where they may not.
_ENVIRONMENT = {"PATH": os.defpath} | {
    f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL", "NUMEXPR", "VECLIB")
}


def _kill(process: subprocess.Popen) -> None:
    """Ends a process and its group; a jail ends with its first process."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextlib.contextmanager
def _started(way: jail.Way, module: str, arguments: Sequence[str], folder: str, **pipes) -> Iterator[subprocess.Popen]:
    """A module of the jail as a process, until the block ends."""
    code = f"import sys; sys.path.append({str(jail.JAILED)!r}); import {module}; {module}.main()"
    home = folder if way is jail.bare else jail.FOLDER
    process = subprocess.Popen(
        way([sys.executable, "-I", "-B", "-X", "utf8", "-c", code, *arguments]),
        stderr=subprocess.DEVNULL,
        cwd=folder,
        env=_ENVIRONMENT | {"HOME": home, "TMPDIR": home},
        start_new_session=True,
        **pipes,
    )
    try:
        yield process
    finally:
        _kill(process)


@contextlib.contextmanager
def _pipe() -> Iterator[tuple[FileIO, FileIO]]:
    """The reading and the writing end; closed with the block, or before."""
    reads, writes = os.pipe()
    with FileIO(reads, "r") as reader, FileIO(writes, "w") as writer:
        yield reader, writer


@contextlib.contextmanager
def _pair(way: jail.Way) -> Iterator[tuple[int, int]]:
    """The program's and the test's process, connected; yields the pipes of the test's task and verdict."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
        (asked, asks), (answers, answered), (task, tasks), (verdict, verdicts) = (
            stack.enter_context(_pipe()) for _ in range(4)
        )
        stack.enter_context(_started(way, "program", [], folder, stdin=asked, stdout=answered))
        ends = asks.fileno(), answers.fileno()
        arguments = [str(end) for end in ends]
        stack.enter_context(_started(way, "tester", arguments, folder, stdin=task, stdout=verdicts, pass_fds=ends))
        # Each side sees when the other has ended.
        for end in (asked, asks, answers, answered, task, verdicts):
            end.close()
        yield tasks.fileno(), verdict.fileno()


def _receive(fd: int, seconds: float) -> object:
    """Receives the next message of the test.

    Raises:
      TimeoutError: where it says nothing for this many seconds.
      EOFError: where it has ended.
    """
    end = time.monotonic() + seconds
    poll = select.poll()
    poll.register(fd, select.POLLIN)

    def wait(_: int) -> None:
        left = end - time.monotonic()
        if left <= 0 or not poll.poll(1e3 * left):
            raise TimeoutError

    return protocol.receive(fd, wait)


def run(exam: Exam, limits: Limits, way: jail.Way) -> str:
    """Tests a function; its program and its test each have a process of their own, started in the given way.

    Returns:
      `PASSED`, or why it failed: the error that the program or the test raised, "timed out", or "ended early".

    Raises:
      OSError: where no jail can be started, which says nothing about the program.
    """
    with _pair(way) as (tasks, verdict):
        try:
            protocol.send(tasks, [*exam, *limits])
            if _receive(verdict, _STARTING) != "ready":
                raise EOFError
        except (TimeoutError, EOFError, BrokenPipeError) as error:
            why = f"within {_STARTING:g} s" if isinstance(error, TimeoutError) else f"within {limits}"
            raise OSError(f"The processes that test a program do not start {why}.") from error
        try:
            answer = _receive(verdict, limits.seconds)
        except TimeoutError:
            return TIMED_OUT
        except EOFError:
            return "ended early"
    assert isinstance(answer, list)
    passed, said = answer
    return PASSED if passed else said


# Each attempt has to be refused by a jail. The names of those that were not refused are returned.
_PROBE = """
import ctypes, os, socket, threading
libc = ctypes.CDLL(None)

def attempts():
    yield "act as root", lambda: 1 / (os.geteuid() == 0)
    yield "read the files of its user", lambda: open({file!r}).close()
    yield "write the files of its user", lambda: open({file!r}, "a").close()
    yield "reach the network of this machine", lambda: socket.create_connection(("127.0.0.1", {port}), 1).close()
    yield "see the processes of this machine", lambda: 1 / (os.getpid() > 2 or os.path.exists("/proc/self"))
    yield "start processes without limit", lambda: os.fork() or os._exit(0)
    yield "start threads without limit", lambda: threading.Thread(target=str).start()
    yield "take memory beyond its limit by System V", lambda: 1 / (libc.shmget(0, 1 << 20, 0o600) >= 0)
    yield "make namespaces of its own", lambda: 1 / (libc.unshare(0x10000000) == 0)
    yield "take memory beyond its limit", lambda: bytearray({memory})
    yield "fill the disk", fill

def fill():
    for i in range({files}):
        with open(f"fill{{i}}", "wb") as file:
            file.write(bytes(1 << 20))

def probe():
    found = []
    for name, attempt in attempts():
        try:
            attempt()
            found.append(name)
        except (OSError, MemoryError, RuntimeError, ZeroDivisionError):
            pass
    return found
"""


def _missing(way: jail.Way, limits: Limits) -> tuple[str, ...]:
    """The attempts that succeed in a program that is started this way.

    Raises:
      OSError: where none can be started.
    """
    with tempfile.TemporaryDirectory() as directory, socket.create_server(("127.0.0.1", 0)) as server:
        file = pathlib.Path(directory) / "file"
        file.touch()
        program = _PROBE.format(
            file=str(file), port=server.getsockname()[1], memory=limits.memory, files=4 * jail.SIZE >> 20
        )
        test = "found = candidate()\nassert not found, '\\n'.join(found)"
        outcome = run(Exam(program, "probe", test), limits._replace(seconds=_STARTING), way)
    if outcome == PASSED:
        return ()
    if not outcome.startswith("AssertionError: "):
        raise OSError(f"a program of our own does not run there ({outcome})")
    return tuple(outcome.removeprefix("AssertionError: ").splitlines())


def _check_start(way: jail.Way) -> None:
    """Starts an interpreter that does nothing.

    Raises:
      OSError: with what the jail says, where that fails.
    """
    command = way([sys.executable, "-I", "-c", ""])
    try:
        done = subprocess.run(command, env=_ENVIRONMENT, capture_output=True, text=True, timeout=_STARTING)
    except subprocess.TimeoutExpired as error:
        raise OSError(f"an interpreter does not start within {_STARTING:g} s") from error
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise OSError(said[-1])


@functools.cache
def isolation(limits: Limits) -> tuple[Isolation, str]:
    """The best jail in which programs run within these limits: the one that refuses the most of what it should.

    Returns:
      it, and why the jails before it were not taken; empty where there is none.

    Raises:
      OSError: where these limits let no program run.
    """
    refused: list[str] = []
    found: list[Isolation] = []
    for name, way in jail.WAYS.items():
        try:
            _check_start(way)
            found.append(Isolation(name, _missing(way, limits)))
        except OSError as error:
            refused.append(f"{name}: {error}")
            continue
        if not found[-1].missing:
            break
    if not found:
        raise OSError(f"No program runs within {limits}: {'; '.join(refused)}. Raise the limits, or use Linux.")
    return min(found, key=lambda one: len(one.missing)), "; ".join(refused)


def judge(limits: Limits, *, unsafe: bool = False) -> Callable[[Exam, Limits], str]:
    """A function that tests programs within these limits on this machine: `run` in the best jail.

    With `unsafe`, a jail that does not refuse everything is taken too.

    Raises:
      OSError: where no jail refuses everything, naming what it allows; or where these limits let no program run.
    """
    best, refused = isolation(limits)
    if best.missing and not unsafe:
        raise OSError(
            f"The programs cannot be isolated on this machine: with {best.name}, they could {', '.join(best.missing)}"
            f"{f' ({refused})' if refused else ''}. Install bubblewrap (apt-get install bubblewrap), allow namespaces, "
            "or run them in a disposable container, with --config.execute=unsafe."
        )
    return functools.partial(run, way=jail.WAYS[best.name])
