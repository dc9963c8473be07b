"""From the planes of files to volumes: which belong together, in which order, and where the volume lies.

One axis order: intensities ``(channel, slice, row, column)``, slices along the cross product of row and column direction,
and an affine from index (column, row, slice) to patient coordinates [mm], DICOM's LPS axes. Planes come from
``dicom_planes`` by way of ``reader``; nothing here parses a file.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.data import reader
from client.data.scan import MAX_SIDE, Scan
from client.data.skips import Reason, UnusableError, unusable

ORIENTATION_TOLERANCE = 1e-3
"""Largest difference between direction cosines that count as equal; headers round them to about six digits."""

PLACE_TOLERANCE = 0.1
"""Largest distance of a slice or frame from where it should be, as a share of the spacing."""

SHEAR_TOLERANCE = 0.1
"""Slices that lie further aside from the first one's normal than this share of a pixel are sheared: a tilted gantry."""


@dataclass(frozen=True)
class Stack:
    """A series, or a part of one, as a volume that still knows its slices."""

    scan: Scan
    uids: tuple[str, ...]
    """SOP Instance UID of each slice; never stored."""

    positions: NDArray[np.float64]
    """Image Position (Patient) of each slice [mm, LPS], ``(slice, 3)``; NaN where a slice has no place in the patient."""

    unit: str = ""
    """Unit of the intensities: HU, SUV, Bq/ml or counts; empty for arbitrary ones."""

    frames: tuple[int, ...] = ()
    """Number of each slice's frame in its file, from 1."""


@dataclass(frozen=True)
class Plane:
    """One plane of an image file: its place in the patient, and where its pixels are."""

    source: Source
    frame: int
    tile: tuple[int, int] | None
    position: NDArray[np.float64] | None
    orientation: NDArray[np.float64] | None
    spacing: tuple[float, float] | None
    """Between rows, between columns [mm]."""

    thickness: float
    slope: float
    intercept: float
    is_localizer: bool
    contrast: tuple[Any, ...]
    """What tells images of one place apart by their making: part of the image type, echo."""

    order: tuple[float, ...]
    """What tells them apart by time: temporal position, acquisition, trigger time, instance."""


@dataclass(frozen=True)
class Source:
    """An image file: how its pixels are stored."""

    path: Path
    uid: str
    rows: int
    columns: int
    stored: tuple[int, int, int]
    """Frames, rows and columns of what is stored."""

    samples: int
    raw: tuple[str, int, int] | None
    """Data type, place of the first value, bits in use; None where the child has to decode."""

    is_inverted: bool
    is_projection: bool
    unit: str


def planes_of(paths: Sequence[Path]) -> list[Plane]:
    """All planes of the files of one series, in the order of the files and frames.

    Raises
    ------
    UnusableError
        If one of the files cannot be used.
    """
    reply = reader.ask("layouts", *paths)
    with unusable(Reason.BAD_GEOMETRY):
        return [
            plane for path, layout in zip(paths, reply.facts["layouts"], strict=True) for plane in _planes(path, layout)
        ]


def _planes(path: Path, layout: dict[str, Any]) -> Iterator[Plane]:
    raw = layout["raw"]
    source = Source(
        path=path,
        uid=str(layout["instance"]),
        rows=int(layout["rows"]),
        columns=int(layout["columns"]),
        stored=(int(layout["frames"]), int(layout["stored_rows"]), int(layout["stored_columns"])),
        samples=int(layout["samples"]),
        raw=None if raw is None else (str(raw["dtype"]), int(raw["offset"]), int(raw["bits_stored"])),
        is_inverted=bool(layout["is_inverted"]),
        is_projection=bool(layout["is_projection"]),
        unit=str(layout["unit"]),
    )
    if min(source.rows, source.columns) < 1 or max(source.stored[1:]) > MAX_SIDE:
        raise UnusableError(Reason.TOO_LARGE)
    for plane in layout["planes"]:
        spacing, tile = plane["spacing"], plane["tile"]
        yield Plane(
            source=source,
            frame=int(plane["frame"]),
            tile=None if tile is None else (int(tile[0]), int(tile[1])),
            position=_vector(plane["position"]),
            orientation=_vector(plane["orientation"]),
            spacing=None if spacing is None else (float(spacing[0]), float(spacing[1])),
            thickness=float(plane["thickness"]),
            slope=float(plane["slope"]),
            intercept=float(plane["intercept"]),
            is_localizer=bool(plane["is_localizer"]),
            contrast=tuple(plane["contrast"]),
            order=tuple(float(v) for v in plane["order"]),
        )


