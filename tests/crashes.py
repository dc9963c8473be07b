"""Kill a process at every line of a module in turn: what must be durable is durable wherever the power goes."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from types import FrameType, ModuleType
from typing import Any


def killed_at(n_lines: int, module: ModuleType, work: Callable[[], None]) -> bool:
    """Do ``work`` in a process that SIGKILL ends before its ``n_lines``-th line of ``module``; whether it came to that.

    The killed process has no chance to clean up: no ``finally``, no rollback, no flush.
    """
    child = os.fork()
    if child == 0:
        try:
            sys.settrace(_killer(n_lines, str(module.__file__)))
            work()
            sys.settrace(None)
        except BaseException:
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise AssertionError("the work itself failed")
    return os.WIFSIGNALED(status)


def _killer(n_lines: int, file: str) -> Callable[[FrameType, str, Any], Any]:
    left = n_lines

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal left
        if frame.f_code.co_filename != file:
            return None
        if event == "line":
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    return trace
