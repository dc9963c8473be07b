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
    leakage         of the scanner from features (:func:`leakage`); None with fewer than two scanners
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
        "leakage": leakage(trainer, weights, sites),
    }


def leakage(trainer: Trainer, weights: Weights, sites: Sequence[SiteFolder]) -> dict[str, float] | None:
    """How well a fresh probe reads the scanner off the features of test patients.

    A logistic regression learns on half of them and names the scanners of the other half; ``accuracy`` is the mean over
    scanners and ``chance`` what guessing gives. The accuracy of the discriminator that a network was trained against is
    no evidence: features can hide from one reader alone.
    """
    from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]
    from sklearn.metrics import balanced_accuracy_score  # type: ignore[import-untyped]
    from sklearn.pipeline import make_pipeline  # type: ignore[import-untyped]
    from sklearn.preprocessing import StandardScaler  # type: ignore[import-untyped]

    table = ScannerTable(trainer.plan.adaptation.scanners if trainer.plan.adaptation else None)
    load_weights(trainer.network, weights)
    described: list[NDArray[np.float32]] = []
    scanners: list[int] = []
    for site in sites:
        cohort = cohort_of(site, trainer.plan)
        for patient in cohort.patients("test"):
            rng = generator("probe", patient.key)
            drawn = [trainer.task.draw(cohort.volume(patient.studies[0]), rng).image for _ in range(DRAWS)]
            image = torch.from_numpy(np.stack(drawn)).to(trainer.device)
            described.append(descriptor_of(trainer.network, image).mean(0))
            scanners.append(table.place(cohort.scanner(patient.studies[0])))
    values, truth = np.array(described), np.array(scanners)
    first = np.arange(len(truth)) % 2 == 0
    if len(set(truth[first])) < 2 or set(truth[~first]) - set(truth[first]):
        return None
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500)).fit(values[first], truth[first])
    accuracy = balanced_accuracy_score(truth[~first], probe.predict(values[~first]))
    return {"accuracy": float(accuracy), "chance": 1 / len(set(truth[~first]))}


def descriptor_of(network: nn.Module, image: torch.Tensor) -> NDArray[np.float32]:
    """What a discriminator would see of each image, ``(batch, d)``, whether the network has one or not."""
    with torch.no_grad():
        return np.asarray(describe(without_discriminator(network).eval(), image).float().cpu().numpy(), np.float32)
