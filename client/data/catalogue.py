"""The catalogue of a site: which patients, studies, series and files its data folder holds, and what was left out.

It is one SQLite file without a person in it: keyed hashes stand for patient IDs, UIDs and paths (folders are often named
after patients), so a path can be found again only with the site's secret and the folder itself. Series names are kept,
stripped of the patient's name, ID and dates. Nothing here reads pixels; ``cohort`` does.
"""

from __future__ import annotations

import hmac
import os
import sqlite3
import stat
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from client.data import dicom, images, kspace, reader, zips
from client.data.aliases import Aliases
from client.data.keys import key_of
from client.data.records import Facts, File, Kind, Role, Series, Study
from client.data.seen import Outcome, Seen
from client.data.skips import Reason, Skipped, UnusableError, counts
from client.data.storage import replacing
from shared_models.errors import FederadError

__all__ = ["Catalogue", "Progress", "Reason", "Series", "Skipped", "Study"]

Progress = Callable[[int, int], None]
"""Called with (done, in all)."""

VERSION = 2
"""Of the file's tables; another version is built anew."""

_TABLES = """
CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE patients (key TEXT PRIMARY KEY);
CREATE TABLE studies (key TEXT PRIMARY KEY, patient TEXT NOT NULL REFERENCES patients, split TEXT);
CREATE TABLE series (
    id INTEGER PRIMARY KEY, study TEXT NOT NULL REFERENCES studies, key TEXT NOT NULL, name TEXT NOT NULL,
    kind TEXT NOT NULL, role TEXT NOT NULL, modality TEXT, scanner TEXT, reference TEXT);
CREATE TABLE files (
    series INTEGER NOT NULL REFERENCES series, key TEXT NOT NULL, size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL,
    instance TEXT NOT NULL, n_planes INTEGER NOT NULL, burned_in INTEGER NOT NULL,
    PRIMARY KEY (series, key)) WITHOUT ROWID;
CREATE TABLE skipped (file TEXT PRIMARY KEY, reason TEXT NOT NULL) WITHOUT ROWID;
"""

TABLES = (PurePosixPath("index.csv"), PurePosixPath("labels.csv"), PurePosixPath("patients.csv"))
"""Files of the data folder that are about images and are none."""

INCOMING = ".federad-incoming"
"""Folders of this name are not looked into: studies arrive there, and are not whole yet (``retrieval``)."""

READS = 3
"""Raised when more is read than before, so that what was left out is looked at again."""

_FIXED_WORD = "federad catalogue"
"""Its key tells whether two secrets are the same, without telling either."""


