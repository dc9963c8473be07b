"""Emulated hospitals: folders of real DICOM files as a hospital would export them, or of k-space where plans begin there.

Every hospital has its own patients and one scanner, or several among which patients are dealt. A study is one series of
classic MR images, one file per slice, with the outline of the lesions as a DICOM Segmentation that refers to them, and a
second series of the same device where the plan names its sequence::

    site-1/EMU-0-1-001/study-1/im-001.dcm ... im-012.dcm seg.dcm second-001.dcm ... second-012.dcm
    site-1/labels.csv                       who has a lesion, where the plan names a prevalence; how many or what share
                                            of the brain they are, where the plan learns that

The files depend on the plan's [simulation] and [data] tables, the number of sites and the seed alone: the same bytes
whatever the number of worker processes. Identifiers are fictional, dates are fixed.
"""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset, dcmwrite
from pydicom.dataset import FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian, MRImageStorage, generate_uid
from scipy import ndimage

from shared_models.errors import FederadError
from shared_models.plan import Plan
from shared_models.seeds import generator
from shared_models.tasks import OF_KSPACE, WITH_NUMBERS
from simulation.atlas import HEAD_HEIGHT_MM, TISSUES, Grid
from simulation.kspace import NOISE_SHARE, coil_images, write_study
from simulation.patients import TISSUES_WITH_LESION, Anatomy, EmulatedPatient
from simulation.processes import process_pool
from simulation.scanners import ALL_SCANNERS, SCANNERS, Scanner, acquire, scanners_sha256, with_sequence

SLICE_THICKNESS_MM = 4.0
"""Thickness of a slice in plans of two dimensions [mm]; there is no gap between slices."""

DEFAULT_SPACING_MM = 2.0
"""Spacing on every axis that the plan leaves open, apart from the slices of a plan of two dimensions [mm]."""

GRADES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Ends of the intervals in which emulated readers say what share of the brain lesions are; none at all is 0."""

FORMAT = 1
"""Grows whenever the same seed would give other files than before."""

SECOND = 3
"""Series Number of a second series; the segmentation's is 2."""

MANIFEST, UNFINISHED = "manifest.json", "unfinished"

Progress = Callable[[int, int], None]
"""Called with (patients done, patients in all) after every patient."""

_STUDY_DATES = ("20240115", "20250115")


@dataclass(frozen=True)
class EmulatedHospital:
    """One hospital of an emulated consortium."""

    name: str
    """``site-1``, ``site-2`` and so on."""

    scanner: str
    """Its scanner: a name in :data:`~simulation.scanners.ALL_SCANNERS`, or several joined by plus signs."""

    folder: Path
    """Where its DICOM files lie, one folder per patient."""


@dataclass(frozen=True)
class _Assignment:
    """One patient to make: everything that a worker process needs."""

    patient: EmulatedPatient
    scanner: str
    grid: Grid
    label: str
    folder: Path
    prevalence: float | None
    n_coils: int | None
    """Receivers whose k-space is written; None for DICOM."""
    is_unlabelled: bool = False
    second_series: str | None = None
    """Whose sequence a second series shows."""
    number: str | None = None
    """What of the lesions is written down: "count", "proportion", or some of :data:`FINDINGS`, joined by semicolons; None
    where it is at most whether there are any."""

    @property
    def has_lesions(self) -> bool:
        return self.prevalence is None or self.patient.has_lesion(self.prevalence)


def emulate(
    plan: Plan, *, n_sites: int, folder: Path, seed: int, workers: int = 1, progress: Progress | None = None
) -> list[EmulatedHospital]:
    """Write the hospitals of an emulated consortium into ``folder``, or find them there.

    Parameters
    ----------
    plan
        ``[simulation]`` says how many patients and slices, which scanners and how many have lesions, ``[data]`` gives the
        grid, ``[task]`` the name of the lesion label and of the one before it, which patients without lesions have.
    n_sites
        Number of hospitals, 1 or more. The scanners are dealt to them in the plan's order, over and over.
    folder
        Where the hospitals go; created if missing. A folder that holds exactly these hospitals is left as it is, one that
        was left half-finished or holds other emulated hospitals is filled afresh.
    seed
        Chooses the patients, 0 or above.
    workers
        Processes that share the work; 1 stays in this process. Changes nothing but speed.
    progress
        Told about every finished patient; None for silence.

    Returns
    -------
    list[EmulatedHospital]
        ``site-1`` to ``site-n``.

    Raises
    ------
    FederadError
        R230 if the plan asks for something that is not emulated, R231 if ``folder`` holds somebody else's files,
        R232 if a worker process died.
    """
    return _emulated(plan, _dealt(plan, n_sites, seed), _manifest(plan, n_sites, seed), folder, workers, progress)


