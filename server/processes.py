"""The operator's processes: started, watched, started again, ended together.

Each writes to a log of its own that is kept short. They end with the process that supervises them, even when that one is
killed (``setpriv --pdeathsig``), and what a process has started ends with it: workers of an nginx that was killed go on
answering, and no other nginx could take their port.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

log = logging.getLogger(__name__)

LOG_BYTES = 16 * 2**20
"""A log of this size makes room for a new one; one old one is kept [bytes]."""

FIRST_PAUSE_S = 0.3
LONGEST_PAUSE_S = 10.0
"""Pause before a process is started again: doubled each time that it ends soon, so that a broken one costs nothing [s]."""

STEADY_S = 30.0
"""A process that ran this long is started again at once [s]."""

OFFLINE = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "HF_HUB_OFFLINE": "1",
}
"""Nothing calls home."""


def environment(**more: str) -> dict[str, str]:
    """The environment of a child: this one's, without a way out, with the programs of this installation first."""
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    return {**os.environ, **OFFLINE, "PATH": programs, "PYTHONUNBUFFERED": "1", **more}


class Child:
    """One process that should be running.

    Parameters
    ----------
    name
        What people call it.
    command
        Program and arguments.
    log_file
        Where its output goes.
    stop_signal
        What ends it in good order.
    orphan_signal
        What it gets when its supervisor dies.
    leftover_signal
        What the processes that it has started get when it has died, until it is started again; then they are killed.
    outlived
        Whether what it has started may go on when it is started again; :meth:`stop` ends that, too.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        log_file: Path,
        env: Mapping[str, str] | None = None,
        stop_signal: signal.Signals = signal.SIGTERM,
        orphan_signal: signal.Signals = signal.SIGKILL,
        leftover_signal: signal.Signals = signal.SIGKILL,
        outlived: bool = False,
    ) -> None:
        self.name = name
        self.log_file = log_file
        self._command, self._env, self._stop_signal = list(command), dict(env or environment()), stop_signal
        self._guard, self._outlived = _ends_with_parent(orphan_signal), outlived
        self._leftover_signal = leftover_signal
        self._process: subprocess.Popen[bytes] | None = None
        self._began = 0.0
        self._pause_s = FIRST_PAUSE_S
        self._next = 0.0

    @property
    def pid(self) -> int | None:
        """Its number while it runs."""
        return self._process.pid if self._process is not None and self.is_running else None

    @property
    def is_running(self) -> bool:
        """Whether it has been started and has not ended."""
        return self._process is not None and self._process.poll() is None

    @property
    def exit_status(self) -> int | None:
        """With what it ended; None while it runs."""
        return self._process.poll() if self._process is not None else None

    def start(self) -> None:
        """Start it, from the main thread: it ends with the thread that started it."""
        self._began = time.monotonic()
        self._process = subprocess.Popen(  # noqa: S603  the command is ours
            [*self._guard, *self._command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=self._env,
            start_new_session=True,
        )
        threading.Thread(target=_copy, args=(self._process, self.log_file), daemon=True).start()

    def keep_running(self) -> bool:
        """Start it again if it has ended and its pause is over; whether that was so."""
        if self.is_running or self._process is None:
            return False
        now = time.monotonic()
        if not self._next:
            if not self._outlived:  # first in good order, so that nothing is lost that is on its way through it
                _end_group(self._process.pid, self._leftover_signal)
            steady = now - self._began >= STEADY_S
            self._pause_s = FIRST_PAUSE_S if steady else min(2 * self._pause_s, LONGEST_PAUSE_S)
            self._next = now + self._pause_s
            log.warning("%s ended (%s); it is started again in %.1f s", self.name, self.exit_status, self._pause_s)
        if now < self._next:
            return False
        self._next = 0.0
        if not self._outlived:
            _end_group(self._process.pid, signal.SIGKILL)
        self.start()
        return True

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal, if it runs."""
        if self._process is not None and self.is_running:
            self._process.send_signal(number)

    def stop(self, grace_s: float = 10.0) -> None:
        """End it, by force after ``grace_s`` seconds, and whatever it has started."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.poll() is None:
            process.send_signal(self._stop_signal)
            with suppress(subprocess.TimeoutExpired):
                process.wait(grace_s)
        _end_group(process.pid, signal.SIGKILL)
        process.wait()

    def last_words(self, n_lines: int = 3) -> str:
        """The end of its log, for a message."""
        try:
            lines = self.log_file.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        except OSError:
            return ""
        return " / ".join(line.strip() for line in lines[-n_lines:])[-400:]


def wait_until(is_ready: Callable[[], bool], timeout_s: float, *, unless: Callable[[], bool] = lambda: False) -> bool:
    """Whether ``is_ready`` came true before the time was over or ``unless`` did."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if is_ready():
            return True
        if unless():
            return False
        time.sleep(0.1)
    return False


def _end_group(leader: int, number: signal.Signals) -> None:
    """Send a signal to what a process has started and left behind: it leads a group of its own."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, number)


def _ends_with_parent(number: signal.Signals) -> list[str]:
    """A prefix that makes the kernel end a process with the one that started it; empty where there is no such thing."""
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", number.name.removeprefix("SIG"), "--"] if setpriv else []


def _copy(process: subprocess.Popen[bytes], file: Path) -> None:
    """Carry a process's output to its log, which makes room for a new one when it is full."""
    if process.stdout is None:
        return
    with process.stdout:
        for line in process.stdout:
            with suppress(OSError):  # a full disk must not end the process that writes
                if file.exists() and file.stat().st_size > LOG_BYTES:
                    file.replace(file.with_suffix(".old.log"))
                with file.open("ab") as stream:
                    stream.write(line)