def _vector(values: Sequence[float] | None) -> NDArray[np.float64] | None:
    return None if values is None else np.array([float(v) for v in values])


def volumes(planes: Sequence[Plane]) -> list[list[Plane]]:
    """Planes sorted into volumes, each volume's planes along its normal.

    Planes of one size, orientation and spacing belong together; where some lie at one place, echoes and image types are
    told apart first, then the n-th image of each place belongs to the n-th volume. Planes without a place stay in the
    order of their instances.
    """
    found = []
    for alike in _alike(planes):
        if alike[0].position is None or alike[0].orientation is None:
            found.append(sorted(alike, key=lambda p: p.order[-1]))
        elif _n_places(alike) == len(alike):
            found.append(_along_normal(alike))
        else:
            by_contrast = defaultdict(list)
            for plane in alike:
                by_contrast[plane.contrast].append(plane)
            for _, same in sorted(by_contrast.items(), key=lambda item: str(item[0])):
                found += [_along_normal(volume) for volume in _nth_of_each_place(same)]
    return found


def _alike(planes: Sequence[Plane]) -> list[list[Plane]]:
    """Planes by their size, orientation and spacing, in the order in which they appear."""
    groups: list[list[Plane]] = []
    for plane in planes:
        for group in groups:
            if not _differ(group[0], plane):
                group.append(plane)
                break
        else:
            groups.append([plane])
    return groups


def _differ(a: Plane, b: Plane) -> bool:
    if (a.source.rows, a.source.columns, a.source.samples) != (b.source.rows, b.source.columns, b.source.samples):
        return True
    if (a.position is None) != (b.position is None) or (a.orientation is None) != (b.orientation is None):
        return True
    if (a.spacing is None) != (b.spacing is None):
        return True
    if a.spacing == b.spacing and _bytes(a.orientation) == _bytes(b.orientation):
        return False
    is_resized = a.spacing != b.spacing and bool(
        np.abs(np.array(b.spacing) / np.array(a.spacing) - 1).max() > ORIENTATION_TOLERANCE
    )
    if a.orientation is None or b.orientation is None:
        return is_resized
    return is_resized or bool(np.abs(a.orientation - b.orientation).max() > ORIENTATION_TOLERANCE)


def _bytes(vector: NDArray[np.float64] | None) -> bytes | None:
    """Compared much faster than numbers are; most slices of a series say the very same."""
    return None if vector is None else vector.tobytes()


def _places(planes: Sequence[Plane]) -> NDArray[np.int64]:
    """The number of each plane's place along the normal, counted from the lowest; planes closer than a hundredth of a
    millimetre are at one."""
    along = _along(planes)
    order = np.argsort(along, kind="stable")
    numbers = np.zeros(len(planes), dtype=np.int64)
    numbers[order] = np.concatenate([[0], np.cumsum(np.diff(along[order]) > 0.01)])
    return numbers


def _n_places(planes: Sequence[Plane]) -> int:
    return int(_places(planes).max()) + 1


def _along(planes: Sequence[Plane]) -> NDArray[np.float64]:
    """How far along its normal each plane lies [mm]."""
    x, y = np.array([plane.orientation for plane in planes]).reshape(-1, 2, 3).transpose(1, 0, 2)
    return np.asarray((np.cross(x, y) * np.array([plane.position for plane in planes])).sum(axis=1))


def _along_normal(planes: list[Plane]) -> list[Plane]:
    return [planes[k] for k in np.argsort(_along(planes), kind="stable")]


def _nth_of_each_place(planes: list[Plane]) -> list[list[Plane]]:
    numbered: dict[int, list[Plane]] = defaultdict(list)
    for plane, place in zip(planes, _places(planes), strict=True):
        numbered[int(place)].append(plane)
    nth: dict[int, list[Plane]] = defaultdict(list)
    for same_place in numbered.values():
        for n, plane in enumerate(sorted(same_place, key=lambda p: p.order)):
            nth[n].append(plane)
    return [nth[n] for n in sorted(nth)]


