"""What a classification model found: a structured report with each label's probability, and where its evidence lies."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from client.data.preprocessing import on_scan_grid
from client.findings import Findings, Shown, entropy, file_name, heated, slices_to_show
from client.findings_maps import limits_of, write_map
from shared_models.tasks.multi_label import FOUND, MultiLabel, classification
from shared_models.uncertainty import Members, passes

if TYPE_CHECKING:
    from client.inference import Case, OnProgress


def write(case: Case, folder: Path, on_progress: OnProgress) -> Findings:
    """Predict, and write ``report.dcm`` for a DICOM study, and a map of the evidence for the label that is shown.

    That is the most probable label, or the second where there are two: where nothing speaks for a lesion, no place does.
    Where a study may have several labels, each counts as found from a probability of one half on.
    """
    model, scan = case.model, case.scan
    task, names = classification(model.plan), model.plan.task.labels
    are_several = isinstance(task, MultiLabel)

    def distribution(probabilities: NDArray[np.generic]) -> NDArray[np.float32]:
        """What adds up to 1 along the first axis: over labels, or of each label and its absence."""
        p = np.asarray(probabilities, np.float32)
        return np.stack([p, 1 - p]) if are_several else p[:, np.newaxis]

    on_progress(0, 1)
    device, members = torch.device(model.device), Members()
    with torch.inference_mode():
        maps = task.predict(model.network, case.volume, device)
        for number in passes(model.network, case.passes, device):
            members.add(distribution(task.probabilities(task.predict(model.network, case.volume, device))))
            on_progress(number + 1, case.passes + 1)
    on_progress(1, 1)
    probabilities = task.probabilities(maps)
    best, shown = int(probabilities.argmax()), task.shown_label(probabilities)
    heat = on_scan_grid(task.heat(maps, case.volume, shown)[np.newaxis], scan, case.volume.spacing_mm)[0]
    seen = [index for index, p in enumerate(probabilities) if (p >= FOUND if are_several else index == best)]
    title = ", ".join(f"{names[index]}, {probabilities[index]:.0%}" for index in seen)
    found = Findings(title=f"Classification: {title or 'none of the labels found'}")
    found.measures = [
        {"label": name, "probability": float(p), ("found" if are_several else "most_probable"): index in seen}
        for index, (name, p) in enumerate(zip(names, probabilities, strict=True))
    ]
    spoken = members.mean if case.passes else distribution(probabilities)
    most = "as likely there as not" if are_several else "all labels alike"
    doubt = f"{float(entropy(spoken).mean()):.2f}, between 0 (certain) and 1 ({most})"
    if case.passes:
        doubt += f"; {case.passes} passes with dropout disagree by {float(members.disagreement.mean()):.2f}, 0 to 1"
    found.notes.append(f"How undecided the model is: {doubt}.")
    against = "" if are_several else " against the other labels"
    meaning = f"what each voxel says for {names[shown]}{against} [logits]"
    write_map(case, folder, found, f"evidence-{file_name(names[shown])}", heat, meaning, limits_of(heat))
    relative = np.clip(heat / max(float(heat.max()), 1e-6), 0, 1)
    slices = slices_to_show(relative.reshape(len(relative), -1).max(axis=1))
    found.pictures = [
        Shown(heated(scan, relative, k), f"slice {k + 1} of {len(heat)}: what speaks for {names[shown]}", is_map=True)
        for k in slices
    ]
    if case.sources:
        from client.dicom_results import structured_report

        structured_report(case, found.measures).save_as(folder / "report.dcm")
        found.files["report.dcm"] = "DICOM structured report (TID 1500) with the probability of each label"
    return found