def emulate_unseen(
    plan: Plan, *, n_sites: int, folder: Path, seed: int, workers: int = 1, progress: Progress | None = None
) -> list[EmulatedHospital]:
    """The hospitals of ``simulation.unseen``, ``unseen-1`` and so on, whose patients are nobody's elsewhere; see
    :func:`emulate`. ``folder`` is theirs alone."""
    return _emulated(
        plan, _dealt_unseen(plan, n_sites), _unseen_manifest(plan, n_sites, seed), folder, workers, progress
    )


def _emulated(
    plan: Plan,
    shares: Sequence[_Share],
    manifest: dict[str, Any],
    folder: Path,
    workers: int,
    progress: Progress | None,
) -> list[EmulatedHospital]:
    label, seed = _lesion_label(plan), manifest["inputs"]["seed"]
    hospitals = [EmulatedHospital(share.name, share.scanner, folder / share.name) for share in shares]
    if _is_complete(folder, manifest):
        return hospitals
    with _filled_afresh(folder, manifest):
        assignments = [
            _assigned(
                share,
                EmulatedPatient(seed, share.number, index),
                _grid(plan, _own_factors(plan, seed, share.number)),
                label,
                folder,
                _coils(plan),
                _second_series(plan),
                _number(plan),
            )
            for share in shares
            for index in range(1, share.n_patients + 1)
        ]
        numbers: dict[str, list[_Row]] = {hospital.name: [] for hospital in hospitals}
        for done, (one, rows) in enumerate(zip(assignments, _each(assignments, workers), strict=True), start=1):
            numbers[one.folder.name] += rows
            if progress is not None:
                progress(done, len(assignments))
        if _number(plan) is not None:
            for hospital in hospitals:
                _write_rows(hospital.folder / "labels.csv", ("patient", "study", "label"), numbers[hospital.name])
            return hospitals
        for hospital in hospitals if shares[0].prevalence is not None and plan.task.labels else ():
            of_hospital = [one for one in assignments if one.folder == hospital.folder and not one.is_unlabelled]
            _write_labels(hospital.folder / "labels.csv", of_hospital, plan.task.labels[:2])
    return hospitals


def _without(plan: Plan) -> str:
    """What patients without a lesion are called."""
    return plan.task.labels[0] if plan.task.labels else ""


def _assigned(
    share: _Share,
    patient: EmulatedPatient,
    grid: Grid,
    label: str,
    folder: Path,
    n_coils: int | None = None,
    second_series: str | None = None,
    number: str | None = None,
) -> _Assignment:
    """A patient of a hospital, and the scanner there that sees the patient."""
    names, prevalence = share.scanner.split("+"), share.prevalence
    scanner = names[0]
    if len(names) > 1:
        random = generator("scanner", patient.seed, patient.site, patient.index)
        if share.confounding is None or prevalence is None:
            scanner = names[int(random.integers(len(names)))]
        else:
            is_first = (random.random() < share.confounding) == patient.has_lesion(prevalence)
            scanner = names[0] if is_first else names[1 + int(random.integers(len(names) - 1))]
    is_unlabelled = scanner in share.unlabelled
    return _Assignment(
        patient,
        scanner,
        grid,
        label,
        folder / share.name,
        prevalence,
        n_coils,
        is_unlabelled,
        second_series,
        number,
    )


def emulation_sha256(plan: Plan, *, n_sites: int, seed: int) -> str:
    """SHA-256 over everything that the files of :func:`emulate` depend on: plans with the same share their hospitals."""
    sha256: str = _manifest(plan, n_sites, seed)["sha256"]
    return sha256


# ---------------------------------------------------------------------------------------------- what the plan asks for


