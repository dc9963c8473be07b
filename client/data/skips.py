"""Why something was left out: one closed list of reasons, so that they can be counted and never carry a name.

Every file and every study that a site does not use is one :class:`Skipped`. Readers raise :class:`UnusableError`; the
catalogue and the cohort turn it into a counted skip and go on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum


class Reason(StrEnum):
    """Everything that keeps a file out of the catalogue or a study out of a cohort."""

    EMPTY = "empty file"
    NOT_OPENED = "file cannot be opened"
    NOT_AN_IMAGE = "not an image"
    DIRECTORY = "a list of other files (DICOMDIR)"
    DAMAGED = "damaged or truncated file"
    TAGS_MISSING = "needed DICOM tags are missing"
    NO_PATIENT = "no patient ID"
    NOT_SUPPORTED = "a kind of image that is not read"
    NO_DECODER = "compressed in a way that is not read"
    BAD_UID = "a UID that is none"
    TOO_SLOW = "takes too long to read"
    CRASHED = "breaks the program that reads it"
    TOO_LARGE = "implausibly large image"
    ENCRYPTED = "encrypted member of an archive"
    NESTED = "archive within an archive"
    UNSAFE_MEMBER = "unsafe name in an archive"
    SWELLS = "implausibly large when unpacked"
    DUPLICATE = "the same image twice"
    UID_TWICE = "one UID for two different images"
    PATIENTS_DISAGREE = "one series under several patient IDs"
    NO_IMAGE = "mask without an image"

    EXCLUDED = "consent withdrawn"
    FILE_GONE = "file gone since the catalogue was built"
    SPLITS_DISAGREE = "published splits of one patient disagree"
    CHANNEL_MISSING = "a channel of the plan is missing"
    SEVERAL_SERIES = "several series fit one channel"
    NO_LABEL = "image without a mask"
    SEVERAL_LABELS = "several segmentations of one study"
    NEEDS_VOLUME = "needs a volume"
    NO_SPACING = "pixel spacing unknown"
    NOT_AXIAL = "slices are not axial"
    PIXELS = "pixel data cannot be decoded"
    NOT_FINITE = "values are not finite"
    SLICES_DIFFER = "slices of one series differ in size or orientation"
    DUPLICATE_SLICES = "two slices at one position"
    SEVERAL_VOLUMES = "several volumes in one series"
    UNEVEN_SLICES = "slices are missing or unevenly spaced"
    BAD_GEOMETRY = "impossible geometry"
    CHANNELS_DIFFER = "channels on different grids"
    LABEL_SIZE = "mask of another size than its image"
    LABEL_PLACE = "mask does not lie on its image"
    LABEL_NAMES = "no segment is named as in the plan"
    LABEL_VALUES = "mask value outside the plan's labels"
    NOT_LABELLED = "study without a label"
    LABELS_DISAGREE = "labels of one study disagree"
    LABEL_UNKNOWN = "label outside the plan's set"
    LAYOUT = "k-space of unknown layout"
    UNDERSAMPLED = "k-space is not fully sampled"
    COILS = "coils are missing, or several where the plan has one"
    IS_KSPACE = "k-space where the plan wants images"
    NO_KSPACE = "an image where the plan wants measured k-space"


@dataclass(frozen=True)
class Skipped:
    """One thing left out."""

    key: str
    """Key of the file (catalogue) or of the study (cohort); :meth:`Catalogue.locate` gives the path of a file."""

    reason: Reason


class UnusableError(Exception):
    """This file or study cannot be used; caught inside ``client.data`` and counted."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason.value)
        self.reason = reason


def counts(skipped: Iterable[Skipped]) -> str:
    """The reasons with how often each occurs, most frequent first: safe to print, since no name is in it."""
    tally = sorted(Counter(s.reason.value for s in skipped).items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{reason}: {n}" for reason, n in tally) if tally else "none"


@contextmanager
def unusable(reason: Reason) -> Iterator[None]:
    """Turn any failure of a decoder into :class:`UnusableError` with ``reason``.

    Decoders answer hostile or broken input with almost any exception (nine types were seen from pydicom alone), and for
    each of them the answer is the same: this file is left out. Only reading may happen inside, never writing.
    """
    try:
        yield
    except UnusableError:
        raise
    except (PermissionError, FileNotFoundError) as error:
        raise UnusableError(Reason.NOT_OPENED) from error
    except Exception as error:
        raise UnusableError(reason) from error
