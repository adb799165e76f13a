"""Runs a Python program that a model wrote, with limits: a process of its own, which cannot take much.

The process gets seconds, memory and small files; an empty environment; a directory that is deleted behind it; and on
Linux, where users may make namespaces, no network and no sight of other processes. It can read what its user can read:
this guards against programs that are wrong, not against one that was written to break out. For such, run the whole
experiment in a container.
"""

import contextlib
import functools
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import NamedTuple

PASSED = "passed"
"""The outcome of a program that ran to its end."""


class Limits(NamedTuple):
    """What a program may use.

    Attributes:
      seconds: of time on the clock, and (rounded up) of CPU time.
      memory: bytes of address space.
    """

    seconds: float
    memory: int


# The program's word is not enough: one that calls `os._exit(0)` has not run to its end. So the guard says so itself,
# with a number that the program is not told, through a file descriptor that is not its standard output.
_GUARD = """
import json, math, os, resource, sys
request = json.loads(sys.stdin.read())
report = os.fdopen(os.dup(1), "w")
for stream in (0, 1, 2):
    os.dup2(os.open(os.devnull, os.O_RDWR), stream)
resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(request["seconds"]),) * 2)
resource.setrlimit(resource.RLIMIT_AS, (request["memory"],) * 2)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20,) * 2)
resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
try:
    exec(compile(request["program"], "program.py", "exec"), {"__name__": "__main__"})
    outcome = request["passed"]
except BaseException as error:
    outcome = f"{type(error).__name__}: {error}"[:500]
report.write(json.dumps([request["number"], outcome]))
report.flush()
os._exit(0)
"""

_STARTING = 1.0
"""Seconds that the interpreter may take to start."""

_ISOLATE = ("unshare", "--user", "--map-root-user", "--net", "--pid", "--fork", "--kill-child")


@functools.cache
def isolation() -> Sequence[str]:
    """What a command is begun with so that it has no network; nothing where this user may not forbid it."""
    try:
        done = subprocess.run([*_ISOLATE, "true"], capture_output=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return _ISOLATE if done.returncode == 0 else ()


def check(limits: Limits) -> None:
    """Makes sure that a program which does nothing passes.

    Raises:
      OSError: where it does not: this system or these limits let no program run.
    """
    outcome = run("", limits)
    if outcome != PASSED:
        raise OSError(f"An empty program does not run within {limits} ({outcome}): raise them, or run it on Linux.")


def run(program: str, limits: Limits) -> str:
    """Runs a program to its end.

    Args:
      program: its source.
      limits: what it may use.

    Returns:
      `PASSED`, or what ended it: the error that it raised, "timed out", or "ended early".
    """
    number = secrets.token_hex(8)
    request = json.dumps({"program": program, "number": number, "passed": PASSED} | limits._asdict())
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        process = subprocess.Popen(
            [*isolation(), sys.executable, "-I", "-X", "utf8", "-c", _GUARD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=directory,
            env={"PATH": os.defpath, "HOME": directory, "TMPDIR": directory},
            start_new_session=True,
            text=True,
        )
        try:
            output, _ = process.communicate(request, timeout=limits.seconds + _STARTING)
        except subprocess.TimeoutExpired:
            return "timed out"
        finally:
            _kill(process)
    try:
        said, outcome = json.loads(output)
    except ValueError:
        said, outcome = "", ""
    if said == number:
        return outcome
    # Out of CPU time, it is killed and says nothing.
    return "timed out" if time.monotonic() - begin >= limits.seconds else "ended early"


def _kill(process: "subprocess.Popen[str]") -> None:
    """Ends a process and all that it started in its session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