@dataclass(frozen=True)
class _Share:
    """What one hospital gets."""

    name: str
    number: int
    """Its patients are those of this number."""

    scanner: str
    n_patients: int
    prevalence: float | None
    confounding: float | None
    unlabelled: tuple[str, ...] = ()


def _dealt(plan: Plan, n_sites: int, seed: int) -> list[_Share]:
    """The hospitals that train."""
    table = plan.simulation
    scanners = _dealt_scanners(plan, n_sites)
    prevalence = _dealt_prevalence(plan, n_sites, seed)
    confounding = _cycled(table.confounding, n_sites)
    _check_confounding(table.confounding, prevalence, scanners)
    sizes = _dealt_sizes(plan, n_sites, seed)
    unlabelled = tuple(_known_scanners("unlabelled", table.unlabelled or ()))
    return [
        _Share(f"site-{i + 1}", i + 1, scanners[i], sizes[i], prevalence[i], confounding[i], unlabelled)
        for i in range(n_sites)
    ]


def _dealt_unseen(plan: Plan, n_sites: int) -> list[_Share]:
    """The hospitals that train nothing."""
    table = plan.simulation
    scanners = _known_scanners("unseen", table.unseen or ())
    n = len(scanners)
    prevalence = _cycled(table.unseen_prevalence or table.prevalence, n)
    confounding = _cycled(table.unseen_confounding, n)
    _check_confounding(table.unseen_confounding, prevalence, scanners)
    return [
        _Share(f"unseen-{i + 1}", n_sites + i + 1, scanners[i], table.patients, prevalence[i], confounding[i])
        for i in range(n)
    ]


def _cycled(values: Sequence[float] | None, n: int) -> list[float | None]:
    """Values dealt in turn; None where there are none."""
    return [None if values is None else values[i % len(values)] for i in range(n)]


def _known_scanners(key: str, names: Sequence[str]) -> list[str]:
    unknown = sorted({one for name in names for one in name.split("+")} - set(ALL_SCANNERS))
    if unknown:
        raise FederadError(
            "R230",
            happened=f"simulation.{key} names {', '.join(unknown)}, which is not an emulated scanner.",
            because="Contrast, noise and DICOM header of a hospital come from its scanner.",
            remedies=(f"choose from: {', '.join(ALL_SCANNERS)}", f"or leave {key} out"),
        )
    return list(names)


def _check_confounding(
    values: Sequence[float] | None, prevalence: Sequence[float | None], scanners: Sequence[str]
) -> None:
    if values is not None and (None in prevalence or not all("+" in name for name in scanners)):
        raise FederadError(
            "R230",
            happened="simulation.confounding is given where a site has one scanner, or every patient a lesion.",
            because="It says which patients come to the first of a site's scanners.",
            remedies=(
                'join scanners: scanners = ["siemens-t1gd-3t+ge-t2-1.5t"], and give prevalence, under [simulation]',
                "with one scanner a site, a prevalence for each site says the same",
            ),
        )


def _dealt_sizes(plan: Plan, n_sites: int, seed: int) -> list[int]:
    """Patients of each hospital: equal, or shares from a Dirichlet distribution with at least one patient each."""
    n, skew = plan.simulation.patients, plan.simulation.size_skew
    if skew is None:
        return [n] * n_sites
    shares = generator("sizes", seed, n_sites).dirichlet([skew] * n_sites)
    return [max(1, round(float(share) * n * n_sites)) for share in shares]


def _grid(plan: Plan, factors: tuple[float, float] = (1.0, 1.0)) -> Grid:
    """The slab that the plan's [data] and [simulation] describe, so many times as coarse through the plane and in it."""
    spacing = plan.simulation.spacing_mm or plan.data.spacing_mm or (DEFAULT_SPACING_MM,) * plan.data.dimensions
    z, y, x = spacing if len(spacing) == 3 else (SLICE_THICKNESS_MM, *spacing)
    through, within = factors
    if plan.simulation.spacing_spread:
        z, y, x = round(z * through, 3), round(y * within, 3), round(x * within, 3)
    if plan.data.modality != "MR":
        raise FederadError(
            "R230",
            happened=f'data.modality = "{plan.data.modality}", and only "MR" is emulated.',
            because="Emulated hospitals are made from an atlas of the head.",
            remedies=('set modality = "MR" under [data]', "or use real data of that modality in a deployment"),
        )
    if plan.simulation.slices * z > HEAD_HEIGHT_MM:
        raise FederadError(
            "R230",
            happened=f"simulation.slices = {plan.simulation.slices}, and slices of {z:g} mm would stack up to "
            f"{plan.simulation.slices * z:g} mm.",
            because=f"The emulated head is {HEAD_HEIGHT_MM:g} mm tall.",
            remedies=(f"set slices = {int(HEAD_HEIGHT_MM // z)} or fewer under [simulation]",),
        )
    return Grid.slab(plan.simulation.slices, (z, y, x))


