"""What each file said when it was last looked at, so that an interrupted look through a data folder loses nothing.

One SQLite file beside the catalogue, written as the files are read; like the catalogue it knows keys and no person. It is
a memory and not a record: if it is lost, damaged or of another version, files are simply looked at again.
"""

from __future__ import annotations

import json
import sqlite3
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from client.data.records import Facts, File, Kind, Role
from client.data.skips import Reason

Outcome = tuple[Facts, ...] | Reason
"""What a file says, one thing or several; or why it cannot be used."""

COMMIT_S = 1.0
"""At most this much work is lost when the process is killed [s]."""

_PASSING = frozenset({Reason.NOT_OPENED, Reason.TOO_SLOW, Reason.CRASHED})
"""Reasons that may have to do with the hour rather than with the file."""


class Seen:
    """Outcomes by file; a context manager, since it holds the file open.

    Parameters
    ----------
    path
        The SQLite file.
    basis
        Whatever besides the files decides outcomes; another basis begins anew.
    """

    def __init__(self, path: Path, basis: str) -> None:
        self._path = path
        self._basis = basis
        self._known: dict[str, tuple[int, int, str]] = {}
        self._db: sqlite3.Connection | None = None
        self._committed = 0.0

    def __enter__(self) -> Self:
        for _ in range(2):
            try:
                self._open()
                return self
            except (sqlite3.Error, OSError, ValueError):
                self.__exit__()
                for name in ("", "-wal", "-shm"):
                    with suppress(OSError):
                        self._path.with_name(self._path.name + name).unlink(missing_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._db is not None:
            with suppress(sqlite3.Error):
                self._db.commit()
            with suppress(sqlite3.Error):
                self._db.close()
            self._db = None

    def _open(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._db = sqlite3.connect(self._path)
        self._db.executescript(
            "PRAGMA journal_mode = WAL; PRAGMA synchronous = OFF;"
            "CREATE TABLE IF NOT EXISTS about (basis TEXT NOT NULL);"
            "CREATE TABLE IF NOT EXISTS seen (key TEXT PRIMARY KEY, size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL,"
            " outcome TEXT NOT NULL) WITHOUT ROWID;"
        )
        if self._db.execute("SELECT basis FROM about").fetchall() != [(self._basis,)]:
            self._db.executescript("DELETE FROM about; DELETE FROM seen;")
            self._db.execute("INSERT INTO about VALUES (?)", (self._basis,))
            self._db.commit()
        self._known = {key: (size, mtime, text) for key, size, mtime, text in self._db.execute("SELECT * FROM seen")}

    def of(self, file: File) -> Outcome | None:
        """What the file said when it had this size and time; None if nobody looked."""
        size, mtime_ns, text = self._known.get(file.key, (-1, -1, ""))
        if (size, mtime_ns) != (file.size, file.mtime_ns):
            return None
        try:
            content = json.loads(text)
            return Reason(content) if isinstance(content, str) else tuple(_facts(one) for one in content)
        except (ValueError, KeyError, TypeError):
            return None

    def note(self, file: File, outcome: Outcome) -> None:
        """Remember what a file said."""
        if self._db is None or (isinstance(outcome, Reason) and outcome in _PASSING):
            return
        content = outcome if isinstance(outcome, Reason) else [asdict(facts) for facts in outcome]
        try:
            self._db.execute(
                "INSERT OR REPLACE INTO seen VALUES (?, ?, ?, ?)",
                (file.key, file.size, file.mtime_ns, json.dumps(content)),
            )
            if time.monotonic() - self._committed > COMMIT_S:
                self._db.commit()
                self._committed = time.monotonic()
        except sqlite3.Error:  # a full disk: whoever writes the catalogue will say so
            self.__exit__()

    def forget(self, present: set[str]) -> None:
        """Drop the files that are no longer there."""
        gone = [(key,) for key in self._known if key not in present]
        if self._db is not None and gone:
            with suppress(sqlite3.Error):
                self._db.executemany("DELETE FROM seen WHERE key = ?", gone)


def _facts(content: dict[str, Any]) -> Facts:
    return Facts(**{**content, "kind": Kind(content["kind"]), "role": Role(content["role"])})
