"""Joining a consortium: keys made here, a request that goes out, a certificate that comes back.

Two keys are made in the courier's folder and never leave it: the site's (for TLS with the consortium service) and the
SuperNode's (with which Flower knows the site). What goes out is their public halves, signed with the invitation. It goes
over the network, or in a file that a person carries; the reply is signed by the authority that the invitation pins, so
that one is as good as the other::

    courier/
        site.key  site.crt   EC P-384, X.509 from the consortium's authority
        node.key             EC P-384 as OpenSSH writes it, which is what flower-supernode reads
        ca.crt               the one authority that is trusted
        consortium.json      which consortium, where, under which name (``link.Membership``)
        pending/             keys of a request that has no reply yet
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from client.link import FILE, Link, Membership
from shared_models.consortium import Document, EnrolReply, EnrolRequest, Invitation
from shared_models.errors import FederadError
from shared_models.signing import load_public

RENEW_BEFORE = timedelta(days=30)
"""A certificate with less life than this left is renewed."""

_PENDING = "pending"
_QUESTION = "question.json"
_KEYS = ("site.key", "node.key")


class Pending(Document):
    """What is kept of an invitation while its request has no reply: all but its secret."""

    invitation: str
    consortium: str
    site: str
    ca_pem: str


def read_invitation(given: str) -> Invitation:
    """An invitation from what a person typed: the line itself, or the name of a file that holds it; C148 otherwise."""
    if not given.lstrip().startswith("federad1:"):
        with suppress(OSError, ValueError, RuntimeError):  # what names no file is no invitation either
            given = Path(given).expanduser().read_text(encoding="utf-8")
    return Invitation.parse(given)


def enrol(invitation: Invitation, courier: Path, environment: Mapping[str, str] = os.environ) -> Membership:
    """Join over the network. Doing it again after a lost reply, or after it went well, changes nothing.

    Raises
    ------
    FederadError
        C149 with the operator's reason for a no, C150 if the folder cannot be used, C151 to C155 if the consortium cannot
        be reached.
    """
    if (member := membership(courier)) is not None and member.invitation == invitation.id:
        return member
    request = make_request(invitation, courier)
    with Link(invitation.host, invitation.port, invitation.ca_pem, environment=environment) as link:
        return take_reply(courier, link.enrol(request))


def make_request(invitation: Invitation, courier: Path) -> EnrolRequest:
    """What to send to the operator, over the network or as a file; made again, it is about the same keys.

    Raises
    ------
    FederadError
        C150 if the folder cannot be used, or belongs to another site or consortium.
    """
    member = membership(courier)
    if member is not None and member.invitation == invitation.id:
        raise _not_usable(
            f"The folder {courier} has joined {member.name} with this invitation already", "It counts once."
        )
    if member is not None and (member.name, member.site) != (invitation.consortium, invitation.site):
        raise _not_usable(
            f"The folder {courier} belongs to {member.site} in {member.name}",
            "A folder stands for one site in one consortium.",
        )
    pending = courier / _PENDING
    try:
        if not _asks_for(pending, invitation):
            shutil.rmtree(pending, ignore_errors=True)
            _make_folder(pending)
            _write(pending / "site.key", _private(serialization.PrivateFormat.PKCS8))
            _write(pending / "node.key", _private(serialization.PrivateFormat.OpenSSH))
            question = Pending(
                invitation=invitation.id,
                consortium=invitation.consortium,
                site=invitation.site,
                ca_pem=invitation.ca_pem,
            )
            _write(pending / _QUESTION, question.encode())
        site_key, node_key = _site_key(pending / "site.key"), _node_key(pending / "node.key")
    except (OSError, ValueError, TypeError) as error:
        raise _unusable(courier, error) from None
    return EnrolRequest(
        invitation=invitation.id,
        site=invitation.site,
        ca_sha256=invitation.ca_sha256,
        csr_pem=_request(site_key, invitation.site),
        node_public_key_pem=_public(node_key.public_key()),
    ).proven(invitation.secret)


def take_reply(courier: Path, reply: EnrolReply) -> Membership:
    """Finish joining with the operator's reply, however it came.

    Promise
        New keys never stand beside an old certificate: killed in between, the folder belongs to nobody (C150), and the
        same reply finishes it.

    Raises
    ------
    FederadError
        C150 if no request waits for a reply here, C153 if the reply is not the pinned authority's answer to it.
    """
    pending = courier / _PENDING
    try:
        question = Pending.decode((pending / _QUESTION).read_bytes())
        key = _site_key(pending / "site.key").public_key()
    except (OSError, ValueError, TypeError, FederadError):
        if (member := membership(courier)) is not None and _is_ours(courier, reply):
            return member
        raise _not_usable(
            f"No request waits for a reply in {courier}", "A reply is about the keys that were made for it."
        ) from None
    _check_reply(reply, question, key)
    member = Membership(
        name=reply.consortium,
        host=reply.host,
        port=reply.port,
        site=reply.site,
        plan_key_pem=reply.plan_key_pem,
        invitation=question.invitation,
    )
    try:
        (courier / FILE).unlink(missing_ok=True)  # while this lasts, the folder belongs to nobody
        for name in _KEYS:
            _write(courier / name, (pending / name).read_bytes())
        _write(courier / "ca.crt", question.ca_pem.encode())
        _write(courier / "site.crt", reply.certificate_pem.encode())
        _write(courier / FILE, member.encode())
        shutil.rmtree(pending, ignore_errors=True)
    except OSError as error:
        raise _unusable(courier, error) from None
    return member


def certificate_ends(courier: Path) -> datetime:
    """When the site's certificate ends; C150 if it cannot be read."""
    try:
        return x509.load_pem_x509_certificate((courier / "site.crt").read_bytes()).not_valid_after_utc
    except (OSError, ValueError) as error:
        raise _unusable(courier, error) from None