def _own_factors(plan: Plan, seed: int, number: int) -> tuple[float, float]:
    """How many times as coarse as the plan's the images of a hospital are, through the plane and in it."""
    spread = plan.simulation.spacing_spread or 0.0
    through, within = generator("spacing", seed, number).uniform(1 - spread, 1 + spread, size=2)
    return float(through), float(within)


def _coils(plan: Plan) -> int | None:
    """Receivers of an emulated scanner, where plans begin at their k-space."""
    return plan.data.coils if plan.task.kind in OF_KSPACE else None


def _second_series(plan: Plan) -> str | None:
    """Whose sequence every study shows as well."""
    name = plan.simulation.second_series
    if name is None:
        return None
    if plan.task.kind in OF_KSPACE:
        raise FederadError(
            "R230",
            happened=f'simulation.second_series is given with kind = "{plan.task.kind}".',
            because="The k-space of an emulated study is that of one series.",
            remedies=("leave second_series out",),
        )
    return _known_scanners("second_series", [name])[0]


def _number(plan: Plan) -> str | None:
    """What of the lesions is written into tables."""
    if plan.task.target == "multi-label":
        if unknown := [name for name in plan.task.labels if name not in FINDINGS]:
            raise FederadError(
                "R230",
                happened=f"task.labels names {unknown[0]!r}, which is found in no emulated patient.",
                because="A label that no emulated hospital ever writes cannot be learned.",
                remedies=(f"choose from: {', '.join(FINDINGS)}",),
            )
        return "; ".join(plan.task.labels)
    return plan.task.target if plan.task.kind in WITH_NUMBERS else None


def _lesion_label(plan: Plan) -> str:
    if plan.task.kind in OF_KSPACE or plan.task.target == "multi-label":
        return "lesion"
    if len(plan.task.labels) > 2:
        raise FederadError(
            "R230",
            happened=f"task.labels names {len(plan.task.labels) - 1} structures, and emulated patients have one kind of "
            "lesion.",
            because="A label that no emulated hospital ever draws cannot be learned.",
            remedies=('set labels = ["background", "lesion"] under [task]',),
        )
    return plan.task.labels[1]


def _dealt_scanners(plan: Plan, n_sites: int) -> list[str]:
    """The scanner of each site, or its scanners."""
    names = _known_scanners("scanners", plan.simulation.scanners or tuple(SCANNERS))
    return [names[i % len(names)] for i in range(n_sites)]


def _dealt_prevalence(plan: Plan, n_sites: int, seed: int) -> list[float | None]:
    """The share of patients with lesions at each site; None for all of them, without a table.

    With ``label_skew`` it is drawn for each site from a Dirichlet distribution around the table's value.
    """
    shares, skew = _cycled(plan.simulation.prevalence, n_sites), plan.simulation.label_skew
    if skew is None:
        return shares
    random = generator("prevalence", seed, n_sites)
    return [
        None if share is None else float(random.dirichlet([2 * skew * share + 1e-6, 2 * skew * (1 - share) + 1e-6])[0])
        for share in shares
    ]


# --------------------------------------------------------------------------------------------------- one folder, once