def the_volume(planes: Sequence[Plane]) -> list[Plane]:
    """The only volume of a series; localizers beside it are left aside.

    Raises
    ------
    UnusableError
        If there are several, or planes that fit nowhere.
    """
    chosen = [p for p in planes if not p.is_localizer] or list(planes)
    found = volumes(chosen)
    if len(found) == 1:
        return found[0]
    if any(_differ(found[0][0], other[0]) for other in found[1:]):
        raise UnusableError(Reason.SLICES_DIFFER)
    are_whole = len({len(volume) for volume in found}) == 1 and len(found[0]) > 1
    raise UnusableError(Reason.SEVERAL_VOLUMES if are_whole else Reason.DUPLICATE_SLICES)


def stack(planes: Sequence[Plane], *, even: bool) -> Stack:
    """One volume with its pixels.

    Parameters
    ----------
    planes
        Of one volume, sorted.
    even
        Whether slices must be evenly spaced.

    Raises
    ------
    UnusableError
        If a file cannot be decoded, or the planes do not form one regular stack.
    """
    with unusable(Reason.BAD_GEOMETRY):
        affine = affine_of(planes, even=even)
    first = planes[0]
    n_channels = first.source.samples
    image = np.empty((n_channels, len(planes), first.source.rows, first.source.columns), dtype=np.float32)
    for k, plane, pixels in _pixels(planes):
        _intensities(pixels, plane, into=image[:, k])
    nowhere = np.full(3, np.nan)
    return Stack(
        Scan(image, affine),
        uids=tuple(p.source.uid for p in planes),
        positions=np.array([nowhere if p.position is None else p.position for p in planes]),
        unit=first.source.unit,
        frames=tuple(p.frame + 1 for p in planes),
    )


def _pixels(planes: Sequence[Plane]) -> Iterator[tuple[int, Plane, NDArray[Any]]]:
    """Each plane with its stored pixels, every file read once; they are good until the next."""
    by_file: dict[Path, list[int]] = defaultdict(list)
    for k, plane in enumerate(planes):
        by_file[plane.source.path].append(k)
    room = np.empty(0, np.uint8)
    for path, wanted in by_file.items():
        source = planes[wanted[0]].source
        if source.raw is None:
            frames = reader.ask("pixels", path, room=room).arrays[0]
            room = frames.reshape(-1).view(np.uint8) if frames.nbytes > room.size else room
        else:
            n_bytes = math.prod(source.stored) * np.dtype(source.raw[0]).itemsize
            room = room if room.size >= n_bytes else np.empty(n_bytes, np.uint8)
            frames = _raw_frames(source, room[:n_bytes])
        if frames.shape[:3] != source.stored or frames.ndim != (3 if source.samples == 1 else 4):
            raise UnusableError(Reason.PIXELS)
        for k in wanted:
            plane = planes[k]
            whole = frames[plane.frame]
            if plane.tile is not None:
                row, column = plane.tile
                whole = whole[row : row + source.rows, column : column + source.columns]
            if whole.shape[:2] != (source.rows, source.columns):
                raise UnusableError(Reason.PIXELS)
            yield k, plane, whole


