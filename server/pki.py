"""The consortium's certificate authority: who is who on the wire, and nothing else.

One authority (EC P-384) signs the server's certificate and one for each site; it signs no further authorities. Sites make
their keys themselves and send requests (PKCS #10), so that no private key but the operator's own is ever here. Whether a
certificate still counts is not written into it: the store is asked at each call (``consortium``).
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from shared_models.errors import FederadError

CA_DAYS = 3650
SERVER_DAYS = 397
"""Longest life that common TLS clients accept [days]."""

SITE_DAYS = 90
"""Short, so that a site which left the consortium in silence is out after a quarter [days]."""

_BACKDATED = timedelta(hours=1)
"""How far behind a site's clock may be before it takes a new certificate for one of the future."""

_CURVE = ec.SECP384R1
_APPROVED = (ec.SECP256R1, ec.SECP384R1, ec.SECP521R1)


@dataclass(frozen=True)
class Authority:
    """A key and its certificate."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @property
    def key_pem(self) -> bytes:
        """The private key, not encrypted: for a file that only its owner may read."""
        return key_pem(self.key)

    @property
    def pem(self) -> str:
        """The certificate."""
        return certificate_pem(self.certificate)


def new_key() -> ec.EllipticCurvePrivateKey:
    """A fresh EC P-384 key."""
    return ec.generate_private_key(_CURVE())


def new_authority(name: str) -> Authority:
    """The certificate authority of the consortium ``name``."""
    key = new_key()
    subject = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, name), _common_name("federad authority")])
    builder = (
        _builder(subject, subject, key.public_key(), CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    return Authority(key, builder.sign(key, hashes.SHA384()))


def load_authority(key: bytes, certificate: bytes) -> Authority:
    """An authority from its two PEM files.

    Raises
    ------
    ValueError
        If they are damaged or do not belong together.
    """
    private = serialization.load_pem_private_key(key, password=None)
    loaded = x509.load_pem_x509_certificate(certificate)
    if not isinstance(private, ec.EllipticCurvePrivateKey) or private.public_key() != loaded.public_key():
        raise ValueError("the key is not that of the certificate")
    return Authority(private, loaded)


def server_certificate(
    authority: Authority, key: ec.EllipticCurvePublicKey, host: str, days: float = SERVER_DAYS
) -> x509.Certificate:
    """A certificate for the server that sites know as ``host``, a DNS name or an IP address."""
    try:
        name: x509.GeneralName = x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        name = x509.DNSName(host)
    subject = x509.Name([_common_name(host if len(host) <= 64 else "federad server")])
    builder = _leaf(authority, subject, key, days, ExtendedKeyUsageOID.SERVER_AUTH)
    return builder.add_extension(x509.SubjectAlternativeName([name]), critical=False).sign(
        authority.key, hashes.SHA384()
    )


def site_certificate(
    authority: Authority, request: bytes | str, site: str, days: float = SITE_DAYS
) -> x509.Certificate:
    """A client certificate for ``site`` over the key in a certificate request.

    Nothing but the key is taken from the request: the name is the operator's.

    Raises
    ------
    FederadError
        S186 if the request is damaged, is not signed with its own key, or has another kind of key or name.
    """
    key = requested_key(request, site)
    subject = x509.Name(
        [*authority.certificate.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME), _common_name(site)]
    )
    return _leaf(authority, subject, key, days, ExtendedKeyUsageOID.CLIENT_AUTH).sign(authority.key, hashes.SHA384())


def requested_key(request: bytes | str, site: str) -> ec.EllipticCurvePublicKey:
    """The public key in a certificate request of ``site``; S186 as in :func:`site_certificate`."""
    try:
        csr = x509.load_pem_x509_csr(request.encode() if isinstance(request, str) else request)
        is_signed, key = csr.is_signature_valid, csr.public_key()
        names = [attribute.value for attribute in csr.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    except (ValueError, UnsupportedAlgorithm, InvalidSignature, x509.UnsupportedGeneralNameType):
        raise _refused("it cannot be read") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, _APPROVED):
        raise _refused("its key is not an elliptic-curve key on P-256, P-384 or P-521")
    if not is_signed:
        raise _refused("it is not signed with the key it is about")
    if names != [site]:
        raise _refused(f"it is not for {site}")
    return key


def node_key(pem: str) -> str:
    """A SuperNode's public key in its one PEM spelling, which is also Flower's.

    Raises
    ------
    FederadError
        S186 if it is no elliptic-curve key.
    """
    try:
        key = serialization.load_pem_public_key(pem.encode())
    except (ValueError, UnsupportedAlgorithm):
        raise _refused("the SuperNode's key cannot be read") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, _APPROVED):
        raise _refused("the SuperNode's key is not an elliptic-curve key on P-256, P-384 or P-521")
    return public_pem(key)


def public_pem(key: ec.EllipticCurvePublicKey) -> str:
    """A public key as PEM text."""
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo).decode("ascii")


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """A private key as PKCS #8 PEM, not encrypted."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def certificate_pem(certificate: x509.Certificate) -> str:
    """A certificate as PEM text."""
    return certificate.public_bytes(serialization.Encoding.PEM).decode("ascii")


def serial_of(certificate: x509.Certificate) -> str:
    """The serial number as nginx writes it, upper-case hex, without leading zeros."""
    return f"{certificate.serial_number:X}"


def _leaf(
    authority: Authority,
    subject: x509.Name,
    key: ec.EllipticCurvePublicKey,
    days: float,
    purpose: x509.ObjectIdentifier,
) -> x509.CertificateBuilder:
    return (
        _builder(subject, authority.certificate.subject, key, days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key()), critical=False)
    )


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: float
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED if days > 0 else now + timedelta(days=days) - _BACKDATED)
        .not_valid_after(now + timedelta(days=days))
    )


def _key_usage(*, certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=certificates,
        crl_sign=certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _common_name(name: str) -> x509.NameAttribute[str]:
    return x509.NameAttribute(NameOID.COMMON_NAME, name)


def _refused(why: str) -> FederadError:
    return FederadError(
        "S186",
        happened=f"A certificate request was refused: {why}.",
        because="A certificate is given for a key that the site has proven to hold, under the name it was invited with.",
        remedies=(
            "make the request with federad-site enrol, of the same version as the operator's",
            "give the operator the request file as it was written",
        ),
    )
