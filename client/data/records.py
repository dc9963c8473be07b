"""What a catalogue knows: files with what they say about themselves, series, studies."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from client.data.keys import Split


class Kind(StrEnum):
    """How a series is stored."""

    DICOM = "dicom"
    SEGMENTATION = "dicom segmentation"
    STRUCTURES = "dicom structures"
    NIFTI = "nifti"
    PICTURE = "picture"
    KSPACE = "k-space"
    REPORT = "dicom structured report"


class Role(StrEnum):
    """What a series is for."""

    IMAGE = "image"
    LABEL = "label"


@dataclass(frozen=True)
class File:
    """One file of a series, by its key; its path is :meth:`Catalogue.locate`'s to tell."""

    key: str
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class Series:
    """Files that form one image or one label."""

    key: str
    name: str
    """The name a plan's channels are matched with, lower case."""

    kind: Kind
    files: tuple[File, ...]
    """Slices in any order; for a picture's mask the mask and, if there is one, its field of view."""

    modality: str | None = None
    """DICOM Modality (0008,0060); None where the source states none, and the folder's owner is believed."""

    scanner: str | None = None
    reference: str | None = None
    """Key of the image series that a segmentation was drawn on."""

    n_planes: int = 1
    """Planes in all files together."""

    says_burned_in: bool = False
    """Whether a header says that text is burned into the pixels."""


@dataclass(frozen=True)
class Study:
    """One visit of one patient: images by name, at most one label series."""

    key: str
    patient: str
    images: dict[str, Series]
    label: Series | None
    """The reference; with more than one file of a segmentation it is ambiguous which one counts."""

    split: Split | None
    """A published split, for research data; it overrides the site's own."""

    scanner: str | None
    """Manufacturer, model and field strength, such as "SIEMENS Aurora 1.5 T"."""

    reports: tuple[File, ...] = ()
    """Structured reports that somebody has verified."""


@dataclass(frozen=True)
class Facts:
    """What one file says about itself, with keys in place of identifiers."""

    patient: str
    study: str
    series: str
    instance: str
    """Key of the image itself, to notice copies."""

    name: str
    kind: Kind
    role: Role
    modality: str | None = None
    scanner: str | None = None
    reference: str | None = None
    split: Split | None = None
    n_planes: int = 1
    """Planes in the file: frames of a multi-frame image, at least two for a mosaic."""

    says_burned_in: bool = False
    """Whether the header says that text is burned into the pixels (0028,0301)."""