def _manifest(plan: Plan, n_sites: int, seed: int) -> dict[str, Any]:
    """What the files depend on, and its hash."""
    inputs: dict[str, Any] = {
        "format": FORMAT,
        "seed": seed,
        "patients": plan.simulation.patients,
        "label": _lesion_label(plan),
        "scanners": _dealt_scanners(plan, n_sites),
        "scanners_sha256": scanners_sha256(named_scanners(plan)),
        "grid": asdict(_grid(plan)),
    }
    if (n_coils := _coils(plan)) is not None:
        inputs |= {"coils": n_coils, "noise_share": NOISE_SHARE}
    if (number := _number(plan)) is not None:
        inputs |= {"number": number, "grades": GRADES}
    if plan.simulation.prevalence is not None:
        inputs |= {"prevalence": _dealt_prevalence(plan, n_sites, seed), "without": _without(plan)}
    if (second := _second_series(plan)) is not None:
        inputs["second_series"] = second
    for key in ("confounding", "size_skew", "unlabelled", "spacing_spread"):
        if (value := getattr(plan.simulation, key)) is not None:
            inputs[key] = value
    return _signed(inputs)


def _unseen_manifest(plan: Plan, n_sites: int, seed: int) -> dict[str, Any]:
    """The same of the hospitals that train nothing."""
    inputs = {
        "format": FORMAT,
        "seed": seed,
        "label": _lesion_label(plan),
        "without": _without(plan),
        "scanners_sha256": scanners_sha256(named_scanners(plan)),
        "grid": asdict(_grid(plan)),
        "unseen": [asdict(share) for share in _dealt_unseen(plan, n_sites)],
    }
    if (number := _number(plan)) is not None:
        inputs |= {"number": number, "grades": GRADES}
    if (n_coils := _coils(plan)) is not None:
        inputs |= {"coils": n_coils, "noise_share": NOISE_SHARE}
    if (second := _second_series(plan)) is not None:
        inputs["second_series"] = second
    if plan.simulation.spacing_spread is not None:
        inputs["spacing_spread"] = plan.simulation.spacing_spread
    return _signed(inputs)


def named_scanners(plan: Plan) -> list[str]:
    """Every emulated scanner that a plan names, seen or not."""
    table = plan.simulation
    second = () if table.second_series is None else (table.second_series,)
    return [one for name in (*table.scanners, *(table.unseen or ()), *second) for one in name.split("+")]


def _signed(inputs: dict[str, Any]) -> dict[str, Any]:
    sha256 = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
    return {"emulated": True, "sha256": sha256, "inputs": inputs}


def _is_complete(folder: Path, manifest: dict[str, Any]) -> bool:
    """Whether these very hospitals lie in ``folder``, with as many files as were written."""
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return bool(found["sha256"] == manifest["sha256"] and found["files"] == _count_files(folder))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _count_files(folder: Path) -> int:
    return sum(1 for site in _sites(folder) for ending in ("*.dcm", "*.h5") for _ in site.rglob(ending))


def _sites(folder: Path) -> list[Path]:
    return sorted([*folder.glob("site-*"), *folder.glob("unseen-*")])


@contextmanager
def _filled_afresh(folder: Path, manifest: dict[str, Any]) -> Iterator[None]:
    """Clear what an earlier emulation left in ``folder``; when the body ends well, sign the result with its manifest."""
    old_sites = _sites(folder)
    if old_sites and not any((folder / mark).exists() for mark in (MANIFEST, UNFINISHED)):
        raise FederadError(
            "R231",
            happened=f"{folder} already holds {old_sites[0].name}, and no emulation made it.",
            because="Filling it would delete files that may be somebody's only copy.",
            remedies=("choose another folder", "or move these files away"),
        )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / UNFINISHED).touch()
    (folder / MANIFEST).unlink(missing_ok=True)
    for site in old_sites:
        shutil.rmtree(site)
    yield
    text = json.dumps({**manifest, "files": _count_files(folder)}, indent=2) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")
    (folder / UNFINISHED).unlink()


_Row = tuple[str, ...]
"""Of a table of labels."""


