"""The link: the site's end of the consortium service, over TLS, through whatever stands in between.

Only the consortium's own authority is trusted, never the machine's list: a certificate from anywhere else is not the
consortium's, however genuine it looks. A hospital's network gives many reasons for a call to fail, and gRPC reports most
of them alike; so after a failure the way is walked once more step by step (``_diagnosis``), and the step that fails is
named.

The link belongs to the courier. It carries what the station's gate has let out, and adds nothing.
"""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import os
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import unquote, urlsplit

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.oid import NameOID
from pydantic import Field

from shared_models.consortium import (
    CONSORTIUM_NAME,
    MAX_NOTICES,
    PACKAGE,
    PROTOCOL,
    PROTOCOL_METADATA,
    TIME_METADATA,
    Document,
    EnrolReply,
    EnrolRequest,
    Host,
    Name,
    Notice,
    Notices,
    ParcelName,
    ParcelStored,
    Plans,
    Port,
    Releases,
    RenewReply,
    RenewRequest,
    SignedPlan,
    SignedRelease,
)
from shared_models.errors import FederadError
from shared_models.signing import load_public
from shared_models.wire import Failure, bounded, error_in, metadata_of, status_of, stream, tls_channel, unary

FILE = "consortium.json"

CALL_S = 30.0
"""Longest time for a call that carries a message [s]."""

STALL_S = 120.0
"""A transfer in which nothing moves for so long is given up [s]."""

STEP_S = 10.0
"""Longest time for one step of a diagnosis [s]."""

MAX_RELEASED_BYTES = 8 << 30
"""Longest file of a release that is fetched [bytes]."""

AHEAD_S, BEHIND_S = 5.0, 240.0
"""How far this machine's clock may be from the consortium's [s]; Flower's SuperLink tolerates 5 and 300."""

_PAGE_BYTES = 8192
_NO_CHECK_TIME = 0x200000
"""OpenSSL's X509_V_FLAG_NO_CHECK_TIME: everything but the dates."""

_EXPIRED, _NOT_YET, _WRONG_NAME, _WRONG_ADDRESS = 10, 9, 62, 64
"""OpenSSL's reasons for refusing a certificate."""

Reply = TypeVar("Reply", bound=Document)


class Membership(Document):
    """What a site knows of its consortium: ``consortium.json`` in the courier's folder."""

    name: str = Field(pattern=f"^{CONSORTIUM_NAME}$")
    """The consortium."""

    host: Host
    port: Port
    site: Name
    """What this site is called there."""

    plan_key_pem: str
    """The operator's public key, with which plans and releases are signed."""

    invitation: str
    """Which invitation brought the site in."""

    @property
    def plan_key(self) -> Ed25519PublicKey:
        """The operator's public key."""
        return load_public(self.plan_key_pem)

    @classmethod
    def load(cls, courier: Path) -> Self:
        """Read it from the courier's folder; C150 if the site has not enrolled or the file is damaged."""
        try:
            return cls.decode((courier / FILE).read_bytes())
        except (OSError, FederadError) as error:
            why = "is damaged" if isinstance(error, FederadError) else f"cannot be read ({error.strerror})"
            raise FederadError(
                "C150",
                happened=f"{courier / FILE} {why}.",
                because="It says which consortium this site has joined and how to recognise it.",
                remedies=(
                    "enrol first: federad-site enrol INVITATION --data DIR",
                    "or say which folder is the site's: --site DIR, or FEDERAD_SITE in the environment",
                    "or restore the courier folder from your backup",
                ),
            ) from None


class Proxy(Document):
    """An HTTP proxy that is asked for a tunnel (CONNECT, RFC 9110)."""

    host: str
    port: int
    user: str = ""
    password: str = Field(default="", repr=False)

    def __str__(self) -> str:
        return f"{_bracketed(self.host)}:{self.port}"

    @property
    def url(self) -> str:
        """As gRPC wants it, with what it needs to log in."""
        return f"http://{f'{self.user}:{self.password}@' if self.user else ''}{self}"


