"""De-identification of DICOM headers after DICOM PS3.15, annex E.

The Basic Application Level Confidentiality Profile with the option Retain Longitudinal Temporal Information With Modified
Dates. Every attribute of table E.1-1 has its action in ``confidentiality.tsv``, at every depth of a data set; private
attributes and attributes of unknown kind go. UIDs are mapped, and the dates of a patient moved back by one number of days,
by keyed hashes: the same site maps the same identifier to the same thing for ever, and nobody else can undo or repeat it.

What it does not do: look at pixels. Text that is burned into an image, and faces that could be reconstructed, stay; so
does text that somebody typed into an attribute that the table does not name. The report (:class:`Handled`) says so.
"""

from __future__ import annotations

import hmac
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from datetime import date, timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydicom import DataElement, Dataset
from pydicom.datadict import keyword_for_tag
from pydicom.dataset import FileMetaDataset
from pydicom.sr.coding import Code
from pydicom.uid import ExplicitVRLittleEndian

from client.data.keys import key_of

PROFILE = (
    Code("113100", "DCM", "Basic Application Confidentiality Profile"),
    Code("113107", "DCM", "Retain Longitudinal Temporal Information Modified Dates Option"),
)
"""What is claimed of the result, as codes (PS3.16, CID 7050)."""

METHOD = "PS3.15 E.1 Basic Profile, modified dates; pixels unchecked"

MOST_DAYS = 3652
"""Dates are moved back by 1 to this many days, one number for each patient."""

TABLE = Path(__file__).with_name("confidentiality.tsv")

_TEXT = ("LO", "LT", "PN", "SH", "ST", "UC", "UR", "UT")
"""Kinds of attribute into which somebody can have typed something."""

_DUMMIES: dict[str, Any] = {
    **dict.fromkeys(_TEXT, "REMOVED"),
    "AE": "REMOVED",
    "AS": "000Y",
    "CS": "REMOVED",
    "DA": "19000101",
    "DS": "0",
    "DT": "19000101000000",
    "IS": "0",
    "TM": "000000",
    "UR": "urn:removed",
}


@dataclass
class Handled:
    """What was done to headers, in numbers of attributes; names of attributes and no values."""

    headers: int = 0
    removed: Counter[str] = field(default_factory=Counter)
    emptied: Counter[str] = field(default_factory=Counter)
    replaced: Counter[str] = field(default_factory=Counter)
    uids_mapped: Counter[str] = field(default_factory=Counter)
    dates_moved: Counter[str] = field(default_factory=Counter)
    private_removed: int = 0
    kept_text: Counter[str] = field(default_factory=Counter)
    """Attributes with text that the table does not name: they stay, and somebody should look at them."""

    def as_json(self) -> dict[str, Any]:
        """The report."""
        return {
            "profile": [f"{code.value} {code.meaning}" for code in PROFILE],
            "headers": self.headers,
            "removed": dict(sorted(self.removed.items())),
            "emptied": dict(sorted(self.emptied.items())),
            "replaced": dict(sorted(self.replaced.items())),
            "uids_mapped": dict(sorted(self.uids_mapped.items())),
            "dates_moved": dict(sorted(self.dates_moved.items())),
            "private_removed": self.private_removed,
            "not_handled": {
                "text_of_attributes_outside_the_table": dict(sorted(self.kept_text.items())),
                "pixels": "not looked at: text burned into images and faces stay",
            },
        }


