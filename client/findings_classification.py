"""What a classification model found: a structured report with each label's probability, and where its evidence lies."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from client.data.preprocessing import on_scan_grid
from client.findings import Findings, Shown, entropy, file_name, heated, slices_to_show
from client.findings_maps import Members, limits_of, passes, write_map
from shared_models.tasks.classification import Classification

if TYPE_CHECKING:
    from client.inference import Case, OnProgress


def write(case: Case, folder: Path, on_progress: OnProgress) -> Findings:
    """Predict, and write ``report.dcm`` for a DICOM study, and a map of the evidence for the label that is shown.

    That is the most probable label, or the second where there are two: where nothing speaks for a lesion, no place does.
    """
    model, scan = case.model, case.scan
    task, names = Classification(model.plan), model.plan.task.labels
    on_progress(0, 1)
    device, members = torch.device(model.device), Members()
    with torch.inference_mode():
        maps = task.predict(model.network, case.volume, device)
        for number in passes(case):
            members.add(np.asarray(task.probabilities(task.predict(model.network, case.volume, device)), np.float32))
            on_progress(number + 1, case.passes + 1)
    on_progress(1, 1)
    probabilities = task.probabilities(maps)
    best = int(probabilities.argmax())
    shown = 1 if len(names) == 2 else best
    heat = on_scan_grid(task.heat(maps, case.volume, shown)[np.newaxis], scan, case.volume.spacing_mm)[0]
    found = Findings(title=f"Classification: {names[best]}, {probabilities[best]:.0%}")
    found.measures = [
        {"label": name, "probability": float(p), "most_probable": index == best}
        for index, (name, p) in enumerate(zip(names, probabilities, strict=True))
    ]
    spoken = members.mean if case.passes else np.asarray(probabilities, np.float32)
    doubt = f"{float(entropy(spoken[:, np.newaxis])[0]):.2f}, between 0 (certain) and 1 (all labels alike)"
    if case.passes:
        doubt += f"; {case.passes} passes with dropout disagree by {float(members.disagreement):.2f}, 0 to 1"
    found.notes.append(f"How undecided the model is: {doubt}.")
    meaning = f"what each voxel says for {names[shown]} against the other labels [logits]"
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
