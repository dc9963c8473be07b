"""Read DICOM: what a file's header says, a series as one volume, a segmentation on that volume.

Geometry follows the Image Plane module (DICOM PS3.3, C.7.6.2), segmentations the Segmentation IOD (PS3.3, A.51 and
C.8.20). Single-frame grey images are read; multi-frame, mosaic and colour images are counted skips. Which files belong
together is the catalogue's matter.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.errors import InvalidDicomError
from pydicom.uid import UID, SegmentationStorage

from client.data.keys import key_of, plain_name
from client.data.records import Facts, Kind, Role
from client.data.scan import MAX_SIDE, Scan
from client.data.skips import Reason, UnusableError, unusable

# pydicom's log quotes values of the header and tracebacks of decoders; what a reader needs is the counted reason.
logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)

ORIENTATION_TOLERANCE = 1e-3
"""Largest difference between direction cosines that count as equal; headers round them to about six digits."""

PLACE_TOLERANCE = 0.1
"""Largest distance of a slice or frame from where it should be, as a share of the spacing."""

_LABEL_MAP = UID("1.2.840.10008.5.1.4.1.1.66.7")
"""Label Map Segmentation Storage (PS3.4, B.5): one value per voxel instead of one frame per segment."""

_SEGMENTATIONS = (SegmentationStorage, _LABEL_MAP)
_IDENTITY = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")
_GEOMETRY = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing")
_HEADER = [
    *("PatientID", "PatientName", *_IDENTITY, "SOPClassUID", "Modality", "SeriesDescription", "ImageType"),
    *("Manufacturer", "ManufacturerModelName", "MagneticFieldStrength", "ReferencedSeriesSequence"),
    *("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "BitsAllocated", *_GEOMETRY),
]


@dataclass(frozen=True)
class Stack:
    """A series as a volume that still knows its slices."""

    scan: Scan
    uids: tuple[str, ...]
    """SOP Instance UID of each slice; never stored."""

    positions: NDArray[np.float64]
    """Image Position (Patient) of each slice [mm, LPS], ``(slice, 3)``."""


def inspect(path: Path, size: int, secret: bytes) -> Facts:
    """What the header of one DICOM file says; its pixels are not read.

    Parameters
    ----------
    path
        A file with the DICOM preamble (PS3.10, 7.1); others are refused rather than guessed at.
    size
        Its size in bytes, against which an uncompressed image is checked.
    secret
        The site's secret: identifiers leave this function as keys only.

    Raises
    ------
    UnusableError
        If the file is no DICOM, is cut short, lacks tags, or is of a kind that is not supported.
    """
    with unusable(Reason.DAMAGED):
        with path.open("rb") as file:
            try:
                header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=list(_HEADER))
            except InvalidDicomError as error:
                raise UnusableError(Reason.NOT_AN_IMAGE) from error
            n_bytes_left = size - file.tell()
        return _facts(header, n_bytes_left, secret)


def read_series(paths: Sequence[Path], *, even: bool) -> Stack:
    """One series as a volume, slices sorted along their normal.

    Parameters
    ----------
    paths
        The slices in any order, one file each.
    even
        Whether slices must be evenly spaced: needed to resample along z, not to work on single slices.

    Returns
    -------
    Stack
        Rescaled intensities ``(1, slice, row, column)`` with the affine to patient coordinates [mm], and the UIDs of the
        slices. Slices run along the cross product of row and column direction.

    Raises
    ------
    UnusableError
        If a file cannot be decoded, or the slices do not form one regular stack.
    """
    with unusable(Reason.PIXELS):
        read = [pydicom.dcmread(path) for path in paths]
    with unusable(Reason.BAD_GEOMETRY):
        slices = sorted(read, key=lambda one: float(_normal(read[0]) @ _vector(one.ImagePositionPatient)))
        affine = _affine(slices, even=even)
    image = np.empty((1, len(slices), int(slices[0].Rows), int(slices[0].Columns)), dtype=np.float32)
    for k, one in enumerate(slices):
        with unusable(Reason.PIXELS):
            image[0, k] = _intensities(one)
    positions = np.array([_vector(s.ImagePositionPatient) for s in slices])
    return Stack(Scan(image, affine), tuple(str(s.SOPInstanceUID) for s in slices), positions)


def attribute(path: Path, keyword: str) -> str:
    """The value of an attribute of the data set itself, as text; empty where it has none.

    Raises
    ------
    UnusableError
        If the file cannot be read.
    """
    with unusable(Reason.DAMAGED):
        return str(pydicom.dcmread(path, stop_before_pixels=True, specific_tags=[keyword]).get(keyword) or "")


def read_segmentation(path: Path, series: Stack, labels: Sequence[str]) -> NDArray[np.uint8]:
    """A DICOM segmentation laid on the slices of a series.

    Segments are matched with ``labels`` by Segment Label (0062,0005), whatever the case; other segments are background,
    and so is every slice that no frame refers to. A frame belongs to the slice that it names by SOP Instance UID, else to
    the one at its position. Where two segments overlap the later label wins.

    Parameters
    ----------
    path
        A SEG file: binary, fractional (a voxel counts from half of the maximum on) or label map.
    series
        The image series.
    labels
        The plan's labels, background first.

    Returns
    -------
    NDArray[np.uint8]
        Index into ``labels``, ``(slice, row, column)``.

    Raises
    ------
    UnusableError
        If it cannot be decoded, has another size or place than the series, or names no label of the plan.
    """
    with unusable(Reason.PIXELS):
        seg = pydicom.dcmread(path)
        names = {name.strip().lower(): index for index, name in enumerate(labels) if index > 0}
        wanted = {
            int(segment.SegmentNumber): names[str(segment.SegmentLabel).strip().lower()]
            for segment in seg.SegmentSequence
            if str(segment.SegmentLabel).strip().lower() in names
        }
        if not wanted:
            raise UnusableError(Reason.LABEL_NAMES)
        if (seg.Rows, seg.Columns) != series.scan.shape[1:]:
            raise UnusableError(Reason.LABEL_SIZE)
        return _laid_on(seg, series, wanted)


def _laid_on(seg: Dataset, series: Stack, wanted: dict[int, int]) -> NDArray[np.uint8]:
    label = np.zeros(series.scan.shape, dtype=np.uint8)
    n_placed = 0
    for frame, pixels in zip(seg.PerFrameFunctionalGroupsSequence, _frames(seg), strict=True):
        k = _slice_of(frame, seg, series)
        if k is None:
            continue
        n_placed += 1
        for number, index in _segments(frame, seg, wanted):
            inside = _inside(pixels, seg, number)
            label[k] = np.where(inside & (label[k] < index), index, label[k])
    if n_placed == 0:
        raise UnusableError(Reason.LABEL_PLACE)
    return label


def _frames(seg: Dataset) -> Iterator[NDArray[Any]]:
    pixels = seg.pixel_array
    yield from pixels if pixels.ndim == 3 else pixels[np.newaxis]


def _segments(frame: Dataset, seg: Dataset, wanted: dict[int, int]) -> list[tuple[int, int]]:
    """(segment number, label index) that a frame can hold: its own segment, or all of them in a label map."""
    if seg.SOPClassUID == _LABEL_MAP:
        return list(wanted.items())
    groups = _group(frame, seg, "SegmentIdentificationSequence")
    number = int(groups.ReferencedSegmentNumber)
    return [(number, wanted[number])] if number in wanted else []


def _inside(pixels: NDArray[Any], seg: Dataset, number: int) -> NDArray[np.bool_]:
    if seg.SOPClassUID == _LABEL_MAP:
        return np.asarray(pixels == number)
    if seg.SegmentationType == "FRACTIONAL":
        return np.asarray(2 * pixels.astype(np.int64) >= int(seg.MaximumFractionalValue))
    return np.asarray(pixels > 0)


def _group(frame: Dataset, seg: Dataset, name: str) -> Any:
    """A functional group of a frame, its own or the shared one (PS3.3, C.7.6.16), or None."""
    for holder in (frame, *seg.get("SharedFunctionalGroupsSequence", [])):
        if items := holder.get(name):
            return items[0]
    return None


def _slice_of(frame: Dataset, seg: Dataset, series: Stack) -> int | None:
    """Index of the slice that a frame lies on; None if it lies on a slice that is not there."""
    place = _group(frame, seg, "PlanePositionSequence")
    position = None if place is None else _vector(place.ImagePositionPatient)
    k = _named_slice(frame, seg, series)
    if k is None and position is not None:
        k = int(np.argmin(np.linalg.norm(series.positions - position, axis=1)))
        if not _near(position, k, series):
            return None
    elif k is not None and position is not None and not _near(position, k, series):
        raise UnusableError(Reason.LABEL_PLACE)
    plane = _group(frame, seg, "PlaneOrientationSequence")
    if k is not None and plane is not None and not _parallel(_vector(plane.ImageOrientationPatient), series):
        raise UnusableError(Reason.LABEL_PLACE)
    return k


def _named_slice(frame: Dataset, seg: Dataset, series: Stack) -> int | None:
    derivation = _group(frame, seg, "DerivationImageSequence")
    for source in derivation.get("SourceImageSequence", []) if derivation is not None else []:
        if source.ReferencedSOPInstanceUID in series.uids:
            return series.uids.index(source.ReferencedSOPInstanceUID)
    return None


def _near(position: NDArray[np.float64], k: int, series: Stack) -> bool:
    tolerance_mm = PLACE_TOLERANCE * _spacings(series).min()
    return bool(np.abs(series.positions[k] - position).max() <= tolerance_mm)


def _parallel(orientation: NDArray[np.float64], series: Stack) -> bool:
    affine = _affine_of(series)
    directions = affine[:3, :2] / np.linalg.norm(affine[:3, :2], axis=0)
    return bool(np.abs(orientation - directions.T.ravel()).max() <= ORIENTATION_TOLERANCE)


def _spacings(series: Stack) -> NDArray[np.float64]:
    return np.asarray(np.linalg.norm(_affine_of(series)[:3, :3], axis=0))


def _affine_of(series: Stack) -> NDArray[np.float64]:
    if series.scan.affine is None:
        raise ValueError("a DICOM series always has an affine")
    return series.scan.affine


def _affine(slices: Sequence[Dataset], *, even: bool) -> NDArray[np.float64]:
    """Index (column, row, slice) to LPS mm for sorted slices (PS3.3, C.7.6.2.1.1), after checking that they are a stack."""
    first = slices[0]
    _check_alike(slices)
    orientation, spacing = _vector(first.ImageOrientationPatient), _vector(first.PixelSpacing)
    if np.abs(np.linalg.norm(orientation.reshape(2, 3), axis=1) - 1).max() > ORIENTATION_TOLERANCE:
        raise UnusableError(Reason.BAD_GEOMETRY)
    affine = np.eye(4)
    affine[:3, 0] = orientation[:3] * spacing[1]
    affine[:3, 1] = orientation[3:] * spacing[0]
    affine[:3, 2] = _slice_step(slices, even=even)
    affine[:3, 3] = _vector(first.ImagePositionPatient)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine)) < 1e-9:
        raise UnusableError(Reason.BAD_GEOMETRY)
    return affine


def _check_alike(slices: Sequence[Dataset]) -> None:
    first = slices[0]
    for one in slices[1:]:
        turned = np.abs(_vector(one.ImageOrientationPatient) - _vector(first.ImageOrientationPatient)).max()
        resized = np.abs(_vector(one.PixelSpacing) / _vector(first.PixelSpacing) - 1).max()
        if (one.Rows, one.Columns) != (first.Rows, first.Columns) or max(turned, resized) > ORIENTATION_TOLERANCE:
            raise UnusableError(Reason.SLICES_DIFFER)


def _slice_step(slices: Sequence[Dataset], *, even: bool) -> NDArray[np.float64]:
    """The way from one slice to the next [mm, LPS]: along the normal, by the mean distance, or the median if some miss."""
    normal = _normal(slices[0])
    if len(slices) == 1:
        return normal * float(slices[0].get("SliceThickness") or 1.0)
    positions = np.array([_vector(s.ImagePositionPatient) for s in slices])
    along = (positions - positions[0]) @ normal
    aside = positions - positions[0] - np.outer(along, normal)
    gaps = np.diff(along)
    if gaps.min() <= PLACE_TOLERANCE * np.median(gaps):
        raise UnusableError(Reason.DUPLICATE_SLICES)
    if np.abs(aside).max() > PLACE_TOLERANCE * float(min(slices[0].PixelSpacing)):
        raise UnusableError(Reason.BAD_GEOMETRY)
    gap = float(gaps.mean() if even else np.median(gaps))
    if even and np.abs(along - gap * np.arange(len(slices))).max() > PLACE_TOLERANCE * gap:
        raise UnusableError(Reason.UNEVEN_SLICES)
    return normal * gap


def _normal(one: Dataset) -> NDArray[np.float64]:
    orientation = _vector(one.ImageOrientationPatient)
    return np.cross(orientation[:3], orientation[3:])


def _vector(values: Sequence[Any]) -> NDArray[np.float64]:
    return np.array([float(v) for v in values])


def _intensities(one: Dataset) -> NDArray[np.float32]:
    """Stored values through the modality LUT's slope and intercept (PS3.3, C.11.1), bright for bright."""
    if one.PhotometricInterpretation not in ("MONOCHROME1", "MONOCHROME2"):
        raise UnusableError(Reason.NOT_SUPPORTED)
    values = one.pixel_array.astype(np.float32)
    if values.shape != (one.Rows, one.Columns):
        raise UnusableError(Reason.NOT_SUPPORTED)
    values = values * float(one.get("RescaleSlope") or 1) + float(one.get("RescaleIntercept") or 0)
    return -values if one.PhotometricInterpretation == "MONOCHROME1" else values


