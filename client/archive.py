"""The hospital's archive, asked: C-FIND with C-GET or C-MOVE (DICOM PS3.4, annex C), or QIDO-RS with WADO-RS (PS3.18, 10).

``retrieval`` decides what is asked for and keeps what comes; here is only how an archive is spoken to. What arrives is
handed on as bytes: no image is taken apart in the process that has the network.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from client.archive_identity import refused, web_client, web_session
from client.site import Pacs
from shared_models.errors import FederadError

for _name in ("pynetdicom", "pydicom", "dicomweb_client", "urllib3"):  # they quote queries and headers
    logging.getLogger(_name).setLevel(logging.CRITICAL + 1)

TIMEOUT_S = 60.0
"""For connecting, and for each answer to a query [s]."""

FETCH_S = 600.0
"""Between two signs of life while images are fetched: an archive may have to load them from tape [s]."""

MOST_ANSWERS = 100_000
"""Studies, series or objects that one query may find."""

PAGE = 1000
"""Answers to ask for at once."""

CHUNK = 1 << 20
"""How much is read at once [bytes]."""

MOST_AT_ONCE = 100
"""Objects that one request names."""

Uids = Mapping[str, str]
"""SOP Class UID by SOP Instance UID; empty where the archive does not say."""

Take = Callable[[str, Iterable[bytes]], None]
"""Keeps an object, by its SOP Instance UID and its bytes as a file; raises :class:`NotTakenError`."""


class Failure(StrEnum):
    """Why a study was not retrieved: a closed list, so that it can be counted without naming anybody."""

    UNREACHED = "the archive could not be reached"
    REFUSED = "the archive refused or reported a failure"
    UNKNOWN_HERE = "the archive does not know where this site listens"
    INCOMPLETE = "not all of its images came"
    BAD_UID = "a UID that is none"
    TOO_LARGE = "more bytes than allowed"
    NOT_ASKED = "other images came than were asked for"


class FetchError(Exception):
    """A study, or the rest of it, cannot be had."""

    def __init__(self, why: Failure) -> None:
        super().__init__(why.value)
        self.why = why


class NotTakenError(FetchError):
    """An object that came was not kept."""


@dataclass(frozen=True)
class Query:
    """Which studies are wanted; what is left out does not matter."""

    since: str | None = None
    """First study date, ``YYYYMMDD``."""
    until: str | None = None
    modality: str | None = None
    """One of the study's; the other series of such a study come too."""
    description: str | None = None
    """Study Description, with ``*`` and ``?``."""
    patients: tuple[str, ...] = ()
    accessions: tuple[str, ...] = ()

    def keys(self) -> Iterator[dict[str, str]]:
        """Matching attributes by keyword: one query for each patient and accession number."""
        dates = f"{self.since or ''}-{self.until or ''}" if self.since or self.until else ""
        fixed = {
            "StudyDate": dates,
            "ModalitiesInStudy": self.modality or "",
            "StudyDescription": self.description or "",
        }
        for patient in self.patients or ("",):
            for accession in self.accessions or ("",):
                yield fixed | {"PatientID": patient, "AccessionNumber": accession}


@dataclass(frozen=True)
class Found:
    """What an archive says about a study."""

    uid: str
    said: Mapping[str, tuple[str, ...]]
    """Values of the attributes that were asked about, by keyword."""


class Archive(Protocol):
    """An archive that can be asked."""

    def greet(self) -> None:
        """Ask whether it lets this site in; C118 or C129 to C131 if not."""

    def studies(self, query: Query) -> Iterator[Found]:
        """Studies that the archive finds; C118 if it cannot be asked."""

    def series(self, study: str) -> dict[str, str]:
        """Modality by Series Instance UID; :class:`FetchError` if it cannot be asked."""

    def objects(self, study: str, series: str) -> Uids:
        """What a series holds; :class:`FetchError` if it cannot be asked."""

    def fetch(self, study: str, series: str, wanted: Uids, take: Take, *, is_whole: bool) -> None:
        """Have objects of a series come, all of it where ``is_whole``; :class:`FetchError` if that fails."""


@contextmanager
def opened(pacs: Pacs, most_bytes: Callable[[], int]) -> Iterator[Archive]:
    """The archive that ``site.toml`` names; while it is open, and only then, a listener for C-MOVE waits for it.

    Parameters
    ----------
    most_bytes
        How large the next object may be [bytes].

    Raises
    ------
    FederadError
        C118, C122 or C129 if that cannot be.
    """
    if pacs.dicomweb is None:
        from client.archive_dimse import DimseArchive

        with DimseArchive(pacs, most_bytes) as archive:
            yield archive
    else:
        yield WebArchive(pacs)


def greet(pacs: Pacs) -> None:
    """Ask the archive whether it lets this site in: C-ECHO (PS3.4, annex A), or a search for one study.

    Raises
    ------
    FederadError
        C118 if it does not answer, C129 to C131 if either side does not believe who the other is.
    """
    with opened(pacs.model_copy(update={"listen_port": None}), lambda: 0) as archive:
        archive.greet()


def not_asked(why: str) -> FederadError:
    """C118."""
    return FederadError(
        "C118",
        happened=f"The archive cannot be asked: {why}.",
        because="Nobody knows which studies there are to retrieve.",
        remedies=(
            "look at [pacs] in station/site.toml, with those who run the archive: it must know this site's title, and let"
            " it search",
            "then run the same command again: what has come already is not fetched again",
        ),
    )


