"""What a file of k-space says of patient, study, scanner and place, in DICOM's words; what it does not say stays unknown.

ISMRMRD's header (Inati et al. 2017, doi:10.1002/mrm.26089; fastMRI has one too) names patient, study and parameters. Where
slices lie is said by the lines of an ISMRMRD file alone: the middle of the field of view and the directions of readout,
phase encoding and slices in DICOM's LPS axes. Pixels grow along readout and phase encoding, and the middle of the field of
view lies on the centre of pixel n // 2, where the Fourier transform has it.

:func:`told` opens the file and runs in the child process of ``reader``; :func:`acquired` asks it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset

from client.data import reader
from client.data.skips import Reason, UnusableError, unusable

LONGEST = 64
"""Longer texts are cut, as DICOM's LO has it [characters]."""

SAME_DIRECTION = 1e-3
"""How far unit vectors may be off a right angle or each other."""

_NAMESPACE = {"": "http://www.ismrm.org/ISMRMRD"}


@dataclass(frozen=True)
class Place:
    """Where the slices of a stack lie in the patient, in DICOM's LPS axes."""

    orientation: tuple[float, ...]
    """Directions in which columns and rows grow, six cosines, as in Image Orientation (Patient)."""

    corners: tuple[tuple[float, float, float], ...]
    """Centre of the first pixel of each slice [mm]."""


@dataclass(frozen=True)
class Acquired:
    """What is known of an acquisition."""

    header: Dataset = field(default_factory=Dataset)
    """Attributes that the file states, and no others."""

    pixel_mm: tuple[float, float] | None = None
    """Distance of pixel centres along (y, x) [mm]."""

    thickness_mm: float | None = None
    place: Place | None = None


def acquired(path: Path, shape: tuple[int, int, int]) -> Acquired:
    """What a file says.

    Parameters
    ----------
    path
        A file of k-space that could be read.
    shape
        Slices, rows (phase encoding) and columns (readout) of its images.

    Raises
    ------
    UnusableError
        If its header is damaged.
    """
    if path.suffix.lower() == ".npz":
        return Acquired()
    said = reader.ask("k-space origin", path, shape=list(shape)).facts
    with unusable(Reason.DAMAGED):
        header = Dataset()
        for keyword, value in said["header"].items():
            if keyword not in KEYWORDS:
                raise UnusableError(Reason.DAMAGED)
            setattr(header, keyword, str(value)[:LONGEST])
        pixel_mm = None if said["pixel_mm"] is None else (float(said["pixel_mm"][0]), float(said["pixel_mm"][1]))
        place = None
        if said["corners"] is not None and len(said["corners"]) == shape[0]:
            corners = tuple((float(x), float(y), float(z)) for x, y, z in said["corners"])
            place = Place(tuple(float(cosine) for cosine in said["orientation"]), corners)
        return Acquired(header, pixel_mm, said["thickness_mm"] and float(said["thickness_mm"]), place)


def told(path: Path, shape: tuple[int, int, int]) -> dict[str, Any]:
    """What :func:`acquired` needs, as JSON has it.

    Parameters
    ----------
    path
        A file of HDF5.
    shape
        As there.

    Returns
    -------
    dict
        ``header``, values by keyword; ``pixel_mm``, ``thickness_mm``, ``orientation`` and ``corners``, None where unknown.

    Raises
    ------
    UnusableError
        If the header is damaged, or a part of the file lies elsewhere.
    """
    from client.data.kspace_files import check_layout, opened, patient_of, xml_of

    with opened(path) as file:
        check_layout(file, path)
        root = xml_of(file)
        header = {} if root is None else _stated(root)
        patient = patient_of(file)
        if patient is not None:
            header["PatientID"] = _text(patient)
        pixel_mm, thickness_mm = (None, None) if root is None else _sizes(root, shape)
        place = _place(file, shape, pixel_mm) if pixel_mm is not None else None
    return {
        "header": header,
        "pixel_mm": pixel_mm,
        "thickness_mm": thickness_mm,
        "orientation": None if place is None else place.orientation,
        "corners": None if place is None else place.corners,
    }


def _text(value: str) -> str:
    return "".join(c for c in value.strip() if c.isprintable() and c != "\\")[:LONGEST]


def _short(value: str) -> str:
    return _text(value)[:16]


def _date(value: str) -> str:
    found = re.fullmatch(r"\s*(\d{4})-(\d{2})-(\d{2}).*", value, re.DOTALL)
    return "".join(found.groups()) if found else ""


def _time(value: str) -> str:
    found = re.fullmatch(r"\s*(\d{2}):(\d{2}):(\d{2}).*", value, re.DOTALL)
    return "".join(found.groups()) if found else ""


def _number(value: str) -> str:
    return f"{float(value):.10g}"


def _uid(value: str) -> str:
    value = value.strip()
    return value if len(value) <= LONGEST and re.fullmatch(r"[0-2](\.(0|[1-9]\d*))+", value) else ""


def _one_of(*terms: str) -> Callable[[str], str]:
    return lambda value: value.strip().upper() if value.strip().upper() in terms else ""


