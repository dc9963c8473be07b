"""Studies from the hospital's archive into the site's own folder of images, when somebody asks for it.

::

    DATA/retrieved/STUDY/OBJECT.dcm         whole studies, under their UIDs
    DATA/retrieved/.federad-incoming/STUDY  what has come of a study so far; no catalogue looks into it

It runs in the command that a person typed; the station itself has no network. Only what was asked for is kept: an object
is written under a name made of a checked UID, looked at in the child process of ``reader``, and refused if it is not the
one that the archive listed. Patients who are excluded are not fetched. Messages hold counts alone.
"""

from __future__ import annotations

import os
import re
import shutil
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import date
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

from client.archive import Archive, Failure, FetchError, Found, NotTakenError, Query, opened
from client.data import dicom
from client.data.aliases import Aliases
from client.data.catalogue import INCOMING
from client.data.keys import key_of
from client.data.skips import UnusableError
from client.exclusions import left_out
from client.folder import SiteFolder, cannot
from client.processes import only_one
from client.site import Pacs, SiteConfig
from shared_models.errors import FederadError

FOLDER = "retrieved"
"""In the site's folder of images."""

OBJECT_BYTES = 2 * 2**30
"""Largest object that is taken [bytes]."""

SPARE_BYTES = 2**30
"""What stays free on the disk [bytes]."""

TRIES = 3
"""Studies in a row for which the archive is away before the rest is not tried."""

LEFT_THERE = frozenset({"SR", "PR", "KO", "DOC", "AU", "ECG", "HD"})
"""Modalities that are not fetched: reports, presentation states, recordings; nothing here reads them."""

OnProgress = Callable[[int, int], None]
"""Called with (series done, series in all)."""

_UID = re.compile(r"[0-9]+(\.[0-9]+)*")


@dataclass
class Retrieved:
    """What came, in counts."""

    folder: Path
    studies: int = 0
    """Studies that match, without those of excluded patients."""
    series: int = 0
    excluded: int = 0
    """Studies of patients who withdrew their consent: not fetched."""
    complete: int = 0
    """Studies that are here now, whole."""
    fetched: int = 0
    """Objects that came now."""
    there: int = 0
    """Objects that were here already."""
    refused: int = 0
    """Objects that came and were not kept."""
    n_bytes: int = 0
    failed: Counter[Failure] = field(default_factory=Counter)
    """Studies that are not here whole, by reason."""
    seconds: float = 0.0

    def told(self, *, dry_run: bool) -> str:
        """In a sentence."""
        found = f"{self.studies} studies with {self.series} series match."
        if self.excluded:
            found += f" {self.excluded} more are of patients who withdrew their consent, and stay where they are."
        if dry_run:
            return found + "".join(f" {n} could not be counted: {why}." for why, n in sorted(self.failed.items()))
        text = f"{found} {self.complete} are whole in {self.folder}: {self.fetched} objects came"
        return f"{text} ({self.n_bytes / 1e6:.1f} MB, {self.seconds:.0f} s), {self.there} were there."

    def trouble(self) -> FederadError:
        """C121."""
        n_failed = sum(self.failed.values())
        reasons = ", ".join(f"{why}: {n}" for why, n in sorted(self.failed.items()))
        return FederadError(
            "C121",
            happened=f"{n_failed} of {self.studies} studies were not retrieved ({reasons}); {self.complete} are here.",
            because="A study is put where training looks for it when all of it has come, and not before.",
            remedies=(
                "run the same command again: what has come already is not fetched again",
                "if a reason stays, show this message to those who run the archive",
            ),
        )

    def as_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "folder": str(self.folder),
            **{
                k: getattr(self, k)
                for k in ("studies", "series", "excluded", "complete", "fetched", "there", "refused")
            },
            "bytes": self.n_bytes,
            "failed": {why.value: n for why, n in sorted(self.failed.items())},
            "seconds": round(self.seconds, 1),
        }