def proxy_for(host: str, port: int, environment: Mapping[str, str] = os.environ) -> Proxy | None:
    """The proxy that this machine's environment names for a connection, if any.

    ``https_proxy`` or ``HTTPS_PROXY`` names it, unless ``no_proxy`` or ``NO_PROXY`` excepts the host.

    Raises
    ------
    FederadError
        C152 if it names something that is no HTTP proxy.
    """
    text = environment.get("https_proxy") or environment.get("HTTPS_PROXY") or ""
    excepted = environment.get("no_proxy") or environment.get("NO_PROXY") or ""
    if not text or any(_excepts(entry.strip(), host, port) for entry in excepted.split(",")):
        return None
    try:
        parts = urlsplit(text if "://" in text else f"http://{text}")
        if parts.scheme == "http" and parts.hostname:
            user, password = unquote(parts.username or ""), unquote(parts.password or "")
            return Proxy(host=parts.hostname, port=parts.port or 80, user=user, password=password)
    except ValueError:
        pass
    raise FederadError(
        "C152",
        happened="https_proxy in the environment names no HTTP proxy.",
        because="federad goes through proxies that take CONNECT over HTTP.",
        remedies=("set https_proxy=http://PROXY:PORT", "or unset it where no proxy is needed"),
    )


def _excepts(entry: str, host: str, port: int) -> bool:
    """Whether one entry of ``no_proxy`` means this host: a name, a domain, a network, with or without a port, or ``*``."""
    if entry == "*":
        return True
    entry = entry.lower().removesuffix(f":{port}").lstrip("*.").strip("[]")
    with suppress(ValueError):
        return ipaddress.ip_address(host) in ipaddress.ip_network(entry, strict=False)
    return bool(entry) and (host == entry or host.endswith(f".{entry}"))


