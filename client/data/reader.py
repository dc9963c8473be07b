"""Ask another process to parse a file, and survive whatever the file does to it.

Images come from many devices, discs and people; decoders are large programs in C. So nothing here parses a file of the
data folder: a child process does (``parser``), with limits on time and memory, and it is replaced when it dies. What comes
back is JSON and plain arrays, never objects. A file that breaks its reader is one more reason to be counted.
"""

from __future__ import annotations

import atexit
import fcntl
import json
import math
import os
import queue
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from filecmp import cmp
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from client.data import zips
from client.data.parser import MOST_BYTES
from client.data.skips import Reason, UnusableError
from shared_models.errors import FederadError

CPU_S = 4.0
"""CPU time that a file may take, besides what its size pays for [s]; it is counted in whole seconds, rounded up."""

BYTES_PER_S = 2_000_000
"""Pixels that the slowest decoder gives on a slow core [bytes/s]: ten times slower than measured."""

WALL_S = 60.0
"""Longest wait for an answer, besides what the size pays for: a network disk may hang [s]."""

MEMORY = 768 * 2**20
"""Memory that a file may take, besides three times its size [bytes]."""

PIPE_BYTES = 2**20
"""Room of the pipe between the two, so that they seldom wait for each other [bytes]."""

READY_S = 60.0
"""How long a new process may take to begin [s]."""

MOST_READERS = 4

_ROOT = Path(__file__).parents[2]
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Reply:
    """What a file holds."""

    facts: dict[str, Any]
    arrays: tuple[NDArray[Any], ...]


@dataclass(frozen=True)
class Status:
    """Size and time of a file, or of a member of an archive, which has the archive's time."""

    size: int
    mtime_ns: int
    crc: int | None = None
    """Checksum (CRC-32) of a member."""


class _GoneError(Exception):
    """The process ended without an answer."""


