"""Runs a command in namespaces of its own, where bubblewrap is not installed: `python namespaces.py SPEC COMMAND...`.

SPEC is JSON: `paths` that the command may read, `devices`, the `folder` that it may write and its `size` in bytes. It
sees nothing else: no other files, processes or networks. Needs Linux 5.12, and root or the right to make namespaces.
"""

import ctypes
import json
import os
import signal
import sys
from typing import Any

_LIBC = ctypes.CDLL(None, use_errno=True)

_NEW_USER = 0x10000000
_NEW_OTHERS = 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x20000000 | 0x40000000
"""New namespaces of mounts, cgroups, host names, System V memory, processes and networks."""

_NOSUID, _NODEV, _BIND, _REC, _PRIVATE = 0x2, 0x4, 0x1000, 0x4000, 0x40000
_DETACH, _AT_FDCWD, _AT_RECURSIVE, _READ_ONLY = 0x2, -100, 0x8000, 0x1
_DIE_WITH_PARENT = 1
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41, "riscv64": 41, "ppc64le": 203, "s390x": 217}
_MOUNT_SETATTR = 442
_NOBODY = 65534


def _check(code: int, what: str) -> None:
    if code < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _mount(source: str, target: str, kind: str = "", flags: int = 0, options: str = "") -> None:
    words = (source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), options.encode())
    _check(_LIBC.mount(*words), f"mount {target}")


def _pivot(new: str, old: str) -> None:
    number = _PIVOT_ROOT.get(os.uname().machine)
    if number is None:
        raise OSError(f"pivot_root on {os.uname().machine} is not known")
    _check(_LIBC.syscall(ctypes.c_long(number), new.encode(), old.encode()), "pivot_root")


def _read_only(path: str, recursive: bool) -> None:
    attributes = (ctypes.c_uint64 * 4)(_READ_ONLY | _NOSUID, 0, 0, 0)
    flags = ctypes.c_uint(_AT_RECURSIVE if recursive else 0)
    arguments = (ctypes.c_int(_AT_FDCWD), path.encode(), flags, attributes, ctypes.c_size_t(32))
    _check(_LIBC.syscall(ctypes.c_long(_MOUNT_SETATTR), *arguments), f"mount_setattr {path}")


def _bind(path: str) -> None:
    """Shows a path of the old root, which is /old, in the new one, which is /new."""
    source, target = f"/old{path}", f"/new{path}"
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        open(target, "w").close()
    _mount(source, target, flags=_BIND | _REC)


def _isolate() -> None:
    """Enters new namespaces; as root, without a new user namespace, in which root would stay root."""
    if os.geteuid() == 0 and _LIBC.unshare(_NEW_OTHERS) == 0:
        return
    user, group = os.geteuid(), os.getegid()
    _check(_LIBC.unshare(_NEW_OTHERS | _NEW_USER), "unshare")
    for name, text in (("setgroups", "deny"), ("uid_map", f"{_NOBODY} {user} 1"), ("gid_map", f"{_NOBODY} {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def _enter(spec: dict[str, Any]) -> None:
    """Makes a root directory that has only what may be seen, and enters it."""
    os.umask(0o022)
    _mount("none", "/", flags=_REC | _PRIVATE)
    _mount("tmpfs", "/tmp", "tmpfs", _NOSUID | _NODEV, "size=1m")
    os.mkdir("/tmp/old")
    os.mkdir("/tmp/new")
    _pivot("/tmp", "/tmp/old")
    os.chdir("/")
    _mount("tmpfs", "/new", "tmpfs", _NOSUID | _NODEV, "size=1m,mode=755")
    folder = f"/new{spec['folder']}"
    os.makedirs(folder)
    _mount("tmpfs", folder, "tmpfs", _NOSUID | _NODEV, f"size={spec['size']},nr_inodes=4096,mode=1777")
    # Links within the paths are resolved in the old root.
    for path in spec["paths"]:
        _bind(path)
        _read_only(f"/new{path}", recursive=True)
    for path in spec["devices"]:
        _bind(path)
    os.chdir("/new")
    _pivot(".", ".")
    _check(_LIBC.umount2(b".", _DETACH), "umount2")
    os.chdir("/")
    _read_only("/", recursive=False)
    os.chdir(spec["folder"])


def _child() -> int:
    """A new process, which dies with this one. Returns as `os.fork` does."""
    number = os.fork()
    if not number:
        _check(_LIBC.prctl(_DIE_WITH_PARENT, signal.SIGKILL, 0, 0, 0), "prctl")
    return number


def _wait(number: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]) & 0xFF


def main() -> int:
    """Runs the command as the second process of its namespaces; the first, this program, ends with it."""
    spec, command = json.loads(sys.argv[1]), sys.argv[2:]
    _check(_LIBC.prctl(_DIE_WITH_PARENT, signal.SIGKILL, 0, 0, 0), "prctl")
    _isolate()
    first = _child()
    if first:
        return _wait(first)
    _enter(spec)
    second = os.fork()
    if second:
        return _wait(second)
    # The capabilities of the namespaces end here, except for root, which gives up root before it runs any program.
    return os.execv(command[0], command)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except OSError as error:
        sys.exit(str(error))
