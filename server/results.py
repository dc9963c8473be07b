"""How a run ended, in the form of ``result.json``: the same for a simulation and for a deployed run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from server.rounds import Outcome
from shared_models.noised import NoisedMeans
from shared_models.plan import Plan
from shared_models.release import SitePrivacy
from shared_models.task import task_for
from shared_models.weights import weights_sha256

WITHIN = 1.96
"""Standard deviations of noise between which 95 % of it lie."""


def result_of(plan: Plan, outcome: Outcome) -> dict[str, Any]:
    """What the rounds of a plan gave.

    Under ``[privacy]`` ``test`` also holds ``interval``, between whose two values 95 % of the noise lies around each mean,
    numbers of patients are those that sites declared, and ``privacy`` says for each site what the run has cost a patient.
    """
    validated = any(record.validation for record in outcome.records)
    return {
        "rounds": [asdict(record) for record in outcome.records],
        "best_round": outcome.best_round,
        "released": "last" if plan.strategy.release == "best" and not validated else plan.strategy.release,
        "test": _test(plan, outcome),
        "privacy": _privacy(plan, outcome.cost),
        "weights_sha256": weights_sha256(outcome.last),
        "released_sha256": weights_sha256(outcome.best),
    }


def _test(plan: Plan, outcome: Outcome) -> dict[str, Any] | None:
    measured = outcome.test
    if not measured.mean:
        return None
    per_site = {site: {**values, "patients": measured.patients[site]} for site, values in measured.per_site.items()}
    test: dict[str, Any] = {**measured.mean, "per_site": per_site}
    if plan.privacy is not None:
        test["interval"] = _intervals(plan, measured.mean, measured.patients)
    return test


def _intervals(plan: Plan, mean: Mapping[str, float], declared: Mapping[str, int]) -> dict[str, list[float]]:
    """Where 95 % of the noise of the sites' mean lies, for each metric: noise alone, not the spread between patients."""
    task = task_for(plan)
    total = sum(declared.values())
    intervals = {}
    for name, value in mean.items():
        deviations = [n / total * NoisedMeans.of(task, "test", n).deviations[name] for n in declared.values()]
        half = WITHIN * math.hypot(*deviations)
        low, high = task.ranges[name]
        intervals[name] = [max(low, value - half), min(high, value + half)]
    return intervals


def _privacy(plan: Plan, cost: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, Any]] | None:
    if plan.privacy is None:
        return None
    return {site: SitePrivacy.of(spent).model_dump(exclude_none=True) for site, spent in cost.items()}