class Catalogue:
    """Patients, studies, series and files of one folder, and the files left out with the reason for each.

    Built with :meth:`build`, read with :meth:`open`; never changed in between.
    """

    def __init__(self, source: Path, secret_check: str, studies: list[Study], skipped: list[Skipped]) -> None:
        self._source = source
        self._secret_check = secret_check
        self._studies = studies
        self._skipped = skipped

    @classmethod
    def build(cls, path: Path, source: Path, *, secret: bytes, on_progress: Progress | None = None) -> Catalogue:
        """Look at every file below ``source`` and write the catalogue to ``path``, all or nothing.

        A file that was looked at before and has the same size and time is not opened again, also where an earlier look was
        interrupted. Links to folders are not followed.

        Parameters
        ----------
        path
            Where the SQLite file goes; an existing one is replaced at the end.
        source
            The folder with the site's images; it is only read.
        secret
            The site's secret, the key of all keys.
        on_progress
            Called after each file with (files done, files in all).

        Raises
        ------
        FederadError
            C140 if the folder holds no usable image, C142 if the catalogue cannot be written.
        """
        listing = _listing(source)
        survey = _Survey(source, secret)
        with Seen(path.with_name(f"{path.name}.seen"), survey.basis) as seen:
            survey.look_at(listing, seen, on_progress)
        entries, skipped = _assembled(survey.entries, survey.skipped, survey.are_copies, Aliases.of(source, secret))
        if not any(entry.facts.role is Role.IMAGE for entry in entries):
            raise _no_image(source, len(listing), skipped)
        with replacing(path) as partial:
            _write(partial, source, key_of(secret, _FIXED_WORD), entries, skipped)
        return cls.open(path)

    @classmethod
    def open(cls, path: Path) -> Catalogue:
        """Read the catalogue at ``path``.

        Raises
        ------
        FederadError
            C143 if it is missing, unreadable or of another version.
        """
        try:
            with closing(_connect(path)) as db:
                (version,) = db.execute("PRAGMA user_version").fetchone()
                if version == VERSION:
                    about = dict(db.execute("SELECT name, value FROM about"))
                    skipped = [Skipped(key, Reason(r)) for key, r in db.execute("SELECT * FROM skipped ORDER BY file")]
                    return cls(Path(about["source"]), about["secret_check"], _studies(db), skipped)
                happened = f"The catalogue {path} has version {version}; this is version {VERSION}."
        except (sqlite3.Error, KeyError, ValueError) as error:
            happened = f"The catalogue {path} cannot be read ({type(error).__name__})."
        raise FederadError(
            "C143",
            happened=happened,
            because="It says which images this site has.",
            remedies=("prepare the site again: the catalogue is built anew from the data folder",),
        )

    @property
    def source(self) -> Path:
        """The folder that was looked at."""
        return self._source

    def studies(self) -> list[Study]:
        """All studies with at least one image, sorted by (patient, key): never by file-system order."""
        return list(self._studies)

    def skipped(self) -> list[Skipped]:
        """The files left out, by key, each with its reason."""
        return list(self._skipped)

    def locate(self, secret: bytes) -> dict[str, Path]:
        """Where each file below the source folder lies, by its key.

        The catalogue stores no path; the folder is listed and the keys are computed again.

        Raises
        ------
        FederadError
            C143 if the catalogue was built with another secret.
        """
        if not hmac.compare_digest(key_of(secret, _FIXED_WORD), self._secret_check):
            raise FederadError(
                "C143",
                happened="The catalogue was built with another secret than this site's.",
                because="With another secret every patient would have a new name and a new place in the splits.",
                remedies=(
                    "restore the secret that the site was set up with",
                    "or set up the site anew in an empty folder",
                ),
            )
        return {_file_key(secret, relative): self._source / relative for relative in _listing(self._source)}

    def skipped_files(self, secret: bytes) -> list[tuple[PurePosixPath, Reason]]:
        """The files left out that are still there, by their place below the source folder, each with its reason.

        Names of files may be names of patients.

        Raises
        ------
        FederadError
            C143 as for :meth:`locate`.
        """
        paths = self.locate(secret)
        named = [(paths[one.key], one.reason) for one in self._skipped if one.key in paths]
        return sorted((PurePosixPath(path.relative_to(self._source)), reason) for path, reason in named)


@dataclass(frozen=True)
class _Entry:
    """One file with one thing it says; a colour photograph has three."""

    file: File
    facts: Facts


