"""The answer store: asked twice, a station gives the same bytes and trains once.

A question is (run, round, kind, plan hash), bound to the hash of the weights that came with it (``PRIVACY_RULES``,
rule 16). The bytes are stored durably before the first of them leaves. Asking again with other weights is refused. The
bytes of a run's older rounds are dropped, their keys never: the server has added those rounds up, or it would not ask
for the next.

Bytes lie in files, keys in a table of the ledger's database, so that an answer is recorded in the same commit as the
settlement of what it cost (``ledger``).
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterable
from pathlib import Path
from uuid import uuid4

from client.processes import write_durably
from shared_models.messages import Question

ROUNDS_KEPT = 2
"""Newest rounds of each run whose bytes stay on disk."""

TABLE = (
    "CREATE TABLE IF NOT EXISTS answers (run TEXT, round INTEGER, kind TEXT, plan TEXT, weights TEXT NOT NULL,"
    " sha256 TEXT NOT NULL, file TEXT, PRIMARY KEY (run, round, kind, plan)) WITHOUT ROWID"
)


class AnsweredBeforeError(Exception):
    """The question was answered, and its bytes cannot or must not be given again."""


class OtherWeightsError(AnsweredBeforeError):
    """The same question came before with other weights."""


class AnswerStore:
    """Answers in a folder.

    Parameters
    ----------
    folder
        Of the bytes; made if it is not there. The keys are in the table :data:`TABLE` of the caller's database.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def look_up(self, db: sqlite3.Connection, question: Question) -> bytes | None:
        """The stored answer, or None if the question is new.

        Raises
        ------
        OtherWeightsError
            If the same question came before with other weights.
        AnsweredBeforeError
            If its bytes have been dropped since, or are no longer those that were stored.
        """
        row = db.execute(
            "SELECT weights, sha256, file FROM answers WHERE run = ? AND round = ? AND kind = ? AND plan = ?",
            _key(question),
        ).fetchone()
        if row is None:
            return None
        weights, sha256, file = row
        if weights != question.weights_sha256:
            raise OtherWeightsError
        try:
            answer = (self._folder / str(file)).read_bytes()
        except OSError:
            raise AnsweredBeforeError from None
        if hashlib.sha256(answer).hexdigest() != sha256:
            raise AnsweredBeforeError
        return answer

    def write(self, question: Question, answer: bytes) -> str:
        """Put the bytes on the disk, where nothing finds them until they are recorded; the name of their file."""
        file = f"{question.round:06d}-{question.kind}-{uuid4().hex}.safetensors"
        write_durably(self._folder / file, answer)
        return file

    @staticmethod
    def record(db: sqlite3.Connection, question: Question, sha256: str, file: str) -> list[str]:
        """Bind the question to an answer, inside the caller's transaction.

        Returns
        -------
        list of str
            Files of older rounds that no key names any more, to :meth:`drop` after the commit.

        Raises
        ------
        AnsweredBeforeError
            If the question has an answer already.
        """
        row = (*_key(question), question.weights_sha256, sha256, file)
        try:
            db.execute("INSERT INTO answers VALUES (?, ?, ?, ?, ?, ?, ?)", row)
        except sqlite3.IntegrityError:
            raise AnsweredBeforeError from None
        old = (question.run, question.round - ROUNDS_KEPT)
        named = db.execute("SELECT file FROM answers WHERE run = ? AND round <= ? AND file IS NOT NULL", old).fetchall()
        db.execute("UPDATE answers SET file = NULL WHERE run = ? AND round <= ?", old)
        return [str(file) for (file,) in named]

    def forget(self, db: sqlite3.Connection, plan_sha256: str) -> list[Path]:
        """Take the bytes of a plan's answers away from their keys, which stay; the files, to be deleted."""
        rows = db.execute("SELECT file FROM answers WHERE plan = ? AND file IS NOT NULL", (plan_sha256,)).fetchall()
        db.execute("UPDATE answers SET file = NULL WHERE plan = ?", (plan_sha256,))
        return [self._folder / str(file) for (file,) in rows]

    def drop(self, files: Iterable[str]) -> None:
        """Delete files that no key names any more; what a crash keeps from it, :meth:`tidy` does."""
        for file in files:
            (self._folder / file).unlink(missing_ok=True)

    def tidy(self, db: sqlite3.Connection) -> None:
        """Delete every file that no key names: those of older rounds, and what a crash left. For one process at a time."""
        named = {str(file) for (file,) in db.execute("SELECT file FROM answers WHERE file IS NOT NULL")}
        for path in self._folder.glob("*.safetensors*"):
            if path.name not in named:
                path.unlink(missing_ok=True)


def _key(question: Question) -> tuple[str, int, str, str]:
    return question.run, question.round, question.kind, question.plan_sha256
