"""Who the archive is, and who this site is to it: TLS (DICOM PS3.15, annex B), certificates, passwords and tokens.

Every file is named in ``[pacs]`` of ``site.toml``. Secrets come from files that nobody else may read, go into no message
and no log, and over no connection that is not encrypted. An authority that is named there is the only one that counts.
"""

from __future__ import annotations

import base64
import ssl
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from client.site import Pacs
from shared_models.errors import FederadError

if TYPE_CHECKING:
    from dicomweb_client.api import DICOMwebClient

LONGEST_SECRET = 16_384
"""More than that is no password and no token [bytes]."""

REFUSED_HERE = (401, 403)
"""HTTP: not authenticated, not allowed (RFC 9110, 15.5)."""


class Noting(ssl.SSLContext):
    """A context that remembers what went wrong with TLS last: who uses it may only see that a connection ended."""

    def __init__(self, *_: Any) -> None:
        super().__init__()
        self.failure: ssl.SSLError | None = None
        self.sslsocket_class = _NotingSocket


class _NotingSocket(ssl.SSLSocket):
    def do_handshake(self, *arguments: Any) -> None:
        try:
            super().do_handshake(*arguments)
        except OSError as error:  # the connection stands, so whatever this is, it is no TLS
            self._note(error if isinstance(error, ssl.SSLError) else ssl.SSLError("no handshake"))
            raise

    def recv(self, *arguments: Any) -> bytes:
        try:
            return super().recv(*arguments)
        except ssl.SSLError as error:
            if "ALERT" in (error.reason or ""):  # in TLS 1.3 a certificate is refused only here
                self._note(error)
            raise

    def _note(self, error: ssl.SSLError) -> None:
        context = self.context
        if isinstance(context, Noting):
            context.failure = error


def calling(pacs: Pacs) -> Noting:
    """What this site expects when it calls the archive, and how it shows who it is; TLS 1.2 or newer.

    Raises
    ------
    FederadError
        C129 if a file that ``[pacs]`` names cannot be used.
    """
    context = Noting(ssl.PROTOCOL_TLS_CLIENT)
    _trust(context, pacs)
    _show(context, pacs)
    return context


def listening(pacs: Pacs) -> ssl.SSLContext | None:
    """The same for whoever calls the listener: only what the named authority vouches for; None without TLS. C129."""
    if not pacs.tls:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_REQUIRED
    _trust(context, pacs)
    _show(context, pacs)
    return context


def _trust(context: ssl.SSLContext, pacs: Pacs) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if pacs.ca_file is None:
        context.load_default_certs()
        return
    try:
        context.load_verify_locations(cafile=pacs.ca_file)
    except OSError as error:
        raise _unusable("ca_file", _why(error, "it holds no certificate (PEM)")) from None


def _show(context: ssl.SSLContext, pacs: Pacs) -> None:
    if pacs.certificate is None or pacs.key is None:
        return
    _check_private(Path(pacs.key), "key")
    try:
        context.load_cert_chain(pacs.certificate, pacs.key, password=lambda: b"")
    except (OSError, ValueError) as error:
        why = _why(error, "they are not a certificate and its unencrypted key (PEM)")
        raise _unusable("certificate or key", why) from None


def _why(error: Exception, otherwise: str) -> str:
    is_of_disk = isinstance(error, OSError) and not isinstance(error, ssl.SSLError)
    return str(getattr(error, "strerror", None) or otherwise) if is_of_disk else otherwise


def _check_private(path: Path, name: str) -> None:
    try:
        about = path.stat()
    except OSError as error:
        raise _unusable(name, str(error.strerror)) from None
    if not stat.S_ISREG(about.st_mode) or about.st_mode & 0o077:
        raise _unusable(name, f"others may read it (mode {stat.S_IMODE(about.st_mode):04o}), or it is no file")


def _secret(path: str, name: str) -> str:
    """What a file says in its first line; C129 unless nobody else may read it."""
    _check_private(Path(path), name)
    try:
        with Path(path).open("rb") as file:
            lines = file.read(LONGEST_SECRET + 1).decode().splitlines()
    except OSError as error:
        raise _unusable(name, str(error.strerror)) from None
    except UnicodeDecodeError:
        raise _unusable(name, "it is no text") from None
    if len(lines) != 1 or not lines[0].strip() or not lines[0].isprintable():
        raise _unusable(name, "it does not hold one line")
    return lines[0].strip()


