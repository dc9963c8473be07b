"""Read DICOM: what a file's header says, a series as one volume or several, labels drawn on a volume.

Files are taken apart in a child process (``reader``); which planes form a volume is ``stacks``' matter,
which files belong together the catalogue's. Segmentations follow the Segmentation IOD (DICOM PS3.3, A.51 and C.8.20),
contours the RT Structure Set IOD (A.19).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.data import reader
from client.data.keys import key_of, plain_name
from client.data.records import Facts, Kind, Role
from client.data.skips import Reason, UnusableError, unusable
from client.data.stacks import (
    ORIENTATION_TOLERANCE,
    PLACE_TOLERANCE,
    Stack,
    planes_of,
    stack,
    the_volume,
    volumes,
)

__all__ = [
    "Stack",
    "attribute",
    "identity",
    "inspect",
    "read_segmentation",
    "read_series",
    "read_structures",
    "read_volumes",
    "report",
]

_KINDS = {"image": Kind.DICOM, "segmentation": Kind.SEGMENTATION, "structures": Kind.STRUCTURES, "report": Kind.REPORT}


def inspect(path: Path, secret: bytes) -> Facts:
    """What the header of one DICOM file says; its pixels are not read.

    Parameters
    ----------
    path
        A DICOM file, with or without the preamble (PS3.10, 7.1).
    secret
        The site's secret: identifiers leave this function as keys only.

    Raises
    ------
    UnusableError
        If the file is no DICOM, is cut short, lacks tags, or is of a kind that is not supported.
    """
    said = reader.ask("describe", path).facts
    with unusable(Reason.DAMAGED):
        kind = _KINDS[said["kind"]]
        patient = str(said["patient"])
        reference = said["reference"]
        return Facts(
            patient=key_of(secret, patient),
            study=key_of(secret, f"{patient}\n{said['study']}"),
            series=key_of(secret, str(said["series"])),
            instance=key_of(secret, str(said["instance"])),
            name=plain_name(str(said["description"]), patient, str(said["patient_name"])),
            kind=kind,
            role=Role.IMAGE if kind is Kind.DICOM else Role.LABEL,
            modality=said["modality"],
            scanner=_scanner(said) if kind is Kind.DICOM else None,
            reference=key_of(secret, str(reference)) if reference else None,
            n_planes=int(said["n_planes"]),
            says_burned_in=bool(said["says_burned_in"]),
        )


def identity(path: Path) -> tuple[str, str, str]:
    """UIDs of study, series and object as the file has them, unchecked; whatever kind it is of.

    Raises
    ------
    UnusableError
        If the file is no DICOM or damaged.
    """
    study, series, instance = reader.ask("identity", path).facts["uids"]
    return str(study), str(series), str(instance)


def _scanner(said: dict[str, Any]) -> str | None:
    """Manufacturer, model and field strength as far as they are there: "SIEMENS Aurora 1.5 T"."""
    maker = str(said["manufacturer"])
    maker = "SIEMENS" if maker.lower() in ("siemens healthineers", "siemens") else maker
    strength = said["field_t"]
    field = f"{round(float(strength), 1):g} T" if strength else ""
    return re.sub(r"\s+", " ", " ".join(part for part in (maker, str(said["model"]), field) if part)) or None


def read_series(paths: Sequence[Path], *, even: bool) -> Stack:
    """One series as a volume, slices sorted along their normal.

    Parameters
    ----------
    paths
        The files in any order.
    even
        Whether slices must be evenly spaced: needed to resample along z, not to work on single slices.

    Returns
    -------
    Stack
        Rescaled intensities ``(channel, slice, row, column)`` with the affine to patient coordinates [mm], and the UIDs of
        the slices. Slices run along the cross product of row and column direction.

    Raises
    ------
    UnusableError
        If a file cannot be decoded, the slices do not form one regular stack, or there are several volumes.
    """
    return stack(the_volume(planes_of(paths)), even=even)


def read_volumes(paths: Sequence[Path]) -> list[Stack]:
    """Every volume of a series: time points, echoes, orientations. A volume with missing slices is one of uneven spacing.

    Raises
    ------
    UnusableError
        If a file cannot be decoded, or a volume has an impossible geometry.
    """
    return [stack(volume, even=False) for volume in volumes(planes_of(paths))]


def attribute(path: Path, keyword: str) -> str:
    """The value of an attribute of the data set itself, as text; empty where it has none.

    Raises
    ------
    UnusableError
        If the file cannot be read.
    """
    return str(reader.ask("attribute", path, keyword=keyword).facts["value"])


def report(path: Path, words: Sequence[str]) -> set[str]:
    """Which of some words, in lower case, a verified structured report says.

    Raises
    ------
    UnusableError
        If the file cannot be read.
    """
    said = reader.ask("report", path, words=list(words)).facts["said"]
    return {str(word) for word in said} & set(words)


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
    seg = reader.ask("segmentation", path)
    with unusable(Reason.PIXELS):
        names = _indices(labels)
        wanted = {
            int(number): names[str(label).strip().lower()]
            for number, label in seg.facts["segments"]
            if str(label).strip().lower() in names
        }
        if not wanted:
            raise UnusableError(Reason.LABEL_NAMES)
        (frames,) = seg.arrays
        if frames.shape[1:] != series.scan.shape[1:]:
            raise UnusableError(Reason.LABEL_SIZE)
        return _laid_on(seg.facts, frames, series, wanted)


def _indices(labels: Sequence[str]) -> dict[str, int]:
    return {name.strip().lower(): index for index, name in enumerate(labels) if index > 0}


def _laid_on(seg: dict[str, Any], frames: NDArray[Any], series: Stack, wanted: dict[int, int]) -> NDArray[np.uint8]:
    label = np.zeros(series.scan.shape, dtype=np.uint8)
    n_placed = 0
    for frame, pixels in zip(seg["frames"], frames, strict=True):
        k = _slice_of(frame, series)
        if k is None:
            continue
        n_placed += 1
        for number, index in _segments(frame, seg, wanted):
            inside = _inside(pixels, seg, number)
            label[k] = np.where(inside & (label[k] < index), index, label[k])
    if n_placed == 0:
        raise UnusableError(Reason.LABEL_PLACE)
    return label


def _segments(frame: dict[str, Any], seg: dict[str, Any], wanted: dict[int, int]) -> list[tuple[int, int]]:
    """(segment number, label index) that a frame can hold: its own segment, or all of them in a label map."""
    if seg["is_label_map"]:
        return list(wanted.items())
    number = int(frame["segment"])
    return [(number, wanted[number])] if number in wanted else []


def _inside(pixels: NDArray[Any], seg: dict[str, Any], number: int) -> NDArray[np.bool_]:
    if seg["is_label_map"]:
        return np.asarray(pixels == number)
    if seg["is_fractional"]:
        return np.asarray(2 * pixels.astype(np.int64) >= int(seg["maximum"]))
    return np.asarray(pixels > 0)


def _slice_of(frame: dict[str, Any], series: Stack) -> int | None:
    """Index of the slice that a frame lies on; None if it lies on a slice that is not there."""
    position = None if frame["position"] is None else np.array(frame["position"], dtype=np.float64)
    k = _named_slice(frame, series)
    if k is None and position is not None:
        k = int(np.argmin(np.linalg.norm(series.positions - position, axis=1)))
        if not _near(position, k, series):
            return None
    elif k is not None and position is not None and not _near(position, k, series):
        raise UnusableError(Reason.LABEL_PLACE)
    orientation = frame["orientation"]
    if k is not None and orientation is not None and not _parallel(np.array(orientation), series):
        raise UnusableError(Reason.LABEL_PLACE)
    return k


def _named_slice(frame: dict[str, Any], series: Stack) -> int | None:
    """The slice that a frame names by the UID of its file, and in a file of several by its number."""
    for uid, number in frame["sources"]:
        fitting = [k for k, one in enumerate(series.uids) if one == uid]
        if len(fitting) > 1:
            fitting = [k for k in fitting if series.frames[k] == number]
        if fitting:
            return fitting[0]
    return None


def _near(position: NDArray[np.float64], k: int, series: Stack) -> bool:
    tolerance_mm = PLACE_TOLERANCE * _spacings(series).min()
    return bool(np.abs(series.positions[k] - position).max() <= tolerance_mm)


def _parallel(orientation: NDArray[np.float64], series: Stack) -> bool:
    affine = _affine(series)
    directions = affine[:3, :2] / np.linalg.norm(affine[:3, :2], axis=0)
    return bool(np.abs(orientation - directions.T.ravel()).max() <= ORIENTATION_TOLERANCE)


def _spacings(series: Stack) -> NDArray[np.float64]:
    return np.asarray(np.linalg.norm(_affine(series)[:3, :3], axis=0))


def _affine(series: Stack) -> NDArray[np.float64]:
    if series.scan.affine is None:
        raise UnusableError(Reason.LABEL_PLACE)
    return series.scan.affine


def read_structures(path: Path, series: Stack, labels: Sequence[str]) -> NDArray[np.uint8]:
    """The contours of an RT structure set, filled on the slices of a series.

    Regions are matched with ``labels`` by ROI Name (3006,0026), whatever the case. A voxel is inside where its centre is,
    by the even-odd rule over all contours of a region on a slice, so that a contour within another is a hole. A contour
    belongs to the slice whose plane it lies in. Where two regions overlap the later label wins.

    Parameters
    ----------
    path
        An RTSTRUCT file with closed planar contours.
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
        If it cannot be decoded, names no label of the plan, or no contour lies on the series.
    """
    regions = reader.ask("structures", path).facts["regions"]
    with unusable(Reason.BAD_GEOMETRY):
        names = _indices(labels)
        wanted = [
            (names[str(n).strip().lower()], contours) for n, contours in regions if str(n).strip().lower() in names
        ]
        if not wanted:
            raise UnusableError(Reason.LABEL_NAMES)
        label = np.zeros(series.scan.shape, dtype=np.uint8)
        to_index = np.linalg.inv(_affine(series))
        n_placed = 0
        for index, contours in sorted(wanted, key=lambda one: one[0]):
            inside = np.zeros(label.shape, dtype=np.bool_)
            for contour in contours:
                points = np.array(contour, dtype=np.float64).reshape(-1, 3) @ to_index[:3, :3].T + to_index[:3, 3]
                k = round(float(points[:, 2].mean()))
                if not (0 <= k < len(label) and np.abs(points[:, 2] - k).max() < 0.5):
                    continue
                n_placed += 1
                inside[k] ^= filled(points[:, :2], label.shape[1:])
            label[inside] = index
    if n_placed == 0:
        raise UnusableError(Reason.LABEL_PLACE)
    return label


def filled(polygon: NDArray[np.float64], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """The pixels whose centre is inside a polygon, by the even-odd rule.

    Parameters
    ----------
    polygon
        Corners ``(n, 2)`` as (column, row), in pixels; the centre of the first pixel is (0, 0).
    shape
        Rows and columns.
    """
    inside = np.zeros(shape, dtype=np.bool_)
    columns = np.arange(shape[1])
    x, y = polygon.T
    x_next, y_next = np.roll(x, -1), np.roll(y, -1)
    for row in range(max(0, int(np.ceil(y.min()))), min(shape[0], int(np.floor(y.max())) + 1)):
        crossing = (y <= row) != (y_next <= row)
        at = x[crossing] + (row - y[crossing]) * (x_next - x)[crossing] / (y_next - y)[crossing]
        inside[row] = (columns[:, np.newaxis] > at[np.newaxis]).sum(axis=1) % 2 == 1
    return inside
