"""The courier's hands: a Flower ``ClientApp`` that carries bytes to the station and back, and knows nothing.

It holds no data and decides nothing, so that whatever code reaches Flower's process can obtain only what the gate
releases. Flower starts a process for each message, so this one imports no torch; and it holds no model: what is too long
for Flower's message goes piece by piece between the consortium's depot and the station's socket. Flower forwards the text
of exceptions to the server; none leaves here, only a word from a closed list.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, Self

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from shared_models.errors import FederadError
from shared_models.parcel import INLINE_LIMIT, Reference, Trouble, pack, pack_reference, pack_trouble, unpack

log = logging.getLogger(__name__)

STATION_SOCKET = "station-socket"
"""Key of the node's configuration: where the station listens."""

COURIER_FOLDER = "courier-folder"
"""Key of the node's configuration: where the keys for the consortium's depot lie."""

PATIENCE_S = 60.0
"""How long to wait for a station that is starting [s]."""


class Answering(Protocol):
    """A station, as far as the courier can see it."""

    def answer(self, data: bytes) -> bytes:
        """Answer a question."""


class Depot(Protocol):
    """Where long parcels lie: the link to the consortium."""

    def __enter__(self) -> Self:
        """Open."""

    def __exit__(self, *_: Any) -> None:
        """Close."""

    def get_parcel(self, sha256: str, n_bytes: int) -> Iterator[bytes]:
        """Fetch a parcel in chunks, checked against its name."""

    def put_parcel(self, parts: Iterator[bytes]) -> object:
        """Leave a parcel; raises unless all of it arrived."""


class _TroubleError(Exception):
    """Something that ends in a word."""

    def __init__(self, word: Trouble) -> None:
        super().__init__(word)
        self.word = word


def make_client_app(station_for: Callable[[Context], Answering]) -> ClientApp:
    """A courier to the station that ``station_for`` finds for a node in this process, for messages that hold all bytes."""

    def answered(message: Message, context: Context) -> RecordDict:
        question = unpack(message)
        if isinstance(question, Reference):
            raise _TroubleError("unreadable")
        return pack(station_for(context).answer(question))

    return _courier(answered, logging.DEBUG)


def make_deployed_app(depot_for: Callable[[Path], Depot]) -> ClientApp:
    """A courier to the station behind the socket that the node's configuration names.

    Parameters
    ----------
    depot_for
        Opens the way to the depot from the courier's folder; called only for what is too long for Flower.
    """

    def answered(message: Message, context: Context) -> RecordDict:
        from client.stub import StationAwayError, StationBusyError, StationStub

        folder = Path(str(context.node_config[COURIER_FOLDER]))
        try:
            question = unpack(message)
        except FederadError:
            raise _TroubleError("unreadable") from None
        try:
            with StationStub(Path(str(context.node_config[STATION_SOCKET]))) as station:
                station.wait(PATIENCE_S)
                return _carried(station.answer(_pieces(question, folder, depot_for)), folder, depot_for)
        except StationAwayError:
            raise _TroubleError("station-away") from None
        except StationBusyError:
            raise _TroubleError("station-busy") from None

    return _courier(answered, logging.WARNING)


def _courier(answered: Callable[[Message, Context], RecordDict], level: int) -> ClientApp:
    """A ``ClientApp`` that lets no exception out; their text goes to this process's log at ``level``."""
    app = ClientApp()

    @app.query()
    def carry(message: Message, context: Context) -> Message:
        try:
            return Message(answered(message, context), reply_to=message)
        except _TroubleError as trouble:
            log.log(level, "No answer was brought: %s.", trouble.word, exc_info=trouble.__cause__)
            return pack_trouble(trouble.word, message)
        except Exception:
            log.log(level, "No answer was brought.", exc_info=True)
            return pack_trouble("failed", message)

    return app


def _pieces(question: bytes | Reference, folder: Path, depot_for: Callable[[Path], Depot]) -> Iterator[bytes]:
    """A question in chunks, from the message or from the depot."""
    from shared_models.wire import chunks

    if isinstance(question, bytes):
        yield from chunks(question)
        return
    with _link_trouble(), depot_for(folder) as depot:
        yield from depot.get_parcel(question.sha256, question.n_bytes)


def _carried(answer: Iterator[bytes], folder: Path, depot_for: Callable[[Path], Depot]) -> RecordDict:
    """An answer as the content of a message: all of it, or its name once it lies in the depot."""
    begun: list[bytes] = []
    n_begun = 0
    for piece in answer:
        begun.append(piece)
        n_begun += len(piece)
        if n_begun > INLINE_LIMIT:
            break
    else:
        return pack(b"".join(begun))
    digest, n_bytes = hashlib.sha256(), 0

    def counted() -> Iterator[bytes]:
        nonlocal n_bytes
        begun.reverse()
        for piece in chain((begun.pop() for _ in range(len(begun))), answer):
            digest.update(piece)
            n_bytes += len(piece)
            yield piece

    with _link_trouble(), depot_for(folder) as depot:
        depot.put_parcel(counted())
    return pack_reference(Reference(digest.hexdigest(), n_bytes))


@contextmanager
def _link_trouble() -> Iterator[None]:
    """What the consortium's link raises becomes a word; what the station's socket raises stays what it is."""
    try:
        yield
    except FederadError as error:
        raise _TroubleError("link-broken") from error


def _link(folder: Path) -> Depot:
    from client.link import Link

    return Link.open(folder)


app = make_deployed_app(_link)
"""What a SuperNode runs."""
