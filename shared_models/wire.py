"""How bytes travel over gRPC: unary calls of JSON, streams of chunks, and errors that keep their number.

Both services of federad (the consortium's, and the station's on its socket) are generic: no generated code, bytes in and
bytes out. What the bytes mean stands in ``consortium`` and ``messages``. A :class:`FederadError` raised behind a call
arrives at the caller as the same error.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from shared_models.errors import TITLES, FederadError

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # it is read once, and what gRPC would print we say better

import grpc

log = logging.getLogger(__name__)

Failure = grpc.RpcError
"""What a call raises at the caller's end."""

CHUNK_BYTES = 1 << 20
"""Longest piece of a stream [bytes]; Flower's and gRPC's own limits are above it."""

Unary = Callable[[bytes, grpc.ServicerContext], bytes]
"""Answers one message with one."""

Stream = Callable[[Iterator[bytes], grpc.ServicerContext], Iterable[bytes]]
"""Answers a stream of chunks with one; a single message is a stream of one."""


def chunks(data: bytes | memoryview) -> Iterator[bytes]:
    """``data`` in pieces of at most :data:`CHUNK_BYTES`; one empty piece for no data."""
    view = memoryview(data).cast("B")
    for start in range(0, max(len(view), 1), CHUNK_BYTES):
        yield bytes(view[start : start + CHUNK_BYTES])


def joined(parts: Iterable[bytes], limit: int) -> bytes:
    """All pieces as one, or nothing.

    Raises
    ------
    FederadError
        M213 as soon as they are more than ``limit`` bytes together.
    """
    return b"".join(bounded(parts, limit))


def bounded(parts: Iterable[bytes], limit: int) -> Iterator[bytes]:
    """The same pieces one by one; M213 as soon as they are more than ``limit`` bytes together."""
    n_bytes = 0
    for part in parts:
        n_bytes += len(part)
        if n_bytes > limit:
            raise FederadError(
                "M213",
                happened=f"A transfer was stopped after {limit} bytes, the most that is taken here.",
                because="Without a limit one sender could fill the memory or the disk of the receiver.",
                remedies=(
                    "check that both sides run the same version of federad",
                    "use a network with fewer parameters",
                ),
            )
        yield part


def unary_handler(answer: Unary) -> grpc.RpcMethodHandler:
    """A method of one message each way."""

    def handle(request: bytes, context: grpc.ServicerContext) -> bytes:
        try:
            return answer(request, context)
        except Exception as error:
            _end(context, error)
            raise

    return grpc.unary_unary_rpc_method_handler(handle)


def stream_handler(answer: Stream) -> grpc.RpcMethodHandler:
    """A method of chunks in both directions."""

    def handle(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        try:
            yield from answer(requests, context)
        except Exception as error:
            _end(context, error)
            raise

    return grpc.stream_stream_rpc_method_handler(handle)


def service(name: str, handlers: Mapping[str, grpc.RpcMethodHandler]) -> grpc.GenericRpcHandler:
    """All methods of the service ``name``; the path of one is ``/name/method``."""
    return grpc.method_handlers_generic_handler(name, dict(handlers))


def tls_channel(
    target: str, ca_pem: str, key_pem: bytes | None, certificate_pem: bytes | None, options: Mapping[str, str | int]
) -> grpc.Channel:
    """A connection over TLS that trusts one certificate authority; made when it is first used."""
    credentials = grpc.ssl_channel_credentials(ca_pem.encode(), key_pem, certificate_pem)
    return grpc.secure_channel(target, credentials, options=tuple(options.items()))


def unary(channel: grpc.Channel, path: str) -> grpc.UnaryUnaryMultiCallable:
    """The caller's end of :func:`unary_handler`: takes and gives bytes."""
    return channel.unary_unary(path)


def stream(channel: grpc.Channel, path: str) -> grpc.StreamStreamMultiCallable:
    """The caller's end of :func:`stream_handler`: takes and gives iterators of bytes."""
    return channel.stream_stream(path)


def _end(context: grpc.ServicerContext, error: Exception) -> None:
    """End a call with an error that :func:`error_in` reads at the other end; the text of any other stays here."""
    if isinstance(error, FederadError):
        context.abort(grpc.StatusCode.FAILED_PRECONDITION, json.dumps({"federad": error.as_json()}))
    if context.is_active():  # else the caller has gone, and nobody failed
        log.error("a call failed", exc_info=error)
        context.abort(grpc.StatusCode.INTERNAL, "failed; the other side's log says how")


def status_of(failure: grpc.RpcError) -> str:
    """gRPC's word for a failure, such as ``UNAVAILABLE``."""
    return str(failure.code().name) if isinstance(failure, grpc.Call) else type(failure).__name__


def metadata_of(call: Any) -> dict[str, str]:
    """What came ahead of an answer, or of a failure; empty if nothing did."""
    metadata = call.initial_metadata() if isinstance(call, grpc.Call) else None
    return {key: value for key, value in metadata or () if isinstance(value, str)}


def error_in(failure: grpc.RpcError) -> FederadError | None:
    """The numbered error with which the other side ended a call; None if gRPC itself, or something between, failed."""
    try:
        parts: dict[str, Any] = json.loads(failure.details() or "")["federad"]
        words = [parts["error"], parts["happened"], parts["because"], *parts["remedies"]]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    if not all(isinstance(word, str) and word.isprintable() for word in words) or words[0] not in TITLES:
        return None
    return FederadError(words[0], happened=words[1], because=words[2], remedies=words[3:])