class WebArchive:
    """An archive with DICOMweb."""

    def __init__(self, pacs: Pacs) -> None:
        self._pacs = pacs
        self._address = str(pacs.dicomweb).rstrip("/")
        self._session = web_session(pacs)
        self._client = web_client(pacs, self._session)

    def greet(self) -> None:
        """One search for one study."""
        try:
            self._client.search_for_studies(limit=1)
        except Exception as error:
            raise self._no_answer(error) from None

    def _no_answer(self, error: BaseException) -> FederadError:
        return refused(self._pacs, error) or not_asked(f"{self._address} did not answer the search as DICOMweb says")

    def studies(self, query: Query) -> Iterator[Found]:
        """Studies found with QIDO-RS."""
        for keys in query.keys():  # noqa: SIM118  # a method of its own
            filters = {keyword: value for keyword, value in keys.items() if value}
            try:
                answers = self._all(self._client.search_for_studies, filters=filters, fields=list(keys))
            except FetchError as error:
                raise self._no_answer(error) from None
            for one in answers:
                yield Found(
                    _web_value(one, "StudyInstanceUID"), {keyword: _web_values(one, keyword) for keyword in keys}
                )

    def series(self, study: str) -> dict[str, str]:
        """Series found with QIDO-RS."""
        answers = self._all(self._client.search_for_series, study)
        return {_web_value(one, "SeriesInstanceUID"): _web_value(one, "Modality") for one in answers}

    def objects(self, study: str, series: str) -> Uids:
        """Objects found with QIDO-RS."""
        answers = self._all(self._client.search_for_instances, study, series)
        return {_web_value(one, "SOPInstanceUID"): _web_value(one, "SOPClassUID") for one in answers}

    def fetch(self, study: str, series: str, wanted: Uids, take: Take, *, is_whole: bool) -> None:
        """One object after the other with WADO-RS, in the syntax in which it is stored."""
        for instance in wanted:
            where = f"{self._address}/studies/{study}/series/{series}/instances/{instance}"
            wants = {"Accept": 'multipart/related; type="application/dicom"; transfer-syntax=*'}
            with _asked():
                answer: Any = self._session.get(
                    where, headers=wants, stream=True, timeout=(TIMEOUT_S, FETCH_S), allow_redirects=False
                )
            with answer:
                if answer.status_code != 200:
                    raise FetchError(Failure.REFUSED)
                try:
                    take(instance, only_part(_chunks(answer), str(answer.headers.get("Content-Type", ""))))
                except NotTakenError as error:
                    if error.why is not Failure.NOT_ASKED:
                        raise

    def _all(self, search: Any, *place: str, filters: dict[str, str] | None = None, fields: Any = None) -> list[Any]:
        """Answers to a search, page by page where the archive gives pages."""
        found: list[Any] = []
        with _asked():
            while len(found) < MOST_ANSWERS:
                page = search(*place, search_filters=filters or {}, fields=fields, limit=PAGE, offset=len(found))
                if page and page == found[-len(page) :]:  # it knows no pages, and has said all
                    return found
                found += page
                if len(page) < PAGE:
                    return found
        raise FetchError(Failure.REFUSED)


@contextmanager
def _asked() -> Iterator[None]:
    """Whatever HTTP, TLS or the answer's form went wrong with; the exception quotes the address with the query."""
    try:
        yield
    except FetchError:
        raise
    except Exception as error:
        is_away = isinstance(error, OSError) and getattr(error, "response", None) is None
        raise FetchError(Failure.UNREACHED if is_away else Failure.REFUSED) from None


def _chunks(answer: Any) -> Iterator[bytes]:
    with _asked():
        yield from answer.iter_content(CHUNK)


def only_part(chunks: Iterable[bytes], content_type: str) -> Iterator[bytes]:
    """The one part of a multipart message (RFC 2046, 5.1), or the message itself where it is none, as it comes.

    Raises
    ------
    FetchError
        If it is neither, or ends too early.
    """
    kind = content_type.split(";", maxsplit=1)[0].strip().lower()
    if kind == "application/dicom":
        yield from chunks
        return
    named = re.search(r'boundary="?([^";]{1,200})"?', content_type)
    if kind != "multipart/related" or named is None:
        raise FetchError(Failure.REFUSED)
    ends = b"\r\n--" + named[1].strip().encode()
    waiting, is_inside = b"\r\n", False
    for chunk in chunks:
        waiting += chunk
        if not is_inside:
            begins = waiting.find(b"\r\n\r\n", waiting.find(ends)) if ends in waiting else -1
            if begins < 0:
                if len(waiting) > CHUNK:
                    break
                continue
            waiting, is_inside = waiting[begins + 4 :], True
        if (at := waiting.find(ends)) >= 0:
            yield waiting[:at]
            return
        yield waiting[: -len(ends)]
        waiting = waiting[-len(ends) :]
    raise FetchError(Failure.INCOMPLETE)


def _web_values(answer: Any, keyword: str) -> tuple[str, ...]:
    """Values of an attribute in the DICOM JSON model (PS3.18, annex F)."""
    from pydicom.datadict import tag_for_keyword

    try:
        values = answer[f"{tag_for_keyword(keyword):08X}"].get("Value") or []
        return tuple(str(value).strip() for value in values if value is not None)
    except (KeyError, TypeError, AttributeError):
        return ()


def _web_value(answer: Any, keyword: str) -> str:
    values = _web_values(answer, keyword)
    return values[0] if values else ""


def batches(uids: Sequence[str]) -> Iterator[list[str]]:
    """As many as one request names."""
    for first in range(0, len(uids), MOST_AT_ONCE):
        yield list(uids[first : first + MOST_AT_ONCE])
