"""A chain of entries that nobody can change unnoticed, kept twice: in a database, and in the anchor elsewhere.

An entry is canonical JSON with its number, the hash of the entry before it and its own; hashes are HMACs under a secret of
the station, so that they tell nothing and cannot be made up elsewhere::

    {"event":"charge", ..., "hash":"<HMAC of all else here>", "n":12, "previous":"<hash of entry 11>", "time":"..."}

The anchor is a file with the same lines, on another disk if the hospital gives it one. It is written after the database
and before anything is done on the strength of an entry, and only ever grows (it may be made append-only). So:

* the database is one entry ahead: something died between the two; the anchor is brought up to date;
* the anchor is ahead: the database is an older copy, put back. Nothing goes on until a person decides; the missing entries
  can be taken from the anchor (:meth:`Chain.recover`);
* they differ: one was changed.

Every opening reads and checks everything.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from client.audit import Head
from client.processes import write_durably
from shared_models.errors import FederadError

Entry = Mapping[str, Any]


class NoHistoryError(Exception):
    """There is no chain, in the database or at the anchor."""


@dataclass
class Book:
    """The chain while it is open for writing; everything written becomes durable together when it is closed."""

    db: sqlite3.Connection
    entries: list[Entry]
    _key: bytes
    new: list[bytes] = field(default_factory=list)

    def append(self, event: str, **facts: Any) -> Entry:
        """Add an entry; one in each opening, so that database and anchor are never further apart than that."""
        if self.new:
            raise ValueError("a second entry in one transaction")
        head = _head(self.entries)
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = _canonical(
            _signed(self._key, {**facts, "event": event, "n": head.n + 1, "previous": head.hash, "time": now})
        )
        self.new.append(line)
        return self._add(line)

    def _add(self, line: bytes) -> Entry:
        entry = _checked(self._key, line, _head(self.entries))
        if entry is None:
            raise ValueError("an entry that does not follow the one before")
        self.db.execute("INSERT INTO chain VALUES (?, ?)", (entry["n"], line.decode("ascii")))
        self.entries.append(entry)
        return entry


class Chain:
    """The chain in a database, with its anchor. Several processes may write to it.

    Parameters
    ----------
    database
        A SQLite file, made with the first entry. Callers keep other tables in it.
    key
        Of the hashes.
    anchor
        A file that is made with the first entry, whose folder must be there.
    tables
        SQL that makes the callers' tables where they are not there.
    """

    def __init__(self, database: Path, key: bytes, anchor: Path, tables: str = "") -> None:
        self.database = database
        self.anchor = anchor
        self._key = key
        self._tables = tables
        self._known: tuple[list[bytes], list[Entry]] = ([], [])

    @contextmanager
    def open(self) -> Iterator[Book]:
        """The checked chain, for one at a time; what is appended is durable, in both places, when this returns.

        Raises
        ------
        NoHistoryError
            If there is no entry anywhere.
        FederadError
            C164 if it cannot be written, C166 if it is not whole, C167 if the database is older than the anchor, C168 if
            the anchor cannot be used.
        """
        with self._opened() as (db, lines):
            entries = self._verified(lines)
            anchored = self._anchored()
            if not lines and not anchored:
                raise NoHistoryError
            self._compare(lines, anchored)
            self._write_anchor(lines[len(anchored) :])
            book = Book(db, list(entries), self._key)
            yield book
            db.execute("COMMIT")
            self._write_anchor(book.new)

    def begin(self, **facts: Any) -> None:
        """Write the first entry.

        Raises
        ------
        FederadError
            As :meth:`open`.
        """
        with self._opened() as (db, lines):
            anchored = self._anchored()
            if lines or anchored:
                return
            book = Book(db, [], self._key)
            book.append("begin", **facts)
            db.execute("COMMIT")
            self._write_anchor(book.new)

    def recover(self) -> int:
        """Take over what the anchor holds beyond the database, after an older copy of the database was put back.

        Returns
        -------
        int
            The number of entries that were missing.

        Raises
        ------
        FederadError
            C166 if the anchor does not go on where the database ends.
        """
        with self._opened() as (db, lines):
            entries = self._verified(lines)
            anchored = self._anchored()
            if anchored[: len(lines)] != lines:
                raise _not_whole(self.database, "it does not hold what its anchor begins with")
            book = Book(db, list(entries), self._key)
            for line in anchored[len(lines) :]:
                try:
                    book._add(line)
                except ValueError:
                    raise _not_whole(self.anchor, f"line {len(book.entries) + 1} was changed") from None
            db.execute("COMMIT")
            return len(anchored) - len(lines)

    def renew_anchor(self) -> None:
        """Write the anchor anew, at a place where there is none yet, or where it is an older copy.

        Raises
        ------
        FederadError
            C168 if what is there already says more than the database, or something else.
        """
        with self._opened() as (_, lines):
            self._verified(lines)
            if not lines:
                raise NoHistoryError
            anchored = self._anchored()
            if anchored != lines[: len(anchored)]:
                raise _anchor_unusable(self.anchor, "it holds more than the ledger, or something else")
            try:
                write_durably(self.anchor, b"".join(line + b"\n" for line in lines))
            except OSError as error:
                raise unwritable(self.anchor, error) from None

    @contextmanager
    def _opened(self) -> Iterator[tuple[sqlite3.Connection, list[bytes]]]:
        """The database inside a transaction, with the lines it holds; undone unless the caller commits."""
        try:
            with self._locked(), closing(self._connect()) as db:
                db.execute("BEGIN IMMEDIATE")
                for statement in (
                    "CREATE TABLE IF NOT EXISTS chain (n INTEGER PRIMARY KEY, line TEXT NOT NULL)",
                    self._tables,
                ):
                    db.execute(statement)
                lines = [str(line).encode("utf-8") for (line,) in db.execute("SELECT line FROM chain ORDER BY n")]
                yield db, lines
        except sqlite3.OperationalError as error:
            raise unwritable(self.database, error) from None
        except sqlite3.IntegrityError:
            raise
        except sqlite3.DatabaseError as error:
            raise _not_whole(self.database, f"it is damaged ({error})") from None

    def _connect(self) -> sqlite3.Connection:
        os.close(self._file(self.database))
        db = sqlite3.connect(self.database, timeout=60, isolation_level=None)
        # EXTRA: with FULL, a power cut may undo the removal of the journal, and with it the commit.
        db.executescript("PRAGMA journal_mode = DELETE; PRAGMA synchronous = EXTRA; PRAGMA trusted_schema = OFF;")
        return db

    @contextmanager
    def _locked(self) -> Iterator[None]:
        descriptor = self._file(self.database.with_name(f"{self.database.name}.lock"))
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _file(self, path: Path, flags: int = 0) -> int:
        """A file open for writing; made by root, it belongs to whom the database's folder belongs."""
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | flags, 0o600)
            if os.geteuid() == 0:
                owner = self.database.parent.stat()
                os.fchown(descriptor, owner.st_uid, owner.st_gid)
            return descriptor
        except OSError as error:
            raise unwritable(path, error) from None

    def _verified(self, lines: list[bytes]) -> list[Entry]:
        """The entries; those that were checked before and are still the same are not checked again."""
        known_lines, known = self._known
        if lines[: len(known_lines)] != known_lines:
            known_lines, known = [], []
        entries = list(known)
        for line in lines[len(known_lines) :]:
            entry = _checked(self._key, line, _head(entries))
            if entry is None:
                raise _not_whole(self.database, f"entry {len(entries) + 1} was changed, or does not belong there")
            entries.append(entry)
        self._known = lines, entries
        return entries

    def _anchored(self) -> list[bytes]:
        """The lines of the anchor; what a crash left of a line that was never finished is none."""
        try:
            content = self.anchor.read_bytes()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise _anchor_unusable(self.anchor, f"it cannot be read ({type(error).__name__})") from None
        lines = content.removesuffix(b"\n").split(b"\n") if content else []
        known = self._known[0]
        return lines if lines == known[: len(lines)] else [line for line in lines if _is_finished(line)]

    def _compare(self, lines: list[bytes], anchored: list[bytes]) -> None:
        if len(anchored) > len(lines) and anchored[: len(lines)] == lines:
            raise _rolled_back(self.database, self.anchor, len(lines), len(anchored))
        if anchored != lines[: len(anchored)]:
            raise _not_whole(self.database, f"its anchor {self.anchor} says something else")
        if len(lines) - len(anchored) > 1:
            raise _anchor_unusable(self.anchor, f"it has {len(anchored)} of {len(lines)} entries")

    def _write_anchor(self, lines: list[bytes]) -> None:
        if not lines:
            return
        try:
            is_new = not self.anchor.exists()
            descriptor = self._file(self.anchor, os.O_APPEND)
            with os.fdopen(descriptor, "r+b", buffering=0) as file:
                size = file.seek(0, os.SEEK_END)
                is_torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
                data = (b"\n" if is_torn else b"") + b"".join(line + b"\n" for line in lines)
                if file.write(data) != len(data):
                    raise OSError("no room for a whole line")
                os.fsync(descriptor)
            if is_new:
                _sync_folder(self.anchor.parent)
        except OSError as error:
            raise unwritable(self.anchor, error) from None


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _head(entries: list[Entry]) -> Head:
    return Head(entries[-1]["n"], entries[-1]["hash"]) if entries else Head()


