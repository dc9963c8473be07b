"""What a hospital has, told truthfully to the hospital: what can be used, what was left out and why, what to look at.

``federad-site check`` writes it down as a page (``page``) that never leaves: it has pictures of patients. Numbers here are
exact and are no releases; nothing of this module is reachable from the gate.
"""

from __future__ import annotations

import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from client.data import dicom, images
from client.data.catalogue import Catalogue
from client.data.cohort import Cohort
from client.data.records import Kind, Series, Study
from client.data.scan import Scan
from client.data.skips import Reason, Skipped, UnusableError
from client.data.suspicions import has_text, may_show_face
from shared_models.plan import Plan

MOST_SHOWN = 24
"""Studies whose pixels are looked at for the page, evenly picked."""

BINS = 48

_SAME_PICTURE_TWICE = (Reason.DUPLICATE, Reason.UID_TWICE, Reason.PATIENTS_DISAGREE)
_TEXT_MODALITIES = frozenset({"US", "SC", "ES", "XC", "OT"})


@dataclass(frozen=True)
class Look:
    """One series whose pixels were looked at."""

    study: str
    """Key of the study."""

    name: str
    modality: str | None
    scanner: str | None
    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float] | None
    """Between slices, rows, columns."""

    unit: str
    percentiles: tuple[float, float, float]
    """Intensities that 1, 50 and 99 of 100 voxels lie below."""

    histogram: tuple[int, ...]
    picture: NDArray[np.uint8]
    """The slice in the middle, ``(row, column)``."""

    is_text_suspected: bool
    is_face_suspected: bool


