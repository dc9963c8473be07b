"""The courier: a Flower ``ClientApp`` that carries bytes to the station and back, and knows nothing.

It holds no data and decides nothing, so that whatever code reaches Flower's process can obtain only what the gate
releases. Flower forwards the text of exceptions to the server; none leaves here, since the station answers trouble with
a word of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from shared_models.parcel import pack, unpack


class Answering(Protocol):
    """A station, as far as the courier can see it."""

    def answer(self, data: bytes) -> bytes:
        """Answer a question."""


def make_client_app(station_for: Callable[[Context], Answering]) -> ClientApp:
    """A courier to the station that ``station_for`` finds for a node."""
    app = ClientApp()

    @app.query()
    def carry(message: Message, context: Context) -> Message:
        return Message(pack(station_for(context).answer(unpack(message))), reply_to=message)

    return app
