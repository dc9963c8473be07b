"""What operator and sites say to each other outside the rounds: invitations, enrolment, signed plans, notices.

Every document is a frozen pydantic model and travels as canonical JSON. An invitation is the one thing that both sides
exchange before they know each other: it pins the consortium's certificate authority and holds a signing key of its own,
with which the site proves that it was invited. The operator keeps only the public half, so that nobody who reads the
operator's database can enrol in a site's place, and the secret itself never travels back.
"""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import re
import ssl
from datetime import UTC, datetime
from typing import Annotated, Literal, Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from shared_models.errors import FederadError
from shared_models.scanners import SCANNER
from shared_models.signing import SIGNATURE, canonical, fingerprint, sign, verify

PACKAGE = "federad.Consortium"
"""Name of the gRPC service."""

SITE_NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}"
"""As in ``messages``, which this room leaves alone: whoever carries bytes for a site loads no arrays."""

CONSORTIUM_NAME = r"[A-Za-z0-9][A-Za-z0-9 _.-]{0,62}"
RUN = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}"
SHA256 = r"[0-9a-f]{64}"
WORD = r"[a-z0-9][a-z0-9-]{0,39}"
"""A word of a notice: of a closed list that the sender keeps."""

PROTOCOL = 1
"""Changed when older sites can no longer be understood."""

PROTOCOL_METADATA = "x-federad-protocol"
"""The caller's :data:`PROTOCOL` in the metadata of each call."""

TIME_METADATA = "x-federad-time"
"""The operator's clock in the metadata of each answer, in seconds since 1970."""

_PREFIX = "federad1:"

MAX_SCANNERS = 100
"""Scanners that one site tells of."""

MAX_NOTICES = 1000
"""Notices in one call of Tell."""


def _host(host: str) -> str:
    """A host name (RFC 1123, lower case) or an IP address."""
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        label = r"(?!-)[a-z0-9-]{1,63}(?<!-)"
        if len(host) > 253 or not re.fullmatch(rf"{label}(\.{label})*", host) or re.fullmatch(r"[0-9.]+", host):
            raise ValueError(f"{host!r} is neither a host name in lower case nor an IP address") from None
        return host


Host = Annotated[str, AfterValidator(_host)]
Port = Annotated[int, Field(ge=1, le=65535)]
Name = Annotated[str, Field(pattern=f"^{SITE_NAME}$")]
Sha256 = Annotated[str, Field(pattern=f"^{SHA256}$")]
Pem = Annotated[str, Field(max_length=8192)]


