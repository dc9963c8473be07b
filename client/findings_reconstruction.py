"""What a reconstruction model made of k-space: a new series of images, pictures beside the zero-filled image, and how
steady the model is.

K-space that a scanner sampled in part is reconstructed from what was measured. Of fully sampled k-space the plan's share is
used, and what comes out is measured against the whole. Where a study has magnitudes alone, its k-space is made up: that
shows what a model does, and is no measurement.
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
from client.findings import Findings, Shown, beside, save_nifti
from shared_models.mri import centre_is_measured
from shared_models.tasks.reconstruction import ERROR_GAIN, Reconstruction, magnitude

if TYPE_CHECKING:
    from client.inference import Case, OnProgress

SERIES = "reconstruction"
"""Folder of the series."""

OTHER_SHARE = 1.25
"""A model is told to be used elsewhere than it learned when the acceleration is so many times another, either way."""


def write(case: Case, folder: Path, on_progress: OnProgress) -> Findings:
    """Reconstruct, and write ``reconstruction/0001.dcm`` and so on, or ``reconstruction.nii.gz`` for a NIfTI image."""
    task, volume, device = Reconstruction(case.model.plan), case.volume, torch.device(case.model.device)
    total, done = volume.image.shape[1], 0

    def network(sample: Tensor) -> Tensor:
        nonlocal done
        answer: Tensor = case.model.network(sample)
        done += len(sample)
        on_progress(min(done, total), total)
        return answer

    with torch.inference_mode():
        images = task.predict(network, volume, device)
    masks = np.stack([task.mask(volume, z) for z in range(total)])
    acceleration = float(masks.size / masks.sum())
    found = Findings(title=f"Reconstruction from 1/{acceleration:.3g} of k-space")
    made = {
        "reconstruction": _on_scan(case, magnitude(images)),
        "zero-filled": _on_scan(case, magnitude(task.zero_filled(volume))),
    }
    _measure(case, task, images, acceleration, found)
    _tell(case, masks, acceleration, found)
    _tell_stability(case, task, device, found)
    _write(case, folder, made["reconstruction"], acceleration, found)
    _show(case, made, found)
    return found


def _on_scan(case: Case, values: NDArray[np.float64]) -> NDArray[np.float32]:
    """Magnitudes ``(z, y, x)`` of a volume on the scan's grid, in the source's units."""
    scaled = np.asarray(values * case.unit, np.float32)
    return (
        scaled if case.kind is Kind.KSPACE else on_scan_grid(scaled[np.newaxis], case.scan, case.volume.spacing_mm)[0]
    )


def _measure(
    case: Case, task: Reconstruction, images: NDArray[np.float32], acceleration: float, found: Findings
) -> None:
    """The rows of the table: against the whole where there is one."""
    found.measures = [{"label": label, "acceleration": acceleration} for label in ("reconstruction", "zero-filled")]
    if case.volume.measured is None:
        scores = task.measure(images, case.volume)
        found.measures[0] |= {"psnr": scores["psnr"], "ssim": scores["ssim"]}
        found.measures[1] |= {"psnr": scores["zero_filled_psnr"], "ssim": scores["zero_filled_ssim"]}


def _tell(case: Case, masks: NDArray[np.bool_], acceleration: float, found: Findings) -> None:
    """What a reader must know of where the samples come from."""
    plan = case.model.plan
    if case.is_made_up:
        found.warnings.append(
            "The study has magnitudes alone: phase, coils and k-space were made up from them, and no scanner measured "
            "them. This shows what the model does, and replaces no acquisition."
        )
    if case.volume.measured is None:
        found.notes.append(
            f"All of k-space is there; the model was given 1/{acceleration:.3g} of it (pattern: {plan.task.mask}), and its "
            "image is measured against the image from the whole."
        )
        return
    found.notes.append(
        "The model was given what the scanner measured; there is no image from the whole to compare with."
    )
    learned = plan.task.acceleration
    if max(acceleration / learned, learned / acceleration) > OTHER_SHARE:
        found.warnings.append(
            f"The model learned from 1/{learned:g} of k-space, and this is 1/{acceleration:.3g}: it is used where it did "
            "not learn."
        )
    if not all(centre_is_measured(mask, plan.task.centre_fraction) for mask in masks):
        found.warnings.append(
            f"The middle {plan.task.centre_fraction:.0%} of k-space, in which the model looks for the coils, was not all "
            "measured: what it shows cannot be relied on."
        )


def _tell_stability(case: Case, task: Reconstruction, device: torch.device, found: Findings) -> None:
    """The stability card of this study, in words (:mod:`shared_models.stability`)."""
    card = task.card(case.model.network, case.volume, device)
    said = (
        f"The worst small change of the samples that a search found changes the image {card['amplification']:.2g} times as "
        "much as the samples (1 for the zero-filled image)"
    )
    if "structure" in card:
        said += (
            f"; of a small bright disc that was put into the image {card['structure']:.0%} comes back (zero-filled: "
            f"{card['structure_zero_filled']:.0%})"
        )
        if card["structure"] < card["structure_zero_filled"]:
            found.warnings.append(
                "The model keeps less of a small structure that it has not seen than the zero-filled image does: look at "
                "that, too."
            )
    found.notes.append(f"{said}. A learned reconstruction can lose small structures, and show some that are not there.")


def _write(case: Case, folder: Path, values: NDArray[np.float32], acceleration: float, found: Findings) -> None:
    model = case.model
    if case.kind is Kind.NIFTI or (case.kind is Kind.DICOM and not case.sources):
        save_nifti(folder / f"{SERIES}.nii.gz", values, case.scan)
        found.files[f"{SERIES}.nii.gz"] = "magnitude of the reconstruction, in the image's own units"
        return
    from client.dicom_images import write_series

    origin = "k-space made up from magnitudes" if case.is_made_up else "k-space"
    derivation = f"Magnitude reconstructed by {model.name} from 1/{acceleration:.3g} of {origin}."
    kind = write_series(case, folder / SERIES, values, derivation)
    found.files[f"{SERIES}/"] = f"DICOM series of {len(values)} {kind}{'s' if len(values) > 1 else ''}"
    if case.acquired is not None:
        found.notes += _unknown(case)


def _unknown(case: Case) -> list[str]:
    """What a file of k-space does not say, and what follows."""
    known = case.acquired
    notes = []
    if known is not None and known.place is None:
        size = "" if known.pixel_mm is not None else " nor how large its pixels are"
        notes.append(
            f"The file does not say where its slices lie in the patient{size}: the series is of secondary capture images, "
            "without a place, on which nothing can be measured in the patient."
        )
    missing = [
        word for word, keyword in (("patient", "PatientID"), ("study", "StudyInstanceUID"))
        if known is not None and not known.header.get(keyword)
    ]  # fmt: skip
    if missing:
        notes.append(
            f"The file does not say of which {' and '.join(missing)} it is: an archive cannot file the series with others "
            "until somebody puts that in."
        )
    return notes


def _show(case: Case, made: dict[str, NDArray[np.float32]], found: Findings) -> None:
    """Rows of pictures of the slices with the most signal, all with one scale of greys."""
    rows = dict(reversed(made.items()))  # zero-filled first
    if case.volume.measured is None:
        reference = case.scan.image[0]
        rows |= {"from all of k-space": reference}
        error = np.abs(made["reconstruction"] - reference)
        rows |= {f"error, {ERROR_GAIN:g} times as bright": ERROR_GAIN * error}
    shown = made["reconstruction"]
    brightest = float(np.percentile(shown, 99.8))
    found.pictures_in_a_row = len(rows)
    energy = (shown.astype(np.float64) ** 2).sum(axis=(1, 2))
    n = min(2, len(shown))
    best = [int(part[energy[part].argmax()]) for part in np.array_split(np.arange(len(shown)), n)]
    for k in best:
        for name, values in rows.items():
            picture = beside(values[k], brightest, case.scan, case.volume.spacing_mm)
            found.pictures.append(Shown(picture, f"slice {k + 1} of {len(shown)}: {name}"))
