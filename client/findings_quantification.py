"""What a quantification model found: a structured report with the number, and a map of where its evidence lies."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from client.data.preprocessing import on_scan_grid
from client.findings import Findings, Shown, file_name, heated, slices_to_show
from client.findings_maps import limits_of, write_map
from shared_models.tasks.quantification import AFFECTED, Quantification

if TYPE_CHECKING:
    from client.inference import Case, OnProgress


def write(case: Case, folder: Path, on_progress: OnProgress) -> Findings:
    """Predict, and write ``report.dcm`` for a DICOM study, and a map of the evidence for what is counted."""
    model, scan = case.model, case.scan
    task, (name,) = Quantification(model.plan), model.plan.task.named_labels
    on_progress(0, 1)
    with torch.inference_mode():
        maps = task.predict(model.network, case.volume, torch.device(model.device))
    on_progress(1, 1)
    number = task.number(maps)
    heat = on_scan_grid(task.heat(maps, case.volume, AFFECTED)[np.newaxis], scan, case.volume.spacing_mm)[0]
    found = Findings(title=f"{name}: {task.in_words(number)}")
    found.measures = [{"label": name, task.target: number}]
    found.notes.append(
        "The number is learned from numbers alone; nobody has drawn what makes it up, and the map is no outline."
    )
    meaning = f"what each voxel says for {name} against the background [logits]"
    write_map(case, folder, found, f"evidence-{file_name(name)}", heat, meaning, limits_of(heat))
    relative = np.clip(heat / max(float(heat.max()), 1e-6), 0, 1)
    slices = slices_to_show(relative.reshape(len(relative), -1).max(axis=1))
    found.pictures = [
        Shown(heated(scan, relative, k), f"slice {k + 1} of {len(heat)}: what speaks for {name}", is_map=True)
        for k in slices
    ]
    if case.sources:
        from client.dicom_results import number_report

        number_report(case, name, task.target, number).save_as(folder / "report.dcm")
        found.files["report.dcm"] = f"DICOM structured report (TID 1500) with the {task.target}"
    return found
