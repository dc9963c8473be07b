"""What waits to be told to the operator: notices that passed the gate, until the courier says that they arrived.

Kept in SQLite in the station's folder, so that nothing is forgotten while the courier or the network is away. Of a round's
progress only the newest is worth telling.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

FILE = "outbox.sqlite"

MOST_AT_ONCE = 500
"""Notices handed out together."""


class Outbox:
    """The notices in a station's folder. Several processes may use it.

    Parameters
    ----------
    folder
        The station's.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        with closing(self._connect()) as db, db:
            db.execute(
                "CREATE TABLE IF NOT EXISTS notices"
                " (number INTEGER PRIMARY KEY AUTOINCREMENT, topic TEXT NOT NULL, body BLOB NOT NULL)"
            )

    def put(self, body: bytes, *, topic: str = "") -> None:
        """Add a notice; with a ``topic`` it takes the place of what waits under the same."""
        with closing(self._connect()) as db, db:
            if topic:
                db.execute("DELETE FROM notices WHERE topic = ?", (topic,))
            db.execute("INSERT INTO notices (topic, body) VALUES (?, ?)", (topic, body))

    def waiting(self, told: int = 0) -> tuple[int, list[bytes]]:
        """The oldest notices that were not told yet, and the number of the last of them.

        Parameters
        ----------
        told
            Notices up to this number have arrived, and are forgotten.
        """
        with closing(self._connect()) as db, db:
            db.execute("DELETE FROM notices WHERE number <= ?", (told,))
            rows = db.execute("SELECT number, body FROM notices ORDER BY number LIMIT ?", (MOST_AT_ONCE,)).fetchall()
        return (rows[-1][0] if rows else told), [body for _, body in rows]

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self._path, timeout=30)
