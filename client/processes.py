"""Processes of a site: one of each in a folder, children that never outlive their parent, files that survive a crash."""

from __future__ import annotations

import ctypes
import fcntl
import os
import pwd
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread
from typing import IO
from uuid import uuid4

from shared_models.errors import FederadError

PR_SET_PDEATHSIG = 1
"""Option of ``prctl`` (prctl(2)): the signal that a process gets when its parent dies."""

_libc = ctypes.CDLL(None, use_errno=True)


def write_durably(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Write a file that is whole or not there, also after a power cut; an existing one is replaced.

    Written by root, it belongs to whom its folder belongs.
    """
    partial = path.with_name(f".{path.name}.{uuid4().hex[:8]}.part")
    try:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            if os.geteuid() == 0:
                owner = path.parent.stat()
                os.fchown(descriptor, owner.st_uid, owner.st_gid)
            os.fsync(descriptor)
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def overwrite(path: Path) -> None:
    """Put zeros in the place of a file's bytes, as far as its file system writes in place."""
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def only_one(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file ``path`` for as long as this process works; it names the process that holds it.

    The kernel lets go of it when the process ends, however that happens, so that no lock is ever left behind.

    Parameters
    ----------
    what
        What there may be only one of, for the message.

    Raises
    ------
    FederadError
        C156 if another process holds it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _second(path, what) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
        os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def holder(path: Path) -> int | None:
    """The process that holds a lock file; None if nobody does."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        text = os.pread(descriptor, 32, 0).strip()
        return int(text) if text.isdigit() else None
    else:
        return None
    finally:
        os.close(descriptor)


def spawn(
    command: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    output: IO[bytes] | int | None = None,
    user: int | None = None,
) -> subprocess.Popen[bytes]:
    """Start a child in a process group of its own, which the kernel kills should this process die.

    Call it in a thread that lives as long as the child: the kernel watches the thread.

    Parameters
    ----------
    user
        Whose account the child works under, with all groups of it; only root may give another than its own.
    """
    parent = os.getpid()
    account = pwd.getpwuid(user) if user not in (None, os.geteuid()) and os.geteuid() == 0 else None
    groups = os.getgrouplist(account.pw_name, account.pw_gid) if account else []

    def prepare() -> None:
        if account is not None:
            os.setgroups(groups)
            os.setgid(account.pw_gid)
            os.setuid(account.pw_uid)
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # after setuid, which takes it back
        if os.getppid() != parent:
            os._exit(1)

    return subprocess.Popen(  # noqa: S603  # commands of our own
        list(command),
        env=dict(env) if env is not None else None,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT if output is not None else None,
        start_new_session=True,
        preexec_fn=prepare,  # noqa: PLW1509  # nothing in it takes a lock
    )


def end(process: subprocess.Popen[bytes], grace_s: float = 10.0) -> None:
    """End a child and everything in its process group: first politely, then not."""
    for number, wait_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, 5.0)):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(wait_s)
            if number == signal.SIGTERM and _group_is_gone(process.pid, 2.0):
                return


class Backoff:
    """Pauses between tries that double up to a limit, and begin anew after something lasted."""

    def __init__(self, first_s: float = 1.0, most_s: float = 60.0, healthy_s: float = 60.0) -> None:
        self._first_s, self._most_s, self._healthy_s = first_s, most_s, healthy_s
        self._next_s = first_s

    def pause_s(self, lasted_s: float = 0.0) -> float:
        """How long to wait after something that lasted so long."""
        if lasted_s >= self._healthy_s:
            self.reset()
        pause, self._next_s = self._next_s, min(2 * self._next_s, self._most_s)
        return pause

    def reset(self) -> None:
        """Begin with the shortest pause again."""
        self._next_s = self._first_s


def until_told() -> Event:
    """An event that SIGTERM and SIGINT set from now on; call it in the main thread."""
    event = Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        # Another thread sets it, since this one may be stopped in the middle of waiting for it, holding its lock.
        signal.signal(number, lambda *_: Thread(target=event.set).start())
    return event


def _group_is_gone(group: int, within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except (ProcessLookupError, PermissionError):
            return True
        time.sleep(0.02)
    return False


def _second(path: Path, what: str) -> FederadError:
    number = holder(path)
    return FederadError(
        "C156",
        happened=f"Another {what} works in {path.parent}" + (f": process {number}." if number else "."),
        because="Two of them would answer the same questions and write the same files.",
        remedies=(
            "federad-site status shows what is running, federad-site stop ends it",
            "for a second hospital on this machine, use a second folder: --site FOLDER",
        ),
    )
