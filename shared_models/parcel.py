"""One byte string inside a Flower message, or only its name: the place where Flower's records are spoken of.

The bytes lie in an ``Array``, which Flower sends as separate objects of a few megabytes each when they are many. Above
:data:`INLINE_LIMIT` they do not travel through Flower, whose database gives up on them, but as a parcel through the
consortium's own service; Flower's message then holds their :class:`Reference`. What goes wrong on the way at a site comes
back as one word of :data:`Trouble`, since Flower forwards the text of exceptions to the server.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict

from shared_models.errors import FederadError

STYPE = "federad.safetensors"

INLINE_LIMIT = 32 * 2**20
"""Most bytes that travel inside Flower's message."""

PARCEL_LIMIT = 8 * 2**30
"""Most bytes of one question or answer; a parcel that names more is refused before any of it is fetched."""

Trouble = Literal["unreadable", "bundle-refused", "station-away", "station-busy", "link-broken", "failed"]
"""Every reason a courier may give for bringing no answer: a closed list, as short as the station's own."""

CLIENT_APP_RAISED = 2
"""Flower's number for a ClientApp that did not end well (``flwr.common.constant.ErrorCode``)."""


@dataclass(frozen=True)
class Reference:
    """The name of bytes that lie in the consortium's depot."""

    sha256: str
    """64 hex digits."""

    n_bytes: int


def pack(data: bytes) -> RecordDict:
    """The content of a message that carries ``data``."""
    return RecordDict(
        {"parcel": ArrayRecord({"bytes": Array(dtype="uint8", shape=(len(data),), stype=STYPE, data=data)})}
    )


def pack_reference(reference: Reference) -> RecordDict:
    """The content of a message that names a parcel in the depot."""
    return RecordDict({"reference": ConfigRecord({"sha256": reference.sha256, "bytes": reference.n_bytes})})


def unpack(message: Message) -> bytes | Reference:
    """The bytes in a message, or the name of the parcel that has them.

    Raises
    ------
    FederadError
        M211 if the message holds something else.
    """
    content = message.content
    if content.keys() == {"reference"}:
        return _reference(content)
    try:
        array = content.array_records["parcel"]["bytes"]
    except (KeyError, ValueError):
        array = None
    if array is None or array.stype != STYPE:
        raise _nothing_of_ours("holds no parcel of federad's")
    return array.data


def pack_trouble(word: Trouble, message: Message) -> Message:
    """The reply to ``message`` that brings a word in place of an answer."""
    return Message(Error(CLIENT_APP_RAISED, word), reply_to=message)


def trouble_in(reply: Message) -> Trouble | None:
    """The word in a reply without an answer; None for a word or an error that is not on the list (Flower's own are not)."""
    words = {word: word for word in get_args(Trouble)}
    return words.get(reply.error.reason or "") if reply.has_error() else None


def _reference(content: RecordDict) -> Reference:
    try:
        fields = dict(content.config_records["reference"])
    except KeyError:
        fields = {}
    sha256, n_bytes = fields.get("sha256"), fields.get("bytes")
    if fields.keys() != {"sha256", "bytes"} or not isinstance(sha256, str) or not re.fullmatch("[0-9a-f]{64}", sha256):
        raise _nothing_of_ours("names no parcel of federad's")
    if not isinstance(n_bytes, int) or isinstance(n_bytes, bool) or not 0 < n_bytes <= PARCEL_LIMIT:
        raise _nothing_of_ours(f"names a parcel that has not between 1 and {PARCEL_LIMIT} bytes")
    return Reference(sha256, n_bytes)


def _nothing_of_ours(what: str) -> FederadError:
    return FederadError(
        "M211",
        happened=f"A Flower message {what}.",
        because="Nothing else is exchanged between server and sites.",
        remedies=("check that both sides run the same version of federad",),
    )