_STATED: dict[str, tuple[str, Callable[[str], str]]] = {
    "subjectInformation/patientName": ("PatientName", _text),
    "subjectInformation/patientID": ("PatientID", _text),
    "subjectInformation/patientBirthdate": ("PatientBirthDate", _date),
    "subjectInformation/patientGender": ("PatientSex", _one_of("M", "F", "O")),
    "subjectInformation/patientWeight_kg": ("PatientWeight", _number),
    "studyInformation/studyDate": ("StudyDate", _date),
    "studyInformation/studyTime": ("StudyTime", _time),
    "studyInformation/studyID": ("StudyID", _short),
    "studyInformation/accessionNumber": ("AccessionNumber", _short),
    "studyInformation/referringPhysicianName": ("ReferringPhysicianName", _text),
    "studyInformation/studyDescription": ("StudyDescription", _text),
    "studyInformation/studyInstanceUID": ("StudyInstanceUID", _uid),
    "studyInformation/bodyPartExamined": ("BodyPartExamined", lambda value: _short(value).upper()),
    "measurementInformation/patientPosition": (
        "PatientPosition",
        _one_of("HFS", "HFP", "HFDR", "HFDL", "FFS", "FFP", "FFDR", "FFDL"),
    ),
    "measurementInformation/protocolName": ("ProtocolName", _text),
    "measurementInformation/frameOfReferenceUID": ("FrameOfReferenceUID", _uid),
    "acquisitionSystemInformation/systemVendor": ("Manufacturer", _text),
    "acquisitionSystemInformation/systemModel": ("ManufacturerModelName", _text),
    "acquisitionSystemInformation/institutionName": ("InstitutionName", _text),
    "acquisitionSystemInformation/stationName": ("StationName", _short),
    "acquisitionSystemInformation/systemFieldStrength_T": ("MagneticFieldStrength", _number),
    "sequenceParameters/TR": ("RepetitionTime", _number),
    "sequenceParameters/TE": ("EchoTime", _number),
    "sequenceParameters/TI": ("InversionTime", _number),
    "sequenceParameters/flipAngle_deg": ("FlipAngle", _number),
}
"""Elements of the header, the DICOM attribute that says the same, and how its value is written; times in ms in both."""


KEYWORDS = frozenset({keyword for keyword, _ in _STATED.values()} | {"ImagingFrequency", "ImagedNucleus"})


def _stated(root: ElementTree.Element) -> dict[str, str]:
    header: dict[str, str] = {}
    for path, (keyword, written) in _STATED.items():
        found = root.find(path, _NAMESPACE)
        if found is None or not (found.text or "").strip():
            continue
        try:
            value = written(str(found.text))
        except ValueError:
            continue
        if value:
            header[keyword] = value
    frequency = root.findtext("experimentalConditions/H1resonanceFrequency_Hz", "", _NAMESPACE).strip()
    if frequency.isdigit():
        header |= {"ImagingFrequency": _number(str(int(frequency) / 1e6)), "ImagedNucleus": "1H"}
    return header


def _sizes(root: ElementTree.Element, shape: tuple[int, int, int]) -> tuple[tuple[float, float] | None, float | None]:
    """Pixel size along (y, x) and thickness [mm], from the encoded field of view over the encoded matrix: what is
    reconstructed is cut out of that, and not interpolated. Unknown where the rows are not those that were encoded."""
    encoded = _triple(root, "encoding/encodedSpace/matrixSize")
    field_mm = _triple(root, "encoding/encodedSpace/fieldOfView_mm")
    shown_mm = _triple(root, "encoding/reconSpace/fieldOfView_mm")
    thickness_mm = shown_mm[2] if shown_mm is not None else None
    if encoded is None or field_mm is None or round(encoded[1]) != shape[1]:
        return None, thickness_mm
    return (field_mm[1] / encoded[1], field_mm[0] / encoded[0]), thickness_mm


def _triple(root: ElementTree.Element, path: str) -> tuple[float, float, float] | None:
    try:
        x, y, z = (float(str(root.findtext(f"{path}/{axis}", "", _NAMESPACE))) for axis in "xyz")
    except ValueError:
        return None
    return (x, y, z) if min(x, y, z) > 0 and max(x, y, z) < 1e6 else None


def _place(file: Any, shape: tuple[int, int, int], pixel_mm: tuple[float, float]) -> Place | None:
    """Where the slices lie, if every line says so and all agree; None for fastMRI's files, which have no lines."""
    if "dataset" not in file:
        return None
    heads = file["dataset"]["data"].fields("head")[()]
    is_noise = (heads["flags"] & (1 << 18)) != 0
    heads = heads[~is_noise]
    along_x, along_y, normal = (_common(heads[name]) for name in ("read_dir", "phase_dir", "slice_dir"))
    if along_x is None or along_y is None or normal is None:
        return None
    if (
        np.abs(np.abs(np.cross(along_x, along_y) @ normal) - 1) > SAME_DIRECTION
        or abs(along_x @ along_y) > SAME_DIRECTION
    ):
        return None
    n_slices, n_rows, n_columns = shape
    corners = []
    for k in range(n_slices):
        middles = heads["position"][heads["idx"]["slice"] == k].astype(np.float64)
        if not len(middles) or not np.isfinite(middles).all() or np.ptp(middles, axis=0).max() > 1e-2:
            return None
        corner = middles[0] - n_columns // 2 * pixel_mm[1] * along_x - n_rows // 2 * pixel_mm[0] * along_y
        corners.append((float(corner[0]), float(corner[1]), float(corner[2])))
    if len(set(corners)) < n_slices:
        return None
    return Place((*map(float, along_x), *map(float, along_y)), tuple(corners))


def _common(directions: NDArray[np.float32]) -> NDArray[np.float64] | None:
    """The one unit vector that all lines name; None where they name several, or none."""
    if not len(directions):
        return None
    first = directions[0].astype(np.float64)
    length = np.linalg.norm(first)
    if not np.isfinite(directions).all() or abs(length - 1) > SAME_DIRECTION:
        return None
    return first / length if np.abs(directions - first).max() <= SAME_DIRECTION else None
