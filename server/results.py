"""How a run ended, in the form of ``result.json``: the same for a simulation and for a deployed run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from server.rounds import Measured, Outcome
from shared_models.noised import NoisedMeans, gaussian_epsilon, within
from shared_models.plan import Plan
from shared_models.release import SitePrivacy
from shared_models.task import task_for
from shared_models.weights import weights_sha256

Interval = tuple[float, float]

SIZES = ("patients", "declared_size")
"""What stands beside the metrics of a site in ``test``: how many patients it measured, or under ``[privacy]`` declared."""


def result_of(plan: Plan, outcome: Outcome) -> dict[str, Any]:
    """What the rounds of a plan gave.

    ``test`` holds a number for each metric, and ``per_site`` the numbers of each site beside its ``patients``. Under
    ``[privacy]`` it is null, or each number is one with noise: ``value``, the ``interval`` in which 95 % of the noise
    around it lies, and the ``cost`` to a test patient of the one release that held all metrics of the site; ``privacy``,
    the cost of the whole run at each site, contains it. A site has its ``declared_size`` then in place of ``patients``.
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


def measured_of(test: Mapping[str, Any] | None) -> Measured:
    """What stands in ``test`` of a result, as the round loop gave it."""
    per_site: dict[str, dict[str, float]] = {}
    patients: dict[str, int] = {}
    for site, figures in (test or {}).get("per_site", {}).items():
        per_site[site] = _values({name: figure for name, figure in figures.items() if name not in SIZES})
        patients[site] = next(figures[name] for name in SIZES if name in figures)
    mean = _values({name: figure for name, figure in (test or {}).items() if name != "per_site"})
    return Measured(mean or None, per_site, patients)


def intervals(plan: Plan, measured: Measured) -> tuple[dict[str, Interval], dict[str, dict[str, Interval]]]:
    """Where 95 % of the noise around test metrics lies: of means over sites, and of each site's; empty without noise."""
    if plan.privacy is None or plan.privacy.metrics_noise is None or not measured.mean:
        return {}, {}
    task = task_for(plan)
    noise = {site: NoisedMeans.of(task, "test", size) for site, size in measured.patients.items()}
    of_sites = {
        site: {name: noise[site].interval(name, value) for name, value in values.items() if name in task.ranges}
        for site, values in measured.per_site.items()
    }
    of_means = {}
    for name, value in measured.mean.items():
        if name in task.ranges:
            size = {site: measured.patients[site] for site, values in measured.per_site.items() if name in values}
            shares = (n / sum(size.values()) * noise[site].deviations[name] for site, n in size.items())
            of_means[name] = within(task.ranges[name], value, math.hypot(*shares))
    return of_means, of_sites


def _test(plan: Plan, outcome: Outcome) -> dict[str, Any] | None:
    measured = outcome.test
    if not measured.mean:
        return None
    if plan.privacy is None:
        exact = {site: {**values, "patients": measured.patients[site]} for site, values in measured.per_site.items()}
        return {**measured.mean, "per_site": exact}
    if plan.privacy.metrics_noise is None:
        return None
    of_means, of_sites = intervals(plan, measured)
    delta = plan.privacy.delta
    cost = {"epsilon": round(gaussian_epsilon(plan.privacy.metrics_noise, delta), 6), "delta": delta}
    per_site = {
        site: {**_noised(values, of_sites[site], cost), "declared_size": measured.patients[site]}
        for site, values in measured.per_site.items()
    }
    return {**_noised(measured.mean, of_means, cost), "per_site": per_site}


def _noised(
    values: Mapping[str, float], around: Mapping[str, Interval], cost: Mapping[str, float]
) -> dict[str, dict[str, Any]]:
    """Values that have an interval: no other came out of a mechanism that the plan knows."""
    return {
        name: {"value": value, "interval": list(around[name]), "cost": dict(cost)}
        for name, value in values.items()
        if name in around
    }


def _values(figures: Mapping[str, Any]) -> dict[str, float]:
    return {name: figure["value"] if isinstance(figure, Mapping) else figure for name, figure in figures.items()}


def _privacy(plan: Plan, cost: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, Any]] | None:
    if plan.privacy is None:
        return None
    return {site: SitePrivacy.of(spent).model_dump(exclude_none=True) for site, spent in cost.items()}