class Deidentifier:
    """De-identifies headers of one site.

    Parameters
    ----------
    secret
        The site's, the key of all maps.
    """

    def __init__(self, secret: bytes) -> None:
        self.handled = Handled()
        self._secret = secret

    def apply(self, header: Dataset) -> Dataset:
        """A copy without identifiers; the given data set stays as it is."""
        made = deepcopy(header)
        self.handled.headers += 1
        person = str(header.get("PatientID") or "")
        self._clean(made, person)
        made.PatientIdentityRemoved = "YES"
        made.DeidentificationMethod = METHOD
        made.DeidentificationMethodCodeSequence = [_coded(code) for code in PROFILE]
        made.LongitudinalTemporalInformationModified = "MODIFIED"
        made.file_meta = self._meta(header, made)
        made.preamble = b"\0" * 128
        return made

    def uid(self, uid: str) -> str:
        """What stands for a UID here: a UID of the root 2.25 (PS3.5, B.2)."""
        number = int.from_bytes(hmac.digest(self._secret, b"uid" + uid.encode(), "sha256")[:16], "big")
        return f"2.25.{number}"

    def days(self, person: str) -> int:
        """By how many days the dates of a patient are moved back."""
        digest = hmac.digest(self._secret, b"days" + person.encode(), "sha256")
        return 1 + int.from_bytes(digest[:8], "big") % MOST_DAYS

    def _clean(self, data: Dataset, person: str) -> None:
        for element in list(data):
            if element.tag.is_private:
                self.handled.private_removed += 1
                del data[element.tag]
            elif (action := _action_of(int(element.tag))) is not None:
                self._act(action, data, element, person)
            elif element.VR == "UN":
                self.handled.removed[_name(element)] += 1
                del data[element.tag]
            elif element.VR == "SQ":
                for item in element.value:
                    self._clean(item, person)
            elif element.VR in _TEXT and element.value:
                self.handled.kept_text[_name(element)] += 1

    def _act(self, action: str, data: Dataset, element: DataElement, person: str) -> None:
        name = _name(element)
        if action == "date" and (moved := _moved(element, self.days(person))) is not None:
            self.handled.dates_moved[name] += 1
            element.value = moved
        elif action in ("X", "date"):
            self.handled.removed[name] += 1
            del data[element.tag]
        elif name in ("PatientID", "PatientName"):
            self.handled.replaced[name] += 1
            element.value = key_of(self._secret, person)
        elif action == "U":
            self.handled.uids_mapped[name] += 1
            self._map(element, person)
        elif action == "Z":
            self.handled.emptied[name] += 1
            element.value = [] if element.VR == "SQ" else None if element.VR in ("OB", "OW", "UN") else ""
        else:
            self.handled.replaced[name] += 1
            _make_dummy(element, self.uid)

    def _map(self, element: DataElement, person: str) -> None:
        """Map a UID, several, or those within a sequence of references."""
        if element.VR == "SQ":
            for item in element.value:
                self._clean(item, person)
        elif element.value:
            several = isinstance(element.value, list) or element.VM > 1
            element.value = [self.uid(str(uid)) for uid in element.value] if several else self.uid(str(element.value))

    def _meta(self, header: Dataset, made: Dataset) -> FileMetaDataset:
        """File meta information that names the object and its encoding, and nothing else."""
        meta, given = FileMetaDataset(), getattr(header, "file_meta", None)
        meta.TransferSyntaxUID = (given or {}).get("TransferSyntaxUID") or ExplicitVRLittleEndian
        if "SOPClassUID" in made:
            meta.MediaStorageSOPClassUID = made.SOPClassUID
        if "SOPInstanceUID" in made:
            meta.MediaStorageSOPInstanceUID = made.SOPInstanceUID
        return meta


def action_for(tag: int) -> str | None:
    """The action of the profile and its option for an attribute, as the table has it; None where it has none."""
    exact, groups = _table()
    found = exact.get(tag)
    if found is None and tag >> 24 in (0x50, 0x60):  # repeating groups: curves and overlays
        whole = f"{tag:08X}"
        found = groups.get(f"{whole[:2]}xx{whole[4:]}") or groups.get(f"{whole[:2]}xxxxxx")
    return found


@lru_cache(maxsize=4096)
def _action_of(tag: int) -> str | None:
    """One action: a choice that depends on the type of the attribute is made so that the object stays valid."""
    action = action_for(tag)
    if action is None or action in ("X", "Z", "D", "U"):
        return action
    if action == "C":
        return "date"
    return "U" if "U" in action else "D" if "D" in action else "Z"


@lru_cache(maxsize=1)
def _table() -> tuple[dict[int, str], dict[str, str]]:
    """Actions by tag, and by pattern for repeating groups."""
    exact: dict[int, str] = {}
    groups: dict[str, str] = {}
    lines = [line for line in TABLE.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    for line in lines[1:]:
        tag, _, basic, *dates = line.split("\t")
        action = dates[0] if dates else basic
        if "x" in tag:
            groups[tag] = action
        else:
            exact[int(tag, 16)] = action
    return exact, groups


def _moved(element: DataElement, days: int) -> Any:
    """The same date or dates, earlier; times of day as they are; None where it is neither or cannot be read."""
    if element.VR == "TM":
        return element.value
    if element.VR not in ("DA", "DT"):
        return None
    if not element.value:
        return element.value
    values = list(element.value) if element.VM > 1 else [element.value]
    try:
        moved = [_earlier(str(value), days) for value in values]
    except ValueError:
        return None
    return moved if element.VM > 1 else moved[0]


def _earlier(text: str, days: int) -> str:
    """``YYYYMMDD...`` moved back by days; of a date of fewer digits the missing ones count as the first."""
    digits = text.strip()[:8].ljust(8, "0")
    begin = date(int(digits[:4]), int(digits[4:6]) or 1, int(digits[6:8]) or 1)
    return f"{begin - timedelta(days=days):%Y%m%d}" + text.strip()[8:]


def _make_dummy(element: DataElement, map_uid: Callable[[str], str]) -> None:
    """A value that says nothing and is valid; in a sequence, of every attribute of every item."""
    if element.VR == "SQ":
        for item in element.value:
            for inner in list(item):
                if inner.tag.is_private or inner.VR == "UN":
                    del item[inner.tag]
                else:
                    _make_dummy(inner, map_uid)
    elif element.VR == "UI":
        element.value = map_uid(str(element.value))
    elif element.VR in _DUMMIES:
        element.value = _DUMMIES[element.VR]
    elif element.VR in ("OB", "OW", "OD", "OF", "OL", "OV", "UN"):
        element.value = b"\0\0"
    else:
        element.value = 0


def _coded(code: Code) -> Dataset:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = code.value, code.scheme_designator, code.meaning
    return item


def _name(element: DataElement) -> str:
    """Keyword of an attribute, or its tag."""
    return keyword_for_tag(element.tag) or f"{element.tag}"
