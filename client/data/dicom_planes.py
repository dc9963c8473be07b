"""Where each plane of a DICOM file lies in the patient, and how its pixels are stored; runs in the child of ``reader``.

Geometry follows DICOM PS3.3: Image Plane (C.7.6.2), multi-frame functional groups (C.7.6.16), and for mosaics the tiles of
one image, as dcm2niix reads them (Li et al. 2016, doi:10.1016/j.jneumeth.2016.03.001).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset

from client.data.dicom_files import (
    GRID_TAG,
    LAYOUT,
    SEGMENTATIONS,
    Facts,
    Opened,
    check_size,
    floats,
    group,
    is_colour,
    is_grid,
    is_mosaic,
    number,
    opened,
    text,
)
from client.data.skips import Reason, UnusableError, unusable

MOSAIC_TAGS = [0x0019100A, 0x00291010, 0x00290010]

CROSS_SECTIONS = ("MR", "CT", "PT")
"""Modalities whose images have a place, or are broken."""


def layout(path: Path) -> Facts:
    """Where each plane of an image file lies in the patient, and where its pixels lie in the file.

    Returns
    -------
    dict
        ``rows``, ``columns``, ``frames``, ``samples``; ``raw``: dtype and offset of uncompressed grey pixels, else None;
        ``unit``; ``planes``: one entry per plane with position, orientation, spacing (row, column), all [mm] and LPS or
        None, slope, intercept, ``tile`` (row and column of its first pixel in a mosaic), and what it is sorted by.
    """
    file = opened(path, LAYOUT)
    with unusable(Reason.BAD_GEOMETRY):
        _kind_of_image(file)
        if int(file.header.get("NumberOfFrames") or 1) == 1 and is_mosaic(file.header):
            file = opened(path, [*LAYOUT, *MOSAIC_TAGS])
        return _layout(file)


def _kind_of_image(file: Opened) -> None:
    check_size(file)
    if file.header.get("SOPClassUID") in SEGMENTATIONS:
        raise UnusableError(Reason.NOT_SUPPORTED)


def _layout(file: Opened) -> Facts:
    header = file.header
    frames = max(int(header.get("NumberOfFrames") or 1), 1)
    stored_rows, stored_columns = rows, columns = int(header.get("Rows")), int(header.get("Columns"))
    if header.get("PerFrameFunctionalGroupsSequence"):
        planes = _planes_of_groups(header, frames)
    elif frames > 1:
        planes = _planes_of_frames(header, frames)
    elif is_mosaic(header):
        planes, rows, columns = _planes_of_mosaic(header)
    elif is_grid(header):
        planes, rows, columns = _planes_of_grid(header)
    else:
        planes = [_classic(header) | {"position": floats(header, "ImagePositionPatient", 3)}]
    factor, unit = _unit(header)
    for plane in planes:
        plane["slope"], plane["intercept"] = plane["slope"] * factor, plane["intercept"] * factor
    return {
        "rows": rows,
        "columns": columns,
        "stored_rows": stored_rows,
        "stored_columns": stored_columns,
        "frames": frames,
        "samples": 3 if is_colour(header) else 1,
        "raw": _raw(file, frames),
        "is_inverted": text(header, "PhotometricInterpretation") == "MONOCHROME1",
        "unit": unit,
        "instance": text(header, "SOPInstanceUID"),
        "is_projection": text(header, "Modality") not in CROSS_SECTIONS,
        "planes": planes,
    }


def _raw(file: Opened, frames: int) -> Facts | None:
    """How uncompressed grey pixels are stored, if they lie in the file as they are."""
    header, bits = file.header, int(file.header.get("BitsAllocated") or 0)
    if file.pixels_at is None or is_colour(header) or header.get("ModalityLUTSequence"):
        return None
    if bits not in (8, 16, 32) or (bits == 8 and not file.is_little):
        return None
    if text(header, "PhotometricInterpretation") not in ("MONOCHROME1", "MONOCHROME2"):
        raise UnusableError(Reason.NOT_SUPPORTED)
    n_values = int(header.get("Rows")) * int(header.get("Columns")) * frames
    if n_values * bits // 8 > file.after:
        raise UnusableError(Reason.DAMAGED)
    is_float = "PixelRepresentation" not in header and bits == 32 and "BitsStored" not in header
    letter = "f" if is_float else "i" if int(header.get("PixelRepresentation") or 0) else "u"
    return {
        "dtype": f"{'<' if file.is_little else '>'}{letter}{bits // 8}",
        "offset": file.pixels_at,
        "bits_stored": bits if is_float else int(header.get("BitsStored") or bits),
    }


def _classic(header: Dataset) -> Facts:
    """A plane but for its position: what a single-frame image says at the top of its data set."""
    image_type = [str(word) for word in (header.get("ImageType") or [])]
    spacing = next(
        (
            found
            for name in ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing")
            if (found := floats(header, name, 2))
        ),
        None,
    ) or _ultrasound_spacing(header)
    return {
        "frame": 0,
        "tile": None,
        "orientation": floats(header, "ImageOrientationPatient", 6),
        "spacing": spacing,
        "thickness": number(header, "SliceThickness") or 1.0,
        "slope": number(header, "RescaleSlope") or 1.0,
        "intercept": number(header, "RescaleIntercept"),
        "is_localizer": "LOCALIZER" in image_type,
        "contrast": [
            *image_type[2:],
            text(header, "ComplexImageComponent"),
            number(header, "EchoNumbers"),
            number(header, "EchoTime"),
        ],
        "order": [
            number(header, "TemporalPositionIdentifier"),
            number(header, "AcquisitionNumber"),
            number(header, "TriggerTime"),
            number(header, "InstanceNumber"),
        ],
    }


def _ultrasound_spacing(header: Dataset) -> list[float] | None:
    """Of the only calibrated region of an ultrasound image (PS3.3, C.8.5.5), where it is in centimetres."""
    regions = header.get("SequenceOfUltrasoundRegions") or []
    if len(regions) != 1 or any(int(number(regions[0], f"PhysicalUnits{xy}Direction")) != 3 for xy in "XY"):
        return None
    mm = [abs(10 * number(regions[0], f"PhysicalDelta{xy}")) for xy in "YX"]
    return mm if min(mm) > 0 else None


def _planes_of_frames(header: Dataset, frames: int) -> list[Facts]:
    """Multi-frame without functional groups: a dose grid, a reconstructed nuclear volume, else a film without places."""
    base = _classic(header)
    position = floats(header, "ImagePositionPatient", 3)
    offsets = header.get("GridFrameOffsetVector")
    detectors = header.get("DetectorInformationSequence") or []
    if offsets is not None and len(offsets) == frames and position and base["orientation"]:
        along = [float(v) - float(offsets[0]) * (float(offsets[0]) != 0) for v in offsets]
        base["slope"] = number(header, "DoseGridScaling") or base["slope"]
    elif "TOMO" in " ".join(header.get("ImageType") or []) and detectors and number(header, "SpacingBetweenSlices"):
        base["orientation"] = base["orientation"] or floats(detectors[0], "ImageOrientationPatient", 6)
        position = position or floats(detectors[0], "ImagePositionPatient", 3)
        along = [number(header, "SpacingBetweenSlices") * k for k in range(frames)]
    else:
        along, position = [0.0] * frames, None
    if position is None or base["orientation"] is None:
        return [base | {"frame": k, "position": None, "order": [0.0, 0.0, 0.0, float(k)]} for k in range(frames)]
    orientation = np.array(base["orientation"])
    normal = np.cross(orientation[:3], orientation[3:])
    return [
        base | {"frame": k, "position": (np.array(position) + along[k] * normal).tolist(), "order": [0, 0, 0, float(k)]}
        for k in range(frames)
    ]


def _planes_of_groups(header: Dataset, frames: int) -> list[Facts]:
    """Enhanced multi-frame: each frame with its own or the shared functional groups."""
    per_frame = header.PerFrameFunctionalGroupsSequence
    if len(per_frame) != frames:
        raise UnusableError(Reason.DAMAGED)
    shared = (header.get("SharedFunctionalGroupsSequence") or [None])[0]
    base = _classic(header)
    return [_plane_of_group(base, frame, shared, k) for k, frame in enumerate(per_frame)]


def _plane_of_group(base: Facts, frame: Dataset, shared: Dataset | None, k: int) -> Facts:
    def value(name: str, read: Callable[[Dataset], Any]) -> Any:
        item = group(frame, shared, name)
        return None if item is None else read(item)

    content = group(frame, shared, "FrameContentSequence") or Dataset()
    transform = group(frame, shared, "PixelValueTransformationSequence") or group(
        frame, shared, "RealWorldValueMappingSequence"
    )
    slope, intercept = base["slope"], base["intercept"]
    if transform is not None:
        slope = number(transform, "RescaleSlope") or number(transform, "RealWorldValueSlope") or 1.0
        intercept = number(transform, "RescaleIntercept") or number(transform, "RealWorldValueIntercept")
    kind = value("MRImageFrameTypeSequence", lambda i: [str(w) for w in i.get("FrameType") or []]) or []
    diffusion = group(frame, shared, "MRDiffusionSequence") or Dataset()
    measures = group(frame, shared, "PixelMeasuresSequence")
    return base | {
        "frame": k,
        "position": value("PlanePositionSequence", lambda i: floats(i, "ImagePositionPatient", 3)),
        "orientation": value("PlaneOrientationSequence", lambda i: floats(i, "ImageOrientationPatient", 6)),
        "spacing": None if measures is None else floats(measures, "PixelSpacing", 2),
        "thickness": (number(measures, "SliceThickness") if measures is not None else 0.0) or 1.0,
        "slope": slope,
        "intercept": intercept,
        "contrast": [
            *kind[2:],
            str(value("MRImageFrameTypeSequence", lambda i: text(i, "ComplexImageComponent")) or ""),
            value("MREchoSequence", lambda i: number(i, "EffectiveEchoTime")) or 0.0,
        ],
        "order": [
            number(content, "TemporalPositionIndex"),
            number(diffusion, "DiffusionBValue"),
            number(content, "FrameAcquisitionNumber"),
            float(k),
        ],
    }


def _planes_of_mosaic(header: Dataset) -> tuple[list[Facts], int, int]:
    """A Siemens mosaic: slices as tiles of one image, row by row; rows and columns of a tile come along.

    The header's position is where the first tile would begin if it were as large as the whole image.
    """
    csa = _csa(header)
    n = int(header[0x0019100A].value or 0) if 0x0019100A in header else 0
    n = n or int(float((csa.get("NumberOfImagesInMosaic") or ["0"])[0]))
    base = _classic(header)
    position, orientation, spacing = floats(header, "ImagePositionPatient", 3), base["orientation"], base["spacing"]
    if not 0 < n <= 4096 or position is None or orientation is None or spacing is None:
        raise UnusableError(Reason.TAGS_MISSING)
    side = int(np.ceil(np.sqrt(n)))
    rows, columns = int(header.Rows) // side, int(header.Columns) // side
    along_row, along_column = np.array(orientation[:3]), np.array(orientation[3:])
    first = (
        np.array(position)
        + along_row * spacing[1] * (int(header.Columns) - columns) / 2
        + along_column * spacing[0] * (int(header.Rows) - rows) / 2
    )
    step = _mosaic_normal(csa, np.cross(along_row, along_column)) * (
        number(header, "SpacingBetweenSlices") or base["thickness"]
    )
    planes = [
        base | {"position": (first + k * step).tolist(), "tile": [k // side * rows, k % side * columns]}
        for k in range(n)
    ]
    return planes, rows, columns


def _planes_of_grid(header: Dataset) -> tuple[list[Facts], int, int]:
    """United Imaging's grid: slices as tiles of one image, row by row, each with its position in a private sequence."""
    slices = header[GRID_TAG].value
    side = int(np.ceil(np.sqrt(len(slices))))
    rows, columns = int(header.Rows) // -(-len(slices) // side), int(header.Columns) // side
    base = _classic(header)
    orientation = base["orientation"] or floats(slices[0], "ImageOrientationPatient", 6)
    planes = [
        base
        | {
            "position": floats(one, "ImagePositionPatient", 3),
            "orientation": orientation,
            "tile": [k // side * rows, k % side * columns],
        }
        for k, one in enumerate(slices)
    ]
    return planes, rows, columns


def _mosaic_normal(csa: dict[str, list[str]], normal: NDArray[np.float64]) -> NDArray[np.float64]:
    """The direction in which a mosaic's slices follow each other; Siemens' private header knows it."""
    said = [float(v) for v in csa.get("SliceNormalVector", [])[:3]]
    return normal if len(said) != 3 or float(np.dot(said, normal)) >= 0 else -normal


def _csa(header: Dataset) -> dict[str, list[str]]:
    """Siemens' private header (0029,xx10) as text, version "SV10": name, number of items, and the items."""
    if 0x00291010 not in header:
        return {}
    data = bytes(header[0x00291010].value or b"")
    if data[:4] != b"SV10" or len(data) < 16:
        return {}
    (n_tags,) = struct.unpack_from("<I", data, 8)
    found: dict[str, list[str]] = {}
    at = 16
    for _ in range(min(n_tags, 1000)):
        name = data[at : at + 64].split(b"\0", 1)[0].decode("ascii", "replace")
        (n_items,) = struct.unpack_from("<i", data, at + 76)
        at += 84
        items = []
        for _ in range(min(n_items, 1000)):
            (length,) = struct.unpack_from("<i", data, at + 4)
            if not 0 <= length <= len(data):
                return found
            items.append(data[at + 16 : at + 16 + length].split(b"\0", 1)[0].decode("ascii", "replace").strip())
            at += 16 + (length + 3) // 4 * 4
        found[name] = [item for item in items if item]
    return found


def _unit(header: Dataset) -> tuple[float, str]:
    """What stored values, rescaled, are to be multiplied with, and in which unit they are then.

    CT is in Hounsfield units by its rescale values. PET in Bq/ml becomes SUV by body weight where the header has all that
    it needs (the vendor-neutral part of the QIBA consensus); else it stays in its unit.
    """
    modality = text(header, "Modality")
    if modality == "CT":
        return 1.0, "HU"
    if modality != "PT":
        return 1.0, ""
    units = text(header, "Units").upper()
    if units == "GML":
        return 1.0, "SUV"
    factor = _suv_factor(header) if units == "BQML" else None
    return (1.0, {"BQML": "Bq/ml", "CNTS": "counts"}.get(units, "")) if factor is None else (factor, "SUV")


def _suv_factor(header: Dataset) -> float | None:
    """Body weight [g] over the activity left at the time that decay was corrected to [Bq]."""
    doses = header.get("RadiopharmaceuticalInformationSequence") or []
    weight_g = 1000 * number(header, "PatientWeight")
    if len(doses) != 1 or weight_g <= 0 or "ATTN" not in (header.get("CorrectedImage") or []):
        return None
    total, half_life_s = number(doses[0], "RadionuclideTotalDose"), number(doses[0], "RadionuclideHalfLife")
    injected, began = _seconds(text(doses[0], "RadiopharmaceuticalStartTime")), _seconds(text(header, "SeriesTime"))
    if total <= 0 or half_life_s <= 0:
        return None
    decay = text(header, "DecayCorrection").upper()
    if decay == "ADMIN":
        return weight_g / total
    if decay != "START" or injected is None or began is None:
        return None
    waited_s = (began - injected) % 86_400
    return float(weight_g / (total * 2 ** (-waited_s / half_life_s)))


def _seconds(time: str) -> float | None:
    """Seconds since midnight of a DICOM time, HHMMSS.FFFFFF."""
    match = re.fullmatch(r"(\d{2})(\d{2})(\d{2}(?:\.\d+)?)", time)
    return None if match is None else 3600 * int(match[1]) + 60 * int(match[2]) + float(match[3])