class Link:
    """A connection to the consortium, made when it is first used and again after it broke.

    Parameters
    ----------
    host, port
        Where the consortium is.
    ca_pem
        Its certificate authority, the only one that is trusted.
    key_pem, certificate_pem
        The site's own; left out only to enrol.
    environment
        Where the proxy is looked up.
    """

    def __init__(
        self,
        host: str,
        port: int,
        ca_pem: str,
        *,
        key_pem: bytes | None = None,
        certificate_pem: bytes | None = None,
        environment: Mapping[str, str] = os.environ,
    ) -> None:
        self.host, self.port = host, port
        self._ca_pem, self._certificate_pem = ca_pem, certificate_pem
        self.proxy = proxy_for(host, port, environment)
        way = {"grpc.http_proxy": self.proxy.url} if self.proxy else {"grpc.enable_http_proxy": 0}
        self._channel = tls_channel(
            f"dns:///{_bracketed(host)}:{port}", ca_pem, key_pem, certificate_pem, {**_OPTIONS, **way}
        )

    @classmethod
    def open(cls, courier: Path, environment: Mapping[str, str] = os.environ) -> Self:
        """The link of an enrolled site, from the courier's folder; C150 if its files cannot be used."""
        membership = Membership.load(courier)
        try:
            ca, key, certificate = ((courier / name).read_bytes() for name in ("ca.crt", "site.key", "site.crt"))
            x509.load_pem_x509_certificate(ca)
            if load_pem_private_key(key, None).public_key() != x509.load_pem_x509_certificate(certificate).public_key():
                raise ValueError("the key is not that of the certificate")
            return cls(
                membership.host,
                membership.port,
                ca.decode("ascii"),
                key_pem=key,
                certificate_pem=certificate,
                environment=environment,
            )
        except (OSError, ValueError, TypeError) as error:
            raise FederadError(
                "C150",
                happened=f"A key or certificate in {courier} cannot be used ({type(error).__name__}).",
                because="With them this site proves who it is.",
                remedies=(
                    "check that the courier's user may read the folder",
                    "restore it from your backup, or ask the operator for a new invitation",
                ),
            ) from None

    # Calls ----------------------------------------------------------------------------------------------------------

    def enrol(self, request: EnrolRequest) -> EnrolReply:
        """Ask to be taken in; C149 with the operator's reason if not."""
        return self._call("Enrol", request, EnrolReply)

    def renew(self, csr_pem: str) -> str:
        """A further certificate for this site, PEM."""
        return self._call("Renew", RenewRequest(csr_pem=csr_pem), RenewReply).certificate_pem

    def plans(self) -> list[SignedPlan]:
        """The plans on offer. Whether their signatures hold is for the station to say."""
        return list(self._call("Plans", Document(), Plans).plans)

    def tell(self, notices: Iterable[Notice]) -> None:
        """Pass on what the station's gate let out."""
        waiting = tuple(notices)
        for start in range(0, len(waiting), MAX_NOTICES):
            self._call("Tell", Notices(notices=waiting[start : start + MAX_NOTICES]), Document)

    def releases(self) -> list[SignedRelease]:
        """The published models. Whether their signatures hold is for the reader to say."""
        return list(self._call("Releases", Document(), Releases).releases)

    def put_parcel(self, parts: Iterable[bytes]) -> ParcelStored:
        """Leave a long parcel with the operator; memory holds a few chunks at a time.

        Raises
        ------
        FederadError
            M211 if other bytes arrived than were sent, C149 if the operator cannot store it.
        """
        digest = hashlib.sha256()

        def hashed() -> Iterator[bytes]:
            for part in parts:
                digest.update(part)
                yield part

        stored = ParcelStored.decode(b"".join(self._transfer("PutParcel", hashed())))
        if stored.sha256 != digest.hexdigest():
            raise _damaged()
        return stored

    def get_parcel(self, sha256: str, n_bytes: int) -> Iterator[bytes]:
        """Fetch a long parcel chunk by chunk.

        Raises
        ------
        FederadError
            M213 if more than ``n_bytes`` come, M211 at the end if they are not those of ``sha256``.
        """
        return self._fetched("GetParcel", sha256, n_bytes)

    def get_release(self, sha256: str) -> Iterator[bytes]:
        """Fetch a file of a released model chunk by chunk; raises as :meth:`get_parcel`."""
        return self._fetched("GetRelease", sha256, MAX_RELEASED_BYTES)

    def close(self) -> None:
        """End the connection."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _fetched(self, method: str, sha256: str, n_bytes: int) -> Iterator[bytes]:
        digest = hashlib.sha256()
        name = ParcelName(sha256=sha256).encode()
        for part in bounded(self._transfer(method, iter((name,))), n_bytes):
            digest.update(part)
            yield part
        if digest.hexdigest() != sha256:
            raise _damaged()

    def _call(self, method: str, request: Document, reply: type[Reply]) -> Reply:
        sent = time.time()
        try:
            data, call = unary(self._channel, f"/{PACKAGE}/{method}").with_call(
                request.encode(), timeout=CALL_S, metadata=_METADATA
            )
        except Failure as failure:
            check_clock(_told_time(failure), sent)
            raise self._named(failure) from None
        check_clock(_told_time(call), sent)
        return reply.decode(data)

    def _transfer(self, method: str, parts: Iterator[bytes]) -> Iterator[bytes]:
        mistakes: list[Exception] = []
        moved = threading.Event()

        def watched() -> Iterator[bytes]:
            try:
                for part in parts:
                    moved.set()
                    yield part
            except Exception as error:  # gRPC would swallow it, and its own would take its place
                mistakes.append(error)
                raise

        call = stream(self._channel, f"/{PACKAGE}/{method}")(watched(), metadata=_METADATA)
        try:
            with _given_up_when_stalled(call, moved):
                for part in call:
                    moved.set()
                    yield part
        except Failure as failure:
            if mistakes:
                raise mistakes[0] from None
            raise self._named(failure) from None
        finally:
            call.cancel()

    def _named(self, failure: Failure) -> FederadError:
        """The failure of a call as an error that says what to do."""
        told = error_in(failure)
        if told is not None:
            return told if told.code[0] in "CM" else _as_refusal(told)
        return self._diagnosis() or self._unnamed(failure)

    # What went wrong ------------------------------------------------------------------------------------------------

    def _diagnosis(self) -> FederadError | None:
        """Walk the way to the consortium step by step; the first step that fails, or None if none does."""
        if (ended := self._own_certificate_ended()) is not None:
            return ended
        try:
            with self._connected() as plain:
                return self._tls_diagnosis(plain)
        except FederadError as error:
            return error
        except OSError as error:
            return _unreachable(f"the connection to {self._where} broke ({_words(error)})", *_FIREWALL)

    @property
    def _where(self) -> str:
        return f"{_bracketed(self.host)}:{self.port}"

    def _own_certificate_ended(self) -> FederadError | None:
        if self._certificate_pem is None:
            return None
        ended = x509.load_pem_x509_certificate(self._certificate_pem).not_valid_after_utc
        if ended > datetime.now(UTC):
            return None
        return _not_let_in(f"this site's certificate ended on {ended:%Y-%m-%d}")

    @contextmanager
    def _connected(self) -> Iterator[socket.socket]:
        """A socket on which TLS with the consortium can begin."""
        where = self.proxy or Proxy(host=self.host, port=self.port)
        what = f"the proxy {where}" if self.proxy else f"the consortium at {where}"
        try:
            socket.getaddrinfo(where.host, where.port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise _unreachable(
                f"the name of {what} is not known here ({_words(error)})",
                "check this machine's DNS: the name must be resolved inside your network",
                "or, where only a proxy may go out, set https_proxy=http://PROXY:PORT",
            ) from None
        try:
            plain = socket.create_connection((where.host, where.port), timeout=STEP_S)
        except OSError as error:
            raise _unreachable(
                f"{what} does not answer ({_words(error)})",
                "check the address and that it is up"
                if self.proxy
                else "check that your firewall lets this machine out",
                *_FIREWALL,
            ) from None
        with plain:
            if self.proxy is not None:
                self._tunnel(plain, self.proxy)
            yield plain

    def _tunnel(self, plain: socket.socket, proxy: Proxy) -> None:
        """Ask a proxy for a tunnel; C152 with its own words if it gives none."""
        login = base64.b64encode(f"{proxy.user}:{proxy.password}".encode()).decode("ascii")
        lines = [f"CONNECT {self._where} HTTP/1.1", f"Host: {self._where}"]
        lines += [f"Proxy-Authorization: Basic {login}"] if proxy.user else []
        plain.sendall(("\r\n".join(lines) + "\r\n\r\n").encode("latin-1"))
        head = _until_blank_line(plain)
        status = re.match(rb"HTTP/1\.[01] (\d{3})", head)
        if status is None:
            raise _in_between(
                f"What answers at {proxy} is no HTTP proxy."
                if head
                else f"The proxy {proxy} hung up without an answer.",
                "check the address in https_proxy",
            )
        if status[1] == b"407":
            wants = "another name or password" if proxy.user else "a name and password"
            raise _in_between(
                f"The proxy {proxy} wants {wants} (407).",
                "give them: https_proxy=http://NAME:PASSWORD@PROXY:PORT, with %40 for @ and %3A for :",
                f"or have {self._where} let through without",
            )
        if not status[1].startswith(b"2"):
            title = _title(head + _what_is_left(plain))
            raise _in_between(
                f"The proxy {proxy} answered {status[1].decode()} in place of the consortium"
                + (f", with its own page: {title!a}." if title else "."),
                f"have {self._where} let through, as a tunnel (CONNECT) and without inspection",
            )

    def _tls_diagnosis(self, plain: socket.socket) -> FederadError | None:
        context = self._trusting_the_consortium()
        context.set_alpn_protocols(["h2"])
        try:
            with context.wrap_socket(plain, server_hostname=self.host) as secure:
                if secure.selected_alpn_protocol() != "h2":
                    return _in_between(
                        f"What answers at {self._where} speaks no HTTP/2.",
                        "ask the operator whether the front is the one that federad-server start makes",
                    )
                return None
        except ssl.SSLCertVerificationError as error:
            return self._refused_certificate(error.verify_code)
        except ssl.SSLError as error:
            return _stranger(
                f"What answers at {self._where} does not speak TLS as expected ({error.reason or 'it hung up'}).",
                "look for a firewall or proxy that inspects or blocks TLS, and have this address excepted",
                "check host and port with the operator",
            )
        except OSError as error:
            return _unreachable(f"{self._where} hung up while TLS began ({_words(error)})", *_FIREWALL)

    def _refused_certificate(self, reason: int) -> FederadError:
        shown = self._certificate_shown()
        names, issuer, begins, ends = _described(shown)
        if reason in {_EXPIRED, _NOT_YET}:
            there = self._time_there()
            if there is not None and begins <= there <= ends:
                return _wrong_clock((datetime.now(UTC) - there).total_seconds())
            when = (
                f"ended on {ends:%Y-%m-%d %H:%M} UTC"
                if reason == _EXPIRED
                else f"begins only on {begins:%Y-%m-%d %H:%M} UTC"
            )
            return _stranger(
                f"The certificate of {self._where} {when}.",
                "tell the operator to renew it: federad-server start does so",
                "check this machine's date, if it is wrong",
            )
        if reason in {_WRONG_NAME, _WRONG_ADDRESS}:
            return _stranger(
                f"The certificate of {self._where} is for {names or 'no name'}.",
                "the operator has given the consortium another name than the one in the invitation: ask for a new one",
                "check that the name leads to the right machine: DNS, /etc/hosts",
            )
        return _stranger(
            f"The certificate of {self._where} was given out by {issuer}, not by this consortium.",
            "if that is your own network: it opens TLS to look inside; have this address excepted from inspection",
            "if the consortium was set up anew, ask the operator for a new invitation",
        )

    def _certificate_shown(self) -> x509.Certificate | None:
        """What the other end shows, whoever it is."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # it is looked at, and nothing is sent
        try:
            with self._connected() as plain, context.wrap_socket(plain, server_hostname=self.host) as secure:
                return x509.load_der_x509_certificate(secure.getpeercert(binary_form=True) or b"")
        except (OSError, ValueError, FederadError):
            return None

    def _time_there(self) -> datetime | None:
        """The consortium's time, from its front; only the dates of its certificate are not checked."""
        context = self._trusting_the_consortium()
        context.verify_flags |= ssl.VerifyFlags(_NO_CHECK_TIME)
        try:
            with self._connected() as plain, context.wrap_socket(plain, server_hostname=self.host) as secure:
                secure.sendall(f"HEAD / HTTP/1.1\r\nHost: {self._where}\r\nConnection: close\r\n\r\n".encode())
                date = re.search(rb"\r\ndate: ([^\r]*)\r\n", _until_blank_line(secure), re.IGNORECASE)
            return parsedate_to_datetime(date[1].decode("ascii")) if date else None
        except (OSError, ValueError, FederadError):
            return None

    def _trusting_the_consortium(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(cadata=self._ca_pem)
        return context

    def _unnamed(self, failure: Failure) -> FederadError:
        """A failure that the diagnosis could not find again."""
        code = status_of(failure)
        if code == "UNAUTHENTICATED":
            return _not_let_in("the consortium's front did not take this site's certificate")
        if code == "DEADLINE_EXCEEDED":
            why = f"the consortium at {self._where} did not answer within {CALL_S:g} s"
        elif code == "CANCELLED":
            why = f"a transfer stood still for {STALL_S:g} s"
        else:
            why = f"the front at {self._where} is there, but not the consortium behind it ({code})"
        return _unreachable(
            why, "federad-site tries again by itself", "if it lasts, tell the operator: federad-server status"
        )


_OPTIONS: dict[str, str | int] = {
    "grpc.use_local_subchannel_pool": 1,
    "grpc.initial_reconnect_backoff_ms": 500,
    "grpc.max_reconnect_backoff_ms": 10_000,
    "grpc.keepalive_time_ms": 30_000,  # finds a link that is open at one end only
    "grpc.keepalive_timeout_ms": 15_000,
}

_METADATA = ((PROTOCOL_METADATA, str(PROTOCOL)),)

_FIREWALL = (
    "where only a proxy may go out, set https_proxy=http://PROXY:PORT",
    "ask the operator whether the consortium is up",
)


def check_clock(there: float | None, sent: float) -> None:
    """Compare this machine's clock with the consortium's.

    Parameters
    ----------
    there
        What the consortium's clock showed while the call was under way [s since 1970]; None if it did not say.
    sent
        What ours showed before the call [s since 1970].

    Raises
    ------
    FederadError
        C155 if ours is certainly too far away, however long the call took.
    """
    if there is None:
        return
    least_ahead, most_ahead = sent - there, time.time() - there
    if least_ahead > AHEAD_S or most_ahead < -BEHIND_S:
        raise _wrong_clock(least_ahead if least_ahead > 0 else most_ahead)


def _wrong_clock(ahead_s: float) -> FederadError:
    off = f"{abs(ahead_s):.0f} s" if abs(ahead_s) < 120 else f"{abs(ahead_s) / 60:.0f} minutes"
    return FederadError(
        "C155",
        happened=f"This machine's clock is {off} {'ahead of' if ahead_s > 0 else 'behind'} the consortium's.",
        because="Every message is signed with its time: Flower refuses one from the future, or more than 5 minutes old.",
        remedies=("set the clock by NTP: timedatectl set-ntp true", "if the clock is right, tell the operator"),
    )


def _told_time(call: Any) -> float | None:
    told = metadata_of(call).get(TIME_METADATA, "")
    return float(told) if re.fullmatch(r"\d{1,12}\.\d{3}", told) else None


@contextmanager
def _given_up_when_stalled(call: Any, moved: threading.Event) -> Iterator[None]:
    """Cancel ``call`` when nothing has moved for a while."""
    over = threading.Event()

    def watch() -> None:
        while not over.is_set():
            moved.clear()
            over.wait(STALL_S)
            if not over.is_set() and not moved.is_set():
                call.cancel()
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()


def _until_blank_line(connection: socket.socket) -> bytes:
    """The head of an HTTP answer and what came with it, at most a page."""
    head = b""
    while b"\r\n\r\n" not in head and len(head) < _PAGE_BYTES and (part := connection.recv(_PAGE_BYTES)):
        head += part
    return head


def _what_is_left(connection: socket.socket) -> bytes:
    """A little of a page that may still be under way."""
    connection.settimeout(1.0)
    try:
        return connection.recv(_PAGE_BYTES)
    except OSError:
        return b""


def _title(page: bytes) -> str:
    """The title of an HTML page, as far as it can be shown."""
    title = re.search(rb"<title[^>]*>(.*?)</title>", page, re.IGNORECASE | re.DOTALL)
    return " ".join(title[1].decode("utf-8", "replace").split())[:100] if title else ""


def _described(certificate: x509.Certificate | None) -> tuple[str, str, datetime, datetime]:
    """Names, issuer and dates of a certificate, for a message."""
    never = datetime.fromtimestamp(0, UTC)
    if certificate is None:
        return "", "somebody else", never, never
    try:
        alternatives = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        names = ", ".join(str(name.value) for name in alternatives)
    except (x509.ExtensionNotFound, ValueError):
        names = ""
    issuers = [
        str(attribute.value)
        for oid in (NameOID.ORGANIZATION_NAME, NameOID.COMMON_NAME)
        for attribute in certificate.issuer.get_attributes_for_oid(oid)
    ]
    issuer = ascii(", ".join(issuers)[:100]) if issuers else "somebody without a name"
    return names, issuer, certificate.not_valid_before_utc, certificate.not_valid_after_utc


def _bracketed(host: str) -> str:
    """A host as it stands before a port."""
    try:
        return f"[{host}]" if ipaddress.ip_address(host).version == 6 else host
    except ValueError:
        return host


def _words(error: OSError) -> str:
    return "no answer in time" if isinstance(error, TimeoutError) else error.strerror or type(error).__name__


def _unreachable(why: str, *remedies: str) -> FederadError:
    return FederadError(
        "C151",
        happened=f"The consortium cannot be reached: {why}.",
        because="This site needs one connection out, to one name and port; nothing has to come in.",
        remedies=remedies,
    )


def _in_between(happened: str, *remedies: str) -> FederadError:
    return FederadError(
        "C152",
        happened=happened,
        because="What stands in between must pass the connection through unchanged.",
        remedies=remedies,
    )


def _stranger(happened: str, *remedies: str) -> FederadError:
    return FederadError(
        "C153",
        happened=happened,
        because="This site talks to the consortium that invited it and to nobody else. Nothing was sent.",
        remedies=remedies,
    )


def _not_let_in(why: str) -> FederadError:
    return FederadError(
        "C154",
        happened=f"The consortium does not let this site in: {why}.",
        because="A certificate holds for a quarter of a year and is renewed while federad-site runs.",
        remedies=(
            "ask the operator for a new invitation and enrol again: federad-site enrol INVITATION --data DIR",
            "check this machine's date, if it is wrong",
        ),
    )


def _as_refusal(told: FederadError) -> FederadError:
    return FederadError("C149", happened=told.happened, because=told.because, remedies=told.remedies)


def _damaged() -> FederadError:
    return FederadError(
        "M211",
        happened="A parcel arrived with other bytes than were sent.",
        because="What cannot be trusted to the last bit is not used.",
        remedies=("it is asked for again by itself", "if it lasts, look for something that changes long transfers"),
    )
