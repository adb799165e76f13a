"""Work directories: which one a run takes, and a lock, so that no two runs take the same one.

The default is `runs/NAME-HASH`, NAME of the config file and HASH of the resolved config. So the same command continues
its run, and runs of different configs never share files. With a time in the name, a user would have to look up and name
the directory of an interrupted run to continue it.

The lock is a file, `.lock`, that the system locks for the process (`flock`), and whose content names the process. The
system releases it when the process ends, in whatever way, so a stale lock never blocks a run. Where a file system has
no locks, the process that the file names is looked up on this host.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import pathlib
import shlex
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

from specjax import files
from specjax.experiments import results
from specjax.parallel import distributed

LOCK = ".lock"
_REMEDY = "wait for it, stop it, or choose another --workdir"
_UNSUPPORTED = (errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL)


def default(file: str, config: Mapping[str, Any]) -> pathlib.Path:
    """The work directory of a run that was given none, from its config file and its resolved config."""
    text = json.dumps(json.loads(results.to_json(dict(config))), sort_keys=True)
    return pathlib.Path("runs") / f"{pathlib.Path(file).stem}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _started(pid: int) -> str | None:
    """When a process of this host was started, in the system's units; None where that is not known."""
    try:
        # What follows the name, which may hold anything, begins with the third field; the start is the 22nd.
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return True


def _self() -> dict[str, Any]:
    """This process, as the lock's file describes its owner."""
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "process_start": _started(os.getpid()),
        "command": shlex.join(sys.argv),
    }


def _read(descriptor: int) -> dict[str, Any]:
    """The content of a lock's file; empty where it cannot be read."""
    try:
        os.lseek(descriptor, 0, os.SEEK_SET)
        found = json.loads(os.read(descriptor, 1 << 16).decode())
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError, RecursionError):
        return {}


def _runs(owner: Mapping[str, Any]) -> bool:
    """Whether the process that a lock names may still run."""
    pid = owner.get("pid")
    if not isinstance(pid, int) or pid < 1:
        return False
    if owner.get("host") != socket.gethostname():
        return True
    return pid != os.getpid() and _is_alive(pid) and owner.get("process_start") in (None, _started(pid))


def _refusal(path: pathlib.Path, owner: Mapping[str, Any], *, certain: bool) -> ValueError:
    who = "another run"
    if owner:
        who = (
            f"another run (process {owner.get('pid')} on {owner.get('host')}, since {owner.get('started')}: "
            f"{owner.get('command')})"
        )
    remedy = _REMEDY if certain else f"{_REMEDY}; if it has ended, delete {path}"
    return ValueError(f"{path.parent} is in use by {who}: {remedy}.")


def _take(path: pathlib.Path) -> int | None:
    """Takes the lock; returns the open file, or None where the file was removed meanwhile: then try again."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except FileNotFoundError:
        return None  # A run that ended has just removed its empty directory.
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _refusal(path, _read(descriptor), certain=True) from None
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            if _runs(owner := _read(descriptor)):
                raise _refusal(path, owner, certain=False) from None
        try:
            current = os.path.samestat(os.fstat(descriptor), os.stat(path))
        except FileNotFoundError:
            current = False
        if not current:
            os.close(descriptor)
            return None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, (json.dumps(_self()) + "\n").encode(), 0)
    except BaseException:
        with contextlib.suppress(OSError):
            os.close(descriptor)
        raise
    return descriptor


def _make(directory: pathlib.Path) -> list[pathlib.Path]:
    """Makes a directory; returns what was made, the innermost first."""
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    return missing


@contextlib.contextmanager
def locked(directory: str | pathlib.Path) -> Iterator[None]:
    """Holds a work directory for one run. It is made, and removed again where the run leaves nothing in it.

    Raises:
      ValueError: where another run has it, naming that run.
      OSError: where it cannot be made or written.
    """
    directory = pathlib.Path(directory)
    path = directory / LOCK
    try:
        made, descriptor = [], None
        while descriptor is None:
            made += _make(directory)
            descriptor = _take(path)
    except OSError as error:
        raise files.cannot_write(path, error) from error
    try:
        yield
    finally:
        # Removed while it is held: a process that opened it meanwhile sees that its name is gone, and tries again.
        path.unlink(missing_ok=True)
        os.close(descriptor)
        for empty in made:
            with contextlib.suppress(OSError):
                empty.rmdir()


@contextlib.contextmanager
def locked_by_first(directory: str | pathlib.Path) -> Iterator[None]:
    """Holds the work directory of a run of several processes: the first takes the lock for all.

    Raises:
      ValueError: in every process, where another run has it.
    """
    with contextlib.ExitStack() as stack:
        refused = None
        if distributed.is_first():
            try:
                stack.enter_context(locked(directory))
            except (ValueError, OSError) as error:
                refused = str(error)
        if refused := distributed.from_first(refused):
            raise ValueError(refused)
        yield