def _facts(header: Dataset, n_bytes_left: int, secret: bytes) -> Facts:
    is_segmentation = header.get("SOPClassUID") in _SEGMENTATIONS
    _check_kind(header, n_bytes_left, is_segmentation=is_segmentation)
    patient = str(header.get("PatientID") or "").strip()
    if not patient:
        raise UnusableError(Reason.NO_PATIENT)
    if not all(header.get(tag) for tag in _IDENTITY):
        raise UnusableError(Reason.TAGS_MISSING)
    referenced = header.get("ReferencedSeriesSequence") if is_segmentation else None
    return Facts(
        patient=key_of(secret, patient),
        study=key_of(secret, f"{patient}\n{header.StudyInstanceUID}"),
        series=key_of(secret, str(header.SeriesInstanceUID)),
        instance=key_of(secret, str(header.SOPInstanceUID)),
        name=plain_name(str(header.get("SeriesDescription") or ""), patient, str(header.get("PatientName") or "")),
        kind=Kind.SEGMENTATION if is_segmentation else Kind.DICOM,
        role=Role.LABEL if is_segmentation else Role.IMAGE,
        modality=str(header.get("Modality") or "") or None,
        scanner=None if is_segmentation else _scanner(header),
        reference=key_of(secret, str(referenced[0].SeriesInstanceUID)) if referenced else None,
    )


