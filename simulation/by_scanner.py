"""How a model does on each scanner, on scanners that it never saw, and whether its features betray them.

Where patients are real this is measured without ``[privacy]`` alone; emulated patients may be measured exactly always.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from client.training import Trainer, resident_trainer
from shared_models.adaptation import describe, without_discriminator
from shared_models.plan import Plan
from shared_models.scanners import ScannerTable
from shared_models.seeds import generator
from shared_models.task import Sample
from shared_models.weights import Weights, load_weights
from simulation.baselines import DEVICE
from simulation.stations import SiteFolder, cohort_of

DRAWS = 4
"""Samples of a test patient whose descriptors are averaged."""

Metrics = dict[str, float]


def measure_scanners(
    plan: Plan, weights: Weights, sites: Sequence[SiteFolder], unseen: Sequence[SiteFolder]
) -> dict[str, Any]:
    """Test metrics of a model by scanner.

    ==============  ==================================================================================
    seen            by scanner of the sites' test patients
    seen_mean       the same over all of them
    unseen          by hospital that trained nothing, with its scanner
    unseen_mean     over all patients there together
    leakage         what a fresh probe reads of the scanner off the features (:func:`probed`)
    kept            what one reads of the label: adaptation must not hide it, too
    ==============  ==================================================================================
    """
    trainer = resident_trainer(plan, DEVICE)
    of_scanner: dict[str, list[Metrics]] = defaultdict(list)
    for site in sites:
        cohort = cohort_of(site, plan)
        measured = trainer.measure(weights, cohort, "test")
        for patient in cohort.patients("test"):
            of_scanner[cohort.scanner(patient.studies[0]) or "unknown"].append(measured[patient.key])
    elsewhere = {site.name: list(trainer.measure(weights, cohort_of(site, plan), "test").values()) for site in unseen}
    summary = trainer.task.summary
    return {
        "seen": {name: summary(rows) for name, rows in sorted(of_scanner.items())},
        "seen_mean": summary([row for rows in of_scanner.values() for row in rows]),
        "unseen": {
            name: {"scanner": ", ".join(cohort_of(site, plan).scanners), **summary(rows)}
            for site, (name, rows) in zip(unseen, elsewhere.items(), strict=True)
        },
        "unseen_mean": summary([row for rows in elsewhere.values() for row in rows]),
        **probed(trainer, weights, sites),
    }


def probed(trainer: Trainer, weights: Weights, sites: Sequence[SiteFolder]) -> dict[str, dict[str, float] | None]:
    """How well fresh probes read the scanner (``leakage``) and the label (``kept``) off the features of test patients.

    A logistic regression learns on half of them and names the other half; ``accuracy`` is the mean over what is told
    apart, and ``chance`` what guessing gives. None where there is one scanner, or no label. The label of a sample is
    that of its study, or whether it holds anything outlined or found. The accuracy of the discriminator that a network was
    trained against is no evidence: features can hide from one reader alone.
    """
    table = ScannerTable(trainer.plan.adaptation.scanners if trainer.plan.adaptation else None)
    load_weights(trainer.network, weights)
    described: list[NDArray[np.float32]] = []
    labels: list[list[int]] = []
    scanners: list[int] = []
    for site in sites:
        cohort = cohort_of(site, trainer.plan)
        for patient in cohort.patients("test"):
            rng = generator("probe", patient.key)
            drawn = [trainer.task.draw(cohort.volume(patient.studies[0]), rng) for _ in range(DRAWS)]
            image = torch.from_numpy(np.stack([sample.image for sample in drawn])).to(trainer.device)
            described.append(descriptor_of(trainer.network, image))
            labels.append([_label(trainer.plan, sample) for sample in drawn])
            scanners.append(table.place(cohort.scanner(patient.studies[0])))
    values, is_first = np.array(described), np.arange(len(scanners)) % 2 == 0
    return {
        "leakage": _told_apart(values.mean(1), np.array(scanners), is_first),
        "kept": _told_apart(np.concatenate(values), np.array(labels).ravel(), np.repeat(is_first, DRAWS)),
    }


def _label(plan: Plan, sample: Sample) -> int:
    """0 for every sample of a task without labels."""
    if plan.task.kind == "classification" and sample.target.ndim == 0:
        return int(sample.target)
    return int(sample.target.max() > 0) if plan.task.kind in {"segmentation", "classification"} else 0


def _told_apart(
    values: NDArray[np.float32], truth: NDArray[np.int64], is_first: NDArray[np.bool_]
) -> dict[str, float] | None:
    from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]
    from sklearn.metrics import balanced_accuracy_score  # type: ignore[import-untyped]
    from sklearn.pipeline import make_pipeline  # type: ignore[import-untyped]
    from sklearn.preprocessing import StandardScaler  # type: ignore[import-untyped]

    first, second = truth[is_first], truth[~is_first]
    if len(set(first)) < 2 or not len(second) or set(second) - set(first):
        return None
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500)).fit(values[is_first], first)
    accuracy = balanced_accuracy_score(second, probe.predict(values[~is_first]))
    return {"accuracy": float(accuracy), "chance": 1 / len(set(second))}


def descriptor_of(network: nn.Module, image: torch.Tensor) -> NDArray[np.float32]:
    """What a discriminator would see of each image, ``(batch, d)``, whether the network has one or not."""
    with torch.no_grad():
        return np.asarray(describe(without_discriminator(network).eval(), image).float().cpu().numpy(), np.float32)