def _each(assignments: Sequence[_Assignment], workers: int) -> Iterable[list[_Row]]:
    """Write all patients; the rows of each for the hospital's table, in order."""
    if workers == 1:
        yield from map(_write_patient, assignments)
        return
    pool = process_pool(workers)
    try:
        yield from pool.map(_write_patient, assignments)
    except BrokenProcessPool:
        raise FederadError(
            "R232",
            happened="A process that makes emulated patients ended before its work was done.",
            because="Most often the machine ran out of memory; the hospitals are incomplete.",
            remedies=("run it again with fewer workers",),
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


# -------------------------------------------------------------------------------------------------- one patient's files


def _write_patient(assignment: _Assignment) -> list[_Row]:
    """All studies of a patient; a row for each whose number is written down."""
    rows: list[_Row] = []
    for study in range(1, assignment.patient.n_studies + 1):
        anatomy = (_write_study if assignment.n_coils is None else _write_kspace)(assignment, study)
        if assignment.number is not None and not assignment.is_unlabelled:
            said = _said(anatomy, assignment.number)
            rows.append((assignment.patient.patient_id, str(_uid(assignment, study, "study")), said))
    return rows


def _write_labels(path: Path, assignments: Sequence[_Assignment], names: Sequence[str]) -> None:
    """Who has a lesion, in the words of the plan: first the name for those who have none."""
    _write_rows(path, ("patient", "label"), [(one.patient.patient_id, names[one.has_lesions]) for one in assignments])


def _write_rows(path: Path, head: _Row, rows: Sequence[_Row]) -> None:
    with path.open("w", newline="", encoding="utf-8") as lines:
        table = csv.writer(lines, lineterminator="\n")
        table.writerow(head)
        table.writerows(rows)


def _said(anatomy: Anatomy, number: str) -> str:
    """What a table says of a study."""
    if number == "count":
        return str(count(anatomy))
    if number == "proportion":
        return grade(share_of_brain(anatomy))
    return "; ".join(name for name in number.split("; ") if FINDINGS[name](anatomy)) or "none"


def count(anatomy: Anatomy) -> int:
    """How many lesions there are: parts of the outline that do not touch at a face, an edge or a corner."""
    return int(ndimage.label(anatomy.lesion_mask, structure=np.ones((3, 3, 3)))[1])


def share_of_brain(anatomy: Anatomy) -> float:
    """What share of the slab's brain lesions are, 0 to 1."""
    brain = [*(TISSUES.index(name) for name in ("grey_matter", "white_matter")), TISSUES_WITH_LESION.index("lesion")]
    return float(anatomy.lesion_mask.sum() / max(float(anatomy.tissues[brain].sum()), 1.0))


def grade(share: float) -> str:
    """The interval of :data:`GRADES` that a share lies in, as a reader writes it: ``"0.02-0.05"``; ``"0"`` for none."""
    if share <= 0:
        return "0"
    place = next(i for i, high in enumerate(GRADES[1:], start=1) if share <= high)
    return f"{GRADES[place - 1]:g}-{GRADES[place]:g}"


def _halves(anatomy: Anatomy) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """The outline in the front half of the head and in the back half; y grows to the back."""
    front, back = np.array_split(anatomy.lesion_mask > 0, 2, axis=1)
    return front, back


FINDINGS: dict[str, Callable[[Anatomy], bool]] = {
    "front lesion": lambda anatomy: bool(_halves(anatomy)[0].any()),
    "back lesion": lambda anatomy: bool(_halves(anatomy)[1].any()),
    "several lesions": lambda anatomy: count(anatomy) > 1,
}
"""What may be found in an emulated study, which has any number of them; none changes when left and right are mirrored."""


def _write_study(assignment: _Assignment, study: int) -> Anatomy:
    """The series and the segmentation into ``<patient>/study-<n>``; what was seen."""
    patient, grid = assignment.patient, assignment.grid
    anatomy = patient.anatomy(grid, study, with_lesions=assignment.has_lesions)
    scanner = ALL_SCANNERS[assignment.scanner]
    folder = assignment.folder / patient.patient_id / f"study-{study}"
    folder.mkdir(parents=True)
    series = _acquired(assignment, study, anatomy, scanner, number=1)
    for slice_ in series:
        dcmwrite(folder / f"im-{slice_.InstanceNumber:03d}.dcm", slice_, enforce_file_format=True)
    if assignment.second_series is not None:
        second = with_sequence(scanner, ALL_SCANNERS[assignment.second_series])
        for slice_ in _acquired(assignment, study, anatomy, second, number=SECOND):
            dcmwrite(folder / f"second-{slice_.InstanceNumber:03d}.dcm", slice_, enforce_file_format=True)
    if assignment.is_unlabelled:
        return anatomy
    segmentation = _segmentation(assignment, study, series, anatomy.lesion_mask)
    dcmwrite(folder / "seg.dcm", segmentation, enforce_file_format=True)
    return anatomy


def _write_kspace(assignment: _Assignment, study: int) -> Anatomy:
    """The study as ``<patient>/study-<n>.h5``; what was seen."""
    patient, grid, n_coils = assignment.patient, assignment.grid, assignment.n_coils or 1
    anatomy = patient.anatomy(grid, study, with_lesions=assignment.has_lesions)
    random = generator("k-space", patient.seed, patient.site, patient.index, study, assignment.scanner)
    scanner = ALL_SCANNERS[assignment.scanner]
    images = coil_images(scanner, anatomy.tissues, grid.spacing_mm, n_coils, random)
    path = assignment.folder / patient.patient_id / f"study-{study}.h5"
    write_study(path, images, grid.spacing_mm, scanner, patient.patient_id)
    return anatomy


def _acquired(assignment: _Assignment, study: int, anatomy: Anatomy, scanner: Scanner, number: int) -> list[Dataset]:
    """Series ``number`` of a study, from the feet to the head; 1 is the one that is drawn on."""
    patient = assignment.patient
    which = () if number == 1 else (number,)
    random = generator("acquisition", patient.seed, patient.site, patient.index, study, assignment.scanner, *which)
    image = acquire(scanner, anatomy.tissues, assignment.grid.spacing_mm, random)
    pixels = np.clip(np.rint(image * scanner.gain), 0, 4095).astype("<u2")
    window = float(np.percentile(pixels, 99.5))
    slices = [_slice(assignment, study, place, plane, window) for place, plane in enumerate(pixels, start=1)]
    for slice_ in slices:
        _describe_scanner(slice_, scanner)
        if number > 1:
            slice_.SOPInstanceUID = _uid(assignment, study, "series", number, slice_.InstanceNumber)
            slice_.SeriesInstanceUID = _uid(assignment, study, "series", number)
            slice_.SeriesNumber = number
    return slices


def _uid(assignment: _Assignment, *what: object) -> UID:
    """A UID that the same emulation gives again and no other one does."""
    parts = ("federad", FORMAT, assignment.patient, ALL_SCANNERS[assignment.scanner], assignment.grid, *what)
    parts += () if assignment.has_lesions else ("without lesions",)
    return generate_uid(entropy_srcs=["\x1f".join(str(part) for part in parts)])


def _slice(assignment: _Assignment, study: int, number: int, pixels: NDArray[np.uint16], window: float) -> Dataset:
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SpecificCharacterSet = "ISO_IR 192"
    ds.ImageType = ["ORIGINAL", "PRIMARY", "M"]
    ds.SOPClassUID = MRImageStorage
    ds.SOPInstanceUID = _uid(assignment, study, number)
    ds.InstanceNumber = number
    _describe_patient(ds, assignment.patient, study)
    _describe_study(ds, assignment, study)
    _place(ds, assignment.grid, number - 1)
    ds.SamplesPerPixel = 1
    ds.PhotometricInterpretation = "MONOCHROME2"
    ds.Rows, ds.Columns = pixels.shape
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 12, 11
    ds.PixelRepresentation = 0
    ds.WindowCenter, ds.WindowWidth = round(window / 2), max(1, round(window))
    ds.PixelData = pixels.tobytes()
    return ds


def _describe_patient(ds: Dataset, patient: EmulatedPatient, study: int) -> None:
    ds.PatientName = f"Emulated^{patient.patient_id}"
    ds.PatientID = patient.patient_id
    ds.PatientBirthDate = ""
    ds.PatientSex = patient.sex
    ds.PatientAge = f"{patient.age_years + study - 1:03d}Y"
    ds.PatientComments = "Emulated: this person does not exist"


def _describe_study(ds: Dataset, assignment: _Assignment, study: int) -> None:
    ds.StudyInstanceUID = _uid(assignment, study, "study")
    ds.SeriesInstanceUID = _uid(assignment, study, "series")
    ds.FrameOfReferenceUID = _uid(assignment, study, "frame of reference")
    ds.StudyID, ds.SeriesNumber = str(study), 1
    ds.StudyDate = ds.SeriesDate = ds.AcquisitionDate = ds.ContentDate = _STUDY_DATES[study - 1]
    ds.StudyTime = ds.SeriesTime = ds.AcquisitionTime = ds.ContentTime = "120000"
    ds.AccessionNumber = ds.ReferringPhysicianName = ds.PositionReferenceIndicator = ""
    ds.StudyDescription = "Emulated brain MR"
    ds.InstitutionName = f"Emulated hospital {assignment.patient.site}"
    ds.BodyPartExamined = "BRAIN"
    ds.PatientPosition = "HFS"


def _describe_scanner(ds: Dataset, scanner: Scanner) -> None:
    ds.Modality = "MR"
    ds.Manufacturer = scanner.manufacturer
    ds.ManufacturerModelName = scanner.model
    ds.MagneticFieldStrength = scanner.field_strength_t
    ds.SequenceName = scanner.sequence_name
    ds.SeriesDescription = ds.ProtocolName = scanner.series_description
    ds.ScanningSequence = list(scanner.scanning_sequence)
    ds.SequenceVariant = "SK"
    ds.ScanOptions = ""
    ds.MRAcquisitionType = "2D"
    ds.EchoTrainLength = 1
    ds.EchoTime = _milliseconds(scanner.echo_time_s)
    ds.RepetitionTime = _milliseconds(scanner.repetition_time_s)
    if scanner.inversion_time_s is not None:
        ds.InversionTime = _milliseconds(scanner.inversion_time_s)
    if scanner.contrast_agent is not None:
        ds.ContrastBolusAgent = scanner.contrast_agent


def _place(ds: Dataset, grid: Grid, index: int) -> None:
    """Geometry of slice ``index`` (from 0, feet to head); DICOM gives positions as (x, y, z), spacings as (row, column)."""
    z, y, x = (round(mm, 6) for mm in grid.origin_mm)  # DICOM's decimal strings have at most 16 characters
    dz, dy, dx = grid.spacing_mm
    height = round(z + index * dz, 6)
    ds.ImagePositionPatient = [x, y, height]
    ds.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    ds.SliceLocation = height
    ds.PixelSpacing = [dy, dx]
    ds.SliceThickness = ds.SpacingBetweenSlices = dz


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1000, 3)