class Document(BaseModel):
    """A frozen JSON object."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    def encode(self) -> bytes:
        """Its canonical JSON."""
        return canonical(self.model_dump(mode="json"))

    @classmethod
    def decode(cls, data: bytes | str) -> Self:
        """Read one.

        Raises
        ------
        FederadError
            M211 if it is something else.
        """
        try:
            return cls.model_validate_json(data)
        except (ValidationError, ValueError, RecursionError) as error:
            where = ""
            if isinstance(error, ValidationError):
                first = error.errors(include_url=False, include_input=False)[0]
                where = f" ({'.'.join(map(str, first['loc'])) or 'all of it'}: {first['msg']})"
            raise FederadError(
                "M211",
                happened=f"A message that should hold a {cls.__name__} cannot be read{where}.",
                because="It is damaged, or was written by another version of federad.",
                remedies=("check that both sides run the same version of federad", "send it again"),
            ) from None


class Signed(Document):
    """A document that the operator signs with the plan key."""

    signature: str = ""

    def signed(self, key: Ed25519PrivateKey) -> Self:
        """The same document with its signature."""
        return self.model_copy(update={SIGNATURE: sign(self.model_dump(mode="json"), key)})

    def verify(self, key: Ed25519PublicKey) -> None:
        """Raise M212 unless the holder of the key signed exactly this."""
        verify(self.model_dump(mode="json"), key, self._what())

    @classmethod
    def _what(cls) -> str:
        return "signed document"


class SignedPlan(Signed):
    """A plan that a consortium offers to run."""

    plan: str
    """Canonical JSON of the ``Plan``."""

    consortium: str
    run: str = Field(pattern=f"^{RUN}$")
    issued: str
    """When, as ISO 8601 in UTC."""

    @property
    def plan_sha256(self) -> str:
        """Identity of the plan, 64 hex digits."""
        return fingerprint(self.plan.encode())

    @classmethod
    def _what(cls) -> str:
        return "plan"


class SignedRelease(Signed):
    """A model that a consortium publishes."""

    release: str
    """Canonical JSON of its ``release.Manifest``."""

    sha256: Sha256
    """Of the file of weights."""

    n_bytes: int = Field(ge=0)
    consortium: str
    issued: str

    @classmethod
    def _what(cls) -> str:
        return "release"


class Notice(Document):
    """Something that a site tells about itself, made at its gate."""

    kind: Literal["approved", "refused", "progress", "status", "scanners"]
    plan_sha256: str = Field(default="", pattern=f"^({SHA256})?$")
    run: str = Field(default="", pattern=f"^({RUN})?$")
    round: int = Field(default=0, ge=0, lt=2**31)
    done: int = Field(default=0, ge=0, lt=2**31)
    total: int = Field(default=0, ge=0, lt=2**31)
    word: str = Field(default="", pattern=f"^({WORD})?$")
    scanners: tuple[Annotated[str, Field(pattern=f"^{SCANNER}$")], ...] = Field(default=(), max_length=MAX_SCANNERS)
    """What somebody at the site typed: its scanners, in words of the public vocabulary."""


class Plans(Document):
    """Reply of ``Plans``."""

    plans: tuple[SignedPlan, ...] = ()


class Notices(Document):
    """Request of ``Tell``."""

    notices: tuple[Notice, ...] = Field(default=(), max_length=MAX_NOTICES)


class Releases(Document):
    """Reply of ``Releases``."""

    releases: tuple[SignedRelease, ...] = ()


class ParcelName(Document):
    """Request of ``GetParcel`` and ``GetRelease``."""

    sha256: Sha256


class ParcelStored(ParcelName):
    """Reply of ``PutParcel``."""

    n_bytes: int = Field(ge=0)


class RenewRequest(Document):
    """Request of ``Renew``: a certificate for the same keys or for new ones."""

    csr_pem: Pem


class RenewReply(Document):
    """Reply of ``Renew``."""

    certificate_pem: Pem


class EnrolReply(Document):
    """What a site gets when it enrols."""

    site: Name
    consortium: str = Field(pattern=f"^{CONSORTIUM_NAME}$")
    host: Host
    port: Port
    certificate_pem: Pem
    ca_pem: Pem
    plan_key_pem: Pem
    """The operator's public key, with which plans and releases are signed."""

    signature: str = Field(default="", max_length=400)
    """Of the certificate authority over the canonical JSON of all other fields (ECDSA, SHA-384), in base64: a reply that
    comes by mail is as good as one over TLS."""

    def signed(self, key: ec.EllipticCurvePrivateKey) -> Self:
        """The same reply with its signature."""
        signature = key.sign(self._claimed(), ec.ECDSA(hashes.SHA384()))
        return self.model_copy(update={SIGNATURE: base64.b64encode(signature).decode("ascii")})

    def is_signed_by(self, key: ec.EllipticCurvePublicKey) -> bool:
        """Whether the authority with this public key wrote exactly this."""
        try:
            key.verify(base64.b64decode(self.signature, validate=True), self._claimed(), ec.ECDSA(hashes.SHA384()))
        except (InvalidSignature, ValueError):
            return False
        return True

    def _claimed(self) -> bytes:
        return canonical(self.model_dump(mode="json", exclude={SIGNATURE}))