class _Survey:
    """Looks once at every file and sorts them into entries and skips."""

    def __init__(self, source: Path, secret: bytes) -> None:
        self.entries: list[_Entry] = []
        self.skipped: list[Skipped] = []
        self._source = source
        self._secret = secret
        self._index = images.Index.of(source)
        self._paths: dict[str, PurePosixPath] = {}
        self.basis = key_of(secret, f"{VERSION}\n{READS}\n{self._index}")
        """What besides a file decides what it says."""

    def look_at(self, listing: Sequence[PurePosixPath], seen: Seen, on_progress: Progress | None) -> None:
        """Each file's outcome, from memory where it is unchanged; new files are read several at a time."""
        outcomes: dict[File, Outcome] = {}
        new: list[File] = []
        n_done = 0
        for relative in listing:
            file, outcome = self._known(relative, seen)
            if file is not None and outcome is not None:
                outcomes[file] = outcome
            elif file is not None:
                outcomes[file] = Reason.NOT_OPENED  # in its place, until it has been looked at
                new.append(file)
                continue
            n_done += 1
            if on_progress is not None:
                on_progress(n_done, len(listing))
        for file, outcome in zip(new, reader.side_by_side(self._inspected, new), strict=True):
            outcomes[file] = outcome
            seen.note(file, outcome)
            n_done += 1
            if on_progress is not None:
                on_progress(n_done, len(listing))
        seen.forget({file.key for file in outcomes})
        for file, outcome in outcomes.items():
            if isinstance(outcome, Reason):
                self.skipped.append(Skipped(file.key, outcome))
            else:
                self.entries += [_Entry(file, facts) for facts in outcome]

    def are_copies(self, a: File, b: File) -> bool:
        """Whether two files hold the same bytes."""
        if a.size != b.size:
            return False
        try:
            return reader.same_bytes(self._source / self._paths[a.key], self._source / self._paths[b.key])
        except (OSError, UnusableError):
            return False

    def _known(self, relative: PurePosixPath, seen: Seen) -> tuple[File | None, Outcome | None]:
        """A file, and its outcome where that is known without opening it; no file for what is none of the images."""
        if relative in TABLES:
            return None, None
        key = _file_key(self._secret, relative)
        self._paths[key] = relative
        try:
            status = os.stat(f"{self._source}/{relative}")  # noqa: PTH116  # building a Path costs more than asking
        except NotADirectoryError:
            return self._known_member(key, relative, seen)
        except OSError:
            return File(key, 0, 0), Reason.NOT_OPENED
        file = File(key, status.st_size, status.st_mtime_ns)
        if not stat.S_ISREG(status.st_mode):
            return file, Reason.NOT_AN_IMAGE
        return file, Reason.EMPTY if status.st_size == 0 else seen.of(file)

    def _known_member(self, key: str, relative: PurePosixPath, seen: Seen) -> tuple[File, Outcome | None]:
        try:
            status = reader.status(self._source / relative)
        except (OSError, UnusableError):
            return File(key, 0, 0), Reason.NOT_OPENED
        file = File(key, status.size, status.mtime_ns)
        return file, seen.of(file)

    def _inspected(self, file: File) -> Outcome:
        relative = self._paths[file.key]
        path, name = self._source / relative, relative.name.lower()
        try:
            if not path.is_file():
                return self._inspected_member(path, name)
            if name.endswith(zips.ENDING):
                reader.members(path)
                return Reason.DAMAGED  # it can be read now; it could not when the folder was listed
            if name.endswith(images.NIFTI_ENDINGS):
                return (images.inspect_nifti(path, relative, self._secret),)
            if name.endswith(images.PICTURE_ENDINGS):
                return images.inspect_picture(path, relative, self._secret, self._index)
            if name.endswith(kspace.ENDINGS):
                return (kspace.inspect(path, relative, self._secret, self._index),)
            return (dicom.inspect(path, self._secret),)
        except UnusableError as error:
            return () if error.reason is Reason.DIRECTORY else error.reason

    def _inspected_member(self, path: Path, name: str) -> Outcome:
        """What a member of an archive says: research formats are told by where they lie, and are read from folders only."""
        if name.endswith((*images.NIFTI_ENDINGS, *images.PICTURE_ENDINGS, *kspace.ENDINGS)):
            return Reason.NOT_SUPPORTED
        return (dicom.inspect(path, self._secret),)


def _listing(source: Path) -> list[PurePosixPath]:
    """Every file below ``source``, relative to it and sorted, so that no result depends on the file system's order.

    In place of a zip archive stand its members; the archive itself where nothing of it can be read.
    """
    found = (Path(folder, name) for folder, names in _walked(source) for name in names)
    within = (inner for path in found for inner in (_members(path) if _is_archive(path) else (path,)))
    return sorted(PurePosixPath(path.relative_to(source)) for path in within)


def _walked(source: Path) -> Iterator[tuple[str, list[str]]]:
    for folder, inner, names in os.walk(source):
        inner[:] = [name for name in inner if name != INCOMING]
        yield folder, names


def _is_archive(path: Path) -> bool:
    return path.name.lower().endswith(zips.ENDING) and path.is_file()


def _members(archive: Path) -> list[Path]:
    try:
        return [archive / name for name in reader.members(archive)]
    except (OSError, UnusableError):
        return [archive]


def _file_key(secret: bytes, relative: PurePosixPath) -> str:
    return key_of(secret, f"file:{relative}")


