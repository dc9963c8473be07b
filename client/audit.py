"""The audit: what left this hospital, when and under which plan, and what was refused; one line each, for ever.

A line is canonical JSON. It holds the hash of the line before it and its own::

    {"event":"answer", ..., "hash":"<SHA-256 of all else here>", "n":12, "previous":"<hash of line 11>", "time":"..."}

so that a line changed, taken out or put elsewhere breaks the chain behind it. Beside the file lies ``<name>.head``, the
number and hash of the last line, which tells whether lines are missing at the end. A line is on the disk before what it
speaks of leaves; where it cannot be written, nothing leaves.

Whoever may write the folder can write a whole new chain. Against that, note the head that ``federad-site audit verify``
shows somewhere else from time to time: a chain that still contains it has not been rewritten before that point.

Lines hold words, names of plans and runs, hashes and sizes; never anything about a patient.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from shared_models.errors import FederadError

FILE = "audit.jsonl"

START = "0" * 64
"""What stands in the place of the previous hash in the first line."""

LONGEST_LINE = 16 * 1024
"""Bytes; longer lines are not written, and are no lines when read."""


@dataclass(frozen=True)
class Head:
    """The end of the chain."""

    n: int = 0
    """Lines in it."""

    hash: str = START


class AuditLog:
    """The audit in one file; made with its first line. Several processes may write to it.

    Parameters
    ----------
    path
        The file. Its folder must be there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, event: str, **facts: Any) -> None:
        """Append a line, durably.

        Parameters
        ----------
        event
            One word for what happened.
        facts
            JSON values: words, hashes, numbers.

        Raises
        ------
        FederadError
            C162 if the line cannot be written, or if the file no longer ends as it should.
        """
        try:
            with self._locked() as file:
                head = self._end(file)
                line, new = _line(head, event, facts)
                start = file.seek(0, os.SEEK_END)
                try:
                    if file.write(line) != len(line):
                        raise OSError(errno.ENOSPC, "no room for a whole line")
                    _to_disk(file)
                except OSError:
                    file.truncate(start)
                    raise
                self._write_head(new)
        except OSError as error:
            raise _unwritable(self.path, type(error).__name__) from None

    @property
    def head(self) -> Head:
        """Number of lines and hash of the last, as noted; C162 if the note cannot be read."""
        return self._read_head()

    def verify(self) -> Head:
        """Read the whole chain.

        Returns
        -------
        Head
            Number of lines and hash of the last; no lines where nothing was ever written.

        Raises
        ------
        FederadError
            C162 with the first line that does not fit, or if lines are missing at the end.
        """
        head = Head()
        for entry in self.entries():
            head = Head(entry["n"], entry["hash"])
        if (noted := self._read_head()).n > head.n:
            raise _broken(self.path, f"{noted.n - head.n} lines are missing after line {head.n}")
        return head

    def require(self, head: Head) -> None:
        """Make sure that the line which ``head`` names is here, unless the audit came back from a backup since.

        Raises
        ------
        FederadError
            C162 if it is not, or if the chain is broken.
        """
        for entry in self.entries():
            if entry["event"] == "restored" or (entry["n"], entry["hash"]) == (head.n, head.hash):
                return
        raise _broken(self.path, f"it lacks line {head.n}, of which the ledger knows")

    def entries(self) -> Iterator[dict[str, Any]]:
        """Every line in order, each checked against the one before; what a crash left of a line at the end is none.

        Raises
        ------
        FederadError
            C162 at the first line that does not fit.
        """
        head, noted = Head(), self._read_head()
        try:
            with self.path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH)
                while (raw := file.readline(LONGEST_LINE)).endswith(b"\n") or len(raw) == LONGEST_LINE:
                    entry = _checked(raw, head)
                    if entry is None:
                        raise _broken(self.path, f"line {head.n + 1} was changed, or does not belong there")
                    head = Head(entry["n"], entry["hash"])
                    if head.n == noted.n and head != noted:
                        raise _broken(self.path, f"line {head.n} is not the one that was written")
                    yield entry
        except FileNotFoundError:
            return
        except OSError as error:
            raise _broken(self.path, f"it cannot be read ({type(error).__name__})") from None

    @contextmanager
    def _locked(self) -> Iterator[BinaryIO]:
        """The file, for one writer at a time."""
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "r+b", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file

    def _end(self, file: BinaryIO) -> Head:
        """The last line's number and hash. What a crash left of a line that never counted is cut off first."""
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 2 * LONGEST_LINE))
        tail = file.read()
        if torn := len(tail) - (tail.rfind(b"\n") + 1):
            file.truncate(size - torn)
            tail = tail[:-torn]
        noted = self._read_head()
        lines = tail.splitlines(keepends=True)
        if not lines:
            end = Head()
        else:
            entry = _parsed(lines[-1])
            if entry is None:
                raise _broken(self.path, "its last line was changed")
            end = Head(entry["n"], entry["hash"])
        if noted.n > end.n or (noted.n == end.n and noted != end):
            raise _broken(self.path, f"it ends with line {end.n}, and line {noted.n} was written")
        return end

    @property
    def _head_file(self) -> Path:
        return self.path.with_name(f"{self.path.name}.head")

    def _read_head(self) -> Head:
        try:
            text = self._head_file.read_text(encoding="ascii")
            n, _, hash_ = text.strip().partition(" ")
            return Head(int(n), hash_) if text else Head()
        except FileNotFoundError:
            return Head()
        except (OSError, ValueError):
            raise _broken(self.path, "the note of its last line cannot be read") from None

    def _write_head(self, head: Head) -> None:
        """Note the last line, over the note of the one before and of the same length.

        It is not waited for: after a power cut the chain may be ahead of its note, which is no sign of anything.
        """
        descriptor = os.open(self._head_file, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.pwrite(descriptor, f"{head.n:012d} {head.hash}\n".encode("ascii"), 0)
        finally:
            os.close(descriptor)


def _line(head: Head, event: str, facts: Mapping[str, Any]) -> tuple[bytes, Head]:
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    entry = {**facts, "event": event, "n": head.n + 1, "previous": head.hash, "time": now}
    entry["hash"] = _hash_of(entry)
    line = _canonical(entry) + b"\n"
    if len(line) >= LONGEST_LINE:
        raise ValueError(f"an audit line of {len(line)} bytes")
    return line, Head(head.n + 1, entry["hash"])


def _checked(raw: bytes, head: Head) -> dict[str, Any] | None:
    """A line that follows ``head``; None if it does not."""
    entry = _parsed(raw)
    if entry is None or entry["n"] != head.n + 1 or entry["previous"] != head.hash:
        return None
    return entry


def _parsed(raw: bytes) -> dict[str, Any] | None:
    """A whole line in the spelling in which it was written, with the hash that it says."""
    try:
        entry = json.loads(raw)
        whole = raw == _canonical(entry) + b"\n" and isinstance(entry["n"], int)
        claimed = entry["hash"]
        return entry if whole and _hash_of({k: v for k, v in entry.items() if k != "hash"}) == claimed else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _canonical(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def _hash_of(entry: Mapping[str, Any]) -> str:
    return hashlib.sha256(_canonical(entry)).hexdigest()


def _to_disk(file: BinaryIO) -> None:
    os.fsync(file.fileno())


def _unwritable(path: Path, why: str) -> FederadError:
    return FederadError(
        "C162",
        happened=f"The audit {path} cannot be written ({why}).",
        because="What cannot be written down does not leave this site.",
        remedies=(
            "make room on the disk, and check that the account that runs this process may write the folder",
            "nothing needs to be repaired: the same question is answered once the audit can be written",
        ),
    )


def _broken(path: Path, what: str) -> FederadError:
    return FederadError(
        "C162",
        happened=f"The audit {path} is not whole: {what}.",
        because="It is the proof of what left this site, and is only worth something as long as nobody changes it.",
        remedies=(
            "keep the file as it is and tell whoever is responsible for data protection here",
            "restore it from a backup, or move it and its .head file away together to begin a new one",
        ),
    )
