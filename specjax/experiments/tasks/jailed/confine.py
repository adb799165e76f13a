"""Limits that a process sets for itself before it runs an untrusted program, and cannot lift again."""

import contextlib
import ctypes
import errno
import math
import os
import resource

MAX_FILE = 1 << 20
"""The largest file that a program may write, in bytes."""

_NOBODY = 65534
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000

# No second process or thread, no namespaces, no memory that RLIMIT_AS does not count, no way into other processes, and
# none of the kernel's large interfaces that programs seldom need.
_REFUSED = (
    "fork vfork clone clone3 "
    "unshare setns mount umount2 pivot_root chroot fsopen fsconfig fsmount fspick open_tree move_mount mount_setattr "
    "shmget msgget semget mq_open memfd_create memfd_secret "
    "ptrace process_vm_readv process_vm_writev process_madvise pidfd_open pidfd_getfd kcmp "
    "bpf perf_event_open userfaultfd io_uring_setup io_uring_enter io_uring_register io_setup "
    "fanotify_init inotify_init1 keyctl add_key request_key init_module finit_module delete_module "
    "kexec_load kexec_file_load "
)


def confine(seconds: float, memory: int) -> None:
    """Gives up root, and limits this process for good to seconds of CPU time and bytes of address space."""
    if os.geteuid() == 0:
        _give_up_root()
    limits = {
        resource.RLIMIT_CPU: math.ceil(seconds) + 1,
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_FSIZE: MAX_FILE,
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
    }
    for limit, value in limits.items():
        most = resource.getrlimit(limit)[1]
        value = value if most == resource.RLIM_INFINITY else min(value, most)
        resource.setrlimit(limit, (value, value))
    with contextlib.suppress(OSError):
        _refuse_system_calls()


def _give_up_root() -> None:
    """Becomes the user nobody, where that is possible and this user can read the interpreter's modules."""
    with contextlib.suppress(OSError):
        os.setresuid(0, _NOBODY, 0)
        readable = os.access(os.__file__, os.R_OK, effective_ids=True)
        os.setresuid(0, 0, 0)
        if readable:
            os.setgroups([])
            os.setresgid(_NOBODY, _NOBODY, _NOBODY)
            os.setresuid(_NOBODY, _NOBODY, _NOBODY)


def _refuse_system_calls() -> None:
    """Loads a filter for this process and what it executes.

    Raises:
      OSError: without libseccomp, or where the kernel has no filters.
    """
    library = ctypes.CDLL("libseccomp.so.2")
    library.seccomp_init.restype = ctypes.c_void_p
    context = ctypes.c_void_p(library.seccomp_init(ctypes.c_uint32(_ALLOW)))
    for name in _REFUSED.split():
        number = library.seccomp_syscall_resolve_name(name.encode())
        if number != -1:  # An old library does not know new calls.
            action = ctypes.c_uint32(_ERRNO | errno.EPERM)
            library.seccomp_rule_add_array(context, action, ctypes.c_int(number), ctypes.c_uint(0), None)
    code = library.seccomp_load(context)
    library.seccomp_release(context)
    if code:
        raise OSError(-code, os.strerror(-code))
