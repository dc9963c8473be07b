"""An archive with DICOM's own services: C-FIND, then C-GET over the same connection, or C-MOVE to a listener of ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Self

from pydicom import Dataset, uid
from pydicom.uid import UID
from pynetdicom import AE, AllStoragePresentationContexts, build_context, build_role, evt
from pynetdicom.sop_class import (
    StudyRootQueryRetrieveInformationModelFind,
    StudyRootQueryRetrieveInformationModelGet,
    StudyRootQueryRetrieveInformationModelMove,
    Verification,
)

from client.archive import (
    FETCH_S,
    MOST_ANSWERS,
    TIMEOUT_S,
    Failure,
    FetchError,
    Found,
    NotTakenError,
    Query,
    Take,
    Uids,
    batches,
    not_asked,
)
from client.archive_identity import calling, listening, refused
from client.site import Pacs
from shared_models.errors import FederadError

SYNTAXES = (
    *(uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian, uid.DeflatedExplicitVRLittleEndian, uid.RLELossless),
    *(uid.JPEGLosslessSV1, uid.JPEGLossless, uid.JPEGLSLossless, uid.JPEGLSNearLossless, uid.JPEG2000Lossless),
    *(uid.JPEG2000, uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit, uid.HTJ2KLossless, uid.HTJ2KLosslessRPCL, uid.HTJ2K),
    uid.ExplicitVRBigEndian,
)
"""Transfer syntaxes that this site reads; an archive sends each object in the one in which it holds it."""

MOST_CONTEXTS = 126
"""Presentation contexts that one association may have, but for those of queries (PS3.8, 9.3.2.2)."""

PENDING = (0xFF00, 0xFF01)
DESTINATION_UNKNOWN = 0xA801
NOT_WANTED = 0x0124
"""Refused: not authorised (PS3.7, C.5.20)."""
OUT_OF_RESOURCES = 0xA700


class DimseArchive:
    """An archive with C-FIND; a context manager, since it may listen.

    Parameters
    ----------
    pacs
        Where it is; with ``listen_port`` objects come by C-MOVE, else by C-GET.
    most_bytes
        How large the next object may be [bytes].
    """

    def __init__(self, pacs: Pacs, most_bytes: Callable[[], int]) -> None:
        self._pacs = pacs
        self._most_bytes = most_bytes
        self._where = pacs.where
        self._tls = calling(pacs) if pacs.tls else None
        self._take: Take | None = None
        self._failure: FetchError | None = None
        self._received: dict[int, int] = {}
        self._listener: Any = None

    def __enter__(self) -> Self:
        if self._pacs.listen_port is None:
            return self
        entity = self._entity(FETCH_S)
        entity.require_calling_aet = [self._pacs.ae_title]
        entity.require_called_aet = True
        entity.supported_contexts = [
            build_context(one.abstract_syntax or "", list(SYNTAXES)) for one in AllStoragePresentationContexts
        ]
        try:
            self._listener = entity.start_server(
                ("", self._pacs.listen_port),
                block=False,
                ssl_context=listening(self._pacs),
                evt_handlers=self._handlers(),
            )
        except OSError as error:
            raise FederadError(
                "C122",
                happened=f"Nothing can listen on port {self._pacs.listen_port} for the archive ({error.strerror}).",
                because="With C-MOVE an archive opens a connection to this site, while a retrieval runs.",
                remedies=(
                    "give another listen_port under [pacs] in station/site.toml, above 1023, and tell the archive",
                    "or leave listen_port out, if the archive can answer over the same connection (C-GET)",
                ),
            ) from None
        return self

    def __exit__(self, *_: object) -> None:
        if self._listener is not None:
            self._listener.shutdown()

    def greet(self) -> None:
        """C-ECHO."""
        try:
            with self._association([build_context(Verification)], TIMEOUT_S) as association:
                if association.send_c_echo().get("Status") != 0:
                    raise FetchError(Failure.REFUSED)
        except FetchError as error:
            raise self._no_answer(error) from None

    def _no_answer(self, error: FetchError) -> FederadError:
        away = error.why is Failure.UNREACHED
        refusal = f"refused {self._pacs.calling_ae_title} or what it asked"
        return not_asked(f"{self._where} {'cannot be reached or did not answer' if away else refusal}")

    def studies(self, query: Query) -> Iterator[Found]:
        """Studies found with C-FIND."""
        try:
            with self._to_find() as find:
                for keys in query.keys():  # noqa: SIM118  # a method of its own
                    for one in find("STUDY", {**keys, "StudyInstanceUID": ""}):
                        said = {keyword: _values(one, keyword) for keyword in keys}
                        yield Found(_value(one, "StudyInstanceUID"), said)
        except FetchError as error:
            raise self._no_answer(error) from None

    def series(self, study: str) -> dict[str, str]:
        """Series found with C-FIND."""
        with self._to_find() as find:
            answers = find("SERIES", {"StudyInstanceUID": study, "SeriesInstanceUID": "", "Modality": ""})
        return {_value(one, "SeriesInstanceUID"): _value(one, "Modality") for one in answers}

    def objects(self, study: str, series: str) -> Uids:
        """Objects found with C-FIND."""
        asked = {"StudyInstanceUID": study, "SeriesInstanceUID": series, "SOPInstanceUID": "", "SOPClassUID": ""}
        with self._to_find() as find:
            answers = find("IMAGE", asked)
        return {_value(one, "SOPInstanceUID"): _value(one, "SOPClassUID") for one in answers}

    def fetch(self, study: str, series: str, wanted: Uids, take: Take, *, is_whole: bool) -> None:
        """A series at once, or the objects that are missing of one."""
        self._take, self._failure = take, None
        lists: list[list[str]] = [[]] if is_whole else list(batches(list(wanted)))
        try:
            for instances in lists:
                asked = Dataset()
                asked.QueryRetrieveLevel = "IMAGE" if instances else "SERIES"
                asked.StudyInstanceUID, asked.SeriesInstanceUID = study, series
                if instances:
                    asked.SOPInstanceUID = instances
                if self._listener is None:
                    self._get(asked, wanted)
                else:
                    self._move(asked)
                if self._failure is not None:
                    raise self._failure
        finally:
            self._take = None

    def _get(self, asked: Dataset, wanted: Mapping[str, str]) -> None:
        classes = sorted({one for one in wanted.values() if UID(one).is_valid})
        classes = classes or [str(one.abstract_syntax) for one in AllStoragePresentationContexts]
        each = [[syntax] for syntax in SYNTAXES]  # one for each, so that nothing has to be converted
        if len(classes) * len(each) > MOST_CONTEXTS:
            each = [list(SYNTAXES)]
        contexts = [build_context(one, syntaxes) for one in classes[:MOST_CONTEXTS] for syntaxes in each]
        roles = [build_role(one, scp_role=True) for one in classes[:MOST_CONTEXTS]]
        model = StudyRootQueryRetrieveInformationModelGet
        with self._association([build_context(model), *contexts], FETCH_S, roles) as association:
            self._wait_for(lambda: association.send_c_get(asked, model))

    def _move(self, asked: Dataset) -> None:
        model = StudyRootQueryRetrieveInformationModelMove
        with self._association([build_context(model)], FETCH_S) as association:
            self._wait_for(lambda: association.send_c_move(asked, self._pacs.calling_ae_title, model))

    def _wait_for(self, request: Callable[[], Iterator[tuple[Dataset, Dataset | None]]]) -> None:
        """Until the archive says that it has sent all."""
        try:
            for said, _ in request():
                status = said.get("Status")
                if status is None:
                    raise self._failure or FetchError(Failure.UNREACHED)
                if status == DESTINATION_UNKNOWN:
                    raise FetchError(Failure.UNKNOWN_HERE)
                if status not in (0x0000, 0xB000, *PENDING):  # 0xB000: something was not sent; it will be missed
                    raise self._failure or FetchError(Failure.REFUSED)
        except (ValueError, RuntimeError):
            raise self._failure or FetchError(Failure.REFUSED) from None

    @contextmanager
    def _to_find(self) -> Iterator[Callable[[str, Mapping[str, str]], list[Dataset]]]:
        model = StudyRootQueryRetrieveInformationModelFind
        with self._association([build_context(model)], TIMEOUT_S) as association:

            def find(level: str, keys: Mapping[str, str]) -> list[Dataset]:
                asked = Dataset()
                asked.SpecificCharacterSet = "ISO_IR 192"
                asked.QueryRetrieveLevel = level
                for keyword, value in keys.items():
                    setattr(asked, keyword, value)
                found: list[Dataset] = []
                try:
                    for said, one in association.send_c_find(asked, model):
                        status = said.get("Status")
                        if status not in (0x0000, *PENDING) or len(found) > MOST_ANSWERS:
                            raise FetchError(Failure.UNREACHED if status is None else Failure.REFUSED)
                        if status in PENDING and one is not None:
                            found.append(one)
                except (ValueError, RuntimeError):
                    raise FetchError(Failure.REFUSED) from None
                return found

            yield find

    @contextmanager
    def _association(self, contexts: list[Any], timeout_s: float, roles: list[Any] | None = None) -> Iterator[Any]:
        if self._tls is not None:
            self._tls.failure = None
        association = self._entity(timeout_s).associate(
            str(self._pacs.host),
            self._pacs.port,
            contexts,
            ae_title=self._pacs.ae_title,
            ext_neg=roles,
            evt_handlers=self._handlers() if roles else None,
            tls_args=(self._tls, str(self._pacs.host)) if self._tls is not None else None,
        )
        if not association.is_established:
            if self._tls is not None and (trouble := refused(self._pacs, self._tls.failure)):
                raise trouble
            raise FetchError(Failure.REFUSED if association.is_rejected else Failure.UNREACHED)
        try:
            yield association
        finally:
            if association.is_established:
                association.release()

    def _entity(self, timeout_s: float) -> AE:
        entity = AE(ae_title=self._pacs.calling_ae_title)
        entity.acse_timeout = entity.connection_timeout = TIMEOUT_S
        entity.dimse_timeout = entity.network_timeout = timeout_s
        entity.maximum_pdu_size = 2**17
        return entity

    def _handlers(self) -> list[Any]:
        return [(evt.EVT_DATA_RECV, self._on_bytes), (evt.EVT_C_STORE, self._on_object)]

    def _on_bytes(self, event: evt.Event) -> None:
        """Hang up before an object becomes larger than what is taken; it would lie in memory until it is whole."""
        who = id(event.assoc)
        self._received[who] = self._received.get(who, 0) + len(event.data)
        if self._received[who] > self._most_bytes() + 2**20:
            self._failure = FetchError(Failure.TOO_LARGE)
            event.assoc.abort()

    def _on_object(self, event: evt.Event) -> int:
        self._received.pop(id(event.assoc), None)
        take = self._take
        if take is None:
            return NOT_WANTED
        try:
            take(str(event.request.AffectedSOPInstanceUID), [event.encoded_dataset()])
        except NotTakenError as error:
            return OUT_OF_RESOURCES if error.why in (Failure.TOO_LARGE, Failure.INCOMPLETE) else NOT_WANTED
        return 0x0000


def _values(answer: Dataset, keyword: str) -> tuple[str, ...]:
    with suppress(Exception):  # whatever an archive writes there is no value then
        value = answer.get(keyword)
        if value is None or value == "":
            return ()
        several = value if not isinstance(value, str) and hasattr(value, "__iter__") else [value]
        return tuple(str(one).strip().strip("\0") for one in several)
    return ()


def _value(answer: Dataset, keyword: str) -> str:
    values = _values(answer, keyword)
    return values[0] if values else ""
