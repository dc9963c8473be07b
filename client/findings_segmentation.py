"""What a segmentation model found: a DICOM segmentation on the scanner's own voxels, maps, measures, pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.data.preprocessing import on_scan_grid
from client.data.records import Kind
from client.findings import (
    COLOURS,
    Findings,
    Shown,
    entropy,
    file_name,
    heated,
    measured,
    outlined,
    save_nifti,
    save_picture,
    slices_to_show,
)
from shared_models.tasks.segmentation import Segmentation

if TYPE_CHECKING:
    from client.inference import Case, OnProgress


def write(case: Case, folder: Path, on_progress: OnProgress) -> Findings:
    """Predict, and write ``segmentation.dcm`` (or ``.nii.gz``, ``.png``), a map of each label's probability and one of how
    undecided the model is."""
    scan, names = case.scan, case.model.plan.task.labels
    probabilities = on_scan_grid(_predicted(case, on_progress), scan, case.volume.spacing_mm)
    labels = np.asarray(probabilities.argmax(axis=0), np.uint8)
    doubt = entropy(probabilities)
    found = Findings(title=f"Segmentation: {', '.join(names[1:])}")
    _write_labels(case, labels, folder, found)
    for index, name in enumerate(names[1:], start=1):
        file = f"probability-{file_name(name)}.nii.gz"
        save_nifti(folder / file, probabilities[index], scan)
        found.files[file] = f"probability of {name}, 0 to 1"
        inside = labels == index
        row = {"label": name, **measured(inside, scan)}
        row["mean_probability"] = float(probabilities[index][inside].mean()) if inside.any() else None
        found.measures.append(row)
    save_nifti(folder / "uncertainty.nii.gz", doubt, scan)
    found.files["uncertainty.nii.gz"] = "entropy of the probabilities over the largest possible, 0 (certain) to 1"
    _show(case, labels, doubt, found)
    if not labels.any():
        found.notes.append("The model found none of its labels in this study; that does not mean that there is none.")
    return found


def _predicted(case: Case, on_progress: OnProgress) -> NDArray[np.float32]:
    """Probabilities ``(label, z, y, x)`` on the volume's grid."""
    model = case.model
    task = Segmentation(model.plan)
    total, done = task.n_windows(case.volume), 0

    def network(windows: Tensor) -> Tensor:
        nonlocal done
        answer: Tensor = model.network(windows)
        done += len(windows)
        on_progress(min(done, total), total)
        return answer

    with torch.inference_mode():
        return task.probabilities(network, case.volume, torch.device(model.device))


def _write_labels(case: Case, labels: NDArray[np.uint8], folder: Path, found: Findings) -> None:
    if case.sources:
        from client.dicom_results import segmentation

        written, uncoded = segmentation(case, labels)
        written.save_as(folder / "segmentation.dcm")
        found.files["segmentation.dcm"] = "DICOM segmentation of the series, one segment for each label"
        if uncoded:
            found.notes.append(
                f"There is no standard code here for {', '.join(uncoded)}: the segmentation uses codes of federad's own."
            )
    elif case.kind is Kind.PICTURE:
        save_picture(folder / "segmentation.png", labels)
        found.files["segmentation.png"] = "index of the label at each pixel"
    else:
        save_nifti(folder / "segmentation.nii.gz", labels, case.scan)
        found.files["segmentation.nii.gz"] = "index of the label at each voxel"
        if case.kind is Kind.DICOM:
            found.notes.append("The slices of this series are no images of their own: no DICOM object refers to them.")


def _show(case: Case, labels: NDArray[np.uint8], doubt: NDArray[np.float32], found: Findings) -> None:
    weight = (labels > 0).sum(axis=(1, 2)).astype(np.float64)
    for k in slices_to_show(weight):
        found.pictures.append(Shown(outlined(case.scan, labels, k), f"slice {k + 1} of {len(weight)}: what was found"))
        found.pictures.append(Shown(heated(case.scan, doubt, k), f"slice {k + 1}: where the model is undecided (red)"))
    for row, colour in zip(found.measures, (COLOURS * 43)[: len(found.measures)], strict=True):
        row["colour"] = "#{:02x}{:02x}{:02x}".format(*colour)