def _check_kind(header: Dataset, n_bytes_left: int, *, is_segmentation: bool) -> None:
    rows, columns, frames = (int(header.get(tag) or 0) for tag in ("Rows", "Columns", "NumberOfFrames"))
    if not rows or not columns:
        raise UnusableError(Reason.NOT_AN_IMAGE)
    if max(rows, columns) > MAX_SIDE:
        raise UnusableError(Reason.TOO_LARGE)
    n_samples = int(header.get("SamplesPerPixel") or 1)
    n_bits = rows * columns * max(frames, 1) * n_samples * int(header.get("BitsAllocated") or 8)
    if _is_raw(header) and n_bytes_left < n_bits // 8:
        raise UnusableError(Reason.DAMAGED)
    if is_segmentation:
        return
    if frames > 1 or n_samples > 1 or "MOSAIC" in (header.get("ImageType") or []):
        raise UnusableError(Reason.NOT_SUPPORTED)
    if not all(header.get(tag) for tag in _GEOMETRY):
        raise UnusableError(Reason.TAGS_MISSING)


def _is_raw(header: Dataset) -> bool:
    """Whether pixels lie in the file as they are, neither compressed nor within a deflated data set."""
    syntax = UID(header.file_meta.get("TransferSyntaxUID") or "")
    return syntax.is_transfer_syntax and not syntax.is_compressed and not syntax.is_deflated


def _scanner(header: Dataset) -> str | None:
    """Manufacturer, model and field strength as far as they are there: "SIEMENS Aurora 1.5 T"."""
    maker = str(header.get("Manufacturer") or "").strip()
    maker = "SIEMENS" if maker.lower() in ("siemens healthineers", "siemens") else maker
    model = str(header.get("ManufacturerModelName") or "").strip()
    strength = header.get("MagneticFieldStrength")
    field = f"{round(float(strength), 1):g} T" if strength else ""
    return re.sub(r"\s+", " ", " ".join(part for part in (maker, model, field) if part)) or None
