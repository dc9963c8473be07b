"""What each strategy is worth where sites differ in scanner and in how common lesions are.

Lesion or none at four emulated hospitals, each with a scanner of its own; nine of ten patients have a lesion at two of
them, and one of ten at the others. AUC within a site is not moved by how common lesions are there, so what is left is what
skew has done to the model; the share of patients who get the right label is moved, and what a personal model can learn of
its site shows there. All strategies take plain SGD steps at the sites, as SCAFFOLD has to, and as many of them;
nothing is tuned, and FedAdam and FedYogi step by a hundredth.

A personal model is measured at home and elsewhere; the shared ones everywhere.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

import simulation
from server.journal import Journal
from shared_models.plan import Plan
from shared_models.weights import decode
from simulation.baselines import shared_rows
from simulation.experiments.classification import less
from simulation.experiments.harness import Experiment, Results, claim, row
from simulation.run import Request, Watcher, find_sites, local_means

PREVALENCE = (0.9, 0.9, 0.1, 0.1)

STRATEGIES: dict[str, dict[str, Any]] = {
    "fedavg": {},
    "fedprox": {"proximal_mu": 0.1},
    "fedadam": {"server_learning_rate": 0.01},
    "fedyogi": {"server_learning_rate": 0.01},
    "scaffold": {},
    "fedbn": {},
    "ditto": {"personal_pull": 0.1},
}
"""Names and keys of ``[strategy]``."""

PERSONAL = ("fedbn", "ditto")


def arms(*, quick: bool) -> dict[str, Plan]:
    """The classification plan with a network that has normalisation layers, once for each strategy; ``quick`` takes a
    quarter of the rounds."""
    plan = Plan.load(Path(simulation.__path__[0]) / "plans" / "classification.toml")
    return {name: _plan(plan, name, keys, 10 if quick else 40) for name, keys in STRATEGIES.items()}


def _plan(base: Plan, name: str, keys: dict[str, Any], rounds: int) -> Plan:
    tables = json.loads(base.canonical_json()) | {"name": "strategies", "rounds": rounds}
    tables.pop("adaptation", None)  # what scanners do to a strategy is the question here
    tables["task"] |= {"network": "densenet"}
    tables["training"] |= {"optimizer": "sgd", "learning_rate": 0.1}
    tables["strategy"] |= {"name": name, **keys}
    tables["simulation"] |= {"patients": 60, "prevalence": list(PREVALENCE)}
    return Plan.from_tables(tables)


def evaluate(results: Results) -> dict[str, Any]:
    """AUC of the shared model at all sites, and of personal ones at home and elsewhere."""

    def of(name: str, what: str) -> list[float]:
        return [float(result["after"][what]) for result in results[name]]

    def alone(what: str) -> list[float]:
        return [float(result["comparison"][what]) for result in results["fedavg"]]

    central = [
        next(one["mean"] for one in result["comparison"]["rows"] if one["method"] == "central")
        for result in results["fedavg"]
    ]

    def right(name: str, prefix: str = "") -> list[float]:
        per_site = [result["test"]["per_site"].values() for result in results[name]]
        return [float(np.mean([figures[f"{prefix}accuracy"] for figures in sites])) for sites in per_site]

    at_home = {**{name: right(name) for name in STRATEGIES}, "ditto": right("ditto", "own:")}
    everywhere, home, elsewhere = "all sites' test patients", "own test patients", "other sites' test patients"
    better = [max(pair) for pair in zip(*(of(name, "personal_own") for name in PERSONAL), strict=True)]
    more = [max(pair) for pair in zip(*(at_home[name] for name in PERSONAL), strict=True)]
    return {
        "rows": [
            *(row(name, "auc", everywhere, of(name, "federated")) for name in STRATEGIES),
            *(row(f"{name}, personal", "auc", home, of(name, "personal_own")) for name in PERSONAL),
            *(row(f"{name}, personal", "auc", elsewhere, of(name, "personal_elsewhere")) for name in PERSONAL),
            row("local", "auc", home, alone("local_own")),
            row("local", "auc", elsewhere, alone("local_elsewhere")),
            row("central", "auc", everywhere, central),
            *(
                row(f"{name}, personal" if name in PERSONAL else name, "accuracy", home, at_home[name])
                for name in STRATEGIES
            ),
        ],
        "claims": [
            claim(
                "personal_ahead_at_home",
                "AUC of the better personal strategy on own patients - FedAvg's",
                less(better, of("fedavg", "federated")),
                at_least=0.0,
            ),
            claim(
                "personal_right_at_home",
                "share of own patients who get the right label with the better personal strategy - with FedAvg",
                less(more, at_home["fedavg"]),
                at_least=0.0,
            ),
        ],
    }


def _called(name: str) -> str:
    return f"{name}, personal" if name in PERSONAL else name


def look(request: Request) -> dict[str, Any]:
    """AUC of a finished run's models, means over sites that each count the same."""
    plan, sites = request.plan, find_sites(request, Watcher())
    result = json.loads((request.folder / "result.json").read_text(encoding="utf-8"))
    shared = decode((request.folder / "model.safetensors").read_bytes())[0]
    identity = Journal(request.folder / "journal").identity()
    of_sites = {site: values for site, values in result["test"]["per_site"].items() if "auc" in values}
    rows = shared_rows(plan, sites, shared, of_sites, identity.run if identity else "")
    found = {"federated": rows[0].mean("auc")}
    if len(rows) > 1:
        found["personal_own"], found["personal_elsewhere"] = local_means(rows, "auc", "personal")
    return found


STRATEGIES_EXPERIMENT = Experiment(
    name="strategies",
    title="Strategies where sites differ in scanner and prevalence",
    seeds=(0, 1, 2),
    n_sites=4,
    arms=arms,
    evaluate=evaluate,
    after=look,
    compared="fedavg",
)