def query(
    *,
    since: str | None = None,
    until: str | None = None,
    modality: str | None = None,
    description: str | None = None,
    patients: Sequence[str] = (),
    accessions: Sequence[str] = (),
) -> Query:
    """A query from what somebody typed.

    Raises
    ------
    FederadError
        C119 if it asks for nothing in particular, or a value is none of its kind; the message does not repeat it.
    """
    lists = {"patients": _names(patients, "patients"), "accessions": _names(accessions, "accessions")}
    first, last = _day(since, "--since"), _day(until, "--until")
    if first and last and first > last:
        raise _bad_query("--since is later than --until")
    if modality is not None and not re.fullmatch(r"[A-Z0-9]{2,16}", modality):
        raise _bad_query("--modality is none, such as MR or CT")
    if description is not None and not _is_text(description):
        raise _bad_query("--description is not 1 to 64 printable characters without a backslash")
    asked = Query(since=first, until=last, modality=modality, description=description, **lists)
    if asked == Query():
        raise _bad_query("it would ask for everything that the archive holds")
    return asked


def _day(text: str | None, option: str) -> str | None:
    if text is None:
        return None
    try:
        return date.fromisoformat(text).strftime("%Y%m%d")
    except ValueError:
        raise _bad_query(f"{option} is no date such as 2024-03-15") from None


def _is_text(text: str) -> bool:
    return 0 < len(text) <= 64 and text.isprintable() and "\\" not in text


def _names(lines: Sequence[str], what: str) -> tuple[str, ...]:
    """Identifiers, one each; a wildcard would ask for everybody."""
    names = tuple(dict.fromkeys(line.strip() for line in lines if line.strip()))
    wrong = sum(not _is_text(name) or "*" in name or "?" in name for name in names)
    if wrong:
        raise _bad_query(f"{wrong} lines of the list of {what} are no identifiers (64 characters, without \\, * and ?)")
    return names


def _bad_query(why: str) -> FederadError:
    return FederadError(
        "C119",
        happened=f"The archive was not asked: {why}.",
        because="Only studies that somebody has named are fetched.",
        remedies=(
            "give one or more of --since, --until, --modality, --description, --patients FILE, --accessions FILE",
            "with --dry-run the numbers of studies and series are shown, and nothing is fetched",
        ),
    )


def archive_of(site: SiteFolder) -> Pacs:
    """The archive that ``site.toml`` names; C163 if it names none."""
    pacs = SiteConfig.load(site.station).pacs
    if pacs is None:
        raise cannot(
            "site.toml names no archive.",
            "Nothing is fetched from or sent anywhere that this hospital has not named.",
            'write [pacs] with host = "..." and port, or dicomweb = "https://...", into station/site.toml',
        )
    return pacs


