"""Several processes that run one program, each with some of the devices, and what they have to agree on."""

import contextlib
import functools
import json
import math
import os
import pathlib
import re
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

_SHARED = (".json", ".jsonl")
"""Files of a work directory from which a run resumes."""

_ADDRESS, _NUMBER, _PLACE = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
_TIMEOUT = "SPECJAX_JOIN_TIMEOUT"
_REMEDY = f"set {_ADDRESS}=HOST:PORT, {_NUMBER} and {_PLACE}, or leave --distributed out."

_WAIT = 300.0
"""Seconds that the other processes may take to join."""

_PAUSE = 10.0
"""Seconds between two messages about the processes that this one waits for."""


class _Process(NamedTuple):
    """What the environment says about the processes; None where the cluster tells JAX.

    Attributes:
      address: HOST:PORT of the first process.
      number: the number of processes.
      place: the index of this one.
    """

    address: str | None
    number: int | None
    place: int | None


def _read(name: str, kind: Callable[[str], Any]) -> Any:
    """The value of a variable, None where it is not set.

    Raises:
      ValueError: naming it.
    """
    value = os.environ.get(name)
    try:
        return kind(value) if value else None
    except ValueError as error:
        raise ValueError(f"{name}={value!r} is not a number: {_REMEDY}") from error


def _told() -> _Process:
    """What the environment says.

    Raises:
      ValueError: where it is inconsistent.
    """
    address, number, place = _read(_ADDRESS, str), _read(_NUMBER, int), _read(_PLACE, int)
    if address is not None and not re.fullmatch(r".+:\d+", address):
        raise ValueError(f"{_ADDRESS}={address!r} is not HOST:PORT: {_REMEDY}")
    if number is not None and number < 1:
        raise ValueError(f"{_NUMBER}={number}: at least 1.")
    if number is not None and place is not None and not 0 <= place < number:
        raise ValueError(f"{_PLACE}={place} with {_NUMBER}={number}: the first is 0, the last {number - 1}.")
    return _Process(address, number, place)


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), 2).close()
    except OSError:
        return False
    return True


def _missing(process: _Process) -> str:
    """The processes that this one waits for, in words."""
    if process.address is None:
        return "the other hosts that the cluster names"
    if process.place and not _answers(process.address):
        return f"process 0, which does not answer at {process.address}"
    others = [i for i in range(process.number or 0) if i != process.place]
    if not others:
        return "the others"
    named = f"process{'es' if len(others) > 1 else ''} {', '.join(map(str, others[:8]))}"
    named += ", ..." if len(others) > 8 else ""
    return f"{named} to come to {process.address}" + (", of which one at least is missing" if len(others) > 1 else "")


@contextlib.contextmanager
def _announced(process: _Process, seconds: float) -> Iterator[None]:
    """Says what the block waits for, and ends this process with an error where it takes longer than `seconds`."""
    joined, begin = threading.Event(), time.monotonic()

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def watch() -> None:
        own = "This process" if process.place is None else f"Process {process.place} of {process.number}"
        while not joined.wait(min(_PAUSE, max(begin + seconds - time.monotonic(), 0))):
            taken = time.monotonic() - begin
            if taken >= seconds:
                say(
                    f"error: {own} waited {taken:.0f} s for {_missing(process)}: start every process with the same "
                    f"command, {_ADDRESS} and {_NUMBER}, and its own {_PLACE}; {_TIMEOUT} says how long to wait."
                )
                # JAX cannot be interrupted there, and would end the process with a dump of its stack.
                os._exit(1)
            say(f"{own} waits for {_missing(process)} ({taken:.0f} of {seconds:.0f} s) ...")

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        joined.set()
        watcher.join()


def initialize() -> None:
    """Joins the processes of this program, before anything else uses JAX, and says which of them it waits for.

    On Cloud TPU, SLURM and Open MPI, JAX finds the processes itself; elsewhere JAX_COORDINATOR_ADDRESS (HOST:PORT of
    the first process), JAX_NUM_PROCESSES and JAX_PROCESS_ID (0, 1, ...) say them. SPECJAX_JOIN_TIMEOUT is how many
    seconds the others may take, by default 300; then the process ends with an error.

    Raises:
      ValueError: where the processes are not known, or a variable is wrong.
    """
    process = _told()
    seconds = _read(_TIMEOUT, float) or _WAIT
    try:
        with _announced(process, seconds):
            # JAX reads the address by itself.
            jax.distributed.initialize(
                num_processes=process.number, process_id=process.place, initialization_timeout=math.ceil(seconds) + 60
            )
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"The processes cannot be joined ({error}): {_REMEDY}") from error


def is_first() -> bool:
    """Whether this process is the one that prints and writes."""
    return jax.process_index() == 0


def from_first(value: Any) -> Any:
    """The first process's `value`, on every process; it consists of JSON types.

    Decisions that depend on a clock have to be shared like this: processes that decide differently deadlock.
    """
    if jax.process_count() == 1:
        return value
    content = np.frombuffer(json.dumps(value).encode() if is_first() else b"", np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(content.size)))
    buffer = np.zeros(size, np.uint8)
    buffer[: content.size] = content
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(buffer)).tobytes())


def mirror(workdir: pathlib.Path) -> pathlib.Path:
    """The work directory of this process: that of the first, or a temporary copy of the files to resume from."""
    found = sorted(workdir.glob("*")) if is_first() else []
    texts = {path.name: path.read_text(encoding="utf-8") for path in found if path.suffix in _SHARED}
    texts = from_first(texts)
    if is_first():
        return workdir
    copy = pathlib.Path(tempfile.mkdtemp(prefix="specjax"))
    for name, text in texts.items():
        (copy / name).write_text(text, encoding="utf-8")
    return copy


def to_host(x: Any) -> np.ndarray:
    """An array on the host. Where other processes hold parts of it, all of them have to call this."""
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    return np.asarray(x)


def replicate(tree: Any, mesh: Mesh | None) -> Any:
    """Arrays that every process can read; unchanged where there is one process."""
    if mesh is None or jax.process_count() == 1:
        return tree
    return _copier(mesh)(tree)


@functools.cache
def _copier(mesh: Mesh) -> Any:
    return jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))
