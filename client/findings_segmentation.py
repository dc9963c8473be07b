"""What a segmentation model found: a DICOM segmentation on the scanner's own voxels, maps, measures, pictures.

The segmentation is what the released network says. How undecided it is, is read off the same probabilities, or off the
mean of several passes with dropout, where they are asked for and the network has learned with dropout.
"""

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
from client.findings_maps import write_map
from shared_models.tasks.segmentation import Segmentation
from shared_models.uncertainty import Members, passes

if TYPE_CHECKING:
    from client.inference import Case, OnProgress


def write(case: Case, folder: Path, on_progress: OnProgress) -> Findings:
    """Predict, and write ``segmentation.dcm`` (or ``.nii.gz``, ``.png``), a map of each label's probability and one of how
    undecided the model is; with passes one more, of what they disagree about."""
    scan, names = case.scan, case.model.plan.task.labels
    predicted, members = _predicted(case, on_progress)
    probabilities = on_scan_grid(predicted, scan, case.volume.spacing_mm)
    labels = np.asarray(probabilities.argmax(axis=0), np.uint8)
    doubt = entropy(probabilities)
    if case.passes:
        doubt = entropy(on_scan_grid(members.mean, scan, case.volume.spacing_mm))
    found = Findings(title=f"Segmentation: {', '.join(names[1:])}")
    _write_labels(case, labels, folder, found)
    for index, name in enumerate(names[1:], start=1):
        write_map(
            case,
            folder,
            found,
            f"probability-{file_name(name)}",
            probabilities[index],
            f"probability of {name}, 0 to 1",
        )
        inside = labels == index
        row = {"label": name, **measured(inside, scan)}
        row["mean_probability"] = float(probabilities[index][inside].mean()) if inside.any() else None
        found.measures.append(row)
    of_what = "the probabilities" if not case.passes else f"the mean probabilities of {case.passes} passes with dropout"
    meaning = f"entropy of {of_what} over the largest possible, 0 (certain) to 1"
    write_map(case, folder, found, "uncertainty", doubt, meaning)
    if case.passes:
        apart = on_scan_grid(members.disagreement[np.newaxis], scan, case.volume.spacing_mm)[0]
        meaning = f"what {case.passes} passes with dropout disagree about (mutual information over the largest entropy)"
        write_map(case, folder, found, "disagreement", apart, f"{meaning}, 0 to 1")
    _show(case, labels, probabilities, doubt, found)
    if not labels.any():
        found.notes.append("The model found none of its labels in this study; that does not mean that there is none.")
    return found


def _predicted(case: Case, on_progress: OnProgress) -> tuple[NDArray[np.float32], Members]:
    """Probabilities ``(label, z, y, x)`` on the volume's grid, and what passes with dropout say."""
    model = case.model
    task, device = Segmentation(model.plan), torch.device(model.device)
    total, done = task.n_windows(case.volume) * (1 + case.passes), 0

    def network(windows: Tensor) -> Tensor:
        nonlocal done
        answer: Tensor = model.network(windows)
        done += len(windows)
        on_progress(min(done, total), total)
        return answer

    with torch.inference_mode():
        plain = task.probabilities(network, case.volume, device)
        members = Members()
        for _ in passes(model.network, case.passes, device):
            members.add(task.probabilities(network, case.volume, device))
    return plain, members


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


def _show(
    case: Case,
    labels: NDArray[np.uint8],
    probabilities: NDArray[np.float32],
    doubt: NDArray[np.float32],
    found: Findings,
) -> None:
    """Of each slice three pictures beside each other: what was found, how probable anything is there, how undecided."""
    weight = (labels > 0).sum(axis=(1, 2)).astype(np.float64)
    anything = 1 - probabilities[0]
    what = found.measures[0]["label"] if len(found.measures) == 1 else "any label"
    found.pictures_in_a_row = 3
    for k in slices_to_show(weight):
        at = f"slice {k + 1} of {len(weight)}"
        found.pictures.append(Shown(outlined(case.scan, labels, k), f"{at}: what was found"))
        found.pictures.append(Shown(heated(case.scan, anything, k), f"{at}: probability of {what}", is_map=True))
        found.pictures.append(Shown(heated(case.scan, doubt, k), f"{at}: where the model is undecided", is_map=True))
    for row, colour in zip(found.measures, (COLOURS * 43)[: len(found.measures)], strict=True):
        row["colour"] = "#{:02x}{:02x}{:02x}".format(*colour)
