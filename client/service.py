"""The station as a process: gRPC on a Unix socket, whose file permissions are its lock.

There is no network here. Whoever may open the socket (the courier's account, through the group of the folder ``run/``)
can ask questions and offer plans; what it gets is what passed the gate. Questions and answers are streams of chunks, so
that a courier never holds a model. One question at a time is read and worked on; others wait in the courier's hands.
Trouble in here ends a call with a word or a number, and its text stays in the station's log.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import socket as sockets
import stat
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, Self

import grpc

from client.processes import only_one, until_told
from client.stub import OPTIONS, SERVICE, Address
from shared_models.errors import FederadError
from shared_models.messages import Question
from shared_models.parcel import PARCEL_LIMIT
from shared_models.wire import chunks, joined, service, stream_handler, unary_handler

log = logging.getLogger(__name__)

LOCK = "process.lock"

MOST_WAITING = 8
"""Questions in work or waiting for it; more are turned away."""

TURN_POLL_S = 0.1
"""How often a waiting question looks whether its asker is still there [s]."""

TOLD = ("C158", "C159", "M213")
"""Numbers whose text may pass the socket: it says nothing that the courier does not know. All others stay inside."""


class Served(Protocol):
    """A station, as far as its socket can see it."""

    @property
    def name(self) -> str:
        """The site's name."""

    @property
    def is_broken(self) -> bool:
        """Whether only a new process can mend it."""

    @property
    def busy_with(self) -> Question | None:
        """The question being answered."""

    def answer(self, data: bytes) -> bytes:
        """Answer a question."""

    def offer(self, data: bytes) -> None:
        """Keep a plan to decide on."""

    def outbox(self, told: int) -> tuple[int, list[bytes]]:
        """What waits to be told."""


