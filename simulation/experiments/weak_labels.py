"""What share of the brain lesions are, from intervals that a reader wrote: a loss for proportions against plain regression.

The network is the same, the labels are the same intervals. With the loss for proportions the number is the mean of the
probabilities of places and an answer within the interval costs nothing; plain regression reads the number off the mean of
the features and draws it to the interval's middle (the comparison of Bortsova et al. 2018, arXiv:1807.08601). Two hospitals
train on 50 or 100 patients in all, which is half of those they have; agreement is measured at four hospitals that train
nothing, with the same scanners, on all of their test patients together: twice as many as train.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import simulation
from shared_models.plan import Plan
from simulation.experiments.harness import Experiment, Results, claim, row

N_SITES = 2
PATIENTS = (50, 100)
"""Who train, at both sites together; places are drawn, so it is about so many."""

LOSSES = ("proportion", "squared")

ROUNDS, LEARNING_RATE = 200, 2e-3
"""At the example plan's larger steps either loss sometimes stays where it began."""

ELSEWHERE = "hospitals that train nothing"


def arms(*, quick: bool) -> dict[str, Plan]:
    """The example plan with more rounds, smaller steps and either loss, at few patients and at more; ``quick`` takes a
    quarter."""
    base = Plan.load(Path(simulation.__path__[0]) / "plans" / "quantification.toml")
    base = base.model_copy(update={"rounds": ROUNDS // 4 if quick else ROUNDS})
    return {f"{loss}-{n}": _with(base, loss, n) for n in PATIENTS for loss in LOSSES}


def _with(base: Plan, loss: str, n_patients: int) -> Plan:
    """The plan with this loss and so many patients; twice as many passes over half of them make as many steps."""
    tables = json.loads(base.canonical_json())
    tables["training"] |= {
        "loss": loss,
        "learning_rate": LEARNING_RATE,
        "epochs": base.training.epochs * max(PATIENTS) // n_patients,
    }
    tables["data"]["split"] = {"train": 0.5, "validation": 0.0, "test": 0.5}
    tables["simulation"] |= {"patients": 2 * n_patients // N_SITES, "unseen": list(base.simulation.scanners) * 2}
    return Plan.from_tables(tables)


def agreement_of(results: Results, loss: str, n_patients: int) -> list[float]:
    """ICC of all patients elsewhere together, one for each seed."""
    return [result["scanners"]["unseen_mean"]["icc"] for result in results[f"{loss}-{n_patients}"]]


def evaluate(results: Results) -> dict[str, Any]:
    """ICC with either loss, and how much the loss for proportions gains."""
    rows, claims = [], []
    for n in PATIENTS:
        ours, plain = (agreement_of(results, loss, n) for loss in LOSSES)
        for loss, values in zip(LOSSES, (ours, plain), strict=True):
            rows.append(row(f"{loss}, {n} patients", "icc", ELSEWHERE, values))
        gain = [a - b for a, b in zip(ours, plain, strict=True)]
        text = f"ICC of the loss for proportions - ICC of plain regression, {n} patients"
        claims.append(claim(f"icc_gain_{n}", text, gain, at_least=0.0))
    return {"rows": rows, "claims": claims}


WEAK_LABELS = Experiment(
    name="weak-labels",
    title="How much is affected, from the intervals of readers: a loss for proportions against plain regression",
    seeds=(0, 1, 2),
    n_sites=N_SITES,
    arms=arms,
    evaluate=evaluate,
    compares=False,
)