class Reader:
    """One child process that parses files; started when first asked, started again when it dies."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._waiting = b""

    def ask(self, what: str, *, size: int, room: NDArray[np.uint8] | None = None, **arguments: Any) -> Reply:
        """Have the child do ``what`` (``parser`` lists it).

        Parameters
        ----------
        what
            Name of the ability.
        size
            Bytes of the file or files, which decide how much time and memory are granted.
        room
            Where an array of the answer may lie, if it fits; without it each gets memory of its own.
        arguments
            For the ability; paths as text.

        Raises
        ------
        UnusableError
            With the reason of the child, or ``TOO_SLOW`` or ``CRASHED`` if it had to be ended or died twice.
        FederadError
            C115 if the process cannot be started at all.
        """
        for attempt in (1, 2):
            try:
                return self._ask(what, size, room, arguments)
            except _GoneError:
                self.close()
                if attempt == 2:
                    raise UnusableError(Reason.CRASHED) from None
        raise AssertionError

    def _ask(self, what: str, size: int, room: NDArray[np.uint8] | None, arguments: dict[str, Any]) -> Reply:
        process = self._running()
        seconds = CPU_S + size / BYTES_PER_S
        request = {"do": what, "with": arguments, "seconds": seconds, "bytes": MEMORY + 3 * size}
        self._write(process, request)
        until = time.monotonic() + WALL_S + 4 * seconds
        reply = self._line(process, until)
        if "unusable" in reply:
            raise UnusableError(Reason(reply["unusable"]))
        said = reply["arrays"]
        room = room if len(said) == 1 else None
        arrays = [self._array(process, until, dtype, shape, room) for dtype, shape in said]
        return Reply(reply["facts"], tuple(arrays))

    def close(self) -> None:
        """End the child."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                with suppress(OSError):
                    stream.close()  # type: ignore[union-attr]
            self._process, self._waiting = None, b""

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            self._process = _start()
            try:
                self._line(self._process, time.monotonic() + READY_S)
            except (_GoneError, UnusableError):
                self.close()
                raise _not_started() from None
        return self._process

    def _write(self, process: subprocess.Popen[bytes], message: dict[str, Any]) -> None:
        try:
            process.stdin.write(json.dumps(message).encode() + b"\n")  # type: ignore[union-attr]
            process.stdin.flush()  # type: ignore[union-attr]
        except OSError:
            raise _GoneError from None

    def _line(self, process: subprocess.Popen[bytes], until: float) -> dict[str, Any]:
        """The next line that the child writes; it is ended if there is none in time."""
        parts = [self._waiting]
        while b"\n" not in parts[-1]:
            part = bytearray(1 << 16)
            parts.append(bytes(part[: self._read(process, until, part)]))
        line, _, self._waiting = b"".join(parts).partition(b"\n")
        return json.loads(line)  # type: ignore[no-any-return]

    def _array(
        self,
        process: subprocess.Popen[bytes],
        until: float,
        dtype: str,
        shape: list[int],
        room: NDArray[np.uint8] | None,
    ) -> NDArray[Any]:
        """An array that follows a reply."""
        n_bytes = math.prod(shape) * np.dtype(dtype).itemsize
        if n_bytes > MOST_BYTES or np.dtype(dtype).hasobject:
            self.close()
            raise UnusableError(Reason.TOO_LARGE)
        if room is None or room.size < n_bytes:
            room = np.empty(n_bytes, np.uint8)
        array = room[:n_bytes].view(dtype).reshape(shape)
        buffer = array.reshape(-1).view(np.uint8).data if array.size else memoryview(b"")
        done = min(len(buffer), len(self._waiting))
        buffer[:done], self._waiting = self._waiting[:done], self._waiting[done:]
        while done < len(buffer):
            done += self._read(process, until, buffer[done:])
        return array

    def _read(self, process: subprocess.Popen[bytes], until: float, into: memoryview | bytearray) -> int:
        """Whatever the child has written, at least one byte; it is ended if nothing comes in time."""
        stream = process.stdout.fileno()  # type: ignore[union-attr]
        ready, _, _ = select.select([stream], [], [], max(until - time.monotonic(), 0))
        if not ready:
            self.close()
            raise UnusableError(Reason.TOO_SLOW)
        n = os.readv(stream, [into])
        if n == 0:
            self._say_why(process)
        return n

    def _say_why(self, process: subprocess.Popen[bytes]) -> None:
        """The child is gone: because its time was up, or for a reason of its own."""
        import signal

        if process.wait() == -signal.SIGXCPU:
            self.close()
            raise UnusableError(Reason.TOO_SLOW)
        raise _GoneError


_KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**26)}
"""For glibc (mallopt(3)): what one image needed stays for the next one, since fetching each page anew costs as much as
decoding does."""


