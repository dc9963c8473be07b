"""The station as a courier sees it: a socket that takes bytes and gives bytes.

Nothing here imports torch, reads an image or keeps more of a question or an answer than one chunk.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, Self

import grpc

from shared_models.errors import FederadError
from shared_models.wire import CHUNK_BYTES, error_in, stream, unary

SERVICE = "federad.Station"

BUSY = "C158"
"""Number with which a station ends a call that has enough questions waiting."""

CALL_S = 30.0
"""Longest wait for anything but an answer [s]."""

OPTIONS = (
    ("grpc.max_receive_message_length", 2 * CHUNK_BYTES),
    ("grpc.max_send_message_length", 2 * CHUNK_BYTES),
    ("grpc.enable_http_proxy", 0),
)
"""Small messages, both ways; the hospital's proxy is not for a socket on this machine."""

_LONGEST_ADDRESS = 100
"""A socket's path has at most 107 bytes (unix(7))."""


class StationAwayError(Exception):
    """Nobody answers at the socket, or the station went away in between."""


class StationBusyError(Exception):
    """The station has enough questions waiting."""


class StationStub:
    """A connection to the station behind a socket; close it, or use it in ``with``.

    Parameters
    ----------
    socket
        Path of the socket.
    """

    def __init__(self, socket: Path) -> None:
        self._address = Address(socket)
        self._channel = grpc.insecure_channel(self._address.target, options=OPTIONS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connection."""
        self._channel.close()
        self._address.close()

    def wait(self, seconds: float) -> None:
        """Until the station listens.

        Raises
        ------
        StationAwayError
            If it does not within ``seconds``.
        """
        try:
            grpc.channel_ready_future(self._channel).result(timeout=seconds)
        except grpc.FutureTimeoutError:
            raise StationAwayError from None

    def answer(self, question: Iterable[bytes]) -> Iterator[bytes]:
        """Ask, and give the answer piece by piece as it comes; that can take as long as training does.

        Parameters
        ----------
        question
            Pieces of at most :data:`~shared_models.wire.CHUNK_BYTES`, read once the station is ready for them. What it
            raises is raised here.

        Raises
        ------
        StationAwayError
            If the station goes away; ask again once it is back.
        StationBusyError
            If others are waiting already.
        """
        watched = _Watched(question)
        call = stream(self._channel, f"/{SERVICE}/Answer")(watched)
        try:
            if next(call, None) is None:
                raise StationAwayError
            watched.go.set()
            yield from call
        except grpc.RpcError as failure:
            if watched.error is not None:
                raise watched.error from None
            told = error_in(failure)
            raise (StationBusyError() if told and told.code == BUSY else told or StationAwayError()) from None
        finally:
            watched.over = True
            watched.go.set()
            call.cancel()

    def offer(self, plan: bytes) -> None:
        """Put a signed plan before the people of this site.

        Raises
        ------
        FederadError
            C159 if the station does not take it.
        StationAwayError
            If the station does not answer.
        """
        self._call("Offer", plan)

    def outbox(self, told: int = 0) -> tuple[int, list[dict[str, Any]]]:
        """What waits to be told to the operator, and the number of the last of it; up to ``told`` it has arrived."""
        reply = json.loads(self._call("Outbox", json.dumps({"told": told}).encode()))
        return int(reply["last"]), list(reply["notices"])

    def status(self) -> dict[str, Any]:
        """The site's name, its version, and what it is busy with."""
        status: dict[str, Any] = json.loads(self._call("Status", b"{}"))
        return status

    def _call(self, method: str, body: bytes) -> bytes:
        try:
            return bytes(unary(self._channel, f"/{SERVICE}/{method}")(body, timeout=CALL_S))
        except grpc.RpcError as failure:
            raise error_in(failure) or StationAwayError() from None


class Address:
    """What gRPC takes for a socket's path, however long that is.

    A path too long for the kernel is reached through the open folder, which has a short name in ``/proc``.
    """

    def __init__(self, socket: Path) -> None:
        path = socket.absolute()
        self._folder: int | None = None
        if len(os.fsencode(path)) > _LONGEST_ADDRESS:
            self._folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            path = Path(f"/proc/{os.getpid()}/fd/{self._folder}") / path.name
        self.target = f"unix:{path}"

    def close(self) -> None:
        """Let go of the folder."""
        if self._folder is not None:
            os.close(self._folder)
            self._folder = None


class _Watched:
    """The pieces of a question and an empty one: held back until the station is ready, with memory of what went wrong.

    gRPC reads them in a thread of its own, as early as it can, and drops the reason if that fails.
    """

    def __init__(self, parts: Iterable[bytes]) -> None:
        self._parts = chain(filter(None, parts), (b"",))
        self.go = threading.Event()
        self.over = False
        self.error: Exception | None = None

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        self.go.wait()
        if self.over:
            raise StopIteration
        try:
            return next(self._parts)
        except StopIteration:
            raise
        except Exception as error:
            self.error = error
            raise


def not_answering(socket: Path) -> FederadError:
    """C158, for whoever wanted something of the station."""
    return FederadError(
        "C158",
        happened=f"Nobody answers at {socket}.",
        because="The station holds the data and the plans; without it this site takes no part.",
        remedies=(
            "federad-site start",
            "if it is started, look at the end of station/logs/station.log for why it ended",
            "the account that asks must belong to the group of the socket: ls -l shows which",
        ),
    )
