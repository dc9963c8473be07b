"""One byte string inside a Flower message: the only place where Flower's records are spoken of.

The bytes lie in an ``Array``, which Flower sends as separate objects of a few megabytes each when they are many.
"""

from __future__ import annotations

from flwr.app import Array, ArrayRecord, Message, RecordDict

from shared_models.errors import FederadError

STYPE = "federad.safetensors"


def pack(data: bytes) -> RecordDict:
    """The content of a message that carries ``data``."""
    return RecordDict(
        {"parcel": ArrayRecord({"bytes": Array(dtype="uint8", shape=(len(data),), stype=STYPE, data=data)})}
    )


def unpack(message: Message) -> bytes:
    """The bytes in a message.

    Raises
    ------
    FederadError
        M211 if the message holds something else.
    """
    try:
        array = message.content.array_records["parcel"]["bytes"]
    except (KeyError, ValueError):
        array = None
    if array is None or array.stype != STYPE:
        raise FederadError(
            "M211",
            happened="A Flower message holds no parcel of federad's.",
            because="Nothing else is exchanged between server and sites.",
            remedies=("check that both sides run the same version of federad",),
        )
    return array.data
