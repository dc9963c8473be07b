"""Maps of what was found, on the scanner's own grid: NIfTI for research, DICOM parametric maps for the archive, or both."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from client.findings import Findings, save_nifti

if TYPE_CHECKING:
    from client.inference import Case

Form = Literal["nifti", "dicom", "both"]
"""In which files maps are written; DICOM takes as many bytes for each voxel, in the archive too."""

FORMS: tuple[Form, ...] = get_args(Form)


def write_map(
    case: Case,
    folder: Path,
    found: Findings,
    name: str,
    values: NDArray[np.float32],
    meaning: str,
    limits: tuple[float, float] = (0.0, 1.0),
) -> None:
    """Write a map as it was asked for, as ``name.nii.gz`` or ``name.dcm``; what is no DICOM gives NIfTI in any case.

    Parameters
    ----------
    name
        Of the file, without its ending; of the form ``probability-...`` it is coded as a probability.
    values
        ``(slice, row, column)`` on the scan's grid, without a unit.
    meaning
        What a value says, for people.
    limits
        The least and the largest value that there may be.
    """
    as_dicom = bool(case.sources) and case.maps != "nifti"
    if as_dicom:
        from client.dicom_results import parametric_map

        parametric_map(case, name, values, meaning, limits).save_as(folder / f"{name}.dcm")
        found.files[f"{name}.dcm"] = f"DICOM parametric map: {meaning}"
    if not as_dicom or case.maps == "both":
        save_nifti(folder / f"{name}.nii.gz", values, case.scan)
        found.files[f"{name}.nii.gz"] = meaning
    if case.maps != "nifti" and not as_dicom and (note := _NO_DICOM) not in found.notes:
        found.notes.append(note)


_NO_DICOM = "There are no DICOM images here that a parametric map could refer to: maps are NIfTI."


def limits_of(values: NDArray[np.float32]) -> tuple[float, float]:
    """The least and the largest value of a map that has no bounds of its own."""
    return float(values.min()), float(values.max())
