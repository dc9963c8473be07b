"""What a federation is compared with: one model of all data in one place, and each hospital's own model.

All start from the same weights, take as many passes over as many patients with the same loop, and keep the best round by
validation or the last, as the plan says for the federation. Only where the data lies differs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from client.data.cohort import Cohort, Patient
from client.site import is_emulated
from client.training import Split, Trainer, resident_trainer
from shared_models.plan import Plan
from shared_models.start import first_weights
from shared_models.task import Picture
from shared_models.volume import Volume
from shared_models.weights import Weights, averaged, decode, encode
from simulation.processes import process_pool
from simulation.stations import SiteFolder, cohort_of

DEVICE = "auto"


class PooledCohort:
    """The patients of several sites as if they lay in one place."""

    def __init__(self, cohorts: Sequence[Cohort]) -> None:
        self._cohorts = cohorts
        self._home = {
            study: cohort
            for cohort in cohorts
            for split in ("train", "validation", "test")
            for patient in cohort.patients(split)
            for study in patient.studies
        }

    def patients(self, split: Split) -> tuple[Patient, ...]:
        """All sites' patients of a split, site by site."""
        return tuple(patient for cohort in self._cohorts for patient in cohort.patients(split))

    def volume(self, study: str) -> Volume:
        """A volume from the site that has it."""
        return self._home[study].volume(study)

    def scanner(self, study: str) -> str | None:
        """What a study was made with."""
        return self._home[study].scanner(study)

    def is_unlabelled(self, study: str) -> bool:
        """Whether a study has no reference."""
        return self._home[study].is_unlabelled(study)

    def category(self, study: str) -> int | None:
        """The label of a study as a whole."""
        return self._home[study].category(study)

    @property
    def declared_scanners(self) -> tuple[str, ...] | None:
        """All that the sites declared."""
        return tuple(name for cohort in self._cohorts for name in cohort.declared_scanners or ()) or None


@dataclass(frozen=True)
class Row:
    """One method of a comparison."""

    method: str
    per_site: dict[str, dict[str, float]]
    """Test metrics on each site's test patients; sites without any are left out."""

    def mean(self, metric: str) -> float | None:
        """Mean over the sites that have it, each counting the same; None if none has."""
        values = [metrics[metric] for metrics in self.per_site.values() if metric in metrics]
        return sum(values) / len(values) if values else None


@dataclass(frozen=True)
class TestPatient:
    """How the shared model did on one test patient, and a picture of it; stays on this machine."""

    site: str
    metrics: dict[str, float]
    study: str


def train_alone(
    trainer: Trainer, cohort: Cohort | PooledCohort, plan: Plan, *, seed: int, name: str, start: Path | None = None
) -> Weights:
    """The weights that the plan's ``release`` chooses among its rounds on one cohort; the last without validation."""
    weights = first_weights(plan, seed, start)
    best, best_value = weights, float("-inf")
    chooses = plan.strategy.release == "best" and bool(cohort.patients("validation"))
    average: Weights | None = None
    for round_ in range(1, plan.rounds + 1):
        update = trainer.train(weights, cohort, seed=seed, site=name, round_=round_).update
        weights = {key: weights[key] + update[key] for key in weights}
        if (decay := plan.strategy.average_decay) is not None:
            average = averaged(average, weights, round_, decay)
        if chooses:
            measured = trainer.task.summary(list(trainer.measure(weights, cohort, "validation").values()))
            value = measured.get(trainer.task.headline, float("-inf"))
        else:
            value = float(round_)
        if value > best_value or best_value == float("-inf"):
            best, best_value = weights, value
    return best if average is None else average


def measure_everywhere(trainer: Trainer, weights: Weights, plan: Plan, sites: Sequence[SiteFolder]) -> dict[str, Any]:
    """Mean test metrics at each site that has test patients."""
    per_site = {}
    for site in sites:
        measured = trainer.measure(weights, cohort_of(site, plan), "test")
        if measured:
            per_site[site.name] = trainer.task.summary(list(measured.values()))
    return per_site


def baseline(
    plan: Plan, sites: Sequence[SiteFolder], home: Sequence[SiteFolder], name: str, seed: int, start: Path | None = None
) -> Row:
    """Train on the data of ``home`` alone and test at all ``sites``."""
    trainer = resident_trainer(plan, DEVICE)
    cohorts = [cohort_of(site, plan) for site in home]
    cohort = cohorts[0] if len(cohorts) == 1 else PooledCohort(cohorts)
    weights = train_alone(trainer, cohort, plan, seed=seed, name=name, start=start)
    return Row(name, measure_everywhere(trainer, weights, plan, sites))


def baselines(
    plan: Plan,
    sites: Sequence[SiteFolder],
    *,
    seed: int,
    workers: int,
    on_done: Callable[[str], None],
    start: Path | None = None,
) -> list[Row]:
    """The central model and every site's own, the longest first; a site that cannot train has none."""
    able = [site for site in sites if cohort_of(site, plan).patients("train")]
    jobs = [("central", able), *((f"local:{site.name}", [site]) for site in able)]
    rows: list[Row] = []
    if workers == 1:
        for name, home in jobs:
            rows.append(baseline(plan, sites, home, name, seed, start))
            on_done(name)
        return rows
    with process_pool(min(workers, len(jobs))) as pool:
        futures: dict[Future[Row], str] = {
            pool.submit(baseline, plan, sites, home, name, seed, start): name for name, home in jobs
        }
        for future in as_completed(futures):
            rows.append(future.result())
            on_done(futures[future])
    order = [name for name, _ in jobs]
    return sorted(rows, key=lambda row: order.index(row.method))


def show_patients(plan: Plan, site: SiteFolder, encoded: bytes) -> list[tuple[TestPatient, Picture]]:
    """Best, median and worst test patient of one site under ``encoded`` weights, with pictures."""
    weights, _ = decode(encoded)
    trainer = resident_trainer(plan, DEVICE)
    cohort = cohort_of(site, plan)
    measured = trainer.measure(weights, cohort, "test")
    studies = {patient.key: patient.studies[0] for patient in cohort.patients("test")}
    ranked = sorted(measured, key=lambda key: (-measured[key][trainer.task.shown], key))
    chosen = [ranked[i] for i in sorted({0, len(ranked) // 2, len(ranked) - 1})] if ranked else []
    shown = []
    for key in chosen:
        volume = cohort.volume(studies[key])
        picture = trainer.task.picture(trainer.predict_loaded(volume), volume)
        shown.append((TestPatient(site.name, measured[key], studies[key]), picture))
    return shown


def encoded(weights: Weights) -> bytes:
    """Weights as bytes, to hand them to a worker."""
    return encode(weights, "")


def measured_mean(plan: Plan, model: Path, sites: Sequence[SiteFolder]) -> dict[str, float]:
    """Mean test metrics of a released model over the sites, each counting the same, exactly.

    **For emulated patients only.** Where patients are real, the exact figure of a plan with ``[privacy]`` is a release that
    nobody paid for; these protect nobody who exists, and without the truth a simulation could not tell what privacy costs.

    Raises
    ------
    ValueError
        If a simulation did not write one of these sites' images.
    """
    if not all(is_emulated(site.data) for site in sites):
        raise ValueError("a private model is measured exactly on emulated patients only")
    weights, _ = decode(model.read_bytes())
    per_site = measure_everywhere(resident_trainer(plan, DEVICE), weights, plan, sites)
    names = dict.fromkeys(name for metrics in per_site.values() for name in metrics)
    return {name: float(np.mean([m[name] for m in per_site.values() if name in m])) for name in names}
