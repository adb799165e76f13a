"""Ways to start a command so that it sees no more of this machine than it needs: each a function, see `WAYS`.

In a jail there are the Python of this process with its packages and `/usr`, all read-only, an empty folder in memory
with `SIZE` bytes, and nothing else: no other files, no processes but its own, no `/proc`, no network.
"""

import json
import os
import pathlib
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

JAILED = pathlib.Path(__file__).parent / "jailed"
"""The modules that run in the jail."""

FOLDER = "/tmp"
"""The directory that a jailed program may write to."""

SIZE = 16 << 20
"""The size of the folder in bytes."""

_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")

Way = Callable[[Sequence[str]], list[str]]
"""From a command, which begins with an absolute path, to the command that runs it in a jail.

Raises:
  OSError: where this way is not available.
"""


def _readable() -> list[str]:
    """The paths that a Python in a jail reads; none contains another."""
    interpreter = pathlib.Path(os.path.realpath(sys.executable)).parent
    paths = {"/usr", "/lib", "/lib64", "/etc/ld.so.cache", sys.prefix, sys.base_prefix, str(JAILED)}
    paths |= {os.path.realpath(sys.base_prefix), str(interpreter)}
    found = sorted(path for path in paths if os.path.exists(path))
    return [path for path in found if not any(pathlib.Path(path).is_relative_to(o) for o in found if o != path)]


def bubblewrap(command: Sequence[str]) -> list[str]:
    """By bubblewrap (https://github.com/containers/bubblewrap), where it is installed.

    The number of empty files in the folder is bounded only by the program's time.
    """
    found = shutil.which("bwrap")
    if found is None:
        raise OSError("bwrap is not installed")
    words = [found, "--die-with-parent", "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts"]
    words += ["--unshare-cgroup-try", "--cap-drop", "ALL"]
    if os.geteuid() == 0:
        # Root gives up being root in the jail: root of a user namespace would still own root's files.
        words += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        words += ["--unshare-user"]
    words += ["--perms", "1777", "--size", str(SIZE), "--tmpfs", FOLDER]
    paths = _readable()
    # Parent directories that bubblewrap makes by itself can be read by root only.
    parents = {str(parent) for path in paths for parent in pathlib.Path(path).parents} - {"/", FOLDER}
    for parent in sorted(parents):
        words += ["--perms", "0755", "--dir", parent]
    for path in paths:
        words += ["--ro-bind", path, path]
    for path in _DEVICES:
        words += ["--dev-bind", path, path]
    return [*words, "--remount-ro", "/", "--chdir", FOLDER, "--", *command]


def namespaces(command: Sequence[str]) -> list[str]:
    """By the kernel's namespaces directly (`jailed/namespaces.py`)."""
    if sys.platform != "linux":
        raise OSError(f"{sys.platform} has no namespaces")
    spec = {"paths": _readable(), "devices": _DEVICES, "folder": FOLDER, "size": SIZE}
    return [sys.executable, "-I", "-S", "-B", str(JAILED / "namespaces.py"), json.dumps(spec), *command]


def bare(command: Sequence[str]) -> list[str]:
    """Without a jail: the process is limited, but sees what its user sees."""
    return list(command)


WAYS: Mapping[str, Way] = MappingProxyType({"bubblewrap": bubblewrap, "namespaces": namespaces, "no jail": bare})
"""The ways by name, the best first."""