class EnrolRequest(Document):
    """A site's request: its public keys, and the proof that it was invited."""

    invitation: str = Field(pattern="^[0-9a-f]{32}$")
    """Which invitation it answers."""

    site: Name
    ca_sha256: Sha256
    """Fingerprint of the certificate authority that the invitation pins."""

    csr_pem: Pem
    """PKCS #10, signed with the site's key."""

    node_public_key_pem: Pem
    """Public half of the SuperNode's key."""

    proof: str = Field(default="", max_length=200)
    """Signature with the invitation's key over the canonical JSON of all other fields, in base64."""

    def is_proven_by(self, key: Ed25519PublicKey) -> bool:
        """Whether whoever made the request holds the invitation with this public key."""
        try:
            key.verify(base64.b64decode(self.proof, validate=True), self._claimed())
        except (InvalidSignature, ValueError):
            return False
        return True

    def proven(self, secret: str) -> Self:
        """The same request with the proof."""
        proof = base64.b64encode(_invitation_key(secret).sign(self._claimed())).decode("ascii")
        return self.model_copy(update={"proof": proof})

    def _claimed(self) -> bytes:
        return canonical(self.model_dump(mode="json", exclude={"proof"}))


class Invitation(Document):
    """One site's way into a consortium: to be used once, and before it expires.

    Whoever holds it can enrol under the site's name, so it is handed over as a password would be.
    """

    consortium: str = Field(pattern=f"^{CONSORTIUM_NAME}$")
    host: Host
    port: Port
    site: Name
    expires: int
    """When the operator stops taking it [s since 1970]."""

    secret: str = Field(pattern="^[A-Za-z0-9_-]{43}$")
    """Private Ed25519 key of this invitation alone, base64url."""

    ca: str = Field(max_length=4096)
    """The consortium's certificate authority, DER in base64url."""

    @property
    def id(self) -> str:
        """What both sides call it: 32 hex digits that say nothing about the secret."""
        return invitation_id(_invitation_key(self.secret).public_key())

    @property
    def public_key(self) -> bytes:
        """What the operator keeps, 32 bytes."""
        return raw_public(_invitation_key(self.secret).public_key())

    @property
    def ca_pem(self) -> str:
        """The pinned certificate authority."""
        return ssl.DER_cert_to_PEM_cert(_unpadded(self.ca))

    @property
    def ca_sha256(self) -> str:
        """Fingerprint of the pinned certificate authority, as ``openssl x509 -fingerprint -sha256`` shows it."""
        return fingerprint(_unpadded(self.ca))

    @property
    def expires_at(self) -> datetime:
        """When the operator stops taking it."""
        return datetime.fromtimestamp(self.expires, UTC)

    def line(self) -> str:
        """The invitation as one line to paste."""
        return _PREFIX + encode_url(self.encode())

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read an invitation as pasted: line breaks and blanks that a mail program put in do no harm.

        Raises
        ------
        FederadError
            C148 if it is no invitation, or not all of one.
        """
        text = "".join(text.split())
        if not text.startswith(_PREFIX):
            raise _no_invitation(f"it does not begin with {_PREFIX!r}")
        try:
            invitation = cls.decode(_unpadded(text.removeprefix(_PREFIX)))
            _unpadded(invitation.ca)
        except (FederadError, ValueError):
            raise _no_invitation("a part of it is missing or was changed") from None
        return invitation


def raw_public(key: Ed25519PublicKey) -> bytes:
    """The 32 bytes of a public key."""
    return key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)


def invitation_id(key: Ed25519PublicKey) -> str:
    """What both sides call the invitation with this public key."""
    return hashlib.sha256(b"federad invitation" + raw_public(key)).hexdigest()[:32]


def encode_url(data: bytes) -> str:
    """base64url without padding."""
    return base64.urlsafe_b64encode(data).decode("ascii").rstrip("=")


def _unpadded(text: str) -> bytes:
    if not re.fullmatch("[A-Za-z0-9_-]*", text):
        raise ValueError("not base64url")
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def _invitation_key(secret: str) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(_unpadded(secret))


def _no_invitation(why: str) -> FederadError:
    return FederadError(
        "C148",
        happened=f"This is not an invitation that federad can read: {why}.",
        because="An invitation says where the consortium is and how to recognise it; nothing of it can be guessed.",
        remedies=(
            "paste the whole line that the operator sent, or give the file that holds it",
            "ask the operator for a new one if this one was damaged",
        ),
    )


def utc_now() -> str:
    """Now, as ISO 8601 in UTC to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
