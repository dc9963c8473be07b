"""A scanner whose scans take part while nobody has outlined them: what adaptation gives back there.

Four hospitals have two scanners each, of which the second is new and the same everywhere, and without a reference. What its
labels would have given is measured by the same hospitals with them (Kamnitsas et al. 2017, arXiv:1612.08894, compare so).
Two new scanners: a far one, at low field, blurred and noisy; and one with another sequence. As in that paper, one series is
of the same sequence everywhere (proton density here) and the other is not: T2, in which lesions are bright, and on the new
scanner a gradient echo weighted by T2*, in which they are dark. No change of contrast that keeps its order covers that.

A third case is reconstruction, where k-space is its own reference: no scan is without one that only an adversary could
use. There the far scanner takes part or it does not, and appearance is what may replace it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

import simulation
from shared_models.plan import AdaptationTable, Plan
from simulation.experiments.harness import Experiment, Results, claim, row

FAR, SEQUENCE, RECONSTRUCTION = "far", "sequence", "reconstruction"

NEW = {FAR: "agfa-t2-0.2t", SEQUENCE: "siemens-t2star-1.5t", RECONSTRUCTION: "agfa-t2-0.2t"}
"""The new scanner of each case."""

OLD = {
    FAR: ("siemens-t1gd-3t", "philips-flair-3t"),
    SEQUENCE: ("philips-t2-3t", "ge-t2-1.5t"),
    RECONSTRUCTION: ("siemens-t1gd-3t", "philips-flair-3t"),
}

SECOND_SERIES, CHANNELS = "united-pd-3t", ("pd", "t2")
"""What every study shows as well where sequences differ, and how its two series are found by their descriptions."""

PLAIN, LABELS = "plain", "labels"
APPEARANCE, FEATURES, PREDICTIONS = "appearance", "features", "predictions"
BOTH, MOMENTS = "appearance-predictions", "appearance-moments"

OF_PREDICTIONS = {
    "adversarial": "scanner",
    "reads": "predictions",
    "strength": 3.0,
    "gradient_ratio": 1.0,
    "warm_up": 0.0,
}

ROUNDS = {FAR: 60, SEQUENCE: 90, RECONSTRUCTION: 15}
"""Of each case: what nobody has outlined is learned more slowly."""

TABLES: dict[str, dict[str, Any] | None] = {
    PLAIN: None,
    APPEARANCE: {"appearance": True},
    FEATURES: {"adversarial": "scanner"},
    PREDICTIONS: OF_PREDICTIONS,
    BOTH: {"appearance": True, **OF_PREDICTIONS},
    MOMENTS: {"appearance": True, "adversarial": "moments"},
    LABELS: None,
}
"""``[adaptation]`` of each way."""

WAYS = {FAR: tuple(TABLES), SEQUENCE: tuple(TABLES), RECONSTRUCTION: (PLAIN, APPEARANCE, LABELS)}

METRICS = {FAR: "dice", SEQUENCE: "dice", RECONSTRUCTION: "psnr"}

SPLITS = {FAR: "far scanner", SEQUENCE: "other sequence", RECONSTRUCTION: "far scanner's k-space"}
"""Whose other patients are measured."""


def arms(*, quick: bool) -> dict[str, Plan]:
    """Every way with each new scanner; ``quick`` takes half of the rounds."""
    plans = {case: base_of(case) for case in NEW}
    if quick:
        plans = {case: plan.model_copy(update={"rounds": plan.rounds // 2}) for case, plan in plans.items()}
    return {f"{case}, {way}": _plan(plans[case], case, way) for case, ways in WAYS.items() for way in ways}


def base_of(case: str) -> Plan:
    """A small plan for the task of a case."""
    name = "reconstruction" if case == RECONSTRUCTION else "unseen-scanner"
    plan = Plan.load(Path(simulation.__path__[0]) / "plans" / f"{name}.toml")
    plan = plan.model_copy(update={"name": "new-scanner", "rounds": ROUNDS[case]})
    if case != RECONSTRUCTION:
        return plan
    task = plan.task.model_copy(update={"channels": (16,) * 4, "cascades": 3})
    few = plan.simulation.model_copy(update={"patients": 16, "slices": 1})
    return plan.model_copy(update={"task": task, "simulation": few})


def _plan(base: Plan, case: str, way: str) -> Plan:
    new, table = NEW[case], TABLES[way]
    takes_part = case != RECONSTRUCTION or way == LABELS
    hospitals = base.simulation.model_copy(
        update={
            "scanners": tuple(f"{old}+{new}" if takes_part else old for old in OLD[case]),
            "unlabelled": None if way == LABELS or case == RECONSTRUCTION else (new,),
            "unseen": (new, new),
            "second_series": SECOND_SERIES if case == SEQUENCE else None,
        }
    )
    data = base.data.model_copy(update={"channels": CHANNELS}) if case == SEQUENCE else base.data
    adaptation = AdaptationTable(**table) if table else None
    return base.model_copy(update={"data": data, "simulation": hospitals, "adaptation": adaptation})


def evaluate(results: Results) -> dict[str, Any]:
    """Every way on other patients of the new scanner, and the share of the gap to its labels that comes back."""

    def measured(case: str, way: str) -> list[float]:
        return [float(result["scanners"]["unseen_mean"][METRICS[case]]) for result in results[f"{case}, {way}"]]

    def recovered(case: str, way: str) -> list[float]:
        plain, labels = np.array(measured(case, PLAIN)), np.array(measured(case, LABELS))
        return [float(share) for share in (np.array(measured(case, way)) - plain) / (labels - plain)]

    return {
        "rows": [
            row(way, METRICS[case], SPLITS[case], measured(case, way)) for case, ways in WAYS.items() for way in ways
        ],
        "claims": [
            claim(
                f"{case}_gap_recovered",
                f"share of the gap to its labels that comes back by {way}, {SPLITS[case]}",
                recovered(case, way),
                at_least=expected,
            )
            for case, way, expected in ((FAR, APPEARANCE, 0.4), (SEQUENCE, PREDICTIONS, 0.3))
        ],
    }


NEW_SCANNER = Experiment(
    name="new-scanner",
    title="A new scanner whose scans nobody has outlined",
    seeds=(0, 1, 2, 3, 4),
    n_sites=4,
    arms=arms,
    evaluate=evaluate,
    compares=False,
)
"""What a model is worth on other patients of the new scanner."""
