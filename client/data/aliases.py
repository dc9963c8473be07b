"""Several identifiers of one patient, as the site's own table says: ``patients.csv`` in the data folder or above it.

It has the columns ``identifier`` and ``patient``: each row says that an identifier means the patient who is also called
``patient``. Without it the same person under two numbers would be two patients, each protected only by half, and could
be in training and in test at once.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from client.data.keys import key_of
from shared_models.errors import FederadError

TABLE = "patients.csv"


@dataclass(frozen=True)
class Aliases:
    """Which patient a key of a patient ID stands for."""

    keys: dict[str, str]

    @classmethod
    def of(cls, source: Path, secret: bytes) -> Aliases:
        """Read the table in ``source`` or its parent; empty if there is none.

        Raises
        ------
        FederadError
            C116 if there is one that cannot be read, or that leads in a circle.
        """
        for path in (source / TABLE, source.parent / TABLE):
            if path.is_file():
                return cls(_resolved(path, _rows(path), secret))
        return cls({})

    def patient(self, key: str) -> str:
        """The key of the patient whom ``key`` means."""
        return self.keys.get(key, key)


def _rows(path: Path) -> dict[str, str]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as lines:
            table = csv.DictReader(lines)
            if not {"identifier", "patient"} <= set(table.fieldnames or ()):
                raise _unusable(path, "it has no columns identifier and patient")
            rows = [((row["identifier"] or "").strip(), (row["patient"] or "").strip()) for row in table]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise _unusable(path, f"it cannot be read as CSV in UTF-8 ({type(error).__name__})") from None
    means = {identifier: patient for identifier, patient in rows if identifier and patient and identifier != patient}
    if len(means) < len({row for row in rows if all(row) and row[0] != row[1]}):
        raise _unusable(path, "it gives two patients for one identifier")
    return means


def _resolved(path: Path, means: dict[str, str], secret: bytes) -> dict[str, str]:
    """Where each identifier leads in the end."""
    ends = {}
    for identifier, patient in means.items():
        passed, end = {identifier}, patient
        while end in means:
            if end in passed:
                raise _unusable(path, "its rows lead in a circle")
            passed.add(end)
            end = means[end]
        ends[key_of(secret, identifier)] = key_of(secret, end)
    return ends


def _unusable(path: Path, why: str) -> FederadError:
    return FederadError(
        "C116",
        happened=f"The table of patients {path} cannot be used: {why}.",
        because="It says which identifiers are one person, and a person is what privacy protects.",
        remedies=(
            "write it as CSV in UTF-8 with the columns identifier and patient, one identifier per row",
            "or remove it, if every patient has one identifier",
        ),
    )