class StationServer:
    """A station behind its socket; start it in ``with``.

    Parameters
    ----------
    station
        Who answers.
    socket
        Where. The folder must be there; a dead socket in its place is replaced.
    on_broken
        Told when the station needs a new process.
    """

    def __init__(self, station: Served, socket: Path, *, on_broken: Callable[[], None] = lambda: None) -> None:
        self._station, self._socket, self._on_broken = station, socket, on_broken
        self._turn = threading.Lock()
        self._waiting = threading.BoundedSemaphore(MOST_WAITING)
        self._calls = ThreadPoolExecutor(MOST_WAITING + 4, thread_name_prefix="station")
        self._server = grpc.server(self._calls, options=OPTIONS)
        self._server.add_generic_rpc_handlers(
            [
                service(
                    SERVICE,
                    {
                        "Answer": stream_handler(self._answer),
                        "Offer": unary_handler(_as_json(self._offer)),
                        "Outbox": unary_handler(_as_json(self._outbox)),
                        "Status": unary_handler(_as_json(self._status)),
                    },
                )
            ]
        )

    def __enter__(self) -> Self:
        """Listen.

        Raises
        ------
        FederadError
            C157 if the socket cannot be made, or somebody listens there.
        """
        make_way(self._socket)
        address = Address(self._socket)
        before = os.umask(0o117)
        try:
            self._server.add_insecure_port(address.target)
        except RuntimeError:
            raise _no_socket(self._socket, "it cannot be made there") from None
        finally:
            os.umask(before)
            address.close()
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(grace=1.0).wait()
        self._calls.shutdown(wait=False, cancel_futures=True)
        self._socket.unlink(missing_ok=True)

    def _answer(self, question: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        """First an empty piece, when the question may come; then the pieces of the answer.

        The question ends with an empty piece.
        """
        with self._in_the_queue(), _discreet():
            while not self._turn.acquire(timeout=TURN_POLL_S):
                if not context.is_active():
                    return
            try:
                yield b""
                answer = self._station.answer(joined(_whole(question), PARCEL_LIMIT))
            finally:
                self._turn.release()
        if self._station.is_broken:
            self._on_broken()
        yield from chunks(answer)

    @contextmanager
    def _in_the_queue(self) -> Iterator[None]:
        if not self._waiting.acquire(blocking=False):
            raise FederadError(
                "C158",
                happened=f"{MOST_WAITING} questions wait for the station already.",
                because="It answers one at a time.",
                remedies=("ask again later",),
            )
        try:
            yield
        finally:
            self._waiting.release()

    def _offer(self, plan: bytes) -> dict[str, Any]:
        self._station.offer(plan)
        return {}

    def _outbox(self, request: bytes) -> dict[str, Any]:
        last, notices = self._station.outbox(int(json.loads(request)["told"]))
        return {"last": last, "notices": [json.loads(notice) for notice in notices]}

    def _status(self, _: bytes) -> dict[str, Any]:
        question = self._station.busy_with
        return {
            "site": self._station.name,
            "version": importlib.metadata.version("federad"),
            "busy": None if question is None else {"kind": question.kind, "round": question.round, "run": question.run},
        }


def _as_json(answer: Callable[[bytes], dict[str, Any]]) -> Callable[[bytes, grpc.ServicerContext], bytes]:
    def handle(request: bytes, _: grpc.ServicerContext) -> bytes:
        with _discreet():
            return json.dumps(answer(request)).encode()

    return handle


@contextmanager
def _discreet() -> Iterator[None]:
    """Keeps the words of trouble inside, but for those that may be told; ``wire`` sends no others than a FederadError's."""
    try:
        yield
    except FederadError as error:
        if error.code in TOLD:
            raise
        raise _StaysInsideError from error


def _whole(question: Iterator[bytes]) -> Iterator[bytes]:
    """The pieces up to the empty one. To gRPC, half a question from somebody who went away looks like a whole one."""
    for piece in question:
        if not piece:
            return
        yield piece
    raise _AskerGoneError


class _AskerGoneError(Exception):
    """Whoever asked went away in the middle of the question."""


class _StaysInsideError(Exception):
    """Trouble that the courier has no need to know of."""


def serve(folder: Path, socket: Path) -> None:
    """Be the station of ``folder`` until told to stop.

    Raises
    ------
    FederadError
        C146 if the folder holds no station, C156 if one runs there already, C157 if the socket cannot be used.
    """
    stopped = until_told()
    if not (folder / "site.toml").is_file():
        _require_site(folder)
    with only_one(folder / LOCK, "station"):
        from client.station import Station

        station = Station(folder)
        broken = threading.Event()
        with StationServer(station, socket, on_broken=broken.set):
            station.started()
            log.info("The station of %s listens at %s.", station.name, socket)
            threading.Thread(target=_imported, daemon=True).start()
            while not stopped.wait(0.2):
                if broken.is_set():
                    time.sleep(1.0)  # the refusal is on its way
                    log.error("The device was lost; a new process will look for it.")
                    break
            else:
                log.info("The station of %s was told to stop.", station.name)
    logging.shutdown()
    os._exit(3 if broken.is_set() else 0)  # a round in progress is given up, and asked for again


def _imported() -> None:
    """Import what the first question needs while nobody asks: tasks and accountants take seconds."""
    from client.accounting import filter_order
    from shared_models.registry import look_up
    from shared_models.tasks import TASKS

    try:
        for name in TASKS:
            look_up(TASKS, name)
        filter_order(1.0, 1e-5)
    except Exception:
        log.warning("Not all that questions may need can be imported; one that needs it fails.", exc_info=True)
    else:
        log.info("All that questions need is imported.")


def make_way(socket: Path) -> None:
    """Remove what a dead process left at a socket's place.

    Raises
    ------
    FederadError
        C157 if somebody listens there, or if it is something else than a socket.
    """
    try:
        mode = socket.lstat().st_mode
    except FileNotFoundError:
        if not socket.parent.is_dir():
            raise _no_socket(socket, "its folder is missing") from None
        return
    except OSError as error:
        raise _no_socket(socket, f"it cannot be looked at ({type(error).__name__})") from None
    if not stat.S_ISSOCK(mode):
        raise _no_socket(socket, "something else lies there")
    address = Address(socket)
    with sockets.socket(sockets.AF_UNIX) as probe:
        try:
            probe.connect(address.target.removeprefix("unix:"))
        except ConnectionRefusedError:
            socket.unlink(missing_ok=True)
            return
        except OSError as error:
            raise _no_socket(socket, f"it cannot be looked at ({type(error).__name__})") from None
        finally:
            address.close()
    raise _no_socket(socket, "another process listens there")


def _require_site(folder: Path) -> None:
    from client.site import SiteConfig

    SiteConfig.load(folder)


def _no_socket(socket: Path, why: str) -> FederadError:
    return FederadError(
        "C157",
        happened=f"The socket {socket} cannot be used: {why}.",
        because="The courier brings questions through it, and nobody else may.",
        remedies=(
            "federad-site status shows what is running, federad-site stop ends it",
            "check that the account of the station may write that folder",
            "move away what lies there if it is not a socket",
        ),
    )
