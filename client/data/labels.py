"""The label or number of a study as a whole, for tasks that have one: from a table, a folder's name, a report or a header.

In this order: the attribute that the plan names, and nothing else then; a row of ``labels.csv``; for pictures the folder
between ``images`` and the file; the study's verified DICOM structured reports, where a coded value or a text is a label of
the plan and nothing else. ``labels.csv`` lies in the data folder or above it and has the columns ``patient`` and
``label``; a column ``study`` says it for one study alone, a column ``site`` for one data folder. A patient is a Patient
ID, or what stands for it: the top folder of a NIfTI file, a picture's name or its subject in ``index.csv``. A study is a
Study Instance UID, or the folder of the NIfTI file.

Where studies have several labels (``target = "multi-label"``), ``label`` holds them all, such as ``mass; effusion``, or
each has a row of its own; ``none`` says that nothing was found. Where a plan learns numbers, ``label`` holds one, such as
``3`` or ``0.07``, or an interval with both of its ends, such as ``0.05-0.10``, as a reader's grade says it.
"""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from client.data import dicom
from client.data.keys import key_of
from client.data.records import Kind, Study
from client.data.skips import Reason, UnusableError
from shared_models.errors import FederadError
from shared_models.plan import TaskTable
from shared_models.tasks import WITH_NUMBERS

TABLE = "labels.csv"

NOTHING_FOUND = frozenset({"none", "no finding"})
"""What a table says of a study that has none of several labels."""

_NUMBER = r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*"
_INTERVAL = re.compile(f"{_NUMBER}(?:[-–]{_NUMBER})?")


class StudyLabels:
    """What is known of studies' labels at one site; nothing of it is kept beyond the cohort.

    Parameters
    ----------
    source
        The site's data folder.
    task
        Names of the labels, and of the DICOM attribute that holds them.
    secret
        The site's secret, the key of all keys.

    Raises
    ------
    FederadError
        C176 if there is a table that cannot be read.
    """

    def __init__(self, source: Path, task: TaskTable, secret: bytes) -> None:
        self._indices = {name.strip().lower(): index for index, name in enumerate(task.labels)}
        self._attribute = task.label_attribute
        self._are_several = task.target == "multi-label"
        self._is_share = task.target == "proportion" if task.kind in WITH_NUMBERS else None
        self._source = source
        self._words: dict[str, set[str]] = defaultdict(set)
        for path in (source / TABLE, source.parent / TABLE):
            if self._attribute is None and path.is_file():
                self._read(path, source.name, secret)
                break

    def of(self, study: Study, paths: Sequence[Path], reports: Sequence[Path] = ()) -> int:
        """The index of a study's label, or of several the sum of 2 to the power of each; ``paths`` are the files of one of
        its images, ``reports`` its reports.

        Raises
        ------
        UnusableError
            If there is none, there are several where one is asked for, or it is none of the plan's.
        """
        words = self._words_of(study, paths, reports)
        if self._are_several:
            return self._bits(words)
        if len(words) > 1:
            raise UnusableError(Reason.LABELS_DISAGREE)
        (word,) = words
        if word not in self._indices:
            raise UnusableError(Reason.LABEL_UNKNOWN)
        return self._indices[word]

    def _bits(self, words: set[str]) -> int:
        named = {part.strip() for word in words for part in re.split(r"[;|]", word)} - {""}
        found = named - NOTHING_FOUND
        if found and found != named:
            raise UnusableError(Reason.LABELS_DISAGREE)
        if not found <= self._indices.keys():
            raise UnusableError(Reason.LABEL_UNKNOWN)
        return sum(1 << self._indices[word] for word in found)

    def interval_of(self, study: Study, paths: Sequence[Path]) -> tuple[float, float]:
        """The interval in which a study's number lies, both ends alike where it is known exactly.

        Raises
        ------
        UnusableError
            If there is none, there are several, or it is no number of the kind that the plan asks for.
        """
        found = {interval(word) for word in self._words_of(study, paths, ())}
        if len(found) > 1:
            raise UnusableError(Reason.LABELS_DISAGREE)
        (one,) = found
        if one is None or (self._is_share and one[1] > 1):
            raise UnusableError(Reason.LABEL_UNKNOWN)
        return one

    def _words_of(self, study: Study, paths: Sequence[Path], reports: Sequence[Path]) -> set[str]:
        words = {word.strip().lower() for word in self._said_of(study, paths, reports)} - {""}
        if not words:
            raise UnusableError(Reason.NOT_LABELLED)
        return words

    def _said_of(self, study: Study, paths: Sequence[Path], reports: Sequence[Path]) -> set[str]:
        kind = next(iter(study.images.values())).kind
        if self._attribute is not None:
            return {dicom.attribute(path, self._attribute) for path in paths} if kind is Kind.DICOM else set()
        for key in (study.key, study.patient):
            if key in self._words:
                return self._words[key]
        *_, above, folder = ("", "", *paths[0].relative_to(self._source).parts[:-1])
        if kind is Kind.PICTURE:
            return {folder} if above == "images" else set()
        return {word for path in reports for word in dicom.report(path, list(self._indices))}

    def _read(self, path: Path, site: str, secret: bytes) -> None:
        try:
            with path.open(newline="", encoding="utf-8-sig") as lines:
                table = csv.DictReader(lines)
                if not {"patient", "label"} <= set(table.fieldnames or ()):
                    raise _unusable(path, "it has no columns patient and label")
                rows = [row for row in table if row.get("site") in (None, "", site)]
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise _unusable(path, f"it cannot be read as CSV in UTF-8 ({type(error).__name__})") from None
        for row in rows:
            patient, study = (row["patient"] or "").strip(), (row.get("study") or "").strip()
            identifiers = (f"{patient}\n{study}", f"folder:{study}") if study else (patient,)
            for identifier in identifiers:
                self._words[key_of(secret, identifier)].add(row["label"] or "")


def interval(word: str) -> tuple[float, float] | None:
    """The ends of what a table says, ``"0.05-0.10"`` or ``"3"``; None where that is no number, or the ends are in
    disorder."""
    found = _INTERVAL.fullmatch(word)
    if found is None:
        return None
    low, high = float(found[1]), float(found[2] if found[2] is not None else found[1])
    return (low, high) if low <= high else None


def _unusable(path: Path, why: str) -> FederadError:
    return FederadError(
        "C176",
        happened=f"The table of labels {path} cannot be used: {why}.",
        because="It says which label each patient has, and nobody guesses.",
        remedies=(
            "write it as CSV in UTF-8 with the columns patient and label, and study where studies of one patient differ",
            "or remove it, if the labels are the names of folders below images/",
        ),
    )
