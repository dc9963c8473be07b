"""What the operator signs: JSON documents with Ed25519 (RFC 8032), in one spelling.

A document is a JSON object. Its signature covers the canonical JSON of all other fields, so that it does not depend on
their order or on white space, and a plan can never pass for a release: their fields have other names.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from shared_models.errors import FederadError

SIGNATURE = "signature"
"""The field that holds the signature and is not covered by it."""


def canonical(document: Mapping[str, Any]) -> bytes:
    """The one spelling of a JSON object: keys sorted, no spaces, ASCII."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def sign(document: Mapping[str, Any], key: Ed25519PrivateKey) -> str:
    """The signature of a document without its field ``signature``, in base64."""
    return base64.b64encode(key.sign(_signed(document))).decode("ascii")


def verify(document: Mapping[str, Any], key: Ed25519PublicKey, what: str = "document") -> None:
    """Make sure that ``document`` is what the holder of the key signed.

    Parameters
    ----------
    what
        What the document is, for the message.

    Raises
    ------
    FederadError
        M212 if the signature is missing or does not hold.
    """
    try:
        key.verify(base64.b64decode(document[SIGNATURE], validate=True), _signed(document))
    except (InvalidSignature, KeyError, TypeError, ValueError, binascii.Error):
        raise FederadError(
            "M212",
            happened=f"The signature of a {what} does not hold.",
            because="It was changed on the way, or was signed by another than the operator this site enrolled with.",
            remedies=(
                f"do not use this {what}, and ask the operator for it again",
                "tell the operator; if the consortium was set up anew, this site has to enrol again",
            ),
        ) from None


def fingerprint(data: bytes) -> str:
    """SHA-256 of bytes, 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def private_pem(key: Ed25519PrivateKey) -> bytes:
    """The private key as PKCS #8 PEM, not encrypted: for a file that only its owner may read."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def public_pem(key: Ed25519PublicKey) -> str:
    """The public key as PEM text."""
    pem = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return pem.decode("ascii")


def load_public(pem: str) -> Ed25519PublicKey:
    """The key in PEM text.

    Raises
    ------
    ValueError
        If it is no Ed25519 key.
    """
    try:
        key = serialization.load_pem_public_key(pem.encode())
    except UnsupportedAlgorithm as error:
        raise ValueError(str(error)) from None
    if not isinstance(key, Ed25519PublicKey):
        raise ValueError(f"{type(key).__name__} is not an Ed25519 key")
    return key


def _signed(document: Mapping[str, Any]) -> bytes:
    return canonical({name: value for name, value in document.items() if name != SIGNATURE})