def web_session(pacs: Pacs) -> Any:
    """A session of HTTP with the archive's DICOMweb service; it looks at nothing but ``[pacs]``: no proxy, no ``.netrc``.

    Raises
    ------
    FederadError
        C129 if a file that ``[pacs]`` names cannot be used.
    """
    from dicomweb_client.session_utils import create_session

    calling(pacs)  # every file is there and fits
    session = create_session()
    session.trust_env = False
    known = ssl.get_default_verify_paths()
    session.verify = pacs.ca_file or known.cafile or known.capath or True
    if pacs.certificate is not None and pacs.key is not None:
        session.cert = (pacs.certificate, pacs.key)
    if pacs.token_file is not None:
        session.auth = _Authorized(f"Bearer {_secret(pacs.token_file, 'token_file')}")
    elif pacs.user is not None:
        pair = f"{pacs.user}:{_secret(str(pacs.password_file), 'password_file')}"
        session.auth = _Authorized(f"Basic {base64.b64encode(pair.encode()).decode()}")
    return session


def web_client(pacs: Pacs, session: Any) -> DICOMwebClient:
    """A client for that service, which asks everything once."""
    from dicomweb_client.api import DICOMwebClient

    client = DICOMwebClient(url=str(pacs.dicomweb).rstrip("/"), session=session)
    client.set_http_retry_params(retry=False)
    return client


class _Authorized:
    """Puts credentials on a request, if what it asks is encrypted; on none that a redirection leads to."""

    def __init__(self, words: str) -> None:
        self._words = words

    def __call__(self, request: Any) -> Any:
        if not str(request.url).startswith("https://"):
            raise ValueError("credentials are not sent over a connection that is not encrypted")
        request.headers["Authorization"] = self._words
        return request

    def __repr__(self) -> str:
        return "_Authorized(...)"


def refused(pacs: Pacs, error: BaseException | None) -> FederadError | None:
    """C130 or C131 if what went wrong is that either side does not believe who the other is; else None.

    Parameters
    ----------
    pacs
        The archive.
    error
        What a client or its TLS raised, with all that it was raised from.
    """
    if error is None:
        return None
    where = pacs.where
    for one in _chain(error):
        if isinstance(one, ssl.SSLCertVerificationError):
            return _not_trusted(f"{where} shows a certificate that is not accepted: {one.verify_message}")
        if isinstance(one, ssl.SSLError):
            reason = (getattr(one, "reason", None) or str(one)).lower().replace("_", " ")
            if "alert" in reason:
                return _not_let_in(f"{where} did not accept how this site shows who it is ({reason})")
            return _not_trusted(f"{where} does not speak TLS as it should ({reason})")
        status = getattr(getattr(one, "response", None), "status_code", None)
        if status in REFUSED_HERE:
            return _not_let_in(f"{where} answered {status} to this site")
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An exception and all that it carries: causes, contexts, reasons, arguments."""
    waiting: list[Any] = [error]
    seen: set[int] = set()
    while waiting:
        one = waiting.pop(0)
        if not isinstance(one, BaseException) or id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        waiting += [one.__cause__, one.__context__, getattr(one, "reason", None), *one.args]


def _unusable(name: str, why: str) -> FederadError:
    return FederadError(
        "C129",
        happened=f"What {name} under [pacs] names cannot be used: {why}.",
        because="With it this site shows the archive who it is, or looks who the archive is.",
        remedies=(
            "give an absolute path to a file that the station's account may read, certificates and keys in PEM",
            "let nobody else read a key, a password or a token: chown federad-data FILE; chmod 600 FILE",
        ),
    )


def _not_trusted(happened: str) -> FederadError:
    return FederadError(
        "C130",
        happened=f"{happened[0].upper()}{happened[1:]}.",
        because="Images and names of patients go to the hospital's own archive, and to nobody who only says so.",
        remedies=(
            "ask those who run the archive for the certificate of its authority, and name it as ca_file under [pacs]",
            "host, or the address of dicomweb, must be the name that stands in the archive's certificate",
            "if the archive speaks no TLS on that port, ask for the port where it does",
        ),
    )


def _not_let_in(happened: str) -> FederadError:
    return FederadError(
        "C131",
        happened=f"{happened[0].upper()}{happened[1:]}.",
        because="An archive opens to those it knows, and to them what they are allowed.",
        remedies=(
            "look at user and password_file, token_file, or certificate and key under [pacs] in station/site.toml",
            "ask those who run the archive to let this site search, fetch and store, as far as it shall",
        ),
    )