def retrieve(
    site: SiteFolder,
    asked: Query,
    *,
    dry_run: bool = False,
    most_bytes: int = 100 * 10**9,
    on_progress: OnProgress | None = None,
) -> Retrieved:
    """Fetch the studies that a query finds, as far as they are not here.

    Promise
        Interrupted and repeated, it goes on where it was: an object that is here whole is not fetched again. A study
        appears below ``retrieved/`` when all of it has come.

    Parameters
    ----------
    site
        The site's folder.
    asked
        Which studies.
    dry_run
        Only count studies and series.
    most_bytes
        After so much has come, no more is taken [bytes].
    on_progress
        Called after each series.

    Raises
    ------
    FederadError
        C118 if the archive cannot be asked, C120 if what comes cannot be written, C122 if nothing can listen for it, C127
        if nobody knows who is excluded, C129 to C131 if either side does not believe who the other is, C156 if another
        retrieval is going on, C163 if ``site.toml`` names no archive.
    """
    config, pacs = SiteConfig.load(site.station), archive_of(site)
    began = time.monotonic()
    with only_one(site.station / "retrieve.lock", "retrieval"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they quote header values
        work = _Retrieval(site, pacs, Path(config.data), most_bytes)
        work.run(asked, dry_run=dry_run, on_progress=on_progress or (lambda _done, _total: None))
    work.result.seconds = time.monotonic() - began
    return work.result


class _Retrieval:
    """One retrieval."""

    def __init__(self, site: SiteFolder, pacs: Pacs, data: Path, most_bytes: int) -> None:
        self.result = Retrieved(data / FOLDER)
        self._pacs = pacs
        self._kept = Kept(data / FOLDER, most_bytes)
        self._secret = (site.station / "secret").read_bytes()
        self._aliases = Aliases.of(data, self._secret)
        self._excluded = left_out(site.station, data, self._secret)

    def run(self, asked: Query, *, dry_run: bool, on_progress: OnProgress) -> None:
        if not dry_run:
            self._kept.make()
        pacs = (
            self._pacs.model_copy(update={"listen_port": None}) if dry_run else self._pacs
        )  # nothing comes, none listens
        with opened(pacs, self._kept.room) as archive:
            plan = self._plan(archive, asked)
            self.result.series = sum(map(len, plan.values()))
            if not dry_run:
                self._fetch_all(archive, plan, on_progress)
        self.result.fetched, self.result.n_bytes = self._kept.n_objects, self._kept.n_bytes
        self.result.refused = self._kept.n_refused

    def _plan(self, archive: Archive, asked: Query) -> dict[str, list[str]]:
        """Series to fetch, by study."""
        plan: dict[str, list[str]] = {}
        seen: set[str] = set()
        for found in list(archive.studies(asked)):
            if found.uid in seen or not _fits(found, asked):
                continue
            seen.add(found.uid)
            patient = "".join(found.said.get("PatientID", ())[:1])
            if self._aliases.patient(key_of(self._secret, patient)) in self._excluded:
                self.result.excluded += 1
                continue
            self.result.studies += 1
            try:
                series = archive.series(checked(found.uid))
                plan[found.uid] = [checked(uid) for uid, modality in series.items() if modality not in LEFT_THERE]
            except FetchError as error:
                self.result.failed[error.why] += 1
        return plan

    def _fetch_all(self, archive: Archive, plan: dict[str, list[str]], on_progress: OnProgress) -> None:
        n_away, n_done = 0, 0
        for study, series in sorted(plan.items()):
            try:
                if n_away >= TRIES:
                    raise FetchError(Failure.UNREACHED)
                if self._kept.room() == 0:
                    raise FetchError(Failure.TOO_LARGE)
                self._fetch(archive, study, series, partial(self._tell, on_progress, n_done))
                self.result.complete += 1
                n_away = 0
            except FetchError as error:
                self.result.failed[error.why] += 1
                n_away = n_away + 1 if error.why is Failure.UNREACHED else 0
            n_done += len(series)
            on_progress(n_done, self.result.series)

    def _tell(self, on_progress: OnProgress, n_before: int, n: int) -> None:
        on_progress(n_before + n, self.result.series)

    def _fetch(self, archive: Archive, study: str, series: list[str], on_series: Callable[[int], None]) -> None:
        """What is missing of a study; it is settled when nothing is."""
        lists = {one: archive.objects(study, one) for one in series}
        wanted = {checked(instance) for objects in lists.values() for instance in objects}
        here = self._kept.begin(study, wanted)
        self.result.there += len(here & wanted)
        failure: FetchError | None = None
        for number, (one, objects) in enumerate(lists.items(), start=1):
            missing = {instance: kind for instance, kind in objects.items() if instance not in here}
            if missing:
                try:
                    archive.fetch(study, one, missing, self._kept.take, is_whole=len(missing) == len(objects))
                except FetchError as error:
                    failure = error
            if self._kept.trouble is not None:
                raise self._kept.trouble
            if failure is not None and failure.why is Failure.UNREACHED:
                break
            on_series(number)
        if not self._kept.settle():
            raise failure or FetchError(self._kept.why or Failure.INCOMPLETE)


def checked(uid: str) -> str:
    """A UID that may be part of a file's name: digits and single points (PS3.5, 9.1; leading zeros are let pass).

    Raises
    ------
    FetchError
        If it is anything else.
    """
    if len(uid) > 64 or not _UID.fullmatch(uid):
        raise FetchError(Failure.BAD_UID)
    return uid


def _fits(found: Found, asked: Query) -> bool:
    """Whether an answer is one to the query, as far as it says: archives leave keys aside that they do not know."""
    said = {keyword: values for keyword, values in found.said.items() if any(values)}
    one = {keyword: values[0] for keyword, values in said.items()}
    if asked.patients and one.get("PatientID", "") not in asked.patients:
        return False
    if asked.accessions and one.get("AccessionNumber", "") not in asked.accessions:
        return False
    if not (asked.since or "") <= one.get("StudyDate", asked.since or "") <= (asked.until or "99999999"):
        return False
    if asked.modality and asked.modality not in said.get("ModalitiesInStudy", (asked.modality,)):
        return False
    text = one.get("StudyDescription")
    return not asked.description or text is None or fnmatchcase(text.lower(), asked.description.lower())


class Kept:
    """The folder of what came: takes the objects of one study at a time.

    Objects may come from several threads; one that is not wanted is refused, whoever sends it.

    Parameters
    ----------
    folder
        Where studies go.
    most_bytes
        After so much, nothing more is taken [bytes].
    """

    def __init__(self, folder: Path, most_bytes: int) -> None:
        self.n_objects = 0
        self.n_bytes = 0
        self.n_refused = 0
        self.why: Failure | None = None
        """Why the last object of this study was refused."""
        self.trouble: FederadError | None = None
        """C120, if something could not be written."""
        self._folder = folder
        self._most_bytes = most_bytes
        self._lock = threading.Lock()
        self._study = ""
        self._wanted: set[str] = set()

    def make(self) -> None:
        """Make the folder; C120 if that cannot be."""
        try:
            if not self._folder.parent.is_dir():
                raise FileNotFoundError(2, "the folder of images is not there")
            (self._folder / INCOMING).mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise self._not_written(error) from None

    def room(self) -> int:
        """How large the next object may be [bytes]."""
        return max(0, min(OBJECT_BYTES, self._most_bytes - self.n_bytes))

    def begin(self, study: str, wanted: set[str]) -> set[str]:
        """Take only these objects of this study from now on; those that are here already."""
        with self._lock:
            self._study, self.why = checked(study), None
            try:
                self._incoming.mkdir(mode=0o700, parents=True, exist_ok=True)
                for left in self._incoming.glob("*.part"):
                    left.unlink()
                here = {file.stem for place in (self._incoming, self._settled) for file in place.glob("*.dcm")}
            except OSError as error:
                raise self._not_written(error) from None
            self._wanted = wanted - here
            return here & wanted

    def take(self, instance: str, parts: Iterable[bytes]) -> None:
        """Keep one object if it is one that was asked for.

        Raises
        ------
        NotTakenError
            If it is not, is too large, or cannot be written; nothing of it is kept then.
        """
        with self._lock:
            try:
                self._take(instance, parts)
            except FetchError as error:
                self.n_refused += 1
                self.why = error.why
                raise NotTakenError(error.why) from None

    def _take(self, instance: str, parts: Iterable[bytes]) -> None:
        if instance not in self._wanted:
            raise FetchError(Failure.NOT_ASKED)
        part = self._incoming / f"{checked(instance)}.part"
        try:
            if shutil.disk_usage(self._incoming).free < SPARE_BYTES:
                raise OSError(28, f"less than {SPARE_BYTES / 2**30:g} GiB is free")
            with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600), "wb") as file:
                n_bytes = self._write(file, parts)
            if not self._is_asked_for(part, instance):
                raise FetchError(Failure.NOT_ASKED)
            part.rename(part.with_suffix(".dcm"))
        except OSError as error:
            self.trouble = self._not_written(error)
            raise FetchError(Failure.INCOMPLETE) from None
        finally:
            part.unlink(missing_ok=True)
        self._wanted.discard(instance)
        self.n_objects += 1
        self.n_bytes += n_bytes

    def _write(self, file: Any, parts: Iterable[bytes]) -> int:
        n_bytes, most = 0, self.room()
        for one in parts:
            n_bytes += len(one)
            if n_bytes > most:
                raise FetchError(Failure.TOO_LARGE)
            file.write(one)
        file.flush()
        os.fsync(file.fileno())  # what has its final name is whole, also after a power cut
        return n_bytes

    def _is_asked_for(self, part: Path, instance: str) -> bool:
        try:
            study, _, found = dicom.identity(part)
        except UnusableError:
            return False
        return (study, found) == (self._study, instance)

    def settle(self) -> bool:
        """Put the study where the catalogue finds it, if nothing of it is missing."""
        with self._lock:
            if self._wanted:
                return False
            try:
                if not self._settled.exists():
                    self._incoming.rename(self._settled)
                else:
                    for file in self._incoming.glob("*.dcm"):
                        file.rename(self._settled / file.name)
                    self._incoming.rmdir()
            except OSError as error:
                raise self._not_written(error) from None
            return True

    @property
    def _incoming(self) -> Path:
        return self._folder / INCOMING / self._study

    @property
    def _settled(self) -> Path:
        return self._folder / self._study

    def _not_written(self, error: OSError) -> FederadError:
        return FederadError(
            "C120",
            happened=f"What the archive sends cannot be written below {self._folder} ({error.strerror}).",
            because="Studies go into the site's own folder of images, under the account that reads it.",
            remedies=(
                f"make the folder for that account: sudo install -d -m 700 -o federad-data {self._folder}",
                "or free space on that disk, then run the same command again: what has come is kept",
            ),
        )
