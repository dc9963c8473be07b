"""Kill a process before each of its durable writes in turn, down to the system call inside a database's commit."""

from __future__ import annotations

import ctypes
import os
import platform
import signal
from collections.abc import Callable

WRITES = {
    "x86_64": {
        "write": 1,
        "pwrite64": 18,
        "writev": 20,
        "fsync": 74,
        "fdatasync": 75,
        "truncate": 76,
        "ftruncate": 77,
        "rename": 82,
        "unlink": 87,
        "renameat": 264,
        "unlinkat": 263,
        "renameat2": 316,
    },
}
"""Numbers of the system calls that change what is on a disk, by machine."""

CALL_NUMBER = {"x86_64": 15 * 8}
"""Where a stopped process keeps the number of its call, in bytes."""

TRACEME, PEEKUSER, SYSCALL, SETOPTIONS, TRACESYSGOOD = 0, 3, 24, 0x4200, 1

can_kill_at_writes = platform.system() == "Linux" and platform.machine() in WRITES

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


def killed_at_write(n_writes: int, work: Callable[[], None]) -> bool:
    """Do ``work`` in a process that SIGKILL ends before its ``n_writes``-th change to a disk; whether it came to that."""
    child = os.fork()
    if child == 0:
        try:
            _libc.ptrace(TRACEME, 0, None, None)
            os.kill(os.getpid(), signal.SIGSTOP)
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    os.waitpid(child, 0)
    _libc.ptrace(SETOPTIONS, child, None, TRACESYSGOOD)
    machine = platform.machine()
    calls = set(WRITES[machine].values())
    entering, left, deliver = True, n_writes, 0
    while True:
        _libc.ptrace(SYSCALL, child, None, deliver)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            if os.WEXITSTATUS(status):
                raise AssertionError("the work itself failed")
            return False
        if os.WIFSIGNALED(status):
            return True
        if os.WSTOPSIG(status) != signal.SIGTRAP | 0x80:
            deliver = os.WSTOPSIG(status)
            continue
        deliver = 0
        if entering and _libc.ptrace(PEEKUSER, child, CALL_NUMBER[machine], None) in calls:
            left -= 1
            if left == 0:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return True
        entering = not entering
