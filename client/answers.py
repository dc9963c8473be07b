"""The answer store: asked twice, a station gives the same bytes and trains once.

A question is (run, round, kind, plan hash), bound to the hash of the weights that came with it (``PRIVACY_RULES``,
rule 16). The bytes are stored durably before the first of them leaves. Asking again with other weights is refused. The
bytes of a run's older rounds are dropped, their keys never: the server has added those rounds up, or it would not ask
for the next.
"""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path
from uuid import uuid4

from shared_models.messages import Question

ROUNDS_KEPT = 2
"""Newest rounds of each run whose bytes stay on disk."""


class AnsweredBeforeError(Exception):
    """The question was answered, and its bytes cannot or must not be given again."""


class OtherWeightsError(AnsweredBeforeError):
    """The same question came before with other weights."""


class AnswerStore:
    """Answers in a folder: bytes in files, keys in SQLite.

    Parameters
    ----------
    folder
        Made if it is not there.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        with closing(self._connect()) as db, db:
            db.execute(
                "CREATE TABLE IF NOT EXISTS answers (run TEXT, round INTEGER, kind TEXT, plan TEXT, weights TEXT NOT NULL,"
                " file TEXT, PRIMARY KEY (run, round, kind, plan)) WITHOUT ROWID"
            )

    def find(self, question: Question) -> bytes | None:
        """The stored answer, or None if the question is new.

        Raises
        ------
        OtherWeightsError
            If the same question came before with other weights.
        AnsweredBeforeError
            If its bytes have been dropped since.
        """
        with closing(self._connect()) as db:
            row = db.execute(
                "SELECT weights, file FROM answers WHERE run = ? AND round = ? AND kind = ? AND plan = ?",
                _key(question),
            ).fetchone()
        if row is None:
            return None
        if row[0] != question.weights_sha256:
            raise OtherWeightsError
        try:
            return (self._folder / str(row[1])).read_bytes()
        except OSError:
            raise AnsweredBeforeError from None

    def keep(self, question: Question, answer: bytes) -> None:
        """Store ``answer`` durably; it may leave after this returns."""
        file = f"{question.round:06d}-{question.kind}-{uuid4().hex}.safetensors"
        temporary = self._folder / f"{file}.part"
        with temporary.open("wb") as stream:
            stream.write(answer)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(self._folder / file)
        with closing(self._connect()) as db, db:
            db.execute(
                "INSERT INTO answers VALUES (?, ?, ?, ?, ?, ?)", (*_key(question), question.weights_sha256, file)
            )
            old = db.execute(
                "SELECT file FROM answers WHERE run = ? AND round <= ?", (question.run, question.round - ROUNDS_KEPT)
            ).fetchall()
        for (name,) in old:
            (self._folder / name).unlink(missing_ok=True)

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self._folder / "answers.sqlite", timeout=30)


def _key(question: Question) -> tuple[str, int, str, str]:
    return question.run, question.round, question.kind, question.plan_sha256
