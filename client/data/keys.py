"""Names without people: keyed hashes stand for patients, studies, series and files, and place patients in splits.

HMAC-SHA256 (RFC 2104) with the site's secret: the same identifier gives the same key for ever, and nobody without the
secret can tell whether a person is in a catalogue by hashing a list of patient IDs.
"""

from __future__ import annotations

import hmac
import os
import re
from typing import Literal

from shared_models.plan import SplitTable

Split = Literal["train", "validation", "test"]

KEY_LENGTH = 16
"""Hexadecimal digits of a key: 64 bits, so a million patients collide with probability 3e-8."""

_PUBLISHED: dict[str, Split] = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
    "testing": "test",
}


def key_of(secret: bytes, identifier: str) -> str:
    """The key that stands for ``identifier`` at this site: 16 hexadecimal digits."""
    return hmac.digest(secret, os.fsencode(identifier), "sha256").hex()[:KEY_LENGTH]


def split_of(secret: bytes, patient: str, shares: SplitTable) -> Split:
    """The place of a patient, decided by nothing but the secret, the patient and the shares.

    u, the first 8 bytes of HMAC-SHA256(secret, "split" + key) over 2^64, is uniform on [0, 1): train below
    ``shares.train``, validation below ``shares.train + shares.validation``, else test. There is no stratification and no
    repair, since either would let one patient's presence move another (``PRIVACY_RULES``, rule 9).

    Parameters
    ----------
    secret
        The site's secret.
    patient
        Key of the patient, as in the catalogue.
    shares
        Expected shares, from the plan.
    """
    u = int.from_bytes(hmac.digest(secret, b"split" + patient.encode(), "sha256")[:8], "big") / 2**64
    if u < shares.train:
        return "train"
    return "validation" if u < shares.train + shares.validation else "test"


def published_split(word: str) -> Split | None:
    """A split as a data set's authors wrote it ("train", "val", ...), or None for an unknown word."""
    return _PUBLISHED.get(word.strip().lower())


def plain_name(text: str, *identifiers: str) -> str:
    """A series name in lower case without the given identifiers and without runs of six digits (dates, numbers).

    Operators type patient names into series descriptions; channels are found by these descriptions, so they are kept
    for what is left of them.
    """
    name = text.lower()
    for word in {w for i in identifiers for w in (i.lower(), *re.split(r"[\^=\s]+", i.lower())) if len(w) > 2}:
        name = name.replace(word, "")
    return re.sub(r"\d{6,}", "", name).strip(" _-.") or "unnamed"
