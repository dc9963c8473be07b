"""Pneumonia in children's chest radiographs (PneumoniaMNIST) at four sites of other sizes and prevalences for each seed.

AUC is the mean over sites, each counting the same. The data set's authors report 0.944 for one ResNet-18 on all of its
4 708 training images at 28 pixels (Yang et al. 2023, doi:10.1038/s41597-022-01721-8).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import simulation
from shared_models.plan import Plan
from simulation.experiments.classification import less, rows_of, ways
from simulation.experiments.harness import Experiment, Results, claim


def arms(*, quick: bool) -> dict[str, Plan]:
    """The example plan alone; ``quick`` takes a quarter of its rounds."""
    plan = Plan.load(Path(simulation.__path__[0]) / "plans" / "pneumonia.toml")
    return {"": plan.model_copy(update={"rounds": plan.rounds // 4}) if quick else plan}


def evaluate(results: Results) -> dict[str, Any]:
    """AUC of the ways to train, and the claims."""
    auc = ways(results)
    return {
        "rows": rows_of(auc),
        "claims": [
            claim("auc", "federated AUC", auc["federated"], at_least=0.93),
            claim(
                "below_central_auc",
                "central AUC - federated AUC",
                less(auc["central"], auc["federated"]),
                at_most=0.015,
            ),
        ],
    }


CLASSIFICATION_REAL = Experiment(
    name="classification-real",
    title="Pneumonia in chest radiographs, dealt to four skewed sites",
    seeds=(0, 1, 2),
    n_sites=4,
    arms=arms,
    evaluate=evaluate,
    data="pneumoniamnist.npz, a MedMNIST file",
)