def _segmentation(assignment: _Assignment, study: int, series: Sequence[Dataset], mask: NDArray[np.uint8]) -> Dataset:
    """The lesions as a binary DICOM Segmentation on the slices of ``series``; ``mask`` is ``(z, y, x)``."""
    import highdicom as hd
    from pydicom.sr.codedict import codes

    segment = hd.seg.SegmentDescription(
        segment_number=1,
        segment_label=assignment.label,
        segmented_property_category=codes.SCT.MorphologicallyAbnormalStructure,
        segmented_property_type=codes.SCT.Lesion,
        algorithm_type=hd.seg.SegmentAlgorithmTypeValues.MANUAL,
        tracking_uid=_uid(assignment, "lesions"),
        tracking_id="lesions",
    )
    segmentation = hd.seg.Segmentation(
        source_images=series,
        pixel_array=mask,
        segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=[segment],
        series_instance_uid=_uid(assignment, study, "segmentation series"),
        series_number=2,
        sop_instance_uid=_uid(assignment, study, "segmentation"),
        instance_number=1,
        manufacturer="federad",
        manufacturer_model_name="emulation",
        software_versions=str(FORMAT),
        device_serial_number="0",
        content_label="LESIONS",
        omit_empty_frames=False,
    )
    return _made_timeless(segmentation, series[0], _uid(assignment, study, "dimensions"))


def _made_timeless(segmentation: Dataset, source: Dataset, dimension_uid: UID) -> Dataset:
    """Replace every moment of writing by the study's own, and the random UID of the dimensions by ours."""
    date, time = source.StudyDate, source.StudyTime
    moments = {"DA": date, "TM": time, "DT": date + time}
    for element in segmentation.iterall():
        if element.keyword == "DimensionOrganizationUID":
            element.value = dimension_uid
        elif element.VR in moments and not element.is_empty:
            element.value = moments[element.VR]
    return segmentation