def _assembled(
    entries: list[_Entry], skipped: list[Skipped], are_copies: Callable[[File, File], bool], aliases: Aliases
) -> tuple[list[_Entry], list[Skipped]]:
    """Entries under their patient, without copies and without labels that belong to no image; each label moved to the
    study of its image."""
    skipped = list(skipped)
    entries = [_Entry(e.file, replace(e.facts, patient=aliases.patient(e.facts.patient))) for e in entries]
    disputed = _disputed(entries)
    seen: dict[tuple[str, str], File] = {}
    image_entries: list[_Entry] = []
    label_entries: list[_Entry] = []
    for entry in entries:
        if entry.facts.series in disputed:
            skipped.append(Skipped(entry.file.key, Reason.PATIENTS_DISAGREE))
            continue
        first = seen.setdefault((entry.facts.study, entry.facts.instance), entry.file)
        if first != entry.file:
            is_copy = are_copies(first, entry.file)
            skipped.append(Skipped(entry.file.key, Reason.DUPLICATE if is_copy else Reason.UID_TWICE))
            continue
        (image_entries if entry.facts.role is Role.IMAGE else label_entries).append(entry)
    places = _Places(image_entries)
    labels = []
    for entry in label_entries:
        if (study := places.study_of(entry.facts)) is None:
            is_report = entry.facts.kind is Kind.REPORT
            skipped.append(Skipped(entry.file.key, Reason.NOT_AN_IMAGE if is_report else Reason.NO_IMAGE))
        else:
            labels.append(_Entry(entry.file, replace(entry.facts, study=study)))
    return image_entries + labels, _once(skipped)


def _disputed(entries: list[_Entry]) -> set[str]:
    """Series that appear under several patients: nobody knows whose they are, or whether two are one person."""
    patients: dict[str, set[str]] = defaultdict(set)
    for entry in entries:
        patients[entry.facts.series].add(entry.facts.patient)
    return {series for series, of in patients.items() if len(of) > 1}


class _Places:
    """Where the images are, so that a label finds its own."""

    def __init__(self, image_entries: list[_Entry]) -> None:
        self._by_series = {(e.facts.patient, e.facts.series): e.facts.study for e in image_entries}
        self._studies = {e.facts.study for e in image_entries}

    def study_of(self, label: Facts) -> str | None:
        """The study a label belongs to: that of the series it names, else its own if there are images in it."""
        if label.reference is not None:
            return self._by_series.get((label.patient, label.reference))
        return label.study if label.study in self._studies else None


def _once(skipped: list[Skipped]) -> list[Skipped]:
    """One reason per file, the first; sorted by key."""
    first: dict[str, Skipped] = {}
    for one in skipped:
        first.setdefault(one.key, one)
    return [first[key] for key in sorted(first)]


def _no_image(source: Path, n_files: int, skipped: list[Skipped]) -> FederadError:
    looked = f"{n_files} files were looked at; left out: {counts(skipped)}" if n_files else "it is empty or not there"
    return FederadError(
        "C140",
        happened=f"The data folder {source} holds no usable image: {looked}.",
        because="A site without images cannot take part in a run.",
        remedies=(
            "check the path of the data folder, and that the account that runs the site may read it",
            "DICOM files may lie anywhere below it; NIfTI as <subject>/<name>.nii.gz; photographs in images/ and masks/,"
            " or in images/<label>/",
        ),
    )


def _connect(path: Path) -> sqlite3.Connection:
    """For reading only, so that a wrong path creates nothing."""
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)


def _write(path: Path, source: Path, secret_check: str, entries: list[_Entry], skipped: list[Skipped]) -> None:
    with closing(sqlite3.connect(path)) as db, db:
        db.executescript(
            f"PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA user_version = {VERSION}; {_TABLES}"
        )
        db.executemany(
            "INSERT INTO about VALUES (?, ?)",
            [("source", str(source.absolute())), ("secret_check", secret_check)],
        )
        for series, members in _by_series(entries).items():
            facts = members[0].facts
            db.execute("INSERT OR IGNORE INTO patients VALUES (?)", (facts.patient,))
            db.execute("INSERT OR IGNORE INTO studies VALUES (?, ?, ?)", (facts.study, facts.patient, facts.split))
            row = db.execute(
                "INSERT INTO series (study, key, name, kind, role, modality, scanner, reference)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (*series, facts.kind, facts.role, facts.modality, facts.scanner, facts.reference),
            )
            db.executemany(
                "INSERT INTO files VALUES (?, ?, ?, ?, ?, ?, ?)",
                [(row.lastrowid, *_file_row(member)) for member in members],
            )
        db.executemany("INSERT INTO skipped VALUES (?, ?)", [(s.key, s.reason) for s in skipped])