def _signed(key: bytes, entry: dict[str, Any]) -> dict[str, Any]:
    return {**entry, "hash": hmac.new(key, _canonical(entry), hashlib.sha256).hexdigest()}


def _checked(key: bytes, line: bytes, head: Head) -> Entry | None:
    """The entry of a line that follows ``head``; None if it does not, or was changed in any way."""
    try:
        entry = json.loads(line)
        del entry["hash"]
        whole = _signed(key, entry)
        follows = whole["n"] == head.n + 1 and whole["previous"] == head.hash
        return whole if follows and line == _canonical(whole) else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _is_finished(line: bytes) -> bool:
    """Whether a line of the anchor is whole: a crash may have left its beginning, and a later one begins anew."""
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _canonical(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def unwritable(path: Path, error: Exception) -> FederadError:
    """C164, for whatever is written together with the chain."""
    return FederadError(
        "C164",
        happened=f"The ledger cannot be written: {path} ({getattr(error, 'strerror', None) or error}).",
        because="What is spent and what is answered is written down first, so nothing is trained and nothing leaves.",
        remedies=(
            "make room on the disk, and check that it is not mounted read-only",
            "check that the account of the station may write there",
            "nothing needs to be repaired: the next question is answered once the ledger can be written",
        ),
    )


def _not_whole(path: Path, what: str) -> FederadError:
    return FederadError(
        "C166",
        happened=f"The ledger {path} is not whole: {what}.",
        because="It says what every patient here has already paid; a ledger that was changed may say too little.",
        remedies=(
            "keep ledger.sqlite and the anchor as they are and tell whoever is responsible for data protection here",
            "put the newest backup of ledger.sqlite back, or none: federad-site ledger --after-restore then takes what is "
            "missing from the anchor",
            "without a usable anchor: federad-site ledger --begin-anew, which counts everything so far as spent",
        ),
    )


def _rolled_back(path: Path, anchor: Path, n: int, n_anchored: int) -> FederadError:
    return FederadError(
        "C167",
        happened=f"The ledger {path} is an older copy: it has {n} entries, and its anchor {anchor} has {n_anchored}.",
        because="With the older copy, what was spent since could be spent again.",
        remedies=(
            "put the newer file back if there is one",
            "after a restore from a backup: federad-site ledger --after-restore takes the missing entries from the anchor",
            "if nobody restored anything, tell whoever is responsible for data protection here",
        ),
    )


def _anchor_unusable(anchor: Path, what: str) -> FederadError:
    return FederadError(
        "C168",
        happened=f"The ledger's anchor {anchor} cannot be used: {what}.",
        because="It is the second copy, without which nobody notices that an older ledger was put back.",
        remedies=(
            "check anchor in site.toml, and that its disk is mounted and may be read and written by the station's account",
            "if the anchor was moved or its disk is new: federad-site ledger --new-anchor writes it again",
            "if nobody touched it, tell whoever is responsible for data protection here",
        ),
    )
