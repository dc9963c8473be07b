"""The journal: every round durable before the next begins.

A folder with one SQLite file of round records and the weights of the rounds worth keeping (the last and the best) as
safetensors. A round is committed when its record is in SQLite; its weights are on disk before that.
"""

from __future__ import annotations

import json
import os
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

from shared_models.weights import Weights, decode, encode


class Journal:
    """Rounds of one run, in a folder.

    Parameters
    ----------
    folder
        Made if it is not there.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        with closing(self._connect()) as db, db:
            db.execute("CREATE TABLE IF NOT EXISTS rounds (round INTEGER PRIMARY KEY, record TEXT NOT NULL)")

    def commit(self, round_: int, record: dict[str, Any], weights: Weights) -> None:
        """Make a round durable: its weights first, then its record."""
        path = self.weights_path(round_)
        temporary = path.with_suffix(".part")
        with temporary.open("wb") as stream:
            stream.write(encode(weights, json.dumps({"round": round_})))
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
        self.amend(round_, record)

    def amend(self, round_: int, record: dict[str, Any]) -> None:
        """Write a round's record, or what became known of it later (its weights are validated in the next round)."""
        with closing(self._connect()) as db, db:
            db.execute("INSERT OR REPLACE INTO rounds VALUES (?, ?)", (round_, json.dumps(record)))

    def records(self) -> list[dict[str, Any]]:
        """All committed rounds, oldest first."""
        with closing(self._connect()) as db:
            return [json.loads(row[0]) for row in db.execute("SELECT record FROM rounds ORDER BY round")]

    def weights(self, round_: int) -> Weights:
        """The weights after a round that was kept."""
        return decode(self.weights_path(round_).read_bytes())[0]

    def keep_only(self, *rounds: int) -> None:
        """Drop the weights of all rounds but these."""
        kept = {self.weights_path(round_) for round_ in rounds}
        for path in self._folder.glob("round-*.safetensors"):
            if path not in kept:
                path.unlink()

    def weights_path(self, round_: int) -> Path:
        """Where the weights after a round lie."""
        return self._folder / f"round-{round_:05d}.safetensors"

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self._folder / "journal.sqlite", timeout=30)
