"""Lesion or none at four emulated hospitals: together, pooled, and each on its own.

Nobody tells the network where a lesion is, only that there is one; whether its heatmap finds it all the same is measured by
the pointing game (Zhang et al. 2016, arXiv:1608.00507): the hottest point of a test patient's map is in the outline or not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import simulation
from shared_models.plan import Plan
from simulation.experiments.harness import Experiment, Results, claim, row

EVERYBODY = "all sites' test patients"


def arms(*, quick: bool) -> dict[str, Plan]:
    """The example plan alone; ``quick`` takes half of its rounds."""
    plan = Plan.load(Path(simulation.__path__[0]) / "plans" / "classification.toml")
    return {"": plan.model_copy(update={"rounds": plan.rounds // 2}) if quick else plan}


def ways(results: Results) -> dict[str, list[float]]:
    """AUC of each way to train, one for each seed; means over sites, each counting the same."""
    of_seed = results[""]
    means = [{one["method"]: one["mean"] for one in result["comparison"]["rows"]} for result in of_seed]
    return {
        "federated": [mean["federated"] for mean in means],
        "central": [mean["central"] for mean in means],
        "own": [result["comparison"]["local_own"] for result in of_seed],
        "elsewhere": [result["comparison"]["local_elsewhere"] for result in of_seed],
    }


def rows_of(auc: dict[str, list[float]]) -> list[dict[str, Any]]:
    """The table of AUC."""
    return [
        row("federated", "auc", EVERYBODY, auc["federated"]),
        row("central", "auc", EVERYBODY, auc["central"]),
        row("local", "auc", "own test patients", auc["own"]),
        row("local", "auc", "other sites' test patients", auc["elsewhere"]),
    ]


def less(some: list[float], others: list[float]) -> list[float]:
    """Differences, seed by seed."""
    return [a - b for a, b in zip(some, others, strict=True)]


def evaluate(results: Results) -> dict[str, Any]:
    """AUC of the ways to train, how often heatmaps hit, and the claims."""
    auc = ways(results)
    hits = [result["test"]["localisation"] for result in results[""]]
    return {
        "rows": [*rows_of(auc), row("federated", "localisation", "test patients with a lesion", hits)],
        "claims": [
            claim(
                "below_central_auc", "central AUC - federated AUC", less(auc["central"], auc["federated"]), at_most=0.02
            ),
            claim(
                "over_other_sites_auc",
                "federated AUC - local models' AUC on other sites' patients",
                less(auc["federated"], auc["elsewhere"]),
                at_least=0.0,
            ),
            claim("localisation_hit_rate", "share of lesions that the heatmap's peak hits", hits, at_least=0.6),
        ],
    }


CLASSIFICATION = Experiment(
    name="classification",
    title="Lesion or none, from one word for each patient, and where it is",
    seeds=(0, 1, 2),
    n_sites=4,
    arms=arms,
    evaluate=evaluate,
)