def renew(courier: Path, link: Link, *, before: timedelta = RENEW_BEFORE) -> bool:
    """Renew the site's certificate if it has less life left than ``before``, over the same key.

    Returns
    -------
    bool
        Whether there is a new one, so that links must be opened again.

    Raises
    ------
    FederadError
        C149 to C155 if the operator does not give one, C153 if it is not for this site's key.
    """
    if certificate_ends(courier) - datetime.now(UTC) >= before:
        return False
    member = Membership.load(courier)
    try:
        key, authority = _site_key(courier / "site.key"), (courier / "ca.crt").read_text(encoding="ascii")
    except (OSError, ValueError, TypeError) as error:
        raise _unusable(courier, error) from None
    pem = link.renew(_request(key, member.site))
    if (why := _fault(pem, authority, member.site, key.public_key())) is not None:
        raise _not_the_answer(why)
    try:
        _write(courier / "site.crt", pem.encode())
    except OSError as error:
        raise _unusable(courier, error) from None
    return True


def membership(courier: Path) -> Membership | None:
    """The consortium that a folder belongs to; None if it has joined none, C150 if the file is damaged."""
    return Membership.load(courier) if (courier / FILE).exists() else None


def _check_reply(reply: EnrolReply, question: Pending, key: ec.EllipticCurvePublicKey) -> None:
    authority = x509.load_pem_x509_certificate(question.ca_pem.encode()).public_key()
    if not isinstance(authority, ec.EllipticCurvePublicKey) or not reply.is_signed_by(authority):
        raise _not_the_answer("it is not signed by the consortium that sent the invitation")
    if (reply.consortium, reply.site) != (question.consortium, question.site):
        raise _not_the_answer(f"it is for {reply.site} in {reply.consortium}")
    if (why := _fault(reply.certificate_pem, question.ca_pem, question.site, key)) is not None:
        raise _not_the_answer(why)
    try:
        load_public(reply.plan_key_pem)
    except ValueError:
        raise _not_the_answer("the key that signs plans cannot be read") from None


