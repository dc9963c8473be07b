"""The consortium's gRPC service: what sites ask the operator outside of Flower's rounds.

It listens on a Unix socket that only the operator's user can open. The front (nginx) ends TLS, checks the site's
certificate against the consortium's authority, and says in two metadata what it found, over whatever the caller put
there::

    x-client-verify    "SUCCESS" if the caller holds the key of a certificate of this authority
    x-client-serial    its serial number in hex

Whether that certificate still counts is asked of the store at each call. ``Enrol`` alone is open to callers without one.
"""

from __future__ import annotations

import fcntl
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Self

import grpc

from server.consortium import Consortium
from server.registry import FOLDER, Registry
from shared_models.consortium import (
    PACKAGE,
    PROTOCOL,
    PROTOCOL_METADATA,
    TIME_METADATA,
    Document,
    EnrolRequest,
    Notices,
    ParcelName,
    ParcelStored,
    Plans,
    Releases,
    RenewRequest,
)
from shared_models.errors import FederadError
from shared_models.wire import service, stream_handler, unary_handler

log = logging.getLogger(__name__)

VERIFY_METADATA = "x-client-verify"
SERIAL_METADATA = "x-client-serial"

SOCKET = Path("run") / "consortium.sock"
"""Where the service listens, below the operator's folder."""

MAX_CALLS = 64
"""Calls answered at the same time; a transfer of weights is one."""

_MAX_SOCKET_PATH = 107
"""Longest path of a Unix socket that Linux takes [bytes]."""

Ask = Callable[[str, bytes], Document]
"""Answers a site's message."""

Transfer = Callable[[str, Iterator[bytes]], Iterable[bytes]]
"""Answers a site's stream with one."""