def _file_row(entry: _Entry) -> tuple[object, ...]:
    file, facts = entry.file, entry.facts
    return file.key, file.size, file.mtime_ns, facts.instance, facts.n_planes, facts.says_burned_in


def _by_series(entries: list[_Entry]) -> dict[tuple[str, str, str], list[_Entry]]:
    """Entries by (study, series, name), in sorted order."""
    grouped: dict[tuple[str, str, str], list[_Entry]] = defaultdict(list)
    for entry in entries:
        grouped[entry.facts.study, entry.facts.series, entry.facts.name].append(entry)
    return dict(sorted(grouped.items()))


_FILES = """
SELECT s.patient, r.study, r.key, r.name, r.kind, r.role, r.modality, r.scanner, r.reference, s.split,
       f.n_planes, f.burned_in, f.instance, f.key, f.size, f.mtime_ns
FROM files f JOIN series r ON f.series = r.id JOIN studies s ON r.study = s.key
ORDER BY s.patient, r.study, r.key, r.name, f.key
"""


def _stored(db: sqlite3.Connection) -> Iterator[_Entry]:
    for row in db.execute(_FILES):
        patient, study, key, name, kind, role, modality, scanner, reference, split, n_planes, burned_in, *rest = row
        instance, *file = rest
        yield _Entry(
            File(*file),
            Facts(
                patient=patient,
                study=study,
                series=key,
                instance=instance,
                name=name,
                kind=Kind(kind),
                role=Role(role),
                modality=modality,
                scanner=scanner,
                reference=reference,
                split=split,
                n_planes=n_planes,
                says_burned_in=bool(burned_in),
            ),
        )


def _studies(db: sqlite3.Connection) -> list[Study]:
    grouped: dict[tuple[str, str], list[_Entry]] = defaultdict(list)
    for entry in _stored(db):
        grouped[entry.facts.patient, entry.facts.study].append(entry)
    return [_study(key, patient, entries) for (patient, key), entries in sorted(grouped.items())]


def _study(key: str, patient: str, entries: list[_Entry]) -> Study:
    all_series = [(members[0].facts.role, _series(members)) for members in _by_series(entries).values()]
    pictures = _named(series for role, series in all_series if role is Role.IMAGE)
    said = [series for _, series in all_series if series.kind is Kind.REPORT]
    labels = [series for role, series in all_series if role is Role.LABEL and series not in said]
    return Study(
        key=key,
        patient=patient,
        images=pictures,
        label=_one_label(labels),
        split=entries[0].facts.split,
        scanner=next((s.scanner for s in pictures.values() if s.scanner), None),
        reports=tuple(file for series in said for file in series.files),
    )


def _series(members: list[_Entry]) -> Series:
    facts = members[0].facts
    return Series(
        key=facts.series,
        name=facts.name,
        kind=facts.kind,
        files=tuple(member.file for member in members),
        modality=facts.modality,
        scanner=facts.scanner,
        reference=facts.reference,
        n_planes=sum(member.facts.n_planes for member in members),
        says_burned_in=any(member.facts.says_burned_in for member in members),
    )


def _named(series: Iterable[Series]) -> dict[str, Series]:
    """Series by name, sorted; a second one of the same name becomes "name #2"."""
    by_name: dict[str, Series] = {}
    for one in sorted(series, key=lambda s: (s.name, s.key)):
        n = sum(other.name == one.name for other in by_name.values())
        by_name[one.name if n == 0 else f"{one.name} #{n + 1}"] = one
    return by_name


def _one_label(labels: list[Series]) -> Series | None:
    """The label series with all files that claim to be it; a photograph's field of view follows its mask."""
    claims = [label for label in labels if label.name != "fov"]
    if not claims:
        return None
    views = [label for label in labels if label.name == "fov" and label.kind is Kind.PICTURE]
    return replace(claims[0], files=tuple(file for label in (*claims, *views) for file in label.files))