def _fault(pem: str, ca_pem: str, site: str, key: ec.EllipticCurvePublicKey) -> str | None:
    """Why a certificate is not one of ``site`` over ``key``; None if it is."""
    try:
        certificate = x509.load_pem_x509_certificate(pem.encode())
        certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(ca_pem.encode()))
    except (ValueError, TypeError, InvalidSignature):
        return "the certificate in it was not given out by this consortium"
    names = [attribute.value for attribute in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    if names != [site]:
        return "the certificate in it is for another site"
    return None if certificate.public_key() == key else "the certificate in it is for keys that are not here"


def _is_ours(courier: Path, reply: EnrolReply) -> bool:
    """Whether a reply is the one that was taken here before."""
    try:
        return (courier / "site.crt").read_bytes() == reply.certificate_pem.encode()
    except OSError:
        return False


def _asks_for(pending: Path, invitation: Invitation) -> bool:
    """Whether a request for this invitation has been made here."""
    try:
        return Pending.decode((pending / _QUESTION).read_bytes()).invitation == invitation.id
    except (OSError, FederadError):
        return False


def _request(key: ec.EllipticCurvePrivateKey, site: str) -> str:
    """A certificate request (PKCS #10), PEM."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, site)])
    csr = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA384())
    return csr.public_bytes(serialization.Encoding.PEM).decode("ascii")


def _private(form: serialization.PrivateFormat) -> bytes:
    """A fresh private key, PEM, not encrypted: for a file that only its owner may read."""
    key = ec.generate_private_key(ec.SECP384R1())
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


def _public(key: ec.EllipticCurvePublicKey) -> str:
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo).decode("ascii")


def _site_key(path: Path) -> ec.EllipticCurvePrivateKey:
    return _elliptic(serialization.load_pem_private_key(path.read_bytes(), password=None))


def _node_key(path: Path) -> ec.EllipticCurvePrivateKey:
    return _elliptic(serialization.load_ssh_private_key(path.read_bytes(), password=None))


def _elliptic(key: object) -> ec.EllipticCurvePrivateKey:
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise TypeError(f"{type(key).__name__} is not an elliptic-curve key")
    return key


def _make_folder(folder: Path) -> None:
    """A folder that only its owner may look into; made as root, it belongs to whom the folder above belongs."""
    if not folder.is_dir():
        if not folder.parent.is_dir():
            _make_folder(folder.parent)
        folder.mkdir(mode=0o700)
        _hand_over(folder)


def _write(path: Path, data: bytes) -> None:
    """Write a file that only its owner may read, all of it or nothing."""
    temporary = path.with_name(f"{path.name}.part")
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    _hand_over(temporary)
    temporary.replace(path)


def _hand_over(path: Path) -> None:
    if os.geteuid() == 0:
        above = path.parent.stat()
        os.chown(path, above.st_uid, above.st_gid)


def _unusable(courier: Path, error: Exception) -> FederadError:
    why = error.strerror if isinstance(error, OSError) else type(error).__name__
    return _not_usable(f"The folder {courier} cannot be used ({why})", "The keys of this site are kept there.")


def _not_usable(happened: str, because: str) -> FederadError:
    return FederadError(
        "C150",
        happened=f"{happened}.",
        because=because,
        remedies=(
            "check that the folder is this site's, and that its owner may write there",
            "to join another consortium, or under another name, use another folder: --site DIR",
        ),
    )


def _not_the_answer(why: str) -> FederadError:
    return FederadError(
        "C153",
        happened=f"The reply is not the answer to this site's request: {why}.",
        because="This site talks to the consortium that invited it and to nobody else. Nothing was changed here.",
        remedies=(
            "take the reply file that the operator made from the newest request file of this site",
            "ask the operator for a new invitation if the request or its keys were lost",
        ),
    )