def _start() -> subprocess.Popen[bytes]:
    threads = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_THREAD_LIMIT")
    # Only what it needs: whatever else stands in the environment is none of a hostile file's business.
    env = {name: os.environ[name] for name in ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH") if name in os.environ}
    env |= dict.fromkeys(threads, "1") | {"PYTHONPATH": str(_ROOT), "PYTHONDONTWRITEBYTECODE": "1"} | _KEEP_MEMORY
    process = subprocess.Popen(  # our own module
        [sys.executable, "-P", "-m", "client.data.parser"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=env,
        cwd="/",
    )
    with suppress(OSError):
        fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, PIPE_BYTES)  # type: ignore[arg-type]
    return process


def _not_started() -> FederadError:
    return FederadError(
        "C115",
        happened="The process that reads image files could not be started.",
        because="Files are parsed there and nowhere else, so that a broken or hostile one cannot harm the station.",
        remedies=(
            "check that this account may start processes, and that there is memory for one more",
            "check the installation: python -m pip check",
        ),
    )


class _Pool:
    """The readers of this process; as many as are asked at once."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._idle: queue.SimpleQueue[Reader] = queue.SimpleQueue()

    @contextmanager
    def one(self) -> Iterator[Reader]:
        """A reader for one question; a process that was forked off has readers of its own."""
        if os.getpid() != self._pid:
            self._pid, self._idle = os.getpid(), queue.SimpleQueue()
        try:
            reader = self._idle.get_nowait()
        except queue.Empty:
            reader = Reader()
        try:
            yield reader
        finally:
            self._idle.put(reader)

    def living(self) -> list[int]:
        """Process numbers of the readers that wait for a question."""
        waiting: list[Reader] = []
        with suppress(queue.Empty):
            while os.getpid() == self._pid:
                waiting.append(self._idle.get_nowait())
        for one in waiting:
            self._idle.put(one)
        return [one._process.pid for one in waiting if one._process is not None]

    def close(self) -> None:
        """End all of them."""
        while os.getpid() == self._pid:
            try:
                self._idle.get_nowait().close()
            except queue.Empty:
                return


_pool = _Pool()
atexit.register(_pool.close)


def living() -> list[int]:
    """Process numbers of this process's readers, when none of them is busy."""
    return _pool.living()


def ask(what: str, *paths: Path, room: NDArray[np.uint8] | None = None, **arguments: Any) -> Reply:
    """Have a child parse a file, or several for ``what`` that takes ``paths``; as :meth:`Reader.ask`.

    Raises
    ------
    UnusableError
        If the file cannot be used, whatever the reason.
    """
    try:
        size = sum(status(path).size for path in paths)
    except OSError as error:
        raise UnusableError(Reason.NOT_OPENED) from error
    names = [os.fspath(path.absolute()) for path in paths]
    if not all(_is_text(name) for name in names):
        raise UnusableError(Reason.NOT_OPENED)
    place: dict[str, Any] = {"paths": names} if what == "layouts" else {"path": names[0]}
    with _pool.one() as reader:
        return reader.ask(what, size=size, room=room, **place, **arguments)


def members(archive: Path) -> dict[str, Status]:
    """What a zip archive holds, by name; those that are not read, too.

    Raises
    ------
    UnusableError
        If nothing of it can be read; OSError if it is not there.
    """
    status = archive.stat()
    return _members(archive, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=64)
def _members(archive: Path, size: int, mtime_ns: int) -> dict[str, Status]:
    listed = ask("members", archive).facts["members"]
    return {one["name"]: Status(int(one["size"]), mtime_ns, int(one["crc"])) for one in listed}


def status(path: Path) -> Status:
    """Size and time of a file or a member; OSError or UnusableError if it is not there."""
    try:
        found = path.stat()
        return Status(found.st_size, found.st_mtime_ns)
    except NotADirectoryError:
        archive = zips.archive_of(path)
    try:
        return members(archive)[path.relative_to(archive).as_posix()]
    except KeyError:
        raise UnusableError(Reason.NOT_OPENED) from None


def same_bytes(a: Path, b: Path) -> bool:
    """Whether two files hold the same, as far as the checksum of an archive's member tells; OSError, UnusableError."""
    first, second = status(a), status(b)
    if first.size != second.size:
        return False
    if first.crc is None and second.crc is None:
        return cmp(a, b, shallow=False)
    return _checksum(a, first) == _checksum(b, second)


def _checksum(path: Path, found: Status) -> int:
    if found.crc is not None:
        return found.crc
    total = 0
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            total = crc32(part, total)
    return total


def _is_text(name: str) -> bool:
    """Whether a path survives JSON; bytes that are no text do, as lone surrogates."""
    return str(json.loads(json.dumps(name))) == name


def side_by_side(do: Callable[[_Item], _Result], items: Iterable[_Item]) -> Iterator[_Result]:
    """``do`` of each item, in their order, several at a time; each may ask a reader of its own."""
    n = max(1, min(MOST_READERS, len(os.sched_getaffinity(0))))
    if n == 1:
        yield from map(do, items)
        return
    threads = ThreadPoolExecutor(n)
    try:
        yield from threads.map(do, items)
    finally:
        threads.shutdown(cancel_futures=True)