def _raw_frames(source: Source, into: NDArray[np.uint8]) -> NDArray[Any]:
    """Uncompressed pixels, read where they lie: nothing is parsed, so nothing can go wrong but the disk.

    They lie in ``into``, which the next file may have: one that stays in the processor's cache.
    """
    dtype, offset, bits = source.raw  # type: ignore[misc]
    stored = np.dtype(dtype)
    with unusable(Reason.PIXELS):
        file = os.open(source.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            done = 0
            while done < into.size:
                n = os.preadv(file, [into.data[done:]], offset + done)
                if not n:
                    raise UnusableError(Reason.DAMAGED)
                done += n
        finally:
            os.close(file)
    values = into.view(stored).reshape(source.stored)
    unused = 8 * stored.itemsize - bits
    if 0 < unused < 8 * stored.itemsize and stored.kind in "iu":
        values = _without_unused_bits(values, unused)
    return values


def _without_unused_bits(values: NDArray[Any], unused: int) -> NDArray[Any]:
    """Only the bits that are in use: others once held overlays (PS3.5, 8.1.1)."""
    native = values.astype(values.dtype.newbyteorder("="), copy=False)
    bits = 8 * native.itemsize - unused
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if native.dtype.kind == "i" else (0, (1 << bits) - 1)
    if int(native.max()) <= high and (low == 0 or int(native.min()) >= low):
        return native
    return np.asarray((native << unused) >> unused)


def _intensities(pixels: NDArray[Any], plane: Plane, *, into: NDArray[np.float32]) -> None:
    """Stored values through the modality LUT's slope and intercept (PS3.3, C.11.1), bright for bright."""
    if pixels.ndim == 3:
        into[...] = np.moveaxis(pixels, -1, 0)
        return
    into[0] = pixels
    if plane.slope != 1 or plane.intercept != 0:
        np.multiply(into, plane.slope, out=into)
        np.add(into, plane.intercept, out=into)
    if plane.source.is_inverted:
        np.negative(into, out=into)


def affine_of(planes: Sequence[Plane], *, even: bool) -> NDArray[np.float64] | None:
    """Index (column, row, slice) to LPS mm for sorted planes (PS3.3, C.7.6.2.1.1), after checking that they are a stack.

    A projection or a photograph has no place in the patient: its rows and columns become y and x where the distance of its
    pixels is known, and it has no affine where it is not.
    """
    first = planes[0]
    if first.position is None or first.orientation is None or first.spacing is None:
        if not all(p.source.is_projection for p in planes) and len(planes) == 1:
            raise UnusableError(Reason.TAGS_MISSING)
        return _flat_affine(first.spacing)
    if any(_differ(first, other) for other in planes[1:]):
        raise UnusableError(Reason.SLICES_DIFFER)
    orientation, spacing = first.orientation, first.spacing
    if np.abs(np.linalg.norm(orientation.reshape(2, 3), axis=1) - 1).max() > ORIENTATION_TOLERANCE:
        raise UnusableError(Reason.BAD_GEOMETRY)
    affine = np.eye(4)
    affine[:3, 0] = orientation[:3] * spacing[1]
    affine[:3, 1] = orientation[3:] * spacing[0]
    affine[:3, 2] = _slice_step(planes, even=even)
    affine[:3, 3] = first.position
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine)) < 1e-9:
        raise UnusableError(Reason.BAD_GEOMETRY)
    return affine


def _flat_affine(spacing: tuple[float, float] | None) -> NDArray[np.float64] | None:
    if spacing is None or not all(math.isfinite(mm) and mm > 0 for mm in spacing):
        return None
    return np.diag([spacing[1], spacing[0], 1.0, 1.0])


def _slice_step(planes: Sequence[Plane], *, even: bool) -> NDArray[np.float64]:
    """The way from one slice to the next [mm, LPS]: along the normal, by the mean distance, or the median if some miss."""
    normal = _normal(planes[0])
    if len(planes) == 1:
        return normal * planes[0].thickness
    positions = np.array([p.position for p in planes])
    along = (positions - positions[0]) @ normal
    aside = positions - positions[0] - np.outer(along, normal)
    gaps = np.diff(along)
    if gaps.min() <= PLACE_TOLERANCE * np.median(gaps):
        raise UnusableError(Reason.DUPLICATE_SLICES)
    gap = float(gaps.mean() if even else np.median(gaps))
    pixel_mm = float(min(planes[0].spacing))  # type: ignore[arg-type]
    drift = np.zeros(3)
    if np.abs(aside).max() > SHEAR_TOLERANCE * pixel_mm:
        drift = aside[-1] / along[-1]
        if np.abs(aside - np.outer(along, drift)).max() > PLACE_TOLERANCE * pixel_mm:
            raise UnusableError(Reason.BAD_GEOMETRY)
    if even and np.abs(along - gap * np.arange(len(planes))).max() > PLACE_TOLERANCE * gap:
        raise UnusableError(Reason.UNEVEN_SLICES)
    return np.asarray((normal + drift) * gap) if drift.any() else normal * gap


def _normal(plane: Plane) -> NDArray[np.float64]:
    return np.cross(plane.orientation[:3], plane.orientation[3:])  # type: ignore[index]
