"""Predictions to the hospital's archive: C-STORE (DICOM PS3.4, annex B) or STOW-RS (PS3.18, 10.5).

Only objects that were just written are sent, only to the archive that ``site.toml`` names, and only when somebody asks for
it. It runs in the command that a person typed; the station itself has no network.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydicom import Dataset, dcmread

from client.archive_identity import calling, refused, web_client, web_session
from client.site import Pacs
from shared_models.errors import FederadError

logging.getLogger("pynetdicom").setLevel(logging.CRITICAL)  # what goes wrong is told by C126

TIMEOUT_S = 60.0
"""For connecting, and for each object [s]."""

WARNINGS = range(0xB000, 0xC000)
"""Statuses of an object that was stored, though not in every detail as it was sent (PS3.4, table B.2-1)."""


def deliver(files: Sequence[Path], pacs: Pacs) -> int:
    """Send DICOM objects; how many the archive has taken, which is all of them.

    Raises
    ------
    FederadError
        C126 if the archive cannot be reached or has not taken one of them, C129 to C131 if either side does not believe who
        the other is.
    """
    objects = [dcmread(file) for file in files]
    if pacs.dicomweb is not None:
        _stow(objects, pacs)
    elif objects:
        _store(objects, pacs)
    return len(objects)


def _store(objects: Sequence[Dataset], pacs: Pacs) -> None:
    from pynetdicom import AE
    from pynetdicom.presentation import build_context

    entity = AE(ae_title=pacs.calling_ae_title)
    entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = entity.connection_timeout = TIMEOUT_S
    kinds = sorted({(str(one.SOPClassUID), str(one.file_meta.TransferSyntaxUID)) for one in objects})
    contexts = [build_context(sop_class, syntax) for sop_class, syntax in kinds]
    tls = calling(pacs) if pacs.tls else None
    association = entity.associate(
        str(pacs.host),
        pacs.port,
        contexts,
        ae_title=pacs.ae_title,
        tls_args=(tls, str(pacs.host)) if tls is not None else None,
    )
    where = pacs.where
    kinds_refused = [str(one.abstract_syntax.name) for one in association.rejected_contexts if one.abstract_syntax]
    if not association.is_established:
        if tls is not None and (trouble := refused(pacs, tls.failure)):
            raise trouble
        if association.is_rejected:
            raise _not_sent(f"{where} refused to talk to {pacs.calling_ae_title}")
        if kinds_refused:
            raise _not_sent(f"{where} takes no objects of the kind {kinds_refused[0]}")
        raise _not_sent(f"{where} cannot be reached")
    try:
        for number, one in enumerate(objects, start=1):
            if one.SOPClassUID.name in kinds_refused:
                raise _not_sent(f"{where} takes no objects of the kind {one.SOPClassUID.name}")
            status = association.send_c_store(one).get("Status")
            if status != 0 and status not in WARNINGS:
                said = "did not answer" if status is None else f"answered with status 0x{status:04X}"
                raise _not_sent(f"{where} {said} to object {number} of {len(objects)}")
    finally:
        association.release()


def _stow(objects: Sequence[Dataset], pacs: Pacs) -> None:
    client = web_client(pacs, web_session(pacs))
    try:
        answer: Any = client.store_instances(list(objects))
    except Exception as error:  # whatever HTTP, TLS or the answer's form went wrong with
        said = refused(pacs, error) or _not_sent(f"{pacs.where} did not take the objects ({type(error).__name__})")
        raise said from None
    failed = len(answer.get("FailedSOPSequence") or [])
    if failed:
        raise _not_sent(f"{pacs.where} did not take {failed} of {len(objects)} objects")


def _not_sent(why: str) -> FederadError:
    return FederadError(
        "C126",
        happened=f"The prediction is written, but was not sent: {why}.",
        because="What is not in the archive is found by nobody there.",
        remedies=(
            "look at [pacs] in station/site.toml, with those who run the archive: it must know this site's title",
            "send the .dcm files of the prediction's folder by hand, or predict again into a new folder with --send",
        ),
    )