class ConsortiumService:
    """The methods of ``federad.Consortium``, each for a site that was admitted."""

    def __init__(self, consortium: Consortium) -> None:
        self._consortium = consortium

    def handler(self) -> grpc.GenericRpcHandler:
        """For ``grpc.Server.add_generic_rpc_handlers``."""
        return service(
            PACKAGE,
            {
                "Enrol": unary_handler(self._enrol),
                "Renew": self._unary(self._renew),
                "Plans": self._unary(self._plans),
                "Tell": self._unary(self._tell),
                "Releases": self._unary(self._releases),
                "PutParcel": self._stream(self._put_parcel),
                "GetParcel": self._stream(self._get_parcel),
                "GetRelease": self._stream(self._get_release),
            },
        )

    def _enrol(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        _greet(context)
        enrolment = EnrolRequest.decode(request)
        try:
            reply = self._consortium.enrol(enrolment)
        except FederadError as error:
            log.warning("%s did not enrol: %s", enrolment.site, error.happened)
            raise
        log.info("%s has enrolled", enrolment.site)
        return reply.encode()

    def _renew(self, site: str, request: bytes) -> Document:
        return self._consortium.renew(site, RenewRequest.decode(request))

    def _plans(self, site: str, request: bytes) -> Document:
        return Plans(plans=tuple(self._consortium.offered()))

    def _tell(self, site: str, request: bytes) -> Document:
        self._consortium.tell(site, Notices.decode(request).notices)
        return Document()

    def _releases(self, site: str, request: bytes) -> Document:
        return Releases(releases=tuple(release.signed for release in self._registry.list()))

    def _put_parcel(self, site: str, parts: Iterator[bytes]) -> Iterable[bytes]:
        sha256 = self._consortium.depot.put(parts)
        yield ParcelStored(sha256=sha256, n_bytes=self._consortium.depot.n_bytes(sha256)).encode()

    def _get_parcel(self, site: str, parts: Iterator[bytes]) -> Iterable[bytes]:
        return self._consortium.depot.get(ParcelName.decode(next(parts, b"")).sha256)

    def _get_release(self, site: str, parts: Iterator[bytes]) -> Iterable[bytes]:
        return self._registry.read(ParcelName.decode(next(parts, b"")).sha256)

    @cached_property
    def _registry(self) -> Registry:
        return Registry(self._consortium.folder / FOLDER)

    def _unary(self, ask: Ask) -> grpc.RpcMethodHandler:
        return unary_handler(lambda request, context: ask(self._admitted(context), request).encode())

    def _stream(self, transfer: Transfer) -> grpc.RpcMethodHandler:
        return stream_handler(lambda parts, context: transfer(self._admitted(context), parts))

    def _admitted(self, context: grpc.ServicerContext) -> str:
        """The site that calls; C154 if it is none that may."""
        metadata = _greet(context)
        if metadata.get(VERIFY_METADATA) != "SUCCESS":
            raise _no_certificate()
        return self._consortium.admit(metadata.get(SERIAL_METADATA, ""))


class Serving:
    """The service, listening until it is stopped.

    Parameters
    ----------
    consortium
        Whose service it is.
    socket
        Where it listens; ``run/consortium.sock`` below the consortium's folder unless given.

    Raises
    ------
    FederadError
        S189 if another process listens there already, or the path is too long for a socket.
    """

    def __init__(self, consortium: Consortium, socket: Path | None = None) -> None:
        self.socket = (socket or consortium.folder / SOCKET).absolute()
        if len(bytes(self.socket)) > _MAX_SOCKET_PATH:
            raise _cannot_start(
                f"the path of its socket has {len(bytes(self.socket))} bytes, {_MAX_SOCKET_PATH} are possible",
                "put the operator's folder where its path is shorter",
            )
        self.socket.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock = self.socket.with_suffix(".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise _cannot_start("it runs already", "stop the other one first: federad-server stop") from None
        self._server = grpc.server(ThreadPoolExecutor(MAX_CALLS), maximum_concurrent_rpcs=MAX_CALLS)
        self._server.add_generic_rpc_handlers((ConsortiumService(consortium).handler(),))
        try:
            self._server.add_insecure_port(f"unix:{self.socket}")  # without TLS: the front ends it, on this machine
        except RuntimeError:
            self._lock.close()
            raise _cannot_start(
                f"{self.socket} cannot be opened", "check that the operator's user may write there"
            ) from None
        self.socket.chmod(0o600)
        self._server.start()

    def wait(self, timeout_s: float | None = None) -> None:
        """Until it is stopped, or so long."""
        self._server.wait_for_termination(timeout_s)

    def stop(self, grace_s: float = 5.0) -> None:
        """Take no more calls, and end those that are still going on after ``grace_s``."""
        self._server.stop(grace_s).wait()
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def _greet(context: grpc.ServicerContext) -> dict[str, str]:
    """Tell the caller the time here, and give its metadata; M211 if it speaks another version."""
    context.send_initial_metadata(((TIME_METADATA, f"{time.time():.3f}"),))
    metadata = {key: value for key, value in context.invocation_metadata() if isinstance(value, str)}
    theirs = metadata.get(PROTOCOL_METADATA, "")
    if theirs != str(PROTOCOL):
        raise FederadError(
            "M211",
            happened=f"The site speaks version {theirs[:20]!a} of federad's messages, the consortium version '{PROTOCOL}'.",
            because="One would misread the other.",
            remedies=("install the same version of federad at both; the operator says which",),
        )
    return metadata


def _no_certificate() -> FederadError:
    return FederadError(
        "C154",
        happened="The consortium did not let this site in: it showed no certificate of this consortium.",
        because="Only enrolled sites are told of plans and may send anything.",
        remedies=("enrol first: federad-site enrol INVITATION --data DIR",),
    )


def _cannot_start(why: str, remedy: str) -> FederadError:
    return FederadError(
        "S189",
        happened=f"The consortium service cannot start: {why}.",
        because="Without it no site can enrol, hear of a plan or send long parcels.",
        remedies=(remedy,),
    )