@dataclass
class Readiness:
    """Everything that the page shows."""

    site: str
    source: str
    device: str
    device_reason: str
    disk_free_gb: float
    n_patients: int = 0
    n_studies: int = 0
    n_files: int = 0
    modalities: Counter[str] = field(default_factory=Counter)
    scanners: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Patients and studies of each scanner."""

    skipped_files: Counter[str] = field(default_factory=Counter)
    n_duplicates: int = 0
    n_says_burned_in: int = 0
    looks: list[Look] = field(default_factory=list)
    unread: Counter[str] = field(default_factory=Counter)
    """Why series that were to be shown could not be read."""

    plan: str | None = None
    splits: dict[str, int] = field(default_factory=dict)
    """Usable patients of each split."""

    skipped_studies: Counter[str] = field(default_factory=Counter)
    labels: dict[str, float] = field(default_factory=dict)
    """Studies of each label, or its share of all voxels [%]."""

    labels_are_of_studies: bool = False

    @property
    def n_suspected(self) -> int:
        """Shown series that a person should look at."""
        return sum(look.is_text_suspected or look.is_face_suspected for look in self.looks)


def look(site: str, source: Path, catalogue: Catalogue, secret: bytes, device: tuple[str, str]) -> Readiness:
    """What the data folder holds, and a closer look at some of its series.

    Parameters
    ----------
    device
        The device that training would use, and why.
    """
    studies = catalogue.studies()
    found = Readiness(site, str(source), *device, disk_free_gb=shutil.disk_usage(source).free / 1e9)
    found.n_patients, found.n_studies = len({study.patient for study in studies}), len(studies)
    series = [one for study in studies for one in study.images.values()]
    found.n_files = sum(len(one.files) for one in series)
    found.modalities = Counter(one.modality or "not stated" for one in series)
    found.n_says_burned_in = sum(one.says_burned_in for one in series)
    found.scanners = _scanners(studies)
    found.skipped_files = _tally(catalogue.skipped())
    found.n_duplicates = sum(skip.reason in _SAME_PICTURE_TWICE for skip in catalogue.skipped())
    paths = catalogue.locate(secret)
    for study in _evenly(studies, MOST_SHOWN):
        name, one = next(iter(study.images.items()))
        try:
            found.looks.append(_looked_at(study, name, one, paths))
        except UnusableError as error:
            found.unread[error.reason.value] += 1
    return found


def against(found: Readiness, plan: Plan, cohort: Cohort) -> None:
    """Add what a plan could use of it."""
    found.plan = plan.name
    found.splits = {split: len(cohort.patients(split)) for split in ("train", "validation", "test")}
    found.skipped_studies = _tally(cohort.skipped)
    studies = [
        study for split in ("train", "validation", "test") for p in cohort.patients(split) for study in p.studies
    ]
    volumes = [cohort.volume(study) for study in studies]
    categories = [volume.category for volume in volumes if volume.category is not None]
    found.labels_are_of_studies = bool(categories)
    if categories:
        is_several = plan.task.target == "multi-label"
        found.labels = {
            name: float(sum(bool(one >> n & 1) if is_several else one == n for one in categories))
            for n, name in enumerate(plan.task.labels)
        }
        return
    intervals = [volume.interval for volume in volumes if volume.interval is not None]
    if intervals:
        found.labels_are_of_studies = True
        n_without = sum(high == 0 for _, high in intervals)
        (name,) = plan.task.named_labels
        found.labels = {f"no {name}": float(n_without), name: float(len(intervals) - n_without)}
        return
    counts = np.zeros(256)
    for volume in volumes:
        if volume.label is not None:
            counts += np.bincount(np.asarray(volume.label).ravel(), minlength=256)
    shares = 100 * counts / max(counts.sum(), 1)
    found.labels = {name: float(shares[n]) for n, name in enumerate(plan.task.labels)} if counts.any() else {}


def _tally(skipped: list[Skipped] | tuple[Skipped, ...]) -> Counter[str]:
    return Counter(skip.reason.value for skip in skipped)


def _scanners(studies: list[Study]) -> dict[str, tuple[int, int]]:
    by_scanner: dict[str, list[Study]] = defaultdict(list)
    for study in studies:
        by_scanner[study.scanner or "not stated"].append(study)
    return {
        name: (len({study.patient for study in by_scanner[name]}), len(by_scanner[name])) for name in sorted(by_scanner)
    }


def _evenly(studies: list[Study], most: int) -> Iterator[Study]:
    n = min(most, len(studies))
    return (studies[k * (len(studies) - 1) // max(n - 1, 1)] for k in range(n))


def _looked_at(study: Study, name: str, series: Series, paths: Mapping[str, Path]) -> Look:
    scan, unit = _read(series, [paths[file.key] for file in series.files if file.key in paths])
    values = scan.image[0]
    inside = values[np.isfinite(values)]
    if not inside.size:
        raise UnusableError(Reason.NOT_FINITE)
    low, middle, high = (float(v) for v in np.percentile(inside[:: max(1, inside.size // 200_000)], (1, 50, 99)))
    histogram, _ = np.histogram(inside, BINS, range=(low, high if high > low else low + 1))
    plane = values[len(values) // 2]
    spacing = None if scan.affine is None else np.linalg.norm(scan.affine[:3, :3], axis=0)[::-1]
    return Look(
        study=study.key,
        name=name,
        modality=series.modality,
        scanner=series.scanner,
        shape=scan.shape,
        spacing_mm=None if spacing is None else (float(spacing[0]), float(spacing[1]), float(spacing[2])),
        unit=unit,
        percentiles=(low, middle, high),
        histogram=tuple(int(n) for n in histogram),
        picture=_picture(plane, low, high),
        is_text_suspected=series.says_burned_in or series.modality in _TEXT_MODALITIES or has_text(plane),
        is_face_suspected=may_show_face(scan, name, series.modality),
    )


def _read(series: Series, paths: list[Path]) -> tuple[Scan, str]:
    """The first volume of a series, in its own grid, and its unit."""
    if not paths:
        raise UnusableError(Reason.FILE_GONE)
    if series.kind is Kind.PICTURE:
        return images.read_picture(paths[0], (series.name,)), ""
    if series.kind is Kind.NIFTI:
        return images.read_nifti(paths[0]), ""
    first = dicom.read_volumes(paths)[0]
    return first.scan, first.unit


def _picture(plane: NDArray[np.float32], low: float, high: float) -> NDArray[np.uint8]:
    """A plane at most 160 pixels wide, from black at the first to white at the last percentile."""
    step = max(1, -(-max(plane.shape) // 160))
    small = np.nan_to_num(plane[::step, ::step])
    return np.asarray(np.clip((small - low) / ((high - low) or 1) * 255, 0, 255), dtype=np.uint8)
